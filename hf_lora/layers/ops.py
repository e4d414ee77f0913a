"""The low-rank product as one autograd function, and small tensor operations that the layers share."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dropout import draw_mask, drop_, dropped, dropped_indices


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` in the dtype of its products: that of autocast if autocast is on, otherwise its own.

    With one cast here, the base product and the adapter share the copy that autocast would make for each. Like
    autocast, it leaves float64 unchanged.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


def weight_like(weight: Tensor, x: Tensor) -> Tensor:
    """The float32 master `weight` in the dtype of `x`. If autocast is on, it does the casting and caching.

    A factor that was offloaded after its creation is on meta, where products are garbage; moving it raises.
    """
    if weight.dtype == x.dtype and weight.device == x.device:
        return weight  # the common case first: at one token per step each call counts
    return weight.to(x.device) if torch.is_autocast_enabled(x.device.type) else weight.to(x.device, x.dtype)


def to_float64(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype of folding: float64, so that sums that nearly cancel are correct too."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)  # MPS has no float64


def used_devices() -> list[int]:
    """The CUDA devices whose random state is in use, for `torch.random.fork_rng`."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Within, random numbers of torch, numpy and Python may be drawn; afterwards, the states are those of before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=used_devices()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Within, no module of `model` is in training mode; without `eval()`, which models override."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` of `nn.Module._apply` that moves tensors but does not cast them, so that float32 masters stay float32."""

    def move(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return move


def can_use_functions() -> bool:
    """Whether an autograd function may run: compilers, tracing, functorch transforms and forward-mode differentiation
    need the plain operations."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
    )


def lasting(tensor: Tensor) -> Tensor | None:
    """`tensor` for a cache that later calls read, in whatever mode; None for one that exists only while tracing."""
    if type(tensor) is not Tensor or not can_use_functions():
        return None
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


# The low-rank product ------------------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """One layer in a product: its weight W (O, I) and bias or None, or its output y (…, O) and None."""

    base: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float


class _Plan(NamedTuple):
    """The arguments of the function that are not tensors, one of each per layer. `scalings` include dropout's gain."""

    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    weights: bool
    p: float


def lora_products(x: Tensor, operands: Sequence[Operand], p: float = 0.0, *, weights: bool) -> tuple[Tensor, ...]:
    """y_i = W_i x + b_i + scaling_i · B_i A_i drop(x) for layers that read one x (…, I), in the dtype of x.

    x is read once: the factors A are stacked, the layers share one dropout mask, and one gradient of x is accumulated.
    In addition to what the plain layers save for the backward, it saves x, A x (N, ranks) and one byte per dropped
    element, but no scaled, cast or masked copy.

    Args:
        weights: whether `base` of the operands are weights. Otherwise they are outputs of the layers, in the dtype of
            x, and the updates are added to them.
    """
    gain = 1.0 / (1.0 - p)
    plan = _Plan(tuple(o.a.shape[0] for o in operands), tuple(o.scaling * gain for o in operands), weights, p)
    tensors = (t for o in operands for t in o[:4])
    result: tuple[Tensor, ...] = _LoraProducts.apply(x, plan, *tensors)
    return result


class _LoraProducts(torch.autograd.Function):
    """The backward of `lora_products`, written out.

    With g_i the gradient of y_i and t_i = scaling_i · g_i B_i (N, R), computed once:
    dA_i = t_iᵀ drop(x), dB_i = scaling_i · g_iᵀ h_i, dx = drop(Σ t_i A_i) + Σ g_i W_i.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        bases, biases, a, b = tensors[0::4], tensors[1::4], tensors[2::4], tensors[3::4]
        flat = x.reshape(-1, x.shape[-1])
        mask = draw_mask(flat, plan.p) if plan.p else None
        h = F.linear(flat if mask is None else dropped(flat, dropped_indices(mask, flat, plan.p)), _stacked(a, x))
        kept: list[Tensor] = []
        outputs = []
        for base, bias, part, up, scaling in zip(bases, biases, h.split(plan.ranks, 1), b, plan.scalings, strict=True):
            update = up.to(x).t()
            if plan.weights:
                weight = base.to(x)  # under autocast a copy, which the plain layer saves for its backward too
                kept.append(weight)
                y = F.linear(flat, weight, None if bias is None else bias.to(x))
                y.addmm_(part, update, alpha=scaling)
            else:
                y = torch.addmm(base.reshape(-1, base.shape[-1]), part, update, alpha=scaling)
            # As in matmul, the result is not a view for autograd, so a model may change it in place.
            outputs.append(torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]))
        ctx.plan, ctx.rest, ctx.done, ctx.shape = plan, None, set(), x.shape
        ctx.set_materialize_grads(False)
        # Parameters stay in memory anyway; what is saved is checked as a whole, so they are checked by themselves.
        ctx.parameters = [(t, version_of(t)) for t in (*a, *b, *(bases if plan.weights else ()))]
        casts = (None if weight is base else weight for weight, base in zip(kept, bases, strict=plan.weights))
        needs = ctx.needs_input_grad
        # Only the gradients of A and of the weights read x.
        reads_x = any(needs[4::4]) or (plan.weights and any(needs[2::4]))
        ctx.save_for_backward(x if reads_x else None, h, mask, *casts)
        ctx.mark_non_differentiable(
            *(y for i, y in enumerate(outputs) if not needs[0] and not any(needs[2 + 4 * i : 6 + 4 * i]))
        )
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        plan: _Plan = ctx.plan
        count, needs = len(plan.ranks), ctx.needs_input_grad
        x, h, mask, kept = _unpack(ctx, grads)
        a, b = ([tensor for tensor, _ in ctx.parameters[i : i + count]] for i in (0, count))
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        stacked = _stacked(a, h)
        like = h.new_empty(1).expand(len(h), ctx.shape[-1]) if flat is None else flat
        places = None if mask is None else dropped_indices(mask, like, plan.p)
        masked = flat if places is None or flat is None else dropped(flat, places)
        if torch.is_grad_enabled():  # double backward: h depends on x and A
            if masked is None:
                raise RuntimeError("A is frozen, so the layer's input was not kept for a second derivative.")
            h = F.linear(masked, stacked)
        parts = h.split(plan.ranks, 1)
        flats = [None if g is None else g.reshape(-1, g.shape[-1]) for g in grads]
        t = _columns(flats, b, plan, h)

        dx = None
        if needs[0]:
            dx = t @ stacked
            if places is not None:
                drop_(dx, places)
            for g, weight in zip(flats, kept, strict=plan.weights):
                if g is not None:
                    dx.addmm_(g, weight)
            dx = dx.view(ctx.shape)
        da = () if masked is None or not any(needs[4::4]) else (t.t() @ masked).split(plan.ranks)
        found: list[Any] = [dx, None]
        for i, g in enumerate(flats):
            if g is None:
                found += [None] * 4
                continue
            base, bias, down, up = needs[2 + 4 * i : 6 + 4 * i]
            if not plan.weights:
                found += [grads[i], None]
            else:
                found += [g.t() @ flat if base and flat is not None else None, g.sum(0) if bias else None]
            found.append(da[i].to(a[i]) if down else None)
            # (R, O), then transposed: computing (O, R) directly is slower on a CPU.
            db = torch.addmm(h.new_empty(1), parts[i].t(), g, beta=0, alpha=plan.scalings[i]).t() if up else None
            found.append(None if db is None else db.to(b[i]))
        return tuple(found)


def version_of(tensor: Tensor | None) -> int | None:
    """The number of changes of `tensor` in place; None if PyTorch does not count them."""
    return None if tensor is None or tensor.is_inference() else tensor._version


def _unpack(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor]]:
    """x (None if no gradient needs it), h, mask and the weights.

    The layers are independent, as if each had a function of its own: a backward through some of them leaves what the
    others need, and only parameters of layers with a gradient must be unchanged since the forward.

    Raises:
        RuntimeError: as autograd, if a tensor that is needed was changed in place, or freed.
    """
    count = len(grads)
    now = {i for i, g in enumerate(grads) if g is not None}
    try:
        saved = ctx.saved_tensors
        ctx.done = now
    except RuntimeError:  # freed by a backward through other layers, or changed
        if ctx.rest is None or ctx.done & now:
            raise
        saved, ctx.done = ctx.rest[0], ctx.done | now
        if ctx.rest[1] != version_of(saved[0]):
            raise
    ctx.rest = (saved, version_of(saved[0])) if len(now) < count else None
    if any(version_of(t) != v for i, (t, v) in enumerate(ctx.parameters) if i % count in now):
        raise RuntimeError("A parameter that gradients depend on was changed in place after the forward of its layer.")
    x, h, mask, *casts = saved
    bases = (tensor for tensor, _ in ctx.parameters[2 * count :])
    return x, h, mask, [base if cast is None else cast for base, cast in zip(bases, casts, strict=True)]


def _stacked(factors: Sequence[Tensor], x: Tensor) -> Tensor:
    """The factors A concatenated along the ranks, in the dtype of x."""
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(x)


def _columns(grads: Sequence[Tensor | None], b: Sequence[Tensor], plan: _Plan, h: Tensor) -> Tensor:
    """t (N, ranks): the gradients of the inputs of each B, concatenated."""
    if len(b) == 1:
        g = grads[0]
        assert g is not None  # otherwise autograd would not call this
        return torch.addmm(h.new_empty(1), g, b[0].to(h), beta=0, alpha=plan.scalings[0])
    t, start = torch.empty_like(h), 0
    for g, up, rank, scaling in zip(grads, b, plan.ranks, plan.scalings, strict=True):
        part = t[:, start : start + rank]
        if g is None:
            part.zero_()
        else:
            part.addmm_(g, up.to(h), beta=0, alpha=scaling)
        start += rank
    return t


# Scaled outputs ------------------------------------------------------------------------------------------------------

_ELEMENTS = 1 << 17
"""Elements of a block of rows of a gradient that a core's cache holds."""


def scale_outputs(y: Tensor, change: Tensor, bias: Tensor | None = None) -> Tensor:
    """y + change ∘ (y - bias): the output y of a layer if the weights of its outputs are multiplied by 1 + change.

    Args:
        y: (…, O), or with other axes after O.
        change, bias: (O,), or with axes to multiply y by; `change` in float32.
    """
    if change.dim() == 1 and y.requires_grad and can_use_functions():
        scaled: Tensor = _ScaledOutputs.apply(y, change, bias)
        return scaled
    return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), change.to(y.dtype))


class _ScaledOutputs(torch.autograd.Function):
    """The backward of `scale_outputs`, in one pass over the gradient and y.

    With g the gradient: dy = g + change ∘ g, dchange = Σ g ∘ (y - bias), dbias = - change ∘ Σ g.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, change: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, change, bias)
        return torch.addcmul(y, y if bias is None else y - bias.to(y.dtype), change.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, change, bias = ctx.saved_tensors
        g, y = grad.reshape(-1, grad.shape[-1]), y.reshape(-1, y.shape[-1])
        gain = change.to(g.dtype)
        if torch.is_grad_enabled():  # double backward
            dy, dchange = torch.addcmul(g, g, gain), (g * y).sum(0, dtype=change.dtype)
        else:
            dy, dchange = torch.empty_like(g), torch.zeros_like(change)
            rows = max(1, _ELEMENTS // g.shape[1]) if g.device.type == "cpu" else max(1, len(g))
            for part, of, into in zip(g.split(rows), y.split(rows), dy.split(rows), strict=True):
                torch.addcmul(part, part, gain, out=into)
                dchange += (part * of).sum(0, dtype=change.dtype)
        dbias = None
        if bias is not None:
            total = g.sum(0, dtype=change.dtype)
            dchange = dchange - bias.to(change.dtype) * total
            dbias = (-change * total).to(bias.dtype) if ctx.needs_input_grad[2] else None
        return dy.view(grad.shape), dchange, dbias
