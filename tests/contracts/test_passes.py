"""Every built-in pass keeps the contract that plug-ins inherit, on the model of the example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import DataConfig
from coldpress.events import Event
from coldpress.registry import PASSES
from coldpress.testing.passes import PassCase, PassContract


@pytest.fixture
def data(tmp_path: Path) -> dict[str, DataConfig]:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f'{{"text": "line number {i} of a small file"}}\n' for i in range(16)))
    config = DataConfig.model_validate(
        {
            "name": "train",
            "load_dataset_config": {"data_name": "json", "data_files": str(file)},
            "pre_process_data_config": {"text_field": "text", "strategy": "line-by-line", "max_seq_len": 32},
        }
    )
    return {"train": config}


ARGUMENTS = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_checkpointing": False, "report_to": "none"}


def training(name: str, data: dict[str, DataConfig], model: Path, **more: Any) -> PassCase:
    made = PASSES[name]()
    config = made.Config(r=2, target_modules=["o_proj"], train_data_config="train", training_args=ARGUMENTS, **more)
    return PassCase(made, config, Artifact.load(model), data)


class TestLoRA(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("LoRA", data, phi3)


class TestDoRA(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("DoRA", data, phi3, rank_pattern={"layers.0.*": 1})


class TestLoRAFromTheBase(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("LoRA", data, phi3, init_lora_weights="pissa_niter_2", layers_to_transform=(0, 1))


class TestLoHa(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("LoHa", data, phi3, rank_dropout=0.1)


class TestLoKr(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("LoKr", data, phi3, decompose_both=True)


class TestLoftQ(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("LoftQ", data, phi3, loftq_iter=2)


class TestQLoRA(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        return training("QLoRA", data, phi3, double_quant=True)


class TestFullFinetune(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path) -> PassCase:
        made = PASSES["FullFinetune"]()
        config = made.Config(trainable_modules=("layers.5",), train_data_config="train", training_args=ARGUMENTS)
        return PassCase(made, config, Artifact.load(phi3), data)


class TestMergeAdapterWeights(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path, tmp_path: Path) -> PassCase:
        trained = training("LoRA", data, phi3)
        events: list[Event] = []
        adapter = trained.made.run(trained.config, trained.model, trained.context(tmp_path / "trained", events))
        made = PASSES["MergeAdapterWeights"]()
        return PassCase(made, made.Config(), adapter)


class TestModelBuilder(PassContract):
    @pytest.fixture
    def case(self, phi3: Path) -> PassCase:
        made = PASSES["ModelBuilder"]()
        return PassCase(made, made.Config(precision="int4"), Artifact.load(phi3))


class TestExtractAdapters(PassContract):
    @pytest.fixture
    def case(self, data: dict[str, DataConfig], phi3: Path, tmp_path: Path) -> PassCase:
        trained = training("LoRA", data, phi3)
        events: list[Event] = []
        adapter = trained.made.run(trained.config, trained.model, trained.context(tmp_path / "trained", events))
        builder = PASSES["ModelBuilder"]()
        case = PassCase(builder, builder.Config(precision="int4", adapter="inputs"), adapter)
        built = builder.run(case.config, adapter, case.context(tmp_path / "built", events))
        made = PASSES["ExtractAdapters"]()
        return PassCase(made, made.Config(), built)
