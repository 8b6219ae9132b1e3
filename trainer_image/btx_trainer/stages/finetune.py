"""finetune: trains the mixed model and its router -> the final Mixture-of-Experts model.

inputs: (mixed model, prepared domains...).
"""

from dataclasses import replace

from btx_api.spec import Phase
from btx_api.stage import ROUTER_TOKENS, FinetuneRecipe
from torch import Tensor

from btx_trainer import routing
from btx_trainer.data import Sampler
from btx_trainer.loop import Job, begin, parts_of, train
from btx_trainer.model import freeze
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """The router's start from data is the first act, then the steps, if any (tokens: 0).

    Raises ConfigurationError when the routing rule does not fit the model or its experts.
    """
    recipe = work.recipe
    assert isinstance(recipe, FinetuneRecipe)
    job = begin(work, recipe, recipe.data)
    config = job.model.config
    experts = routing.count_experts(job.model)
    rule = routing.rule_for(recipe.routing, experts, config.model_type)
    routing.install(job.model, rule)
    freeze(job.model, recipe.trainable)
    exported = rule.export(config.model_type)
    job = replace(
        job,
        alpha=recipe.routing.alpha,
        router_data=[(e, _sample(job, i)) for e, i in enumerate(recipe.experts) if i],
        config=exported if isinstance(exported, dict) else {},
    )
    return train(work, job)


def _sample(job: Job, domain: int) -> list[tuple[Tensor, Tensor]]:
    """Some of a domain's training data, as `init_domain_mean` takes it."""
    length = job.recipe.sequence_length
    tokens = max(1, min(ROUTER_TOKENS, job.recipe.batch_tokens) // length) * length
    data = Sampler(
        phases=[Phase(tokens=tokens, domains={str(domain): 1.0})], domains=job.domains,
        sequence_length=length, batch_tokens=tokens, seed=job.recipe.random_seed,
    )  # fmt: skip
    return [(ids, positions) for ids, positions, _ in parts_of(data.batch(0), job)]
