"""Layers that share their input give, whatever happens between their calls, what they give alone."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import randomize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lora import LoraConfig, share_inputs
from hf_lora.adapt.activation import set_active
from hf_lora.adapt.inject import inject
from hf_lora.adapt.merge import merge, set_enabled, unmerge
from hf_lora.adapt.mixing import scale_adapter
from hf_lora.adapt.state import require_state

LAYERS = ("q", "k", "v")


class Siblings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (6, 4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def pair(dropout: float = 0.0) -> tuple[Any, Any]:
    """The same layers alone and as a group."""
    alone: Any = Siblings()
    inject(alone, LoraConfig(r=2, target_modules=list(LAYERS), lora_dropout=dropout), "one")
    inject(alone, LoraConfig(r=3, target_modules=["q", "v"], lora_dropout=dropout), "two")
    set_active(alone, require_state(alone, "test"), ("one",))
    shared = copy.deepcopy(randomize(alone).train())
    assert share_inputs(shared, torch.randn(3, 6)) == [LAYERS]
    return alone.train(), shared


class Walk:
    """Calls of the layers with other things between them. Two walks with one seed do the same to two models."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.random = model, random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.leaf = torch.randn(3, 6, generator=self.generator).requires_grad_(self.random.random() < 0.6)
        self.x = self.leaf * 1.0
        self.outputs: list[Tensor] = []
        self.checkpointed: list[Tensor] = []
        self.trace: list[str] = []

    def go(self, steps: int) -> Iterator[dict[str, Any]]:
        """What can be seen after each step."""
        for _ in range(steps):
            event: Callable[[Walk], object] = self.random.choice(EVENTS)
            self.trace.append(event.__name__)
            try:
                event(self)
            except RuntimeError:  # autograd refuses it: a graph that was freed, or a tensor that was changed
                yield {"refused": True}
                return
            yield self.seen()

    def seen(self) -> dict[str, Any]:
        found: dict[str, Any] = {f"output {i}": y.detach().clone() for i, y in enumerate(self.outputs[-2:])}
        found |= {f"requires {i}": y.requires_grad for i, y in enumerate(self.outputs[-2:])}
        found |= {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return found | ({"x": self.leaf.grad.clone()} if self.leaf.grad is not None else {})

    def layer(self) -> Any:
        return self.model.get_submodule(self.random.choice(LAYERS))

    def parameter(self) -> tuple[nn.Module, str]:
        """A parameter of one of the layers, as its module and name."""
        path, _, name = self.random.choice([n for n, _ in self.model.named_parameters()]).rpartition(".")
        return self.model.get_submodule(path), name

    def call(self) -> None:
        layer, modes = self.layer(), self.random.choice(MODES)
        with modes():
            self.outputs.append(layer(self.x))

    def forget_checkpointed(self) -> None:
        """Their backward would run the forward again with other adapters, with or without groups."""
        self.outputs = [y for y in self.outputs if not any(y is other for other in self.checkpointed)]

    def call_checkpointed(self) -> None:
        layer, reentrant = self.layer(), self.random.random() < 0.5
        self.outputs.append(checkpoint(layer, self.x, use_reentrant=reentrant))
        self.checkpointed.append(self.outputs[-1])

    def call_all(self) -> None:
        self.outputs.append(self.model(self.x))

    def call_all_checkpointed(self) -> None:
        self.outputs.append(checkpoint(self.model, self.x, use_reentrant=self.random.random() < 0.5))
        self.checkpointed.append(self.outputs[-1])

    def take_another_input(self) -> None:
        self.leaf = torch.randn(3, 6, generator=self.generator).requires_grad_(self.random.random() < 0.6)
        self.x = self.leaf * 1.0

    def set_mode(self) -> None:
        self.layer().train(self.random.random() < 0.5)

    @torch.no_grad()
    def change_a_parameter(self) -> None:
        module, name = self.parameter()
        module.get_parameter(name).mul_(1.5)

    def replace_values(self) -> None:
        module, name = self.parameter()
        parameter = module.get_parameter(name)
        parameter.data = parameter.data * 0.7

    def replace_a_parameter(self) -> None:
        module, name = self.parameter()
        old = module.get_parameter(name)
        setattr(module, name, nn.Parameter(old.detach() * self.random.choice([1.0, 1.2]), old.requires_grad))

    def toggle_a_gradient(self) -> None:
        module, name = self.parameter()
        parameter = module.get_parameter(name)
        parameter.requires_grad_(not parameter.requires_grad)
        self.forget_checkpointed()  # whether torch refuses the other graph depends on how many tensors it saves

    def change_the_input(self) -> None:
        with torch.no_grad():
            self.x.add_(0.5)

    def require_a_gradient_of_the_input(self) -> None:
        if self.x.is_leaf:
            self.x.requires_grad_(not self.x.requires_grad)

    def backward(self) -> None:
        chosen = [y for y in self.outputs if y.requires_grad and self.random.random() < 0.6]
        if chosen:
            loss = torch.stack([y.float().square().sum() for y in chosen]).sum()
            loss.backward(retain_graph=self.random.random() < 0.5)

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)

    def switch(self) -> None:
        names = self.random.choice([("one",), ("two",), ("one", "two"), ("two", "one"), ()])
        set_active(self.model, require_state(self.model, "test"), names)
        self.forget_checkpointed()

    def disable(self) -> None:
        set_enabled(self.model, self.random.random() < 0.5)
        self.forget_checkpointed()

    def scale(self) -> None:
        scale_adapter(self.model, "one", self.random.choice([0.5, 2.0]), "test")

    def merge_and_unmerge(self) -> None:
        state = require_state(self.model, "test")
        if state.activity.active and state.activity.enabled:
            merge(self.model)
            unmerge(self.model)


MODES: list[Callable[[], contextlib.AbstractContextManager[object]]] = [
    contextlib.nullcontext, contextlib.nullcontext, contextlib.nullcontext, torch.no_grad, torch.enable_grad,
    torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
]  # fmt: skip
EVENTS = [
    *6 * [Walk.call], *2 * [Walk.call_all], *2 * [Walk.backward], Walk.call_checkpointed, Walk.call_all_checkpointed,
    Walk.take_another_input, Walk.set_mode, Walk.change_a_parameter, Walk.replace_values, Walk.replace_a_parameter,
    Walk.toggle_a_gradient, Walk.change_the_input, Walk.require_a_gradient_of_the_input, Walk.step, Walk.switch,
    Walk.disable, Walk.scale, Walk.merge_and_unmerge,
]  # fmt: skip


def assert_the_same(seed: int, steps: int) -> None:
    alone, shared = (Walk(model, seed) for model in pair())
    for expected, found in zip(alone.go(steps), shared.go(steps), strict=True):
        if found.keys() == {"refused"} and "change_the_input" in shared.trace:
            return  # a group saves the input for all of its layers, so torch refuses the backward of each of them
        assert found.keys() == expected.keys(), shared.trace
        for name, value in expected.items():
            if isinstance(value, Tensor):
                rounds = torch.bfloat16 if any(y.dtype == torch.bfloat16 for y in alone.outputs) else torch.float32
                error = float((found[name].double() - value.double()).norm() / value.double().norm().clamp_min(1e-6))
                assert error <= 64 * torch.finfo(rounds).eps, (name, error, shared.trace)
            else:
                assert found[name] == value, (name, shared.trace)


@pytest.mark.parametrize("seeds", range(10))
def test_short_walks(seeds: int) -> None:
    for seed in range(20 * seeds, 20 * seeds + 20):
        assert_the_same(seed, 12)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", range(20))
def test_long_walks(seeds: int) -> None:
    for seed in range(1000 + 100 * seeds, 1100 + 100 * seeds):
        assert_the_same(seed, 25)
