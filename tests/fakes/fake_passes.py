"""A pass that touches nothing and behaves as its config says; the engine tests run real workers on it."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import replace
from typing import ClassVar, Literal

from coldpress.artifacts.base import Artifact, Spec
from coldpress.config.schema import Frozen
from coldpress.errors import PlanError, StepError
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


class Fake:
    Config = FakeConfig
    version: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("numpy",)
    preload: ClassVar[tuple[str, ...]] = ()
    needs_torch: ClassVar[bool] = False

    def plan(self, config: FakeConfig, spec: Spec, env: PlanContext) -> Planned:
        if config.behave == "refuse":
            raise PlanError("this pass refuses", hint="do not ask it")
        return Planned(spec, Estimate(ram=config.ram, disk=100, seconds=1.0), notes=("a fake",))

    def limits(self, config: FakeConfig, spec: Spec) -> Limits | None:
        return None

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
        made = replace(model, path=ctx.output, tokenizer=model.tokenizer_path)
        if config.behave == "wrong":
            (ctx.output / "genai_config.json").write_text("{}")
            return replace(made, kind="onnx", model=ctx.output)
        return made
