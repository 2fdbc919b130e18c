"""Logits of a model for token sequences, whatever the model's form. Metrics and parity know only this.

Sequences are padded on the right, where a causal model never looks, so a sequence's logits do not depend on its batch.
Weights are multiplied in float32: what is compared is the model, not the precision it happens to run in.

A checkpoint runs whole (`TorchRunner`) or with one decoder block in memory at a time (`LayerwiseRunner`); both run
Transformers' own model. Block by block costs one reading of the weights for as many sequences as `STATES_BYTES` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import ADAPTER_FILE, FORMATS, lora_inputs
from coldpress.artifacts.adapter_record import modules_of
from coldpress.artifacts.base import Artifact, BaseQuantization, read_json
from coldpress.artifacts.tensors import TensorSet, TensorSource
from coldpress.errors import CheckpointError, StepError, UnsupportedModelError
from coldpress.hardware import detect

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["LayerwiseRunner", "LogitsRunner", "OnnxRunner", "TorchRunner", "in_batches", "open_runner"]

LOGITS_BYTES = 128 << 20
"""Of one batch; fewer sequences are run at a time when the vocabulary is large."""
STATES_BYTES = 256 << 20
"""Hidden states that wait between two blocks; more sequences than they hold take another reading of the weights."""
BLOCK_TOKENS = 1024
"""Tokens that a block computes at a time (at least one sequence): bounds what lies between its matrices."""
WHOLE_SHARE = 0.5
"""Of the memory available: a model whose float32 weights take more is not loaded whole."""
EVALUATION_GRAPH = "coldpress.evaluation_graph"
"""Metadata of a graph whose logits are of the last position only: the file beside it that yields them all."""
_QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Of the products that ONNX Runtime makes of DequantizeLinear and MatMul, where genai_config.json sets it."""

_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class LogitsRunner(Protocol):
    """A causal language model that can be asked."""

    vocab_size: int
    context_length: int | None

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        """[tokens, vocabulary] of each sequence; row i holds the scores of token i + 1."""
        ...

    def close(self) -> None:
        """Let go of the weights."""
        ...


@contextmanager
def open_runner(
    model: Artifact,
    *,
    trust_remote_code: bool = False,
    blocks: Literal["always", "if too large"] = "if too large",
    on_block: Callable[[int, int], None] | None = None,
) -> Iterator[LogitsRunner]:
    """The runner for a model, loaded from its files; raises CheckpointError.

    `blocks` says when a checkpoint runs block by block; `on_block` is then told (blocks done, blocks). A model that has
    no blocks to run one by one is loaded whole where it fits.
    """
    runner: LogitsRunner | None = None
    if model.kind == "onnx":
        provider = model.execution_provider or "CPUExecutionProvider"
        runner = OnnxRunner(model.model, adapter=model.adapter, execution_provider=provider)
    elif _runs_in_blocks(model) and (blocks == "always" or _too_large(model)):
        try:
            runner = LayerwiseRunner(
                model.model, adapter=model.adapter, trust_remote_code=trust_remote_code, on_block=on_block
            )
        except UnsupportedModelError:
            if _too_large(model):
                raise
    if runner is None:
        runner = TorchRunner(
            model.model,
            adapter=model.adapter,
            base_quantization=model.base_quantization,
            trust_remote_code=trust_remote_code,
        )
    try:
        yield runner
    finally:
        runner.close()


def _runs_in_blocks(model: Artifact) -> bool:
    """Not where another library makes weights of the base while it is loaded whole.

    bitsandbytes does for a QLoRA adapter, and PEFT for an adapter that begins with a decomposition of the base (PiSSA,
    OLoRA, LoftQ ...) or that brings weights of the base along.
    """
    if model.adapter is None:
        return True
    config = read_json(model.adapter / "adapter_config.json")
    whole = tuple(f".{module}.weight" for module in config.get("modules_to_save") or ())
    with TensorSet.open(model.adapter / "adapter_model.safetensors") as tensors:
        names = [info.name for info in tensors.infos() if not modules_of([info.name])]
    plain_start = config.get("init_lora_weights", True) in (True, False, "gaussian")
    return model.base_quantization is None and plain_start and all(name.endswith(whole) for name in names)


def _too_large(model: Artifact) -> bool:
    return 4 * model.describe().parameters > WHOLE_SHARE * detect().available


def in_batches(
    runner: LogitsRunner, sequences: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[int, Logits]]:
    """(position in `sequences`, its logits), in order of length, so that little is padded."""
    order = sorted(range(len(sequences)), key=lambda place: len(sequences[place]), reverse=True)
    batches = []
    while order:
        longest = max(len(sequences[order[0]]), 1)
        rows = max(1, min(batch_size, LOGITS_BYTES // (4 * longest * max(runner.vocab_size, 1))))
        if isinstance(runner, LayerwiseRunner):
            rows = max(1, min(rows, BLOCK_TOKENS // longest))
        batches.append(order[:rows])
        order = order[rows:]
    texts = ([sequences[place] for place in batch] for batch in batches)
    results = runner.each(list(texts)) if isinstance(runner, LayerwiseRunner) else map(runner.logits, texts)
    for batch in batches:
        found = next(results)
        for row, place in enumerate(batch):
            yield place, found[row]
        del found  # or it would stay while the next batch is computed


class TorchRunner:
    """A Hugging Face checkpoint, with its adapter if it has one, in float32 on the CPU."""

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        base_quantization: BaseQuantization | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        from coldpress.nn.loading import load_adapter, load_dequantized, load_model

        if adapter is None or base_quantization is None:
            model = load_model(folder, dtype="float32", trust_remote_code=trust_remote_code)
        else:
            model = load_dequantized(folder, base_quantization, trust_remote_code=trust_remote_code)
        if adapter is not None:
            model = load_adapter(model, adapter)
        self._model = model.eval()
        config = read_json(folder / "config.json")
        self.vocab_size = int(config["vocab_size"])
        limit = config.get("max_position_embeddings")
        self.context_length = None if limit is None else int(limit)

    @property
    def model(self) -> Any:
        """The Transformers model itself, for generation."""
        return self._model

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import torch

        with torch.inference_mode():
            out = self._model(input_ids=_padded(batch), use_cache=False).logits.float().numpy()
        return [out[row, : len(ids)] for row, ids in enumerate(batch)]

    def close(self) -> None:
        self._model = None


class LayerwiseRunner:
    """A Hugging Face checkpoint, with its adapter if it has one, in float32 on the CPU, one decoder block in memory.

    `tensors` are the weights, those of the folder unless given (an adapter merged, codes dequantized).
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensors: TensorSource | None = None,
        adapter: Path | None = None,
        trust_remote_code: bool = False,
        on_block: Callable[[int, int], None] | None = None,
    ) -> None:
        from coldpress.nn.layerwise import LayerwiseModel

        self._model = LayerwiseModel(folder, tensors=tensors, adapter=adapter, trust_remote_code=trust_remote_code)
        self._on_block = on_block
        config = read_json(folder / "config.json")
        self.vocab_size = int(config["vocab_size"])
        limit = config.get("max_position_embeddings")
        self.context_length = None if limit is None else int(limit)

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        (found,) = self.each([batch])
        return found

    def each(self, batches: Sequence[Sequence[Sequence[int]]]) -> Iterator[list[Logits]]:
        """`logits` of each batch, in order; the weights are read once for as many batches as `STATES_BYTES` holds."""
        waiting = list(batches)
        while waiting:
            held, taken = 0, 0
            while taken < len(waiting):
                held += 4 * self._model.hidden_size * len(waiting[taken]) * max(map(len, waiting[taken]))
                if taken and held > STATES_BYTES:
                    break
                taken += 1
            now, waiting = waiting[:taken], waiting[taken:]
            ids = [_padded(batch) for batch in now]
            states = self._model.through_blocks(ids, self._on_block)
            for place, batch in enumerate(now):
                out = self._model.logits(ids[place], states[place]).numpy()
                yield [out[row, : len(one)] for row, one in enumerate(batch)]
                del out  # or it would stay while the next batch is computed

    def close(self) -> None:
        self._model.close()


def _padded(batch: Sequence[Sequence[int]]) -> Any:
    """Token ids [sequences, longest] as a tensor."""
    import torch

    longest = max(len(ids) for ids in batch)
    return torch.tensor([[*ids, *([0] * (longest - len(ids)))] for ids in batch])


def _sizes(folder: Path) -> dict[str, Any]:
    """The model section of genai_config.json; a model for plain ONNX Runtime has only its checkpoint's config."""
    if (folder / "genai_config.json").is_file() or not (folder / "config.json").is_file():
        found: dict[str, Any] = read_json(folder / "genai_config.json").get("model", {})
        return found
    config = read_json(folder / "config.json")
    return {"vocab_size": config.get("vocab_size"), "context_length": config.get("max_position_embeddings")}


class OnnxRunner:
    """An ONNX Runtime GenAI model folder, run by plain ONNX Runtime with an empty cache.

    A graph with LoRA inputs is given `adapter`: the file that was made for it, where there is one, else its weights.
    The session is made when it is first asked: while a reference goes through its blocks, its weights need not wait in
    memory. Where the graph says so (`EVALUATION_GRAPH`), another one over the same data file is run in its place.

    A model with a graph of its own for prompts is asked as it is used: that graph takes the first quarter of a
    sequence, the other, which is the coarser, goes on from its cache.
    """

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        execution_provider: str = "CPUExecutionProvider",
        threads: int | None = None,
    ) -> None:
        import onnxruntime

        genai = _sizes(folder)
        self._graph = folder / str(genai.get("decoder", {}).get("filename", "model.onnx"))
        if execution_provider not in onnxruntime.get_available_providers():
            raise StepError(
                f"the model is built for {execution_provider}, which the installed ONNX Runtime does not have",
                hint=f"it has: {', '.join(onnxruntime.get_available_providers())}",
            )
        if not self._graph.is_file():
            raise CheckpointError(f"{self._graph} is missing", hint="is the model complete?")
        self._provider, self._threads = execution_provider, threads or detect().threads
        self._level = genai.get("decoder", {}).get("session_options", {}).get(_QDQ_LEVEL)
        self._lora: dict[str, Any] = {}
        self._options: Any = None
        if adapter is not None:
            self._take(folder / f"{ADAPTER_FILE}{FORMATS['onnx_adapter']}", adapter)
        self._prompt_graph = _prompt_graph(folder, genai)
        self._opened: Any = None
        self._opened_prompt: Any = None
        self.vocab_size = int(genai.get("vocab_size") or self._session.get_outputs()[0].shape[-1])
        limit = genai.get("context_length")
        self.context_length = None if limit is None else int(limit)

    @property
    def _session(self) -> Any:
        if self._opened is None:
            self._opened = self._open_for_all_logits(self._graph)
        return self._opened

    def _open_for_all_logits(self, graph: Path) -> Any:
        other = _metadata(graph).get(EVALUATION_GRAPH)
        return self._open(graph if other is None else self._beside(other))

    def _take(self, file: Path, adapter: Path) -> None:
        import onnxruntime

        if file.is_file():
            self._loaded = onnxruntime.LoraAdapter()  # must live as long as the options that name it
            try:
                self._loaded.Load(str(file))
            except _onnxruntime_errors() as error:
                raise CheckpointError(f"ONNX Runtime cannot load {file}: {error}") from error
            self._options = onnxruntime.RunOptions()
            self._options.add_active_adapter(self._loaded)
            return
        with AdapterWeights.open(adapter) as weights:
            self._lora = lora_inputs(weights)

    def _beside(self, name: str) -> Path:
        """The file of the model's folder that the graph names."""
        folder = self._graph.parent.resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise CheckpointError(f"{self._graph} names {name!r} as {EVALUATION_GRAPH}, outside its own folder")
        if not path.is_file():
            raise CheckpointError(
                f"{self._graph} yields logits of the last position only and names {name!r} for all of them, "
                f"which is missing",
                hint="is the model complete? build it again",
            )
        return path

    def _open(self, graph: Path) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._level is not None:
            options.add_session_config_entry(_QDQ_LEVEL, str(self._level))
        try:
            return onnxruntime.InferenceSession(str(graph), options, providers=[self._provider])
        except _onnxruntime_errors() as error:
            raise CheckpointError(f"ONNX Runtime cannot load {graph}: {error}") from error

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        import numpy as np

        if self._prompt_graph is not None:
            return [self._handed_over(ids, self._prompt_graph) for ids in batch]
        rows, longest = len(batch), max(len(ids) for ids in batch)
        ids = np.zeros((rows, longest), np.int64)
        mask = np.zeros((rows, longest), np.int64)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        inputs = {one.name: one for one in self._session.get_inputs()}
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.broadcast_to(np.arange(longest, dtype=np.int64), (rows, longest)).copy()
        for name, one in inputs.items():
            if name.startswith("past_key_values."):
                feeds[name] = np.zeros((rows, one.shape[1], 0, one.shape[3]), _FLOATS[one.type])
        for one in self._session.get_overridable_initializers():
            if one.name in self._lora:
                feeds[one.name] = self._lora[one.name].astype(_FLOATS[one.type], copy=False)
        (out,) = self._session.run(["logits"], feeds, self._options)
        return [out[row, : len(one)].astype(np.float32, copy=False) for row, one in enumerate(batch)]

    def _handed_over(self, ids: Sequence[int], prompt_graph: Path) -> Logits:
        """Logits of a sequence, a quarter of it through the prompt's graph and the rest through the other."""
        import numpy as np

        if self._opened_prompt is None:
            self._opened_prompt = self._open_for_all_logits(prompt_graph)
        prompt = (len(ids) + 3) // 4
        found: list[Logits] = []
        caches = [one for one in self._session.get_inputs() if one.name.startswith("past_key_values.")]
        past = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), _FLOATS[one.type]) for one in caches}
        for session, new in ((self._opened_prompt, ids[:prompt]), (self._session, ids[prompt:])):
            if len(new):
                length = next(iter(past.values())).shape[2] + len(new)
                feeds = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64)}
                presents = [name.replace("past_key_values", "present") for name in past]
                logits, *caches_now = session.run(["logits", *presents], {**feeds, **past})
                found.append(logits[0].astype(np.float32, copy=False))
                past = dict(zip(past, caches_now, strict=True))
        return np.concatenate(found)

    def close(self) -> None:
        self._opened = self._opened_prompt = None


def _metadata(graph: Path) -> Mapping[str, str]:
    """Of a graph, without its weights: a session would prepare them first."""
    import onnx_ir
    from google.protobuf.message import DecodeError

    try:
        return onnx_ir.load(graph).metadata_props
    except (DecodeError, ValueError, OSError):
        return {}  # the session will say what is wrong with it


def _prompt_graph(folder: Path, genai: dict[str, Any]) -> Path | None:
    """The graph that GenAI runs in place of the first one for more than one token."""
    for stages in genai.get("decoder", {}).get("pipeline", []):
        for stage in stages.values():
            if not stage.get("run_on_token_gen", True):
                return folder / str(stage["filename"])
    return None


def _onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "EPFail")
    found = [getattr(state, name) for name in names if hasattr(state, name)]
    return (RuntimeError, ValueError, OSError, *found)
