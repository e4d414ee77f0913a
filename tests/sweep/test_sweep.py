"""A sweep of architectures: everything that an adapter does in its life, on tiny random models of each.

`docs/make_architectures.py` runs the same steps and writes the table in the documentation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from models import CASES, Case
from steps import TARGETS, sweep

GRID = [
    pytest.param(case, targets, id=f"{case.name}-{targets}", marks=() if case.sample else pytest.mark.slow)
    for case in CASES
    for targets in TARGETS
]


@pytest.mark.parametrize(("case", "targets"), GRID)
def test_every_step(case: Case, targets: str, tmp_path: Path) -> None:
    record = sweep(case, targets, tmp_path)
    assert record.adapted or record.refused


def test_the_sample_holds_eight_kinds_of_models() -> None:
    sample = [case for case in CASES if case.sample]
    assert len(sample) == 8
    assert len({case.group for case in sample}) == 8
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
