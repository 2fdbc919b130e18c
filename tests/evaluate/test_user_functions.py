"""The user's own Python: called as Olive calls it, and whatever is wrong with it is told with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coldpress.artifacts.base import Artifact
from coldpress.config.metrics import CustomMetric
from coldpress.errors import PlanError, StepError
from coldpress.evaluate.bench import Bench
from coldpress.evaluate.measure import refusal
from coldpress.evaluate.user_functions import measure

Benches = Callable[..., Bench]

SCRIPT = """
import math

import beside


def devices(model, device, execution_providers, factor=1):
    return factor * (100 * (device == "cpu") + 10 * (execution_providers == ["CPUExecutionProvider"]) + beside.THREE)


def forward(model, device, execution_providers):
    if model.model_path.endswith(".onnx"):
        return {"inputs": len(model.prepare_session().get_inputs()), "loaded": model.load_model() == model.model_path}
    return {"inputs": model.load_model().config.vocab_size, "tokens": len(model.tokenizer.ids("abc"))}


def right(output, targets, scale=1.0):
    assert output.preds.shape == targets.shape and output.logits.shape == (len(targets), len(output.labels))
    assert (output.logits.argmax(dim=1) == output.preds).all()
    return {"right": scale * (output.preds == targets).float().mean(), "labels": len(output.labels)}


def raises(model, device, execution_providers):
    return 1 / (len(model.model_path) - len(model.model_path))


def nothing(model, device, execution_providers):
    return math.nan


def text(model, device, execution_providers):
    return "0.9"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "beside.py").write_text("THREE = 3\n")
    path = tmp_path / "own.py"
    path.write_text(SCRIPT)
    return path


def metric(script: Path, *names: str, data: str | None = None, **user: Any) -> CustomMetric:
    return CustomMetric.model_validate(
        {
            "name": "own", "type": "custom", "sub_types": [{"name": name} for name in names], "data_config": data,
            "user_config": {"user_script": str(script), "script_dir": str(script.parent / "lib"), **user},
        }
    )  # fmt: skip


def test_the_whole_evaluation_is_the_users(script: Path, tiny_phi3: Path, bench_of: Benches) -> None:
    (found,) = measure(metric(script, "n", evaluate_func="devices"), bench_of(tiny_phi3))
    assert (found.sub_type, found.value, found.n, found.standard_error) == ("n", 113, 1, None)
    (doubled,) = measure(
        metric(script, "n", evaluate_func="devices", evaluate_func_kwargs={"factor": 2}), bench_of(tiny_phi3)
    )
    assert doubled.value == 226


def test_the_model_as_olives_handlers_offer_it(
    script: Path, tiny_phi3: Path, tiny_onnx: Artifact, bench_of: Benches
) -> None:
    found = measure(metric(script, "inputs", "tokens", evaluate_func="forward"), bench_of(tiny_phi3))
    assert [one.value for one in found] == [260, 3]
    (inputs,) = measure(metric(script, "inputs", evaluate_func="forward"), bench_of(tiny_onnx))
    assert inputs.value == 6, "ids, mask, two layers of keys and values"


def test_the_number_is_the_users(script: Path, tiny_phi3: Path, make_data: Any, bench_of: Benches) -> None:
    rows = [(f"text {number}", ("joy", "sad", "fear")[number % 3]) for number in range(9)]
    bench = bench_of(tiny_phi3, make_data(rows))
    right, labels = measure(metric(script, "right", "labels", data="rows", metric_func="right"), bench)
    assert (labels.value, right.n) == (3, 9)
    from coldpress.config.metrics import AccuracyMetric
    from coldpress.evaluate.accuracy import measure as of_accuracy

    (accuracy,) = of_accuracy(AccuracyMetric(name="a", type="accuracy", data_config="rows"), bench)
    assert right.value == pytest.approx(accuracy.value)
    scaled = metric(script, "right", data="rows", metric_func="right", metric_func_kwargs={"scale": 3.0})
    assert measure(scaled, bench)[0].value == pytest.approx(3 * accuracy.value)


def test_what_goes_wrong_in_it_is_told(script: Path, tiny_phi3: Path, bench_of: Benches) -> None:
    bench = bench_of(tiny_phi3)
    with pytest.raises(StepError, match=r"raises of .*own\.py raised ZeroDivisionError: .* at line 24 \(return 1 /"):
        measure(metric(script, "n", evaluate_func="raises"), bench)
    with pytest.raises(StepError, match=r"nothing of .*own\.py gave nan for n, which is no number"):
        measure(metric(script, "n", evaluate_func="nothing"), bench)
    with pytest.raises(StepError, match=r"text of .*own\.py must give a number for n, it gave '0\.9'"):
        measure(metric(script, "n", evaluate_func="text"), bench)
    with pytest.raises(StepError, match="gives no number 'input'; it gives: inputs, tokens") as caught:
        measure(metric(script, "input", evaluate_func="forward"), bench)
    assert caught.value.hint == "did you mean inputs?"
    with pytest.raises(StepError, match="gives one number, and own has 2 sub types"):
        measure(metric(script, "a", "b", evaluate_func="devices"), bench)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return np.array([1.0, 2.0])", r"f of .*own\.py must give a number for n, it gave array\(\[1\., 2\.\]\)"),
        ("return torch.tensor([1.0, 2.0])", r"f of .*own\.py must give a number for n, it gave tensor"),
        ("return 10**400", r"f of .*own\.py gave inf for n"),
        ("return -(10**9999)", r"f of .*own\.py gave -inf for n"),
        ("raise Mute", r"f of .*own\.py raised Mute: <exception str\(\) failed> at line 8"),
    ],
)
def test_odd_results_and_errors(body: str, said: str, tmp_path: Path, tiny_phi3: Path, bench_of: Benches) -> None:
    mute = "class Mute(Exception):\n    def __str__(self):\n        raise ValueError\n"
    (tmp_path / "own.py").write_text(f"import numpy as np\nimport torch\n{mute}\ndef f(*_):\n    {body}\n")
    (tmp_path / "lib").mkdir()
    with pytest.raises(StepError, match=said):
        measure(metric(tmp_path / "own.py", "n", evaluate_func="f"), bench_of(tiny_phi3))


def test_a_script_that_cannot_be_used(script: Path, tmp_path: Path, tiny_phi3: Path, bench_of: Benches) -> None:
    bench = bench_of(tiny_phi3)
    with pytest.raises(PlanError, match="has no function 'devcies'") as caught:
        measure(metric(script, "n", evaluate_func="devcies"), bench)
    assert caught.value.hint == "did you mean devices?"
    script.write_text("raise RuntimeError('at import')\n")
    with pytest.raises(StepError, match=r"the script .* raised RuntimeError: at import at line 1"):
        measure(metric(script, "n", evaluate_func="devices"), bench)
    with pytest.raises(PlanError, match="there is no script"):
        measure(metric(tmp_path / "lost.py", "n", evaluate_func="devices"), bench)


def test_a_plan_sees_it_without_running_it(script: Path, tmp_path: Path) -> None:
    script.write_text("import os as devices\nraise RuntimeError\nfrom a import b\nclass C: ...\nx = y = lambda: 1\n")
    for name in ("devices", "b", "C", "x", "y"):
        assert refusal(metric(script, "n", evaluate_func=name), None) is None
    message, hint = refusal(metric(script, "n", evaluate_func="device"), None) or ("", "")
    assert "has no function 'device'" in message
    assert hint == "did you mean devices?"
    script.write_text(
        "try:\n    import fast\nexcept ImportError:\n    def a(*_): ...\nif True:\n    b = a\n"
        "c: object = a\nd, (e, f) = a, (a, a)\nwith open(x) as g: ...\nasync def late(*_): ...\n"
    )
    for name in "abcdefg":
        assert refusal(metric(script, "n", evaluate_func=name), None) is None
    assert "late of " in (refusal(metric(script, "n", evaluate_func="late"), None) or ("", ""))[0]
    assert "has no function 'x'" in (refusal(metric(script, "n", evaluate_func="x"), None) or ("", ""))[0]
    script.write_text("def f(:\n")
    assert "is no Python" in (refusal(metric(script, "n", evaluate_func="f"), None) or ("", ""))[0]
    assert "there is no script" in (refusal(metric(tmp_path / "x.py", "n", evaluate_func="f"), None) or ("", ""))[0]
