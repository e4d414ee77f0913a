"""Everything of this project that wants a GPU, in one run of at most nine minutes: `make gpu`.

    python examples/benchmarks/gpu.py [--out out/gpu] [--only tests memory]

The tests marked gpu, then the benchmarks at the sizes of one large GPU, each in a process with its own time limit. A
step that fails does not stop the next one. The folder gets `summary.json`, `log.txt`, the tests' results and a JSON
file for each benchmark, which report.py turns into tables. The exit code is 0 if every step passed, 1 if one failed,
and 2 if nothing was run because something is missing. Nothing is installed, and no network is used.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 520
"""Seconds for all steps; nine minutes leave room for starting them."""

DRIVER = ("/proc/driver/nvidia/version", "/dev/nvidiactl")


@dataclass
class Step:
    """A command of Python, and the seconds that it may take."""

    name: str
    limit: float
    words: list[str]


@dataclass
class Result:
    name: str
    words: list[str]
    status: str  # passed, failed, timed out, or left out
    seconds: float = 0.0
    code: int | None = None


@dataclass
class Summary:
    missing: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)


def steps(out: Path) -> list[Step]:
    """What is run, in order; a benchmark writes its table to a file of its own name."""
    marked = [f for f in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
    tests = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]

    def benchmark(name: str, script: str, limit: float, *words: str) -> Step:
        file = str(ROOT / "examples" / "benchmarks" / f"{script}.py")
        return Step(name, limit, [file, "--preset", "h200", "--json", str(out / f"{name}.json"), *words])

    eager = ("frozen", "peft", "peft_same", "ours", "full")
    return [
        Step("tests", 150, [*tests, *(str(file.relative_to(ROOT)) for file in marked)]),
        benchmark("train_step", "train_step", 110, "--dropout", "0.05", "--variants", *eager),
        benchmark("memory", "memory", 60, "--dropout", "0.05"),
        benchmark("decode", "decode", 90),
        # Compiling takes most of the time, so it comes last, with what it is compared with.
        benchmark("train_step_compiled", "train_step", 110, "--variants", "frozen", "peft", "peft_compiled", "ours"),
    ]


def why_not() -> list[str]:
    """What is missing for a run on a GPU."""
    if find_spec("torch") is None:
        return [f"PyTorch is not installed for {sys.executable} (another Python: make gpu PYTHON=…)"]
    import torch

    missing = []
    if torch.version.cuda is None:
        missing.append(f"PyTorch {torch.__version__} is a build without CUDA")
    if not any(Path(place).exists() for place in DRIVER):
        missing.append("there is no NVIDIA driver")
    if not missing and not torch.cuda.is_available():
        missing.append("PyTorch sees no GPU")
    if find_spec("pytest") is None:
        missing.append("pytest is not installed")
    sys.path.insert(0, str(ROOT))
    from hf_lora.errors import VersionError
    from hf_lora.versions import check_versions

    try:
        check_versions()
    except VersionError as error:
        missing.append(" ".join(str(error).split()))
    return missing


def run(step: Step, seconds: float, log: Path) -> Result:
    """Run a step in a process group, which is ended after the seconds; its output is printed and added to the log."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {
        "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", **os.environ,
        "PYTHONPATH": path, "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    start, print_from = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *step.words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    with log.open("rb") as written:
        written.seek(print_from)
        print(written.read().decode(errors="replace"), flush=True)
    status = "timed out" if code is None else "failed" if code else "passed"
    return Result(step.name, step.words, status, round(time.monotonic() - start, 1), code)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine() -> dict[str, str]:
    import torch
    import transformers

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu, "cuda": str(torch.version.cuda), "torch": torch.__version__,
        "transformers": transformers.__version__, "python": sys.version.split()[0],
    }  # fmt: skip


def run_all(chosen: list[Step], out: Path, limit: float = LIMIT) -> Summary:
    """Run steps one after the other, whatever becomes of each; the summary is written after each."""
    summary, end = Summary(), time.monotonic() + limit
    for step in chosen:
        left = end - time.monotonic()
        print(f"== {step.name}: at most {min(step.limit, max(left, 0)):.0f} s", flush=True)
        if left > 5:
            summary.results.append(run(step, min(step.limit, left), out / "log.txt"))
        else:
            summary.results.append(Result(step.name, step.words, "left out"))
        write(summary, out)
    return summary


def write(summary: Summary, out: Path) -> None:
    (out / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder for the results")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in steps(Path())], help="default: every step")
    options = parser.parse_args(words)
    missing = why_not()
    if missing:
        print(f"Nothing was run on a GPU: {'; '.join(missing)}.")
        return 2
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for file in ("log.txt", "summary.json"):
        (out / file).unlink(missing_ok=True)
    summary = run_all([step for step in steps(out) if options.only is None or step.name in options.only], out)
    summary.machine = machine()
    write(summary, out)
    for result in summary.results:
        print(f"{result.name:20} {result.status:10} {result.seconds:6.1f} s")
    return int(any(result.status != "passed" for result in summary.results))


if __name__ == "__main__":
    sys.exit(main())
