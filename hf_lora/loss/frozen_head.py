"""The loss of a causal language model over its frozen output head, without storing the logits.

A frozen head needs no gradient, so the backward needs only the gradient of the hidden states, which can be computed
in the forward from the logits of a few tokens: for the token x with hidden state h, head W and p = softmax(W h), the
gradient of log p_x with respect to h is W_x - Wᵀp. Each chunk of tokens costs two products with W, its logits are
discarded, and tokens without a label skip the head. A training step saves one gradient with the size of the labeled
hidden states. PyTorch's loss saves the logits, their float32 copy and their gradient, and a token without a label
costs as much as one with a label.

`FrozenHead` integrates this into the forward of a model and verifies it on the first batch: the head returns its
input, the loss function checks that it receives exactly this tensor, and the loss is compared with the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..data.spans import IGNORED
from ..layers.hosts import Host
from ..layers.ops import kept_random_states, to_compute_dtype

CHUNK_ELEMENTS = 2**23
"""Logits per chunk: 32 MiB in float32. Larger chunks were not faster on a CPU, and the products are large enough."""


class Scores(NamedTuple):
    """Scores of the labels per position; zero without a label.

    Args:
        log_probs: (B, T) log-probability of the label, differentiable with respect to the hidden states.
        hits: (B, T) whether no token is likelier than the label; with `predictions`, whether it is the predicted one.
        mask: (B, T) whether there is a label.
        predictions: (B, T) the likeliest token, if requested.
        entropy: (B, T) entropy of the distribution in nats, if requested; not differentiable.
    """

    log_probs: Tensor
    hits: Tensor
    mask: Tensor
    predictions: Tensor | None
    entropy: Tensor | None


def label_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    predictions: bool = False,
    entropy: bool = False,
) -> Scores:
    """Score the labels of hidden states (B, T, H) under a frozen head (V, H), in chunks of tokens.

    Products run in autocast's dtype if autocast is on, otherwise in that of the hidden states; sums and exponentials
    in float32 (float64 for float64).

    Args:
        targets: (B, T) the token that each position predicts, -100 without a label.
        predictions, entropy: compute these too; each costs one more pass over the logits.
    """
    mask = targets != IGNORED
    where = mask.reshape(-1).nonzero().squeeze(-1)
    labels = targets.reshape(-1).index_select(0, where)
    learn = torch.is_grad_enabled() and hidden.requires_grad
    parts = _LabelLogProbs.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, bias, where, labels, learn, predictions, entropy
    )

    def spread(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        return part.new_zeros(mask.numel()).index_copy(0, where, part).view(mask.shape)

    log_probs, hits, likeliest, nats = (spread(part) for part in parts)
    assert log_probs is not None
    assert hits is not None
    return Scores(log_probs, hits, mask, likeliest, nats)


class _LabelLogProbs(torch.autograd.Function):
    """log p of N labels from the rows `where` of hidden (M, H). The forward also computes their gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        where: Tensor,
        labels: Tensor,
        learn: bool,
        predictions: bool,
        entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        device = hidden.device.type
        dtype = to_compute_dtype(hidden[:0]).dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        count = where.numel()
        log_probs = torch.empty(count, dtype=exact, device=hidden.device)
        hits = torch.empty(count, dtype=torch.bool, device=hidden.device)
        likeliest = torch.empty_like(labels) if predictions else None
        nats = torch.empty_like(log_probs) if entropy else None
        grad = hidden.new_empty(count, hidden.shape[1]) if learn else None
        step = max(1, CHUNK_ELEMENTS // weight.shape[0])
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            shift = None if bias is None else bias.to(dtype)
            for start in range(0, count, step):
                part = slice(start, start + step)
                label = labels[part, None]
                z = F.linear(hidden.index_select(0, where[part]).to(dtype), head, shift).to(exact)
                top = z.amax(-1, keepdim=True)
                own = z.gather(-1, label)
                if likeliest is None:
                    hits[part] = (own == top).squeeze(-1)
                else:
                    likeliest[part] = z.argmax(-1)
                    hits[part] = likeliest[part] == labels[part]
                z -= top
                own -= top
                e = z.exp() if nats is not None else z.exp_()
                # The label is summed apart from the other tokens: where p is 1 up to rounding, their share is the
                # whole gradient, and log p.
                e.scatter_(-1, label, 0.0)
                others = e.sum(-1, keepdim=True)
                total = others + own.exp()
                log_total = torch.where(own == 0, others.log1p(), total.log())
                log_probs[part] = (own - log_total).squeeze(-1)
                if nats is not None:
                    mean = torch.linalg.vecdot(e, z).unsqueeze(-1) + own.exp() * own
                    nats[part] = (log_total - mean / total).squeeze(-1)
                if grad is not None:
                    mean = (e.to(dtype) @ head).to(exact).div_(total)
                    wanted = head.index_select(0, label.squeeze(-1)).to(exact)
                    grad[part] = wanted.mul_(others / total).sub_(mean)
        if grad is not None:
            ctx.save_for_backward(grad, where)
        ctx.rows = hidden.shape[0]
        ctx.mark_non_differentiable(*(t for t in (hits, likeliest, nats) if t is not None))
        return log_probs, hits, likeliest, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_log_probs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad, where = ctx.saved_tensors
        # In float16 the factor includes the loss scale and the division by the number of tokens, so it is applied in
        # float32: the magnitude of the saved rows is that of W, independent of the scale.
        rows = (by_log_probs[:, None] * grad).to(grad.dtype)
        whole = grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, where, rows)
        return whole, None, None, None, None, None, None, None


def shifted(labels: Tensor) -> Tensor:
    """The label that each position predicts: labels (B, T) shifted by one, with -100 at the end."""
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


@dataclass
class Caught:
    """The result of one forward in `FrozenHead.catch`: the scores, or why there are none."""

    scores: Scores | None = None
    fault: str | None = None
    hidden: Tensor | None = field(default=None, repr=False)
    version: int = 0
    loss_called: bool = False
    dtype: torch.dtype = torch.float32


class FrozenHead:
    """The output head of a causal language model over which the loss may be computed without logits.

    Attributes:
        off: why this is not possible, for the user; None if it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module: Any = model.get_output_embeddings()  # type: ignore[operator]
        self.name = next((name for name, m in model.named_modules() if m is self.module), "")
        self.off = _why_not(model, self.module, self.name)
        self.proved = False

    @contextlib.contextmanager
    def catch(
        self, model: Any, labels: Tensor, *, predictions: bool = False, entropy: bool = False
    ) -> Iterator[Caught]:
        """Within, the model's forward with labels computes its loss from the scores; its logits are hidden states.

        Args:
            labels: (B, T) those that the model is called with.
        """
        caught, targets = Caught(), shifted(labels)
        given, given_version = labels, _version(labels)
        head = self.module
        plain_forward = head.forward
        if model.loss_function is not ForCausalLMLoss:  # it may be set at any time, and is read at each forward
            caught.fault = "the model has another loss_function than that of causal language models"
            yield caught
            return

        def forward(hidden: Tensor) -> Tensor:
            if caught.scores is not None or hidden.shape[:-1] != targets.shape:
                caught.fault = f"{self.name} is called with other tokens than those of the labels"
                return plain_forward(hidden)
            # Computed here and not in the loss: sharded weights are whole only during the call of the head.
            caught.scores = label_scores(
                hidden, head.weight, head.bias, targets.to(hidden.device), predictions=predictions, entropy=entropy
            )
            caught.hidden, caught.version = hidden, _version(hidden)
            # Read here because Accelerate's autocast wraps only the forward.
            caught.dtype = to_compute_dtype(hidden).dtype
            return hidden

        def loss(logits: Tensor, labels: Tensor | None = None, *_: Any, **kwargs: Any) -> Tensor:
            caught.loss_called = True
            scores = caught.scores
            if scores is None or logits is not caught.hidden or _version(logits) != caught.version:
                caught.fault = caught.fault or f"the model changes the output of {self.name} before its loss"
                return logits.sum()
            own = kwargs.get("shift_labels")
            if own is None and (labels is not given or _version(given) != given_version):
                own = targets if labels is None else shifted(labels)
            if own is not None and not torch.equal(own.to(targets.device), targets):
                caught.fault = "the model changes the labels before its loss"
            tokens = kwargs.get("num_items_in_batch")
            if tokens is None:
                tokens = scores.mask.sum()
            return -scores.log_probs.sum() / (tokens.to(logits.device) if isinstance(tokens, Tensor) else tokens)

        head.forward, model._loss_function = forward, loss
        try:
            yield caught
        finally:
            del head.forward, model._loss_function
            if not caught.loss_called and caught.fault is None:
                caught.fault = "the model does not use its loss_function"

    def prove(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Compare with the model's own loss once, on a part of a batch, without gradients; set `off` if it differs.

        Args:
            model: the model, unwrapped from Accelerate.
            inputs: a batch with `labels` (B, T).
        """
        if self.proved or self.off is not None:
            return
        self.proved = True
        probe = _first_tokens(inputs)
        with torch.no_grad(), kept_random_states():
            seed = torch.initial_seed()
            try:
                torch.manual_seed(seed)  # the same dropout in both
                with self.catch(model, probe["labels"]) as caught:
                    value = model(**probe)["loss"]
            except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
                self.off = f"the model's forward uses its logits for something else ({type(error).__name__})"
                return
            if caught.fault is None:
                torch.manual_seed(seed)
                own = model(**probe)["loss"]
        if caught.fault is not None:
            self.off = caught.fault
            return
        # Sums over a vocabulary in another order: a few rounding errors of the logits' dtype, and many of float32.
        slack = 16 * torch.finfo(caught.dtype).eps + 256 * torch.finfo(torch.float32).eps
        if not torch.isclose(value.double(), own.double(), rtol=slack):
            self.off = f"the model's own loss is {float(own):.6g}, but over the frozen head it is {float(value):.6g}"


def find_frozen_head(model: nn.Module) -> FrozenHead | None:
    """The head of a causal language model; None for any other model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return None
    by_name = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    by_loss = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    if not (by_name or by_loss) or model.get_output_embeddings() is None:
        return None
    return FrozenHead(model)


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference mode does not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _why_not(model: nn.Module, head: nn.Module, name: str) -> str | None:
    """Why the structure of the model does not allow it; None if it does."""
    if "_loss_function" in model.__dict__:
        return "a loss_function was set on the model"
    if any(p.requires_grad for p in head.parameters()):
        return f"{name} is trained"
    if isinstance(head, Host):
        return f"{name} has an adapter"
    if type(head) is not nn.Linear:
        return f"{name} is a {type(head).__name__}, not a plain linear layer"
    if "forward" in head.__dict__ or head._forward_hooks:
        return f"{name} has a hook"
    return None


_OF_TOKENS = {"input_ids", "attention_mask", "position_ids", "labels", "token_type_ids"}
_OF_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def _first_tokens(inputs: Mapping[str, Any], tokens: int = 64) -> dict[str, Any]:
    """The first tokens of the first row of a batch of text, as one document; other batches whole.

    It is small because the model's own loss stores all of its logits.
    """
    kept = {k: v for k, v in inputs.items() if k not in _OF_PACKING and k not in ("num_items_in_batch", "use_cache")}
    if not set(kept) <= _OF_TOKENS or "input_ids" not in kept:
        return {**kept, "use_cache": False}
    probe = {k: v[:1, :tokens] for k, v in kept.items() if k != "position_ids"}
    probe["labels"] = probe["input_ids"].clone()
    probe["labels"][:, : probe["labels"].shape[1] // 3] = IGNORED
    return {**probe, "use_cache": False}
