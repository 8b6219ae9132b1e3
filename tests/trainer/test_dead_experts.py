"""A forced-dead expert at /metrics and /progress of a real finetune; a balanced one is not there."""

import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from btx_api.spec import Optimizer, Routing
from btx_api.stage import Kind, Progress
from btx_trainer.stages import finetune
from btx_trainer.telemetry import Telemetry
from torch import nn
from training import SHAPE, Studio, finetune_recipe
from transformers import MixtralConfig

STEPS, WINDOW = 6, 3
METRIC = "btx_trainer_dead_experts{"


def never_the_last(model: nn.Module) -> None:
    """Of logits a, -a, b, -b, 0 two are above 0: top-2 never takes the last expert."""
    for layer in model.model.layers:
        gate = layer.mlp.gate.weight
        gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0


def in_turn(model: nn.Module) -> None:
    """Routers of one size for every expert, at random: each gets its share of the slots."""
    for number, layer in enumerate(model.model.layers):
        draw = torch.Generator().manual_seed(number)
        layer.mlp.gate.weight.copy_(torch.randn(layer.mlp.gate.weight.shape, generator=draw))


def scrape(port: int, page: str) -> str:
    """What a monitor would read."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=30) as answer:
        text: str = answer.read().decode()
    return text


def watched(studio: Studio, name: str) -> tuple[list[float], list[Progress]]:
    """Finetunes a model whose router stays as it is; the metric and the progress of each step."""
    recipe = finetune_recipe(
        STEPS, routing=Routing(alpha=0), optimizer=Optimizer(lr=1e-9, weight_decay=0)
    )
    telemetry = Telemetry(run="r", stage="finetune", kind=Kind.FINETUNE)
    server = telemetry.serve("127.0.0.1:0")
    port, metrics, seen = server.server_address[1], list[float](), list[Progress]()

    def publish(progress: Progress) -> None:
        telemetry.publish(progress)
        if progress.phase == "training":
            lines = scrape(port, "metrics").splitlines()
            metrics.extend(float(x.split()[-1]) for x in lines if x.startswith(METRIC))
            seen.append(Progress.model_validate_json(scrape(port, "progress")))

    task = studio.task(recipe, [name, "letters", "sums"], dead_expert_steps=WINDOW)
    try:
        finetune.run(studio.work(task, publish))
    finally:
        server.shutdown()
        server.server_close()
    return metrics, seen


@pytest.mark.parametrize(
    ("change", "count", "names"),
    [(never_the_last, 2.0, ("0.4", "1.4")), (in_turn, 0.0, ())],
)
def test_a_dead_expert_is_a_metric(
    tmp_path: Path, change: Callable[[nn.Module], None], count: float, names: tuple[str, ...]
) -> None:
    """From the last step of the window on, one per layer; 0 where every expert gets its share."""
    studio = Studio(tmp_path)
    config = MixtralConfig(**SHAPE, num_local_experts=5, num_experts_per_tok=2)
    studio.add_model("forced", config, change)
    metrics, seen = watched(studio, "forced")
    before, after = WINDOW - 1, STEPS - WINDOW + 1
    assert metrics == [0.0] * before + [count] * after
    assert [p.dead_experts for p in seen] == [()] * before + [names] * after
    if not names:
        assert min(min(p.expert_load) for p in seen) > 0.1 / 5
