"""Fixtures of the engine's tests."""

import pytest
from simulator import Simulator


@pytest.fixture
def sim() -> Simulator:
    """A world in memory that checks every step: no-op, invariants, size, single flight."""
    return Simulator()
