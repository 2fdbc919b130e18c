"""The content-addressed store of finished steps.

    cache_dir/
      steps/<key>/          a finished step: the artifact, artifact.json, record.json (with a manifest of its files)
      partial/<key>/        a step under way: out/ becomes the artifact, work/ holds checkpoints for the next try
      scores/<key>.json     finished evaluations
      locks/<key>.lock      one writer a key; two runs may share a cache
      logs/<step>.log       what the steps' processes printed
      digests.json          file digests, remembered by path, size, mtime and inode

A step appears in `steps` by one rename, after everything in it reached the disk. Failures are never stored. A record
without `parity` is of a step that nobody proved yet; whoever needs it proved adds that (`steps`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.digest import digest_file
from coldpress.errors import DiskFullError, StoreError

__all__ = ["Entry", "FileDigests", "Store", "as_store_error", "disk_errors", "publish", "write_json"]

RECORD_FILE = "record.json"
MARKER_FILE = "coldpress-cache.txt"


@dataclass(frozen=True)
class Entry:
    """One finished step in the store."""

    key: str
    path: Path
    record: Mapping[str, Any]

    @property
    def bytes(self) -> int:
        return sum(int(file["size"]) for file in self.record["files"].values())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch: the time of the folder, since a use must not look like a change of its files."""
        return self.path.stat().st_mtime

    def artifact(self) -> Artifact:
        return Artifact.load(self.path)


@contextlib.contextmanager
def disk_errors(place: Path) -> Iterator[None]:
    """Turn what the operating system says about a disk into our errors, naming the place."""
    try:
        yield
    except OSError as error:
        raise as_store_error(error, place) from error


def as_store_error(error: OSError, place: Path) -> StoreError:
    where = error.filename or place
    if error.errno == errno.ENOSPC:
        return DiskFullError(
            f"no space left on the disk of {place}",
            hint="free some space (`coldpress cache prune`), or set cache_dir and output_dir elsewhere",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StoreError(
            f"{where} cannot be written: {error.strerror}",
            hint="give the folder write permission, or set cache_dir or output_dir to one that has it",
        )
    return StoreError(f"{where}: {error.strerror or error}")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that it is either the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class FileDigests:
    """Digests of files, remembered by (path, size, mtime_ns, inode). Saved by `save`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        if path.is_file():
            with contextlib.suppress(ValueError, OSError):
                known = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(known, dict):
                    self._known = {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 4}

    @staticmethod
    def _stamp(path: Path) -> list[int]:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ino]

    def get(self, path: Path) -> str | None:
        known = self._known.get(str(path.resolve()))
        if known is None or known[:3] != self._stamp(path):
            return None
        return str(known[3])

    def put(self, path: Path, digest: str) -> None:
        self._known[str(path.resolve())] = [*self._stamp(path), digest]
        self._changed = True

    def save(self) -> None:
        if self._changed:
            write_json(self._path, self._known)
            self._changed = False


class Store:
    """Finished steps under one folder. Opening it writes nothing; the first write makes the folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.digests = FileDigests(root / "digests.json")

    def prepare(self) -> None:
        """Make the folders and see that they can be written; raises StoreError."""
        with disk_errors(self.root):
            for name in ("steps", "partial", "scores", "locks", "logs"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
            for name, text in ((".gitignore", "*\n"), (MARKER_FILE, "A cache of Coldpress; see `coldpress cache`.\n")):
                if not (self.root / name).exists():
                    (self.root / name).write_text(text, encoding="utf-8")

    @property
    def is_one(self) -> bool:
        """Whether the folder is a cache, and not just any folder."""
        return (self.root / MARKER_FILE).is_file()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Say for as long as a run lasts that the cache is used, so that nobody prunes it."""
        import filelock

        with filelock.FileLock(self.root / "locks" / f"run-{os.getpid()}-{threading.get_ident()}.lock"):
            yield

    def _used_by_a_run(self) -> bool:
        import filelock

        for path in (self.root / "locks").glob("run-*.lock"):
            try:
                with filelock.FileLock(path, timeout=0):
                    pass
            except filelock.Timeout:
                return True
            path.unlink(missing_ok=True)
        return False

    def get(self, key: str, *, touch: bool = False) -> Entry | None:
        """The finished step under `key`, None when there is none or its files are not what was committed."""
        entry = self._read(self.root / "steps" / key)
        if entry is None or any(
            not _unchanged(entry.path / name, file) for name, file in entry.record["files"].items()
        ):
            return None
        if touch:
            with contextlib.suppress(OSError):
                os.utime(entry.path)
        return entry

    def amend(self, entry: Entry, **more: Any) -> Entry:
        """Add to the record of a finished step."""
        record = {**entry.record, **more}
        with disk_errors(entry.path):
            write_json(entry.path / RECORD_FILE, record)
        return Entry(entry.key, entry.path, record)

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold the key; `on_wait` is called once if another run holds it."""
        import filelock

        lock = filelock.FileLock(self.root / "locks" / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def partial(self, key: str) -> tuple[Path, Path]:
        """(out, work) of a step under way: out is empty, work is as the last try left it."""
        base = self.root / "partial" / key
        out, work = base / "out", base / "work"
        with disk_errors(base):
            if out.exists():
                shutil.rmtree(out)
            out.mkdir(parents=True)
            work.mkdir(exist_ok=True)
        return out, work

    def forget(self, key: str) -> None:
        """Delete a finished step; the caller holds the lock."""
        shutil.rmtree(self.root / "steps" / key, ignore_errors=True)

    def discard(self, key: str, *, keep_work: bool) -> None:
        """Throw away a step under way. Its work folder stays when it holds something to continue from."""
        base = self.root / "partial" / key
        shutil.rmtree(base / "out", ignore_errors=True)
        work = base / "work"
        if not keep_work or not work.is_dir() or not any(work.iterdir()):
            shutil.rmtree(base, ignore_errors=True)

    def commit(self, key: str, artifact: Artifact, record: Mapping[str, Any]) -> Entry:
        """Make a finished step visible under `key`; the caller holds the lock."""
        base = self.root / "partial" / key
        out, target = base / "out", self.root / "steps" / key
        with disk_errors(out):
            artifact.save()
            files = {
                path.relative_to(out).as_posix(): _manifest_row(path)
                for path in sorted(out.rglob("*"))
                if path.is_file()
            }
            full = {**record, "key": key, "files": files}
            write_json(out / RECORD_FILE, full)
            _sync_tree(out)
            if target.exists():
                shutil.rmtree(target)
            out.rename(target)
            _sync_folder(target.parent)
        shutil.rmtree(base, ignore_errors=True)
        return Entry(key, target, full)

    def score(self, key: str) -> dict[str, Any] | None:
        """A finished evaluation; one that makes no sense counts as absent."""
        path = self.root / "scores" / f"{key}.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) and value.get("scores") else None

    def put_score(self, key: str, value: Mapping[str, Any]) -> None:
        with disk_errors(self.root):
            write_json(self.root / "scores" / f"{key}.json", value)

    def entries(self) -> list[Entry]:
        """All finished steps, last used first."""
        found = [entry for path in (self.root / "steps").glob("*") if (entry := self._read(path)) is not None]
        return sorted(found, key=lambda entry: -entry.last_used)

    def damaged(self) -> list[Path]:
        """Folders of steps whose record is missing or makes no sense; they count as absent."""
        return [path for path in sorted((self.root / "steps").glob("*")) if self._read(path) is None]

    def _read(self, path: Path) -> Entry | None:
        try:
            record = json.loads((path / RECORD_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(record, dict) and isinstance(record.get("files"), dict)
        return Entry(path.name, path, record) if whole else None

    def verify(self) -> list[str]:
        """Read every file again; one line for each that is not what was committed."""
        wrong = []
        for path in sorted((self.root / "steps").glob("*")):
            entry = self._read(path)
            if entry is None:
                wrong.append(f"{path}: {RECORD_FILE} is missing or unreadable")
                continue
            for name, file in entry.record["files"].items():
                place = path / name
                if not place.is_file():
                    wrong.append(f"{place}: missing")
                elif digest_file(place) != file["sha256"]:
                    wrong.append(f"{place}: its sha256 is not the one that was committed")
        return wrong

    def prune(self, *, unused_for: float) -> tuple[list[str], int]:
        """Delete steps not used for that many seconds, and abandoned work; (names, bytes freed).

        A step that a kept one refers to (an adapter and its merged base) stays; a damaged one always goes. Raises
        StoreError while a run uses the cache.
        """
        if self._used_by_a_run():
            raise StoreError(f"a run is using {self.root}", hint="prune when it has ended")
        now = time.time()
        entries = {entry.key: entry for entry in self.entries()}
        kept = {key for key, entry in entries.items() if now - entry.last_used <= unused_for}
        queue = list(kept)
        while queue:
            for needed in entries[queue.pop()].record.get("refers_to", ()):
                if needed in entries and needed not in kept:
                    kept.add(needed)
                    queue.append(needed)
        removed, freed = [f"damaged                {path.name[:12]}" for path in self.damaged()], 0
        for path in self.damaged():
            freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path, ignore_errors=True)
        for key, entry in entries.items():
            if key not in kept:
                removed.append(f"{entry.record.get('pass', '?'):22s} {key[:12]}")
                freed += entry.bytes
                shutil.rmtree(entry.path, ignore_errors=True)
        for path in (self.root / "partial").glob("*"):
            if now - path.stat().st_mtime > unused_for:
                freed += sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
                removed.append(f"unfinished             {path.name[:12]}")
                shutil.rmtree(path, ignore_errors=True)
        return removed, freed


def _manifest_row(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest_file(path)}


def _unchanged(path: Path, row: Mapping[str, Any]) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return bool(status.st_size == row["size"] and status.st_mtime_ns == row["mtime_ns"])


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    """Make renames durable. Windows has no handle on folders; there the rename itself is enough."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def publish(entry: Entry, output_dir: Path) -> Path:
    """Put a copy of a finished step at `output_dir/model`; weights are hard-linked where the disk allows.

    The folder is made beside its place and swapped in by rename, so it is either the old or the new model.
    """
    target = output_dir / "model"
    run = f"{os.getpid()}-{threading.get_ident()}"
    staging, old = output_dir / f".model-{run}.new", output_dir / f".model-{run}.old"
    with disk_errors(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            for name in entry.record["files"]:
                source, place = entry.path / name, staging / name
                place.parent.mkdir(parents=True, exist_ok=True)
                _link_or_copy(source, place)
            entry.artifact().moved(staging).save()
            if target.exists():
                target.rename(old)
            staging.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return target


def _link_or_copy(source: Path, place: Path) -> None:
    """Small files are copied, because people edit them; an edit of a linked weight file is noticed by its mtime."""
    if source.stat().st_size > (1 << 20):
        try:
            os.link(source, place)
        except OSError:
            shutil.copy2(source, place)
    else:
        shutil.copy2(source, place)
