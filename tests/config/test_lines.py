"""Lines of problems and of today's paths, exact to the line, in JSON and in YAML."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coldpress.config.load import LoadedConfig
from coldpress.errors import Problem

Problems = Callable[..., tuple[Problem, ...]]
Load = Callable[..., LoadedConfig]
Write = Callable[..., Path]

YAML = """\
# a workflow with anchors
defaults: &cpu
  accelerators:
    - device: cpu
      execution_providers: [CPUExecutionProvider]
"""

WORKFLOW = """\
input_model: {type: HfModel, model_path: größe/modell}
systems:
  box:
    type: LocalSystem
    accelerators: &cpu
      - device: cpu
        execution_providers: [CPUExecutionProvider]
  other:
    type: LocalSystem
    accelerators: *cpu
data_configs:
  - name: train
    load_dataset_config:
      data_name: json
      data_files: "überraschung 😀.json"
    pre_process_data_config: &block
      text_template: "{phrase}"
      max_seq_len: 64
  - name: test
    load_dataset_config: {data_name: json}
    pre_process_data_config:
      <<: *block
      max_seq_len: 32
passes:
  ft:
    type: LoRA
    train_data_config: train
    training_args:
      learning_rate: 1e-4
host: box
"""


def test_lines_of_todays_paths_in_an_old_file(seed_dir: Path, load: Load) -> None:
    path = seed_dir / "olive-config.local.json"
    source = path.read_text().splitlines()
    config = load(path)
    for today, old in {
        "input_model.model_path": "model_name",
        "input_model.load_kwargs.trust_remote_code": "trust_remote_code",
        "data_configs.0.pre_process_data_config.strategy": "corpus_strategy",
        "data_configs.dataset_default_train.pre_process_data_config.max_seq_len": "source_max_len",
        "passes.lora.r": "lora_r",
        "passes.lora.training_args.eval_strategy": "evaluation_strategy",
        "passes.lora.training_args.train_sampling_strategy": "group_by_length",
        "systems.local_system.accelerators.0.execution_providers": "execution_providers",
        "host": "host",
        "output_dir": "output_dir",
        "passes.lora.training_args": "training_args",
    }.items():
        line = config.line_of(today)
        assert line is not None, today
        assert f'"{old}"' in source[line - 1], today


def test_line_of_what_is_not_there_is_the_line_above(seed_dir: Path, load: Load) -> None:
    config = load(seed_dir / "olive-config.local.json")
    assert config.line_of("passes.builder.exclude_embeds") == config.line_of("passes.builder")
    assert config.line_of("nothing.at.all") is None


def test_yaml_with_anchors_and_unicode(write: Write, load: Load) -> None:
    config = load(write(WORKFLOW, "w.yaml"))
    workflow = config.workflow
    assert workflow.input_model.model_path == "größe/modell"
    assert workflow.data_configs[0].load_dataset_config.data_files == "überraschung 😀.json"
    assert workflow.systems["other"].accelerators == workflow.systems["box"].accelerators
    assert workflow.data_configs[1].pre_process_data_config.max_seq_len == 32
    assert workflow.data_configs[1].pre_process_data_config.text_template == "{phrase}"
    assert config.line_of("data_configs.test.pre_process_data_config.text_template") == 17
    assert config.line_of("data_configs.test.pre_process_data_config.max_seq_len") == 23
    assert config.line_of("host") == 30


def test_a_problem_behind_an_alias_is_told_once_at_the_anchor(write: Write, problems_of: Problems) -> None:
    problems = problems_of(write(WORKFLOW.replace("device: cpu", "devise: cpu"), "w.yaml"))
    assert [(problem.line, problem.hint) for problem in problems] == [(6, "did you mean device?")]


def test_lines_and_columns_of_yaml_problems(write: Write, problems_of: Problems) -> None:
    text = WORKFLOW.replace("learning_rate: 1e-4", "learning_rat: 1e-4").replace("max_seq_len: 32", "max_seq_len: many")
    problems = problems_of(write(text, "w.yaml"))
    assert [(problem.line, problem.column, problem.path) for problem in problems] == [
        (23, 20, "data_configs.1.pre_process_data_config.max_seq_len"),
        (29, 7, "passes.ft.training_args.learning_rat"),
    ]


def test_a_top_level_block_for_anchors_is_an_unknown_key(write: Write, problems_of: Problems) -> None:
    (problem,) = problems_of(write(YAML + WORKFLOW, "w.yaml"))
    assert (problem.line, problem.path) == (2, "defaults")


def test_value_and_key_on_different_lines(write: Write, problems_of: Problems) -> None:
    text = '{\n "input_model": {"type": "HfModel", "model_path": "a"},\n "clean_cache":\n\n  3,\n "hots"\n :\n "x"\n}'
    assert [(problem.line, problem.column) for problem in problems_of(write(text))] == [(5, 3), (6, 2)]
