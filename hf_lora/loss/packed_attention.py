"""Attention over packed documents, one document at a time, for `sdpa` on a CPU.

Packing concatenates documents in one row. FlashAttention gets their boundaries; `sdpa` gets a mask (tokens × tokens)
instead and multiplies every pair of tokens, so a row of eight documents costs eight times the necessary attention.
Here each document is a separate call, without a mask if its attention is causal.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Like `sdpa` of transformers, with the document boundaries that a padding-free collator passes to the model.

    Args:
        query: (1, heads, T, D); key and value: (1, key-value heads, T, D).
        attention_mask: (1, 1, T, T), bool, or None for causal attention.
        kwargs: `cu_seq_lens_q` (documents + 1,) holds the first token of each document, then T.

    Returns:
        The output (1, T, heads, D), and None for the attention weights.
    """
    borders = kwargs.get("cu_seq_lens_q")
    tokens = query.shape[2]
    whole = query.shape[0] == 1 and key.shape[2] == tokens and kwargs.get("position_bias") is None
    if borders is None or not whole or int(borders[-1]) != tokens:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    edges = borders.tolist()
    causal = _are_causal(attention_mask, edges)
    outputs = []
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        mask = None if causal[number] or attention_mask is None else attention_mask[..., start:end, start:end]
        part, _ = sdpa_attention_forward(
            module, query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], mask, **kwargs
        )
        outputs.append(part)
    return torch.cat(outputs, dim=1), None


def _are_causal(mask: Tensor | None, edges: list[int]) -> list[bool]:
    """Per document, whether each token attends to all tokens before it, which a sliding window may prevent.

    Computed once per mask (layers share masks) and stored on it.
    """
    if mask is None:
        return [True] * (len(edges) - 1)
    known: tuple[list[int], list[bool]] | None = getattr(mask, "_hf_lora_causal", None)
    if known is None or known[0] != edges:
        spans = itertools.pairwise(edges)
        seen = [int(mask[..., a:b, a:b].sum()) == (b - a) * (b - a + 1) // 2 * mask.shape[1] for a, b in spans]
        known = (edges, seen if mask.dtype == torch.bool else [False] * len(seen))
        mask._hf_lora_causal = known  # type: ignore[attr-defined]
    return known[1]


@contextlib.contextmanager
def attention_by_document(model: PreTrainedModel) -> Iterator[None]:
    """Within, a model on a CPU that uses `sdpa` attends document by document; other models do not change.

    The function registered as `sdpa` is replaced, not the name in the model's config: models look it up by name, some
    build a sparse mask only for `sdpa`, and parts of a model may use another name.
    """
    known: Any = ALL_ATTENTION_FUNCTIONS
    if known["sdpa"] is not sdpa_attention_forward or next(model.parameters()).device.type != "cpu":
        yield
        return
    known["sdpa"] = packed_attention
    try:
        yield
    finally:
        del known["sdpa"]  # only the local entry, so the global one of transformers is visible again
