"""Which machines and processes a training runs on, and what its processes take together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from coldpress.config.schema import LocalSystem, Workflow
from coldpress.engine.places import Places
from coldpress.errors import Problem
from coldpress.hardware import Hardware
from coldpress.passes.base import Estimate
from coldpress.systems.hosts import Host, read_hosts
from coldpress.units import size

__all__ = ["together", "training_hosts"]

Refuse = Callable[[str, str, str | None], None]


def training_hosts(
    workflow: Workflow, places: Places, hardware: Hardware, refuse: Refuse
) -> tuple[tuple[Host, ...], tuple[Problem, ...]]:
    """Machines for the steps that several processes can run; none is one process here. And what a hosts file has wrong.

    `refuse` takes what is wrong with the config: message, path, hint.
    """
    name = workflow.host or workflow.target
    system = workflow.systems.get(name) if name else None
    if not isinstance(system, LocalSystem):
        return (), ()
    devices, key = len(system.accelerators), f"systems.{name}.accelerators"
    hosts: tuple[Host, ...] = (Host("localhost", devices),) if devices > 1 else ()
    if system.hosts is not None:
        key = f"systems.{name}.hosts"
        path = places.find(system.hosts)
        if path is None:
            looked = places.looked_in(system.hosts)
            refuse(f"there is no hosts file {system.hosts!r}; looked in {looked}", key, "write one machine a line")
            return (), ()
        hosts, problems = read_hosts(path, default_slots=devices)
        if problems:
            return (), problems
    here, gpus = _here(hosts), len(hardware.gpus)
    if system.accelerators[0].device == "gpu" and here > gpus > 0:
        refuse(f"{here} processes need a GPU each, and this machine has {gpus}", key, "ask for fewer")
    return (() if hosts == (Host("localhost"),) else hosts), ()


def together(one: Estimate, hosts: tuple[Host, ...]) -> tuple[Estimate, str]:
    """From the estimate of one process to that of all on this machine, and how it is made up."""
    ranks, here = sum(host.slots for host in hosts), _here(hosts)
    away = len(hosts) > 1 or not hosts[0].here
    said = f"{ranks} processes" + (f" on {', '.join(host.name for host in hosts)}" if away else "")
    said += f": about {size(one.ram)} of memory each"
    if here > 1:
        said += f", {size(one.ram * here)} on this machine"
    if one.vram:
        said += f"; {size(one.vram)} of each GPU's"
    if away:
        said += "; all machines must see the same files under the same names, and be reached by ssh without a password"
    return dataclasses.replace(one, ram=one.ram * here), said


def _here(hosts: tuple[Host, ...]) -> int:
    return sum(host.slots for host in hosts if host.here)
