"""Bad input and bad luck on the real passes: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.errors import CheckpointError, ColdpressError, ConfigError, DataError, DiskFullError, ParityError

Document = dict[str, Any]


@pytest.fixture
def project(tmp_path: Path, phi3: Path) -> Path:
    """A folder with a model and forty records."""
    shutil.copytree(phi3, tmp_path / "model")
    tones = ("sadness", "joy", "fear", "surprise")
    rows = [json.dumps({"phrase": f"this is phrase number {i}", "tone": tones[i % 4]}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.fixture
def document() -> Document:
    return {
        "input_model": {"type": "HfModel", "model_path": "model"},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
            }
        },
        "data_configs": [
            {
                "name": "train",
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": "train.jsonl", "split": "train"},
                "pre_process_data_config": {
                    "text_template": "{phrase} -> {tone}",
                    "strategy": "line-by-line",
                    "max_seq_len": 64,
                    "pad_to_max_len": False,
                },
            }
        ],
        "passes": {
            "lora": {
                "type": "LoRA",
                "r": 4,
                "target_modules": ["o_proj"],
                "train_data_config": "train",
                "eval_dataset_size": 0.2,
                "training_args": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
            },
            "merge": {"type": "MergeAdapterWeights"},
            "build": {"type": "ModelBuilder", "precision": "int4"},
        },
        "host": "here",
        "target": "here",
        "cache_dir": "cache",
        "output_dir": "output",
    }


def run(project: Path, document: Document, **options: Any) -> coldpress.RunResult:
    path = project / "workflow.json"
    path.write_text(json.dumps(document, indent=1))
    return coldpress.run(path, **options)


def nothing_half_written(project: Path) -> bool:
    steps = list((project / "cache" / "steps").glob("*")) if (project / "cache" / "steps").is_dir() else []
    outs = list((project / "cache" / "partial").glob("*/out")) if (project / "cache").is_dir() else []
    left = {path.name for path in (project / "output").glob("*")}
    said = left <= {"failed.json", "report.html"}
    return all((step / "record.json").is_file() for step in steps) and not outs and said


def refused(project: Path, document: Document, error: type[ColdpressError], *says: str) -> str:
    with pytest.raises(error) as caught:
        run(project, document)
    text = str(caught.value)
    for words in says:
        assert words in text, text
    assert nothing_half_written(project)
    return text


def test_a_missing_data_file(project: Path, document: Document) -> None:
    document["data_configs"][0]["load_dataset_config"]["data_files"] = "trian.jsonl"
    refused(project, document, ConfigError, "trian.jsonl", "workflow.json:")


def test_an_empty_data_file(project: Path, document: Document) -> None:
    (project / "train.jsonl").write_text("")
    refused(project, document, ConfigError, "train.jsonl is empty", "workflow.json:")


def test_a_broken_record_is_named_by_line(project: Path, document: Document) -> None:
    lines = (project / "train.jsonl").read_text().splitlines()
    lines[6] = '{"phrase": "cut'
    (project / "train.jsonl").write_text("\n".join(lines))
    refused(project, document, ConfigError, "train.jsonl:7", "workflow.json:")  # the plan reads the first rows


def test_a_broken_record_further_down_is_named_by_line(project: Path, document: Document) -> None:
    lines = (project / "train.jsonl").read_text().splitlines()
    lines[29] = '{"phrase": "cut'
    (project / "train.jsonl").write_text("\n".join(lines))
    refused(project, document, DataError, "train.jsonl:30")


def test_a_column_that_is_not_there(project: Path, document: Document) -> None:
    document["data_configs"][0]["pre_process_data_config"]["text_template"] = "{phrase} -> {tome}"
    refused(project, document, ConfigError, "tome", "phrase", "tone", "workflow.json:")


def test_target_modules_that_match_nothing(project: Path, document: Document) -> None:
    document["passes"]["lora"]["target_modules"] = ["q_proj", "o_proj"]
    refused(project, document, ConfigError, "q_proj", "qkv_proj", "workflow.json:")


def test_a_truncated_checkpoint(project: Path, document: Document) -> None:
    weights = project / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size - 1000)
    refused(project, document, ConfigError, "model.safetensors")


def test_a_corrupt_checkpoint(project: Path, document: Document) -> None:
    weights = project / "model" / "model.safetensors"
    with weights.open("r+b") as file:
        file.write(b"\xff" * 64)
    refused(project, document, ConfigError, "model.safetensors")


def test_a_checkpoint_with_nan(project: Path, document: Document) -> None:
    """The header is fine, so only the work can find it; it is found, and named."""
    weights = project / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4096:] = b"\xff" * 4096
    weights.write_bytes(bytes(data))
    document["passes"] = {"build": document["passes"]["build"]}
    refused(project, document, CheckpointError, "NaN")


def test_an_unknown_architecture(project: Path, document: Document) -> None:
    config = json.loads((project / "model" / "config.json").read_text())
    (project / "model" / "config.json").write_text(json.dumps({**config, "model_type": "phi5"}))
    refused(project, document, ConfigError, "phi5", "phi3", "llama")


def test_cuda_where_there_is_none_never_falls_back(project: Path, document: Document) -> None:
    document["systems"]["here"]["accelerators"] = [{"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}]
    from coldpress.hardware import detect

    if detect().gpus:
        pytest.skip("this machine has a GPU")
    refused(project, document, ConfigError, "asks for a GPU", "nothing falls back")


def test_remote_code_needs_consent(project: Path, document: Document) -> None:
    document["input_model"]["load_kwargs"] = {"trust_remote_code": True}
    config = json.loads((project / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (project / "model" / "config.json").write_text(json.dumps(config))
    (project / "model" / "evil.py").write_text("raise SystemExit('ran')\n")
    refused(project, document, ConfigError, "nobody agreed", "--trust-remote-code")


def test_remote_code_that_is_not_needed_is_said_and_not_run(project: Path, document: Document) -> None:
    document["input_model"]["load_kwargs"] = {"trust_remote_code": True}
    path = project / "workflow.json"
    path.write_text(json.dumps(document))
    assert any("not needed" in note for note in coldpress.plan(path).notes)


def test_bf16_on_the_cpu_is_refused_with_the_reason(project: Path, document: Document) -> None:
    document["passes"] = {"build": {"type": "ModelBuilder", "precision": "bf16"}}
    refused(project, document, ConfigError, "bf16", "MatMul")


def test_a_result_beyond_its_limit_is_a_failed_step(project: Path, document: Document) -> None:
    document["passes"] = {"build": {**document["passes"]["build"], "parity": {"max_kl": 1e-6}}}
    refused(project, document, ParityError, "KL", "limit")


def test_a_full_disk_in_the_middle_of_a_build(project: Path, document: Document, disk_of: Callable[..., Path]) -> None:
    small_disk = disk_of("24m")
    document["passes"] = {"build": {"type": "ModelBuilder", "precision": "fp32"}}
    document["cache_dir"] = str(small_disk / "cache")
    with pytest.raises((DiskFullError, ConfigError)) as caught:
        run(project, document)
    assert "disk" in str(caught.value)
    assert not list((small_disk / "cache").glob("partial/*/out"))
    assert not (project / "output").exists()


def test_the_cache_is_no_way_round_the_proof(project: Path, document: Document) -> None:
    build = document["passes"]["build"]
    document["passes"] = {"build": {**build, "parity": {"enabled": False}}}
    assert run(project, document).steps[0].parity is None
    document["passes"] = {"build": {**build, "parity": {"max_kl": 1e-6}}}
    with pytest.raises(ParityError, match="KL"):
        run(project, document)
    document["passes"] = {"build": build}
    proved = run(project, document).steps[0]
    assert proved.cached, "the build itself is not done again"
    assert proved.parity is not None
    assert proved.parity.passed


def test_ctrl_c_in_training_saves_and_ends_soon(project: Path, document: Document) -> None:
    document["passes"]["lora"]["training_args"] |= {"max_steps": 2000}
    path = project / "workflow.json"
    path.write_text(json.dumps(document, indent=1))
    process = subprocess.Popen(
        [sys.executable, "-m", "coldpress", "run", str(path), "--log-format", "json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "Progress":
            break
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate(timeout=45)  # far below the minute after which a worker is killed
    assert process.returncode == 130
    assert "goes on from" in complaint
    assert list((project / "cache" / "partial").glob("*/work/checkpoints/checkpoint-*/complete"))


STEPS = ("lora", "merge", "build")


@pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("step", STEPS)
def test_stopped_in_each_step_and_continued(
    project: Path, document: Document, step: str, number: signal.Signals, uninterrupted: Callable[[], list[str]]
) -> None:
    document["passes"]["lora"]["training_args"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    path = project / "workflow.json"
    path.write_text(json.dumps(document, indent=1))
    process = subprocess.Popen(
        [sys.executable, "-m", "coldpress", "run", str(path), "--log-format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        started = event["event"] == "StepStarted" and event["kind"] not in ("parity", "evaluate")
        if event.get("step") == step and (event["event"] == "Progress" if step == "lora" else started):
            break
    time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode in (130, -signal.SIGKILL, 0)
    if process.returncode != 0:
        assert not (project / "output" / "run.json").exists()
    result = run(project, document)
    assert [one.cached for one in result.steps[: STEPS.index(step)]] == [True] * STEPS.index(step)
    assert (result.output / "genai_config.json").is_file()
    assert not list((project / "cache" / "partial").iterdir())
    assert weights_of(result) == uninterrupted()


def weights_of(result: coldpress.RunResult) -> list[str]:
    from coldpress.digest import digest_file

    return [digest_file(result.output / "model.onnx.data")]


@pytest.fixture
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, project: Path, document: Document
) -> Callable[[], list[str]]:
    """The same workflow, run in one go elsewhere."""

    def go() -> list[str]:
        if not _ONE_GO:
            elsewhere = tmp_path_factory.mktemp("one-go") / "project"
            shutil.copytree(project, elsewhere, ignore=shutil.ignore_patterns("cache", "output"))
            _ONE_GO.extend(weights_of(run(elsewhere, document)))
        return _ONE_GO

    return go


_ONE_GO: list[str] = []
