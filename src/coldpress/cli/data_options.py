"""What `finetune` and `data` share: options that say what the text of a record is, and the data config they make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from coldpress.errors import UsageError

__all__ = ["data_config", "text_options", "text_settings"]

_FILES = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json",
    ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}  # fmt: skip
_LOSS = {"answers": True, "all": False}


def text_options(command: Any) -> Any:
    """Options for the text of a record and its loss; without any, the form of the records is recognised."""
    for option in reversed(
        (
            click.option(
                "--template",
                "text_template",
                help="Text of one record, {column} filled in, {column|loss} for an answer; \\n is a line break.",
            ),
            click.option("--text-field", help="The column that holds the text."),
            click.option(
                "--chat",
                "chat_template",
                is_flag=True,
                help="Records hold chat messages; use the model's chat template.",
            ),
            click.option(
                "--format",
                "form",
                type=click.Choice(["messages", "sharegpt", "alpaca", "prompt-completion", "text"]),
                help="Form of the records; default: recognised by their columns.",
            ),
            click.option("--answer", "label_col", help="Column of the answer: loss on it alone, and accuracy by it."),
            click.option(
                "--loss",
                type=click.Choice(["answers", "all"]),
                help="Which tokens carry loss; default: the answers where they are known.",
            ),
            click.option(
                "--turns",
                "assistant_turns",
                type=click.Choice(["all", "last"]),
                help="Which of the assistant's turns carry loss; default: all.",
            ),
            click.option(
                "--strategy",
                type=click.Choice(["line-by-line", "pack", "join"]),
                default=None,
                help="One record a sequence (default), whole records packed, or one stream cut.",
            ),
            click.option("--max-seq-len", type=click.IntRange(2), help="Tokens in a sequence; default: 1024."),
        )
    ):
        command = option(command)
    return command


def text_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as keys of pre_process_data_config; raises UsageError where two of them say different things."""
    template = options["text_template"]
    settings = {
        "format": options["form"],
        "text_template": template.replace("\\n", "\n") if template else None,
        "text_field": options["text_field"],
        "chat_template": options["chat_template"] or None,
        "label_col": options["label_col"],
        "completion_only_loss": _LOSS.get(options["loss"] or ""),
        "assistant_turns": options["assistant_turns"],
        "strategy": options["strategy"],
        "max_seq_len": options["max_seq_len"],
    }
    texts = {"text_template": "--template", "text_field": "--text-field", "chat_template": "--chat"}
    said = [option for key, option in texts.items() if settings[key]]
    if len(said) > 1:
        raise UsageError(
            f"say what the text of a record is once: {', '.join(said)} exclude each other",
            hint="for columns question and answer: --template 'Q: {question}\\nA: {answer|loss}'",
        )
    answered = settings["label_col"] or settings["chat_template"]
    if settings["completion_only_loss"] is None and answered and options["strategy"] != "join":
        settings["completion_only_loss"] = True
    return {key: value for key, value in settings.items() if value is not None}


def data_config(name: str, file: str, split: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A data config of one file, folder or hub data set."""
    kind = _FILES.get(Path(file).suffix.lower())
    load: dict[str, Any] = {"data_name": file} if kind is None else {"data_name": kind, "data_files": file}
    if split is not None:
        load["split"] = split
    return {
        "name": name,
        "type": "HuggingfaceContainer",
        "load_dataset_config": load,
        "pre_process_data_config": dict(settings),
    }
