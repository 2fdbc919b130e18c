"""LoRA and QLoRA on one GPU: Coldpress against Transformers' Trainer with PEFT (and bitsandbytes), padded batches.

    python benchmarks/finetune_gpu.py [--rounds 2] [--steps 10] [--budget 480] [--shapes ...] [--methods ...]
    python benchmarks/finetune_gpu.py --tiny --device cpu       # the same code on a model of nothing, to try it

For a bare machine: it needs torch, transformers, peft, accelerate and pydantic, bitsandbytes for QLoRA, and this
repository (no network, no model, no installation of Coldpress). The shapes of Llama-3.2-1B and Phi-3-mini get random
bf16 weights on the device; rows of 128 to 2,048 tokens, as many short as long ones on a log scale, 8 to a step, the
same in the same order for both sides, from the same adapter (rank 16, all linear layers). Each run is a process of its
own. Tokens are real ones, seconds those after two steps of warming up, memory is `torch.cuda.max_memory_allocated` of
the training. A side that does not fit takes half the micro-batch and twice the accumulation.

The bars: 2.5 times the tokens/s, half the memory; beside them what Unsloth publishes of itself: 2 times, 70 % less.
One JSON line for each run, then the table. A pair of runs that would not end within `--budget` seconds is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
NEEDED = ("torch", "transformers", "peft", "accelerate", "pydantic")
OURS, PEER = "Coldpress", "Trainer + PEFT"
SPEED_BAR, MEMORY_BAR = 2.5, 0.5
UNSLOTH_SPEED, UNSLOTH_MEMORY = 2.0, 0.3
WARM = 2
"""Steps before the clock starts."""
SECONDS_A_RUN = 240
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000}  # fmt: skip


def shape_config(shape: str) -> Any:
    """Transformers' config of a shape. The sliding window goes: it is as long as the context, and slows the peer."""
    from shapes import SHAPES
    from transformers import AutoConfig

    values = {**SHAPES["llama-1b"].config, **TINY} if shape == "tiny" else dict(SHAPES[shape].config)
    if "sliding_window" in values:
        values["sliding_window"] = None
    names = ("model_type", "architectures", "torch_dtype")
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k not in names})
    config.use_cache = False
    return config


def make_rows(count: int, context: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids; lengths are log-uniform from a sixteenth of the context to all of it."""
    draw = random.Random(seed)
    lengths = [round(context / 16 * 16 ** draw.random()) for _ in range(count)]
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths]


def make_model(asked: argparse.Namespace) -> Any:
    """Random weights, made where they will be trained."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(asked.device):
        model = AutoModelForCausalLM.from_config(shape_config(asked.shape), dtype=torch.bfloat16)
    if asked.method == "qlora":
        hold_in_four_bits(model)
    for parameter in model.parameters():
        parameter.requires_grad = False
    return model


def hold_in_four_bits(model: Any) -> None:
    """NF4 with double quantization for all linear layers but the head, as `load_in_4bit` would."""
    import bitsandbytes
    import torch

    linears = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }
    for name, layer in linears.items():
        device = layer.weight.device
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, packed.to(device))
    model.is_loaded_in_4bit = True


def with_adapter(model: Any, asked: argparse.Namespace) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(asked.seed)
    settings = LoraConfig(r=asked.rank, lora_alpha=asked.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


def arguments_of(asked: argparse.Namespace) -> dict[str, Any]:
    """TrainingArguments that both sides get."""
    return {
        "per_device_train_batch_size": asked.micro_batch,
        "gradient_accumulation_steps": asked.rows // asked.micro_batch,
        "max_steps": asked.steps + WARM,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "constant",
        "bf16": True,
        "use_cpu": asked.device == "cpu",
        "train_sampling_strategy": "sequential",
        "seed": asked.seed,
    }


class Clock:
    """When a step was done, on the device too."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seen: list[tuple[int, float]] = []

    def step(self, done: int) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.seen.append((done, time.perf_counter()))

    def span(self) -> tuple[int, int, float]:
        """(first step that is not counted, last step, seconds between their ends)"""
        warm = [one for one in self.seen[:-1] if one[0] >= WARM] or self.seen[:1]
        (first, began), (last, ended) = warm[0], self.seen[-1]
        return first, last, ended - began


def train_peer(model: Any, rows: Sequence[Sequence[int]], asked: argparse.Namespace, clock: Clock) -> list[float]:
    """Trainer, PEFT and, for QLoRA, what PEFT's documentation does to the model first."""
    import torch
    import transformers
    from peft import prepare_model_for_kbit_training

    if asked.method == "qlora":
        model = prepare_model_for_kbit_training(model)
    adapted = with_adapter(model, asked)
    losses: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step in (1, WARM, asked.steps + WARM):
                clock.step(state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            losses.extend([float(logs["loss"])] if "loss" in (logs or {}) else [])

    def padded(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        ids = [torch.tensor(one["input_ids"]) for one in batch]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=0),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True, padding_value=0),
            "labels": pad(ids, batch_first=True, padding_value=-100),
        }

    with tempfile.TemporaryDirectory() as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
            **arguments_of(asked),
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=adapted,
            args=arguments,
            train_dataset=[{"input_ids": list(row)} for row in rows],
            data_collator=padded,
            callbacks=[Watch()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return losses


def train_ours(model: Any, rows: Sequence[Sequence[int]], asked: argparse.Namespace, clock: Clock) -> list[float]:
    """What the passes LoRA and QLoRA do once the model is loaded."""
    from coldpress.data.packing import TokenSequence
    from coldpress.events import Event, Progress
    from coldpress.nn.train import train

    def watch(event: Event) -> None:
        if isinstance(event, Progress):
            clock.step(int(event.done))

    arguments = {**arguments_of(asked), "dataloader_pin_memory": asked.device != "cpu", **asked.ours}
    if arguments.get("gradient_checkpointing"):
        arguments.setdefault("gradient_checkpointing_kwargs", {"use_reentrant": False})
        model.enable_input_require_grads()
    adapted = with_adapter(model, asked)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    sequences = [TokenSequence(list(row), list(row)) for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        report = train(
            adapted, sequences, None, arguments=arguments, pad_id=0, work=Path(scratch), step="train", emit=watch
        )
    return list(report.losses)


def one_run(asked: argparse.Namespace) -> dict[str, Any]:
    """The process that trains: one side, once."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    rows = make_rows(
        (asked.steps + WARM) * asked.rows, asked.context, 1000 if asked.shape == "tiny" else 32000, asked.seed
    )
    clock = Clock(asked.device)
    found: dict[str, Any] = {
        "side": asked.side, "shape": asked.shape, "method": asked.method, "micro_batch": asked.micro_batch,
        "device": torch.cuda.get_device_name() if asked.device == "cuda" else "cpu", "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    try:
        model = make_model(asked)
        if asked.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        losses = {OURS: train_ours, PEER: train_peer}[asked.side](model, rows, asked, clock)
    except torch.OutOfMemoryError:
        return {**found, "fits": False}
    first, last, seconds = clock.span()
    tokens = sum(len(row) for row in rows[first * asked.rows : last * asked.rows])
    on_gpu = asked.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return {
        **found,
        "fits": True,
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
        "peak_bytes": peak,
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


class Runs:
    """Starts the processes, one after the other, and remembers which micro-batch fitted."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.fitted: dict[tuple[str, str, str], int] = {}
        self.failed = False

    def run(self, side: str, shape: str, method: str) -> dict[str, Any]:
        """The result with the largest micro-batch that fits, or the last one that does not."""
        key = (side, shape, method)
        micro = self.fitted.get(key, self.options.rows)
        while True:
            found = self._process({"side": side, "shape": shape, "method": method, "micro_batch": micro})
            print(json.dumps(found), flush=True)
            if found["fits"] or "error" in found or micro == 1:
                self.fitted[key] = micro
                return found
            micro //= 2

    def _process(self, asked: dict[str, Any]) -> dict[str, Any]:
        """What the process says. One that fails is told of and does not end the others: device time is dear."""
        shared = ("device", "context", "rows", "steps", "rank", "seed", "ours")
        settings = asked | {name: getattr(self.options, name) for name in shared}
        command = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(settings)]
        source = str(HERE.parent / "src")
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        # Trainer would spread over several devices, and what is measured is one.
        environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_A_RUN, env=environment)
        except subprocess.TimeoutExpired:
            self.failed = True
            return {**asked, "fits": False, "error": f"not done after {SECONDS_A_RUN} s"}
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found
        if "out of memory" in done.stderr:
            return {**asked, "fits": False}
        self.failed = True
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return {**asked, "fits": False, "error": done.stderr.strip().splitlines()[-1][-300:]}


def table(results: Sequence[dict[str, Any]], steps: int) -> str:
    head = ("shape, method", "side", "real tokens/s (min-max)", "peak MB", "micro-batch", f"loss after {steps} steps")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for shape, method in dict.fromkeys((one["shape"], one["method"]) for one in results):
        middle = {}
        for side in (OURS, PEER):
            mine = [one for one in results if (one["shape"], one["method"], one["side"]) == (shape, method, side)]
            fitting = [one for one in mine if one["fits"]]
            if not fitting:
                said = "failed" if any("error" in one for one in mine) else "does not fit"
                lines.append(f"| {shape}, {method} | {side} | {said} | | | |")
                continue
            rates = [one["tokens_per_second"] for one in fitting]
            peak = statistics.median(one["peak_bytes"] for one in fitting)
            middle[side] = (statistics.median(rates), peak)
            lines.append(
                f"| {shape}, {method} | {side} | {middle[side][0]:,.0f} ({min(rates):,.0f}-{max(rates):,.0f}) "
                f"| {peak / 1e6:,.0f} | {fitting[-1]['micro_batch']} | {fitting[-1]['last_loss']:.4f} |"
            )
        if len(middle) == 2:
            speed, memory = (mine / other for mine, other in zip(middle[OURS], middle[PEER], strict=True))
            lines.append(
                f"| {shape}, {method} | ratio | {speed:.2f}; bar {SPEED_BAR:g}: {word(speed >= SPEED_BAR)}; "
                f"Unsloth's {UNSLOTH_SPEED:g}: {word(speed >= UNSLOTH_SPEED)} | {memory:.2f}; bar {MEMORY_BAR:g}: "
                f"{word(memory <= MEMORY_BAR)}; Unsloth's {UNSLOTH_MEMORY:g}: {word(memory <= UNSLOTH_MEMORY)} | | |"
            )
    return "\n".join(lines)


def word(reached: bool) -> str:
    return "reached" if reached else "NOT reached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=["llama-1b", "phi-3-mini"], default=["llama-1b", "phi-3-mini"])
    parser.add_argument("--methods", nargs="+", choices=["lora", "qlora"], default=["lora", "qlora"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="measured, after two that are not")
    parser.add_argument("--rows", type=int, default=8, help="of one step")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of 0.4M parameters, 256 tokens")
    parser.add_argument("--ours", type=json.loads, default={}, help="JSON: training arguments of Coldpress alone")
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run is not None:
        print(json.dumps(one_run(argparse.Namespace(**options.run))))
        return
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise SystemExit(f"not installed here: pip install {' '.join(absent)}")
    if options.tiny:
        options.context, options.shapes = 256, ["tiny"]
    if "qlora" in options.methods and importlib.util.find_spec("bitsandbytes") is None:
        print("QLoRA is left out: bitsandbytes is not installed", flush=True)
        options.methods.remove("qlora")
    runs = Runs(options)
    results = measure_all(runs, options)
    device = next((one["device"] for one in results if one["fits"]), "nothing fitted")
    print(f"\n{device}; at most {options.rounds} rounds in turn\n\n{table(results, options.steps + WARM)}")
    raise SystemExit(1 if runs.failed else 0)


def measure_all(runs: Runs, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pairs of runs, until the rounds are done or the next pair, as long as its last one, would exceed the budget."""
    started = time.monotonic()
    took: dict[tuple[str, str], float] = {}
    results: list[dict[str, Any]] = []
    for pair in [
        (shape, method) for _ in range(options.rounds) for shape in options.shapes for method in options.methods
    ]:
        began = time.monotonic()
        if began - started + took.get(pair, 0.0) > options.budget:
            print(f"{', '.join(pair)}: no other round, the budget of {options.budget:g} s is used up", flush=True)
            continue
        results += [runs.run(side, *pair) for side in (OURS, PEER)]
        took[pair] = time.monotonic() - began
    print(f"{time.monotonic() - started:.0f} s in all", flush=True)
    return results


if __name__ == "__main__":
    main()
