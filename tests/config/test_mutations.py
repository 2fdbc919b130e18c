"""Whatever a seed config is turned into, loading it gives a config or a ConfigError, and nothing else."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from coldpress.config.load import load_config
from coldpress.errors import ConfigError, Problem

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3.5, "", "x", "cpu", [], ["gpu", "cpu"], {}, {"type": "x"}, [[]], [{}], [None],
    "SEARCHABLE_VALUES", "DEFAULT_VALUE", {"config": None}, {"config": {"config": {}}}, "😀", {"params": 3}, 1e300,
    10**40, "{", "}{", "Your name", {"device": "gpu"}, {"name": "x"}, {"max_steps": "x"},
]  # fmt: skip
SEARCHED: list[Any] = [
    [8, 16], ["LoRA"], ["int4", "fp32"], [1e-4, 1e-3], [[1], [2]], True, {"sampler": "random"}, "SEARCHABLE_VALUES",
    [{"type": "LoRA"}, {"type": "ModelBuilder", "precision": "int4"}], {"search_algorithm": "tpe"},
    {"olive_parameter_type": "SearchParameter", "type": "Boolean"},
]  # fmt: skip
KEYS = [
    "config", "params", "type", "name", "engine", "extra", "hf_config", "components", "params_config", "pass_flows",
    "data_root", "azureml_client", "cache_config", "host", "training_args", "user_config", "metrics", "parity",
    "evaluators", "search_strategy", "model_path", "adapter_path", "load_kwargs", "extra_args", "dataloader_config",
    "component_kwargs", "optim", "warmup_ratio", "execution_providers", "accelerators", "evaluator", "data_configs",
    "double_quant", "label_cols", "input_cols", "text_cols", "dispatch_batches", "evaluation_strategy", "adafactor",
]  # fmt: skip


def problems(source: Any, overrides: list[str], passes: Mapping[str, type[BaseModel]]) -> tuple[Problem, ...]:
    """Nothing when the config loads."""
    try:
        load_config(source, overrides, passes=passes)
    except ConfigError as error:
        return error.problems
    return ()


def spots(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    yield path
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in members:
        yield from spots(item, (*path, key))


def mutated(document: Any, rng: random.Random, values: list[Any] = VALUES) -> Any:
    document = copy.deepcopy(document)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        places = [path for path in spots(document) if path]
        if not places:
            return document
        path = rng.choice(places)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        last: Any = path[-1]
        action = rng.choice(["set", "delete", "misspell", "add", "wrap"])
        if action == "set":
            parent[last] = copy.deepcopy(rng.choice(values))
        elif action == "delete":
            del parent[last]
        elif action == "wrap":
            parent[last] = rng.choice([[parent[last]], {"config": parent[last]}, {"a": parent[last]}])
        elif action == "misspell" and isinstance(parent, dict):
            at = rng.randrange(len(last)) if last else 0
            parent[last[:at] + last[at + 1 :]] = parent.pop(last)
        elif isinstance(parent, dict):
            parent[rng.choice(KEYS)] = copy.deepcopy(rng.choice(values))
    return document


@pytest.mark.parametrize("seed", range(4))
def test_random_changes_of_the_tree(seed_file: Path, passes: Mapping[str, type[BaseModel]], seed: int) -> None:
    rng = random.Random(seed)
    document = json.loads(seed_file.read_text())
    refused = 0
    for _ in range(150):
        found = problems(mutated(document, rng), [], passes)
        refused += bool(found)
        assert all(problem.message for problem in found)
    assert refused > 50


@pytest.mark.parametrize("seed", range(2))
def test_random_changes_of_a_search(today: Any, passes: Mapping[str, type[BaseModel]], seed: int) -> None:
    """What loads can be written, and so can each of its points."""
    today["search_strategy"] = {"sampler": "random", "include_pass_params": True}
    lora = {"type": "LoRA", "train_data_config": "train", "training_args": {"learning_rate": [1e-4, 1e-3]}}
    today["passes"]["ft"] = [lora, {**lora, "type": "QLoRA", "config": {"alpha": [8, 16]}, "disable_search": True}]
    today["passes"]["build"]["precision"] = ["fp32", "int4"]
    rng = random.Random(seed)
    refused = 0
    for _ in range(300):
        document = mutated(today, rng, VALUES + 2 * SEARCHED)
        found = problems(document, [], passes)
        assert all(problem.message for problem in found)
        refused += bool(found)
        if found:
            continue
        config = load_config(document, passes=passes)
        again = load_config(json.loads(json.dumps(config.document)), passes=passes)
        assert (again.workflow, again.space) == (config.workflow, config.space)
        for point in itertools.islice(config.space.points(), 3) if config.space is not None else ():
            try:
                at = config.at(point)
            except ConfigError:
                continue
            assert load_config(json.loads(json.dumps(at.document)), passes=passes).workflow == at.workflow
    assert 100 < refused < 280


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
def test_random_changes_of_the_text(
    seed_dir: Path, passes: Mapping[str, type[BaseModel]], tmp_path: Path, name: str
) -> None:
    rng = random.Random(7)
    text = (seed_dir / "olive-config.local.json").read_text()
    path = tmp_path / name
    for _ in range(150 if name.endswith("json") else 40):
        at = rng.randrange(len(text))
        cut = rng.choice([0, 1, 1, 5, 50])
        new = rng.choice(
            ["", "{", "}", '"', ",", ":", "\\", "\t", "\n", "&a", "*a", "!!x ", "- ", "é", "[", "#", "\x01"]
        )
        path.write_text(text[:at] + new + text[at + cut :], encoding="utf-8")
        assert all(problem.file == str(path) for problem in problems(path, [], passes))


def test_random_overrides(seed_dir: Path, passes: Mapping[str, type[BaseModel]]) -> None:
    rng = random.Random(11)
    path = seed_dir / "olive-config.local.json"
    places = [".".join(map(str, place)) for place in spots(json.loads(path.read_text())) if place]
    for _ in range(300):
        place = rng.choice(places) + rng.choice(["", "", ".x", ".0", ".config", ".."])
        value = json.dumps(rng.choice(VALUES))
        problems(path, [f"{place}={value}"], passes)
