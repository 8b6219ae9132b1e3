"""`make cluster`: a cluster that runs until Ctrl-C, and a kubeconfig for it."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from cluster.control_plane import control_plane
from cluster.hollow_node import hollow_node
from cluster.node import real_cluster


def stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM and SIGHUP stop it as Ctrl-C does."""
    raise KeyboardInterrupt


def main(folder: Path) -> None:
    """Starts everything that this user may start; stops it in the right order."""
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    begun = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            cluster = stack.enter_context(real_cluster(folder))
        else:
            print("not root: no kubelet, no containers; a hollow node plays the pods", flush=True)
            cluster = stack.enter_context(control_plane(folder))
            stack.enter_context(hollow_node(cluster))
        print(f"ready after {time.monotonic() - begun:.0f} s; Ctrl-C stops it\n", flush=True)
        print(f"export KUBECONFIG={cluster.kubeconfig}", flush=True)
        signal.pause()


if __name__ == "__main__":
    main(Path(*sys.argv[1:2] or ["build/cluster/run"]))
