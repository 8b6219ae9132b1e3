"""Tasks without a stage: preflight (in preflight.py), report, export, gc (in roots.py).

Whatever the command line needs of storage runs as one of these. No torch. Called by __main__.py.
"""

import json
import secrets
import shutil
from pathlib import Path

from btx_api.artifact import MODEL_CARD, REPORT_JSON
from btx_api.stage import Export, Gc, Kind, Preflight, Report, Result, TaskExecution
from pydantic import ValidationError

from btx_trainer import roots
from btx_trainer.artifacts import Artifact, find
from btx_trainer.errors import ConfigurationError, MissingError
from btx_trainer.preflight import preflight, probe
from btx_trainer.storage import Store, open_store


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
            # By the storage's own clock.
            return Result(text=roots.collect(errand, store, probe(store).modified))


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
    """A copy of one artifact, every byte verified, and its model card if it has none of its own.

    The folder appears whole or not at all.
    """
    folder = Path(errand.folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(errand.folder, "exists and is not an empty folder")
    artifact = _artifact(store, errand.kind, errand.digest)
    card = _artifact(store, Kind.EVALUATE, errand.card).read(MODEL_CARD) if errand.card else b""
    partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        artifact.copy(partial)
        if card:
            (partial / MODEL_CARD).write_bytes(card)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = artifact.manifest.files
    size, more = sum(f.size for f in files), ", and the model card" if card else ""
    return f"{len(files)} files, {size} bytes in {errand.folder}{more}"
