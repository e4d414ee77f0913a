"""Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): it acts from the invocation tokens of each row on.

What comes before them is computed by the base alone, so a cache of it serves the base and all such adapters.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...config import LoraConfig
from ...errors import StateError
from ..calls import known
from ..contract import AdaptedLayer, Inputs, Shape
from ..ops import Operand, can_use_functions, lora_products, to_compute_dtype
from .additive import Additive, dropout_of, plain_update

NEVER = 1 << 60
"""The start of a row without invocation tokens."""


class Progress(NamedTuple):
    """What a cache has of the rows of former calls.

    Args:
        start: (B,) position of the invocation tokens in the cache.
        length: the number of positions in the cache.
        last: (B, n) the last tokens, in which an invocation may begin.
    """

    start: Tensor
    length: int
    last: Tensor


class Alora(Additive):
    kind = "alora"
    of_product = False
    acts_everywhere = False
    sees_calls = True

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return None if shape.is_matrix else "aLoRA (alora_invocation_tokens) is for linear layers"

    def refuse_model(self, model: nn.Module) -> str | None:
        config = getattr(model, "config", None)
        is_text = isinstance(model, PreTrainedModel) and model.main_input_name == "input_ids"
        if not is_text or getattr(config, "is_encoder_decoder", False):
            return "it looks for its tokens in input_ids of a transformers model of text with one sequence per row"
        if hasattr(model, "generate") and "past_key_values" not in inspect.signature(model.forward).parameters:
            return "it notes its tokens on the cache of generation, and this model has a state of another kind"
        return None

    def refuse_folding(self, layer: AdaptedLayer) -> str | None:
        return "aLoRA acts only from its invocation tokens on, and a merged weight would act on all tokens"

    def before(self, config: LoraConfig, inputs: Inputs, former: Any) -> tuple[Tensor, Progress]:
        """(B, T) which tokens of a call the adapter acts on, and the progress of the rows after the call.

        In rows of several documents, each of which begins at position 0, each document has its own invocation.
        """
        ids, past = inputs.ids, inputs.past
        tokens = torch.tensor(config.alora_invocation_tokens, device=ids.device)
        former = _fitting(former, ids, past)
        # Tokens at whose end a cached row may have the beginning of an invocation.
        before = ids[:, :0] if former is None else former.last.to(ids.device)
        seen, offset = torch.cat([before, ids], 1), past - before.shape[1]
        documents = _documents(inputs.positions, seen.shape)
        starts = _starts(seen, tokens, documents)
        starts = (starts + offset).where(starts < NEVER, NEVER)
        if former is not None:
            starts = starts.where(starts < NEVER, former.start.to(ids.device)[:, None])
        places = torch.arange(past, past + ids.shape[1], device=ids.device)
        last = seen[:, seen.shape[1] - min(len(tokens) - 1, seen.shape[1]) :]
        return places >= starts[:, before.shape[1] :], Progress(starts[:, -1], past + ids.shape[1], last)

    def forward(self, layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        state, inner = layer._lora, to_compute_dtype(x)
        y = layer.product(x if state.storage.quantized else inner)
        trains = (layer.training or torch.is_grad_enabled()) and can_use_functions() and y.dtype == inner.dtype
        for name in names:
            chosen = inner * _like(known(state.activity, name), inner, state.shape.features(layer))
            if trains:
                a, b = layer.factor("lora_A", name), layer.factor("lora_B", name)
                added = Operand(y, None, a, b, state.adapters[name].scaling)
                (y,) = lora_products(chosen, [added], dropout_of(layer, name), weights=False)
            else:
                y = plain_update(layer, name, chosen, y)
        return y


def _starts(ids: Tensor, tokens: Tensor, documents: Tensor) -> Tensor:
    """(B, T) the place of the last invocation in the document of each token, or NEVER."""
    starts = torch.full(ids.shape, NEVER, device=ids.device)
    count = len(tokens)
    if ids.shape[1] < count:
        return starts
    hits = (ids.unfold(1, count, 1) == tokens).all(-1)
    hits &= documents[:, : hits.shape[1]] == documents[:, count - 1 :]  # within one document
    places = torch.arange(hits.shape[1], device=ids.device).where(hits, -1)
    last = torch.full((len(ids), int(documents.max()) + 1), -1, device=ids.device)
    last = last.scatter_reduce(1, documents[:, : hits.shape[1]], places, "amax").gather(1, documents)
    return starts.where(last < 0, last)


def _documents(positions: Tensor | None, shape: torch.Size) -> Tensor:
    """(B, T) the number of the document of each token: one begins at each position 0."""
    if positions is None or positions.shape != shape:  # further tokens of a cached document
        return torch.zeros(shape, dtype=torch.long, device=None if positions is None else positions.device)
    return (positions == 0).cumsum(1)


def _fitting(former: Progress | None, ids: Tensor, past: int) -> Progress | None:
    """The progress of a cache for the present rows. A cache may have been cropped, or its rows repeated."""
    if former is None or not past:
        return None
    if len(ids) % len(former.start):
        raise StateError(
            f"The cache is that of {len(former.start)} rows, and this call has {len(ids)}, so it is not known from "
            "which token on the adapter acts in each. Compute the cache of these rows again."
        )
    times = len(ids) // len(former.start)
    start, last = (tensor.repeat_interleave(times, 0) for tensor in (former.start, former.last))
    start = start.where(start < past, NEVER)
    return Progress(start, past, last if former.length == past else last[:, :0])


def _like(mask: Tensor, x: Tensor, features: tuple[int, int]) -> Tensor:
    """A mask (B, T) for an input (B, T', I) with the last T' tokens.

    Raises:
        StateError: the layer gets tokens in another arrangement.
    """
    if x.dim() != 3 or len(x) != len(mask) or x.shape[1] > mask.shape[1]:
        raise StateError(
            f"aLoRA: an adapted layer with {features[0]} inputs and {features[1]} outputs gets inputs of the shape "
            f"{tuple(x.shape)} in a call with {tuple(mask.shape)} tokens, so it is not known where it acts. "
            "Name the layer in exclude_modules."
        )
    return mask[:, mask.shape[1] - x.shape[1] :, None].to(x.device, x.dtype)
