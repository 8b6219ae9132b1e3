"""A trainer that has its libraries loaded and forks for each attempt: seconds less a stage.

The other end is btx_trainer/fork_server.py; why, and where it is not used: docs/decisions/0026.
What it forks is a child of this process, as if started by Popen: Linux hands orphans to the
nearest ancestor that asks for them (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

COMMAND = (sys.executable, "-m", "btx_trainer.fork_server")
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""There is a driver, whose state does not survive a fork."""
ANSWER_SECONDS = 30.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class Forked:
    """As much of a Popen as the backend uses; its signals go to a process not yet reaped."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None  # type: int, int | None

    def terminate(self) -> None:
        """SIGTERM, unless it has been waited for."""
        if self.returncode is None:
            os.kill(self.pid, signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code; -n after signal n."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode


class ForkServer:
    """One server, started when it is first asked for. Without one, whoever asks uses Popen."""

    def __init__(self) -> None:
        self.usable = _libc is not None and not any(Path(path).exists() for path in GPUS)
        """False for good once it has failed."""
        self.ready = False
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def begin(self) -> socket.socket | None:
        """Starts it if need be; what becomes readable when `look` has news, None if nothing will.

        Its environment is what all attempts have in common.
        """
        if self._process or not self.usable or _libc is None:
            return None if self.ready else self._channel
        if _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            self.usable = False
            return None
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*COMMAND, str(theirs.fileno()), str(os.getpid())], pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                process_group=0, preexec_fn=die_with_parent,  # noqa: PLW1509 - the engine has one thread
            )  # fmt: skip
        self._channel.setblocking(False)
        return self._channel

    def look(self) -> None:
        """Whether it has loaded everything, or has ended instead."""
        if self._channel is None or self.ready:
            return
        try:
            self.ready = bool(self._channel.recv(16))
        except BlockingIOError:
            return
        except OSError:
            pass  # the same as its end
        if not self.ready:
            self.close()

    def fork(self, changes: Mapping[str, str], log: int) -> Forked | None:
        """An attempt's process, leader of its own group, its output in the file `log`.

        `changes` to the environment. None when there is no server that can.
        """
        if not self.ready or self._channel is None:
            return None
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with mine:
            mine.settimeout(ANSWER_SECONDS)
            with contextlib.suppress(OSError):
                with theirs:
                    message = json.dumps(dict(changes)).encode()
                    socket.send_fds(self._channel, [message], [log, theirs.fileno()])
                pid = int(mine.recv(16) or 0)
                # One that gets no word, because this took too long, ends without a deed.
                if pid and mine.send(b"go"):
                    return Forked(pid)
        self.close()
        return None

    def close(self) -> None:
        """Ends the server; what it has forked goes on."""
        self.usable = self.ready = False
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._channel = self._process = None


def die_with_parent() -> None:
    """In a child: an engine that is killed cannot clean up."""
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
