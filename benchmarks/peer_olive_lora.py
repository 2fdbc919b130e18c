"""One Olive workflow, with a clock and a counter in its training loop; run by the Python of Olive's environment.

    PYTHON benchmarks/peer_olive_lora.py CONFIG RESULT

Olive makes a plain `transformers.Trainer`; here it is given a subclass of it that does the same and notes when the loop
begins and ends and how many tokens, padding and real ones, went through it. RESULT gets the JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import transformers

seen: dict[str, Any] = {"tokens": 0, "positions": 0, "steps": 0}


class Clock(transformers.TrainerCallback):
    """Wall time of the loop alone."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        seen["seconds"] = -time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen["seconds"] += time.perf_counter()
        seen["steps"] = state.global_step


class CountingTrainer(transformers.Trainer):
    """Trainer that counts what it trains on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(Clock())

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen["positions"] += ids.numel()
        seen["tokens"] += ids.numel() if mask is None else int(mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


def main() -> None:
    from olive.passes.pytorch import lora
    from olive.workflows import run

    # Olive's imports leave it with a `transformers` module object of its own, so it is that one's Trainer.
    lora.transformers.Trainer = CountingTrainer
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    Path(sys.argv[2]).write_text(json.dumps(seen), encoding="utf-8")


if __name__ == "__main__":
    main()
