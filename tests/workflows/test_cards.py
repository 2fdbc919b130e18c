"""Model cards: what they say is in the record, and the code in them runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import coldpress
from coldpress.model_card import base_license, cell, model_name, run_card, task_of, training_card
from coldpress.nn import imports
from coldpress.record import ModelRecord, TrainingRecord, read_run
from fakes.tiny_runs import tiny_document

pytestmark = pytest.mark.xdist_group("tiny_run")


def head(card: str) -> dict[str, Any]:
    """What a hub reads of a card."""
    from ruamel.yaml import YAML

    text = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert text is not None
    found: dict[str, Any] = YAML(typ="safe").load(text.group(1))
    return found


def run_code(card: str, folder: Path, base: Path) -> str:
    """Run the card's own Python, with the places filled in; what it prints."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    code = re.sub(r"^base = .*$", f"base = {str(base)!r}", code, flags=re.MULTILINE)
    code = re.sub(r"^folder = .*$", f"folder = {str(folder)!r}", code, flags=re.MULTILINE)
    imports.load_training()
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    return said.getvalue()


@pytest.fixture(scope="module")
def tiny_adapter(tiny_run: Path) -> Path:
    """The same project's first step as the whole workflow: the training itself is cached."""
    project = tiny_run.parent
    document = tiny_document(output_dir="adapter-output")
    document["passes"] = {"lora": document["passes"]["lora"]}
    path = project / "adapter.json"
    path.write_text(json.dumps(document))
    result = coldpress.run(path)
    assert result.steps[0].cached
    return result.output


def test_no_warning_of_a_length_that_nobody_asked_for(tiny_run: Path) -> None:
    """The default of max_seq_len is longer than the context of the tiny model."""
    record, _ = read_run(tiny_run)
    assert not [said for said in record.warnings if "max_seq_len" in said]


def test_the_card_of_an_adapter_beside_its_weights(tiny_run: Path) -> None:
    record, _ = read_run(tiny_run)
    folder = Path(record.steps[0].path) / "adapter"
    card = (folder / "README.md").read_text()
    assert head(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "coldpress"]}
    training = record.steps[0].training
    assert training is not None
    assert training.data is not None
    for said in (
        "# a-tiny-model: LoRA adapter",
        f"32 rows, {training.data.tokens} tokens, {training.data.loss_tokens} with loss",
        f"sha256 {training.data.fingerprint}",
        f"{training.loss_first:.4f} → {training.loss:.4f} nats per token",
        f"{training.eval_loss:.4f} on the held-out data",
        '"learning_rate": 0.01',
        f"coldpress {coldpress.__version__}, torch ",
    ):
        assert said in card, said
    assert "More Information Needed" not in card
    assert str(tiny_run.parent) not in card, "places of this machine are nobody's business"


def test_the_card_of_an_adapter_that_is_handed_over_has_the_scores_too(tiny_adapter: Path) -> None:
    card = (tiny_adapter / "adapter" / "README.md").read_text()
    assert card == (tiny_adapter / "README.md").read_text()
    assert head(card)["library_name"] == "peft"
    assert "| accuracy (higher is better) | " in card
    assert "measured on accuracy: 40" in card


def test_the_code_of_an_adapters_card_runs(tiny_run: Path, tiny_adapter: Path) -> None:
    base = tiny_run.parent / "a-tiny-model"
    assert "... ->" in run_code((tiny_adapter / "README.md").read_text(), tiny_adapter / "adapter", base)


def test_the_card_of_an_onnx_model_and_its_code(tiny_run: Path) -> None:
    card = (tiny_run / "model" / "README.md").read_text()
    assert head(card) == {"pipeline_tag": "text-generation", "tags": ["onnx", "onnxruntime-genai", "coldpress"]}
    record, _ = read_run(tiny_run)
    parity = record.steps[2].parity
    assert parity is not None
    assert f"KL {parity.kl:.2e}" in card
    assert parity.limit in card
    assert "... ->" in run_code(card, tiny_run / "model", tiny_run)


def test_the_card_of_a_merged_checkpoint_and_its_code(tiny_run: Path, tmp_path: Path) -> None:
    record, _ = read_run(tiny_run)
    merged = record.model_copy(update={"steps": record.steps[:2]})
    card = run_card(merged, "text-generation", adapter=False)
    assert head(card)["library_name"] == "transformers"
    folder = tmp_path / "merged"
    shutil.copytree(record.steps[1].path, folder)
    assert "... ->" in run_code(card, folder, tiny_run)


def training(**more: Any) -> TrainingRecord:
    base = ModelRecord(kind="checkpoint", model_type="llama", bytes=1, name="org/base", license="apache-2.0")
    return TrainingRecord.model_validate(
        {
            "method": "LoRA",
            "steps": 2,
            "seconds": 1.0,
            "tokens": 10,
            "loss": 1.0,
            "losses": [2.0, 1.0],
            "base": base,
            **more,
        }
    )


def test_a_base_from_a_hub_is_named_with_its_licence() -> None:
    card = training_card(training(), None, adapter=True)
    assert head(card) == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "tags": ["lora", "coldpress"],
    }
    assert 'base = "org/base"\n' in card


PROMPT = "{{Text}} `{a b}` <b>é\u2028\n```\n# {__import__('os').abort()} {a b} -> "


def test_a_template_is_shown_and_filled_in_by_its_letters() -> None:
    for card in (
        training_card(training(prompt=PROMPT), "text-generation", adapter=True),
        training_card(training(prompt=PROMPT), "text-classification", adapter=True),
    ):
        assert "````text\n{{Text}} `{a b}` <b>é" in card
        (lines,) = re.findall(r"^record = .*\nprompt = .*$", card, re.MULTILINE)
        found: dict[str, Any] = {}
        exec(lines, found)
        assert found["prompt"] == "{Text} `...` <b>é\u2028\n```\n# ... ... ->"
        assert "Once upon a time" not in card


def test_conversations_are_asked_by_the_chat_template() -> None:
    card = training_card(training(chat_template=True), "text-generation", adapter=True)
    assert "`coldpress chat FOLDER`" in card
    assert 'messages = [{"role": "user", "content": "..."}]' in card
    own = training_card(training(chat_template="{{ messages[0]['content'] }}\n"), "text-generation", adapter=True)
    assert """chat_template="{{ messages[0]['content'] }}\\n",""" in own
    assert "coldpress chat" not in own
    assert "Once upon a time" not in card + own


def test_the_code_for_conversations_runs(tiny_run: Path, tmp_path: Path) -> None:
    """The tiny model has a chat template, which a run that trains nothing goes by."""
    record, _ = read_run(tiny_run)
    onnx = record.model_copy(update={"steps": record.steps[2:]})
    assert "user: ...assistant: " in run_code(
        run_card(onnx, None, adapter=False, chat=True), tiny_run / "model", tiny_run
    )
    merged = record.model_copy(update={"steps": record.steps[1:2]})
    folder = tmp_path / "merged"
    shutil.copytree(record.steps[1].path, folder)
    said = run_code(run_card(merged, "text-generation", adapter=False, chat=True), folder, tiny_run)
    assert said.startswith("user: ...")


def test_what_is_not_known_is_left_out() -> None:
    card = training_card(training(), None, adapter=True)
    for absent in ("Data", "Held out", "Evaluation loss", "Settings", "Device", "pipeline_tag", "None", "null"):
        assert absent not in card, absent


def test_hostile_names_stay_text() -> None:
    name = "<script>alert(1)</script> | [x](http://y) `z`"
    base = ModelRecord(kind="checkpoint", model_type="llama", bytes=1, name=name)
    card = training_card(training(base=base, settings={"a": "```\n# not a heading"}), None, adapter=True)
    body = card.split("---\n", 2)[2]
    without_code = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in without_code
    assert "](http" not in without_code.replace("\\]", "")
    assert [line for line in without_code.splitlines() if line.startswith("# ")] == [f"# {cell(name)}: LoRA adapter"]
    assert all(line.count("|") - line.count("\\|") == 3 for line in without_code.splitlines() if line.startswith("|"))


def test_tasks() -> None:
    assert task_of({"architectures": ["LlamaForCausalLM"]}) == "text-generation"
    assert task_of({"architectures": ["LlamaForCausalLM"]}, {"task_type": "SEQ_CLS"}) == "text-classification"
    assert task_of({}) is None
    card = training_card(training(), "text-classification", adapter=True)
    assert "AutoModelForSequenceClassification.from_pretrained(base)" in card


def test_names_and_licences_of_bases(tmp_path: Path) -> None:
    assert model_name(Path("/x/hub/models--org--a-b/snapshots/0123")) == "org/a-b"
    assert model_name(Path("/x/phi-3-mini")) == "phi-3-mini"
    assert model_name(Path("/x/steps") / ("0" * 64)) == ""
    assert base_license(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: 'mit'\n---\n# x\nlicense: gpl\n")
    assert base_license(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("# x\nlicense: gpl\n")
    assert base_license(tmp_path) is None
