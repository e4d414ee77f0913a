"""Activated LoRA (Greenewald et al. 2025, arXiv:2504.12397): it acts from the invocation tokens of each row on.

What comes before them is computed by the base alone, so a cache of it serves the base and all such adapters.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...compat import counts_tokens
from ...config import LoraConfig
from ...errors import StateError
from ..calls import known
from ..contract import AdaptedLayer, Inputs, Shape
from ..ops import Operand, can_use_functions, lora_products, to_compute_dtype
from .additive import Additive, dropout_of, plain_update

NEVER = 1 << 60
"""The start of a row without invocation tokens."""
UNKNOWN = -1
"""A token in a cache that was computed elsewhere, such as by the base."""


class Alora(Additive):
    kind = "alora"
    of_product = False
    acts_everywhere = False
    sees_calls = True

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return None if shape.is_matrix else "aLoRA (alora_invocation_tokens) is for linear layers"

    def refuse_model(self, model: nn.Module) -> str | None:
        if not (
            isinstance(model, PreTrainedModel)
            and model.main_input_name == "input_ids"
            and not getattr(model.config, "is_encoder_decoder", False)
        ):
            return "it looks for its tokens in input_ids of a transformers model of text with one sequence per row"
        if hasattr(model, "generate") and not counts_tokens(model):
            return "it notes its tokens on the cache of generation, and this model has a state of another kind"
        return None

    def refuse_folding(self, layer: AdaptedLayer) -> str | None:
        return "aLoRA acts only from its invocation tokens on, and a merged weight would act on all tokens"

    def before(self, config: LoraConfig, inputs: Inputs, former: Any) -> tuple[Tensor, Tensor]:
        """(B, T) which tokens of a call the adapter acts on, and (B, past + T) all tokens so far.

        In rows of several documents, each of which begins at position 0, each document has its own invocation.
        """
        ids, past = inputs.ids, inputs.past
        tokens = torch.tensor(config.alora_invocation_tokens, device=ids.device)
        seen = torch.cat([_cached(former, ids, past), ids], 1)
        starts = _starts(seen, tokens, _documents(inputs.positions, seen))
        return (torch.arange(seen.shape[1], device=ids.device) >= starts)[:, past:], seen

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


def _documents(positions: Tensor | None, ids: Tensor) -> Tensor:
    """(B, T) the number of the document of each token: one begins at each position 0."""
    if positions is None or positions.shape != ids.shape:  # such as further tokens of a cached document
        return torch.zeros_like(ids, dtype=torch.long)
    return (positions.to(ids.device) == 0).cumsum(1)


def _cached(former: Tensor | None, ids: Tensor, past: int) -> Tensor:
    """(B, past) the tokens in the cache. It may have been cropped or continued elsewhere, or its rows repeated."""
    if former is None or not past:
        return ids.new_full((len(ids), past), UNKNOWN)
    if len(ids) % len(former):
        raise StateError(
            f"The cache is that of {len(former)} rows, and this call has {len(ids)}, so it is not known from which "
            "token on the adapter acts in each. Compute the cache of these rows again."
        )
    found = former[:, :past].to(ids.device).repeat_interleave(len(ids) // len(former), 0)
    return F.pad(found, (0, past - found.shape[1]), value=UNKNOWN)


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
