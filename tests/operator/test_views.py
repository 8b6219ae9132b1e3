"""Tables of status and plan: what a person reads is what the status says, in the graph's order."""

from types import SimpleNamespace

import pytest
from btx_api.methods import graph
from btx_api.spec import Scheduling
from btx_api.stage import Kind, Parameters, Progress
from btx_api.status import Condition, ConditionType, Reason, Row, State, Status
from btx_operator import views
from btx_operator.flops import Rate, cost
from builders import resolved_for, spec_of

SPEC = spec_of(finetune={"data": [{"tokens": 300, "domains": {"code": 1}}]})
GRAPH = graph(SPEC, resolved_for(SPEC))


def rows(**states):
    """A row per stage of SPEC, Pending unless named (with `_` for `-`)."""
    return tuple(
        Row(name=name, digest=node.stage.digest).model_copy(
            update=states.get(name.replace("-", "_"), {})
        )
        for name, node in GRAPH.items()
    )


def a_run(status, pid=None):
    """A run as local.saved gives it."""
    return SimpleNamespace(name="demo", spec=SPEC, status=status, pid=pid)


def a_condition(kind, status, reason, message=""):
    """A condition without its times."""
    return Condition(
        type=kind, status=status, reason=reason, message=message, last_transition_time=0
    )


def words(lines, first):
    """The words of the line that begins with a word."""
    return next(line.split() for line in lines if line.split()[:1] == [first])


def test_a_run_is_shown_stage_by_stage():
    """State, attempts, tokens, loss, gain, reuse, time and message stand in the stage's row."""
    status = Status(
        state="Running",
        stages=rows(
            prepare_code={"state": State.COMPLETE},
            train_code={"state": State.RUNNING, "attempt": 2, "seconds": 65},
            train_math={"state": State.COMPLETE, "attempt": 1, "gain": 0.25},
            mix={"state": State.FAILED, "attempt": 3, "message": "no space"},
        ),
    )
    shown = views.run_tables(a_run(status, 77), {"train-code": Progress(tokens=128, loss=3.5)})
    assert shown[0] == "demo: Running, process 77"
    assert words(shown, "prepare-code") == ["prepare-code", "Complete", "yes"]
    assert words(shown, "train-code") == [
        "train-code",
        "Running",
        "2",
        "128/400",
        "3.5000",
        "1m05s",
    ]
    assert words(shown, "train-math") == ["train-math", "Complete", "1", "100", "+0.2500"]
    assert words(shown, "mix") == ["mix", "Failed", "3", "no", "space"]
    assert words(shown, "finetune") == ["finetune", "Pending", "300"]
    names = [line.split()[0] for line in shown if line.split()[:1] and line.split()[0] in GRAPH]
    assert names == list(GRAPH)


def test_runs_are_listed_with_what_is_complete():
    """One line per run: method, state, stages complete of all, the process that works on it."""
    status = Status(state="Failed", stages=rows(mix={"state": State.COMPLETE}))
    shown = views.runs_table([a_run(status, 12)])
    assert shown[1].split() == ["demo", "BTX", "Failed", f"1/{len(GRAPH)}", "12"]


@pytest.mark.parametrize(
    ("condition", "line"),
    [
        (a_condition(ConditionType.ACCEPTED, "False", Reason.WOULD_RETRAIN, "revert or set"),
         "WouldRetrain: revert or set"),
        (a_condition(ConditionType.SUCCEEDED, "False", Reason.STAGE_FAILED, "mix: no space"),
         "StageFailed: mix: no space"),
        (a_condition(ConditionType.QUEUED, "True", Reason.WAITING_FOR, "other/mix"),
         "WaitingFor: other/mix"),
        (a_condition(ConditionType.SUSPENDED, "True", Reason.INTERRUPTED), "Interrupted"),
    ],
)  # fmt: skip
def test_reasons_name_what_stands_in_the_way(condition, line):
    """A condition that holds a run up is one line; without a message the reason alone."""
    assert views.reasons(Status(conditions=(condition,))) == [line]


def test_nothing_stands_in_the_way_of_a_run_that_is_fine():
    """Conditions that say all is well are no reasons."""
    fine = (
        a_condition(ConditionType.ACCEPTED, "True", Reason.ACCEPTED),
        a_condition(ConditionType.SUCCEEDED, "Unknown", Reason.IN_PROGRESS),
    )
    assert views.reasons(Status(conditions=fine)) == []


def test_problems_are_told_once():
    """Preflight's problems stand for the condition that counts them, and for an older failure."""
    refused = a_condition(ConditionType.ACCEPTED, "False", Reason.PROBLEMS_FOUND, "2 problems")
    failed = a_condition(ConditionType.SUCCEEDED, "False", Reason.STAGE_FAILED, "mix: no space")
    status = Status(problems=("spec.seed.uri: none", "x: y"), conditions=(refused, failed))
    assert views.reasons(status) == ["spec.seed.uri: none", "x: y"]


def test_the_display_names_reuse_waiting_and_failure():
    """The last column says why a stage is where it is; preflight leaves when it is done."""
    status = Status(
        preflight=Row(name="preflight", digest="", state=State.RUNNING),
        stages=rows(
            prepare_code={"state": State.COMPLETE},
            train_code={"state": State.WAITING, "waits_for": "other/train-code"},
            train_math={"state": State.BACK_OFF, "attempt": 1, "message": "killed"},
            mix={"state": State.RUNNING, "attempt": 2, "failures": 1, "message": "killed"},
            finetune={"state": State.COMPLETE, "attempt": 1, "seconds": 90},
        ),
    )
    found = {line.stage: line for line in views.stage_lines("demo", status, {})}
    notes = [found[name].note for name in ("prepare-code", "train-code", "train-math", "average")]
    assert notes == ["reused", "other/train-code", "killed", ""]
    assert [found[name].note for name in ("mix", "finetune")] == ["attempt 2", "1m30s"]
    assert next(iter(found)) == "preflight"
    done = Row(name="preflight", digest="", state=State.COMPLETE)
    later = views.stage_lines("demo", status.model_copy(update={"preflight": done}), {})
    assert later[0].stage == "prepare-code"


def test_the_final_model_is_finetuned_or_dense():
    """export's default: finetune if the run has one, else the dense training, else nothing."""
    assert views.final_stage(Status(stages=rows())).name == "finetune"
    dense = spec_of(method="Dense")
    names = graph(dense, resolved_for(dense))
    status = Status(stages=tuple(Row(name=n, digest="") for n in names))
    assert views.final_stage(status).name == "train-dense"
    assert views.final_stage(status, "mix") is None
    assert views.final_stage(Status()) is None


PARAMETERS = Parameters(dense=10**9, total=2 * 10**9, active=15 * 10**8, layers=2, hidden=8)


def a_plan(rates, **how):
    """The plan of SPEC: train-code is complete, another plan pays for train-math."""
    complete = [name == "train-code" for name in GRAPH]
    elsewhere = {GRAPH["train-math"].stage.digest: "dense"}
    return views.plan_tables(
        spec_of(**how), GRAPH, complete, PARAMETERS, rates=rates, elsewhere=elsewhere
    )


def number(line, unit):
    """The number before a word."""
    words = line.replace(",", "").split()
    return float(words[words.index(unit) - 1])


def test_a_plan_says_what_is_left_to_pay():
    """Complete stages and stages that another plan pays for are not counted again."""
    shown = a_plan({})
    assert shown[0] == "parameters: seed 1B, mixed 2B, of them active 1.5B"
    assert words(shown, "train-code")[1:4] == ["complete", "4.194M", "1"]
    assert words(shown, "train-math")[1:4] == ["as", "in", "dense"]
    assert words(shown, "prepare-code")[1:4] == ["to", "run", GRAPH["prepare-code"].stage.digest]
    flops = {n: cost(GRAPH[n].stage, PARAMETERS, Scheduling()).flops for n in GRAPH}
    total, left = shown[-4], shown[-1]
    assert total.startswith(f"BTX in all: {sum(flops.values()):.2e} FLOPs, ")
    assert left == (
        f"{len(GRAPH) - 2} of {len(GRAPH)} stages to run: "
        f"at most {flops['finetune'] + flops['evaluate']:.2e} FLOPs"
    )


def test_a_plan_without_a_rate_has_no_hours():
    """Nothing is guessed: no hours anywhere, and a line that says how to get them."""
    shown = a_plan({})
    assert not any("hours" in line for line in shown[2:-2])
    assert shown[-2] == (
        "train, finetune, evaluate: no rate known, so no hours; see --flops-per-second"
    )
    some = a_plan({Kind.TRAIN: Rate(flops_per_second=1e12, source="test")})
    assert "train: 1e+12 FLOP/s (test)" in some
    assert "finetune, evaluate: no rate known, so no hours; see --flops-per-second" in some
    assert "hours" not in some[-1]


def test_hours_are_flops_by_the_rate_and_gpus_shorten_the_chain():
    """A stage's hours are one GPU's; the longest chain takes them on all GPUs of its stages."""
    rates = dict.fromkeys(Kind, Rate(flops_per_second=1e12, source="test"))
    shown = a_plan(rates)
    row = words(shown, "train-code")
    assert float(row[5]) == pytest.approx(float(row[4]) / 3.6e15, rel=0.01)
    assert number(shown[-3], "hours") > 0
    wide = {kind: {"gpus": 4, "nodes": 2} for kind in ("train", "finetune", "evaluate")}
    eighth = a_plan(rates, execution=wide)
    assert number(eighth[-3], "hours") == pytest.approx(number(shown[-3], "hours") / 8, rel=0.01)
    assert words(eighth, "train-code") == row
