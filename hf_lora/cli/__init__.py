"""The `hf-lora` command. Nothing heavy is imported before a command needs it, so `--help` answers at once."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
