"""`coldpress doctor`: what this machine can do, and what about its packages is known to be bad."""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
from pathlib import Path

import click

from coldpress.hardware import Hardware, detect, library_versions
from coldpress.units import size

__all__ = ["doctor", "findings"]

_PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "tokenizers", "safetensors", "numpy",
    "numba", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-genai",
    "onnxruntime-genai-cuda", "onnxruntime-genai-directml",
)  # fmt: skip
_ORT = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml")
_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")


def findings(hardware: Hardware, versions: dict[str, str | None]) -> list[tuple[str, str]]:
    """(problem, way out) for each known-bad thing."""
    found = []
    for family in (_ORT, _GENAI):
        present = [name for name in family if versions[name]]
        if len(present) > 1:
            found.append(
                (
                    f"{' and '.join(present)} are installed together: they overwrite each other's files",
                    f"pip uninstall {' '.join(present)}, then install the one you want",
                )
            )
        if not present:
            found.append((f"no {family[0]} is installed", "pip install 'coldpress[cpu]' (or [gpu])"))
    if hardware.gpus and not versions["onnxruntime-gpu"]:
        found.append(
            ("this machine has a GPU, and the installed ONNX Runtime cannot use it", "pip install 'coldpress[gpu]'")
        )
    found += [
        (f"{name} is not installed: fine-tuning and proofs need it", "pip install 'coldpress[cpu]'")
        for name in ("torch", "transformers", "peft", "datasets")
        if versions[name] is None
    ]
    transformers = versions["transformers"]
    if transformers is not None and int(transformers.split(".")[0]) < 5:
        found.append((f"transformers {transformers} is older than 5", "pip install -U transformers"))
    free = shutil.disk_usage(Path.cwd()).free
    if free < 5e9:
        found.append((f"only {size(free)} of disk are free here", "free some space, or set cache_dir elsewhere"))
    return found


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show hardware, versions, execution providers and known-bad combinations. Exit code 1 when there is one."""
    hardware, versions = detect(), library_versions(_PACKAGES)
    problems = findings(hardware, versions)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "python": platform.python_version(),
                    "hardware": dataclasses.asdict(hardware),
                    "versions": versions,
                    "problems": [{"problem": problem, "way_out": way_out} for problem, way_out in problems],
                },
                indent=2,
            )
        )
        ctx.exit(1 if problems else 0)
    click.echo(f"system     {hardware.system}, {hardware.machine}, Python {platform.python_version()}")
    click.echo(f"processor  {hardware.processor}: {hardware.cores} cores, {hardware.threads} threads")
    click.echo(f"           {' '.join(hardware.instruction_sets) or 'no known instruction sets'}")
    bf16 = "bf16 in hardware" if hardware.fast_bf16 else "no bf16 in hardware: training runs in fp32"
    click.echo(f"           {bf16}")
    click.echo(f"memory     {size(hardware.memory)}, {size(hardware.available)} available")
    click.echo(f"GPUs       {', '.join(f'{gpu.name} ({size(gpu.memory)})' for gpu in hardware.gpus) or 'none'}")
    click.echo(f"providers  {', '.join(hardware.execution_providers) or 'none'}")
    for name, version in versions.items():
        if version or name in ("torch", "transformers", "peft", "datasets", "bitsandbytes"):
            click.echo(f"{name:28s} {version or 'not installed'}")
    for problem, way_out in problems:
        click.echo(f"{click.style('problem', fg='red')} {problem}\n  {click.style('way out:', fg='cyan')} {way_out}")
    if not problems:
        click.echo(click.style("nothing known to be bad", fg="green"))
    ctx.exit(1 if problems else 0)
