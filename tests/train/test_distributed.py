"""Two processes: the guard decides alike, resuming changes no bit, also of averages, and the loss over the head is the
model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    said = run_processes(Path(__file__).with_name("two_processes.py"), tmp_path)
    assert said.count("the adapter was removed from these layers") == 2  # by one process
