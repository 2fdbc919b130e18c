"""What a run leaves behind, as typed values: `run.json` (`failed.json` of a run that failed) and `training.json`.

The string under a field is its description in the JSON Schema (`coldpress schema --record`) and in docs/run-record.md.
A reader ignores what it does not know; a field is only ever added, or `record_version` is raised. All types of the
record stand in this one file, however long it is, because they are read, and made into one page, together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coldpress.described import Described
from coldpress.errors import StoreError

__all__ = [
    "FAILED_FILE", "RECORD_FILE", "DataRecord", "DimensionRecord", "ErrorRecord", "GoalRecord", "GpuRecord",
    "HardwareRecord", "ModelRecord", "ObjectiveRecord", "OutputRecord", "ParityRecord", "RunRecord",
    "ScoreRecord", "SearchRecord", "StepRecord", "TrainedRecord", "TrainingRecord", "TrainingSummary",
    "TrialRecord", "read_run", "read_training", "record_json_schema", "to_json",
]  # fmt: skip

RECORD_FILE = "run.json"
FAILED_FILE = "failed.json"
"""In the output folder, of the last run when that failed; a run that succeeds removes it."""

R = TypeVar("R", bound=BaseModel)


class _Part(Described):
    model_config = ConfigDict(extra="ignore")


class GpuRecord(_Part):
    """One GPU."""

    name: str
    """As the driver calls it."""
    memory: int
    """Bytes."""


class HardwareRecord(_Part):
    """The machine that the run was made on. Sizes in bytes."""

    system: str
    """Operating system and its version."""
    machine: str
    """Processor architecture."""
    processor: str
    """Name of the processor."""
    cores: int
    """Physical cores that the process might use."""
    threads: int
    """Logical processors that the process might use."""
    instruction_sets: tuple[str, ...] = ()
    """Those of interest to matrix products."""
    memory: int
    """Memory that the process might use."""
    available: int
    """Of that, free when the run began."""
    gpus: tuple[GpuRecord, ...] = ()
    """GPUs that nvidia-smi lists."""
    execution_providers: tuple[str, ...] = ()
    """Of the installed ONNX Runtime."""


class ModelRecord(_Part):
    """A model, as it came in or as a step made it."""

    kind: Literal["checkpoint", "onnx"]
    """A Hugging Face checkpoint (an adapter may be on it), or an ONNX Runtime GenAI folder."""
    model_type: str
    """Family, as in its config.json."""
    precision: str = ""
    """Type of its weights: bfloat16, int4 ..."""
    parameters: int | None = None
    """Numbers in a checkpoint, its adapter left out."""
    bytes: int
    """Of its weights on disk, an adapter's and an ONNX graph included."""
    name: str = ""
    """Hub id, or name of the folder."""
    license: str | None = None
    """What the model card of the input model says."""


class ParityRecord(_Part):
    """A result compared with its input, token by token on text. Null stands for what is no finite number."""

    kl: float | None
    """Mean KL divergence, nats per token."""
    top1_agreement: float | None
    """Share of tokens for which both find the same next token the most likely."""
    perplexity_reference: float | None
    """Of the input."""
    perplexity: float | None
    """Of the result."""
    standard_error: float | None
    """Of the logarithm of the perplexities' ratio."""
    tokens: int
    """How many were compared."""
    passed: bool
    """Whether it was within the limit."""
    limit: str
    """The limit, in words."""
    reference: str = "whole"
    """How the input was computed: whole, or layer by layer."""
    compared: str = "tokens"
    """What was compared: tokens of text, or, of a classifier, texts; the other figures are then of each text, and its
    class is the token."""


class DataRecord(_Part):
    """Data that a training used."""

    name: str
    """Its data config."""
    origin: str = ""
    """File names, or hub id and revision."""
    fingerprint: str | None = None
    """sha256: of the file's bytes where it is one file, of names and digests where there are several."""
    rows: int
    """Records."""
    sequences: int
    """What they became."""
    tokens: int
    """In these, padding not counted."""
    loss_tokens: int
    """Of these, the ones that carry loss."""


class TrainedRecord(_Part):
    """What a training could change, and did."""

    parameters: int
    """Numbers that it could change."""
    of: int
    """Numbers in the model, an adapter's included."""
    layers: int
    """Modules with such numbers."""
    layers_changed: int
    """Of these, the ones that came out other than they went in."""


class TrainingSummary(_Part):
    """What a training did. Losses in nats per token, of what carries loss."""

    method: str = ""
    """The pass: LoRA, QLoRA ..."""
    steps: int
    """Updates of the weights."""
    seconds: float
    """Of the training loop; of a resumed training, since the resume."""
    tokens: int
    """Trained on, padding not counted, over all epochs."""
    tokens_per_second: float | None = None
    """Of the training loop, evaluations and checkpoints included."""
    loss_first: float | None = None
    """Mean over the first tenth of the steps."""
    loss: float
    """Mean over the last tenth of the steps."""
    eval_loss: float | None = None
    """On held-out data, of the weights that were handed over."""
    best_step: int | None = None
    """Step whose weights were handed over, where that is not the last."""
    resumed_from: int | None = None
    """Step of the checkpoint that it went on from."""
    data: DataRecord | None = None
    """Trained on."""
    held_out: DataRecord | None = None
    """Left out of training, for the evaluation loss."""
    prompt: str = ""
    """What stood before an answer in the texts, with columns in braces and braces doubled; of a classifier, all of the
    text. Empty for conversations, and where a text is one column."""
    chat_template: bool | str = False
    """Of conversations: true for the tokenizer's own chat template, else the template itself."""
    settings: Mapping[str, Any] = Field(default_factory=dict)
    """Parameters of the pass, those of the data and of the trainer left out."""
    arguments: Mapping[str, Any] = Field(default_factory=dict)
    """Arguments of Transformers' trainer."""
    trained: TrainedRecord | None = None
    """How much of the model."""
    device: str = ""
    """Name of the processor or GPU."""
    ranks: int = 1
    """Processes that trained together; a step has as many times the rows that the arguments say."""


class TrainingRecord(TrainingSummary):
    """`training.json` beside an adapter: the summary, and every figure."""

    losses: tuple[float, ...]
    """Of every step, from the first."""
    goes_on_with: str | None = None
    """The adapter that it went on training."""
    form: str = ""
    """How records went through the model: packed into one row, padded, or padded with a class each."""
    fused: Mapping[str, int] = Field(default_factory=dict)
    """Layers that computed in fused form, by kind."""
    log: tuple[Mapping[str, Any], ...] = ()
    """What the trainer logged, by `step`: `loss`, `learning_rate`, `grad_norm`, `eval_loss` ..."""
    base: ModelRecord | None = None
    """The model that was trained."""
    libraries: Mapping[str, str | None] = Field(default_factory=dict)
    """Versions."""


class StepRecord(_Part):
    """A finished step."""

    name: str
    """In the workflow."""
    type: str
    """The pass."""
    key: str
    """Under which the cache keeps it."""
    cached: bool
    """Whether it was done before this run."""
    seconds: float
    """Of the pass itself, when it ran."""
    peak_bytes: int
    """Highest resident memory of its process."""
    peak_anonymous_bytes: int
    """The part of it that no file backs."""
    ranks: int = 1
    """Processes that ran it together; time and memory are those of the first."""
    path: str
    """Its result in the cache."""
    model: ModelRecord | None = None
    """What it made."""
    parity: ParityRecord | None = None
    """The result compared with the step's input; null where the step changes the model on purpose, or the proof is
    off."""
    parity_seconds: float = 0.0
    """Time of that comparison."""
    parity_peak_bytes: int = 0
    """Highest resident memory of that comparison."""
    training: TrainingSummary | None = None
    """Of a step that trains."""
    training_file: str | None = None
    """Its training.json with every loss, relative to the folder of this record."""


class GoalRecord(_Part):
    """What a goal asked of a score."""

    type: str
    """threshold, max-degradation ..."""
    value: float
    """As in the config."""
    bound: float
    """What the score must reach, in its own unit."""
    met: bool
    """Whether it did."""
    margin: float = 0.0
    """By how much, in its own unit; what lacks is negative."""
    sure: bool = True
    """Whether the margin is more than two standard errors away from nothing; not where an error is unknown."""


class ScoreRecord(_Part):
    """A measured number of one model."""

    model: str
    """`input`, or the name of the step whose result was measured."""
    metric: str
    """Name in the config."""
    sub_type: str = ""
    """Which number of the metric."""
    value: float | None
    """Null where it is no finite number."""
    unit: str = ""
    """share, bytes, ms, tokens/s, nats/token ...; empty for a bare number."""
    higher_is_better: bool = True
    """Direction."""
    n: int
    """What it was measured on: records, tokens, repeats."""
    standard_error: float | None = None
    """0 of what is exact, such as a size; null where there is nothing to estimate it from."""
    goal: GoalRecord | None = None
    """What the config asked of it."""
    priority: int = -1
    """Rank in a search; 1 is the first."""
    details: Mapping[str, Any] = Field(default_factory=dict)
    """How it was measured: repeats, confidence, load of the machine, runner ..."""
    cached: bool = False
    """Whether it was measured before this run."""


class OutputRecord(_Part):
    """The model that was handed over."""

    key: str
    """Of the step that made it."""
    path: str
    """Its folder."""
    files: Mapping[str, tuple[int, int]]
    """Size in bytes and time of change (nanoseconds) of each, by name."""


class ErrorRecord(_Part):
    """Why a run failed."""

    type: str
    """Class of the error."""
    message: str
    """What happened."""
    hint: str | None = None
    """The way out."""
    step: str | None = None
    """Step that failed."""
    exit_code: int
    """Of the command."""
    parity: ParityRecord | None = None
    """The comparison that refused the step's result."""


class DimensionRecord(_Part):
    """One thing that a search may choose."""

    name: str
    """Step and parameter, or the step where it chooses between passes."""
    choices: tuple[Any, ...]
    """Its values."""


class ObjectiveRecord(_Part):
    """A number that a search makes better."""

    metric: str
    """The metric's name in the config."""
    sub_type: str
    """Which number of it."""
    unit: str = ""
    """Its unit."""
    higher_is_better: bool = False
    """Direction."""


class TrialRecord(_Part):
    """One setting of a search, and what came of it."""

    number: int
    """From 1, in the order of trying."""
    settings: Mapping[str, Any]
    """Dimension -> value."""
    state: Literal["feasible", "infeasible", "unproved", "failed", "pruned"]
    """feasible: measured and proved, every goal met; infeasible: misses a goal, and what is dearer was not measured;
    unproved: not proved, out of the race: `why` names the trial that is no worse; failed: an error; pruned: not run,
    because the plan proves that it is out of bounds."""
    why: str = ""
    """What stopped it."""
    violation: float = 0.0
    """How much its goals lack, as a share of what they ask, added up; at least so much where not all are `judged`."""
    judged: bool = True
    """Whether every goal is."""
    scores: tuple[ScoreRecord, ...] = ()
    """What was measured of it."""
    seconds: float = 0.0
    """From start to end; what was cached took none."""
    key: str | None = None
    """Under which the cache keeps its model."""
    same_as: int | None = None
    """Trial that made the very same model."""
    whole: bool = True
    """Whether all steps were done; false: the first ones alone (pass-by-pass), of which nothing is handed over."""


class SearchRecord(_Part):
    """A search: its space, its trials, and why this one was handed over."""

    execution_order: str
    """joint: all steps at once; pass-by-pass: step by step, going on from the best."""
    sampler: str
    """sequential, random, tpe or nsga2."""
    seed: int
    """Of the sampler."""
    space: tuple[DimensionRecord, ...]
    """What could be chosen."""
    size: int
    """Settings there are."""
    objectives: tuple[ObjectiveRecord, ...]
    """The first decides first."""
    trials: tuple[TrialRecord, ...]
    """All that were tried, in order."""
    front: tuple[int, ...]
    """Trials that no other feasible one beats in every objective."""
    winner: int | None
    """The trial that is handed over."""
    why: str
    """Why it is."""
    met: bool
    """Whether it meets every goal."""
    nearest: tuple[int, ...] = ()
    """Where nothing met the goals: the trials that lack the least as far as is known, those without a model last."""
    config: Mapping[str, Any] | None = None
    """The config of the winner alone, without the search."""
    steps_run: int = 0
    """Steps that were worked on."""
    steps_shared: int = 0
    """Steps that a trial found done, by another trial or an earlier run."""
    seconds: float = 0.0
    """From start to end."""
    stopped: str = ""
    """What ended it before every setting was tried; empty where all were."""


class RunRecord(_Part):
    """A run: what it was asked, where it ran, what it did, what it measured, what it handed over."""

    record_version: Literal[1] = 1
    """Of this format."""
    status: Literal["done", "failed"] = "done"
    """Whether it reached its end."""
    coldpress: str
    """Version of Coldpress."""
    workflow: str = ""
    """The workflow's id."""
    started: str
    """When, with the time zone."""
    seconds: float
    """From start to end."""
    config_file: str | None
    """Relative paths in the config are looked up from its folder; null when the config was given as a value."""
    dialect: str
    """Dialect that the config was written in."""
    config: Mapping[str, Any]
    """The config in today's language, with what the command line set. It holds no secrets."""
    hardware: HardwareRecord
    """The machine."""
    libraries: Mapping[str, str | None]
    """Version of each library; null where it is not installed."""
    input: Mapping[str, Any]
    """The input model: `key` (sha256 of its files) and `path`."""
    input_model: ModelRecord | None = None
    """What the input model is."""
    output: OutputRecord | None = None
    """Null when the run failed."""
    steps: tuple[StepRecord, ...] = ()
    """Finished steps, in order."""
    scores: tuple[ScoreRecord, ...] = ()
    """Everything that evaluators measured, in order."""
    warnings: tuple[str, ...] = ()
    """All that was warned of."""
    search: SearchRecord | None = None
    """The search that chose these steps; null without one."""
    error: ErrorRecord | None = None
    """Why it failed."""


def to_json(record: BaseModel) -> dict[str, Any]:
    """A record as JSON values; numbers that are not finite are null."""
    value: dict[str, Any] = json.loads(record.model_dump_json())
    return value


def record_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `run.json` and `failed.json`; in it `$defs/TrainingRecord`, of `training.json`."""
    schema = RunRecord.model_json_schema(mode="serialization")
    training = TrainingRecord.model_json_schema(mode="serialization")
    schema["$defs"] |= {**training.pop("$defs"), "TrainingRecord": training}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Record of a Coldpress run"}


def read_run(place: Path) -> tuple[RunRecord, Path]:
    """The record of a run, and its file: of an output folder the last run's, failed or not. Raises StoreError."""
    if place.is_dir():
        found = [place / name for name in (FAILED_FILE, RECORD_FILE) if (place / name).is_file()]
        if not found:
            raise StoreError(
                f"{place} holds no {RECORD_FILE}, so it is no output folder of a run",
                hint="give an output folder, or the record itself",
            )
        place = found[0]
    return _read(place, RunRecord), place


def read_training(path: Path) -> TrainingRecord:
    """A `training.json`; raises StoreError."""
    return _read(path, TrainingRecord)


def _read(path: Path, kind: type[R]) -> R:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        odd = next(_not_finite(value), None)
        if odd is not None:
            raise ValueError(f"{odd} is no number of JSON, where null stands for what is not finite")
        return kind.model_validate(value)
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # what pydantic, JSON and UTF-8 raise is a ValueError
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        what = str(error) if first is None else f"{'.'.join(map(str, first['loc'])) or 'the file'}: {first['msg']}"
        raise StoreError(
            f"{path} is no record of a run: {what}", hint="`coldpress schema --record` prints what one looks like"
        ) from error


def _not_finite(value: Any, path: str = "") -> Iterator[str]:
    """Numbers that Python reads and JSON has none of, each with its path."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{path}: {value}"
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(item, f"{path}.{key}".lstrip("."))
