"""A model folder's tokenizer without Transformers: `tokenizers` on `tokenizer.json`, plus BOS, EOS and chat template.

Importing it costs 20 ms, it yields the same ids as Transformers' fast tokenizers, and it is what ONNX Runtime GenAI
reads as well. A folder without `tokenizer.json` is converted by Transformers at load.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from coldpress.artifacts.base import read_json
from coldpress.data.chat_template import render_template
from coldpress.errors import CheckpointError, DataError, MissingExtraError

__all__ = ["TOKENIZER_FILES", "Tokenizer", "chat_template_of", "copy_tokenizer"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids."""

    backend: Any
    """A `tokenizers.Tokenizer`."""
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    """What fills short sequences; masked everywhere, so any id is right."""
    chat_template: str | None = None
    special_tokens: Mapping[str, str] | None = None
    """`bos_token`, `eos_token` ... as a chat template sees them."""
    generation_eos: frozenset[int] = frozenset()
    """Ids that generation stops at by generation_config.json, or by config.json where that has none."""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text: EOS, and what generation stops at."""
        return self.generation_eos if self.eos_id is None else self.generation_eos | {self.eos_id}

    @cached_property
    def begins_with_bos(self) -> bool:
        """Whether the tokenizer itself writes BOS before a text, as it does when the model is used."""
        return self.bos_id is not None and list(self.backend.encode("a").ids[:1]) == [self.bos_id]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """From a model folder; raises CheckpointError."""
        config, model, generation = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in ("tokenizer_config.json", "config.json", "generation_config.json")
        )
        backend = _backend(folder)
        tokens = _special_tokens(folder, config)

        def number(name: str) -> int | None:
            token = tokens.get(f"{name}_token")
            found = None if token is None else backend.token_to_id(token)
            if found is None:
                given = model.get(f"{name}_token_id")
                found = given[0] if isinstance(given, list) and given else given
            return int(found) if isinstance(found, int) else None

        stops = generation.get("eos_token_id", model.get("eos_token_id"))
        bos, eos, pad = number("bos"), number("eos"), number("pad")
        return cls(
            backend=backend,
            bos_id=bos,
            eos_id=eos,
            pad_id=next((value for value in (pad, eos, bos) if value is not None), 0),
            chat_template=_chat_template(folder, config),
            special_tokens=tokens,
            generation_eos=frozenset(
                token for token in (stops if isinstance(stops, list) else [stops]) if isinstance(token, int)
            ),
        )

    def encode(self, texts: Sequence[str]) -> list[Any]:
        """`tokenizers.Encoding` of each text (`ids`, places in characters), without BOS or EOS."""
        return list(self.backend.encode_batch(list(texts), add_special_tokens=False))

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS or EOS."""
        return [list(one.ids) for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def token(self, token_id: int) -> str:
        """One token as text."""
        return str(self.backend.id_to_token(token_id) or "")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """Messages rendered with the chat template (or with `template`); raises DataError."""
        return render_template(
            self.template(template),
            messages,
            generation_prompt=generation_prompt,
            tools=tools,
            special_tokens=self.special_tokens,
        )

    def template(self, given: str | None = None) -> str:
        """The chat template: `given`, else the tokenizer's own; raises DataError where there is none."""
        source = given or self.chat_template
        if source is None:
            raise DataError(
                "chat_template is asked for, and the tokenizer has none",
                hint="give the Jinja template itself as chat_template, or use text_template",
            )
        return source


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy every tokenizer file that `source` has; files that are there already stay."""
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
    if (source / "chat_templates").is_dir() and not (target / "chat_templates").exists():
        shutil.copytree(source / "chat_templates", target / "chat_templates")


def _backend(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("text needs the package tokenizers", hint="pip install 'coldpress[cpu]'") from error
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:
            if type(error) is not Exception:  # the Rust library raises a bare Exception for a damaged file
                raise
            raise CheckpointError(f"{path} is not a tokenizer: {error}", hint="download the model again") from error
        backend.no_padding()
        backend.no_truncation()
        return backend
    if not any((folder / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")):
        raise CheckpointError(f"{folder} has no tokenizer (tokenizer.json)", hint="is the download complete?")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if not hasattr(converted, "backend_tokenizer"):
        raise CheckpointError(f"the tokenizer in {folder} has no fast form", hint="save it as tokenizer.json first")
    return converted.backend_tokenizer


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    beside = folder / "special_tokens_map.json"
    merged = {**(read_json(beside) if beside.is_file() else {}), **config}
    found = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"):
        value = merged.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def chat_template_of(folder: Path) -> str | None:
    """The chat template beside a tokenizer, without loading that; raises CheckpointError."""
    path = folder / "tokenizer_config.json"
    return _chat_template(folder, read_json(path) if path.is_file() else {})


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        template = named.get("default")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else None
