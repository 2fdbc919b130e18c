"""ONNX decoders on plain ONNX Runtime: logits of given tokens, and a cache that is carried on outside.

    prompt    [rows, T] padded on the right, empty cache      -> scores of the last token, cache [row, head, room, size]
    step      [rows, 1], mask [rows, T + 1]                   -> its scores; the token lies behind the row's last

GroupQueryAttention counts the tokens of each row by the mask, so rows of different lengths share a cache; with a cache
it takes one new token at a time, or several of one row alone (ONNX Runtime 1.32, CPU). That is why continuations
go token by token, and why prompts go one by one where most of them is a prefix that all share. On the CPU the caches
that it reads are those that it writes, with room for more tokens, as GenAI has it: nothing is copied for a token. A
graph that is not for GenAI (padding on the left, or another exporter's) tells tokens from padding by their slots, and
yields new caches each time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter import AdapterWeights
from coldpress.artifacts.adapter_inputs import ADAPTER_FILE, FORMATS, lora_inputs
from coldpress.artifacts.base import read_json
from coldpress.config.metrics import RunnerChoice
from coldpress.errors import CheckpointError
from coldpress.evaluate.abilities import Ability, Stop
from coldpress.evaluate.onnx_cache import ROOM, Past, floats, ort_value
from coldpress.evaluate.onnx_session import onnxruntime_errors, open_session, require_provider
from coldpress.evaluate.reading import Reader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits = npt.NDArray[np.float32]

__all__ = ["EVALUATION_GRAPH", "OnnxRunner"]

EVALUATION_GRAPH = "coldpress.evaluation_graph"
"""Metadata of a graph whose logits are of the last position only: the file beside it that yields them all."""
_QDQ_LEVEL = "session.qdq_matmulnbits_accuracy_level"
"""Of the products that ONNX Runtime makes of DequantizeLinear and MatMul, where genai_config.json sets it."""
_SPINNING = "session.intra_op.allow_spinning"
"""Whether threads wait busily; beside other work that is slow, so the builder turns it off but for one profile."""
_PREFIX_SHARE = 2.0
"""Prompts run one by one after their shared prefix only where it is so many times as long as the rest."""

_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}


class _Row(Reader):
    """One row of a model's cache."""

    def __init__(self, runner: OnnxRunner) -> None:
        super().__init__()
        self._runner = runner
        self._past: Past | None = None

    def append(self, ids: Sequence[int], known: int, keep: int) -> Logits:
        import numpy as np

        past, self._past = self._past, None
        past = None if past is None or not known else self._runner.cut(past, known)
        end = len(ids) if self._runner.yields_all else len(ids) - keep + 1
        found = []
        for new in (ids[known:end], *([token] for token in ids[end:])):
            scores, past = self._runner.after(past, new)
            found.append(scores)
        self._past = past
        return np.concatenate(found)


class OnnxRunner:
    """An ONNX Runtime GenAI model folder, run by plain ONNX Runtime.

    A graph with LoRA inputs is given `adapter`: the file that was made for it, where there is one, else its weights.
    Sessions are made when they are first asked: while a reference goes through its blocks, the weights need not wait
    in memory. For all logits another graph over the same data file runs in its place where it says so
    (`EVALUATION_GRAPH`).

    A model with a graph of its own for prompts is asked as it is used: that graph takes the first quarter of a
    sequence, the other, which is the coarser, goes on from its cache. A prompt that is continued goes through it whole.
    """

    name = "ONNX Runtime"
    kind: RunnerChoice = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        *,
        adapter: Path | None = None,
        execution_provider: str = "CPUExecutionProvider",
        threads: int | None = None,
    ) -> None:
        genai = _sizes(folder)
        decoder = genai.get("decoder", {})
        self._graph = folder / str(decoder.get("filename", "model.onnx"))
        require_provider(execution_provider)
        if not self._graph.is_file():
            raise CheckpointError(f"{self._graph} is missing", hint="is the model complete?")
        self._provider, self._threads = execution_provider, threads
        settings = decoder.get("session_options", {})
        self._entries = {key: str(settings[key]) for key in (_QDQ_LEVEL, _SPINNING) if key in settings}
        self._lora: dict[str, Any] = {}
        self._options: Any = None
        if adapter is not None:
            self._take(folder / f"{ADAPTER_FILE}{FORMATS['onnx_adapter']}", adapter)
        self._prompt_graph = _prompt_graph(folder, genai)
        self._by_slots = not (folder / "genai_config.json").is_file()
        """A cache by slots keeps padding between a row's tokens; one for GenAI puts a token behind the row's last."""
        self._sessions: dict[Path, Any] = {}
        self._complete: dict[Path, Path] = {}
        """Graph -> the one that yields all logits of it."""
        self._outlines: dict[Path, tuple[Mapping[str, str], tuple[str, ...]]] = {}
        self._in_place = (
            execution_provider == "CPUExecutionProvider"
            and not self._by_slots
            and bool(read_json(folder / "genai_config.json").get("search", {}).get("past_present_share_buffer"))
        )
        self._row = _Row(self)
        self.vocab_size = int(genai.get("vocab_size") or self._session.get_outputs()[0].shape[-1])
        limit = genai.get("context_length")
        self.context_length = None if limit is None else int(limit)

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset(("log-likelihood", "logits", *(("generation",) if self.continues else ())))

    @property
    def continues(self) -> bool:
        return any(name.startswith("past_key_values.") for name in self._outline(self._graph)[1])

    # -- sessions -----------------------------------------------------------------------------------------------------

    @property
    def _session(self) -> Any:
        """For the logits of every token."""
        return self._open_for_all_logits(self._graph)

    @property
    def _decoding(self) -> Any:
        """For the logits of the last token: the graph as it is used."""
        return self._open(self._graph)

    def _open_for_all_logits(self, graph: Path) -> Any:
        if graph not in self._complete:
            other = self._outline(graph)[0].get(EVALUATION_GRAPH)
            self._complete[graph] = graph if other is None else self._beside(other)
        return self._open(self._complete[graph])

    def _open(self, graph: Path) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = open_session(graph, self._provider, self._threads, self._entries)
        return self._sessions[graph]

    def _outline(self, graph: Path) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Metadata of a graph and the names of its inputs, without its weights: a session would prepare them first."""
        if graph not in self._outlines:
            import onnx_ir
            from google.protobuf.message import DecodeError

            try:
                model = onnx_ir.load(graph)
            except (DecodeError, ValueError, OSError):
                return {}, ()  # the session will say what is wrong with it
            self._outlines[graph] = dict(model.metadata_props), tuple(str(one.name) for one in model.graph.inputs)
        return self._outlines[graph]

    def _take(self, file: Path, adapter: Path) -> None:
        import onnxruntime

        if file.is_file():
            self._loaded = onnxruntime.LoraAdapter()  # must live as long as the options that name it
            try:
                self._loaded.Load(str(file))
            except onnxruntime_errors() as error:
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

    # -- given tokens -------------------------------------------------------------------------------------------------

    def logits(self, batch: Sequence[Sequence[int]]) -> list[Logits]:
        if self._prompt_graph is not None:
            return [self._handed_over(ids, self._prompt_graph) for ids in batch]
        feeds, _ = self._prompt_feeds(self._session, batch, room=0)
        (out,) = self._session.run(["logits"], feeds, self._options)
        return [out[row, : len(one)].astype("float32", copy=False) for row, one in enumerate(batch)]

    def _prompt_feeds(self, session: Any, batch: Sequence[Sequence[int]], *, room: int) -> tuple[dict[str, Any], Any]:
        """Inputs for rows that begin with an empty cache (with room for so many tokens), and their mask."""
        import numpy as np

        rows, longest = len(batch), max(len(ids) for ids in batch)
        ids = np.zeros((rows, longest), np.int64)
        mask = np.zeros((rows, longest), np.int64)
        for row, one in enumerate(batch):
            ids[row, : len(one)] = one
            mask[row, : len(one)] = 1
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, **self._own_inputs(session)}
        inputs = {one.name: one for one in session.get_inputs()}
        if "position_ids" in inputs:
            feeds["position_ids"] = np.broadcast_to(np.arange(longest, dtype=np.int64), (rows, longest)).copy()
        for name, one in inputs.items():
            if name.startswith("past_key_values."):
                feeds[name] = np.zeros((rows, one.shape[1], room, one.shape[3]), _FLOATS[one.type])
        return feeds, mask

    def _own_inputs(self, session: Any) -> dict[str, Any]:
        """The adapter, where it is given as inputs."""
        return {
            one.name: self._lora[one.name].astype(_FLOATS[one.type], copy=False)
            for one in (session.get_overridable_initializers() if self._lora else ())
            if one.name in self._lora
        }

    def _handed_over(self, ids: Sequence[int], prompt_graph: Path) -> Logits:
        """Logits of a sequence, a quarter of it through the prompt's graph and the rest through the other."""
        import numpy as np

        prompt = (len(ids) + 3) // 4
        found: list[Logits] = []
        caches = [one for one in self._session.get_inputs() if one.name.startswith("past_key_values.")]
        past = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), _FLOATS[one.type]) for one in caches}
        first = self._open_for_all_logits(prompt_graph)
        for session, new in ((first, ids[:prompt]), (self._session, ids[prompt:])):
            if len(new):
                length = next(iter(past.values())).shape[2] + len(new)
                feeds = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, length), np.int64)}
                logits, *caches_now = session.run(["logits", *map(_present, past)], {**feeds, **past})
                found.append(logits[0].astype(np.float32, copy=False))
                past = dict(zip(past, caches_now, strict=True))
        return np.concatenate(found)

    def ready(self) -> None:
        """Open what generation runs."""
        for graph in (self._graph, self._prompt_graph):
            if graph is not None:
                self._open(graph)

    def forward(self, batch: Sequence[Sequence[int]]) -> None:
        """Run prompts as before a generation: scores of the last token, and a cache."""
        self.start(batch)

    # -- with a cache -------------------------------------------------------------------------------------------------

    def side_by_side(self, lengths: Sequence[int], shared: int) -> bool:
        rest = sum(lengths) / len(lengths) - shared
        return self._prompt_graph is not None or shared <= _PREFIX_SHARE * rest

    def start(
        self, prompts: Sequence[Sequence[int]], *, shared: int = 0
    ) -> tuple[Past | Sequence[Sequence[int]], Logits]:
        import numpy as np

        lengths = [len(ids) for ids in prompts]
        if not self.side_by_side(lengths, min(shared, min(lengths) - 1)):
            return prompts, np.concatenate([self._row.read(ids) for ids in prompts])
        return self._started(prompts)

    def _started(self, prompts: Sequence[Sequence[int]]) -> tuple[Past, Logits]:
        """The caches of prompts, and the scores of the next token."""
        import numpy as np

        session = self._decoding if self._prompt_graph is None else self._open(self._prompt_graph)
        lengths = [len(ids) for ids in prompts]
        feeds, mask = self._prompt_feeds(session, prompts, room=max(lengths) + ROOM if self._in_place else 0)
        scores, past = self._run(session, {name: ort_value(one) for name, one in feeds.items()}, mask)
        last = np.array(lengths) - 1 if scores.shape[1] > 1 else np.zeros(len(lengths), np.int64)
        return past, scores[np.arange(len(prompts)), last]

    @property
    def yields_all(self) -> bool:
        """Whether the graph as it is used yields the logits of every token it is given."""
        return EVALUATION_GRAPH not in self._outline(self._graph)[0]

    def after(self, past: Past | None, new: Sequence[int]) -> tuple[Logits, Past]:
        """Logits of tokens behind the cache of one row: [tokens, or 1, vocabulary]."""
        import numpy as np

        if past is None:
            room = len(new) + ROOM if self._in_place else 0
            feeds, mask = self._prompt_feeds(self._decoding, [new], room=room)
            feeds = {name: ort_value(one) for name, one in feeds.items()}
        else:
            mask = np.ones((1, past.mask.shape[1] + len(new)), np.int64)
            feeds = self._feeds_after(past, [new], mask)
        scores, now = self._run(self._decoding, feeds, mask)
        return scores[0], now

    def cut(self, past: Past, tokens: int) -> Past:
        """The first tokens of one row."""
        mask = past.mask[:, :tokens]
        if self._in_place:
            return Past(past.caches, mask)
        return Past({name: ort_value(one.numpy()[:, :, :tokens]) for name, one in past.caches.items()}, mask)

    def _run(self, session: Any, feeds: dict[str, Any], mask: Any) -> tuple[Any, Past]:
        """Logits as an array, and the cache after it."""
        names = [name for name in self._outline(self._graph)[1] if name.startswith("past_key_values.")]
        if not self._in_place:
            out = session.run_with_ort_values(["logits", *map(_present, names)], feeds, self._options)
            return floats(out[0]), Past(dict(zip(names, list(out)[1:], strict=True)), mask)
        bound = session.io_binding()
        for name, value in feeds.items():
            bound.bind_ortvalue_input(name, value)
        for name in names:
            bound.bind_ortvalue_output(_present(name), feeds[name])
        bound.bind_output("logits")
        session.run_with_iobinding(bound, self._options)
        return floats(bound.get_outputs()[-1]), Past({name: feeds[name] for name in names}, mask)

    def _feeds_after(self, past: Past, tokens: Sequence[Sequence[int]], mask: Any) -> dict[str, Any]:
        """Inputs for as many new tokens in every row, behind a cache; `mask` covers both."""
        import numpy as np

        feeds: dict[str, Any] = {
            "input_ids": np.array(tokens, np.int64), "attention_mask": mask, **self._own_inputs(self._decoding),
        }  # fmt: skip
        if "position_ids" in self._outline(self._graph)[1]:
            new = feeds["input_ids"].shape[1]
            feeds["position_ids"] = mask.sum(axis=1, keepdims=True) - new + np.arange(new)
        caches = past.with_room(mask.shape[1]).caches if self._in_place else past.caches
        return {**{name: ort_value(one) for name, one in feeds.items()}, **caches}

    def _step(self, past: Past, tokens: Sequence[int]) -> tuple[Logits, Past]:
        """One token behind each row."""
        import numpy as np

        mask = np.concatenate([past.mask, np.ones((len(tokens), 1), np.int64)], axis=1)
        if not self._by_slots:
            mask = (np.arange(mask.shape[1]) < mask.sum(axis=1, keepdims=True)).astype(np.int64)
        out, now = self._run(self._decoding, self._feeds_after(past, [[token] for token in tokens], mask), mask)
        return out[:, -1], now

    def following(
        self, state: Past | Sequence[Sequence[int]], rows: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> list[Logits]:
        import numpy as np

        if not isinstance(state, Past):
            return [self._row.read([*state[row], *new], len(new)) for row, new in zip(rows, tokens, strict=True)]
        if self._fits_beside(state, rows, tokens):
            return self._beside_others(state, rows, tokens)
        lengths = state.lengths
        found: list[Any] = [None] * len(tokens)
        for group in self._groups([lengths[row] for row in rows], [len(one) for one in tokens]):
            past = state.rows([rows[place] for place in group])
            scores = []
            for number in range(len(tokens[group[0]])):
                now, past = self._step(past, [tokens[place][number] for place in group])
                scores.append(now)
            for row, place in enumerate(group):
                found[place] = np.stack([one[row] for one in scores])
        return found

    def _fits_beside(self, state: Past, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> bool:
        """Whether all rows can go on together: each is asked once, most of them are, and none leaves the context."""
        longest = max(state.lengths) + max(len(one) for one in tokens)
        within = self.context_length is None or longest <= self.context_length
        return within and len(set(rows)) == len(rows) and 2 * len(rows) >= len(state.mask)

    def _beside_others(self, state: Past, rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> list[Logits]:
        """All rows go on, so that no cache is copied; what the others, and those that are done, yield is not used."""
        import numpy as np

        found: list[list[Any]] = [[] for _ in rows]
        past = state
        for number in range(max(len(one) for one in tokens)):
            given = [0] * len(state.mask)
            for row, one in zip(rows, tokens, strict=True):
                given[row] = one[number] if number < len(one) else 0
            scores, past = self._step(past, given)
            for place, row in enumerate(rows):
                if number < len(tokens[place]):
                    found[place].append(scores[row])
        return [np.stack(one) for one in found]

    def _groups(self, lengths: Sequence[int], news: Sequence[int]) -> Iterator[list[int]]:
        """Rows with as many new tokens, in groups whose longest row has room for them within the context."""
        group: list[int] = []
        for place in sorted(range(len(lengths)), key=lambda place: (news[place], lengths[place])):
            full = self.context_length is not None and lengths[place] + news[place] > self.context_length
            if group and (news[place] != news[group[0]] or full):
                yield group
                group = []
            group.append(place)
        yield group

    # -- new tokens ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int] = (),
        stop: Stop | None = None,
    ) -> list[list[int]]:
        made: list[list[int]] = [[] for _ in prompts]
        open_rows = list(range(len(prompts)))
        past, scores = self._started(prompts)
        while True:
            going = []
            for place, row in enumerate(open_rows):
                token = int(scores[place].argmax())
                if token in stop_tokens:
                    continue
                made[row].append(token)
                if len(made[row]) < max_new_tokens and not (stop is not None and stop(made[row])):
                    going.append(place)
            if not going:
                return made
            past, open_rows = past.rows(going), [open_rows[place] for place in going]
            scores, past = self._step(past, [made[row][-1] for row in open_rows])

    def stream(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        past, scores = self._started([prompt])
        for number in range(new_tokens):
            token = int(scores[0].argmax())
            yield token
            if number + 1 < new_tokens:
                scores, past = self._step(past, [token])

    def close(self) -> None:
        self._sessions.clear()
        self._row = _Row(self)


def _sizes(folder: Path) -> dict[str, Any]:
    """The model section of genai_config.json; a model for plain ONNX Runtime has only its checkpoint's config."""
    if (folder / "genai_config.json").is_file() or not (folder / "config.json").is_file():
        found: dict[str, Any] = read_json(folder / "genai_config.json").get("model", {})
        return found
    config = read_json(folder / "config.json")
    return {"vocab_size": config.get("vocab_size"), "context_length": config.get("max_position_embeddings")}


def _present(past: str) -> str:
    """Name of the output that is the input `past` of the next run."""
    return past.replace("past_key_values", "present")


def _prompt_graph(folder: Path, genai: dict[str, Any]) -> Path | None:
    """The graph that GenAI runs in place of the first one for more than one token."""
    for stages in genai.get("decoder", {}).get("pipeline", []):
        for stage in stages.values():
            if not stage.get("run_on_token_gen", True):
                return folder / str(stage["filename"])
    return None
