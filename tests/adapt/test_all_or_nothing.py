"""An injection that is cut off anywhere leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, randomize, snapshot, tiny_bert
from torch import Tensor

from hf_lora import INITS, METHODS, LoraConfig, apply_lora
from hf_lora.layers.inits import InitCall
from hf_lora.layers.inits.kaiming import Kaiming
from hf_lora.layers.methods import Additive

IDS = torch.arange(8).view(2, 4)


class Stopping:
    """Counts down, and then raises."""

    left = 0
    error: type[BaseException] = KeyboardInterrupt

    @classmethod
    def step(cls) -> None:
        cls.left -= 1
        if cls.left < 0:
            raise cls.error("cut off")


class StoppingInit(Kaiming):
    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        Stopping.step()
        return super().__call__(call)


class StoppingMethod(Additive):
    """Stops where the factors of a layer are there already."""

    def start(self, layer: Any, name: str) -> dict[str, Tensor]:
        Stopping.step()
        return super().start(layer, name)


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(INITS, "stopping", StoppingInit())
    monkeypatch.setitem(METHODS, "stopping", StoppingMethod())
    yield
    Stopping.left = 10**9


def described(model: Any) -> Any:
    kinds = [(name, type(module), sorted(module.__dict__)) for name, module in model.named_modules()]
    return kinds, {name: p.requires_grad for name, p in model.named_parameters()}


CONFIG = dict(r=2, target_modules=["query", "dense"], bias="lora_only")


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("field", ["init_lora_weights", "method"])
@pytest.mark.parametrize(("steps", "error"), [(0, KeyboardInterrupt), (1, MemoryError), (4, KeyboardInterrupt)])
def test_all_or_nothing(second: bool, field: str, steps: int, error: type[BaseException]) -> None:
    model = tiny_bert().eval()
    if second:
        apply_lora(model, LoraConfig(**CONFIG), "first")
        randomize(model)
    before, tensors, logits = described(model), snapshot(model), model(IDS).logits
    active = model.active_adapters() if second else []
    Stopping.left, Stopping.error = steps, error
    with pytest.raises(error, match="cut off"):
        apply_lora(model, LoraConfig(**CONFIG, **{field: "stopping"}), "second")
    assert described(model) == before
    assert_same_tensors(snapshot(model), tensors)
    assert torch.equal(model(IDS).logits, logits)
    Stopping.left = 10**9
    apply_lora(model, LoraConfig(**CONFIG, **{field: "stopping"}), "second")
    assert model.active_adapters() == ["second"]
    if second:
        model.delete_adapter("second")
        assert model.active_adapters() == active
        assert torch.equal(model(IDS).logits, logits)
