"""What short verbs share: their options, the workflow they begin with, its saving or running, and errors in its words.

A user of these verbs wrote no config: where an error names a key, the option that made it is said.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from coldpress.cli.options import log_format_option, trust_option
from coldpress.errors import ColdpressError, ConfigError, Problem, StoreError

__all__ = ["in_options", "options_by_name", "run_options", "save_or_run", "skeleton"]

_OPTIONS = {
    "completion_only_loss": "loss",
    "eval_data_config": "eval_data",
    "eval_dataset_size": "eval_size",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
}
"""Key of a config -> parameter of a verb, where that is not called the same."""
_PHRASES = {
    "relative paths start at the config file's folder": "relative paths start in the working folder",
    "give the Jinja template itself as chat_template, or use text_template":
        "put the template into the model's folder, as chat_template.jinja",
    "text_template, text_field or text_cols": "text_template or text_field",
    "correct the name in the data config": "correct the name",
    "set completion_only_loss to false": "give --loss all",
    " to pre_process_data_config": "",
    " in pre_process_data_config": "",
}  # fmt: skip
"""What is said of a config file -> the same where there is none."""


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
    with in_options():
        return _save_or_run(document, save_config, trust, log_format)


def _save_or_run(document: dict[str, Any], save_config: Path | None, trust: bool, log_format: str) -> int:
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


@contextlib.contextmanager
def in_options() -> Iterator[None]:
    """Errors of what is done inside name the options of the command that runs."""
    try:
        yield
    except ConfigError as error:
        told = dict.fromkeys(_of_options(one, _options()) for one in error.problems)  # two data sets share options
        raise ConfigError(list(told)) from error
    except ColdpressError as error:
        error.message = _spelled(error.message, _options())
        error.hint = error.hint and _spelled(error.hint, _options())
        error.args = (error.message,)
        raise


def options_by_name() -> dict[str, str]:
    """Parameters of the command that runs -> as they are written."""
    return {str(one.name): max(one.opts, key=len) for one in click.get_current_context().command.params}


def _options() -> Mapping[str, str]:
    """Keys of a config -> options of the command that runs. Keys of one word are words of any sentence."""
    options = options_by_name()
    named = {name: option for name, option in options.items() if "_" in name or name == "strategy"}
    return {**named, **{key: options[name] for key, name in _OPTIONS.items() if name in options}}


def _spelled(text: str, options: Mapping[str, str]) -> str:
    """A sentence with options for keys: `--strategy pack` for `strategy: pack`, and for `"strategy": "pack"`."""
    for said, instead in _PHRASES.items():
        text = text.replace(said, instead)
    keys = "|".join(map(re.escape, options))
    return re.sub(
        rf'"?\b({keys})\b(?!\.\w)"?(?:: "?([\w-]+)"?)?',
        lambda found: " ".join(filter(None, (options[found[1]], found[2]))),
        text,
    )


def _of_options(problem: Problem, options: Mapping[str, str]) -> Problem:
    """A problem at an option in place of a key; one of a data set as a whole at the option that names it."""
    path, key = problem.path, problem.path.rpartition(".")[2]
    if key in options:
        path = options[key]
    elif path.startswith("data_configs."):
        path = "--eval-data" if path.startswith("data_configs.eval_data.") else "--data"
    hint = problem.hint and _spelled(problem.hint, options)
    return replace(problem, path=path, message=_spelled(problem.message, options), hint=hint)
