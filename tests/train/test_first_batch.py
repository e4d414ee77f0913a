"""What a run determines before its first step: the scale of the loss, and what the optimizer holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Rows, adapter_values, sentences, texts, texts_of_three, tiny_bert, tiny_gpt2, tiny_t5, tiny_tokens
from torch import nn

from hf_lora import ConfigError, LoraConfig, LoraTrainer, TrainingError, apply_lora
from hf_lora.train.first_batch import divides_by_items, find_shared_inputs

Make = Callable[..., Any]


def rows(source: Rows, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: {}) -> Rows:
    return Rows([{**row, **change(row)} for row in source.rows[:8]])


CASES: dict[str, tuple[Callable[[], Any], Callable[[], Rows]]] = {
    "classes": (tiny_bert, lambda: rows(sentences())),
    "regression": (lambda: tiny_bert(labels=1), lambda: rows(sentences(), lambda r: {"labels": r["labels"].float()})),
    "tokens": (tiny_tokens, lambda: rows(texts_of_three(), lambda r: {"labels": r["labels"].clamp(min=0)})),
    "encoder-decoder": (
        tiny_t5,
        lambda: rows(texts(), lambda r: {"labels": r["input_ids"], "decoder_input_ids": r["input_ids"].roll(1)}),
    ),
    "language model": (tiny_gpt2, lambda: rows(texts())),
}


def no_dropout(model: nn.Module) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_a_step_is_the_same_in_any_number_of_batches(case: str, smooth: float, arguments: Make) -> None:
    """Reference: the whole step as one batch, where the models' own mean is right."""
    make, data = CASES[case]
    if smooth and case == "regression":
        pytest.skip("label smoothing is for classes")
    ends, losses = [], []
    for steps in (1, 2, 4):
        args = arguments(
            max_steps=2, per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps, optim="sgd",
            logging_strategy="steps", logging_steps=1, label_smoothing_factor=smooth,
        )  # fmt: skip
        model = no_dropout(make())
        torch.manual_seed(1)
        trainer = LoraTrainer(model, args, train_dataset=data())
        trainer.train()
        ends.append(adapter_values(model))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    if case == "language model" and smooth:  # transformers averages the smoothed losses of batches with unequal labels
        return
    for loss, end in zip(losses[1:], ends[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5)
        for name, value in end.items():
            assert torch.allclose(value, ends[0][name], rtol=1e-4, atol=1e-6), name


def test_looking_at_the_first_batch_changes_nothing() -> None:
    class Draws(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            self.calls += 1
            return x * random.random() * np.random.rand() * torch.rand(())

    model = Draws()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert divides_by_items(model, {"x": torch.ones(1)}, lambda batch, items: model(**batch) / items)
    assert not divides_by_items(model, {"x": torch.ones(1)}, lambda batch, items: model(**batch))
    assert divides_by_items(model, {"x": torch.ones(1)}, lambda batch, items: model(**batch) / int(items))
    assert model.training
    assert model.calls == 3
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())


# The optimizer -------------------------------------------------------------------------------------------------------


def test_an_optimizer_from_before_the_adapter_trains_it(arguments: Make) -> None:
    """Reference: the optimizer of Trainer with the same options."""
    ends = []
    for early in (True, False):
        model = no_dropout(tiny_bert())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5) if early else None
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) if optimizer else None
        torch.manual_seed(1)
        trainer = LoraTrainer(
            model, arguments(max_steps=3), train_dataset=sentences(), optimizers=(optimizer, schedule)
        )
        if not early:
            late = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.5)
            trainer.optimizer, trainer.lr_scheduler = late, torch.optim.lr_scheduler.LambdaLR(late, lambda s: 0.5**s)
        start = adapter_values(model)
        trainer.train()
        ends.append(adapter_values(model))
        assert any(not torch.equal(start[name], value) for name, value in ends[-1].items() if "lora_B" in name)
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_an_optimizer_that_lacks_trainable_tensors_is_refused(arguments: Make) -> None:
    model = tiny_bert()
    groups = [{"params": [p], "lr": 0.1} for p in model.parameters()]
    args = arguments(max_steps=1)
    with pytest.raises(TrainingError, match=r"lacks \d+ of \d+ trainable.*apply_lora\(model, config\)"):
        LoraTrainer(model, args, train_dataset=sentences(), optimizers=(torch.optim.SGD(groups), None)).train()

    model = apply_lora(tiny_bert(), LoraConfig(r=2))  # the way that the message names
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    LoraTrainer(model, args, train_dataset=sentences(), optimizers=(own, None)).train()
    half = torch.optim.SGD(own.param_groups[0]["params"][::2], lr=0.1)
    with pytest.raises(TrainingError, match="lacks"):
        LoraTrainer(model, args, train_dataset=sentences(), optimizers=(half, None)).train()


def test_an_overridden_create_optimizer_is_checked(arguments: Make) -> None:
    class Own(LoraTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            chosen = [p for n, p in self.model.named_parameters() if p.requires_grad and self.wanted in n]
            self.optimizer = torch.optim.SGD(chosen, lr=0.1)
            return self.optimizer

    Own.wanted = "lora_A"
    with pytest.raises(TrainingError, match=r"lacks .*lora_B"):
        Own(tiny_bert(), arguments(max_steps=1), train_dataset=sentences()).train()
    Own.wanted = ""
    Own(tiny_bert(), arguments(max_steps=1), train_dataset=sentences()).train()
    with pytest.raises(ConfigError, match="create_optimizer is overridden"):
        Own(tiny_bert(), arguments(max_steps=1, loraplus_lr_ratio=4.0), train_dataset=sentences()).train()


def test_batches_that_are_not_the_inputs_of_the_model_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers that generate completions have batches of prompts; only a real input may fail with a warning."""
    warnings: list[str] = []
    monkeypatch.setattr("hf_lora.train.first_batch.logger.warning_once", warnings.append)
    model = apply_lora(tiny_gpt2(), LoraConfig(r=2))
    find_shared_inputs(model, {"prompts": ["a", "b"]})
    assert warnings == []
    find_shared_inputs(model, {"input_ids": "a"})
    assert len(warnings) == 1
