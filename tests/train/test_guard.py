"""The guard: layers that are never called, that get no gradient, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SPARE, Rows, sentences, texts_of_three, tiny_bert, tiny_tokens
from torch import nn

from hf_lora import LoraConfig, LoraTrainer, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.errors import TrainingError
from hf_lora.train.watch.base import Watch
from hf_lora.train.watch.finite import check_finite
from hf_lora.train.watch.guard import LayerGuard

Make = Callable[..., Any]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) for m in model.modules())


def test_a_named_layer_that_is_never_called_is_an_error(arguments: Make) -> None:
    trainer = LoraTrainer(
        tiny_tokens(), arguments(max_steps=10), train_dataset=texts_of_three(),
        lora_config=LoraConfig(target_modules=["query", "spare"]),
    )  # fmt: skip
    with pytest.raises(TrainingError, match=SPARE) as error:
        trainer.train()
    assert "query" not in str(error.value)
    assert "exclude_modules" in str(error.value)
    assert trainer.state.global_step == 4
    assert hooks(trainer.model) == 0


def test_a_found_layer_that_is_never_called_is_dropped_and_not_saved(
    arguments: Make, messages: list[str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    trainer = LoraTrainer(tiny_tokens(), arguments(max_steps=6), train_dataset=texts_of_three())
    assert SPARE in adapter_layers(trainer.model)
    trainer.train()
    assert SPARE not in adapter_layers(trainer.model)
    assert any(SPARE in m and "never called" in m.lower() for m in messages)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not any("spare" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert hooks(trainer.model) == 0
    trained = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == trained


def test_warm_up_and_accumulation_are_no_fault(arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=6, warmup_steps=6, gradient_accumulation_steps=2, lr_scheduler_type="linear")
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences())
    trainer.train()
    assert trainer.state.global_step == 6
    assert not any("called" in m for m in messages)


def test_a_layer_without_gradient_is_listed_and_kept(arguments: Make, messages: list[str]) -> None:
    model = tiny_bert()
    layer = model.bert.encoder.layer[0]
    layer.register_forward_hook(lambda m, i, o: tuple(t.detach() for t in o) if isinstance(o, tuple) else o.detach())
    trainer = LoraTrainer(model, arguments(max_steps=5), train_dataset=sentences())
    trainer.train()
    [message] = [m for m in messages if "no gradient" in m]
    assert "bert.encoder.layer.0.attention.self.query" in message
    assert "layer.1." not in message
    assert "bert.encoder.layer.0.attention.self.query" in adapter_layers(trainer.model)


def test_nothing_learns_at_all(arguments: Make) -> None:
    class Still(LoraTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return loss * 0

    trainer = Still(
        tiny_bert(), arguments(max_steps=40), train_dataset=sentences(), lora_config=LoraConfig(modules_to_save=[])
    )
    with pytest.raises(TrainingError, match="no adapter is trained"):
        trainer.train()
    assert trainer.state.global_step == 16


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(arguments: Make) -> None:
    class Broken(LoraTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    trainer = Broken(tiny_bert(), arguments(max_steps=10), train_dataset=sentences())
    with pytest.raises(TrainingError, match=r"Step 3.*not finite"):
        trainer.train()
    check_finite(trainer.model, "test")


def test_an_overflow_under_loss_scaling_is_no_fault(arguments: Make) -> None:
    from types import SimpleNamespace

    model = apply_lora(tiny_bert())
    guard, args = LayerGuard(2), arguments()
    state = SimpleNamespace(global_step=0, is_world_process_zero=True)
    scaled = SimpleNamespace(scaler=object(), param_groups=[])
    guard.on_train_begin(args, state, None, model=model)
    for value in (float("inf"), float("inf"), 1.0, 1.0):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value) if parameter.requires_grad else None
        guard.on_pre_optimizer_step(args, state, None, optimizer=scaled)
        assert guard.watched
        guard.on_step_end(args, state, None, model=model, optimizer=scaled)
    assert not guard.watched


def test_nan_is_not_saved_over_what_is_there(arguments: Make, tmp_path: Path) -> None:
    args = arguments(max_steps=6, save_strategy="steps", save_steps=6)
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences())
    trainer.save_model(str(tmp_path / "adapter"))
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter[0, 0] = float("inf")
    for call in (
        lambda: trainer.save_model(str(tmp_path / "adapter")),
        lambda: trainer._save_checkpoint(trainer.model, None),
    ):
        with pytest.raises(TrainingError, match="not finite") as error:
            call()
        assert name in str(error.value)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert not list(Path(args.output_dir).glob("checkpoint-*"))


class Routed(nn.Module):
    """A sum of linear layers, of which each batch takes one, as routed experts are."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.order, self.step = order, 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        expert = self.experts[self.order[self.step % len(self.order)]]
        self.step += self.training
        y = expert(self.stem(x))
        return {"loss": y.square().mean(), "logits": y}


def rows_of_four() -> Rows:
    return Rows([{"x": torch.randn(4), "labels": torch.tensor(0)} for _ in range(16)])


def test_experts_that_were_not_routed_to_yet_are_kept(arguments: Make, messages: list[str]) -> None:
    model = Routed([0, 1, 0, 2])
    apply_lora(model, LoraConfig(target_modules=["stem", "experts.0", "experts.1", "experts.2", "experts.3"]))
    trainer = LoraTrainer(model, arguments(max_steps=20), train_dataset=rows_of_four())
    trainer.train()
    assert any("experts.3" in m and "kept" in m for m in messages)
    assert "experts.3" in adapter_layers(model)


def test_a_member_of_a_list_that_is_left_out_every_time_is_an_error(arguments: Make) -> None:
    model = Routed([0])
    apply_lora(model, LoraConfig(target_modules=["experts.0", "experts.1"]))
    trainer = LoraTrainer(model, arguments(max_steps=20), train_dataset=rows_of_four())
    with pytest.raises(TrainingError, match=r"experts\.1"):
        trainer.train()
    assert trainer.state.global_step == 16


def test_the_guard_alone_on_a_plain_trainer_and_switched_off(arguments: Make, messages: list[str]) -> None:
    from transformers import Trainer, TrainingArguments

    model = apply_lora(tiny_tokens())
    args = arguments(TrainingArguments, max_steps=5)
    Trainer(model, args, train_dataset=texts_of_three(), callbacks=[LayerGuard(2)]).train()
    assert SPARE not in adapter_layers(model)

    trainer = LoraTrainer(tiny_tokens(), arguments(max_steps=5, lora_guard_steps=0), train_dataset=texts_of_three())
    trainer.train()
    assert SPARE in adapter_layers(trainer.model)


def test_a_loaded_adapter_is_not_taken_apart(arguments: Make, messages: list[str], tmp_path: Path) -> None:
    source = apply_lora(tiny_tokens())
    for name, parameter in source.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    source.save_pretrained(tmp_path)
    from hf_lora import LoraModel

    model = LoraModel.from_pretrained(tmp_path, base_model=tiny_tokens(), is_trainable=True)
    LoraTrainer(model, arguments(max_steps=5), train_dataset=texts_of_three()).train()
    assert SPARE in adapter_layers(model)
    assert any(SPARE in m and "not trained" in m for m in messages)


def test_a_watch_of_ones_own_sees_whole_gradients_before_they_are_clipped(arguments: Make) -> None:
    class Norms(Watch):
        over = 0

        def __init__(self) -> None:
            self.seen: list[tuple[int, float, float]] = []

        def before_step(self, model: Any, optimizer: Any, loss: torch.Tensor, step: int) -> None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            self.seen.append((step, float(torch.nn.utils.get_total_norm(gradients)), float(loss)))

        def finished(self) -> None:
            self.over += 1

    watch = Norms()
    args = arguments(
        max_steps=3, gradient_accumulation_steps=2, max_grad_norm=1e-3, logging_strategy="steps", logging_steps=1
    )
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), callbacks=[watch])
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [step for step, *_ in watch.seen] == [1, 2, 3]
    assert [norm for _, norm, _ in watch.seen] == pytest.approx([entry["grad_norm"] for entry in logged], rel=1e-5)
    assert [loss for *_, loss in watch.seen] == pytest.approx([entry["loss"] for entry in logged], abs=1e-3)
    assert watch.over == 1


def test_gradient_checkpointing_and_evaluation_in_between(arguments: Make, messages: list[str]) -> None:
    args = arguments(max_steps=5, gradient_checkpointing=True, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer = LoraTrainer(tiny_tokens(), args, train_dataset=texts_of_three(), eval_dataset=texts_of_three())
    trainer.train()
    assert SPARE not in adapter_layers(trainer.model)
    assert not any("no gradient" in m for m in messages)


def test_the_best_checkpoint_may_be_older_than_the_verdict(arguments: Make) -> None:
    """Its tensors of a layer that lost the adapter since are left out; all others are loaded."""
    from safetensors.torch import load_file

    args = arguments(
        max_steps=6, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2, learning_rate=1e-1,
        load_best_model_at_end=True, metric_for_best_model="worse",
    )  # fmt: skip
    steps: list[int] = []

    def worse(prediction: Any) -> dict[str, float]:
        steps.append(len(steps))
        return {"worse": -float(len(steps))}

    rows = texts_of_three()
    trainer = LoraTrainer(
        tiny_tokens(), args, train_dataset=rows, eval_dataset=Rows(rows.rows[:4]), compute_metrics=worse
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    saved = load_file(best / "adapter_model.safetensors")
    assert any("spare" in key for key in saved)
    found = trainer.model.get_adapter_state_dict()
    assert SPARE not in adapter_layers(trainer.model)
    assert found.keys() == {key for key in saved if "spare" not in key}
    assert all(torch.equal(value, saved[key]) for key, value in found.items())
