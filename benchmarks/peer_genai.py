"""onnxruntime-genai generating, timed; for models of its own builder and for ours alike.

    PYTHON benchmarks/peer_genai.py FOLDER PROMPT NEW THREADS REPEATS

Prints as JSON the peak resident bytes of the process, and the seconds of a prompt of PROMPT random tokens up to the
first new token, and of NEW greedy tokens after it, for each repeat but a first one that warms up. THREADS 0 leaves
genai_config.json as it is.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path


def main(folder: str, prompt: int, new: int, threads: int, repeats: int) -> None:
    import numpy as np
    import onnxruntime_genai as og

    config = og.Config(folder)
    if threads:
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)
    vocabulary = json.loads((Path(folder) / "genai_config.json").read_text())["model"]["vocab_size"]
    tokens = np.random.default_rng(0).integers(2, vocabulary, prompt).astype(np.int32)
    rounds = []
    for _ in range(repeats + 1):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=prompt + new + 16, do_sample=False)
        generator = og.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(tokens[None])
        generator.generate_next_token()  # picks from the prompt's logits; each later call runs the model once
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        rounds.append((first - start, time.perf_counter() - first))
    print(json.dumps({"rounds": rounds[1:], "resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
