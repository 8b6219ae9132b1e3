"""The operator is killed before and after each of its writes, and at random; every run ends alike."""

import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator

from btx_api.stage import Kind
from cluster.api_proxy import Fault, Kill, Request
from cluster.chaos import (
    RECOVERY_SECONDS,
    Deeds,
    Lane,
    all_over,
    at_once,
    deeds,
    differences,
    lanes,
    quiet,
    recovered,
    scaled,
    states,
    until,
)
from cluster.control_plane import Cluster
from cluster.space import scripted
from kubernetes import client

LANES = 4
SECONDS = 1.5
"""How long pods run in the test of random kills."""
KILLS = 5
"""Of each of its runs."""
Point = tuple[str, int, bool]
"""`verb resource`, number among the writes of this kind, and whether the kill comes after it."""
FEW = {"update btxruns": 3, "create jobs": 3, "create events": 3}
"""Writes of each kind at which CI kills."""


class OneKill:
    """A rule of the proxy: kills at one write, and remembers when."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.seen = 0
        self.time = 0.0

    def __call__(self, request: Request) -> Fault | None:
        what, number, after = self.point
        if self.time or str(request) != what:
            return None
        self.seen += 1
        if self.seen < number:
            return None
        self.time = time.time()
        return Kill(after)


def test_every_run_does_the_same_without_faults(
    plain_and_writes: tuple[Deeds, Counter[str]],
) -> None:
    """What the tests below compare with: each stage once, each digest committed once."""
    found, writes = plain_and_writes

    assert '"state": "Succeeded"' in found.ending
    assert len(found.jobs) == len(set(found.jobs)) == len(found.left) == found.pods == 10
    assert len(found.committed) == len(set(found.committed)) == 9
    assert writes.keys() == FEW.keys()
    assert writes["create jobs"] == 10


def test_killed_at_every_write(
    cluster: Cluster, api: client.ApiClient, plain_and_writes: tuple[Deeds, Counter[str]]
) -> None:
    """Before write k is sent, and after it was applied but before the answer: 0 duplicates."""
    expected, writes = plain_and_writes
    points = [
        (what, number, after)
        for what, few in FEW.items()
        for number in _sample(writes[what], scaled(writes[what], few))
        for after in (False, True)
    ]
    missed: list[Point] = []
    times: list[float] = []
    what: Counter[str] = Counter()

    def work(one: Lane, mine: Iterator[Point]) -> None:
        for point in mine:
            rule = OneKill(point)
            seconds = _one_kill(api, one, rule)
            if seconds is None:
                missed.append(point)
            else:
                times.append(seconds)
                what[point[0]] += 1

    with lanes(cluster, api, [f"kill-{i}" for i in range(LANES)]) as found:
        shared = iter(points)
        at_once([lambda one=one: work(one, shared) for one in found])  # type: ignore[misc]
        wrong = {
            f"{one.name}/{run}": lines
            for one in found
            for run, did in deeds(cluster, api, one.name).items()
            if (lines := differences(did, expected))
        }
        kills = sum(one.operator.kills for one in found)
        exits = sum(one.operator.exits for one in found)

    print(
        f"\n{len(points)} runs, {kills} kills: {dict(what)} of {dict(writes)}, each before and after; "
        f"not reached {missed}; acted again after {max(times):.1f} s at most; own ends {exits}"
    )
    assert wrong == {}
    # How often a run writes depends on how many facts arrive together.
    assert len(missed) <= len(points) // 8
    assert exits == 0
    assert max(times) < 3 * RECOVERY_SECONDS


def _sample(writes: int, few: int) -> list[int]:
    """So many numbers of writes spread over all, the first and the last among them."""
    places = range(few)
    return sorted({1 + round(place * (writes - 1) / (few - 1)) for place in places})


def _one_kill(api: client.ApiClient, one: Lane, rule: OneKill) -> float | None:
    """A whole run with one kill: seconds until the operator wrote again; None: never killed."""
    what, number, after = rule.point
    name = f"{what.rpartition(' ')[2]}{number}-{'after' if after else 'before'}"
    one.proxy.count(rule)
    one.run(name)
    all_over(api, one, name)
    if not rule.time:
        quiet(one)
    one.proxy.count()
    if not rule.time:
        return None
    # Killed at its last words, it has nothing more to say.
    return recovered(one, rule.time) or 0.0


def test_killed_at_random(
    cluster: Cluster, api: client.ApiClient, plain_and_writes: tuple[Deeds, Counter[str]]
) -> None:
    """100 kills over 20 runs (TRIALS=all), at any moment, while the operator starts too."""
    expected, _ = plain_and_writes
    runs = scaled(20, few=4)
    counter = itertools.count()
    hits: list[bool] = []

    def work(one: Lane) -> None:
        while (number := next(counter)) < runs:
            hits.extend(_killed_at_random(api, one, f"r{number}", random.Random(number)))

    with lanes(cluster, api, [f"random-{i}" for i in range(LANES)]) as found:
        at_once([lambda one=one: work(one) for one in found])  # type: ignore[misc]
        wrong = {
            f"{one.name}/{run}": lines
            for one in found
            for run, did in deeds(cluster, api, one.name).items()
            if (lines := differences(did, expected))
        }
        exits = sum(one.operator.exits for one in found)

    print(f"\n{len(hits)} kills over {runs} runs, {sum(hits)} before the end; own ends {exits}")
    assert wrong == {}
    assert len(hits) == KILLS * runs
    assert sum(hits) >= 0.8 * len(hits)
    assert exits == 0


def _killed_at_random(
    api: client.ApiClient, one: Lane, name: str, draw: random.Random
) -> list[bool]:
    """For each kill: whether the run was still under way."""
    script = {"seconds": SECONDS}
    one.proxy.count()
    one.run(name, execution=scripted(**dict.fromkeys(map(str, Kind), script)))
    hits = []
    for _ in range(KILLS):
        # Up to the start of the operator, or some writes beyond it.
        before, writes = one.proxy.writes, draw.choice((0, 1, 2, 4, 8))
        until(lambda b=before, w=writes: one.proxy.writes >= b + w or _over(api, one, name), 120)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.5))
        hits.append(not _over(api, one, name))
        one.operator.kill()
    all_over(api, one, name)
    return hits


def _over(api: client.ApiClient, one: Lane, name: str) -> bool:
    return states(api, one.name).get(name) == "Succeeded"
