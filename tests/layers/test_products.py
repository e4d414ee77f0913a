"""The low-rank product as one autograd function, alone and for layers that share their input."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    adapter_gradients,
    assert_near,
    assert_same_tensors,
    backward,
    batch_for,
    randomize,
    relative_error,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
)
from torch import Tensor, nn

from hf_lora import LoraConfig, StateError, apply_lora, share_inputs
from hf_lora.adapt.inject import inject
from hf_lora.adapt.walk import adapter_layers
from hf_lora.layers.ops import Operand, lora_products

MODELS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "bert": tiny_bert, "t5": tiny_t5, "gpt2": tiny_gpt2}
GROUPS = {  # by reading the models: what is handed one tensor by one parent
    "llama": 2 * [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}],
    "bert": 2 * [{"query", "key", "value"}],
    "t5": 2 * [{"q", "k", "v"}] + [{"k", "v"}],  # in cross-attention the query comes from the decoder
    "gpt2": [],  # its query, key and value are one layer
}


def pair(name: str = "llama", dtype: torch.dtype = torch.float32, **config: Any) -> tuple[Any, Any]:
    """The same model with and without groups."""
    alone = randomize(apply_lora(MODELS[name](), LoraConfig(**{"r": 4, **config}))).to(dtype)
    shared: Any = copy.deepcopy(alone)
    share_inputs(shared, **batch_for(shared))
    return alone, shared


class Attention(nn.Module):
    """Three layers of one input, and what a test wants to happen between their calls."""

    def __init__(self, between: Callable[[Attention, Tensor], Tensor] = lambda self, x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, n) for n in (6, 4, 4))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x = self.between(self, x)
        return torch.cat([q, self.k(x), self.v(x)], -1)


def attention(between: Callable[[Any, Tensor], Tensor] = lambda self, x: x, **config: Any) -> tuple[Any, Any]:
    """An `Attention` that does `between`, without and with a group that was found while nothing was between."""
    alone = Attention()
    inject(alone, LoraConfig(**{"r": 2, "target_modules": ["q", "k", "v"], **config}), "default")
    randomize(alone)
    shared = copy.deepcopy(alone)
    assert share_inputs(shared, torch.randn(3, 6)) == [("q", "k", "v")]
    alone.between = shared.between = between
    return alone.train(), shared.train()


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_(True)
    y = model(x * 1.0)
    y.square().sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **adapter_gradients(model)}


def assert_equal_outcomes(alone: nn.Module, shared: nn.Module) -> None:
    x = torch.randn(3, 6)
    expected, found = outcome(alone, x), outcome(shared, x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name], value, torch.float32, 8)


# The function --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [True, False])
def test_first_and_second_gradients_are_those_of_finite_differences(weights: bool) -> None:
    torch.manual_seed(0)
    sizes = ((4, 2), (5, 3))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)

    def operands(base: Tensor, bias: Tensor, a: Tensor, b: Tensor, *rest: Tensor) -> list[Operand]:
        more = operands(*rest) if rest else []
        return [Operand(base, bias if weights else None, a, b, 0.7), *more]

    tensors = []
    for o, r in sizes:
        shapes = ((o, 6) if weights else (2, 3, o), (o,), (r, 6), (o, r))
        tensors += [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return lora_products(x, operands(*given), weights=weights)

    assert torch.autograd.gradcheck(function, (x, *tensors))
    assert torch.autograd.gradgradcheck(function, (x, *tensors))


def test_an_output_that_nobody_uses_costs_no_gradient() -> None:
    x = torch.randn(3, 6, requires_grad=True)

    def make(o: int) -> Operand:
        a, b = (torch.randn(shape, requires_grad=True) for shape in ((2, 6), (o, 2)))
        return Operand(torch.randn(o, 6), None, a, b, 1.0)

    first, second = make(4), make(5)
    y, _ = lora_products(x, [first, second], weights=True)
    y.sum().backward()
    assert first.a.grad is not None
    assert second.b.grad is None
    expected = torch.ones(3, 4) @ (first.base + first.b.detach() @ first.a.detach())
    assert x.grad is not None
    assert_near(x.grad, expected, torch.float32, 8)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_outputs_may_be_changed_in_place(weights: bool, count: int) -> None:
    """As `nn.ReLU(inplace=True)` does with what a linear layer gives it."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    operands = [
        Operand(torch.randn((4, 6) if weights else (2, 3, 4)), None, torch.randn(2, 6), torch.randn(4, 2), 1.0)
    ]
    operands *= count
    expected = [y * 2 for y in lora_products(x, operands, weights=weights)]
    found = [y.mul_(2) for y in lora_products(x, operands, weights=weights)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        (gradient,) = torch.autograd.grad(one.sum(), x, retain_graph=True)
        assert torch.equal(gradient, torch.autograd.grad(other.sum(), x, retain_graph=True)[0])


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6)], ids=str)
def test_inputs_of_any_shape(shape: tuple[int, ...]) -> None:
    alone, shared = attention()
    x = torch.randn(shape)
    assert shared(x).shape == (*shape[:-1], 14)
    assert torch.equal(shared(x), alone(x)) or shape
    outcome(shared, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_near_to_float64_as_pefts(dtype: torch.dtype, tmp_path: Any) -> None:
    """A model whose base and adapters compute in one dtype, against the same weights in float64."""
    from peft import PeftModel

    errors: dict[str, list[float]] = {"ours": [], "peft": []}
    for seed in range(10):
        model = randomize(apply_lora(tiny_llama(seed), LoraConfig(r=4, task_type="CAUSAL_LM")), seed).to(dtype)
        batch = batch_for(model)
        model.save_pretrained(tmp_path / str(seed))
        for factor in (p for p in model.parameters() if p.requires_grad):
            factor.data = factor.to(dtype).float()  # so that all compute with the same numbers
        share_inputs(model, **batch)
        exact: Any = copy.deepcopy(model)
        for parameter in exact.parameters():
            parameter.data = parameter.data.double()
        other = PeftModel.from_pretrained(
            tiny_llama(seed).to(dtype), tmp_path / str(seed), is_trainable=True, autocast_adapter_dtype=False
        ).to(dtype)
        reference = backward(exact, batch)
        renamed = {n.removeprefix("base_model.model."): g for n, g in backward(other, batch).items()}
        assert renamed.keys() == reference.keys()
        for key, gradients in (("ours", backward(model, batch)), ("peft", renamed)):
            total = sum(float((gradients[n].double() - g).square().sum()) for n, g in reference.items())
            errors[key].append((total / sum(float(g.square().sum()) for g in reference.values())) ** 0.5)
    # Means of ten. In half precision each is off by a few percent; in float32 the order in which the machine's library
    # adds decides, and makes either one the nearer by a factor.
    bound = 2.0 if dtype == torch.float32 else 1.15
    assert sum(errors["ours"]) <= bound * sum(errors["peft"])


# Layers that share their input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_what_one_parent_hands_one_tensor(name: str) -> None:
    model = apply_lora(MODELS[name](), LoraConfig(r=4))
    model.train()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    found = share_inputs(model, **batch_for(model))
    assert [{path.rpartition(".")[2] for path in group} for group in found] == GROUPS[name]
    assert all(len({path.rpartition(".")[0] for path in group}) == 1 for group in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(d, a) for d in (torch.float64, torch.float32, torch.bfloat16) for a in (False, True) if not a or d.itemsize < 8],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_groups_give_the_gradients_of_single_layers(name: str, dtype: torch.dtype, autocast: bool) -> None:
    whole: dict[str, Any] = {"modules_to_save": []} if dtype == torch.float64 else {}  # a head computes in float32
    alone, shared = pair(name, dtype, **whole)
    if dtype == torch.float64:
        for model in (alone, shared):
            for parameter in model.parameters():  # a factor stays float32 under .to()
                parameter.data = parameter.data.double()
    batch = batch_for(alone)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, found = backward(alone.train(False), batch), backward(shared, batch)
    assert found.keys() == expected.keys()
    rounds = torch.bfloat16 if autocast else dtype
    for key, gradient in expected.items():  # two ways of rounding bf16 differ by what each is off by
        assert_near(found[key], gradient, rounds, 12 if rounds == torch.bfloat16 else 256)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_groups_under_activation_checkpointing(reentrant: bool) -> None:
    _, model = pair(lora_dropout=0.3)
    model.train()
    batch = batch_for(model)
    torch.manual_seed(1)
    expected = backward(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.manual_seed(1)
    assert_same_tensors(backward(model, batch), expected)


def test_a_group_draws_one_mask() -> None:
    _, model = attention(lora_dropout=0.5)
    for layer in (model.q, model.k):
        with torch.no_grad():
            layer.weight.zero_()
            layer.bias.zero_()
            layer.lora_A["default"].weight.copy_(torch.eye(2, 6))
            layer.lora_B["default"].weight.copy_(torch.ones(layer.out_features, 2))
    y = model(torch.ones(500, 6))
    assert torch.equal(y[:, 0], y[:, 6])
    assert 0.2 < (y[:, 0] == 0).float().mean() < 0.3  # both elements that count were dropped


BETWEEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "another tensor": lambda self, x: x * 2,
    "a copy": lambda self, x: x.clone(),
    "a layer called twice": lambda self, x: x + 0 * self.q(x).sum() + self.k(x).sum(),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_a_call_that_is_not_as_recorded_is_computed_alone(between: Callable[[Any, Tensor], Tensor]) -> None:
    assert_equal_outcomes(*attention(between))


def test_a_tensor_that_was_changed_in_place_is_read_again() -> None:
    """No backward is possible then, with or without adapters; a first forward of reentrant checkpointing is."""
    alone, shared = attention(lambda self, x: x.add_(1.0))
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert_near(shared(x.clone()), alone(x.clone()), torch.float32, 8)


def test_members_that_differ() -> None:
    assert_equal_outcomes(*attention(rank_pattern={"k": 3}, alpha_pattern={"v": 7}))
    models = attention()
    for model in models:  # another adapter, on two of them, beside the first or alone
        inject(model, LoraConfig(r=3, target_modules=["q", "v"]), "second")
        randomize(model, 3)
    from hf_lora.adapt.activation import set_active
    from hf_lora.adapt.state import require_state

    for names in (("second",), ("default", "second"), ("default",)):
        for model in models:
            set_active(model, require_state(model, "test"), names)
        assert_equal_outcomes(*models)
    for model in models:
        model.k.requires_grad_(True)  # a trained weight
        model.v.eval()
        model.q.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
        model.v.register_forward_hook(lambda module, args, y: y * 2)
    assert_equal_outcomes(*models)
    assert models[0].k.weight.grad is not None


def test_a_skipped_member_keeps_nothing_alive_for_long() -> None:
    _, model = attention()
    x = torch.randn(3, 6)
    held = weakref.ref(x)
    model.q(x)
    del x
    assert model.q._lora.activity.shared_outputs is not None
    model(torch.randn(3, 6)).sum().backward()
    assert model.q._lora.activity.shared_outputs is None
    assert held() is None
    with torch.inference_mode():
        model(torch.randn(3, 6))


def test_groups_of_copies_are_their_own_and_groups_end_with_the_adapters() -> None:
    _, model = pair()
    batch = batch_for(model)
    expected = backward(model, batch)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = set(adapter_layers(twin).values())
        groups = [layer._lora.group for layer in own if layer._lora.group]
        assert len(groups) == 10
        assert all(member in own for group in groups for member in group)
        assert_same_tensors(backward(twin, batch), expected)
    twin.model.layers[0].self_attn.k_proj = nn.Linear(32, 16)  # replaced: the others go on
    twin.requires_grad_(False)
    assert twin(**batch).loss.isfinite()
    y = model(**batch).logits
    model.merge_adapter()
    assert relative_error(model(**batch).logits, y) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, y)
    plain = model.unload()
    assert not adapter_layers(plain)
    with pytest.raises(StateError, match="share_inputs: this LlamaForCausalLM has no adapters"):
        share_inputs(plain, **batch)


def test_a_call_that_fails_leaves_no_group_and_no_hook() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4)).train()
    share_inputs(model, **batch_for(model))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        share_inputs(model)
    assert not any(layer._lora.group for layer in adapter_layers(model).values())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
