"""Upload and download through our storage beside s5cmd, on one real S3 server (SeaweedFS).

Both move the same files between a local folder (page cache warm) and a bucket on loopback. Ours is
what every stage does: `Store.sink` for each file that it writes, `Store.download` for those that it
needs, with a CRC32C of every byte, ours and the server's; s5cmd is told nothing but the number of
parts in flight and their size. Each is a process of its own; ours is timed from behind its imports
and the making of its client, which a stage does once. The server runs on the same cores and takes
most of them: the CPU seconds are the client's alone, per GiB.
"""

import filecmp
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import common

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from s3_server import BUCKET, serving

VOLUMES = 200

COPY = """
import json, os, sys, time
from pathlib import Path
import btx_trainer.s3
from btx_api.spec import Storage
from btx_trainer.artifacts import side_by_side
from btx_trainer.storage import open_store, READ_BYTES
way, folder, endpoint, *names = sys.argv[1:]
uri = "s3://btx/ours"
store = open_store(Storage(uri=uri, endpoint=endpoint, region="us-east-1", path_style=True))
wall, cpu = time.perf_counter(), time.process_time()
if way == "up":
    buffer = memoryview(bytearray(READ_BYTES))
    for name in names:
        with open(os.path.join(folder, name), "rb", buffering=0) as file, store.sink(name) as sink:
            while count := file.readinto(buffer):
                sink.write(buffer[:count])
else:
    side_by_side(lambda name: store.download(name, Path(folder, name)), names)
cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
print(json.dumps({"wall": wall, "cpu": cpu}))
"""


def write_files(folder: Path, count: int, size: int) -> list[str]:
    """Files of random bytes; their names."""
    folder.mkdir()
    with Path("/dev/urandom").open("rb") as source:
        for number in range(count):
            with (folder / f"{number}.bin").open("wb") as file:
                for start in range(0, size, 2**24):
                    file.write(source.read(min(2**24, size - start)))
    return [f"{number}.bin" for number in range(count)]


def contenders(
    way: str, folder: Path, endpoint: str, names: list[str]
) -> dict[str, Callable[[], common.Sample]]:
    """One transfer of all files by each; a download goes to a fresh folder every time."""
    source, target = folder / "files", folder / "copies"

    def fresh() -> Path:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        return source if way == "up" else target

    def ours() -> common.Sample:
        found = common.run([common.OURS, "-c", COPY, way, fresh(), endpoint, *names])
        if way == "down":
            same, *_ = filecmp.cmpfiles(source, target, names, shallow=False)
            assert same == names, "a download is not what was uploaded"
        return common.Sample(peak=found.peak, **found.values)

    found = {"ours": ours}
    if program := common.peer("s5cmd"):

        def peer() -> common.Sample:
            there = f"s3://{BUCKET}/peer/"
            paths = (f"{source}/", there) if way == "up" else (f"{there}*", f"{fresh()}/")
            return common.run([
                program, "--endpoint-url", endpoint, "cp", "--part-size", "32",
                "--concurrency", "4", *paths,
            ])  # fmt: skip

        found["s5cmd"] = peer
    return found


def main() -> None:
    """Upload, then download."""
    asked = common.options(__doc__ or "")
    count, size = (2, 2**22) if asked.tiny else (2, 2**28)
    times = asked.rounds or (1 if asked.tiny else 5)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch), VOLUMES) as endpoint:
        folder = Path(scratch)
        names = write_files(folder / "files", count, size)
        gib = count * size / 2**30
        for way, name in (("up", "upload"), ("down", "download")):
            samples = common.rounds(times, contenders(way, folder, endpoint, names))
            peers = samples.get("s5cmd", [])
            what = f"{name} of {count} x {size >> 20} MiB"
            rows += [
                common.row(
                    f"s3, {what}", [gib / s.wall for s in samples["ours"]],
                    [gib / s.wall for s in peers], peer_name="s5cmd", unit="GiB/s", goal=">= 0.9",
                ),
                common.row(
                    f"s3, {what}: the client's CPU", [s.cpu / gib for s in samples["ours"]],
                    [s.cpu / gib for s in peers], peer_name="s5cmd", unit="s/GiB",
                ),
            ]  # fmt: skip
    common.finish("s3", rows, tiny=asked.tiny, packages=("boto3", "s5cmd", "google-crc32c"))


if __name__ == "__main__":
    main()
