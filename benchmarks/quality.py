"""What int4 costs a model: KL, top-1 agreement and perplexity of builder settings against the checkpoint, on text.

    python benchmarks/quality.py MODEL [--text FILE --field NAME] [--tokens 8192] [--set profiles|methods|prompts]

MODEL is a checkpoint folder; without --text the bundled text of the proof is used. No peer: the settings are compared
with each other.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from side_by_side import machine

from coldpress.artifacts.base import Artifact
from coldpress.config.schema import Accelerator
from coldpress.data.tokenizer import Tokenizer
from coldpress.evaluate.divergence import compare
from coldpress.evaluate.runners import open_runner
from coldpress.evaluate.texts import SEQUENCE_TOKENS, text_sequences
from coldpress.hardware import detect
from coldpress.passes.base import Context
from coldpress.passes.model_builder import ModelBuilder, ModelBuilderConfig

SETS: Mapping[str, list[dict[str, Any]]] = {
    "profiles": [{"profile": name} for name in ("fast", "balanced", "accurate")],
    "methods": [
        {"int4_block_size": block, "int4_algo_config": method, "int4_is_symmetric": symmetric}
        for block in (32, 128)
        for method, symmetric in (("rtn", True), ("rtn", False), ("k_quant", True), ("k_quant", False), ("hqq", False))
    ],
    "prompts": [{"profile": name, "prompt_graph": how} for name in ("fast", "balanced") for how in (None, "int8")],
}


def sequences_of(tokenizer: Tokenizer, text: Path | None, field: str, tokens: int) -> list[list[int]]:
    if text is None:
        return text_sequences(tokenizer, tokens=tokens)
    found, count = [], 0
    for line in text.read_text(encoding="utf-8").splitlines():
        ids = list(tokenizer.ids(json.loads(line)[field]))[:SEQUENCE_TOKENS]
        if len(ids) > 1:
            found.append(ids)
            count += len(ids) - 1
        if count >= tokens:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, help="a .jsonl file")
    parser.add_argument("--field", default="text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--set", choices=SETS, default="profiles")
    options = parser.parse_args()
    source = Artifact.load(options.model)
    sequences = sequences_of(Tokenizer.load(options.model), options.text, options.field, options.tokens)
    print(f"{options.model.name}, {sum(len(one) - 1 for one in sequences)} tokens; {machine()}\n")
    print("| setting | KL | top-1 | perplexity (se of the change) | MB |\n| --- | --- | --- | --- | --- |")
    with open_runner(source) as reference:
        for chosen in SETS[options.set]:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder)
                context = Context("build", out, out, detect(), Accelerator(), {}, lambda event: None)
                built = ModelBuilder().run(ModelBuilderConfig(precision="int4", **chosen), source, context)
                size = sum(file.stat().st_size for file in out.glob("*.data"))
                with open_runner(built) as candidate:
                    found = compare(reference, candidate, sequences)
            change = found.perplexity / found.perplexity_reference - 1
            print(f"| {', '.join(f'{key} {value}' for key, value in chosen.items() if value is not None)} "
                  f"| {found.kl:.4f} | {found.top1_agreement:.1%} | {found.perplexity_reference:.2f} -> "
                  f"{found.perplexity:.2f}, {change:+.1%} ({found.standard_error:.1%}) | {size / 1e6:.2f} |",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
