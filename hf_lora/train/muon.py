"""LoRA-Muon: steepest descent of the adapted weight in the spectral norm (Cesista et al. 2026, arXiv:2606.12921).

Muon replaces the averaged gradient of a matrix by the nearest matrix with orthogonal columns or rows, msign(M) =
M (MᵀM)^(-1/2), so that a step moves every direction by the same amount. Here the matrix is the update s·B A, which
moves by s·(dB A + B dA). With a half of the step for each term, the steepest descent is

    dB = -rate / (2 s) · msign(G_B S_A^(-1/2)) S_A^(-1/2)        S_A = A Aᵀ
    dA = -rate / (2 s) · S_B^(-1/2) msign(S_B^(-1/2) G_A)        S_B = Bᵀ B

where G are the averages of the gradients. To first order, `rate` thus bounds the spectral norm of what a step adds to
the weight, so it depends neither on the rank nor on the sizes of A and B. The second order, s·dB dA, is small but
where B lacks directions: in the first steps of a rank that is higher than that of the gradients.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ..adapt.inner import adapted_part
from ..adapt.walk import adapter_layers
from .precision import full_float32

WHITENING = 1e-4
"""What is added to the diagonal of A Aᵀ and Bᵀ B, relative to their norms: the least that counts of a direction."""
POLAR = 1e-6
"""The same for the Gram matrix of the momentum: float32 does not resolve smaller parts of it."""
POLAR_EXPRESS = (
    (8.287212018, -23.59588652, 17.30038731),
    (4.107059112, -2.947849917, 0.5448431083),
    (3.948690853, -2.908902116, 0.5518191394),
    (3.318419657, -2.488488024, 0.5100489401),
    (2.300652020, -1.668903985, 0.4188073120),
    (1.891301407, -1.267995827, 0.3768040895),
    (1.875001480, -1.250001645, 0.3750001646),
    (1.875, -1.25, 0.375),
)
"""Odd polynomials of degree 5 whose composition takes singular values from 0.001 to 1 to 1: the optimal ones of Amsel
et al. 2025, The Polar Express (arXiv:2505.16932)."""


class Pair(NamedTuple):
    """The factors of a linear layer: A (R, I), B (O, R), and what multiplies their product, which is not 0."""

    a: nn.Parameter
    b: nn.Parameter
    scaling: float


def factor_pairs(model: nn.Module) -> list[Pair]:
    """The factors of all linear layers that are trained in pairs; not those that several layers share."""
    found: list[Pair] = []
    for layer in adapter_layers(adapted_part(model)).values():
        if not layer._lora.shape.is_matrix:
            continue
        for name in layer._lora.names:
            adapter = layer._lora.adapters[name]
            trained: dict[str, Any] = {
                spec.axes: factor.weight
                for kind, factor in layer.factors(name)
                if (spec := adapter.specs[kind]).trainable and factor.weight.requires_grad
            }
            if {"RI", "OR"} <= trained.keys() and adapter.scaling:
                found.append(Pair(trained["RI"], trained["OR"], adapter.scaling))
    uses = defaultdict[int, int](int)
    for pair in found:
        for factor in (pair.a, pair.b):
            uses[id(factor)] += 1
    return [pair for pair in found if uses[id(pair.a)] == uses[id(pair.b)] == 1]


class LoraMuon(Optimizer):
    """LoRA-Muon for pairs of factors, and AdamW for everything else.

    Args:
        adamw: a new optimizer of all parameters; its options also apply to the pairs, such as the first beta.
        pairs: they become groups of their own, the last ones.
        rate: their learning rate.
    """

    def __init__(self, adamw: AdamW, pairs: Sequence[Pair], rate: float) -> None:
        self._adamw, self._pairs = adamw, {id(pair.a): pair for pair in pairs}
        taken = {id(factor) for pair in pairs for factor in (pair.a, pair.b)}
        rest, muon = list[dict[str, Any]](), list[dict[str, Any]]()
        for group in adamw.param_groups:
            for groups, is_taken in ((rest, False), (muon, True)):
                if params := [p for p in group["params"] if (id(p) in taken) == is_taken]:
                    options = {"lr": rate, "muon": True} if is_taken else {"muon": False}
                    groups.append({**group, **options, "params": params})
        super().__init__([*rest, *muon], adamw.defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._adamw.state = self.state  # shared anew: loading a state replaces it and the groups
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.step()
        for group in self.param_groups:
            if group["muon"]:
                pairs = (pair for p in group["params"] if (pair := self._pairs.get(id(p))) is not None)
                for alike in _alike([p for p in pairs if p.a.grad is not None and p.b.grad is not None]):
                    with full_float32(alike[0].a.device):  # Gram matrices that are rounded more are not positive
                        self._step_pairs(alike, group)
        return loss

    def _step_pairs(self, alike: Sequence[Pair], group: dict[str, Any]) -> None:
        """A step of pairs of the same rank on the same device."""
        rate, beta, decay = group["lr"], group["betas"][0], group["weight_decay"]
        # Both from the same point. The step of B first, and that of A in the geometry of the new B, would bound what
        # they add together, but was worse: an F1 of 0.665 instead of 0.682 (answers.py, two seeds).
        changes = [self._average(pair.a, beta) for pair in alike]
        changes += [self._average(pair.b, beta).mT for pair in alike]
        # A is changed in the geometry of B, and the reverse.
        inner = whitening([_gram(pair.b.mT) for pair in alike] + [_gram(pair.a) for pair in alike])
        mixed = [root @ change for root, change in zip(inner, changes, strict=True)]
        polar = inverse_roots([_gram(each) for each in mixed])
        steps = [r.mT @ (p @ each) for r, p, each in zip(inner, polar, mixed, strict=True)]
        for i, pair in enumerate(alike):
            size = rate / (2 * abs(pair.scaling))
            for factor, step in ((pair.a, steps[i]), (pair.b, steps[len(alike) + i].mT)):
                factor.mul_((1 - rate * decay) ** 0.5)  # so the product's decay is that of AdamW
                factor.sub_((size * step).to(factor.dtype))

    def _average(self, factor: nn.Parameter, beta: float) -> Tensor:
        """Nesterov's average of the gradients in float32."""
        assert factor.grad is not None
        gradient, state = factor.grad.float(), self.state[factor]
        if "average" not in state:
            state["average"] = torch.zeros_like(gradient)
        elif state["average"].dtype != gradient.dtype:  # PyTorch loads a state in the dtype of its parameter
            state["average"] = state["average"].float()
        state["average"].lerp_(gradient, 1 - beta)
        return torch.lerp(gradient, state["average"], beta)


def whitening(grams: Sequence[Tensor]) -> Tensor:
    """W with Wᵀ W = S⁻¹, from Cholesky factors, for damped S (R, R); (N, R, R).

    A step is the same for every such W, also for the symmetric one, S^(-1/2).
    """
    stack, norms = _normalized(grams, WHITENING)
    lower = torch.linalg.cholesky_ex(stack).L
    one = torch.eye(stack.shape[-1], device=stack.device).expand_as(stack)
    return torch.linalg.solve_triangular(lower, one, upper=False) * norms.rsqrt()


def inverse_roots(grams: Sequence[Tensor]) -> Tensor:
    """S^(-1/2) for damped S (R, R); (N, R, R).

    By matrix products alone, which every device is fast at: p(S) with the polynomials of `POLAR_EXPRESS`.
    """
    stack, norms = _normalized(grams, POLAR)
    roots: Tensor | None = None
    for linear, cubic, quintic in POLAR_EXPRESS:
        factor = torch.baddbmm(stack, stack, stack, beta=cubic, alpha=quintic)
        factor.diagonal(dim1=-2, dim2=-1).add_(linear)
        roots = factor if roots is None else factor @ roots
        stack = factor @ stack @ factor
    assert roots is not None
    return roots * norms.rsqrt()


def _normalized(grams: Sequence[Tensor], damping: float) -> tuple[Tensor, Tensor]:
    """(S / |S| + damping, |S|) with |S| the Frobenius norm: (N, R, R) and (N, 1, 1). A norm of zero counts as 1."""
    stack = torch.stack(list(grams))
    largest = stack.abs().amax((-2, -1), keepdim=True)  # squares of very small or large values are 0 or infinite
    largest = torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.matrix_norm(stack / largest, keepdim=True)
    norms = torch.where(norms > 0, norms, 1.0) * largest
    stack = stack / norms
    stack.diagonal(dim1=-2, dim2=-1).add_(damping)
    return stack, norms


def _gram(matrix: Tensor) -> Tensor:
    """M Mᵀ (R, R) in float32."""
    matrix = matrix.float()
    return matrix @ matrix.mT


def _alike(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs of the same rank on the same device."""
    groups = defaultdict[Any, list[Pair]](list)
    for pair in pairs:
        groups[pair.a.shape[0], pair.a.device].append(pair)
    yield from groups.values()
