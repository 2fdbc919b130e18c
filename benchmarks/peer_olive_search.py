"""`olive run --config FILE` for Olive 0.13, mended first where a search ends with an error.

Metrics other than accuracy do not get past the writing of its config, and each trial that shares a step with another
one fails.

    PYTHON_OF_OLIVE peer_olive_search.py CONFIG
"""

import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

REPAIRS = {
    "olive.evaluator.metric": {
        "return backend if isinstance(backend, str)": "return backend if not hasattr(backend, 'model_dump')",
        "return metric_config.model_dump()": "return metric_config and metric_config.model_dump()",
    },
    "olive.common.config_utils": {"value = value.lower()": "value = str(value).lower()"},
    "olive.engine.footprint": {
        "setattr(self, k, v)": "setattr(self, 'model_config_data' if k == 'model_config' else k, v)"
    },
}
"""Module -> what it says, and what it has to say: None is no model and no name, `model_config` is pydantic's own."""
as_installed = SourceFileLoader.get_code


def repaired(self, fullname):  # type: ignore[no-untyped-def]
    if fullname not in REPAIRS:
        return as_installed(self, fullname)
    source = Path(self.path).read_text(encoding="utf-8")
    for said, meant in REPAIRS[fullname].items():
        assert said in source, "another Olive than 0.13.0"
        source = source.replace(said, meant)
    return compile(source, self.path, "exec")


SourceFileLoader.get_code = repaired

from olive.workflows import run  # noqa: E402

run(sys.argv[1])
