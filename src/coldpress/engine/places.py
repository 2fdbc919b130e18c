"""Where the things a config names lie: paths resolved, models found, files that count listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from coldpress.artifacts.adapter_record import ADAPTER_HINT, adapter_folder
from coldpress.artifacts.base import Artifact, Spec
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.config.metrics import AccuracyMetric, CustomMetric, LmEvalMetric, Metric
from coldpress.config.schema import AzureMLResource, DataConfig, InputModel, LoadDataset
from coldpress.data.sources import BUNDLED_TEXT
from coldpress.errors import CheckpointError, PlanError

__all__ = ["Places", "ResolvedModel", "model_files", "spec_of_unknown"]

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_WEIGHTS_AND_CONFIGS = frozenset((".json", ".safetensors", ".bin", ".model", ".jinja", ".py", ".onnx", ".data", ".txt"))


@dataclass(frozen=True)
class ResolvedModel:
    """The input model: on this machine (`artifact`), on the hub (`hub_id`), or known by name only (`unknown`)."""

    artifact: Artifact | None = None
    hub_id: str | None = None
    revision: str | None = None
    unknown: str | None = None
    note: str | None = None
    """How the path was found, where that is not plain."""


@dataclass(frozen=True)
class Places:
    """Roots that relative paths are looked up under: the config file's folder, then the working folder."""

    config_dir: Path
    working_dir: Path

    def find(self, path: str) -> Path | None:
        """The existing file or folder that `path` names, None when there is none."""
        for root in (self.config_dir, self.working_dir):
            candidate = (root / Path(path).expanduser()).resolve()
            if candidate.exists():
                return candidate
        return None

    def looked_in(self, path: str) -> str:
        roots = dict.fromkeys((self.config_dir, self.working_dir))
        return " and ".join(str((root / path).resolve()) for root in roots)

    def output(self, path: str) -> Path:
        """Where something will be written: relative to the config file's folder."""
        return (self.config_dir / Path(path).expanduser()).resolve()

    def model(self, model: InputModel) -> ResolvedModel:
        """Find the input model; raises PlanError or CheckpointError."""
        path = model.model_path
        if isinstance(path, AzureMLResource):
            where = ", ".join(f"{key} {value}" for key, value in path.config.items() if isinstance(value, str | int))
            return ResolvedModel(unknown=f"the model lies in Azure ML ({where})")
        found = self.find(path)
        if found is not None:
            artifact = Artifact.load(found)
            if model.adapter_path is not None:
                artifact = self._with_adapter(artifact, model.adapter_path)
            if model.task == CLASSIFICATION and artifact.kind == "checkpoint":
                artifact = replace(artifact, task=CLASSIFICATION)
            note = None
            if found != (self.config_dir / path).resolve() and not Path(path).is_absolute():
                note = f"model_path {path} was found in the working folder: {found}"
            return ResolvedModel(artifact=artifact, note=note)
        if not _HUB_ID.match(path):
            raise PlanError(
                f"there is no folder {path!r}; looked in {self.looked_in(path)}",
                hint="give a folder that holds a checkpoint, or a hub id of the form org/name",
            )
        cached = _hub_snapshot(path, model.load_kwargs.revision)
        if cached is not None:
            artifact = Artifact.load(cached)
            if model.task == CLASSIFICATION:
                artifact = replace(artifact, task=CLASSIFICATION)
            return ResolvedModel(artifact=artifact, note=f"{path} is in the hub cache: {cached}")
        return ResolvedModel(
            hub_id=path,
            revision=model.load_kwargs.revision,
            unknown=f"{path} is not a folder here ({self.looked_in(path)}); as a hub id it is not downloaded yet",
        )

    def _with_adapter(self, artifact: Artifact, adapter_path: str) -> Artifact:
        found = self.find(adapter_path)
        adapter = None if found is None else adapter_folder(found)
        if adapter is None:
            raise PlanError(
                f"adapter_path {adapter_path!r} is no adapter folder; looked in {self.looked_in(adapter_path)}",
                hint=ADAPTER_HINT,
            )
        return artifact.with_adapter(adapter)

    def data(self, config: DataConfig) -> DataConfig:
        """The same data config with absolute file paths; files that are not there keep the name that was given."""
        load = config.load_dataset_config
        files = load.data_files
        resolved: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] | AzureMLResource | None
        if isinstance(files, str):
            resolved = self._file(files)
        elif isinstance(files, tuple):
            resolved = tuple(self._file(name) for name in files)
        elif isinstance(files, Mapping):
            resolved = {
                split: self._file(names) if isinstance(names, str) else tuple(self._file(name) for name in names)
                for split, names in files.items()
            }
        else:
            resolved = files
        changes: dict[str, object] = {"data_files": resolved}
        if (local := self.find(load.data_name)) is not None and local.is_dir():
            changes["data_name"] = str(local)
        load = LoadDataset.model_validate({**load.model_dump(), **changes})
        return config.model_copy(update={"load_dataset_config": load})

    def metric(self, metric: Metric) -> Metric:
        """The same metric with absolute paths; what is not there keeps the name that was given."""
        if isinstance(metric, CustomMetric):
            user = metric.user_config
            changes = {key: self._file(path) for key in ("user_script", "script_dir") if (path := getattr(user, key))}
            return metric.model_copy(update={"user_config": user.model_copy(update=changes)})
        if isinstance(metric, LmEvalMetric):
            tasks = tuple(self._file(name) if name in metric.task_files else name for name in metric.tasks)
            folder = None if metric.include_path is None else self._file(metric.include_path)
            return metric.model_copy(update={"tasks": tasks, "include_path": folder})
        if isinstance(metric, AccuracyMetric) and metric.backend == "huggingface_metrics":
            named = ((sub, self.find(sub.name)) for sub in metric.sub_types)
            subs = tuple(sub if found is None else sub.model_copy(update={"name": str(found)}) for sub, found in named)
            return metric.model_copy(update={"sub_types": subs})
        return metric

    def _file(self, name: str) -> str:
        if name == BUNDLED_TEXT:
            return str(resources.files("coldpress.data").joinpath(name.partition(":")[2]))
        found = self.find(name)
        return name if found is None else str(found)


def _hub_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a checkpoint that was downloaded before, without asking the network."""
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return None
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise PlanError(
            f"there is no folder {name!r} here, and no hub id looks like it: {error}",
            hint="give a folder that holds a checkpoint, or a hub id of the form org/name",
        ) from error
    return Path(found).parent if isinstance(found, str) else None


def model_files(artifact: Artifact) -> dict[str, Path]:
    """The files that make a model what it is, by name: configs, weights, tokenizer, adapter."""
    named = {}
    for prefix, folder in (("", artifact.model), ("adapter/", artifact.adapter), ("tokenizer/", artifact.tokenizer)):
        if folder is None:
            continue
        for path in sorted(folder.iterdir()):
            counts = path.suffix in _WEIGHTS_AND_CONFIGS and not path.name.startswith(".") and path.name != "run.json"
            if counts and path.is_file():
                named[prefix + path.name] = path
    if not named:
        raise CheckpointError(f"{artifact.model} holds no model files")
    return named


def spec_of_unknown(reason: str) -> Spec:
    """What can be said of a model that nobody has seen yet."""
    return Spec(kind="checkpoint", config={}, unknown=reason)
