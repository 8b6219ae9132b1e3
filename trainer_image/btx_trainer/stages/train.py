"""train: continues pretraining of the seed on prepared domains -> a dense model.

inputs: (seed, prepared domains...).
"""

from btx_api.stage import TrainRecipe

from btx_trainer.loop import begin, train
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """An expert, or the dense baseline; metrics: own held-out loss at both ends, and the gain."""
    assert isinstance(work.recipe, TrainRecipe)
    return train(work, begin(work, work.recipe, work.recipe.data))
