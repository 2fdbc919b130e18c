"""Whether files have the columns that a data config names, from their first rows: for a plan, which reads no more."""

from __future__ import annotations

from collections.abc import Callable

from coldpress.config.schema import DataConfig, PreProcess
from coldpress.data.classes import check_class_text
from coldpress.data.formats import Reading, forms, read_as, unknown
from coldpress.data.sources import Records, first_records
from coldpress.data.templates import check_chat_template, check_label_in_text, columns_of
from coldpress.errors import DataError

__all__ = ["Wrong", "wrong_columns"]

Wrong = tuple[str, DataError]
"""The key of the data config that cannot be right, and why."""
_BLOCK = "pre_process_data_config"


def wrong_columns(config: DataConfig, *, classes: bool | None, has_template: bool) -> list[Wrong]:
    """What of a data config its local files cannot give; nothing is said where that takes reading them whole.

    `classes`: the label column is a class and no part of the text; None where nobody knows. `has_template`: the model
    has a chat template.
    """
    pre = config.pre_process_data_config
    try:
        records = first_records(config, _enough(pre))
    except DataError as error:
        return [("load_dataset_config", error)]
    if records is None:
        return []
    reading = read_as(records.columns, records.rows, pre, has_template=has_template)
    if reading is None:
        key = "format" if pre.format != "auto" else "message_col" if pre.chat_template else ""
        return [(f"{_BLOCK}.{key}".rstrip("."), unknown(records, pre))]
    return _missing(config, records, reading, classes=classes, has_template=has_template)


def _enough(pre: PreProcess) -> list[tuple[str, ...]]:
    """Sets of columns, one of which the files must have."""
    label = () if pre.label_col is None else (pre.label_col,)
    named = pre.text_template is not None or pre.text_field is not None or bool(pre.text_cols)
    sets = [columns_of(pre)[0]] if named and not pre.chat_template else forms(pre)
    return [(*names, *label) for names in sets]


def _missing(
    config: DataConfig, records: Records, reading: Reading, *, classes: bool | None, has_template: bool
) -> list[Wrong]:
    pre = config.pre_process_data_config
    columns, used_by = columns_of(pre, reading)
    checks: list[tuple[str, Callable[[], None]]] = [
        (used_by if used_by in PreProcess.model_fields else "", lambda: records.require(columns, used_by)),
        ("label_col", lambda: _check_label(config, records, reading, classes)),
        ("chat_template", lambda: check_chat_template(records, pre, reading, has_template=has_template)),
    ]
    found: list[Wrong] = []
    for key, check in checks:
        try:
            check()
        except DataError as error:  # noqa: PERF203 - all of them are told
            found.append((f"{_BLOCK}.{key}".rstrip("."), error))
    return found


def _check_label(config: DataConfig, records: Records, reading: Reading, classes: bool | None) -> None:
    """Raise DataError for a label column that is not there, or does not stand where it must."""
    pre = config.pre_process_data_config
    if pre.label_col is None:
        return
    records.require((pre.label_col,), "label_col")
    if classes:
        check_class_text(config, reading)
    elif classes is not None and set(columns_of(pre, reading)[0]) <= set(records.columns):  # else a typo is the cause
        check_label_in_text(pre, reading)
