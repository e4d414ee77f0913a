"""Methods and initializations that depend on tokens and batches, with the packed rows of `LoraSFTTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import adapter_gradients, relative_error
from test_sft import adapted, chats, llama, sft, tokenizer

__all__ = ["chats", "tokenizer"]  # fixtures


def gradients(trainer: Any) -> dict[str, torch.Tensor]:
    """Those of all rows together."""
    trainer.model.train().zero_grad()
    for batch in trainer.get_train_dataloader():
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(100.0))
        loss.backward()
    return adapter_gradients(trainer.model)


def test_packed_rows_are_invoked_as_rows_one_by_one(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    tokens = tokenizer.encode("assistant")
    found = [
        gradients(sft(adapted(llama(), alora_invocation_tokens=tokens), tokenizer, chats, tmp_path, packing=packing))
        for packing in (True, False)
    ]
    assert all(relative_error(found[1][n], g) < 256 * torch.finfo(torch.float32).eps for n, g in found[0].items())
    assert all(g.norm() > 0 for g in found[0].values())


def test_an_initialization_looks_at_packed_rows(tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    trainer = sft(llama(), tokenizer, chats, tmp_path, packing=True, lora_init="eva", lora_r=2, max_steps=1)
    trainer.train()
    assert trainer.model.lora_configs["default"].rank_pattern
