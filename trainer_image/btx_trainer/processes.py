"""Processes of apart.py, one for each thread that asks. Called by stages/prepare.py.

They run on mimalloc where its library is installed, as it is in the trainer's image: a sixth faster
[measured]. The trainer itself does not: torch manages its memory by glibc's rules.
"""

import errno
import os
import platform
import subprocess
import sys
import threading
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from btx_trainer import apart
from btx_trainer.tokenizer import Ids, Lengths

_NO_THREADS = {"TOKENIZERS_PARALLELISM": "false"}
ALLOCATOR = "libmimalloc.so.2"
FOLDERS = ("/usr/local/lib", f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib")
_PIPE_BYTES = 2**20
"""The most that a user may ask of Linux: with its 64 KiB a chunk is many changes of process."""


def allocator() -> str:
    """Path of a faster malloc; empty where there is none."""
    paths = (os.path.join(folder, ALLOCATOR) for folder in FOLDERS)
    return next(filter(os.path.exists, paths), "")


class TokenizerProcesses:
    """A tokenizer.json's `encode`, faster than at home; a context that ends the processes.

    Each holds the tokenizer, some 100 MB for 128,000 tokens.
    """

    def __init__(self, path: Path, eos: int) -> None:
        module = [sys.executable, "-m", apart.__name__]
        self._path, self._command = str(path), [*module, str(path), str(eos)]
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "TokenizerProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._all:
            process.kill()
        for process in self._all:
            process.communicate()

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        """As Tokenizer.encode. OSError if the process has ended, as for want of memory."""
        process = self._process()
        assert process.stdin and process.stdout
        try:
            apart.send(process.stdin, (array("q", map(len, texts)), b"".join(texts)))
            lengths, ids = apart.receive(process.stdout, np.dtype(np.uint32).itemsize)
        except (BrokenPipeError, EOFError) as error:
            code = process.wait()
            message = f"a tokenizer process ended with {code}"
            raise OSError(errno.EIO, message, self._path) from error
        return np.frombuffer(ids, np.uint32), np.frombuffer(lengths, np.int64)

    def _process(self) -> subprocess.Popen[bytes]:
        found: subprocess.Popen[bytes] | None = getattr(self._mine, "process", None)
        if found is None:
            preloaded = ":".join(filter(None, (allocator(), os.environ.get("LD_PRELOAD"))))
            found = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=_PIPE_BYTES,
                env=os.environ | _NO_THREADS | {"LD_PRELOAD": preloaded},
            )  # fmt: skip
            self._mine.process = found
            self._all.append(found)
        return found
