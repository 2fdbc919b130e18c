"""Hugging Face causal language models from local folders, for training and for evaluation.

4-bit bases (bitsandbytes): on CPUs with AVX512-BF16 a `Linear4bit` in eval mode repacks its weights in place, which
drops the double quantization and leaves garbage for whoever dequantizes them later. Every layer is therefore told that
the CPU lacks the instructions; the result is the same in eval and in train mode, and no kernel is fetched.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coldpress.artifacts.base import BaseQuantization, read_json
from coldpress.artifacts.classifiers import classifier_infos, classifier_layout, labels_of
from coldpress.artifacts.quantized import Checkpoint, open_checkpoint
from coldpress.artifacts.tensors import TensorSet
from coldpress.errors import CheckpointError, UnsupportedModelError
from coldpress.nn import imports
from coldpress.nn.adapters import four_bit_names

if TYPE_CHECKING:
    import torch

__all__ = ["dequantized", "four_bit_layers", "load_adapter", "load_dequantized", "load_model", "load_outline"]


def load_model(
    folder: Path,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization: BaseQuantization | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    classifier: Mapping[str, Any] | None = None,
) -> Any:
    """A causal language model; `dtype` is float32, float16, bfloat16, or auto for the stored one.

    A checkpoint that is quantized on disk is dequantized here, to float32 for auto: no library of its tool is needed.
    `classifier` is the config.json of a sequence classifier, which is then loaded: what of it the folder lacks (its
    head) is new, with numbers from torch's generator.
    Raises CheckpointError for missing, damaged or incomplete weights and UnsupportedModelError for an unknown type.
    """
    config = _readable_config(folder, trust_remote_code)
    # A damaged or cut file is named here, before a library fails inside.
    with open_checkpoint(folder, config) as tensors:
        stored = list(tensors.infos())
        new: set[str] = set()
        if classifier is not None:
            made = classifier_infos(classifier, stored, "float32", len(labels_of(classifier)))
            new = {name for name, (_, own) in made.items() if own is None}
            stored = [info for info, _ in made.values()]
        matrices = {info.name.removesuffix(".weight"): info.shape for info in stored if len(info.shape) == 2}
        if tensors.packings:
            if quantization is not None or classifier is not None:
                what = "it cannot be held in 4 bits of bitsandbytes" if quantization else "no classifier is made of it"
                raise CheckpointError(
                    f"{folder} is quantized already, so {what}",
                    hint="take the unquantized model, or train a plain LoRA adapter",
                )
            model = load_outline(folder, _read_all(tensors), trust_remote_code=trust_remote_code)
            if attn_implementation is not None:
                model.set_attn_implementation(attn_implementation)
            half = {"float16": model.half, "bfloat16": model.bfloat16}.get(dtype)
            return model if half is None else half()
    if quantization is not None:
        imports.load_bitsandbytes()
    else:
        imports.load_inference()
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils import logging

    options: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
        "local_files_only": True,
        "output_loading_info": True,
    }
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if quantization is not None:
        options["quantization_config"] = _four_bit(quantization, matrices, classifier)
        device_map = device_map or {"": "cpu"}
    if device_map is not None:
        options["device_map"] = device_map
    logging.disable_progress_bar()
    hf_config = _hf_config(folder, config, trust_remote_code)
    loader = AutoModelForCausalLM
    if classifier is not None:
        loader = AutoModelForSequenceClassification
        _set_classes(hf_config, classifier)
    try:
        model, info = loader.from_pretrained(folder, config=hf_config, **options)
    except _loading_errors() as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {_first_line(error)}", hint="is the download complete?"
        ) from error
    _refuse_missing(folder, set(info["missing_keys"]) - new)
    if quantization is not None:
        _keep_four_bits(model, set(_quantized(matrices, classifier)), folder)
    return model


def _keep_four_bits(model: Any, wanted: set[str], folder: Path) -> None:
    """Check which layers bitsandbytes quantized, and keep it from repacking them: see the top of the module."""
    layers = four_bit_layers(model)
    if set(layers) != wanted:
        odd = sorted(set(layers) ^ wanted)
        raise CheckpointError(f"bitsandbytes quantized other layers of {folder} than asked, the first: {odd[0]}")
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False


def _read_all(tensors: Checkpoint) -> dict[str, torch.Tensor]:
    import numpy as np
    import torch

    found = {}
    for info in tensors.infos():
        array = np.array(tensors.read(info.name))
        # torch knows the types of ml_dtypes only by their bits.
        bits = {"bfloat16": np.int16}.get(info.dtype)
        tensor = torch.from_numpy(array if bits is None else array.view(bits))
        found[info.name] = tensor if bits is None else tensor.view(torch.bfloat16)
    return found


def load_outline(folder: Path, weights: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The float32 model of a folder whose parameters are what `weights` gives, names as in a checkpoint.

    `weights` goes to Transformers' own loader: names are converted, ties and buffers made, and missing ones refused as
    in `load_model`. Its values may be stand-ins that yield tensors without memory (device `meta`). A mark of
    quantization in config.json is ignored: `weights` says what the weights are.
    """
    config = _readable_config(folder, trust_remote_code)
    imports.load_inference()
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    hf_config = _hf_config(folder, config, trust_remote_code)
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
    try:
        with torch.device("meta"):
            model_class = type(AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code))
        model, info = model_class.from_pretrained(
            None, config=hf_config, state_dict=dict(weights), dtype=torch.float32, output_loading_info=True
        )
    except _loading_errors() as error:
        raise CheckpointError(
            f"{folder} cannot be loaded: {_first_line(error)}", hint="is the download complete?"
        ) from error
    _refuse_missing(folder, info["missing_keys"])
    return model


def _readable_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if "auto_map" in config and not trust_remote_code and not _known_type(config):
        raise UnsupportedModelError(
            f"{folder} needs the checkpoint's own Python code", hint="read it, then run with --trust-remote-code"
        )
    return config


def _refuse_missing(folder: Path, missing: Collection[str]) -> None:
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of the model, the first: {min(missing)}",
            hint="Transformers would fill them with random numbers; is the download complete?",
        )


def _hf_config(folder: Path, config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Transformers' config of a folder. A padding id outside the vocabulary is dropped: it could not be embedded.

    Phi3Config, for one, pads with 32000 where config.json says nothing, whatever the vocabulary.
    """
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except _loading_errors() as error:
        if not _known_type(config) and not trust_remote_code:
            raise UnsupportedModelError(
                f"the installed Transformers does not know the model type {config.get('model_type')!r}",
                hint="upgrade transformers",
            ) from error
        raise CheckpointError(
            f"{folder / 'config.json'} is refused by Transformers: {_first_line(error)}",
            hint="correct the key in config.json, or download the model again",
        ) from error
    text = found.get_text_config()
    pad, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(pad, int) and isinstance(vocabulary, int) and not 0 <= pad < vocabulary:
        text.pad_token_id = None
    return found


def _loading_errors() -> tuple[type[Exception], ...]:
    """What Transformers raises for a folder that it cannot read."""
    from huggingface_hub.errors import StrictDataclassError

    return (OSError, ValueError, KeyError, RuntimeError, TypeError, StrictDataclassError)


def _first_line(error: Exception) -> str:
    """What the library says, on one line; with its type where that alone says little."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}" if isinstance(error, KeyError) else said


def load_dequantized(
    folder: Path,
    quantization: BaseQuantization,
    *,
    trust_remote_code: bool = False,
    classifier: Mapping[str, Any] | None = None,
) -> Any:
    """The model that a QLoRA adapter was trained on, as a plain float32 model; bitsandbytes makes its weights."""
    imports.load_bitsandbytes()
    import torch

    linear = torch.nn.Linear
    model = load_model(
        folder,
        dtype=quantization.compute_dtype,
        trust_remote_code=trust_remote_code,
        quantization=quantization,
        classifier=classifier,
    )
    for name, layer in four_bit_layers(model).items():
        weight = dequantized(layer)
        plain = linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            plain.bias = layer.bias
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, plain)
    # The marks of a quantized model would keep Transformers and PEFT from treating it as the plain one it now is.
    for mark in ("is_loaded_in_4bit", "is_quantized", "hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            delattr(model, mark)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()
    return model


def dequantized(layer: Any) -> torch.Tensor | None:
    """The weight that a 4-bit layer of bitsandbytes stands for, in its compute type; None for another layer."""
    import bitsandbytes

    if not isinstance(layer, bitsandbytes.nn.Linear4bit):
        return None
    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return found


def load_adapter(model: Any, adapter: Path) -> Any:
    """Put a trained PEFT adapter on a model, for evaluation; raises CheckpointError."""
    imports.load_training()
    from peft import PeftModel

    with TensorSet.open(adapter / "adapter_model.safetensors"):
        pass
    try:
        with imports.quiet_renames():
            return PeftModel.from_pretrained(model, adapter, is_trainable=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"the adapter {adapter} does not fit the model: {error}") from error


def four_bit_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The bitsandbytes 4-bit layers of a model, by module name."""
    import bitsandbytes

    return {name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}


def _set_classes(hf_config: Any, classifier: Mapping[str, Any]) -> None:
    """What makes a classifier's config of a language model's."""
    hf_config.id2label = dict(enumerate(labels_of(classifier)))
    hf_config.label2id = {label: index for index, label in hf_config.id2label.items()}
    hf_config.problem_type = "single_label_classification"
    if isinstance(classifier.get("pad_token_id"), int):
        hf_config.get_text_config().pad_token_id = classifier["pad_token_id"]


def _known_type(config: Mapping[str, Any]) -> bool:
    from transformers.models.auto import modeling_auto as known

    kind = config.get("model_type")
    return kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        kind in known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    )


def _quantized(matrices: Mapping[str, tuple[int, ...]], classifier: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    head: tuple[str, ...] = ()
    if classifier is not None:
        layout = classifier_layout(classifier)
        head = (*layout.head_modules, *(name.removesuffix(".weight") for name in layout.pooler))
    plain = {name: shape for name, shape in matrices.items() if "embed" not in name and not name.startswith(head)}
    return four_bit_names({name: (shape[0], shape[1]) for name, shape in plain.items()})


def _four_bit(
    quantization: BaseQuantization,
    matrices: Mapping[str, tuple[int, ...]],
    classifier: Mapping[str, Any] | None = None,
) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        # A tied head has no tensor of its own.
        llm_int8_skip_modules=sorted({"lm_head", *matrices} - set(_quantized(matrices, classifier))),
    )
