"""A 4-bit base is split between two processes where its codes are stored as bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes
from quantized_bases import available, save_base


@pytest.mark.distributed
def test_two_processes_share_a_4_bit_base(tmp_path: Path) -> None:
    available("nf4")
    run_processes(Path(__file__).with_name("quantized_worker.py"), save_base(tmp_path))
