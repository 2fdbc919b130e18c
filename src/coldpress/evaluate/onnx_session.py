"""Sessions of ONNX Runtime, and whether a model's execution provider is here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coldpress.errors import CheckpointError, StepError
from coldpress.hardware import NVIDIA_PROVIDERS, detect

__all__ = ["onnxruntime_errors", "open_session", "provider_here", "require_provider"]


def open_session(
    graph: Path, provider: str, threads: int | None = None, entries: Mapping[str, str] | None = None
) -> Any:
    """An ONNX Runtime session; raises CheckpointError, and StepError for a provider that is not there."""
    import onnxruntime

    require_provider(provider)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or detect().threads
    options.log_severity_level = 3
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    try:
        session = onnxruntime.InferenceSession(str(graph), options, providers=[provider])
    except onnxruntime_errors() as error:
        raise CheckpointError(f"ONNX Runtime cannot load {graph}: {error}") from error
    if provider not in session.get_providers():  # it goes on with the CPU where the device or a library is missing
        raise StepError(
            f"the model is built for {provider}, which the installed ONNX Runtime has but cannot use here",
            hint="`coldpress doctor` shows the machine; are the device, its driver and the provider's libraries there?",
        )
    return session


def provider_here(provider: str) -> bool:
    """Whether models for an execution provider can be expected to run on this machine."""
    import onnxruntime

    lacks_gpu = provider in NVIDIA_PROVIDERS and not detect().gpus
    return provider in onnxruntime.get_available_providers() and not lacks_gpu


def require_provider(provider: str) -> None:
    """Raise StepError for an execution provider that the installed ONNX Runtime does not have."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise StepError(
            f"the model is built for {provider}, which the installed ONNX Runtime does not have",
            hint=f"it has: {', '.join(onnxruntime.get_available_providers())}",
        )


def onnxruntime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions share no base class but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented", "EPFail")
    found = [getattr(state, name) for name in names if hasattr(state, name)]
    return (RuntimeError, ValueError, OSError, *found)
