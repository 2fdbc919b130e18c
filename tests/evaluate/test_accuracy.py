"""The metric accuracy: by likelihood, by what a model writes, by its head; and what it cannot be asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import AccuracyMetric
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError, PlanError
from coldpress.evaluate.accuracy import answers_of, measure
from coldpress.evaluate.answers import read_answers
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.predictions import by_generation
from coldpress.evaluate.runners import TorchRunner, open_runner
from coldpress.events import Message
from fakes.tiny_models import make_encoder, make_tokenizer

Benches = Callable[..., Bench]
ROWS = [(f"text {number} {'xyz'[number % 3] * number}", ("joy", "sad", "surprise")[number % 3]) for number in range(12)]


def metric(*names: str, **options: Any) -> AccuracyMetric:
    subs = [{"name": name} for name in names or ("accuracy_score",)]
    return AccuracyMetric.model_validate(
        {"name": "acc", "type": "accuracy", "data_config": "rows", "sub_types": subs, **options}
    )


class Writer:
    """Writes what a function says of the prompt's text."""

    context_length: int | None = None

    def __init__(self, tokenizer: Tokenizer, says: Callable[[str], str]) -> None:
        self.tokenizer, self.says = tokenizer, says
        self.stopped: list[int] = []

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Any = None,
    ) -> list[list[int]]:
        made = []
        for ids in prompts:
            tokens: list[int] = []
            for token in [*self.tokenizer.ids(self.says(self.tokenizer.decode(ids))), 257][:max_new_tokens]:
                if token in stop_tokens:
                    break
                tokens.append(token)
                if stop(tokens):
                    break
            made.append(tokens)
            self.stopped.append(len(tokens))
        return made

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        raise NotImplementedError

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        raise NotImplementedError


def test_written_answers(tokenizer: Tokenizer, make_data: Any) -> None:
    data = make_data([("a", "joy"), ("b", "sad"), ("c", "joy"), ("d", "sad")], text_template="{text}={label}.")
    said = {"a": "joy", "b": " sad\nand so on", "c": "\n joy of a kind", "d": "sadness and much more than that"}
    writer: Any = Writer(tokenizer, lambda prompt: said[prompt.removeprefix("<s>")[0]])
    found = by_generation(writer, tokenizer, read_answers(data, tokenizer))
    assert found.truth == ("joy", "sad", "joy", "sad")
    # The longest right text after a prompt has five tokens ("joy." and EOS), so six are written at most.
    assert found.predicted == ("joy", "sad", "joy", "sadnes")
    assert sorted(writer.stopped) == [3, 5, 6, 6], "stopped at EOS, at a line break, at the limit"
    assert found.prompts == ("a=", "b=", "c=", "d=")


def test_written_answers_of_any_length(tokenizer: Tokenizer, make_data: Any) -> None:
    data = make_data([("a", "one"), ("b", "two")])
    writer: Any = Writer(tokenizer, lambda prompt: "seventeen")
    found = by_generation(writer, tokenizer, read_answers(data, tokenizer), max_new_tokens=9)
    assert found.predicted == ("seventeen", "seventeen")
    writer.context_length = 11
    long = make_data([("a", "one"), ("b" * 9, "two")])
    found = by_generation(writer, tokenizer, read_answers(long, tokenizer))
    assert (len(found.predicted), found.left_out) == (1, 1)
    writer.context_length = 4
    with pytest.raises(DataError, match="no record of rows has a prompt that fits"):
        by_generation(writer, tokenizer, read_answers(long, tokenizer))


@pytest.mark.parametrize("kind", ["transformers", "onnxruntime", "onnxruntime-genai"])
def test_a_model_writes_as_its_logits_say(
    kind: Any, tiny_phi3: Path, tiny_onnx: Artifact, tokenizer: Tokenizer, make_data: Any
) -> None:
    answers = read_answers(make_data(ROWS), tokenizer)
    reference = TorchRunner(tiny_phi3)
    expected = []
    for prompt in answers.prompts:
        ids = [256, *tokenizer.ids(prompt)]
        new: list[int] = []
        while len(new) < 10:
            token = int(reference.logits([[*ids, *new]])[0][-1].argmax())
            if token == 257:
                break
            new.append(token)
            if "\n" in tokenizer.decode(new).lstrip():
                break
        text = str(tokenizer.backend.decode(new, skip_special_tokens=True))
        expected.append(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    model = Artifact.load(tiny_phi3) if kind == "transformers" else tiny_onnx
    with open_runner(model, needs=("generation",), runner=kind) as runner:
        found = by_generation(runner, tokenizer, answers, batch_size=5)
    assert found.predicted == tuple(expected)


def test_all_figures_of_one_reading(
    tiny_phi3: Path, make_data: Any, bench_of: Benches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sub types share the model's answers: it is asked once by likelihood, once by writing."""
    asked: list[bool] = []

    def watch(*args: Any, written: bool, **options: Any) -> Any:
        asked.append(written)
        return answers_of(*args, written=written, **options)

    monkeypatch.setattr("coldpress.evaluate.accuracy.answers_of", watch)
    bench = bench_of(tiny_phi3, make_data(ROWS))
    names = ("accuracy_score", "f1_score", "exact_match", "precision", "recall", "perplexity")
    found = {one.sub_type: one for one in measure(metric(*names), bench)}
    assert list(found) == list(names)
    assert asked == [False, True]
    assert found["perplexity"].value > 10
    assert not found["perplexity"].higher_is_better, "whatever Olive says"
    assert found["accuracy_score"].n == 12
    other = {one.sub_type: one for one in measure(metric(*names), bench)}
    assert other == found, "the errors too: the resampling has a seed of its own"
    written = measure(metric("accuracy_score", answer_by="generation"), bench)[0]
    assert written.value == found["exact_match"].value


def test_records_that_do_not_fit_are_told(tiny_phi3: Path, make_data: Any, bench_of: Benches, told: list[Any]) -> None:
    bench = bench_of(tiny_phi3, make_data([*ROWS, ("x" * 140, "joy")]))
    (found,) = measure(metric(), bench)
    assert found.n == 12
    warnings = [event.text for event in told if isinstance(event, Message)]
    assert warnings == ["1 records of rows are longer than the model's context and were left out"]


# -- encoders ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("bert"), labels=("joy", "sad", "surprise"))


TEXT = {"text_template": None, "text_field": "text"}


def test_a_model_answers_by_its_head(classifier: Path, tokenizer: Tokenizer, make_data: Any, bench_of: Benches) -> None:
    bench = bench_of(classifier, make_data(ROWS, **TEXT))
    ids = [[256, *tokenizer.ids(text), 257] for text, _ in ROWS]  # between CLS and SEP
    with open_runner(Artifact.load(classifier), needs=("classification",)) as runner:
        scores = np.concatenate([runner.classify([one]) for one in ids])
    says = [("joy", "sad", "surprise")[place] for place in scores.argmax(axis=1)]
    assert len(set(says)) > 1
    found = (
        {one.sub_type: one for one in measure(metric("accuracy_score", "f1_score", "auroc"), bench)}
        if _has("torchmetrics")
        else {one.sub_type: one for one in measure(metric("accuracy_score", "f1_score"), bench)}
    )
    assert found["accuracy_score"].value == sum(a == b for a, (_, b) in zip(says, ROWS, strict=True)) / 12
    answers = answers_of(metric(), bench, written=False, complete=True)
    assert answers.predicted == tuple(says)
    assert answers.scores is not None
    expected = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(answers.scores, expected, atol=1e-4)


def test_a_decoder_with_classes_answers_too(
    tmp_path: Path, tokenizer: Tokenizer, make_data: Any, bench_of: Benches
) -> None:
    """It reads a text as it was trained, BOS and EOS included, and is asked at its last token, padding or not."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, pad_token_id=258, id2label=dict(enumerate(("joy", "sad", "surprise"))),
        initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "classes")
    make_tokenizer(tmp_path / "classes")
    with torch.no_grad():
        says = [
            ("joy", "sad", "surprise")[int(model(torch.tensor([[256, *tokenizer.ids(text), 257]])).logits.argmax())]
            for text, _ in ROWS
        ]
    assert len(set(says)) > 1
    answers = answers_of(
        metric(), bench_of(tmp_path / "classes", make_data(ROWS, **TEXT)), written=False, complete=False
    )
    assert answers.predicted == tuple(says)


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_classes_by_number_and_in_any_case(classifier: Path, make_data: Any, bench_of: Benches) -> None:
    by_name = answers_of(metric(), bench_of(classifier, make_data(ROWS, **TEXT)), written=False, complete=False)
    numbers = {"joy": 0, "sad": 1, "surprise": 2}
    rows = [(text, numbers[label]) for text, label in ROWS]
    by_number = answers_of(metric(), bench_of(classifier, make_data(rows, **TEXT)), written=False, complete=False)
    assert by_number.truth == by_name.truth
    rows = [(text, label.upper()) for text, label in ROWS]
    upper = answers_of(metric(), bench_of(classifier, make_data(rows, **TEXT)), written=False, complete=False)
    assert upper.truth == by_name.truth


def test_answers_that_a_head_does_not_have(classifier: Path, make_data: Any, bench_of: Benches) -> None:
    bench = bench_of(classifier, make_data([("a", "joy"), ("b", "surprize")], **TEXT))
    with pytest.raises(DataError, match=r"outside the set of labels \(joy, sad, surprise\): 'surprize'") as caught:
        measure(metric(), bench)
    assert caught.value.hint == "did you mean 'surprise'?"


def test_what_an_encoder_cannot_be_asked(classifier: Path, tmp_path: Path, make_data: Any, bench_of: Benches) -> None:
    bench = bench_of(classifier, make_data(ROWS, **TEXT))
    with pytest.raises(PlanError, match="is an encoder and writes nothing"):
        measure(metric("exact_match"), bench)
    with pytest.raises(DataError, match="stands in the text"):
        measure(metric(), bench_of(classifier, make_data(ROWS)))
    headless = make_encoder(tmp_path / "headless")
    with pytest.raises(PlanError, match="cannot give a score for each class of its own head"):
        measure(metric(), bench_of(headless, make_data(ROWS, **TEXT)))


def test_data_without_labels_and_empty_data(tiny_phi3: Path, make_data: Any, bench_of: Benches) -> None:
    with pytest.raises(DataError, match="names no answer, so there is nothing to be right about"):
        measure(metric(), bench_of(tiny_phi3, make_data(ROWS, label_col=None)))
    with pytest.raises(DataError, match="holds no rows"):
        measure(metric(), bench_of(tiny_phi3, make_data([])))
    with pytest.raises(DataError, match="outside the set of labels"):
        measure(metric(labels=("joy", "sad")), bench_of(tiny_phi3, make_data(ROWS)))
