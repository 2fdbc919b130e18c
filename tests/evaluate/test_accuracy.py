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
from coldpress.evaluate.accuracy import label_accuracy
from coldpress.evaluate.runners import TorchRunner
from fakes.tiny_models import make_tokenizer

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

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder)


def config(tmp_path: Path, rows: list[tuple[str, str]], **pre: Any) -> DataConfig:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"phrase": phrase, "tone": tone}) + "\n" for phrase, tone in rows))
    return DataConfig(
        name="rows",
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**{"text_template": "{phrase}={tone}", "label_col": "tone", **pre}),
    )


def in_full(runner: Any, tokenizer: Tokenizer, data: DataConfig, phrase: str, labels: list[str]) -> str:
    """Every label's text from the answer on, one by one, in float64."""
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
    return labels[int(np.argmax(scores))]


def test_equals_scoring_in_full(tiny_phi3: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    labels = ["jo", "joy", "joyful", "sad", "x"]
    rows = [(f"phrase {number} {'abcdefg'[number % 7] * number}", labels[number % 5]) for number in range(20)]
    data = config(tmp_path, rows)
    runner = TorchRunner(tiny_phi3)
    score = label_accuracy(runner, tokenizer, data, batch_size=3)
    expected = [in_full(runner, tokenizer, data, phrase, labels) for phrase, _ in rows]
    assert list(score.predictions) == expected
    assert len(set(expected)) > 1, "a test of one answer proves little"
    right = sum(guess == tone for guess, (_, tone) in zip(expected, rows, strict=True))
    assert score.value == right / 20
    assert score.standard_error == pytest.approx(math.sqrt(score.value * (1 - score.value) / 20))
    assert (score.n, score.majority) == (20, 0.2)


def saying(tokenizer: Tokenizer, answer: str) -> Logits:
    """A model that is sure to go on with `answer` and EOS after `=`."""
    equals, wanted = tokenizer.ids("=")[0], [*tokenizer.ids(answer), 257]

    def score(ids: Sequence[int]) -> Any:
        out = np.zeros((len(ids), 260))
        start = max(place for place, token in enumerate(ids) if token == equals)
        for place in range(start, len(ids)):
            said = list(ids[start + 1 : place + 1])
            if said == wanted[: len(said)] and len(said) < len(wanted):
                out[place, wanted[len(said)]] = 20.0
        return out

    return score


@pytest.mark.parametrize("answer", ["joy", "joyful", "jo"])
def test_labels_that_begin_alike(tokenizer: Tokenizer, tmp_path: Path, answer: str) -> None:
    data = config(tmp_path, [("a", "jo"), ("b", "joy"), ("c", "joyful")])
    score = label_accuracy(FakeRunner(saying(tokenizer, answer)), tokenizer, data)
    assert score.predictions == (answer,) * 3


def test_labels_that_cannot_win_are_not_run(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [(f"p{number}", ("anger", "fear", "joy", "surprise")[number % 4]) for number in range(40)]
    runner = FakeRunner(saying(tokenizer, "surprise"))
    score = label_accuracy(runner, tokenizer, config(tmp_path, rows))
    assert score.value == 0.25
    assert runner.asked == 80, "one to learn the first tokens, one to finish the winner"


def test_records_beyond_the_context_are_counted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runner = FakeRunner(saying(tokenizer, "joy"))
    runner.context_length = 12
    score = label_accuracy(runner, tokenizer, config(tmp_path, [("a", "joy"), ("b" * 30, "joy"), ("c", "fear")]))
    assert (score.n, score.left_out, score.value) == (2, 1, 0.5)
    runner.context_length = 3
    with pytest.raises(DataError, match="fits into the model's context of 3"):
        label_accuracy(runner, tokenizer, config(tmp_path, [("a", "joy"), ("b", "fear")]))


def test_data_without_an_answer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    runner = FakeRunner(saying(tokenizer, "joy"))
    with pytest.raises(DataError, match="names no answer"):
        label_accuracy(runner, tokenizer, config(tmp_path, [("a", "joy")], label_col=None))
    with pytest.raises(DataError, match="has 1 different answers"):
        label_accuracy(runner, tokenizer, config(tmp_path, [("a", "joy")]))
    with pytest.raises(DataError, match="has 120 different answers"):
        label_accuracy(runner, tokenizer, config(tmp_path, [("a", f"{number}") for number in range(120)]))


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
    score = label_accuracy(FakeRunner(saying(tokenizer, "joy")), tokenizer, data)
    assert score.predictions == ("joy", "joy")
    assert score.value == 0.5
