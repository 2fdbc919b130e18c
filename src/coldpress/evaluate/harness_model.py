"""A runner as the Language Model Evaluation Harness knows models: its requests become tokens, the answers are ours.

Imported only where the harness is used. Tokens are made as by its own `hf` model: the tokenizer's special tokens around
a text unless it begins with BOS, contexts cut on the left, one token (BOS, else EOS) before what has no context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from coldpress.data.tokenizer import Tokenizer
from coldpress.errors import DataError, PlanError
from coldpress.evaluate.likelihood import score_continuations
from coldpress.evaluate.runners import batches_of

__all__ = ["HarnessModel"]

_DEFAULT_LENGTH = 2048
"""Of models that do not say how long their context is; the harness has the same."""
_NEW_TOKENS = 256
"""Of a task that does not say; the harness has the same."""


class HarnessModel(TemplateLM):  # type: ignore[misc] # lm_eval ships no types
    """What `lm_eval` calls a model. Always greedy; a task that samples is refused."""

    def __init__(
        self,
        runner: Any,
        words: Tokenizer,
        *,
        batch_size: int,
        max_length: int | None,
        name: str,
        on_done: Callable[[int, int, str], None],
    ) -> None:
        super().__init__()
        self._runner, self._words = runner, words
        self._batch = batch_size
        self.max_length = min(one for one in (max_length, runner.context_length, 1 << 30) if one is not None)
        if max_length is None and runner.context_length is None:
            self.max_length = _DEFAULT_LENGTH
        self._name, self._on_done = name, on_done

    @property
    def eot_token_id(self) -> int:
        found = self._words.eos_id if self._words.eos_id is not None else self._words.bos_id
        if found is None:
            raise PlanError(
                "the tokenizer has neither BOS nor EOS, so a text without context cannot be scored",
                hint="name eos_token in tokenizer_config.json",
            )
        return found

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._words.bos_id is None else self._words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        bos = self._words.token(self.prefix_token_id)
        special = not string.startswith(bos) if add_special_tokens is None else add_special_tokens
        return list(self._words.backend.encode(string, add_special_tokens=special).ids)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._words.chat(chat_history, generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self._words.chat_template

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _text, context, tokens in requests:
            if len(tokens) > self.max_length:
                raise DataError(
                    f"an answer of {len(tokens)} tokens is longer than the model's context of {self.max_length}",
                    hint="the task does not fit this model",
                )
            pairs.append((context[-(self.max_length + 1 - len(tokens)) :], tokens))
        # The model sees all but the last token, so a pair may be one token longer than its context.
        return score_continuations(
            pairs, self._runner, batch_size=self._batch, on_done=lambda done: self._on_done(done, len(pairs), "answers")
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows, of_request = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for context, tokens in map(
                make_disjoint_window,
                get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1),
            ):
                windows.append((None, context, tokens))
                of_request.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(of_request, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        made = [""] * len(requests)
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        end = self._words.token(self.eot_token_id)
        for place, request in enumerate(requests):
            options = dict(normalize_gen_kwargs(dict(request.args[1]), _NEW_TOKENS))
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise PlanError(
                    "the task samples its answers (do_sample: true), and runners take the most likely token",
                    hint="set do_sample: false in generation_kwargs of the task",
                )
            until = tuple(handle_stop_sequences(options.get("until"), eos=end))
            groups.setdefault((until, int(options["max_gen_toks"])), []).append(place)
        done = 0
        for (until, new), places in groups.items():
            room = self.max_length - new
            if room < 1:
                raise PlanError(
                    f"the task wants {new} new tokens, and the model's context is {self.max_length}",
                    hint="set max_gen_toks in generation_kwargs of the task",
                )
            prompts = [self.tok_encode(requests[place].args[0])[-room:] or [self.prefix_token_id] for place in places]
            for batch in batches_of([len(one) for one in prompts], self._batch):
                found = self._runner.generate(
                    [prompts[one] for one in batch],
                    max_new_tokens=new,
                    stop_tokens=self._words.stop_ids,
                    stop=lambda tokens, until=until: any(term in self._text(tokens) for term in until if term),
                )
                for one, tokens in zip(batch, found, strict=True):
                    made[places[one]] = postprocess_generated_text(self._text(tokens), list(until), None)
                done += len(batch)
                self._on_done(done, len(requests), "answers")
        return made

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._words.backend.decode(list(tokens), skip_special_tokens=True))
