"""From a data config to sequences, and its preview."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.packing import IGNORED
from coldpress.data.prepare import clamp, prepare
from coldpress.data.preview import preview
from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError

TEMPLATE = "say: {phrase}\ntone: {tone}"
ROWS = [{"phrase": f"p{number:03}", "tone": ("joy", "fear")[number % 2]} for number in range(40)]


def config(path: Path, rows: list[dict[str, Any]] = ROWS, **pre: Any) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(
        name=path.stem,
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**{"text_template": TEMPLATE, **pre}),
    )


def test_join(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=64), tokenizer, held_out=0.25, seed=1)
    assert prepared.held_out is not None
    assert {len(one.ids) for one in prepared.train.sequences + prepared.held_out.sequences} == {64}
    assert (prepared.train.rows, prepared.held_out.rows) == (30, 10)
    stream = prepared.train.sequences[0].ids
    assert stream[0] == 256
    assert stream[stream.index(257) + 1 :][:2] == tokenizer.ids("\n\n"), "the joiner stands between records"


def test_clamped_to_the_context(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=2048), tokenizer, context_length=128)
    assert prepared.max_seq_len == 128
    assert "max_seq_len 2048 is beyond the model's context of 128" in prepared.notes[0]


def test_completion_only(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(
        tmp_path / "d.jsonl", strategy="line-by-line", label_col="tone", completion_only_loss=True, max_seq_len=64
    )
    one = prepare(asked, tokenizer).train.sequences[0]
    carried = [token for token, label in zip(one.ids, one.labels, strict=True) if label != IGNORED]
    assert carried == [*tokenizer.ids("joy"), 257], "the answer and EOS, nothing of the prompt"


def test_repeats_stay_on_one_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(tmp_path / "d.jsonl", ROWS * 2, strategy="line-by-line", max_seq_len=64)
    prepared = prepare(asked, tokenizer, held_out=0.25)
    assert prepared.held_out is not None
    train, held = ({tuple(one.ids) for one in part.sequences} for part in (prepared.train, prepared.held_out))
    assert not train & held
    assert "40 of 80 rows are repeats" in prepared.notes[0]


def test_a_separate_evaluation_set_that_repeats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = config(tmp_path / "a.jsonl", strategy="line-by-line", max_seq_len=64)
    other = config(tmp_path / "b.jsonl", [*ROWS[:3], {"phrase": "new", "tone": "joy"}], max_seq_len=32)
    prepared = prepare(train, tokenizer, held_out=other)
    assert "3 of 4 rows of b are in a as well" in prepared.notes[0]


def test_padding_on_the_left_without_a_mask(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(tmp_path / "d.jsonl", strategy="line-by-line", padding_side="left", use_attention_mask=False)
    with pytest.raises(DataError, match="attend to padding"):
        prepare(asked, tokenizer)


def test_preview(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = config(
        tmp_path / "d.jsonl", strategy="line-by-line", label_col="tone", completion_only_loss=True, max_seq_len=64
    )
    shown = preview(asked, tokenizer, context_length=128, samples=2)
    assert (shown.rows, shown.sequences, shown.columns) == (40, 40, ("phrase", "tone"))
    assert shown.loss_tokens == 20 * 4 + 20 * 5
    assert shown.lengths.longest == shown.lengths.shortest + 1 == len(shown.samples[1].tokens)
    assert shown.samples[0].text == "<s>say: p000\ntone: joy</s>"
    assert [text for text, _, loss in shown.samples[0].tokens if loss] == ["j", "o", "y", "</s>"]


def test_the_default_length_is_clamped_without_a_word() -> None:
    assert clamp(PreProcess(), 128) == (128, ())
    assert clamp(PreProcess(max_seq_len=100), 128) == (100, ())
    length, (said,) = clamp(PreProcess(max_seq_len=1024), 128)
    assert (length, "beyond the model's context of 128" in said) == (128, True)


def test_a_marked_answer_under_join_is_said_to_have_no_effect(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "abc", "a": "d"}\n' * 9)

    def said(**pre: Any) -> bool:
        config = DataConfig(
            name="a",
            load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
            pre_process_data_config=PreProcess(text_template="{q}{a|loss}", max_seq_len=8, **pre),
        )
        return any("under join all of the text carries loss" in note for note in prepare(config, tokenizer).notes)

    assert said()
    assert not said(strategy="line-by-line")


def test_a_small_held_out_part_under_join_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(config(tmp_path / "d.jsonl", max_seq_len=128), tokenizer, held_out=2)
    assert prepared.held_out is not None
    rows = [f"say: p{number:03}\ntone: {tone}" for number, tone in ((0, "joy"), (1, "fear"))]
    assert len(prepared.held_out.sequences) == 1
    assert 2 * len(rows[0]) + 8 <= prepared.held_out.tokens <= 2 * len(rows[1]) + 8, "BOS, EOS and joiner: 4 a record"


# -- what is said before training -------------------------------------------------------------------------------------


def test_pack_end_to_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"phrase": f"p{number:03}" * (1 + number % 7), "tone": "joy"} for number in range(200)]
    asked = {"label_col": "tone", "completion_only_loss": True, "max_seq_len": 96}
    packed = prepare(config(tmp_path / "d.jsonl", rows, strategy="pack", **asked), tokenizer)
    lines = prepare(config(tmp_path / "d.jsonl", rows, strategy="line-by-line", **asked), tokenizer)
    assert (packed.train.records, packed.train.tokens) == (200, lines.train.tokens)
    assert packed.train.loss_tokens == lines.train.loss_tokens == 200 * 4
    assert packed.notes == lines.notes == ()
    (said,) = packed.facts
    assert said.startswith(f"200 records are packed into {len(packed.train.sequences)} sequences of up to 96 tokens, ")
    assert 0.9 < packed.train.tokens / (96 * len(packed.train.sequences)) <= 1
    assert prepare(config(tmp_path / "d.jsonl", rows, strategy="pack", **asked), tokenizer).train == packed.train


def test_marked_answers(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"q": "a", "r": "bc", "s": "d", "t": "ef"}) + "\n")
    asked = DataConfig(
        name="d",
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(text_template="{q}:{r|loss}\n{s}:{t|loss}.", strategy="pack"),
    )
    (one,) = prepare(asked, tokenizer).train.sequences
    carried = [token for token, label in zip(one.ids, one.labels, strict=True) if label != IGNORED]
    assert carried == [*tokenizer.ids("bc"), *tokenizer.ids("ef."), 257], "the last answer goes on to the end"


CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "so"},
    {"role": "assistant", "content": "no"},
]


def chat_config(path: Path, rows: list[Any], **pre: Any) -> DataConfig:
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return DataConfig(
        name=path.stem,
        load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
        pre_process_data_config=PreProcess(**{"strategy": "line-by-line", "max_seq_len": 128, **pre}),
    )


def test_every_turn_carries_loss(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prepared = prepare(chat_config(tmp_path / "d.jsonl", [CHAT]), tokenizer)
    (one,) = prepared.train.sequences
    said = "".join(tokenizer.token(token) for token, label in zip(one.ids, one.labels, strict=True) if label != IGNORED)
    assert said == "yo<|end|>no<|end|></s>"
    assert one.ids[0] != 256, "the chat template writes no BOS, nor does the tokenizer when the model is used"
    assert "read as messages (column messages)" in prepared.facts
    last = prepare(chat_config(tmp_path / "d.jsonl", [CHAT], assistant_turns="last"), tokenizer).train
    assert last.loss_tokens == 4
    whole = prepare(chat_config(tmp_path / "d.jsonl", [CHAT], completion_only_loss=False), tokenizer).train
    assert whole.loss_tokens == whole.tokens - 1


def test_turns_that_do_not_stop_are_noted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = chat_config(tmp_path / "d.jsonl", [CHAT] * 2)
    (said,) = [note for note in prepare(asked, tokenizer).notes if "turns" in note]
    assert said.startswith("2 turns of the assistant end with '<|end|>', at which the model does not stop")
    assert "add its id, 259, to eos_token_id in generation_config.json" in said
    stops = replace(tokenizer, generation_eos=frozenset({259}))
    prepared = prepare(asked, stops)
    assert not [note for note in prepared.notes if "turns" in note or "stop" in note]
    assert prepared.train.sequences[0].ids[-1] == 259, "no EOS after a token that ends the text"


@pytest.mark.parametrize(
    ("pre", "eos", "count", "way_out"),
    [
        ({}, 257, 0, ""),
        ({"add_special_tokens": False}, 257, 40, '"add_special_tokens": true'),
        ({}, None, 40, "add eos_token to tokenizer_config.json"),
        ({"text_template": TEMPLATE + "</s>", "add_special_tokens": False}, 257, 0, ""),
        ({"text_template": "{phrase|loss}</s>{tone}", "add_special_tokens": False}, 257, 40, "true"),
    ],
)
def test_stopping_is_taught_or_noted(
    tmp_path: Path, tokenizer: Tokenizer, pre: dict[str, Any], eos: int | None, count: int, way_out: str
) -> None:
    asked = config(tmp_path / "d.jsonl", strategy="line-by-line", **pre)
    notes = [note for note in prepare(asked, replace(tokenizer, eos_id=eos)).notes if "stop" in note]
    assert len(notes) == bool(count)
    if count:
        assert notes[0].startswith("40 of 40 rows do not teach the model to stop")
        assert way_out in notes[0]


def test_evaluation_on_training_data(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = config(tmp_path / "a.jsonl", strategy="line-by-line")
    same = config(tmp_path / "b.jsonl", strategy="line-by-line")
    with pytest.raises(DataError, match=r"all 40 rows of b \(.*b\.jsonl\) are in a \(.*a\.jsonl\) as well") as error:
        prepare(train, tokenizer, held_out=same)
    assert "eval_data_config: a" in str(error.value.hint)
    other_template = same.model_copy(
        update={"pre_process_data_config": PreProcess(text_template="{phrase}", strategy="line-by-line")}
    )
    with pytest.raises(DataError, match="all 40 rows of b"):
        prepare(train, tokenizer, held_out=other_template)
    meant = prepare(train, tokenizer, held_out=train)
    assert "a is trained on and evaluated on" in meant.notes[0]
    most = config(tmp_path / "c.jsonl", [*ROWS[:3], {"phrase": "new", "tone": "joy"}], strategy="line-by-line")
    assert (
        prepare(train, tokenizer, held_out=most)
        .notes[0]
        .startswith("MOST OF THE EVALUATION DATA IS TRAINING DATA (75%)")
    )


def test_three_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for strategy in ("line-by-line", "pack"):
        asked = config(tmp_path / "d.jsonl", ROWS[:3], strategy=strategy, max_seq_len=64)
        prepared = prepare(asked, tokenizer, held_out=0.1)
        assert prepared.held_out is not None
        assert (prepared.train.records, prepared.held_out.records) == (2, 1)
        assert "2 rows to train on: expect a model that knows them by heart and little else" in prepared.notes
    with pytest.raises(DataError, match="fill less than one sequence") as error:
        prepare(config(tmp_path / "d.jsonl", ROWS[:3]), tokenizer)
    assert '"strategy": "pack"' in str(error.value.hint)
    with pytest.raises(DataError, match="both sides need at least one row"):
        prepare(config(tmp_path / "d.jsonl", ROWS[:1], strategy="pack"), tokenizer, held_out=0.1)


def test_bad_records_are_all_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows: list[Any] = [*ROWS]
    for place, value in ((3, None), (5, "  "), (7, ["a"]), (9, {"a": 1}), (11, float("nan")), (13, "\ud83d"), (15, "")):
        rows[place] = {"phrase": "x", "tone": value}
    rows[17] = {"phrase": "x"}
    asked = config(tmp_path / "d.jsonl", rows, strategy="pack", label_col="tone")
    with pytest.raises(DataError, match="8 of 40 records cannot be used") as error:
        prepare(asked, tokenizer)
    said = error.value.message
    for line, what in (
        (4, "'tone' is empty"),
        (6, "'tone' is blank"),
        (8, "holds a list, not text"),
        (10, "an object"),
    ):
        assert any(f"d.jsonl:{line}: " in one and what in one for one in said.split("\n")), (line, said)
    assert said.endswith("and 3 more")


def test_half_a_character_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*ROWS, {"phrase": "a\ud83d", "tone": "joy"}]
    with pytest.raises(DataError, match=r"d\.jsonl:41: the text is not Unicode: character 7 is half of a pair"):
        prepare(config(tmp_path / "d.jsonl", rows, strategy="pack"), tokenizer)


def test_blank_columns_before_the_answer_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*ROWS, {"phrase": "", "tone": "joy"}, {"phrase": None, "tone": "joy"}]
    prepared = prepare(config(tmp_path / "d.jsonl", rows, strategy="pack", label_col="tone"), tokenizer)
    assert "the column 'phrase' is blank in 2 of 42 rows" in prepared.notes
    assert prepared.train.records == 42


def test_too_long_is_said_with_the_longest(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [*ROWS, {"phrase": "x" * 500, "tone": "joy"}]
    whole = prepare(config(tmp_path / "d.jsonl", rows, strategy="pack", max_seq_len=64), tokenizer)
    assert "1 of 41 rows exceed 64 tokens (the longest has 517): their ends are left out" in whole.notes
    answers = config(tmp_path / "d.jsonl", rows, strategy="pack", label_col="tone", completion_only_loss=True)
    prepared = prepare(answers, tokenizer, context_length=64)
    assert "1 of 41 rows do not fit 64 tokens (the longest has 517): left out" in prepared.notes
    with pytest.raises(DataError, match="none fits into 8 tokens"):
        prepare(answers, tokenizer, context_length=8)


def test_conversations_without_an_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [CHAT, CHAT[:1], [*CHAT, CHAT[0]]]
    with pytest.raises(DataError, match=r"d\.jsonl:2: none of the 1 messages is the assistant's"):
        prepare(chat_config(tmp_path / "d.jsonl", rows), tokenizer)
    prepared = prepare(chat_config(tmp_path / "d.jsonl", [rows[0], rows[2]]), tokenizer)
    assert "1 of 2 rows go on after the assistant's last turn: those messages are left out" in prepared.notes
    assert prepared.train.sequences[0] == prepared.train.sequences[1]
    whole = prepare(chat_config(tmp_path / "d.jsonl", rows, completion_only_loss=False), tokenizer)
    assert whole.train.records == 3
    assert whole.chat_template is True
    assert whole.prompt == ""


def test_labels_all_masked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    mute = [[*CHAT[:3], {**CHAT[3], "weight": 0}], [CHAT[0], {**CHAT[1], "weight": 0}]]
    prepared = prepare(chat_config(tmp_path / "d.jsonl", [*mute, CHAT]), tokenizer)
    assert prepared.train.silent_rows == 1
    assert "1 of 3 rows have no token that carries loss: left out" in prepared.notes
    with pytest.raises(DataError, match="1 of 1 rows have no token that carries loss") as error:
        prepare(chat_config(tmp_path / "d.jsonl", mute[1:]), tokenizer)
    assert "coldpress data" in str(error.value.hint)


def test_an_empty_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        prepare(config(tmp_path / "d.jsonl", []), tokenizer)


def test_the_held_out_part_is_checked_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    asked = {"strategy": "pack", "label_col": "tone", "completion_only_loss": True, "max_seq_len": 64}
    long = [{"phrase": f"{number}" * 100, "tone": "joy"} for number in range(3)]
    other = config(tmp_path / "b.jsonl", long, **asked)
    with pytest.raises(DataError, match=r"^b: no sequence comes out of 3 rows .* none fits into 64 tokens"):
        prepare(config(tmp_path / "a.jsonl", **asked), tokenizer, held_out=other)
    mixed = config(tmp_path / "c.jsonl", [*ROWS, *long], **asked)
    prepared = prepare(mixed, tokenizer, held_out=0.5, seed=3)
    assert prepared.held_out is not None
    count = prepared.held_out.long_rows
    assert 0 < count < 3, "some of the long rows fall to each side"
    assert any(note.startswith(f"held-out part: {count} of 22 rows do not fit 64 tokens") for note in prepared.notes)
