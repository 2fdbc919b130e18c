"""Text from a model: what cannot be sampled, cannot be read or cannot be run is refused, and nothing hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from coldpress.chat import Sampling, open_generator
from coldpress.cli.talk import generate
from coldpress.errors import ColdpressError, UsageError
from fakes.tiny_models import make_checkpoint
from oracles.passes import build_with_pass


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), family="llama", dtype="float32")


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Callable[..., Path]:
    pytest.importorskip("onnxruntime_genai")

    def build(**options: Any) -> Path:
        target = tmp_path_factory.mktemp("onnx")
        build_with_pass(llama, target, precision="fp32", **options).save()
        return target

    return build


@pytest.fixture(scope="module")
def plain(onnx: Callable[..., Path]) -> Path:
    return onnx()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": 1e-46}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_sampled_with_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Sampling(**options)


def test_the_command_refuses_before_it_loads_a_model(tmp_path: Path) -> None:
    arguments = [str(tmp_path / "none"), "-p", "hi", "--seed", "99999999999999999999"]
    assert "seed is 0 to" in str(CliRunner().invoke(generate, arguments).exception)
    outcome = CliRunner().invoke(generate, [str(tmp_path / "none"), "-p", "-"], input=b"\xff\xfe")
    assert isinstance(outcome.exception, UsageError)
    assert "not UTF-8" in str(outcome.exception)


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_every_seed_that_is_allowed_samples_the_same_again(kind: str, llama: Path, plain: Path) -> None:
    generator = open_generator(llama if kind == "checkpoint" else plain)
    sampling = Sampling(12, temperature=1.0, seed=2**63 - 1)
    first, second = ("".join(generator.stream("ab", sampling)) for _ in range(2))
    assert first == second
    assert first != "".join(generator.stream("ab", Sampling(12, temperature=1.0, seed=5)))


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_prompts_that_are_no_text_are_refused(kind: str, llama: Path, plain: Path) -> None:
    generator = open_generator(llama if kind == "checkpoint" else plain)
    with pytest.raises(UsageError, match="not UTF-8: character 3"):
        list(generator.stream("ab\udcff", Sampling(2)))
    with pytest.raises(UsageError, match="is empty"):
        list(generator.stream("", Sampling(2)))


def test_a_failure_of_transformers_reaches_the_caller(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator: Any = open_generator(llama)

    def broken(**options: Any) -> None:
        options["streamer"].put(options["input_ids"])
        raise RuntimeError("probability tensor contains inf")

    monkeypatch.setattr(generator._model, "generate", broken)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            list(generator.stream("ab", Sampling(2)))
        except ColdpressError as error:
            caught.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive(), "the reader waits for tokens that never come"
    assert "probability tensor contains inf" in str(caught[0])


def test_a_reader_that_goes_away_ends_the_generation(llama: Path) -> None:
    generator = open_generator(llama)
    before = threading.active_count()
    pieces = generator.stream("ab", Sampling(100_000))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= before  # threads of other tests may end meanwhile


def test_a_token_without_a_row_is_named(llama: Path) -> None:
    generator: Any = open_generator(llama)
    generator._vocab = 256
    with pytest.raises(UsageError, match=r"256 tokens.*'<s>' \(256\)"):
        list(generator.stream("a<s>", Sampling(2)))


def test_a_prompt_beyond_the_context_is_refused_with_a_way_out(plain: Path) -> None:
    with pytest.raises(UsageError, match=r"128 tokens.*is 128\n  hint: shorten the prompt to 127"):
        list(open_generator(plain).stream("a" * 128, Sampling(2)))


@pytest.mark.parametrize(("option", "part"), [("exclude_embeds", "embedding"), ("exclude_lm_head", "head")])
def test_a_model_without_an_end_says_so(option: str, part: str, onnx: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=rf"built without its {part} \({option}\)"):
        open_generator(onnx(**{option: True}))
