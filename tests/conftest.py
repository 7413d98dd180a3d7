"""What holds for every test."""

import sys
from pathlib import Path

import pytest
import torch

# `bench` has what torchdiffeq's main branch has and its release lacks.
sys.path.append(str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The states of the tests are small, and on a busy machine a second thread costs far more than
    it brings; tests of threading choose their own number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
