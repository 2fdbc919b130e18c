"""The record of a run: what is written is what the schema and the types say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from coldpress.digest import digest_file
from coldpress.errors import StoreError
from coldpress.record import ParityRecord, RunRecord, read_run, read_training, record_json_schema, to_json

pytestmark = pytest.mark.xdist_group("tiny_run")


def test_a_real_record_fits_the_schema_and_reads_back(tiny_run: Path) -> None:
    written = json.loads((tiny_run / "run.json").read_text())
    jsonschema.Draft202012Validator(record_json_schema()).validate(written)
    record, place = read_run(tiny_run)
    assert place == tiny_run / "run.json"
    assert to_json(record) == written, (
        "every field that is written is declared, and every one that is declared is written"
    )


def test_a_real_training_fits_its_part_of_the_schema(tiny_run: Path) -> None:
    schema = record_json_schema()
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/TrainingRecord", "$defs": schema["$defs"]})
    written = json.loads((tiny_run / "logs" / "lora" / "training.json").read_text())
    validator.validate(written)
    for damage in ({"losses": "none"}, {"base": {}}, {"trained": 3}):
        assert not validator.is_valid({**written, **damage}), damage


def test_the_schema_refuses_what_is_no_record(tiny_run: Path) -> None:
    written = json.loads((tiny_run / "run.json").read_text())
    validator = jsonschema.Draft202012Validator(record_json_schema())
    for damage in ({"steps": [{}]}, {"record_version": 2}, {"seconds": "long"}, {"hardware": None}):
        assert not validator.is_valid({**written, **damage}), damage


def test_what_a_real_record_holds(tiny_run: Path) -> None:
    record, _ = read_run(tiny_run)
    project = tiny_run.parent
    assert (record.status, record.workflow, record.error) == ("done", "tiny", None)
    assert record.config_file == str(project / "workflow.json")
    assert record.input_model is not None
    assert record.input_model.name == "a-tiny-model"
    assert record.input_model.bytes == (project / "a-tiny-model" / "model.safetensors").stat().st_size
    assert [step.name for step in record.steps] == ["lora", "merge", "int4"]
    lora, merge, int4 = record.steps
    assert (lora.parity, lora.training_file) == (None, "logs/lora/training.json")
    assert merge.parity is not None
    assert merge.parity.passed
    assert int4.model is not None
    assert (int4.model.kind, int4.model.precision) == ("onnx", "int4")
    graph = tiny_run / "model" / "model.onnx"
    assert int4.model.bytes == graph.stat().st_size + graph.with_name("model.onnx.data").stat().st_size
    assert {(score.model, score.metric, score.unit, score.n) for score in record.scores} == {
        (model, "accuracy", "share", 40) for model in ("input", "lora", "int4")
    }


def test_the_training_in_the_record_and_its_curve(tiny_run: Path) -> None:
    record, _ = read_run(tiny_run)
    summary = record.steps[0].training
    assert summary is not None
    assert summary.data is not None
    assert summary.held_out is not None
    assert summary.data.fingerprint == digest_file(tiny_run.parent / "train.jsonl")
    assert (summary.data.rows, summary.held_out.rows) == (32, 8)
    assert 0 < summary.data.loss_tokens < summary.data.tokens
    assert (summary.method, summary.steps) == ("LoRA", 30)
    assert summary.settings["r"] == 4
    assert summary.arguments["learning_rate"] == 1e-2
    training = read_training(tiny_run / "logs" / "lora" / "training.json")
    assert len(training.losses) == 30
    assert summary.loss_first == pytest.approx(math.fsum(training.losses[:3]) / 3)
    assert summary.loss == pytest.approx(math.fsum(training.losses[-3:]) / 3)
    evaluated = {point["step"]: point["eval_loss"] for point in training.log if "eval_loss" in point}
    assert sorted(evaluated) == [10, 20, 30]
    assert summary.eval_loss == min(evaluated.values())


def test_no_number_becomes_null() -> None:
    parity = ParityRecord(
        kl=math.nan, top1_agreement=0.5, perplexity_reference=10.0, perplexity=math.inf, standard_error=0.1,
        tokens=256, passed=False, limit="KL 0.1",
    )  # fmt: skip
    written = to_json(parity)
    assert (written["kl"], written["perplexity"]) == (None, None)
    assert ParityRecord.model_validate(written).perplexity is None


def test_what_a_later_version_adds_is_ignored(tiny_run: Path, tmp_path: Path) -> None:
    written = json.loads((tiny_run / "run.json").read_text())
    written["weather"] = "fine"
    written["steps"][0]["mood"] = 3
    path = tmp_path / "run.json"
    path.write_text(json.dumps(written), encoding="utf-8-sig")
    assert read_run(path)[0] == read_run(tiny_run)[0], "with the mark that some editors put first, too"


def test_a_failed_run_comes_before_an_older_good_one(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_run / "run.json", tmp_path / "run.json")
    written: dict[str, Any] = json.loads((tiny_run / "run.json").read_text())
    (tmp_path / "failed.json").write_text(json.dumps({**written, "status": "failed"}))
    assert read_run(tmp_path)[0].status == "failed"
    assert read_run(tmp_path / "run.json")[0].status == "done"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "line 1 column 2"),
        ('{"steps": [{"seconds": NaN}]}', r"steps\.0\.seconds: nan is no number of JSON"),
        ('{"seconds": 1e999}', "seconds: inf is no number of JSON"),
        ("[" * 100_000, "maximum recursion depth"),
        ("[]", "is no record of a run"),
        ('{"coldpress": "0.1"}', "started: Field required"),
        ("\xff", "is no record of a run"),
    ],
)
def test_a_damaged_record_is_one_clear_message(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StoreError, match=says) as caught:
        read_run(path)
    assert "schema --record" in str(caught.value)


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no run\.json"):
        read_run(tmp_path)
    with pytest.raises(StoreError, match="cannot be read"):
        read_run(tmp_path / "nowhere.json")


def test_the_schema_describes_every_field() -> None:
    schema = record_json_schema()
    parts = [schema, *schema["$defs"].values()]
    assert [name for part in parts for name, field in part["properties"].items() if not field.get("description")] == []
    assert schema["properties"].keys() == RunRecord.model_fields.keys()
