"""A world without processes: runs, attempts and a storage in memory, moved on by the test.

It is a Backend of reconcile.py. After every step it checks that the decision, once applied, has
nothing left to do, and that the status keeps its invariants and its bounds.
"""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from btx_api.methods import Members, graph
from btx_api.spec import BTXRunSpec
from btx_api.stage import (
    TASK_SCHEMA,
    VERSIONS,
    Corrupt,
    Exit,
    Kind,
    Problem,
    Resolved,
    Result,
    Task,
)
from btx_api.status import ACTIVE, PREFLIGHT, ConditionType, Row, State, Status
from btx_operator.decide import decide
from btx_operator.errors import Conflict
from btx_operator.observed import (
    Attempt,
    Claim,
    Event,
    Observed,
    Phase,
    Release,
    Start,
    index,
    storage_key,
)
from btx_operator.reconcile import reconcile
from builders import resolved_for

Key = tuple[str, int, str]


@dataclass
class Storage:
    """What is committed, and what the domains' files hold."""

    complete: dict[str, str] = field(default_factory=dict)
    """Digest -> tag of its manifest."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Domain -> fingerprint, where a test changed its bytes."""
    models: dict[str, str] = field(default_factory=dict)
    """Ready expert -> fingerprint, likewise."""
    gains: dict[str, float] = field(default_factory=dict)
    """Stage name -> gain in its Result; 0.5 elsewhere."""
    problems: tuple[str, ...] = ()
    corrupt: tuple[Corrupt, ...] = ()
    commits: int = 0

    def resolve(self, spec: BTXRunSpec, members: tuple[str, ...] | None, task: Task) -> Resolved:
        """What preflight would answer."""
        domains = tuple(self.fingerprints.get(name, f"{name:d<22}"[:22]) for name in spec.domains())
        ready = [expert.name for expert in spec.experts if expert.model]
        models = tuple(self.models.get(name, f"{name:m<22}"[:22]) for name in ready)
        base = resolved_for(spec, domains=domains, models=models)
        assert task.preflight is not None
        nodes = graph(
            spec, base,
            Members(experts=members, without=task.preflight.without) if members else None,
            versions=task.preflight.versions, uid=task.preflight.uid,
        )  # fmt: skip
        bits = sum(
            1 << i for i, node in enumerate(nodes.values()) if node.stage.digest in self.complete
        )
        gains = tuple(
            self.gains.get(f"train-{e.name}", 0.5)
            if (node := nodes.get(f"train-{e.name}")) and node.stage.digest in self.complete
            else None
            for e in spec.experts
        )
        final = nodes.get("finetune") or nodes["train-dense"]
        there = final.stage.digest in self.complete
        return base.model_copy(update={
            "complete": f"{bits:x}", "gains": gains, "problems": self.problems,
            "corrupt": self.corrupt, "token": "f" * 16 if there else "",
        })  # fmt: skip

    def run(self, task: Task) -> Result:
        """What the trainer would leave after doing the task."""
        if task.preflight is not None:
            asked = task.preflight
            return Result(resolved=self.resolve(asked.spec, asked.members, task))
        stage = task.stage
        assert stage is not None
        reused = self.complete.get(stage.digest, task.execution.replaces) != task.execution.replaces
        if not reused:
            self.commits += 1
            self.complete[stage.digest] = f"tag{self.commits}"
        gain = self.gains.get(task.execution.name, 0.5)
        return Result(
            digest=stage.digest, token="f" * 16, tag=self.complete[stage.digest], reused=reused,
            metrics={"gain": gain} if stage.kind is Kind.TRAIN else {},
        )  # fmt: skip


@dataclass
class World:
    """One run as its store has it."""

    name: str
    uid: str
    created: float
    spec: BTXRunSpec | None
    generation: int = 1
    status: Status = field(default_factory=Status)
    refresh: str = ""
    retry: str = ""
    verify: bool = False
    closing: bool = False
    problems: tuple[str, ...] = ()
    attempts: dict[Key, Attempt] = field(default_factory=dict)
    tasks: dict[Key, Task] = field(default_factory=dict)
    reserved: Status | None = None
    lose_write: bool = False
    """The next write of the status meets a conflict."""


@dataclass
class Carried:
    """A Decision as its backend was told to carry it out."""

    run: str
    status: Status
    stops: list[Attempt] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    again_after: float | None = None


class Simulator:
    """Backend for any number of runs over one storage."""

    def __init__(self, *, instant: bool = False) -> None:
        self.now = 1_700_000_000.0
        self.storage = Storage()
        self.worlds: dict[str, World] = {}
        self.events: list[Event] = []
        self.decisions: list[Carried] = []
        self.held: set[str] = set()
        """Stages (`<stage>` or `<run>/<stage>`) whose attempts a queue holds back."""
        self.instant = instant
        """Attempts run as soon as they are created and end as soon as they are asked to."""
        self.release_of_engine = Release(image="", task=TASK_SCHEMA, kinds=VERSIONS)
        self.patient = 0.0
        """Seconds that a write of what is only shown waits; a real backend loses its patience."""
        self._handles = itertools.count(1)

    # Backend -----------------------------------------------------------------------------------

    def observe(self, run: str) -> Observed | None:
        world = self.worlds.get(run)
        if world is None:
            return None
        world.reserved = None
        claims = index(
            Claim(run=other.name, uid=other.uid, created=other.created, row=row)
            for other in self.worlds.values()
            if other is not world and world.spec and other.spec
            and storage_key(other.spec) == storage_key(world.spec)
            for row in (other.reserved or other.status).stages
        )  # fmt: skip
        return Observed(
            name=world.name, uid=world.uid, created=world.created, generation=world.generation,
            spec=world.spec, status=world.status, release=self.release_of_engine,
            problems=world.problems, attempts=tuple(world.attempts.values()),
            claims=claims, refresh=world.refresh, retry=world.retry, verify=world.verify,
            closing=world.closing,
        )  # fmt: skip

    def reserve(self, run: str, status: Status) -> None:
        self.worlds[run].reserved = status
        self.decisions.append(Carried(run=run, status=status))

    def patience(self, run: str) -> float:
        return self.patient

    async def write_status(self, run: str, status: Status) -> None:
        world = self.worlds[run]
        if world.lose_write:
            world.lose_write = False
            raise Conflict
        world.status = Status.parse(status.model_dump(mode="json", exclude_defaults=True))

    async def stop(self, run: str, attempt: Attempt) -> None:
        world = self.worlds[run]
        self.decisions[-1].stops.append(attempt)
        key = (attempt.stage, attempt.number, attempt.digest)
        world.attempts[key] = replace(world.attempts[key], stopping=True)
        if self.instant:
            self._end(world, key, Exit.PREEMPTED, None)

    async def start(self, run: str, start: Start) -> None:
        world = self.worlds[run]
        self.decisions[-1].starts.append(start)
        key = (start.name, start.attempt, start.digest)
        if key in world.attempts:
            return
        phase = Phase.RUNNING if self.instant else Phase.PENDING
        world.tasks[key] = start.task
        world.attempts[key] = Attempt(
            stage=start.name, number=start.attempt, digest=start.digest,
            handle=f"job{next(self._handles)}", phase=phase,
            since=self.now,
        )  # fmt: skip

    async def emit(self, run: str, events: Sequence[Event]) -> None:
        self.events += events
        self.decisions[-1].events += events

    # What a test does to the world ---------------------------------------------------------------

    def submit(self, spec: BTXRunSpec | None, name: str = "run", **fields: Any) -> World:
        """Creates a run, or edits it."""
        world = self.worlds.get(name)
        if world is None:
            uid = f"uid-{name}"
            world = World(name=name, uid=uid, created=self.now + len(self.worlds), spec=spec)
            self.worlds[name] = world
        elif spec != world.spec:
            world.spec, world.generation = spec, world.generation + 1
        for key, value in fields.items():
            setattr(world, key, value)
        return world

    def step(self, run: str = "run") -> Carried:
        """One reconcile, and the checks that every step has to pass."""
        before, carried = self.worlds[run].status, len(self.decisions)
        after = asyncio.run(_only(reconcile(self, run, lambda: self.now)))
        if len(self.decisions) == carried:
            return Carried(run=run, status=before, again_after=after)  # put off
        decision = self.decisions[-1]
        decision.again_after = after
        self._check(run, before, decision)
        return decision

    def settle(self, *runs: str) -> None:
        """Steps until nothing changes; pending attempts begin to run."""
        for _ in range(100):
            before = self._picture()
            afters = [self.step(run).again_after for run in runs or tuple(self.worlds)]
            self.begin_pending()
            if self._picture() == before and 0.0 not in afters:
                return
        raise AssertionError("the engine does not come to rest")

    def begin_pending(self) -> None:
        """Every attempt gets its process, unless a queue holds it."""
        for world in self.worlds.values():
            for key, attempt in world.attempts.items():
                held = not self.held.isdisjoint((attempt.stage, f"{world.name}/{attempt.stage}"))
                if held and attempt.phase is Phase.PENDING:
                    world.attempts[key] = replace(attempt, phase=Phase.QUEUED, since=None)
                elif not held and attempt.phase in (Phase.PENDING, Phase.QUEUED):
                    world.attempts[key] = replace(attempt, phase=Phase.RUNNING, since=self.now)

    def live(self, run: str = "run") -> dict[str, Attempt]:
        """Attempts that have not ended, by stage."""
        attempts = self.worlds[run].attempts.values()
        return {a.stage: a for a in attempts if a.phase is not Phase.ENDED}

    def end(
        self, stage: str, code: int = Exit.OK, *, run: str = "run", result: Result | None = None,
        readable: bool = True,
    ) -> None:  # fmt: skip
        """The stage's live attempt ends; with OK it has done its task."""
        attempt = self.live(run)[stage]
        key = (attempt.stage, attempt.number, attempt.digest)
        world = self.worlds[run]
        if code == Exit.OK and result is None:
            result = self.storage.run(world.tasks[key])
        self._end(world, key, code, result if readable else None)

    def vanish(self, stage: str, run: str = "run") -> None:
        """The stage's attempts are gone, as after somebody deleted them."""
        world = self.worlds[run]
        world.attempts = {k: a for k, a in world.attempts.items() if k[0] != stage}

    def advance(self, seconds: float) -> None:
        """Time passes; nothing else happens."""
        self.now += seconds

    copy_of = staticmethod(replace)

    def finish(self, *runs: str, but: Sequence[str] = ()) -> None:
        """Ends every live attempt well, until nothing is left to do but the stages in `but`."""
        for _ in range(400):
            self.settle(*runs)
            waiting = [
                (run, stage)
                for run in runs or tuple(self.worlds)
                for stage, attempt in self.live(run).items()
                if stage not in but and attempt.phase is Phase.RUNNING
            ]
            if not waiting:
                return
            for run, stage in waiting:
                code = Exit.PREEMPTED if self.live(run)[stage].stopping else Exit.OK
                self.end(stage, code, run=run)
        raise AssertionError("the run does not end")

    # Questions ----------------------------------------------------------------------------------

    def status(self, run: str = "run") -> Status:
        return self.worlds[run].status

    def row(self, stage: str, run: str = "run") -> Row:
        status = self.status(run)
        row = status.preflight if stage == PREFLIGHT else status.row(stage)
        assert row is not None, stage
        return row

    def condition(self, kind: ConditionType, run: str = "run") -> tuple[str, str]:
        """Status and reason."""
        found = self.status(run).condition(kind)
        assert found is not None
        return found.status, found.reason

    def attempts(self, run: str = "run") -> dict[str, int]:
        """Number of the latest attempt, by stage."""
        return {row.name: row.attempt for row in self.status(run).stages}

    def tasks(self, stage: str, run: str = "run") -> list[Task]:
        """What the stage's attempts were given, first attempt first."""
        world = self.worlds[run]
        return [world.tasks[key] for key in sorted(world.tasks) if key[0] == stage]

    # Inside -------------------------------------------------------------------------------------

    def _end(self, world: World, key: Key, code: int, result: Result | None) -> None:
        attempt = world.attempts[key]
        ran = self.now - attempt.since if attempt.since is not None else 0.0
        world.attempts[key] = replace(
            attempt, phase=Phase.ENDED, exit=code, result=result, seconds=ran, since=None
        )

    def _picture(self) -> Any:
        return [(w.status, tuple(w.attempts.values())) for w in self.worlds.values()]

    def _check(self, run: str, before: Status, decision: Carried) -> None:
        world = self.worlds[run]
        if world.status is before and decision.status != before:
            return  # the write met a conflict
        seen = self.observe(run)
        assert seen is not None
        again = decide(seen, self.now)
        assert (again.starts, again.stops) == ((), ())
        if not self.instant:
            assert again.events == ()
            assert _without_handles(again.status) == _without_handles(world.status)
        if again.status != world.status:
            third = decide(replace(seen, status=again.status), self.now)
            assert third.status == again.status
            assert (third.starts, third.stops, third.events) == ((), (), ())
        check_invariants(world.spec, before, world.status)
        self._check_single_flight()

    def _check_single_flight(self) -> None:
        digests = [
            (world.spec and storage_key(world.spec), attempt.digest)
            for world in self.worlds.values()
            for attempt in world.attempts.values()
            if attempt.phase in (Phase.PENDING, Phase.RUNNING)
            and not attempt.stopping
            and attempt.stage not in (PREFLIGHT, "stranger")
        ]
        assert len(digests) == len(set(digests))


async def _only(step: Any) -> Any:
    return await step


def _without_handles(status: Status) -> Status:
    rows = tuple(row.model_copy(update={"handle": ""}) for row in status.stages)
    errand = status.preflight and status.preflight.model_copy(update={"handle": ""})
    return status.model_copy(update={"stages": rows, "preflight": errand})


LIMITS = ((16, 10_000), (64, 32_000))
"""Experts, and bytes of status as compact JSON."""


def check_invariants(spec: BTXRunSpec | None, before: Status, status: Status) -> None:
    """Rules that hold for every status, and for every pair of one and the next."""
    assert [c.type for c in status.conditions] == list(ConditionType)
    names = [row.name for row in status.stages]
    assert len(names) == len(set(names))
    for row in (*status.stages, *([status.preflight] if status.preflight else [])):
        active = row.state in ACTIVE
        assert row.attempt > 0 or not active
        assert active or row.state is State.STOPPING or not row.handle
        assert row.state in (State.RUNNING, State.STOPPING) or row.start_time is None
        assert (row.retry_time is not None) == (row.state is State.BACK_OFF)
        assert bool(row.waits_for) == (row.state is State.WAITING)
    _check_next(before, status)
    succeeded = status.condition(ConditionType.SUCCEEDED)
    accepted = status.condition(ConditionType.ACCEPTED)
    assert succeeded is not None and accepted is not None
    if succeeded.status == "True" and accepted.status == "True":
        assert status.model
        assert not any(row.state in ACTIVE for row in status.stages)
    if spec is not None:
        mixed = [row for row in status.stages if row.name in ("mix", "average")]
        assert status.members or not any(row.state in ACTIVE for row in mixed)
        trains = [r for r in status.stages if r.name.startswith("train-") and r.state in ACTIVE]
        assert len(trains) <= (spec.policy.max_parallel_experts or 64)
        for experts, size in LIMITS:
            if len(spec.experts) <= experts:
                assert len(status.line().encode()) <= size
    assert Status.model_validate_json(status.line()) == status


def _check_next(before: Status, status: Status) -> None:
    for condition in status.conditions:
        old = before.condition(condition.type)
        if old is not None and old.status == condition.status:
            assert old.last_transition_time == condition.last_transition_time
    marks = [(s.retry, s.generation, s.key) for s in (before, status)]
    forgiven = marks[0] != marks[1]
    for row in status.stages:
        old_row = before.row(row.name)
        if old_row is None or old_row.digest != row.digest:
            continue
        assert row.attempt in (old_row.attempt, old_row.attempt + 1)
        if not forgiven and row.state is not State.COMPLETE:
            assert row.failures >= old_row.failures
            assert row.preemptions >= old_row.preemptions
            assert row.lost >= old_row.lost


def problem(message: str, where: str = "") -> Result:
    """What a failing trainer leaves."""
    return Result(problem=Problem(field=where, message=message))


def corrupt_input(row: Row, tag: str) -> Result:
    """What a reader of a corrupt artifact leaves."""
    found = Corrupt(kind=row.kind, digest=row.digest, tag=tag)
    return Result(problem=Problem(field=row.name, message="bytes differ"), corrupt=found)
