"""Every right of the operator is needed: without it something that people see fails, with it it works.

Each verb of operator_process.RULES is taken from one operator. Its user then gets it, and what failed
works without a restart. That the chart grants the same rules: tests/chart/test_render.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from btx_api.names import GROUP
from cluster.api_proxy import Fault, Lost, Request
from cluster.chaos import RECOVERY_SECONDS, Lane, at_once, audit, grant_once, lane, until
from cluster.control_plane import Cluster
from cluster.operator_process import RULES
from cluster.space import TOLD, running, scripted
from kubernetes import client

Right = tuple[str, str]
"""Resource (with subresource) and verb."""
RIGHTS: list[Right] = [
    (resource, verb) for rule in RULES for resource in rule["resources"] for verb in rule["verbs"]
]
AT_ONCE = 5
HELD = scripted(prepare={"stages": {"preflight": TOLD}})
SETTLED = 6.0
"""Seconds after which no list follows that the operator's start asked for."""
WAIT = 3.0
"""Seconds for which what must not happen is waited for, once the right was refused."""


@dataclass(frozen=True)
class Proof:
    """What fails without a right."""

    provoke: Callable[[Lane], object]
    """Makes the operator need it."""
    works: Callable[[Lane], bool]


def rules_without(right: Right) -> list[dict[str, Any]]:
    """RULES but for one verb of one resource."""
    return [
        {**rule, "verbs": [verb for verb in rule["verbs"] if (resource, verb) != right]}
        for rule in RULES
        for resource in rule["resources"]
    ]


# Provocations -----------------------------------------------------------------------------------


def begin(one: Lane) -> None:
    """A run, once the lists with which the operator starts are over."""
    time.sleep(SETTLED)
    one.run("run")


def begin_held(one: Lane) -> None:
    """The same, and its first pod does not end."""
    time.sleep(SETTLED)
    one.run("run", execution=HELD)


def conflict(one: Lane) -> None:
    """The run changes while the operator does not hear of it, and then has something to record."""
    begin_held(one)
    pod = one.space.pod("preflight", running)
    until(lambda: one.space.row("preflight").get("state") == "Running", RECOVERY_SECONDS)
    one.proxy.stall("btxruns")
    one.space.note(note="changed")
    one.space.tell(pod)


def lost_answer(one: Lane) -> None:
    """A Job is created, but neither the answer nor a watch tells so."""
    lost: list[Request] = []

    def rule(request: Request) -> Fault | None:
        if (request.verb, request.resource) != ("create", "jobs") or lost:
            return None
        lost.append(request)
        return Lost()

    until(lambda: len(one.proxy.watches()) == 3, 60)
    time.sleep(SETTLED)
    for kind in ("jobs", "pods"):
        one.proxy.stall(kind)
    one.proxy.rule = rule
    one.run("run", execution=HELD)


def suspend(one: Lane) -> None:
    """A run with a Job is suspended."""
    one.run("run", execution=HELD)
    one.space.pod("preflight", running)
    one.space.edit(suspend=True)


def failing(one: Lane) -> None:
    """Preflight fails: its event has the last lines of the log."""
    one.run("run", execution=scripted(prepare={"exit": 1}))


# Effects ----------------------------------------------------------------------------------------


def ready(one: Lane) -> bool:
    """The operator says so."""
    return one.operator.get("/readyz")[0] == 200


def answered(one: Lane) -> bool:
    """The run has a status."""
    return bool(one.space.get().get("status"))


def first_job(one: Lane) -> bool:
    """Preflight has a Job."""
    return bool(one.space.jobs("preflight"))


def goes_on(one: Lane) -> bool:
    """The end of preflight was noticed."""
    return bool(one.space.jobs("prepare-code"))


def shown(one: Lane) -> bool:
    """That its pod runs is shown."""
    return bool(one.space.row("preflight").get("state") == "Running")


def adopted(one: Lane) -> bool:
    """The status has the Job's uid."""
    return bool(one.space.row("preflight").get("handle"))


def ended_job(one: Lane) -> bool:
    """No Job is left of a run that is suspended."""
    return not one.space.jobs()


def log_read(one: Lane) -> bool:
    """The API server let the operator through to the log (a hollow node has none)."""
    return any(
        line.get("objectRef", {}).get("subresource") == "log"
        and line["responseStatus"]["code"] != 403
        for line in audit(one.space.cluster, one.name, one.name)
    )


def service(one: Lane) -> bool:
    """The ranks of an expert on two nodes find each other."""
    return bool(one.space.core.list_namespaced_service(one.name).items)


def told(one: Lane) -> bool:
    """The run has an event."""
    return bool(one.space.events())


PROOFS: dict[Right, Proof] = {
    ("btxruns", "get"): Proof(conflict, goes_on),
    ("btxruns", "list"): Proof(lambda one: None, ready),
    ("btxruns", "watch"): Proof(begin, answered),
    ("btxruns/status", "update"): Proof(begin, answered),
    ("jobs", "get"): Proof(lost_answer, adopted),
    ("jobs", "list"): Proof(lambda one: None, ready),
    ("jobs", "watch"): Proof(begin, goes_on),
    ("jobs", "create"): Proof(begin, first_job),
    ("jobs", "delete"): Proof(suspend, ended_job),
    ("pods", "list"): Proof(lambda one: None, ready),
    ("pods", "watch"): Proof(begin_held, shown),
    ("pods/log", "get"): Proof(failing, log_read),
    ("services", "create"): Proof(
        lambda one: one.run("run", execution={"train": {"nodes": 2}}), service
    ),
    ("events", "create"): Proof(begin, told),
}  # fmt: skip


def test_there_is_a_proof_for_every_right() -> None:
    """A new right needs a new row."""
    assert sorted(PROOFS) == sorted(RIGHTS)


def _prove(cluster: Cluster, api: client.ApiClient, right: Right) -> str:
    """What is wrong with this right; empty: without it something fails, with it it works."""
    proof, (resource, verb) = PROOFS[right], right
    name = f"no-{verb}-{resource.replace('/', '-')}"
    _allow(cluster, api, name, rules_without(right))
    with lane(cluster, api, name, user=name, resyncSeconds=300) as one:
        if verb != "list":
            one.operator.wait_ready(120)
        proof.provoke(one)
        until(lambda: _refused(one, right), RECOVERY_SECONDS, lambda: f"{right} is not used")
        time.sleep(WAIT)
        if proof.works(one):
            return f"{right}: {proof.works.__doc__} Without it, too."
        _allow(cluster, api, name, RULES)
        # Events that were refused are gone; whoever was refused asks again.
        if proof.works in (told, log_read):
            one.space.remove()
            one.space.none_left()
            proof.provoke(one)
        try:
            until(lambda: proof.works(one), 3 * RECOVERY_SECONDS)
        except AssertionError:
            return f"{right}: not healed\n{one.operator.log()[-2000:]}"
        assert one.operator.exits == 0
    return ""


def _refused(one: Lane, right: Right) -> bool:
    """Whether the API server refused it, by its log."""
    for line in audit(one.space.cluster, one.name, one.name):
        what = line.get("objectRef", {})
        path = "/".join(filter(None, (what.get("resource"), what.get("subresource"))))
        if (path, line["verb"]) == right and line["responseStatus"]["code"] == 403:
            return True
    return False


def _allow(cluster: Cluster, api: client.ApiClient, user: str, rules: list[dict[str, Any]]) -> None:
    """These rights, everywhere, and no other."""
    rbac = client.RbacAuthorizationV1Api(api)
    body = {"metadata": {"name": user}, "rules": [rule for rule in rules if rule["verbs"]]}
    if user in {role.metadata.name for role in rbac.list_cluster_role().items}:
        rbac.replace_cluster_role(user, body)
        return
    cluster.authority.kubeconfig(user, cluster.address, user=user)
    rbac.create_cluster_role(body)
    group = "rbac.authorization.k8s.io"
    rbac.create_cluster_role_binding(
        {
            "metadata": {"name": user},
            "roleRef": {"kind": "ClusterRole", "name": user, "apiGroup": group},
            "subjects": [{"kind": "User", "name": user, "apiGroup": group}],
        }
    )


def test_every_right_is_needed(
    cluster: Cluster, api: client.ApiClient, hollow: str, crd: None, storage: None
) -> None:
    """Without one of them something fails; once it is granted that works, without a restart."""
    problems = []
    grant_once(cluster)
    for first in range(0, len(RIGHTS), AT_ONCE):
        some = RIGHTS[first : first + AT_ONCE]
        problems += at_once([lambda right=right: _prove(cluster, api, right) for right in some])  # type: ignore[misc]

    assert "\n".join(filter(None, problems)) == ""


@pytest.mark.parametrize("group", ["", "batch", GROUP])
def test_no_rule_is_wider_than_its_verbs(group: str) -> None:
    """No wildcard, no Secret, one group a rule."""
    for rule in (rule for rule in RULES if group in rule["apiGroups"]):
        assert rule["apiGroups"] == [group]
        assert "*" not in (*rule["resources"], *rule["verbs"])
        assert "secrets" not in rule["resources"]
