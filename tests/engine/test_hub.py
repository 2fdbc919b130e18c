"""A model that is no folder here, and a hub that does not answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from coldpress.config.schema import InputModel
from coldpress.engine.places import Places
from coldpress.engine.run import _download
from coldpress.errors import PlanError


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    class ConnectError(HfHubHTTPError.__bases__[0]):  # type: ignore[misc,name-defined]
        """As the HTTP library's own: under its root, and no OSError."""

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(PlanError, match="'no/such' is no folder here, and the hub cannot be reached: ConnectError"):
        _download("no/such", None)


def test_a_name_that_no_hub_takes_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no folder 'a--b' here"):
        Places(tmp_path, tmp_path).model(InputModel(type="HfModel", model_path="a--b"))
