"""A Job: one thing to do, as plain values that fit in a JSON file. Every system runs the same jobs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from coldpress.artifacts.base import Artifact

__all__ = ["Job", "artifact_from_dict", "artifact_to_dict"]


@dataclass(frozen=True)
class Job:
    """What a worker process is asked to do."""

    kind: Literal["pass", "parity", "evaluate"]
    step: str
    """The step's name in the workflow, for messages."""
    model: Mapping[str, Any]
    """The input artifact, from `artifact_to_dict`."""
    accelerator: Mapping[str, Any]
    data_configs: Mapping[str, Any]
    """By name, paths absolute."""
    trust_remote_code: bool
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Of the kind: pass (`type`, `config`, `output`, `work`), parity (`reference` ...), evaluate (`metric`)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Job:
        return cls(**data)


def artifact_to_dict(artifact: Artifact) -> dict[str, Any]:
    return {"path": str(artifact.path), **artifact.record()}


def artifact_from_dict(data: Mapping[str, Any]) -> Artifact:
    return Artifact.from_record(Path(data["path"]), data)
