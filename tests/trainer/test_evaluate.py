"""evaluate on a tiny real run: its losses against stock transformers, routing, histories, errors.

One storage holds seven models and three prepared domains; the stage runs on them as in a run.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from btx_api.artifact import HISTORY, Maker
from btx_api.spec import Precision, Scheduling, Source, SourceFormat, Storage, TaskKind
from btx_api.stage import (
    Content,
    EvaluatedDomain,
    EvaluatedModel,
    EvaluatedTask,
    EvaluateRecipe,
    Input,
    Kind,
    Location,
    Output,
    Progress,
    Stage,
    TaskExecution,
    recipe_of,
)
from btx_trainer import shards
from btx_trainer.analysis import BINS, Excerpt
from btx_trainer.artifacts import Artifact, Attempt, Outside
from btx_trainer.errors import ConfigurationError, PreemptedError, TrainerError
from btx_trainer.fingerprint import fingerprint_model, fingerprint_sources
from btx_trainer.model import load_model, new_model, save_model
from btx_trainer.scores import Report
from btx_trainer.stages import evaluate
from btx_trainer.storage import FileStore, open_outside, open_store
from btx_trainer.tally import EXCERPT
from btx_trainer.tokenizer import ByteTokenizer
from btx_trainer.work import Made, Work
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

LENGTH = 48
SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    # Wide enough that losses differ and routers decide.
    "initializer_range": 0.3, "tie_word_embeddings": True,
}  # fmt: skip
TEXTS = {
    "code": ["def f(x):\n    return x\n", "import os\n" * 9, "class A: pass\n", "x = {1: 'é'}\n"],
    "math": ["1+1=2\n2+2=4\n" * 7, "(x-1)(x+1)=x^2-1\n", "7*8=56\n", "3/4\n"],
    "general": ["The quick brown fox. " * 6, "Nothing more.", "And so on, and so on."],
}
ROLES = (
    ("seed", "seed"), ("code", "expert"), ("math", "expert"), ("soup", "soup"),
    ("mixed", "mixed"), ("final", "final"),
)  # fmt: skip
KINDS = {"expert": Kind.TRAIN, "soup": Kind.AVERAGE, "mixed": Kind.MIX, "final": Kind.FINETUNE}


def a_model(folder: Path, number: int, *, experts: int = 0) -> Path:
    """A random Llama, or a random Mixtral, in HF layout."""
    if experts:
        config = MixtralConfig(**SHAPE, num_local_experts=experts, num_experts_per_tok=2)
    else:
        config = LlamaConfig(**SHAPE)
    folder.mkdir(parents=True)
    save_model(new_model(config, number), folder, torch.float32)
    return folder


def prepare(folder: Path, texts: list[str], held_out: bool = True) -> None:
    """A prepare artifact's files: every text is held out, or none."""
    tokenizer = ByteTokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    data = [text.encode() for text in texts]
    tokens, lengths = tokenizer.encode(data)
    with shards.Writer(FileStore(folder), tokenizer) as writer:
        with writer.source(1.0) as source:
            source.write(
                shards.Encoded(
                    tokens=tokens, lengths=lengths,
                    sizes=np.array([len(text) for text in data], np.int64),
                    hashes=np.arange(len(data), dtype=np.uint64),
                    held_out=np.full(len(data), held_out), lost=Counter(),
                )
            )  # fmt: skip
        writer.finish()


class Run:
    """A storage with the inputs of an evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = Storage(uri=f"file://{folder}/storage")
        self.store = open_store(self.storage)
        self.inputs: list[Artifact | Outside] = []
        self.stage_inputs: list[Input] = []
        self.folders: dict[str, Path] = {}

    def add_seed(self) -> None:
        path = a_model(self.folder / "seed", 1)
        uri = f"file://{path}"
        found = fingerprint_model(*open_outside(uri, self.storage))
        self.folders["seed"] = path
        self.inputs.append(
            Outside(location=Location(uri=uri), fingerprint=found, storage=self.storage)
        )
        self.stage_inputs.append(Content(fingerprint=found))

    def add(self, kind: Kind, name: str, files: Path, deviations: tuple[str, ...] = ()) -> None:
        stage = Stage(kind=kind, version=1, recipe={"made": name}, inputs=())
        attempt = Attempt(self.store, stage)
        for path in sorted(files.iterdir()):
            attempt.add(path, path.name)
        artifact = attempt.commit(metrics={}, deviations=deviations, maker=Maker(), parents=())
        self.folders[name] = artifact.fetch()
        self.inputs.append(artifact)
        self.stage_inputs.append(Output(digest=stage.digest))

    def add_task(self, path: Path) -> EvaluatedTask:
        """A file of questions, as the last input."""
        sources = (Source(uri=f"file://{path}", format=SourceFormat.JSONL),)
        found = fingerprint_sources(sources, self.storage)
        place = Location(sources=sources)
        self.inputs.append(Outside(location=place, fingerprint=found, storage=self.storage))
        self.stage_inputs.append(Content(fingerprint=found))
        return EvaluatedTask(name=path.stem, input=len(self.inputs) - 1)

    def recipe(self, **changes: object) -> EvaluateRecipe:
        return EvaluateRecipe(
            **{
                "models": tuple(
                    EvaluatedModel(label=label, role=role, input=i)
                    for i, (label, role) in enumerate(ROLES)
                ),
                "columns": tuple(
                    EvaluatedDomain(name=name, input=len(ROLES) + i)
                    for i, name in enumerate(TEXTS)
                ),
                "routing": "TopK", "precision": "fp32", "sequence_length": LENGTH, "tokens": 260,
                **changes,
            }
        )  # fmt: skip

    def work(self, scratch: Path, recipe: EvaluateRecipe, **execution: object) -> Work:
        stage = Stage(
            kind=Kind.EVALUATE, version=1, recipe=recipe_of(recipe),
            inputs=tuple(self.stage_inputs),
        )  # fmt: skip
        return Work(
            stage=stage, recipe=recipe, inputs=tuple(self.inputs), store=self.store,
            execution=TaskExecution(storage=self.storage, scheduling=Scheduling(**execution)),
            out=Attempt(self.store, stage), scratch=scratch, publish=lambda _: None,
            stopping=lambda: False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Seed, two experts (one is the seed again), soup, two Mixtures-of-Experts, three domains."""
    made = Run(tmp_path_factory.mktemp("run"))
    made.add_seed()
    for number, (name, role) in enumerate(ROLES[1:], 1):
        experts = 3 if role in ("mixed", "final") else 0
        files = a_model(made.folder / name, 1 if name == "math" else number + 1, experts=experts)
        if name in ("code", "final"):
            lines = [{"step": i, "tokens": i * 64, "loss": 3 + i / 900} for i in range(1, 901)]
            (files / HISTORY).write_text("".join(json.dumps(line) + "\n" for line in lines))
        made.add(KINDS[role], name, files, ("went back 3 steps",) if name == "code" else ())
    for name, texts in TEXTS.items():
        prepare(made.folder / f"data-{name}", texts)
        made.add(Kind.PREPARE, f"data-{name}", made.folder / f"data-{name}")
    return made


Evaluated = tuple[Made, Report, dict[str, bytes]]


def evaluated(work: Work) -> Evaluated:
    """Runs the stage: what it made, its report, its files."""
    made = evaluate.run(work)
    folder = work.store.local(work.out.folder)
    assert folder
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return made, Report.parse(json.loads(files["report.json"])), files


@pytest.fixture(scope="module")
def outcome(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The run, evaluated once."""
    return evaluated(run.work(tmp_path_factory.mktemp("scratch"), run.recipe()))


def pieces(name: str, limit: int) -> Iterator[list[int]]:
    """What may be predicted: documents cut at LENGTH targets, until `limit` targets."""
    for text in TEXTS[name]:
        tokens = [*text.encode(), 257]
        for first in range(0, len(tokens) - 1, LENGTH):
            piece = tokens[first : first + min(LENGTH, limit) + 1]
            limit -= len(piece) - 1
            if len(piece) > 1:
                yield piece


@torch.no_grad()
def stock_loss(folder: Path, name: str, limit: int = 260) -> float:
    """Nats per token by stock transformers, one piece of a document at a time, with its head."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    nats, targets = 0.0, 0
    for piece in pieces(name, limit):
        logits = model(torch.tensor([piece[:-1]])).logits[0]
        nats += F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
        targets += len(piece) - 1
    return nats / targets


def test_losses_equal_a_recomputation_by_stock_code(run: Run, outcome: Evaluated) -> None:
    """Every model's loss on every domain, Mixtures-of-Experts included, within 1e-4."""
    report = outcome[1]

    for row in report.models:
        for name in TEXTS:
            expected = stock_loss(run.folders[row.label], name)
            assert row.scores[name].loss == pytest.approx(expected, abs=1e-4), (row.label, name)
    assert len({row.scores["code"].loss for row in report.models}) == 5


def test_tokens_and_bytes_are_those_predicted(outcome: Evaluated) -> None:
    """Targets of a domain are counted and capped; their bytes make the bits per byte."""
    report = outcome[1]

    for domain in report.domains:
        predicted = [token for piece in pieces(domain.name, 260) for token in piece[1:]]
        assert domain.tokens == len(predicted) <= 260
        text = [token for token in predicted if token < 256]
        assert domain.bytes == len(text)
        score = report.seed.scores[domain.name]
        bits = score.loss * domain.tokens / math.log(2) / len(text)
        assert score.bits_per_byte == pytest.approx(bits, abs=1e-4)
        assert score.perplexity == pytest.approx(math.exp(score.loss), rel=1e-5)


def test_identical_models_have_identical_rows(outcome: Evaluated) -> None:
    """The math expert here is the seed again: the same scores to the last digit, and no gap."""
    report = outcome[1]
    expert = report.experts[1]

    assert {n: s.loss for n, s in expert.scores.items()} == {
        n: s.loss for n, s in report.seed.scores.items()
    }
    assert all(score.versus_seed == 0 for score in expert.scores.values())
    assert all(row.scores["math"].gap_closed is None for row in report.models)


def test_gaps_and_oracle_follow_from_the_losses(outcome: Evaluated) -> None:
    """The oracle takes each expert on its own domain; no expert has `general`."""
    report = outcome[1]
    code = report.experts[0].scores["code"].loss

    assert report.oracle == {"code": code, "math": report.experts[1].scores["math"].loss}
    assert [domain.expert for domain in report.domains] == ["code", "math", ""]
    for row in report.models:
        score = row.scores["code"]
        assert score.versus_seed == pytest.approx(
            score.loss - report.seed.scores["code"].loss, abs=2e-6
        )
        mean = sum(s.loss for s in row.scores.values()) / 3
        assert row.mean_loss == pytest.approx(mean, abs=2e-6)


@torch.no_grad()
def test_routing_shares_equal_those_of_the_stock_routers(run: Run, outcome: Evaluated) -> None:
    """Share of slots by layer, domain and expert; each layer's add up to 1."""
    report = outcome[1]
    model = AutoModelForCausalLM.from_pretrained(run.folders["final"], dtype=torch.float32)
    table = next(table for table in report.routing if table.role == "final")

    assert [t.role for t in report.routing] == ["mixed", "final"]
    assert (table.experts, table.k, table.unit) == (("code", "math", "seed"), 2, "slots")
    for name in TEXTS:
        counts = torch.zeros(2, 3)
        for piece in pieces(name, 260):
            out = model(torch.tensor([piece[:-1]]), output_router_logits=True)
            for layer, logits in enumerate(out.router_logits):
                chosen = logits.softmax(-1).topk(2).indices.flatten()
                counts[layer] += torch.bincount(chosen, minlength=3)
        expected = (counts / counts.sum(-1, keepdim=True)).tolist()
        for layer, shares in enumerate(table.domains[name]):
            assert sum(shares) == pytest.approx(1, abs=1e-5)
            assert list(shares) == pytest.approx(expected[layer], abs=2e-6)
    for layer, load in enumerate(table.layers):
        mean = [sum(table.domains[n][layer][e] for n in TEXTS) / 3 for e in range(3)]
        assert list(load.shares) == pytest.approx(mean, abs=2e-6)
        assert (load.least, load.most) == (min(load.shares), max(load.shares))
        assert load.entropy == pytest.approx(-sum(s * math.log(s) for s in mean), abs=1e-5)


def test_parameters_in_use_count_k_of_the_experts(outcome: Evaluated) -> None:
    """Two of three experts per token; a dense model uses all it has."""
    report = outcome[1]
    expert = 3 * 32 * 48 * 2

    for row in report.models:
        moe = row.role in ("mixed", "final")
        assert row.parameters - row.active_parameters == (expert if moe else 0)


def test_histories_lineage_and_deviations_of_the_inputs_are_in_the_report(
    run: Run, outcome: Evaluated
) -> None:
    """Curves are averaged down to 400 points; origins are digests; deviations name their model."""
    made, report, files = outcome

    assert [curve.label for curve in report.curves] == ["code", "final"]
    curve = report.curves[0]
    assert (len(curve.loss), curve.steps[-1], curve.tokens[-1]) == (300, 900, 57600)
    assert curve.loss[0] == pytest.approx(3 + 2 / 900)
    parents = [item.parent for item in run.inputs]
    assert report.seed.origin == f"content/{parents[0].fingerprint}"
    assert report.models[1].origin == f"train/{parents[1].digest}"
    assert report.domains[0].origin == f"prepare/{parents[6].digest}"
    assert report.deviations == ("code: went back 3 steps",)
    assert set(made.metrics) == {"mean_seed", "mean_soup", "mean_mixed", "mean_final"}
    assert made.metrics["mean_final"] == report.result.mean_loss
    assert set(files) == {"report.json", "report.html", "README.md", "summary.txt"}


def changed_run(run: Run, folder: Path) -> Run:
    """The same inputs; what is added to it stays its own."""
    made = Run(folder)
    made.store, made.folders = run.store, run.folders
    made.inputs, made.stage_inputs = list(run.inputs), list(run.stage_inputs)
    return made


def test_tasks_are_further_columns(run: Run, tmp_path: Path) -> None:
    """Every model on both kinds; the routing of the mixed ones; nothing else of the report moves."""
    changed = changed_run(run, tmp_path)
    choices, sums = [{"question": "1+1=", "choices": ["2", "3"], "answer": 0}] * 3, []
    for i in range(5):
        sums.append({"question": f"{i}+1=", "answer": str(i + 1)})
    for name, records in (("pick", choices), ("write", sums)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    pick, write = (changed.add_task(tmp_path / f"{name}.jsonl") for name in ("pick", "write"))
    exact = {"kind": TaskKind.EXACT_MATCH, "max_new_tokens": 3, "shots": 2}
    asked = (pick, write.model_copy(update=exact))

    seen: list[Progress] = []
    work = changed.work(tmp_path, run.recipe(questions=asked))
    report = evaluated(replace(work, publish=seen.append))[1]

    assert [(t.name, t.kind, t.questions, t.shots, t.chance) for t in report.tasks] == [
        ("pick", "MultipleChoice", 3, 0, 0.5), ("write", "ExactMatch", 3, 2, None),
    ]  # fmt: skip
    assert all(set(row.tasks) == {"pick", "write"} for row in report.models)
    # The same question three times: all right or all wrong.
    assert {row.tasks["pick"].accuracy for row in report.models} <= {0, 1}
    for table in report.routing:
        rows = [row for layers in table.tasks.values() for row in layers]
        assert list(table.tasks) == ["pick", "write"]
        assert len(rows) == 4
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in rows)
    assert report.tasks[0].origin == f"content/{changed.stage_inputs[pick.input].fingerprint}"  # type: ignore[union-attr]  # of outside
    assert seen[-1].step == seen[-1].steps > 0
    (tmp_path / "pick.jsonl").write_text(json.dumps(choices[0]))
    with pytest.raises(ConfigurationError, match="input changed since preflight"):
        evaluate.run(changed.work(tmp_path, run.recipe(questions=asked)))


def explain(shown: Excerpt, known: list[tuple[list[int], list[list[int]]]]) -> None:
    """Takes an excerpt for whole pieces, each (tokens, experts by layer): the first, then others.

    Rows are packed, so what stands behind a short piece need not be the next one.
    """
    left, rest = list(known), bytes(ord(token) for token in shown.tokens)
    while rest:
        fits = [i for i, (ids, _) in enumerate(left) if bytes(ids).startswith(rest[: len(ids)])]
        assert fits and (fits[0] == 0 or len(left) < len(known)), rest
        ids, experts = left.pop(fits[0])
        first, size = len(shown.tokens) - len(rest), min(len(ids), len(rest))
        for ours, stock in zip(shown.experts, experts, strict=True):
            assert list(ours[first : first + size]) == stock[:size]
        rest = rest[size:]


@torch.no_grad()
def test_histograms_and_excerpts_are_those_of_the_stock_routers(
    run: Run, outcome: Evaluated
) -> None:
    """Probabilities by layer, expert and bin; the first tokens with their likeliest experts."""
    model = AutoModelForCausalLM.from_pretrained(run.folders["final"], dtype=torch.float32)
    table = next(table for table in outcome[1].routing if table.role == "final")
    expected = torch.zeros(2, 3, BINS)
    for name in TEXTS:
        counts = torch.zeros(2, 3, BINS)
        known: list[tuple[list[int], list[list[int]]]] = []
        for piece in pieces(name, 260):
            out = model(torch.tensor([piece[:-1]]), output_router_logits=True)
            for layer, logits in enumerate(out.router_logits):
                for expert, values in enumerate(logits.softmax(-1).T):
                    counts[layer, expert] += torch.histc(values, BINS, 0, 1)
            likeliest = [logits.argmax(-1).tolist() for logits in out.router_logits]
            known.append((piece[:-1], likeliest))
        expected += counts / counts.sum(-1, keepdim=True) / len(TEXTS)
        shown = table.excerpts[name]
        assert shown.layers == (0, 1)
        assert len(shown.tokens) == EXCERPT > LENGTH, "more than a row"
        explain(shown, known)
    found = torch.tensor(table.histograms)
    assert torch.allclose(found, expected, atol=2e-5)
    assert torch.allclose(found.sum(-1), torch.ones(2, 3), atol=2e-4)


def test_a_domain_no_model_has_read_is_untrained(run: Run, tmp_path: Path) -> None:
    """By the inputs of the models' own stages; general is the seed's, an expert's is trained on."""
    changed = changed_run(run, tmp_path)
    columns = list(run.recipe().columns)
    for name in ("read", "unread"):
        prepare(tmp_path / name, TEXTS["general"])
        changed.add(Kind.PREPARE, f"data-{name}", tmp_path / name)
        columns.append(EvaluatedDomain(name=name, input=len(changed.inputs) - 1))
    final = run.recipe().models[-1].input
    stage = changed.inputs[final].manifest.stage  # type: ignore[union-attr]  # an artifact
    read = changed.stage_inputs[columns[-2].input]
    manifest = changed.inputs[final].manifest.model_copy(  # type: ignore[union-attr]  # likewise
        update={"stage": stage.model_copy(update={"inputs": (read,)})}
    )
    changed.inputs[final] = replace(changed.inputs[final], manifest=manifest)

    report = evaluated(changed.work(tmp_path, run.recipe(columns=tuple(columns))))[1]

    assert [d.name for d in report.domains] == ["code", "math", "general", "read", "unread"]
    assert [d.name for d in report.domains if d.untrained] == ["unread"]


def test_the_same_inputs_give_the_same_bytes(run: Run, outcome: Evaluated, tmp_path: Path) -> None:
    """Every file, the page's plots too."""
    again = evaluated(run.work(tmp_path, run.recipe()))

    assert again[2] == outcome[2]


def test_the_batch_size_changes_rounding_only(run: Run, outcome: Evaluated, tmp_path: Path) -> None:
    """Scheduling is not part of the result: the same targets, losses within 1e-5."""
    report = evaluated(run.work(tmp_path, run.recipe(), micro_batch=1))[1]

    assert report.domains == outcome[1].domains
    for ours, theirs in zip(report.models, outcome[1].models, strict=True):
        assert ours.mean_loss == pytest.approx(theirs.mean_loss, abs=1e-5)


def test_bf16_is_close_and_not_the_same(run: Run, outcome: Evaluated, tmp_path: Path) -> None:
    """The recipe's precision is the compute dtype, of Mixtures-of-Experts too."""
    report = evaluated(run.work(tmp_path, run.recipe(precision=Precision.BF16)))[1]

    for ours, theirs in zip(report.models, outcome[1].models, strict=True):
        assert ours.mean_loss == pytest.approx(theirs.mean_loss, rel=0.02)
        assert ours.mean_loss != theirs.mean_loss


def test_soft_routing_reports_weights(run: Run, tmp_path: Path) -> None:
    """Where every token goes to every expert, slots say nothing: the gate's weights are shown."""
    report = evaluated(run.work(tmp_path, run.recipe(routing="Soft")))[1]

    for table in report.routing:
        assert (table.k, table.unit) == (3, "weight")
        rows = [row for layers in table.domains.values() for row in layers]
        assert all(sum(row) == pytest.approx(1, abs=1e-5) for row in rows)
        assert any(max(row) > 0.35 for row in rows)


def test_a_domain_without_held_out_text_has_no_column(run: Run, tmp_path: Path) -> None:
    """It is a deviation; with no other domain left it is the user's error."""
    prepare(tmp_path / "data", TEXTS["code"], held_out=False)
    changed = Run(tmp_path)
    changed.store, changed.inputs = run.store, list(run.inputs)
    changed.stage_inputs = list(run.stage_inputs)
    changed.add(Kind.PREPARE, "silent", tmp_path / "data")
    silent = EvaluatedDomain(name="silent", input=len(run.inputs))
    columns = (run.recipe().columns[1], silent)

    report = evaluated(changed.work(tmp_path, run.recipe(columns=columns)))[1]

    assert [domain.name for domain in report.domains] == ["math"]
    assert report.deviations[-1] == "silent: has no held-out text and no column"
    with pytest.raises(ConfigurationError, match=r"prepare\.heldOut: leaves no held-out tokens"):
        evaluate.run(changed.work(tmp_path, run.recipe(columns=(silent,))))
    with pytest.raises(ConfigurationError, match=r"evaluate\.tokens: leaves no held-out tokens"):
        evaluate.run(run.work(tmp_path, run.recipe(tokens=0)))


def test_a_model_without_a_finite_loss_is_named(run: Run, tmp_path: Path) -> None:
    """A diverged model ends the stage instead of entering the table."""
    broken = load_model(run.folders["seed"])
    broken.model.norm.weight.data[:] = math.nan
    (tmp_path / "broken").mkdir()
    save_model(broken, tmp_path / "broken", torch.float32)
    changed = Run(tmp_path)
    changed.store, changed.stage_inputs = run.store, list(run.stage_inputs)
    changed.inputs = list(run.inputs)
    changed.add(Kind.FINETUNE, "broken", tmp_path / "broken")
    models = (*run.recipe().models[:1], EvaluatedModel(label="final", role="dense", input=9))

    with pytest.raises(TrainerError, match="its loss on code is not finite"):
        evaluate.run(changed.work(tmp_path, run.recipe(models=models)))


def test_progress_reaches_its_end_and_a_stop_is_heeded(run: Run, tmp_path: Path) -> None:
    """Every target of every model is counted; asked to stop, it does so at the next batch."""
    seen: list[Progress] = []
    work = run.work(tmp_path, run.recipe())
    evaluate.run(replace(work, publish=seen.append))

    assert seen[-1].step == seen[-1].steps > 0
    assert {progress.phase for progress in seen} == {"loading", "evaluating"}

    stop: Callable[[], bool] = iter([False] * 5 + [True]).__next__
    with pytest.raises(PreemptedError):
        evaluate.run(replace(run.work(tmp_path, run.recipe()), stopping=stop))


def test_a_dense_run_has_a_seed_and_a_result(run: Run, tmp_path: Path) -> None:
    """Two rows, no routing, no oracle; its mean is a metric."""
    models = (
        EvaluatedModel(label="seed", role="seed", input=0),
        EvaluatedModel(label="final", role="dense", input=1),
    )

    made, report, _ = evaluated(run.work(tmp_path, run.recipe(models=models, routing="")))

    assert (report.method, report.oracle, report.routing) == ("Dense", {}, ())
    assert set(made.metrics) == {"mean_seed", "mean_dense"}
