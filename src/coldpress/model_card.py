"""Model cards: `README.md` beside an adapter, and beside the model that a run hands over.

A card says what was measured and recorded; what is not known is left out. The head is what model hubs read.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from coldpress.record import DataRecord, ModelRecord, RunRecord, StepRecord, TrainingRecord, TrainingSummary
from coldpress.summary import comparisons, models_of, parity_text, score_name
from coldpress.units import duration, size

__all__ = ["CARD_FILE", "base_license", "cell", "model_name", "run_card", "task_of", "training_card"]

CARD_FILE = "README.md"
GENERATION, CLASSIFICATION = "text-generation", "text-classification"
_TASKS = {"CAUSAL_LM": GENERATION, "SEQ_CLS": CLASSIFICATION}
"""By what PEFT calls them."""
_ARCHITECTURES = {"ForCausalLM": GENERATION, "ForSequenceClassification": CLASSIFICATION}
"""By the end of a class of Transformers."""
_LIBRARIES = ("coldpress", "torch", "transformers", "peft", "bitsandbytes", "onnxruntime", "onnxruntime-genai")
"""Whose versions matter to whoever uses the model."""


def model_name(folder: Path) -> str:
    """Hub id of a model in the hub's cache, else the name of its folder; none for a result in our own cache."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return "" if re.fullmatch(r"[0-9a-f]{64}", folder.name) else folder.name


def base_license(folder: Path) -> str | None:
    """What the head of a model's own card names as its licence."""
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", head.group(1), re.MULTILINE) if head else None
    return found.group(1) if found else None


def task_of(config: Mapping[str, Any], adapter: Mapping[str, Any] | None = None) -> str | None:
    """What a model is for, as hubs call it, from its config.json and its adapter's config; None where they are mute."""
    if adapter is not None and adapter.get("task_type") in _TASKS:
        return _TASKS[adapter["task_type"]]
    names = [str(name) for name in config.get("architectures") or ()]
    return next((task for end, task in _ARCHITECTURES.items() if any(name.endswith(end) for name in names)), None)


def training_card(training: TrainingRecord, task: str | None, *, adapter: bool) -> str:
    """The card of an adapter, or of a model trained whole. `task` is one of `task_of`."""
    base = training.base
    assert base is not None
    kind = "adapter" if adapter else "fine-tuned"
    head = _head(
        base,
        "adapter" if adapter else "finetune",
        library="peft" if adapter else "transformers",
        tags=[training.method.lower()],
        task=task,
    )
    made_with = f"Coldpress {training.libraries.get('coldpress') or ''}".rstrip()
    lines = [
        f"# {cell(base.name)}: {cell(training.method)} {kind}" if base.name else f"# {cell(training.method)} {kind}",
        "",
        f"{'An adapter for ' if adapter else ''}{_named(base)}, trained with {made_with}.",
        "",
        *_training_section("Training", training, base),
        *_use_torch(training, task, base.name if adapter else None, chat=False),
        *_versions(training.libraries),
    ]
    return head + "\n".join(lines) + "\n"


def run_card(record: RunRecord, task: str | None, *, adapter: bool, chat: bool = False) -> str:
    """The card of the model that a run handed over; `adapter` says whether it is a base with one beside it.

    `chat` says whether its tokenizer has a chat template.
    """
    base, last = record.input_model, record.steps[-1]
    assert base is not None
    assert last.model is not None
    onnx = last.model.kind == "onnx"
    trained = [step for step in record.steps if step.training is not None]
    last_training = trained[-1].training if trained else None
    head = _head(
        base,
        "adapter" if adapter and not onnx else "finetune" if trained and not onnx else "quantized" if onnx else None,
        library="peft" if adapter and not onnx else None if onnx else "transformers",
        tags=["onnx", "onnxruntime-genai"] if onnx else [],
        task=task,
    )
    made = " → ".join(dict.fromkeys(step.type for step in record.steps))
    sections = [
        _results(record),
        _steps(record),
        *[_training_section(f"Training: {cell(step.name)}", step.training) for step in trained if step.training],
        _use_onnx(last_training, adapter=adapter, chat=chat)
        if onnx
        else _use_torch(last_training, task, base.name if adapter else None, chat=chat),
        _machine(record),
        _versions({"coldpress": record.coldpress, **record.libraries}),
    ]  # fmt: skip
    lines = [
        f"# {cell(base.name)}: {made}",
        "",
        f"{_named(base)} ({_described(base)}), made into {_described(last.model)} by Coldpress {record.coldpress}.",
        "",
        *[line for section in sections for line in section],
    ]
    return head + "\n".join(lines) + "\n"


# -- parts ------------------------------------------------------------------------------------------------------------


def _head(
    base: ModelRecord, relation: str | None, *, library: str | None, tags: Sequence[str], task: str | None
) -> str:
    from ruamel.yaml import YAML

    hub_id = base.name if "/" in base.name else None
    values: dict[str, Any] = {
        "base_model": hub_id,
        "base_model_relation": relation if hub_id else None,
        "library_name": library,
        "license": base.license,
        "pipeline_tag": task,
        "tags": [*tags, "coldpress"],
    }
    text = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.dump({name: value for name, value in values.items() if value}, text)
    return f"---\n{text.getvalue()}---\n\n"


def cell(text: Any) -> str:
    """Text that is safe in a line or a table cell of Markdown: no HTML, no column, no line break, no link."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


def _table(rows: Iterable[tuple[str, str | None]]) -> list[str]:
    """Two columns; rows without a value are left out."""
    return ["| | |", "| --- | --- |", *[f"| {name} | {value} |" for name, value in rows if value], ""]


def _named(model: ModelRecord) -> str:
    return cell(model.name) or "the result of an earlier step"


def _described(model: ModelRecord) -> str:
    size_of = "" if model.parameters is None else f"{model.parameters / 1e6:,.1f}M parameters"
    parts = [model.model_type, size_of, model.precision, "ONNX" if model.kind == "onnx" else "", size(model.bytes)]
    return ", ".join(cell(part) for part in parts if part)


def _training_section(title: str, training: TrainingSummary, base: ModelRecord | None = None) -> list[str]:
    one = training
    loss = f"{one.loss:.4f}" if one.loss_first is None else f"{one.loss_first:.4f} → {one.loss:.4f}"
    best = "" if one.best_step is None else f", of step {one.best_step}, whose weights these are"
    rate = "" if one.tokens_per_second is None else f", {one.tokens_per_second:,.0f} tokens/s"
    trained = None if one.trained is None else f"{one.trained.parameters:,} of {one.trained.of:,} parameters"
    rows: list[tuple[str, str | None]] = [
        ("Base model", None if base is None else f"{_named(base)} ({_described(base)})"),
        ("Method", cell(one.method)),
        ("Trained", trained),
        ("Data", None if one.data is None else _data(one.data)),
        ("Held out", None if one.held_out is None else _data(one.held_out)),
        ("Steps", f"{one.steps:,}; {one.tokens:,} tokens{rate}"),
        ("Loss", f"{loss} nats per token with loss (means over the first and the last tenth of the steps)"),
        ("Evaluation loss", None if one.eval_loss is None else f"{one.eval_loss:.4f} on the held-out data{best}"),
        ("Time", f"{duration(one.seconds)}{_since(one.resumed_from)}"),
        ("Device", cell(one.device)),
    ]
    lines = [f"## {title}", "", *_table(rows)]
    for name, values in (("Settings", one.settings), ("Training arguments", one.arguments)):
        if values:
            text = json.dumps(dict(values), indent=2, default=str, ensure_ascii=False)
            lines += [f"{name}:", "", *_code("json", text)]
    return lines


def _code(language: str, text: str) -> list[str]:
    """A fenced block; the fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.splitlines(), fence, ""]


def _since(resumed_from: int | None) -> str:
    return "" if resumed_from is None else f", since it went on from step {resumed_from}"


def _data(data: DataRecord) -> str:
    counts = f"{data.rows:,} rows, {data.tokens:,} tokens, {data.loss_tokens:,} with loss"
    print_of = "" if data.fingerprint is None else f"; sha256 {data.fingerprint}"
    return f"{cell(data.name)} ({cell(data.origin)}): {counts}{print_of}"


def _results(record: RunRecord) -> list[str]:
    rows = comparisons(record)
    names = [name for name in models_of(record) if any(name in row.models for row in rows)]
    if len(names) < 2:
        return []
    lines = ["## Results", "", f"| | {' | '.join(cell(name) for name in names)} |", "| --- |" + " ---: |" * len(names)]
    for row in rows:
        values = [row.models[name].text(row.unit) if name in row.models else "" for name in names]
        wanted = "higher" if row.higher_is_better else "lower"
        lines.append(f"| {cell(row.name)} ({wanted} is better) | {' | '.join(values)} |")
    counts = dict.fromkeys(f"{score_name(score)}: {score.n:,}" for score in record.scores)
    note = f"± is the standard error; measured on {'; '.join(counts)}." if counts else ""
    return [*lines, "", *([note, ""] if note else [])]


def _steps(record: RunRecord) -> list[str]:
    lines = ["## Steps", "", "| step | pass | result | time | peak memory | against its input |", "| --- " * 6 + "|"]
    lines += [f"| {' | '.join(_step_cells(step))} |" for step in record.steps]
    limits = [f"{cell(step.name)}: {cell(step.parity.limit)}" for step in record.steps if step.parity is not None]
    note = f"Limits: {'; '.join(limits)}." if limits else ""
    return [*lines, "", *([note, ""] if note else [])]


def _step_cells(step: StepRecord) -> list[str]:
    made = "" if step.model is None else f"{cell(step.model.precision)}, {size(step.model.bytes)}"
    proof = "" if step.parity is None else f"{parity_text(step.parity)} ({step.parity.tokens:,} {step.parity.compared})"
    return [cell(step.name), cell(step.type), made, duration(step.seconds), size(step.peak_bytes), cell(proof)]


def _machine(record: RunRecord) -> list[str]:
    machine = record.hardware
    gpus = ", ".join(f"{gpu.name} ({size(gpu.memory)})" for gpu in machine.gpus)
    rows = [
        ("Processor", cell(f"{machine.processor}, {machine.cores} cores, {machine.threads} threads")),
        ("GPU", cell(gpus)),
        ("Memory", size(machine.memory)),
        ("System", cell(f"{machine.system}, {machine.machine}")),
    ]
    return ["## Machine", "", *_table(rows)]


def _versions(libraries: Mapping[str, str | None]) -> list[str]:
    known = [f"{name} {libraries[name]}" for name in _LIBRARIES if libraries.get(name)]
    return ["## Versions", "", cell(", ".join(known)) + "."] if known else []


# -- how to load it ---------------------------------------------------------------------------------------------------

_FOLDER = 'folder = "."  # this folder'
_TEXT = 'prompt = "Once upon a time"'
_MESSAGES = 'messages = [{"role": "user", "content": "..."}]'


def _asked(training: TrainingSummary | None, task: str | None, *, chat: bool) -> tuple[list[str], bool | str]:
    """Python that sets what a model is asked (`prompt`, or `messages`), and the chat template: true is its own.

    `chat` says whether the tokenizer has one, which counts for a model that was not trained here.
    """
    template = chat if training is None else training.chat_template
    if template and task != CLASSIFICATION:
        return [_MESSAGES], template
    prompt = "" if training is None else training.prompt
    return _filled_in(prompt) if prompt.strip() else [_TEXT], False


def _filled_in(prompt: str) -> list[str]:
    """Python that sets `prompt` by a template; what the data's owner wrote stands in string literals alone.

    Without spaces at its end, which most tokenizers put into the word that follows.
    """
    terms, columns, text = [], [], ""
    for piece in re.split(r"(\{\{|\}\}|\{[^{}]*\})", prompt.rstrip(" ")):
        if piece in ("{{", "}}"):
            text += piece[0]
        elif piece.startswith("{"):
            terms += [*([repr(text)] if text else []), f"record[{piece[1:-1]!r}]"]
            columns.append(piece[1:-1])
            text = ""
        else:
            text += piece
    terms += [repr(text)] if text else []
    record = ", ".join(f"{name!r}: '...'" for name in dict.fromkeys(columns))
    return [*([f"record = {{{record}}}"] if columns else []), f"prompt = {' + '.join(terms)}"]


def _form(training: TrainingSummary | None) -> list[str]:
    """In which form a model expects its texts, where a training says it."""
    if training is not None and training.chat_template:
        return ["Trained on conversations: a chat template puts messages into a prompt.", ""]
    if training is None or not training.prompt.strip():
        return []
    said = "Trained on texts of this form; the answer comes after it, and names in braces are filled in:"
    return [said, "", *_code("text", training.prompt)]


def _use(training: TrainingSummary | None, code: Sequence[str], command: str | None, said: str = "") -> list[str]:
    lines = ["## Use", "", *([said, ""] if said else []), *_form(training)]
    lines += _code("python", "\n".join(code)) if code else []
    return [*lines, *([f"From the command line: `coldpress {command}`.", ""] if command else [])]


def _command(asked: Sequence[str], template: bool | str) -> str | None:
    if template:
        return "chat FOLDER" if template is True else None
    return "generate FOLDER --prompt " + ('"Once upon a time"' if asked == [_TEXT] else "PROMPT")


def _use_torch(training: TrainingSummary | None, task: str | None, base: str | None, *, chat: bool) -> list[str]:
    """Of a checkpoint, or of an adapter on `base`."""
    asked, template = _asked(training, task, chat=chat)
    kind = "AutoModelForSequenceClassification" if task == CLASSIFICATION else "AutoModelForCausalLM"
    model = f"{kind}.from_pretrained({'folder' if base is None else 'base'})"
    code = [f"from transformers import {kind}, AutoTokenizer", "", _FOLDER, *asked]
    if base is not None:
        where = json.dumps(base or "...", ensure_ascii=False) + (
            "" if "/" in base else "  # the folder of the base model"
        )
        code = ["from peft import PeftModel", code[0], "", f"base = {where}", *code[2:]]
        model = f"PeftModel.from_pretrained({model}, folder)"
    code += ["tokenizer = AutoTokenizer.from_pretrained(folder)", f"model = {model}"]
    if template:
        code += [
            "tokens = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt",',
            *([f"    chat_template={template!r},"] if isinstance(template, str) else []),
            ")",
        ]
    else:
        code += ['tokens = tokenizer(prompt, return_tensors="pt")']
    if task == CLASSIFICATION:
        code += ["found = int(model(**tokens).logits.argmax(-1))", "print(model.config.id2label[found])"]
        return _use(training, code, None)
    code += [
        "found = model.generate(**tokens, max_new_tokens=32)",
        "print(tokenizer.decode(found[0], skip_special_tokens=True))",
    ]
    return _use(training, code, _command(asked, template))


def _use_onnx(training: TrainingSummary | None, *, adapter: bool, chat: bool) -> list[str]:
    asked, template = _asked(training, None, chat=chat)
    command = _command(asked, template)
    if adapter:
        return _use(training, (), command, "The graph takes its adapter as inputs.")
    own = f", template_str={template!r}" if isinstance(template, str) else ""
    render = [f"prompt = tokenizer.apply_chat_template(json.dumps(messages){own}, add_generation_prompt=True)"]
    return _use(training, [*(["import json", ""] if template else []), "import onnxruntime_genai as og", "",
                 _FOLDER, *asked,
                 "model = og.Model(folder)", "tokenizer = og.Tokenizer(model)", *(render if template else []),
                 "parameters = og.GeneratorParams(model)", "tokens = tokenizer.encode(prompt)",
                 "parameters.set_search_options(max_length=len(tokens) + 32)",
                 "generator = og.Generator(model, parameters)", "generator.append_tokens(tokens)",
                 "while not generator.is_done():", "    generator.generate_next_token()",
                 "print(tokenizer.decode(generator.get_sequence(0)))"], command)  # fmt: skip
