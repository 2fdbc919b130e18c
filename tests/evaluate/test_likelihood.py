"""Label likelihood against scoring every label in full, and the cases that a shortcut gets wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.templates import encode, render
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.answers import read_answers
from coldpress.evaluate.predictions import Predictions, by_likelihood
from coldpress.evaluate.runners import LayerwiseRunner, OnnxRunner, TorchRunner
from fakes.models_built import build_fp32

Logits = Callable[[Sequence[int]], Any]


class FakeRunner:
    """Logits from a function of the sequence; counts what it was asked."""

    vocab_size = 260
    context_length: int | None = None

    def __init__(self, score: Logits) -> None:
        self.score = score
        self.asked = 0

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Any]:
        self.asked += len(batch)
        return [np.asarray(self.score(ids), np.float32) for ids in batch]


class FakeContinuing(FakeRunner):
    """The same, going on from prompts that it was given once."""

    continues = True
    in_batches = True

    def side_by_side(self, lengths: Sequence[int], shared: int) -> bool:
        return self.in_batches

    def start(self, prompts: Sequence[Sequence[int]], *, shared: int = 0) -> tuple[Any, Any]:
        assert len({tuple(one[:shared]) for one in prompts}) == 1
        return prompts, np.stack([one[-1] for one in self.logits(prompts)])

    def following(self, state: Any, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Any]:
        whole = self.logits([[*state[row], *one] for row, one in zip(rows, tokens, strict=True)])
        return [one[len(state[row]) :] for row, one in zip(rows, whole, strict=True)]


def config(tmp_path: Path, rows: list[tuple[str, str]], **pre: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"phrase": phrase, "tone": tone}) + "\n" for phrase, tone in rows))
    return DataConfig(
        name="rows",
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**{"text_template": "{phrase}={tone}", "label_col": "tone", **pre}),
    )


def ask(runner: Any, tokenizer: Tokenizer, data: DataConfig, **options: Any) -> Predictions:
    return by_likelihood(runner, tokenizer, read_answers(data, tokenizer), **options)


def in_full(runner: Any, tokenizer: Tokenizer, data: DataConfig, phrase: str, labels: list[str]) -> list[float]:
    """ln p of every label's text from the answer on, one by one, in float64."""
    pre = data.pre_process_data_config
    scores = []
    for label in labels:
        (one,) = encode([render({"phrase": phrase, "tone": label}, pre, tokenizer)], pre, tokenizer)
        logits = runner.logits([one.ids])[0].astype(np.float64)
        assert one.answer_start is not None
        total = 0.0
        for place in range(one.answer_start, len(one.ids)):
            row = logits[place - 1]
            total += row[one.ids[place]] - math.log(np.exp(row - row.max()).sum()) - row.max()
        scores.append(total)
    return scores


LABELS = ["jo", "joy", "joyful", "sad", "x"]
ROWS = [(f"phrase {number} {'abcdefg'[number % 7] * number}", LABELS[number % 5]) for number in range(20)]


@pytest.mark.parametrize("kind", ["torch", "layerwise", "onnx"])
def test_equals_scoring_in_full(kind: str, tiny_phi3: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    make: Any = {
        "torch": lambda: TorchRunner(tiny_phi3),
        "layerwise": lambda: LayerwiseRunner(tiny_phi3),
        "onnx": lambda: OnnxRunner(build_fp32(tiny_phi3, tmp_path / "onnx").model),
    }
    data = config(tmp_path, ROWS)
    runner = make[kind]()
    found = ask(runner, tokenizer, data, batch_size=3, complete=True)
    expected = np.array([in_full(TorchRunner(tiny_phi3), tokenizer, data, phrase, LABELS) for phrase, _ in ROWS])
    assert found.predicted == tuple(LABELS[place] for place in expected.argmax(axis=1))
    assert len(set(found.predicted)) > 1, "a test of one answer proves little"
    assert found.scores is not None
    # No token is common to all labels, so nothing is left out of the scores. 1e-3: float32 in another order.
    np.testing.assert_allclose(found.scores, expected, atol=1e-3)
    assert ask(runner, tokenizer, data, batch_size=7).predicted == found.predicted


def test_scores_leave_out_what_all_labels_share(tiny_phi3: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = config(tmp_path, [("a", "joy"), ("bb", "jam"), ("ccc", "jolly")])
    runner = TorchRunner(tiny_phi3)
    found = ask(runner, tokenizer, data, complete=True)
    labels = ["jam", "jolly", "joy"]
    expected = np.array([in_full(runner, tokenizer, data, phrase, labels) for phrase in ("a", "bb", "ccc")])
    assert found.scores is not None
    moved = expected - found.scores
    np.testing.assert_allclose(moved, moved[:, :1].repeat(3, axis=1), atol=1e-4)
    assert (np.abs(moved) > 0.1).all()


def saying(tokenizer: Tokenizer, answer: str) -> Logits:
    """A model that is sure to go on with `answer` and EOS after `=`."""
    equals, wanted = tokenizer.ids("=")[0], [*tokenizer.ids(answer), 257]

    def score(ids: Sequence[int]) -> Any:
        out = np.zeros((len(ids), 260))
        start = max((place for place, token in enumerate(ids) if token == equals), default=len(ids))
        for place in range(start, len(ids)):
            said = list(ids[start + 1 : place + 1])
            if said == wanted[: len(said)] and len(said) < len(wanted):
                out[place, wanted[len(said)]] = 20.0
        return out

    return score


@pytest.mark.parametrize("fake", [FakeRunner, FakeContinuing])
@pytest.mark.parametrize("answer", ["joy", "joyful", "jo"])
def test_labels_that_begin_alike(fake: Any, tokenizer: Tokenizer, tmp_path: Path, answer: str) -> None:
    data = config(tmp_path, [("a", "jo"), ("b", "joy"), ("c", "joyful")])
    assert ask(fake(saying(tokenizer, answer)), tokenizer, data).predicted == (answer,) * 3


def test_a_label_that_is_the_whole_beginning_of_another_text_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = config(tmp_path, [("a", "jo"), ("b", "joy"), ("c", "sad")], add_special_tokens=False)
    with pytest.raises(DataError, match="'jo' is the beginning of the one with 'joy'"):
        ask(FakeRunner(saying(tokenizer, "joy")), tokenizer, data)


def test_labels_that_cannot_win_are_not_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [(f"p{number}", ("anger", "fear", "joy", "surprise")[number % 4]) for number in range(40)]
    data = config(tmp_path, rows)
    runner = FakeRunner(saying(tokenizer, "surprise"))
    assert ask(runner, tokenizer, data).predicted == ("surprise",) * 40
    assert runner.asked == 80, "one to learn the first tokens, one to finish the winner"
    going_on = FakeContinuing(saying(tokenizer, "surprise"))
    assert ask(going_on, tokenizer, data).predicted == ("surprise",) * 40
    assert going_on.asked == 80, "each prompt once, each winner once"
    everything = FakeContinuing(saying(tokenizer, "surprise"))
    ask(everything, tokenizer, data, complete=True)
    assert everything.asked == 40 * 5


def test_equal_prompts_are_asked_once(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runner = FakeContinuing(saying(tokenizer, "joy"))
    found = ask(runner, tokenizer, config(tmp_path, [("a", "joy"), ("a", "sad"), ("b", "joy"), ("a", "joy")]))
    assert (found.predicted, found.truth) == (("joy",) * 4, ("joy", "sad", "joy", "joy"))
    assert found.prompts == ("a=", "a=", "b=", "a=")
    assert runner.asked == 4


def test_records_beyond_the_context_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runner = FakeRunner(saying(tokenizer, "joy"))
    runner.context_length = 12
    data = config(tmp_path, [("a", "joy"), ("b" * 30, "joy"), ("c", "fear")])
    found = ask(runner, tokenizer, data)
    assert (len(found.truth), found.left_out) == (2, 1)
    runner.context_length = 3
    with pytest.raises(DataError, match="fits into the model's context of 3"):
        ask(runner, tokenizer, data)


def test_data_without_an_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for rows, pre, said in (
        ([("a", "joy")], {"label_col": None}, "names no answer"),
        ([("a", "joy")], {}, "has 1 different answers"),
        ([("a", f"{number}") for number in range(120)], {}, "has 120 different answers"),
    ):
        with pytest.raises(DataError, match=said):
            read_answers(config(tmp_path, rows, **pre), tokenizer)


def test_a_label_outside_the_set(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = config(tmp_path, [("a", "joy"), ("b", "sadnes"), ("c", "zzz")])
    with pytest.raises(DataError, match=r"'sadnes', 'zzz'; the first at .*rows\.jsonl:2") as caught:
        read_answers(data, tokenizer, labels=["joy", "sadness"])
    assert caught.value.hint == "did you mean 'sadness'?"
    assert read_answers(data, tokenizer, labels=["zzz", "joy", "sadnes", "more"]).labels == (
        "zzz", "joy", "sadnes", "more",
    )  # fmt: skip


def test_chat_answers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{tone}="}, {"role": "assistant", "content": tone}]}
        for tone in ("joy", "fear")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        name="chat",
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}"),
    )
    found = ask(FakeContinuing(saying(tokenizer, "joy")), tokenizer, data)
    assert (found.predicted, found.truth) == (("joy", "joy"), ("joy", "fear"))
