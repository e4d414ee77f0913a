"""Tokenizers, runs and the text of a card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from helpers import VOCABULARY, batch_for, tiny_bert

from hf_lora import LoraTrainer, LoraTrainingArguments

WORDS = ["open", "close", "the", "door", "window", "A", "text", "to", "classify", "beginning", "of", "a", "The"]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "[EOS]"}
    words = [*special.values(), *WORDS]
    words += [f"w{i}" for i in range(VOCABULARY - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **special).save_pretrained(folder)


def make_trainer(folder: Path, **values: Any) -> Any:
    rows = [{k: v[0] for k, v in batch_for(tiny_bert()).items()} | {"labels": torch.tensor(i % 3)} for i in range(12)]
    settings = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
        "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-2, "num_train_epochs": 2,
    } | values  # fmt: skip
    return LoraTrainer(tiny_bert(), LoraTrainingArguments(**settings), None, rows, rows[:5])


def content(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def table(text: str) -> dict[str, str]:
    """The rows of two cells of a card."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
