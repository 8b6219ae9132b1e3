"""(spec, what its URIs hold, members) -> the graph of stages; one function per method; pure.

Called by the engine at every step, by preflight (what is complete?) and by `btx plan`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from btx_api.spec import (
    GENERAL,
    BTXRunSpec,
    DataInit,
    Evaluate,
    EvaluationDomain,
    EvaluationTask,
    Expert,
    Method,
    Model,
    Phase,
    Prepare,
    Reuse,
    Source,
    SourceFormat,
    SourceShape,
    TaskShape,
)
from btx_api.stage import (
    VERSIONS,
    AverageRecipe,
    Content,
    EvaluatedDomain,
    EvaluatedModel,
    EvaluatedTask,
    EvaluateRecipe,
    FinetuneRecipe,
    Input,
    Kind,
    Location,
    MixRecipe,
    Output,
    PrepareRecipe,
    Resolved,
    Stage,
    TrainRecipe,
    recipe_of,
)

GENERAL_SHARE = 0.2
"""Of the default finetune mixture (BTX paper, Table 7: 19.23 %)."""
FINETUNE_SHARE = 5
"""Default finetune tokens: a fifth of the experts' tokens (BTX paper: 80 B after 453 B)."""


class Members(Model):
    """Which experts go into the mix; frozen in status before the mix starts."""

    experts: tuple[str, ...]
    """In spec order."""
    without: tuple[str, ...] = ()
    """Domains whose prepare failed: left out of the finetune data and the evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A stage with what the engine needs to start it."""

    stage: Stage
    locations: tuple[Location, ...]
    """Where its inputs are, same order as `stage.inputs`."""
    needs: tuple[str, ...]
    """Names of the stages whose output it reads, without repetition."""
    expert: str = ""
    """Of a train stage: its expert."""


Graph = dict[str, Node]
Origin = str | tuple[Content, Location]
"""An input while building: the name of an earlier stage, or content from outside."""


class _Builder:
    """Adds stages in topological order; knows where every input is."""

    def __init__(
        self, spec: BTXRunSpec, resolved: Resolved, versions: Mapping[Kind, int], salt: str
    ) -> None:
        self.spec, self.resolved, self.versions, self.salt = spec, resolved, versions, salt
        self.graph: Graph = {}
        self.content = dict(zip(spec.domains(), resolved.domains, strict=True))
        ready = [expert.name for expert in spec.experts if expert.model]
        self.ready = dict(zip(ready, resolved.models, strict=True))
        self.tasks: list[Origin] = [
            (Content(fingerprint=found), Location(sources=(task_source(task),)))
            for task, found in zip(spec.evaluate.tasks, resolved.tasks, strict=True)
        ]

    def add(self, name: str, kind: Kind, recipe: Model, inputs: Sequence[Origin]) -> None:
        """Adds one stage; its producers must have been added before."""
        found: list[Input] = []
        locations: list[Location] = []
        for item in inputs:
            if isinstance(item, str):
                producer = self.graph[item].stage
                found.append(Output(digest=producer.digest))
                locations.append(Location(kind=producer.kind))
            else:
                found.append(item[0])
                locations.append(item[1])
        stage = Stage(
            kind=kind, version=self.versions[kind], recipe=recipe_of(recipe),
            inputs=tuple(found), salt=self.salt,
        )  # fmt: skip
        needs = tuple(dict.fromkeys(item for item in inputs if isinstance(item, str)))
        expert = name.removeprefix("train-") if kind is Kind.TRAIN else ""
        self.graph[name] = Node(stage=stage, locations=tuple(locations), needs=needs, expert=expert)

    @property
    def seed(self) -> tuple[Content, Location]:
        return Content(fingerprint=self.resolved.seed), Location(uri=self.spec.seed.uri)

    def model_of(self, expert: Expert) -> Origin:
        """An expert's model: its train stage, or the ready checkpoint."""
        if expert.model is None:
            return f"train-{expert.name}"
        return Content(fingerprint=self.ready[expert.name]), Location(uri=expert.model)

    def prepare(self) -> None:
        """One stage per domain."""
        block = self.spec.prepare
        bytes_only = block.tokenizer == "bytes"
        uri = self.spec.seed.uri if block.tokenizer == "seed" else block.tokenizer
        tokenizer = (Content(fingerprint=self.resolved.tokenizer), Location(uri=uri))
        for domain, sources in self.spec.domains().items():
            fields = {name: getattr(block, name) for name in Prepare.model_fields}
            fields["tokenizer"] = "bytes" if bytes_only else "file"
            shapes = tuple(
                SourceShape(format=s.format, field=s.field, weight=s.weight) for s in sources
            )
            data = (Content(fingerprint=self.content[domain]), Location(sources=sources))
            inputs = [data] if bytes_only else [data, tokenizer]
            self.add(
                f"prepare-{domain}", Kind.PREPARE, PrepareRecipe(**fields, sources=shapes), inputs
            )

    def train(self, name: str, block: Model, phases: Sequence[Phase]) -> None:
        """A train stage over phases of named domains."""
        domains, data = _indexed(phases)
        recipe = TrainRecipe(**dict(block), data=data)
        self.add(name, Kind.TRAIN, recipe, [self.seed, *domains])

    def evaluate(
        self,
        models: Sequence[tuple[str, str, Origin]],
        without: Sequence[str],
    ) -> None:
        """`models`: (label, role, input); ends every method."""
        block, domains = self.spec.evaluate, evaluation_domains(self.spec)
        names = [d.name for d in domains if d.name not in without]
        mixed = any(role in ("mixed", "final") for _, role, _ in models)
        fields = {name: getattr(block, name) for name in Evaluate.model_fields}
        first = len(models) + len(names)
        recipe = EvaluateRecipe(
            # What is only evaluated is an input by content; its URIs are not hashed.
            **{**fields, "domains": (), "tasks": ()},
            models=tuple(
                EvaluatedModel(label=label, role=role, input=i)
                for i, (label, role, _) in enumerate(models)
            ),
            columns=tuple(
                EvaluatedDomain(name=name, input=len(models) + i) for i, name in enumerate(names)
            ),
            questions=tuple(
                EvaluatedTask(input=first + i, **{f: getattr(t, f) for f in TaskShape.model_fields})
                for i, t in enumerate(block.tasks)
            ),
            routing=self.spec.finetune.routing.method if mixed else "",
        )
        inputs = [source for _, _, source in models]
        prepared = [f"prepare-{name}" for name in names]
        self.add("evaluate", Kind.EVALUATE, recipe, [*inputs, *prepared, *self.tasks])


def graph(
    spec: BTXRunSpec,
    resolved: Resolved,
    members: Members | None = None,
    *,
    versions: Mapping[Kind, int] = VERSIONS,
    uid: str = "",
) -> Graph:
    """All stages of a run in topological order, by name. `members=None`: every expert."""
    salt = uid if spec.policy.reuse is Reuse.NEVER else ""
    builder = _Builder(spec, resolved, versions, salt)
    builder.prepare()
    METHODS[spec.method](builder, members or Members(experts=tuple(e.name for e in spec.experts)))
    return builder.graph


def _btx(build: _Builder, members: Members) -> None:
    """prepare* -> train* -> {average, mix -> finetune} -> evaluate (BTX paper section 3)."""
    spec = build.spec
    for expert in spec.experts:
        if expert.model is None:
            phase = Phase(tokens=expert.tokens, domains={expert.name: 1.0})
            build.train(f"train-{expert.name}", spec.expert_train(expert), [phase])
    chosen = [expert for expert in spec.experts if expert.name in members.experts]
    mixed = [build.seed, *map(build.model_of, chosen)]
    include = spec.mix.include_seed
    average = AverageRecipe(**dict(spec.average), include_seed=include)
    build.add("average", Kind.AVERAGE, average, mixed)
    top_k = spec.finetune.routing.top_k(spec.mixed_experts(len(chosen)))
    build.add("mix", Kind.MIX, MixRecipe(**dict(spec.mix), top_k=top_k), mixed)
    _finetune(build, chosen, members.without)
    models: list[tuple[str, str, Origin]] = [("seed", "seed", build.seed)]
    models += [(e.name, "expert", build.model_of(e)) for e in chosen]
    models += [("soup", "soup", "average"), ("mixed", "mixed", "mix")]
    build.evaluate([*models, ("final", "final", "finetune")], members.without)


def _finetune(build: _Builder, chosen: Sequence[Expert], without: Sequence[str]) -> None:
    """inputs: mixed model, domains of the phases, then domains only the router's start needs."""
    spec = build.spec
    domains, data = _indexed(finetune_phases(spec, without))
    experts: list[int] = []
    if spec.finetune.routing.init is DataInit.DOMAIN_MEAN:
        owners = [e.name for e in chosen] + [GENERAL] * spec.mix.include_seed
        for owner in owners:
            name = f"prepare-{owner}"
            if name not in build.graph or owner in without:
                experts.append(0)
                continue
            if name not in domains:
                domains.append(name)
            experts.append(domains.index(name) + 1)
    recipe = FinetuneRecipe(**{**dict(spec.finetune), "data": data}, experts=tuple(experts))
    build.add("finetune", Kind.FINETUNE, recipe, ["mix", *domains])


def _dense(build: _Builder, members: Members) -> None:
    """prepare* -> train -> evaluate, data-matched: the experts' data, then the finetune data."""
    spec = build.spec
    tokens = {e.name: e.tokens for e in spec.experts}
    first = Phase(tokens=sum(tokens.values()), domains={n: float(t) for n, t in tokens.items()})
    build.train("train-dense", spec.train, [first, *finetune_phases(spec, members.without)])
    build.evaluate(
        [("seed", "seed", build.seed), ("final", "dense", "train-dense")], members.without
    )


METHODS: dict[Method, Callable[[_Builder, Members], None]] = {
    Method.BTX: _btx,
    Method.DENSE: _dense,
}


def finetune_phases(spec: BTXRunSpec, without: Sequence[str] = ()) -> list[Phase]:
    """The finetune block's phases less lost domains; or the default mixture."""
    phases = list(spec.finetune.data) or [_default_phase(spec)]
    kept = []
    for phase in phases:
        domains = {n: w for n, w in phase.domains.items() if n not in without}
        if any(domains.values()):
            kept.append(Phase(tokens=phase.tokens, domains=domains))
    return kept


def _default_phase(spec: BTXRunSpec) -> Phase:
    trained = [e.tokens for e in spec.experts if e.tokens]
    typical = sum(trained) / len(trained) if trained else 1.0
    weights = {e.name: float(e.tokens or typical) for e in spec.experts if e.data}
    total = sum(weights.values())
    if spec.general:
        weights[GENERAL] = total * GENERAL_SHARE / (1 - GENERAL_SHARE) or 1.0
    return Phase(tokens=sum(trained) // FINETUNE_SHARE, domains=weights or {GENERAL: 1.0})


def evaluation_domains(spec: BTXRunSpec) -> tuple[EvaluationDomain, ...]:
    """The block's domains; default: every domain with data, general last."""
    return spec.evaluate.domains or tuple(EvaluationDomain(name=name) for name in spec.domains())


def task_source(task: EvaluationTask) -> Source:
    """A task's questions as a source: how they are listed and fingerprinted."""
    return Source(uri=task.uri, format=SourceFormat.JSONL)


def _indexed(phases: Sequence[Phase]) -> tuple[list[str], tuple[Phase, ...]]:
    """Stage names of the phases' domains, and the phases by input index (the model is input 0)."""
    names = list(dict.fromkeys(name for phase in phases for name in phase.domains))
    data = tuple(
        Phase(
            tokens=phase.tokens,
            domains={str(names.index(n) + 1): w for n, w in phase.domains.items()},
        )
        for phase in phases
    )
    return [f"prepare-{name}" for name in names], data
