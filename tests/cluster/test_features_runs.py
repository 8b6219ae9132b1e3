"""Runs among each other, and what their users change: single flight, edits, suspend, members."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from btx_api.names import STAGE_LABEL
from btx_api.stage import Corrupt, Kind, Result
from cluster.control_plane import Cluster
from cluster.operator_process import Operator
from cluster.space import (
    TOLD,
    Object,
    Space,
    attempt,
    condition,
    deleting,
    number,
    row_of,
    running,
    scripted,
    task_of,
)
from kubernetes import client

HELD = {"train": {"stages": {"train-code": TOLD}}}
EXPERTS = [
    {"name": "code", "tokens": 400, "data": [{"uri": "file://code/*.py"}]},
    {"name": "math", "tokens": 100, "data": [{"uri": "file://math.jsonl"}]},
]


@pytest.mark.shows("single-flight", "waiting-for")
def test_four_runs_over_the_same_experts(engine: Operator, space: Space) -> None:
    """Four specs at once: every expert trains once, and every run succeeds."""
    lrs = {"a": 1e-4, "b": 2e-4, "c": 3e-4, "d": 4e-4}
    for name, lr in lrs.items():
        space.run(name, finetune={"optimizer": {"lr": lr}})
    digests = {name: row_of(space.succeeded(name), "finetune")["digest"] for name in lrs}
    begun = [name for name in lrs for job in space.jobs("train-code", name)]

    assert len(set(digests.values())) == 4
    assert space.commits("train-code") == ["train-code"]
    assert space.commits("train-math") == ["train-math"]
    assert len(space.commits("finetune")) == 4
    assert len(begun) == 1


@pytest.mark.shows("single-flight", "waiting-for", "take-over", "suspend")
def test_a_waiter_takes_over(engine: Operator, space: Space) -> None:
    """From a holder that is suspended, deleted, failed: in the order of age; nothing runs twice."""
    for name in ("a", "b", "c", "d"):
        space.run(name, execution=scripted(**HELD), policy={"maxRetries": 0})
        space.until_row("train-code", name, state={"Running", "WaitingFor"})
    for name in ("b", "c", "d"):
        assert space.until_row("train-code", name, waitsFor="a/train-code")["state"] == "WaitingFor"
    message = space.until_condition("Queued", "True", "WaitingFor", "b")
    assert "a/train-code" in message
    assert space.jobs("train-code", "b") == []

    space.edit("a", suspend=True)
    after_a = holder(space, "b", "c", "d")
    space.remove(after_a)
    after_b = holder(space, *({"b", "c", "d"} - {after_a}))
    space.release("train-code", 78, after_b)
    space.until_condition("Succeeded", "False", "ExpertFailed", after_b)
    [last] = {"b", "c", "d"} - {after_a, after_b}
    space.release("train-code", 0, last)
    space.succeeded(last)
    row = space.row("train-code", last)
    assert (row["attempt"], row.get("failures", 0)) == (1, 0)
    assert space.commits("train-code") == ["train-code"]
    space.edit("a", suspend=False)
    space.release("train-code", 0, "a")
    resumed = row_of(space.succeeded("a"), "train-code")
    assert (resumed["attempt"], resumed.get("failures", 0)) == (2, 0)
    assert space.commits("train-code") == ["train-code"]


def holder(space: Space, *names: str) -> str:
    """The one of these runs that trains the expert now; the others wait for it."""
    found: list[str] = []

    def one() -> bool:
        rows = {name: space.row("train-code", name) for name in names}
        found[:] = [name for name, row in rows.items() if row["state"] in ("Starting", "Running")]
        waits = {row.get("waitsFor") for name, row in rows.items() if name not in found}
        return len(found) == 1 and waits <= {f"{found[0]}/train-code"}

    space.cluster.wait_for("a holder", one)
    return found[0]


@pytest.fixture
def elsewhere(cluster: Cluster, api: client.ApiClient) -> Iterator[Space]:
    """Another namespace."""
    made = Space(cluster, api, f"test-{uuid.uuid4().hex[:8]}")
    yield made
    made.close()


@pytest.mark.shows("single-flight-scope")
def test_other_namespaces_and_storages_share_nothing(
    engine: Operator, space: Space, elsewhere: Space
) -> None:
    """The same expert trains in each of them at the same time."""
    held = {"execution": scripted(**HELD)}
    space.run("one", **held)
    space.run("two", storage={"uri": f"file://{space.name}-2"}, **held)
    elsewhere.run("one", storage={"uri": f"file://{space.name}"}, **held)
    rows = [
        space.until_row("train-code", "one", state="Running"),
        space.until_row("train-code", "two", state="Running"),
        elsewhere.until_row("train-code", "one", state="Running"),
    ]

    assert len({row["digest"] for row in rows}) == 1
    assert not any(row.get("waitsFor") for row in rows)


@pytest.mark.shows("suspend", "suspend-uncounted", "conditions")
def test_suspend_and_resume(engine: Operator, space: Space) -> None:
    """SIGTERM to every pod, Jobs deleted, nothing counted; the next attempt goes on."""
    space.run(execution=scripted(train={"attempts": [TOLD, {}]}))
    space.until_row("train-code", state="Running")
    space.until_row("train-math", state="Running")
    space.edit(suspend=True)
    space.until_condition("Suspended", "True", "Suspended")
    space.none_left("train-code")
    run = space.until(lambda run: row_of(run, "train-code")["state"] == "Pending")
    kinds = [c["type"] for c in run["status"]["conditions"]]
    assert kinds == ["Accepted", "Queued", "Running", "Suspended", "Succeeded"]
    assert run["status"]["state"] == "Suspended"
    space.event("Suspended")
    space.event("AttemptStopped", "train-code: attempt 1")

    space.edit(suspend=False)
    done = space.succeeded()
    for stage in ("train-code", "train-math"):
        row = row_of(done, stage)
        counts = [row.get(key, 0) for key in ("failures", "preemptions", "lost")]
        assert (row["attempt"], counts) == (2, [0, 0, 0])
    assert space.row("prepare-code")["attempt"] == 1
    space.event("NotSuspended")


@pytest.mark.shows("edit-pending", "same-digest-kept", "edit-accepted")
def test_an_edit_is_looked_at_while_attempts_go_on(engine: Operator, space: Space) -> None:
    """EditPending: nothing starts, nothing is pruned; on acceptance rows of the same digest stay."""
    held = {"stages": {"preflight": {"attempts": [{}, TOLD]}}}
    space.run(execution=scripted(prepare=held, train={"stages": {"train-code": TOLD}}))
    before = space.until_row("train-code", state="Running")
    math = space.until_row("train-math", state="Complete")
    space.edit(evaluate={"tokens": 4096})
    space.until_condition("Accepted", "Unknown", "EditPending")
    space.release("train-code")
    space.until_row("train-code", state="Complete")
    [code] = space.jobs("train-code")
    assert not deleting(code)
    assert space.jobs("mix") == []
    assert space.row("mix")["state"] == "Pending"
    space.release("preflight")
    run = space.succeeded()

    assert run["status"]["generation"] == run["metadata"]["generation"] == 2
    assert row_of(run, "train-math")["digest"] == math["digest"]
    assert row_of(run, "train-code")["digest"] == before["digest"]
    assert (row_of(run, "train-math")["attempt"], row_of(run, "train-code")["attempt"]) == (1, 1)
    assert space.commits("train-math") == ["train-math"]
    [evaluate] = space.jobs("evaluate")
    stage = task_of(evaluate).stage
    assert stage is not None and stage.recipe["tokens"] == 4096


def retrained(tokens: int = 800) -> list[Object]:
    """The experts, with another recipe for the first."""
    return [EXPERTS[0] | {"tokens": tokens}, EXPERTS[1]]


@pytest.mark.shows("would-retrain", "suspend-under-refusal", "revert")
def test_an_edit_that_would_retrain(engine: Operator, space: Space) -> None:
    """The running expert runs on, nothing starts, the message says what to do; suspend acts."""
    space.run(execution=scripted(train={"stages": {"train-math": TOLD}}))
    space.until_row("train-code", state="Complete")
    math = space.pod("train-math", running)
    space.edit(experts=retrained())
    message = space.until_condition("Accepted", "False", "WouldRetrain")
    assert message == "code: trained already; revert, or set policy.allowRetrain"
    space.event("WouldRetrain", "code: trained already")
    [there] = space.pods("train-math")
    assert there["metadata"]["uid"] == math["metadata"]["uid"] and running(there)
    assert [attempt(job) for job in space.jobs("train-code")] == [1]

    space.edit(suspend=True)
    space.none_left("train-math")
    run = space.until(lambda run: row_of(run, "train-math")["state"] == "Pending")
    assert condition(run, "Suspended")[:2] == ("True", "Suspended")
    assert condition(run, "Accepted")[:2] == ("False", "WouldRetrain")
    space.edit(suspend=False)
    space.until_condition("Suspended", "False", "NotSuspended")
    assert space.jobs("train-math") == []
    space.edit(experts=EXPERTS)
    space.until_condition("Accepted", "True", "Accepted")
    space.release("train-math")
    done = space.succeeded()
    assert row_of(done, "train-math").get("failures", 0) == 0
    assert space.commits("train-code") == ["train-code"]


@pytest.mark.shows("allow-retrain", "policy-at-once", "would-retrain")
def test_allow_retrain(engine: Operator, space: Space) -> None:
    """policy acts at once: the refused edit is accepted, and the expert trained by the new recipe."""
    space.run(execution=scripted(finetune=TOLD))
    old = space.until_row("train-code", state="Complete")
    space.pod("finetune", running)
    space.edit(experts=retrained())
    space.until_condition("Accepted", "False", "WouldRetrain")
    looks = space.row("preflight")["attempt"]
    assert running(space.pods("finetune")[0])
    space.edit(policy={"allowRetrain": True})
    space.until_condition("Accepted", "True", "Accepted")
    new = space.until_row("train-code", state="Complete", attempt=2)
    assert new["digest"] != old["digest"]
    assert space.row("preflight")["attempt"] == looks
    assert space.commits("train-code") == ["train-code"] * 2
    assert space.commits("train-math") == ["train-math"]
    space.pod("finetune", lambda pod: attempt(pod) == 2 and running(pod))


@pytest.mark.shows("prune", "dropped-expert", "changed-recipe", "added-expert")
def test_experts_that_are_changed_dropped_and_added(engine: Operator, space: Space) -> None:
    """Jobs that the graph does not ask for go; those of untrained experts need no permission."""
    third = {"name": "law", "tokens": 100, "data": [{"uri": "file://law.jsonl"}]}
    script = {"stages": {"train-code": {"attempts": [TOLD, {}]}, "train-math": TOLD}}
    space.run(execution=scripted(train=script))
    old = space.until_row("train-code", state="Running")
    space.until_row("train-math", state="Running")
    space.edit(experts=[EXPERTS[0] | {"tokens": 800}, third])
    run = space.succeeded()

    code = row_of(run, "train-code")
    assert (code["attempt"], code.get("failures", 0)) == (2, 0)
    assert code["digest"] != old["digest"]
    assert row_of(run, "train-math") == {}
    assert run["status"]["members"]["experts"] == ["code", "law"]
    space.none_left("train-math")
    assert [attempt(job) for job in space.jobs("train-code")] == [2]
    assert space.commits("train-math") == []


@pytest.mark.shows("immutable")
def test_immutable_fields(engine: Operator, space: Space) -> None:
    """Refused by the API server once accepted, naming the field; before that they can be mended."""
    space.run(suspend=True, seed={"uri": "file://sed"})
    space.edit(seed={"uri": "file://seed"})
    space.edit(suspend=False)
    space.until_condition("Accepted", "True", "Accepted")
    changes: dict[str, Any] = {
        "seed.uri": {"seed": {"uri": "file://other"}},
        "storage.uri": {"storage": {"uri": "file://other"}},
        "method": {"method": "Dense"},
    }
    for field, change in changes.items():
        with pytest.raises(client.ApiException, match="immutable once accepted") as refused:
            space.edit(**change)
        assert refused.value.status == 422
        assert f"spec.{field}" in str(refused.value.body)
    space.succeeded()


@pytest.mark.shows("invalid-spec", "correction-heals")
def test_a_spec_that_cannot_be_read(engine: Operator, space: Space) -> None:
    """What the schema cannot refuse: a condition naming the field; corrected, the run goes on."""
    space.run(train={"batchTokens": "1.5K", "sequenceLength": 128})
    message = space.until_condition("Accepted", "False", "InvalidSpec")
    run = space.get()
    assert "spec.train.batchTokens: 1500 is not a positive multiple" in message
    assert run["status"]["problems"] == [message]
    assert (run["status"]["state"], space.jobs()) == ("Refused", [])
    space.event("InvalidSpec", "spec.train.batchTokens")
    space.edit(train={"batchTokens": "1280"})
    done = space.succeeded()
    assert "problems" not in done["status"]


@pytest.mark.shows("refresh", "retry")
def test_btx_refresh(engine: Operator, space: Space) -> None:
    """The annotation asks for one more preflight of a run that has ended; nothing else runs."""
    space.run()
    space.succeeded()
    space.note(refresh="now")
    run = space.until(lambda run: run["status"].get("refresh") == "now")
    space.until(lambda run: condition(run, "Accepted")[:2] == ("True", "Accepted"))
    assert row_of(run, "preflight")["attempt"] == 2
    assert [attempt(job) for job in space.jobs("preflight")] == [1, 2]
    assert len(space.commits()) == len(set(space.commits()))


@pytest.mark.shows("max-parallel", "scheduling-next-attempt")
def test_at_most_so_many_experts_at_once(engine: Operator, space: Space) -> None:
    """Of those that may begin the first of the spec; an edit of scheduling is for later attempts."""
    experts = [{"name": name, "tokens": 100, "data": [{"uri": f"file://{name}.jsonl"}]}
               for name in ("zeta", "alpha", "mid")]  # fmt: skip
    begin = space.mark()
    prepare = {"stages": {"prepare-alpha": TOLD, "prepare-mid": TOLD}}
    held = scripted(prepare=prepare, train={"stages": {"train-zeta": TOLD}})
    space.run(experts=experts, policy={"maxParallelExperts": 1}, execution=held)
    space.pod("train-zeta", running)
    for stage in ("prepare-mid", "prepare-alpha"):
        space.release(stage)
        space.until_row(stage, state="Complete")
    space.edit(execution={"train": {"labels": {"team": "blue"}}})
    space.until(lambda run: run["status"]["observedGeneration"] == 2)
    [zeta] = space.jobs("train-zeta")
    assert "team" not in zeta["spec"]["template"]["metadata"]["labels"]
    space.release("train-zeta")
    space.succeeded()
    runs, born = space.replay(begin)

    order = [job["metadata"]["labels"][STAGE_LABEL] for job in born]
    assert [s for s in order if s.startswith("train")] == ["train-zeta", "train-alpha", "train-mid"]
    active = ("Starting", "Running", "Stopping")
    for run in runs:
        rows = run.get("status", {}).get("stages", [])
        busy = [row["name"] for row in rows if row["name"].startswith("train-")
                and row.get("state") in active]  # fmt: skip
        assert len(busy) <= 1
    for stage in ("train-alpha", "train-mid"):
        [job] = space.jobs(stage)
        assert job["spec"]["template"]["metadata"]["labels"]["team"] == "blue"


@pytest.mark.shows("expert-deadline", "members-frozen", "prune", "members-again")
def test_an_expert_that_is_late(engine: Operator, space: Space) -> None:
    """Left out when the clock is over, its Job deleted; decided again when the policy changes."""
    space.run(
        policy={"expertDeadlineSeconds": 12, "minExperts": 1},
        execution=scripted(train={"stages": {"train-math": {"attempts": [TOLD, {}]}}}, mix=TOLD),
    )
    space.pod("train-math", running)
    space.until_row("train-math", state="Late")
    space.none_left("train-math")
    run = space.until(lambda run: row_of(run, "mix")["state"] == "Running")
    assert run["status"]["members"]["experts"] == ["code"]
    assert "expertSince" not in run["status"]
    space.event("ExpertLate", "train-math")
    space.event("MembersDecided", "members: code")
    [mix] = space.jobs("mix")
    digest = row_of(run, "mix")["digest"]

    space.edit(policy={"expertDeadlineSeconds": 3600})
    space.until_row("train-math", state="Complete")
    space.event("MembersDecided", "members: code, math")
    again = space.until_row("mix", state="Running", attempt=2)
    assert again["digest"] != digest
    gone = mix["metadata"]["name"]
    space.cluster.wait_for("pruning", lambda: gone not in names(space.jobs("mix")))
    assert space.get()["status"]["members"]["experts"] == ["code", "math"]


def names(items: list[Object]) -> list[str]:
    """Of objects."""
    return [item["metadata"]["name"] for item in items]


@pytest.mark.shows("too-few-experts")
def test_too_few_experts_are_left(engine: Operator, space: Space) -> None:
    """Under Quorum the run fails once minExperts cannot be reached, and not before."""
    script = {"stages": {"train-code": {"exit": 78}, "train-math": TOLD}}
    space.run(policy={"failurePolicy": "Quorum", "minExperts": 1}, execution=scripted(train=script))
    space.until_row("train-code", state="Failed")
    assert condition(space.get(), "Succeeded")[:2] == ("Unknown", "InProgress")
    space.release("train-math", 78)
    message = space.until_condition("Succeeded", "False", "TooFewExperts")
    assert "0 of at least 1 experts; without code, math" in message


@pytest.mark.shows("run-deleted", "no-finalizers")
def test_a_deleted_run_takes_its_children_along(engine: Operator, space: Space) -> None:
    """By garbage collection: nothing of ours holds anything back."""
    space.run(execution=scripted(train=TOLD))
    space.pod("train-code", running)
    metas = [item["metadata"] for item in (space.get(), *space.jobs())]
    assert not any(meta.get("finalizers") for meta in metas)
    space.remove()
    space.none_left()
    with pytest.raises(client.ApiException, match="404"):
        space.get()


@pytest.mark.shows("corrupt-replaced", "scheduling-next-attempt")
def test_a_corrupt_input_is_made_again(engine: Operator, space: Space) -> None:
    """Exit 65 names a copy: its producer replaces it, then the reader goes on; nothing is counted."""
    held = {"stages": {"prepare-code": {"attempts": [TOLD, {}]}}}
    space.run(execution=scripted(prepare=held))
    space.until_row("train-math", state="Complete")
    tag, digest = f"tag{len(space.commits()) + 1}", space.row("prepare-code")["digest"]
    corrupt = Corrupt(kind=Kind.PREPARE, digest=digest, tag=tag)
    act = {"exit": 65, "message": Result(corrupt=corrupt).line()}
    space.edit(execution=scripted(train={"stages": {"train-code": {"attempts": [act, {}]}}}))
    space.until(lambda run: run["status"]["generation"] == 2)
    space.release("prepare-code")
    run = space.succeeded()

    maker, reader = row_of(run, "prepare-code"), row_of(run, "train-code")
    assert (maker["attempt"], maker["invalid"]) == (2, {"tag": tag, "count": 1})
    assert (reader["attempt"], reader.get("failures", 0)) == (2, 0)
    tasks = [task_of(job) for job in space.jobs("prepare-code")]
    assert [task.execution.replaces for task in tasks] == ["", tag]
    assert space.commits("prepare-code") == ["prepare-code"] * 2
    space.event("ArtifactCorrupt", f"prepare-code: copy {tag} is corrupt")


@pytest.mark.shows("graph")
def test_a_dense_run_has_its_own_stages(engine: Operator, space: Space) -> None:
    """The method decides which stages there are."""
    space.run(method="Dense")
    run = space.succeeded()
    assert {row["name"] for row in run["status"]["stages"]} >= {"train-dense", "evaluate"}
    assert not any(row["name"] in ("mix", "average") for row in run["status"]["stages"])
    assert [number(1)(job) for job in space.jobs("train-dense")] == [True]
