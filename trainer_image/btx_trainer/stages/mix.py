"""mix: seed and members -> one Mixture-of-Experts model in stock layout. Never runs a model.

inputs: (seed, members...); expert i is member i, the seed (if included) is the last.
"""

from btx_api.spec import RouterInit
from btx_api.stage import MixRecipe

from btx_trainer.families import Normal, expert_order, mix_plan, mixed_config
from btx_trainer.merging import open_models, write_model
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """FFNs become experts, the rest is averaged, routers are fresh (BTX paper section 3.2)."""
    recipe = work.recipe
    assert isinstance(recipe, MixRecipe)
    dense, (seed, *members) = open_models(work)
    models = expert_order(members, seed, include_seed=recipe.include_seed)
    std = recipe.router_std if recipe.router_init is RouterInit.RANDOM else 0.0
    router = Normal(std=std, seed=recipe.random_seed)
    plan = mix_plan(dense, seed.tensors, [1.0] * len(models), router)
    config = mixed_config(dense, seed.tensors, experts=len(models), top_k=recipe.top_k)
    return write_model(work, plan, models, config)
