"""KL, agreement and perplexity against a slow oracle; and twins that are broken in one place and must be seen."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coldpress.artifacts.base import Artifact
from coldpress.artifacts.tensors import TensorSet, write_safetensors
from coldpress.config.schema import Accelerator, DataConfig, LoadDataset, PreProcess
from coldpress.data.tokenizer import Tokenizer
from coldpress.evaluate.divergence import compare
from coldpress.evaluate.runners import LayerwiseRunner, TorchRunner
from coldpress.evaluate.texts import text_sequences
from coldpress.events import Event, Message, Progress
from coldpress.hardware import detect
from coldpress.parity import KeptReference, prove
from coldpress.passes.base import Context
from coldpress.passes.merge_adapter_weights import MERGE_LIMITS
from fakes.tiny_models import make_checkpoint, make_tokenizer

RNG = np.random.default_rng(0)
SEQUENCES = [[256, *RNG.integers(0, 256, length).tolist()] for length in (5, 17, 40, 40, 63)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def changed(model: Path, target: Path, change: Callable[[str, Any], Any]) -> Path:
    """A copy of a checkpoint with some of its tensors changed."""
    shutil.copytree(model, target)
    with TensorSet.open(model) as tensors:
        made = []
        for info in tensors.infos():
            value = tensors.read(info.name).copy()
            made.append((info, change(info.name, value).astype(value.dtype)))
        write_safetensors(
            target / "model.safetensors", [(info, lambda value=value: value) for info, value in made], {"format": "pt"}
        )
    return target


def oracle(reference: Any, candidate: Any, sequences: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Position by position, in float64."""
    kl, agree, losses_p, losses_q = [], [], [], []
    for ids in sequences:
        p_rows, q_rows = (runner.logits([ids])[0].astype(np.float64) for runner in (reference, candidate))
        for place, target in enumerate(ids[1:]):
            p, q = (np.exp(rows[place] - rows[place].max()) for rows in (p_rows, q_rows))
            p, q = p / p.sum(), q / q.sum()
            kl.append(float((p * np.log(p / q)).sum()))
            agree.append(int(p.argmax()) == int(q.argmax()))
            losses_p.append(-math.log(p[target]))
            losses_q.append(-math.log(q[target]))
    return (
        float(np.mean(kl)),
        float(np.mean(agree)),
        math.exp(float(np.mean(losses_p))),
        math.exp(float(np.mean(losses_q))),
        clustered_error(np.array(losses_q) - np.array(losses_p), [ids[1:] for ids in sequences]),
    )


def clustered_error(growth: Any, targets: Sequence[Sequence[int]]) -> float:
    """The sandwich estimator written out: residuals of equal tokens vary together, of different ones apart."""
    tokens = np.concatenate(targets)
    residual = growth - growth.mean()
    together = sum(a * b for i, a in enumerate(residual) for b in residual[tokens == tokens[i]])
    return math.sqrt(together) / len(growth)


def test_against_the_oracle(model: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    other = changed(model, tmp_path / "other", lambda name, value: value + 0.02 * noise.standard_normal(value.shape))
    reference, candidate = TorchRunner(model), TorchRunner(other)
    found = compare(reference, candidate, SEQUENCES, batch_size=2)
    kl, agree, perplexity_p, perplexity_q, error = oracle(reference, candidate, SEQUENCES)
    assert found.tokens == sum(len(one) - 1 for one in SEQUENCES)
    # 1e-4: float32 log-probabilities against float64 ones.
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agree)
    assert found.perplexity_reference == pytest.approx(perplexity_p, rel=1e-4)
    assert found.perplexity == pytest.approx(perplexity_q, rel=1e-4)
    assert found.standard_error == pytest.approx(error, rel=1e-3)


def test_equal_models(model: Path) -> None:
    runner = TorchRunner(model)
    found = compare(runner, TorchRunner(model), SEQUENCES)
    assert found.kl == 0
    assert found.top1_agreement == 1
    assert found.perplexity == found.perplexity_reference


def one_head(name: str, value: Any) -> Any:
    if name == "model.layers.1.self_attn.o_proj.weight":
        value[:, :16] = 0
    return value


def one_scale(name: str, value: Any) -> Any:
    if name == "model.layers.0.mlp.down_proj.weight":
        value[:, :32] = value[:, :32] * 2
    return value


def one_norm(name: str, value: Any) -> Any:
    if name == "model.norm.weight":
        value[3] = -value[3]
    return value


@pytest.mark.parametrize("kind", [TorchRunner, LayerwiseRunner])
@pytest.mark.parametrize("damage", [one_head, one_scale, one_norm])
def test_a_broken_twin_is_seen(kind: Any, model: Path, tmp_path: Path, damage: Callable[[str, Any], Any]) -> None:
    broken = changed(model, tmp_path / "broken", damage)
    found = compare(kind(model), kind(broken), SEQUENCES)
    assert found.kl > 10 * MERGE_LIMITS.kl
    # And the damage weighs the same on either way: the whole model and the blocks are one model.
    assert found.kl == pytest.approx(compare(TorchRunner(model), TorchRunner(broken), SEQUENCES).kl, rel=1e-4)


def test_nan_is_infinitely_far(model: Path, tmp_path: Path) -> None:
    def damage(name: str, value: Any) -> Any:
        return value * np.nan if name == "model.norm.weight" else value

    broken = changed(model, tmp_path / "broken", damage)
    found = compare(TorchRunner(model), TorchRunner(broken), SEQUENCES[:1])
    assert found.kl == math.inf
    assert found.perplexity == math.inf


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Tokenizer.load(folder)


def rows(path: Path, count: int) -> DataConfig:
    path.write_text("".join(json.dumps({"text": f"row number {number:03}"}) + "\n" for number in range(count)))
    return DataConfig(
        name="rows",
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(strategy="line-by-line", max_seq_len=64),
    )


def test_text_of_the_data_comes_first_and_is_filled_up(tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = rows(tmp_path / "rows.jsonl", 20)
    some = text_sequences(tokenizer, tokens=100, data=data)
    assert 100 <= sum(len(one) - 1 for one in some) < 100 + 16
    assert tokenizer.decode(some[0]) == "<s>row number 000</s>"
    more = text_sequences(tokenizer, tokens=2000, data=data)
    assert [one for one in more[:20] if "row number" in tokenizer.decode(one)] == more[:20]
    assert 2000 <= sum(len(one) - 1 for one in more) < 2000 + 256
    assert max(map(len, more)) <= 256


def test_only_held_out_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from coldpress.data.prepare import prepare

    data = rows(tmp_path / "rows.jsonl", 40)
    trained = prepare(data, tokenizer, held_out=0.25, seed=7).train.sequences
    found = text_sequences(tokenizer, tokens=150, data=data, held_out={"size": 0.25, "seed": 7})
    assert len(found) == 10
    assert not {tuple(one) for one in found} & {tuple(one.ids) for one in trained}


def test_prove(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    data = rows(tmp_path / "rows.jsonl", 10)
    context = Context("merge", tmp_path, tmp_path, detect(), Accelerator(), {"rows": data}, events.append)
    noise = np.random.default_rng(1)
    other = changed(model, tmp_path / "other", lambda name, value: value + 0.02 * noise.standard_normal(value.shape))
    found = prove(Artifact.load(model), Artifact.load(other), context, tokens=300, data_config="rows")
    assert set(found) == {
        "kl", "top1_agreement", "perplexity_reference", "perplexity", "standard_error", "tokens", "reference",
        "kl_error", "top1_error",
    }  # fmt: skip
    assert found["reference"] == "layer by layer"
    layers = [event for event in events if isinstance(event, Progress) and event.unit == "layers"]
    assert [(event.done, event.total) for event in layers] == [(1, 2), (2, 2)] * 2, "the reference, then the candidate"
    assert found["kl"] > 0
    assert found["tokens"] >= 300
    assert not [event for event in events if isinstance(event, Message)]


def test_one_weight_of_one_layer_damaged_on_disk(model: Path, tmp_path: Path) -> None:
    """The reference is read from its file: one weight wrong there is a distance here."""
    context = Context("build", tmp_path, tmp_path, detect(), Accelerator(), {}, lambda event: None)
    whole = prove(Artifact.load(model), Artifact.load(model), context, tokens=300)
    assert (whole["kl"], whole["top1_agreement"]) == (0, 1)
    broken = Path(shutil.copytree(model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    length = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]["data_offsets"][0]
    data[8 + length + place : 8 + length + place + 2] = (0x4380).to_bytes(2, "little")  # bf16 256
    weights.write_bytes(data)
    found = prove(Artifact.load(broken), Artifact.load(model), context, tokens=300)
    assert found["kl"] > 10 * MERGE_LIMITS.kl


def test_a_reference_that_is_kept_goes_through_its_blocks_once(model: Path, tmp_path: Path) -> None:
    def layers(reference: Path, kept: KeptReference | None) -> tuple[int, dict[str, Any]]:
        events: list[Event] = []
        context = Context("build", tmp_path, tmp_path, detect(), Accelerator(), {}, events.append)
        found = prove(Artifact.load(reference), Artifact.load(other), context, tokens=256, kept=kept)
        return sum(isinstance(event, Progress) and event.unit == "layers" for event in events), found

    other = changed(model, tmp_path / "other", lambda name, value: value * 1.01)
    mine = changed(model, tmp_path / "mine", lambda name, value: value)
    kept = KeptReference()
    first = layers(mine, kept)
    second = layers(mine, kept)
    assert (first[0], second[0]) == (4, 2)
    assert second[1] == first[1] == layers(mine, None)[1]
    changed(model, tmp_path / "new", lambda name, value: value * 1.2)
    shutil.copy(tmp_path / "new" / "model.safetensors", mine / "model.safetensors")
    third = layers(mine, kept)
    assert third[0] == 4
    assert third[1]["kl"] != first[1]["kl"]
    kept.close()


@pytest.mark.skipif(os.name != "posix", reason="Windows moves no folder with an open file in it")
def test_what_was_proved_is_an_open_reference_wherever_it_was_moved(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    context = Context("build", tmp_path, tmp_path, detect(), Accelerator(), {}, events.append)

    def layers() -> int:
        found = sum(isinstance(event, Progress) and event.unit == "layers" for event in events)
        events.clear()
        return found

    merged = changed(model, tmp_path / "merged", lambda name, value: value * 1.01)
    built = changed(model, tmp_path / "built", lambda name, value: value * 1.02)
    kept = KeptReference()
    prove(Artifact.load(model), Artifact.load(merged), context, tokens=256, kept=kept)
    assert layers() == 4
    moved = merged.rename(tmp_path / "moved")
    found = prove(Artifact.load(moved), Artifact.load(built), context, tokens=256, kept=kept)
    assert layers() == 2, "of the candidate"
    assert found == prove(Artifact.load(moved), Artifact.load(built), context, tokens=256)
    kept.close()
