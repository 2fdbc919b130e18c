"""LoRA as Transformers' Trainer and PEFT do it by default: float32, batches padded to their longest row.

    PYTHON benchmarks/peer_trainer.py MODEL ROWS RESULT SETTINGS

ROWS are JSON lines with `ids`, SETTINGS a JSON object: `lora` for LoraConfig, `training` for TrainingArguments, `seed`.
RESULT gets the clock, the tokens and the loss of every step. All of it is the peer's own code: nothing of Coldpress.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended.append(time.perf_counter())


class CountingTrainer(Trainer):
    """Trainer that notes tokens and loss of every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: list[int] = []
        self.losses: list[float] = []

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.tokens.append(int(inputs["attention_mask"].sum()))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(float(loss))
        return loss


def main() -> None:
    model_folder, rows, result, settings = sys.argv[1:]
    asked = json.loads(settings)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = [{"input_ids": json.loads(line)["ids"]} for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.manual_seed(asked["seed"])
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **asked["lora"]))
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = CountingTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch, report_to="none", save_strategy="no", disable_tqdm=True, seed=asked["seed"],
                **asked["training"],
            ),
            train_dataset=data,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    found = {"ended": clock.ended, "tokens": trainer.tokens, "losses": trainer.losses}
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
