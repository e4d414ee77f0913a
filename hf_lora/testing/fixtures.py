"""A pytest fixture for `LocalHub`: add `pytest_plugins = ["hf_lora.testing.fixtures"]` to your conftest.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from . import LocalHub


@pytest.fixture
def local_hub() -> Iterator[LocalHub]:
    """A running `LocalHub` for one test."""
    with LocalHub() as hub:
        yield hub
