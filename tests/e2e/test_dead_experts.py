"""From a manifest to the event: real trainers, the local engine, experts that get no token."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from btx_api.spec import BTXRunSpec
from btx_api.status import EventReason, State
from btx_operator.local import LocalBackend
from btx_operator.observed import Event
from tiny import write_llama

NAMES = ("code", "math")
TRAINING = {"sequenceLength": 32, "batchTokens": 128, "heldOutTokens": 64, "precision": "fp32"}
CASES: dict[str, dict[str, Any]] = {
    # All logits are 0, and of equals the first two are taken.
    "dead": {"mix": {"routerInit": "Zero"}, "routing": {"alpha": 0}},
    "balanced": {"mix": {"routerStd": 1.0, "includeSeed": False}, "routing": {"alpha": 0.01}},
}


def a_spec(folder: Path, case: str) -> BTXRunSpec:
    """Two ready experts, finetuned for 12 steps in which the router cannot move."""
    for number, name in enumerate(("seed", *NAMES)):
        write_llama(folder / name, number)
        lines = [json.dumps({"text": f"{name} {i} " * 20}) for i in range(20)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    experts = [
        {
            "name": n,
            "model": f"file://{folder}/{n}",
            "data": [{"uri": f"file://{folder}/{n}.jsonl"}],
        }
        for n in NAMES
    ]
    finetune = {
        **TRAINING, "data": [{"tokens": 12 * 128, "domains": dict.fromkeys(NAMES, 1)}],
        "optimizer": {"lr": 1e-12, "weightDecay": 0}, "routing": CASES[case]["routing"],
    }  # fmt: skip
    return BTXRunSpec.parse({
        "storage": {"uri": f"file://{folder}/storage"}, "seed": {"uri": f"file://{folder}/seed"},
        "experts": experts, "prepare": {"tokenizer": "bytes", "heldOut": 0.2},
        "mix": CASES[case]["mix"], "finetune": finetune,
        "execution": {"finetune": {"deadExpertSteps": 4}},
    })  # fmt: skip


@pytest.mark.parametrize(("case", "dead"), [("dead", ["0.2", "1.2"]), ("balanced", [])])
def test_experts_that_get_no_token_are_one_event(
    tmp_path: Path, case: str, dead: list[str]
) -> None:
    """The engine tells it once and keeps it in status; a run whose experts all work has none."""
    told: list[Event] = []

    def hear(_: str, event: Event) -> None:
        if event.reason in (EventReason.EXPERT_DEAD, EventReason.EXPERT_ALIVE):
            told.append(event)

    backend = LocalBackend(tmp_path / ".btx", slots=1, on_event=hear)

    def until_finetuned() -> None:
        row = backend.status("run").row("finetune")
        if row and row.state in (State.COMPLETE, State.FAILED) and not backend.closing:
            backend.interrupt()

    backend.open("run", a_spec(tmp_path, case))
    try:
        asyncio.run(backend.run_until_done(tick=until_finetuned))
        row = backend.status("run").row("finetune")
    finally:
        backend.close()
    assert row and row.state is State.COMPLETE, backend
    assert [event.reason for event in told] == [EventReason.EXPERT_DEAD] * bool(dead)
    assert row.dead_experts.startswith(f"{len(dead)}" if dead else "")
    assert bool(row.dead_experts) is bool(dead)
