"""llama.cpp as a peer: its environment, and the three things it is measured at.

    PYTHON benchmarks/peer_llama_cpp.py build CHECKPOINT FOLDER     convert to bf16 GGUF, then Q4_0, as a user does it
    PYTHON benchmarks/peer_llama_cpp.py quantize BF16 OUTPUT TYPE   q4_0 or q4_k_m, on all cores
    PYTHON benchmarks/peer_llama_cpp.py generate GGUF PROMPT NEW THREADS REPEATS

PYTHON is that of the peer's environment (`python()`): llama-cpp-python compiled for this machine's processor. The
converter comes with the same source archive (`source()`, given as LLAMA_CPP). The models here have no tokenizer worth
the name, so the converter's is left out; all else is llama.cpp's own.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

__all__ = ["NAME", "REQUIREMENTS", "python", "source"]

RELEASE = "0.3.36"
REQUIREMENTS = (f"llama-cpp-python=={RELEASE}", "gguf==0.19.0", "torch==2.13.0", "transformers==5.23.0")
NAME = "llama.cpp 0c1e570"
"""The commit that the release holds."""
BARRIERS = Path(__file__).resolve().with_name("amx_barriers.h")
FLAGS = {
    "CMAKE_ARGS": f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-include {BARRIERS}'",
    "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
}
FILE_TYPES = {"q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0", "q4_k_m": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}


def python() -> str:
    """The Python of the peer's environment; compiles llama.cpp at first use (minutes)."""
    from side_by_side import peer_python

    return peer_python("llama-cpp", ("--no-cache-dir", "--no-binary=llama-cpp-python", *REQUIREMENTS), FLAGS)


def source() -> Path:
    """The folder with convert_hf_to_gguf.py, taken from the source archive of the release."""
    from side_by_side import HERE

    folder = HERE / ".envs" / "llama-cpp-source"
    found = folder / f"llama_cpp_python-{RELEASE}" / "vendor" / "llama.cpp"
    if not (found / "convert_hf_to_gguf.py").is_file():
        wanted = ["--no-deps", "--no-binary=:all:", f"llama-cpp-python=={RELEASE}", "-d", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wanted], check=True)
        with tarfile.open(folder / f"llama_cpp_python-{RELEASE}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return found


def _convert(checkpoint: str, output: str) -> None:
    sys.path.insert(0, os.environ["LLAMA_CPP"])
    import convert_hf_to_gguf
    from conversion.llama import LlamaModel

    def without_tokenizer(self) -> None:  # type: ignore[no-untyped-def]
        self.gguf_writer.add_tokenizer_model("none")

    LlamaModel.set_vocab = without_tokenizer
    sys.argv = ["convert_hf_to_gguf.py", checkpoint, "--outtype", "bf16", "--outfile", output]
    convert_hf_to_gguf.main()


def _quantize(bf16: str, output: str, kind: str) -> None:
    import llama_cpp as lib

    parameters = lib.llama_model_quantize_default_params()
    parameters.nthread = os.cpu_count()
    parameters.ftype = getattr(lib, FILE_TYPES[kind])
    if lib.llama_model_quantize(bf16.encode(), output.encode(), ctypes.byref(parameters)):
        raise SystemExit("llama_model_quantize failed")


def _build(checkpoint: str, folder: str) -> None:
    bf16, q4 = Path(folder) / "model-bf16.gguf", Path(folder) / "model-q4_0.gguf"
    for step in (("convert", checkpoint, str(bf16)), ("quantize", str(bf16), str(q4), "q4_0")):
        started = time.perf_counter()
        subprocess.run([sys.executable, __file__, *step], check=True)
        print(f"{step[0]}: {time.perf_counter() - started:.2f} s", flush=True)


def _generate(gguf: str, prompt: int, new: int, threads: int, repeats: int) -> None:
    """Seconds of the prompt and of `new` greedy tokens after it, as JSON; the first, warming round is left out."""
    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(gguf.encode(), lib.llama_model_default_params())
    parameters = lib.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = prompt + new + 16, prompt, prompt
    parameters.n_threads = parameters.n_threads_batch = threads
    context = lib.llama_init_from_model(model, parameters)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    tokens = (ctypes.c_int32 * prompt)(*np.random.default_rng(0).integers(2, vocabulary, prompt))
    one = (ctypes.c_int32 * 1)()

    def step(ids, count: int) -> int:  # type: ignore[no-untyped-def]
        if lib.llama_decode(context, lib.llama_batch_get_one(ids, count)):
            raise SystemExit("llama_decode failed")
        logits = lib.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

    rounds = []
    for _ in range(repeats + 1):
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        start = time.perf_counter()
        one[0] = step(tokens, prompt)
        first = time.perf_counter()
        for _ in range(new):
            one[0] = step(one, 1)
        rounds.append((first - start, time.perf_counter() - first))
    system = lib.llama_print_system_info().decode()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    print(json.dumps({"rounds": rounds[1:], "system": system, "resident": peak}))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "generate":
        _generate(rest[0], *map(int, rest[1:]))
    else:
        {"build": _build, "convert": _convert, "quantize": _quantize}[verb](*rest)
