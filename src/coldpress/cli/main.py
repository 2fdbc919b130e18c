"""The `coldpress` command: which verbs there are, and the one place where an error becomes a message and an exit code.

A verb's module is imported when it is called, so `coldpress --help` imports nothing but click.
"""

from __future__ import annotations

import importlib
import signal
import sys
from typing import Any

import click

from coldpress import __version__
from coldpress.errors import ColdpressError, ConfigError, Interrupted

__all__ = ["main"]

_VERBS = {
    "run": ("coldpress.cli.workflow", "Run a workflow to its end."),
    "check": ("coldpress.cli.workflow", "Find every error in a config, all at once."),
    "plan": ("coldpress.cli.workflow", "Dry run: steps, what is cached, memory, disk and time."),
    "migrate": ("coldpress.cli.language", "Rewrite a config of any older Olive dialect to today's."),
    "schema": ("coldpress.cli.language", "Print the JSON Schema of the config language."),
    "data": ("coldpress.cli.data", "Show prepared samples: text, token ids, which tokens carry loss."),
    "finetune": ("coldpress.cli.verbs", "Fine-tune a model on a file of records: adapters or all weights."),
    "build": ("coldpress.cli.verbs", "Build an ONNX model for ONNX Runtime GenAI."),
    "optimize": ("coldpress.cli.optimize", "Search for the best form of a model within limits of quality and size."),
    "eval": ("coldpress.cli.evaluate", "Measure a model, or two side by side: quality, speed, memory, size."),
    "convert-adapters": ("coldpress.cli.adapters", "A PEFT adapter to a file for an ONNX model with LoRA inputs."),
    "report": ("coldpress.cli.report", "The report of a run made again, or several runs side by side."),
    "generate": ("coldpress.cli.talk", "Let a model continue a prompt."),
    "chat": ("coldpress.cli.talk", "Talk to a model."),
    "cache": ("coldpress.cli.cache", "List, prune or verify finished steps."),
    "doctor": ("coldpress.cli.doctor", "Hardware, versions, execution providers, known-bad combinations."),
}


class _LazyGroup(click.Group):
    """Knows its verbs by name; imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _VERBS:
            return None
        command: click.Command = getattr(importlib.import_module(_VERBS[name][0]), name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _VERBS and not args[0].startswith("-"):
            from coldpress.registry import nearest

            close = nearest(args[0], _VERBS)
            ctx.fail(f"there is no command {args[0]!r}" + (f"; did you mean {close}?" if close else ""))
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="coldpress")
def _root() -> None:
    """Fine-tune, merge, compress, export and prove a language model: one config file, one command."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a step failed, 2 config or command wrong, 3 goals missed, 130 interrupted."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(_run())


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run() -> int:
    try:
        code = _root(standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except ConfigError as error:
        _show_problems(error)
        return error.exit_code
    except ColdpressError as error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error.message}", err=True)
        if error.hint:
            click.echo(f"{click.style('  hint:', fg='cyan')} {error.hint}", err=True)
        return error.exit_code
    except SystemExit as end:
        # click ends so when the reader of the output (head, less) went away: nothing is wrong.
        return 0 if isinstance(end.__context__, BrokenPipeError) else 1
    except Exception as error:  # noqa: BLE001 - the one place in the command line
        import traceback

        traceback.print_exc()
        click.echo(
            f"error: {type(error).__name__}: {error}\n"
            "  hint: this is a bug in Coldpress; please report the lines above",
            err=True,
        )
        return 1


def _show_problems(error: ConfigError) -> None:
    for problem in error.problems:
        place = ":".join(str(part) for part in (problem.file, problem.line) if part)
        head = ": ".join(part for part in (place, problem.path) if part)
        click.echo(f"{click.style(head, bold=True)}: {problem.message}" if head else problem.message, err=True)
        if problem.hint:
            click.echo(f"{click.style('  hint:', fg='cyan')} {problem.hint}", err=True)
    count = len(error.problems)
    click.echo(click.style(f"{count} problem{'s' if count > 1 else ''}; nothing was run", fg="red"), err=True)
