"""A run that becomes several times slower than its first steps: which usually is another program on the same cores."""

from __future__ import annotations

import os
import time
from statistics import median

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .base import Watch

logger = logging.get_logger(__name__)

SKIPPED, COUNTED = 2, 8
"""The first steps allocate memory; the next ones are the reference."""
FACTOR, SHORTEST = 3.0, 0.1
"""How many times as long the later steps must take, and at least how many seconds."""


class Slowdown(Watch):
    """Logs one warning when steps take several times as long as the first ones."""

    def __init__(self) -> None:
        self._begin = 0.0
        self._seconds: list[float] = []
        self._said = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._seconds, self._said = [], False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._begin = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._seconds.append(time.perf_counter() - self._begin)
        if self._said or len(self._seconds) < SKIPPED + 2 * COUNTED or not state.is_world_process_zero:
            return
        first = median(self._seconds[SKIPPED : SKIPPED + COUNTED])
        last = median(self._seconds[-COUNTED:])
        if last > FACTOR * first and last > SHORTEST:
            self._said = True
            logger.warning(
                f"Step {state.global_step}: a step takes {last:.2g} s, {last / first:.1f} times as long as the first "
                f"ones ({first:.2g} s). {_why(args)}"
            )


def _why(args: TrainingArguments) -> str:
    if args.device.type != "cpu":
        return "Either these rows are longer, or another program uses the device."
    load = f" (load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores)" if hasattr(os, "getloadavg") else ""
    return (
        f"Either these rows are longer, or another program uses the same cores{load}. With fewer threads than cores a "
        "step waits less for it: OMP_NUM_THREADS=1."
    )
