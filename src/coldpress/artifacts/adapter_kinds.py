"""Kinds of PEFT adapters that `artifacts.adapter` cannot add to a base, refused by the name of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coldpress.errors import PlanError

__all__ = ["KINDS", "refuse_unknown_kinds", "unknown_kind"]

KINDS = ("LORA", "LOHA", "LOKR")
"""PEFT's types that can be."""

_REFUSED: Mapping[str, str] = {
    "use_qalora": "QA-LoRA",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA, which changes only part of a text",
    "arrow_config": "Arrow, which chooses among adapters for each token",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA, which changes the base as well",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on single parameters (target_parameters)",
    "megatron_config": "Megatron layers",
}
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def refuse_unknown_kinds(record: Mapping[str, Any]) -> None:
    """`record`: adapter_config.json. Raises PlanError."""
    reason = unknown_kind(record)
    if reason is not None:
        raise PlanError(reason, hint="merge it with PEFT")


def unknown_kind(record: Mapping[str, Any]) -> str | None:
    """What of an adapter is not known here; None where all is."""
    kind = str(record.get("peft_type"))
    if kind not in KINDS:
        return f"the adapter is of the type {kind}; what can be merged: {', '.join(KINDS)}"
    odd = [said for key, said in _REFUSED.items() if record.get(key)]
    start = str(record.get("init_lora_weights"))
    if start.startswith(_CHANGES_BASE):
        odd.append(f"the initialisation {start}, which changes the base as well")
    if record.get("use_dora") and record.get("lora_bias"):
        odd.append("DoRA with lora_bias, which PEFT does not have either")
    return f"the adapter uses {', '.join(odd)}, which cannot be merged yet" if odd else None
