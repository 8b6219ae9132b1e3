"""Two operators serve one namespace, as when the old one's node is cut off: no Lease is needed."""

import contextlib
from collections.abc import Iterator

from cluster.api_proxy import ApiProxy
from cluster.chaos import (
    RECOVERY_SECONDS,
    Deeds,
    Kept,
    Lane,
    all_over,
    deeds,
    lanes,
    quiet,
    scaled,
    until,
)
from cluster.control_plane import Cluster
from cluster.operator_process import USER
from cluster.space import TOLD, deleting, running, scripted
from kubernetes import client


@contextlib.contextmanager
def second(one: Lane) -> Iterator[ApiProxy]:
    """Another operator of the lane's namespace, ready; its way to the API server."""
    cluster, name = one.space.cluster, f"{one.name}-second"
    proxy = ApiProxy(cluster, USER, lambda: None)
    with proxy.running():
        path = proxy.kubeconfig(cluster.folder / f"{name}.kubeconfig")
        other = Kept(cluster, path, name=name, namespaces=[one.name], **one.settings)
        other.start()
        try:
            other.wait_ready(120)
            until(lambda: len(proxy.watches()) == 3, RECOVERY_SECONDS)
            yield proxy
        finally:
            other.stop()


def test_two_operators_at_once(cluster: Cluster, api: client.ApiClient, plain: Deeds) -> None:
    """Both do their best: nothing is done twice.

    The slower one may delete a Job whose result the other has recorded.
    """
    runs = [f"r{number}" for number in range(scaled(10, few=3))]
    with lanes(cluster, api, ["two"]) as [one], second(one) as proxy:
        for run in runs:
            one.run(run)
        all_over(api, one, *runs)
        quiet(one)
        wrote = [len(one.proxy.written), len(proxy.written)]
        found = deeds(cluster, api, "two")

    print(f"\n{len(runs)} runs; writes of the one and the other that got through: {wrote}")
    for did in found.values():
        assert (did.ending, did.committed) == (plain.ending, plain.committed)
        assert len(did.jobs) == len(set(did.jobs)) == len(plain.jobs)
    assert min(wrote) > 0


def test_an_operator_that_missed_an_edit_stops_nothing(
    cluster: Cluster, api: client.ApiClient, plain: Deeds
) -> None:
    """It believes that the run is suspended, and sees the Jobs that the other one makes."""
    held = scripted(prepare={"stages": {"preflight": TOLD}})
    with lanes(cluster, api, ["stale"], resyncSeconds=300) as [one], second(one) as proxy:
        one.run("run", suspend=True, execution=held)
        one.space.until_condition("Suspended", "True", "Suspended")
        # Both have seen it; the status that came last, too.
        quiet(one, 3)
        proxy.stall("btxruns")
        seen = proxy.counts["get btxruns"]
        one.space.edit(suspend=False)
        pod = one.space.pod("preflight", running)
        until(lambda: proxy.counts["get btxruns"] > seen, RECOVERY_SECONDS)
        assert not deleting(one.space.pods("preflight")[0])
        one.space.tell(pod)
        all_over(api, one)
        did = deeds(cluster, api, one.name)["run"]

    assert (did.ending, did.committed) == (plain.ending, plain.committed)
    assert len(did.jobs) == len(set(did.jobs)) == len(plain.jobs)
