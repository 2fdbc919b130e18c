"""Canonical JSON, and sha256 of values, files and folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["DigestMemory", "canonical_json", "digest_file", "digest_files", "digest_value"]

_CHUNK = 4 << 20


class DigestMemory(Protocol):
    """Remembers file digests, so that unchanged gigabytes are not read again."""

    def get(self, path: Path) -> str | None: ...
    def put(self, path: Path, digest: str) -> None: ...


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_value(value: Any) -> str:
    """sha256 in hex of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def digest_file(path: Path, memory: DigestMemory | None = None) -> str:
    """sha256 in hex of a file's bytes."""
    if memory is not None and (known := memory.get(path)) is not None:
        return known
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    digest = state.hexdigest()
    if memory is not None:
        memory.put(path, digest)
    return digest


def digest_files(files: Mapping[str, Path] | Iterable[Path], memory: DigestMemory | None = None) -> str:
    """sha256 over names and contents. A mapping gives the names; else each file's own name counts."""
    named = dict(files) if isinstance(files, Mapping) else {path.name: path for path in files}
    return digest_value({name: digest_file(path, memory) for name, path in sorted(named.items())})
