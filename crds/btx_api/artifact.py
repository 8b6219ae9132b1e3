"""What a stage leaves in storage: paths below the prefix, and the manifest that commits it.

<prefix>/stages/<kind>/<digest>/attempts/<token>/...   files of one attempt; never overwritten
<prefix>/stages/<kind>/<digest>/manifest.json          the commit: last, conditional, names a token
<prefix>/stages/<kind>/<digest>/checkpoints/<step>-<token>/...  the same one level down
<prefix>/stages/<kind>/<digest>/log/<run>-<attempt>.txt
<prefix>/runs/<uid>.json                               digests of a run's graph: the roots of gc
"""

from typing import Annotated

from pydantic import Field

from btx_api.names import MANIFEST, stage_folder
from btx_api.spec import Model, Real
from btx_api.stage import Kind, Stage

HISTORY = "history.jsonl"
"""Training stages: one line per logged step {step, tokens, loss, ...}."""
REPORT_JSON = "report.json"
REPORT_HTML = "report.html"
MODEL_CARD = "README.md"
SHARDS = "shards.json"
"""Index of a prepare artifact."""


def manifest_key(kind: Kind, digest: str) -> str:
    """Key of a stage's manifest."""
    return f"{stage_folder(kind, digest)}/{MANIFEST}"


def attempt_folder(kind: Kind, digest: str, token: str) -> str:
    """Folder of the files that a manifest names."""
    return f"{stage_folder(kind, digest)}/attempts/{token}"


def checkpoints_folder(kind: Kind, digest: str) -> str:
    """Folder of a stage's checkpoints."""
    return f"{stage_folder(kind, digest)}/checkpoints"


def log_key(kind: Kind, digest: str, run: str, attempt: int) -> str:
    """Key of one attempt's log."""
    return f"{stage_folder(kind, digest)}/log/{run}-{attempt}.txt"


class FileEntry(Model):
    """One file of an artifact."""

    name: str
    """Relative to the attempt's folder."""
    size: Annotated[int, Field(ge=0)]
    # The alias generator would write crc32C.
    crc32c: Annotated[str, Field(pattern="^[0-9a-f]{8}$", alias="crc32c")]


class Parent(Model):
    """Lineage: an input and the copy of it that was read."""

    kind: Kind | None = None
    digest: str = ""
    token: str = ""
    tag: str = ""
    fingerprint: str = ""
    """Of an input from outside; then the fields above are empty."""
    uri: str = ""


class Maker(Model):
    """Who made an artifact; never part of a digest."""

    run: str = ""
    uid: str = ""
    attempt: int = 1
    image: str = ""
    version: str = ""
    """Of this package."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Versions of torch, transformers, ... that took part."""
    created: str = ""
    """RFC 3339, UTC."""
    seconds: Real = 0.0


class Manifest(Model):
    """The commit of an artifact (or, with `step`, of a checkpoint)."""

    schema_version: int = 1
    stage: Stage
    digest: str
    token: str
    files: tuple[FileEntry, ...]
    parents: tuple[Parent, ...] = ()
    metrics: dict[str, Real] = Field(default_factory=dict)
    """Headline numbers; the same as in the Result."""
    deviations: tuple[str, ...] = ()
    """What happened that the recipe does not say (a loss-spike rollback), in words."""
    step: int | None = None
    """Of a checkpoint."""
    maker: Maker = Maker()


class RecordedStage(Model):
    """One stage that a run wants, complete or not."""

    kind: Kind
    digest: str


class RunRecord(Model):
    """`runs/<uid>.json`: what a run's storage must not lose."""

    time: str = ""
    """RFC 3339, UTC: when it was written."""
    stages: dict[str, RecordedStage] = Field(default_factory=dict)
    """Of the graph, by name."""
    former: tuple[RecordedStage, ...] = ()
    """Of graphs before: an edit may be taken back, members may be decided again."""
