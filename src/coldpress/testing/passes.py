"""The contract every pass must keep, as a test class to inherit.

class TestMine(PassContract):
    @pytest.fixture
    def case(self, tmp_path):
        return PassCase(Mine(), Mine.Config(bits=4), Artifact.load(model), data_configs={})
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from coldpress.artifacts.base import Artifact
from coldpress.config.candidates import candidates_of
from coldpress.config.schema import Accelerator, DataConfig
from coldpress.described import descriptions_of
from coldpress.events import Event
from coldpress.hardware import detect
from coldpress.passes.base import Context, PlanContext

__all__ = ["PassCase", "PassContract"]

_FRAMEWORKS = ("torch", "transformers", "datasets", "onnxruntime", "onnx_ir", "numba", "peft")


@dataclass(frozen=True)
class PassCase:
    """A pass with a config and a small model to run it on."""

    made: Any
    config: Any
    model: Artifact
    data_configs: Mapping[str, DataConfig] = field(default_factory=dict)
    accelerator: Accelerator = field(default_factory=Accelerator)

    def planning(self) -> PlanContext:
        return PlanContext(detect(), self.accelerator, self.data_configs, data_bytes={})

    def context(self, folder: Path, events: list[Event]) -> Context:
        for name in ("out", "work"):
            (folder / name).mkdir(parents=True)
        return Context(
            step="step",
            output=folder / "out",
            work=folder / "work",
            hardware=detect(),
            accelerator=self.accelerator,
            data_configs=self.data_configs,
            emit=events.append,
        )


class PassContract:
    """Inherit it as a test class and give a fixture `case` that returns a PassCase."""

    def test_unknown_keys_are_errors(self, case: PassCase) -> None:
        values = case.config.model_dump()
        try:
            type(case.config).model_validate({**values, "no_such_key": 1})
        except ValidationError:
            return
        raise AssertionError("a config with an unknown key was accepted")

    def test_config_survives_json(self, case: PassCase) -> None:
        """The engine hands it to the worker as JSON, and it is part of the cache key."""
        assert type(case.config).model_validate(case.config.model_dump(mode="json")) == case.config

    def test_every_field_has_help(self, case: PassCase) -> None:
        cls: type[BaseModel] = type(case.config)
        assert not set(cls.model_fields) - set(descriptions_of(cls))

    def test_candidates_of_a_search_are_values(self, case: PassCase) -> None:
        """What SEARCHABLE_VALUES stands for, one value at a time; training arguments are checked by the loader."""
        cls, given = type(case.config), case.config.model_dump(exclude_unset=True)
        for key, candidates in candidates_of(cls).items():
            assert key.split(".")[0] in cls.model_fields, f"there is no parameter {key}"
            assert len(candidates.values) > 1, f"{key} has nothing to choose from"
            for value in candidates.values if "." not in key else ():
                cls.model_validate({**given, key: value})

    def test_declarations(self, case: PassCase) -> None:
        cls = type(case.made)
        assert isinstance(cls.version, int)
        assert isinstance(cls.needs_torch, bool)
        assert all(isinstance(name, str) for name in (*cls.libraries, *cls.preload))

    def test_planning_is_pure_and_loads_no_framework(self, case: PassCase) -> None:
        spec = case.model.describe()
        first = case.made.plan(case.config, spec, case.planning())
        assert case.made.plan(case.config, spec, case.planning()) == first
        assert first.estimate.ram > 0
        assert first.estimate.disk > 0
        cls = type(case.made)
        program = f"import sys, {cls.__module__}; print(' '.join(sys.modules))"
        out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        assert not set(out.split()) & set(_FRAMEWORKS), "the top of the pass's module imports a framework"

    def test_the_artifact_is_what_was_planned(self, case: PassCase, tmp_path: Path) -> None:
        planned = case.made.plan(case.config, case.model.describe(), case.planning())
        events: list[Event] = []
        context = case.context(tmp_path / "run", events)
        artifact = case.made.run(case.config, case.model, context)
        assert planned.spec.mismatch(artifact.describe()) is None
        assert artifact.path == context.output
        artifact.save()
        moved = context.output.rename(tmp_path / "moved")
        assert planned.spec.mismatch(Artifact.load(moved).describe()) is None, "it does not survive the store's rename"
