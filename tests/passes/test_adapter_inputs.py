"""Adapters and the builder: merged while it streams, or inputs that GenAI switches at run time; bad adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from coldpress.artifacts.base import Artifact, BaseQuantization
from coldpress.artifacts.tensors import TensorSet
from coldpress.config.schema import Accelerator
from coldpress.errors import CheckpointError, PlanError
from coldpress.evaluate.runners import OnnxRunner, open_runner
from coldpress.hardware import detect
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.extract_adapters import ExtractAdapters, ExtractAdaptersConfig
from coldpress.passes.merge_adapter_weights import MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig
from fakes.tiny_models import make_checkpoint
from oracles.adapters import base_in_blocks, inputs_of, make_adapter, merged_checkpoint
from oracles.passes import CPU, CUDA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PROMPT = [5, 6, 7, 8, 100, 31]
LENGTH = 20
TOLERANCE = 1e-3
"""Float32 sums in another order move these logits by 1e-5; another adapter, or none, by more than 0.1."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), family="llama", dtype="float32")


def run(made: Any, config: Any, model: Artifact, output: Path, accelerator: Accelerator = CPU) -> Artifact:
    """Plan, run, and hold the one against the other."""
    planned = made.plan(config, model.describe(), PlanContext(detect(), accelerator, {}, {}))
    output.mkdir(parents=True)
    artifact = made.run(config, model, Context("s", output, output, detect(), accelerator, {}, lambda event: None))
    assert planned.spec.mismatch(artifact.describe()) is None
    return artifact  # type: ignore[no-any-return]


def build(model: Artifact, output: Path, **options: Any) -> Artifact:
    return run(
        ModelBuilder(), ModelBuilderConfig(**{"precision": "int4", "int4_accuracy_level": 1, **options}), model, output
    )


def with_adapter(base: Path, adapter: Path, quantization: BaseQuantization | None = None) -> Artifact:
    return Artifact(adapter, "checkpoint", base, adapter=adapter, base_quantization=quantization)


def logits(model: Artifact) -> np.ndarray:
    with open_runner(model) as runner:
        return runner.logits([PROMPT])[0]


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = ir.load(folder / "model.onnx").graph.initializers
    return {name: value.const_value.numpy().copy() for name, value in found.items() if value.const_value is not None}


# Merged in the stream

MERGED: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {"targets": ["q_proj", "down_proj", "lm_head"]}),
    ("int4", {"targets": ["q_proj", "k_proj", "up_proj"]}),
    ("int8", {"targets": ["o_proj"], "use_dora": True}),
    ("fp32", {"targets": ["v_proj", "embed_tokens"], "use_dora": True}),
    ("int4", {"targets": ["gate_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("fp32", {"targets": ["q_proj"], "trainable_token_indices": [5, 100]}),
]


@pytest.mark.parametrize(("precision", "settings"), MERGED, ids=str)
def test_the_builder_merges_while_it_streams(
    precision: str, settings: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    """The same graph as from a merged checkpoint in float32, and no such checkpoint on disk."""
    adapter = make_adapter(llama, tmp_path / "adapter", **settings)
    merged = merged_checkpoint(llama, adapter, tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (merged / name).write_bytes((llama / name).read_bytes())
    options: dict[str, Any] = {"precision": precision, **({"int4_accuracy_level": None} if precision == "fp32" else {})}
    one = build(with_adapter(llama, adapter), tmp_path / "one", **options)
    two = build(Artifact.load(merged), tmp_path / "two", **options)
    assert one.adapter is None
    assert not list((tmp_path / "one").rglob("*.safetensors"))
    found, expected = tensors_of(one.path), tensors_of(two.path)
    assert found.keys() == expected.keys()
    differing = [name for name in found if not np.array_equal(found[name], expected[name])]
    for name in differing:
        # Sums in another order: the last bit of a float, and once in a while the code of a weight between two.
        if found[name].dtype == np.float32:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, atol=1e-5)
        else:
            assert (found[name] != expected[name]).mean() < 0.01, name
    assert np.abs(logits(one) - logits(two)).max() < (1e-4 if precision == "fp32" else 0.02)
    plain = build(Artifact.load(llama), tmp_path / "plain", **options)
    assert np.abs(logits(one) - logits(plain)).max() > 0.1


@pytest.mark.parametrize("adapter_option", ["merge", "inputs"])
def test_after_qlora_the_builder_takes_the_base_that_was_trained_on(
    adapter_option: str, llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj", "up_proj"])
    quantization = BaseQuantization("nf4", True, "float32")
    model = with_adapter(llama, adapter, quantization)
    direct = build(model, tmp_path / "direct", precision="fp32", int4_accuracy_level=None, adapter=adapter_option)
    by_merge = run(MergeAdapterWeights(), MergeAdapterWeightsConfig(), model, tmp_path / "merged")
    expected = logits(build(by_merge, tmp_path / "two", precision="fp32", int4_accuracy_level=None))
    assert np.abs(logits(direct) - expected).max() < 1e-4
    unquantized = replace(model, base_quantization=None)
    other = build(unquantized, tmp_path / "other", precision="fp32", int4_accuracy_level=None)
    assert np.abs(logits(other) - expected).max() > 0.05  # the base matters


def damage(what: str, adapter: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path, record = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    held = load_file(path)
    first = min(held)
    if what == "wrong rank":
        record.write_text(json.dumps({**json.loads(record.read_text()), "r": 9}))
    elif what == "wrong shape":
        save_file({**held, first: np.ascontiguousarray(np.tile(held[first], 2))}, path)
    elif what == "another model":
        save_file({name.replace("layers.1", "layers.7"): value for name, value in held.items()}, path)
    elif what == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    elif what == "not finite":
        save_file({**held, first: held[first] * np.float32("nan")}, path)


@pytest.mark.parametrize("option", ["merge", "inputs"])
@pytest.mark.parametrize("what", ["wrong rank", "wrong shape", "another model", "cut short", "not finite"])
def test_a_bad_adapter_is_refused_before_the_first_byte(what: str, option: str, llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj"])
    damage(what, adapter)
    with pytest.raises(CheckpointError, match=str(tmp_path / "adapter")):
        build(with_adapter(llama, adapter), tmp_path / "out", adapter=option)
    assert not list((tmp_path / "out").glob("model.onnx*"))
    if option == "merge":
        with pytest.raises(CheckpointError):
            run(MergeAdapterWeights(), MergeAdapterWeightsConfig(), with_adapter(llama, adapter), tmp_path / "merged")
        assert not list((tmp_path / "merged").glob("*.safetensors*"))


# Inputs


def greedy(folder: Path, files: dict[str, Path], order: list[str | None]) -> list[tuple[list[int], np.ndarray]]:
    """Tokens, and the logits after the prompt, from one GenAI model whose adapters are switched between texts."""
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    adapters = og.Adapters(model)
    for name, file in files.items():
        adapters.load(str(file), name)
    found = []
    for name in order:
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=LENGTH, do_sample=False)
        generator = og.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(np.array(PROMPT, np.int64))
        after_prompt = np.array(generator.get_logits())[0, -1]
        while not generator.is_done():
            generator.generate_next_token()
        found.append(([int(token) for token in generator.get_sequence(0)], after_prompt))
        del generator
    return found


@torch.no_grad()
def greedy_of(model: Any) -> tuple[list[int], np.ndarray]:
    ids = list(PROMPT)
    first = model(torch.tensor([ids])).logits[0, -1].numpy()
    while len(ids) < LENGTH:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 257:
            break
    return ids, first


def test_two_adapters_on_one_int4_base_in_genai(llama: Path, tmp_path: Path) -> None:
    """Each equals the dequantized base with BA beside it, in logits and text; so does the base alone, at any time."""
    import peft
    from click.testing import CliRunner

    from coldpress.cli.adapters import convert_adapters

    targets = ["q_proj", "v_proj", "down_proj"]
    built = build(
        Artifact.load(llama), tmp_path / "onnx", adapter="inputs", adapter_modules=targets, int4_block_size=32
    )
    files, expected = {}, {None: greedy_of(base_in_blocks(llama, 32, 5, embedding_bits=8))}
    for name, r, chosen, more in (("one", 3, targets, {}), ("two", 6, targets[:2], {"use_rslora": True})):
        adapter = make_adapter(llama, tmp_path / name, chosen, r=r, seed=r, **more)
        files[name] = tmp_path / f"{name}.onnx_adapter"
        arguments = ["-a", str(adapter), "-o", str(files[name]), "--model", str(built.path)]
        done = CliRunner().invoke(convert_adapters, arguments, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        dequantized = base_in_blocks(llama, 32, 5, embedding_bits=8)
        expected[name] = greedy_of(peft.PeftModel.from_pretrained(dequantized, adapter).eval())
    order = [None, "one", "two", None, "one"]
    found = greedy(built.path, files, order)
    for name, (text, after_prompt) in zip(order, found, strict=True):
        assert np.abs(after_prompt - expected[name][1]).max() < TOLERANCE, name
        assert text == expected[name][0], name
    logits_of = [after_prompt for _, after_prompt in found[:3]]
    assert min(np.abs(a - b).max() for a, b in ((logits_of[0], logits_of[1]), (logits_of[1], logits_of[2]))) > 0.1
    # Not a 4-bit form of the sum: that one is elsewhere.
    merged = merged_checkpoint(llama, tmp_path / "one", tmp_path / "merged")
    _, requantized = greedy_of(base_in_blocks(merged, 32, 5, embedding_bits=8))
    assert np.abs(requantized - expected["one"][1]).max() > 3 * TOLERANCE


def test_profiles_take_adapters_too(llama: Path, tmp_path: Path) -> None:
    """fast fuses gate and up and prunes the head: both of its graphs have the inputs."""
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj", "gate_proj", "lm_head"])
    model = with_adapter(llama, adapter)
    fast = build(model, tmp_path / "fast", adapter="inputs", precision="int8", profile="fast")
    plain = build(Artifact.load(llama), tmp_path / "plain", precision="int8", profile="fast")
    expected = logits(model)
    # 8 bits move the logits by 0.03 on average; the adapter by ten times as much.
    assert np.abs(logits(fast) - expected).mean() < 0.06
    assert np.abs(logits(plain) - expected).mean() > 0.3
    names = [{value.name for value in ir.load(file).graph.inputs} for file in sorted(fast.path.glob("*.onnx"))]
    assert len(names) == 2
    assert names[0] == names[1]


@pytest.mark.parametrize("save_format", ["onnx_adapter", "safetensors", "numpy"])
def test_builder_and_extract_adapters(save_format: Any, llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj", "gate_proj"])
    model = with_adapter(llama, adapter)
    built = build(model, tmp_path / "built", adapter="inputs", precision="fp32", int4_accuracy_level=None)
    # The builder's result is compared with base and adapter, so it runs with the adapter on.
    assert np.abs(logits(built) - logits(model)).max() < TOLERANCE
    assert ModelBuilder().limits(ModelBuilderConfig(precision="fp32", adapter="inputs"), model.describe()) is not None
    made = run(ExtractAdapters(), ExtractAdaptersConfig(save_format=save_format), built, tmp_path / "made")
    names = {file.name for file in built.path.iterdir()}
    ending = {"onnx_adapter": ".onnx_adapter", "safetensors": ".safetensors", "numpy": ".npz"}[save_format]
    assert {file.name for file in made.path.iterdir()} == {*names, f"adapter_weights{ending}"}
    assert np.array_equal(logits(made), logits(built))
    if save_format == "onnx_adapter":
        assert not OnnxRunner(made.model, adapter=made.adapter)._lora  # the file is what ran
    else:
        expected = inputs_of(adapter)
        file = made.path / f"adapter_weights{ending}"
        if save_format == "numpy":
            found = dict(np.load(file))
        else:
            with TensorSet.open(file) as held:
                found = {info.name: held.read(info.name) for info in held.infos()}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6)


def test_a_corrupt_adapter_file_is_seen(llama: Path, tmp_path: Path) -> None:
    """The twin: the proof after ExtractAdapters would fail for one wrong number, and for a torn file."""
    from coldpress.artifacts.adapter_inputs import write_inputs

    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj"])
    built = build(with_adapter(llama, adapter), tmp_path / "built", adapter="inputs")
    made = run(ExtractAdapters(), ExtractAdaptersConfig(), built, tmp_path / "made")
    right = logits(built)
    assert np.array_equal(logits(made), right)
    inputs = {name: value.astype(np.float32) for name, value in inputs_of(adapter).items()}
    inputs[min(inputs)][3, 1] += 0.5
    file = write_inputs(made.path / "adapter_weights", inputs)
    assert np.abs(logits(made) - right).max() > TOLERANCE
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="adapter_weights"):
        logits(made)


def test_every_name_of_olives_pass_is_honoured_or_refused(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj"])
    env = PlanContext(detect(), Accelerator(), {}, {})
    checkpoint = with_adapter(llama, adapter).describe()
    onnx = ModelBuilder().plan(ModelBuilderConfig(precision="int4", adapter="inputs"), checkpoint, env).spec

    def refused(match: str, spec: Any = onnx, **options: Any) -> None:
        with pytest.raises(PlanError, match=match):
            ExtractAdapters().plan(ExtractAdaptersConfig(**options), spec, env)

    assert ExtractAdapters().plan(ExtractAdaptersConfig(), onnx, env).spec == onnx
    refused("make_inputs: false is not built", make_inputs=False)
    refused("dynamic_lora_r: false", dynamic_lora_r=False)
    refused("optional_inputs: false", optional_inputs=False)
    refused("adapter_type dora cannot be an input", adapter_type="dora")
    refused("put ModelBuilder with adapter: inputs before it", checkpoint)
    merged = ModelBuilder().plan(ModelBuilderConfig(precision="int4"), checkpoint, env).spec
    refused("the model has no LoRA inputs; say adapter: inputs", merged)


MORE_THAN_LORA: list[dict[str, Any]] = [
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"trainable_token_indices": [3]},
]


@pytest.mark.parametrize("settings", MORE_THAN_LORA, ids=str)
def test_what_cannot_be_an_input_is_said_before_the_first_byte(
    settings: dict[str, Any], llama: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj"], **settings)
    with pytest.raises(
        PlanError, match=r"more than LoRA on linear layers: (DoRA|weights trained whole|trained tokens)"
    ):
        build(with_adapter(llama, adapter), tmp_path / "out", adapter="inputs")
    assert not list((tmp_path / "out").glob("model.onnx*"))


def test_an_adapter_wider_than_adapter_modules_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj", "up_proj"])
    with pytest.raises(CheckpointError, match="changes up_proj, for which the graph has no inputs"):
        build(with_adapter(llama, adapter), tmp_path / "out", adapter="inputs", adapter_modules=["q_proj"])


@pytest.fixture
def convert() -> Callable[..., str]:
    from click.testing import CliRunner

    from coldpress.cli.adapters import convert_adapters

    def call(*arguments: Any) -> str:
        return CliRunner().invoke(convert_adapters, [str(one) for one in arguments], catch_exceptions=False).output

    return call


def test_convert_adapters_in_olives_spelling(llama: Path, tmp_path: Path, convert: Callable[..., str]) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", ["q_proj"], r=3)
    said = convert("--adapter_path", adapter, "--output_path", tmp_path / "x" / "one", "--adapter_format", "numpy",
                   "--dtype", "float16")  # fmt: skip
    assert "one.npz: 2 modules, rank 3, float16" in said
    found = dict(np.load(tmp_path / "x" / "one.npz"))
    for name, value in inputs_of(adapter).items():
        assert found[name].dtype == np.float16
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)


def test_convert_adapters_refuses_what_does_not_fit(llama: Path, tmp_path: Path, convert: Callable[..., str]) -> None:
    from coldpress.errors import UsageError

    built = build(Artifact.load(llama), tmp_path / "onnx", adapter="inputs", adapter_modules=["q_proj"])
    plain = build(Artifact.load(llama), tmp_path / "plain")
    wide = make_adapter(llama, tmp_path / "wide", ["q_proj", "o_proj"])
    fits = make_adapter(llama, tmp_path / "fits", ["q_proj"])
    target = tmp_path / "made"
    with pytest.raises(CheckpointError, match=r"o_proj\.lora_A\.weight is no input of the graph"):
        convert("-a", wide, "-o", target, "-m", built.path)
    with pytest.raises(CheckpointError, match="has no LoRA inputs"):
        convert("-a", fits, "-o", target, "-m", plain.path)
    with pytest.raises(UsageError, match=r"--dtype is float16, and the inputs of .* are float32"):
        convert("-a", fits, "-o", target, "-m", built.path, "--dtype", "float16")
    with pytest.raises(UsageError, match="not quantized"):
        convert("-a", fits, "-o", target, "--quantize_int4")
    assert not target.with_name("made.onnx_adapter").exists()
    with pytest.raises(CheckpointError, match="onnx is no adapter folder") as error:
        convert("-a", tmp_path / "onnx", "-o", target)
    assert "the output folder of a fine-tuning" in str(error.value.hint)
    assert "2 modules" in convert("-a", fits, "-o", target, "-m", built.path)


def test_convert_adapters_takes_output_folders(llama: Path, tmp_path: Path, convert: Callable[..., str]) -> None:
    """The adapter of a run lies in OUTPUT/model/adapter."""
    make_adapter(llama, tmp_path / "output" / "model" / "adapter", ["q_proj"])
    for given in ("output", "output/model", "output/model/adapter"):
        assert "2 modules" in convert("-a", tmp_path / given, "-o", tmp_path / "made")


def test_generation_takes_the_models_own_adapter_or_a_file(
    llama: Path, tmp_path: Path, convert: Callable[..., str]
) -> None:
    from coldpress.chat import Sampling, open_generator
    from coldpress.errors import UsageError

    first, second = (make_adapter(llama, tmp_path / f"a{seed}", ["q_proj"], seed=seed) for seed in (1, 2))
    built = build(with_adapter(llama, first), tmp_path / "built", adapter="inputs")
    made = run(ExtractAdapters(), ExtractAdaptersConfig(), built, tmp_path / "made")
    for artifact in (built, made):
        artifact.save()
    base = build(Artifact.load(llama), tmp_path / "base")
    convert("-a", second, "-o", tmp_path / "second", "-m", made.path)

    def text(path: Path, **options: Any) -> str:
        return "".join(open_generator(path, **options).stream("ab", Sampling(12)))

    own, other, plain = text(made.path), text(made.path, adapter=tmp_path / "second.onnx_adapter"), text(base.path)
    assert len({own, other, plain}) == 3
    assert text(built.path) == own
    with pytest.raises(UsageError, match="is a checkpoint"):
        text(llama, adapter=tmp_path / "second.onnx_adapter")
    with pytest.raises(CheckpointError, match="has no LoRA inputs"):
        text(base.path, adapter=tmp_path / "second.onnx_adapter")
    (tmp_path / "torn.onnx_adapter").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match=r"torn\.onnx_adapter cannot be read"):
        text(made.path, adapter=tmp_path / "torn.onnx_adapter")


def test_targets_given_as_a_regular_expression(llama: Path, tmp_path: Path) -> None:
    adapter = make_adapter(llama, tmp_path / "adapter", r".*layers\.1\.self_attn\.(q|o)_proj")  # type: ignore[arg-type]
    found = with_adapter(llama, adapter).describe().adapter
    assert found is not None
    assert found.target_modules == ("o_proj", "q_proj")


@pytest.mark.parametrize("name", ["gptq-4-order", "awq-16", "fp8-blocks"])
def test_on_a_quantized_checkpoint(name: str, tmp_path: Path) -> None:
    """The adapter is added to what the codes stand for; as an input it leaves the codes as they are, in any order."""
    import peft
    from transformers import AutoModelForCausalLM

    from oracles.stored import CASES, quantize_folder

    case = CASES[name]
    plain = make_checkpoint(tmp_path / "plain", family="llama", dtype="float32")
    values = quantize_folder(plain, tmp_path / "stored", case)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "stored" / file).write_bytes((plain / file).read_bytes())
    adapter = make_adapter(plain, tmp_path / "adapter", ["q_proj", "down_proj"])
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for layer, array in values.items():
        model.get_parameter(layer).data.copy_(torch.tensor(array, dtype=torch.float32))
    adapted = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        expected = adapted(torch.tensor([PROMPT])).logits[0].numpy()
    given = with_adapter(tmp_path / "stored", adapter)
    options: dict[str, Any] = {"precision": "fp32", "int4_accuracy_level": None}
    if not name.startswith("fp8"):  # the others' codes are taken as they are
        options = {"int4_op_types_to_quantize": ["MatMul"], "int4_nodes_to_exclude": ["/lm_head/MatMul"]}
    built = build(given, tmp_path / "built", adapter="inputs", **options)
    assert np.abs(logits(built) - expected).max() < TOLERANCE
    merged = run(MergeAdapterWeights(), MergeAdapterWeightsConfig(), given, tmp_path / "merged")
    reference = adapted.merge_and_unload().state_dict()
    with TensorSet.open(merged.model) as tensors:
        for info in tensors.infos():
            np.testing.assert_allclose(tensors.read(info.name), reference[info.name].numpy(), atol=1e-5)
    direct = build(given, tmp_path / "direct", precision="fp32", int4_accuracy_level=None)
    assert np.abs(logits(direct) - expected).max() < TOLERANCE


def test_the_example_of_the_docs(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    convert: Callable[..., str],
) -> None:  # fmt: skip
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    french, german = (make_adapter(llama, tmp_path / f"a{seed}", ["q_proj"], seed=seed) for seed in (1, 2))
    built = build(with_adapter(llama, french), tmp_path / "built", adapter="inputs")
    run(ExtractAdapters(), ExtractAdaptersConfig(), built, tmp_path / "french-and-more" / "model")
    convert("-a", german, "-o", tmp_path / "german.onnx_adapter", "--model", tmp_path / "built")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/adapters.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["french", "german", "None"]
    assert len({line.split(maxsplit=1)[1] for line in lines}) == 3


@pytest.mark.parametrize(
    ("options", "dtype"),
    [({"precision": "int4"}, "float16"), ({"precision": "fp16"}, "float16"), ({"precision": "bf16"}, "bfloat16")],
)
def test_on_cuda_inputs_and_file_have_the_type_of_the_graph(
    options: dict[str, Any], dtype: str, llama: Path, tmp_path: Path
) -> None:
    """Structure only: there may be no GPU here."""
    import onnx

    from coldpress.artifacts.adapter_inputs import read_adapter_file
    from coldpress.graph.lora import inputs_of

    adapter = make_adapter(llama, tmp_path / "adapter", ["v_proj", "gate_proj"], r=3)
    config = ModelBuilderConfig(adapter="inputs", **options)
    built = run(ModelBuilder(), config, with_adapter(llama, adapter), tmp_path / "built", CUDA)
    wanted = inputs_of(built.model)
    assert {name for name, _ in wanted.values()} == {dtype}
    made = run(ExtractAdapters(), ExtractAdaptersConfig(), built, tmp_path / "made", CUDA)
    held = read_adapter_file(made.path / "adapter_weights.onnx_adapter")
    assert held["model.layers.1.self_attn.v_proj.lora_A.weight"] == (dtype, (64, 3))
    assert len(held) == 8
    model = onnx.load(made.path / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":  # ONNX Runtime's own, in the standard domain
            node.domain = "com.microsoft"
    onnx.checker.check_model(model, full_check=True)
