"""Stands in for the trainer where a test needs scripted failures: ends when and how it is told.

Run as `python stand_in.py FOLDER`. It reads the Task as the trainer does, waits for one line of
JSON {"exit": n, "result": {...} or null} in the FIFO `<folder>/<run>.<name>-<attempt>`, writes the
Result and exits with n; at SIGTERM with 75 at once, or never if the task's run is named `deaf`.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path


def main() -> None:
    """See above."""
    value = os.environ["BTX_TASK"]
    text = Path(value[1:]).read_text() if value.startswith("@") else value
    execution = json.loads(text)["execution"]
    deaf = execution["run"] == "deaf"
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: os._exit(75))
    fifo = fifo_of(
        Path(sys.argv[1]), execution["run"], execution["name"], execution.get("attempt", 1)
    )
    print(f"waiting for {fifo.name}", flush=True)
    with fifo.open() as told:
        answer = json.loads(told.readline())
    if answer["result"] is not None:
        path = Path(execution["result"])
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(answer["result"]))
        temporary.replace(path)
    os._exit(answer["exit"])


def fifo_of(folder: Path, run: str, name: str, attempt: int) -> Path:
    """Made by whoever comes first."""
    path = folder / f"{run}.{name}-{attempt}"
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path)
    return path


if __name__ == "__main__":
    main()
