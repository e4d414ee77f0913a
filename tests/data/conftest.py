"""The tokenizer of bytes, once for each file."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import byte_tokenizer


@pytest.fixture(scope="module")
def bytes_() -> Any:
    return byte_tokenizer()
