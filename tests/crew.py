"""Several ranks of one stage as real processes over gloo, without a launcher and in moments.

They are forked from a server process that has imported torch and transformers once.
"""

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from btx_trainer.ranks import Place


class Failed(Exception):
    """What a rank raised, in words."""


PRELOAD = ["torch", "transformers", "btx_trainer.loop", "btx_trainer.stages.finetune", "training"]


def together(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(ranks, *args)` on so many connected ranks; what each gave, by rank.

    An exception is part of the answer, as Failed, not raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    meeting = Path(tempfile.mkdtemp()) / "meeting"
    started = []
    for rank in range(world):
        place = Place(rank=rank, world=world, local=rank, meeting=f"file://{meeting}", parent=1)
        answer, ask = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(ask, place, function, args))
        process.start()
        ask.close()
        started.append((process, answer))
    try:
        return [answer.recv() for _, answer in started]
    finally:
        for process, _ in started:
            process.kill()
            process.join()


def _rank(ask: Connection, place: Place, function: Callable[..., Any], args: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        import torch
        from btx_trainer.distributed import connect

        torch.set_num_threads(1)
        ranks = connect(place, 60)
        ask.send(function(ranks, *args))
    except Exception as error:
        traceback.print_exc()
        ask.send(Failed(str(error)))
    # Until it is killed: the others may still be talking.
    signal.pause()
