"""A pytest fixture of `LocalHub`: put `pytest_plugins = ["hf_lora.testing.fixtures"]` into your conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import LocalHub


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    """A running `LocalHub` of one test."""
    with LocalHub() as hub:
        yield hub
