"""The picture of the cluster: newer versions win, lists remove, claims follow, nothing comes back."""

import itertools
from typing import Any

from btx_api.status import State
from btx_operator.cluster.cache import Cache
from builders import a_spec

VERSIONS = itertools.count(1)


def a_run(
    name: str = "r", uid: str = "", version: int = 0, *, storage: str = "file://s",
    namespace: str = "ns", **rows: str,
) -> dict[str, Any]:  # fmt: skip
    """`rows`: digest letter -> state."""
    stages = [
        {"name": f"train-{letter}", "digest": letter * 32, "state": state}
        for letter, state in rows.items()
    ]
    return {
        "metadata": {
            "namespace": namespace, "name": name, "uid": uid or f"uid-{name}", "generation": 1,
            "resourceVersion": str(version or next(VERSIONS)),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": a_spec(storage={"uri": storage}),
        "status": {"stages": stages},
    }  # fmt: skip


def labelled(name: str, uid: str, version: int, run: str = "r", **meta: Any) -> dict[str, Any]:
    labels = {"btx.dev/run": run, "btx.dev/run-uid": f"uid-{run}", "btx.dev/stage": "train-a"}
    notes = {"btx.dev/attempt": "1", "btx.dev/digest": "a" * 32}
    return {
        "namespace": "ns", "name": name, "uid": uid, "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T00:00:00Z", "labels": labels, "annotations": notes, **meta,
    }  # fmt: skip


def a_job(uid: str = "job", version: int = 1, run: str = "r") -> dict[str, Any]:
    return {"metadata": labelled(uid, uid, version, run), "spec": {}, "status": {}}


def a_pod(uid: str = "pod", version: int = 1, job: str = "job", phase: str = "Running") -> Any:
    owners = [{"kind": "Job", "uid": job, "controller": True}]
    return {
        "metadata": labelled(uid, uid, version, ownerReferences=owners),
        "spec": {"containers": [{"name": "trainer", "image": "i"}]},
        "status": {"phase": phase},
    }


class Told(list[tuple[str, str]]):
    """Runs that the cache said have changed."""

    def __call__(self, key: tuple[str, str]) -> None:
        self.append(key)

    def take(self) -> set[str]:
        found = {name for _, name in self}
        self.clear()
        return found


def test_an_older_version_never_replaces_a_newer_one() -> None:
    """A watch may be behind our own write, or behind a list."""
    told = Told()
    cache = Cache(told)

    assert cache.put_run(a_run(version=5, a="Running"))
    assert not cache.put_run(a_run(version=4, a="Pending"))
    assert not cache.put_run(a_run(version=5, a="Pending"))
    assert cache.runs["ns", "r"].status.stages[0].state is State.RUNNING
    assert told.take() == {"r"}
    assert cache.put_job(a_job(version=7)) and not cache.put_job(a_job(version=6))


def test_what_was_deleted_does_not_come_back() -> None:
    """A late event or an older list may still tell of it."""
    cache = Cache(Told())
    for put, drop, item in (
        (cache.put_run, cache.drop_run, a_run(version=1)),
        (cache.put_job, cache.drop_job, a_job()),
        (cache.put_pod, cache.drop_pod, a_pod()),
    ):
        put(item)
        drop(item)
        assert not put(item | {"metadata": item["metadata"] | {"resourceVersion": "9"}})


def test_a_namesake_does_not_inherit() -> None:
    """A run of the same name is another run: the first one's Jobs are not its own."""
    cache = Cache(Told())
    cache.put_run(a_run(version=1))
    cache.put_job(a_job())
    cache.put_run(a_run(uid="uid-new", version=9))

    assert cache.records_of("uid-new") == [] and cache.records_of("uid-r") == []


def test_a_record_lives_as_long_as_something_of_it_does() -> None:
    """A deleted Job's pod goes on; when it has ended and its row knows, the record goes."""
    cache = Cache(Told())
    cache.put_run(a_run(version=1, a="Running"))
    cache.put_job(a_job())
    cache.put_pod(a_pod())
    cache.drop_job(a_job())
    cache.tidy(("ns", "r"))
    (record,) = cache.records_of("uid-r")
    assert record.job is None and len(record.live_pods) == 1

    cache.drop_pod(a_pod(version=2))
    assert cache.records_of("uid-r") == [record] and not record.live_pods
    cache.tidy(("ns", "r"))
    assert cache.records_of("uid-r") == [] and not cache.records


def test_a_record_stays_until_its_row_has_been_told() -> None:
    """The row names the Job as its handle: its end is not recorded yet."""
    cache = Cache(Told())
    run = a_run(version=1, a="Running")
    run["status"]["stages"][0]["handle"] = "job"
    cache.put_run(run)
    cache.put_job(a_job())
    cache.put_pod(a_pod(phase="Failed"))
    cache.drop_job(a_job())
    cache.tidy(("ns", "r"))

    assert len(cache.records_of("uid-r")) == 1


def test_a_list_removes_what_it_lacks_but_not_what_is_newer() -> None:
    """kopf does not tell what vanished while its watch was cut; a list may be behind a create."""
    told = Told()
    cache = Cache(told)
    cache.put_run(a_run(version=1))
    cache.put_job(a_job("old", 10))
    cache.put_job(a_job("new", 30))
    told.take()

    assert cache.prune("jobs", (), 20, ()) == 1 and told.take() == {"r"}
    assert [r.uid for r in cache.records_of("uid-r") if r.job] == ["new"]
    assert cache.take("runs", [a_run("r", version=1)]) == {}
    assert cache.take("runs", [a_run("r", version=2)]) == {"uid-r": 2}
    assert cache.prune("runs", {"uid-r"}, 40, ()) == 0
    assert cache.prune("runs", (), 40, ("elsewhere",)) == 0
    assert cache.prune("runs", (), 40, ("ns",)) == 1 and not cache.runs


def test_claims_are_of_the_same_namespace_and_storage() -> None:
    """Who shares a digest; a reservation counts at once, and is undone by the next look."""
    cache = Cache(Told())
    cache.put_run(a_run("one", a="Running", b="Pending"))
    cache.put_run(a_run("two", a="Pending"))
    cache.put_run(a_run("far", storage="file://other", a="Running"))
    cache.put_run(a_run("foreign", namespace="other", a="Running"))

    def holders(run: str, digest: str) -> list[tuple[str, State]]:
        claims = cache.claims(("ns", run)).get(digest * 32, ())
        return [(claim.run, claim.row.state) for claim in claims]

    assert holders("two", "a") == [("one", State.RUNNING)]
    assert holders("one", "a") == [("two", State.PENDING)]
    assert holders("far", "a") == [] and holders("two", "c") == []
    assert list(cache.claims(("ns", "two"))) == ["a" * 32, "b" * 32]
    status = cache.runs["ns", "two"].status
    row = status.stages[0].model_copy(update={"state": State.STARTING})
    cache.reserve(("ns", "two"), status.model_copy(update={"stages": (row,)}))
    assert holders("one", "a") == [("two", State.STARTING)]
    cache.release(("ns", "two"))
    assert holders("one", "a") == [("two", State.PENDING)]


def test_sharers_are_woken_by_a_change_of_what_they_share() -> None:
    """And by the end of the run that made it; other runs sleep on."""
    told = Told()
    cache = Cache(told)
    cache.put_run(a_run("one", a="Running"))
    cache.put_run(a_run("two", a="WaitingFor"))
    cache.put_run(a_run("other", b="Pending"))
    told.take()

    cache.put_run(a_run("one", a="Complete"))
    assert told.take() == {"one", "two"}
    cache.put_run(a_run("one", a="Complete"))
    assert told.take() == {"one"}
    cache.drop_run(a_run("one"))
    assert told.take() == {"two"}
