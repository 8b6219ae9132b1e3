"""One program of the cluster: started, stopped and started again with the same arguments."""

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Part:
    """A process with its log; the same command each time it is started."""

    name: str
    command: Sequence[str | Path]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; its log is appended to."""
        assert self.process is None, f"{self.name} runs already"
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the one who stops the parts in their order.
            self.process = subprocess.Popen(
                [os.fspath(word) for word in self.command],
                env=os.environ | self.environment, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def stop(self, *, kill: bool = False, patience: float = 5) -> None:
        """Ends it, if it runs: SIGTERM, and SIGKILL after `patience` seconds; or SIGKILL at once."""
        if self.process is None:
            return
        if not kill:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self.process.kill()
        self.process.wait()
        self.process = None

    def check(self) -> None:
        """Raises if it has ended by itself, with the end of its log."""
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else None
            lines = self.log.read_text(errors="replace").splitlines()[-15:]
            raise RuntimeError("\n".join([f"{self.name} ended ({code}); {self.log}:", *lines]))
