"""What a stage costs by formula: tokens, steps, FLOPs; pure. Called by `btx plan`.

Forward of one token: 2 N + 4 L H T. N: parameters that are multiplied (of an MoE: the active ones),
L: layers, H: heads x head size, T: sequence length; attention over the full square, not halved for
the causal mask. Training is three forwards (activations' and weights' gradients), two where
weights are frozen. Held-out losses count forwards over as many tokens as the recipe allows.
Not counted: norms, softmax, the optimizer, the router's first act (DomainMean).
"""

from dataclasses import dataclass

from btx_api.spec import RoutingMethod, Trainable
from btx_api.stage import (
    RECIPES,
    EvaluateRecipe,
    FinetuneRecipe,
    Kind,
    Parameters,
    Stage,
    TrainRecipe,
)

SPARSE_ROLES = ("mixed", "final")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one stage; all 0 for stages that run no model."""

    tokens: int = 0
    """Trained on, whole steps."""
    steps: int = 0
    flops: float = 0.0
    """At most: held-out data may be shorter than the recipe allows."""


def cost(stage: Stage, parameters: Parameters) -> Cost:
    """Tokens, steps and FLOPs of one stage over all its attempts, none of it lost."""
    recipe = RECIPES[stage.kind].parse(stage.recipe)
    if isinstance(recipe, EvaluateRecipe):
        return _evaluate(recipe, parameters)
    if not isinstance(recipe, TrainRecipe | FinetuneRecipe):
        return Cost()
    steps = sum(-(-phase.tokens // recipe.batch_tokens) for phase in recipe.data)
    tokens = steps * recipe.batch_tokens
    domains = {name for phase in recipe.data for name in phase.domains}
    measured = 2 * len(domains) * recipe.held_out_tokens
    sparse = stage.kind is Kind.FINETUNE
    forward = forward_flops(parameters, recipe.sequence_length, sparse=sparse)
    frozen = _frozen(recipe, parameters) if isinstance(recipe, FinetuneRecipe) else 0
    flops = tokens * (3 * forward - 2 * frozen) + measured * forward
    return Cost(tokens=tokens, steps=steps, flops=float(flops))


def forward_flops(parameters: Parameters, sequence_length: int, *, sparse: bool) -> int:
    """FLOPs of one token's forward pass through the seed, or (`sparse`) the mixed model."""
    p = parameters
    multiplied = (p.active if sparse else p.dense) - p.head
    return 2 * multiplied + 4 * p.layers * p.hidden * sequence_length


def _evaluate(recipe: EvaluateRecipe, parameters: Parameters) -> Cost:
    per_token = sum(
        forward_flops(parameters, recipe.sequence_length, sparse=model.role in SPARSE_ROLES)
        for model in recipe.models
    )
    return Cost(flops=float(per_token * recipe.tokens * len(recipe.columns)))


def _frozen(recipe: FinetuneRecipe, parameters: Parameters) -> float:
    """Active parameters without a weight gradient."""
    p, k = parameters, recipe.routing.k
    if recipe.trainable is Trainable.ALL:
        return 0
    if recipe.trainable is Trainable.ROUTER:
        return p.active - p.head
    # dense = shared + one expert, active = shared + k experts. Soft reads all experts and its k
    # says nothing: there the seed's own share is left out, so the bound is a little too high.
    return (p.active - p.dense) * (
        k / (k - 1) if recipe.routing.method is RoutingMethod.TOP_K else 1
    )
