from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.config.migrate import write_migrated
from coldpress.errors import UsageError

Load = Callable[..., LoadedConfig]


@pytest.mark.parametrize("suffix", [".json", ".yaml"])
def test_the_seed_migrates_to_a_fixed_point(seed_file: Path, load: Load, tmp_path: Path, suffix: str) -> None:
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    old = load(seed_file)
    assert write_migrated(old, first) == old.rewrites
    new = load(first)
    assert new.workflow == old.workflow
    assert (new.dialect, new.rewrites) == ("today", ())
    write_migrated(new, second)
    assert second.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("gone", ["training_args", "lora_dropout", "eval_dataset_size", "target_modules"])
def test_defaults_of_the_old_dialect_survive(local: Any, load: Load, tmp_path: Path, gone: str) -> None:
    del local["passes"]["lora"]["config"][gone]
    del local["data_configs"][0]["pre_process_data_config"]["params"]["corpus_strategy"]
    old = load(local)
    write_migrated(old, tmp_path / "new.json")
    new = load(tmp_path / "new.json")
    assert new.workflow == old.workflow
    assert new.dialect == "today"


def test_today_is_written_as_it_stands(today: Any, load: Load, tmp_path: Path) -> None:
    write_migrated(load(today), tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text()) == today


def test_keys_stand_in_the_order_of_the_schema(seed_dir: Path, load: Load, tmp_path: Path) -> None:
    write_migrated(load(seed_dir / "olive-config.local.json"), tmp_path / "new.json")
    document = json.loads((tmp_path / "new.json").read_text())
    assert list(document)[:4] == ["input_model", "systems", "data_configs", "passes"]
    assert list(document["passes"]) == ["lora", "merge_adapter_weights", "builder"]
    assert list(document["passes"]["lora"])[:3] == ["type", "r", "alpha"]
    assert "config" not in document["passes"]["lora"]
    assert "engine" not in document


def test_yaml_keeps_texts_that_look_like_something_else(today: Any, load: Load, tmp_path: Path) -> None:
    today["workflow_id"] = "1e3"
    today["data_configs"][0]["pre_process_data_config"]["text_template"] = "### Größe: {phrase}\n### yes:\n{tone} 😀"
    today["passes"]["ft"]["training_args"] = {"eval_strategy": "no", "run_name": "null", "learning_rate": 1e-05}
    old = load(today)
    write_migrated(old, tmp_path / "new.yaml")
    assert load(tmp_path / "new.yaml").workflow == old.workflow


def test_an_existing_file_is_kept_unless_forced(today: Any, load: Load, tmp_path: Path) -> None:
    target = tmp_path / "new.json"
    target.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_migrated(load(today), target)
    assert target.read_text() == "mine"
    write_migrated(load(today), target, force=True)
    assert json.loads(target.read_text()) == today
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_targets_that_cannot_be_written(today: Any, load: Load, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder"):
        write_migrated(load(today), tmp_path)
    for force in (False, True):
        with pytest.raises(UsageError, match="cannot be written"):
            write_migrated(load(today), tmp_path / "no" / "new.json", force=force)


def test_inputs_keep_their_meaning_in_another_folder(today: Any, load: Load, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new" / "deep"
    new.mkdir(parents=True)
    for name in ("model", "data"):
        (old / name).mkdir(parents=True)
    (old / "data" / "a.jsonl").touch()
    today["input_model"]["model_path"] = "model"
    loading = today["data_configs"][0]["load_dataset_config"]
    loading |= {
        "data_name": "json",
        "data_files": {"train": ["data/a.jsonl", str(old / "data" / "a.jsonl")], "test": "b"},
    }
    today["workflow_id"] = "model"
    (old / "w.json").write_text(json.dumps(today))
    write_migrated(load(old / "w.json"), new / "w.json")
    made = json.loads((new / "w.json").read_text())
    assert made["input_model"]["model_path"] == "../../old/model"
    assert made["data_configs"][0]["load_dataset_config"]["data_files"] == {
        "train": ["../../old/data/a.jsonl", str(old / "data" / "a.jsonl")],
        "test": "b",
    }
    assert made["workflow_id"] == "model"
    assert made["output_dir"] == today["output_dir"]
    write_migrated(load(old / "w.json"), old / "again.json")
    assert json.loads((old / "again.json").read_text()) == today
