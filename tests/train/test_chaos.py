"""ckpt-chaos kills a training at the file events of its saves; each resumed run must equal the whole one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODES = "before,torn,term,unsynced"
FAILURES = "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "killed"), [(1, 0), (2, 0), (2, 1)])
def test_a_killed_run_resumes_from_the_newest_complete_checkpoint(ranks: int, killed: int, tmp_path: Path) -> None:
    """Points are spread over the events and the modes; docs/faults.md has the result for all of them."""
    pytest.importorskip("ckpt_chaos", reason="needs ckpt-chaos: pip install ckpt-chaos")
    points = 8 if killed == 0 else 4
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    words = [
        "run", "--modes", MODES, "--max-points", points, "--work", tmp_path, "--ranks", ranks, "--crash-rank", killed,
        "--checkpoint-glob", "{out}/checkpoint-*", "--step-regex", r"resumed from step (\d+)",
        "--result-file", "{out}/adapter_model.safetensors", "--fail-on", FAILURES,
        "--", sys.executable, HERE / "chaos_worker.py", "{out}",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", *map(str, words)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CKPT_CHAOS_CRASH_RANK": str(killed)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "DID NOT CRASH" not in done.stdout
    assert done.stdout.splitlines()[-1] == f"PASS: {points + 1}"  # and the control
