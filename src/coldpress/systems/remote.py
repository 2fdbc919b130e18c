"""A worker on another machine, through ssh: the same Python, working folder and environment, and the same three pipes.

ssh gives its standard input to the worker and the worker's standard output back, so jobs and answers travel as they do
on this machine; what is printed comes over standard error into the log here. The environment goes first, as a line of
standard input: on the command line anybody could read it. When ssh ends, so does the worker: its input is closed.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coldpress.systems.hosts import Host

__all__ = ["STOP_LINE", "environment_line", "remote_command"]

STOP_LINE = "stop\n"
"""On a worker's standard input: what SIGTERM is on this machine."""

_OF_THIS_MACHINE = frozenset((
    "CUDA_VISIBLE_DEVICES", "DBUS_SESSION_BUS_ADDRESS", "DISPLAY", "HOME", "HOSTNAME", "LOGNAME", "MAIL", "OLDPWD",
    "PWD", "SHELL", "SHLVL", "SSH_AGENT_PID", "SSH_AUTH_SOCK", "SSH_CLIENT", "SSH_CONNECTION", "SSH_TTY", "TERM",
    "TMPDIR", "USER", "XDG_RUNTIME_DIR", "XDG_SESSION_ID", "_",
))  # fmt: skip
"""Variables that say something about this machine or this login."""

_START = """
import json, os, sys
line = b""
while not line.endswith(b"\\n"):
    byte = os.read(0, 1)
    if not byte:
        sys.exit("no environment came over standard input")
    line += byte
os.environ.update(json.loads(line))
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])
"""
"""Run there: takes its environment byte by byte, so that the jobs behind it are left to the worker."""


def remote_command(host: Host, arguments: Sequence[str]) -> list[str]:
    """What to start here so that `python -m arguments...` runs there."""
    there = shlex.join([sys.executable, "-c", _START, *arguments])
    # BatchMode: a question for a password would wait for ever.
    return ["ssh", "-o", "BatchMode=yes", host.name, f"cd {shlex.quote(str(Path.cwd()))} && exec {there}"]


def environment_line(environment: Mapping[str, str]) -> str:
    """The first line of standard input."""
    kept = {name: value for name, value in environment.items() if name not in _OF_THIS_MACHINE}
    return json.dumps(kept) + "\n"
