"""`coldpress convert-adapters`: PEFT adapters to files that a graph with LoRA inputs is given at run time."""

from __future__ import annotations

from pathlib import Path

import click

from coldpress.errors import CheckpointError, UsageError

__all__ = ["convert_adapters"]


@click.command(name="convert-adapters")
@click.option(
    "-a", "--adapter-path", "--adapter_path", "adapter", required=True, type=click.Path(path_type=Path),
    help="Folder with adapter_config.json and adapter_model.safetensors, or a fine-tuning's output folder.",
)  # fmt: skip
@click.option(
    "-o", "--output-path", "--output_path", "output", required=True, type=click.Path(path_type=Path),
    help="File to write; the format's ending is added where it is missing.",
)  # fmt: skip
@click.option(
    "-m", "--model", type=click.Path(path_type=Path), help="The ONNX model it is for: checks names, shapes and type."
)
@click.option(
    "--adapter-format", "--adapter_format", "form", type=click.Choice(["onnx_adapter", "safetensors", "numpy"]),
    default="onnx_adapter", show_default=True, help="onnx_adapter is what ONNX Runtime and GenAI load.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the graph's inputs; default: the model's, or float32.",
)  # fmt: skip
@click.option("--quantize-int4", "--quantize_int4", is_flag=True, hidden=True)
@click.option("--int4-block-size", "--int4_block_size", hidden=True)
@click.option("--int4-quantization-mode", "--int4_quantization_mode", hidden=True)
def convert_adapters(
    adapter: Path,
    output: Path,
    model: Path | None,
    form: str,
    dtype: str | None,
    quantize_int4: bool,
    int4_block_size: str | None,
    int4_quantization_mode: str | None,
) -> None:
    """Convert a PEFT LoRA adapter for a model built with `adapter: inputs` (or by Olive's ExtractAdapters).

    The adapter's scale is worked in. One model serves any number of such files, each of its own rank.
    """
    from coldpress.artifacts.adapter import AdapterWeights
    from coldpress.artifacts.adapter_inputs import check_inputs, lora_inputs, outlines, write_inputs
    from coldpress.artifacts.adapter_record import ADAPTER_HINT, adapter_folder

    if quantize_int4 or int4_block_size or int4_quantization_mode:
        raise UsageError(
            "adapters are not quantized: in int4 all would need one rank, and an adapter takes little memory",
            hint="leave --quantize_int4 and its options out",
        )
    folder = adapter_folder(adapter)
    if folder is None:
        raise CheckpointError(f"{adapter} is no adapter folder", hint=ADAPTER_HINT)
    wanted = {}
    if model is not None:
        from coldpress.artifacts.base import Artifact
        from coldpress.graph.lora import inputs_of

        wanted = inputs_of(Artifact.load(model).model)
    own = next((found for found, _ in wanted.values()), None)
    if None not in (dtype, own) and dtype != own:
        raise UsageError(f"--dtype is {dtype}, and the inputs of {model} are {own}", hint="leave --dtype out")
    dtype = dtype or own or "float32"
    with AdapterWeights.open(folder) as weights:
        inputs = lora_inputs(weights, dtype)
    if model is not None:
        check_inputs(outlines(inputs), wanted, str(model))
    file = write_inputs(output, inputs, form)  # type: ignore[arg-type]
    ranks = sorted({array.shape[1] for name, array in inputs.items() if ".lora_A." in name})
    click.echo(
        f"{file}: {len(inputs) // 2} modules, rank {', '.join(map(str, ranks))}, {dtype}, "
        f"{file.stat().st_size / 1e6:.1f} MB"
    )
