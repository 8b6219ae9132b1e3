"""The trainer's entry: Task -> already done? -> stage -> commit -> Result -> exit code.

A stage on several ranks is this same entry once more in each of them, started by launch.py.
`BTX_TASK` holds the Task as JSON, or `@path` of a file with it. Imports no torch until a stage
needs it. Called by the local backend and as the container's command.
"""

import errno
import faulthandler
import importlib
import importlib.metadata
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from btx_api.artifact import Maker, log_key
from btx_api.names import TASK_ENV, stage_folder
from btx_api.spec import Model, explain
from btx_api.stage import (
    MAX_METRICS,
    RECIPES,
    TASK_SCHEMA,
    VERSIONS,
    Content,
    Exit,
    Kind,
    Problem,
    Progress,
    Result,
    Stage,
    Task,
    TaskExecution,
)
from pydantic import ValidationError

from btx_trainer import checkpoint, errands, launch
from btx_trainer.artifacts import Artifact, Attempt, Outside, find
from btx_trainer.errors import (
    ConfigurationError,
    CorruptInputError,
    MissingError,
    PreemptedError,
    TrainerError,
)
from btx_trainer.ranks import Ranks, here
from btx_trainer.roots import write_record
from btx_trainer.storage import Store, open_store
from btx_trainer.telemetry import Log, Telemetry
from btx_trainer.work import Made, Work

ENVIRONMENT = {
    # Without it a kernel depends on the alignment of its operands, and a resume is not exact.
    "MKL_CBWR": "AVX2",
    # Spinning OpenMP threads collapse beside a busy core.
    "GOMP_SPINCOUNT": "1000",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    # A GPU's first checkpoint waits for pinned memory: 0.2 s a gigabyte instead of 0.8 [measured].
    "PYTORCH_CUDA_ALLOC_CONF": "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
}
LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "pyarrow")
STALE_SECONDS = 86_400
"""What nobody has written to for so long, a killed attempt at the same stage has left."""


def main() -> Exit:
    """Runs the task of the environment; returns the exit code."""
    started, place = time.monotonic(), here()
    place.die_with_parent()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a text stream
    # What rank 0 tells holds for all.
    level = logging.ERROR if place.rank else logging.INFO
    logging.basicConfig(level=level, stream=sys.stdout, format="%(asctime)s %(message)s")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    stopping = _catch_signals()
    target = ""

    def work() -> Result:
        nonlocal target
        raw = _read_task()
        target = str(raw.get("execution", {}).get("result", ""))
        return _run(_parse(raw), stopping, stack)

    # What goes wrong is printed before the log is closed.
    with ExitStack() as stack:
        result, code = _outcome(work)
    _finish(result.model_copy(update={"seconds": round(time.monotonic() - started, 3)}), target)
    return code


def _catch_signals() -> threading.Event:
    stopping = threading.Event()

    def stop(number: int, _: object) -> None:
        stopping.set()
        # The second one ends a stage that does not look.
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # A rank is started with these held back.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
    return stopping


def _outcome(work: Callable[[], Result]) -> tuple[Result, Exit]:
    """Every way to end, as a Result; prints one line, or for a bug the traceback."""
    try:
        return work(), Exit.OK
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return Result(problem=error.problem, corrupt=error.corrupt), error.exit
    except OSError as error:
        place = str(error.filename or "")
        problem = Problem(field=place, message=error.strerror or str(error))
        # Of the environment: the object and what the system says of it are the whole story.
        if not place and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
    except Exception as error:  # whatever it is, it becomes a Result
        traceback.print_exc()
        problem = Problem(field=type(error).__name__, message=str(error) or "no message")
    where = f"{problem.field}: " if problem.field else ""
    print(f"error: {where}{problem.message}", file=sys.stderr)
    return Result(problem=problem), Exit.FAILED


def _finish(result: Result, target: str) -> None:
    line = result.line()
    if target:
        path = Path(target)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(line)
            partial.replace(path)
        except OSError:
            # A container's termination log is a mount: it can be written, not replaced.
            path.write_text(line)
    if not here().parent:
        print(line, flush=True)


def _read_task() -> dict[str, Any]:
    text = os.environ.get(TASK_ENV, "")
    try:
        value = json.loads(Path(text[1:]).read_text() if text.startswith("@") else text)
    except (OSError, ValueError) as error:
        raise ConfigurationError(TASK_ENV, f"holds no task: {error}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(TASK_ENV, "holds no task: not a JSON object")
    return value


def _parse(raw: dict[str, Any]) -> Task:
    version = raw.get("schemaVersion", TASK_SCHEMA)
    if version != TASK_SCHEMA:
        raise ConfigurationError(
            "task.schemaVersion", f"{version}: this trainer reads {TASK_SCHEMA}; use another image"
        )
    try:
        return Task.parse(raw)
    except ValidationError as error:
        raise ConfigurationError("", explain(error, "task")[0]) from error


def _run(task: Task, stopping: threading.Event, stack: ExitStack) -> Result:
    execution, work = task.execution, task.work
    if execution.scratch:
        Path(execution.scratch).mkdir(parents=True, exist_ok=True)
    scratch = stack.enter_context(
        tempfile.TemporaryDirectory(
            dir=execution.scratch or None, prefix="btx-", ignore_cleanup_errors=True
        )
    )
    # Libraries and children put their own temporary files there too.
    os.environ["TMPDIR"] = tempfile.tempdir = scratch
    if isinstance(work, Stage):
        return _run_stage(work, execution, stopping, stack)
    return errands.run(work, execution)


def _run_stage(
    stage: Stage, execution: TaskExecution, stopping: threading.Event, stack: ExitStack
) -> Result:
    """In a process alone, in one of several ranks, or in the parent that starts these."""
    store, replaces, place = open_store(execution.storage), execution.replaces, here()
    crew = launch.Crew() if place.parent else launch.crew_of(stage.kind, execution.scheduling)
    ranks = _meet(execution) if place.parent else Ranks()
    # Of several nodes rank 0 decides for all of them.
    if crew.nodes == 1 or execution.must_exist:
        result, replaces = ranks.share(lambda: _found(store, stage, execution))
        if result:
            return result
    if execution.must_exist:
        raise MissingError(f"stages/{stage.kind}/{stage.digest}", "there is no such artifact")
    recipe = _recipe(stage)
    log = _log(store, stage, execution, stack) if not place.parent and crew.node == 0 else None
    if crew.world > 1:
        return launch.run(Task(stage=stage, execution=execution), crew, stopping.is_set)
    telemetry = Telemetry(run=execution.run, stage=execution.name or stage.kind, kind=stage.kind)
    if execution.listen:
        stack.callback(telemetry.serve(execution.listen).shutdown)
    _watch(telemetry, execution, log, stack)
    out = Attempt(store, stage, replaces=replaces)
    out.token = ranks.share(lambda: out.token)
    work = Work(
        stage=stage, recipe=recipe, execution=execution, store=store,
        inputs=_inputs(stage, execution, store, ranks), out=out,
        scratch=Path(tempfile.gettempdir()), publish=telemetry.publish, stopping=stopping.is_set,
    )  # fmt: skip
    return _make(work, ranks)


def _meet(execution: TaskExecution) -> Ranks:
    """Connects a rank with the others; with torch, so not in a process alone."""
    connect = importlib.import_module("btx_trainer.distributed").connect
    # The watchdog is to end a rank that waits for another, not this limit.
    ranks: Ranks = connect(here(), 2 * execution.no_progress_seconds)
    logging.info("rank %d of %d", ranks.rank, ranks.world)
    return ranks


def _found(store: Store, stage: Stage, execution: TaskExecution) -> tuple[Result | None, str]:
    """The Result of an artifact that is there already; else the tag of what is to be replaced."""
    replaces = execution.replaces
    if execution.uid:
        write_record(store, execution.uid, {execution.name: stage}, whole=False)
    try:
        found = find(store, stage.kind, stage.digest, ignoring=replaces)
        if found and execution.verify:
            found.verify()
    except CorruptInputError as error:
        # Ours, and nobody can use it: made again under the same address.
        assert error.corrupt
        found, replaces = None, error.corrupt.tag
    if found is None:
        return None, replaces
    _prune(store, stage)
    return _result(found, reused=True), replaces


def _log(store: Store, stage: Stage, execution: TaskExecution, stack: ExitStack) -> Log:
    # Some credentials may not list uploads; gc comes by later.
    with suppress(OSError):
        folder = stage_folder(stage.kind, stage.digest)
        store.delete_unfinished(f"{folder}/", time.time() - STALE_SECONDS)
    log = Log(store, log_key(stage.kind, stage.digest, execution.run or "run", execution.attempt))
    stack.callback(log.close)
    return log


def _recipe(stage: Stage) -> Model:
    if stage.version != VERSIONS[stage.kind]:
        raise ConfigurationError(
            f"{stage.kind}.version",
            f"{stage.version}: this trainer makes {VERSIONS[stage.kind]}; use another image",
        )
    try:
        return RECIPES[stage.kind].parse(stage.recipe)
    except ValidationError as error:
        raise ConfigurationError("", explain(error, stage.kind)[0]) from error


def _inputs(
    stage: Stage, execution: TaskExecution, store: Store, ranks: Ranks
) -> tuple[Artifact | Outside, ...]:
    inputs: list[Artifact | Outside] = []
    for item, location in zip(stage.inputs, execution.inputs, strict=True):
        if isinstance(item, Content):
            tokenizer = stage.kind is Kind.PREPARE and not location.sources
            inputs.append(
                Outside(
                    location=location, fingerprint=item.fingerprint, tokenizer=tokenizer,
                    storage=execution.storage,
                )
            )  # fmt: skip
        else:
            assert location.kind
            found = find(store, location.kind, item.digest)
            if found is None:
                raise CorruptInputError(location.kind, item.digest, "", "the artifact is missing")
            inputs.append(found)
    parents = [item.parent for item in inputs]
    if ranks.share(lambda: parents) != parents:
        raise TrainerError("", "an input was made again while the ranks started")
    return tuple(inputs)


def _make(work: Work, ranks: Ranks) -> Result:
    """Runs the stage; of several ranks the first commits."""
    stage, started = work.stage, time.monotonic()
    work.publish(Progress(phase="loading"))
    run: Callable[[Work], Made] = importlib.import_module(f"btx_trainer.stages.{stage.kind}").run
    try:
        made = run(work)
        assert len(made.metrics) <= MAX_METRICS, made.metrics
    except BaseException as error:
        work.out.discard()
        if isinstance(error, PreemptedError):
            ranks.leave()
        raise
    ranks.leave()
    if ranks.rank:
        return Result()
    work.publish(Progress(phase="committing"))
    # A commit that fails may have happened all the same, and then its files must stay.
    artifact = work.out.commit(
        metrics=made.metrics, deviations=made.deviations,
        maker=_maker(work.execution, time.monotonic() - started),
        parents=[item.parent for item in work.inputs],
    )  # fmt: skip
    _prune(work.store, stage)
    result = _result(artifact, reused=artifact.token != work.out.token)
    return result.model_copy(update={"resumed_step": made.resumed_step})


def _prune(store: Store, stage: Stage) -> None:
    """Checkpoints of a committed stage serve nobody; that some are left harms nobody either."""
    with suppress(OSError):
        checkpoint.prune(store, stage)


def _maker(execution: TaskExecution, seconds: float) -> Maker:
    return Maker(
        run=execution.run, uid=execution.uid, attempt=execution.attempt, image=execution.image,
        version=importlib.metadata.version("btx"),
        libraries={n: str(sys.modules[n].__version__) for n in LIBRARIES if n in sys.modules},
        created=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        seconds=round(seconds, 3),
    )  # fmt: skip


def _result(artifact: Artifact, *, reused: bool) -> Result:
    return Result(
        digest=artifact.digest, token=artifact.token, tag=artifact.tag, reused=reused,
        metrics=artifact.manifest.metrics,
    )  # fmt: skip


def _watch(
    telemetry: Telemetry, execution: TaskExecution, log: Log | None, stack: ExitStack
) -> None:
    """Ends the process, whatever it waits for, when nothing has moved for too long."""
    limit, done = execution.no_progress_seconds, threading.Event()
    stack.callback(done.set)

    def watch() -> None:
        while telemetry.idle < limit:
            if done.wait(min(5.0, limit / 4)):
                return
        faulthandler.dump_traceback()
        problem = Problem(message=f"no progress for {limit} s (policy.noProgressSeconds)")
        print(f"error: {problem.message}", file=sys.stderr, flush=True)
        if log:
            # Storage may be what hangs.
            closing = threading.Thread(target=log.close, daemon=True)
            closing.start()
            closing.join(10)
        _finish(Result(problem=problem), execution.result)
        os._exit(Exit.STALLED)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()


if __name__ == "__main__":
    sys.exit(main())
