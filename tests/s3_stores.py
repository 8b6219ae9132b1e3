"""Stores over an S3 server of a test's choice, with what the tests of its faults need."""

from typing import Any

from btx_api.spec import Storage
from btx_trainer.storage import Store, open_store

MIB = 2**20


def store_at(endpoint: str, prefix: str, **options: Any) -> Store:
    """A store at an address: the server's own, or a proxy's."""
    return open_store(
        Storage(uri=prefix, endpoint=endpoint, region="us-east-1", path_style=True, **options)
    )


def write(store: Store, key: str, data: bytes) -> None:
    """One object, a MiB at a time."""
    with store.sink(key) as sink:
        for start in range(0, len(data), MIB):
            sink.write(data[start : start + MIB])
