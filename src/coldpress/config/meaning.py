"""What single keys cannot show: values that are right alone and wrong together."""

from __future__ import annotations

import re
import string

from coldpress.config.metric_meaning import check_metrics
from coldpress.config.pass_tree import pass_nodes
from coldpress.config.schema import PreProcess
from coldpress.config.tree import Node, problem_at
from coldpress.errors import Problem

__all__ = ["check_meaning"]

_LONGEST = 200
"""Bytes of a step's name; file systems take 255, and something is put around it."""


def check_meaning(root: Node) -> list[Problem]:
    """Contradictions between keys, and names that cannot be. Values of a wrong type are left to the check of types."""
    problems: list[Problem] = []
    data = root.get("data_configs")
    trained_on = {node.text(key) for _, node in pass_nodes(root) for key in ("train_data_config", "eval_data_config")}
    for config in (data.items if data is not None else None) or []:
        block = config.get("pre_process_data_config")
        if block is not None and block.mapping is not None:
            problems += _strategy(block)
            problems += _text(block)
            problems += _padding(block)
            if config.text("name") in trained_on:
                problems += _marks_in_vain(block)
    return problems + _step_names(root) + check_metrics(root)


def _step_names(root: Node) -> list[Problem]:
    """A step's name stands beside `input` in tables of scores, and is the name of a folder of logs."""
    passes = root.get("passes")
    problems = []
    for name, node in ((passes.mapping if passes is not None else None) or {}).items():
        if name == "input":
            message = "a step cannot be called input: that is what the input model is called beside its results"
            problems.append(problem_at(node, message, hint="give it another name"))
        elif name in ("", ".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", name) or len(name.encode()) > _LONGEST:
            message = f"{name[:40]!r} is no name for a step: folders are called by it"
            problems.append(problem_at(node, message, hint="use letters, digits, _ and -"))
    return problems


def _value(block: Node, key: str) -> object:
    node = block.get(key)
    return PreProcess.model_fields[key].default if node is None else node.value


def _place(block: Node, key: str) -> Node:
    return block.get(key) or block


def _strategy(block: Node) -> list[Problem]:
    strategy = _value(block, "strategy")
    where = _place(block, "strategy")
    problems = []
    if strategy == "join-sliding-window" and _value(block, "stride") is None:
        problems.append(problem_at(where, "join-sliding-window needs stride, the tokens between window starts"))
    if strategy in ("join-random", "line-by-line-random"):
        for key, what in (
            ("max_samples", "how many sequences to draw"),
            ("random_seed", "so that a run can be repeated"),
        ):
            if _value(block, key) is None:
                problems.append(problem_at(where, f"{strategy} needs {key}: {what}"))
    stride, length = _value(block, "stride"), _value(block, "max_seq_len")
    if strategy == "join-sliding-window" and isinstance(stride, int) and isinstance(length, int) and stride > length:
        message = f"stride {stride} is longer than max_seq_len {length}: tokens would be left out"
        problems.append(problem_at(_place(block, "stride"), message))
    return problems


def _text(block: Node) -> list[Problem]:
    problems = []
    template = _value(block, "text_template")
    if isinstance(template, str):
        problems += _template(block, template)
    strategy = str(_value(block, "strategy"))
    if _value(block, "completion_only_loss") is True:
        where = _place(block, "completion_only_loss")
        if not _names_answers(block):
            hint = "or mark the answer in text_template: {answer|loss}"
            message = "completion_only_loss needs label_col, the column of the answer"
            problems.append(problem_at(where, message, hint=hint))
        if strategy.startswith("join"):
            hint = "strategy: pack, or line-by-line"
            problems.append(problem_at(where, "completion_only_loss needs whole records in a sequence", hint=hint))
    if _value(block, "completion_only_loss") is False and _marks(template):
        message = "text_template marks an answer (|loss), and completion_only_loss is false"
        problems.append(problem_at(_place(block, "completion_only_loss"), message, hint="leave one of them out"))
    if strategy == "pack" and _value(block, "drop_short_sequences") is True:
        message = "does not go with pack: nearly every pack is a little shorter than max_seq_len"
        problems.append(problem_at(_place(block, "drop_short_sequences"), message))
    return problems + _format(block)


def _marks_in_vain(block: Node) -> list[Problem]:
    """Answers that are marked and not found again: a stream of records is cut anywhere."""
    strategy = str(_value(block, "strategy"))
    template = _value(block, "text_template")
    if not _marks(template) or not strategy.startswith("join") or _value(block, "completion_only_loss") is not None:
        return []
    message = f"text_template marks an answer (|loss), and under {strategy} all of the text carries loss"
    hint = "set strategy to line-by-line or pack, or take |loss out of text_template"
    return [problem_at(_place(block, "text_template"), message, hint=hint)]


_TEXT_KEYS = ("text_template", "text_field", "text_cols", "chat_template")
_TEXT_OF = {"text": ("text_template", "text_field", "text_cols"), "messages": ("chat_template",)}
"""What may stand beside a format; every other form of conversation takes what messages takes."""


def _format(block: Node) -> list[Problem]:
    """A format beside keys that say something else."""
    chosen = _value(block, "format")
    if chosen in ("auto", None):
        return []
    allowed = _TEXT_OF["text" if chosen == "text" else "messages"]
    wrong = [key for key in _TEXT_KEYS if key not in allowed and _value(block, key)]
    return [
        problem_at(_place(block, key), f"{key} does not go with format {chosen}", hint="leave one of them out")
        for key in wrong
    ]


def _names_answers(block: Node) -> bool:
    """Whether the block says what the answers are, or leaves it to the form of the records."""
    if _value(block, "label_col") is not None or _value(block, "chat_template"):
        return True
    if _value(block, "format") not in ("auto", "text", None):
        return True
    named = any(_value(block, key) for key in _TEXT_KEYS)
    return _marks(_value(block, "text_template")) or not (named or _value(block, "format") == "text")


def _marks(template: object) -> bool:
    """Whether a template marks an answer: {answer|loss}."""
    if not isinstance(template, str):
        return False
    try:
        return any((spec or name or "").endswith("|loss") for _, name, spec, _ in string.Formatter().parse(template))
    except ValueError:
        return False


def _template(block: Node, template: str) -> list[Problem]:
    where = _place(block, "text_template")
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        hint = "a brace that is text is written twice: {{"
        return [problem_at(where, f"not a template: {error}", hint=hint)]
    if "" in names:
        return [problem_at(where, "{} names no column", hint="write the column's name between the braces")]
    if not names:
        return [problem_at(where, "names no column", hint="write a column's name in braces, such as {text}")]
    return []


def _padding(block: Node) -> list[Problem]:
    lines = str(_value(block, "strategy")).startswith(("line", "pack"))
    if lines and _value(block, "use_attention_mask") is False and _value(block, "pad_to_max_len") is True:
        message = "without an attention mask the padding of pad_to_max_len would be attended to"
        hint = "write pad_to_max_len: false, or leave the mask on"
        return [problem_at(_place(block, "use_attention_mask"), message, hint=hint)]
    return []
