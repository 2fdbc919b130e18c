"""What to measure: evaluators, their metrics, and the goals that a number must reach. Olive's language, and ours.

Each type of metric has a class of its own, so that a key without effect is an error. Olive's types are accuracy,
latency, throughput, size_on_disk and custom; perplexity, divergence, generation, memory, load_time, lm_eval are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeAlias, TypeVar

from pydantic import Field, model_validator

from coldpress.config.frozen import Frozen, Text

__all__ = [
    "METRIC_TYPES",
    "OF_TEXT",
    "OWN_ACCURACY",
    "TORCH_METRICS",
    "AccuracyMetric",
    "CustomMetric",
    "DivergenceMetric",
    "Evaluator",
    "Fresh",
    "GenerationMetric",
    "Goal",
    "LatencyMetric",
    "LmEvalMetric",
    "LoadTimeMetric",
    "MemoryMetric",
    "Metric",
    "PerplexityMetric",
    "RunnerChoice",
    "SizeMetric",
    "SubType",
    "Timing",
    "TorchMetric",
    "UserConfig",
]

RunnerChoice = Literal["transformers", "onnxruntime", "onnxruntime-genai"]
N = TypeVar("N", bound=str)
C = TypeVar("C")


class Goal(Frozen):
    """What a number must reach; all but threshold are relative to the input model's."""

    type: Literal[
        "threshold", "min-improvement", "percent-min-improvement", "max-degradation", "percent-max-degradation"
    ]
    """threshold: the value itself; the others: better by at least, or worse by at most, so much or so many percent."""
    value: float
    """In the unit of the metric, or in percent."""


class SubType(Frozen, Generic[N, C]):
    """One number of a metric."""

    name: N
    """Which number."""
    priority: int = Field(default=-1, ge=-1)
    """Rank in a search, 1 is the first; without a search it has no effect."""
    higher_is_better: bool | None = None
    """Direction; null is the number's own."""
    goal: Goal | None = None
    """What it must reach."""
    metric_config: C | None = None
    """How it is computed."""


class Timing(Frozen):
    """How often something is timed."""

    warmup_num: int = Field(default=3, ge=0)
    """Runs that are not counted."""
    repeat_test_num: int = Field(default=20, ge=2)
    """Runs that are counted, at least."""
    sleep_num: float = Field(default=0.0, ge=0)
    """Seconds between two runs."""
    confidence: float = Field(default=0.03, gt=0, lt=1)
    """Half the 95 % interval of the mean, as a share of it: runs are repeated until it is that narrow."""
    max_seconds: float = Field(default=60.0, gt=0)
    """Runs end here in any case; what was reached is recorded."""


class Fresh(Frozen):
    """How often a process of its own is started."""

    repeat_test_num: int = Field(default=3, ge=1)
    """Processes."""


OfAccuracy: TypeAlias = SubType[str, Mapping[str, Any]]
OfPerplexity: TypeAlias = SubType[Literal["perplexity", "bits_per_byte", "loss"], None]
OfDivergence: TypeAlias = SubType[Literal["kl", "top1_agreement", "cosine_similarity"], None]
OfBatches: TypeAlias = SubType[Literal["avg", "min", "max", "p50", "p75", "p90", "p95", "p99", "p999"], Timing]
OfSize: TypeAlias = SubType[Literal["bytes"], None]
OfGeneration: TypeAlias = SubType[
    Literal[
        "time_to_first_token_p50",
        "time_to_first_token_p90",
        "time_to_first_token_p99",
        "time_per_output_token_p50",
        "time_per_output_token_p90",
        "time_per_output_token_p99",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ],
    Timing,
]
OfMemory: TypeAlias = SubType[Literal["peak_rss", "peak_anonymous", "peak_vram"], Fresh]
OfLoading: TypeAlias = SubType[Literal["load", "first_answer"], Fresh]
Named: TypeAlias = SubType[Text, None]


class UserConfig(Frozen):
    """The user's own Python for a custom metric. It runs when the metric is measured, not when the file is checked."""

    user_script: Text | None = None
    """File with the function."""
    script_dir: Text | None = None
    """Folder that the script may import from."""
    evaluate_func: Text | None = None
    """Called with (model, device, execution_providers); gives a number, or numbers by name of sub type."""
    evaluate_func_kwargs: Mapping[str, Any] | None = None
    """Further arguments of evaluate_func."""
    metric_func: Text | None = None
    """Called with (output, targets) of the whole data set: predicted labels and scores, and the right answers."""
    metric_func_kwargs: Mapping[str, Any] | None = None
    """Further arguments of metric_func."""


class AccuracyMetric(Frozen):
    """How often a model is right about records that have an answer."""

    name: Text
    """How the result is called."""
    type: Literal["accuracy"]
    """Right answers of a classification, or of generated text."""
    backend: Literal["torch_metrics", "huggingface_metrics"] = "torch_metrics"
    """Whose metrics the sub types name: ours and torchmetrics' classification metrics, or the evaluate library's."""
    sub_types: tuple[OfAccuracy, ...] = Field(default=(OfAccuracy(name="accuracy_score"),), min_length=1)
    """Which numbers: accuracy_score, f1_score, precision, recall, exact_match, perplexity, or a backend's own."""
    data_config: Text
    """Held-out records; its `label_col` names the answer."""
    answer_by: Literal["likelihood", "generation"] = "likelihood"
    """How a causal model answers: the label it finds the most likely, or what it writes (exact_match always is)."""
    labels: tuple[Text, ...] | None = Field(default=None, min_length=2)
    """All answers there may be; null is those that occur."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a written answer at most; null is the longest right one and one more."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences scored at a time."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the usual one."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling behind standard errors."""


class PerplexityMetric(Frozen):
    """How surprised a model is by text."""

    name: Text
    """How the result is called."""
    type: Literal["perplexity"]
    """Of every token after the ones before it, in windows that overlap."""
    sub_types: tuple[OfPerplexity, ...] = Field(
        default=(OfPerplexity(name="perplexity"),),
        min_length=1,
    )
    """perplexity; bits_per_byte, which compares models of different tokenizers; loss in nats a token."""
    data_config: Text
    """The text."""
    window: int | None = Field(default=None, ge=2)
    """Tokens that the model sees at once; null is its context, or max_seq_len where that is shorter."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between window starts; the others are context. null is half a window."""
    batch_size: int = Field(default=4, ge=1)
    """Windows at a time."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the usual one."""


class DivergenceMetric(Frozen):
    """How far a model is from the one it was made of."""

    name: Text
    """How the result is called."""
    type: Literal["divergence"]
    """Of next-token distributions on text, or of embeddings."""
    sub_types: tuple[OfDivergence, ...] = Field(
        default=(OfDivergence(name="kl"),),
        min_length=1,
    )
    """kl in nats a token; top1_agreement of the most likely token; cosine_similarity of embeddings."""
    data_config: Text | None = None
    """The text; null is the text that comes with Coldpress."""
    tokens: int = Field(default=4096, ge=64)
    """Tokens to compare on, at least."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences at a time."""


class LatencyMetric(Frozen):
    """How long one batch takes, or how many sequences that makes a second."""

    name: Text
    """How the result is called."""
    type: Literal["latency", "throughput"]
    """Of forward passes over all batches of the data in turn, with an empty cache: ms, or sequences a second."""
    sub_types: tuple[OfBatches, ...] = Field(default=(OfBatches(name="avg"),), min_length=1)
    """Which numbers."""
    data_config: Text | None = None
    """Texts to run; null is text that comes with Coldpress, cut to prompt_tokens."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of a sequence where there is no data_config."""
    batch_size: int = Field(default=1, ge=1)
    """Sequences in a batch."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the usual one."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling behind standard errors."""


class SizeMetric(Frozen):
    """What a model takes on disk."""

    name: Text
    """How the result is called."""
    type: Literal["size_on_disk"]
    """All files that are needed to run it; a file that is shared is counted once."""
    sub_types: tuple[OfSize, ...] = Field(default=(OfSize(name="bytes"),), min_length=1)
    """bytes."""


class GenerationMetric(Frozen):
    """How fast a model writes."""

    name: Text
    """How the result is called."""
    type: Literal["generation"]
    """Prompts continued one after the other, greedily, each by the same number of tokens."""
    sub_types: tuple[OfGeneration, ...] = Field(
        default=(
            OfGeneration(name="time_to_first_token_p50"),
            OfGeneration(name="decode_tokens_per_second"),
        ),
        min_length=1,
    )
    """Times in ms, speeds in tokens a second."""
    data_config: Text | None = None
    """Prompts: texts up to their answer; null is text that comes with Coldpress, cut to prompt_tokens."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of a prompt where there is no data_config."""
    new_tokens: int = Field(default=32, ge=2)
    """Tokens to write after each."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is ONNX Runtime GenAI where it can, else the usual one."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling behind standard errors."""


class MemoryMetric(Frozen):
    """What a model takes in memory."""

    name: Text
    """How the result is called."""
    type: Literal["memory"]
    """Highest use of a process of its own that loads the model and runs a prompt."""
    sub_types: tuple[OfMemory, ...] = Field(default=(OfMemory(name="peak_rss"),), min_length=1)
    """peak_rss: resident, libraries included; peak_anonymous: what no file backs of it; peak_vram: of the GPU."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt."""
    new_tokens: int = Field(default=16, ge=1)
    """Tokens to write after it (decoders)."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the one that users run: ONNX Runtime GenAI where it can."""


class LoadTimeMetric(Frozen):
    """How long a model takes to be ready."""

    name: Text
    """How the result is called."""
    type: Literal["load_time"]
    """In a process of its own, libraries imported: from the first byte read to the first answer."""
    sub_types: tuple[OfLoading, ...] = Field(default=(OfLoading(name="load"),), min_length=1)
    """load: until the model is there; first_answer: until it has run a prompt. Seconds."""
    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the one that users run: ONNX Runtime GenAI where it can."""


class CustomMetric(Frozen):
    """A number that the user's own Python computes."""

    name: Text
    """How the result is called."""
    type: Literal["custom"]
    """By the user's function."""
    sub_types: tuple[Named, ...] = Field(min_length=1)
    """Names of the numbers that the function gives."""
    user_config: UserConfig
    """Where the function is."""
    data_config: Text | None = None
    """Records, for metric_func."""
    labels: tuple[Text, ...] | None = Field(default=None, min_length=2)
    """All answers there may be; null is those that occur."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences scored at a time."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the usual one."""


Records: TypeAlias = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]


class LmEvalMetric(Frozen):
    """Tasks of the Language Model Evaluation Harness."""

    name: Text
    """How the result is called."""
    type: Literal["lm_eval"]
    """By the harness's own code; only the model is ours."""
    sub_types: tuple[Named, ...] = ()
    """Numbers as the harness names them, `task.metric` or `metric`; none is all that the tasks give."""
    tasks: tuple[Text, ...] = Field(min_length=1)
    """Names of tasks, or paths of task files (YAML)."""
    include_path: Text | None = None
    """A folder of further task files, whose tasks may then be named."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null is the task's own."""
    limit: Records | None = None
    """Records of a task (a whole number), or a share of them; null is all."""
    apply_chat_template: bool = False
    """Put prompts into the model's chat template."""
    system_instruction: str | None = None
    """A system message before every prompt."""
    fewshot_as_multiturn: bool = False
    """Examples as turns of a conversation."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens that the model sees at most; null is its context."""
    bootstrap_iters: int = Field(default=1000, ge=0)
    """Resamples behind the standard error of numbers that are no means."""
    batch_size: int = Field(default=16, ge=1)
    """Sequences at a time."""
    runner: RunnerChoice | None = None
    """What runs models of its kind; null is the usual one."""
    seed: int = Field(default=1234, ge=0)
    """Of the choice of examples."""

    @property
    def task_files(self) -> tuple[str, ...]:
        """Those of the tasks that are paths of files."""
        return tuple(name for name in self.tasks if name.endswith((".yaml", ".yml")))


@dataclass(frozen=True)
class TorchMetric:
    """A metric of torchmetrics' classifications."""

    library_name: str
    """Its class is Multiclass and this."""
    of_scores: bool = False
    """Whether it reads the scores of all labels."""
    higher_is_better: bool = True
    unit: str = "share"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Those that the library has no default for; metric_config may say otherwise."""


OF_TEXT = ("perplexity", "bits_per_byte", "loss")
"""Sub types of accuracy that are of all text, not of answers: Olive has perplexity there."""
OWN_ACCURACY = ("accuracy_score", "precision", "recall", "f1_score", "exact_match", *OF_TEXT)
"""Sub types of accuracy that we compute."""
TORCH_METRICS: Mapping[str, TorchMetric] = {
    "auroc": TorchMetric("AUROC", of_scores=True),
    "average_precision": TorchMetric("AveragePrecision", of_scores=True),
    "calibration_error": TorchMetric("CalibrationError", of_scores=True, higher_is_better=False),
    "cohen_kappa": TorchMetric("CohenKappa", unit=""),
    "fbeta_score": TorchMetric("FBetaScore", arguments={"beta": 1.0}),
    "hamming_distance": TorchMetric("HammingDistance", higher_is_better=False),
    "jaccard_index": TorchMetric("JaccardIndex"),
    "matthews_corrcoef": TorchMetric("MatthewsCorrCoef", unit=""),
    "negative_predictive_value": TorchMetric("NegativePredictiveValue"),
    "specificity": TorchMetric("Specificity"),
}
"""Sub types of accuracy that torchmetrics computes, by the names that its functions have."""

Metric = Annotated[
    AccuracyMetric
    | PerplexityMetric
    | DivergenceMetric
    | LatencyMetric
    | SizeMetric
    | GenerationMetric
    | MemoryMetric
    | LoadTimeMetric
    | CustomMetric
    | LmEvalMetric,
    Field(discriminator="type"),
]
METRIC_TYPES: Mapping[str, type[Frozen]] = {
    "accuracy": AccuracyMetric,
    "perplexity": PerplexityMetric,
    "divergence": DivergenceMetric,
    "latency": LatencyMetric,
    "throughput": LatencyMetric,
    "size_on_disk": SizeMetric,
    "generation": GenerationMetric,
    "memory": MemoryMetric,
    "load_time": LoadTimeMetric,
    "custom": CustomMetric,
    "lm_eval": LmEvalMetric,
}
_MODEL_CLASSES: Mapping[str, RunnerChoice] = {
    "hf": "transformers",
    "ort": "onnxruntime",
    "ortgenai": "onnxruntime-genai",
}
_OF_TASKS = (
    "tasks", "model_class", "batch_size", "max_length", "limit", "apply_chat_template", "system_instruction",
    "fewshot_as_multiturn", "num_fewshot", "bootstrap_iters", "include_path",
)  # fmt: skip


class Evaluator(Frozen):
    """A set of metrics."""

    type: Literal["LMEvaluator"] | None = None
    """LMEvaluator: tasks of the Language Model Evaluation Harness, besides any metrics."""
    metrics: tuple[Metric, ...] | None = Field(default=None, min_length=1)
    """Measured one after the other."""
    tasks: tuple[Text, ...] | None = Field(default=None, min_length=1)
    """LMEvaluator: names of tasks, or paths of task files (YAML); size_on_disk may stand among them."""
    model_class: Literal["hf", "ort", "ortgenai"] | None = None
    """LMEvaluator: what runs the model; null is the usual runner of its kind."""
    batch_size: int | None = Field(default=None, ge=1)
    """LMEvaluator: sequences at a time."""
    max_length: int | None = Field(default=None, ge=2)
    """LMEvaluator: tokens that the model sees at most; null is its context."""
    limit: Records | None = None
    """LMEvaluator: records of a task (a whole number), or a share of them; null is all."""
    apply_chat_template: bool | None = None
    """LMEvaluator: put prompts into the model's chat template."""
    system_instruction: str | None = None
    """LMEvaluator: a system message before every prompt."""
    fewshot_as_multiturn: bool | None = None
    """LMEvaluator: examples as turns of a conversation."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """LMEvaluator: examples in the prompt; null is the task's own."""
    bootstrap_iters: int | None = Field(default=None, ge=0)
    """LMEvaluator: resamples behind the standard error of numbers that are no means."""
    include_path: Text | None = None
    """LMEvaluator: a folder of further task files."""

    @model_validator(mode="after")
    def _one_of_them(self) -> Evaluator:
        if self.type is None:
            given = [name for name in _OF_TASKS if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{', '.join(given)} belong to an evaluator of type LMEvaluator")
            if not self.metrics:
                raise ValueError("an evaluator needs metrics")
        elif self.tasks is None:
            raise ValueError("an LMEvaluator needs tasks")
        return self

    @property
    def measured(self) -> tuple[Metric, ...]:
        """All metrics, those that the tasks of an LMEvaluator stand for among them."""
        if self.tasks is None:
            return self.metrics or ()
        found: list[Any] = list(self.metrics or ())
        names = [name for name in self.tasks if name != "size_on_disk"]
        if names:
            options = {
                name: value
                for name in _OF_TASKS
                if name not in ("tasks", "model_class") and (value := getattr(self, name)) is not None
            }
            runner = None if self.model_class is None else _MODEL_CLASSES[self.model_class]
            found.append(LmEvalMetric(name="lm_eval", type="lm_eval", tasks=tuple(names), runner=runner, **options))
        if len(names) < len(self.tasks):
            found.append(SizeMetric(name="size_on_disk", type="size_on_disk"))
        return tuple(found)
