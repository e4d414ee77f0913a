"""`muon_learning_rate`: a step is the steepest one by singular values in float64, and everything else has AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_tensors, tiny_llama
from tiny import adapter_values, sentences, tiny_bert
from torch import Tensor, nn
from torch.optim import AdamW

from hf_lora import LoraConfig, LoraTrainer, LoraTrainingArguments, apply_lora
from hf_lora.adapt.walk import adapter_layers
from hf_lora.errors import ConfigError
from hf_lora.train import muon
from hf_lora.train.muon import POLAR, WHITENING, LoraMuon, Pair, factor_pairs, inverse_roots, whitening

Make = Callable[..., Any]
RATE = 0.02


def matrix(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(r: int = 4, inputs: int = 12, outputs: int = 9, scaling: float = 2.0, balance: float = 1.0) -> Pair:
    a, b = matrix(r, inputs, seed=0, scale=balance), matrix(outputs, r, seed=1, scale=1 / balance)
    return Pair(nn.Parameter(a), nn.Parameter(b), scaling)


def with_gradient(found: Pair) -> Pair:
    """The gradients of a loss whose gradient for the weight is a random matrix G: s Bᵀ G and s G Aᵀ."""
    whole = matrix(found.b.shape[0], found.a.shape[1], seed=2)
    found.a.grad = found.scaling * found.b.detach().T @ whole
    found.b.grad = found.scaling * whole @ found.a.detach().T
    return found


def msign(m: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(m, full_matrices=False)
    return u @ v


def damped_root(s: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(s)
    return (vectors * (values + WHITENING * values.norm()).rsqrt()) @ vectors.T


def stepped(found: Pair, rate: float = RATE, **options: Any) -> tuple[Tensor, Tensor]:
    """The changes of A and B in a step, in float64."""
    before = [factor.detach().double() for factor in (found.a, found.b)]
    LoraMuon(AdamW([found.a, found.b], lr=1.0, **{"weight_decay": 0.0, **options}), [found], rate).step()
    a, b = (factor.detach().double() - old for factor, old in zip((found.a, found.b), before, strict=True))
    return a, b


@pytest.mark.parametrize(("r", "inputs", "outputs"), [(4, 12, 9), (1, 5, 7), (6, 6, 20), (8, 64, 4)])
def test_a_step_is_that_of_the_singular_values(r: int, inputs: int, outputs: int) -> None:
    found = with_gradient(pair(r, inputs, outputs))
    a, b, grad_a, grad_b = (t.detach().double() for t in (found.a, found.b, found.a.grad, found.b.grad))
    root_a, root_b, size = damped_root(a @ a.T), damped_root(b.T @ b), RATE / (2 * found.scaling)
    da, db = stepped(found)
    if r <= min(inputs, outputs):  # else some singular values are 0, and their directions are not defined
        torch.testing.assert_close(db, -size * msign(grad_b @ root_a) @ root_a, rtol=1e-3, atol=1e-5 * RATE)
        torch.testing.assert_close(da, -size * root_b @ msign(root_b @ grad_a), rtol=1e-3, atol=1e-5 * RATE)
    for part in (found.scaling * db @ a, found.scaling * b @ da):
        assert float(torch.linalg.matrix_norm(part, 2)) <= RATE / 2 * (1 + 1e-4)


def test_what_the_weight_gains_depends_neither_on_the_balance_of_the_factors_nor_on_alpha() -> None:
    gains = []
    for options in ({}, {"balance": 8.0}, {"balance": 0.1}, {"scaling": 0.5}):
        found = with_gradient(pair(**options))
        a, b = found.a.detach().double(), found.b.detach().double()
        da, db = stepped(found)
        gains.append(found.scaling * (db @ a + b @ da))
    for gain in gains[1:]:
        torch.testing.assert_close(gain, gains[0], rtol=1e-3, atol=1e-4 * RATE)


def test_a_new_adapter_moves_b_alone() -> None:
    found = pair()
    found.b.data.zero_()
    da, db = stepped(with_gradient(found))
    assert not da.any()
    assert db.abs().max() > 0
    term = found.scaling * db @ found.a.detach().double()
    assert float(torch.linalg.matrix_norm(term, 2)) == pytest.approx(RATE / 2, rel=1e-3)


def test_weight_decay_is_that_of_the_product() -> None:
    found = pair()
    before = found.b.detach().double() @ found.a.detach().double()
    found.a.grad, found.b.grad = torch.zeros_like(found.a), torch.zeros_like(found.b)
    stepped(found, weight_decay=0.5)
    after = found.b.detach().double() @ found.a.detach().double()
    torch.testing.assert_close(after, (1 - RATE * 0.5) * before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_roots_are_those_of_eigenvalues(condition: float, size: float) -> None:
    """Relative to the largest singular value of the matrix that they whiten, sqrt(S)."""
    vectors = torch.linalg.qr(matrix(16, 16, seed=3).double()).Q
    values = size * torch.logspace(0, -math.log10(condition), 16, dtype=torch.float64)
    s, root = ((vectors * v) @ vectors.T for v in (values, values.sqrt()))
    damped = (values + POLAR * values.norm()).rsqrt()
    got = inverse_roots([s.float()])[0].double() @ root
    torch.testing.assert_close(got, (vectors * damped) @ vectors.T @ root, rtol=0, atol=2e-3)
    inner = whitening([s.float()])[0].double() @ root
    whole = (vectors * (values / (values + WHITENING * values.norm()))) @ vectors.T
    torch.testing.assert_close(inner.T @ inner, whole, rtol=0, atol=2e-3)


def test_the_sign_of_the_scaling_changes_nothing() -> None:
    """s and B give the weight that -s and -B give; PEFT's files may have a negative alpha."""
    found, mirrored = with_gradient(pair()), pair()
    mirrored = Pair(mirrored.a, nn.Parameter(-mirrored.b.detach()), -mirrored.scaling)
    a, b = stepped(found)
    a_too, b_too = stepped(with_gradient(mirrored))
    assert torch.equal(a_too, a)
    assert torch.equal(b_too, -b)


@pytest.mark.parametrize("size", [2.0**-50, 2.0**40])
def test_the_size_of_the_gradients_changes_nothing(size: float) -> None:
    found, scaled = with_gradient(pair()), with_gradient(pair())
    for factor in (scaled.a, scaled.b):
        assert factor.grad is not None
        factor.grad *= size
    for step, expected in zip(stepped(scaled), stepped(found), strict=True):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_step_of_nothing_is_zero() -> None:
    found = pair()
    for factor in (found.a, found.b):
        factor.data.zero_()
        factor.grad = torch.zeros_like(factor)
    assert not any(change.any() for change in stepped(found))


def test_bfloat16_factors_move() -> None:
    found = with_gradient(pair())
    half = Pair(*(nn.Parameter(f.detach().bfloat16()) for f in (found.a, found.b)), found.scaling)
    half.a.grad, half.b.grad = found.a.grad.bfloat16(), found.b.grad.bfloat16()
    optimizer = LoraMuon(AdamW([half.a, half.b], lr=1.0), [half], 0.5)
    before = half.b.detach().clone()
    optimizer.step()
    assert half.b.dtype == torch.bfloat16
    assert not torch.equal(half.b, before)
    assert {state["average"].dtype for state in optimizer.state.values()} == {torch.float32}
    again = LoraMuon(AdamW([half.a, half.b], lr=1.0), [half], 0.5)
    again.load_state_dict(optimizer.state_dict())
    again.step()
    assert {state["average"].dtype for state in again.state.values()} == {torch.float32}


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_faster_products_are_not_for_gram_matrices(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polynomials of a Gram matrix with negative eigenvalues, as TF32 and bfloat16 round them, diverge."""
    seen: list[str] = []

    def roots(grams: Any) -> Tensor:
        seen.extend((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))
        return inverse_roots(grams)

    monkeypatch.setattr(muon, "inverse_roots", roots)
    torch.set_float32_matmul_precision(precision)
    try:
        assert all(torch.isfinite(change).all() for change in stepped(with_gradient(pair())))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == ["ieee", "ieee"]


# In a training -------------------------------------------------------------------------------------------------------


def run(args: Any, config: LoraConfig | None = None, resume: Any = None) -> Any:
    config = config or LoraConfig(r=4, bias="all")
    trainer = LoraTrainer(tiny_bert(), args, train_dataset=sentences(), lora_config=config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_step_under_autocast_is_in_float32() -> None:
    first, second = (with_gradient(pair(8, 64, 16)) for _ in range(2))
    plain = stepped(first)
    with torch.autocast("cpu", torch.bfloat16):
        found = stepped(second)
    assert all(torch.equal(*each) for each in zip(plain, found, strict=True))


def test_everything_else_has_the_groups_of_adamw(arguments: Make) -> None:
    trainer = run(arguments(max_steps=2, head_learning_rate=3e-3, muon_learning_rate=RATE, weight_decay=0.1))
    model, groups = trainer.model, trainer.optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    *rest, last = groups
    assert {names[id(p)].split(".")[-3] for p in last["params"]} == {"lora_A", "lora_B"}
    assert last["initial_lr"] == RATE
    assert last["weight_decay"] == 0.1
    others = {names[id(p)] for group in rest for p in group["params"]}
    assert others
    assert not any(".lora_A." in name or ".lora_B." in name for name in others)
    assert 3e-3 in {group["initial_lr"] for group in rest}


def test_what_is_not_a_factor_is_trained_as_by_adamw() -> None:
    """With the same gradients, bit for bit."""
    model, expected = (nn.Linear(5, 3), nn.Linear(5, 3))
    expected.load_state_dict(model.state_dict())
    found = pair()
    ours = LoraMuon(AdamW([*model.parameters(), found.a, found.b], lr=1e-2), [found], RATE)
    theirs = AdamW(expected.parameters(), lr=1e-2)
    for step in range(3):
        for a, b in zip(model.parameters(), expected.parameters(), strict=True):
            a.grad = b.grad = matrix(*a.shape, seed=10 + step)
        with_gradient(found)
        ours.step()
        theirs.step()
    assert_same_tensors(model.state_dict(), expected.state_dict())


def test_a_resumed_training_gives_the_same_bits(arguments: Make) -> None:
    common: dict[str, Any] = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 4, "muon_learning_rate": RATE,
        "lr_scheduler_type": "cosine", "warmup_steps": 2,
    }  # fmt: skip
    whole = run(arguments(name="whole", **common))
    resumed = run(arguments(name="resumed", **common), resume=f"{whole.args.output_dir}/checkpoint-4")
    assert_same_tensors(adapter_values(resumed.model), adapter_values(whole.model))


@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4, use_dora=True), LoraConfig(r=4, lora_dropout=0.3), LoraConfig(r=4, init_lora_weights="pissa")],
)
def test_it_trains_other_adapters(arguments: Make, config: LoraConfig) -> None:
    before = adapter_values(run(arguments(max_steps=1, muon_learning_rate=1e-9, learning_rate=1e-9), config).model)
    trainer = run(arguments(max_steps=6, muon_learning_rate=RATE), config)
    after = adapter_values(trainer.model)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert all(not torch.equal(after[name], before[name]) for name in after)


def test_pairs_are_those_of_linear_layers_that_are_trained_whole() -> None:
    model = apply_lora(tiny_llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "v_proj"]))
    assert len(factor_pairs(model)) == 2 * model.config.num_hidden_layers
    frozen = apply_lora(tiny_llama(), LoraConfig(r=4, method="lora_fa"))
    assert factor_pairs(frozen) == []
    for layer in adapter_layers(model).values():
        layer._lora.adapters["default"].scaling = 0.0  # as in a file with alpha=0, which learns nothing
    assert factor_pairs(model) == []


def test_settings_that_contradict_it_are_refused(arguments: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"muon_learning_rate=-1 must be > 0"):
        LoraTrainingArguments("out", muon_learning_rate=-1)
    with pytest.raises(ConfigError, match="loraplus_lr_ratio is for AdamW"):
        LoraTrainingArguments("out", muon_learning_rate=RATE, loraplus_lr_ratio=4)
    with pytest.raises(ConfigError, match="optim chooses SGD"):
        run(arguments(max_steps=1, muon_learning_rate=RATE, optim="sgd"))
    with pytest.raises(ConfigError, match="muon_learning_rate has no effect"):
        run(arguments(max_steps=1, muon_learning_rate=RATE), LoraConfig(r=4, method="lora_fa"))
    model = apply_lora(tiny_bert(), LoraConfig(r=4))
    given = AdamW([p for p in model.parameters() if p.requires_grad])
    trainer = LoraTrainer(
        model, arguments(max_steps=1, muon_learning_rate=RATE), train_dataset=sentences(), optimizers=(given, None)
    )
    with pytest.raises(ConfigError, match="an optimizer was passed"):
        trainer.train()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"muon_learning_rate=0\.02 needs whole factors, but FSDP.*train with DDP"):
        LoraTrainingArguments("out", muon_learning_rate=RATE)
