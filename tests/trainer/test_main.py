"""The entry: real trainer processes from Task to Result and exit code."""

import errno
import json
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from btx_api.artifact import log_key, manifest_key
from btx_api.metrics import ENGINE, TRAINER, MetricType
from btx_api.spec import Source, Storage
from btx_api.stage import (
    RECIPES,
    Content,
    Exit,
    Export,
    Kind,
    Location,
    Output,
    Progress,
    Result,
    Stage,
    Task,
    TaskExecution,
)
from btx_trainer.__main__ import _outcome
from btx_trainer.artifacts import Attempt, Outside, find
from btx_trainer.errors import CorruptInputError, PreemptedError
from btx_trainer.fingerprint import fingerprint_model, fingerprint_sources
from btx_trainer.stages import mix
from btx_trainer.storage import Store, open_outside, open_store
from btx_trainer.telemetry import Telemetry, line
from btx_trainer.work import Work
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file
from tiny import ended, run_trainer, start_trainer, write_llama


def mix_task(folder: Path, storage: Storage, **execution) -> Task:
    """mix of a seed and one expert, both ready models."""
    inputs, locations = [], []
    for number in range(2):
        model = folder / f"model-{number}"
        if not model.exists():
            write_llama(model, number)
        uri = f"file://{model}"
        seen = fingerprint_model(*open_outside(uri, storage))
        inputs.append(Content(fingerprint=seen))
        locations.append(Location(uri=uri))
    stage = Stage(kind=Kind.MIX, version=1, recipe={"topK": 2}, inputs=tuple(inputs))
    return Task(
        stage=stage,
        execution=TaskExecution(
            storage=storage, inputs=tuple(locations), run="test", name="mix", uid="u",
            scratch=str(folder / "scratch"), **execution,
        ),
    )  # fmt: skip


def prepare_task(folder: Path, storage: Storage, uri: str = "", **execution) -> Task:
    """prepare of a hundred documents with the byte tokenizer."""
    lines = [json.dumps({"text": f"Document {number}."}) for number in range(100)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    source = Source(uri=uri or f"file://{folder}/text.jsonl")
    seen = "f" * 22 if uri else fingerprint_sources([source], storage)
    recipe = {"tokenizer": "bytes", "sources": [{}]}
    inputs = (Content(fingerprint=seen),)
    return Task(
        stage=Stage(kind=Kind.PREPARE, version=1, recipe=recipe, inputs=inputs),
        execution=TaskExecution(
            storage=storage, inputs=(Location(sources=(source,)),), run="test", name="prepare",
            scratch=str(folder / "scratch"), **execution,
        ),
    )  # fmt: skip


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return Storage(uri=f"file://{tmp_path}/storage")


def test_a_stage_runs_once(storage, tmp_path):
    """The first process makes the artifact; the second finds it, and neither needs torch."""
    result_file = tmp_path / "result.json"
    task = mix_task(tmp_path, storage, result=str(result_file))
    first = run_trainer(task)
    assert (first.code, first.imported) == (Exit.OK, []), first.err
    assert Result.parse(json.loads(result_file.read_text())) == first.result
    store = open_store(storage)
    found = find(store, Kind.MIX, task.stage.digest)
    assert (first.result.token, first.result.tag) == (found.token, found.tag)
    assert first.result.reused is False
    names = {entry.name for entry in found.manifest.files}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert [parent.uri for parent in found.manifest.parents] == [
        location.uri for location in task.execution.inputs
    ]
    maker = found.manifest.maker
    assert (maker.run, maker.uid, maker.attempt) == ("test", "u", 1)
    assert "numpy" in maker.libraries and "torch" not in maker.libraries

    second = run_trainer(task)
    assert (second.code, second.imported) == (Exit.OK, [])
    expected = first.result.model_copy(update={"reused": True, "seconds": second.result.seconds})
    assert second.result == expected
    assert list((tmp_path / "scratch").iterdir()) == []


def test_prepare_and_average_need_no_torch(local, tmp_path):
    """Stages of the CPU start without torch."""
    prepared = run_trainer(prepare_task(tmp_path, local))
    assert (prepared.code, prepared.imported) == (Exit.OK, []), prepared.err
    task = mix_task(tmp_path, local)
    average = Stage(kind=Kind.AVERAGE, version=1, recipe={}, inputs=task.stage.inputs)
    averaged = run_trainer(task.model_copy(update={"stage": average}))
    assert (averaged.code, averaged.imported) == (Exit.OK, []), averaged.err


def test_must_exist_never_computes(local, tmp_path):
    """mustExist exits Missing where there is nothing, and gives the Result where there is."""
    asked = mix_task(tmp_path, local, must_exist=True)
    missing = run_trainer(asked)
    assert missing.code == Exit.MISSING
    assert missing.result.problem.field == f"stages/mix/{asked.stage.digest}"
    made = run_trainer(mix_task(tmp_path, local))
    found = run_trainer(asked)
    assert (found.code, found.result.token) == (Exit.OK, made.result.token)


def test_replaces_makes_the_artifact_again(local, tmp_path):
    """A task that replaces a tag computes and commits another attempt under the same digest."""
    first = run_trainer(mix_task(tmp_path, local)).result
    second = run_trainer(mix_task(tmp_path, local, replaces=first.tag)).result
    assert (second.digest, second.reused) == (first.digest, False)
    assert second.token != first.token
    late = run_trainer(mix_task(tmp_path, local, replaces=first.tag)).result
    assert (late.token, late.reused) == (second.token, True)


@pytest.mark.parametrize("damage", ["manifest", "file"])
def test_an_artifact_that_nobody_can_use_is_made_again(local, tmp_path, damage):
    """Its own stage replaces an unreadable manifest, or one whose files are cut short."""
    task = mix_task(tmp_path, local)
    first = run_trainer(task).result
    store = open_store(local)
    key = manifest_key(Kind.MIX, task.stage.digest)
    if damage == "file":
        key = find(store, Kind.MIX, task.stage.digest).key("model.safetensors")
    store.put(key, store.read(key)[:-1])
    second = run_trainer(task)

    assert (second.code, second.result.reused) == (Exit.OK, False), second.err
    assert second.result.token != first.token
    found = find(store, Kind.MIX, task.stage.digest)
    assert found.token == second.result.token
    found.verify()


def with_input(task: Task, digest: str) -> Task:
    """The same mix, whose expert is the output of an average stage."""
    old, execution = task.stage, task.execution
    inputs = (old.inputs[0], Output(digest=digest))
    stage = Stage(kind=old.kind, version=1, recipe=old.recipe, inputs=inputs)
    locations = (execution.inputs[0], Location(kind=Kind.AVERAGE))
    changed = execution.model_copy(update={"inputs": locations})
    return Task(stage=stage, execution=changed)


def test_a_corrupt_input_is_named(local, tmp_path):
    """One flipped byte of an input: exit Corrupt, and the Result says which copy of what."""
    both = mix_task(tmp_path, local)
    average = Stage(kind=Kind.AVERAGE, version=1, recipe={}, inputs=both.stage.inputs)
    made = run_trainer(both.model_copy(update={"stage": average})).result
    task = with_input(both, made.digest)
    store = open_store(local)
    key = find(store, Kind.AVERAGE, made.digest).key("model.safetensors")
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    bad = run_trainer(task)

    assert bad.code == Exit.CORRUPT
    corrupt = bad.result.corrupt
    assert (corrupt.kind, corrupt.digest, corrupt.tag) == (Kind.AVERAGE, made.digest, made.tag)
    assert "Traceback" not in bad.err
    assert find(store, Kind.MIX, task.stage.digest) is None
    assert [h.key for h in store.list(f"stages/mix/{task.stage.digest}/attempts")] == []


def test_an_input_that_is_gone_is_corrupt_without_a_tag(local, tmp_path):
    """The engine then has its producer run again."""
    missing = run_trainer(with_input(mix_task(tmp_path, local), "0" * 32))

    assert missing.code == Exit.CORRUPT
    assert (missing.result.corrupt.digest, missing.result.corrupt.tag) == ("0" * 32, "")


def test_an_input_that_changed_is_refused(local, tmp_path):
    """Other bytes than preflight saw: exit Configuration, naming the input."""
    task = mix_task(tmp_path, local)
    write_llama(tmp_path / "model-1", 7)
    changed = run_trainer(task)

    assert changed.code == Exit.CONFIGURATION
    assert changed.result.problem.field == task.execution.inputs[1].uri
    assert changed.result.problem.message == "input changed since preflight"


def plain(**changes) -> dict:
    execution = {"storage": {"uri": "file:///nowhere/storage"}}
    return {"gc": {"keepDays": 1}, "execution": execution, **changes}


STAGE = {"kind": "mix", "version": 1, "recipe": {"topK": 2}, "inputs": []}
BAD_TASKS = {
    "nothing": ("", "BTX_TASK: holds no task"),
    "no JSON": ("{", "BTX_TASK: holds no task"),
    "no object": ("[]", "BTX_TASK: holds no task"),
    "no file": ("@/nowhere/task.json", "BTX_TASK: holds no task"),
    "from the future": (plain(schemaVersion=2, shape="new"), "task.schemaVersion: 2"),
    "unknown field": (plain(colour="red"), "task.colour: unknown field"),
    "wrong type": (plain(gc={"keepDays": "soon"}), "task.gc.keepDays:"),
    "another version": (plain(gc=None, stage={**STAGE, "version": 9}), "mix.version: 9"),
    "bad recipe": (plain(gc=None, stage={**STAGE, "recipe": {"k": 1}}), "mix.topK: is required"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_a_task_that_cannot_be_read(case):
    """One line naming the field, exit Configuration, no traceback."""
    task, message = BAD_TASKS[case]
    done = run_trainer(task)

    assert done.code == Exit.CONFIGURATION
    errors = [text for text in done.err.splitlines() if not text.startswith("imported:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {message}")
    problem = done.result.problem
    assert f"{problem.field}: {problem.message}".lstrip(": ").startswith(message)


def test_the_task_may_be_in_a_file(local, tmp_path):
    """`@path` reads the task from there."""
    errand = Export(kind=Kind.MIX, digest="0" * 32, folder=str(tmp_path / "out"))
    task = Task(export=errand, execution=TaskExecution(storage=local))
    (tmp_path / "task.json").write_text(json.dumps(task.plain()))

    assert run_trainer(f"@{tmp_path}/task.json").code == Exit.MISSING


def test_a_result_file_that_cannot_be_replaced_is_written(local, tmp_path):
    """As a container's termination log: a mount that can be written to, and nothing beside it."""
    task = mix_task(tmp_path, local, must_exist=True, result="/proc/self/fd/2")
    done = run_trainer(task)

    assert done.code == Exit.MISSING
    assert done.result.line() in done.err


@pytest.mark.parametrize(
    ("error", "code", "message", "traced"),
    [
        (OSError(errno.ENOSPC, "No space left", "/x"), 1, "/x: No space left", False),
        (OSError(errno.ENOSPC, "No space left"), 1, ": No space left", False),
        (OSError(errno.EIO, "refused", "s3://b/k"), 1, "s3://b/k: refused", False),
        (FileNotFoundError(2, "No such file", "/x"), 1, "/x: No such file", False),
        (CorruptInputError(Kind.MIX, "d", "t", "bad"), 65, "stages/mix/d: bad", False),
        (OSError("of nothing"), 1, ": of nothing", True),
        (RuntimeError("first\nsecond"), 1, "RuntimeError: first second", True),
    ],
)
def test_every_failure_becomes_a_result(error, code, message, traced, capsys):
    """A failure that names its object, or a full disk, is one line; any other shows its traceback."""

    def work() -> Result:
        raise error

    result, found = _outcome(work)

    assert found == code
    assert f"{result.problem.field}: {result.problem.message}" == message
    assert ("Traceback" in capsys.readouterr().err) == traced


# average and mix.


def test_the_mixed_model_is_the_plan_of_its_inputs(local, tmp_path):
    """Expert tensors are the inputs' own bytes, members first; tokenizer files are the seed's."""
    task = mix_task(tmp_path, local)
    (tmp_path / "model-0/tokenizer.json").write_text('{"of": "the seed"}')
    (tmp_path / "model-0/notes.txt").write_text("not part of a model")
    task = mix_task(tmp_path, local)
    made = run_trainer(task).result
    folder = find(open_store(local), Kind.MIX, made.digest).fetch()
    mixed = load_file(folder / "model.safetensors")
    seed, expert = (load_file(tmp_path / f"model-{i}/model.safetensors") for i in range(2))
    name = "model.layers.1.mlp.gate_proj.weight"
    experts = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"

    assert (mixed[experts.format(0)] == expert[name]).all()
    assert (mixed[experts.format(1)] == seed[name]).all()
    norm = "model.norm.weight"
    assert np.allclose(mixed[norm], (seed[norm] + expert[norm]) / 2)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 2)
    assert made.metrics == {"models": 2, "parameters": sum(v.size for v in mixed.values())}
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_models_that_differ_are_not_mixed(local, tmp_path):
    """Exit Configuration naming the input and the field."""
    write_llama(tmp_path / "model-1", 1, num_hidden_layers=3)
    done = run_trainer(mix_task(tmp_path, local))

    assert done.code == Exit.CONFIGURATION
    assert done.result.problem.field == "input 1 config.json"
    assert done.result.problem.message == "num_hidden_layers is 3, the seed's is 2"


def test_a_stage_that_is_asked_to_stop_keeps_nothing(local, tmp_path):
    """mix stops while it writes; the next attempt begins anew."""
    task = mix_task(tmp_path, local)
    store = open_store(local)
    inputs = tuple(
        Outside(location=location, fingerprint=item.fingerprint, storage=local)
        for item, location in zip(task.stage.inputs, task.execution.inputs, strict=True)
    )
    seen: list[Progress] = []
    work = Work(
        stage=task.stage, recipe=RECIPES[Kind.MIX].parse(task.stage.recipe), store=store,
        execution=task.execution, inputs=inputs, out=Attempt(store, task.stage), scratch=tmp_path,
        publish=seen.append, stopping=lambda: len(seen) == 3,
    )  # fmt: skip
    with pytest.raises(PreemptedError):
        mix.run(work)

    assert [progress.phase for progress in seen] == ["writing"] * 3
    assert list(store.list("")) == []


# A server that takes connections and never answers.


@pytest.fixture
def silent():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def hanging(folder: Path, server: socket.socket, **execution) -> Task:
    """prepare of a source on the silent server."""
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    storage = Storage(uri=f"file://{folder}/storage", endpoint=endpoint, path_style=True)
    return prepare_task(folder, storage, "s3://bucket/text.jsonl", **execution)


KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}


def test_without_progress_a_stage_ends_as_stalled(silent, tmp_path):
    """Whatever it waits for: exit Stalled, a Result, and a log in storage that shows where."""
    result = tmp_path / "result.json"
    task = hanging(tmp_path, silent, no_progress_seconds=1, result=str(result))
    done = run_trainer(task, **KEYS)

    assert done.code == Exit.STALLED
    assert "no progress for 1 s" in Result.parse(json.loads(result.read_text())).problem.message
    key = log_key(Kind.PREPARE, task.stage.digest, "test", 1)
    text = open_store(task.execution.storage).read(key).decode()
    assert "sources.py" in text and "no progress for 1 s" in text


def test_a_second_signal_ends_a_stage_that_hangs(silent, tmp_path):
    """The first SIGTERM asks; the second, for a stage that cannot look, is final."""
    process = start_trainer(hanging(tmp_path, silent), **KEYS)
    connection, _ = silent.accept()
    process.terminate()
    connection.close()
    # The request is repeated only by a process that is still there.
    connection, _ = silent.accept()
    process.terminate()
    done = ended(process)
    connection.close()

    assert done.code == -15


def test_the_log_is_stored_with_the_error(local, tmp_path):
    """What a stage printed, its traceback or error line last, is in storage under its attempt."""
    task = mix_task(tmp_path, local, attempt=3)
    write_llama(tmp_path / "model-1", 7)
    done = run_trainer(task)
    store: Store = open_store(local)
    text = store.read(log_key(Kind.MIX, task.stage.digest, "test", 3)).decode()

    assert (
        text.splitlines()[-1] == f"error: {done.result.problem.field}: input changed since "
        "preflight"
    )
    assert text.splitlines()[-1] in done.err


# Telemetry.


FULL = Progress(
    phase="training", step=10, steps=20, tokens=1000, tokens_per_second=50.0, loss=2.5,
    balance=1.1, grad_norm=0.5, lr=1e-4, eta_seconds=20.0, checkpoint_step=5,
    checkpoint_time=1.7e9, expert_load=(0.25, 0.75), dead_experts=("0.1",),
)  # fmt: skip


def fetch(url: str) -> str:
    with urllib.request.urlopen(url) as answer:
        return answer.read().decode()


def test_progress_is_served_as_json_and_as_metrics(caplog):
    """/progress is the latest Progress; /metrics has every trainer metric, and no other."""
    telemetry = Telemetry(run="r", stage="train-code", kind=Kind.TRAIN)
    server = telemetry.serve("127.0.0.1:0")
    address = f"http://127.0.0.1:{server.server_address[1]}"
    telemetry.publish(FULL)
    shown = Progress.parse(json.loads(fetch(f"{address}/progress")))
    text = fetch(f"{address}/metrics")
    server.shutdown()
    server.server_close()

    assert shown == FULL.model_copy(update={"kind": Kind.TRAIN, "time": shown.time})
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    assert found.keys() == {metric.name for metric in TRAINER.values()}
    for metric in TRAINER.values():
        for labels, _ in found[metric.name]:
            assert set(labels) == set(metric.labels)
    stage = {"run": "r", "stage": "train-code"}
    assert found["btx_trainer_loss_nats"] == [(stage, 2.5)]
    assert found["btx_trainer_expert_load_ratio"][1] == ({**stage, "expert": "1"}, 0.75)


def test_what_is_not_known_is_not_shown():
    """Neither the log line nor the metrics invent a loss."""
    telemetry = Telemetry(run="r", stage="mix", kind=Kind.MIX)
    telemetry.publish(Progress(phase="writing", step=1, steps=2))

    assert line(Progress(phase="writing", step=1, steps=2)) == "writing step 1/2"
    assert "loss" not in telemetry.exposition().decode()
    assert line(FULL) == (
        "training step 10/20 loss 2.5000 balance 1.100 lr 1.00e-04 grad_norm 0.500 tokens/s 50"
        " eta_s 20 checkpoint 5 dead 1"
    )


def test_a_stage_is_idle_since_it_last_published(monkeypatch):
    """A measurement publishes per batch with the step unchanged: that is progress, as bytes
    of storage that move; silence is not."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("btx_trainer.storage.traffic.last", 0.0)
    telemetry = Telemetry(run="r", stage="s", kind=Kind.TRAIN)
    for time, publishes, idle in ((10.0, True, 0.0), (30.0, False, 20.0), (40.0, True, 0.0)):
        now[0] = time
        if publishes:
            telemetry.publish(Progress(phase="evaluating", step=1))
        assert telemetry.idle == idle
    monkeypatch.setattr("btx_trainer.storage.traffic.last", 45.0)
    now[0] = 50.0
    assert telemetry.idle == 5.0


def test_few_lines_for_many_steps(monkeypatch, caplog):
    """One line per phase, then one per 5 s, and one for the last step."""
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    caplog.set_level("INFO")
    telemetry = Telemetry(run="r", stage="s", kind=Kind.TRAIN)
    for step in range(1, 101):
        now[0] += 0.125
        telemetry.publish(Progress(phase="training", step=step, steps=100))

    steps = [record.getMessage().split()[3] for record in caplog.records]
    assert steps == ["1/100", "41/100", "81/100", "100/100"]


def test_metric_names_are_in_order():
    """Names are unique, counters end in _total, units stand in the name, and all have a help."""
    every = [*TRAINER.values(), *ENGINE.values()]
    assert len({metric.name for metric in every}) == len(every)
    for metric in every:
        assert metric.help.endswith(".")
        assert metric.name.endswith("_total") == (metric.type is MetricType.COUNTER)
        assert metric.unit in metric.name.split("_") or not metric.unit
