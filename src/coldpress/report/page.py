"""Records to one HTML file that needs nothing but itself: no network, no other file.

Plotly's script goes in compressed, quickly rather than well (2.2 MB instead of 4.8 MB), and is unpacked by the browser;
where one is too old for that, or runs no scripts, everything but the charts is there.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import gzip
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import coldpress
from coldpress.errors import DiskFullError, StoreError
from coldpress.record import RunRecord
from coldpress.report.compare import COMPARED
from coldpress.report.runs import Run, run_of
from coldpress.report.sections import SECTIONS, Section
from coldpress.summary import verdict
from coldpress.units import duration

__all__ = ["REPORT_FILE", "comparison_page", "run_page", "write_page", "write_report"]

REPORT_FILE = "report.html"


def write_report(record: RunRecord, folder: Path) -> Path:
    """The page of a run beside its record; returns its path."""
    path = folder / REPORT_FILE
    write_page(path, run_page(run_of(record, folder)))
    return path


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all; raises StoreError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        kind = DiskFullError if error.errno == errno.ENOSPC else StoreError
        raise kind(
            f"{path} cannot be written: {error.strerror or error}",
            hint="mend that and run it again; `coldpress report OUTPUT_DIR/run.json -o FILE` writes it elsewhere",
        ) from error


def run_page(run: Run) -> str:
    """A run as one page."""
    record = run.record
    said = {
        "title": run.name,
        "lead": verdict(record),
        "failed": record.status == "failed",
        "facts": [record.started, duration(record.seconds), f"Coldpress {record.coldpress}"],
    }
    return _page(said, _found(section(run) for section in SECTIONS))


def comparison_page(runs: Sequence[Run]) -> str:
    """Runs side by side."""
    said = {
        "title": f"{len(runs)} runs compared",
        "lead": ", ".join(run.name for run in runs),
        "failed": False,
        "facts": [f"Coldpress {coldpress.__version__}"],
    }
    return _page(said, _found(section(runs) for section in COMPARED))


def _found(sections: Iterable[Section | None]) -> list[Section]:
    return [section for section in sections if section is not None]


def _page(said: Mapping[str, Any], sections: Sequence[Section]) -> str:
    charts = [chart for section in sections for chart in section.charts]
    figures = json.dumps(_finite({chart.id: chart.figure for chart in charts}), ensure_ascii=False, allow_nan=False)
    page: str = _templates()("page.html").render(
        **said,
        sections=sections,
        # "<" would end the element that the figures stand in.
        figures=figures.replace("<", "\\u003c") if charts else "",
        plotly=_plotly() if charts else "",
        style=_text("style.css"),
        draw=_text("draw.js"),
    )
    return page


def _finite(value: Any) -> Any:
    """Values of a figure, with nothing for numbers too large to be drawn: JSON has none of them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def _templates() -> Callable[[str], Any]:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template


def _text(name: str) -> str:
    return (files("coldpress.report") / "templates" / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    """Plotly's script, compressed, as text."""
    script = (files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, 2, mtime=0)).decode("ascii")
