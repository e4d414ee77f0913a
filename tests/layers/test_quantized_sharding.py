"""A 4-bit base is split between two processes where its codes are stored as bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from quantized_bases import available, save_base


@pytest.mark.distributed
def test_two_processes_share_a_4_bit_base(tmp_path: Path) -> None:
    available("nf4")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
               "--rdzv_endpoint=127.0.0.1:0", str(here / "quantized_worker.py"), str(save_base(tmp_path))]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr[-3000:]
