"""Counts where tokens go while a model runs: loads, routing probabilities, a few tokens' experts.

Called by evaluation.py and answers.py around their forward passes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from btx_trainer import routing
from btx_trainer.analysis import BINS, Excerpt
from btx_trainer.routing import LayerRouting

EXCERPT = 64
"""Tokens of an excerpt."""


class Tally:
    """Sums over the tokens of one domain or task; empty for a dense model."""

    def __init__(self) -> None:
        self.load = torch.zeros(())
        """[layers, experts]: slots, or where every token goes to every expert the gate's weight."""
        self.histogram = torch.zeros(())
        """[layers, experts, BINS]: tokens by their routing probability."""

    def add(self, layers: Sequence[LayerRouting], mask: Tensor) -> None:
        """One recorded forward pass; only tokens of the mask (a bool per token) count."""
        if not layers:
            return
        mask = mask.flatten()
        if layers[0].experts.shape[-1] == layers[0].probabilities.shape[-1]:
            load = routing.balance_terms(layers, mask).sum_u.double()
        else:
            load = routing.slot_counts(layers, torch.where(mask, 0, -1))[0]
        self.load = self.load + load.cpu()
        parts = [_histogram(layer.probabilities[mask]) for layer in layers]
        self.histogram = self.histogram + torch.stack(parts).cpu()


def _histogram(probabilities: Tensor) -> Tensor:
    """[tokens, experts] -> [experts, BINS]."""
    experts = probabilities.shape[-1]
    bins = (probabilities * BINS).long().clamp(max=BINS - 1)
    places = bins + torch.arange(experts, device=bins.device) * BINS
    return torch.bincount(places.flatten(), minlength=experts * BINS).view(experts, BINS)


def excerpt(
    layers: Sequence[LayerRouting], ids: Tensor, mask: Tensor, text: Callable[[list[int]], str]
) -> Excerpt:
    """The first tokens of the mask; `ids` and `mask` are [sequences, length], as in the pass."""
    places = mask.flatten().nonzero().flatten()[:EXCERPT]
    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    return Excerpt(
        layers=tuple(shown),
        tokens=tuple(text([i]) for i in ids.flatten()[places].tolist()),
        experts=tuple(tuple(layers[i].experts[places, 0].tolist()) for i in shown),
    )
