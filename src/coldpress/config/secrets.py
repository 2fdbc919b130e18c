"""Secrets and placeholders in a config: the first are refused and never shown, the second are listed."""

from __future__ import annotations

import re

from coldpress.config.tree import Node, problem_at
from coldpress.errors import Problem

__all__ = ["find_placeholders", "find_secrets", "looks_secret", "masked"]

_SECRET_KEY = re.compile(
    r"(^|_)(password|passwd|pwd|secret|credentials?|api_?key|account_?key|access_?key|private_?key|storage_?key|"
    r"sas|sas_?token|connection_?string|bearer|auth_?token|access_?token|hf_?token|hub_?token|api_?token|token)$",
    re.IGNORECASE,
)
_PLAIN_TOKENS = re.compile(r"(^|_)(pad|eos|bos|unk|sep|cls|mask|image|special|stop|start|end)_token$", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|"
    r"AKIA[0-9A-Z]{12,}|eyJ[A-Za-z0-9_-]{16,}\.[A-Za-z0-9_-]{8,})|AccountKey=|SharedAccessSignature|[?&]sig="
)
_SHORT = 8
"""No token has fewer characters."""

_PLACEHOLDER = re.compile(
    r"^\s*(your\b.+|<[A-Za-z][\w .-]*>|\{\{.+\}\}|\$\{.+\}|change[ _-]?me|to[ -]?do|x{3,}|\.{3})\s*$", re.I
)
_TEXT_KEYS = {"text_template", "joiner", "chat_template", "message_col"}


def looks_secret(key: str, value: str) -> bool:
    """Whether a text is one that should never be shown: by its key's name, or by how it begins."""
    if _SECRET_VALUE.search(value):
        return True
    if _PLAIN_TOKENS.search(key) or not _SECRET_KEY.search(key):
        return False
    short = len(value) < _SHORT and key.lower().endswith("token")
    return bool(value.strip()) and not short and not _PLACEHOLDER.match(value)


def masked(value: str) -> str:
    return f"a secret of {len(value)} characters"


def find_secrets(node: Node, key: str = "") -> list[Problem]:
    """Every secret in the tree. It is taken out, so that no later message can show it."""
    found: list[Problem] = []
    below = node.mapping if node.mapping is not None else {str(i): item for i, item in enumerate(node.items or [])}
    for name, item in list(below.items()):
        key_name = name if node.mapping is not None else key
        if isinstance(item.value, str) and looks_secret(key_name, item.value):
            message = (
                f"{masked(item.value)} stands in the file; secrets come from the environment (HF_TOKEN, Azure login)"
            )
            found.append(problem_at(item, message, hint="remove it, and renew it if the file was shared", at_key=True))
            if node.mapping is not None:
                del node.mapping[name]
                node.damaged = True
            else:
                item.value = "***"
            continue
        found.extend(find_secrets(item, key_name))
    return found


def find_placeholders(node: Node, key: str = "") -> list[Problem]:
    """Values that a template left for the user to fill in."""
    if isinstance(node.value, str):
        if key not in _TEXT_KEYS and _PLACEHOLDER.match(node.value):
            return [problem_at(node, f"still a placeholder: {node.value!r}")]
        return []
    if node.mapping is not None:
        return [found for name, item in node.mapping.items() for found in find_placeholders(item, name)]
    return [found for item in node.items or [] for found in find_placeholders(item, key)]
