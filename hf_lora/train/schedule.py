"""How many steps a run has, and how many of them warm up."""

from __future__ import annotations

import math
from collections.abc import Container, Sized

from transformers import Trainer, TrainingArguments

from ..errors import ConfigError

FEW_STEPS = 20
"""Below this many steps, a run rarely learns much."""
SHORTEST_WARMUP = 3
"""A default warm-up of fewer steps is left out: the first step of a warm-up has the rate 0."""


def steps_of(trainer: Trainer) -> int | None:
    """The number of optimizer steps of a run, as Trainer counts them; None if its dataset has no length."""
    args, data = trainer.args, trainer.train_dataset
    if args.max_steps > 0:
        return args.max_steps
    if not isinstance(data, Sized):
        return None
    return steps_of_rows(args, len(data), args.train_batch_size * args.world_size)


def steps_of_rows(args: TrainingArguments, rows: int, batch: int) -> int:
    """The number of optimizer steps for a number of rows, with so many in the batches of all processes together."""
    if args.max_steps > 0:
        return args.max_steps
    return math.ceil(args.num_train_epochs * steps_of_epoch(args, rows, batch))


def steps_of_epoch(args: TrainingArguments, rows: int, batch: int) -> int:
    """The number of optimizer steps of one epoch, with so many rows in the batches of all processes together."""
    count = rows / batch
    batches = math.floor(count) if args.dataloader_drop_last else math.ceil(count)
    return max(math.ceil(batches / args.gradient_accumulation_steps), 1)


def check_batches(trainer: Trainer) -> None:
    """Check that an epoch has a batch.

    Raises:
        ConfigError: `dataloader_drop_last` drops the only one.
    """
    args, data = trainer.args, trainer.train_dataset
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(data, Sized) and len(data) < batch:
        raise ConfigError(
            f"dataloader_drop_last leaves nothing to train on: {len(data)} rows are fewer than a batch of {batch}. "
            "Set it to false, or make the batch smaller: per_device_train_batch_size."
        )


def set_warmup(args: TrainingArguments, steps: int | None, given: Container[str]) -> None:
    """Replace a warm-up that is a fraction by a whole number of steps, rounded down.

    Trainer rounds up, so that the only step of a short run would have the rate 0.
    """
    if steps is None or not 0 < args.warmup_steps < 1:
        return
    count = int(args.warmup_steps * steps)
    args.warmup_steps = count if count >= SHORTEST_WARMUP or "warmup_steps" in given else 0


def hints(args: TrainingArguments, steps: int | None, packed: bool) -> list[str]:
    """What to change about a run of so few steps that it will learn little."""
    if steps is None:
        return []
    lines = []
    if steps < FEW_STEPS:
        smaller = (
            "--packing false (rows are packed into few long ones)"
            if packed
            else (f"--per-device-train-batch-size {max(1, args.per_device_train_batch_size // 4)}")
        )
        more = "--max-length with fewer tokens per row" if packed else "a file with more rows"
        epochs = max(2, math.ceil(2 * FEW_STEPS / steps * args.num_train_epochs))
        longer = f"--max-steps {2 * FEW_STEPS}" if args.max_steps > 0 else f"--num-train-epochs {epochs}"
        few = f"Only {steps} step{'s' * (steps > 1)}, which rarely is enough to learn."
        lines.append(f"{few} More steps: {longer}, {smaller}, or {more}.")
    if steps <= args.warmup_steps:
        lines.append(
            f"The warm-up of {args.warmup_steps:g} steps does not end in {steps} steps, so the learning rate stays "
            "below its value: lower --warmup-steps."
        )
    return lines
