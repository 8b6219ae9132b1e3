"""One stage: what became of its latest attempt, and whether another is due; pure.

decide.py calls `record` with what it sees and `step` to learn what the stage may do next.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from btx_api.spec import BTXRunSpec, Policy, Scheduling, overlay
from btx_api.stage import Exit, Kind, Result
from btx_api.status import (
    ACTIVE,
    MESSAGE_LENGTH,
    PREFLIGHT,
    SHORT_LENGTH,
    Invalid,
    Row,
    State,
    brief,
)

from btx_operator.observed import Attempt, Phase

BACKOFF_LIMIT = 600
"""Seconds; the longest wait between two attempts."""
REPAIRS = 2
"""Times that a corrupt artifact is made again; the next time its stage fails."""
VANISHED = "vanished without a result"


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until a new fact, or until a time."""

    until: float | None = None


@dataclass(frozen=True, slots=True)
class Begin:
    """Attempt `number` may begin; `again`: it was decided before, and was never seen."""

    number: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """The artifact is there."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Given up."""


Step = Wait | Begin | Done | Failed


def change(row: Row, **fields: Any) -> Row:
    """`row` with some fields replaced."""
    return row.model_copy(update=fields)


def scheduling_of(spec: BTXRunSpec, name: str) -> Scheduling:
    """How the attempts of a stage run: its kind's block, overlaid by its expert's."""
    kind, _, rest = name.partition("-")
    block: Scheduling = getattr(spec.execution, kind)
    own = next((e.execution for e in spec.experts if kind == Kind.TRAIN and e.name == rest), None)
    return overlay(block, own)


def step(row: Row, now: float) -> Step:
    """What the stage may do next, its inputs and its turn aside."""
    match row.state:
        case State.COMPLETE:
            return Done()
        case State.FAILED | State.LATE:
            return Failed()
        case State.STARTING if not row.handle:
            return Begin(row.attempt, again=True)
        case State.BACK_OFF if row.retry_time is not None and now < row.retry_time:
            return Wait(row.retry_time)
        case State.PENDING | State.WAITING | State.BACK_OFF:
            return Begin(row.attempt + 1)
        case _:
            return Wait()


def record(row: Row, attempt: Attempt | None, policy: Policy, now: float) -> Row:
    """The row after looking at its latest attempt; `attempt=None`: there is no such object."""
    if row.state not in (*ACTIVE, State.STOPPING):
        return row
    if attempt is not None and attempt.phase is not Phase.ENDED:
        return _live(row, attempt, policy, now)
    if attempt is not None and attempt.exit is not None:
        return _ended(row, attempt, attempt.exit, policy, now)
    if row.state is State.STOPPING:
        return _over(row, State.PENDING)
    if attempt is None and not row.handle:
        return row
    return _lost(row, VANISHED, policy, now)


def begin(row: Row) -> Row:
    """The intent: written before the attempt is created."""
    return change(
        row, state=State.STARTING, attempt=row.attempt + 1, retry_time=None, waits_for="",
        message="", exit=None, replaced=0,
    )  # fmt: skip


def stop(row: Row) -> Row:
    """Ask an active attempt to end; what it does from now on is not counted."""
    if row.state not in ACTIVE:
        return row
    return change(row, state=State.STOPPING if row.handle else State.PENDING)


def late(row: Row) -> Row:
    """Left out; an attempt that still runs is of no use."""
    return change(_over(row, State.LATE), retry_time=None, waits_for="")


def complete(row: Row, *, gain: float | None = None, token: str = "") -> Row:
    """The artifact is committed. Rows of prepare keep four fields, for the sake of size."""
    if row.name.startswith(Kind.PREPARE):
        return Row(
            name=row.name, digest=row.digest, state=State.COMPLETE, attempt=row.attempt,
            invalid=row.invalid,
        )  # fmt: skip
    return change(
        _over(row, State.COMPLETE), exit=None, retry_time=None, check=False, message="",
        waits_for="", gain=None if gain is None else round(gain, 4), token=token,
    )  # fmt: skip


def fail(row: Row, message: str, policy: Policy, now: float) -> Row:
    """One more failure: another attempt after a back-off, or given up."""
    failures = row.failures + 1
    if failures > policy.max_retries:
        return change(_over(row, State.FAILED), failures=failures, message=brief(message))
    return change(
        _over(row, State.BACK_OFF), failures=failures, message=brief(message, SHORT_LENGTH),
        retry_time=_after(failures, policy, now),
    )  # fmt: skip


def forgive(row: Row) -> Row:
    """As if nothing had failed; what was found corrupt is still to be replaced."""
    invalid = None if row.invalid is None else Invalid(tag=row.invalid.tag, count=0)
    fresh = change(row, failures=0, lost=0, exit=None, message="", retry_time=None, invalid=invalid)
    if row.state in (State.FAILED, State.BACK_OFF):
        return change(fresh, state=State.PENDING, seconds=0)
    return fresh


def corrupted(row: Row, tag: str) -> Row:
    """A reader found the artifact corrupt in the copy whose manifest is `tag`."""
    count = row.invalid.count if row.invalid else 0
    if row.state is not State.COMPLETE or (row.invalid and row.invalid.tag == tag and count):
        # Being made again, or made again since the reader began.
        return row
    if count == REPAIRS:
        return change(row, state=State.FAILED, message=f"corrupt again after {REPAIRS} repairs")
    return change(
        row, state=State.PENDING, invalid=Invalid(tag=tag, count=count + 1), gain=None, token=""
    )


def due(row: Row, attempt: Attempt, policy: Policy) -> tuple[float, str] | None:
    """When the live attempt's deadline passes, and its name."""
    if attempt.since is None or row.state not in ACTIVE:
        return None
    if attempt.phase is Phase.RUNNING and policy.active_deadline_seconds:
        left = policy.active_deadline_seconds - row.seconds
        return attempt.since + left, "activeDeadlineSeconds"
    if attempt.phase is Phase.PENDING and policy.pending_deadline_seconds:
        return attempt.since + policy.pending_deadline_seconds, "pendingDeadlineSeconds"
    return None


def words(code: int, result: Result) -> str:
    """Exit code and problem, on one line of any length."""
    problem = result.problem
    said = "" if problem is None else f": {problem.field}: {problem.message}"
    return f"exit {code}" + said.replace(": : ", ": ")


def last_words(seen: Iterable[Attempt]) -> dict[tuple[str, int], str]:
    """By stage and number, why an attempt does not begin, or ended badly."""
    return {
        (a.stage, a.number): a.trouble or words(a.exit or 0, a.result or Result())
        for a in seen
        if a.trouble or a.exit
    }


def _live(row: Row, attempt: Attempt, policy: Policy, now: float) -> Row:
    if attempt.obsolete and row.state in ACTIVE:
        return stop(change(row, handle=attempt.handle))
    deadline = due(row, attempt, policy)
    if deadline and now >= deadline[0]:
        return change(_over(row, State.FAILED), message=f"policy.{deadline[1]} passed")
    state = {Phase.RUNNING: State.RUNNING, Phase.QUEUED: State.QUEUED}.get(attempt.phase)
    running = attempt.phase is Phase.RUNNING and attempt.since is not None
    dead = attempt.dead_experts
    errand = row.name == PREFLIGHT
    trouble = brief(attempt.trouble, MESSAGE_LENGTH if errand else SHORT_LENGTH)
    return change(
        _replaced(row, attempt),
        handle=attempt.handle,
        # Of preflight, Accepted goes on to say why the last look failed.
        message=trouble or (row.message if errand else ""),
        dead_experts=row.dead_experts if dead is None else _counted(len(dead), dead),
        state=row.state if row.state is State.STOPPING else state or State.STARTING,
        start_time=int(attempt.since or 0) if running else None,
    )


def _ended(row: Row, attempt: Attempt, code: int, policy: Policy, now: float) -> Row:
    result, stopped = attempt.result or Result(), row.state is State.STOPPING
    row = change(_replaced(row, attempt), seconds=row.seconds + round(attempt.seconds))
    message = words(code, result)
    match code:
        case Exit.OK if attempt.result is not None:
            row = complete(row, gain=result.metrics.get("gain"), token=result.token)
            dead = int(result.metrics.get("dead_experts", 0))
            if str(dead) != (row.dead_experts or "0").partition(":")[0]:
                row = change(row, dead_experts=_counted(dead))
        case Exit.OK:
            row = change(_over(row, State.PENDING), check=True, message="its Result was lost")
        case _ if stopped:
            row = _over(row, State.PENDING)
        case Exit.PREEMPTED:
            row = change(_over(row, State.PENDING), preemptions=row.preemptions + 1)
        case Exit.MISSING:
            row = _lost(change(row, check=False), message, policy, now)
        case Exit.CONFIGURATION:
            row = fail(row, message, policy.model_copy(update={"max_retries": 0}), now)
        case Exit.CORRUPT if result.corrupt:
            # decide.py has the producer make its artifact again first.
            row = change(_over(row, State.PENDING), message=brief(message, SHORT_LENGTH))
        case _:
            row = fail(row, message, policy, now)
    return row if row.state in (State.PENDING, State.COMPLETE) else change(row, exit=code)


def _replaced(row: Row, attempt: Attempt) -> Row:
    """What the backend itself began again was preempted as well."""
    new = max(0, attempt.replaced - row.replaced)
    return change(row, preemptions=row.preemptions + new, replaced=row.replaced + new)


def _counted(count: int, names: Sequence[str] = ()) -> str:
    """What a row says of dead experts; that an attempt ended may be seen before its last words."""
    return brief(f"{count}: {', '.join(names)}".removesuffix(": "), SHORT_LENGTH) if count else ""


def _lost(row: Row, message: str, policy: Policy, now: float) -> Row:
    # The first time at once: the usual cause is that the engine itself was killed.
    time = _after(row.lost, policy, now) if row.lost else int(now)
    return change(
        _over(row, State.BACK_OFF), lost=row.lost + 1, retry_time=time,
        message=brief(message, SHORT_LENGTH),
    )  # fmt: skip


def _over(row: Row, state: State) -> Row:
    return change(row, state=state, handle="", start_time=None, replaced=0)


def _after(times: int, policy: Policy, now: float) -> int:
    wait: int = min(policy.backoff_seconds * 2 ** min(times - 1, 20), BACKOFF_LIMIT)
    return math.ceil(now + wait)
