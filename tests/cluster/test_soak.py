"""Many runs are created, edited, suspended, resumed and deleted while watches are cut: nothing grows.

TRIALS=all plays a thousand runs, a day of a busy team; otherwise a few waves show that it works.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from cluster.chaos import Kept, Lane, lanes, scaled, states, until
from cluster.control_plane import Cluster
from cluster.space import scripted
from kubernetes import client

WAVE = scaled(20, few=10)
GROWTH = 2**20
"""Bytes of resident memory that the second half of a thousand runs may add."""
WARM = 24 * 2**20
"""The same of a short test, in which caches of libraries are still being filled."""
WAVE_SECONDS = 600


def resident(one: Lane) -> int:
    """Bytes of the operator's process."""
    part = one.operator._part
    assert part is not None and part.process is not None
    status = Path(f"/proc/{part.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def files(one: Lane) -> int:
    """Open files and connections of the operator's process."""
    part = one.operator._part
    assert part is not None and part.process is not None
    return len(list(Path(f"/proc/{part.process.pid}/fd").iterdir()))


def tasks(one: Lane) -> int:
    """Of the operator's loop."""
    part, path = one.operator._part, Path(one.operator.environment["BTX_TASKS"])
    assert part is not None and part.process is not None
    path.unlink(missing_ok=True)
    os.kill(part.process.pid, signal.SIGUSR2)
    until(path.exists, 60)
    return int(path.read_text())


def sample(one: Lane, name: str) -> dict[str, float]:
    """A metric by its labels."""
    lines = one.operator.get("/metrics")[1].splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
    return {labels: float(value) for labels, value in found}


def wave(one: Lane, api: client.ApiClient, number: int) -> None:
    """So many runs from their creation to their deletion."""
    names = [f"w{number:03d}-{i:02d}" for i in range(WAVE)]
    for i, name in enumerate(names):
        # Every fourth one shares the storage of the one before: what is there is taken.
        shared = f"file://{one.name}-{number}-{i - i % 4}"
        one.space.run(name, storage={"uri": shared}, execution=scripted(train={"seconds": 0.5}))
    for name in names[::3]:
        one.space.edit(name, policy={"maxRetries": 5})
    for name in names[1::3]:
        one.space.edit(name, suspend=True)
    one.proxy.cut()
    until(
        lambda: all(states(api, one.name).get(name) == "Suspended" for name in names[1::3]),
        WAVE_SECONDS, lambda: states(api, one.name),
    )  # fmt: skip
    for name in names[1::3]:
        one.space.edit(name, suspend=False)
    until(
        lambda: all(states(api, one.name).get(name) == "Succeeded" for name in names),
        WAVE_SECONDS, lambda: f"{states(api, one.name)}\n{one.operator.log()[-2000:]}",
    )  # fmt: skip
    for name in names:
        one.space.remove(name)
    until(lambda: not left(one), WAVE_SECONDS, lambda: left(one))


def left(one: Lane) -> list[str]:
    """Jobs, pods and Services of runs that are there."""
    listings = (
        one.space.batch.list_namespaced_job, one.space.core.list_namespaced_pod,
        one.space.core.list_namespaced_service,
    )  # fmt: skip
    answers = (json.loads(f(one.name, _preload_content=False).data) for f in listings)
    return [item["metadata"]["name"] for answer in answers for item in answer["items"]]


@pytest.mark.usefixtures("hollow", "crd")
def test_nothing_grows(
    cluster: Cluster, api: client.ApiClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, files, tasks, cache, queue and the cluster's objects, half-way and at the end."""
    told = {"BTX_TASKS": str(tmp_path / "tasks"), "PYTHONPATH": ":".join(sys.path)}
    monkeypatch.setattr(Kept, "module", "cluster.counted_operator")
    monkeypatch.setattr(Kept, "environment", told)
    waves = scaled(1000 // WAVE, 2)
    with lanes(cluster, api, ["soak"], workers=8) as [one]:
        marks, idle = [], tasks(one)
        for number in range(waves):
            wave(one, api, number)
            print(f"wave {number}: {resident(one) / 2**20:.2f} MiB, {files(one)} files", flush=True)
            if number + 1 in (waves // 2, waves):
                marks.append((resident(one), files(one)))
        until(lambda: not any(sample(one, "btx_operator_cache_objects").values()), 120)
        (half, half_files), (end, _) = marks
        print(f"resident after half {half / 2**20:.1f} MiB, at the end {end / 2**20:.1f} MiB")

        assert end - half < (GROWTH if waves > 2 else WARM)
        # Connections are kept for a while after a burst.
        until(lambda: files(one) <= half_files + 8, 120, lambda: str(files(one)))
        # kopf has a task for each object that it has heard of lately.
        until(lambda: tasks(one) <= idle, 60, lambda: f"{tasks(one)} tasks, {idle} at first")
        assert sample(one, "btx_operator_queue_depth") == {"btx_operator_queue_depth": 0.0}
        assert one.operator.exits == 0
