"""ModelBuilder: a Hugging Face checkpoint to an ONNX model for ONNX Runtime GenAI, streamed from file to file.

Options are those of Olive's pass of this name (`builder_choice`). Each one is honoured or refused with its reason; none
is ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from coldpress.artifacts.arch import Arch
from coldpress.artifacts.base import Artifact, Spec, read_json
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.artifacts.tensors import TensorSource
from coldpress.errors import CheckpointError, PlanError
from coldpress.events import Progress
from coldpress.graph.form import EMBEDDING, WRITE_BUDGET, Form, Quantization, data_bytes, prompt_bytes
from coldpress.graph.genai import check_search
from coldpress.passes.base import Context, Estimate, Limits, PlanContext, Planned
from coldpress.passes.builder_choice import Choice, choose, main_quantization, resolve
from coldpress.passes.builder_config import ModelBuilderConfig
from coldpress.passes.builder_providers import PROVIDERS
from coldpress.passes.builder_taken import none_taken
from coldpress.passes.merge_adapter_weights import keep_adapter, with_adapter

__all__ = ["ModelBuilder", "ModelBuilderConfig"]

_LIMITS: Mapping[str, Limits] = {
    "fp32": Limits(1e-3, 0.005),
    "fp16": Limits(1e-3, 0.005),
    "bf16": Limits(0.01, 0.01),
    "int8": Limits(0.01, 0.01),
    "int4": Limits(0.1, 0.05),
}
_PARAMETERS_PER_SECOND = 0.3e9
"""Quantized and written by one core at five scales (eight times as many at one); only a plan's estimate uses it."""
_PROCESS_BYTES = 200 << 20
"""Python with onnx_ir and Numba."""
_MODEL_FILE_BYTES = 1 << 20
HEAD_CHECK_ELEMENTS = 1 << 22
"""Weights of a tied head compared with the embedding at a time."""
MODEL_FILE = "model.onnx"
PROMPT_FILE = "model_prompt.onnx"
"""Beside model.onnx: the graph that runs for more than one token."""
ALL_LOGITS: Mapping[str, str] = {MODEL_FILE: "model_all_logits.onnx", PROMPT_FILE: "model_prompt_all_logits.onnx"}
"""Beside a graph with a pruned head: the same weights, logits of every token. Perplexity and parity need them."""


class ModelBuilder:
    """Build the ONNX model."""

    Config: ClassVar[type[ModelBuilderConfig]] = ModelBuilderConfig
    version: ClassVar[int] = 2
    libraries: ClassVar[tuple[str, ...]] = ("onnx-ir", "numba", "numpy")
    preload: ClassVar[tuple[str, ...]] = ("coldpress.graph.decoder", "coldpress.kernels.quantize")
    needs_torch: ClassVar[bool] = False
    takes: ClassVar[str] = "checkpoint"
    makes: ClassVar[str] = "onnx"

    @staticmethod
    def check(config: ModelBuilderConfig) -> None:
        """Raise PlanError for options that are not built, whatever the model is."""
        check_search(resolve(config)[0].search, None)

    def plan(self, config: ModelBuilderConfig, spec: Spec, env: PlanContext) -> Planned:
        """What comes out and what it takes; raises PlanError with every reason against it."""
        provider = env.accelerator.execution_providers[0]
        built = replace(
            spec,
            kind="onnx",
            tensors=(),
            packings={},
            precision=config.precision,
            adapter=spec.adapter if config.adapter == "inputs" else None,
            base_quantization=None,
            execution_provider=provider,
        )
        if spec.kind != "checkpoint":
            raise PlanError(f"ModelBuilder takes a Hugging Face checkpoint, this step gets a model of kind {spec.kind}")
        if spec.task == CLASSIFICATION:
            raise PlanError(
                "ModelBuilder builds models that write text, and this one gives a text its class",
                hint="take text-classification out of input_model.task if the model writes text; a classifier stays a "
                "checkpoint: end the workflow with what the training made, or with MergeAdapterWeights",
            )
        as_stored = spec.adapter is None or (config.adapter == "inputs" and spec.base_quantization is None)
        packings = spec.packings if as_stored else none_taken(spec.packings)
        choice = choose(config, spec.config, provider, spec.adapter, packings)
        check_search(resolve(config)[0].search, choice.arch.context_length)
        _check_tensors(choice.arch, {tensor.name: tensor.shape for tensor in spec.tensors})
        size = data_bytes(choice.arch, choice.form)
        if choice.prompt is not None:
            size += prompt_bytes(choice.arch, choice.prompt)
        quantized = bool(choice.form.nodes)
        searched = any(q.candidates > 1 for q in choice.form.nodes.values())
        rate = _PARAMETERS_PER_SECOND * env.hardware.cores * (1 if searched else 8)
        estimate = Estimate(
            ram=_PROCESS_BYTES + WRITE_BUDGET * (1 if spec.adapter is None else 2),
            disk=size + _MODEL_FILE_BYTES,
            seconds=2.0 + spec.parameters / (rate if quantized else 0.5e9) * (1 if choice.prompt is None else 2),
        )
        return Planned(built, estimate, choice.notes, model_bytes=size)

    def limits(self, config: ModelBuilderConfig, spec: Spec) -> Limits | None:
        """None where the model no longer goes from tokens to logits."""
        resolved, _ = resolve(config)
        if resolved.exclude_embeds or resolved.exclude_lm_head:
            return None
        return _LIMITS[resolved.precision]

    def run(self, config: ModelBuilderConfig, model: Artifact, ctx: Context) -> Artifact:
        """Write the graph, its weights, genai_config.json and the tokenizer into `ctx.output`."""
        import onnx_ir as ir

        import coldpress
        from coldpress.artifacts.quantized import open_checkpoint
        from coldpress.graph.decoder import build_decoder
        from coldpress.graph.genai import copy_tokenizer, genai_config, read_generation
        from coldpress.graph.weights import DataFile

        provider = ctx.accelerator.execution_providers[0]
        resolved, _ = resolve(config)
        hf_config = read_json(model.model / "config.json")
        unread = resolved.padding == "left"  # then there is no genai_config.json
        generation = {} if unread else read_generation(model.model, hf_config, resolved.search)
        merges = config.adapter == "merge"
        with open_checkpoint(model.model, hf_config) as base, with_adapter(model, base, added=merges) as tensors:
            packings = base.packings if tensors is base else none_taken(base.packings)
            choice = choose(config, hf_config, provider, model.describe().adapter, packings)
            _check_tensors(choice.arch, {info.name: info.shape for info in base.infos()})
            _check_tied_head(choice.arch, base)
            copy_tokenizer(model.tokenizer_path, model.model, ctx.output, choice.arch.vocab)
            kept = None if merges else keep_adapter(model, ctx.output, choice.form.lora_modules)
            data = DataFile()
            graphs = {}
            for name, form in _graphs(choice).items():
                metadata = _provenance(resolved, replace(choice, form=form), coldpress.__version__)
                if form.prune_head:
                    metadata["coldpress.evaluation_graph"] = ALL_LOGITS[name]
                producer = ("coldpress", coldpress.__version__)
                graphs[name] = build_decoder(choice.arch, form, tensors, data, producer=producer, metadata=metadata)
            data.write(
                ctx.output,
                threads=ctx.hardware.cores,
                progress=lambda done, total: ctx.emit(Progress(ctx.step, done, total, "B")),
            )
        for name, graph in graphs.items():
            ir.save(graph, ctx.output / name)
        artifact = Artifact(
            ctx.output, "onnx", ctx.output, adapter=kept, precision=resolved.precision, execution_provider=provider
        )
        if choice.form.left_padding:
            return artifact
        genai = genai_config(
            choice.arch,
            hf_config,
            generation,
            threads=ctx.hardware.cores if choice.provider == "cpu" else None,
            spinning=choice.spinning,
            search=resolved.search,
            provider_options=_provider_options(resolved, provider),
            session_options=_session_options(choice),
            position_ids=choice.form.takes_position_ids,
            inputs_embeds=choice.form.exclude_embeds,
            outputs=_outputs(choice.form),
            prompt_file=None if choice.prompt is None else PROMPT_FILE,
        )
        text = json.dumps(genai, indent=4, ensure_ascii=False) + "\n"
        (ctx.output / "genai_config.json").write_text(text, encoding="utf-8")
        return artifact


def _graphs(choice: Choice) -> dict[str, Form]:
    """File name and form of every graph over the one data file."""
    graphs = {MODEL_FILE: choice.form}
    if choice.prompt is not None:
        graphs[PROMPT_FILE] = choice.prompt
    if choice.form.prune_head:
        graphs |= {ALL_LOGITS[name]: replace(form, prune_head=False) for name, form in graphs.items()}
    return graphs


def _outputs(form: Form) -> tuple[str, ...]:
    logits = () if form.exclude_lm_head else ("logits",)
    hidden = ("hidden_states",) if form.exclude_lm_head or form.include_hidden_states else ()
    return (*logits, *hidden)


def _provider_options(config: ModelBuilderConfig, provider: str) -> tuple[Mapping[str, Mapping[str, str]], ...]:
    known = PROVIDERS[provider]
    if known.key == "cpu":
        return ()
    if known.key == "cuda":
        return ({"cuda": {"enable_cuda_graph": "1" if config.enable_cuda_graph else "0"}},)
    return ({known.key: known.options},)


def _session_options(choice: Choice) -> Mapping[str, str]:
    """The accuracy level of MatMulNBits nodes that ONNX Runtime makes by itself."""
    if not (choice.form.qdq and choice.form.nodes):
        return {}
    return {"session.qdq_matmulnbits_accuracy_level": str(main_quantization(choice.form).accuracy_level)}


def _provenance(config: ModelBuilderConfig, choice: Choice, version: str) -> dict[str, str]:
    """What the model file says of its making."""
    form = choice.form
    # GatherBlockQuantized reads uint8 codes since 1.23; the other operators are older than 1.22.
    runtime = "1.23" if EMBEDDING in form.nodes else "1.22"
    if form.int8_tokens:
        runtime = "1.25"  # before, ONNX Runtime multiplies int8 wrongly on AMX: its pull request 27671
    if choice.arch.mixture is not None:
        runtime = "1.32"  # the only one that experts were run with
    metadata = {
        "coldpress.version": version,
        "coldpress.precision": config.precision,
        "coldpress.execution_provider": choice.provider,
        "coldpress.io_dtype": form.io,
        "coldpress.minimum_onnxruntime": runtime,
    }
    if choice.provider != "cpu":
        metadata["coldpress.checked"] = "in structure; graphs for this provider were not run"
    if form.nodes:
        q = main_quantization(form)
        metadata |= {
            "coldpress.block_size": str(q.block_size),
            "coldpress.symmetric": str(q.symmetric).lower(),
            "coldpress.accuracy_level": str(q.accuracy_level),
            "coldpress.algorithm": _algorithm(q),
        }
    taken = sum(q.taken is not None for q in form.nodes.values())
    if taken:
        metadata["coldpress.taken_over"] = f"{taken} of {len(form.nodes)} quantized matrices"
    return metadata


def _algorithm(q: Quantization) -> str:
    if q.taken is not None:
        return f"{q.taken.method}, as stored"
    if q.half_quadratic:
        return "hqq"
    return "rtn" if q.candidates == 1 else f"rtn, best of {q.candidates} scales"


def _head_name(arch: Arch) -> str:
    return f"{arch.family.names.head}.weight"


def _check_tied_head(arch: Arch, tensors: TensorSource) -> None:
    """A head that is tied may lie in the file a second time, but must be the embedding; raises CheckpointError."""
    head = _head_name(arch)
    if not arch.tied or head not in tensors:
        return
    step = max(1, HEAD_CHECK_ELEMENTS // arch.hidden)
    for start in range(0, arch.vocab, step):
        stop = min(start + step, arch.vocab)
        if (tensors.read(head, start, stop) != tensors.read(arch.embedding, start, stop)).any():
            raise CheckpointError(
                f"config.json ties the head to the embedding, but {head} and {arch.embedding} differ",
                hint="set tie_word_embeddings to false in config.json if the head is one of its own",
            )


def _check_tensors(arch: Arch, found: Mapping[str, tuple[int, ...]]) -> None:
    """The checkpoint must hold what config.json promises and nothing besides; raises CheckpointError."""
    expected = dict(arch.expected())
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} has shape {list(found[name])}, config.json says {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    # Some checkpoints carry the tied head a second time, or what can be computed.
    ignored = (_head_name(arch),) if arch.tied else ()
    problems += [
        f"{name} has no place in a {arch.family.model_type} model of this config.json"
        for name in found
        if name not in expected and name not in ignored and not name.endswith(arch.family.ignored)
    ]
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CheckpointError(
            "config.json and the weights of the model contradict each other:\n  " + "\n  ".join(shown),
            hint="is the download complete, and do config.json and the weights belong to the same model?",
        )
