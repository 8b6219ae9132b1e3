"""Result and Task: what crosses between processes, and how large it may be."""

from btx_api import names
from btx_api.methods import graph
from btx_api.spec import Scheduling
from btx_api.stage import (
    GRAVITY,
    MAX_METRICS,
    PROBLEM_LENGTH,
    Corrupt,
    Exit,
    Kind,
    Parameters,
    Problem,
    Resolved,
    Result,
    Task,
    TaskExecution,
)
from builders import resolved_for, spec_of
from hypothesis import given
from hypothesis import strategies as st

LINE = st.text(max_size=300)
NUMBER = st.floats(-1e9, 1e9).map(lambda x: round(x, 4))


@given(
    problems=st.lists(LINE, max_size=8),
    gains=st.lists(NUMBER | st.none(), max_size=64),
    domains=st.integers(0, 96),
)
def test_the_largest_preflight_answer_fits_a_termination_message(
    problems: list[str], gains: list[float | None], domains: int
) -> None:
    """64 experts, 96 fingerprints; or 8 problems in any script: 4,096 bytes at the most."""
    resolved = Resolved(
        seed="s" * 22,
        tokenizer="t" * 22,
        domains=("x" * 22,) * domains,
        complete="f" * 50,
        gains=tuple(round(g % 100, 4) if g is not None else None for g in gains),
        parameters=Parameters(dense=10**12, total=10**13, active=10**12),
    )
    if problems:
        # Who has found something to mend says nothing else.
        resolved = Resolved(problems=tuple(problems))
    result = Result(digest="d" * 32, token="t" * 16, resolved=resolved)

    assert len(result.line().encode()) <= names.RESULT_BYTES
    assert Result.model_validate_json(result.line()) == result


def test_a_long_problem_loses_its_middle() -> None:
    """The field's name and the reason stay; a short one is as it was."""
    uri = "s3://bucket/" + "folder/" * 40
    [cut, kept] = Resolved(problems=(f"storage.uri: {uri}: denied", "seed.uri: none")).problems
    assert cut.startswith("storage.uri: s3://bucket/") and cut.endswith(": denied")
    assert "…" in cut and PROBLEM_LENGTH - 4 <= len(cut.encode()) <= PROBLEM_LENGTH
    assert kept == "seed.uri: none"


def test_the_largest_stage_result_fits_a_termination_message() -> None:
    """Bounded strings and at most 16 numbers."""
    result = Result(
        digest="d" * 32, token="t" * 16, tag="g" * 80, reused=True, seconds=1.23456789012345e-7,
        metrics={f"{i:x<40}": -1.23456789012345e-300 for i in range(MAX_METRICS)},
        problem=Problem(field='"' * 160, message="\U0001f600" * 600),
        corrupt=Corrupt(kind=Kind.FINETUNE, digest="d" * 32, tag="t" * 80),
        text="\\" * 600,
    )  # fmt: skip

    assert len(result.line().encode()) <= names.RESULT_BYTES


def test_a_task_reads_back_as_itself() -> None:
    """What the engine writes is what the trainer gets."""
    spec = spec_of()
    for name, node in graph(spec, resolved_for(spec)).items():
        task = Task(
            stage=node.stage,
            execution=TaskExecution(
                storage=spec.storage, name=name, inputs=node.locations,
                scheduling=Scheduling(threads=2),
            ),
        )  # fmt: skip

        assert Task.model_validate_json(task.model_dump_json(exclude_defaults=True)) == task
        assert task.work == node.stage


def test_gravity_orders_every_exit() -> None:
    """Configuration before corrupt before stalled before failed before preempted."""
    assert set(GRAVITY) == set(Exit)
    order = [Exit.CONFIGURATION, Exit.CORRUPT, Exit.STALLED, Exit.FAILED, Exit.PREEMPTED, Exit.OK]
    assert [code for code in GRAVITY if code in order] == order
