"""Tiny random models and data for the training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import VOCABULARY
from torch.utils.data import Dataset

SPARE = "bert.spare"
"""The layer of `tiny_tokens` that is never called."""


class Rows(Dataset):  # type: ignore[type-arg]
    """A list of dicts of tensors as a data set."""

    def __init__(self, rows: list[dict[str, torch.Tensor]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(self.rows[index])


def tiny_bert(labels: int = 3, seed: int = 0) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=labels,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tiny_tokens(seed: int = 0) -> Any:
    """A token classifier whose backbone holds a linear layer that it never calls."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    model = BertForTokenClassification(config)
    model.bert.spare = torch.nn.Linear(32, 32)
    return model


def tiny_gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


def tiny_t5(seed: int = 0) -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def tiny_llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def sentences(n: int = 24, labels: int = 3, seed: int = 1) -> Rows:
    """Texts of 8 tokens whose class shows in their first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(4, VOCABULARY, (8,), generator=generator)
        ids[0] = i % labels + 1
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(i % labels)})
    return Rows(rows)


def texts(n: int = 24, seed: int = 2) -> Rows:
    """Token sequences with labels, some of them ignored, for language models and token classifiers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        ids = torch.randint(4, VOCABULARY, (10,), generator=generator)
        labels = ids.clone()
        labels[: int(torch.randint(0, 5, (1,), generator=generator))] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return Rows(rows)


def texts_of_three() -> Rows:
    """Token labels of three classes."""
    rows = texts().rows
    for row in rows:
        row["labels"] = torch.where(row["labels"] < 0, row["labels"], row["labels"] % 3)
    return Rows(rows)


def adapter_values(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


TEXTS = ["a man plays guitar", "the cat sits on mat", "dog runs in park", "sun is hot"] * 2
OTHERS = ["a woman plays guitar", "the dog sits on mat", "cat runs in park", "moon is cold"] * 2


def bert_of_texts(folder: Path, width: int = 32) -> str:
    """The folder of a BERT without a head, whose tokenizer knows the words of `TEXTS` and `OTHERS`."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    words = dict.fromkeys(" ".join(TEXTS + OTHERS).split())
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=width * 3 // 2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)
