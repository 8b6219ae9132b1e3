"""Real processes, killed and terminated at random steps, end in the bits of one left alone.

TRIALS + 1 is how often the two stages are interrupted in all; every other time by SIGTERM.
"""

import os
import random
import signal

import pytest
from attempts import attempt, outcome
from btx_api.artifact import checkpoints_folder
from btx_api.spec import Routing
from btx_api.stage import Exit, Result, Task
from training import Studio, finetune_recipe, train_recipe

TRIALS = int(os.environ.get("TRIALS", "3"))
STEPS = {"train": 250, "finetune": 120}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """One storage for all processes."""
    return Studio(tmp_path_factory.mktemp("studio"))


def task_of(studio: Studio, kind: str) -> Task:
    """A fresh task that takes some seconds and saves every second."""
    how = {"threads": 2, "checkpoint_seconds": 1, "dead_expert_steps": 3}
    if kind == "train":
        return studio.task(train_recipe(STEPS[kind]), ["seed", "letters"], **how)
    routing = Routing(init="DomainMean")
    recipe = finetune_recipe(STEPS[kind], routing=routing, experts=(1, 2, 0, 0))
    return studio.task(recipe, ["mixed", "letters", "sums"], micro_batch=5, **how)


@pytest.mark.parametrize(
    ("kind", "trials"), [("train", (TRIALS + 1) // 2), ("finetune", (TRIALS + 2) // 2)]
)
def test_an_interrupted_stage_ends_in_the_same_bits(studio: Studio, kind: str, trials: int) -> None:
    """SIGKILL and SIGTERM at random steps: files and metrics are those of a run left alone."""
    whole, broken = task_of(studio, kind), task_of(studio, kind)
    with attempt(studio, whole) as alone:
        result, kept = _interrupted(studio, broken, STEPS[kind], trials)
        assert alone.ends(Exit.OK).resumed_step == 0
    assert result.resumed_step >= kept
    assert outcome(studio, broken) == outcome(studio, whole)
    for task in (whole, broken):
        assert task.stage
        folder = checkpoints_folder(task.stage.kind, task.stage.digest)
        assert not (studio.folder / "storage" / folder).exists()


def _interrupted(studio: Studio, task: Task, steps: int, trials: int) -> tuple[Result, int]:
    """The result after so many interruptions, and the step that was surely saved at the last."""
    draw = random.Random(f"{steps} {trials}")
    targets = sorted(draw.randrange(steps // 4, steps * 3 // 4) for _ in range(trials))
    kept = 0
    for trial, target in enumerate(targets):
        with attempt(studio, task) as process:
            progress = process.reaches(target)
            assert progress.checkpoint_step >= kept
            if trial % 2:
                process.process.send_signal(signal.SIGTERM)
                process.ends(Exit.PREEMPTED)
                kept = progress.step
            else:
                process.process.kill()
                kept = progress.checkpoint_step
    with attempt(studio, task) as process:
        return process.ends(Exit.OK), kept
