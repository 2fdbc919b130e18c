"""ModelBuilder with a graph of its own for prompts: what is written, what GenAI makes of it, what a proof sees."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from coldpress.errors import CheckpointError, PlanError
from coldpress.evaluate.runners import OnnxRunner
from coldpress.graph.form import HEAD
from coldpress.kernels.quantize import quantize_rows
from oracles.decoders import Stepper, tiny_model
from oracles.passes import CUDA, TOKENIZER, build_with_pass, plan_with_pass

OPTIONS: dict[str, Any] = {"precision": "int4", "prompt_graph": "int8", "int4_block_size": 16}
PROMPT = [int(token) for token in np.random.default_rng(0).integers(3, 80, 21)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    tiny_model("llama-gqa", folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


@pytest.fixture(scope="module")
def built(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def get(**options: Any) -> Path:
        key = json.dumps(options)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("built")
            build_with_pass(checkpoint, made[key], **OPTIONS, **options)
        return made[key]

    return get


def graph(folder: Path, name: str) -> ir.Graph:
    return ir.load(folder / name).graph


def kinds(folder: Path, name: str) -> dict[str | None, str]:
    return {node.name: node.op_type for node in graph(folder, name)}


class Steps(Stepper):
    """A prompt through one file of a folder; then `switch` goes on with another and the same cache."""

    def __init__(self, folder: Path, file: str) -> None:
        self.folder = folder
        super().__init__(folder)
        self.switch(file)

    def switch(self, file: str) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(self.folder / file, providers=["CPUExecutionProvider"])


def by_hand(folder: Path, prompt: Sequence[int], after: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the prompt's tokens and of those after it, the second graph taking over."""
    step = Steps(folder, "model_prompt.onnx")
    first = step(np.array([prompt]))
    step.switch("model.onnx")
    return first[0], np.concatenate([step(np.array([[token]])) for token in after], axis=1)[0]


def test_what_is_written(built: Callable[..., Path]) -> None:
    folder = built()
    first, second = kinds(folder, "model.onnx"), kinds(folder, "model_prompt.onnx")
    body = [name for name, kind in first.items() if kind == "MatMulNBits" and name != HEAD]
    assert {second[name] for name in body} == {"QGemm"}
    assert second[HEAD] == "MatMulNBits"
    assert "QGemm" not in first.values()
    one, other = graph(folder, "model.onnx"), graph(folder, "model_prompt.onnx")
    assert [value.name for value in one.inputs] == [value.name for value in other.inputs]
    assert [value.name for value in one.outputs] == [value.name for value in other.outputs]
    # What both need lies in the file once.
    for name in set(one.initializers) & set(other.initializers):
        tensors = [each.initializers[name].const_value for each in (one, other)]
        if isinstance(tensors[0], ir.ExternalTensor):
            assert tensors[0].offset == tensors[1].offset  # type: ignore[union-attr]
    assert ir.load(folder / "model.onnx").metadata_props["coldpress.minimum_onnxruntime"] == "1.23"
    assert ir.load(folder / "model_prompt.onnx").metadata_props["coldpress.minimum_onnxruntime"] == "1.25"
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert {name: stage["filename"] for name, stage in decoder["pipeline"][0].items()} == {
        "prompt": "model_prompt.onnx", "decode": "model.onnx",
    }  # fmt: skip
    assert decoder["pipeline"][0]["prompt"]["inputs"] == [value.name for value in one.inputs]
    assert decoder["pipeline"][0]["decode"]["outputs"] == [value.name for value in one.outputs]


def test_the_plan_says_what_it_takes(checkpoint: Path) -> None:
    plain = plan_with_pass(checkpoint, precision="int4")
    planned = plan_with_pass(checkpoint, precision="int4", prompt_graph="int8")
    # 2 layers: qkv 64 x 128, o 64 x 64, gate, up and down 64 x 128 (bytes), and a float32 for each output.
    from coldpress.artifacts.arch_config import arch_from_config
    from coldpress.graph.form import products

    arch = arch_from_config(json.loads((checkpoint / "config.json").read_text()))
    more = sum(linear.n * linear.k + 4 * linear.n for name, linear in products(arch) if name != HEAD)
    assert planned.estimate.disk - plain.estimate.disk == more
    assert any("a second graph for prompts" in note and "VNNI or AMX" in note for note in planned.notes)


def test_it_is_for_the_cpu(checkpoint: Path) -> None:
    with pytest.raises(PlanError, match="prompt_graph is for the CPU"):
        plan_with_pass(checkpoint, CUDA, precision="int4", prompt_graph="int8")


def greedy(folder: Path, count: int, prompts: Sequence[Sequence[int]], **search: Any) -> tuple[Any, list[np.ndarray]]:
    """Sequences that GenAI continues, and the last logits of the prompt and of each step."""
    og = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    length = len(prompts[0]) + count
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts), **search)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, np.int32))
    seen = [np.array(generator.get_output("logits"))[:, -1]]
    generator.generate_next_token()  # picks from the prompt's logits; each later call runs the model first
    for _ in range(count - 1):
        generator.generate_next_token()
        seen.append(np.array(generator.get_output("logits"))[:, -1])
    return [[int(token) for token in generator.get_sequence(row)] for row in range(len(prompts))], seen


@pytest.mark.parametrize("shared_buffer", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_genai_runs_one_graph_after_the_other(pruned: bool, shared_buffer: bool, built: Callable[..., Path]) -> None:
    folder = built(prune_lm_head=pruned)
    (sequence,), seen = greedy(folder, 6, [PROMPT], past_present_share_buffer=shared_buffer)
    first, after = by_hand(folder, PROMPT, sequence[len(PROMPT) :])
    # 1e-3: sums in another order. From 3 on: GenAI forbids the end of the text, which is token 2, below min_length.
    np.testing.assert_allclose(seen[0][0], first[-1], atol=1e-3)
    for number, logits in enumerate(seen[1:]):
        np.testing.assert_allclose(logits[0, 3:], after[number, 3:], atol=1e-3)
    # The twin: the graph that generates says something else of the prompt.
    alone = Steps(folder, "model.onnx")(np.array([PROMPT]))[0]
    assert np.abs(seen[0][0] - alone[-1]).max() > 0.05


def test_genai_runs_it_for_a_batch(built: Callable[..., Path]) -> None:
    folder = built(prune_lm_head=True)
    prompts = [PROMPT, PROMPT[::-1]]
    sequences, seen = greedy(folder, 4, prompts)
    for row, prompt in enumerate(prompts):
        first, _ = by_hand(folder, prompt, sequences[row][len(prompt) :])
        np.testing.assert_allclose(seen[0][row], first[-1], atol=1e-3)


def test_a_proof_asks_both_graphs(built: Callable[..., Path]) -> None:
    for pruned in (True, False):
        folder = built(prune_lm_head=pruned)
        runner = OnnxRunner(folder, threads=1)
        whole, short = runner.logits([PROMPT, PROMPT[:1]])
        assert (whole.shape, short.shape) == ((21, 80), (1, 80))
        step = Steps(folder, "model_prompt_all_logits.onnx" if pruned else "model_prompt.onnx")
        np.testing.assert_allclose(whole[:6], step(np.array([PROMPT[:6]]))[0], atol=1e-5)
        step.switch("model_all_logits.onnx" if pruned else "model.onnx")
        np.testing.assert_allclose(whole[6:], step(np.array([PROMPT[6:]]))[0], atol=1e-5)
        runner.close()


@pytest.mark.parametrize("part", ["int8", "Q4"])
def test_a_proof_finds_damage_in_either(part: str, checkpoint: Path, tmp_path: Path) -> None:
    build_with_pass(checkpoint, tmp_path, **OPTIONS, prune_lm_head=True)
    sound = OnnxRunner(tmp_path, threads=1).logits([PROMPT])[0]
    file = "model_prompt.onnx" if part == "int8" else "model.onnx"
    tensor = graph(tmp_path, file).initializers[f"model.layers.0.mlp.up_proj.MatMul.weight_{part}"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with (tmp_path / "model.onnx.data").open("r+b") as data:
        data.seek(tensor.offset or 0)
        data.write(bytes(tensor.nbytes))
    moved = np.abs(OnnxRunner(tmp_path, threads=1).logits([PROMPT])[0] - sound).max(axis=1)
    assert moved[6:].min() > 0.01  # what is generated depends on the cache that the prompt left
    assert (moved[:6].min() > 0.01) == (part == "int8")


def test_a_missing_graph_is_said(checkpoint: Path, tmp_path: Path) -> None:
    build_with_pass(checkpoint, tmp_path, **OPTIONS)
    (tmp_path / "model_prompt.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"model_prompt\.onnx"):
        OnnxRunner(tmp_path, threads=1).logits([PROMPT])


def test_the_weights_are_those_of_the_checkpoint(checkpoint: Path, built: Callable[..., Path]) -> None:
    import torch
    from safetensors.torch import load_file

    stored = load_file(checkpoint / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    codes, scales = quantize_rows(stored.to(torch.float32).numpy())
    values = graph(built(), "model_prompt.onnx").initializers
    name = "model.layers.1.attn.o_proj.MatMul.weight_int8"
    np.testing.assert_array_equal(values[name].const_value.numpy(), codes)  # type: ignore[union-attr]
    np.testing.assert_array_equal(values[f"{name}_scales"].const_value.numpy(), scales)  # type: ignore[union-attr]


def test_longrope_is_refused(tmp_path: Path) -> None:
    # GenAI recomputes the cache at the end of the original context for phi3, and not for a pipeline.
    tiny_model("phi3-longrope", tmp_path)
    with pytest.raises(PlanError, match="computes the cache of a longrope model anew"):
        plan_with_pass(tmp_path, precision="int4", prompt_graph="int8")
