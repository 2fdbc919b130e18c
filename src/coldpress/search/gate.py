"""Who may use the machine: as many at once as its memory has room for, and one alone for what is timed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Gate", "Room"]


class Gate:
    """Shared by work, held alone by measurements; whoever wants it alone goes before further work."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._measuring = False
        self._wanted = 0

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Beside other work."""
        with self._changed:
            self._changed.wait_for(lambda: not self._measuring and not self._wanted)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """With nothing beside it."""
        with self._changed:
            self._wanted += 1
            self._changed.wait_for(lambda: not self._measuring and not self._working)
            self._wanted -= 1
            self._measuring = True
        try:
            yield
        finally:
            with self._changed:
                self._measuring = False
                self._changed.notify_all()


class Room:
    """Memory that trials share. One is always let in: whether it fits at all is told by its plan."""

    def __init__(self, size: int) -> None:
        self._changed = threading.Condition()
        self._size = size
        self._used = 0

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """So many bytes, as soon as they are free."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += max(size, 1)
        try:
            yield
        finally:
            with self._changed:
                self._used -= max(size, 1)
                self._changed.notify_all()
