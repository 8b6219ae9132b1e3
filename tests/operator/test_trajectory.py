"""One long story, told to the simulator and to real processes: the same Decisions."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Machine
from simulator import Simulator
from trajectory import decisions, story


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """The local backend with scripted processes."""
    found = Machine(tmp_path)
    yield found
    found.close()


def test_simulator_and_processes_decide_alike(machine: Machine) -> None:
    """Whatever a backend is, the policy is the engine's."""
    simulator = Simulator(instant=True)

    story(simulator)
    story(machine)

    ours, theirs = decisions(simulator), decisions(machine)
    assert [d["starts"] for d in ours] == [d["starts"] for d in theirs]
    assert ours == theirs
    assert len(ours) > 40
