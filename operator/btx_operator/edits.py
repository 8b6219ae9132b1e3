"""Is the spec as it stands accepted? The preflight errand, its answer, and what an edit may change.

Called by decide.py; pure. The old spec is kept nowhere: status holds hashes, and rows hold digests.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from btx_api.methods import Graph, Members, graph
from btx_api.spec import BTXRunSpec
from btx_api.stage import PROBLEM_LENGTH, TASK_SCHEMA, Exit, Kind, Resolved
from btx_api.status import ACTIVE, PREFLIGHT, Reason, Row, State, Status, brief

from btx_operator import attempts
from btx_operator.attempts import change
from btx_operator.conditions import Verdict
from btx_operator.observed import Attempt, Observed

OUTSIDE_GRAPH: dict[str, Any] = {
    "policy": True, "suspend": True, "execution": True, "experts": {"__all__": {"execution"}},
}  # fmt: skip
"""Fields whose edit acts at once: they change no stage. (`policy.reuse` does; it is put back.)"""


@dataclass(frozen=True, slots=True)
class Admission:
    """The Accepted condition, and whether a preflight is what it waits for."""

    verdict: Verdict
    looking: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the engine works to the spec as it stands."""
        return self.verdict.status == "True"


GRAPHS = 128
"""Graphs that are kept: of runs at work, one each, and another while preflight is read."""
_GRAPHS: OrderedDict[tuple[Any, ...], tuple[BTXRunSpec, Graph]] = OrderedDict()
Refusal = Callable[[Observed, Status], Verdict | None]


def admit(seen: Observed, status: Status) -> tuple[Status, Admission]:
    """Accepts, refuses, or asks for a preflight."""
    for refuse in (_unreadable, _immutable, _too_old):
        if verdict := refuse(seen, status):
            problems = tuple(brief(problem, PROBLEM_LENGTH) for problem in seen.problems[:8])
            return status.model_copy(update={"problems": problems}), Admission(verdict)
    assert seen.spec is not None
    key = preflight_key(seen.spec, seen.refresh)
    row = status.preflight
    if row is None or row.digest != key:
        row = Row(name=PREFLIGHT, digest=key, attempt=row.attempt if row else 0)
        status = status.model_copy(update={"preflight": row, "problems": ()})
    if row.state is not State.COMPLETE:
        return status, Admission(_not_yet(seen.spec, status, row), looking=True)
    if (status.generation, status.key) != (seen.generation, key):
        for refuse in (_duplicates, _would_retrain):
            if verdict := refuse(seen, status):
                return status, Admission(verdict)
        status = _accept(seen, status, key)
    return status, Admission(Verdict("True", Reason.ACCEPTED))


def preflight_key(spec: BTXRunSpec, refresh: str) -> str:
    """Digest of all that preflight's answer depends on, as far as the engine can see."""
    plain = spec.model_dump(mode="json", exclude=OUTSIDE_GRAPH)
    return _hash([plain, spec.policy.reuse, refresh], 32)


def standing(spec: BTXRunSpec, status: Status) -> Members | None:
    """The members, unless an edit asks for them to be decided again."""
    return status.members if status.members_key == members_key(spec) else None


def members_key(spec: BTXRunSpec) -> str:
    """Hash of what the choice of members depends on."""
    policy = spec.policy
    names = [expert.name for expert in spec.experts]
    return _hash([names, policy.min_experts, policy.expert_deadline_seconds], 8)


def graph_of(seen: Observed, status: Status) -> Graph:
    """The stages of the run; needs an answer of preflight."""
    assert seen.spec is not None and status.resolved is not None
    return _graph(seen, status, status.resolved, standing(seen.spec, status))


def hear(seen: Observed, status: Status, attempt: Attempt | None, now: float) -> Status:
    """The status after looking at the preflight attempt."""
    row = status.preflight
    if seen.spec is None or row is None or row.digest != preflight_key(seen.spec, seen.refresh):
        return status
    # Preflight never gives up: a Secret made later heals the run.
    endless = {"max_retries": 10**9, "active_deadline_seconds": None}
    policy = seen.spec.policy.model_copy(update={**endless, "pending_deadline_seconds": None})
    asked = row.state in (*ACTIVE, State.STOPPING)
    code = attempt.exit if attempt and asked else None
    result = attempt.result if attempt and code is not None else None
    answer = result.resolved if result else None
    if answer and not answer.problems and code == Exit.OK:
        return _resolved(seen, status, answer, attempts.complete(row))
    problems = answer.problems if answer else ()
    if result and result.problem and code == Exit.CONFIGURATION:
        said = f"{result.problem.field}: {result.problem.message}"
        problems = problems or (brief(said, PROBLEM_LENGTH),)
    if problems:
        row = attempts.fail(row, problems[0], policy, now)
        return status.model_copy(update={"preflight": row, "problems": problems})
    if code in (Exit.OK, Exit.CONFIGURATION):
        row = attempts.fail(row, f"exit {code} without an answer", policy, now)
    else:
        row = attempts.record(row, attempt, policy, now)
        if result and row.message:
            row = change(row, message=brief(attempts.words(code or 0, result)))
    return status.model_copy(update={"preflight": row})


def _unreadable(seen: Observed, status: Status) -> Verdict | None:
    """The spec breaks a rule of spec.py that the API server did not check."""
    if seen.spec is not None:
        return None
    return Verdict("False", Reason.INVALID_SPEC, brief("; ".join(seen.problems), 200))


def _immutable(seen: Observed, status: Status) -> Verdict | None:
    """Pinned by the first acceptance, so that a wrong seed of a new run can still be mended."""
    assert seen.spec is not None
    paths = ("method", "seed.uri", "storage.uri")
    pairs = zip(paths, status.identity, _identity(seen.spec), strict=False)
    changed = [path for path, old, new in pairs if old != new]
    if not changed:
        return None
    message = f"{', '.join(changed)}: immutable; revert, or make a new run"
    return Verdict("False", Reason.IMMUTABLE, message)


def _too_old(seen: Observed, status: Status) -> Verdict | None:
    """The engine writes the Task of this release and of the one before."""
    release = status.release or seen.release
    if release.task >= TASK_SCHEMA - 1:
        return None
    message = f"task version {release.task} of the run's image; this engine writes {TASK_SCHEMA}"
    return Verdict("False", Reason.IMAGE_TOO_OLD, message)


def _not_yet(spec: BTXRunSpec, status: Status, row: Row) -> Verdict:
    if status.problems:
        return Verdict("False", Reason.PROBLEMS_FOUND, brief("; ".join(status.problems), 200))
    if row.failures > spec.policy.max_retries:
        return Verdict("False", Reason.PREFLIGHT_FAILED, row.message)
    if status.generation:
        return Verdict("Unknown", Reason.EDIT_PENDING, row.message)
    return Verdict("Unknown", Reason.PREFLIGHT, row.message)


def _duplicates(seen: Observed, status: Status) -> Verdict | None:
    """Two experts that are one model would be counted twice in every mean."""
    assert seen.spec is not None and status.resolved is not None
    nodes = _graph(seen, status, status.resolved, None)
    models = [e.name for e in seen.spec.experts if e.model]
    made = dict(zip(models, status.resolved.models, strict=True))
    made |= {node.expert: node.stage.digest for node in nodes.values() if node.expert}
    first: dict[str, str] = {}
    for name, identity in made.items():
        if identity in first:
            message = f"experts {first[identity]!r} and {name!r} are one and the same model"
            return Verdict("False", Reason.DUPLICATE_EXPERTS, message)
        first[identity] = name
    return None


def _would_retrain(seen: Observed, status: Status) -> Verdict | None:
    """Only an edit or other bytes under the same URI can change a digest."""
    assert seen.spec is not None
    if seen.spec.policy.allow_retrain:
        return None
    nodes = graph_of(seen, status)
    there = _complete(nodes, status)
    rows = {row.name: row for row in status.stages if row.state is State.COMPLETE}
    again = [
        node.expert
        for name, node in nodes.items()
        if node.stage.kind is Kind.TRAIN
        and name in rows
        and node.stage.digest not in there | {rows[name].digest}
    ]
    if not again:
        return None
    message = f"{', '.join(again)}: trained already; revert, or set policy.allowRetrain"
    return Verdict("False", Reason.WOULD_RETRAIN, brief(message, 200))


def _accept(seen: Observed, status: Status, key: str) -> Status:
    """Rows of the new graph; those of the same name and digest are kept, failures forgiven."""
    spec, resolved = seen.spec, status.resolved
    assert spec is not None and resolved is not None
    anew = status.members_key != members_key(spec)
    nodes = graph_of(seen, status)
    rows = rows_of(nodes, seen, status)
    for name, row in rows.items():
        if row.state is State.FAILED or (row.state is State.LATE and anew):
            rows[name] = change(attempts.forgive(row), state=State.PENDING)
    if key != status.key:
        rows = _looked_up(spec, nodes, status, rows)
    update: dict[str, Any] = {
        "stages": tuple(rows.values()),
        "generation": seen.generation,
        "key": key,
        "release": status.release or seen.release,
        "identity": _identity(spec),
        "members_key": members_key(spec),
        "resolved": resolved.model_copy(
            update={"complete": "", "gains": (), "token": "", "corrupt": ()}
        ),
    }
    if anew:
        update |= {"members": None, "expert_seconds": 0, "expert_since": None}
    return status.model_copy(update=update)


def rows_of(nodes: Graph, seen: Observed, status: Status) -> dict[str, Row]:
    """One row per stage that the result needs or that was tried.

    Numbers of attempts go on, so that an attempt of an older row is never taken for one of this.
    """
    rows = {row.name: row for row in status.stages}
    last = {name: row.attempt for name, row in rows.items()}
    for attempt in seen.attempts:
        last[attempt.stage] = max(attempt.number, last.get(attempt.stage, 0))
    needed, found = wanted(nodes), {}
    for name, node in nodes.items():
        row = rows.get(name)
        if row is not None and row.digest == node.stage.digest:
            found[name] = row
        elif row is not None or name in needed:
            found[name] = Row(name=name, digest=node.stage.digest, attempt=last.get(name, 0))
    return found


def wanted(nodes: Graph) -> set[str]:
    """Names of the stages that the result needs: evaluate and all that it reads."""
    found = {"evaluate"}
    for name in reversed(nodes):
        if name in found:
            found.update(nodes[name].needs)
    return found


def _looked_up(
    spec: BTXRunSpec, nodes: Graph, status: Status, rows: dict[str, Row]
) -> dict[str, Row]:
    """What preflight found in storage: complete, gone, corrupt."""
    resolved = status.resolved
    assert resolved is not None
    there, final = _complete(nodes, status), final_stage(nodes)
    corrupt = {item.digest: item.tag for item in resolved.corrupt}
    gains = dict(zip((f"train-{e.name}" for e in spec.experts), resolved.gains, strict=False))

    def look(row: Row) -> Row:
        complete = row.state is State.COMPLETE
        if row.invalid is not None and not complete:
            return row  # its repair is under way; what is in storage is the corrupt copy
        if row.digest in corrupt:
            return attempts.corrupted(change(row, state=State.COMPLETE), corrupt[row.digest])
        if complete and row.digest not in there:
            return change(row, state=State.PENDING, gain=None, token="")
        if row.digest in there and not complete:
            token = resolved.token if row.name == final else ""
            return attempts.complete(row, gain=gains.get(row.name), token=token)
        return row

    return {name: look(row) for name, row in rows.items()}


def final_stage(nodes: Graph) -> str:
    """Name of the stage that makes the run's model: the last model that evaluate reads."""
    models = [n for n in nodes["evaluate"].needs if nodes[n].stage.kind is not Kind.PREPARE]
    return models[-1]


def _resolved(seen: Observed, status: Status, answer: Resolved, row: Row) -> Status:
    """Keeps the fingerprint of every URI that stayed, unless a new look was asked for."""
    spec = seen.spec
    assert spec is not None
    inputs = _inputs(spec)
    merged = answer
    if status.resolved is not None and status.refresh == seen.refresh:
        known = dict(zip(status.inputs, _prints(status.resolved), strict=True))
        kept = [known.get(h, f) for h, f in zip(inputs, _prints(answer), strict=True)]
        domains, models = len(answer.domains), len(answer.models)
        merged = answer.model_copy(update={
            "seed": kept[0], "tokenizer": kept[1],
            "domains": tuple(kept[2 : 2 + domains]),
            "models": tuple(kept[2 + domains : 2 + domains + models]),
            "tasks": tuple(kept[2 + domains + models :]),
        })  # fmt: skip
    # The bitmap counts the stages of the graph that preflight saw; rewrite it for ours.
    members = standing(spec, status)
    asked = _graph(seen, status, answer, members)
    there = _digests(asked, answer.complete)
    looked_at = {node.stage.digest for node in asked.values()}
    there |= {row.digest for row in status.stages if row.state is State.COMPLETE} - looked_at
    ours = _graph(seen, status, merged, members).values()
    bits = sum(1 << i for i, node in enumerate(ours) if node.stage.digest in there)
    resolved = merged.model_copy(update={"complete": f"{bits:x}"})
    return status.model_copy(update={
        "preflight": row, "problems": (), "resolved": resolved, "inputs": inputs,
        "refresh": seen.refresh,
    })  # fmt: skip


def _graph(seen: Observed, status: Status, resolved: Resolved, members: Members | None) -> Graph:
    """A run asks for the same graph at every step, and hashing its stages is half of a step."""
    assert seen.spec is not None
    versions = (status.release or seen.release).kinds
    texts = [resolved.model_dump_json(), members and members.model_dump_json(), seen.uid]
    key = (id(seen.spec), *texts, *versions.items())
    found = _GRAPHS.get(key)
    # Of a spec that is gone another one may have the id.
    if found is None or found[0] is not seen.spec:
        made = graph(seen.spec, resolved, members, versions=versions, uid=seen.uid)
        if status.over:
            return made
        found = _GRAPHS[key] = (seen.spec, made)
        while len(_GRAPHS) > GRAPHS:
            _GRAPHS.popitem(last=False)
    return Graph(found[1])


def _complete(nodes: Graph, status: Status) -> set[str]:
    return _digests(nodes, status.resolved.complete if status.resolved else "")


def _digests(nodes: Graph, bitmap: str) -> set[str]:
    bits = int(bitmap or "0", 16)
    return {node.stage.digest for i, node in enumerate(nodes.values()) if bits >> i & 1}


def _prints(resolved: Resolved) -> tuple[str, ...]:
    models = (*resolved.models, *resolved.tasks)
    return (resolved.seed, resolved.tokenizer, *resolved.domains, *models)


def _inputs(spec: BTXRunSpec) -> tuple[str, ...]:
    """A hash of the URIs behind each fingerprint, in the order of `_prints`."""
    uris: list[Any] = [["seed", spec.seed.uri], ["tokenizer", spec.prepare.tokenizer]]
    uris += [["domain", *(s.uri for s in sources)] for sources in spec.domains().values()]
    uris += [["model", expert.model] for expert in spec.experts if expert.model]
    uris += [["task", task.uri] for task in spec.evaluate.tasks]
    return tuple(_hash(item, 8) for item in uris)


def _identity(spec: BTXRunSpec) -> tuple[str, ...]:
    return tuple(_hash(value, 8) for value in (spec.method, spec.seed.uri, spec.storage.uri))


def _hash(value: Any, length: int) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]
