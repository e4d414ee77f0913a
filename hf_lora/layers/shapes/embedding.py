"""Embeddings: rows of the factor A are looked up."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_swap import unwrap_class
from ..contract import AdaptedLayer
from ..ops import weight_like
from .matrix import MatrixByInput, runs_forward_of


class EmbeddingShape(MatrixByInput):
    """`nn.Embedding`: weight (V, O), A (R, V), B (O, R); ids (B, T) -> (B, T, O).

    A subclass may multiply its rows by `embed_scale`; the update is then multiplied as well.
    """

    looks_up = True
    is_matrix = False
    keys = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}

    def claims(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Embedding):
            return False
        return runs_forward_of(layer, nn.Embedding) or _computes_scaled_rows(layer)

    def refuse(self, layer: nn.Module) -> str | None:
        if cast(nn.Embedding, layer).max_norm is not None:
            return "an embedding with max_norm rewrites its own weight in forward"
        return None

    def features(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Embedding, layer)
        return layer.num_embeddings, layer.embedding_dim

    def update(self, layer: AdaptedLayer, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        a, b = layer.factor("lora_A", name), layer.factor("lora_B", name)
        h = F.embedding(x, a.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        h = (h * scaling).to(layer.weight.dtype)
        u = F.linear(h, weight_like(b, h))
        scale = getattr(layer, "embed_scale", None)
        return u if scale is None else u * (scale.to(u.dtype) if isinstance(scale, Tensor) else scale)


@torch.no_grad()
def _computes_scaled_rows(layer: nn.Embedding) -> bool:
    """Whether an embedding with an overridden forward returns its rows times `embed_scale`: it is tested on some ids.

    One with further parameters or modules may treat single ids differently, so it does not.
    """
    scale: Any = getattr(layer, "embed_scale", None)
    weight = layer._parameters.get("weight")
    if scale is None or type(weight) is not nn.Parameter or weight.is_meta or not weight.is_floating_point():
        return scale is not None and (weight is None or weight.is_meta) and _has_no_more(layer)
    if not _has_no_more(layer):
        return False
    ids = torch.linspace(0, layer.num_embeddings - 1, min(layer.num_embeddings, 64), device=weight.device).long()
    try:
        cls: Any = unwrap_class(type(layer))
        found = cls.forward(layer, ids[None])
        wanted = F.embedding(ids[None], weight) * (scale.to(weight.dtype) if isinstance(scale, Tensor) else scale)
    except Exception:  # another signature: in any case it is not known to be a lookup
        return False
    if not isinstance(found, Tensor) or found.shape != wanted.shape:
        return False
    return bool((found.float() - wanted.float()).norm() <= 4 * torch.finfo(weight.dtype).eps * wanted.float().norm())


def _has_no_more(layer: nn.Embedding) -> bool:
    """Whether `weight` and `embed_scale` are all that an embedding has, except for its adapters."""
    kept = {*layer._parameters, *layer._buffers, *(name for name in layer._modules if not name.startswith("lora_"))}
    return kept <= {"weight", "embed_scale"}
