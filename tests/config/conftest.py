"""Stand-ins for the passes' own config types, and short ways to load a text and to read its problems."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel, Field

from coldpress.config.candidates import Candidates
from coldpress.config.load import LoadedConfig, load_config
from coldpress.config.schema import Frozen
from coldpress.errors import ConfigError, Problem

SEED = Path(__file__).parent.parent / "workflows" / "seed"


class LoRAStandIn(Frozen):
    searchable: ClassVar[Mapping[str, Candidates]] = {
        "r": Candidates((16, 32, 64), by_default=True),
        "alpha": Candidates((16, 32)),
        "training_args.learning_rate": Candidates((1e-4, 2e-4)),
    }
    r: int = Field(default=64, ge=1)
    """Rank of the adapter."""
    alpha: float = 16.0
    lora_dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = None
    modules_to_save: tuple[str, ...] | None = None
    rank_pattern: Mapping[str, int] = Field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    torch_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    train_data_config: str
    eval_data_config: str | None = None
    eval_dataset_size: float | int | None = None
    training_args: Mapping[str, Any] = Field(default_factory=dict)


class QLoRAStandIn(LoRAStandIn):
    compute_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    double_quant: bool = False
    quant_type: Literal["nf4", "fp4"] = "nf4"
    save_quant_config: bool = True


class LoHaStandIn(Frozen):
    r: int = Field(default=64, ge=1)
    """Rank of the adapter."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    train_data_config: str
    training_args: Mapping[str, Any] = Field(default_factory=dict)


class MergeStandIn(Frozen):
    pass


class BuilderStandIn(Frozen):
    searchable: ClassVar[Mapping[str, Candidates]] = {
        "precision": Candidates(("int4", "int8")),
        "int4_block_size": Candidates(
            (32, 64, 128), by_default=True, only_with=("precision", ("int4", "int8")), unless=("extra_options",)
        ),
    }
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"]
    int4_block_size: Literal[16, 32, 64, 128, 256] | None = None
    int4_nodes_to_exclude: tuple[str, ...] | None = None
    exclude_embeds: bool = False
    extra_options: Mapping[str, Any] | None = None


PASSES: dict[str, type[BaseModel]] = {
    "LoRA": LoRAStandIn,
    "QLoRA": QLoRAStandIn,
    "LoHa": LoHaStandIn,
    "MergeAdapterWeights": MergeStandIn,
    "ModelBuilder": BuilderStandIn,
}

TODAY: dict[str, Any] = {
    "input_model": {"type": "HfModel", "model_path": "some/model"},
    "systems": {
        "box": {
            "type": "LocalSystem",
            "accelerators": [{"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}],
        }
    },
    "data_configs": [
        {
            "name": "train",
            "type": "HuggingfaceContainer",
            "load_dataset_config": {"data_name": "json", "data_files": "a.json", "split": "train"},
            "pre_process_data_config": {"text_template": "{phrase}\n{tone}", "max_seq_len": 64, "label_col": "tone"},
        }
    ],
    "evaluators": {
        "tones": {
            "metrics": [
                {
                    "name": "tone",
                    "type": "accuracy",
                    "sub_types": [{"name": "accuracy_score", "priority": 1}],
                    "data_config": "train",
                }
            ]
        }
    },
    "passes": {
        "ft": {"type": "LoRA", "r": 8, "train_data_config": "train", "training_args": {"max_steps": 5}},
        "merge": {"type": "MergeAdapterWeights"},
        "build": {"type": "ModelBuilder", "precision": "int4"},
    },
    "host": "box",
    "target": "box",
    "evaluator": "tones",
    "search_strategy": False,
    "output_dir": "out",
}

Loader = Callable[..., LoadedConfig]


@pytest.fixture
def passes() -> dict[str, type[BaseModel]]:
    return PASSES


@pytest.fixture
def seed_dir() -> Path:
    return SEED


@pytest.fixture(
    params=[
        "olive-config.local.json",
        "olive-config.local.qlora.json",
        "olive-config.local-data.azure-compute.json",
        "olive-config.azure-data.azure-model.json",
    ]
)
def seed_file(request: pytest.FixtureRequest) -> Path:
    return SEED / str(request.param)


@pytest.fixture
def local() -> dict[str, Any]:
    """The seed's local config as a mapping, to change."""
    loaded: dict[str, Any] = json.loads((SEED / "olive-config.local.json").read_text())
    return loaded


@pytest.fixture
def today() -> dict[str, Any]:
    """A small config in today's form, to change."""
    return copy.deepcopy(TODAY)


@pytest.fixture
def load() -> Loader:
    def run(source: Path | Mapping[str, Any], *overrides: str) -> LoadedConfig:
        return load_config(source, overrides, passes=PASSES)

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def put(text: str, name: str = "config.json") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return put


@pytest.fixture
def problems_of() -> Callable[..., tuple[Problem, ...]]:
    """The problems of a config that must be refused."""

    def run(source: Path | Mapping[str, Any], *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(ConfigError) as caught:
            load_config(source, overrides, passes=PASSES)
        return caught.value.problems

    return run
