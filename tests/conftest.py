"""Fixtures of several test files."""

import pytest
import torch


@pytest.fixture
def one_thread():
    """For tests of many small products: their threads wait for each other, and where other programs
    want the cores too, each wait can last a time slice."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
