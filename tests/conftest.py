"""For the whole suite: nothing from the network, one thread, and the same random numbers at the start of each test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import offline

offline()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)  # the models are tiny: more threads wait for each other


@pytest.fixture(autouse=True)
def _seeded(_one_thread: None) -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _warnings_again() -> None:
    """What is warned of once in a process is warned of once in each test, whichever tests came before it."""
    once = getattr(logging.Logger, "warning_once", None)  # added by transformers
    if once is not None:
        once.cache_clear()


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Any]:
    """Makes training arguments that are quiet, on the CPU, and write below the test's folder."""

    def make(cls: Any = None, **values: Any) -> Any:
        from hf_lora import LoraTrainingArguments

        values = {
            "output_dir": str(tmp_path / values.pop("name", "run")),
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "logging_strategy": "no",
            "save_strategy": "no",
            "learning_rate": 1e-2,
        } | values
        return (cls or LoraTrainingArguments)(**values)

    return make


@contextlib.contextmanager
def heard(level: int) -> Iterator[list[str]]:
    """The texts that hf_lora logs at a level or above."""
    texts: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ear, logger = Ear(), logging.getLogger("hf_lora")
    before = logger.level
    logger.addHandler(ear)
    logger.setLevel(level)
    try:
        yield texts
    finally:
        logger.setLevel(before)
        logger.removeHandler(ear)


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What hf_lora warns of, as a list of texts."""
    with heard(logging.WARNING) as texts:
        yield texts


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What hf_lora logs at INFO or above, as a list of texts."""
    with heard(logging.INFO) as texts:
        yield texts
