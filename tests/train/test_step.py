"""What the trainer adds to a step: groups of layers that share an input, and no wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_near, randomize
from tiny import adapter_values, sentences, texts, tiny_bert, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback

from hf_lora import LoraConfig, LoraTrainer, apply_lora
from hf_lora.train import first_batch

Make = Callable[..., Any]


# Layers that share an input.


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The batches that `share_inputs` was called with; the real one is called, too."""
    calls: list[dict[str, Any]] = []
    real = first_batch.share_inputs

    def share_inputs(model: Any, **batch: Any) -> Any:
        groups = real(model, **batch)
        calls.append({"model": model, "batch": batch, "groups": groups})
        return groups

    monkeypatch.setattr(first_batch, "share_inputs", share_inputs)
    return calls


class Seen(TrainerCallback):
    """The first batch that a model was trained on, as its own forward got it."""

    def __init__(self, model: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.batches.append(kwargs)


def test_each_run_finds_the_groups_on_its_first_batch(arguments: Make, recorded: list[dict[str, Any]]) -> None:
    model = tiny_llama()
    seen = Seen(model)
    made = arguments(max_steps=2, gradient_accumulation_steps=2, eval_on_start=True, eval_strategy="steps")
    subject = LoraTrainer(model, made, train_dataset=texts(), eval_dataset=texts(4))
    subject.train()
    assert len(recorded) == 1
    subject.train()
    assert len(recorded) == 2
    assert len(seen.batches) == 8
    for call, first in zip(recorded, (seen.batches[0], seen.batches[4]), strict=True):
        assert call["model"] is model
        for name, value in call["batch"].items():
            assert torch.equal(value, first[name])
        assert {"input_ids", "labels"} <= call["batch"].keys()
        layer = "model.layers.0."
        assert (f"{layer}self_attn.q_proj", f"{layer}self_attn.k_proj", f"{layer}self_attn.v_proj") in call["groups"]


@pytest.mark.parametrize("off", ["share_inputs", "torch_compile", "n_gpu", "fsdp", "deepspeed"])
def test_where_layers_are_not_to_share(
    off: str, arguments: Make, recorded: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = LoraTrainer(tiny_bert(), arguments(max_steps=1), train_dataset=sentences())
    assert first_batch.may_share_inputs(subject, subject.model)
    if off == "share_inputs":
        subject = LoraTrainer(tiny_bert(), arguments(max_steps=1, share_inputs=False), train_dataset=sentences())
        subject.train()
        assert recorded == []
        return
    if off in ("torch_compile", "n_gpu"):
        monkeypatch.setattr(subject.args, "torch_compile" if off == "torch_compile" else "_n_gpu", 2)
    else:
        monkeypatch.setattr(subject, f"is_{off}_enabled", True)
    assert not first_batch.may_share_inputs(subject, subject.model)


def test_a_forward_that_fails_there_stops_nothing(
    arguments: Make, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, **batch: Any) -> Any:
        raise ValueError("no such batch")

    def run(**values: Any) -> dict[str, torch.Tensor]:
        subject = LoraTrainer(tiny_bert(), arguments(max_steps=2, **values), train_dataset=sentences())
        subject.train()
        return adapter_values(subject.model)

    alone = run(share_inputs=False)
    monkeypatch.setattr(first_batch, "share_inputs", fails)
    found = run()
    assert all(torch.equal(found[name], value) for name, value in alone.items())
    assert len([m for m in messages if "ValueError: no such batch" in m]) == 1


# Waits for the device.


class Waits(TorchDispatchMode):
    """Counts what needs a tensor's values on the host."""

    NAMES = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = dict.fromkeys(self.NAMES, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in self.count:
            self.count[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class FromStep(TrainerCallback):
    """Counts from the end of a step on, till the training ends."""

    def __init__(self, step: int) -> None:
        self.step, self.waits = step, Waits()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.waits.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize(("make", "data"), [(tiny_bert, sentences), (tiny_llama, texts)])
def test_a_step_waits_for_the_device_no_more_often_than_trainers(make: Any, data: Any, arguments: Make) -> None:
    counts = []
    for cls in (LoraTrainer, Trainer):
        model = apply_lora(make(), LoraConfig(r=4, lora_dropout=0.1))
        waits = FromStep(6)
        cls(model, arguments(max_steps=9, name=cls.__name__), train_dataset=data(48), callbacks=[waits]).train()
        counts.append(waits.waits.count)
    ours, theirs = counts
    assert theirs["aten::_local_scalar_dense"] > 0  # the filter of NaN looks at every loss: the count works
    # The loss over the head has to know which tokens are labeled, once a step, before the forward.
    allowed = {**theirs, "aten::nonzero": theirs["aten::nonzero"] + (3 if make is tiny_llama else 0)}
    for name, count in ours.items():
        assert count <= allowed[name], name


# Rows behind one another, without padding.


@pytest.mark.parametrize("borders", [False, True])
@pytest.mark.parametrize("over_head", [False, True])
def test_flattened_rows_are_learned_as_separate_ones(borders: bool, over_head: bool, arguments: Make) -> None:
    rows = [
        {"input_ids": r["input_ids"][: 3 + i], "labels": r["labels"][: 3 + i]} for i, r in enumerate(texts(6).rows)
    ]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=borders)
    results = []
    for batches in ([rows], [[row] for row in rows]):
        model = randomize(apply_lora(tiny_llama())).double()
        for factor in (p for p in model.parameters() if p.requires_grad):
            factor.data = factor.data.double()  # so that what is left is the rounding of float64
        subject = LoraTrainer(model, arguments(frozen_head_loss=over_head), train_dataset=rows, data_collator=collator)
        made = [collator(batch) for batch in batches]
        tokens = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in made]).sum()
        loss = torch.stack([subject.training_step(model, batch, tokens) for batch in made]).sum()
        assert (subject.head_loss.head is not None and subject.head_loss.head.off is None) is over_head
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (alone, expected) = results
    torch.testing.assert_close(loss, alone)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.count_nonzero()
        assert_near(gradients[name], gradient, torch.float64, factor=256)


@pytest.mark.parametrize("liger", [False, True])
def test_ligers_own_loss_is_left_to_it(liger: bool, arguments: Make) -> None:
    batch = {key: value[None] for key, value in texts(1).rows[0].items()}
    subject = LoraTrainer(tiny_llama(), arguments(), train_dataset=texts())
    subject.args.use_liger_kernel = liger
    subject.compute_loss(subject.model, batch)
    assert (subject.head_loss.head is None) == liger


def test_a_flag_of_earlier_releases_is_accepted(arguments: Make, messages: list[str]) -> None:
    LoraTrainer(tiny_bert(), arguments(max_steps=1, keep_freed_memory=True), train_dataset=sentences()).train()
    assert any("keep_freed_memory no longer has any effect" in m for m in messages)
