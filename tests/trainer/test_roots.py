"""What gc keeps and what it deletes, on real storage; the records of runs that it goes by."""

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from btx_api.artifact import Maker, checkpoints_folder
from btx_api.methods import Graph, Members, graph
from btx_api.names import MANIFEST, run_record
from btx_api.spec import BTXRunSpec, Storage
from btx_api.stage import Exit, Gc, Kind, Preflight, Stage, Task, TaskExecution
from btx_trainer import roots
from btx_trainer.artifacts import Attempt, find
from btx_trainer.errands import run
from btx_trainer.errors import ConfigurationError
from btx_trainer.preflight import preflight
from btx_trainer.roots import collect, write_record
from btx_trainer.storage import Store, open_store
from btx_trainer.tokenizer import byte_tokenizer_json
from builders import resolved_for
from builders import spec_of as small_spec
from tiny import run_trainer, write_llama

UID = "uid-1"
DAY = 86_400


def make(store: Store, stage: Stage) -> Stage:
    """An artifact of a stage that nobody computed."""
    attempt = Attempt(store, stage)
    attempt.put("model.safetensors", stage.digest.encode() * 100)
    attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
    return stage


def there(store: Store, *stages: Stage) -> list[bool]:
    """Which of them are committed."""
    return [find(store, stage.kind, stage.digest) is not None for stage in stages]


def nodes_of(spec: BTXRunSpec, members: Members | None = None) -> dict[str, Stage]:
    """The stages of a run by name."""
    return {n: node.stage for n, node in graph(spec, resolved_for(spec), members).items()}


RUN = nodes_of(small_spec())
OTHER = Stage(kind=Kind.FINETUNE, version=1, recipe={}, inputs=(), salt="nobody's")


def later(store: Store, days: float, **how: Any) -> str:
    """gc as it would go so many days from now."""
    return collect(Gc(**{"keep_days": 7, "dry_run": False, **how}), store, time.time() + days * DAY)


def test_a_run_that_is_not_done_keeps_everything(store: Store) -> None:
    """Months without a sign of life: it may wait in a queue; who is nobody's goes."""
    for name in ("prepare-code", "train-code"):
        make(store, RUN[name])
    make(store, OTHER)
    write_record(store, UID, RUN, whole=True)

    assert later(store, 100).startswith("2 files of 1 stages deleted, ")
    assert there(store, RUN["prepare-code"], RUN["train-code"], OTHER) == [True, True, False]


def test_what_is_kept_for_a_run_that_stands_is_told(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that names the record and the days; on request such runs are given up."""
    make(store, RUN["train-code"])
    write_record(store, UID, RUN, whole=True)
    told = "runs/uid-1.json: not done, nothing moved for 30 days; kept\n"

    later(store, 30)
    assert capsys.readouterr().out == told
    later(store, 30, abandoned_days=40)
    assert there(store, RUN["train-code"]) == [True]
    assert later(store, 30, abandoned_days=20).startswith("2 files of 1 stages deleted, ")
    assert there(store, RUN["train-code"]) == [False]
    assert store.head(run_record(UID))


def test_a_run_is_alive_while_one_of_its_stages_moves(tmp_path: Path) -> None:
    """Even where runs are given up: the checkpoint of its last expert is a sign of life."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    make(store, RUN["train-code"])
    write_record(store, UID, RUN, whole=True)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    folder = checkpoints_folder(Kind.TRAIN, RUN["train-math"].digest)
    store.put(f"{folder}/10-x/{MANIFEST}", b"{}")

    later(store, 0, abandoned_days=14)
    assert there(store, RUN["train-code"]) == [True]


def test_a_finished_run_is_kept_for_some_days(store: Store) -> None:
    """From its last artifact on; then all of it goes, but for what another run wants."""
    for stage in RUN.values():
        make(store, stage)
    write_record(store, UID, RUN, whole=True)
    assert later(store, 6) == "0 files of 0 stages deleted, 0 bytes"
    shared = {"prepare-code": RUN["prepare-code"]}
    write_record(store, "uid-2", shared, whole=True)

    assert later(store, 8).startswith(f"{2 * (len(RUN) - 1)} files of {len(RUN) - 1} stages")
    assert there(store, RUN["prepare-code"], RUN["finetune"]) == [True, False]


def test_nothing_young_goes(store: Store) -> None:
    """Whoever made it may be about to name it."""
    make(store, OTHER)
    assert later(store, 6, force=True) == "0 files of 0 stages deleted, 0 bytes"
    assert later(store, 8, force=True).startswith("2 files of 1 stages deleted, ")


def test_a_dry_run_says_what_would_go(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per stage with its files, the bytes of all; nothing is gone."""
    make(store, OTHER)
    size = sum(head.size for head in store.list("stages/"))
    assert later(store, 8, dry_run=True) == f"2 files of 1 stages would be deleted, {size} bytes"
    assert capsys.readouterr().out == f"stages/finetune/{OTHER.digest}: 2 of 2 files\n"
    assert there(store, OTHER) == [True]


def test_without_any_record_nothing_goes_unless_forced(store: Store) -> None:
    """A wrong prefix, or records that were lost, look like a storage that nobody wants."""
    assert later(store, 8) == "0 files of 0 stages deleted, 0 bytes"
    make(store, OTHER)
    with pytest.raises(ConfigurationError, match="no record of a run"):
        later(store, 8)
    assert there(store, OTHER) == [True]


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"stages": 1}', b'{"ages": {}}'])
def test_a_record_that_cannot_be_read_stops_it(store: Store, text: bytes) -> None:
    """What it names is not known: nothing is deleted, and the record is named."""
    make(store, OTHER)
    write_record(store, UID, RUN, whole=True)
    store.put(run_record("uid-2"), text)
    with pytest.raises(ConfigurationError, match=r"runs/uid-2\.json"):
        later(store, 8)
    assert there(store, OTHER) == [True]


def test_what_was_named_once_stays_until_the_run_is_done(store: Store) -> None:
    """An edit may be taken back; members are decided while stages run."""
    edited = nodes_of(small_spec(train={"randomSeed": 1}))
    make(store, RUN["train-code"])
    write_record(store, UID, RUN, whole=True)
    write_record(store, UID, edited, whole=True)
    later(store, 30)
    assert there(store, RUN["train-code"]) == [True]
    for stage in edited.values():
        make(store, stage)
    later(store, 8)
    assert there(store, RUN["train-code"]) == [False]


def test_a_stage_of_other_members_is_named_when_it_starts(store: Store) -> None:
    """Its mix is not of the graph that preflight recorded; the evaluation ends the run all the same."""
    few = nodes_of(small_spec(), Members(experts=("math",)))
    write_record(store, UID, RUN, whole=True)
    for name in ("mix", "finetune"):
        write_record(store, UID, {name: few[name]}, whole=False)
        make(store, few[name])
    later(store, 30)
    assert there(store, few["mix"], few["finetune"]) == [True, True]
    write_record(store, UID, {"evaluate": few["evaluate"]}, whole=False)
    make(store, few["evaluate"])
    assert later(store, 6).startswith("0 files")
    later(store, 8)
    assert there(store, few["mix"], few["finetune"]) == [False, False]


def test_tasks_that_start_together_are_all_named(store: Store) -> None:
    """Each changes the record that it read, or reads it again."""
    threads = [
        threading.Thread(
            target=write_record, args=(store, UID, {name: stage}), kwargs={"whole": False}
        )
        for name, stage in RUN.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = json.loads(store.read(run_record(UID)))
    assert {n: item["digest"] for n, item in record["stages"].items()} == {
        n: stage.digest for n, stage in RUN.items()
    }


def test_a_run_that_begins_meanwhile_keeps_what_it_counts_on(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record is seen before the next stage is deleted."""
    stages = [make(store, RUN["prepare-code"]), make(store, RUN["train-code"])]
    write_record(store, "uid-0", {}, whole=True)
    delete = roots._delete

    def begin(target: Store, heads: Sequence[Any]) -> None:
        delete(target, heads)
        write_record(target, UID, RUN, whole=True)

    monkeypatch.setattr(roots, "_delete", begin)
    later(store, 8)
    assert sorted(there(store, *stages)) == [False, True]


def age(path: Path, days: float) -> None:
    """All below looks so old."""
    for file in [path, *path.rglob("*")]:
        then = time.time() - days * DAY
        os.utime(file, (then, then))


def test_what_killed_attempts_left_goes(tmp_path: Path) -> None:
    """Old files of attempts that no manifest names, old checkpoints of a committed stage."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    write_record(store, UID, RUN, whole=True)
    complete, never = make(store, RUN["train-code"]), RUN["train-math"]
    left = [Attempt(store, stage) for stage in (complete, never, complete)]
    for attempt in left:
        attempt.put("model.safetensors", b"half")
    for stage in (complete, never):
        store.put(f"{checkpoints_folder(stage.kind, stage.digest)}/3-x/{MANIFEST}", b"{}")
    age(tmp_path / "stages", 10)
    young = f"{left[2].folder}/young"
    store.put(young, b"")

    # An attempt of `complete` may still be at work: one of its files is young.
    assert later(store, 0) == "1 files of 1 stages deleted, 4 bytes"
    age(tmp_path / "stages", 10)
    assert later(store, 0) == "4 files of 1 stages deleted, 10 bytes"
    found = find(store, complete.kind, complete.digest)
    assert found
    found.verify()
    kept = [head.key for head in store.list(f"stages/{never.kind}/{never.digest}")]
    assert [key.rpartition("/")[2] for key in kept] == [MANIFEST], "its checkpoint"


def test_what_killed_writers_left_goes(tmp_path: Path) -> None:
    """Temporary files that no listing shows: counted by a dry run, deleted once they are old."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    write_record(store, UID, RUN, whole=True)
    folder = tmp_path / "stages/train/x/attempts/y"
    folder.mkdir(parents=True)
    for name, days in (("old", 10), ("young", 1)):
        (folder / f".btx-{name}").write_bytes(b"half")
        os.utime(folder / f".btx-{name}", (time.time() - days * DAY,) * 2)

    told = "0 files of 0 stages would be deleted, 0 bytes; 1 unfinished writes too"
    assert later(store, 0, dry_run=True) == told
    assert later(store, 0) == told.replace("would be deleted", "deleted")
    assert [path.name for path in folder.iterdir()] == [".btx-young"]


def test_stale_uploads_are_aborted(s3_endpoint: str) -> None:
    """An upload of a killed writer: nobody sees it, everybody pays for it."""
    storage = Storage(
        uri="s3://btx/uploads", region="us-east-1", path_style=True, endpoint=s3_endpoint
    )
    store: Any = open_store(storage)
    write_record(store, UID, RUN, whole=True)
    where = {"Bucket": "btx", "Key": "uploads/stages/train/x/attempts/y/z"}
    store.client.create_multipart_upload(**where)

    def uploads() -> int:
        found = store.client.list_multipart_uploads(Bucket="btx", Prefix="uploads/")
        return len(found.get("Uploads", []))

    assert later(store, 6).endswith(" 0 bytes")
    assert later(store, 8, dry_run=True).endswith("; 1 unfinished writes too")
    assert uploads() == 1
    assert later(store, 8).endswith("; 1 unfinished writes too")
    assert uploads() == 0


def test_a_waiting_mix_finds_every_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's record and its first expert are older than keepDays, its last expert still trains.

    The whole path: preflight records, the last expert's checkpoint is the only young file, gc
    deletes, then the last expert commits and a real mix reads all of them.
    """
    monkeypatch.chdir(tmp_path)
    experts = []
    for number, name in enumerate(("seed", "code", "math")):
        write_llama(tmp_path / name, number)
        (tmp_path / name / "tokenizer.json").write_text(byte_tokenizer_json())
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
        if number:
            experts.append({"name": name, "tokens": 4096, "data": [{"uri": f"file://{name}.txt"}]})
    spec = BTXRunSpec.parse({
        "storage": {"uri": "file://storage"}, "seed": {"uri": "file://seed"}, "experts": experts,
    })  # fmt: skip
    store = open_store(spec.storage)
    nodes: Graph = graph(spec, preflight(Preflight(spec=spec, uid=UID)), uid=UID)

    def commit(name: str) -> None:
        attempt = Attempt(store, nodes[f"train-{name}"].stage)
        for path in (tmp_path / name).iterdir():
            attempt.add(path, path.name)
        attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())

    commit("code")
    make(store, OTHER)
    age(tmp_path / "storage", 30)
    last = nodes["train-math"].stage
    store.put(f"{checkpoints_folder(last.kind, last.digest)}/10-x/{MANIFEST}", b"{}")
    execution = TaskExecution(
        storage=spec.storage, uid=UID, name="mix", inputs=nodes["mix"].locations
    )
    gone = run(Gc(keep_days=1, dry_run=False), execution).text
    assert gone.startswith("2 files of 1 stages deleted, "), "what is nobody's"
    commit("math")
    done = run_trainer(Task(stage=nodes["mix"].stage, execution=execution))
    assert done.code == Exit.OK, done.err
