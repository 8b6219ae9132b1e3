"""The trainer with its libraries loaded, forked for each task of a `btx run` (decision 0026).

argv: a socket (SOCK_SEQPACKET), and the process id of the engine. A message is a JSON object of
environment variables, with two descriptors: the attempt's log, and a socket on which the attempt
says its process id and waits for `go`. Nothing of a task is read before the fork.
"""

import gc
import importlib
import json
import os
import socket
import sys
import time

from btx_trainer.ranks import Place

STAGES = ("prepare", "train", "average", "mix", "finetune", "evaluate")
ONE_THREAD = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}  # fmt: skip
"""While libraries load: a second thread could hold a lock that nobody in an attempt lets go."""


def serve(channel: socket.socket, engine: int) -> None:
    """Returns in each attempt's process, ready for its task; ends when the engine is gone."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 65_536, 2)
        if not message:
            sys.exit()
        log, answer = descriptors
        first = os.fork()
        if not first:
            # The second one's parent is gone at once, so that it becomes the engine's.
            if os.fork():
                os._exit(0)
            channel.close()
            _become(json.loads(message), log, answer, engine)
            return
        os.close(log)
        os.close(answer)
        os.waitpid(first, 0)


def _become(changes: dict[str, str], log: int, answer: int, engine: int) -> None:
    """An attempt as Popen would have started it; ends if the engine does not want it any more."""
    os.setpgid(0, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    until = time.monotonic() + 10
    while os.getppid() != engine and time.monotonic() < until:
        time.sleep(0.001)
    Place(parent=engine).die_with_parent()
    with socket.socket(fileno=answer) as wanted:
        try:
            wanted.send(str(os.getpid()).encode())
            told = wanted.recv(16)
        except OSError:
            told = b""
    if not told:
        os._exit(1)
    os.environ.update(changes)
    torch = importlib.import_module("torch")
    # As OMP_NUM_THREADS would have done it; a stage that has its own number sets it later.
    torch.set_num_threads(int(changes["OMP_NUM_THREADS"]))


if __name__ == "__main__":
    os.environ.update(ONE_THREAD)
    trainer = importlib.import_module("btx_trainer.__main__")
    for name, value in trainer.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for stage in STAGES:
        importlib.import_module(f"btx_trainer.stages.{stage}")
    # What is there now stays; collecting it would copy its pages in each attempt.
    gc.freeze()
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.send(b"ready")
    serve(requests, int(sys.argv[2]))
    sys.exit(trainer.main())
