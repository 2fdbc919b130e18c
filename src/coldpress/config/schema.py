"""The config language as typed, frozen values: today's Olive language, normalised to one shape.

`load` reads text into these types; everything below it sees only these. A default is said once, here; the string under
a field is its help text. Unknown keys are errors. Passes bring their own config types (see `passes/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator

from coldpress.config.frozen import Frozen, Text
from coldpress.config.metrics import Evaluator, Metric, SubType
from coldpress.config.search_strategy import SearchStrategy

__all__ = [
    "Accelerator",
    "AzureMLClient",
    "AzureMLResource",
    "AzureMLSystem",
    "DataConfig",
    "DockerConfig",
    "EnvironmentConfig",
    "Evaluator",
    "Frozen",
    "InputModel",
    "LoadDataset",
    "LoadKwargs",
    "LocalSystem",
    "Metric",
    "ParityLimits",
    "PassEntry",
    "PreProcess",
    "SearchStrategy",
    "SubType",
    "System",
    "Workflow",
]


MEMORY = r"^[0-9]+(\.[0-9]+)? ?([KMGT]i?)?B?$"
"""A size such as 8GB."""


class AzureMLResource(Frozen):
    """A model or a file that lies in Azure ML; nothing of it is known until the registry is reached."""

    type: Literal["azureml_registry_model", "azureml_model", "azureml_datastore", "azureml_job_output"]
    """Which kind of Azure ML resource."""
    config: Mapping[str, Any] = Field(default_factory=dict)
    """Its coordinates: registry, name and version, or workspace, datastore and path."""


class AzureMLClient(Frozen):
    """An Azure ML workspace."""

    subscription_id: str | None = None
    """Azure subscription."""
    resource_group: str | None = None
    """Resource group of the workspace."""
    workspace_name: str | None = None
    """Name of the workspace."""
    aml_config_path: str | None = None
    """A `config.json` from the Azure portal, instead of the three above."""
    read_timeout: int | None = None
    """Seconds to wait for an answer."""
    max_operation_retries: int | None = None
    """Tries of one operation."""
    operation_retry_interval: int | None = None
    """Seconds between tries."""
    default_auth_params: Mapping[str, Any] | None = None
    """Arguments of azure-identity's DefaultAzureCredential."""
    keyvault_name: str | None = None
    """Key vault that holds the hub token."""


class DockerConfig(Frozen):
    """The container that an Azure ML job runs in."""

    base_image: str | None = None
    """Image to start from."""
    dockerfile: str | None = None
    """A Dockerfile instead of an image."""
    build_context_path: str | None = None
    """Folder that the Dockerfile is built in."""
    conda_file_path: str | None = None
    """Conda environment to install on top."""
    name: str | None = None
    """Name of the environment."""
    version: str | None = None
    """Version of the environment."""


class EnvironmentConfig(Frozen):
    """A registered Azure ML environment."""

    name: str
    """Its name."""
    version: str | None = None
    """Its version."""
    label: str | None = None
    """A label such as latest, instead of a version."""


class LoadKwargs(Frozen):
    """How Transformers loads the checkpoint."""

    torch_dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Floating-point type of the loaded weights; auto is the type they are stored in."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """Attention kernel; null lets Transformers choose."""
    trust_remote_code: bool = False
    """Run the checkpoint's own Python. Honoured only together with `--trust-remote-code`."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""


class InputModel(Frozen):
    """The model to start from."""

    type: Literal["HfModel"] = "HfModel"
    """A Hugging Face checkpoint: `config.json`, safetensors, tokenizer."""
    model_path: Text | AzureMLResource
    """A local folder, or a hub id `org/name`."""
    task: str = "text-generation"
    """What the model is for."""
    load_kwargs: LoadKwargs = LoadKwargs()
    """How it is loaded."""
    adapter_path: Text | None = None
    """A PEFT adapter folder that belongs on top of the checkpoint."""


class Accelerator(Frozen):
    """One device of a system and the ONNX Runtime execution provider that models for it are built for."""

    device: Literal["cpu", "gpu"] = "cpu"
    """cpu or gpu."""
    execution_providers: tuple[str, ...] = ("CPUExecutionProvider",)
    """ONNX Runtime execution provider; exactly one."""
    memory: Annotated[str, Field(pattern=MEMORY)] | Annotated[int, Field(ge=1)] | None = None
    """Memory to stay within, in bytes or as `8GB`; null is what the machine has."""


class LocalSystem(Frozen):
    """This machine, or several that see the same files."""

    type: Literal["LocalSystem"] = "LocalSystem"
    """The kind of system."""
    accelerators: tuple[Accelerator, ...] = Field(default=(Accelerator(),), min_length=1)
    """Devices, all alike. Training runs one process on each; other steps use one."""
    hosts: Text | None = None
    """A file that names the machines a training runs on, one a line: `name slots=2`; `localhost` is this one."""
    hf_token: bool = False
    """Whether hub downloads use the token in the environment (`HF_TOKEN`)."""

    @field_validator("accelerators")
    @classmethod
    def _alike(cls, accelerators: tuple[Accelerator, ...]) -> tuple[Accelerator, ...]:
        kinds = list(dict.fromkeys(f"{one.device} with {', '.join(one.execution_providers)}" for one in accelerators))
        if len(kinds) > 1:
            raise ValueError(
                f"{len(accelerators)} accelerators that differ ({'; '.join(kinds)}): a model is built for one device "
                "and one execution provider, and several are as many processes of a training; keep equal ones"
            )
        if any(one != accelerators[0] for one in accelerators):
            raise ValueError("accelerators of one system are as many processes of a training: give all the same memory")
        return accelerators


class AzureMLSystem(Frozen):
    """An Azure ML compute. Known to `check` and `plan`; running on it is not built yet."""

    type: Literal["AzureML"] = "AzureML"
    """The kind of system."""
    accelerators: tuple[Accelerator, ...] = (Accelerator(),)
    """Devices; exactly one for now."""
    aml_compute: Text
    """Name of the compute target."""
    aml_docker_config: DockerConfig | None = None
    """Base image and conda file of the job's environment."""
    aml_environment_config: EnvironmentConfig | None = None
    """A registered environment, instead of a docker config."""
    azureml_client_config: AzureMLClient | None = None
    """Subscription, resource group and workspace."""
    instance_count: int = Field(default=1, ge=1)
    """Machines of the job."""
    tags: Mapping[str, str] | None = None
    """Tags of the job."""
    hf_token: bool = False
    """Whether the job reads the hub token from the workspace's key vault."""


System = Annotated[LocalSystem | AzureMLSystem, Field(discriminator="type")]


class LoadDataset(Frozen):
    """Where records come from."""

    data_name: Text
    """A hub data set, or a file format: json, csv, parquet, text."""
    data_files: str | tuple[str, ...] | Mapping[str, str | tuple[str, ...]] | AzureMLResource | None = None
    """Local files: one, several, or one entry a split."""
    data_dir: str | None = None
    """Folder inside the data set."""
    subset: str | None = None
    """Named configuration of a hub data set."""
    split: str | None = None
    """Which split, with slicing (`train[:10%]`); null: the only one there is."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    trust_remote_code: bool = False
    """Data set scripts are not run; kept so that older configs are told so."""


class PreProcess(Frozen):
    """How records become token sequences."""

    format: Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt-completion"] = "auto"
    """Form of the records; auto: what the keys below say, else column `text`, else told from the columns."""
    text_cols: tuple[str, ...] | None = None
    """Columns joined by a space, when there is no template."""
    text_field: str | None = None
    """The one column that holds the text."""
    text_template: str | None = None
    """Text of one record, `{column}` filled in; `{column|loss}` marks an answer."""
    chat_template: bool | str = False
    """Render `message_col` with the tokenizer's chat template (true), or with this Jinja template."""
    message_col: str = "messages"
    """Column of chat messages, each with `role` and `content`."""
    label_col: str | None = None
    """Column that holds the answer: what the accuracy metric scores, and where completion-only loss begins; the class
    in sequence classification."""
    completion_only_loss: bool | None = None
    """Loss on the answers and what ends them, not on the prompts; null: yes where the format says what the answers are
    and a sequence holds whole records (not under join)."""
    assistant_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns carry completion-only loss."""
    strategy: Literal["join", "join-random", "join-sliding-window", "line-by-line", "line-by-line-random", "pack"] = (
        "join"
    )
    """One stream cut into full sequences (join), one record a sequence (line-by-line), or as many whole records as fit,
    which do not see each other (pack)."""
    max_seq_len: int = Field(default=1024, ge=1)
    """Tokens in a sequence; at most the model's context, with a warning where more is asked for."""
    max_samples: int | None = Field(default=None, ge=1)
    """Sequences to keep; null is all."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between window starts of join-sliding-window."""
    random_seed: int | None = None
    """Seed of the random strategies."""
    random_retries: int = Field(default=10, ge=1)
    """Tries to find a record that is long enough (random strategies)."""
    pad_to_max_len: bool = True
    """Pad every sequence to `max_seq_len`; false pads to the longest of the batch."""
    padding_side: Literal["right", "left"] = "right"
    """Where padding goes."""
    drop_short_sequences: bool = False
    """Drop sequences shorter than `max_seq_len`."""
    use_attention_mask: bool = True
    """Mask padding out; false is refused where a batch has padding that would then be attended."""
    add_special_tokens: bool = True
    """Put the tokenizer's BOS before and EOS after each record."""
    joiner: str = "\n\n"
    """Text between records under join."""
    processing_batch_size: int = Field(default=1024, ge=1)
    """Records tokenized at a time."""


class DataConfig(Frozen):
    """A named data set, from file to token sequences."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """How passes and metrics refer to it."""
    type: Literal["HuggingfaceContainer"] = "HuggingfaceContainer"
    """Records through the datasets library."""
    load_dataset_config: LoadDataset
    """Where records come from."""
    pre_process_data_config: PreProcess = PreProcess()
    """How records become token sequences."""


class ParityLimits(Frozen):
    """How far a step's result may be from what it came from, on text; beyond it the step fails."""

    enabled: bool = True
    """False skips the check; run.json then says that nothing was proved."""
    data_config: str | None = None
    """Text to compare on; null: the training data's held-out part, then the evaluator's data, then bundled text."""
    tokens: int = Field(default=4096, ge=64)
    """Tokens to compare on, at least; bundled text fills up what the data lacks."""
    max_kl: float | None = Field(default=None, gt=0)
    """Mean KL divergence in nats per token; null: 1e-3 for a merge, 0.01 for int8, 0.1 for int4."""
    max_perplexity_increase: float | None = Field(default=None, gt=0)
    """Relative growth of perplexity (0.05 is 5 %); null: 0.05 for int4, 0.01 for int8, 0.005 for a merge."""


class PassEntry(Frozen):
    """One step of the workflow."""

    type: str
    """Which pass, by its registered name."""
    config: SerializeAsAny[Frozen]
    """The pass's own parameters."""
    host: str | None = None
    """System that runs it; null is the workflow's host."""
    evaluator: str | None = None
    """Evaluator to measure its result with, besides the workflow's own at the end."""
    parity: ParityLimits | None = None
    """Limits for this step; null is the workflow's."""


class Workflow(Frozen):
    """The whole file."""

    input_model: InputModel
    """The model to start from."""
    systems: Mapping[str, System] = Field(default_factory=dict)
    """Machines, by name."""
    data_configs: tuple[DataConfig, ...] = ()
    """Data sets."""
    evaluators: Mapping[str, Evaluator] = Field(default_factory=dict)
    """Sets of metrics, by name."""
    passes: Mapping[str, PassEntry] = Field(default_factory=dict)
    """Steps, in order."""
    host: str | None = None
    """System that runs the steps; null is this machine with its CPU."""
    target: str | None = None
    """System the model is made for and measured on; null is the host."""
    evaluator: str | None = None
    """Evaluator for the input model and the final model; null measures nothing."""
    evaluate_input_model: bool = True
    """Measure the input model too."""
    search_strategy: bool | SearchStrategy | None = None
    """Try several settings and keep the best: how they are looked for; true takes the defaults of that. What is
    searched stands in the passes: alternatives under one name, lists of values, SEARCHABLE_VALUES."""
    parity: ParityLimits = ParityLimits()
    """Limits of the comparison after each lossy step."""
    workflow_id: str = Field(default="default_workflow", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name of the run in its records."""
    output_dir: Text = "output"
    """Where the final model goes; relative to the config file."""
    cache_dir: Text = ".coldpress-cache"
    """Where finished steps are kept; relative to the config file."""
    clean_cache: bool = False
    """Forget this workflow's finished steps first."""
    log_severity_level: int = Field(default=1, ge=0, le=4)
    """0 debug, 1 info, 2 warning, 3 error, 4 critical."""

    @property
    def strategy(self) -> SearchStrategy | None:
        """How settings are looked for; None without a search."""
        if isinstance(self.search_strategy, SearchStrategy):
            return self.search_strategy
        return SearchStrategy() if self.search_strategy else None
