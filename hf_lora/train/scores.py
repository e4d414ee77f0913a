"""The metrics of a task that are not of one batch's outputs: of generated texts, or of all embeddings together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.utils import logging

from ..tasks.base import Asked, Data


def scores(trainer: Any, data: Data, split: str, prefix: str) -> dict[str, float]:
    """The metrics that `Task.score` computes of the model in training, which are also added to Trainer's log."""
    hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
    bar = logging.tqdm(total=len(data.rows[split]), desc=split, disable=hidden, leave=False, delay=1)
    with trainer.average.applied(), bar:
        asked = Asked(trainer.args.per_device_eval_batch_size, progress=_advance(bar))
        found = data.task.score(trainer._bare_model, data, split, asked).metrics
    values = {f"{prefix}_{name}": value for name, value in found.items()}
    trainer.state.log_history[-1].update(values)  # for the card
    return values


def add_scores(trainer: Any, data: Data) -> None:
    """Compute them in each evaluation during training, if one of them decides which checkpoint is the best."""
    if str(trainer.args.metric_for_best_model).removeprefix("eval_") not in data.task.scored:
        return
    evaluate, split = trainer.evaluate, "eval" if "eval" in data.rows else "test"

    def evaluate_and_score(*args: Any, **kwargs: Any) -> dict[str, float]:
        values: dict[str, float] = evaluate(*args, **kwargs)
        return values | (scores(trainer, data, split, "eval") if trainer.is_in_train else {})

    trainer.evaluate = evaluate_and_score


def _advance(bar: Any) -> Callable[[int], None]:
    """Shows the number of finished rows in a progress bar."""
    shown = 0

    def show(done: int) -> None:
        nonlocal shown
        bar.update(done - shown)
        shown = done

    return show
