"""One artifact is made once at a time: within a run and over all runs of a storage; pure.

Called by decide.py. A live row (an intent counts) is the reservation of its digest; the backend
passes other runs' rows as claims.
"""

from collections.abc import Mapping

from btx_api.status import Row, State, Status

from btx_operator import attempts
from btx_operator.attempts import Begin
from btx_operator.observed import Observed

LIVE = (State.STARTING, State.RUNNING)
"""A queued, stopping or failed holder holds nothing: whoever can run takes over."""


def shared(seen: Observed, status: Status) -> Status:
    """A stage is complete once the one that makes the same artifact for it is."""
    rows = []
    for row in status.stages:
        makers = [other for other in status.stages if other.digest == row.digest]
        makers += [
            claim.row
            for claim in seen.claims.get(row.digest, ())
            if f"{claim.run}/{claim.row.name}" == row.waits_for
        ]
        done = next((maker for maker in makers if maker.state is State.COMPLETE), None)
        if done and row.state in (State.PENDING, State.BACK_OFF, State.WAITING):
            rows.append(attempts.complete(row, gain=done.gain, token=done.token))
        else:
            rows.append(row)
    return status.model_copy(update={"stages": tuple(rows)})


def holder(seen: Observed, rows: Mapping[str, Row], row: Row, step: Begin) -> str:
    """Who makes the row's artifact now, as `<stage>` or `<run>/<stage>`; empty: nobody."""
    for twin in rows.values():
        if twin.digest == row.digest and twin.name != row.name and twin.state in LIVE:
            return "" if step.again else twin.name
    for claim in seen.claims.get(row.digest, ()):
        # Two intents at once: only after two engines wrote them; the older run goes on.
        older = (claim.created, claim.uid) < (seen.created, seen.uid)
        if claim.row.state in LIVE and (older or not step.again):
            return f"{claim.run}/{claim.row.name}"
    return ""
