"""`.status` fits: 10 kB at 16 experts and 32 kB at 64, at its worst moments."""

from typing import Any

import pytest
from btx_api.methods import Members
from btx_api.spec import BTXRunSpec
from btx_api.status import (
    MESSAGE_LENGTH,
    SHORT_LENGTH,
    STAGE_LENGTH,
    Condition,
    ConditionType,
    Invalid,
    Reason,
    Row,
    State,
    Status,
)
from builders import spec_of
from simulator import LIMITS, Simulator

UUID = "01234567-89ab-cdef-0123-456789abcdef"


def many(count: int, **policy: Any) -> BTXRunSpec:
    """Experts with names as long as they may be."""
    experts = [
        {"name": f"a-very-long-name-{i:03d}", "tokens": 100, "data": [{"uri": f"file://{i}"}]}
        for i in range(count)
    ]
    return spec_of(experts=experts, policy=policy)


EXPERTS_ONLY: dict[str, dict[str, Any]] = {
    "all experts train, after a failure and a preemption": {
        "state": State.RUNNING, "attempt": 3, "handle": UUID, "start_time": 1_700_000_000,
        "failures": 1, "preemptions": 1, "seconds": 86_400,
    },
    "no expert's pod can start, and they were replaced": {
        "state": State.STARTING, "attempt": 3, "handle": UUID, "failures": 1, "preemptions": 1,
        "seconds": 86_400, "replaced": 1, "message": "m" * SHORT_LENGTH,
    },
    "the storage went away under all experts": {
        "state": State.BACK_OFF, "attempt": 3, "retry_time": 1_700_000_000, "failures": 2,
        "preemptions": 1, "seconds": 86_400, "message": "m" * SHORT_LENGTH, "exit": 1,
    },
    "all experts are given up": {
        "state": State.FAILED, "attempt": 3, "failures": 3, "seconds": 86_400,
        "message": "m" * MESSAGE_LENGTH, "exit": 78,
    },
}  # fmt: skip
COMPLETE: dict[str, Any] = {
    "state": State.COMPLETE, "attempt": 3, "gain": 0.1234, "token": "t" * 16,
    "seconds": 86_400, "failures": 1, "preemptions": 1,
}  # fmt: skip


def at_its_worst(status: Status, moment: dict[str, Any], *, everywhere: bool) -> Status:
    """Every expert in that state, beside an edit that is refused in many words."""
    kinds = "" if everywhere else "train-"
    rows = tuple(
        row.model_copy(update=moment)
        if row.name.startswith(kinds) and not row.name.startswith("prepare-")
        else row
        for row in status.stages
    )
    talkative = (ConditionType.ACCEPTED, ConditionType.RUNNING, ConditionType.SUCCEEDED)
    told = tuple(
        c.model_copy(update={"message": "m" * 100}) if c.type in talkative else c
        for c in status.conditions
    )
    update = {"stages": rows, "conditions": told, "problems": ("p" * 100,) * 2}
    update |= {"stage": "s" * STAGE_LENGTH, "experts": "64/64", "progress": "100%", "eta": "99h59m"}
    if everywhere:
        names = [row.name for row in rows if row.name.startswith("train-")]
        members = Members(experts=tuple(name.removeprefix("train-") for name in names))
        update |= {"members": members, "model": "s" * 100}
    return status.model_copy(update=update)


@pytest.mark.parametrize(("count", "limit"), LIMITS)
def test_status_stays_within_its_bound(sim: Simulator, count: int, limit: int) -> None:
    """At the worst moments that a run can have."""
    sim.submit(many(count))
    sim.settle()
    sim.end("preflight")
    sim.settle()
    for stage in list(sim.live()):
        sim.end(stage)
    sim.settle()

    sizes = {
        name: len(at_its_worst(sim.status(), moment, everywhere=False).line())
        for name, moment in EXPERTS_ONLY.items()
    }
    sizes["complete"] = len(at_its_worst(sim.status(), COMPLETE, everywhere=True).line())

    print(f"{count} experts: {sizes}")
    assert max(sizes.values()) <= limit


def test_a_row_survives_its_json(sim: Simulator) -> None:
    """Times are RFC 3339 outside, whole seconds inside; defaults are left out."""
    row = Row(
        name="train-code", digest="d" * 32, state=State.BACK_OFF, attempt=1,
        retry_time=1_700_000_010, invalid=Invalid(tag="t", count=1),
    )  # fmt: skip

    text = row.model_dump_json(exclude_defaults=True)

    assert '"retryTime":"2023-11-14T22:13:30Z"' in text
    assert "startTime" not in text
    assert Row.model_validate_json(text) == row


def test_a_finished_prepare_row_has_four_fields(sim: Simulator) -> None:
    """There may be 96 of them."""
    sim.submit(spec_of())
    sim.finish()

    row = sim.row("prepare-code").model_dump(mode="json", exclude_defaults=True)

    assert sorted(row) == ["attempt", "digest", "name", "state"]


def test_conditions_are_as_metav1_wants_them() -> None:
    """Names and types of the fields are Kubernetes' own."""
    condition = Condition(
        type=ConditionType.ACCEPTED, status="True", reason=Reason.ACCEPTED,
        last_transition_time=1_700_000_000, observed_generation=1,
    )  # fmt: skip

    assert condition.model_dump(mode="json") == {
        "type": "Accepted", "status": "True", "reason": "Accepted", "message": "",
        "lastTransitionTime": "2023-11-14T22:13:20Z", "observedGeneration": 1,
    }  # fmt: skip
