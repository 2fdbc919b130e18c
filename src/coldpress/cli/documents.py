"""What short verbs share: their options, the workflow they begin with, and its saving or running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from coldpress.cli.options import log_format_option, trust_option
from coldpress.errors import StoreError

__all__ = ["run_options", "save_or_run", "skeleton"]


def run_options(command: Any) -> Any:
    """Options of every verb that makes a workflow."""
    for option in reversed(
        (
            click.option("-o", "--output-dir", default="output", show_default=True, help="Where the model goes."),
            click.option("--cache-dir", default=".coldpress-cache", show_default=True, help="Where finished steps go."),
            click.option(
                "--save-config",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="Write the workflow to FILE (.json or .yaml) and do not run it.",
            ),
            trust_option,
            log_format_option,
        )
    ):
        command = option(command)
    return command


def skeleton(model: str, output_dir: str, cache_dir: str, trust: bool, device: str, provider: str) -> dict[str, Any]:
    """A workflow without passes."""
    loading = {"load_kwargs": {"trust_remote_code": True}} if trust else {}
    return {
        "input_model": {"type": "HfModel", "model_path": model, **loading},
        "systems": {
            "local_system": {
                "type": "LocalSystem",
                "accelerators": [{"device": device, "execution_providers": [provider]}],
            }
        },
        "passes": {},
        "host": "local_system",
        "target": "local_system",
        "cache_dir": cache_dir,
        "output_dir": output_dir,
    }


def save_or_run(document: dict[str, Any], save_config: Path | None, trust: bool, log_format: str) -> int:
    """Save the workflow, or run it; the exit code."""
    from coldpress.api import load_config
    from coldpress.cli.workflow import run_and_show, say_dialect

    loaded = load_config(document)
    if save_config is not None:
        if save_config.exists():
            raise StoreError(f"{save_config} is there already", hint="give another name, or delete it first")
        from coldpress.config.migrate import write_migrated

        write_migrated(loaded, save_config, force=False)
        click.echo(f"{save_config}: written; run it with: coldpress run {save_config}")
        return 0
    if log_format != "json":
        say_dialect(loaded)
    return run_and_show(loaded, trust, log_format)
