"""What people see of runs: progress, dead experts, sizes of status, health and metrics."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from btx_api.metrics import ENGINE
from btx_api.stage import Kind, Progress
from cluster.operator_process import Operator
from cluster.space import Object, Space, row_of, running, scripted, version
from prometheus_client.parser import text_string_to_metric_families

PROGRESS_SECONDS = 2
"""The operator's setting in these tests."""


class Trainer:
    """The /progress of a trainer, on loopback."""

    def __init__(self, port: int) -> None:
        self.progress = Progress(kind=Kind.TRAIN, step=0, steps=100, eta_seconds=4200)
        self.asked = 0
        trainer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                trainer.asked += self.path == "/progress"
                body = trainer.progress.model_dump_json().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)

    def now(self, **fields: object) -> None:
        """What it answers from now on."""
        self.progress = self.progress.model_copy(update=fields)


@pytest.fixture
def trainer(trainer_port: int) -> Iterator[Trainer]:
    """A trainer that answers."""
    made = Trainer(trainer_port)
    made.thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    made.thread.join()


HERE = {"end": "told", "ip": "127.0.0.1"}


@pytest.mark.shows("progress", "progress-rate", "eta")
def test_progress_is_pulled_and_written_now_and_then(
    engine: Operator, space: Space, trainer: Trainer
) -> None:
    """Per cent and time of rank 0 of the slowest; at most one write in so many seconds."""
    space.run(execution=scripted(train={"stages": {"train-code": HERE}}))
    space.until_row("train-math", state="Complete")
    trainer.now(step=42)
    run = space.until(lambda run: run["status"].get("progress") == "42%")
    assert run["status"]["eta"] == "1h10m"
    trainer.now(step=99, eta_seconds=5.0)
    space.until(lambda run: run["status"].get("eta") == "5s")
    begin, asked = space.mark(), trainer.asked
    stop = threading.Event()
    steps = threading.Thread(target=advance, args=(trainer, stop))
    steps.start()
    writes = []
    began = time.monotonic()
    for _ in space.history():
        writes.append(time.monotonic())
        if writes[-1] - began > 4 * PROGRESS_SECONDS:
            break
    stop.set()
    steps.join()
    runs, _ = space.replay(begin)
    seen = [run["status"]["progress"] for run in runs if version(run) > int(begin)]
    space.release("train-code")
    done = space.succeeded()

    assert trainer.asked > asked
    assert 2 <= len(set(seen)) <= (writes[-1] - began) / PROGRESS_SECONDS + 2
    assert len(runs) <= (writes[-1] - began) / PROGRESS_SECONDS + 2
    assert ("progress" in done["status"], "eta" in done["status"]) == (False, False)


def advance(trainer: Trainer, stop: threading.Event) -> None:
    """A step ten times a second."""
    step = 0
    while not stop.wait(0.1):
        step += 1
        trainer.now(step=step % 100)


@pytest.mark.shows("dead-experts")
def test_dead_experts_are_told(engine: Operator, space: Space, trainer: Trainer) -> None:
    """Once when they die, once when they live again; in the row while they are dead."""
    trainer.now(kind=Kind.FINETUNE, expert_load=(0.5, 0.5, 0.0))
    space.run(execution=scripted(finetune=HERE))
    space.pod("finetune", running)
    trainer.now(dead_experts=("0.2", "1.2"))
    message = space.event("ExpertDead", "finetune")
    assert "2: 0.2, 1.2" in message
    assert space.until_row("finetune", deadExperts="2: 0.2, 1.2")["state"] == "Running"
    trainer.now(dead_experts=())
    space.event("ExpertAlive", "finetune: every expert gets tokens again")
    space.release("finetune")
    row = row_of(space.succeeded(), "finetune")
    assert "deadExperts" not in row
    assert row.get("failures", 0) == 0


@pytest.mark.shows("no-kill-without-progress")
def test_an_attempt_that_cannot_be_asked_runs_on(engine: Operator, space: Space) -> None:
    """Its address is not reachable: that is counted in a metric, and nothing else happens."""
    space.run(method="Dense", execution=scripted(train={"seconds": 6}))
    run = space.succeeded()
    row = row_of(run, "train-dense")
    assert (row["attempt"], row.get("failures", 0), len(space.pods("train-dense"))) == (1, 0, 1)
    assert values(engine)["btx_operator_progress_failures"] > 0


def values(engine: Operator) -> dict[str, float]:
    """The sum of every metric family's samples but creation times."""
    families = text_string_to_metric_families(engine.get("/metrics")[1])
    return {
        family.name: sum(s.value for s in family.samples if not s.name.endswith("_created"))
        for family in families
        if not family.name.endswith("_created")
    }


LONG_NAME = "expert-with-a-name-"


@pytest.mark.parametrize(("experts", "limit"), [(16, 10_000), (64, 32_000)])
@pytest.mark.shows("status-size", "status-rows")
def test_the_size_of_status(
    engine: Operator, space: Space, capsys: pytest.CaptureFixture[str], experts: int, limit: int
) -> None:
    """A row for each stage, within the promised size; the stored object's size is printed."""
    space.patience = 300  # 133 Jobs
    names = [f"x{i:02}-{LONG_NAME}"[:16].rstrip("-") for i in range(experts)]
    spec = [{"name": name, "tokens": 100, "data": [{"uri": f"file://{name}.jsonl"}]}
            for name in names]  # fmt: skip
    begin = space.mark()
    space.run(experts=spec, execution=scripted(mix={"end": "told"}))
    space.pod("mix", running)
    space.release("mix")
    run = space.succeeded()
    runs, _ = space.replay(begin)

    sizes = [len(compact(item.get("status", {}))) for item in runs]
    stored = [len(compact(item)) for item in runs]
    with capsys.disabled():
        print(f"\n{experts} experts: status {max(sizes)} B, the stored object {max(stored)} B")
    assert max(sizes) <= limit
    stages = [row["name"] for row in run["status"]["stages"]]
    assert len(stages) == len(set(stages)) == 2 * experts + 1 + 4
    assert run["status"]["experts"] == f"{experts}/{experts}"
    assert sorted(space.commits()) == sorted(stages)


def compact(item: Object) -> bytes:
    """As JSON without spaces."""
    return json.dumps(item, separators=(",", ":")).encode()


@pytest.mark.shows("metrics")
def test_the_metrics_are_those_of_the_table(engine: Operator, space: Space) -> None:
    """Names and labels of metrics.ENGINE and nothing else; they count what happened."""
    before = values(engine)
    space.run(method="Dense", execution=scripted(train={"attempts": [{"exit": 1}, {}]}))
    space.succeeded()
    text = engine.get("/metrics")[1]
    families = {f.name: f for f in text_string_to_metric_families(text)
                if not f.name.endswith("_created")}  # fmt: skip
    wanted = {metric.name.removesuffix("_total"): metric for metric in ENGINE.values()}
    after = values(engine)

    assert families.keys() == wanted.keys()
    for name, metric in wanted.items():
        extra = {"le"} if metric.type == "histogram" else set()
        for sample in families[name].samples:
            assert set(sample.labels) - extra == set(metric.labels), sample
    assert after["btx_attempts"] - before["btx_attempts"] >= 6
    failed = [s for s in families["btx_attempts"].samples
              if s.labels == {"kind": "train", "outcome": "Failed"} and s.name.endswith("_total")]  # fmt: skip
    assert failed[0].value >= 1
    assert after["btx_operator_status_bytes"] > 0
    assert engine.get("/healthz") == (200, "ok")
    assert engine.get("/readyz")[0] == 200
