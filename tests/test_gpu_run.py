"""`make gpu` as far as it goes without a GPU: what it says here, and how it runs steps that fail, hang or are late."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOT_THERE = ("bitsandbytes", "datasets", "deepspeed", "evaluate", "gguf", "mypy", "peft", "torchao", "trl")
"""Packages of the tests that a machine with a GPU need not have."""


@pytest.fixture(scope="module")
def load() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "benchmarks")
        yield importlib.import_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_missing_in_a_line_and_runs_nothing(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load("gpu").main(["--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.startswith("Nothing was run on a GPU: ")
    assert ("a build without CUDA" in printed) == (torch.version.cuda is None)
    assert not (tmp_path / "out").exists()


def test_the_line_for_each_thing_that_is_missing(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = load("gpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "DRIVER", (str(ROOT),))
    assert gpu.why_not() == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.why_not() == ["PyTorch sees no GPU"]
    monkeypatch.setattr(gpu, "DRIVER", (str(ROOT / "nowhere"),))
    assert gpu.why_not() == ["there is no NVIDIA driver"]
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert "PyTorch is not installed" in gpu.why_not()[0]


def test_every_step_runs_whatever_became_of_the_others(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = load("gpu")
    child = "import subprocess; p = subprocess.Popen(['sleep', '60']); print('child', p.pid, flush=True); p.wait()"
    chosen = [
        gpu.Step("broken", 20, ["-c", "raise SystemExit('no such kernel')"]),
        gpu.Step("hangs", 1.5, ["-c", child]),
        gpu.Step("works", 20, ["-c", "import os; print('offline', os.environ['HF_HUB_OFFLINE'])"]),
    ]
    summary = gpu.run_all(chosen, tmp_path)
    assert [(r.name, r.status) for r in summary.results] == [
        ("broken", "failed"), ("hangs", "timed out"), ("works", "passed"),
    ]  # fmt: skip
    log = (tmp_path / "log.txt").read_text()
    assert "no such kernel" in log
    assert "offline 1" in log
    assert "offline 1" in capsys.readouterr().out
    number = int(log.partition("child ")[2].split()[0])
    for _ in range(50):  # the kernel takes a moment
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child of a step that timed out still runs")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert [result["status"] for result in written["results"]] == ["failed", "timed out", "passed"]
    late = gpu.run_all(chosen[2:], tmp_path, limit=3)
    assert late.results[0].status == "left out"


def test_the_steps_are_commands_that_exist_and_end_in_nine_minutes(load: Any, tmp_path: Path) -> None:
    gpu = load("gpu")
    tests, *benchmarks = gpu.steps(tmp_path)
    assert sum(step.limit for step in (tests, *benchmarks)) <= gpu.LIMIT <= 9 * 60
    assert all(step.limit < 120 for step in benchmarks)
    files = [word for word in tests.words if word.endswith(".py")]
    assert {"tests/train/test_gpu.py", "tests/test_devices.py"} <= set(files)
    for step in benchmarks:
        script, *words = step.words
        options = load(Path(script).stem).parse(words)
        assert options.preset == "h200"
        assert options.json == tmp_path / f"{step.name}.json"


def test_the_checkout_is_small_enough_to_travel() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 64 * 2**20


def test_without_peft_its_variants_are_left_out(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = load("variants")
    names = ["frozen", "peft", "peft_compiled", "ours"]
    assert variants.runnable(names) == names
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    assert variants.runnable(names) == ["frozen", "ours"]
    assert "without peft, peft_compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_tests_need_few_packages() -> None:
    """The files are collected, and their tests for the CPU pass, without the packages that may be missing."""
    files = ["tests/train/test_gpu.py", "tests/test_devices.py"]
    code = f"import sys; sys.modules.update(dict.fromkeys({NOT_THERE!r})); import pytest; sys.exit(pytest.main(%r))"
    words = ["-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    done = subprocess.run(
        [sys.executable, "-c", code % words], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "bitsandbytes" not in done.stderr
