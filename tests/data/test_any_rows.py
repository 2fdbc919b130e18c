"""Rows of any JSON at all: sequences come out, or an error of ours that says why; never anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.data.prepare import prepare
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import ColdpressError

TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "hi", "\ud83d", "[1]", '[{"role": "user"}]', "</s>", "\0"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
ROLES = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "robot", 3, None])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": SCALARS | st.lists(SCALARS, max_size=2)})
    | st.fixed_dictionaries({"from": ROLES, "value": SCALARS})
    | st.fixed_dictionaries({"role": ROLES}, optional={"tool_calls": SCALARS | st.lists(SCALARS, max_size=1)})
    | SCALARS,
    max_size=4,
)
VALUES = SCALARS | MESSAGES | st.dictionaries(TEXTS.filter(str.isprintable), SCALARS, max_size=2)
GOOD = st.text(min_size=1, max_size=8) | st.sampled_from(["hi", "</s>", "é🙂", "[1, 2]", "<|end|>", "a b"])
TURN = st.tuples(st.sampled_from(["user", "assistant"]), GOOD)
TALK = st.lists(TURN, min_size=1, max_size=4)
GOOD_COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    "messages": TALK.map(lambda turns: [{"role": role, "content": text} for role, text in turns]),
    "conversations": TALK.map(lambda turns: [{"from": "human", "value": text} for _, text in turns] + [
        {"from": "gpt", "value": "so"}]),
    "history": st.just([["a", "b"]]) | st.none(),
    "tools": st.just([{"name": "clock"}]) | st.none(),
    "label": st.sampled_from(["joy", "fear"]),
}  # fmt: skip
FORMS = (
    ("messages", "tools"),
    ("conversations", "system"),
    ("instruction", "output", "input", "history"),
    ("prompt", "completion", "label"),
    ("text", "label"),
    ("question", "answer", "context"),
)


def _column(name: str) -> st.SearchStrategy[Any]:
    """Mostly what belongs there."""
    good = GOOD_COLUMNS.get(name, GOOD)
    return st.integers(0, 7).flatmap(lambda chance: VALUES if chance == 7 else good)


def _rows(forms: tuple[tuple[str, ...], ...]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """A few rows of one form; its first two columns are always there."""
    return st.sampled_from(forms).flatmap(
        lambda form: st.lists(
            st.fixed_dictionaries(
                {name: _column(name) for name in form[:2]}, optional={name: _column(name) for name in form[2:]}
            ),
            min_size=1,
            max_size=4,
        )
    )


SETTINGS: list[tuple[dict[str, Any], tuple[tuple[str, ...], ...]]] = [
    ({}, FORMS),
    ({"strategy": "pack"}, FORMS),
    ({"strategy": "line-by-line", "assistant_turns": "last"}, FORMS),
    ({"strategy": "pack", "completion_only_loss": True}, FORMS[:4]),
    ({"strategy": "pack", "chat_template": True, "add_special_tokens": False}, FORMS[:4]),
    ({"strategy": "pack", "text_template": "{prompt}{completion|loss}"}, FORMS[3:4]),
    ({"strategy": "line-by-line", "text_cols": ("text", "label"), "label_col": "label"}, FORMS[4:5]),
    ({"label_col": "label"}, FORMS[3:5]),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_sequences_or_our_error(tmp_path: Path, tokenizer: Tokenizer, number: int) -> None:
    chosen, forms = SETTINGS[number]
    classes = number == len(SETTINGS) - 1
    pre = PreProcess(**{"max_seq_len": 64, **chosen})
    path = tmp_path / "rows.jsonl"

    @given(_rows(forms), st.sampled_from([None, None, 0.3, 1]))
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    def check(rows: list[dict[str, Any]], held_out: float | int | None) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        asked = DataConfig(
            name="rows",
            load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
            pre_process_data_config=pre,
        )
        refused: ColdpressError | None = None
        sequences: list[TokenSequence] = []
        try:
            sequences = prepare(asked, tokenizer, held_out=held_out, classes=classes).train.sequences
        except ColdpressError as error:
            refused = error
        assert bool(sequences) != bool(refused)
        assert refused is None or refused.hint, refused
        for one in sequences:
            assert len(one.ids) == len(one.labels) <= 64
            assert all(label in (IGNORED, token) for label, token in zip(one.labels, one.ids, strict=True))
            assert one.lengths is None or sum(one.lengths) == len(one.ids)
            assert (one.target is not None) == classes

    check()
