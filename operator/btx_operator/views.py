"""Values of the engine -> tables and lines for a person; pure. Called by cli.py."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from btx_api.methods import Graph, finetune_phases, graph
from btx_api.spec import BTXRunSpec, Scheduling
from btx_api.stage import Kind, Parameters, Progress
from btx_api.status import ACTIVE, Condition, ConditionType, Reason, Row, State, Status

from btx_operator.attempts import scheduling_of
from btx_operator.flops import Rate, cost, longest_chain
from btx_operator.render import Line, count, duration, table

FINAL = (Kind.FINETUNE, Kind.TRAIN)
"""Kinds that make a run's final model, the first that a run has counts (Dense has no finetune)."""

REUSED = "reused"


class Run(Protocol):
    """What is known of a run on this machine (local.SavedRun)."""

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> BTXRunSpec: ...
    @property
    def status(self) -> Status: ...
    @property
    def pid(self) -> int | None: ...


def stage_lines(run: str, status: Status, progress: Mapping[str, Progress]) -> list[Line]:
    """Every stage for the live display; preflight while it is not done."""
    rows = [*status.stages]
    if status.preflight and status.preflight.state is not State.COMPLETE:
        rows.insert(0, status.preflight)
    return [
        Line(run=run, stage=row.name, state=row.state, progress=progress.get(row.name),
             note=_note(row))
        for row in rows
    ]  # fmt: skip


def _note(row: Row) -> str:
    if row.state is State.WAITING:
        return row.waits_for
    if row.state is State.COMPLETE and not row.attempt:
        return REUSED
    if row.state is State.COMPLETE:
        return duration(row.seconds) if row.seconds else ""
    if row.state in ACTIVE:
        # What is said of the attempt before is no longer of interest.
        again = row.failures or row.preemptions or row.lost
        return ", ".join(filter(None, (f"attempt {row.attempt}" if again else "", _dead(row))))
    return row.message


def runs_table(runs: Sequence[Run]) -> list[str]:
    """One line per run."""
    rows = [
        (
            run.name,
            run.spec.method,
            run.status.state,
            f"{sum(row.state is State.COMPLETE for row in run.status.stages)}"
            f"/{len(run.status.stages)}",
            str(run.pid or ""),
        )
        for run in runs
    ]
    return table(("run", "method", "state", "complete", "process"), rows)


def plan_of(run: Run, uid: str, rates: Mapping[Kind, Rate]) -> list[str]:
    """The plan of a run that was accepted: of its own stages and what became of them."""
    status = run.status
    assert status.resolved is not None and status.release is not None
    stages = graph(
        run.spec, status.resolved, status.members, versions=status.release.kinds, uid=uid
    )
    rows = {row.name: row for row in status.stages}
    complete = [
        name in rows
        and rows[name].digest == node.stage.digest
        and rows[name].state is State.COMPLETE
        for name, node in stages.items()
    ]
    parameters = status.resolved.parameters
    return plan_tables(run.spec, stages, complete, parameters, rates=rates, elsewhere={})


def run_tables(run: Run, progress: Mapping[str, Progress]) -> list[str]:
    """State and reasons of one run, then a table of its stages."""
    status = run.status
    process = f", process {run.pid}" if run.pid else ""
    lines = [f"{run.name}: {status.state}{process}"]
    lines += [f"  {reason}" for reason in reasons(status)]
    if status.progress:
        left = f", {status.eta} left" if status.eta else ""
        lines.append(f"  {status.stage}: {status.progress}{left}")
    if status.model:
        lines.append(f"  model {status.model}")
    header = ("stage", "state", "attempts", "tokens", "loss", "gain", "reused", "time", "message")
    return [*lines, "", *table(header, [_row(run, row, progress) for row in status.stages])]


def _row(run: Run, row: Row, progress: Mapping[str, Progress]) -> tuple[str, ...]:
    now = progress.get(row.name, Progress())
    wanted = planned_tokens(run.spec, row.name)
    tokens = f"{count(now.tokens)}/{count(wanted)}" if now.tokens else count(wanted or 0)
    return (
        row.name,
        row.state,
        str(row.attempt or ""),
        tokens if wanted else "",
        "" if now.loss is None else f"{now.loss:.4f}",
        "" if row.gain is None else f"{row.gain:+.4f}",
        "yes" if _note(row) == REUSED else "",
        duration(row.seconds) if row.seconds else "",
        _dead(row) if row.state in (State.COMPLETE, *ACTIVE) else _note(row),
    )


def _dead(row: Row) -> str:
    return f"dead experts {row.dead_experts}" if row.dead_experts else ""


def planned_tokens(spec: BTXRunSpec, stage: str) -> int:
    """Tokens that a stage of a run is asked to train on; 0 for stages that train nothing."""
    tokens = {f"train-{expert.name}": expert.tokens for expert in spec.experts}
    finetune = sum(phase.tokens for phase in finetune_phases(spec))
    tokens |= {"finetune": finetune, "train-dense": sum(tokens.values()) + finetune}
    return tokens.get(stage, 0)


def reasons(status: Status) -> list[str]:
    """Why a run is not accepted, or waits, stands or failed; empty for one that is fine."""
    accepted = status.condition(ConditionType.ACCEPTED)
    if accepted and accepted.status == "False":
        return list(status.problems) or [_reason(accepted)]
    told = ((ConditionType.QUEUED, "True"), (ConditionType.SUSPENDED, "True"),
            (ConditionType.SUCCEEDED, "False"))  # fmt: skip
    found = [c for kind, truth in told if (c := status.condition(kind)) and c.status == truth]
    running = status.condition(ConditionType.RUNNING)
    if running and running.reason is Reason.BLOCKED:
        found.append(running)
    return [_reason(condition) for condition in found]


def _reason(condition: Condition) -> str:
    return f"{condition.reason}: {condition.message}".removesuffix(": ")


def final_stage(status: Status, name: str = "") -> Row | None:
    """The row of a stage, by default of the one that makes the final model."""
    if name:
        return status.row(name)
    for kind in FINAL:
        for row in reversed(status.stages):
            if row.kind is kind:
                return row
    return None


def plan_tables(
    spec: BTXRunSpec,
    stages: Graph,
    complete: Sequence[bool],
    parameters: Parameters,
    *,
    rates: Mapping[Kind, Rate],
    elsewhere: Mapping[str, str],
) -> list[str]:
    """Every stage with what it costs, then the run's totals, and what is left to pay.

    `rates` by kind of stage, none where nothing is known; `elsewhere`: digests that another plan
    pays for, and whose.
    """
    blocks = {name: scheduling_of(spec, name) for name in stages}
    prices = {name: cost(node.stage, parameters, blocks[name]) for name, node in stages.items()}
    hours = {
        name: rates[node.stage.kind].hours(prices[name].flops)
        for name, node in stages.items()
        if prices[name].flops and node.stage.kind in rates
    }
    rows, left = [], dict[str, float]()
    for (name, node), done in zip(stages.items(), complete, strict=True):
        digest, price = node.stage.digest, prices[name]
        other = elsewhere.get(digest)
        state = "complete" if done else f"as in {other}" if other else "to run"
        if state == "to run":
            left[name] = price.flops
        numbers = (count(price.tokens), str(price.steps)) if price.tokens else ("", "")
        work = f"{price.flops:.2e}" if price.flops else ""
        time = f"{hours[name]:.3g}" if name in hours else ""
        rows.append((name, state, *numbers, work, time, digest))
    p = parameters
    mixed = f", mixed {count(p.total)}, of them active {count(p.active)}" if p.total else ""
    weight = {n: price.flops / _processes(blocks[n]) for n, price in prices.items()}
    chain = longest_chain(stages, weight)
    every = [name for name, price in prices.items() if price.flops]
    total = sum(price.flops for price in prices.values())
    return [
        f"parameters: seed {count(p.dense)}{mixed}",
        *table(("stage", "state", "tokens", "steps", "FLOPs", "hours", "digest"), rows),
        f"{spec.method} in all: {total:.2e} FLOPs{_together(hours, every)}, "
        f"{count(sum(price.tokens for price in prices.values()))} tokens",
        f"longest chain: {', '.join(chain)}: {sum(prices[n].flops for n in chain):.2e} FLOPs"
        + _together({n: h / _processes(blocks[n]) for n, h in hours.items()},
                    [name for name in chain if name in every], "hours"),
        *_rate_lines(stages, every, rates),
        f"{len(left)} of {len(rows)} stages to run: at most {sum(left.values()):.2e} FLOPs"
        + _together(hours, [name for name in left if name in every]),
    ]  # fmt: skip


def _processes(block: Scheduling) -> int:
    return block.nodes * max(1, block.gpus)


def _together(
    hours: Mapping[str, float], names: Sequence[str], unit: str = "GPU- or process-hours"
) -> str:
    """`, 12.5 hours`; nothing where the rate of one of the stages is not known."""
    known = all(name in hours for name in names)
    return f", {sum(hours[name] for name in names):.3g} {unit}" if known and names else ""


def _rate_lines(stages: Graph, every: Sequence[str], rates: Mapping[Kind, Rate]) -> list[str]:
    """Where the hours come from; which kinds have none."""
    told: dict[str, list[str]] = {}
    for kind in dict.fromkeys(stages[name].stage.kind for name in every):
        rate = rates.get(kind)
        said = (
            f"{rate.flops_per_second:.3g} FLOP/s ({rate.source})"
            if rate
            else ("no rate known, so no hours; see --flops-per-second")
        )
        told.setdefault(said, []).append(kind)
    return [f"{', '.join(kinds)}: {said}" for said, kinds in told.items()]
