"""What `btx plan` says a stage costs, against torch's own counter around the stage as it runs."""

import importlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_api.artifact import Maker
from btx_api.methods import Graph, graph
from btx_api.spec import BTXRunSpec, Scheduling
from btx_api.stage import RECIPES, Content, Preflight, Stage, TaskExecution
from btx_operator.flops import cost
from btx_trainer import loop
from btx_trainer.artifacts import Artifact, Attempt, Outside, find
from btx_trainer.model import load_model
from btx_trainer.preflight import preflight
from btx_trainer.storage import open_store
from btx_trainer.work import Work
from tiny import write_llama
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

LENGTH, ROWS = 128, 4
"""Of a sequence, in tokens; of a batch, in sequences."""
BATCH = LENGTH * ROWS
NAMES = ("code", "math", "general")
SEED: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "sequenceLength": LENGTH, "batchTokens": BATCH, "heldOutTokens": 2 * BATCH, "precision": "fp32",
}  # fmt: skip
TOLERANCE = 0.02


def grouped(a: Any, b: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    """Rows of `a` by one matrix each; or, for the weights' gradient, columns by rows in groups."""
    return int(2 * a[0] * a[1] * (b[2] if len(b) == 3 else b[1]))


def added(into: Any, a: Any, b: Any, *_: Any, **__: Any) -> int:
    """A product that is added to what is there, in place."""
    return int(2 * a[0] * a[1] * b[1])


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """The CPU's kernel computes what the others do."""
    return int(sdpa_flop_count(query, key, value))


def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """As above."""
    return int(sdpa_backward_flop_count(grad, query, key, value))


ATEN = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    ATEN._grouped_mm: grouped,
    ATEN.addmm_: added,
    ATEN._scaled_dot_product_flash_attention_for_cpu: attention,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
"""What torch counts as 0."""


def counting() -> FlopCounterMode:
    """A counter that knows every product of ours."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A seed, and three domains whose held-out documents are whole sequences."""
    root = tmp_path_factory.mktemp("plan")
    write_llama(root / "seed", **SEED)
    for name in NAMES:
        # One token more than targets; the end of a document is one as well.
        texts = [f"{name} {i} ".ljust(2 * LENGTH, ".") for i in range(60)]
        lines = [json.dumps({"text": text}) for text in texts]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    return root


def a_spec(folder: Path, **changes: Any) -> BTXRunSpec:
    """Two experts of 3 and 2 steps, finetuned for 4; held-out data enough for all it asks."""
    experts = [
        {"name": name, "tokens": tokens, "data": [{"uri": f"file://{folder}/{name}.jsonl"}]}
        for name, tokens in (("code", 3 * BATCH), ("math", 2 * BATCH))
    ]
    phases = [{"tokens": 4 * BATCH, "domains": dict.fromkeys(NAMES, 1)}]
    finetune = {"data": phases, **changes.pop("finetune", TRAINING)}
    return BTXRunSpec.parse({
        "storage": {"uri": f"file://{folder}/storage"}, "seed": {"uri": f"file://{folder}/seed"},
        "general": [{"uri": f"file://{folder}/general.jsonl"}], "experts": experts,
        "prepare": {"tokenizer": "bytes", "heldOut": 0.5}, "train": TRAINING, "finetune": finetune,
        "evaluate": {"tokens": 2 * BATCH, "sequenceLength": LENGTH, "precision": "fp32"},
        **changes,
    })  # fmt: skip


def opened(stage: Stage, execution: TaskExecution) -> tuple[Artifact | Outside, ...]:
    """A stage's inputs, as __main__ opens them."""
    store, found = open_store(execution.storage), []
    for item, location in zip(stage.inputs, execution.inputs, strict=True):
        if isinstance(item, Content):
            found.append(
                Outside(location=location, fingerprint=item.fingerprint, storage=execution.storage)
            )
        else:
            found.append(find(store, location.kind, item.digest))
    return tuple(found)


def run_stage(spec: BTXRunSpec, name: str, nodes: Graph, scheduling: Scheduling) -> int:
    """One stage in this process, committed; the FLOPs that torch counted."""
    node = nodes[name]
    stage, store = node.stage, open_store(spec.storage)
    if find(store, stage.kind, stage.digest):
        return 0
    execution = TaskExecution(
        storage=spec.storage, name=name, inputs=node.locations, scheduling=scheduling
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = Work(
            stage=stage, recipe=RECIPES[stage.kind].parse(stage.recipe), execution=execution,
            store=store, inputs=opened(stage, execution), out=Attempt(store, stage),
            scratch=Path(scratch), publish=lambda progress: None, stopping=lambda: False,
        )  # fmt: skip
        module = importlib.import_module(f"btx_trainer.stages.{stage.kind}")
        with counting() as counter:
            made = module.run(work)
        work.out.commit(metrics=made.metrics, deviations=(), maker=Maker(), parents=())
    return int(counter.get_total_flops())


def off(
    spec: BTXRunSpec, *, micro_batch: int | None = None, to: str = "finetune"
) -> dict[str, float]:
    """How far the plan of each stage up to one is from its count, as a share; all run for real."""
    found = preflight(Preflight(spec=spec, uid=""))
    assert found.problems == ()
    scheduling = Scheduling(threads=1, micro_batch=micro_batch)
    nodes = graph(spec, found)
    names = list(nodes)
    counted = {n: run_stage(spec, n, nodes, scheduling) for n in names[: names.index(to) + 1]}
    planned = {n: cost(nodes[n].stage, found.parameters, scheduling).flops for n in names}
    return {name: abs(planned[name] - flops) / flops for name, flops in counted.items() if flops}


def test_the_counter_counts_what_a_hand_does() -> None:
    """Grouped products of 10 rows by [8, 16], attention of 2 heads of 8 over 16 tokens squared."""
    rows, weights = torch.ones(10, 8, requires_grad=True), torch.ones(3, 8, 16, requires_grad=True)
    offsets = torch.tensor([2, 5, 10], dtype=torch.int32)
    with FlopCounterMode(display=False) as blind, counting() as counter:
        product = torch.nn.functional.grouped_mm(rows, weights, offs=offsets)
    assert counter.get_total_flops() == 2 * 10 * 8 * 16
    assert blind.get_total_flops() == 0
    with counting() as counter:
        product.backward(torch.ones_like(product))
    assert counter.get_total_flops() == 2 * (2 * 10 * 8 * 16)
    with counting() as counter:
        torch.zeros(8, 16).addmm_(torch.ones(8, 10), torch.ones(10, 16))
    assert counter.get_total_flops() == 2 * 10 * 8 * 16
    query = torch.ones(1, 2, 16, 8, requires_grad=True)
    with counting() as counter:
        seen = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
    square = 2 * 2 * 16 * 16 * 8
    assert counter.get_total_flops() == 2 * square
    with counting() as counter:
        seen.backward(torch.ones_like(seen))
    assert counter.get_total_flops() == 5 * square


def test_a_run_costs_what_its_plan_says(folder: Path) -> None:
    """Every stage of BTX within the tolerance: training, finetuning, evaluation."""
    found = off(a_spec(folder), to="evaluate")
    assert found.keys() == {"train-code", "train-math", "finetune", "evaluate"}
    assert max(found.values()) < TOLERANCE


def test_the_data_matched_dense_run_costs_what_its_plan_says(folder: Path) -> None:
    """Both phases of its training, and the held-out losses of every domain."""
    phases = [{"tokens": 4 * BATCH, "domains": dict.fromkeys(NAMES, 1)}]
    found = off(a_spec(folder, method="Dense", finetune={"data": phases}), to="evaluate")
    assert found.keys() == {"train-dense", "evaluate"}
    assert max(found.values()) < TOLERANCE


VARIANTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "Soft": ({"routing": {"method": "Soft"}}, None),
    "the router alone": ({"trainable": "Router"}, None),
    "all but the experts": ({"trainable": "AllButExperts"}, None),
    "a router that starts from the data": ({"routing": {"init": "DomainMean"}}, None),
    "several micro-batches": ({"randomSeed": 1}, 1),
    "several micro-batches without balance": ({"routing": {"alpha": 0}}, 1),
    "long sequences": ({"sequenceLength": 512}, None),
}


@pytest.mark.parametrize("case", VARIANTS)
def test_a_finetune_costs_what_its_plan_says(folder: Path, case: str) -> None:
    """Whatever is trained, however tokens are routed, however a batch is cut."""
    changes, micro_batch = VARIANTS[case]
    found = off(a_spec(folder, finetune={**TRAINING, **changes}), micro_batch=micro_batch)
    assert found["finetune"] < TOLERANCE


def test_the_experts_implementation_changes_no_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop over the experts multiplies as much as the grouped kernel."""
    eager = partial(load_model, experts_implementation="eager")
    monkeypatch.setattr(loop, "load_model", eager)
    assert off(a_spec(folder, finetune={**TRAINING, "randomSeed": 2}))["finetune"] < TOLERANCE
