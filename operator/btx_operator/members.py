"""Which experts go into the mix, and whether the run can still succeed; pure. Called by decide.py.

Members are chosen once, when every expert is complete, failed or late, before the mix starts.
"""

from collections.abc import Mapping
from enum import StrEnum

from btx_api.methods import Members
from btx_api.spec import BTXRunSpec, Expert, FailurePolicy, Method, OnNoGain, RoutingMethod
from btx_api.stage import Kind
from btx_api.status import Reason, Row, State, Status

from btx_operator import attempts
from btx_operator.conditions import Verdict

Rows = Mapping[str, Row]


class Fate(StrEnum):
    """What became of one expert."""

    OPEN = "open"
    COMPLETE = "complete"
    NO_GAIN = "no gain"
    """Complete, but left out under policy.onNoGain: Drop."""
    FAILED = "failed"
    LATE = "late"


def clock(spec: BTXRunSpec, status: Status, *, stands: bool, now: float) -> Status:
    """Runs or pauses the clock of expertDeadlineSeconds; it ends with the choice of members."""
    stands = stands or status.members is not None or spec.method is Method.DENSE
    since = status.expert_since
    if stands and since is not None:
        seconds = status.expert_seconds + int(now) - since
        return status.model_copy(update={"expert_seconds": seconds, "expert_since": None})
    if not stands and since is None:
        return status.model_copy(update={"expert_since": int(now)})
    return status


def deadline(spec: BTXRunSpec, status: Status) -> float | None:
    """Unix time at which experts that are not complete become late."""
    if status.expert_since is None or spec.policy.expert_deadline_seconds is None:
        return None
    return status.expert_since + spec.policy.expert_deadline_seconds - status.expert_seconds


def choose(spec: BTXRunSpec, status: Status, now: float) -> Status:
    """Freezes the members once no expert is open and enough are complete."""
    if status.members is not None or spec.method is Method.DENSE:
        return status
    fates = fates_of(spec, status, now)
    if Fate.OPEN in fates.values() or failure(spec, status, set(), now):
        return status
    complete = tuple(name for name, fate in fates.items() if fate is Fate.COMPLETE)
    late = {f"{Kind.TRAIN}-{name}" for name, fate in fates.items() if fate is Fate.LATE}
    rows = tuple(attempts.late(row) if row.name in late else row for row in status.stages)
    lost = tuple(
        expert.name
        for expert in spec.experts
        if _state(status, f"{Kind.PREPARE}-{expert.name}") is State.FAILED
    )
    members = Members(experts=complete, without=lost)
    return status.model_copy(update={"members": members, "stages": rows, "expert_since": None})


def failure(spec: BTXRunSpec, status: Status, needed: set[str], now: float) -> Verdict | None:
    """Why the run cannot succeed any more; None while it can."""
    open_choice = status.members is None and spec.method is not Method.DENSE
    tolerated: set[str] = set()
    if open_choice:
        fates = fates_of(spec, status, now)
        failed = [name for name, fate in fates.items() if fate is Fate.FAILED]
        if failed and spec.policy.failure_policy is FailurePolicy.FAIL_RUN:
            return Verdict("False", Reason.EXPERT_FAILED, _why(status, failed))
        able = [fate for fate in fates.values() if fate in (Fate.OPEN, Fate.COMPLETE)]
        dropped = sum(fate is Fate.NO_GAIN for fate in fates.values())
        least = spec.policy.min_experts or max(1, len(fates) - dropped)
        routing = spec.finetune.routing
        if routing.method is RoutingMethod.TOP_K:
            # A token cannot use more experts than there are.
            least = max(least, routing.k - spec.mix.include_seed)
        if len(able) < least:
            missing = [n for n, fate in fates.items() if fate not in (Fate.OPEN, Fate.COMPLETE)]
            message = f"{len(able)} of at least {least} experts; without {', '.join(missing)}"
            return Verdict("False", Reason.TOO_FEW_EXPERTS, message)
        if spec.policy.failure_policy is FailurePolicy.QUORUM:
            names = [expert.name for expert in spec.experts]
            tolerated = {f"{kind}-{n}" for n in names for kind in (Kind.PREPARE, Kind.TRAIN)}
    for row in status.stages:
        if row.name in needed - tolerated and row.state is State.FAILED:
            return Verdict("False", Reason.STAGE_FAILED, f"{row.name}: {row.message}")
    return None


def fates_of(spec: BTXRunSpec, status: Status, now: float) -> dict[str, Fate]:
    """Every expert's fate, in spec order."""
    limit = deadline(spec, status)
    late = limit is not None and now >= limit
    return {expert.name: _fate(spec, expert, status, late) for expert in spec.experts}


def _fate(spec: BTXRunSpec, expert: Expert, status: Status, late: bool) -> Fate:
    row = status.row(f"{Kind.TRAIN}-{expert.name}")
    if expert.model is not None:
        return Fate.COMPLETE
    if row is not None and row.state is State.COMPLETE:
        gained = row.gain is None or row.gain > 0
        dropped = not gained and spec.policy.on_no_gain is OnNoGain.DROP
        return Fate.NO_GAIN if dropped else Fate.COMPLETE
    prepared = _state(status, f"{Kind.PREPARE}-{expert.name}")
    if State.FAILED in (prepared, row.state if row else None):
        return Fate.FAILED
    return Fate.LATE if late else Fate.OPEN


def _state(status: Status, name: str) -> State | None:
    row = status.row(name)
    return row.state if row else None


def _why(status: Status, experts: list[str]) -> str:
    found = []
    for name in experts:
        rows = [status.row(f"{kind}-{name}") for kind in (Kind.TRAIN, Kind.PREPARE)]
        failed = next(row for row in rows if row is not None and row.state is State.FAILED)
        found.append(f"{failed.name}: {failed.message}")
    return "; ".join(found)
