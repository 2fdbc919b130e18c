"""`coldpress eval`: what it measures, what it prints, and how it ends."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.scores import Measurement, Score
from fakes.models_built import build_onnx
from fakes.tiny_models import make_checkpoint, make_encoder

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, two builds of it (as runs leave them: a folder `model` in an output folder), and records."""
    folder = tmp_path_factory.mktemp("place")
    make_checkpoint(folder / "model")
    for precision in ("fp32", "int4"):
        build_onnx(folder / "model", folder / precision, precision=precision)
        (folder / precision / "out").rename(folder / precision / "model")
    rows = [{"phrase": f"phrase {number}", "tone": ("joy", "fear")[number % 2]} for number in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("Some text to read.\n\nAnd more of it.\n")
    return folder


RECORDS = ("--data", "rows.jsonl", "--template", "{phrase}={tone}", "--answer", "tone")


def evaluate(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "coldpress", "eval", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)


def scores(done: subprocess.CompletedProcess[str]) -> dict[tuple[str, str], Any]:
    assert done.returncode in (0, 3), done.stderr
    return {(one["model"], one["sub_type"]): one for one in json.loads(done.stdout)["scores"]}


def test_two_models_side_by_side(place: Path) -> None:
    options = ("fp32", "--compare", "int4", *RECORDS, "--metrics", "accuracy,f1,kl,size")
    found = scores(evaluate(place, *options, "--json"))
    assert set(found) == {
        ("fp32", "accuracy_score"), ("fp32", "f1_score"), ("fp32", "bytes"),
        ("int4", "accuracy_score"), ("int4", "f1_score"), ("int4", "kl"), ("int4", "bytes"),
    }  # fmt: skip
    assert found["int4", "bytes"]["value"] < found["fp32", "bytes"]["value"]
    assert found["int4", "kl"]["value"] > 1e-4
    assert (found["int4", "kl"]["unit"], found["int4", "kl"]["n"] > 100) == ("nats/token", True)
    done = evaluate(place, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["fp32", "int4", "change", "judged", "n"]
    accuracy = next(line for line in lines if line.startswith("accuracy "))
    assert "±" in accuracy
    assert "points" in accuracy
    kl = next(line for line in lines if line.startswith("divergence: kl"))
    assert kl.split()[2] == "-", "the first model is what the second one is compared with"
    size = next(line for line in lines if line.startswith("size"))
    assert size.split()[-2] == "better"
    assert lines[-1].startswith("(±")


def test_what_fits_is_measured_without_being_asked(place: Path) -> None:
    found = scores(evaluate(place, "fp32", "--data", "text.txt", "--max-seconds", "1", "--json"))
    assert {model for model, _ in found} == {"fp32"}
    assert {"perplexity", "decode_tokens_per_second", "time_to_first_token_p50", "bytes"} <= {sub for _, sub in found}
    assert found["fp32", "decode_tokens_per_second"]["details"]["runner"] == "ONNX Runtime GenAI"


def test_a_number_without_end_is_null_in_json() -> None:
    from coldpress.cli.evaluate import _as_json

    measured = Measurement("perplexity", math.inf, "", False, 3, math.nan, {"share": -math.inf})
    (score,) = json.loads(_as_json({}, [Score.of("m", "text", measured)]), parse_constant=pytest.fail)["scores"]
    assert (score["value"], score["standard_error"], score["details"], score["n"]) == (None, None, {"share": None}, 3)


def test_an_evaluator_from_a_file_and_its_goals(place: Path) -> None:
    subs = [{"name": "accuracy_score", "goal": {"type": "max-degradation", "value": 0.5}}]
    metrics = [{"name": "right", "type": "accuracy", "data_config": "data", "sub_types": subs},
               {"name": "size", "type": "size_on_disk",
                "sub_types": [{"name": "bytes", "goal": {"type": "threshold", "value": 10}}]}]  # fmt: skip
    (place / "evaluator.json").write_text(json.dumps({"metrics": metrics}))
    done = evaluate(place, "fp32", "--compare", "int4", *RECORDS, "--evaluator", "evaluator.json", "--json")
    assert done.returncode == 3, "one goal is not met"
    found = scores(done)
    assert found["int4", "accuracy_score"]["goal"]["met"]
    assert not found["int4", "bytes"]["goal"]["met"]
    assert found["fp32", "bytes"]["goal"] is None
    shown = evaluate(place, "fp32", "--compare", "int4", *RECORDS, "--evaluator", "evaluator.json").stdout
    assert "threshold 10 (10 B) NOT MET" in shown
    alone = evaluate(place, "fp32", *RECORDS, "--evaluator", "evaluator.json")
    assert alone.returncode == 2
    assert "a goal compares with another model, and there is one only (accuracy_score max-degradation)" in alone.stderr


def test_a_checkpoint_and_an_adapter_on_it(place: Path) -> None:
    from coldpress.artifacts.tensors import TensorInfo, write_safetensors

    adapter = place / "adapter"
    adapter.mkdir()
    config = {"base_model_name_or_path": str(place / "model"), "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    name = "base_model.model.model.layers.0.self_attn.o_proj.lora_{}.weight"
    arrays = {name.format("A"): np.ones((2, 64), np.float32), name.format("B"): np.ones((64, 2), np.float32)}
    write_safetensors(
        adapter / "adapter_model.safetensors",
        [(TensorInfo.of(key, "float32", value.shape), lambda value=value: value) for key, value in arrays.items()],
    )
    # Their tones are scored with the adapter on, which changes them: read by Transformers and PEFT.
    asked = ("--data", "rows.jsonl", "--template", "{phrase}", "--metrics", "loss,size", "--json")
    found = scores(evaluate(place, "model", "--compare", "adapter", *asked))
    files = sum(path.stat().st_size for path in adapter.iterdir())
    assert found["adapter", "bytes"]["value"] == found["model", "bytes"]["value"] + files
    assert abs(found["adapter", "loss"]["value"] - found["model", "loss"]["value"]) > 1e-3


def test_the_evaluator_of_a_workflow(place: Path) -> None:
    pre = {"text_template": "{phrase}={tone}", "label_col": "tone", "strategy": "line-by-line"}
    workflow = {
        "input_model": {"type": "HfModel", "model_path": "elsewhere"},
        "data_configs": [{"name": "rows", "load_dataset_config": {"data_name": "json", "data_files": "rows.jsonl"},
                          "pre_process_data_config": pre}],
        "evaluators": {"ev": {"metrics": [{"name": "right", "type": "accuracy", "data_config": "rows"}]}},
        "evaluator": "ev",
        "passes": {"build": {"type": "ModelBuilder", "precision": "fp32"}},
    }  # fmt: skip
    (place / "workflows").mkdir()
    (place / "workflows" / "w.json").write_text(json.dumps(workflow))
    (place / "workflows" / "rows.jsonl").write_text((place / "rows.jsonl").read_text())
    found = scores(evaluate(place, "fp32", "--evaluator", "workflows/w.json", "--json"))
    assert list(found) == [("fp32", "accuracy_score")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--metrics", "acuracy"), "did you mean accuracy?"),
        (("model", "--metrics", "accuracy"), "give --data FILE"),
        (("model", "--metrics", "kl"), "give --compare OTHER"),
        (("model", "--compare", "model"), "is to be compared with itself"),
        (("nowhere",), "is not there, so it is no model"),
        (("model", "--metrics", "size", "--evaluator", "x.json"), "give one of them"),
        (("model", "--evaluator", "x.json"), "there is no such file"),
        (("model", "--data", "rows.jsonl", "--template", "{phrase}", "--metrics", "accuracy"), "names no answer"),
        (("",), "the path of a model is empty"),
        (("rows.jsonl",), "rows.jsonl is a file, not a folder, so it is no model"),
        (("model", "--data", "zzz.csv"), "hint: relative paths start at the working folder"),
        (("model", "--data", "rows.jsonl", "--split", "test"), "has no split 'test'; it has: train"),
        (("model", "--data", "rows.jsonl", "--text-field", "nope"), "no column 'nope', which --text-field uses"),
        (("model", "--data", "rows.jsonl", "--template", "{nope}"), "no column 'nope', which --template uses"),
        (("model", *RECORDS[:-1], "nope"), "no column 'nope', which --answer uses"),
        (("model", "--data", "rows.jsonl", "--template", "abc"), "--template: names no column"),
        (("model", "--data", "rows.jsonl"), "hint: say what the text is: --template or --text-field"),
        (("encoder", "--metrics", "speed"), "is an encoder (BertModel) and writes nothing"),
        (("encoder", "--data", "text.txt", "--metrics", "perplexity"), "so it has no perplexity"),
    ],
)
def test_what_is_asked_for_must_fit(place: Path, arguments: tuple[str, ...], message: str) -> None:
    if not (place / "encoder").exists():
        make_encoder(place / "encoder")
    done = evaluate(place, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_what_is_wrong_with_an_evaluator_is_told_at_its_line(place: Path) -> None:
    rows = {"name": "rows", "load_dataset_config": {"data_name": "json", "data_files": "lost.jsonl"},
            "pre_process_data_config": {"text_template": "{phrase}={tone}", "label_col": "tone"}}  # fmt: skip
    metric = {"name": "a", "type": "accuracy", "data_config": "nowhere"}
    path = place / "wrong.json"
    path.write_text(json.dumps({"data_configs": [rows], "metrics": [metric, {**metric, "batch_size": 0}]}, indent=1))
    line = 1 + path.read_text().splitlines().index('   "batch_size": 0')
    done = evaluate(place, "fp32", *RECORDS, "--evaluator", "wrong.json")
    assert done.returncode == 2
    assert f"wrong.json:{line}: metrics.1.batch_size: must be at least 1, got 0\n" in done.stderr
    assert "metrics.0.data_config: there is no data config called 'nowhere'" in done.stderr
    assert "there are: data, rows\n" in done.stderr
    path.write_text(json.dumps({"data_configs": [rows], "metrics": [{**metric, "data_config": "rows"}]}))
    done = evaluate(place, "fp32", "--evaluator", "wrong.json")
    assert done.returncode == 2
    assert "error: wrong.json: data_configs.rows: the data file lost.jsonl does not exist" in done.stderr


def test_empty_data(place: Path) -> None:
    (place / "empty.jsonl").write_text("")
    done = evaluate(place, "fp32", "--data", "empty.jsonl", "--answer", "tone", "--template", "{p}={tone}")
    assert done.returncode == 1
    assert "holds no rows" in done.stderr


OWN = """
import ctypes, os, sys, time

def speaks(*_):
    print("from Python")
    os.system("echo from a program")
    sys.stdout.close()
    return 2.5

def ends(*_):
    print("about to end")
    os._exit(0)

def crashes(*_):
    ctypes.string_at(0)

def sleeps(*_):
    print("asleep")
    time.sleep(300)
"""


def own(place: Path, function: str) -> tuple[str, ...]:
    """Arguments that measure a model by a function of a script."""
    (place / "own.py").write_text(OWN)
    user = {"user_script": "own.py", "evaluate_func": function}
    metric = {"name": "own", "type": "custom", "sub_types": [{"name": "n"}], "user_config": user}
    (place / f"{function}.json").write_text(json.dumps({"metrics": [metric]}))
    return ("fp32", "--evaluator", f"{function}.json", "--json")


def test_what_the_users_function_prints_is_no_part_of_the_scores(place: Path) -> None:
    done = evaluate(place, *own(place, "speaks"))
    assert scores(done)["fp32", "n"]["value"] == 2.5
    assert done.stderr.splitlines() == ["from Python", "from a program"]


@pytest.mark.parametrize(("function", "how"), [("ends", "exit code 0"), ("crashes", "signal 11")])
def test_a_function_that_ends_the_process_is_told(place: Path, function: str, how: str) -> None:
    done = evaluate(place, *own(place, function))
    assert done.returncode == 1
    assert f"error: the process that measures ended with {how} before it had the scores" in done.stderr
    assert done.stdout == ""
    if function == "ends":
        assert "about to end" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_ends_both_processes(place: Path) -> None:
    command = [sys.executable, "-m", "coldpress", "eval", *own(place, "sleeps")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=place, start_new_session=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "asleep\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all of its processes
        assert process.stderr.read().strip() == "interrupted", "read to its end: nobody holds it open"
    assert process.returncode == 130
