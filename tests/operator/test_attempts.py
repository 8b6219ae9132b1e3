"""One stage: what the end of an attempt leads to, back-off, deadlines, invalidation."""

from dataclasses import replace
from typing import Any

import pytest
from btx_api.spec import Policy
from btx_api.stage import Exit, Result
from btx_api.status import Invalid, Row, State
from btx_operator.attempts import Begin, Done, Failed, Step, Wait, corrupted, forgive, record, step
from btx_operator.observed import Attempt, Phase
from simulator import corrupt_input, problem

NOW = 1000.0
POLICY = Policy(max_retries=2, backoff_seconds=10)


def a_row(**fields: Any) -> Row:
    """A train stage whose second attempt runs."""
    defaults: dict[str, Any] = {
        "name": "train-code", "digest": "d" * 32, "state": State.RUNNING, "attempt": 2,
        "handle": "job2", "start_time": 900,
    }  # fmt: skip
    return Row(**defaults | fields)


def an_attempt(**fields: Any) -> Attempt:
    """The second attempt, running."""
    defaults: dict[str, Any] = {
        "stage": "train-code", "number": 2, "digest": "d" * 32, "handle": "job2",
        "phase": Phase.RUNNING, "since": 900.0,
    }  # fmt: skip
    return Attempt(**defaults | fields)


def ended(code: int | None, result: Result | None = None) -> Attempt:
    """The second attempt after 100 seconds."""
    return an_attempt(phase=Phase.ENDED, since=None, exit=code, result=result, seconds=100.0)


ENDS: dict[str, tuple[Attempt | None, dict[str, Any], Step]] = {
    "a result completes the stage": (
        ended(Exit.OK, Result(metrics={"gain": 0.12344}, token="t" * 16)),
        {"state": State.COMPLETE, "gain": 0.1234, "token": "t" * 16, "seconds": 100},
        Done(),
    ),
    "success without a result only looks for the manifest": (
        ended(Exit.OK), {"state": State.PENDING, "check": True, "failures": 0, "lost": 0}, Begin(3),
    ),
    "a missing artifact was lost": (
        ended(Exit.MISSING, problem("no manifest" * 50)),
        {"state": State.BACK_OFF, "check": False, "lost": 1, "failures": 0}, Begin(3),
    ),
    "a failure is counted and followed by a back-off": (
        ended(Exit.FAILED, problem("no space", "scratch")),
        {"state": State.BACK_OFF, "failures": 1, "exit": 1, "retry_time": 1010,
         "message": "exit 1: scratch: no space"}, Wait(1010),
    ),
    "a signal is a failure": (ended(-9), {"failures": 1, "exit": -9, "message": "exit -9"}, Wait(1010)),
    "a stall is a failure": (ended(Exit.STALLED), {"failures": 1, "exit": 70}, Wait(1010)),
    "a preemption is counted apart and followed at once": (
        ended(Exit.PREEMPTED), {"state": State.PENDING, "preemptions": 1, "failures": 0}, Begin(3),
    ),
    "a wrong configuration fails at once": (
        ended(Exit.CONFIGURATION, problem("k too large", "finetune.routing.k")),
        {"state": State.FAILED, "failures": 1, "exit": 78}, Failed(),
    ),
    "a corrupt input is not this stage's failure": (
        ended(Exit.CORRUPT, corrupt_input(a_row(), "tag")),
        {"state": State.PENDING, "failures": 0, "preemptions": 0, "lost": 0}, Begin(3),
    ),
    "a corrupt input that is not named is a failure": (
        ended(Exit.CORRUPT), {"state": State.BACK_OFF, "failures": 1}, Wait(1010),
    ),
    "an object that is gone was lost, and the next attempt follows at once": (
        None, {"state": State.BACK_OFF, "lost": 1, "failures": 0, "handle": ""}, Begin(3),
    ),
    "an object without an exit code was lost": (ended(None), {"lost": 1, "failures": 0}, Begin(3)),
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_an_attempt(case: str) -> None:
    """Every exit of the contract leads to its own consequence."""
    attempt, fields, then = ENDS[case]

    row = record(a_row(), attempt, POLICY, NOW)

    assert {name: getattr(row, name) for name in fields} == fields
    assert step(row, NOW) == then
    assert (row.handle, row.start_time) == ("", None)
    assert Row.parse(row.plain()) == row


@pytest.mark.parametrize("code", [None, *Exit])
def test_an_attempt_that_was_asked_to_stop_is_not_counted(code: int | None) -> None:
    """Suspending, editing and dropping cost no retries, however the process ends."""
    row = record(a_row(state=State.STOPPING), ended(code), POLICY, NOW)

    assert (row.failures, row.preemptions, row.lost) == (0, 0, 0)
    assert step(row, NOW) == Begin(3)


def test_an_attempt_that_was_done_before_it_could_stop_counts() -> None:
    """A commit is a commit."""
    row = record(a_row(state=State.STOPPING), ended(Exit.OK, Result()), POLICY, NOW)

    assert row.state is State.COMPLETE


def test_an_intent_that_was_never_seen_begins_again_under_its_number() -> None:
    """A crash between the status and the creation costs no number."""
    intent = a_row(state=State.STARTING, handle="", start_time=None)

    row = record(intent, None, POLICY, NOW)

    assert row == intent
    assert step(row, NOW) == Begin(2, again=True)


def test_a_recorded_end_is_not_counted_twice() -> None:
    """The ended object stays in sight until somebody deletes it."""
    once = record(a_row(), ended(Exit.FAILED), POLICY, NOW)

    assert record(once, ended(Exit.FAILED), POLICY, NOW) == once


def test_the_back_off_doubles_and_is_capped() -> None:
    """10, 20, 40 ... 600 seconds after each failure."""
    waits = []
    for failures in range(8):
        row = record(a_row(failures=failures), ended(1), Policy(max_retries=99), NOW)
        assert row.retry_time is not None
        waits.append(row.retry_time - NOW)

    assert waits == [10, 20, 40, 80, 160, 320, 600, 600]


def test_retries_run_out() -> None:
    """maxRetries failures are followed by another attempt, one more is not."""
    states = [
        record(a_row(failures=failures), ended(1), POLICY, NOW).state for failures in range(3)
    ]

    assert states == [State.BACK_OFF, State.BACK_OFF, State.FAILED]


def test_repeated_losses_back_off() -> None:
    """The first lost attempt is followed at once; something that deletes Jobs is not raced."""
    waits = []
    for lost in range(4):
        row = record(a_row(lost=lost), None, POLICY, NOW)
        assert row.retry_time is not None
        waits.append(row.retry_time - NOW)

    assert waits == [0, 10, 20, 40]


@pytest.mark.parametrize(
    ("policy", "fields", "attempt", "message"),
    [
        ({"active_deadline_seconds": 160}, {"seconds": 60}, {}, "policy.activeDeadlineSeconds passed"),
        ({"active_deadline_seconds": 161}, {"seconds": 60}, {}, None),
        ({"pending_deadline_seconds": 100}, {}, {"phase": Phase.PENDING}, "policy.pendingDeadlineSeconds passed"),
        ({"pending_deadline_seconds": 101}, {}, {"phase": Phase.PENDING}, None),
        ({"pending_deadline_seconds": 1}, {}, {"phase": Phase.QUEUED}, None),
        ({"pending_deadline_seconds": 1}, {}, {"phase": Phase.PENDING, "since": None}, None),
        ({"pending_deadline_seconds": 1}, {}, {}, None),
        ({"active_deadline_seconds": 1}, {"state": State.STOPPING}, {}, None),
    ],
)  # fmt: skip
def test_deadlines(
    policy: dict[str, Any], fields: dict[str, Any], attempt: dict[str, Any], message: str | None
) -> None:
    """Active time adds up over attempts; pending time stands while a queue holds the attempt."""
    row = record(a_row(**fields), an_attempt(**attempt), Policy(**policy), NOW)

    assert (row.state is State.FAILED) == (message is not None)
    assert row.message == (message or "")


def test_a_corrupt_artifact_is_made_again_twice_and_then_given_up() -> None:
    """Each time with the tag of the copy to replace; the same report twice counts once."""
    row, tags = a_row(state=State.COMPLETE, handle="", start_time=None), []
    for tag in ("one", "one", "two", "two", "three"):
        row = corrupted(row, tag)
        if row.state is State.PENDING:
            tags.append(row.invalid)
            assert corrupted(row, tag) == row
            row = row.model_copy(update={"state": State.COMPLETE})

    assert tags == [Invalid(tag="one", count=1), Invalid(tag="two", count=2)]
    assert row.state is State.FAILED


def test_forgiving_resets_what_was_counted_but_not_what_is_to_be_replaced() -> None:
    """`btx retry`: a failed stage begins anew, a deadline too."""
    row = a_row(
        state=State.FAILED, handle="", start_time=None, failures=3, lost=2, seconds=50,
        exit=1, message="exit 1", preemptions=4, invalid=Invalid(tag="one", count=2),
    )  # fmt: skip

    fresh = forgive(row)

    assert fresh == Row(
        name=row.name, digest=row.digest, attempt=2, preemptions=4,
        invalid=Invalid(tag="one", count=0),
    )  # fmt: skip


def test_what_an_attempt_replaced_ends_with_it() -> None:
    """Its preemptions stay counted; the next attempt's objects count from none again."""
    attempt = replace(ended(Exit.FAILED), replaced=3)

    row = record(a_row(replaced=1, preemptions=1), attempt, POLICY, NOW)

    assert (row.preemptions, row.replaced) == (3, 0)
