"""Attention over packed documents, one after another, for `sdpa` on a CPU.

Packing lays documents behind each other in one row. With FlashAttention their borders go to the kernel; `sdpa` gets a
mask of (tokens × tokens) instead and multiplies every pair of them, so a row of eight documents costs eight times the
attention that is needed. Here each document is a call of its own, without a mask where it is plainly causal.
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
    """As transformers' `sdpa`; the borders are those that a padding-free collator hands to the model.

    Args:
        query: (1, heads, T, D); key and value: (1, key-value heads, T, D).
        attention_mask: (1, 1, T, T) of bool, or None where all is causal.
        kwargs: `cu_seq_lens_q` (documents + 1,) holds the first token of each document, then T.

    Returns:
        The attention's output (1, T, heads, D), and None for its weights.
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
    """Per document, whether each token sees all before it: not so beyond a sliding window.

    Found out once a mask, which all layers of a kind share, and kept with it.
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
    """Within, a model on a CPU that uses `sdpa` attends document by document; any other is left as it is.

    The function behind the name is exchanged, not the name in the model's config: models ask for it by name, some
    build a sparse mask for `sdpa` alone, and a part of a model may use another.
    """
    known: Any = ALL_ATTENTION_FUNCTIONS
    if known["sdpa"] is not sdpa_attention_forward or next(model.parameters()).device.type != "cpu":
        yield
        return
    known["sdpa"] = packed_attention
    try:
        yield
    finally:
        del known["sdpa"]  # of this mapping alone; transformers' own, under it, shows again
