"""evaluate: every model on every domain and task -> report.json, report.html, model card.

inputs: (models..., prepared domains..., files of tasks...).
"""

from collections.abc import Mapping
from contextlib import suppress

from btx_api.artifact import HISTORY, MODEL_CARD, REPORT_HTML, REPORT_JSON
from btx_api.stage import EvaluatedTask, EvaluateRecipe

from btx_trainer import report, shards, tasks
from btx_trainer.artifacts import Artifact, Outside
from btx_trainer.distributed import set_up
from btx_trainer.errors import ConfigurationError
from btx_trainer.evaluation import BATCH_TOKENS, Plan, Watch, measure
from btx_trainer.scores import Asked, tabulate
from btx_trainer.shards import TOKENIZER, Prepared
from btx_trainer.tasks import Questions
from btx_trainer.tokenizer import Tokenizer, load
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """One model in memory at a time; metrics: mean held-out loss over the domains, by role.

    Raises ConfigurationError when no domain has held-out text, PreemptedError when asked to stop.
    """
    recipe = work.recipe
    assert isinstance(recipe, EvaluateRecipe)
    scheduling = work.execution.scheduling
    length = recipe.sequence_length
    opened = {c.name: shards.open(work.inputs[c.input].fetch()) for c in recipe.columns}
    # A document's first token is never predicted, and its last (eos) stands for no text.
    domains = {
        name: p
        for name, p in opened.items()
        if p.index.held_out.tokens > 2 * p.index.held_out.documents
    }
    if not domains or not recipe.tokens:
        field = "evaluate.tokens" if domains else "prepare.heldOut"
        raise ConfigurationError(field, "leaves no held-out tokens to measure anything on")
    asked = tuple(_questions(work, shape) for shape in recipe.questions)
    plan = Plan(
        domains=domains, sequence_length=length, tokens=recipe.tokens, routing=recipe.routing,
        compute=set_up(scheduling, recipe.precision), tokenizer=_tokenizer(work, recipe),
        batch_size=scheduling.micro_batch or max(1, BATCH_TOKENS // length), tasks=asked,
    )  # fmt: skip
    watch = Watch(work, plan, len(recipe.models))
    measured = [measure(work.inputs[m.input].fetch(), plan, watch) for m in recipe.models]
    origins = _origins(work)
    result = tabulate(
        recipe, measured, origins=origins, histories=_histories(work, recipe),
        tokenizer=plan.tokenizer.kind, deviations=_deviations(work, recipe, domains),
        trained=_trained(work, recipe),
        asked=[
            Asked(
                shape=shape, questions=len(task.asked), chance=task.chance,
                origin=origins[shape.input],
            )
            for shape, task in zip(recipe.questions, asked, strict=True)
        ],
    )  # fmt: skip
    work.out.put(REPORT_JSON, result.json_text().encode())
    work.out.put(MODEL_CARD, report.card(result).encode())
    report.render([(report.title(result), result)], work.scratch / "report")
    for name in (REPORT_HTML, report.SUMMARY):
        work.out.add(work.scratch / "report" / name, name)
    means = {f"mean_{r.role}": r.mean_loss for r in result.models if r.role != "expert"}
    return Made(metrics=means)


def _questions(work: Work, shape: EvaluatedTask) -> Questions:
    item = work.inputs[shape.input]
    assert isinstance(item, Outside)
    item.check()
    [source] = item.location.sources
    return tasks.read(shape, source, work.execution.storage)


def _tokenizer(work: Work, recipe: EvaluateRecipe) -> Tokenizer:
    """That of the run: all its domains were prepared with it."""
    path = work.inputs[recipe.columns[0].input].fetch() / TOKENIZER
    return load(path if path.exists() else None)


def _trained(work: Work, recipe: EvaluateRecipe) -> set[int]:
    """Inputs with a domain that the stage of a model has read."""
    models = [work.inputs[model.input] for model in recipe.models]
    read = [i for m in models if isinstance(m, Artifact) for i in m.manifest.stage.inputs]
    return {column.input for column in recipe.columns if work.stage.inputs[column.input] in read}


def _origins(work: Work) -> list[str]:
    parents = [item.parent for item in work.inputs]
    return [f"{p.kind}/{p.digest}" if p.kind else f"content/{p.fingerprint}" for p in parents]


def _histories(work: Work, recipe: EvaluateRecipe) -> dict[int, str]:
    found = {}
    for model in recipe.models:
        item = work.inputs[model.input]
        # A soup and a mixed model have none.
        if isinstance(item, Artifact):
            with suppress(FileNotFoundError):
                found[model.input] = item.read(HISTORY).decode()
    return found


def _deviations(work: Work, recipe: EvaluateRecipe, domains: Mapping[str, Prepared]) -> list[str]:
    named = [(model.label, model.input) for model in recipe.models]
    named += [(column.name, column.input) for column in recipe.columns]
    found = [
        f"{name}: {text}"
        for name, number in named
        if isinstance(item := work.inputs[number], Artifact)
        for text in item.manifest.deviations
    ]
    return found + [
        f"{column.name}: has no held-out text and no column"
        for column in recipe.columns
        if column.name not in domains
    ]
