"""Faults of the API server and of the network, each in a lane of its own; every run ends alike.

All faults are injected at the same time, each into one operator's connection. In an outage the
experts' pods end, so that there is something to do when it is over. The interval of full lists is
the chart's, longer than any test: what a watch misses must be noticed otherwise.
"""

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from btx_api.metrics import ENGINE
from cluster.api_proxy import Answer, Broken, Empty, Error, Fault, Lost, Request, Slow
from cluster.chaos import (
    RECOVERY_SECONDS,
    RUN_SECONDS,
    Deeds,
    Lane,
    all_over,
    at_once,
    deeds,
    differences,
    lanes,
    recovered,
    scaled,
    states,
    until,
)
from cluster.control_plane import Cluster
from cluster.space import TOLD, Space, running, scripted
from kubernetes import client

FAULT_SECONDS = scaled(60, few=20)
TRAINS = ("train-code", "train-math")
PRODUCTION = {"resyncSeconds": 300}
Rule = Callable[[Request], Fault | None]
Act = Callable[[Lane], object]


def nothing(request: Request) -> Fault | None:
    """The rule of a proxy that breaks nothing."""
    return None


def on_watches(fault: Fault) -> Rule:
    """A rule that breaks watches only."""
    return lambda request: fault if request.verb == "watch" else None


def errors() -> Rule:
    """Watches that begin with an ERROR event: 500, 504, and 500 again."""
    codes = itertools.cycle((500, 504))
    return lambda request: Error(next(codes)) if request.verb == "watch" else None


OUTAGES: dict[str, Rule] = {
    "watches-closed-at-once": on_watches(Empty()),
    "error-events": errors(),
    "status-500": lambda request: Answer(500),
    "status-503": lambda request: Answer(503, retry_after=1),
    "status-401": lambda request: Answer(401),
    "status-403": lambda request: Answer(403),
    "status-429": lambda request: Answer(429, retry_after=1),
}
"""Rules that hold for FAULT_SECONDS from a time when experts train; open watches are cut first."""
STALLED = "watches-stalled"
"""The watches that are open say nothing any more, for ever, and nobody tells the operator."""


def flaky(request: Request) -> Fault | None:
    """A third of all requests or answers gets lost."""
    draw = random.random()
    if request.verb == "watch" or draw > 0.3:
        return None
    return Lost() if draw > 0.15 else Broken()


def slow(request: Request) -> Fault | None:
    """Everything takes up to two seconds."""
    return Slow(random.uniform(0, 2))


def rule(broken: Rule) -> Act:
    """The proxy has this rule from now on."""
    return lambda one: setattr(one.proxy, "rule", broken)


def gone(one: Lane) -> None:
    """Open watches are cut, and the next of each kind is told that its version is too old."""
    one.proxy.rule = _once(Error(410))
    one.proxy.cut()


HARASSED: dict[str, tuple[Act, float]] = {
    "watches-cut": (lambda one: one.proxy.cut(), 0.5),
    "watches-ended": (lambda one: one.proxy.close(), 0.5),
    "watches-gone": (gone, 3.0),
    "lost-answers": (rule(flaky), 1.0),
    "slow": (rule(slow), 1.0),
    "edited": (lambda one: one.space.note(note=str(time.time())), 0.2),
}
"""What is done again and again, with the seconds in between, during a whole run."""


def _once(fault: Fault) -> Rule:
    """The next watch of each kind."""
    met: set[str] = set()

    def broken(request: Request) -> Fault | None:
        if request.verb != "watch" or request.resource in met:
            return None
        met.add(request.resource)
        return fault

    return broken


@dataclass
class Found:
    """How one lane went."""

    seconds: float
    """From the end of the fault to the next Job; for the whole run where the fault did not end."""
    exits: int
    watches: float
    """Requested in a second while the fault lasted."""
    wrong: list[str]


def _outage(api: client.ApiClient, one: Lane) -> tuple[float, float]:
    one.run("run", execution=scripted(train=TOLD))
    pods = [one.space.pod(stage, running) for stage in TRAINS]
    before = _watches(one)
    if one.name == STALLED:
        assert one.proxy.stall() == 3
    else:
        one.proxy.rule = OUTAGES[one.name]
        one.proxy.cut()
    for pod in pods:
        one.space.tell(pod)
    if one.name != STALLED:
        time.sleep(FAULT_SECONDS)
    watches = _watches(one) - before
    one.proxy.rule = nothing
    over = time.time()
    all_over(api, one, seconds=3 * RECOVERY_SECONDS)
    return recovered(one, over, "jobs") or 0.0, watches / FAULT_SECONDS


def _harassment(api: client.ApiClient, one: Lane) -> tuple[float, float]:
    act, every = HARASSED[one.name]
    act(one) if one.name in ("lost-answers", "slow") else None
    one.run("run")
    before, begun = _watches(one), time.monotonic()
    while not _all_over_now(api, one):
        assert time.monotonic() - begun < RUN_SECONDS, one.operator.log()[-3000:]
        act(one)
        time.sleep(every)
    seconds = time.monotonic() - begun
    one.proxy.rule = nothing
    return seconds, (_watches(one) - before) / seconds


def test_faults_on_the_way(cluster: Cluster, api: client.ApiClient, plain: Deeds) -> None:
    """Each run ends as without faults, and goes on soon after the fault."""
    found: dict[str, Found] = {}

    def work(one: Lane) -> None:
        act = _harassment if one.name in HARASSED else _outage
        seconds, watches = act(api, one)
        did = deeds(cluster, api, one.name)["run"]
        wrong = differences(did, plain)
        found[one.name] = Found(seconds, one.operator.exits, watches, wrong)

    with lanes(cluster, api, [*OUTAGES, STALLED, *HARASSED], **PRODUCTION) as made:
        at_once([lambda one=one: work(one) for one in made])  # type: ignore[misc]

    print(f"\noutages of {FAULT_SECONDS} s; all runs at the same time")
    for name, one in found.items():
        what = "the run took" if name in HARASSED else "the next Job came after"
        print(
            f"{name}: {what} {one.seconds:.1f} s; {one.watches:.1f} watches/s; own ends {one.exits}"
        )
    assert {name: one.wrong for name, one in found.items() if one.wrong} == {}
    assert all(one.seconds < 3 * RECOVERY_SECONDS for one in found.values())
    # Whoever is answered at once and asks again at once does harm.
    assert all(one.watches < 10 for one in found.values())


def _watches(one: Lane) -> int:
    return sum(count for what, count in one.proxy.counts.items() if what.startswith("watch "))


def test_what_vanished_while_the_watch_was_cut(
    cluster: Cluster, api: client.ApiClient, plain: Deeds
) -> None:
    """410 Gone, and the new list lacks objects: kopf says nothing about these."""

    def recorded(one: Lane) -> float:
        """Jobs whose results are known, and another run with all that it had."""
        one.run("other", execution=scripted(prepare=TOLD))
        one.run("run", execution=scripted(train=TOLD))
        one.space.pod("preflight", running, "other")
        for stage in TRAINS:
            one.space.pod(stage, running)
        one.proxy.rule = on_watches(Broken())
        one.proxy.cut()
        one.space.remove("other")
        for job in one.space.jobs("prepare-code"):
            one.space.delete_job(job)
        one.space.none_left(name="other")
        one.space.none_left("prepare-code")
        over = _gone(one)
        for stage in TRAINS:
            one.space.release(stage)
        all_over(api, one, "run")
        until(lambda: "other" not in states(api, one.name), 10)
        did = deeds(cluster, api, one.name)["run"]
        assert (did.ending, did.committed) == (plain.ending, plain.committed)
        assert len(did.jobs) == len(plain.jobs)
        until(lambda: _known(one) == 1, 3 * RECOVERY_SECONDS, lambda: _known(one))
        return time.time() - over

    def live(one: Lane) -> float:
        """The only Job, while it ran: the new list of Jobs is empty."""
        one.run(
            "run", execution=scripted(prepare={"stages": {"preflight": {"attempts": [TOLD, {}]}}})
        )
        one.space.pod("preflight", running)
        [job] = one.space.jobs()
        one.proxy.rule = lambda request: Broken() if _of_jobs(request) else None
        one.proxy.cut("jobs")
        one.space.delete_job(job)
        one.space.none_left("preflight")
        over = _gone(one)
        until(lambda: bool(one.space.jobs("preflight")), 3 * RECOVERY_SECONDS, one.operator.log)
        seconds = time.time() - over
        all_over(api, one)
        did = deeds(cluster, api, one.name)["run"]
        assert did.committed == plain.committed
        assert len(did.jobs) == len(plain.jobs) + 1
        return seconds

    with lanes(cluster, api, ["recorded", "live"], **PRODUCTION) as made:
        work = {"recorded": recorded, "live": live}
        times = at_once([lambda one=one: work[one.name](one) for one in made])  # type: ignore[misc]

    print(f"\nnoticed after {', '.join(f'{seconds:.1f}' for seconds in times)} s")
    assert all(seconds < 3 * RECOVERY_SECONDS for seconds in times)


def _of_jobs(request: Request) -> bool:
    return (request.verb, request.resource) == ("watch", "jobs")


def _gone(one: Lane) -> float:
    """The next watch of each kind is told that its version is too old."""
    one.proxy.rule = _once(Error(410))
    return time.time()


def _known(one: Lane) -> int:
    """Runs in the cache of the operator, by its metrics."""
    metric = f'{ENGINE["cache_objects"].name}{{kind="runs"}} '
    lines = one.operator.get("/metrics")[1].splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith(metric))


def test_the_api_server_is_killed(cluster: Cluster, api: client.ApiClient, plain: Deeds) -> None:
    """SIGKILL, 3 s of nothing, and again; no proxy is in between."""
    rounds = scaled(5, few=2)
    times: list[float] = []
    scripts = scripted(prepare={"seconds": 2}, train={"seconds": 3}, finetune={"seconds": 3})

    def some_over() -> bool:
        return any(_all_over_now(api, one) for one in made)

    with lanes(cluster, api, ["api-a", "api-b"], proxied=False, **PRODUCTION) as made:
        for one in made:
            one.run("run", execution=scripts)
        for _ in range(rounds):
            until(
                lambda: some_over()
                or all("Running" in states(api, one.name).values() for one in made),
                60, lambda: [states(api, one.name) for one in made],
            )  # fmt: skip
            if some_over():
                break
            cluster.stop("kube-apiserver")
            time.sleep(3)
            cluster.start("kube-apiserver")
            # An edit, and not the next stage: when a Job ends is told by the controller manager,
            # which looks again a minute after the third kill.
            began = time.time()
            for one in made:
                one.space.note(retry=str(began))
            for one in made:
                until(lambda: _noticed(one.space, str(began)), 3 * RECOVERY_SECONDS)  # noqa: B023
            times.append(time.time() - began)
        for one in made:
            all_over(api, one)
        did = {one.name: deeds(cluster, api, one.name)["run"] for one in made}
        exits = [one.operator.exits for one in made]

    print(
        f"\n{len(times)} kills of the API server; both acted on an edit after "
        f"{', '.join(f'{seconds:.1f}' for seconds in times)} s; own ends {exits}"
    )
    for one in did.values():
        # An answer that the killed API server sent may have no line in its log.
        assert set(one.jobs) <= set(one.left)
        assert len(one.jobs) == len(set(one.jobs))
        assert (one.ending, one.left, one.pods, one.committed) == (
            plain.ending, plain.left, plain.pods, plain.committed,
        )  # fmt: skip
    assert max(times) < 3 * RECOVERY_SECONDS


def _all_over_now(api: client.ApiClient, one: Lane) -> bool:
    return set(states(api, one.name).values()) == {"Succeeded"}


def _noticed(space: Space, retry: str) -> bool:
    return bool(space.get().get("status", {}).get("retry") == retry)
