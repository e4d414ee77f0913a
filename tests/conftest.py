"""For the whole suite: nothing from the network, one thread, and the same random numbers at the start of each test."""

from __future__ import annotations

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
