"""Batches for the tiny models: keyword arguments of forward, with labels where the class computes a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64
PAD, START, END, IMAGE, VISION_START, VISION_END = 0, 1, 2, 60, 61, 62
LABELS = 3

Batch = dict[str, Any]


def ids(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(5, 58, (rows, length))


def text(model: Any) -> Batch:
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def classes(model: Any) -> Batch:
    return {**text(model), "labels": torch.tensor([0, 2])}


def tokens(model: Any) -> Batch:
    return {**text(model), "labels": torch.randint(0, LABELS, (2, 8))}


def spans(model: Any) -> Batch:
    return {**text(model), "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}


def language(model: Any) -> Batch:
    tokens = ids()
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}


def recurrent(model: Any) -> Batch:
    tokens = ids()
    return {"input_ids": tokens, "labels": tokens.clone()}


def sequences(model: Any) -> Batch:
    return {**text(model), "labels": ids(2, 5)}


def pixels(size: int = 32, labels: str = "class") -> Callable[[Any], Batch]:
    def make(model: Any) -> Batch:
        batch: Batch = {"pixel_values": torch.randn(2, 3, size, size)}
        if labels == "class":
            batch["labels"] = torch.tensor([0, 2])
        elif labels == "map":
            batch["labels"] = torch.randint(0, LABELS, (2, size, size))
        elif labels == "boxes":
            batch["labels"] = [
                {"class_labels": torch.tensor([i]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.4]])} for i in range(2)
            ]
        elif labels == "masks":
            batch["mask_labels"] = [torch.randint(0, 2, (2, size, size)).float() for _ in range(2)]
            batch["class_labels"] = [torch.tensor([0, 1]), torch.tensor([2, 0])]
        return batch

    return make


def waves(labels: str = "ctc") -> Callable[[Any], Batch]:
    def make(model: Any) -> Batch:
        return {
            "input_values": torch.randn(2, 400),
            "labels": torch.randint(1, 8, (2, 3)) if labels == "ctc" else torch.tensor([0, 2]),
        }

    return make


def spectrogram(model: Any) -> Batch:
    return {"input_values": torch.randn(2, 32, 16), "labels": torch.tensor([0, 2])}


def speech(model: Any) -> Batch:
    return {"input_features": torch.randn(2, 8, 32), "labels": ids(2, 5)}


def pairs(model: Any) -> Batch:
    tokens = ids()
    tokens[:, -1] = END
    return {"input_ids": tokens, "pixel_values": torch.randn(2, 3, 16, 16), "return_loss": True}


def captions(images: int) -> Callable[[Any], Batch]:
    """Text behind `images` image tokens, with a picture a row."""

    def make(model: Any) -> Batch:
        tokens = ids(2, images + 6)
        tokens[:, :images] = IMAGE
        labels = tokens.masked_fill(tokens == IMAGE, -100)
        return {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "pixel_values": torch.randn(2, 3, 16, 16),
            "labels": labels,
        }

    return make


def typed_captions(model: Any) -> Batch:
    batch = captions(4)(model)
    return {**batch, "token_type_ids": (batch["input_ids"] != IMAGE).long()}


def plain_captions(model: Any) -> Batch:
    return {**language(model), "pixel_values": torch.randn(2, 3, 16, 16)}


def patches(model: Any) -> Batch:
    batch = captions(4)(model)
    tokens = torch.cat([torch.full((2, 1), VISION_START), batch["input_ids"]], 1)
    labels = tokens.masked_fill((tokens == IMAGE) | (tokens == VISION_START), -100)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "labels": labels,
    }


def several_images(model: Any) -> Batch:
    batch = captions(4)(model)
    return {**batch, "pixel_values": torch.randn(2, 1, 3, 16, 16)}


def decoded_image(model: Any) -> Batch:
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": ids(2, 5)}
