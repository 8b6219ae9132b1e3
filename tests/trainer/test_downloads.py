"""Copies of S3 objects to files: ranges side by side, whatever breaks on the way or at rest."""

import os
import threading
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import google_crc32c
import pytest
from btx_trainer import s3_parts
from btx_trainer.artifacts import side_by_side
from btx_trainer.s3_parts import joined
from btx_trainer.storage import Conflict, Damaged, extend_crc
from fault_proxy import Fault, Script, faulty
from hypothesis import given
from hypothesis import strategies as st
from s3_stores import MIB, store_at, write

pytestmark = pytest.mark.usefixtures("quick")


@given(parts=st.lists(st.binary(max_size=300), max_size=6))
def test_sums_of_parts_make_the_sum_of_the_whole(parts):
    """Both algorithms, beside libraries that sum up the bytes themselves."""
    whole = b"".join(parts)
    for algorithm, one, expected in (
        ("crc32c", google_crc32c.value, google_crc32c.value(whole)),
        ("crc32", zlib.crc32, zlib.crc32(whole)),
    ):
        crc = 0
        for part in parts:
            crc = joined(algorithm, crc, one(part), len(part))
        assert crc == expected


@pytest.mark.parametrize("size", [0, 1, 5 * MIB, 17 * MIB + 3])
def test_a_download_is_the_object(store, tmp_path, size):
    """On both storages: bytes, size and sum; what was there is replaced, folders are made."""
    data = os.urandom(size)
    write(store, "key", data)
    path = tmp_path / "a/b/file"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"longer than it" * 10)

    assert store.download("key", path) == (size, f"{extend_crc(0, data):08x}")
    assert path.read_bytes() == data
    with pytest.raises(FileNotFoundError):
        store.download("nothing", tmp_path / "c/file")


@pytest.mark.parametrize(
    "fault", [Fault.ERROR_500, Fault.SLOW_DOWN, Fault.RESET_AFTER, Fault.TRUNCATED, Fault.SLOW]
)
def test_ranges_that_break_off_go_on_where_they_did(s3_endpoint, prefix, tmp_path, fault):
    """Every range meets the fault up to three times; no byte that has arrived is asked for again."""
    data = os.urandom(17 * MIB + 3)
    write(store_at(s3_endpoint, prefix), "key", data)
    ranges = []
    with faulty(s3_endpoint, Script(rates={fault: 1.0}, pause=0.001)) as proxy:
        proxy.watch(lambda request: ranges.append(request.ranged))
        size, crc = store_at(proxy.endpoint, prefix).download("key", tmp_path / "file")

    assert proxy.script.counts[fault] >= 3
    assert (size, crc) == (len(data), f"{extend_crc(0, data):08x}")
    assert (tmp_path / "file").read_bytes() == data
    if fault is Fault.TRUNCATED:
        starts = [int(r.removeprefix("bytes=").split("-")[0]) for r in ranges if r]
        ends = Counter(int(r.partition("-")[2]) for r in ranges if r)
        assert len(ends) == 4, "a range keeps its end"
        assert len(set(starts)) > 4, "and goes on behind what has arrived"


def test_a_download_that_differs_from_the_checksum_at_rest_is_damaged(
    s3_endpoint, prefix, tmp_path
):
    """A flipped bit in any one of the ranges; it is the reader who repeats it."""
    write(store_at(s3_endpoint, prefix), "key", os.urandom(17 * MIB))
    with faulty(s3_endpoint, Script(rates={Fault.FLIPPED_ANSWER: 1.0}, summed="")) as proxy:
        store = store_at(proxy.endpoint, prefix)
        with pytest.raises(Damaged, match="arrived as crc32c"):
            store.download("key", tmp_path / "file")
        # The proxy flips at most twice: the next reading is whole.
        store.download("key", tmp_path / "file")


def test_an_object_that_changes_between_two_ranges(s3_endpoint, prefix, tmp_path):
    """A file is of one version, or it is Conflict."""
    plain = store_at(s3_endpoint, prefix)
    write(plain, "key", b"1" * 60 * MIB)
    seen = []

    def change(request):
        seen.append(request.ranged)
        if len([ranged for ranged in seen if ranged]) == 5:
            plain.put("key", b"2" * 60 * MIB)

    with faulty(s3_endpoint) as proxy:
        proxy.watch(change)
        with pytest.raises(Conflict):
            store_at(proxy.endpoint, prefix).download("key", tmp_path / "file")


def test_a_full_disk_names_the_file_and_ends_all_ranges(s3_endpoint, prefix):
    """The first error is what is raised; no thread goes on writing."""
    store = store_at(s3_endpoint, prefix)
    write(store, "key", os.urandom(60 * MIB))
    with pytest.raises(OSError, match="No space left") as caught:
        store.download("key", Path("/dev/full"))
    assert caught.value.filename == "/dev/full"
    # All threads of the pool are idle again: it takes a full set of tasks at once.
    gate = threading.Barrier(s3_parts.DOWNLOADS_IN_FLIGHT)
    waits = [store.downloads.submit(gate.wait, 30) for _ in range(gate.parties)]
    assert sorted(one.result() for one in waits) == list(range(gate.parties))


def test_memory_and_requests_do_not_grow_with_the_files(s3_endpoint, prefix, tmp_path):
    """Six files of 30 MiB at once: at most 8 ranges are under way, and a piece of each in memory."""
    write(store_at(s3_endpoint, prefix), "key", os.urandom(30 * MIB))
    lock, flying, most = threading.Lock(), 0, 0

    def begin(request):
        nonlocal flying, most
        with lock:
            flying += bool(request.ranged)
            most = max(most, flying)

    def end(request):
        nonlocal flying
        with lock:
            flying -= bool(request.ranged)

    # The proxy holds what it passes on, so memory is measured without it.
    with faulty(s3_endpoint) as proxy:
        proxy.watch(begin, end)
        store = store_at(proxy.endpoint, prefix)
        side_by_side(lambda name: store.download("key", tmp_path / name), "abcdef")
    store = store_at(s3_endpoint, prefix)
    tracemalloc.start()
    try:
        side_by_side(lambda name: store.download("key", tmp_path / name), "abcdef")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert 1 < most <= s3_parts.DOWNLOADS_IN_FLIGHT
    assert peak < s3_parts.DOWNLOADS_IN_FLIGHT * 2 * MIB
