"""Checkpoints: commit, verification, pruning, and what a kill at any write leaves behind."""

import logging
import threading

import numpy as np
import pytest
from btx_api.artifact import checkpoints_folder
from btx_api.stage import Kind, Stage
from btx_trainer.checkpoint import ARRAYS, STATE, Checkpoint, Checkpoints, prune
from btx_trainer.storage import FileStore
from safetensors.numpy import load_file

STAGE = Stage(kind=Kind.TRAIN, version=1, recipe={}, inputs=())


def make(step):
    """A checkpoint whose content follows from its step."""
    arrays = {
        "weight/a": np.random.default_rng(step).standard_normal((3, 5), np.float32),
        "step/a": np.array(step, np.float32),
    }
    return Checkpoint(step=step, arrays=arrays, state={"history": [{"step": step}]})


def saved(store, *steps, stage=STAGE):
    """The writer of checkpoints at these steps, all of them committed."""
    checkpoints = Checkpoints(store, stage, "a" * 16)
    for step in steps:
        checkpoints.save(make(step))
    checkpoints.wait()
    return checkpoints


def latest(store):
    """What a new attempt would begin from."""
    return Checkpoints(store, STAGE, "b" * 16).latest()


def folders(root):
    """Names of the checkpoint folders on disk."""
    folder = root / checkpoints_folder(STAGE.kind, STAGE.digest)
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    """Arrays of any rank and the JSON state are restored, and the file is plain safetensors."""
    writer = saved(FileStore(tmp_path), 7)
    found = latest(FileStore(tmp_path))
    assert found.step == writer.committed[0] == 7
    assert found.state == {"history": [{"step": 7}]}
    (path,) = tmp_path.rglob(ARRAYS)
    for arrays in (found.arrays, load_file(path)):
        assert arrays.keys() == make(7).arrays.keys()
        for name, array in make(7).arrays.items():
            assert arrays[name].shape == array.shape
            assert arrays[name].tobytes() == array.tobytes()


class Slow(FileStore):
    """A store that writes nothing before it is let go."""

    def __init__(self, root):
        super().__init__(root)
        self.go = threading.Event()

    def sink(self, key):
        assert self.go.wait(60)
        return super().sink(key)


def test_training_goes_on_while_it_is_written(tmp_path):
    """`save` returns before anything is stored, and what is stored is the state as it was then."""
    store = Slow(tmp_path)
    checkpoint = make(1)
    writer = Checkpoints(store, STAGE, "a" * 16)
    writer.save(checkpoint)
    assert writer.busy
    assert latest(FileStore(tmp_path)) is None
    checkpoint.state["history"].append({"step": 2})
    store.go.set()
    writer.wait()
    assert not writer.busy
    assert latest(FileStore(tmp_path)).state == make(1).state


def flip(path):
    """One byte in the middle differs."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    """The last byte is missing."""
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [ARRAYS, STATE, "manifest.json"])
@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()])
def test_a_damaged_checkpoint_is_left_out(tmp_path, caplog, name, damage):
    """A flipped byte, a truncated or a missing file: the one before is used, and a line says so."""
    store = FileStore(tmp_path)
    saved(store, 9, 10)
    damage(next(tmp_path.rglob(f"10-*/{name}")))
    with caplog.at_level(logging.WARNING):
        assert latest(store).step == 9
    seen = name == "manifest.json" and not list(tmp_path.rglob("10-*/manifest.json"))
    assert len(caplog.records) == (0 if seen else 1)


@pytest.mark.parametrize(("said", "instead"), [('"step": 10', '"step": 60'), (STATE, "stale.json")])
def test_a_manifest_that_names_another_step_or_file_is_left_out(tmp_path, said, instead):
    """One flipped digit of the step would skip data and still pass every checksum."""
    store = FileStore(tmp_path)
    saved(store, 9, 10)
    manifest = next(tmp_path.rglob("10-*/manifest.json"))
    text = manifest.read_text()
    assert said in text
    manifest.write_text(text.replace(said, instead))

    assert latest(store).step == 9


def test_without_a_sound_checkpoint_the_stage_begins_anew(tmp_path):
    """No checkpoint, or none but damaged ones: there is nothing to restore."""
    assert latest(FileStore(tmp_path)) is None
    saved(FileStore(tmp_path), 1)
    flip(next(tmp_path.rglob(ARRAYS)))
    assert latest(FileStore(tmp_path)) is None


def test_the_newest_two_are_kept_while_running(tmp_path):
    """Steps count as numbers, not as text."""
    saved(FileStore(tmp_path), 9, 10, 11)
    assert folders(tmp_path) == [f"10-{'a' * 16}", f"11-{'a' * 16}"]


def test_a_damaged_checkpoint_is_deleted_by_the_next_save(tmp_path):
    """It does not count as one of the two that are kept, even if its step is the highest."""
    store = FileStore(tmp_path)
    saved(store, 9, 10)
    flip(next(tmp_path.rglob(f"10-*/{ARRAYS}")))
    second = Checkpoints(store, STAGE, "b" * 16)
    assert second.latest().step == 9
    second.save(make(10))
    second.wait()
    assert folders(tmp_path) == [f"10-{'b' * 16}", f"9-{'a' * 16}"]
    assert latest(store).step == 10


class Killed(Exception):
    """The process ends here."""


class Mortal(FileStore):
    """A store whose process dies at its n-th write or delete."""

    def __init__(self, root, writes):
        super().__init__(root)
        self.left = writes

    def _count(self):
        self.left -= 1
        if self.left < 0:
            raise Killed

    def sink(self, key):
        self._count()
        return super().sink(key)

    def put(self, key, data, **conditions):
        self._count()
        return super().put(key, data, **conditions)

    def delete(self, key):
        self._count()
        super().delete(key)


@pytest.mark.parametrize("writes", range(6))
def test_a_kill_at_any_write_leaves_a_checkpoint(tmp_path, writes):
    """Before the manifest the one before counts; after it, while pruning, the new one does."""
    saved(FileStore(tmp_path), 1, 2)
    dying = Checkpoints(Mortal(tmp_path, writes), STAGE, "b" * 16)
    dying.save(make(3))
    with pytest.raises(Killed):
        dying.wait()
    assert latest(FileStore(tmp_path)).step == (2 if writes < 3 else 3)


def test_pruning_leaves_nothing(tmp_path):
    """After the stage's commit its checkpoints go, with what killed writers left, and only they."""
    store = FileStore(tmp_path)
    saved(store, 1, 2)
    unfinished = store.sink(f"{checkpoints_folder(STAGE.kind, STAGE.digest)}/3-cc/{ARRAYS}")
    unfinished.write(b"half")
    other = Stage(kind=Kind.TRAIN, version=1, recipe={}, inputs=(), salt="x")
    saved(store, 1, stage=other)
    prune(store, STAGE)
    assert folders(tmp_path) == []
    assert Checkpoints(store, other, "b" * 16).latest().step == 1
    prune(store, STAGE)
    unfinished.abort()
