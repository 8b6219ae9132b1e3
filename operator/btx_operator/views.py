"""Values of the engine -> tables and lines for a person; pure. Called by cli.py."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from btx_api.methods import Graph, finetune_phases
from btx_api.spec import BTXRunSpec
from btx_api.stage import Kind, Parameters, Progress
from btx_api.status import ACTIVE, Condition, ConditionType, Row, State, Status

from btx_operator.flops import cost
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
        return f"attempt {row.attempt}" if again else ""
    return row.message


def runs_table(runs: Sequence[Run]) -> list[str]:
    """One line per run of this machine."""
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


def run_tables(run: Run, progress: Mapping[str, Progress]) -> list[str]:
    """State and reasons of one run, then a table of its stages."""
    status = run.status
    process = f", process {run.pid}" if run.pid else ""
    lines = [f"{run.name}: {status.state}{process}"]
    lines += [f"  {reason}" for reason in reasons(status)]
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
        "" if row.state in (State.COMPLETE, *ACTIVE) else _note(row),
    )


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
    return [
        _reason(c) for kind, truth in told if (c := status.condition(kind)) and c.status == truth
    ]


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
    graph: Graph,
    complete: Sequence[bool],
    parameters: Parameters,
    *,
    tflops: int,
    elsewhere: Mapping[str, str],
) -> list[str]:
    """Every stage with what it costs, then what is left to pay.

    `tflops`: what one GPU achieves; `elsewhere`: digests that another plan pays for, and whose.
    """
    rows, costs = [], {"to run": 0.0, "complete": 0.0}
    for (name, node), done in zip(graph.items(), complete, strict=True):
        digest, price = node.stage.digest, cost(node.stage, parameters)
        other = elsewhere.get(digest)
        state = "complete" if done else f"as in {other}" if other else "to run"
        costs[state] = costs.get(state, 0.0) + price.flops
        numbers = (count(price.tokens), str(price.steps)) if price.tokens else ("", "")
        hours = f"{_hours(price.flops, tflops):.3g}"
        work = (f"{price.flops:.2e}", hours) if price.flops else ("", "")
        rows.append((name, state, *numbers, *work, digest))
    p = parameters
    mixed = f", mixed {count(p.total)}, of them active {count(p.active)}" if p.total else ""
    left, saved = costs["to run"], costs["complete"]
    todo = sum(row[1] == "to run" for row in rows)
    return [
        f"parameters: seed {count(p.dense)}{mixed}",
        *table(("stage", "state", "tokens", "steps", "FLOPs", "GPU-hours", "digest"), rows),
        f"{todo} of {len(rows)} stages to run: at most {left:.2e} FLOPs or "
        f"{_hours(left, tflops):.3g} GPU-hours at {tflops} TFLOP/s per GPU; "
        f"{_hours(saved, tflops):.3g} GPU-hours are complete in the storage",
    ]


def _hours(flops: float, tflops: int) -> float:
    return flops / (tflops * 1e12) / 3600
