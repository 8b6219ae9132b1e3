"""Tasks without a stage: preflight (in preflight.py), report, export, gc.

Whatever the command line needs of storage runs as one of these. No torch. Called by __main__.py.
"""

import json
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from btx_api.artifact import REPORT_JSON, attempt_folder
from btx_api.names import MANIFEST
from btx_api.stage import Export, Gc, Kind, Preflight, Report, Result, TaskExecution
from pydantic import ValidationError

from btx_trainer.artifacts import Artifact, find
from btx_trainer.errors import ConfigurationError, CorruptInputError, MissingError
from btx_trainer.preflight import preflight, probe
from btx_trainer.storage import Head, Store, open_store

DAY = 86_400


def run(errand: Preflight | Report | Export | Gc, execution: TaskExecution) -> Result:
    """Runs one errand; `text` of the Result is its answer in words, preflight's is `resolved`."""
    if isinstance(errand, Preflight):
        return Result(resolved=preflight(errand))
    store = open_store(execution.storage)
    match errand:
        case Report():
            return Result(text=_report(errand, store))
        case Export():
            return Result(text=_export(errand, store))
        case Gc():
            return Result(text=_gc(errand, store))


def _artifact(store: Store, kind: Kind, digest: str) -> Artifact:
    found = find(store, kind, digest)
    if found is None:
        raise MissingError(f"stages/{kind}/{digest}", "there is no such artifact")
    return found


def _report(errand: Report, store: Store) -> str:
    """Several runs side by side, from the report.json of each one's evaluation."""
    from btx_trainer import report, scores  # noqa: PLC0415 - no other errand needs them

    runs = []
    for item in errand.runs:
        data = _artifact(store, Kind.EVALUATE, item.digest).read(REPORT_JSON)
        try:
            runs.append((item.name, scores.Report.parse(json.loads(data))))
        except ValidationError as error:
            raise ConfigurationError(item.name, "its report is of another release") from error
    report.render(runs, Path(errand.folder))
    return f"report of {', '.join(item.name for item in errand.runs)} in {errand.folder}"


def _export(errand: Export, store: Store) -> str:
    """A copy of one artifact, every byte verified; the folder appears whole or not at all."""
    folder = Path(errand.folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(errand.folder, "exists and is not an empty folder")
    artifact = _artifact(store, errand.kind, errand.digest)
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        artifact.copy(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = artifact.manifest.files
    return f"{len(files)} files, {sum(f.size for f in files)} bytes in {errand.folder}"


def _gc(errand: Gc, store: Store) -> str:
    """Deletes stages that no young run record names, and what killed attempts left of the others.

    Nothing younger than keep_days, by the storage's own clock. Prints one line per stage.
    """
    oldest = probe(store).modified - errand.keep_days * DAY
    kept = set()
    for head in store.list("runs/"):
        if head.key.endswith(".json") and head.modified >= oldest:
            record = json.loads(store.read(head.key))
            kept |= {(item["kind"], item["digest"]) for item in record["stages"].values()}
    stages = defaultdict(list)
    for head in store.list("stages/"):
        _, kind, digest, *_ = head.key.split("/")
        stages[kind, digest].append(head)
    touched = files = size = 0
    for (kind, digest), every in stages.items():
        heads = every
        if (kind, digest) in kept:
            heads = _orphans(store, Kind(kind), digest, every)
        if not heads or any(head.modified >= oldest for head in heads):
            continue
        touched, files = touched + 1, files + len(heads)
        size += sum(head.size for head in heads)
        print(f"stages/{kind}/{digest}: {len(heads)} of {len(every)} files")
        if not errand.dry_run:
            _delete(store, heads)
    verb = "would be deleted" if errand.dry_run else "deleted"
    return f"{files} files of {touched} stages {verb}, {size} bytes"


def _orphans(store: Store, kind: Kind, digest: str, heads: Iterable[Head]) -> list[Head]:
    """Files of attempts that the manifest does not name."""
    try:
        found = find(store, kind, digest)
    except CorruptInputError:
        return []
    named = found.key("") if found else "nothing"
    attempts = attempt_folder(kind, digest, "")
    return [h for h in heads if h.key.startswith(attempts) and not h.key.startswith(named)]


def _delete(store: Store, heads: Iterable[Head]) -> None:
    # The manifest first: what is half deleted must not look committed.
    for head in sorted(heads, key=lambda head: not head.key.endswith(f"/{MANIFEST}")):
        store.delete(head.key)
