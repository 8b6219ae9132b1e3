"""The demo as a person runs it, and its model in the hands of stock transformers."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from btx_api.spec import Routing
from btx_trainer import shards
from btx_trainer.data import held_out_batches
from btx_trainer.model import forward_hidden, load_model
from btx_trainer.routing import install, rule_for
from transformers import AutoModelForCausalLM, AutoTokenizer
from workspace import REPOSITORY, Workspace

EXPERTS = 4


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder that the demo made, what it printed)."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(REPOSITORY / "examples/demo.py")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return folder / "build/demo", done.stdout


@pytest.fixture(scope="module")
def stock(demo: tuple[Path, str]) -> torch.nn.Module:
    """The final model, loaded as the demo's last lines say."""
    model, info = AutoModelForCausalLM.from_pretrained(
        demo[0] / "model", dtype=torch.float32, output_loading_info=True,
        experts_implementation="grouped_mm", attn_implementation="sdpa",
    )  # fmt: skip
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def documents(folder: Path, domain: str, tokens: int) -> Iterator[np.ndarray]:
    """Held-out pieces of a prepared domain, cut as evaluate cuts them."""
    run = Workspace(folder.parent.parent)
    prepared = shards.open(run.artifact(f"prepare-{domain}", "quickstart"))
    for batch in held_out_batches(prepared, sequence_length=128, max_tokens=tokens, batch_size=16):
        for ids, positions, labels in zip(
            batch.input_ids, batch.position_ids, batch.labels, strict=True
        ):
            starts = [*np.flatnonzero(positions == 0), len(ids)]
            for start, end in pairwise(starts):
                targets = labels[start:end]
                kept = int((targets != -100).sum())
                if kept:
                    yield np.append(ids[start : start + kept], targets[kept - 1])


def test_the_demo_prints_table_places_and_how_to_load(demo: tuple[Path, str]) -> None:
    """A person sees what won, what did not, and where it is."""
    folder, printed = demo

    for words in ("final", "soup", "general", "AutoModelForCausalLM", "report.html"):
        assert words in printed
    for file in ("model/config.json", "report.html", "report.json"):
        assert (folder / file).stat().st_size > 0
    sentences = json.loads((folder / "report.json").read_text())["sentences"]
    assert sentences
    assert [s for s in sentences if s not in " ".join(printed.split())] == []


def test_the_final_model_generates(demo: tuple[Path, str], stock: torch.nn.Module) -> None:
    """With its own tokenizer, through stock generate."""
    tokenizer = AutoTokenizer.from_pretrained(demo[0] / "model")
    prompt = tokenizer("import ", return_tensors="pt")

    out = stock.generate(**prompt, max_new_tokens=20, do_sample=False)  # type: ignore[operator]  # transformers is untyped here

    assert out.shape[1] == prompt["input_ids"].shape[1] + 20
    assert tokenizer.decode(out[0]).startswith("import ")


def test_stock_logits_equal_the_trainers(demo: tuple[Path, str], stock: torch.nn.Module) -> None:
    """fp32, same experts and attention, no cache: within 1e-6 x max(5, max |logit|)."""
    ours = load_model(demo[0] / "model").eval()
    install(ours, rule_for(Routing(), EXPERTS, "mixtral"))
    for domain in ("code", "math"):
        ids = torch.tensor(next(documents(demo[0], domain, 4096)))[None]
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            theirs = stock(input_ids=ids, use_cache=False).logits
            hidden = forward_hidden(ours, ids, positions)
            mine = hidden @ ours.get_output_embeddings().weight.T

        worst = (mine - theirs).abs().max().item()
        assert worst <= 1e-6 * max(5.0, theirs.abs().max().item())


@pytest.mark.parametrize("domain", ["code", "prose", "math", "general", "docstrings"])
def test_held_out_losses_are_what_stock_code_computes(
    demo: tuple[Path, str], stock: torch.nn.Module, domain: str
) -> None:
    """One document piece at a time, no packing: equal to report.json within 1e-4."""
    report = json.loads((demo[0] / "report.json").read_text())["runs"]["quickstart"]
    row = next(row for row in report["models"] if row["role"] == "final")
    told = row["scores"][domain]["loss"]
    nats, count = 0.0, 0
    with torch.no_grad():
        for piece in documents(demo[0], domain, 32_768):
            ids = torch.tensor(piece)[None]
            logits = stock(input_ids=ids[:, :-1], use_cache=False).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1

    assert nats / count == pytest.approx(told, abs=1e-4)


def test_the_domain_that_nobody_trained_on_is_marked(demo: tuple[Path, str]) -> None:
    """In the table, the page, the model card and the sentences; it is the only one."""
    folder, printed = demo
    report = json.loads((folder / "report.json").read_text())

    for run in report["runs"].values():
        marked = [domain["name"] for domain in run["domains"] if domain.get("untrained")]
        assert marked == ["docstrings"]
    assert "docstrings†" in printed and "† no model of the run was trained" in printed
    assert '<th scope="col">docstrings†</th>' in (folder / "report.html").read_text()
    card = (folder / "model/README.md").read_text()
    assert "| docstrings† |" in card and "Nobody trained on docstrings: there the final" in card
    assert sum("Nobody trained on docstrings" in text for text in report["sentences"]) == 2


def test_the_task_is_what_stock_code_computes(
    demo: tuple[Path, str], stock: torch.nn.Module
) -> None:
    """One choice at a time: the same accuracy as in report.json, but for ties within 1e-4 nats."""
    report = json.loads((demo[0] / "report.json").read_text())["runs"]["quickstart"]
    final = next(row for row in report["models"] if row["role"] == "final")
    lines = (demo[0] / "data/products.jsonl").read_text().splitlines()
    *records, last = map(json.loads, lines)
    shots = "".join(f"{r['question']} {r['answer']}\n\n" for r in records[:2])
    right, close = 0, 0
    for record in [*records[2:], last]:
        prompt = (shots + record["question"]).encode()
        scores = []
        for choice in record["choices"]:
            ids = torch.tensor([[*prompt, *f" {choice}".encode()]])
            with torch.no_grad():
                logits = stock(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            kept = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
            scores.append(kept.sum().item())
        first, second = sorted(scores)[:-3:-1]
        close += first - second < 1e-4
        right += record["choices"][scores.index(first)] == record["answer"]

    told = final["tasks"]["products"]["accuracy"] * len(lines[2:])
    assert abs(told - right) <= close + 1e-3
    assert close < 5
