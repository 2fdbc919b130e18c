"""`coldpress optimize` as a user meets it: the workflow it writes, what it refuses, and one search for real."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.test_main import coldpress
from coldpress.record import read_run
from fakes.tiny_models import make_checkpoint, make_encoder


def test_the_workflow_that_it_saves_is_one(phi3: Path, phrases: Path, tmp_path: Path) -> None:
    saved = tmp_path / "w.json"
    options = [
        "--max-size", "6.6MB", "--max-memory", "1GB", "--max-decode-latency", "9.5", "--max-quality-loss", "2%",
        "--objective", "size", "--objective", "quality", "--trials", "7", "--max-time", "3", "--seed", "5",
        "--data", str(phrases / "test.jsonl"), "--template", "{phrase} {tone}", "--answer", "tone",
    ]  # fmt: skip
    done = coldpress("optimize", str(phi3), *options, "--save-config", str(saved), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(saved.read_text())
    assert document["search_strategy"] == {
        "sampler": "tpe", "sampler_config": {"max_samples": 7, "seed": 5}, "include_pass_params": False,
        "max_time": 180.0,
    }  # fmt: skip
    (evaluator,) = document["evaluators"].values()
    numbers = {
        (metric["type"], sub["name"]): sub for metric in evaluator["metrics"] for sub in metric["sub_types"]
    }  # fmt: skip
    assert numbers["size_on_disk", "bytes"]["goal"] == {"type": "threshold", "value": 6_600_000}
    assert numbers["size_on_disk", "bytes"]["priority"] == 1
    assert numbers["accuracy", "accuracy_score"]["goal"] == {"type": "max-degradation", "value": 0.02}
    assert numbers["accuracy", "accuracy_score"]["priority"] == 2
    assert numbers["memory", "peak_rss"]["goal"]["value"] == 10**9
    assert numbers["generation", "time_per_output_token_p50"]["goal"]["value"] == 9.5
    checked = coldpress("check", str(saved))
    assert checked.returncode == 0, checked.stderr
    assert "search: tpe over 53 settings" in checked.stdout
    again = coldpress("optimize", str(phi3), "--save-config", str(saved), cwd=tmp_path)
    assert again.returncode != 0
    assert "is there already" in again.stderr


@pytest.mark.parametrize("target", ["cuda", "directml", "webgpu"])
def test_a_workflow_for_another_target_is_saved_and_not_run_here(phi3: Path, tmp_path: Path, target: str) -> None:
    saved = tmp_path / "w.yaml"
    done = coldpress("optimize", str(phi3), "--target", target, "--save-config", str(saved), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert coldpress("check", str(saved)).returncode == 0
    assert "coldpress:parity_text.txt" in saved.read_text(), "the same on a machine where it is installed elsewhere"
    if "no GPU" not in coldpress("doctor").stdout:
        return
    run = coldpress("optimize", str(phi3), "--target", target, cwd=tmp_path)
    assert run.returncode == 2
    assert "cannot be measured here" in run.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--target", "cup"], "did you mean cpu?"),
        (["--target", "mainframe"], "targets: cpu, cuda, directml, webgpu"),
        (["--objective", "sise"], "did you mean size?"),
        (["--max-size", "abc"], "--max-size: 'abc' is no size"),
        (["--max-size", "0"], "--max-size must be more than nothing"),
        (["--max-memory", "12 parsecs"], "--max-memory: '12 parsecs' is no size"),
        (["--max-quality-loss", "lots"], "--max-quality-loss is a number of percent such as 1%, not 'lots'"),
        (["--max-quality-loss=-1"], "--max-quality-loss is a number of percent"),
        (["--max-decode-latency", "0"], "--max-decode-latency"),
        (["--trials", "0"], "--trials"),
        (["--max-time", "0"], "--max-time"),
        (["--max-time", "inf"], "--max-time"),
        (["--max-decode-latency", "nan"], "--max-decode-latency"),
        (["--answer", "tone"], "there is no --data"),
        (["--template", "{a}"], "there is no --data"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--adapter", "none"], "'none' is no adapter folder"),
        (["--seed", "-1"], "--seed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_clear_message(phi3: Path, tmp_path: Path, options: list[str], said: str) -> None:
    done = coldpress("optimize", str(phi3), *options, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "output").exists()


def test_a_loss_of_more_points_than_there_are(phi3: Path, phrases: Path, tmp_path: Path) -> None:
    data = ["--data", str(phrases / "test.jsonl"), "--template", "{phrase} {tone}", "--answer", "tone"]
    done = coldpress("optimize", str(phi3), *data, "--max-quality-loss", "101", cwd=tmp_path)
    assert done.returncode == 2
    assert "101 points of accuracy, and there are 100" in done.stderr


def test_a_model_that_is_not_there_and_one_that_writes_nothing(tmp_path: Path) -> None:
    done = coldpress("optimize", "./none", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no folder './none'" in done.stderr
    make_encoder(tmp_path / "encoder")
    done = coldpress("optimize", "./encoder", cwd=tmp_path)
    assert done.returncode == 2
    assert "./encoder is no decoder that generates text (BertModel)" in done.stderr


def test_limits_that_nothing_can_keep_to(phi3: Path, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    saved = tmp_path / "w.json"
    assert coldpress("optimize", str(phi3), "--max-size", "1kB", "--save-config", str(saved)).returncode == 0
    done = coldpress("plan", str(saved), cwd=tmp_path)
    assert done.returncode == 3
    assert "53 of 53 settings are out: size_on_disk: weights alone are over 1.0 kB" in done.stdout


def test_a_search_for_real(tmp_path: Path) -> None:
    """Random weights do not survive int4: their parity refuses it, or their perplexity; what is left is handed over."""
    pytest.importorskip("optuna")
    pytest.importorskip("onnxruntime_genai")
    make_checkpoint(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    options = ["--data", "text.txt", "--objective", "size", "--trials", "6", "--max-time", "2", "--seed", "2"]
    done = coldpress("optimize", "./model", *options, "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record, _ = read_run(tmp_path / "out")
    search = record.search
    assert search is not None
    assert search.met
    winner = search.trials[(search.winner or 0) - 1]
    assert winner.state == "feasible"
    smallest = min(one.scores[0].value or 0 for one in search.trials if one.state == "feasible")
    assert winner.scores[0].value == smallest
    assert all(one.why for one in search.trials if one.state != "feasible")
    assert all("too far from its input" in one.why for one in search.trials if one.state == "failed")
    assert search.config is not None
    assert search.config["passes"]["build"]["precision"] in winner.settings["build"]
    assert (tmp_path / "out" / "model" / "genai_config.json").is_file()
    assert f"Trial {winner.number} is handed over" in (tmp_path / "out" / "report.html").read_text()
    assert f"trial {winner.number} of {len(search.trials)}" in done.stdout
