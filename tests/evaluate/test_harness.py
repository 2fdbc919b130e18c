"""Tasks of lm-eval on all runners: the same numbers as by the harness's own model of Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import LmEvalMetric
from coldpress.errors import DataError, PlanError
from coldpress.evaluate.bench import Bench, OpenRunners
from coldpress.evaluate.harness import measure
from coldpress.evaluate.measure import refusal
from fakes.models_built import build_fp32

pytest.importorskip("lm_eval")

CHOICE = """
task: tones
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Text: {{{{phrase}}}}\\nTone:"
doc_to_choice: ["joy", "sad", "no idea"]
doc_to_target: "{{{{tone}}}}"
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: surprise
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{phrase}}}}:"
doc_to_target: "{{{{tone}}}}"
process_results: !function beside.letters
generation_kwargs: {{until: ["k", "8"], max_gen_toks: 12, do_sample: {sampled}}}
metric_list:
  - {{metric: letters, aggregation: mean, higher_is_better: false}}
"""
BESIDE = "def letters(doc, results):\n    return {'letters': sum(map(ord, results[0])) + 1000 * len(results[0])}\n"
TASKS = {"choice": CHOICE, "rolling": ROLLING, "writing": WRITING}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tones = ("joy", "sad", "no idea")
    rows = [
        {"phrase": f"{'abc'[number % 3] * (number % 5 + 1)} {number}", "tone": tones[number % 3],
         "long": " ".join(str(number * step) for step in range(number + 9, 60))}
        for number in range(12)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "rows.jsonl", sampled="false"))
    (folder / "sampled.yaml").write_text(WRITING.format(data=folder / "rows.jsonl", sampled="true, temperature: 0.7"))
    (folder / "beside.py").write_text(BESIDE)
    return folder


def bench_of(model: Artifact) -> Bench:
    return Bench(model, OpenRunners())


def numbers(tasks: Path, bench: Bench, name: str, **options: Any) -> dict[str, Any]:
    metric = LmEvalMetric(name="tasks", type="lm_eval", tasks=(str(tasks / f"{name}.yaml"),), batch_size=3, **options)
    return {one.sub_type: one for one in measure(metric, bench)}


@pytest.fixture(scope="module")
def by_the_harness(tasks: Path, tiny_phi3: Path) -> dict[str, Any]:
    """Results of `lm_eval`'s own model on the same checkpoint, in float32."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(tiny_phi3), dtype="float32", device="cpu", batch_size=3)
    found: dict[str, Any] = {}
    for name in TASKS:
        loaded = TaskManager(include_defaults=False).load([str(tasks / f"{name}.yaml")])
        results = evaluate(model, loaded, bootstrap_iters=100, log_samples=False)
        assert results is not None
        found |= {
            f"{task}.{key.partition(',')[0]}": (value, row.get(f"{key.partition(',')[0]}_stderr,none"))
            for task, row in results["results"].items()
            for key, value in row.items()
            if key.endswith(",none") and "_stderr" not in key
        }
    return found


@pytest.mark.parametrize("kind", ["transformers", "onnxruntime", "onnxruntime-genai"])
def test_numbers_are_those_of_the_harness(
    kind: Any, tasks: Path, tiny_phi3: Path, tmp_path: Path, by_the_harness: dict[str, Any]
) -> None:
    if kind != "transformers":
        pytest.importorskip("onnxruntime")
    model = Artifact.load(tiny_phi3) if kind == "transformers" else build_fp32(tiny_phi3, tmp_path / "onnx")
    bench = bench_of(model)
    found = {name: one for task in TASKS for name, one in numbers(tasks, bench, task, runner=kind).items()}
    assert bench.runner((), None).kind == kind
    assert set(found) == set(by_the_harness) == {
        "tones.acc", "tones.acc_norm", "surprise.word_perplexity", "surprise.bits_per_byte", "writing.letters",
    }  # fmt: skip
    for name, (value, error) in by_the_harness.items():
        assert found[name].value == pytest.approx(value, rel=1e-4), name
        if name.startswith("tones"):
            assert found[name].standard_error == pytest.approx(error)
        assert found[name].n == 12
    assert 0 < found["tones.acc"].value < 1
    assert (found["tones.acc"].unit, found["tones.acc"].higher_is_better) == ("share", True)
    assert (found["surprise.bits_per_byte"].unit, found["surprise.bits_per_byte"].higher_is_better) == (
        "bits/byte", False,
    )  # fmt: skip


def test_sub_types_name_numbers(tasks: Path, tiny_phi3: Path) -> None:
    bench = bench_of(Artifact.load(tiny_phi3))
    everything = numbers(tasks, bench, "choice")
    for name in ("acc", "tones.acc"):
        (one,) = numbers(tasks, bench, "choice", sub_types=({"name": name},)).values()
        assert (one.sub_type, one.value) == (name, everything["tones.acc"].value)
    with pytest.raises(PlanError, match=r"give no number 'tones\.accc'") as caught:
        numbers(tasks, bench, "choice", sub_types=({"name": "tones.accc"},))
    assert caught.value.hint == "did you mean tones.acc?"


def test_records_and_context_can_be_fewer(tasks: Path, tiny_phi3: Path) -> None:
    bench = bench_of(Artifact.load(tiny_phi3))
    assert numbers(tasks, bench, "choice", limit=5)["tones.acc"].n == 5
    assert numbers(tasks, bench, "choice", limit=0.5)["tones.acc"].n == 6
    whole = numbers(tasks, bench, "rolling")["surprise.bits_per_byte"].value
    short = numbers(tasks, bench, "rolling", max_length=16)["surprise.bits_per_byte"].value
    assert abs(whole - short) > 0.01, "a shorter context is another prediction"
    shots = numbers(tasks, bench, "rolling", num_fewshot=None)
    assert shots["surprise.bits_per_byte"].value == whole


def test_bad_tasks(tasks: Path, tiny_phi3: Path) -> None:
    bench = bench_of(Artifact.load(tiny_phi3))
    for lost in ({"tasks": ("nowhere.yaml",)}, {"tasks": ("tones",), "include_path": str(tasks / "nowhere")}):
        message, hint = refusal(LmEvalMetric.model_validate({"name": "x", "type": "lm_eval", **lost}), None) or ("", "")
        assert "x: there is no " in message
        assert "nowhere" in message
        assert "relative paths" in str(hint)
    with pytest.raises(PlanError, match="samples its answers"):
        numbers(tasks, bench, "sampled")
    (tasks / "lost.yaml").write_text(CHOICE.format(data=tasks / "lost.jsonl"))
    with pytest.raises(DataError, match="cannot be loaded"):
        numbers(tasks, bench, "lost")
    (tasks / "broken.yaml").write_text("task: [tones\noutput_type: x")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*broken\.yaml\): ParserError: .*line 2"):
        numbers(tasks, bench, "broken")
    (tasks / "broken.yaml").unlink()
    (tasks / "column.yaml").write_text((tasks / "choice.yaml").read_text().replace("{{phrase}}", "{{phrese}}"))
    with pytest.raises(DataError, match=r"cannot be loaded \(.*column\.yaml\): UndefinedError: 'phrese' is"):
        numbers(tasks, bench, "column")
    (tasks / "column.yaml").unlink()
    (tasks / "worse.py").write_text("def worse(doc, results):\n    return {'letters': doc['nope']}\n")
    (tasks / "worse.yaml").write_text((tasks / "writing.yaml").read_text().replace("beside.letters", "worse.worse"))
    with pytest.raises(DataError, match="lm-eval cannot ask writing of tasks: KeyError: 'nope'"):
        numbers(tasks, bench, "worse")
    (tasks / "worse.yaml").unlink()
    unknown = LmEvalMetric(name="x", type="lm_eval", tasks=("tonees",), include_path=str(tasks))
    with pytest.MonkeyPatch.context() as patch:  # the harness's own 14,000 files need not be read for this
        from lm_eval.tasks import TaskManager

        patch.setattr(
            "lm_eval.tasks.TaskManager",
            lambda include_path, include_defaults: TaskManager(include_path=include_path, include_defaults=False),
        )
        with pytest.raises(PlanError, match="lm-eval has no task 'tonees'") as caught:
            measure(unknown, bench)
    assert caught.value.hint == "did you mean tones?"
