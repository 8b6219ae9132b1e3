"""Children that vanish, by TTL and by hand, while the operator looks and while it does not."""

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from cluster.chaos import (
    RECOVERY_SECONDS,
    Deeds,
    Lane,
    all_over,
    at_once,
    deeds,
    lane,
    lanes,
    quiet,
    until,
)
from cluster.control_plane import Cluster
from cluster.space import ended, running, scripted
from kubernetes import client

TRAINS = ("train-code", "train-math")


@contextlib.contextmanager
def down(one: Lane) -> Iterator[None]:
    """The operator is dead within the block."""
    one.operator.down = True
    one.operator.kill()
    try:
        yield
    finally:
        one.operator.down = False


@pytest.mark.parametrize("ttl", [0, 1])
def test_jobs_removed_by_ttl(
    cluster: Cluster, api: client.ApiClient, plain: Deeds, ttl: int
) -> None:
    """Every Job vanishes as soon as it has ended: nothing is done twice, now or after a restart."""
    with lanes(cluster, api, [f"ttl-{ttl}"], jobTtlSeconds=ttl) as [one]:
        one.run("run")
        all_over(api, one)
        one.space.none_left()
        before = one.space.get()
        with down(one):
            pass
        until(lambda: one.operator.kills == 1 and one.operator.get("/readyz")[0] == 200, 60)
        quiet(one, 3)
        did = deeds(cluster, api, one.name)["run"]
        after = one.space.get()

    assert (did.ending, did.committed) == (plain.ending, plain.committed)
    assert len(did.jobs) == len(set(did.jobs)) == len(plain.jobs)
    assert (did.left, did.pods) == ((), 0)
    assert after["status"] == before["status"]


def test_jobs_deleted_by_hand(cluster: Cluster, api: client.ApiClient, plain: Deeds) -> None:
    """Each as soon as it has ended, by somebody who tidies up too eagerly."""
    over = threading.Event()

    def tidy(one: Lane) -> None:
        while not over.is_set():
            for job in one.space.jobs():
                if ended(job):
                    with contextlib.suppress(client.ApiException):
                        one.space.delete_job(job)
            time.sleep(0.1)

    with lanes(cluster, api, ["tidied"]) as [one]:
        tidier = threading.Thread(target=tidy, args=(one,))
        tidier.start()
        try:
            one.run("run")
            all_over(api, one)
            one.space.none_left()
        finally:
            over.set()
            tidier.join()
        quiet(one, 3)
        did = deeds(cluster, api, one.name)["run"]

    assert (did.ending, did.committed) == (plain.ending, plain.committed)
    assert len(did.jobs) == len(set(did.jobs)) == len(plain.jobs)


def test_results_that_vanished_while_the_operator_was_down(
    cluster: Cluster, api: client.ApiClient, plain: Deeds
) -> None:
    """Jobs that ended and were deleted, and pods of which only the Jobs are left: no stage runs twice.

    The attempts that look for the artifacts find them; metrics are complete.
    """

    def work(one: Lane) -> Deeds:
        one.run("run", execution=scripted(train={"seconds": 4}))
        for stage in TRAINS:
            # What was seen is written a second later; what is not written is not known to have been.
            seen = lambda stage=stage: "handle" in one.space.row(stage)  # noqa: E731
            until(seen, RECOVERY_SECONDS)
        with down(one):
            for stage in TRAINS:
                one.space.job(stage, ended)
                for job in one.space.jobs(stage) if one.name == "no-jobs" else ():
                    one.space.delete_job(job)
                for pod in one.space.pods(stage) if one.name == "no-pods" else ():
                    one.space.core.delete_namespaced_pod(
                        pod["metadata"]["name"], one.name, grace_period_seconds=0
                    )
                until(lambda: not one.space.pods(stage), RECOVERY_SECONDS)  # noqa: B023
        all_over(api, one)
        for stage in TRAINS:
            row = one.space.row(stage)
            assert (row["gain"], row["attempt"], row["state"]) == (0.5, 2, "Complete")
            assert row.get("failures", 0) == 0
        return deeds(cluster, api, one.name)["run"]

    with lanes(cluster, api, ["no-jobs", "no-pods"]) as made:
        found = at_once([lambda one=one: work(one) for one in made])  # type: ignore[misc]

    for did in found:
        assert did.committed == plain.committed
        assert len(did.jobs) == len(set(did.jobs)) == len(plain.jobs) + len(TRAINS)


def test_a_namespace_is_deleted_while_the_operator_is_down(
    cluster: Cluster, api: client.ApiClient, plain: Deeds
) -> None:
    """It goes with all that is in it: nothing of ours asks it to wait."""
    core = client.CoreV1Api(api)

    def there(name: str) -> bool:
        return name in {item.metadata.name for item in core.list_namespace().items}

    with lane(cluster, api, "doomed") as one:
        one.operator.wait_ready()
        one.run("run", execution=scripted(train={"end": "hang"}))
        one.space.pod("train-code", running)
        run, [job] = one.space.get(), one.space.jobs("train-code")
        with down(one):
            core.delete_namespace(one.name)
            seconds = until(lambda: not there(one.name), RECOVERY_SECONDS)
        one.operator.wait_ready()

    print(f"\nthe namespace was gone after {seconds:.1f} s")
    assert "finalizers" not in run["metadata"]
    assert job["metadata"]["ownerReferences"][0]["uid"] == run["metadata"]["uid"]
