"""Adapters as an earlier state of the code wrote them (commit a2ec75f), small, as test data.

    python tests/files/old_adapters.py tests/data/written_by_0.1.0

was run once, at that commit. The bases are built without random numbers, which differ between versions of PyTorch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_lora import LoraConfig, apply_lora

IDS = torch.arange(12).view(2, 6) % 40


def filled(model: Any) -> Any:
    """`model` with fixed values in all its parameters."""
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = torch.arange(parameter.numel(), dtype=torch.float64).mul_(0.7).add_(i).cos_().mul_(0.2)
            parameter.copy_(values.view_as(parameter))
    return model.eval()


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return filled(LlamaForCausalLM(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return filled(BertForSequenceClassification(config))


def gpt2() -> nn.Module:
    return filled(GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (llama, dict(rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}, use_rslora=True)),
    "bert": (bert, dict(bias="all")),
    "gpt2": (gpt2, dict(target_modules=["c_attn", "wte"])),
    "whole": (llama, dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"])),
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.flatten()[:24]


def main(folder: Path) -> None:
    expected = {}
    for name, (make, config) in CASES.items():
        model = apply_lora(make(), LoraConfig(r=3, lora_alpha=5, **config))
        with torch.no_grad():
            for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
                parameter.add_(torch.arange(parameter.numel()).add(i).sin().mul(0.1).view_as(parameter))
        model.eval().save_pretrained(folder / name)
        expected[name] = logits(model).tolist()
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
