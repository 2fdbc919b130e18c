"""What a run leaves in its output folder besides the model: its record, report, model cards, training curves.

output_dir/
  model/README.md             the card of what was handed over
  logs/STEP/training.json     every figure of a training
  run.json                    written when all of the above is; there is none without a model that belongs to it
  report.html                 the run as a page, made from the record
  failed.json                 of the last run, if that failed
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import coldpress
from coldpress.artifacts.base import Artifact, Spec, read_json
from coldpress.artifacts.weight_files import weight_bytes
from coldpress.config.load import LoadedConfig
from coldpress.data.tokenizer import chat_template_of
from coldpress.engine.plan import Plan, Step, input_artifact
from coldpress.engine.result import Score, StepResult
from coldpress.engine.store import disk_errors, write_json
from coldpress.errors import ColdpressError
from coldpress.events import ParityMeasured
from coldpress.hardware import library_versions
from coldpress.model_card import CARD_FILE, base_license, model_name, run_card, task_of
from coldpress.record import (
    FAILED_FILE,
    RECORD_FILE,
    ErrorRecord,
    HardwareRecord,
    ModelRecord,
    OutputRecord,
    ParityRecord,
    RunRecord,
    ScoreRecord,
    SearchRecord,
    StepRecord,
    TrainingSummary,
    read_training,
    to_json,
)
from coldpress.report.page import write_report

__all__ = ["LIBRARIES", "Outcome"]

LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "onnx-ir", "onnxruntime",
    "onnxruntime-genai", "numpy", "numba", "tokenizers", "safetensors",
)  # fmt: skip
"""Whose versions are recorded."""
_TRAINING_FILE = "training.json"


@dataclass(frozen=True)
class Outcome:
    """A run that has ended, one way or the other."""

    plan: Plan
    started: str
    seconds: float
    steps: Sequence[StepResult]
    scores: Sequence[Score]
    warnings: Sequence[str]
    parities: Sequence[ParityMeasured] = field(default=(), repr=False)
    """Everything that was compared, also what was refused."""
    search: SearchRecord | None = field(default=None, repr=False)
    """What chose the steps."""
    asked: LoadedConfig | None = field(default=None, repr=False)
    """The config with the search in it; None is the plan's."""

    def write(self, model: Path | None) -> Path:
        """Write all of it beside the model that was handed over, if any; returns the file of the record.

        The page comes after the record, so that one that cannot be written leaves it.
        """
        plan, folder = self.plan, self.plan.output_dir
        with disk_errors(folder):
            steps = tuple(self._step(result) for result in self.steps)
            record = self._record(steps)
            if model is not None:
                self._cards(record, model)
                record = record.model_copy(update={"output": self._output(model)})
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECORD_FILE, to_json(record))
            (folder / FAILED_FILE).unlink(missing_ok=True)
            write_report(record, folder)
        plan.store.digests.save()
        return folder / RECORD_FILE

    def write_failure(self, error: ColdpressError, step: str | None) -> Path:
        """Write what was done and why it ended; returns the page that says so."""
        folder = self.plan.output_dir
        refused = next((one for one in reversed(self.parities) if one.step == step and not one.passed), None)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            record = self._record(tuple(self._step(result) for result in self.steps)).model_copy(
                update={
                    "status": "failed",
                    "error": ErrorRecord(
                        type=type(error).__name__,
                        message=error.message,
                        hint=error.hint,
                        step=step,
                        exit_code=error.exit_code,
                        parity=None if refused is None else _parity(refused),
                    ),
                }
            )
            write_json(folder / FAILED_FILE, to_json(record))
            return write_report(record, folder)

    # -- parts of the record ------------------------------------------------------------------------------------------

    def _record(self, steps: tuple[StepRecord, ...]) -> RunRecord:
        plan = self.plan
        asked = self.asked or plan.loaded
        model = input_artifact(plan)
        return RunRecord(
            coldpress=coldpress.__version__,
            workflow=plan.loaded.workflow.workflow_id,
            started=self.started,
            seconds=round(self.seconds, 3),
            config_file=str(asked.path.resolve()) if asked.path else None,
            dialect=asked.dialect,
            config=asked.document,
            hardware=HardwareRecord.model_validate(dataclasses.asdict(plan.hardware)),
            libraries=library_versions(LIBRARIES),
            input={"key": plan.input_key, "path": str(model.model)},
            input_model=_model(plan.input_spec, model, named=True),
            steps=steps,
            scores=tuple(ScoreRecord.model_validate(dataclasses.asdict(score)) for score in self.scores),
            warnings=tuple(self.warnings),
            search=self.search,
        )

    def _step(self, result: StepResult) -> StepRecord:
        step = next(one for one in self.plan.steps if one.name == result.name)
        training = self._training(step, result)
        return StepRecord(
            name=result.name,
            type=result.type,
            key=result.key,
            cached=result.cached,
            seconds=result.seconds,
            peak_bytes=result.peak_bytes,
            peak_anonymous_bytes=result.peak_anonymous_bytes,
            ranks=result.ranks,
            path=str(result.path),
            model=_model(step.spec, Artifact.load(result.path)),
            parity=None if result.parity is None else _parity(result.parity),
            parity_seconds=result.parity_seconds,
            parity_peak_bytes=result.parity_peak_bytes,
            training=training,
            training_file=None
            if training is None
            else self._curve_of(step).relative_to(self.plan.output_dir).as_posix(),
        )

    def _curve_of(self, step: Step) -> Path:
        return self.plan.output_dir / "logs" / step.name / _TRAINING_FILE

    def _training(self, step: Step, result: StepResult) -> TrainingSummary | None:
        """What a training step says of itself; its figures are copied to the output, which outlives the cache."""
        if getattr(step.config, "train_data_config", None) is None:
            return None
        found = next((path for path in _training_files(result.path) if path.is_file()), None)
        if found is None:
            return None
        training = read_training(found)
        target = self._curve_of(step)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, target)
        return TrainingSummary.model_validate(training.model_dump())

    def _cards(self, record: RunRecord, model: Path) -> None:
        """The card of the model, and in the place of the one that came with an adapter inside it."""
        artifact = Artifact.load(model)
        own = artifact.adapter if artifact.adapter is not None and artifact.adapter.is_relative_to(model) else None
        config = artifact.model / "config.json"
        task = task_of(
            read_json(config) if config.is_file() else {},
            None if own is None else read_json(own / "adapter_config.json"),
        )
        chat = chat_template_of(artifact.tokenizer_path) is not None
        card = run_card(record, task, adapter=own is not None, chat=chat)
        for folder in (model, *((own,) if own is not None and artifact.kind == "checkpoint" else ())):
            path = folder / CARD_FILE
            if not path.is_file() or path.read_text(encoding="utf-8") != card:
                path.write_text(card, encoding="utf-8")

    def _output(self, model: Path) -> OutputRecord:
        files = {}
        for path in sorted(model.rglob("*")):
            if path.is_file():
                status = path.stat()
                files[path.relative_to(model).as_posix()] = (status.st_size, status.st_mtime_ns)
        return OutputRecord(key=self.steps[-1].key, path=str(model), files=files)


def _training_files(folder: Path) -> tuple[Path, ...]:
    return folder / "adapter" / _TRAINING_FILE, folder / _TRAINING_FILE


def _model(spec: Spec, artifact: Artifact, *, named: bool = False) -> ModelRecord:
    return ModelRecord(
        kind=spec.kind,
        model_type=spec.model_type,
        precision=spec.precision,
        parameters=spec.parameters or None,
        bytes=weight_bytes(artifact),
        name=model_name(artifact.model) if named else "",
        license=base_license(artifact.model) if named else None,
    )


def _parity(parity: ParityMeasured) -> ParityRecord:
    return ParityRecord.model_validate(dataclasses.asdict(parity))
