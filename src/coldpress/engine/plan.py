"""The dry run: what a workflow will do, what it takes, and why it cannot, from configs and headers alone.

No framework is imported and no weight is read (file digests are remembered; what was never hashed and is large is not
hashed for a plan: nothing can be cached for it).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import coldpress
from coldpress.artifacts.base import Artifact, Spec
from coldpress.artifacts.classifiers import GENERATION
from coldpress.config.load import LoadedConfig
from coldpress.config.schema import Accelerator, AzureMLResource, AzureMLSystem, DataConfig, Evaluator, ParityLimits
from coldpress.data.sources import files_of
from coldpress.digest import digest_files, digest_value
from coldpress.engine.data_uses import check_columns
from coldpress.engine.evaluators import resolve_evaluators
from coldpress.engine.fits import fits
from coldpress.engine.machines import together, training_hosts
from coldpress.engine.places import Places, ResolvedModel, model_files, spec_of_unknown
from coldpress.engine.store import Store
from coldpress.engine.unseen import without_the_model
from coldpress.errors import CheckpointError, ConfigError, DataError, MissingExtraError, PlanError, Problem
from coldpress.hardware import NVIDIA_PROVIDERS, Gpu, Hardware, detect, library_versions
from coldpress.passes.base import Estimate, Limits, PlanContext
from coldpress.registry import PASSES
from coldpress.systems.hosts import Host

__all__ = ["Plan", "Step", "check_plan", "input_artifact", "make_plan"]

HASH_FOR_PLAN_BYTES = 256 << 20
"""A plan hashes a model it never saw up to this size; beyond it, the model's steps count as not cached."""


@dataclass(frozen=True)
class Step:
    """One pass of the workflow, resolved."""

    name: str
    type: str
    config: Any = field(repr=False)
    key: str | None
    """Cache key; None while something it depends on is unknown."""
    cached: bool
    spec: Spec
    estimate: Estimate | None
    """None for a finished step and for what cannot be known."""
    notes: tuple[str, ...]
    limits: Limits | None
    unproved: str | None
    """Why the result is not compared with its input, where others of its kind are."""
    """Of the comparison with its input; None where there is none."""
    parity: ParityLimits
    evaluator: str | None
    needs_torch: bool
    hosts: tuple[Host, ...]
    """Machines whose processes run it together; empty is one process here."""
    line: int | None
    unknown: str | None = None
    model_bytes: int = 0
    """Of the result's weights on disk, or less; 0 where nobody knows."""


@dataclass(frozen=True)
class Plan:
    """A whole workflow, resolved against this machine and its store."""

    loaded: LoadedConfig = field(repr=False)
    places: Places
    hardware: Hardware = field(repr=False)
    accelerator: Accelerator
    model: ResolvedModel
    input_key: str | None
    input_spec: Spec
    data_configs: Mapping[str, DataConfig] = field(repr=False)
    evaluators: Mapping[str, Evaluator] = field(repr=False)
    """Those that are used, with absolute paths."""
    steps: tuple[Step, ...]
    output_dir: Path
    store: Store = field(repr=False)
    trust_remote_code: bool
    refusals: tuple[Problem, ...] = ()
    """Why the workflow cannot work; `run` and `plan` end with exit code 2."""
    blockers: tuple[Problem, ...] = ()
    """What is missing before it can run (a later feature, a placeholder); only `run` stops for it."""
    notes: tuple[str, ...] = ()

    @property
    def estimate(self) -> Estimate:
        """Of all that is left to do: the highest memory, the sum of disk and time."""
        left = [step.estimate for step in self.steps if step.estimate is not None]
        return Estimate(
            ram=max((one.ram for one in left), default=0),
            vram=max((one.vram for one in left), default=0),
            disk=sum(one.disk for one in left),
            seconds=sum(one.seconds for one in left),
        )

    def evaluator(self, name: str) -> Evaluator:
        return self.evaluators[name]


class _Planner:
    """Gathers refusals while it walks the workflow; `plan` returns what it found."""

    def __init__(
        self, loaded: LoadedConfig, *, trust_remote_code: bool, hash_everything: bool, store: Store | None
    ) -> None:
        self.loaded = loaded
        self.workflow = loaded.workflow
        config_dir = loaded.path.parent.resolve() if loaded.path is not None else Path.cwd()
        self.places = Places(config_dir, Path.cwd())
        self.hardware = detect()
        self.consent = trust_remote_code
        self.hash_everything = hash_everything
        self.store = store or Store(self.places.output(self.workflow.cache_dir))
        self.refusals: list[Problem] = []
        self.blockers: list[Problem] = []
        self.notes: list[str] = []

    def refuse(self, message: str, path: str, hint: str | None = None) -> None:
        self.refusals.append(self._problem(message, path, hint))

    def _problem(self, message: str, path: str, hint: str | None) -> Problem:
        return Problem(message, path=path, file=str(self.loaded.path or ""), line=self.loaded.line_of(path), hint=hint)

    def plan(self) -> Plan:
        accelerator = self._system()
        hosts, problems = training_hosts(self.workflow, self.places, self.hardware, self.refuse)
        self.refusals.extend(problems)
        data_configs = {config.name: self.places.data(config) for config in self.workflow.data_configs}
        model = self._model()
        trust = self._trust(model)
        input_spec, input_key = self._input(model)
        data = {name: self._data_fingerprint(name, config) for name, config in data_configs.items()}
        steps = self._steps(input_spec, input_key, accelerator, hosts, data_configs, data)
        if hosts and not any(step.hosts for step in steps):
            many = sum(host.slots for host in hosts)
            self.notes.append(f"of {many} accelerators one is used: each step of this workflow is one process")
        if input_spec.unknown is not None:  # then no pass was asked
            self.refusals.extend(without_the_model(self.loaded))
        self._only_built_here(accelerator, steps)
        if not steps and not (self.workflow.evaluator and self.workflow.evaluate_input_model):
            hint = "add a pass, or name an evaluator that measures the model"
            self.refuse("the workflow has no passes, so there is nothing to do", "passes", hint)
        plan = Plan(
            loaded=self.loaded,
            places=self.places,
            hardware=self.hardware,
            accelerator=accelerator,
            model=model,
            input_key=input_key,
            input_spec=input_spec,
            data_configs=data_configs,
            evaluators=self._evaluators(input_spec, steps, accelerator),
            steps=steps,
            output_dir=self.places.output(self.workflow.output_dir),
            store=self.store,
            trust_remote_code=trust,
            notes=(),
        )
        check_columns(plan, self.refuse)
        self.notes += fits(plan, self.hardware, self.refuse)
        self.blockers.extend(self.loaded.placeholders)
        return Plan(
            **{
                **vars(plan),
                "refusals": tuple(self.refusals),
                "blockers": tuple(self.blockers),
                "notes": tuple(self.notes),
            }
        )

    def _system(self) -> Accelerator:
        """The accelerator that models are made for; the host's and the target's must agree for now."""
        name = self.workflow.target or self.workflow.host
        for role, used in (("host", self.workflow.host), ("target", self.workflow.target)):
            system = self.workflow.systems.get(used) if used else None
            if isinstance(system, AzureMLSystem):
                self.blockers.append(
                    self._problem(
                        f"{used} is an Azure ML compute, and running on Azure ML is not built yet",
                        role,
                        "use a LocalSystem as host and target to run it on this machine",
                    )
                )
                if role == "host" and self.workflow.target == self.workflow.host:
                    break
        if name is None:
            return Accelerator()
        system = self.workflow.systems[name]
        return system.accelerators[0]

    def _target_hardware(self, accelerator: Accelerator) -> Hardware:
        """This machine, or as much as a config says of another one."""
        if accelerator.device == "cpu" or self._is_local():
            return self.hardware
        return dataclasses.replace(self.hardware, gpus=(Gpu(name="of the remote system", memory=0),))

    def _is_local(self) -> bool:
        used = (self.workflow.host, self.workflow.target)
        return not any(isinstance(self.workflow.systems.get(name), AzureMLSystem) for name in used if name)

    def _only_built_here(self, accelerator: Accelerator, steps: tuple[Step, ...]) -> None:
        """What is made for a device that is not here is built all the same, and proved on the CPU; not measured."""
        provider, lacking = accelerator.execution_providers[0], self._lacking(accelerator)
        if lacking is None or not self._is_local():
            return
        for step in steps:
            if step.spec.kind != "onnx" or step.limits is None or step.cached:
                continue
            if step.spec.precision == "bf16":
                self.refuse(
                    f"the proof of a bf16 graph needs {provider}, since the CPU has no kernels for it: {lacking}",
                    f"passes.{step.name}",
                    "build fp16, or without a proof (parity: {enabled: false})",
                )
            else:
                self.notes.append(f"{step.name} is built for {provider} and proved on the CPU: {lacking}")

    def _lacking(self, accelerator: Accelerator) -> str | None:
        """Why models for an accelerator cannot run here; None where they can."""
        provider = accelerator.execution_providers[0]
        if (
            accelerator.device == "gpu"
            and provider in (*NVIDIA_PROVIDERS, "CPUExecutionProvider")
            and not self.hardware.gpus
        ):
            return "this machine has no GPU that nvidia-smi lists"
        if provider not in ("CPUExecutionProvider", *self.hardware.execution_providers):
            present = ", ".join(self.hardware.execution_providers) or "nothing: it is not installed"
            return f"the installed ONNX Runtime has {present}"
        return None

    def _model(self) -> ResolvedModel:
        try:
            model = self.places.model(self.workflow.input_model)
        except (PlanError, CheckpointError) as error:
            self.refuse(error.message, "input_model.model_path", error.hint)
            return ResolvedModel(unknown="the model cannot be read")
        if model.note:
            self.notes.append(model.note)
        if model.unknown and model.hub_id is None:
            self.blockers.append(
                self._problem(
                    f"{model.unknown}, and reaching Azure ML is not built yet",
                    "input_model.model_path",
                    "download the model and give its folder as model_path",
                )
            )
        return model

    def _trust(self, model: ResolvedModel) -> bool:
        """Whether the checkpoint's own code will run: asked for by the config, agreed to on the command line."""
        if not self.workflow.input_model.load_kwargs.trust_remote_code:
            return False
        if model.artifact is None:
            if self.consent:
                return True
            self.notes.append("trust_remote_code is asked for; without --trust-remote-code no such code will run")
            return False
        config = (model.artifact.model / "config.json").read_text(encoding="utf-8", errors="replace")
        if '"auto_map"' not in config:
            self.notes.append("trust_remote_code is asked for, but this checkpoint has no code of its own: not needed")
            return False
        if not self.consent:
            self.refuse(
                "the config asks to run the checkpoint's own Python code (trust_remote_code), and nobody agreed to it",
                "input_model.load_kwargs.trust_remote_code",
                "read that code, then add --trust-remote-code (or set COLDPRESS_TRUST_REMOTE_CODE=1)",
            )
        return self.consent

    def _input(self, model: ResolvedModel) -> tuple[Spec, str | None]:
        if model.artifact is None:
            return spec_of_unknown(model.unknown or "unknown"), None
        try:
            spec = model.artifact.describe()
        except CheckpointError as error:
            self.refuse(error.message, "input_model.model_path", error.hint)
            return spec_of_unknown("the model cannot be read"), None
        files = model_files(model.artifact)
        unseen = sum(path.stat().st_size for path in files.values() if self.store.digests.get(path) is None)
        if unseen > HASH_FOR_PLAN_BYTES and not self.hash_everything:
            self.notes.append(f"{unseen / 1e9:.1f} GB of weights were never hashed here, so nothing is cached for them")
            return spec, None
        found = digest_files(files, self.store.digests)
        # The same files are another model to a training when they are to become a classifier.
        return spec, found if spec.task == GENERATION else digest_value({"files": found, "task": spec.task})

    def _data_fingerprint(self, name: str, config: DataConfig) -> dict[str, Any]:
        """What identifies the records: the settings, and the contents of the files."""
        load = config.load_dataset_config
        settings = config.model_dump(mode="json", exclude={"name": True, "load_dataset_config": {"data_files"}})
        if isinstance(load.data_files, AzureMLResource):
            self.blockers.append(
                self._problem(
                    "the data lies in an Azure ML datastore, and reaching Azure ML is not built yet",
                    f"data_configs.{name}.load_dataset_config.data_files",
                    "download the file and give its path as data_files",
                )
            )
            return {"settings": settings, "bytes": None, "digest": None}
        try:
            files = files_of(config)
        except DataError as error:
            self.refuse(error.message, f"data_configs.{name}.load_dataset_config.data_files", error.hint)
            return {"settings": settings, "bytes": None, "digest": None}
        if not files:
            return {"settings": settings, "bytes": None, "digest": f"hub:{load.data_name}@{load.revision}"}
        empty = [str(path) for path in files.values() if path.stat().st_size == 0]
        if empty:
            where = f"data_configs.{name}.load_dataset_config.data_files"
            self.refuse(f"{', '.join(empty)} is empty", where, "is it the right file?")
        return {
            "settings": settings,
            "bytes": sum(path.stat().st_size for path in files.values()),
            "digest": digest_files(files, self.store.digests),
        }

    def _steps(
        self,
        spec: Spec,
        key: str | None,
        accelerator: Accelerator,
        hosts: tuple[Host, ...],
        data_configs: Mapping[str, DataConfig],
        data: Mapping[str, dict[str, Any]],
    ) -> tuple[Step, ...]:
        steps: list[Step] = []
        one_process = PlanContext(
            hardware=self._target_hardware(accelerator),
            accelerator=accelerator,
            data_configs=data_configs,
            data_bytes={name: value["bytes"] for name, value in data.items() if value["bytes"] is not None},
        )
        for name, entry in self.workflow.passes.items():
            made = PASSES[entry.type]()
            mine = hosts if getattr(made, "distributed", False) else ()
            ranks = sum(host.slots for host in mine) or 1
            crowded = max((host.slots for host in mine), default=1) if accelerator.device == "cpu" else 1
            env = dataclasses.replace(one_process, ranks=ranks, neighbours=crowded)
            unknown = spec.unknown
            estimate: Estimate | None = None
            limits = unproved = None
            notes: tuple[str, ...] = ()
            weights: int | None = 0
            before = spec
            if unknown is None:
                try:
                    planned = made.plan(entry.config, spec, env)
                except (PlanError, CheckpointError, MissingExtraError) as error:
                    self.refuse(error.message, f"passes.{name}", error.hint)
                    spec = spec_of_unknown(f"step {name} was refused")
                else:
                    spec, estimate, notes = planned.spec, planned.estimate, planned.notes
                    if mine:
                        estimate, said = together(estimate, mine)
                        notes = (said, *notes)
                    limits = made.limits(entry.config, before)
                    unproved = _unproved(made, limits, entry.parity or self.workflow.parity)
                    notes = (*notes, *([] if unproved is None else [f"not proved: {unproved}"]))
                    weights = planned.model_bytes
                    if weights is None:  # what is stored quantized has fewer bytes than it reads as
                        weights = 0 if spec.packings else spec.bytes
            key = None if key is None or spec.unknown else self._key(made, entry, key, accelerator, ranks, data)
            cached = not self.workflow.clean_cache and key is not None and self.store.get(key) is not None
            parity = entry.parity or self.workflow.parity
            steps.append(
                Step(
                    name=name,
                    type=PASSES.name_of(entry.type) or entry.type,
                    config=entry.config,
                    key=key,
                    cached=cached,
                    spec=spec,
                    estimate=None if cached else estimate,
                    notes=notes,
                    limits=_limits(limits, parity),
                    unproved=unproved,
                    parity=parity,
                    evaluator=entry.evaluator,
                    needs_torch=made.needs_torch,
                    hosts=mine,
                    line=self.loaded.line_of(f"passes.{name}"),
                    unknown=spec.unknown,
                    model_bytes=weights or 0,
                )
            )
        return tuple(steps)

    def _evaluators(self, spec: Spec, steps: tuple[Step, ...], accelerator: Accelerator) -> dict[str, Evaluator]:
        ends = [*([spec] if self.workflow.evaluate_input_model else []), *(step.spec for step in steps[-1:])]
        uses = [(self.workflow.evaluator, ends), *((step.evaluator, [step.spec]) for step in steps)]
        found, refused = resolve_evaluators(self.workflow, uses, self.places)
        self.refusals.extend(self._problem(*one) for one in refused)
        lacking = self._lacking(accelerator) if self._is_local() else None
        if found and lacking is not None:
            at = (
                "evaluator"
                if self.workflow.evaluator
                else next(f"passes.{s.name}.evaluator" for s in steps if s.evaluator)
            )
            self.refuse(
                f"what is made for {accelerator.execution_providers[0]} cannot be measured here: {lacking}",
                at,
                "leave the evaluator out to build only, and measure with `coldpress eval` where the device is; "
                "no measurement falls back to the CPU by itself",
            )
        return found

    def _key(
        self,
        made: Any,
        entry: Any,
        input_key: str,
        accelerator: Accelerator,
        ranks: int,
        data: Mapping[str, dict[str, Any]],
    ) -> str | None:
        config = entry.config.model_dump(mode="json")
        used = {}
        for field_name, value in config.items():
            if field_name.endswith("data_config") and isinstance(value, str):
                used[field_name] = data.get(value)
                config[field_name] = None
        if any(value is None or value["digest"] is None for value in used.values()):
            return None
        return digest_value(
            {
                "pass": PASSES.name_of(entry.type),
                "version": made.version,
                "config": config,
                "data": {name: {"settings": v["settings"], "digest": v["digest"]} for name, v in used.items() if v},
                "input": input_key,
                "accelerator": accelerator.model_dump(mode="json", exclude={"memory"}),
                # Each rank brings its own rows to a step: with another number of them something else is learned.
                **({"ranks": ranks} if ranks > 1 else {}),
                "libraries": library_versions(made.libraries),
                "coldpress": coldpress.__version__.split("+")[0],
            }
        )


def _unproved(made: Any, limits: Limits | None, asked: ParityLimits) -> str | None:
    """Why nobody compares what a step makes with its input, though it changes it as little as it can."""
    if limits is not None and not asked.enabled:
        return "parity is off"
    if limits is None and getattr(made, "makes", None) == "onnx":
        return "what it builds does not go from tokens to logits"
    return None


def _limits(default: Limits | None, asked: ParityLimits) -> Limits | None:
    if default is None or not asked.enabled:
        return None
    return Limits(
        kl=default.kl if asked.max_kl is None else asked.max_kl,
        perplexity_increase=(
            default.perplexity_increase if asked.max_perplexity_increase is None else asked.max_perplexity_increase
        ),
    )


def make_plan(
    loaded: LoadedConfig,
    *,
    trust_remote_code: bool = False,
    hash_everything: bool = False,
    store: Store | None = None,
) -> Plan:
    """Resolve a workflow against this machine. Refusals are in the plan, not raised; see `check_plan`.

    `store`: that of an earlier plan of the same workflow, which knows what that one hashed.
    """
    planner = _Planner(loaded, trust_remote_code=trust_remote_code, hash_everything=hash_everything, store=store)
    return planner.plan()


def check_plan(plan: Plan, *, to_run: bool) -> None:
    """Raise ConfigError with every refusal (and every blocker, before a run)."""
    problems = [*plan.refusals, *(plan.blockers if to_run else ())]
    if problems:
        raise ConfigError(problems)


def input_artifact(plan: Plan) -> Artifact:
    """The input model of a plan that has one."""
    if plan.model.artifact is None:
        raise PlanError(f"the input model is not here: {plan.model.unknown}")
    return plan.model.artifact
