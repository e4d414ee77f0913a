"""Two processes: the guard decides alike, resuming changes no bit, also of averages, and the loss over the head is the
model's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = here / "two_processes.py"
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=127.0.0.1:0", str(script), str(tmp_path)]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (done.stdout + done.stderr).count("the adapter was removed from these layers") == 2  # by one process
