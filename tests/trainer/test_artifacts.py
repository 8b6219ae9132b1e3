"""The commit protocol, verified reading, and inputs from outside."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from btx_api.artifact import Maker, Manifest, Parent, attempt_folder, manifest_key
from btx_api.spec import Source, Storage
from btx_api.stage import Content, Kind, Location, Stage
from btx_trainer.artifacts import Artifact, Attempt, Outside, find
from btx_trainer.errors import ConfigurationError, CorruptInputError
from btx_trainer.fingerprint import (
    fingerprint_model,
    fingerprint_sources,
    fingerprint_tokenizer,
    hashes,
)
from btx_trainer.storage import open_store
from builders import trials


def a_stage(salt: str = "") -> Stage:
    return Stage(
        kind=Kind.MIX, version=1, recipe={"topK": 2}, inputs=(Content(fingerprint="f"),), salt=salt
    )


STAGE = a_stage()
FILES = {"config.json": b"{}", "weights/model.safetensors": bytes(range(256)) * 9000}


def commit(store, *, stage=STAGE, replaces="", files=None) -> Artifact:
    attempt = Attempt(store, stage, replaces=replaces)
    for name, data in (FILES if files is None else files).items():
        attempt.put(name, data)
    return attempt.commit(metrics={"gain": 0.5}, deviations=(), maker=Maker(run="r"), parents=())


def look(store, ignoring="") -> Artifact | None:
    return find(store, STAGE.kind, STAGE.digest, ignoring=ignoring)


def test_a_committed_artifact_is_found_with_all_its_bytes(store, tmp_path):
    """What commit returns is what find returns, and fetch gives every file."""
    (tmp_path / "local").write_bytes(b"from a file")
    attempt = Attempt(store, STAGE)
    for name, data in FILES.items():
        attempt.put(name, data)
    attempt.add(tmp_path / "local", "added.txt")
    parent = Parent(fingerprint="f", uri="file://x")
    made = attempt.commit(
        metrics={"gain": 0.5}, deviations=("rolled back",), maker=Maker(run="r"), parents=[parent]
    )
    found = look(store)

    assert found == made
    assert found.token == attempt.token
    assert (found.manifest.deviations, found.manifest.parents) == (("rolled back",), (parent,))
    assert found.manifest.stage.digest == STAGE.digest
    assert found.read("config.json") == b"{}"
    folder = found.fetch()
    expected = {**FILES, "added.txt": b"from a file"}
    assert {name: (folder / name).read_bytes() for name in expected} == expected
    assert store.get(manifest_key(STAGE.kind, STAGE.digest))[1] == found.tag


def test_nothing_is_found_before_the_commit(store):
    """Files without a manifest are no artifact."""
    Attempt(store, STAGE).put("config.json", b"{}")

    assert look(store) is None


def test_who_comes_second_adopts_the_winner_and_cleans_up(store):
    """The second commit returns the first one's artifact; its own files are gone."""
    first = commit(store)
    second = commit(store, files={"config.json": b"other"})

    assert second == first
    assert first.read("config.json") == b"{}"
    folders = {head.key.split("/")[4] for head in store.list("stages/") if "attempts" in head.key}
    assert folders == {first.token}


RACER = """
import json, sys
from btx_api.artifact import Maker
from btx_api.spec import Storage
from btx_api.stage import Stage
from btx_trainer.artifacts import Attempt
from btx_trainer.storage import open_store
store = open_store(Storage.parse(json.loads(sys.argv[1])))
for line in sys.stdin:
    task = json.loads(line)
    attempt = Attempt(store, Stage.parse(task["stage"]), replaces=task["replaces"])
    attempt.put("owner.txt", attempt.token.encode())
    print("ready", flush=True)
    sys.stdin.readline()
    made = attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
    print(json.dumps([attempt.token, made.token, made.tag]), flush=True)
"""


@pytest.mark.parametrize("replacing", [False, True])
def test_two_processes_commit_one_artifact(storage, store, replacing):
    """Races for one address: one manifest, both processes name it, its bytes are the winner's.

    Of a first artifact, and of one that replaces a corrupt one.
    """
    command = [sys.executable, "-c", RACER, json.dumps(storage.plain())]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wins, races = [], trials(30, few=8)
    for turn in range(races):
        stage = a_stage(str(turn))
        replaces = commit(store, stage=stage).tag if replacing else ""
        for racer in racers:
            print(json.dumps({"stage": stage.plain(), "replaces": replaces}), file=racer.stdin)
            racer.stdin.flush()
        assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
        for racer in racers:
            print("go", file=racer.stdin, flush=True)
        answers = [json.loads(racer.stdout.readline()) for racer in racers]
        found = find(store, stage.kind, stage.digest, ignoring=replaces)
        assert [answer[1:] for answer in answers] == [[found.token, found.tag]] * 2
        assert found.read("owner.txt").decode() == found.token
        folder = attempt_folder(Kind.MIX, stage.digest, "")
        # Of a corrupt artifact that was replaced, the files stay for who still reads them.
        left = {head.key.split("/")[4] for head in store.list(folder)}
        assert not left & {own for own, *_ in answers if own != found.token}
        wins += [own == found.token for own, *_ in answers]
    for racer in racers:
        racer.stdin.close()
        assert racer.wait() == 0
        racer.stdout.close()

    assert sum(wins) == races


def test_replaces_ignores_that_manifest_and_no_other(store):
    """A manifest with the tag is replaced, any other adopted; one that is gone is written anew."""
    bad = commit(store)
    assert look(store, ignoring=bad.tag) is None
    good = commit(store, replaces=bad.tag, files={"config.json": b"repaired"})
    assert good.tag != bad.tag
    assert look(store) == good
    assert commit(store, replaces=bad.tag, files={"config.json": b"late"}) == good
    store.delete(manifest_key(STAGE.kind, STAGE.digest))
    again = commit(store, replaces=good.tag, files={"config.json": b"again"})
    assert look(store) == again


def test_killed_before_the_manifest(storage, store):
    """SIGKILL between files and manifest leaves nothing that a later run accepts."""
    script = RACER.replace('print("ready", flush=True)', "import os; os.kill(os.getpid(), 9)")
    task = json.dumps({"stage": STAGE.plain(), "replaces": ""})
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(storage.plain())],
        input=task + "\n", text=True, check=False,
    )  # fmt: skip

    assert done.returncode == -9
    assert any("/attempts/" in head.key for head in store.list("stages/"))
    assert look(store) is None
    assert commit(store).read("config.json") == b"{}"


def flipped(data: bytes) -> bytes:
    return data[:100] + bytes([data[100] ^ 1]) + data[101:]


DAMAGE = {
    "a flipped bit": (flipped, "CRC32C"),
    "a cut file": (lambda data: data[:-1], "bytes, was committed with"),
    "a longer file": (lambda data: data + b"x", "bytes, was committed with"),
    "no file": (None, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", ["fetch", "verify", "read"])
def test_damage_is_found_by_whoever_reads(store, damage, reader):
    """Every way of reading names kind, digest and tag of an artifact whose file is not whole."""
    made = commit(store)
    name = "weights/model.safetensors"
    change, message = DAMAGE[damage]
    if change is None:
        store.delete(made.key(name))
    else:
        store.put(made.key(name), change(FILES[name]))
    with pytest.raises(CorruptInputError, match=message) as caught:
        made.read(name) if reader == "read" else getattr(made, reader)()

    corrupt = caught.value.corrupt
    assert (corrupt.kind, corrupt.digest, corrupt.tag) == (Kind.MIX, STAGE.digest, made.tag)
    assert caught.value.problem.field == f"stages/mix/{STAGE.digest}"
    if damage != "a flipped bit":
        with pytest.raises(CorruptInputError, match=message):
            look(store)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"digest": 1}', "null"])
def test_a_manifest_that_cannot_be_read(store, text):
    """A broken manifest names its own tag, so that it can be replaced."""
    tag = store.put(manifest_key(STAGE.kind, STAGE.digest), text.encode())
    with pytest.raises(CorruptInputError, match="manifest") as caught:
        look(store)

    assert caught.value.corrupt.tag == tag
    assert commit(store, replaces=tag) == look(store)


def test_a_manifest_that_is_not_this_stages(store):
    """A copied manifest, or one whose files leave its folder, is corrupt."""
    made = commit(store)
    key = manifest_key(STAGE.kind, STAGE.digest)
    plain = json.loads(store.get(key)[0])
    for change in ({"digest": "0" * 32}, {"files": [{**plain["files"][0], "name": "../../x"}]}):
        store.put(key, json.dumps({**plain, **change}).encode())
        with pytest.raises(CorruptInputError):
            look(store)
    assert made.manifest == Manifest.parse(plain)


def test_a_later_releases_manifest_is_left_alone(store):
    """A schema version from the future is a configuration problem, never a corrupt input."""
    store.put(manifest_key(STAGE.kind, STAGE.digest), b'{"schemaVersion": 2, "shape": "new"}')

    with pytest.raises(ConfigurationError, match="later release"):
        look(store)


# Inputs from outside.


def outside(uri="", sources=(), *, fingerprint, storage, tokenizer=False) -> Outside:
    return Outside(
        location=Location(uri=uri, sources=tuple(Source(uri=s) for s in sources)),
        fingerprint=fingerprint, storage=storage, tokenizer=tokenizer,
    )  # fmt: skip


def test_a_model_from_outside_must_be_what_preflight_saw(storage, store):
    """A changed weight, config or tokenizer is refused; other files of the folder do not count."""
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        store.put(f"model/{name}", name.encode())
    seen = fingerprint_model(store, "model")
    store.put("model/README.md", b"not part of it")
    uri = f"{storage.uri}/model"
    given = outside(uri, fingerprint=seen, storage=storage)
    folder = given.fetch()
    assert (folder / "model.safetensors").read_bytes() == b"model.safetensors"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        store.put(f"model/{name}", b"other")
        with pytest.raises(ConfigurationError, match="input changed since preflight"):
            outside(uri, fingerprint=seen, storage=storage).fetch()
        with pytest.raises(ConfigurationError, match="input changed since preflight"):
            given.check()
        store.put(f"model/{name}", name.encode())
    given.check()


def test_a_tokenizer_from_outside(storage, store):
    """It arrives as tokenizer.json, from a folder or under another name, if it has not changed."""
    store.put("model/tokenizer.json", b"{}")
    store.put("mine.json", b"{}")
    for uri in (f"{storage.uri}/model", f"{storage.uri}/mine.json"):
        seen = fingerprint_tokenizer(b"{}")
        given = outside(uri, fingerprint=seen, storage=storage, tokenizer=True)
        assert (given.fetch() / "tokenizer.json").read_bytes() == b"{}"
    store.put("model/tokenizer.json", b"[]")
    with pytest.raises(ConfigurationError, match="changed since preflight"):
        outside(f"{storage.uri}/model", fingerprint=seen, storage=storage, tokenizer=True).fetch()


def test_the_fingerprint_of_a_domain(storage, store):
    """Content, ending and order of the files count; their names and the store do not."""
    for name, data in (("a.txt", b"first"), ("b.txt", b"second")):
        store.put(f"data/{name}", data)
    source = Source(uri=f"{storage.uri}/data/")
    seen = fingerprint_sources([source], storage)
    assert len(seen) == 22
    given = outside(sources=[source.uri], fingerprint=seen, storage=storage)
    given.check()

    def rewrite(files):
        for head in list(store.list("data/")):
            store.delete(head.key)
        for name, data in files.items():
            store.put(f"data/{name}", data)
        return fingerprint_sources([source], storage)

    assert rewrite({"x.txt": b"first", "y.txt": b"second"}) == seen
    given.check()
    others = [
        {"x.txt": b"first"},
        {"x.txt": b"second", "y.txt": b"first"},
        {"x.txt": b"first", "y.jsonl": b"second"},
        {"x.txt": b"first", "y.txt": b"secund"},
    ]
    assert len({seen, *map(rewrite, others)}) == 5
    with pytest.raises(ConfigurationError, match="changed since preflight"):
        given.check()


def test_hashes_are_kept_until_the_file_changes(tmp_path: Path, monkeypatch):
    """An old file is hashed once; another mtime, size or inode hashes again; a young one always."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "file"
    old = 1_600_000_000_000_000_000

    def write(data: bytes, mtime: int | None = old) -> str:
        path.write_bytes(data)
        if mtime:
            os.utime(path, ns=(mtime, mtime))
        return hashes([path])[0]

    first = write(b"one")
    assert write(b"two") == first  # same size, mtime and inode: this is the cache
    assert write(b"two", old + 1) != first
    assert write(b"three") != first
    young = write(b"one", None)
    assert young == first
    times = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert hashes([path])[0] != young


def test_hashes_without_a_cache(tmp_path: Path, monkeypatch):
    """Where the cache cannot be, hashing works all the same."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"")

    assert hashes([tmp_path / "file"])[0].startswith("e3b0c44298fc1c14")


def test_the_fingerprint_is_what_the_contract_says(tmp_path: Path):
    """It is part of every digest: 22 characters of sha256 over `ending sha256` per file."""
    store = open_store(Storage(uri=f"file://{tmp_path}"))
    store.put("a.txt", b"text")
    source = Source(uri=f"file://{tmp_path}/a.txt")

    def short(text: str) -> str:
        return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())[:22].decode()

    expected = short(short(f".txt {hashlib.sha256(b'text').hexdigest()}"))
    assert fingerprint_sources([source], Storage(uri="file://x")) == expected
