"""LoRA and QLoRA as passes: what is planned is what comes out, and what cannot work is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.tensors import TensorSet
from coldpress.config.schema import Accelerator
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import CheckpointError, MissingExtraError, PlanError
from coldpress.events import Event, Message
from coldpress.hardware import Gpu
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.lora import LoRA, LoRAConfig
from coldpress.passes.quantized_lora import QLoRA, QLoRAConfig

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 1, "logging_steps": 1}


def lora(**values: Any) -> LoRAConfig:
    return LoRAConfig(**{"train_data_config": "lines", "r": 4, "alpha": 8, "training_args": ARGUMENTS, **values})


def qlora(**values: Any) -> QLoRAConfig:
    return QLoRAConfig(**{"train_data_config": "lines", "r": 4, "alpha": 8, "training_args": ARGUMENTS, **values})


def texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Message)]


def test_what_is_planned_comes_out(
    tiny_phi3: Path, context: Callable[[str], Context], plan_context: PlanContext, events: list[Event]
) -> None:
    base = Artifact.load(tiny_phi3)
    config = lora(eval_dataset_size=0.25)
    planned = LoRA().plan(config, base.describe(), plan_context)
    made = LoRA().run(config, base, context("lora"))
    assert planned.spec.mismatch(made.describe()) is None
    assert planned.spec.adapter is not None
    assert planned.spec.adapter.target_modules == ("o_proj", "qkv_proj"), "the default of phi3"
    assert made.model == base.model
    assert made.adapter is not None
    with TensorSet.open(made.adapter / "adapter_model.safetensors") as adapter:
        infos = list(adapter.infos())
        assert {info.dtype for info in infos} == {"float32"}
        name = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_B.weight"
        assert adapter.read(name).any(), "it was trained"
    assert Tokenizer.load(made.tokenizer_path).ids("a") == Tokenizer.load(tiny_phi3).ids("a")
    record = json.loads((made.adapter / "training.json").read_text())
    assert record["steps"] == len(record["losses"]) == 3
    said = texts(events)
    assert "trains on 18 sequences" in " ".join(said)
    assert "computes in" in " ".join(said)


def test_the_same_seed_gives_the_same_adapter(tiny_phi3: Path, context: Callable[[str], Context]) -> None:
    import torch

    base = Artifact.load(tiny_phi3)
    files = []
    for step in ("one", "two"):
        torch.rand(7)  # the state of the process must not matter
        made = LoRA().run(lora(), base, context(step))
        assert made.adapter is not None
        files.append((made.adapter / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_modules_to_save_and_a_pattern(
    tiny_phi3: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    base = Artifact.load(tiny_phi3)
    config = lora(target_modules=r".*layers\.1\..*_proj", modules_to_save=("lm_head",))
    planned = LoRA().plan(config, base.describe(), plan_context)
    made = LoRA().run(config, base, context("lora"))
    assert planned.spec.adapter is not None
    assert set(planned.spec.adapter.target_modules) == {"down_proj", "gate_up_proj", "o_proj", "qkv_proj"}
    assert made.adapter is not None
    with TensorSet.open(made.adapter / "adapter_model.safetensors") as adapter:
        names = [info.name for info in adapter.infos()]
    assert "base_model.model.lm_head.weight" in names
    assert {name.split(".layers.")[1][0] for name in names if ".layers." in name} == {"1"}


def test_qlora_trains_on_four_bits_with_double_quantization(
    tiny_phi3: Path, context: Callable[[str], Context], plan_context: PlanContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    import coldpress.nn.train
    from coldpress.nn.loading import four_bit_layers

    seen: list[Any] = []
    whole = coldpress.nn.train.train

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        layers = four_bit_layers(model)
        before = {name: layer.weight.data.clone() for name, layer in layers.items()}
        report = whole(model, *args, **kwargs)
        seen.extend((name, layer, before[name]) for name, layer in layers.items())
        return report

    monkeypatch.setattr(coldpress.nn.train, "train", watched)
    config = qlora(
        double_quant=True,
        target_modules="all-linear",
        eval_dataset_size=0.25,
        training_args={**ARGUMENTS, "eval_strategy": "steps", "eval_steps": 1, "optim": "paged_adamw_32bit"},
    )
    base = Artifact.load(tiny_phi3)
    planned = QLoRA().plan(config, base.describe(), plan_context)
    assert any("paged_adamw_32bit needs an NVIDIA GPU; on the CPU adamw_torch" in note for note in planned.notes)
    made = QLoRA().run(config, base, context("qlora"))
    assert planned.spec.mismatch(made.describe()) is None
    assert made.base_quantization is not None
    assert (made.base_quantization.quant_type, made.base_quantization.double_quant) == ("nf4", True)
    assert len(seen) == 6, "down_proj, 96 wide, has no whole blocks of 64"
    assert any("2 of 8 linear layers stay unquantized" in note for note in planned.notes)
    for name, layer, before in seen:
        state = layer.weight.quant_state
        assert state.nested, name
        assert state.quant_type == "nf4"
        assert layer.weight.dtype == before.dtype
        assert layer.weight.data.equal(before), f"{name} was repacked, although it was evaluated in between"
    record = json.loads((made.adapter / "training.json").read_text())  # type: ignore[operator]
    assert sum("eval_loss" in point for point in record["log"]) == 3


def test_save_quant_config_off(tiny_phi3: Path, plan_context: PlanContext) -> None:
    spec = Artifact.load(tiny_phi3).describe()
    assert QLoRA().plan(qlora(save_quant_config=False), spec, plan_context).spec.base_quantization is None
    with pytest.raises(PlanError, match="compute_dtype float32 differs from torch_dtype bfloat16"):
        QLoRA().plan(qlora(compute_dtype="float32"), spec, plan_context)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"target_modules": ("qkv_prj",)}, r"qkv_prj \(did you mean qkv_proj\?\)"),
        ({"modules_to_save": ("head",)}, "modules_to_save names modules"),
        ({"torch_dtype": "float16"}, "trains on GPUs only"),
        ({"eval_dataset_size": 0.1, "eval_data_config": "stream"}, "exclude each other"),
        ({"training_args": {"eval_strategy": "steps"}}, "needs data to evaluate on"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"train_data_config": "streams"}, "there is no data config called 'streams'"),
    ],
)
def test_refusals(tiny_phi3: Path, plan_context: PlanContext, values: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        LoRA().plan(lora(**values), Artifact.load(tiny_phi3).describe(), plan_context)


def test_a_size_that_is_none_is_named(tiny_phi3: Path, plan_context: PlanContext) -> None:
    spec = Artifact.load(tiny_phi3).describe()
    broken = dataclasses.replace(spec, config={**spec.config, "num_hidden_layers": "six"})
    with pytest.raises(
        CheckpointError, match=r"config\.json of the model: num_hidden_layers is 'six', must be a whole"
    ):
        LoRA().plan(lora(), broken, plan_context)


def test_optimizers_of_bitsandbytes(
    tiny_phi3: Path, context: Callable[[str], Context], plan_context: PlanContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    base = Artifact.load(tiny_phi3)
    config = lora(training_args={**ARGUMENTS, "optim": "adamw_bnb_8bit"})
    assert LoRA().run(config, base, context("lora")).adapter is not None
    paged = lora(training_args={**ARGUMENTS, "optim": "paged_lion_32bit"})
    notes = LoRA().plan(paged, base.describe(), plan_context).notes
    assert any("paged_lion_32bit needs an NVIDIA GPU; on the CPU lion_32bit" in note for note in notes)
    versions = {**dict.fromkeys(LoRA.libraries, "1"), "bitsandbytes": None}
    monkeypatch.setattr(
        "coldpress.passes.fine_tuning.library_versions", lambda names: {name: versions[name] for name in names}
    )
    with pytest.raises(MissingExtraError, match="optim adamw_bnb_8bit needs bitsandbytes, not installed"):
        LoRA().plan(config, base.describe(), plan_context)


def test_more_refusals(tiny_phi3: Path, plan_context: PlanContext) -> None:
    spec = Artifact.load(tiny_phi3).describe()
    gpu = dataclasses.replace(
        plan_context,
        accelerator=Accelerator(device="gpu", execution_providers=("CUDAExecutionProvider",)),
        hardware=dataclasses.replace(plan_context.hardware, gpus=()),
    )
    with pytest.raises(PlanError, match="asks for a GPU to train on"):
        LoRA().plan(lora(), spec, gpu)
    there = dataclasses.replace(gpu, hardware=dataclasses.replace(gpu.hardware, gpus=(Gpu("a", 8 << 30),)))
    assert LoRA().plan(lora(), spec, there).estimate.vram > 0


def test_notes_and_estimates(tiny_phi3: Path, plan_context: PlanContext) -> None:
    spec = Artifact.load(tiny_phi3).describe()
    plan_context = dataclasses.replace(plan_context, data_bytes={"stream": 1 << 20})
    planned = LoRA().plan(lora(train_data_config="stream"), spec, plan_context)
    assert any("max_seq_len 2048 is beyond the model's context of 128" in note for note in planned.notes)
    assert planned.estimate.ram > planned.estimate.disk > 0
    larger = LoRA().plan(
        lora(train_data_config="stream", training_args={**ARGUMENTS, "per_device_train_batch_size": 64}),
        spec,
        plan_context,
    )
    assert larger.estimate.ram > planned.estimate.ram
    saved = {"per_device_train_batch_size": 64, "gradient_checkpointing": True}
    less = LoRA().plan(lora(train_data_config="stream", training_args={**ARGUMENTS, **saved}), spec, plan_context)
    assert less.estimate.ram < larger.estimate.ram


def test_gradient_checkpointing_and_float32(tiny_phi3: Path, context: Callable[[str], Context]) -> None:
    base = Artifact.load(tiny_phi3)
    losses = []
    for step, more in (("plain", {}), ("saving", {"gradient_checkpointing": True})):
        config = lora(torch_dtype="float32", lora_dropout=0.0, training_args={**ARGUMENTS, **more})
        made = LoRA().run(config, base, context(step))
        assert made.adapter is not None
        losses.append(json.loads((made.adapter / "training.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5), "what is computed twice is computed alike"


def test_planning_imports_no_torch(tiny_phi3: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from coldpress.artifacts.base import Artifact\nfrom coldpress.config.schema import *\n"
        "from coldpress.hardware import detect\nfrom coldpress.passes.base import PlanContext\n"
        "from coldpress.passes.quantized_lora import QLoRA, QLoRAConfig\n"
        "data = DataConfig(name='d', load_dataset_config=LoadDataset(data_name='json', data_files='x'))\n"
        f"spec = Artifact.load(Path({str(tiny_phi3)!r})).describe()\n"
        "QLoRA().plan(QLoRAConfig(train_data_config=data), spec, PlanContext(detect(), Accelerator(), {}, {}))\n"
        "assert not {'torch', 'transformers', 'datasets', 'peft', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
