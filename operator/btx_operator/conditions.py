"""The only writer of conditions, and the events that follow from a changed status; pure.

decide.py calls `conclude` once it knows what is the case, then `events` with before and after.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from btx_api.spec import BTXRunSpec
from btx_api.stage import Kind
from btx_api.status import (
    ACTIVE,
    PREFLIGHT,
    STAGE_LENGTH,
    Condition,
    ConditionType,
    EventReason,
    Reason,
    Row,
    State,
    Status,
    Truth,
    brief,
)

from btx_operator.attempts import VANISHED, scheduling_of
from btx_operator.observed import Event

MESSAGE_LENGTH = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one condition says."""

    status: Truth
    reason: Reason
    message: str = ""


IN_PROGRESS = Verdict("Unknown", Reason.IN_PROGRESS)


def conclude(
    status: Status,
    spec: BTXRunSpec | None,
    *,
    now: float,
    accepted: Verdict,
    suspended: Reason,
    succeeded: Verdict | None,
    trouble: str = "",
) -> Status:
    """All conditions anew. `succeeded=None`: not judged this time, the old one stands.

    `trouble`: why an attempt does not begin.
    """
    verdicts = {
        ConditionType.ACCEPTED: accepted,
        ConditionType.QUEUED: queued(status, spec),
        ConditionType.RUNNING: _running(status, trouble),
        ConditionType.SUSPENDED: Verdict(
            "False" if suspended is Reason.NOT_SUSPENDED else "True", suspended
        ),
        ConditionType.SUCCEEDED: succeeded,
    }
    conditions = []
    for kind, verdict in verdicts.items():
        old = status.condition(kind)
        if verdict is None and old is not None:
            conditions.append(old)
            continue
        said = verdict or IN_PROGRESS
        stays = old is not None and old.status == said.status
        conditions.append(
            Condition(
                type=kind, status=said.status, reason=said.reason,
                message=brief(said.message, MESSAGE_LENGTH),
                last_transition_time=old.last_transition_time if old and stays else int(now),
                observed_generation=status.observed_generation,
            )
        )  # fmt: skip
    status = status.model_copy(update={"conditions": tuple(conditions)})
    display = {"state": _word(status), "stage": _stage(status), "experts": _experts(status)}
    return status.model_copy(update=display)


def queued(status: Status, spec: BTXRunSpec | None) -> Verdict:
    """True: attempts or the next stages are held up from outside, and nothing goes on beside."""
    by_state: dict[State, list[Row]] = {}
    for row in status.stages:
        by_state.setdefault(row.state, []).append(row)
    if State.RUNNING in by_state or State.STARTING in by_state or spec is None:
        return Verdict("False", Reason.NOT_QUEUED)
    if held := by_state.get(State.QUEUED):
        named = all(scheduling_of(spec, row.name).queue_name for row in held)
        reason = Reason.QUEUED if named else Reason.EXTERNALLY_SUSPENDED
        return Verdict("True", reason, ", ".join(row.name for row in held))
    if waiting := by_state.get(State.WAITING):
        return Verdict("True", Reason.WAITING_FOR, ", ".join(row.waits_for for row in waiting))
    return Verdict("False", Reason.NOT_QUEUED)


def _running(status: Status, trouble: str) -> Verdict:
    names = [row.name for row in status.stages if row.state is State.RUNNING]
    if names:
        return Verdict("True", Reason.STAGES_RUNNING, ", ".join(names))
    if trouble:
        return Verdict("False", Reason.BLOCKED, trouble)
    return Verdict("False", Reason.NOTHING_RUNNING)


WORDS: tuple[tuple[ConditionType, Truth, str], ...] = (
    (ConditionType.ACCEPTED, "False", "Refused"),
    (ConditionType.SUSPENDED, "True", "Suspended"),
    (ConditionType.ACCEPTED, "Unknown", "Preflight"),
    (ConditionType.SUCCEEDED, "True", "Succeeded"),
    (ConditionType.SUCCEEDED, "False", "Failed"),
    (ConditionType.QUEUED, "True", "Queued"),
    (ConditionType.RUNNING, "True", "Running"),
)
"""`status.state` is the word of the first line that holds."""


def _word(status: Status) -> str:
    truths: dict[Any, Truth] = {c.type: c.status for c in status.conditions}
    return next((word for kind, truth, word in WORDS if truths.get(kind) == truth), "Pending")


def _stage(status: Status) -> str:
    """`status.stage`: what has an attempt, by kind, in the order of the graph."""
    rows = (*_errand(status), *status.stages)
    active = [row.name.split("-")[0] for row in rows if row.state in ACTIVE]
    kinds = (f"{kind} x{n}" if n > 1 else kind for kind, n in Counter(active).items())
    return brief(", ".join(kinds), STAGE_LENGTH)


def _experts(status: Status) -> str:
    """`status.experts`: complete train stages of all."""
    states = [row.state for row in status.stages if row.kind is Kind.TRAIN]
    return f"{states.count(State.COMPLETE)}/{len(states)}" if states else ""


def events(before: Status, after: Status, words: Mapping[tuple[str, int], str]) -> Iterator[Event]:
    """What changed, for a person; nothing when nothing did.

    `words`: by stage and number, what an attempt said, in full: a row has little room.
    """
    rows = {row.name: row for row in (*before.stages, *_errand(before))}
    reused = []
    changed = []
    for row in (*_errand(after), *after.stages):
        old = rows.get(row.name) or Row(name=row.name, digest="")
        if row.state is State.COMPLETE and row.attempt == 0 and old.state is not State.COMPLETE:
            reused.append(row.name)
        # Preflight that found problems has not failed: Accepted=False tells of them.
        elif row != old and not (row.name == PREFLIGHT and after.problems):
            yield from _told(row, old, words)
            changed.append((row, old))
    yield from _begun(changed)
    if reused:
        message = brief(f"{len(reused)} complete already: {', '.join(reused)}", MESSAGE_LENGTH)
        yield Event(reason=EventReason.STAGES_REUSED, message=message)
    if after.members is not None and after.members != before.members:
        message = brief(f"members: {', '.join(after.members.experts)}", MESSAGE_LENGTH)
        yield Event(reason=EventReason.MEMBERS_DECIDED, message=message)
    for new in after.conditions:
        past = before.condition(new.type)
        # Running and Queued follow from the attempts, which are told above.
        quiet = new.type in (ConditionType.RUNNING, ConditionType.QUEUED)
        first = past is None and new.reason in (Reason.NOT_SUSPENDED, Reason.IN_PROGRESS)
        if not (quiet or first or (past and past.reason == new.reason)):
            warning = new.status == "False" and new.type is not ConditionType.SUSPENDED
            yield Event(reason=new.reason, message=new.message or new.type, warning=warning)


def _errand(status: Status) -> tuple[Row, ...]:
    return () if status.preflight is None else (status.preflight,)


def _begun(changed: Iterable[tuple[Row, Row]]) -> Iterator[Event]:
    """One event for all attempts that begin together; `changed`: each row and what it was."""
    begun: dict[int, list[str]] = {}
    for row, old in changed:
        # A process that its backend began again is told of as preempted.
        fresh = row.attempt != old.attempt and row.state is not old.state
        if row.state is State.STARTING and fresh:
            begun.setdefault(row.attempt, []).append(row.name)
    for number, names in begun.items():
        # Ten lines say no more, and cost the cluster ten writes.
        message = f"{brief(', '.join(names), MESSAGE_LENGTH)}: attempt {number}"
        yield Event(reason=EventReason.ATTEMPT_STARTED, message=message)


def _told(row: Row, old: Row, said: Mapping[tuple[str, int], str]) -> Iterator[Event]:
    """Events about one row that is not as it was."""
    words = said.get((row.name, old.attempt), row.message)
    which = f"{row.name}: attempt {old.attempt}"
    again = ", given up" if row.state is State.FAILED else ", to be tried again"
    troubles = (
        (row.failures > old.failures, EventReason.ATTEMPT_FAILED, f"{words}{again}"),
        (row.preemptions > old.preemptions, EventReason.ATTEMPT_PREEMPTED, "preempted"),
        (row.lost > old.lost, EventReason.ATTEMPT_LOST, words or VANISHED),
    )
    for happened, reason, message in troubles:
        if happened:
            warning = reason is not EventReason.ATTEMPT_PREEMPTED
            failed = old.attempt if reason is EventReason.ATTEMPT_FAILED else 0
            yield Event(
                reason=reason, message=f"{which}: {message}", warning=warning, stage=row.name,
                attempt=failed,
            )  # fmt: skip
    if row.state is State.STARTING and row.message not in ("", old.message):
        trouble = said.get((row.name, row.attempt), row.message)
        blocked = f"{row.name}: attempt {row.attempt}: {trouble}"
        yield Event(reason=EventReason.ATTEMPT_BLOCKED, message=blocked, warning=True)
    if row.invalid != old.invalid and row.invalid is not None and row.invalid.count:
        message = f"{row.name}: copy {row.invalid.tag} is corrupt"
        yield Event(reason=EventReason.ARTIFACT_CORRUPT, message=message, warning=True)
    if row.dead_experts != old.dead_experts:
        dead = f"{row.name}: dead experts (layer.expert) {row.dead_experts}"
        alive = f"{row.name}: every expert gets tokens again"
        yield (
            Event(reason=EventReason.EXPERT_DEAD, message=dead, warning=True)
            if row.dead_experts
            else Event(reason=EventReason.EXPERT_ALIVE, message=alive)
        )
    if row.state is old.state:
        return
    # Without a code it was no attempt's end that gave the stage up.
    why = row.message if row.exit is None else words
    changes = {
        State.STOPPING: (EventReason.ATTEMPT_STOPPED, f"{row.name}: attempt {row.attempt}"),
        State.COMPLETE: (EventReason.STAGE_COMPLETE, row.name),
        State.FAILED: (EventReason.STAGE_FAILED, f"{row.name}: {why}"),
        State.LATE: (EventReason.EXPERT_LATE, row.name),
    }
    if row.state in changes:
        reason, message = changes[row.state]
        yield Event(reason=reason, message=message, warning=row.state in (State.FAILED, State.LATE))
