"""The metric `custom`: a number that the user's own Python computes, in Olive's two forms.

    evaluate_func(model, device, execution_providers, **kwargs)    the whole evaluation is the user's
    metric_func(output, targets, **kwargs)                         the model is asked here, the number is the user's

Either gives one number, or a mapping from names of sub types to numbers. The script runs when the metric is measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coldpress.config.metrics import CustomMetric
from coldpress.errors import PlanError, StepError
from coldpress.evaluate.abilities import Ability
from coldpress.evaluate.accuracy import answers_of
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.onnx_session import open_session
from coldpress.registry import nearest
from coldpress.scores import Measurement

__all__ = ["Output", "UserModel", "measure"]


@dataclass(frozen=True)
class UserModel:
    """What an evaluate_func gets: the model's files, and the model loaded in the ways that Olive's handlers offer."""

    bench: Bench = field(repr=False)

    @property
    def model_path(self) -> str:
        """Folder of the checkpoint, or the ONNX file."""
        artifact = self.bench.model
        graph = artifact.model / "model.onnx"
        return str(graph if artifact.kind == "onnx" and graph.is_file() else artifact.model)

    @property
    def adapter_path(self) -> str | None:
        return None if self.bench.model.adapter is None else str(self.bench.model.adapter)

    @property
    def tokenizer(self) -> Any:
        """Of Coldpress: `ids(text)`, `decode(ids)`, `chat(messages)`."""
        return self.bench.tokenizer()

    def runner(self, *needs: Ability) -> Any:
        """A runner of Coldpress with these abilities, which stays open for other metrics."""
        return self.bench.runner(needs)

    def load_model(self) -> Any:
        """The Transformers model of a checkpoint; the path of an ONNX model, as in Olive its bytes are not loaded."""
        if self.bench.model.kind == "onnx":
            return self.model_path
        runner = self.bench.runner(())
        return getattr(runner, "model", runner)

    def get_hf_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.bench.model.tokenizer_path, local_files_only=True)

    def prepare_session(self, *_: Any, **__: Any) -> Any:
        """An ONNX Runtime session of an ONNX model."""
        if self.bench.model.kind != "onnx":
            raise PlanError(f"{self.bench.model.path} is a checkpoint, and only ONNX models have a session")
        provider = self.bench.model.execution_provider or "CPUExecutionProvider"
        return open_session(Path(self.model_path), provider)


@dataclass(frozen=True)
class Output:
    """What a metric_func gets of the model: its answers to all records."""

    preds: Any
    """Number of the most likely label, int64 tensor [records]."""
    logits: Any
    """Score of every label, float64 tensor [records, labels]."""
    labels: tuple[str, ...]
    """The labels, in the order of the numbers."""


def measure(metric: CustomMetric, bench: Bench) -> list[Measurement]:
    """The numbers that the user's function gives, by the names of the sub types."""
    user = metric.user_config
    if (user.evaluate_func is None) == (user.metric_func is None):
        raise PlanError(f"{metric.name} needs one of evaluate_func and metric_func in user_config")
    if user.evaluate_func is not None:
        provider = bench.model.execution_provider or "CPUExecutionProvider"
        arguments: tuple[Any, ...] = (UserModel(bench), bench.device, [provider])
        n, name, options = 1, user.evaluate_func, user.evaluate_func_kwargs
    else:
        arguments, n = _answers(metric, bench)
        name, options = str(user.metric_func), user.metric_func_kwargs
    what = f"{name} of {user.user_script}"
    with _script(user.user_script, user.script_dir, name) as function:
        found = _guarded(lambda: function(*arguments, **(options or {})), what, Path(str(user.user_script)))
    return [
        Measurement(sub.name, value, "", True if sub.higher_is_better is None else sub.higher_is_better, n, None)
        for sub in metric.sub_types
        for value in (_number(found, sub.name, metric, what),)
    ]


def _answers(metric: CustomMetric, bench: Bench) -> tuple[tuple[Any, ...], int]:
    import torch

    if metric.data_config is None:
        raise PlanError(f"{metric.name} has a metric_func and no data_config", hint="name the records' data config")
    answers = answers_of(metric, bench, written=False, complete=True)
    codes = {label: place for place, label in enumerate(answers.labels)}
    truth = torch.tensor([codes[one] for one in answers.truth])
    preds = torch.tensor([codes[one] for one in answers.predicted])
    return (Output(preds, torch.from_numpy(answers.scores), answers.labels), truth), len(truth)


@contextlib.contextmanager
def _script(path: str | None, folder: str | None, name: str) -> Iterator[Callable[..., Any]]:
    """The function of a script, while its folder may be imported from; raises PlanError."""
    if path is None:
        raise PlanError(f"{name} needs the script that it stands in", hint="add user_script to user_config")
    file = Path(path)
    if not file.is_file():
        raise PlanError(f"there is no script {file}", hint="relative paths start at the config's folder")
    before = list(sys.path)
    sys.path[:0] = [str(file.parent), *([folder] if folder else [])]
    try:
        spec = importlib.util.spec_from_file_location(f"_user_script_{abs(hash(file.resolve()))}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        _guarded(lambda: spec.loader.exec_module(module), f"the script {file}", file)  # type: ignore[union-attr]
        function = getattr(module, name, None)
        if not callable(function):
            close = nearest(name, [one for one in vars(module) if not one.startswith("_")])
            raise PlanError(f"{file} has no function {name!r}", hint=f"did you mean {close}?" if close else None)
        yield function
    finally:
        sys.path[:] = before


def _guarded(call: Callable[[], Any], what: str, script: Path) -> Any:
    """Run the user's code; whatever it raises becomes a StepError that names its line."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(call)
        error = running.exception()
    if error is None:
        return running.result()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == script]
    place = f" at line {frames[-1].lineno} ({frames[-1].line})" if frames else ""
    said = traceback.TracebackException.from_exception(error)  # even of an error that cannot say itself
    raise StepError(
        f"{what} raised {type(error).__name__}: {said}{place}", hint="the function is yours; correct it there"
    ) from error


def _number(found: Any, sub: str, metric: CustomMetric, what: str) -> float:
    """One number of what the function gave; raises StepError."""
    if isinstance(found, Mapping):
        if sub not in found:
            close = nearest(sub, map(str, found))
            raise StepError(
                f"{what} gives no number {sub!r}; it gives: {', '.join(map(str, found)) or 'none'}",
                hint=f"did you mean {close}?" if close else "name sub types as the function does",
            )
        found = found[sub]
    elif len(metric.sub_types) > 1:
        raise StepError(
            f"{what} gives one number, and {metric.name} has {len(metric.sub_types)} sub types",
            hint="give a mapping from names of sub types to numbers",
        )
    if hasattr(found, "item"):
        with contextlib.suppress(ValueError, RuntimeError):  # an array or a tensor of several elements
            found = found.item()
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise StepError(f"{what} must give a number for {sub}, it gave {reprlib.repr(found)}")
    try:
        value = float(found)
    except OverflowError:  # a whole number beyond all floats
        value = math.inf if found > 0 else -math.inf
    if not math.isfinite(value):
        raise StepError(
            f"{what} gave {value:g} for {sub}, which is no number that models can be compared by",
            hint="find out why: a mean over nothing, a division by zero?",
        )
    return value
