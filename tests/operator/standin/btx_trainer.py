"""Stands in for the trainer in tests of the command line: the same contract, no work.

`python -m btx_trainer` finds it when its folder is on PYTHONPATH. A stage commits a manifest of
its recipe; SCRIPT (JSON, {stage name: exit code, "hold" or "stubborn"}) makes it fail, wait for SIGTERM, or
not even listen to that.
"""

import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from btx_api.artifact import manifest_key
from btx_api.methods import graph
from btx_api.names import TASK_ENV
from btx_api.stage import Exit, Kind, Problem, Progress, Resolved, Result, Stage, Task


class ProgressPage(BaseHTTPRequestHandler):
    """Step 3 of 16."""

    def do_GET(self):
        """Whatever the path."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(
            Progress(step=3, steps=16, tokens=384, loss=2.5).model_dump_json().encode()
        )

    def log_message(self, *_):
        """Requests are no part of the log."""


def preflight(work, root):
    """Fingerprints made of names; a seed that is not there is a problem."""
    spec = work.spec
    seed = Path(spec.seed.uri.removeprefix("file://"))
    if not seed.exists():
        return Resolved(problems=(f"spec.seed.uri: no such folder: {seed}",))
    found = Resolved(
        seed="s" * 22,
        tokenizer="t" * 22,
        domains=tuple(f"{name:x<22}" for name in spec.domains()),
        tasks=tuple(f"{task.name:q<22}" for task in spec.evaluate.tasks),
    )
    stages = [node.stage for node in graph(spec, found, uid=work.uid).values()]
    done = [(root / manifest_key(stage.kind, stage.digest)).exists() for stage in stages]
    bits = sum(1 << i for i, complete in enumerate(done) if complete)
    return found.model_copy(update={"complete": f"{bits:x}"})


def run_stage(stage, execution, root):
    """What SCRIPT says, else a committed manifest."""
    path = root / manifest_key(stage.kind, stage.digest)
    if path.exists():
        return Exit.OK, Result(digest=stage.digest, token="0" * 16, reused=True)
    order = json.loads(os.environ.get("SCRIPT", "{}")).get(execution.name, Exit.OK)
    if order in ("hold", "stubborn"):
        host, _, port = execution.listen.rpartition(":")
        server = HTTPServer((host, int(port)), ProgressPage)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Path("held").open("w") as held:  # a named pipe: the test reads who holds
            held.write(f"{os.getpid()}\n")
        signal.sigwait({signal.SIGTERM} if order == "hold" else {signal.SIGUSR1})
        return Exit.PREEMPTED, Result(problem=Problem(message="stopped"))
    if order:
        return Exit(order), Result(problem=Problem(field=execution.name, message="as scripted"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stage.recipe))
    metrics = {"gain": 0.5} if stage.kind is Kind.TRAIN else {}
    return Exit.OK, Result(digest=stage.digest, token="0" * 16, tag="t", metrics=metrics)


def run_report(work):
    """A summary that names the runs."""
    folder = Path(work.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.txt").write_text(f"summary of {', '.join(r.name for r in work.runs)}\n")


def main():
    """Task -> Result, exit code."""
    text = os.environ[TASK_ENV]
    task = Task.parse(json.loads(Path(text[1:]).read_text() if text[0] == "@" else text))
    root = Path(task.execution.storage.uri.removeprefix("file://"))
    code, result = Exit.OK, Result()
    if isinstance(task.work, Stage):
        code, result = run_stage(task.work, task.execution, root)
    elif task.preflight:
        result = Result(resolved=preflight(task.preflight, root))
    elif task.report:
        run_report(task.report)
    Path(task.execution.result).write_text(result.line())
    return code


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    sys.exit(main())
