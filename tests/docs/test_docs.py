"""What the documents say is what the code does."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import textwrap
import typing
from collections import Counter
from pathlib import Path

import pytest

from coldpress import events
from coldpress.cli.display import PlainLines
from coldpress.cli.evaluate import _show
from coldpress.config.json_schema import workflow_json_schema
from coldpress.registry import PASSES
from coldpress.scores import Score

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("maker", "made"), [("make_passes.py", "passes.md"), ("make_record.py", "run-record.md")])
def test_what_is_made_from_the_code_is_current(maker: str, made: str) -> None:
    spec = importlib.util.spec_from_file_location(maker.removesuffix(".py"), ROOT / "docs" / maker)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / made).read_text(encoding="utf-8") == module.page(), f"run python docs/{maker}"


PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/config.md",
    "docs/search.md",
    "docs/proof.md",
    "docs/adapters.md",
    "docs/methods.md",
    "docs/processes.md",
    "docs/families.md",
    "docs/profiles.md",
    "docs/events.md",
    "docs/run-record.md",
    "docs/report.md",
    "docs/evaluation.md",
    "docs/watching.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", ["docs/config.md", "docs/search.md"])
def test_workflows_of_the_docs_are_what_the_schema_says(page: str) -> None:
    """An editor that has the schema marks nothing in them; what they leave out aside."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = workflow_json_schema({name: PASSES[name].Config for name in PASSES})
    validator = jsonschema.Draft202012Validator({key: value for key, value in schema.items() if key != "required"})
    text = (ROOT / page).read_text(encoding="utf-8")
    workflows = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    assert workflows
    for workflow in workflows:
        assert [error.message for error in validator.iter_errors(workflow)] == []


def test_every_key_of_a_workflow_stands_once_in_its_table() -> None:
    table = (ROOT / "docs" / "config.md").read_text(encoding="utf-8").partition("## Data")[0]
    keys = [key for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall(r"`(\w+)`", row)]
    assert len(keys) == len(set(keys)) > 10


def test_the_example_shows_scores_as_the_terminal_does(capsys: pytest.CaptureFixture[str]) -> None:
    PlainLines(5)(events.ScoreMeasured("input", "accuracy", 0.25, 0.0306, 200, unit="share"))
    page = (ROOT / "examples" / "phrase-classification" / "README.md").read_text(encoding="utf-8")
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() in page


def test_the_table_of_a_measurement_is_printed_so(capsys: pytest.CaptureFixture[str]) -> None:
    _show(
        [
            Score("model", "accuracy", "accuracy_score", 0.25, "share", True, 200, 0.0306),
            Score("output", "accuracy", "accuracy_score", 0.915, "share", True, 200, 0.0197),
            Score("output", "divergence", "kl", 5.1822, "nats/token", False, 4113, 0.0794),
            Score("model", "size", "bytes", 14691155, "bytes", False, 6, 0.0),
            Score("output", "size", "bytes", 5503000, "bytes", False, 8, 0.0),
        ],
        ["model", "output"],
    )
    printed = textwrap.indent(capsys.readouterr().out, "    ")
    assert printed in (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_types_of_parameters_are_readable() -> None:
    text = (ROOT / "docs" / "passes.md").read_text(encoding="utf-8")
    assert "| `batch` | int \\| Literal['auto'] |" in text
    assert re.findall(r"Annotated|FieldInfo|Union\[", text) == []


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_no_heading_stands_twice(page: str) -> None:
    found = re.findall(r"^#+ .+$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert [one for one, count in Counter(found).items() if count > 1] == []


def test_every_family_is_in_the_docs() -> None:
    from coldpress.artifacts.families import FAMILIES

    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert [name for name in FAMILIES if f"`{name}`" not in text] == []


def test_every_number_of_every_metric_is_in_the_docs() -> None:
    from coldpress.config.metrics import METRIC_TYPES, OWN_ACCURACY, TORCH_METRICS, Goal

    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {name: row for row in re.findall(r"^\| `.+\|$", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    for kind, model in METRIC_TYPES.items():
        sub_type = typing.get_args(model.model_fields["sub_types"].annotation)[0].model_fields["name"].annotation
        names = typing.get_args(sub_type) if typing.get_origin(sub_type) is typing.Literal else ()
        if kind == "accuracy":
            names = (*OWN_ACCURACY, *TORCH_METRICS)
        assert [name for name in (kind, *names) if f"`{name}`" not in rows.get(kind, "")] == [], kind
    goals = typing.get_args(Goal.model_fields["type"].annotation)
    assert [name for name in goals if f"`{name}`" not in text] == []


def test_the_limits_of_the_docs_are_those_of_the_code() -> None:
    from coldpress.passes.merge_adapter_weights import MERGE_LIMITS, ORIGINAL_BASE_LIMITS

    text = (ROOT / "docs" / "proof.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (`.+?) \| ([\d.]+ \| \+[\d.]+ %) \|$", text, re.MULTILINE))
    builder = PASSES["ModelBuilder"]()

    def figures(limits: object) -> str:
        return f"{limits.kl:g} | +{limits.perplexity_increase * 100:g} %"  # type: ignore[attr-defined]

    assert rows["`MergeAdapterWeights`"] == figures(MERGE_LIMITS)
    assert rows["`MergeAdapterWeights` of a QLoRA adapter with `base: original`"] == figures(ORIGINAL_BASE_LIMITS)
    for names, row in (("fp32, fp16", ("fp32", "fp16")), ("int8, bf16", ("int8", "bf16")), ("int4", ("int4",))):
        for precision in row:
            config = builder.Config(precision=precision)
            assert rows[f"`ModelBuilder` {names}"] == figures(builder.limits(config, None))


def test_every_event_and_field_is_in_the_docs() -> None:
    text = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (.+) \|$", text, re.MULTILINE))
    kinds = typing.get_args(events.Event)
    assert rows.keys() == {kind.__name__ for kind in kinds}
    for kind in kinds:
        names = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", rows[kind.__name__]))
        assert names == [field.name for field in dataclasses.fields(kind)], kind.__name__


def test_the_example_line_of_the_docs_reads_back() -> None:
    text = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("{")]
    assert [json.loads(events.event_to_json(events.event_from_dict(json.loads(line)))) for line in lines] == [
        json.loads(line) for line in lines
    ]
    assert lines


def test_the_search_of_the_docs_is_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from coldpress.cli.workflow import plan
    from coldpress.config.search_strategy import SearchStrategy

    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    found = re.search(r"```json\n(.*?)```", text, re.DOTALL)
    assert found is not None
    document = json.loads(found[1])
    document["input_model"]["model_path"] = str(ROOT / document["input_model"]["model_path"])
    (tmp_path / "search.json").write_text(json.dumps(document))
    (tmp_path / "text.txt").write_text("a text\n" * 200)
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"```\n(search  sequential.*?steps .*?)\n```", text, re.DOTALL)
    assert shown is not None
    assert CliRunner().invoke(plan, ["search.json"]).output.startswith(shown[1])
    smaller = "evaluators.limits.metrics.0.sub_types.0.goal.value=5000000"
    (told,) = re.findall(r"`(\d of 5 settings are out: [^`]+)`", text)
    assert f"plans   {told}" in CliRunner().invoke(plan, ["search.json", smaller]).output
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (?!in)", text, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(SearchStrategy.model_fields) <= named
