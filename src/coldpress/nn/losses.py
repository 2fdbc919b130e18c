"""How a model is asked for the loss of a micro-batch: packed where that is proved to be the same, else padded.

Inside `loss_of`, the causal model's `forward` takes a packed row and yields the sum of its cross entropies, so that
whatever wraps the model (PEFT, DDP, FSDP) is called as ever. Before it is used, the packed form is held against the
model's own forward pass on single records of the training data: a family that looks across records (a state that is
carried along, a position bias of its own) does not agree, and is trained on padded batches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from coldpress.data.packing import IGNORED, TokenSequence
from coldpress.nn.batches import ALIKE, ROUNDING, Form, MicroBatch, cut_step
from coldpress.nn.cross_entropy import Head, head_loss
from coldpress.nn.fused import Fused, fused_layers
from coldpress.nn.fused_block import fused_blocks
from coldpress.nn.packed_attention import packed_attention

__all__ = ["Loss", "loss_of"]

PROBE_TOKENS = 24
"""Of each record that the two forms are compared on."""
AGREES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Relative difference of the two losses; 16-bit types round in different places."""


@dataclass
class Loss:
    """The loss of a micro-batch, as a sum over what carries loss."""

    form: Form
    fused: Fused = field(default_factory=Fused)
    """Layers that were replaced by faster ones."""
    apart: int | None = None
    """Records longer than this share no micro-batch with shorter ones: longrope's factors change at this length, for
    all that is computed at once."""
    sharing: bool = False
    """Whether tokens that all records of a packed row begin with may stand in it once."""
    _prepare: Callable[[MicroBatch], None] = lambda micro: None

    def own_types(self, model: torch.nn.Module) -> bool:
        """Whether every product has the type of the frozen weights by itself, so that autocast has nothing to do."""
        trained = {id(one) for one in model.parameters() if one.requires_grad}
        frozen = {one.dtype for one in model.parameters() if not one.requires_grad and one.is_floating_point()}
        return trained <= self.fused.trained and len(frozen) == 1

    def __call__(self, model: Any, micro: MicroBatch) -> torch.Tensor:
        """Float32 scalar. `model` may be wrapped."""
        self._prepare(micro)
        if self.form == "packed":
            return model(**micro.inputs)
        if self.form == "classes":
            return model(**micro.inputs).loss.float() * micro.count
        inputs = {name: tensor for name, tensor in micro.inputs.items() if name != "labels"}
        return _shifted_loss(model(**inputs).logits, micro.inputs["labels"])


def _shifted_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return torch.nn.functional.cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum")


@contextmanager
def loss_of(
    model: Any,
    sequences: Sequence[TokenSequence],
    *,
    autocast: torch.dtype | None,
    plain: bool = False,
    whole_layers: bool = True,
) -> Iterator[Loss]:
    """`model` is Transformers' or PEFT's on it; `autocast`: the type of products, if not its own.

    `plain` leaves its layers as they are, for torch.compile. Without `whole_layers` only their parts are replaced.
    """
    if plain:  # torch.compile fuses by itself, and cannot look into what is put in place here
        yield Loss("padded" if sequences[0].target is None else "classes")
        return
    if sequences[0].target is not None:
        with fused_layers(model) as fused:
            yield Loss("classes", fused)
        return
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    sample = _short(sequences)
    expected = _own_losses(model, sample, autocast)
    with ExitStack() as stack:
        fused = stack.enter_context(fused_layers(model))
        packed = None
        for blocks in (True, False) if whole_layers else (False,):
            if packed is None and expected is not None:
                packed = _try_packed(model, causal, sample, expected, autocast, stack, fused if blocks else None)
        apart = _rope_switch(causal.config)
        if packed is None:
            yield Loss("padded", fused, apart)
            return
        prepare, sharing = packed
        yield Loss("packed", fused, apart, sharing, prepare)


def _short(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Three records for the comparison, each with a loss on every token. They begin alike."""
    found: list[TokenSequence] = []
    for sequence in sequences[:3]:
        lengths = getattr(sequence, "lengths", None) or (len(sequence.ids),)
        ids = sequence.ids[: min(lengths[0], PROBE_TOKENS)]
        if len(ids) > 1:
            alike = [] if not found else found[0].ids[: min(ALIKE, len(ids) - 1)]
            found.append(TokenSequence(made := [*alike, *ids[len(alike) :]], list(made)))
    return found


def _last_only(sequence: TokenSequence) -> TokenSequence:
    """With a loss on its last token alone."""
    return TokenSequence(sequence.ids, [IGNORED] * (len(sequence.ids) - 1) + sequence.ids[-1:])


def _own_losses(model: Any, sample: Sequence[TokenSequence], autocast: torch.dtype | None) -> list[float] | None:
    """Each record's loss by the model's own forward pass."""
    found = []
    device = next(model.parameters()).device
    with _evaluating(model), _autocast(device, autocast):
        for one in sample:
            ids = torch.tensor([one.ids], device=device)
            found.append(float(_shifted_loss(model(input_ids=ids, use_cache=False).logits, ids)))
    return found or None


def _try_packed(
    model: Any,
    causal: Any,
    sample: Sequence[TokenSequence],
    expected: Sequence[float],
    autocast: torch.dtype | None,
    stack: ExitStack,
    fused: Fused | None,
) -> tuple[Callable[[MicroBatch], None], bool] | None:
    """Put the packed form in place; None, and all as before, where the model does not agree with itself in it.

    Yields what a micro-batch is made ready by, and whether what records begin with may stand in a row once.
    `fused`: whole layers are fused where they can be, and counted here.
    """
    head = _head_of(causal)
    decoder = getattr(causal, getattr(causal, "base_model_prefix", ""), None)
    if head is None or decoder is None or decoder is causal or getattr(causal.config, "output_router_logits", False):
        return None
    device = next(model.parameters()).device
    dtype = autocast or next(causal.parameters()).dtype
    with ExitStack() as trial:
        try:
            function = trial.enter_context(packed_attention(causal))
        except ValueError:
            return None
        trial.enter_context(_replaced_forward(causal, decoder, head))

        def prepare(micro: MicroBatch) -> None:
            function.segments = micro.segments
            function.rows = _rounded(micro.inputs) if device.type == "cpu" else None  # whole layers are the CPU's

        def run(micro: MicroBatch) -> float:
            with _evaluating(model), _autocast(device, autocast):
                return float(model(**micro.inputs))

        def agree(one: float, other: float) -> bool:
            return abs(one - other) <= AGREES.get(dtype, 2e-2) * abs(other)

        cut = functools.partial(cut_step, form="packed", tokens=1 << 20)
        last = list(enumerate(_last_only(one) for one in sample))
        batch, answers, alike = (
            step.micro[0].to(device) for step in (cut(list(enumerate(sample))), cut(last), cut(last, sharing=True))
        )
        prepare(batch)
        try:
            layers = 0 if fused is None else trial.enter_context(fused_blocks(decoder, function, lambda: run(batch)))
            pairs = [(run(batch), sum(expected))]
            prepare(answers)
            some = run(answers)
            if layers:  # with all rows in the last layer, instead of those that carry loss
                function.rows = None
                pairs.append((some, run(answers)))
            # torch's kernel for a GPU takes each record as it lies
            sharing = device.type == "cpu" and alike.segments is not None and alike.segments.shared > 0
            if sharing:
                prepare(alike)
                sharing = agree(run(alike), some)
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError):
            return None
        if not all(agree(*pair) for pair in pairs):
            return None
        if fused is not None and layers:
            fused.counts["decoder layer"] = layers
        stack.enter_context(trial.pop_all())
        return prepare, sharing


@contextmanager
def _replaced_forward(causal: Any, decoder: Any, head: Head) -> Iterator[None]:
    def forward(
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        loss_rows: torch.Tensor,
        loss_targets: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        out = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = out.last_hidden_state[0]
        whole = len(hidden) == input_ids.shape[1]  # else the last layer has left out others: see `_rounded`
        hidden = _Rows.apply(hidden, loss_rows) if whole else hidden[: len(loss_rows)]
        return head.module(hidden, loss_targets)

    # The head makes the loss in its own forward pass: FSDP gathers a module's weights for as long as that lasts.
    module, before = head.module, head.module.__dict__.get("forward")
    product = module.forward
    head = replace(head, product=product)

    def head_forward(hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        return product(hidden) if targets is None else head_loss(head, hidden, targets)

    causal.forward, module.forward = forward, head_forward
    try:
        yield
    finally:
        del causal.forward, module.forward
        if before is not None:
            module.forward = before


def _rounded(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The rows with loss and some others behind them, `ROUNDING` at a time; None where that is nearly all of them."""
    tokens, rows = inputs["input_ids"].shape[1], inputs["loss_rows"]
    missing = -len(rows) % ROUNDING
    if 2 * (len(rows) + missing) > tokens:
        return None
    others = torch.ones(tokens, dtype=torch.bool, device=rows.device).index_fill_(0, rows, False)
    return torch.cat((rows, others.nonzero()[:missing, 0]))


class _Rows(torch.autograd.Function):  # type: ignore[misc]
    """Some rows of a matrix, each at most once."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.shape).index_copy_(0, rows, upstream), None


def _head_of(causal: Any) -> Head | None:
    """What turns hidden states into logits, with what the family does to them afterwards; the comparison holds it."""
    module = causal.get_output_embeddings()
    if module is None:
        return None
    config = causal.config
    divided = getattr(config, "logits_scaling", None)
    scale = getattr(config, "logit_scale", None) or (1.0 / divided if divided else 1.0)
    return Head(module, getattr(config, "final_logit_softcapping", None), float(scale))


def _rope_switch(config: Any) -> int | None:
    """Length at which a longrope model changes its factors."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind != "longrope":
        return None
    own = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(own) if own else None


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Any:
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
