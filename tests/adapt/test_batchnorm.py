"""A frozen BatchNorm stays in eval, so training moves no buffer that is in no adapter's file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import adapter_gradients, randomize, tiny_resnet
from torch import Tensor, nn

from hf_lora import LoraConfig, apply_lora
from hf_lora.train.watch.batchnorm import FrozenBatchNorm

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def batch() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16) + 1, "labels": torch.tensor([0, 1, 2, 0])}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in model.named_buffers()}


def norms(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, BATCHNORMS)]


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("training_before", [False, True])
def test_no_base_buffer_moves_in_training(training_before: bool, bias: Any) -> None:
    model = tiny_resnet().train(training_before)
    apply_lora(model, LoraConfig(r=4, target_modules=["convolution"], bias=bias))
    assert model.training == training_before
    assert not any(m.training for m in norms(model))
    randomize(model)
    before = buffers(model)
    assert len(before) >= 6
    model.train()
    assert model.training
    assert norms(model)
    assert not any(m.training for m in norms(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**batch()).loss.backward()
        assert all(g.abs().sum() > 0 for n, g in adapter_gradients(model).items() if "lora_A" in n)
        optimizer.step()
    after = buffers(model)
    assert all(torch.equal(after[n], b) for n, b in before.items())
    if bias == "all":
        assert any("normalization" in n and "lora_bias" in n for n, p in model.named_parameters() if p.requires_grad)
    plain = model.unload()
    plain.train()
    assert all(m.training for m in norms(plain))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_a_trainer_holds_them_in_a_module_that_is_not_a_transformers_model(bias: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(2, 3, 6, 6))
    apply_lora(model, LoraConfig(r=2, target_modules=["0", "4"], bias=bias))
    before = buffers(model)
    watch = FrozenBatchNorm()
    watch.on_train_begin(None, None, None, model=model)
    model.train()
    model(torch.randn(2, 3, 6, 6))
    assert all(torch.equal(b, before[n]) for n, b in buffers(model).items())
    watch.finished()
    model.train()
    model(torch.randn(2, 3, 6, 6))
    assert not torch.equal(buffers(model)["1.running_mean"], before["1.running_mean"])


def test_the_base_does_move_them() -> None:
    """Or the test above would say nothing."""
    model = tiny_resnet().train()
    before = buffers(model)
    model(**batch())
    assert not all(torch.equal(b, before[n]) for n, b in buffers(model).items())


def test_a_batchnorm_that_is_trained_whole_moves_its_copy_alone() -> None:
    model = tiny_resnet()
    apply_lora(
        model, LoraConfig(r=4, target_modules=["convolution"], modules_to_save=["embedder.embedder.normalization"])
    )
    model.train()
    before = buffers(model)
    model(**batch()).loss.backward()
    moved = [n for n, b in buffers(model).items() if not torch.equal(b, before[n])]
    assert moved
    assert all(".copies.default." in n for n in moved)
