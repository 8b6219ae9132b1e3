"""AdamW, its schedule, clipping, and its state as arrays. Called by the loop.

Master weights and moments are fp32 whatever the compute dtype is.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from btx_api.spec import Optimizer
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from btx_trainer.distributed import own
from btx_trainer.model import parameter_groups
from btx_trainer.ranks import Ranks

Arrays = dict[str, NDArray[np.float32]]
"""Trainable parameters and optimizer state by name, on the host."""

WEIGHT = "weight"


def lr_at(step: int, steps: int, recipe: Optimizer) -> float:
    """Learning rate of update `step` (from 0) of `steps`: a pure function, nothing to restore.

    Linear warm-up reaches the peak at step warmup_steps; one cosine over all phases reaches
    min_lr_ratio times the peak at the last step (BTX paper section 4.1: peak, warm-up, floor).
    """
    warmup = recipe.warmup_steps
    if step < warmup:
        return recipe.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - 1 - warmup)
    floor = recipe.min_lr_ratio
    return recipe.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))


def adamw(model: nn.Module, recipe: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; matrices decay, vectors do not."""
    return torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )


def gradient_norm(optimizer: torch.optim.Optimizer, ranks: Ranks) -> Tensor:
    """Global 2-norm of the gradients, [], on every rank."""
    norm = get_total_norm(_gradients(optimizer))
    if ranks.world > 1:
        # Every parameter is cut by rows, so that each gradient is counted once.
        norm = norm.square()
        ranks.add(norm)
        norm = norm.sqrt()
    return norm


def update(optimizer: torch.optim.Optimizer, lr: float, norm: Tensor, clip: float) -> None:
    """One step of AdamW after clipping to the global norm `clip` (0: none); drops the gradients."""
    # As torch clips, but each rank its own rows.
    if clip and (gradients := _gradients(optimizer)):
        torch._foreach_mul_(gradients, torch.clamp(clip / (norm + 1e-6), max=1.0))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer, into: dict[str, Tensor]) -> Arrays:
    """Copies what training changes into host memory; `into` keeps the buffers for the next call.

    Names are `weight/<parameter>` and `<moment>/<parameter>`. Frozen parameters are left out: they
    are in the stage's input. Of several ranks each copies the rows it has.
    """
    for name, tensor in _state(model, optimizer):
        if name not in into:
            into[name] = torch.empty(tensor.shape, pin_memory=tensor.is_cuda)
        into[name].copy_(tensor, non_blocking=True)
    if torch.cuda.is_available():
        # The copies to pinned memory are under way; the next step would change what they read.
        torch.cuda.synchronize()
    return {name: buffer.numpy() for name, buffer in into.items()}


def rows(model: nn.Module, arrays: Arrays) -> dict[str, int]:
    """How many rows the whole of each array of a `snapshot` has; scalars are left out."""
    lengths = {name: p.shape[0] for name, p in model.named_parameters()}
    return {key: lengths[key.split("/", 1)[1]] for key, array in arrays.items() if array.ndim}


def restore(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    arrays: Mapping[str, NDArray[np.float32]],
) -> None:
    """Puts back what `snapshot` took, into memory that torch allocates (its alignment counts)."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, array in arrays.items():
            what, name = key.split("/", 1)
            parameter = parameters[name]
            if what != WEIGHT:
                optimizer.state[parameter][what] = (
                    torch.empty_like(parameter)
                    if array.ndim
                    else torch.empty((), device=parameter.device)
                )
            target: Tensor = parameter if what == WEIGHT else optimizer.state[parameter][what]
            own(target).copy_(torch.from_numpy(array))


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [own(p.grad) for p in parameters if p.grad is not None]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield f"{WEIGHT}/{name}", own(parameter.detach())
            moments: dict[str, Any] = optimizer.state.get(parameter, {})
            for what, tensor in moments.items():
                yield f"{what}/{name}", own(tensor)
