"""`coldpress generate` and `chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from coldpress.cli.options import trust_option

__all__ = ["chat", "generate"]


def _sampling_options(command: Any) -> Any:
    for option in reversed(
        (
            click.option(
                "--max-new-tokens",
                type=click.IntRange(1),
                default=256,
                show_default=True,
                help="Tokens to write at most.",
            ),
            click.option(
                "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy."
            ),
            click.option(
                "--top-p",
                type=click.FloatRange(0, 1),
                default=1.0,
                show_default=True,
                help="Sample among the likeliest tokens that make up this share of the probability.",
            ),
            click.option(
                "--adapter",
                type=click.Path(path_type=Path),
                help="An .onnx_adapter file for an ONNX model with LoRA inputs; default: the one it was built with.",
            ),
            click.option("--seed", type=int, help="Seed of the sampling."),
            trust_option,
        )
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompt", "-p", required=True, help="The text to continue; - reads it from standard input.")
@click.option("--chat", "as_chat", is_flag=True, help="Put the prompt into the model's chat template first.")
@_sampling_options
def generate(
    model: Path, prompt: str, as_chat: bool, max_new_tokens: int, temperature: float, top_p: float,
    seed: int | None, adapter: Path | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Let MODEL (an ONNX Runtime GenAI folder, a checkpoint, or a run's output folder) continue a prompt."""
    from coldpress.chat import Sampling, open_generator
    from coldpress.errors import UsageError

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)  # refused before a model is loaded
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on standard input is not UTF-8: {error}", hint="convert it first") from error
    generator = open_generator(model, adapter=adapter, trust_remote_code=trust_remote_code)
    if as_chat:
        text = generator.render([{"role": "user", "content": text}])
    for piece in generator.stream(text, sampling):
        click.echo(piece, nl=False)
    click.echo()


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--system", help="Text of a system message.")
@_sampling_options
def chat(
    model: Path, system: str | None, max_new_tokens: int, temperature: float, top_p: float,
    seed: int | None, adapter: Path | None, trust_remote_code: bool,
) -> None:  # fmt: skip
    """Talk to MODEL; an empty line or Ctrl-D ends it."""
    from coldpress.chat import Sampling, open_generator

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)  # refused before a model is loaded
    generator = open_generator(model, adapter=adapter, trust_remote_code=trust_remote_code)
    messages = [{"role": "system", "content": system}] if system else []
    generator.render([{"role": "user", "content": ""}])  # no chat template: say so before the first question
    while True:
        try:
            said = click.prompt("you", prompt_suffix="> ", default="", show_default=False)
        except click.Abort:
            break
        if not said.strip():
            break
        messages.append({"role": "user", "content": said})
        answer = ""
        for piece in generator.stream(generator.render(messages), sampling):
            click.echo(piece, nl=False)
            answer += piece
        click.echo()
        messages.append({"role": "assistant", "content": answer})
