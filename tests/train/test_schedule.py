"""The number of steps and the warm-up of a run, against what Trainer does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from tiny import sentences, tiny_bert

from hf_lora import LoraTrainer, LoraTrainingArguments
from hf_lora.train.schedule import hints, set_warmup, steps_of

GRID = list(itertools.product((1, 7, 12), (1, 4, 5), (1, 3), (1, 2.5), (-1, 2), (False, True)))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_bert()


@pytest.mark.parametrize("rows", sorted({case[0] for case in GRID}))
def test_the_number_of_steps_is_that_of_trainer(model: Any, rows: int, arguments: Callable[..., Any]) -> None:
    for _, batch, accumulated, epochs, max_steps, drop in (case for case in GRID if case[0] == rows):
        if drop and batch > rows:
            continue  # there is nothing to train on
        args = arguments(
            per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, num_train_epochs=epochs,
            max_steps=max_steps, dataloader_drop_last=drop,
        )  # fmt: skip
        trainer = LoraTrainer(model, args, train_dataset=sentences(rows))
        loader = trainer.get_train_dataloader()
        whole = trainer.set_initial_training_values(args, loader)
        assert steps_of(trainer) == whole[-1], (rows, batch, accumulated, epochs, max_steps, drop)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 19, 20, 49, 50, 51, 500])
@pytest.mark.parametrize("fraction", [0.06, 0.5])
def test_a_warm_up_never_takes_a_whole_run(fraction: float, steps: int, given: bool) -> None:
    args = LoraTrainingArguments("out", warmup_steps=fraction, report_to="none", use_cpu=True)
    set_warmup(args, steps, {"warmup_steps"} if given else set())
    count = args.get_warmup_steps(steps)
    assert count <= fraction * steps < steps
    assert count == int(fraction * steps) or (count == 0 and not given and fraction * steps < 3)


def test_hints() -> None:
    args = LoraTrainingArguments("out", warmup_steps=9, report_to="none", use_cpu=True)
    assert hints(args, None, False) == hints(args, 20, True) == []
    [few, warm] = hints(args, 3, True)
    assert "--num-train-epochs 40, --packing false" in few
    assert "warm-up of 9 steps does not end in 3 steps" in warm
