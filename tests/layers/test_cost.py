"""Injection is linear in the layers, and a third adapter costs no more than the first: counted in Python calls."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from helpers import tiny_llama
from torch import nn

from hf_lora import LoraConfig, apply_lora
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import delete, eject, inject
from hf_lora.adapt.merge import disabled
from hf_lora.adapt.state import require_state
from hf_lora.files.load import load_adapter
from hf_lora.files.save import save_adapter


def calls(action: Callable[[], Any]) -> int:
    """How many Python and C functions `action` calls."""
    count = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def many(layers: int) -> nn.Module:
    block = lambda: nn.ModuleDict({"q": nn.Linear(2, 2), "v": nn.Linear(2, 2)})  # noqa: E731
    return nn.ModuleDict({"layers": nn.ModuleList(block() for _ in range(layers // 2))})


def test_injection_is_linear_in_the_layers() -> None:
    config = LoraConfig(r=1)
    inject(many(10), config)  # what is done once per process
    few, lots = many(1000), many(4000)  # 4,000 take most of a second
    small, large = calls(lambda: inject(few, config)), calls(lambda: inject(lots, config))
    assert large < 4.2 * small
    small, large = calls(lambda: eject(few)), calls(lambda: eject(lots))
    assert large < 4.2 * small


def test_a_third_adapter_costs_no_more_than_the_first(tmp_path: Any) -> None:
    model = many(400)
    config = LoraConfig(r=1, target_modules=["q", "v"])
    inject(many(10), config)
    first = calls(lambda: inject(model, config, "first"))
    inject(model, config, "second")
    # It walks over the others' names, and remembers what they have, to undo an injection that is cut off.
    assert calls(lambda: inject(model, config, "third")) <= 1.2 * first
    eject(model)
    inject(model, config, "first")
    save_adapter(model, tmp_path, "first")
    eject(model)
    load_adapter(model, tmp_path, "zeroth")
    eject(model)
    first = calls(lambda: load_adapter(model, tmp_path, "first"))
    load_adapter(model, tmp_path, "second")
    assert calls(lambda: load_adapter(model, tmp_path, "third")) <= 1.2 * first
    assert calls(lambda: delete(model, "second")) < first


def test_a_third_adapter_allocates_its_own_factors_only() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4))
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    for name in ("second", "third"):
        model.add_adapter(name, LoraConfig(r=4))
    assert sum(p.numel() for p in model.parameters()) == total + 2 * own
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == own


def test_disabling_and_forwards_touch_no_layer() -> None:
    """A `with` block costs the same in a small and in a large model, and unused adapters cost a forward nothing."""
    few, lots = many(20), many(400)
    for model in (few, lots):
        inject(model, LoraConfig(r=1), "first")

    def disable(model: nn.Module) -> None:
        with disabled(model):
            pass

    disable(few)
    assert calls(lambda: disable(few)) == calls(lambda: disable(lots)) < 100

    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(10)])
    targets = LoraConfig(r=1, target_modules=[str(i) for i in range(10)])
    inject(model, targets, "first")
    x = torch.ones(1, 2)
    model(x)
    alone = calls(lambda: model(x))
    for name in ("second", "third", "fourth"):
        inject(model, targets, name)
    set_active(model, require_state(model, "test"), ("first",))
    assert calls(lambda: model(x)) == alone
