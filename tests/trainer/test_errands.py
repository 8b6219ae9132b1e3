"""Preflight, report, export and gc on real storage."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from btx_api.artifact import Maker, manifest_key
from btx_api.methods import Members, graph
from btx_api.names import RESULT_BYTES, run_record
from btx_api.spec import BTXRunSpec, Storage
from btx_api.stage import (
    PROBLEM_LENGTH,
    Corrupt,
    EvaluatedDomain,
    EvaluatedModel,
    EvaluateRecipe,
    Exit,
    Export,
    Kind,
    Parameters,
    Preflight,
    Report,
    ReportRun,
    Resolved,
    Result,
    Stage,
    Task,
    TaskExecution,
)
from btx_trainer.artifacts import Attempt, find
from btx_trainer.errands import run
from btx_trainer.errors import ConfigurationError, CorruptInputError, MissingError
from btx_trainer.preflight import preflight
from btx_trainer.scores import Measured, Sums, tabulate
from btx_trainer.storage import FileStore, open_store
from btx_trainer.tokenizer import byte_tokenizer_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tiny import run_trainer, write_llama

NAMES = ("code", "math")


def inputs(folder: Path) -> None:
    """A seed, a data file per domain, and a ready expert."""
    for number, name in enumerate(("seed", "ready")):
        write_llama(folder / name, number)
        (folder / name / "tokenizer.json").write_text(byte_tokenizer_json())
    for name in (*NAMES, "general"):
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    inputs(tmp_path)
    monkeypatch.chdir(tmp_path)


def expert(name: str, **changes) -> dict:
    return {"name": name, "tokens": 4096, "data": [{"uri": f"file://{name}.jsonl"}], **changes}


def spec_of(storage: Storage | None = None, **changes) -> BTXRunSpec:
    return BTXRunSpec.parse(
        {
            "storage": storage.plain() if storage else {"uri": "file://storage"},
            "seed": {"uri": "file://seed"},
            "general": [{"uri": "file://general.jsonl"}],
            "experts": [expert(name) for name in NAMES],
            **changes,
        }
    )


def ask(spec: BTXRunSpec | None = None, **changes) -> Resolved:
    return preflight(Preflight(spec=spec or spec_of(), uid="uid-1", **changes))


def make(store, stage: Stage, **metrics: float) -> str:
    """An artifact of a stage that nobody computed; returns its token."""
    attempt = Attempt(store, stage)
    attempt.put("model.safetensors", stage.digest.encode() * 100)
    return attempt.commit(metrics=metrics, deviations=(), maker=Maker(), parents=()).token


def test_preflight_resolves_everything_once(storage):
    """Fingerprints, parameter counts, an empty bitmap and the run's record; no torch."""
    spec = spec_of(storage)
    asked = Preflight(spec=spec, uid="uid-1")
    done = run_trainer(Task(preflight=asked, execution=TaskExecution(storage=storage)))
    assert (done.code, done.imported) == (Exit.OK, []), done.err
    found = done.result.resolved

    assert found.problems == ()
    fingerprints = [found.seed, found.tokenizer, *found.domains]
    assert len(set(fingerprints)) == 5
    assert {len(text) for text in fingerprints} == {22}
    assert (found.complete, found.gains, found.token) == ("0", (None, None), "")
    tensors = load_file("seed/model.safetensors").values()
    dense = sum(tensor.size for tensor in tensors)
    ffn = 2 * 3 * 16 * 24
    assert found.parameters == Parameters(
        dense=dense, total=dense + 2 * ffn + 2 * 3 * 16, active=dense + ffn + 2 * 3 * 16,
        head=260 * 16, embedding=260 * 16, experts=2 * ffn, layers=2, hidden=16,
    )  # fmt: skip
    nodes = graph(spec, found, uid="uid-1")
    record = json.loads(open_store(storage).read(run_record("uid-1")))
    assert {name: item["digest"] for name, item in record["stages"].items()} == {
        name: node.stage.digest for name, node in nodes.items()
    }
    assert record["time"].endswith("Z")
    assert ask(spec) == found


def test_only_asking_writes_no_record():
    """`btx plan` of an edited manifest must not touch what gc keeps for the run."""
    assert ask(record=False).problems == ()
    assert list(open_store(Storage(uri="file://storage")).list("runs/")) == []


def test_lost_domains_are_left_out_of_the_graph_that_is_looked_up():
    """A domain without data is in no finetune and in no column: its members say so."""
    spec = spec_of(policy={"failurePolicy": "Quorum", "minExperts": 1})
    members = Members(experts=("math",), without=("code",))
    nodes = graph(spec, ask(spec), members)
    make(open_store(spec.storage), nodes["finetune"].stage)
    found = ask(spec, members=members.experts, without=members.without)
    assert int(found.complete, 16) == 1 << list(nodes).index("finetune")
    assert ask(spec, members=members.experts).complete == "0"


def test_preflight_says_what_is_complete(storage):
    """Bits in graph order, the gain of each complete train stage, the final model's token."""
    spec = spec_of(storage)
    nodes = graph(spec, ask(spec))
    store = open_store(storage)
    make(store, nodes["prepare-math"].stage)
    make(store, nodes["train-math"].stage, gain=-0.123456)
    token = make(store, nodes["finetune"].stage)
    found = ask(spec)

    complete = {name for i, name in enumerate(nodes) if int(found.complete, 16) >> i & 1}
    assert complete == {"prepare-math", "train-math", "finetune"}
    assert found.gains == (None, -0.1235)
    assert found.token == token


def test_cut_files_and_unreadable_manifests_are_not_complete(storage):
    """What its own stage will replace counts as absent."""
    spec = spec_of(storage)
    nodes = graph(spec, ask(spec))
    store = open_store(storage)
    for name in ("prepare-code", "prepare-math"):
        make(store, nodes[name].stage)
    found = find(store, Kind.PREPARE, nodes["prepare-code"].stage.digest)
    store.put(found.key("model.safetensors"), b"short")
    store.put(manifest_key(Kind.PREPARE, nodes["prepare-math"].stage.digest), b"{")

    assert ask(spec).complete == "0"


def test_verify_reads_every_byte(storage):
    """A flipped byte is found only by verify, which names the copy that is corrupt."""
    spec = spec_of(storage)
    stage = graph(spec, ask(spec))["prepare-code"].stage
    store = open_store(storage)
    make(store, stage)
    found = find(store, stage.kind, stage.digest)
    key = found.key("model.safetensors")
    flipped = b"X" + store.read(key)[1:]
    if isinstance(store, FileStore):
        store.put(key, flipped)
    else:
        # By somebody who gives no checksum for the storage to keep.
        store.client.put_object(**store.at(key), Body=flipped)

    assert int(ask(spec).complete, 16) == 1
    checked = ask(spec, verify=True)
    assert checked.complete == "0"
    assert checked.corrupt == (Corrupt(kind=stage.kind, digest=stage.digest, tag=found.tag),)


def test_a_checksum_that_the_storage_keeps_is_compared(s3):
    """What was written over differs by HEAD alone: not complete, and nothing was read."""
    spec = spec_of(s3)
    stage = graph(spec, ask(spec))["prepare-code"].stage
    store = open_store(s3)
    make(store, stage)
    found = find(store, stage.kind, stage.digest)
    key = found.key("model.safetensors")
    assert int(ask(spec).complete, 16) == 1
    store.put(key, b"X" + store.read(key)[1:])

    assert ask(spec).complete == "0"


def test_members_and_uid_are_part_of_the_graph():
    """Decided members change the mix; under reuse Never the uid changes every stage."""
    spec = spec_of(policy={"reuse": "Never"})
    resolved = ask(spec)
    store = open_store(spec.storage)
    members = Members(experts=("math",))
    nodes = graph(spec, resolved, members, uid="uid-1")
    make(store, nodes["mix"].stage)

    assert int(ask(spec, members=("math",)).complete, 16) == 1 << list(nodes).index("mix")
    assert ask(spec).complete == "0"
    assert preflight(Preflight(spec=spec, uid="uid-2", members=("math",))).complete == "0"


def test_a_ready_expert_is_fingerprinted():
    """It has no train stage; its content is an input of the mix."""
    spec = spec_of(experts=[expert("code"), {"name": "ready", "model": "file://ready"}])
    found = ask(spec)

    assert found.problems == ()
    assert len(found.models) == 1
    assert found.models != (found.seed,)
    write_llama(Path("ready"), 9)
    assert ask(spec).models != found.models


def test_the_files_of_tasks_are_fingerprinted(storage):
    """By content, wherever they lie; every record has been read."""
    line = json.dumps({"question": "?", "choices": ["a", "b"], "answer": "b"})
    tasks = [{"name": "q", "uri": "file://q.jsonl"}, {"name": "r", "uri": "file://r.jsonl"}]
    for name, text in (("q", line), ("r", line), ("s", line + "\n" + line)):
        Path(f"{name}.jsonl").write_text(text)
    one, other = ask(spec_of(storage, evaluate={"tasks": tasks})).tasks
    tasks[1]["uri"] = "file://s.jsonl"

    assert one == other
    assert ask(spec_of(storage, evaluate={"tasks": tasks})).tasks[1] != one


READY = {"experts": [expert("code"), {"name": "ready", "model": "file://ready"}]}


def edit_json(path: str, **changes) -> None:
    value = json.loads(Path(path).read_text())
    Path(path).write_text(json.dumps({**value, **changes}))


def edit_tokenizer(path: str) -> None:
    value = json.loads(Path(path).read_text())
    value["model"]["vocab"]["A"], value["model"]["vocab"]["B"] = 66, 65
    Path(path).write_text(json.dumps(value))


def half_precision(path: str) -> None:
    tensors = load_file(path)
    save_file({name: value.astype(np.float16) for name, value in tensors.items()}, path)


def cut(path: str) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:-10])


def remove(path: str) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


PROBLEMS = {
    "no seed": (lambda: remove("seed"), {}, "seed.uri: config.json: no such file"),
    "an unsupported family": (
        lambda: edit_json("seed/config.json", model_type="gpt2"), {},
        "seed.uri: config.json: model_type 'gpt2' is not supported",
    ),
    "biases that the target has not": (
        lambda: edit_json("seed/config.json", attention_bias=True), {},
        "seed.uri: config.json: attention_bias is True, only False can be mixed",
    ),
    "heads that turn in part": (
        lambda: edit_json("seed/config.json", partial_rotary_factor=0.75), {},
        "seed.uri: config.json: partial_rotary_factor is 0.75, only 1.0 can be mixed",
    ),
    "layers that slide": (
        lambda: edit_json("seed/config.json", model_type="qwen3", use_sliding_window=True), {},
        "seed.uri: config.json: use_sliding_window is True, only False can be mixed",
    ),
    "an unknown field": (
        lambda: edit_json("seed/config.json", rope_magic=2), {},
        "seed.uri: config.json: field 'rope_magic' is unknown",
    ),
    "a truncated seed": (
        lambda: cut("seed/model.safetensors"), {}, "seed.uri: model.safetensors: "
    ),
    "a seed without tokenizer": (
        lambda: remove("seed/tokenizer.json"), {},
        "prepare.tokenizer: the seed has no tokenizer.json",
    ),
    "a broken tokenizer": (
        lambda: Path("seed/tokenizer.json").write_text("{}"), {},
        "prepare.tokenizer: tokenizer.json is not a tokenizer",
    ),
    "no tokenizer there": (
        lambda: None, {"prepare": {"tokenizer": "file://nothing.json"}},
        "prepare.tokenizer: No such file or directory: ",
    ),
    "too many ids": (
        lambda: write_llama(Path("seed"), vocab_size=200), {},
        "prepare.tokenizer: has 260 ids, the seed's vocab_size is 200",
    ),
    "too many bytes": (
        lambda: write_llama(Path("seed"), vocab_size=256), {"prepare": {"tokenizer": "bytes"}},
        "prepare.tokenizer: has 260 ids, the seed's vocab_size is 256",
    ),
    "no data": (
        lambda: remove("math.jsonl"), {}, "experts[1].data[0].uri: matches no file"
    ),
    "no general data": (
        lambda: remove("general.jsonl"), {}, "general[0].uri: matches no file"
    ),
    "no evaluation data": (
        lambda: None,
        {"evaluate": {"domains": [
            {"name": "code"}, {"name": "extra", "data": [{"uri": "file://code.jsonl"},
                                                          {"uri": "file://none/*"}]}]}},
        "evaluate.domains[1].data[1].uri: matches no file",
    ),
    "a bad record of a task": (
        lambda: Path("q.jsonl").write_text('{"question": "?", "answer": "!"}\n{"question": "?"}\n'),
        {"evaluate": {"tasks": [{"name": "q", "uri": "file://q.jsonl", "kind": "ExactMatch"}]}},
        "evaluate.tasks[0]: q.jsonl: line 2: answer: is missing",
    ),
    "no such task": (
        lambda: None, {"evaluate": {"tasks": [{"name": "q", "uri": "file://q.jsonl"}]}},
        "evaluate.tasks[0]: file://q.jsonl: matches no file",
    ),
    "another architecture": (
        lambda: write_llama(Path("ready"), 1, num_hidden_layers=3), READY,
        "experts[1].model: config.json: num_hidden_layers is 3, the seed's is 2",
    ),
    "another family": (
        lambda: edit_json("ready/config.json", model_type="mistral"), READY,
        "experts[1].model: config.json: model_type is 'mistral', the seed's is 'llama'",
    ),
    "an expert of an unsupported family": (
        lambda: edit_json("ready/config.json", model_type="gpt2"), READY,
        "experts[1].model: config.json: model_type is 'gpt2', the seed's is 'llama'",
    ),
    "another multiplier": (
        lambda: [
            write_llama(Path(name), i, model_type="granite", logits_scaling=8.0 + i)
            for i, name in enumerate(("seed", "ready"))
        ], READY,
        "experts[1].model: config.json: logits_scaling is 9.0, the seed's is 8.0",
    ),
    "another theta": (
        lambda: write_llama(Path("ready"), 1, rope_theta=5e5), READY,
        "experts[1].model: config.json: rope_parameters.rope_theta is 500000.0, the seed's is 1000",
    ),
    "another dtype": (
        lambda: half_precision("ready/model.safetensors"), READY,
        "experts[1].model: tensor lm_head.weight is F16, the seed's is F32",
    ),
    "other shapes": (
        lambda: write_llama(Path("ready"), 1, intermediate_size=32) and edit_json(
            "ready/config.json", intermediate_size=24
        ), READY,
        "experts[1].model: tensor model.layers.0.mlp.gate_proj.weight has shape [32, 16]",
    ),
    "another tokenizer": (
        lambda: edit_tokenizer("ready/tokenizer.json"), READY,
        "experts[1].model: tokenizer.json: token 'A' is 66, the seed's is 65",
    ),
    "another pre-tokenizer": (
        lambda: edit_json("ready/tokenizer.json", pre_tokenizer=None), READY,
        "experts[1].model: tokenizer.json: pre_tokenizer is null, the seed's is {\"type\"",
    ),
    "no such ready expert": (
        lambda: remove("ready"), READY, "experts[1].model: config.json: no such file"
    ),
    "storage that is a file": (
        lambda: Path("storage").write_text("x"), {}, "storage.uri: ",
    ),
    "a model of nobody": (
        lambda: None, {"seed": {"uri": "hf://nobody/nothing@0"}},
        "seed.uri: hf://nobody/nothing@0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_cannot_work_is_a_problem_of_its_field(case, monkeypatch):
    """Exit 0 with problems: the first begins with the field's path, is one line, says what."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    change, changes, message = PROBLEMS[case]
    change()
    found = ask(spec_of(**changes))

    assert found.problems[0].startswith(message)
    assert found.model_copy(update={"problems": ()}) == Resolved()
    for problem in found.problems:
        assert len(problem.encode()) <= PROBLEM_LENGTH and "\n" not in problem


def test_at_most_eight_problems():
    """A spec in which everything is wrong still fits."""
    names = [f"e{i}" for i in range(12)]
    found = ask(spec_of(experts=[expert(name) for name in names], general=[]))

    assert len(found.problems) == 8


def test_too_many_inputs_are_refused():
    """More fingerprints than fit the answer are a problem, not a broken answer."""
    data = [{"uri": "file://code.jsonl"}]
    domains = [{"name": f"d{i}", "data": data} for i in range(92)]
    line = json.dumps({"question": "?", "choices": ["a", "b"], "answer": "b"})
    Path("q.jsonl").write_text(line)
    tasks = [{"name": f"q{i}", "uri": "file://q.jsonl"} for i in range(2)]
    found = ask(spec_of(evaluate={"domains": domains, "tasks": tasks}))

    assert found.problems[0].startswith("experts: 95 domains, 0 ready experts, 2 tasks; at most 96")


TEXT = st.text(min_size=1, max_size=2000)
REAL = st.floats(-1e300, 1e300)
FULL = "_" * 22
LARGEST = Resolved(
    seed=FULL, tokenizer=FULL, domains=(FULL,) * 96, complete="f" * 42, gains=(-999.9999,) * 64,
    token="f" * 16, parameters=Parameters(**dict.fromkeys(Parameters.model_fields, 10**13)),
    corrupt=(Corrupt(kind=Kind.FINETUNE, digest="f" * 32, tag="f" * 36),) * 4,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(TEXT, max_size=8), st.integers(0, 64), st.integers(0, 32), st.booleans(),
    st.floats(0, 1e9),
)  # fmt: skip
def test_the_largest_answer_fits_a_termination_message(problems, ready, tasks, refused, seconds):
    """64 experts, 96 fingerprints of domains, ready experts and tasks, 8 problems of any text."""
    resolved = Resolved(problems=tuple(problems))
    if not refused:
        resolved = LARGEST.model_copy(
            update={
                "domains": (FULL,) * (96 - ready - tasks),
                "models": (FULL,) * ready,
                "tasks": (FULL,) * tasks,
                "gains": (None,) * ready + (-999.9999,) * (64 - ready),
            }
        )

    assert len(Result(resolved=resolved, seconds=seconds).line().encode()) <= RESULT_BYTES


@settings(max_examples=60, deadline=None)
@given(TEXT, TEXT, st.lists(REAL, min_size=16, max_size=16), st.booleans())
def test_the_largest_result_of_a_stage_fits(field, message, values, failed):
    """16 headline numbers, or a problem of any text with the corrupt input."""
    corrupt = Corrupt(kind=Kind.FINETUNE, digest="f" * 32, tag="f" * 80)
    result = Result(
        digest="f" * 32, token="f" * 16, tag="f" * 80, reused=True, resumed_step=10**12,
        seconds=1e300, metrics={f"{i:0>40}": value for i, value in enumerate(values)},
    )  # fmt: skip
    if failed:
        problem = {"field": field, "message": message}
        result = Result.model_validate({"problem": problem, "corrupt": corrupt, "text": message})

    assert len(result.line().encode()) <= RESULT_BYTES


# Export, report, gc.


def a_stage(salt: str = "") -> Stage:
    return Stage(kind=Kind.FINETUNE, version=1, recipe={}, inputs=(), salt=salt)


STAGE = a_stage()


def do(errand, storage: Storage) -> str:
    return run(errand, TaskExecution(storage=storage)).text


def test_export_copies_a_model_verified(storage, tmp_path):
    """All files into a new folder or an empty one; a folder with something in it is refused."""
    store = open_store(storage)
    make(store, STAGE)
    for folder in (tmp_path / "new", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        text = do(Export(kind=STAGE.kind, digest=STAGE.digest, folder=str(folder)), storage)
        assert text == f"1 files, 3200 bytes in {folder}"
        assert (folder / "model.safetensors").read_bytes() == STAGE.digest.encode() * 100
    again = Export(kind=STAGE.kind, digest=STAGE.digest, folder=str(tmp_path / "new"))
    with pytest.raises(ConfigurationError, match="exists and is not an empty folder"):
        do(again, storage)


def test_the_model_card_comes_along(storage, tmp_path):
    """From the evaluation that is named, verified; without that one there is no folder either."""
    store = open_store(storage)
    make(store, STAGE)
    measured = Stage(kind=Kind.EVALUATE, version=1, recipe={}, inputs=())
    ask = {"kind": STAGE.kind, "digest": STAGE.digest, "card": measured.digest}
    with pytest.raises(MissingError):
        do(Export(**ask, folder=str(tmp_path / "early")), storage)
    attempt = Attempt(store, measured)
    attempt.put("README.md", b"# A model")
    found = attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
    text = do(Export(**ask, folder=str(tmp_path / "new")), storage)
    store.put(found.key("README.md"), b"# A muddle"[:9])
    with pytest.raises(CorruptInputError):
        do(Export(**ask, folder=str(tmp_path / "late")), storage)

    assert text == f"1 files, 3200 bytes in {tmp_path / 'new'}, and the model card"
    assert (tmp_path / "new/README.md").read_bytes() == b"# A model"
    assert not (tmp_path / "early").exists() and not (tmp_path / "late").exists()


def test_a_corrupt_or_missing_artifact_is_not_exported(storage, tmp_path):
    """The errand names it, and there is no folder afterwards."""
    errand = Export(kind=STAGE.kind, digest=STAGE.digest, folder=str(tmp_path / "new"))
    with pytest.raises(MissingError):
        do(errand, storage)
    store = open_store(storage)
    make(store, STAGE)
    key = find(store, STAGE.kind, STAGE.digest).key("model.safetensors")
    store.put(key, b"x" * 3200)
    with pytest.raises(CorruptInputError):
        do(errand, storage)

    assert not [path for path in tmp_path.iterdir() if path.name.startswith("new")]


def evaluated(store, salt: str, loss: float) -> str:
    """An evaluate artifact with a small report; returns its digest."""
    models = (("seed", "seed"), ("final", "final"))
    recipe = EvaluateRecipe(
        models=tuple(
            EvaluatedModel(label=label, role=role, input=i)
            for i, (label, role) in enumerate(models)
        ),
        columns=(EvaluatedDomain(name="code", input=2),),
    )
    sums = [Sums(loss=nats, tokens=100, bytes=400) for nats in (300.0, loss)]
    measured = [Measured(sums={"code": s}, parameters=10, active=10) for s in sums]
    stage = Stage(kind=Kind.EVALUATE, version=1, recipe={}, inputs=(), salt=salt)
    attempt = Attempt(store, stage)
    attempt.put("report.json", tabulate(recipe, measured).json_text().encode())
    attempt.commit(metrics={}, deviations=(), maker=Maker(), parents=())
    return stage.digest


def test_report_puts_runs_side_by_side(storage, tmp_path):
    """The reports of several evaluations become one page with every run's name."""
    store = open_store(storage)
    runs = (
        ReportRun(name="first", digest=evaluated(store, "1", 250.0)),
        ReportRun(name="second", digest=evaluated(store, "2", 200.0)),
    )
    folder = tmp_path / "report"
    text = do(Report(runs=runs, folder=str(folder)), storage)

    assert text == f"report of first, second in {folder}"
    page = (folder / "report.html").read_text()
    assert "first" in page and "second" in page and "2.500" in page
    assert set(json.loads((folder / "report.json").read_text())["runs"]) == {"first", "second"}
    lost = Report(runs=(ReportRun(name="x", digest="0" * 32),), folder=str(folder))
    with pytest.raises(MissingError):
        do(lost, storage)


def test_storage_without_conditional_writes_is_refused(monkeypatch):
    """No server at hand ignores If-None-Match, so the store is made to; the probe is removed."""
    put = FileStore.put

    def careless(self, key, data, *, if_none_match=False, if_match=""):
        return put(self, key, data)

    resolved = ask()
    assert not resolved.problems
    monkeypatch.setattr(FileStore, "put", careless)
    [problem] = ask().problems
    assert problem.startswith("storage.uri: ")
    assert problem.endswith("a second writer overwrites the first: If-None-Match is ignored")
    assert not list(Path("storage").rglob(".probe-*"))
