"""The number of threads of a command on a CPU: as many as other programs leave cores free.

OpenMP's threads wait for one another by spinning. If one of them has lost its core to another program, all others burn
theirs until it is back, and a step takes many times as long as with fewer threads.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import NamedTuple

import typer

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables with which the user chooses."""
SHORTEST = 0.5
"""Seconds; a shorter measurement says nothing."""


class Times(NamedTuple):
    """Seconds until now: of the clock, of the cores that this process may use, and of this process on them."""

    wall: float
    busy: float
    own: float


@contextlib.contextmanager
def threads_for_free_cores() -> Iterator[None]:
    """Within, a command imports its libraries, which takes seconds; then the number of threads is set."""
    before = None if any(name in os.environ for name in SETTINGS) else times()
    yield
    if before is not None and (after := times()) is not None:
        _set_threads(before, after)


def times() -> Times | None:
    """The times until now; None where the system does not tell."""
    try:
        import psutil

        each = psutil.cpu_times(percpu=True)
        cores = [each[i] for i in _cores() if i < len(each)]
    except (ImportError, OSError, RuntimeError):
        return None
    idle = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is also in user
    busy = sum(sum(core) - sum(getattr(core, name, 0.0) for name in idle) for core in cores)
    return Times(time.perf_counter(), busy, sum(os.times()[:4]))


def threads_of(cores: int, before: Times, after: Times) -> tuple[int, int]:
    """(the number of threads, the number of cores that other programs used between two times)."""
    seconds = max(after.wall - before.wall, 1e-9)
    others = (after.busy - before.busy - (after.own - before.own)) / seconds
    used = min(max(round(others), 0), cores)
    return max(cores - used, 1), used


def _set_threads(before: Times, after: Times) -> None:
    import torch

    if after.wall - before.wall < SHORTEST or torch.accelerator.is_available():
        return
    cores = len(_cores())
    threads, used = threads_of(cores, before, after)
    if used and threads < torch.get_num_threads():
        torch.set_num_threads(threads)
        typer.echo(
            f"Other programs use {used} of {cores} cores, so this one computes with {threads} "
            f"thread{'' if threads == 1 else 's'}. OMP_NUM_THREADS={cores} takes all cores.",
            err=True,
        )


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
