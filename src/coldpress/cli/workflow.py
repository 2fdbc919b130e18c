"""`coldpress run`, `check` and `plan`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from coldpress.cli.options import log_format_option, trust_option
from coldpress.cli.text import table
from coldpress.config.load import LoadedConfig
from coldpress.errors import ColdpressError, ConfigError, UsageError
from coldpress.events import RunFailed
from coldpress.goals import UNMET_EXIT_CODE
from coldpress.units import duration, plain_value, settings_text, size

__all__ = ["check", "load", "plan", "run", "run_and_show", "say_dialect"]


_CHOICES = 8
"""Of a dimension that are listed."""
_REASONS = 5
"""Why settings are out, that are listed."""


def _source(config: str | None, arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """The config file and the overrides, from `FILE key=value ...` or `--config FILE key=value ...`."""
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if config is not None:
        files = [config, *files]
    if len(files) != 1:
        said = "no config file is given" if not files else f"one config file is expected, got {', '.join(files)}"
        verb = click.get_current_context().info_name
        raise UsageError(said, hint=f"coldpress {verb} olive-config.json, and overrides as key.path=value")
    return Path(files[0]), overrides


def _with_config(command: Any) -> Any:
    command = click.argument("arguments", nargs=-1, metavar="FILE [KEY.PATH=VALUE]...")(command)
    return click.option(
        "--config", "--run-config", "-c", metavar="FILE", help="The config file; the same as giving it first."
    )(command)


def load(config: str | None, arguments: Sequence[str]) -> LoadedConfig:
    from coldpress.api import load_config

    path, overrides = _source(config, arguments)
    return load_config(path, overrides)


def say_dialect(loaded: LoadedConfig, echo: Any = click.echo) -> None:
    """What was rewritten and what was odd, once each."""
    if loaded.rewrites:
        dialect = (
            "today's language" if loaded.dialect == "today" else f"Olive {loaded.dialect} dialect, read as today's"
        )
        echo(f"{loaded.path or 'config'}: {dialect} ({len(loaded.rewrites)} rewrites):")
        for rewrite in loaded.rewrites:
            echo(f"  {rewrite}")
    for warning in loaded.warnings:
        echo(f"{click.style('warning', fg='yellow')} {warning}")


@click.command()
@_with_config
@trust_option
@log_format_option
@click.option("--quiet-dialect", is_flag=True, help="Do not list the rewrites of an older dialect.")
def run(
    config: str | None, arguments: Sequence[str], trust_remote_code: bool, log_format: str, quiet_dialect: bool
) -> int:
    """Run a workflow to its end. Finished steps are cached: a rerun does only what is missing."""
    if log_format != "json":
        loaded = load(config, arguments)
        if not quiet_dialect:
            say_dialect(loaded)
        return run_and_show(loaded, trust_remote_code, log_format)
    from coldpress.cli.display import JsonLines

    try:
        return run_and_show(load(config, arguments), trust_remote_code, log_format)
    except ColdpressError as error:
        JsonLines()(RunFailed(type(error).__name__, error.message, error.hint, error.exit_code))
        raise


def run_and_show(loaded: LoadedConfig, trust_remote_code: bool, log_format: str) -> int:
    """Run a workflow with its progress on the terminal; the exit code is 3 where the result misses a goal."""
    from coldpress.api import run as run_workflow
    from coldpress.cli.display import sink_for

    sink = sink_for(log_format)
    try:
        result = run_workflow(loaded, sinks=[sink], trust_remote_code=trust_remote_code)
    finally:
        sink.close()
    if not result.unmet:
        return 0
    names = ", ".join(f"{one.metric} {one.sub_type}" for one in result.unmet)
    click.echo(click.style(f"done, but these goals are not met: {names}", fg="red"), err=True)
    return UNMET_EXIT_CODE


@click.command()
@_with_config
def check(config: str | None, arguments: Sequence[str]) -> None:
    """Find every error in a config, all at once, before anything runs. Exit code 2 when there is one."""
    from coldpress.engine.unseen import without_the_model

    loaded = load(config, arguments)
    say_dialect(loaded)
    problems = without_the_model(loaded) if loaded.space is None else []
    if problems:
        raise ConfigError(problems)
    for problem in loaded.placeholders:
        click.echo(f"{click.style('placeholder', fg='yellow')} {problem}")
    passes = ", ".join(f"{name} ({entry.type})" for name, entry in loaded.workflow.passes.items()) or "none"
    click.echo(f"{loaded.path}: ok; passes: {passes}")
    strategy = loaded.workflow.strategy
    if loaded.space is not None and strategy is not None:
        size = loaded.space.size
        click.echo(f"search: {strategy.sampler} over {size} setting{'s' if size != 1 else ''}: {loaded.space}")


@click.command()
@_with_config
@trust_option
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
def plan(config: str | None, arguments: Sequence[str], trust_remote_code: bool, as_json: bool) -> int:
    """Dry run: what would happen, what is cached, what it takes, and why it would be refused. Reads no weights."""
    from coldpress.engine.plan import check_plan, make_plan

    loaded = load(config, arguments)
    if loaded.space is not None:
        return _plan_search(loaded, trust_remote_code, as_json)
    made = make_plan(loaded, trust_remote_code=trust_remote_code)
    if as_json:
        click.echo(json.dumps(_as_json(made), indent=2))
    else:
        say_dialect(loaded)
        _show(made)
    check_plan(made, to_run=False)
    return 0


def _plan_search(loaded: LoadedConfig, trust_remote_code: bool, as_json: bool) -> int:
    """The plan of the first setting, and which settings the plans of all rule out."""
    from coldpress.engine.plan import check_plan, make_plan
    from coldpress.search.outlook import first_setting, look_ahead

    first, settings = first_setting(loaded)
    made = make_plan(first, trust_remote_code=trust_remote_code)
    outlook = look_ahead(loaded, made)
    if as_json:
        click.echo(json.dumps({**_as_json(made), "search": _search_as_json(loaded, settings, outlook)}, indent=2))
    else:
        say_dialect(loaded)
        _show_search(loaded, outlook)
        click.echo(f"steps   of the first setting: {settings_text(settings)}\n")
        _show(made)
    left = made.refusals
    if outlook.ruled_out < outlook.planned or outlook.unmet:  # another setting may do without what this one lacks
        left = tuple(one for one in left if not one.path.startswith("passes."))
    check_plan(dataclasses.replace(made, refusals=left), to_run=False)
    return UNMET_EXIT_CODE if outlook.unmet else 0


def _show_search(loaded: LoadedConfig, outlook: Any) -> None:
    space, strategy = loaded.space, loaded.workflow.strategy
    assert space is not None
    assert strategy is not None
    many = f"{space.size:,} setting{'s' if space.size != 1 else ''}"
    least = f"at most {outlook.trials:,} trials that run"
    click.echo(f"search  {strategy.sampler} over {many}, {strategy.execution_order}, {least}")
    for one in space.dimensions:
        shown = [plain_value(choice) for choice in one.choices[:_CHOICES]]
        more = f", … ({len(one.choices)})" if len(one.choices) > _CHOICES else ""
        click.echo(f"space   {one.name}: {', '.join(shown)}{more}")
    if outlook.planned:
        of = f"{outlook.planned:,}" if outlook.planned == space.size else f"the first {outlook.planned:,}"
        if not outlook.out:
            click.echo(f"plans   none of {of} settings is ruled out")
        for reason, count in list(outlook.out.items())[:_REASONS]:
            click.echo(f"plans   {count} of {of} settings {'are' if count != 1 else 'is'} out: {reason}")
        rest = list(outlook.out.values())[_REASONS:]
        if rest:
            click.echo(f"plans   {sum(rest)} more are out, for {len(rest)} other reasons")
    if outlook.unmet:
        click.echo(click.style("no setting can meet the goals: loosen them, or widen the space", fg="red"))


def _search_as_json(loaded: LoadedConfig, settings: Mapping[str, Any], outlook: Any) -> dict[str, Any]:
    space, strategy = loaded.space, loaded.workflow.strategy
    assert space is not None
    assert strategy is not None
    return {
        "sampler": strategy.sampler,
        "execution_order": strategy.execution_order,
        "size": space.size,
        "trials": outlook.trials,
        "dimensions": [{"name": one.name, "choices": list(one.choices)} for one in space.dimensions],
        "first": dict(settings),
        "planned": outlook.planned,
        "out": [{"reason": reason, "settings": count} for reason, count in outlook.out.items()],
    }


def _show(made: Any) -> None:
    spec = made.input_spec
    if spec.unknown:
        click.echo(f"model   unknown: {spec.unknown}")
    else:
        click.echo(
            f"model   {made.model.artifact.model}: {spec.model_type}, {spec.parameters / 1e6:,.1f}M parameters, "
            f"{spec.precision}, {size(spec.bytes)}"
        )
    accelerator = made.accelerator
    click.echo(f"target  {accelerator.device}, {accelerator.execution_providers[0]}")
    for name, config in made.data_configs.items():
        click.echo(f"data    {name}: {config.load_dataset_config.data_files or config.load_dataset_config.data_name}")
    click.echo(f"cache   {made.store.root}\noutput  {made.output_dir}\n")
    rows = [_row(step) for step in made.steps]
    if all(step.estimate is not None or step.cached for step in made.steps):
        total = made.estimate
        rows.append(["total", "", "", size(total.ram), size(total.vram), size(total.disk), duration(total.seconds)])
    click.echo(table(["step", "pass", "state", "RAM", "VRAM", "disk", "time"], rows, right=(3, 4, 5, 6)))
    click.echo("(RAM: highest anonymous memory of the step's process; all figures are estimates)")
    for step in made.steps:
        for note in step.notes:
            click.echo(f"note    {step.name}: {note}")
    for note in made.notes:
        click.echo(f"note    {note}")
    for problem in made.blockers:
        click.echo(f"{click.style('before a run', fg='yellow')}  {problem}")


def _row(step: Any) -> list[str]:
    if step.cached:
        return [step.name, step.type, "cached", "-", "-", "-", "-"]
    if step.estimate is None:
        return [step.name, step.type, "unknown" if step.unknown else "to do", "?", "?", "?", "?"]
    one = step.estimate
    return [step.name, step.type, "to do", size(one.ram), size(one.vram), size(one.disk), duration(one.seconds)]


def _as_json(made: Any) -> dict[str, Any]:
    return {
        "model": None if made.model.artifact is None else str(made.model.artifact.model),
        "unknown": made.input_spec.unknown,
        "accelerator": made.accelerator.model_dump(mode="json"),
        "cache_dir": os.fspath(made.store.root),
        "output_dir": os.fspath(made.output_dir),
        "steps": [
            {
                "name": step.name,
                "type": step.type,
                "key": step.key,
                "cached": step.cached,
                "unknown": step.unknown,
                "estimate": None if step.estimate is None else vars(step.estimate),
                "notes": list(step.notes),
            }
            for step in made.steps
        ],
        "refusals": [str(problem) for problem in made.refusals],
        "blockers": [str(problem) for problem in made.blockers],
        "notes": list(made.notes),
    }
