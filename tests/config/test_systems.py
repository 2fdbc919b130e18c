"""Systems with several accelerators: as many processes of a training, so all alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coldpress.config.load import LoadedConfig
from coldpress.config.schema import LocalSystem
from coldpress.errors import Problem

Load = Callable[..., LoadedConfig]
Problems = Callable[..., tuple[Problem, ...]]

CPU: dict[str, Any] = {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
GPU: dict[str, Any] = {"device": "gpu", "execution_providers": ["CUDAExecutionProvider"]}


def system(config: LoadedConfig) -> LocalSystem:
    found = config.workflow.systems["box"]
    assert isinstance(found, LocalSystem)
    return found


def test_several_equal_accelerators_and_a_hosts_file(today: Any, load: Load) -> None:
    today["systems"]["box"] |= {"accelerators": [CPU, CPU, CPU], "hosts": "machines"}
    found = system(load(today))
    assert len(found.accelerators) == 3
    assert found.hosts == "machines"


def test_equal_is_what_they_mean(today: Any, local: Any, load: Load) -> None:
    """A GPU without a provider is one with CUDA's."""
    today["systems"]["box"]["accelerators"] = [{"device": "GPU"}, GPU]
    assert len(system(load(today)).accelerators) == 2
    local["systems"]["local_system"]["config"]["accelerators"] = ["cpu", "cpu"]
    config = load(local)
    assert [one.device for one in config.workflow.systems["local_system"].accelerators] == ["cpu", "cpu"]
    told = [rewrite.new for rewrite in config.rewrites if "accelerators" in rewrite.new]
    assert {f"systems.local_system.accelerators.{place}.device" for place in (0, 1)} <= set(told)


@pytest.mark.parametrize(
    ("accelerators", "says"),
    [
        ([CPU, GPU], "2 accelerators that differ (cpu with CPUExecutionProvider; gpu with CUDAExecutionProvider)"),
        ([{**CPU, "memory": "8GB"}, CPU], "give all the same memory"),
        ([], "must not be empty"),
    ],
)
def test_accelerators_that_cannot_be_processes_of_one_training(
    today: Any, problems_of: Problems, accelerators: list[Any], says: str
) -> None:
    today["systems"]["box"]["accelerators"] = accelerators
    (problem,) = problems_of(today)
    assert problem.path == "systems.box.accelerators"
    assert says in problem.message


def test_azure_has_one(today: Any, problems_of: Problems) -> None:
    today["systems"]["box"] = {"type": "AzureML", "aml_compute": "c", "accelerators": [CPU, CPU]}
    (problem,) = problems_of(today)
    assert "2 accelerators" in problem.message
