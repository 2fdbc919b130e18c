"""The command as a user meets it: help, wrong names, exit codes, one clear message."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from coldpress.cli.doctor import findings
from coldpress.cli.main import _root
from coldpress.cli.text import table
from coldpress.engine.store import Store
from coldpress.hardware import Gpu, detect
from coldpress.units import duration, parse_size, settings_text, short_names, size


def coldpress(*arguments: str, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "coldpress", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        input=stdin,
        check=False,
    )


def test_every_option_says_what_it_is() -> None:
    mute, commands = [], [click.Context(_root).command]
    for command in commands:
        if isinstance(command, click.Group):
            context = click.Context(command)
            commands += [one for name in command.list_commands(context) if (one := command.get_command(context, name))]
        options = [one for one in command.params if isinstance(one, click.Option)]
        mute += [f"{command.name} {one.opts[0]}" for one in options if not one.hidden and not one.help]
    assert len(commands) > 16
    assert not mute


def test_help_lists_every_verb() -> None:
    done = coldpress("--help")
    assert done.returncode == 0
    for verb in (
        "run",
        "check",
        "plan",
        "migrate",
        "schema",
        "data",
        "finetune",
        "build",
        "optimize",
        "generate",
        "chat",
        "cache",
        "report",
    ):
        assert f"\n  {verb}" in done.stdout


@pytest.mark.parametrize(
    "verb",
    [
        "run",
        "check",
        "plan",
        "migrate",
        "schema",
        "data",
        "finetune",
        "build",
        "optimize",
        "generate",
        "chat",
        "cache",
        "doctor",
        "report",
    ],
)
def test_every_verb_has_help(verb: str) -> None:
    done = coldpress(verb, "--help")
    assert done.returncode == 0
    assert "Usage:" in done.stdout


def test_a_wrong_verb_gets_the_nearest_right_one() -> None:
    done = coldpress("chek", "x.json")
    assert done.returncode == 2
    assert "did you mean check?" in done.stderr


@pytest.mark.parametrize("verb", ["run", "check", "plan"])
def test_a_missing_file_is_one_clear_message(verb: str, tmp_path: Path) -> None:
    done = coldpress(verb, str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert "none.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_shows_what_a_search_chooses_from(tmp_path: Path) -> None:
    metric = {"name": "size", "type": "size_on_disk", "sub_types": [{"name": "bytes", "priority": 1}]}
    config = {
        "input_model": {"type": "HfModel", "model_path": "some/model"},
        "evaluators": {"sizes": {"metrics": [metric]}},
        "evaluator": "sizes",
        "passes": {"build": {"type": "ModelBuilder", "precision": ["int4", "int8"], "profile": ["fast", "balanced"]}},
        "search_strategy": {"sampler": "random"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = coldpress("check", "config.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "search: random over 4 settings: build.precision (2), build.profile (2)"
    done = coldpress("check", "config.json", "search_strategy=false", cwd=tmp_path)
    assert done.returncode == 2
    assert "write search_strategy: true, or one value" in done.stderr


def test_no_file_at_all() -> None:
    done = coldpress("run")
    assert done.returncode == 2
    assert "no config file is given" in done.stderr


def test_schema_is_json() -> None:
    done = coldpress("schema")
    assert done.returncode == 0
    assert json.loads(done.stdout)["$schema"].startswith("https://json-schema.org/")


def test_doctor_tells_what_is_here() -> None:
    report = json.loads(coldpress("doctor", "--json").stdout)
    assert report["hardware"]["cores"] >= 1
    assert report["versions"]["numpy"]


def test_doctor_knows_bad_combinations() -> None:
    versions = dict.fromkeys(
        ("torch", "transformers", "peft", "datasets", "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml",
         "onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"), "5.0"
    )  # fmt: skip
    versions |= {"onnxruntime-directml": None, "onnxruntime-genai-cuda": None, "onnxruntime-genai-directml": None}
    found = [problem for problem, _ in findings(detect(), versions)]
    assert any("onnxruntime and onnxruntime-gpu are installed together" in problem for problem in found)
    versions["onnxruntime-gpu"] = None
    assert not [problem for problem, _ in findings(detect(), versions) if "together" in problem]
    import dataclasses

    with_gpu = dataclasses.replace(detect(), gpus=(Gpu("a GPU", 8 << 30),))
    assert any("cannot use it" in problem for problem, _ in findings(with_gpu, versions))


def test_cache_names_the_folder_that_is_not_there(tmp_path: Path) -> None:
    done = coldpress("cache", "ls", cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path / ".coldpress-cache") in done.stderr


def test_a_reader_that_goes_away_is_no_failure() -> None:
    command = f"{sys.executable} -m coldpress schema | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0"
    assert "Traceback" not in done.stderr


def test_verify_of_a_damaged_cache_fails(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    store.prepare()
    (store.root / "steps" / "k").mkdir()
    (store.root / "steps" / "k" / "record.json").write_text("[]")
    done = coldpress("cache", "verify", "--cache-dir", str(store.root))
    assert done.returncode == 1
    assert "record.json" in done.stderr
    listed = coldpress("cache", "ls", "--cache-dir", str(store.root))
    assert "1 damaged" in listed.stdout
    assert coldpress("cache", "prune", "--cache-dir", str(store.root)).returncode == 0
    assert not (store.root / "steps" / "k").exists()


def test_only_a_cache_is_pruned(tmp_path: Path) -> None:
    mine = tmp_path / "partial" / "x" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    done = coldpress("cache", "prune", "--all", "--cache-dir", str(tmp_path))
    assert done.returncode == 2
    assert "is no cache of Coldpress" in done.stderr
    assert mine.read_text() == "precious"


def test_json_lines_cover_errors(tmp_path: Path) -> None:
    done = coldpress("run", str(tmp_path / "none.json"), "--log-format", "json")
    assert done.returncode == 2
    event = json.loads(done.stdout.splitlines()[-1])
    assert event["event"] == "RunFailed"
    assert event["exit_code"] == 2
    assert "none.json" in event["message"]


def test_a_wrong_share_is_refused() -> None:
    done = coldpress("finetune", "model", "--data", "x.jsonl", "--text-field", "t", "--eval-size", "abc")
    assert done.returncode == 2
    assert "--eval-size must be a share" in done.stderr


def test_numbers_as_people_read_them() -> None:
    assert [size(0), size(1500), size(2.5e6), size(7.6e9), size(None)] == ["0 B", "1.5 kB", "2.5 MB", "7.6 GB", "?"]
    assert [duration(0.44), duration(12.3), duration(185), duration(7800)] == [
        "0.4 s",
        "12 s",
        "3 min 05 s",
        "2 h 10 min",
    ]
    assert table(["a", "n"], [["x", "10"], ["yy", "7"]], right=(1,)).splitlines()[1:] == ["x   10", "yy   7"]


def test_sizes_are_read_as_they_are_written() -> None:
    assert [parse_size(text) for text in ("1kB", "1.5 kB", "1K", "2 KiB", "6.6MB")] == [
        1000,
        1500,
        1000,
        2048,
        6_600_000,
    ]


def test_settings_by_the_shortest_names_that_tell_them_apart() -> None:
    assert settings_text({}) == "as it is"
    assert settings_text({"a.r": 8, "b.r": 16, "b.args.rate": 1e-3, "b": "LoRA", "c.even": True}) == (
        "a.r 8, b.r 16, rate 0.001, b LoRA, even true"
    )
    assert short_names(["build[A].x", "build[B].x", "build[B].y"]) == {
        "build[A].x": "build[A].x", "build[B].x": "build[B].x", "build[B].y": "y",
    }  # fmt: skip
