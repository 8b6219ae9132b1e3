"""What storage still holds for somebody: the records of runs, and gc, which deletes the rest.

A run's record names every stage of its graph. It is written by each preflight, before anything is
looked up, and by each of the run's tasks whose stage it does not name yet (members that were
decided since). A run whose evaluation is not committed is alive, however old its record is: its
mix may wait for the last expert, or for a queue, for weeks. Called by preflight.py, __main__.py
and errands.py. No torch.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime

from btx_api.artifact import (
    RecordedStage,
    RunRecord,
    attempt_folder,
    checkpoints_folder,
    manifest_key,
)
from btx_api.names import MANIFEST, RUNS_FOLDER, STAGES_FOLDER, run_record
from btx_api.stage import Gc, Kind, Stage
from pydantic import ValidationError

from btx_trainer.artifacts import find
from btx_trainer.errors import ConfigurationError, CorruptInputError
from btx_trainer.storage import Conflict, Head, Store

DAY = 86_400
TRIES = 20
"""Of changing a record that other tasks of the run change as well."""

Stages = Mapping[RecordedStage, list[Head]]
"""Every file of every stage in the storage."""


def write_record(store: Store, uid: str, stages: Mapping[str, Stage], *, whole: bool) -> None:
    """Names stages (all of the graph, if `whole`) in the run's record; a stage's old one stays.

    What a record named once it names until the run is done: an edit may yet be taken back.
    """
    key = run_record(uid)
    new = {name: RecordedStage(kind=s.kind, digest=s.digest) for name, s in stages.items()}
    for _ in range(TRIES):
        data, tag = _get(store, key)
        old = RunRecord()
        with suppress(ValueError):
            old = RunRecord.parse(json.loads(data or b"{}"))
        named = new if whole else {**old.stages, **new}
        if not whole and old.stages == named:
            return
        former = {*old.former, *old.stages.values()} - set(named.values())
        record = RunRecord(
            time=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
            stages=named, former=tuple(sorted(former, key=str)),
        )  # fmt: skip
        text = json.dumps(record.plain(), indent=1).encode()
        with suppress(Conflict):
            store.put(key, text, if_none_match=not tag, if_match=tag)
            return
    raise Conflict(store.uri(key), "changes all the time")


def _get(store: Store, key: str) -> tuple[bytes, str]:
    with suppress(FileNotFoundError):
        return store.get(key)
    return b"", ""


def collect(errand: Gc, store: Store, now: float) -> str:
    """Deletes stages that no run wants, and of the others what killed attempts left.

    `now`: by the storage's own clock. Nothing younger than keep_days goes. Prints a line per stage,
    and per run that is kept though nothing of it moves. ConfigurationError when a record cannot be
    read, or (without force) when there is none: then nothing is deleted.
    """
    oldest = now - errand.keep_days * DAY
    stages = _stages(store)
    listed = _listed(store)
    if stages and not listed and not (errand.force or errand.dry_run):
        raise ConfigurationError(
            store.uri(RUNS_FOLDER), "holds no record of a run, so nothing is wanted; see --force"
        )
    kept = _kept(errand, store, listed, stages, now, tell=True)
    touched = files = size = 0
    for stage, every in stages.items():
        again = _listed(store)
        if again != listed:
            # A run began since, and may count on what is there.
            listed, kept = again, _kept(errand, store, again, stages, now)
        heads = _left_over(store, stage, every) if stage in kept else every
        if not heads or any(head.modified >= oldest for head in heads):
            continue
        touched, files = touched + 1, files + len(heads)
        size += sum(head.size for head in heads)
        print(f"{STAGES_FOLDER}{stage.kind}/{stage.digest}: {len(heads)} of {len(every)} files")
        if not errand.dry_run:
            _delete(store, heads)
    unfinished = sum(
        # Whatever keep_days: a writer that lives has written something within a day.
        store.delete_unfinished(folder, min(oldest, now - DAY), dry_run=errand.dry_run)
        for folder in (STAGES_FOLDER, RUNS_FOLDER)
    )
    verb = "would be deleted" if errand.dry_run else "deleted"
    also = f"; {unfinished} unfinished writes too" if unfinished else ""
    return f"{files} files of {touched} stages {verb}, {size} bytes{also}"


def _listed(store: Store) -> list[Head]:
    return [head for head in store.list(RUNS_FOLDER) if head.key.endswith(".json")]


def _stages(store: Store) -> dict[RecordedStage, list[Head]]:
    stages = defaultdict(list)
    for head in store.list(STAGES_FOLDER):
        with suppress(ValueError):  # a folder that is none of ours
            _, kind, digest, _ = head.key.split("/", 3)
            stages[RecordedStage(kind=Kind(kind), digest=digest)].append(head)
    return stages


def _kept(
    errand: Gc, store: Store, listed: Iterable[Head], stages: Stages, now: float, *,
    tell: bool = False,
) -> set[RecordedStage]:  # fmt: skip
    """What runs want: all of one that is alive, the result of one that ended lately."""
    kept: set[RecordedStage] = set()
    for head in listed:
        record = _read(store, head.key)
        named = set(record.stages.values())
        last = max([head.modified, *(f.modified for stage in named for f in stages.get(stage, ()))])
        days = (now - last) / DAY
        evaluate = record.stages.get(Kind.EVALUATE)
        if evaluate and any(f.key == _manifest(evaluate) for f in stages.get(evaluate, ())):
            kept |= named if days <= errand.keep_days else set()
            continue
        if errand.abandoned_days and days > max(errand.abandoned_days, errand.keep_days):
            continue
        kept |= named | set(record.former)
        if tell and days > errand.keep_days:
            print(f"{head.key}: not done, nothing moved for {days:.0f} days; kept")
    return kept


def _read(store: Store, key: str) -> RunRecord:
    try:
        return RunRecord.parse(json.loads(store.read(key)))
    except (ValueError, ValidationError) as error:
        raise ConfigurationError(
            store.uri(key), "cannot be read, so nothing is deleted; it is of a later release, or "
            "broken: then delete it, and refresh its run",
        ) from error  # fmt: skip


def _manifest(stage: RecordedStage) -> str:
    return manifest_key(stage.kind, stage.digest)


def _left_over(store: Store, stage: RecordedStage, heads: Iterable[Head]) -> list[Head]:
    """Of a stage that is kept: attempts that no manifest names, checkpoints after the commit."""
    try:
        found = find(store, stage.kind, stage.digest)
    except CorruptInputError:
        return []
    named = found.key("") if found else "nothing"
    folders = [attempt_folder(stage.kind, stage.digest, "")]
    if found:
        folders.append(f"{checkpoints_folder(stage.kind, stage.digest)}/")
    return [
        head
        for head in heads
        if head.key.startswith(tuple(folders)) and not head.key.startswith(named)
    ]


def _delete(store: Store, heads: Iterable[Head]) -> None:
    # The manifest first: what is half deleted must not look committed.
    for head in sorted(heads, key=lambda head: not head.key.endswith(f"/{MANIFEST}")):
        store.delete(head.key)
