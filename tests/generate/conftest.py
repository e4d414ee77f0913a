"""A model with a random adapter, in memory and in folders, and what transformers logs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generate.tiny_chat import tiny_tokenizer
from helpers import randomize, tiny_bert, tiny_llama

from hf_lora import LoraConfig, apply_lora


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def adapted() -> Any:
    """A float64 model with a random adapter."""
    return randomize(apply_lora(tiny_llama().double(), LoraConfig(r=4))).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base` with its tokenizer, `adapter` on it, `merged`, and a classifier's adapter `three`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    model = randomize(apply_lora(type(tiny_llama()).from_pretrained(folder / "base"), LoraConfig(r=4)))
    model.save_pretrained(folder / "adapter")
    model.merge_and_unload().save_pretrained(folder / "merged")
    tiny_bert().save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    bert = type(tiny_bert()).from_pretrained(folder / "bert")
    apply_lora(bert, LoraConfig(r=2)).save_pretrained(folder / "three")
    return folder


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
