"""S3 as it is: every fault of the wire, lost answers, certificates, memory, what killed writers left."""

import os
import subprocess
import threading
import time
import tracemalloc

import pytest
from btx_api.artifact import Maker, attempt_folder
from btx_api.spec import Source, Storage
from btx_api.stage import Content, Exit, Kind, Location, Stage, Task, TaskExecution
from btx_trainer import s3, s3_parts
from btx_trainer.artifacts import Attempt, find
from btx_trainer.errors import CorruptInputError
from btx_trainer.fingerprint import fingerprint_sources, hashes
from btx_trainer.storage import Conflict, Damaged, FileStore, traffic
from builders import trials
from fault_proxy import ALL, Fault, Script, faulty
from s3_server import SECRET_KEY
from s3_stores import MIB, store_at, write
from tiny import ended, run_trainer, start_trainer

STAGE = Stage(kind=Kind.MIX, version=1, recipe={}, inputs=(Content(fingerprint="f"),))
pytestmark = pytest.mark.usefixtures("quick")


def commit(store, files, replaces=""):
    attempt = Attempt(store, STAGE, replaces=replaces)
    for name, data in files.items():
        with attempt.sink(name) as sink:
            for start in range(0, len(data), MIB):
                sink.write(data[start : start + MIB])
    made = attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
    return attempt, made


@pytest.mark.parametrize("fault", Fault)
def test_one_kind_of_fault_everywhere(s3_endpoint, prefix, fault, tmp_path):
    """Every request meets it up to three times; what is written, listed and read back is right."""
    files = {"big": os.urandom(17 * MIB + 3), "small": os.urandom(1000), "empty": b""}
    script = Script(rates={fault: 1.0}, pause=0.001)
    with faulty(s3_endpoint, script) as proxy:
        store = store_at(proxy.endpoint, prefix)
        attempt, made = commit(store, files)
        found = find(store, STAGE.kind, STAGE.digest)
        folder = found.fetch()
        read = {name: (folder / name).read_bytes() for name in files}
        listed = {head.key: head.size for head in store.list(made.key(""))}
        store.delete(made.key("small"))

    assert script.counts.keys() == {fault}
    assert made.token == found.token == attempt.token
    assert read == files
    assert listed == {made.key(name): len(data) for name, data in files.items()}
    plain = store_at(s3_endpoint, prefix)
    assert plain.head(made.key("small")) is None
    assert plain.read(made.key("big")) == files["big"]


@pytest.mark.parametrize("fault", [Fault.RESET_AFTER, Fault.LOST_WRITE])
@pytest.mark.parametrize("replacing", [False, True])
def test_a_commit_whose_answer_was_lost_is_ours(s3_endpoint, prefix, fault, replacing):
    """Each write is carried out and its answer lost three times: nothing of ours is discarded."""
    old = commit(store_at(s3_endpoint, prefix), {"a": b"1"})[1].tag if replacing else ""
    with faulty(s3_endpoint, Script(rates={fault: 1.0})) as proxy:
        store = store_at(proxy.endpoint, prefix)
        attempt, made = commit(store, {"a": b"2" * 20 * MIB}, replaces=old)

    assert made.token == attempt.token
    found = find(store_at(s3_endpoint, prefix), STAGE.kind, STAGE.digest, ignoring=old)
    assert (found.token, found.tag) == (made.token, made.tag)
    assert found.read("a") == b"2" * 20 * MIB


def test_a_conditional_put_that_was_lost_against_somebody_else(s3_endpoint, prefix):
    """Only equal bytes are taken for our own success."""
    store_at(s3_endpoint, prefix).put("key", b"theirs", if_none_match=True)
    with faulty(s3_endpoint, Script(rates={Fault.RESET_AFTER: 1.0})) as proxy:
        store = store_at(proxy.endpoint, prefix)
        with pytest.raises(Conflict):
            store.put("key", b"ours", if_none_match=True)


def test_a_body_that_breaks_off_goes_on_where_it_broke_off(s3_endpoint, prefix):
    """The next request asks for the rest, of the same version."""
    data = os.urandom(4 * MIB)
    write(store_at(s3_endpoint, prefix), "key", data)
    ranges = []
    with faulty(s3_endpoint, Script(rates={Fault.TRUNCATED: 1.0})) as proxy:
        proxy.watch(lambda request: ranges.append(request.ranged))
        with store_at(proxy.endpoint, prefix).open("key") as file:
            assert file.read() == data

    starts = [int(r.partition("=")[2].partition("-")[0]) for r in ranges if r]
    assert starts[0] == 0 and starts[1] >= MIB
    assert starts == sorted(starts), "nothing is read twice"


def test_bytes_that_are_wrong_at_rest_are_the_producers(s3_endpoint, prefix):
    """Read three times, then CorruptInput: whoever made it must make it again."""
    store = store_at(s3_endpoint, prefix)
    _, made = commit(store, {"a": b"x" * 1000})
    # As a disk would: the server knows no other checksum.
    store.client.put_object(**store.at(made.key("a")), Body=b"x" * 999 + b"y")
    with pytest.raises(CorruptInputError, match="CRC32C"):
        made.fetch()
    assert find(store, STAGE.kind, STAGE.digest) == made, "nothing but reading it tells"
    store.put(made.key("a"), b"x" * 999 + b"y")
    with pytest.raises(CorruptInputError, match="crc32c"):
        find(store, STAGE.kind, STAGE.digest)


def test_an_object_from_outside_is_checked_against_its_own_checksum(s3_endpoint, prefix):
    """Read as a whole, small or in ranges; without a checksum it is taken as it comes."""
    store = store_at(s3_endpoint, prefix)
    for size in (1000, 17 * MIB):
        write(store, "key", b"x" * size)
        script = Script(rates={Fault.FLIPPED_ANSWER: 1.0}, summed="")
        with (
            faulty(s3_endpoint, script) as proxy,
            store_at(proxy.endpoint, prefix).open("key") as file,
            pytest.raises(Damaged),
        ):
            file.read()
    assert store.get("key")[0] == b"x" * 17 * MIB


def test_a_storm_is_survived_and_a_lasting_one_is_one_line(s3_endpoint, prefix, monkeypatch):
    """Twelve attempts with pauses that grow; then the object, the answer and how often."""
    pauses = []
    monkeypatch.setattr(s3, "PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(s3, "LONGEST_PAUSE_SECONDS", 20.0)
    monkeypatch.setattr(s3, "sleep", pauses.append)
    script = Script(rates={Fault.SLOW_DOWN: 1.0})
    monkeypatch.setattr("fault_proxy.IN_A_ROW", 10**6)
    with faulty(s3_endpoint, script) as proxy, pytest.raises(OSError, match="SlowDown") as caught:
        store_at(proxy.endpoint, prefix).put("key", b"x")
    assert caught.value.filename == f"{prefix}/key"
    assert caught.value.strerror == "SlowDown (503); tried 12 times"
    assert len(pauses) == 11
    assert all(0 <= pause <= min(20, 0.1 * 2**n) for n, pause in enumerate(pauses, 1))


def test_memory_is_bounded_by_the_parts_in_flight(s3_endpoint, prefix):
    """100 MiB up and down with at most 4 + 1 parts of 5 MiB, and what is in the caller's hands."""
    store, size = store_at(s3_endpoint, prefix), 100 * MIB
    bound = (s3_parts.PARTS_IN_FLIGHT + 1) * s3_parts.PART_BYTES + 12 * MIB
    piece = os.urandom(MIB)
    tracemalloc.start()
    try:
        with store.sink("big") as sink:
            for _ in range(size // MIB):
                sink.write(piece)
        up = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        with store.open("big") as file:
            assert sum(len(p) for p in iter(lambda: file.read(MIB), b"")) == size
        down = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert max(up, down) < bound < size


def test_a_reader_that_jumps_reads_little_more_than_it_asks_for(s3_endpoint, prefix):
    """The footer of a Parquet file does not fetch the file."""
    data = os.urandom(60 * MIB)
    write(store_at(s3_endpoint, prefix), "big", data)
    asked = []
    with faulty(s3_endpoint) as proxy:
        proxy.watch(lambda request: asked.append(request.ranged))
        with store_at(proxy.endpoint, prefix).open("big") as file:
            for position in (50 * MIB, 3 * MIB, 30 * MIB):
                file.seek(position)
                assert file.read(1000) == data[position : position + 1000]

    bounds = [r.partition("=")[2].split("-") for r in asked if r]
    assert sum(int(last) - int(first) + 1 for first, last in bounds) <= 3 * 8 * MIB


def test_what_killed_writers_left_is_deleted_once_it_is_old(s3_endpoint, prefix, tmp_path):
    """Multipart uploads and partial files: old ones go, a live writer's stay and complete."""
    for store in (store_at(s3_endpoint, prefix), FileStore(tmp_path)):
        dead, live = store.sink("stages/mix/1/dead"), store.sink("stages/mix/1/live")
        for sink in (dead, live):
            sink.write(b"x" * 6 * MIB)
        elsewhere = store.sink("stages/mix/2/other")
        elsewhere.write(b"x" * 6 * MIB)
        if isinstance(store, FileStore):
            names = {path.name: path for path in tmp_path.rglob(".btx-*")}
            os.utime(names[dead._partial.name], (1, 1))
            os.utime(names[elsewhere._partial.name], (1, 1))
            assert store.delete_unfinished("stages/mix/1/", time.time() - 60) == 1
        else:
            for future in dead._pending:
                future.result()
            assert store.delete_unfinished("stages/mix/1/", time.time() - 60) == 0
            assert store.delete_unfinished("stages/mix/1/dead", time.time() + 60) == 1
            with pytest.raises(FileNotFoundError):
                dead.close()
        dead.abort()
        live.close()
        elsewhere.close()
        found = {head.key for head in store.list("")}
        assert {"stages/mix/1/live", "stages/mix/2/other"} <= found
        assert "stages/mix/1/dead" not in found


def test_an_upload_that_still_gets_parts_is_not_stale(s3_endpoint, prefix):
    """Begun long ago, alive a moment ago."""
    store = store_at(s3_endpoint, prefix)
    sink = store.sink("key")
    sink.write(b"x" * 6 * MIB)
    sink._pending[0].result()
    begun = time.time() + 1.0
    # The server tells whole seconds: wait until it counts as later.
    while time.time() < begun + 1.0:
        time.sleep(0.05)
    sink.write(b"x" * 5 * MIB)
    sink._pending[1].result()
    assert store.delete_unfinished("", begun) == 0
    sink.close()
    assert store.head("key").size == 11 * MIB


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """(CA certificate, server certificate, its key): ours for this session."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "rsa:2048", "-nodes", "-days", "2")
    openssl(
        "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    openssl("req", *key[:3], "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=s3")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\nauthorityKeyIdentifier=keyid\n")
    openssl(
        "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2",
        "-CAcreateserial", "-out", "server.crt", "-extfile", "names",
    )  # fmt: skip
    return tuple(str(folder / name) for name in ("ca.crt", "server.crt", "server.key"))


def test_the_ca_bundle_is_what_decides_whom_to_trust(s3_endpoint, prefix, authority, tmp_path):
    """With it TLS works, parts and all; without it, or with a missing file, one line says so."""
    ca, certificate, key = authority
    with faulty(s3_endpoint, tls=(certificate, key)) as proxy:
        store = store_at(proxy.endpoint, prefix, ca_bundle=ca)
        data = os.urandom(11 * MIB)
        write(store, "key", data)
        assert store.read("key") == data
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED") as caught:
            store_at(proxy.endpoint, prefix).get("key")
        assert caught.value.filename == f"{prefix}/key"
        assert "\n" not in caught.value.strerror
    with pytest.raises(FileNotFoundError, match=r"storage\.caBundle"):
        store_at(proxy.endpoint, prefix, ca_bundle=str(tmp_path / "nothing.crt"))


def test_credentials_and_region_come_from_the_client_s_chain(s3_endpoint, prefix, tmp_path):
    """Keys from a profile's file when the environment has none; no keys at all is one line."""
    (tmp_path / "credentials").write_text(
        f"[default]\naws_access_key_id = test\naws_secret_access_key = {SECRET_KEY}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "nothing"))
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "nothing"))
        with pytest.raises(OSError, match="Unable to locate credentials") as caught:
            store_at(s3_endpoint, prefix).get("key")
        assert caught.value.filename == f"{prefix}/key"
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        store_at(s3_endpoint, prefix).put("key", b"x")
    assert store_at(s3_endpoint, prefix).get("key")[0] == b"x"


def test_everything_at_once(s3_endpoint, prefix):
    """All kinds of faults, five artifacts of 17 MiB: each comes back right, each kind was there."""
    script = Script(rates=ALL, seed=7, pause=0.001)
    with faulty(s3_endpoint, script) as proxy:
        store = store_at(proxy.endpoint, prefix)
        for number in range(5):
            stage = Stage(kind=Kind.MIX, version=1, recipe={}, inputs=(), salt=str(number))
            attempt, data = Attempt(store, stage), os.urandom(17 * MIB)
            with attempt.sink("big") as sink:
                sink.write(data)
            attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
            for _ in range(3):
                found = find(store, stage.kind, stage.digest)
                assert found.token == attempt.token
                assert found.read("big") == data
    print(dict(script.counts))
    assert script.counts.keys() == set(Fault)


def test_bytes_on_their_way_are_progress(s3_endpoint, prefix, tmp_path):
    """Writing, reading and hashing large objects counts; a small object (the log) does not."""
    store = store_at(s3_endpoint, prefix)
    before = traffic.last
    store.put("small", b"x")
    store.get("small")
    assert traffic.last == before
    write(store, "big", b"x" * 6 * MIB)
    written = traffic.last
    assert written > before
    with store.open("big") as file:
        file.read()
    assert traffic.last > written
    (tmp_path / "file").write_bytes(b"x")
    hashed = traffic.last
    hashes([tmp_path / "file"])
    assert traffic.last > hashed


# Whole processes.


def prepare_task(storage, uri, salt="", **execution):
    """prepare of one source with the byte tokenizer; its content is what preflight saw."""
    source = Source(uri=uri)
    seen = fingerprint_sources([source], storage)
    stage = Stage(
        kind=Kind.PREPARE, version=1, recipe={"tokenizer": "bytes", "sources": [{}]},
        inputs=(Content(fingerprint=seen),), salt=salt,
    )  # fmt: skip
    where = TaskExecution(
        storage=storage, inputs=(Location(sources=(source,)),), run="test", name="p", **execution
    )
    return Task(stage=stage, execution=where)


def storage_at(endpoint, prefix):
    return Storage(uri=prefix, endpoint=endpoint, region="us-east-1", path_style=True)


def test_two_writers_of_one_digest_race(s3_endpoint, prefix):
    """Both trainers reach their commit before either is let through: one manifest, one winner."""
    store, count, both = store_at(s3_endpoint, prefix), trials(30), threading.Barrier(2)
    store.put("text.jsonl", b"".join(b'{"text": "document %d"}\n' % i for i in range(100)))
    tokens = []

    def hold(request):
        if request.method == "PUT" and request.path.endswith("/manifest.json"):
            both.wait(100)

    with faulty(s3_endpoint) as proxy:
        proxy.watch(before=hold)
        storage = storage_at(proxy.endpoint, prefix)
        for turn in range(count):
            task = prepare_task(storage, f"{prefix}/text.jsonl", str(turn))
            racers = [start_trainer(task) for _ in range(2)]
            done = [ended(racer) for racer in racers]
            found = find(store, Kind.PREPARE, task.stage.digest)
            found.verify()
            files = list(store.list(attempt_folder(Kind.PREPARE, task.stage.digest, "")))
            assert [end.code for end in done] == [Exit.OK] * 2, done
            assert sorted(end.result.reused for end in done) == [False, True]
            assert {end.result.token for end in done} == {found.token}
            assert {head.key for head in files} == {
                found.key(entry.name) for entry in found.manifest.files
            }
            tokens.append(found.token)
    assert len(set(tokens)) == count


def test_a_slow_transfer_is_no_stall(s3_endpoint, prefix):
    """One request of 10 s in a stage that may be silent for 8 s: bytes keep coming."""
    store = store_at(s3_endpoint, prefix)
    lines = (b'{"text": "%d %s"}\n' % (i, b"x" * 1000) for i in range(4000))
    store.put("text.jsonl", b"".join(lines))
    script = Script(rates={Fault.SLOW: 1.0}, pieces=34, pause=0.3)
    with faulty(s3_endpoint, script) as proxy:
        storage = storage_at(proxy.endpoint, prefix)
        task = prepare_task(storage, f"{prefix}/text.jsonl", no_progress_seconds=8)
        done = run_trainer(task)
    assert done.code == Exit.OK, done.err
    assert script.counts[Fault.SLOW]


def test_errors_of_the_environment_are_one_line(s3_endpoint, prefix, tmp_path):
    """A server that is gone, a folder that is a file: what and why, no traceback."""
    store_at(s3_endpoint, prefix).put("text.jsonl", b'{"text": "x"}')
    task = prepare_task(storage_at(s3_endpoint, prefix), f"{prefix}/text.jsonl")
    (tmp_path / "file").write_text("")

    def changed(**changes):
        return task.model_copy(update={"execution": task.execution.model_copy(update=changes)})

    rows = (
        (storage_at("http://127.0.0.1:9", prefix), "", prefix, "Could not connect"),
        (task.execution.storage, f"{tmp_path}/file/x", f"{tmp_path}/file", "Not a directory"),
    )
    for storage, scratch, place, message in rows:
        done = run_trainer(changed(storage=storage, scratch=scratch))
        assert done.code == Exit.FAILED
        assert done.result.problem.field.startswith(place)
        assert message in done.result.problem.message
        (line,) = [x for x in done.err.splitlines() if not x.startswith("imported:")]
        assert line.startswith(f"error: {place}") and message in line
