"""(Observed, now) -> Decision: the whole policy of a run; pure, and the same for every backend.

Reads from top to bottom as the specification does: what happened, is the spec accepted, who takes
part, what has to stop, what may start, what to say. Called by reconcile.py.
"""

from collections.abc import Iterator

from btx_api.artifact import attempt_folder
from btx_api.methods import Graph, Node
from btx_api.spec import BTXRunSpec, Policy
from btx_api.stage import Exit, Kind, Preflight, Task, TaskExecution
from btx_api.status import ACTIVE, PREFLIGHT, Reason, Release, Row, State, Status

from btx_operator import attempts, edits, members, single_flight
from btx_operator.attempts import Begin, change, scheduling_of
from btx_operator.conditions import IN_PROGRESS, Verdict, conclude, events, queued
from btx_operator.observed import Attempt, Decision, Observed, Phase, Start

Key = tuple[str, int, str]
"""Which attempt: row, number, digest."""


def decide(seen: Observed, now: float) -> Decision:
    """What to do now. On its own applied result it does nothing but record handles."""
    spec = seen.spec
    status = seen.status.model_copy(update={"observed_generation": seen.generation})
    status = recorded(seen, forgiven(seen, status), now)
    status, admission = edits.admit(seen, status)
    suspended = suspension(seen)
    halt = suspended is not Reason.NOT_SUSPENDED
    starts: list[Start] = []
    succeeded = None
    if spec is not None and admission.accepted:
        status = single_flight.shared(seen, status)
        status = members.choose(spec, status, now)
        nodes = edits.graph_of(seen, status)
        final = edits.final_stage(nodes)
        rows = edits.rows_of(nodes, seen, status)
        status = status.model_copy(update={"stages": tuple(rows.values())})
        succeeded = outcome(spec, status, edits.wanted(nodes), now)
        todo = edits.wanted(nodes) if succeeded == IN_PROGRESS and not halt else set()
        status = halted(status, keep=todo)
        nodes = {name: node for name, node in nodes.items() if name in todo}
        status, starts = begun(seen, status, nodes, now)
        stands = halt or queued(status, spec).status == "True"
        status = members.clock(spec, status, stands=stands, now=now)
        status = status.model_copy(update={"model": model_of(spec, status.row(final))})
    elif halt:
        status = halted(status, keep=set())
    elif admission.looking:
        status, starts = looked(seen, status, now)
    status = conclude(
        status, spec, now=now, accepted=admission.verdict, suspended=suspended,
        succeeded=succeeded, trouble=trouble_of(seen, status),
    )  # fmt: skip
    status = status.model_copy(update={"progress": seen.progress, "eta": seen.eta})
    return Decision(
        status=status,
        stops=tuple(pruned(seen, status, hold=not (admission.accepted or halt))),
        starts=tuple(starts),
        events=tuple(events(seen.status, status, attempts.last_words(seen.attempts))),
        again_after=min((max(0.0, time - now) for time in times(seen, status, now)), default=None),
    )


def forgiven(seen: Observed, status: Status) -> Status:
    """A new value of the retry annotation: as if nothing had failed so far."""
    if seen.retry == status.retry:
        return status
    rows = tuple(attempts.forgive(row) for row in status.stages)
    errand = attempts.forgive(status.preflight) if status.preflight else None
    return status.model_copy(update={"stages": rows, "preflight": errand, "retry": seen.retry})


def recorded(seen: Observed, status: Status, now: float) -> Status:
    """What became of every attempt; a corrupt artifact goes back to the stage that makes it."""
    policy = seen.spec.policy if seen.spec else Policy()
    latest = {(a.stage, a.number, a.digest): a for a in seen.attempts}
    rows = {
        row.name: attempts.record(row, latest.get(key_of(row)), policy, now)
        for row in status.stages
    }
    for row in status.stages:
        attempt = latest.get(key_of(row))
        corrupt = attempt.result.corrupt if attempt and attempt.result else None
        if row.state not in ACTIVE or corrupt is None or attempt is None:
            continue
        if attempt.exit != Exit.CORRUPT:
            continue
        makers = [name for name, other in rows.items() if other.digest == corrupt.digest]
        for name in makers:
            rows[name] = attempts.corrupted(rows[name], corrupt.tag)
        if all(rows[name].state is State.COMPLETE for name in makers):
            # Nobody makes it again, so it counts as a failure and cannot go on for ever.
            rows[row.name] = attempts.fail(rows[row.name], rows[row.name].message, policy, now)
    status = status.model_copy(update={"stages": tuple(rows.values())})
    errand = status.preflight
    return edits.hear(seen, status, latest.get(key_of(errand)) if errand else None, now)


def suspension(seen: Observed) -> Reason:
    """The user's wish acts at once, accepted or not."""
    if seen.closing:
        return Reason.INTERRUPTED
    wish = seen.spec is not None and seen.spec.suspend
    return Reason.SUSPENDED if wish else Reason.NOT_SUSPENDED


def outcome(spec: BTXRunSpec, status: Status, needed: set[str], now: float) -> Verdict:
    """The Succeeded condition."""
    states = [row.state for row in status.stages if row.name in needed]
    if all(state is State.COMPLETE for state in states):
        return Verdict("True", Reason.COMPLETE)
    return members.failure(spec, status, needed, now) or IN_PROGRESS


def halted(status: Status, keep: set[str]) -> Status:
    """Attempts of all other stages are asked to stop; preflight's too, if nothing is kept."""
    rows = tuple(row if row.name in keep else attempts.stop(row) for row in status.stages)
    errand = status.preflight
    if errand and not keep:
        errand = attempts.stop(errand)
    return status.model_copy(update={"stages": rows, "preflight": errand})


def begun(seen: Observed, status: Status, nodes: Graph, now: float) -> tuple[Status, list[Start]]:
    """Starts what may start, in the order of the graph."""
    assert seen.spec is not None
    rows = {row.name: row for row in status.stages}
    busy = {a.stage for a in seen.attempts if a.phase is not Phase.ENDED}
    limit = seen.spec.policy.max_parallel_experts or len(rows)
    starts = []
    taken = (*ACTIVE, State.STOPPING)
    trains = sum(row.state in taken and row.kind is Kind.TRAIN for row in rows.values())
    for name, node in nodes.items():
        row = rows[name]
        step = attempts.step(row, now)
        if not isinstance(step, Begin):
            continue
        ready = all(rows[need].state is State.COMPLETE for need in node.needs) and name not in busy
        turn = node.stage.kind is not Kind.TRAIN or trains < limit
        held = single_flight.holder(seen, rows, row, step) if ready or step.again else ""
        if held:
            rows[name] = change(row, state=State.WAITING, waits_for=held, retry_time=None)
        elif step.again or (ready and turn):
            rows[name] = row if step.again else attempts.begin(row)
            trains += node.stage.kind is Kind.TRAIN and not step.again
            starts.append(start_of(seen, status, rows[name], node))
        elif row.state is State.WAITING:
            rows[name] = change(row, state=State.PENDING, waits_for="")
    return status.model_copy(update={"stages": tuple(rows.values())}), starts


def start_of(seen: Observed, status: Status, row: Row, node: Node) -> Start:
    """The attempt of a stage."""
    assert seen.spec is not None
    execution = execution_of(seen, status, row).model_copy(
        update={
            "inputs": node.locations,
            "scheduling": scheduling_of(seen.spec, row.name),
            "replaces": row.invalid.tag if row.invalid else "",
            "must_exist": row.check,
            "verify": seen.verify,
        }
    )
    task = Task(schema_version=release_of(seen, status).task, stage=node.stage, execution=execution)
    return Start(name=row.name, attempt=row.attempt, digest=row.digest, task=task)


def looked(seen: Observed, status: Status, now: float) -> tuple[Status, list[Start]]:
    """Starts preflight, if one is due."""
    spec, row = seen.spec, status.preflight
    assert spec is not None and row is not None
    step = attempts.step(row, now)
    busy = any(a.stage == PREFLIGHT and a.phase is not Phase.ENDED for a in seen.attempts)
    if not isinstance(step, Begin) or (busy and not step.again):
        return status, []
    if not step.again:
        # The Accepted condition goes on to say why the last look failed.
        row = change(attempts.begin(row), message=row.message)
    standing, release = edits.standing(spec, status), release_of(seen, status)
    work = Preflight(
        spec=spec, uid=seen.uid, versions=release.kinds, verify=seen.verify,
        members=standing.experts if standing else None,
        without=standing.without if standing else (),
    )  # fmt: skip
    task = Task(
        schema_version=release.task, preflight=work, execution=execution_of(seen, status, row)
    )
    start = Start(name=row.name, attempt=row.attempt, digest=row.digest, task=task)
    return status.model_copy(update={"preflight": row}), [start]


def execution_of(seen: Observed, status: Status, row: Row) -> TaskExecution:
    """How any attempt of the run is run."""
    assert seen.spec is not None
    return TaskExecution(
        storage=seen.spec.storage, name=row.name, run=seen.name, uid=seen.uid, attempt=row.attempt,
        no_progress_seconds=seen.spec.policy.no_progress_seconds,
        image=seen.spec.execution.image or release_of(seen, status).image,
    )  # fmt: skip


def release_of(seen: Observed, status: Status) -> Release:
    """What the run was accepted with; an upgrade of the engine changes nothing under way."""
    return status.release or seen.release


def pruned(seen: Observed, status: Status, *, hold: bool) -> Iterator[Attempt]:
    """Attempts that nobody asks for: suspended, dropped, edited, late, given up."""
    asked_for = {key_of(row) for row in status.rows if row.state in ACTIVE}
    for attempt in seen.attempts:
        live = attempt.phase is not Phase.ENDED and not attempt.stopping
        # While an edit is pending nobody knows yet what it asks for.
        held = hold and attempt.stage != PREFLIGHT
        if live and not held and (attempt.stage, attempt.number, attempt.digest) not in asked_for:
            yield attempt


def trouble_of(seen: Observed, status: Status) -> str:
    """Why an attempt that is asked for does not begin, in full."""
    active = {key_of(row) for row in status.rows if row.state in ACTIVE}
    troubles = (
        f"{a.stage}: {a.trouble}"
        for a in seen.attempts
        if a.trouble and (a.stage, a.number, a.digest) in active
    )
    return next(troubles, "")


def times(seen: Observed, status: Status, now: float) -> Iterator[float]:
    """When the decision may change without a new fact."""
    rows = {row.name: row for row in status.rows}
    found: list[float | None] = [
        row.retry_time for row in rows.values() if row.state is State.BACK_OFF
    ]
    for attempt in seen.attempts:
        row = rows.get(attempt.stage)
        if seen.spec and row and key_of(row) == (attempt.stage, attempt.number, attempt.digest):
            deadline = attempts.due(row, attempt, seen.spec.policy)
            found.append(deadline[0] if deadline else None)
    found.append(members.deadline(seen.spec, status) if seen.spec else None)
    yield from (time for time in found if time is not None and time > now)


def model_of(spec: BTXRunSpec, row: Row | None) -> str:
    """URI of the final model's folder; empty until it is complete."""
    if row is None or not row.token:
        return ""
    return f"{spec.storage.uri}/{attempt_folder(row.kind, row.digest, row.token)}"


def key_of(row: Row) -> Key:
    """Of the row's latest attempt."""
    return row.name, row.attempt, row.digest
