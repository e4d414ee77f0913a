"""Learning rates that are not common to all parameters: of B, of heads, and in a search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors
from tiny import adapter_values, sentences, texts, tiny_bert, tiny_gpt2
from transformers import Trainer, TrainingArguments

from hf_lora import LoraConfig, LoraTrainer, apply_lora
from hf_lora.errors import ConfigError

Make = Callable[..., Any]


def rates(trainer: Any) -> dict[str, float]:
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}


def test_rates_of_b_and_head(arguments: Make) -> None:
    args = arguments(
        max_steps=6, learning_rate=1e-3, loraplus_lr_ratio=4.0, head_learning_rate=5e-4, weight_decay=0.1,
        warmup_steps=2, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), lora_config=LoraConfig(bias="lora_only"))
    trainer.create_optimizer()
    found = rates(trainer)
    assert found.keys() == {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for name, rate in found.items():
        expected = 4e-3 if "lora_B" in name else 5e-4 if "copies" in name else 1e-3
        assert rate == pytest.approx(expected), name
    decay = {id(p): g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad and not decay[id(p)]} == {
        n for n in found if "bias" in n
    }
    trainer.train()
    steps = [(e["learning_rate"]) for e in trainer.state.log_history if "learning_rate" in e]
    assert all(r <= 1e-3 for r in steps)

    class Ratios(LoraTrainer):
        def training_step(self, *a: Any, **k: Any) -> Any:
            seen.append(
                {(round(g["lr"] / self.optimizer.param_groups[0]["lr"], 6)) for g in self.optimizer.param_groups}
            )
            return super().training_step(*a, **k)

    seen: list[set[float]] = []
    args = arguments(max_steps=6, learning_rate=1e-3, loraplus_lr_ratio=4.0, lr_scheduler_type="cosine")
    Ratios(tiny_gpt2(), args, train_dataset=texts()).train()
    assert all(s == {1.0, 4.0} for s in seen)


def test_without_rates_the_optimizer_is_trainers_own(arguments: Make) -> None:
    model = apply_lora(tiny_bert())
    optimizers = [
        cls(model, arguments(TrainingArguments, weight_decay=0.1)).create_optimizer() for cls in (Trainer, LoraTrainer)
    ]
    theirs, ours = optimizers
    assert type(ours) is type(theirs)
    assert len(ours.param_groups) == len(theirs.param_groups)
    for a, b in zip(ours.param_groups, theirs.param_groups, strict=True):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_a_step_of_lora_plus_is_adams_at_two_rates(arguments: Make) -> None:
    """Against two optimizers of torch, one a rate."""
    ends = []
    for own in (False, True):
        torch.manual_seed(5)
        model = apply_lora(tiny_gpt2())
        options: dict[str, Any] = {
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
        }
        if own:
            parts: dict[bool, list[Any]] = {False: [], True: []}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parts["lora_B" in name].append(parameter)
            groups = [{"params": parts[False], "lr": 1e-3}, {"params": parts[True], "lr": 3e-3}]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
            trainer = LoraTrainer(model, arguments(**options), train_dataset=texts(), optimizers=(optimizer, None))
        else:
            trainer = LoraTrainer(model, arguments(**options, loraplus_lr_ratio=3.0), train_dataset=texts())
        trainer.train()
        ends.append(adapter_values(model))
    assert_same_tensors(ends[0], ends[1])


def test_the_adapter_of_a_flag_is_trained_or_evaluated(arguments: Make, tmp_path: Path, messages: list[str]) -> None:
    first = LoraTrainer(tiny_bert(), arguments(max_steps=2, lora_r=3), train_dataset=sentences())
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    expected = first.evaluate(sentences())["eval_loss"]
    args = arguments(max_steps=1, lora_adapter=str(tmp_path / "adapter"), lora_r=5)
    second = LoraTrainer(tiny_bert(), args, train_dataset=sentences())
    assert "no effect because the adapter" in messages[-1]
    assert second.evaluate(sentences())["eval_loss"] == expected
    assert second.model.lora_configs["default"].r == 3
    before = adapter_values(second.model)
    second.train()
    assert all(not torch.equal(value, before[name]) for name, value in adapter_values(second.model).items())
    with pytest.raises(ConfigError, match=r"lora_adapter=.* but lora_config is given"):
        LoraTrainer(tiny_bert(), args, train_dataset=sentences(), lora_config=LoraConfig(r=2))
    with pytest.raises(ConfigError, match="the model has adapters already"):
        LoraTrainer(second.model, args, train_dataset=sentences())


def test_each_trial_of_a_search_adapts_a_new_model(arguments: Make) -> None:
    """Trainer makes the model, then the accelerator again, in every trial."""
    config = LoraConfig(r=3)
    trainer = LoraTrainer(
        model_init=lambda: tiny_bert(), args=arguments(max_steps=1), train_dataset=sentences(), lora_config=config
    )
    models = []
    for _ in range(2):
        trainer.model = trainer.call_model_init()
        trainer.create_accelerator_and_postprocess()
        models.append(trainer.model)
        assert trainer.model.lora_configs["default"].r == 3
    assert models[0] is not models[1]
    trainer.train()


def test_rates_that_cannot_be_given(arguments: Make) -> None:
    model = apply_lora(tiny_bert())
    own = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    args = arguments(max_steps=2, loraplus_lr_ratio=2.0)
    with pytest.raises(ConfigError, match="passed to the Trainer"):
        LoraTrainer(model, args, train_dataset=sentences(), optimizers=(own, None)).train()
    trainer = LoraTrainer(
        apply_lora(tiny_gpt2()), arguments(max_steps=4, loraplus_lr_ratio=2.0), train_dataset=texts()
    )
    trainer.train()
    trainer.train()
    assert {round(g["lr"], 9) for g in trainer.optimizer.param_groups if g["params"]}
