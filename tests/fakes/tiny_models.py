"""Random checkpoints that take milliseconds: made by Transformers itself, with a byte-level tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from coldpress.nn import imports

__all__ = ["VOCABULARY", "export_encoder", "make_checkpoint", "make_encoder", "make_tokenizer"]

VOCABULARY = 260
"""256 bytes and 4 special tokens."""


def make_tokenizer(folder: Path, *, bos: bool = True) -> None:
    """One token a byte; `<s>`, `</s>`, `<pad>`, `<|end|>` after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<pad>", "<|end|>")])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "chat_template": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    }
    if bos:
        config["bos_token"] = "<s>"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_checkpoint(folder: Path, *, family: str = "phi3", dtype: str = "bfloat16", seed: int = 0, **more: Any) -> Path:
    """A two-layer model with hidden size 64, and its tokenizer. `more` goes into its config."""
    imports.load_training()
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
    )

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
        "initializer_range": 0.2,
        **more,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "phi3":
            model = Phi3ForCausalLM(Phi3Config(**sizes, original_max_position_embeddings=128, sliding_window=None))
        elif family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def make_encoder(
    folder: Path, *, family: str = "bert", form: str = "AutoModel", labels: tuple[str, ...] = (), seed: int = 0
) -> Path:
    """A two-layer encoder as an Auto class saves it: the bare model, with a head for masked words, or for classes."""
    imports.load_training()
    import torch
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 96, "max_position_embeddings": 390, "pad_token_id": 258}  # fmt: skip
    if family == "distilbert":
        sizes = {"vocab_size": VOCABULARY, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96,
                 "max_position_embeddings": 390, "pad_token_id": 258}  # fmt: skip
    config = transformers.AutoConfig.for_model(family, **sizes)
    if labels:
        form = "AutoModelForSequenceClassification"
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, form).from_config(config)
        for name, value in model.named_parameters():
            if value.dim() == 2 and "embed" not in name:
                value.data.normal_(std=0.2)
    model.save_pretrained(folder)
    make_tokenizer(folder, bos=False)
    path = folder / "tokenizer_config.json"
    record = json.loads(path.read_text())
    record.update({"cls_token": "<s>", "sep_token": "</s>"})
    del record["eos_token"], record["chat_template"]
    path.write_text(json.dumps(record))
    return folder


def export_encoder(checkpoint: Path, folder: Path) -> Path:
    """The same encoder as a graph of its own, by torch's exporter, with config and tokenizer beside it."""
    import shutil

    import torch
    from transformers import AutoModel, AutoModelForSequenceClassification

    classifies = "ForSequenceClassification" in (checkpoint / "config.json").read_text()
    kind = AutoModelForSequenceClassification if classifies else AutoModel
    model = kind.from_pretrained(checkpoint, attn_implementation="eager").eval()
    output = "logits" if classifies else "last_hidden_state"

    class Named(torch.nn.Module):
        """Inputs by position, one output: what the exporter can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types)[output]

    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.suffix != ".safetensors":
            shutil.copy(path, folder)
    ids = torch.ones((2, 5), dtype=torch.int64)
    dynamic = {0: "rows", 1: "tokens"}
    torch.onnx.export(
        Named(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), str(folder / "model.onnx"), dynamo=False,
        input_names=["input_ids", "attention_mask", "token_type_ids"],
        output_names=[output],
        dynamic_axes=dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), dynamic),
    )  # fmt: skip
    return folder
