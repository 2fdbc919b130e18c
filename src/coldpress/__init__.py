"""Coldpress: fine-tune, merge, compress, export and prove a language model.

import coldpress
result = coldpress.run("olive-config.json")
print(result.output, result.scores)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coldpress.api import load_config, plan, run
    from coldpress.config.load import LoadedConfig
    from coldpress.engine.plan import Plan
    from coldpress.engine.result import RunResult, Score, StepResult

__version__ = "0.1.0"

__all__ = [
    "LoadedConfig",
    "Plan",
    "RunResult",
    "Score",
    "StepResult",
    "__version__",
    "load_config",
    "plan",
    "run",
]

_HOME = {
    "LoadedConfig": "coldpress.config.load",
    "Plan": "coldpress.engine.plan",
    "RunResult": "coldpress.engine.result",
    "Score": "coldpress.engine.result",
    "StepResult": "coldpress.engine.result",
    "load_config": "coldpress.api",
    "plan": "coldpress.api",
    "run": "coldpress.api",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for only then: `import coldpress` itself is instant."""
    if name not in _HOME:
        raise AttributeError(f"module 'coldpress' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
