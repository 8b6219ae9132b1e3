"""average: the uniform mean of the seed and the members -> a dense model. Never runs a model.

inputs: (seed, members...).
"""

from btx_api.stage import AverageRecipe

from btx_trainer.families import average_plan, expert_order
from btx_trainer.merging import open_models, write_model
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """Every tensor is the mean over exactly the mixed models (BTX paper section 3.2)."""
    recipe = work.recipe
    assert isinstance(recipe, AverageRecipe)
    dense, (seed, *members) = open_models(work)
    models = expert_order(members, seed, include_seed=recipe.include_seed)
    plan = average_plan(dense, seed.tensors, [1.0] * len(models))
    return write_model(work, plan, models, seed.config)
