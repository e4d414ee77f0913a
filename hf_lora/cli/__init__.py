"""The `hf-lora` command. Large libraries are imported when a command runs, so `--help` is fast."""

from __future__ import annotations

from .main import main

__all__ = ["main"]
