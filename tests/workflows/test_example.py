"""The example as it ships: one short run of its workflow, and the whole of its data set."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

import coldpress
from coldpress.chat import Sampling, open_generator

pytestmark = pytest.mark.xdist_group("example")  # one short run serves all of them


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def bare(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s]", "", text.lower()).split())


def test_the_data_set_is_what_its_card_says(phrases: Path) -> None:
    train, test = rows(phrases / "train.jsonl"), rows(phrases / "test.jsonl")
    assert len(test) == 200
    assert len(train) + len(test) >= 1200
    assert all(set(row) == {"phrase", "tone"} for row in train + test)
    assert set(Counter(row["tone"] for row in test).values()) == {50}
    assert {row["tone"] for row in train} == {"sadness", "joy", "fear", "surprise"}
    texts = [bare(row["phrase"]) for row in train + test]
    assert len(set(texts)) == len(texts), "a phrase stands twice"


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> coldpress.RunResult:
    """The example's workflow as it stands, in a copy, with two epochs instead of three."""
    here = Path(__file__).resolve().parents[2] / "examples" / "phrase-classification"
    copy = tmp_path_factory.mktemp("example") / "example"
    shutil.copytree(here, copy, ignore=shutil.ignore_patterns("output", ".coldpress-cache"))
    return coldpress.run(copy / "workflow.json", ["passes.lora.training_args.num_train_epochs=2"])


def test_fine_tuning_makes_it_useful_and_int4_keeps_it_so(short_run: coldpress.RunResult) -> None:
    base, tuned, int4 = (short_run.score(model) for model in ("input", "lora", "int4"))
    assert base.n == tuned.n == int4.n == 200
    assert base.value < 0.5
    assert tuned.value > 0.8, "two epochs of three"
    assert int4.value > tuned.value - 0.05


def test_it_says_the_tone_and_stops(short_run: coldpress.RunResult) -> None:
    generator = open_generator(short_run.output.parent)
    prompt = "### Text: I lost my best friend and I cannot stop crying.\n### The tone is:\n"
    assert "".join(generator.stream(prompt, Sampling(max_new_tokens=20))).strip() in {
        "sadness",
        "joy",
        "fear",
        "surprise",
    }


def test_the_record_holds_what_was_measured(short_run: coldpress.RunResult) -> None:
    record = json.loads(short_run.record.read_text())
    assert {score["model"] for score in record["scores"]} == {"input", "lora", "int4"}
    assert [step["name"] for step in record["steps"]] == ["lora", "merge", "int4"]
    assert all(step["parity"]["passed"] for step in record["steps"] if step["parity"])
