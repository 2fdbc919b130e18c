"""`coldpress data` on a workflow and on a file, and the data options of `finetune`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from coldpress import api
from coldpress.api import load_config
from coldpress.artifacts.base import Artifact
from coldpress.cli.data import data
from coldpress.cli.verbs import finetune
from coldpress.engine.plan import make_plan
from coldpress.errors import ColdpressError, ConfigError
from fakes.tiny_models import make_checkpoint
from oracles.adapters import make_adapter

CHAT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "yo"},
    {"from": "human", "value": "so"},
    {"from": "gpt", "value": "no"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"conversations": CHAT, "id": number}) + "\n" for number in range(3)))
    return path


def shown(command: Any, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments], catch_exceptions=False)


def test_a_file(model: Path, chats: Path) -> None:
    done = shown(data, "--model", model, "--data", chats, "--strategy", "pack", "--samples", 1)
    lines = done.output.splitlines()
    assert lines[0] == f"data  {chats}"
    assert "  3 rows, columns conversations, id" in lines
    assert "  read as ShareGPT conversations (column conversations)" in lines
    assert "  3 records repeat" not in done.output
    assert "  2 records repeat the text of another one" in lines
    assert any("packed into 2 sequences of up to 128 tokens" in line for line in lines)
    assert "    -- record 1 of 2, 47 tokens --------------------------------------------" in lines
    assert "    user: hi<|end|>assistant: [[yo<|end|>]]user: so<|end|>assistant: [[no<|end|></s>]]" in lines
    assert "\x1b" not in done.output


def test_ids(model: Path, chats: Path) -> None:
    done = shown(data, "--model", model, "--data", chats, "--samples", 1, "--ids")
    rows = [line.split(maxsplit=3) for line in done.output.splitlines() if line.startswith("       ")]
    assert len(rows) == 47
    assert rows[-1] == ["46", "257", "loss", "'</s>'"]
    assert [row[3] for row in rows if row[2] == "loss"][:3] == ["'y'", "'o'", "'<|end|>'"]


def test_classes(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nab,1\nabc,0\n")
    done = shown(data, "--model", model, "--data", path, "--answer", "label", "--classes")
    assert "  classes: 0 (1), 1 (1)" in done.output.splitlines()
    assert "sample 1: 4 tokens; class 1" in done.output


def test_the_task_of_a_workflow_says_that_there_are_classes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\nab,1\nabc,0\n")
    path = tmp_path / "workflow.json"
    path.write_text(
        json.dumps(
            {
                "input_model": {"type": "HfModel", "model_path": str(model), "task": "text-classification"},
                "data_configs": [
                    {
                        "name": "train",
                        "load_dataset_config": {"data_name": "csv", "data_files": "rows.csv"},
                        "pre_process_data_config": {"text_field": "text", "label_col": "label"},
                    }
                ],
            }
        )
    )
    assert "  classes: 0 (1), 1 (1)" in shown(data, path).output.splitlines()


def test_a_workflow(model: Path, chats: Path, tmp_path: Path) -> None:
    block = {"strategy": "line-by-line", "max_seq_len": 128}
    workflow = {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "data_configs": [
            {
                "name": name,
                "type": "HuggingfaceContainer",
                "load_dataset_config": {"data_name": "json", "data_files": str(chats)},
                "pre_process_data_config": block,
            }
            for name in ("one", "two")
        ],
    }
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow))
    both = shown(data, path)
    assert [line.split()[0] for line in both.output.splitlines() if line.endswith(chats.name)] == ["one", "two"]
    named = shown(data, path, "--name", "two", "data_configs.1.pre_process_data_config.assistant_turns=last")
    assert named.output.startswith(f"two  {chats}")
    assert "assistant: yo<|end|>user: so<|end|>assistant: [[no" in named.output
    with pytest.raises(ColdpressError, match="no data config called 'tow'") as error:
        shown(data, path, "--name", "tow")
    assert error.value.hint == "did you mean two?"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--data", "x.jsonl"), "--data needs --model"),
        (("w.json", "--model", "m", "--data", "x.jsonl"), "stands in place of a config file"),
        (("w.json", "--template", "{a}"), "--template has a meaning only together with --data: the config file"),
        (
            ("--model", "m", "--data", "x.jsonl", "--chat", "--text-field", "a"),
            "--text-field, --chat exclude each other",
        ),
        (("--model", "m"), "--model has a meaning only together with --data\n  hint: give --data too"),
        ((), "no config file is given\n  hint: coldpress data olive-config.json"),
    ],
)
def test_wrong_use(arguments: tuple[str, ...], what: str) -> None:
    with pytest.raises(ColdpressError) as error:
        shown(data, *arguments)
    assert what in str(error.value)
    assert error.value.exit_code == 2


def saved(tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "workflow.json"
    path.unlink(missing_ok=True)
    shown(finetune, tmp_path / "model", "--data", tmp_path / "x.jsonl", *options, "--save-config", path)
    block: dict[str, Any] = json.loads(path.read_text())["data_configs"][0]["pre_process_data_config"]
    return block


@pytest.mark.parametrize(
    ("options", "block"),
    [
        ((), {}),
        (("--format", "alpaca", "--strategy", "pack"), {"format": "alpaca", "strategy": "pack"}),
        (
            ("--template", "{q}\\n{a|loss}", "--max-seq-len", "64"),
            {"text_template": "{q}\n{a|loss}", "max_seq_len": 64},
        ),
        (("--chat",), {"chat_template": True, "completion_only_loss": True}),
        (("--chat", "--loss", "all"), {"chat_template": True, "completion_only_loss": False}),
        (("--turns", "last", "--loss", "answers"), {"assistant_turns": "last", "completion_only_loss": True}),
        (
            ("--template", "{q}{a}", "--answer", "a"),
            {"text_template": "{q}{a}", "label_col": "a", "completion_only_loss": True},
        ),
        (("--text-field", "t", "--strategy", "join"), {"text_field": "t", "strategy": "join"}),
    ],
)
def test_finetune_writes_the_data_config(tmp_path: Path, options: tuple[str, ...], block: dict[str, Any]) -> None:
    defaults = {"strategy": "line-by-line", "pad_to_max_len": False}
    assert saved(tmp_path, *options) == {**defaults, **block}


@pytest.mark.parametrize(
    ("method", "kind", "own"),
    [
        ("lora", "LoRA", {"r": 64, "alpha": 64, "lora_dropout": 0.05}),
        ("qlora", "QLoRA", {"r": 64, "alpha": 64, "lora_dropout": 0.05}),
        ("dora", "DoRA", {"r": 64, "alpha": 64, "lora_dropout": 0.05}),
        ("loftq", "LoftQ", {"r": 64, "alpha": 64, "lora_dropout": 0.05}),
        ("loha", "LoHa", {"r": 64, "alpha": 64}),
        ("lokr", "LoKr", {"r": 64, "alpha": 64}),
        ("full", "FullFinetune", {}),
    ],
)
def test_each_method_is_a_pass_with_the_parameters_that_it_has(
    tmp_path: Path, method: str, kind: str, own: dict[str, Any]
) -> None:
    path = tmp_path / "workflow.json"
    shown(finetune, tmp_path / "model", "--data", tmp_path / "x.jsonl", "--method", method, "--save-config", path)
    passes = json.loads(path.read_text())["passes"]
    assert list(passes) == [method, *(["merge"] if method != "full" else [])]
    assert passes[method]["type"] == kind
    shown_own = {key: passes[method][key] for key in ("r", "alpha", "lora_dropout") if key in passes[method]}
    assert shown_own == own
    assert passes[method]["training_args"]["learning_rate"] == (2e-5 if method == "full" else 2e-4)


def trained_on(tmp_path: Path, *options: str, **adapter: Any) -> dict[str, Any]:
    """What `finetune` writes for a fine-tuning's output folder, and what its plan says of it."""
    base = make_checkpoint(tmp_path / "base", family="llama", dtype="float32")
    out = tmp_path / "out" / "model"
    make_adapter(base, out / "adapter", ["q_proj", "v_proj"], r=4, **adapter)
    Artifact(out, "checkpoint", base, adapter=out / "adapter").save()
    rows = tmp_path / "x.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}", "completion": f" {n}"}) + "\n" for n in range(20)))
    path = tmp_path / "workflow.json"
    shown(
        finetune, tmp_path / "out", "--data", rows, *options, "--cache-dir", tmp_path / "cache", "--save-config", path
    )
    made = make_plan(load_config(path))
    steps: dict[str, Any] = json.loads(path.read_text())["passes"]
    return {"steps": steps, "refused": " ".join(str(one) for one in made.refusals), "notes": made.steps[0].notes}


def test_an_adapter_is_trained_further_as_it_is(tmp_path: Path) -> None:
    made = trained_on(tmp_path)
    assert not made["refused"]
    assert "goes on with the LoRA adapter that the model has, of rank 4" in made["notes"]
    assert made["steps"]["lora"].keys() == {"type", "train_data_config", "training_args", "eval_dataset_size"}


def test_an_adapter_is_trained_further_by_its_own_method(tmp_path: Path) -> None:
    made = trained_on(tmp_path, use_dora=True)
    assert not made["refused"]
    assert list(made["steps"]) == ["dora", "merge"]


def test_what_is_typed_is_held_against_the_adapter(tmp_path: Path) -> None:
    made = trained_on(tmp_path, "--rank", "64", "--dropout", "0.2")
    assert made["steps"]["lora"]["r"] == 64
    assert made["steps"]["lora"]["lora_dropout"] == 0.2
    assert "alpha" not in made["steps"]["lora"]
    assert "r is 64, the adapter's is 4" in made["refused"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ((), ("--data: ", "say what the text is: --template or --text-field")),
        (("--text-field", "tonne"), ("--text-field: ", "which --text-field uses", "(correct the name)")),
        (("--template", "{phrase}{tone}", "--answer", "toe"), ("--answer: ", "which --answer uses")),
        (("--text-field", "phrase", "--loss", "answers"), ("--loss: --loss needs --answer", "in --template: {answer")),
        (("--template", "{tone|loss}", "--strategy", "join"), ("--template: ", "set --strategy to line-by-line")),
        (("--text-field", "phrase", "--eval-data", "other.csv"), ("--eval-data: ", "start in the working folder")),
    ],
)
def test_errors_name_the_options_that_were_given(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], what: tuple[str, ...]
) -> None:
    """There is no config file whose keys they could name."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text('{"phrase": "hello", "tone": "joy"}\n' * 4)
    with pytest.raises(ConfigError) as error:
        shown(finetune, model, "--data", "a.jsonl", *options)
    said = str(error.value)
    assert all(one in said for one in what), said
    assert not any(key in said for key in ("text_", "label_col", "config file", "strategy:")), said


def test_data_names_options_too(model: Path, chats: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    settings = json.loads((bare / "tokenizer_config.json").read_text())
    (bare / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    with pytest.raises(ColdpressError, match="no chat template") as error:
        shown(data, "--model", bare, "--data", chats)
    assert error.value.hint == "put the template into the model's folder, as chat_template.jinja"
    with pytest.raises(ColdpressError, match="'id' is not part of the text") as error:
        shown(data, "--model", model, "--data", chats, "--text-field", "conversations", "--answer", "id")
    assert error.value.hint == "put {id} into --template, at its end"


def test_steps_end_a_training_whatever_the_default_of_epochs(tmp_path: Path) -> None:
    def epochs(*options: str) -> float | None:
        path = tmp_path / "workflow.json"
        path.unlink(missing_ok=True)
        shown(finetune, tmp_path / "model", "--data", tmp_path / "x.jsonl", *options, "--save-config", path)
        found: float | None = json.loads(path.read_text())["passes"]["lora"]["training_args"].get("num_train_epochs")
        return found

    assert epochs() == 3.0
    assert epochs("--max-steps", "3") is None
    assert epochs("--max-steps", "3", "--epochs", "2") == 2.0


def test_columns_are_looked_at_before_anything_runs(model: Path, tmp_path: Path) -> None:
    """Every wrong one of the data configs that are used, with its place; those that nothing uses are left alone."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"phrase": "hello", "tone": "joy"}\n' * 4)

    def config(name: str, **block: Any) -> dict[str, Any]:
        load = {"data_name": "json", "data_files": str(rows)}
        return {"name": name, "load_dataset_config": load, "pre_process_data_config": block}

    workflow = {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "data_configs": [
            config("train", text_template="{phrse} {tone}", max_seq_len=64),
            config("test", text_template="{phrase} {tonne|loss}"),
            config("lines", text_field="phrse"),
            config("unused", text_field="x"),
        ],
        "passes": {"lora": {"type": "LoRA", "train_data_config": "train", "parity": {"data_config": "unused"}}},
        "evaluators": {
            "ev": {
                "metrics": [
                    {"name": "right", "type": "accuracy", "data_config": "test"},
                    {"name": "speed", "type": "latency", "data_config": "lines"},
                ]
            }
        },
        "evaluator": "ev",
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(workflow, indent=1))
    lines = path.read_text().splitlines()
    with pytest.raises(ConfigError) as error:
        api.plan(path)
    assert [(one.path, lines[(one.line or 0) - 1].strip().split(":")[0]) for one in error.value.problems] == [
        ("data_configs.train.pre_process_data_config.text_template", '"text_template"'),
        ("data_configs.test.pre_process_data_config.text_template", '"text_template"'),
        ("data_configs.lines.pre_process_data_config.text_field", '"text_field"'),
    ]


def test_finetune_says_so_before_it_trains(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"phrase": "hello", "tone": "joy"}\n')
    with pytest.raises(ConfigError, match="none is named text"):
        shown(finetune, model, "--data", rows, "-o", tmp_path / "out", "--cache-dir", tmp_path / "cache")
