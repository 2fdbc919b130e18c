"""A pass that touches nothing and behaves as its config says; the engine tests run real workers on it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from coldpress.artifacts.base import Artifact, Spec
from coldpress.config.schema import Frozen
from coldpress.errors import Interrupted, PlanError, StepError
from coldpress.events import Message, Progress
from coldpress.passes.base import Context, Estimate, Limits, PlanContext, Planned


class FakeConfig(Frozen):
    behave: Literal["ok", "fail", "crash", "killed", "wrong", "full", "refuse", "slow", "segfault"] = "ok"
    """What the pass does."""
    seconds: float = 0.0
    """How long it takes, in ten ticks; ticks already done are not done again."""
    ram: int = 1000
    """What it says it needs, in bytes."""
    mark: str = ""
    """Makes keys differ."""
    train_data_config: str | None = None
    """A data config, to see it in the key."""
    figures: Mapping[str, float] = {}
    """Written beside the result, for a metric that reads them."""
    a: float = 0.0
    """Added to the figure `loss`, as is b."""
    b: float = 0.0
    weights: int | None = None
    """Bytes that the result's weights have, as planned."""
    size: int = 0
    """Bytes that it adds to the model's files."""
    max_kl: float | None = None
    """Limit of its proof; below 0 no result passes."""
    even: bool = False
    """Refuse an odd a."""

    @model_validator(mode="after")
    def _even(self) -> FakeConfig:
        if self.even and self.a % 2:
            raise ValueError("a is to be even")
        return self


class Fake:
    Config = FakeConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    preload: ClassVar[tuple[str, ...]] = ()
    needs_torch: ClassVar[bool] = False

    def plan(self, config: FakeConfig, spec: Spec, env: PlanContext) -> Planned:
        if config.behave == "refuse":
            raise PlanError("this pass refuses", hint="do not ask it")
        return Planned(spec, Estimate(ram=config.ram, disk=100, seconds=1.0), ("a fake",), config.weights)

    def limits(self, config: FakeConfig, spec: Spec) -> Limits | None:
        return None if config.max_kl is None else Limits(config.max_kl, 1.0)

    def run(self, config: FakeConfig, model: Artifact, ctx: Context) -> Artifact:
        (ctx.output / "half").write_text("written before anything goes wrong")
        done = len(list(ctx.work.glob("tick-*")))
        for tick in range(done, 10):
            time.sleep(config.seconds / 10)
            (ctx.work / f"tick-{tick}").touch()
            ctx.emit(Progress(ctx.step, tick + 1, 10, "ticks"))
        ctx.emit(Message("info", f"ticks done before: {done}", ctx.step))
        if config.behave == "fail":
            raise StepError("it failed on purpose", hint="ask for ok")
        if config.behave == "crash":
            raise RuntimeError("a bug, for once on purpose")
        if config.behave == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if config.behave == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if config.behave == "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(ctx.output / "half"))
        before = model.path / "figures.json"
        figures = json.loads(before.read_text()) if before.is_file() else {}
        figures.update(config.figures)
        figures["loss"] = figures.get("loss", 0.0) + config.a + config.b
        (ctx.output / "figures.json").write_text(json.dumps(figures))
        made = replace(model, path=ctx.output, tokenizer=model.tokenizer_path)
        if config.size:
            for file in model.model.iterdir():
                if not file.name.endswith("record.json"):
                    shutil.copyfile(file, ctx.output / file.name)
            with (ctx.output / "config.json").open("a") as end:
                end.write(" " * config.size)
            made = replace(made, model=ctx.output, tokenizer=ctx.output)
        if config.behave == "wrong":
            (ctx.output / "genai_config.json").write_text("{}")
            return replace(made, kind="onnx", model=ctx.output)
        return made


class TogetherConfig(Frozen):
    behave: Literal["ok", "fail", "killed", "endless"] = "ok"
    """What the last rank does, while the others wait for it."""


class Together:
    """Several processes do it: each leaves a mark in the work folder, and waits for the marks of the others."""

    Config = TogetherConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    preload: ClassVar[tuple[str, ...]] = ()
    needs_torch: ClassVar[bool] = False
    distributed: ClassVar[bool] = True

    def plan(self, config: TogetherConfig, spec: Spec, env: PlanContext) -> Planned:
        return Planned(spec, Estimate(ram=1000, disk=100, seconds=1.0), notes=(f"{env.ranks} ranks",))

    def limits(self, config: TogetherConfig, spec: Spec) -> Limits | None:
        return None

    def run(self, config: TogetherConfig, model: Artifact, ctx: Context) -> Artifact:
        sys.stderr.write(f"rank {ctx.rank} was here\n")
        stopped: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
        names = (
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "LOCAL_WORLD_SIZE",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
        )
        facts = {name: os.environ.get(name) for name in (*names, "CUDA_VISIBLE_DEVICES", "FAKE_HOST", "FAKE_SETTING")}
        (ctx.work / f"rank-{ctx.rank}").write_text(json.dumps({**facts, "cwd": str(Path.cwd())}))
        (ctx.output / "mine").write_text(str(ctx.rank))
        if config.behave != "ok" and ctx.rank == ctx.ranks - 1:
            if config.behave == "fail":
                raise StepError("the last rank fails on purpose")
            if config.behave == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        while config.behave != "ok" or len(list(ctx.work.glob("rank-*"))) < ctx.ranks:
            time.sleep(0.01)
            if stopped:
                (ctx.work / f"saved-{ctx.rank}").touch()
                raise Interrupted("saved on the way out")
        ctx.emit(Message("info", f"rank {ctx.rank} says so", ctx.step))
        # Kept in the result, since the work folder goes when the step is done.
        for path in sorted(ctx.work.glob("rank-*")) if ctx.rank == 0 else ():
            (ctx.output / f"{path.name}.json").write_text(path.read_text())
        return replace(model, path=ctx.output, tokenizer=model.tokenizer_path)
