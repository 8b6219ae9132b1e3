"""Every example is a manifest that both readers accept; the paper's recipe has the paper's numbers."""

from pathlib import Path

import pytest
from btx_api.methods import graph
from btx_api.spec import BTXRunSpec
from btx_operator import manifest
from builders import resolved_for

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def spec_of(path: Path) -> BTXRunSpec:
    return manifest.read(path).spec


def test_there_are_examples() -> None:
    """The next test would pass without any."""
    assert {path.stem for path in EXAMPLES} >= {"quickstart", "quickstart-cluster", "paper-7b"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_accepted_and_has_a_graph(path: Path) -> None:
    """As `btx plan` reads it; tests/cluster/test_crd.py gives each to the API server as well."""
    spec = spec_of(path)

    assert "evaluate" in graph(spec, resolved_for(spec))


def test_the_papers_recipe() -> None:
    """Tokens, mixtures and optimiser of arXiv 2403.07816, section 4.1 and the table of mixtures."""
    spec = spec_of(ROOT / "examples/paper-7b.yaml")
    tokens = {expert.name: expert.tokens for expert in spec.experts}
    (phase,) = spec.finetune.data
    weights = {e.name: round(sum(s.weight for s in e.data), 2) for e in spec.experts}

    assert tokens == {"math": 201 * 10**9, "code": 210 * 10**9, "wikipedia": 42 * 10**9}
    assert sum(tokens.values()) + phase.tokens == 533 * 10**9
    assert weights == {"math": 102.98, "code": 99.01, "wikipedia": 100.0}
    assert phase.domains == {"math": 30.16, "code": 40.31, "wikipedia": 10.3, "general": 19.23}
    assert sum(phase.domains.values()) == pytest.approx(100)
    for block in (spec.train, spec.finetune):
        assert (block.sequence_length, block.batch_tokens) == (4096, 4 * 2**20)
        optimizer = block.optimizer
        assert (optimizer.lr, optimizer.warmup_steps, optimizer.min_lr_ratio) == (1e-4, 100, 0.1)
        assert optimizer.weight_decay == 0.1
    assert (spec.finetune.routing.k, spec.finetune.routing.alpha) == (2, 0.01)
    assert spec.mixed_experts(3) == 4
