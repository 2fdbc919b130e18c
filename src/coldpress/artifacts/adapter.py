"""An adapter as PEFT saves it: which weights it touches, and with what (LoRA, DoRA, LoHa, LoKr).

Names and cases as in peft/tuners/lora/layer.py, variants.py and dora.py, loha/layer.py and lokr/layer.py. What is
added to a weight stands in `adapter_products`, the sums in `adapter_merged`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.adapter_kinds import refuse_unknown_kinds
from coldpress.artifacts.adapter_products import Hadamard, Kronecker, LowRank, Product
from coldpress.artifacts.adapter_record import scale_key
from coldpress.artifacts.json_file import read_json
from coldpress.artifacts.tensors import TensorSet, TensorSource
from coldpress.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["EMBEDDING", "HEAD", "AdapterWeights"]

PREFIX = "base_model.model."
EMBEDDING = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
HEAD = ("lm_head.weight", "embed_out.weight", "output.weight")
"""How the names of the two matrices end that a model may tie."""
_OTHER_MODEL = "it was trained on another model"

# End of a tensor's name -> what it is. The module's name stands before it.
_KINDS: Mapping[str, str] = {
    ".lora_A.weight": "first",
    ".lora_B.weight": "second",
    ".lora_embedding_A": "first",
    ".lora_embedding_B": "second",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "tokens",
    **{
        f".{name}": name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2",
                     "lokr_w2_a", "lokr_w2_b")
    },
}  # fmt: skip


_OF_TYPE: Mapping[str, tuple[str, ...]] = {
    "LORA": ("first", "second", "magnitude", "bias", "tokens"),
    "LOHA": ("hada_", "tokens"),
    "LOKR": ("lokr_", "tokens"),
}
"""What of these PEFT's types have."""


class AdapterWeights:
    """A PEFT folder: what is added to weights, by their names, and weights, biases and token rows that replace the
    base's."""

    def __init__(self, folder: Path, record: Mapping[str, Any], tensors: TensorSet) -> None:
        self.folder = folder
        self._record = record
        self._tensors = tensors
        self.pairs: dict[str, LowRank] = {}
        """LoRA and DoRA, by the weight's name."""
        self.products: dict[str, Hadamard | Kronecker] = {}
        """LoHa and LoKr, by the weight's name."""
        self.replaced: dict[str, str] = {}
        """Weight name -> name in the adapter file, for modules that were trained whole."""
        self.tokens: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Embedding's name -> (name in the adapter file, the rows that it replaces)."""
        self.biases: dict[str, tuple[str, float]] = {}
        """Bias's name -> (name in the adapter file, scale of what is added)."""
        self._sort(self._found())
        self.changed = frozenset((*self.pairs, *self.products, *self.replaced, *self.tokens, *self.biases))
        """Names of the weights that the adapter touches."""
        if not self.changed:
            raise CheckpointError(
                f"{folder / 'adapter_model.safetensors'} holds no tensors: there is nothing to add to the base",
                hint="save the adapter again with save_pretrained",
            )

    @classmethod
    def open(cls, folder: Path) -> AdapterWeights:
        """Raises CheckpointError for a damaged adapter, PlanError for a kind that is not known here."""
        record = read_json(folder / "adapter_config.json")
        refuse_unknown_kinds(record)
        tensors = TensorSet.open(folder / "adapter_model.safetensors")
        try:
            return cls(folder, record, tensors)
        except BaseException:
            tensors.close()
            raise

    def __enter__(self) -> AdapterWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.close()

    def rows_of(self, name: str) -> int | None:
        """Rows of a weight that the adapter replaces; None where it does not."""
        own = self.replaced.get(name)
        return None if own is None else self._tensors.info(own).shape[0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows of one of the adapter's own tensors, float32."""
        import numpy as np

        return self._tensors.read(name, start, stop).astype(np.float32)

    @property
    def added(self) -> Mapping[str, Product]:
        """What is added to weights, by their names."""
        return {**self.pairs, **self.products}

    def check(self, base: TensorSource, *, tied: bool) -> None:
        """Every tensor must belong to a weight of the base, fit it and be finite; raises CheckpointError.

        `tied` is the model's tie_word_embeddings: embedding and head are one matrix and must stay so.
        """
        import numpy as np

        if tied:
            self._check_tied()
        self.check_fit({info.name: info.shape for info in base.infos()}, tied=tied)
        for info in self._tensors.infos():
            if not np.isfinite(self.read(info.name)).all():
                raise CheckpointError(
                    f"{self.folder}: {info.name} holds NaN or infinity", hint="its training diverged; train it again"
                )

    def check_fit(self, base: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
        """The part of `check` for which headers are enough: names and shapes of the base."""
        # A head in a tied adapter is the twin of its embedding.
        strangers = sorted(name for name in self.changed if name not in base and not (tied and name.endswith(HEAD)))
        bare = [name for name in strangers if name in self.biases and name.removesuffix("bias") + "weight" in base]
        if bare:
            raise CheckpointError(
                f"{self.folder} was trained with lora_bias, and {len(bare)} of its layers have no bias to add to, "
                f"the first: {bare[0].removesuffix('.bias')}",
                hint="train without lora_bias",
            )
        if strangers:
            raise CheckpointError(
                f"{self.folder} changes {len(strangers)} weights that the base model does not have: "
                + ", ".join(strangers[:8])
                + (" ..." if len(strangers) > 8 else ""),
                hint=_OTHER_MODEL,
            )
        for name, product in self.added.items():
            if name in base and base[name] != product.shape:
                raise CheckpointError(
                    f"{self.folder}: the adapter of {name} is for a weight of shape {list(product.shape)}, "
                    f"the base has {list(base[name])}",
                    hint=_OTHER_MODEL,
                )
        for name, own in (*self.replaced.items(), *((name, own) for name, (own, _) in self.biases.items())):
            if name in base and base[name] != self._tensors.info(own).shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self._tensors.info(own).shape)}, "
                    f"in the base model {list(base[name])}",
                    hint=_OTHER_MODEL,
                )
        for name, (own, rows) in self.tokens.items():
            if name not in base:  # the head, tied to its embedding
                continue
            size, width = base[name]
            if self._tensors.info(own).shape != (len(rows), width) or max(rows, default=0) >= size:
                raise CheckpointError(
                    f"{self.folder}: {len(rows)} tokens up to {max(rows, default=0)} with a tensor of shape "
                    f"{list(self._tensors.info(own).shape)} do not fit {name} of shape [{size}, {width}]",
                    hint=_OTHER_MODEL,
                )

    def _check_tied(self) -> None:
        import numpy as np

        touched = [name for name in self.changed if name.endswith((*EMBEDDING, *HEAD))]
        apart = [name for name in touched if name not in self.replaced and name not in self.tokens]
        whole = [self.read(self.replaced[name]) for name in touched if name in self.replaced]
        if whole and not (len(whole) == 2 and np.array_equal(whole[0], whole[1])):
            apart += [name for name in touched if name in self.replaced]
        apart += [name for name in self.tokens if name.endswith(HEAD)]
        if apart:
            raise CheckpointError(
                f"{self.folder} changes {', '.join(sorted(apart))}, and the base model uses one matrix as embedding "
                "and head: added to it, the adapter would change both, and it was trained on one",
                hint="load the base in Transformers, give lm_head its own copy of the weight, set tie_word_embeddings "
                "to false, save it, and give that folder as the base",
            )

    def _found(self) -> dict[str, dict[str, str]]:
        """Module -> kind -> name in the file; whole weights go to `replaced`."""
        found: dict[str, dict[str, str]] = {}
        for info in self._tensors.infos():
            if not info.name.startswith(PREFIX):
                raise CheckpointError(f"{self.folder}: {info.name!r} is not a tensor of a PEFT adapter")
            inner = info.name.removeprefix(PREFIX).replace(".base_layer.", ".")
            for end, kind in _KINDS.items():
                if inner.endswith(end):
                    found.setdefault(inner.removesuffix(end), {})[kind] = info.name
                    break
            else:
                if any(mark in inner for mark in ("lora_", "hada_", "lokr_", "token_adapter")):
                    raise CheckpointError(f"{self.folder}: {info.name!r} belongs to a kind of adapter not known here")
                self.replaced[inner] = info.name
        return found

    def _sort(self, found: Mapping[str, Mapping[str, str]]) -> None:
        dora, lonely = bool(self._record.get("use_dora")), []
        own = _OF_TYPE[str(self._record.get("peft_type"))]
        for module, names in found.items():
            foreign = [kind for kind in names if not kind.startswith(own)]
            if foreign:
                lonely.append(f"{module} has {names[foreign[0]]}, of another type than {self._record['peft_type']}")
                continue
            weight = f"{module}.weight"
            if any(kind.startswith(("hada_", "lokr_")) for kind in names):
                self.products[weight] = self._product(module, names)
                continue
            if "tokens" in names:
                self.tokens[weight] = (names["tokens"], self._token_rows(module))
                if len(names) > 1:
                    raise PlanError(f"{self.folder}: {module} has trained tokens and a LoRA, which is not built")
                continue
            wanted = ("first", "second", "magnitude") if dora else ("first", "second")
            missing = [kind for kind in wanted if kind not in names]
            if missing:
                words = {"first": "A", "second": "B", "magnitude": "magnitude vector"}
                lonely.append(f"{module} has no {' and no '.join(words[kind] for kind in missing)}")
                continue
            if "magnitude" in names and not dora:
                lonely.append(f"{module} has a magnitude vector, and adapter_config.json says nothing of DoRA")
            pair = self.pairs[weight] = self._pair(module, names)
            if "bias" in names:
                self.biases[f"{module}.bias"] = (names["bias"], pair.scale)
        if lonely:
            raise CheckpointError(
                f"{self.folder / 'adapter_model.safetensors'} and its config contradict each other: "
                + "; ".join(lonely[:8]),
                hint="save the adapter again with save_pretrained",
            )

    def _pair(self, module: str, names: Mapping[str, str]) -> LowRank:
        first, second = (self._tensors.info(names[kind]).shape for kind in ("first", "second"))
        rank, said = first[0] if first else 0, self._rank(module)
        if len(first) != 2 or len(second) != 2 or first[0] != second[1] or rank != said:
            raise CheckpointError(
                f"{self.folder}: A of {module} has shape {list(first)} and B {list(second)}; at rank {said:g}, as "
                f"adapter_config.json says, they must be [{said:g}, in] and [out, {said:g}]",
                hint="config and weights belong to different adapters",
            )
        embedding = names["first"].endswith("lora_embedding_A")
        transposed = embedding or bool(self._record.get("fan_in_fan_out"))
        magnitude = names.get("magnitude")
        if magnitude is not None:
            size = math.prod(self._tensors.info(magnitude).shape)
            if size != second[0]:
                raise CheckpointError(f"{self.folder}: {module} has {second[0]} outputs and {size} magnitudes")
        scale = self._number("lora_alpha", "alpha_pattern", module)
        scale /= math.sqrt(rank) if self._record.get("use_rslora") else rank
        shape = (first[1], second[0]) if transposed else (second[0], first[1])
        return LowRank(names["first"], names["second"], rank, shape, scale, transposed, magnitude)

    def _rank(self, module: str) -> float:
        said = self._number("r", "rank_pattern", module)
        if said < 1:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: the rank of {module} is {said:g}; least is 1"
            )
        return said

    def _product(self, module: str, names: Mapping[str, str]) -> Hadamard | Kronecker:
        """LoHa or LoKr of a module; raises CheckpointError for tensors that do not go together."""
        rank = self._rank(module)
        scale = self._number(scale_key(str(self._record.get("peft_type"))), "alpha_pattern", module) / rank
        shapes = {kind: self._tensors.info(name).shape for kind, name in names.items()}
        try:
            if "hada_w1_a" in names:
                first, second = (_joined(shapes, f"hada_w{number}", rank) for number in (1, 2))
                if first != second or len(names) != 4:
                    raise ValueError(f"{list(first)} and {list(second)}")
                w1_a, w1_b, w2_a, w2_b = (names[f"hada_w{end}"] for end in ("1_a", "1_b", "2_a", "2_b"))
                return Hadamard((w1_a, w1_b, w2_a, w2_b), first, scale)
            left, right = (_joined(shapes, f"lokr_w{number}", rank) for number in (1, 2))
            parts = [
                tuple(names[kind] for kind in sorted(names) if kind.startswith(f"lokr_w{number}")) for number in (1, 2)
            ]
            return Kronecker(parts[0], parts[1], left, right, scale)
        except (KeyError, ValueError) as error:
            held = ", ".join(f"{kind} {list(shape)}" for kind, shape in sorted(shapes.items()))
            raise CheckpointError(
                f"{self.folder}: the tensors of {module} do not make up an adapter of rank {rank:g}: {held}",
                hint="config and weights belong to different adapters, or the file is cut",
            ) from error

    def _number(self, key: str, patterns: str, module: str) -> float:
        """A number with PEFT's patterns: a key is a regular expression for the end of the module's name."""
        try:
            patterned = (self._record.get(patterns) or {}).items()
            said = [value for pattern, value in patterned if re.match(rf"(.*\.)?({pattern})$", module)]
            number = float(said[0] if said else self._record[key])
            if not math.isfinite(number):
                raise ValueError(f"{number} for {module}")
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError, re.error) as error:
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: {key} and {patterns} must be finite numbers by module: "
                f"{error!r}"
            ) from error
        return number

    def _token_rows(self, module: str) -> tuple[int, ...]:
        said = self._record.get("trainable_token_indices")
        if isinstance(said, Mapping):
            said = next((value for key, value in said.items() if f".{module}".endswith(f".{key}")), None)
        if not isinstance(said, list) or not all(type(one) is int and one >= 0 for one in said):
            raise CheckpointError(
                f"{self.folder / 'adapter_config.json'}: trainable_token_indices does not say which rows of {module} "
                f"the adapter holds, got {str(said)[:60]}"
            )
        return tuple(said)


def _joined(shapes: Mapping[str, tuple[int, ...]], name: str, rank: float) -> tuple[int, int]:
    """Shape of a matrix that is whole or the product of two; raises KeyError or ValueError where it is neither."""
    whole = shapes.get(name)
    if whole is None:
        (out, inner), (again, into) = shapes[f"{name}_a"], shapes[f"{name}_b"]
        if inner != again or inner != rank:
            raise ValueError(f"{name} is of rank {inner} and {again}")
        return out, into
    out, into = whole
    if f"{name}_a" in shapes or f"{name}_b" in shapes:
        raise ValueError(f"{name} is there whole and in parts")
    return out, into
