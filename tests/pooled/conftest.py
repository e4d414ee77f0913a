"""Checkpoints that declare their sentence vectors, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_lines
from tiny import OTHERS, TEXTS, bert_of_texts

from hf_lora.pooled.pooling import Dense, Pooling

LABELS = ["music", "animals", "weather"]
ALL = [*TEXTS[:4], *OTHERS[:4], "a"]
DECLARED = {
    "mean": Pooling(("mean",)),
    "normalized": Pooling(("mean",), normalize=True),
    "dense": Pooling(("cls", "max"), (Dense(64, 12, True, "Tanh"),), True),
    "last": Pooling(("lasttoken",)),
}


def save_declared(base: str, folder: Path, pooling: Pooling) -> str:
    """The folder of a sentence-transformers model with this pooling, written by that library."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    body = modules.Transformer(base)
    behind: list[Any] = [modules.Pooling(body.get_embedding_dimension(), pooling.modes)]
    torch.manual_seed(1)
    behind += [modules.Dense(d.in_features, d.out_features, bias=d.bias) for d in pooling.dense]
    behind += [modules.Normalize()] * pooling.normalize
    SentenceTransformer(modules=[body, *behind], device="cpu").save(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert_of_texts(tmp_path_factory.mktemp("texts") / "bert")


@pytest.fixture(scope="module")
def declared(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("declared")
    return {name: save_declared(base, folder / name, pooling) for name, pooling in DECLARED.items()}


def tokens(folder: str) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer, dict(tokenizer(ALL, padding=True, return_tensors="pt"))


@torch.no_grad()
def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found: torch.Tensor = model.eval()(**batch).logits
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [{"text": text, "label": LABELS[(0, 1, 1, 2)[i % 4]]} for i, text in enumerate(TEXTS[:4] + OTHERS[:4])]
    return Path(write_lines(tmp_path_factory.mktemp("rows") / "rows.jsonl", lines * 3))
