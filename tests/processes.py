"""Tests of more than one process: start a worker under torchrun, and end it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

TESTS = Path(__file__).parent
LAUNCH = ["-m", "torch.distributed.run", "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--nproc_per_node"]


def run_processes(worker: Path, *words: Any, processes: int = 2) -> str:
    """What `worker` printed, in `processes` processes on CPUs; 0: in one, without torchrun."""
    paths = os.pathsep.join([str(worker.parent), str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    launch = [*LAUNCH, str(processes)] if processes else []
    done = run_once_more_if_aborted(
        [sys.executable, *launch, str(worker), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout + done.stderr


def run_once_more_if_aborted(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a launcher, and once more after an abort: on a loaded machine gloo aborts a process now and then."""
    run = {"capture_output": True, "text": True, "timeout": 400, "check": False} | options
    done: subprocess.CompletedProcess[str] = subprocess.run(command, **run)
    return subprocess.run(command, **run) if "Signal 6 (SIGABRT)" in done.stderr else done


def leave() -> NoReturn:
    """End this process after all have come here, without destructors: groups that end then may abort the process."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
