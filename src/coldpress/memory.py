"""Memory of this process: now, and its highest while something runs."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path

__all__ = ["PeakMeter", "resident_memory"]

_STATM = Path("/proc/self/statm")
_PAGE = mmap.PAGESIZE


class PeakMeter:
    """Highest resident and anonymous memory of this process while the block runs, in bytes."""

    def __init__(self, seconds: float = 0.02) -> None:
        """`seconds` between two samples."""
        self._seconds = seconds
        self.total = 0
        self.anonymous = 0
        self.now = 0
        """Resident memory at the last sample."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            total, anonymous = resident_memory()
            self.now = total
            self.total, self.anonymous = max(self.total, total), max(self.anonymous, anonymous)
            if self._done.wait(self._seconds):
                return


def resident_memory() -> tuple[int, int]:
    """(resident, of that anonymous) bytes of this process; where the system tells no more, both are the resident."""
    try:
        _, pages, of_files, *_ = map(int, _STATM.read_bytes().split())
        return pages * _PAGE, (pages - of_files) * _PAGE
    except (OSError, ValueError):
        import psutil

        resident = int(psutil.Process().memory_info().rss)
        return resident, resident
