"""One long story, told to any backend of the engine, and the Decisions it led to."""

import json
from typing import Any

from btx_api.spec import BTXRunSpec
from btx_api.stage import Exit
from btx_api.status import ConditionType, Reason, State
from builders import spec_of
from machine import masked
from simulator import Simulator, corrupt_input, problem

POLICY: dict[str, Any] = {
    "failurePolicy": "Quorum", "minExperts": 2, "maxRetries": 1, "backoffSeconds": 10,
    "expertDeadlineSeconds": 1000, "maxParallelExperts": 3,
}  # fmt: skip


def the_spec(names: str, tokens: int = 100, **policy: Any) -> BTXRunSpec:
    """Experts of one letter; `tokens`: of the first."""
    experts = [
        {
            "name": name,
            "tokens": tokens if name == "a" else 100,
            "data": [{"uri": f"file://{name}"}],
        }
        for name in names
    ]
    return spec_of(experts=experts, policy={**POLICY, **policy})


class Teller:
    """Makes one thing happen, lets the engine come to rest, and so on.

    `preempted`: attempts end with the code of a preemption; otherwise they vanish. A Job of one node
    replaces the pod of a preemption itself, so that the engine has nothing to decide.
    """

    def __init__(self, world: Any, *, preempted: bool) -> None:
        self.world, self.preempted = world, preempted

    def submit(self, spec: BTXRunSpec) -> None:
        if isinstance(self.world, Simulator):
            self.world.submit(spec)
        else:
            self.world.submit("run", spec)
        self.world.settle()

    def end(self, *stages: str, code: int = Exit.OK, **more: Any) -> None:
        for stage in stages:
            self.world.end(stage, code, **more)
            self.world.settle()

    def leave(self, stage: str) -> None:
        """Through no fault of its own."""
        if self.preempted:
            self.end(stage, code=Exit.PREEMPTED)
            return
        self.world.vanish(stage)
        self.world.settle()
        self.wait(POLICY["backoffSeconds"])

    def wait(self, seconds: float) -> None:
        self.world.advance(seconds)
        self.world.settle()

    def reason(self, kind: ConditionType) -> Reason:
        condition = self.world.status("run").condition(kind)
        assert condition is not None
        reason: Reason = condition.reason
        return reason


def story(world: Any, *, preempted: bool = True) -> None:
    """Failures, preemption, a corrupt input, a failed and a late expert, edits."""
    tell = Teller(world, preempted=preempted)
    tell.submit(the_spec("abcd"))
    tell.end("preflight", "prepare-a")
    tell.leave("prepare-b")
    tell.end("prepare-c", "prepare-d", "prepare-b", "prepare-general")
    assert sorted(world.live()) == ["train-a", "train-c", "train-d"]

    tell.end("train-a", code=Exit.FAILED, result=problem("out of memory"))
    assert sorted(world.live()) == ["train-b", "train-c", "train-d"]
    tell.leave("train-b")
    tell.end("train-c", code=Exit.CONFIGURATION, result=problem("no such field", "train"))
    tell.wait(10)
    tell.end("train-a")

    prepared = world.row("prepare-d")
    report = corrupt_input(prepared, world.storage.complete[prepared.digest])
    tell.end("train-d", code=Exit.CORRUPT, result=report)
    assert "prepare-d" in world.live()
    tell.end("prepare-d", "train-b")

    tell.submit(the_spec("abcde"))
    assert tell.reason(ConditionType.ACCEPTED) is Reason.EDIT_PENDING
    tell.end("train-d")
    # The edit forgave expert c, which fails again; and it restarted the experts' deadline.
    tell.end("preflight", "prepare-e")
    tell.end("train-c", code=Exit.CONFIGURATION, result=problem("no such field", "train"))
    tell.wait(1000)
    assert world.row("train-e").state is not State.RUNNING
    assert world.status("run").members.experts == ("a", "b", "d")
    tell.end("mix", readable=False)
    tell.end("mix", "average", "finetune", "evaluate")
    assert tell.reason(ConditionType.SUCCEEDED) is Reason.COMPLETE

    tell.submit(the_spec("abcde", tokens=200))
    tell.end("preflight")
    assert tell.reason(ConditionType.ACCEPTED) is Reason.WOULD_RETRAIN
    tell.submit(the_spec("abcde", tokens=200, allowRetrain=True))
    assert sorted(world.live()) == ["train-a"]
    suspended = the_spec("abcde", tokens=200, allowRetrain=True).model_copy(
        update={"suspend": True}
    )
    tell.submit(suspended)
    assert world.live() == {}
    tell.submit(the_spec("abcde", tokens=200, allowRetrain=True))
    tell.end("train-a", "average", "mix", "finetune", "evaluate")
    assert tell.reason(ConditionType.SUCCEEDED) is Reason.COMPLETE


def decisions(world: Any) -> list[dict[str, Any]]:
    """Those that change something, without uids, handles, refresh values."""
    found: list[dict[str, Any]] = []
    for decision in world.decisions:
        plain = {
            "status": masked(decision.status),
            "starts": [
                (
                    start.name,
                    start.attempt,
                    start.task.model_dump(mode="json", exclude_defaults=True),
                )
                for start in decision.starts
            ],
            "stops": [(attempt.stage, attempt.number) for attempt in decision.stops],
            "events": [(event.reason, event.message, event.warning) for event in decision.events],
        }
        for _, _, task in plain["starts"]:
            task["execution"]["uid"] = ""
            task.get("preflight", {})["uid"] = ""
        quiet = not (plain["starts"] or plain["stops"] or plain["events"])
        if not (quiet and found and found[-1]["status"] == plain["status"]):
            found.append(json.loads(json.dumps(plain)))
    return found
