"""The store: commit by rename, remembered digests, prune, verify."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.digest import digest_file
from coldpress.engine.store import FileDigests, Store, publish, write_json


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "cache")
    store.prepare()
    return store


def commit(store: Store, key: str, model: Path, **record: object) -> None:
    out, _ = store.partial(key)
    (out / "weights").write_bytes(b"x" * 100)
    store.commit(key, Artifact(path=out, kind="checkpoint", model=model), {"pass": "Fake", "step": key, **record})


def test_a_committed_step_describes_itself(store: Store, phi3: Path) -> None:
    commit(store, "k", phi3)
    entry = store.get("k")
    assert entry is not None
    assert entry.artifact().describe().model_type == "phi3"
    assert entry.record["files"]["weights"]["size"] == 100
    assert not list((store.root / "partial").iterdir())


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"scores": {}}', '{"scores": '])
def test_a_score_that_makes_no_sense_is_absent(store: Store, text: str) -> None:
    store.put_score("k", {"scores": {"model": []}})
    assert store.score("k") is not None
    (store.root / "scores" / "k.json").write_text(text)
    assert store.score("k") is None


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one")
    memory = FileDigests(tmp_path / "digests.json")
    digest = digest_file(file, memory)
    memory.save()
    again = FileDigests(tmp_path / "digests.json")
    assert again.get(file) == digest
    file.write_bytes(b"two")
    os.utime(file, ns=(1, 1))
    assert again.get(file) is None
    assert digest_file(file, again) != digest


def test_verify_reads_every_byte(store: Store, phi3: Path) -> None:
    commit(store, "k", phi3)
    assert store.verify() == []
    weights = store.root / "steps" / "k" / "weights"
    status = weights.stat()
    weights.write_bytes(b"y" * 100)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert store.get("k") is not None, "same size and time: only verify can tell"
    assert store.verify() == [f"{weights}: its sha256 is not the one that was committed"]


def test_prune_keeps_what_a_kept_step_refers_to(store: Store, phi3: Path) -> None:
    commit(store, "base", phi3)
    commit(store, "lone", phi3)
    commit(store, "child", phi3, refers_to=["base"])
    old = time.time() - 1000
    for key in ("base", "lone"):
        os.utime(store.root / "steps" / key, (old, old))
    removed, freed = store.prune(unused_for=500)
    assert [line.split()[-1] for line in removed] == ["lone"]
    assert freed >= 100
    assert {entry.key for entry in store.entries()} == {"base", "child"}


def test_a_use_is_noted_and_changes_no_file(store: Store, phi3: Path) -> None:
    """A proof keeps its reference open for as long as the files of its step are the same."""
    commit(store, "k", phi3)
    folder = store.root / "steps" / "k"
    old = time.time() - 1000
    os.utime(folder, (old, old))
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    entry = store.get("k", touch=True)
    assert entry is not None
    assert entry.last_used > old + 500
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_json_file_is_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_publishing_replaces_the_whole_model(store: Store, phi3: Path, tmp_path: Path) -> None:
    commit(store, "k", phi3)
    output = tmp_path / "output"
    (output / "model").mkdir(parents=True)
    (output / "model" / "stale").touch()
    (output / "mine").touch()
    entry = store.get("k")
    assert entry is not None
    publish(entry, output)
    assert sorted(path.name for path in output.iterdir()) == ["mine", "model"]
    assert sorted(path.name for path in (output / "model").iterdir()) == ["artifact.json", "weights"]
    assert Artifact.load(output / "model").model == phi3
