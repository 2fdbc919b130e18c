"""Trainings that one process does, or several as ranks: `python -m fakes.rank_scenarios MODEL OUT NAME ...`.

Each rank writes `OUT/NAME.RANK.json` and the trained weights beside it. A step has four rows, however many ranks share
them.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.errors import ColdpressError
from coldpress.events import Event, Message, Progress
from coldpress.nn import imports

__all__ = ["FSDP", "SCENARIOS", "Outcome", "perform", "run_ranks", "sequences"]

STEP_ROWS = 4
FSDP = {
    "fsdp": True,
    "fsdp_config": {"reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
Outcome = dict[str, Any]


def sequences(count: int) -> list[TokenSequence]:
    """Of 5 to 14 tokens, one of them with hardly any loss."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        ids = [256] + [draw.choice((65, 66, 67)) for _ in range(draw.randrange(5, 14))]
        labels = [IGNORED, *ids[1:]]
        if number == 1:
            labels = [IGNORED] * (len(ids) - 1) + ids[-1:]
        made.append(TokenSequence(ids, labels))
    return made


def lora(folder: Path, dropout: float = 0.0, dtype: str = "float32", **options: Any) -> Any:
    import peft
    import torch

    from coldpress.nn.loading import load_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(
            load_model(folder, dtype=dtype),
            peft.LoraConfig(
                r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM", **options
            ),
        )


def full(folder: Path) -> Any:
    from coldpress.nn.loading import load_model

    model = load_model(folder, dtype="float32")
    model.requires_grad_(True)
    return model


def train_one(
    model: Any, work: Path, *, rank: int, ranks: int, emit: Callable[[Event], None] = lambda event: None, **how: Any
) -> Outcome:
    """13 rows in steps of four, twice: the last step of each epoch has one row. Evaluated every two steps."""
    from coldpress.nn.train import Batching, Stopping, train

    arguments = {
        "per_device_train_batch_size": STEP_ROWS // ranks,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "use_cpu": True,
        "seed": 3,
        **how.pop("arguments", {}),
    }
    said: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Message):
            said.append(event.text)
        emit(event)

    outcome: Outcome = {}
    try:
        report = train(
            model,
            sequences(how.pop("rows", 13)),
            sequences(3),
            arguments=arguments,
            pad_id=258,
            work=work,
            step="t",
            emit=listen,
            batching=Batching(tokens=how.pop("tokens", 24)),
            stopping=how.pop("stopping", Stopping(load_best=False)),
        )
    except ColdpressError as error:
        outcome |= {"error": type(error).__name__, "message": error.message}
    else:
        outcome |= report.to_dict()
        outcome["weights"] = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
        if rank == 0:
            outcome["after"] = _loss_after(model)
    return outcome | {"said": said}


def _loss_after(model: Any) -> float:
    """Of the evaluation data, by the model that was handed over, in this process alone."""
    import torch

    total = count = 0.0
    model.float().eval()
    for one in sequences(3):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([one.ids])).logits[0, :-1].float()
        targets = torch.tensor(one.labels[1:])
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets != IGNORED).sum())
    return total / count


# -- scenarios: (model folder, work folder, rank, ranks) -> outcome ----------------------------------------------------


def plain(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return train_one(lora(folder), work, rank=rank, ranks=ranks)


def checkpointed(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return train_one(lora(folder), work, rank=rank, ranks=ranks, arguments={"gradient_checkpointing": True})


def tuned(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    arguments = {
        "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 1, "ddp_broadcast_buffers": False,
        "ddp_backend": "gloo", "ddp_timeout": 60,
    }  # fmt: skip
    return train_one(lora(folder), work, rank=rank, ranks=ranks, arguments=arguments)


def padded(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    model = lora(folder)
    model.get_base_model().config.output_router_logits = True  # of mixtures of experts, which are not packed
    return train_one(model, work, rank=rank, ranks=ranks)


def grouped(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    arguments = {"train_sampling_strategy": "group_by_length"}
    return train_one(lora(folder), work, rank=rank, ranks=ranks, arguments=arguments)


def fewer_rows_than_ranks(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return train_one(lora(folder), work, rank=rank, ranks=ranks, rows=1)


def best(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    """The evaluation loss rises from some step on: training ends early, and earlier weights are handed over."""
    from coldpress.nn.train import Stopping

    arguments = {"learning_rate": 0.3, "num_train_epochs": 9, "lr_scheduler_type": "constant"}
    stopping = Stopping(load_best=True, patience=2)
    return train_one(lora(folder), work, rank=rank, ranks=ranks, arguments=arguments, stopping=stopping)


def broken(folder: Path, work: Path, rank: int, ranks: int, **arguments: Any) -> Outcome:
    """The weights of one rank become NaN during the second step."""
    model = lora(folder)

    def poison(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 1 and rank == ranks - 1:
            weight = next(one for one in model.parameters() if one.requires_grad).data
            getattr(weight, "to_local", lambda: weight)().fill_(float("nan"))

    return train_one(model, work, rank=rank, ranks=ranks, emit=poison, arguments=arguments)


def _stopped(make: Callable[[], Any], work: Path, rank: int, ranks: int, **arguments: Any) -> Outcome:
    """One rank is asked to stop in the second epoch; then all go on. `first` is the interrupted training."""

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 5 and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    first = train_one(make(), work, rank=rank, ranks=ranks, emit=stop, arguments=arguments)
    again = train_one(make(), work, rank=rank, ranks=ranks, arguments=arguments)
    whole = train_one(make(), work.with_name(f"{work.name}-whole"), rank=rank, ranks=ranks, arguments=arguments)
    return again | {"first": first, "whole": whole["losses"]}


def stopped(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return _stopped(lambda: lora(folder, dropout=0.1), work, rank, ranks)


def sharded(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return train_one(lora(folder), work, rank=rank, ranks=ranks, arguments=FSDP if ranks > 1 else {})


def sharded_otherwise(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    """The older form, with checkpoints in parts, and blocks computed again."""
    config = {"fsdp_state_dict_type": "SHARDED_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    arguments = {"fsdp": "shard_grad_op auto_wrap", "fsdp_config": config} if ranks > 1 else {}
    return _stopped(lambda: lora(folder, dropout=0.0), work, rank, ranks, gradient_checkpointing=True, **arguments)


def sharded_saved_modules(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    """A matrix is trained whole beside the adapter; the training is interrupted and goes on."""
    model = functools.partial(lora, folder, modules_to_save=["lm_head"])
    return _stopped(model, work, rank, ranks, **(FSDP if ranks > 1 else {}))


def sharded_bf16(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    """The frozen weights are bf16, the adapter float32."""
    arguments = {"bf16": True, **(FSDP if ranks > 1 else {})}
    return train_one(lora(folder, dtype="bfloat16"), work, rank=rank, ranks=ranks, arguments=arguments)


def sharded_full_bf16(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    arguments = {"bf16": True, **(FSDP if ranks > 1 else {})}
    return train_one(full(folder), work, rank=rank, ranks=ranks, arguments=arguments)


def sharded_broken(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return broken(folder, work, rank, ranks, **(FSDP if ranks > 1 else {}))


def sharded_tied(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    model = full(folder)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return train_one(model, work, rank=rank, ranks=ranks, arguments=FSDP if ranks > 1 else {})


def sharded_stopped(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    return _stopped(lambda: full(folder), work, rank, ranks, **(FSDP if ranks > 1 else {}))


def sharded_best(folder: Path, work: Path, rank: int, ranks: int) -> Outcome:
    from coldpress.nn.train import Stopping

    arguments = {"learning_rate": 0.03, "num_train_epochs": 9, "lr_scheduler_type": "constant"}
    arguments |= FSDP if ranks > 1 else {}
    stopping = Stopping(load_best=True, patience=2)
    return train_one(full(folder), work, rank=rank, ranks=ranks, arguments=arguments, stopping=stopping)


SCENARIOS: dict[str, Callable[[Path, Path, int, int], Outcome]] = {
    one.__name__: one
    for one in (
        plain, tuned, checkpointed, padded, grouped, fewer_rows_than_ranks, best, broken, stopped,
        sharded, sharded_otherwise, sharded_saved_modules, sharded_stopped, sharded_best, sharded_broken, sharded_bf16,
        sharded_full_bf16, sharded_tied,
    )
}  # fmt: skip
"""Sharded ones come last: accelerate remembers FSDP in the environment of the process."""


def perform(name: str, folder: Path, out: Path, rank: int = 0, ranks: int = 1) -> Outcome:
    import coldpress.nn.watch

    coldpress.nn.watch.PROGRESS_SECONDS = 0
    return SCENARIOS[name](folder, out / name, rank, ranks)


def run_ranks(folder: Path, out: Path, names: Sequence[str], ranks: int = 2) -> None:
    """Start the processes and wait for them; raises AssertionError with the log of one that failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "fakes.rank_scenarios", str(folder), str(out), *names]
        log = (out / f"log-{rank}").open("w+")
        started.append((subprocess.Popen(command, env=environment, stdout=log, stderr=log), log))
    codes = []
    try:
        codes = [process.wait(timeout=150) for process, _ in started]
    finally:
        for process, log in started:
            process.kill()
            process.wait()
            log.seek(0)
            text = log.read()[-3000:]
            log.close()
            assert codes == [0] * ranks, text


def main() -> None:
    import faulthandler

    faulthandler.dump_traceback_later(40)
    folder, out, *names = sys.argv[1:]
    imports.load_training()
    from safetensors.torch import save_file

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in names:
        outcome = perform(name, Path(folder), Path(out), rank, ranks)
        place = Path(out) / f"{name}.{rank}"
        weights = outcome.pop("weights", {})
        save_file({key: one.contiguous() for key, one in weights.items()}, place.with_suffix(f".{rank}.safetensors"))
        place.with_suffix(f".{rank}.json").write_text(json.dumps(outcome, default=str))
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
