"""Embeddings: rows of the factor A are looked up."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

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
        return runs_forward_of(layer, nn.Embedding) or hasattr(layer, "embed_scale")

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
