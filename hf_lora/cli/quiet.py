"""Warnings that other libraries log when they are imported, and that a user of a command can do nothing about."""

from __future__ import annotations

import logging

LOGGERS = (
    "torchao",
    "bitsandbytes.backends.cpu.ops",
    "bitsandbytes.autograd._functions",
    "torch.utils._pytree",
    "DeepSpeed",
)
"""Kernels that do not fit this machine, dtypes, classes that PyTorch knows by now, and which device was found."""


def silence_imports() -> None:
    """Drop what these loggers say below the level of an error. A filter stays when they set their own level."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if _is_error not in logger.filters:
            logger.addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
