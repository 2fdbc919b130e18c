"""Which machines a step runs on, and how many processes each runs: the hosts file.

    # one machine a line
    localhost slots=2
    trainer@node2           # as many as the system has accelerators

The first line's first process is rank 0: it writes what is kept. `localhost` is this machine; the others are reached by
`ssh`, and see the same files under the same names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldpress.errors import Problem

__all__ = ["Host", "Place", "places", "read_hosts"]

HERE = ("localhost", "127.0.0.1", "::1")
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_.@:-]+)(?:\s+slots\s*=\s*(?P<slots>\S+))?")


@dataclass(frozen=True)
class Host:
    """A machine."""

    name: str
    slots: int = 1
    """Processes that it runs."""

    @property
    def here(self) -> bool:
        return self.name in HERE

    @property
    def address(self) -> str:
        """As other machines know it, without the user to log in as."""
        return self.name.rpartition("@")[2]


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    rank: int
    host: Host
    local_rank: int
    """Its number among the ranks of its machine."""

    def __str__(self) -> str:
        return f"rank {self.rank}" + ("" if self.host.here else f" on {self.host.name}")


def places(hosts: Sequence[Host]) -> tuple[Place, ...]:
    """One for each process, in the order of the machines."""
    found: list[Place] = []
    for host in hosts:
        found += [Place(len(found) + number, host, number) for number in range(host.slots)]
    return tuple(found)


def read_hosts(path: Path, default_slots: int) -> tuple[tuple[Host, ...], tuple[Problem, ...]]:
    """The machines of a hosts file, and what is wrong with it, each with its line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return (), (Problem(f"the hosts file cannot be read: {error}", file=str(path)),)
    hosts: dict[str, Host] = {}
    problems = []
    for number, line in _lines(text):
        matched = _LINE.fullmatch(line)
        slots = (matched["slots"] or str(default_slots)) if matched else ""
        if matched is None:
            what, hint = f"{line!r} is no machine", "write one machine a line: name, or name slots=2"
        elif not (slots.isascii() and slots.isdigit() and int(slots) > 0):
            what, hint = f"slots={slots} must be a whole number above 0", "slots is how many processes the machine runs"
        elif matched["name"] in hosts:
            what, hint = f"{matched['name']} stands here twice", "give it one line, with the sum as slots=..."
        else:
            hosts[matched["name"]] = Host(matched["name"], int(slots))
            continue
        problems.append(Problem(what, file=str(path), line=number, hint=hint))
    if not hosts and not problems:
        problems.append(Problem("the hosts file names no machine", file=str(path), hint="localhost is this one"))
    return tuple(hosts.values()), tuple(problems)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered, without comments and what is empty."""
    for number, line in enumerate(text.splitlines(), start=1):
        kept = line.partition("#")[0].strip()
        if kept:
            yield number, kept
