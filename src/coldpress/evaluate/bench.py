"""What a metric measures on: a model, the one it came from, data, and runners that stay open between metrics."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import RunnerChoice
from coldpress.config.schema import DataConfig
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError
from coldpress.evaluate.abilities import Needs
from coldpress.evaluate.runners import open_runner, runner_names
from coldpress.events import Message, Progress, Sink

__all__ = ["Bench", "OpenRunners"]


class OpenRunners:
    """Loaded models, each kept until another runner of the same model is needed, or until `close`."""

    def __init__(self, *, trust_remote_code: bool = False) -> None:
        self._trust = trust_remote_code
        self._open: dict[tuple[Artifact, str], tuple[Any, ExitStack]] = {}

    def get(
        self,
        model: Artifact,
        needs: Needs,
        *,
        runner: RunnerChoice | None = None,
        dtype: str = "float32",
        on_block: Callable[[int, int], None] | None = None,
    ) -> Any:
        """A runner with these abilities; raises PlanError where there is none. `runner` counts where it can run it."""
        key = (model, dtype)
        chosen = runner if runner in runner_names(model) else None
        if key in self._open:
            held = self._open[key][0]
            if all(one in held.abilities for one in needs) and chosen in (None, held.kind):
                return held
            self._open.pop(key)[1].close()
        stack = ExitStack()
        found = stack.enter_context(
            open_runner(
                model, needs=needs, runner=chosen, trust_remote_code=self._trust, on_block=on_block, dtype=dtype
            )
        )
        self._open[key] = (found, stack)
        return found

    def keep(self, models: Collection[Artifact]) -> None:
        """Let go of all others."""
        for key in [key for key in self._open if key[0] not in models]:
            self._open.pop(key)[1].close()

    def close(self) -> None:
        self.keep(())


@dataclass(frozen=True)
class Bench:
    """A model to be measured."""

    model: Artifact
    runners: OpenRunners = field(repr=False)
    data_configs: Mapping[str, DataConfig] = field(default_factory=dict, repr=False)
    reference: Artifact | None = None
    """What it is compared with: the input of the workflow."""
    emit: Sink = field(default=lambda event: None, repr=False)
    step: str = ""
    device: str = "cpu"
    trust_remote_code: bool = False

    def data(self, name: str) -> DataConfig:
        if name not in self.data_configs:
            raise DataError(f"there is no data config called {name!r}")
        return self.data_configs[name]

    def runner(self, needs: Needs, choice: RunnerChoice | None = None, dtype: str = "float32") -> Any:
        return self.runners.get(self.model, needs, runner=choice, dtype=dtype, on_block=self.on_block)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.model.tokenizer_path)

    def on_block(self, done: int, blocks: int) -> None:
        self.emit(Progress(self.step, done, blocks, "layers"))

    def warn(self, text: str) -> None:
        self.emit(Message("warning", text, self.step))
