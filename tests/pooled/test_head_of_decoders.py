"""The class means of a head that reads every token and gives the logits of one, as in decoders."""

from __future__ import annotations

from typing import Any

import torch
from helpers import tiny_llama

from hf_lora.pooled.head_start import class_means, start_head


def test_the_features_are_those_of_the_last_token() -> None:
    """As transformers' hidden states of the last token that is not padding."""
    from transformers import LlamaForSequenceClassification

    config = tiny_llama(num_labels=3, pad_token_id=0).config
    model = LlamaForSequenceClassification(config).eval()
    rows: list[dict[str, Any]] = [
        {"input_ids": torch.randint(1, 60, (2 + i % 4,)), "labels": i % 3} for i in range(12)
    ]

    def collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in part], True, 0)
        labels = torch.tensor([row["labels"] for row in part])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    with torch.no_grad():
        features = torch.stack([model.model(row["input_ids"][None]).last_hidden_state[0, -1] for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    weight, _, expected = class_means(features.double(), labels, 3)
    loss = start_head(model, rows, collator=collate, batch_size=5, progress=False)
    assert torch.allclose(model.score.weight.double(), weight, rtol=1e-4, atol=1e-6)
    assert abs(loss - expected) < 1e-4
