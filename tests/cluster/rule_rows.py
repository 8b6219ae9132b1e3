"""Every rule of the CRD with a spec that it accepts and one that it refuses.

A row: the refused field as the API server names it, how the message begins, and what of
`builders.a_spec` (experts code and math, general) is replaced to be accepted and to be refused.
"""

from typing import Any, NamedTuple

from btx_api.rules import Rule

DATA = [{"uri": "file://d/*.txt"}]
NO_WEIGHT = [{"uri": "file://d", "weight": 0}, {"uri": "file://e", "weight": 0}]
SOME_WEIGHT = [{"uri": "file://d", "weight": 0}, {"uri": "file://e", "weight": 0.5}]
TASK = {"name": "q", "uri": "file://q.jsonl"}
READY = {"name": "a", "model": "file://m"}
Changes = dict[str, Any]


class Row(NamedTuple):
    """See the module."""

    field: str
    message: str
    accepted: Changes
    refused: Changes

    def is_of(self, rule: Rule) -> bool:
        """Whether it shows this rule at work."""
        path = ".".join(part for part in (rule.at, rule.field) if part)
        return path == self.field.replace("[0]", "[]") and rule.message.startswith(self.message)


def expert(**changes: Any) -> Changes:
    """A spec's one expert."""
    return {"experts": [{"name": "a", "tokens": 5, "data": DATA, **changes}]}


def routing(**fields: Any) -> Changes:
    """A spec's routing."""
    return {"finetune": {"routing": fields}}


def evaluate(**fields: Any) -> Changes:
    """A spec's evaluation."""
    return {"evaluate": fields}


def finetuned_on(**domains: float) -> Changes:
    """A spec's one phase of finetuning."""
    return {"finetune": {"data": [{"tokens": 1, "domains": domains}]}}


def dense(**blocks: Any) -> Changes:
    """A spec of method Dense."""
    return {"method": "Dense", **blocks}


EXACT = {**TASK, "kind": "ExactMatch", "maxNewTokens": 9}
ROWS = [
    Row("spec.method", "is not served", {"method": "Dense"}, {"method": "BTM"}),
    Row("spec.average.weights", "is not served",
        {"average": {"weights": "Uniform"}}, {"average": {"weights": "Posterior"}}),
    Row("spec.finetune.routing.method", "is not served",
        routing(method="Soft"), routing(method="Switch")),
    Row("spec.stitch", "is read by method BTS only", {}, {"stitch": {}}),
    Row("spec.storage.uri", "storage is file:// or s3://",
        {"storage": {"uri": "s3://bucket/runs"}}, {"storage": {"uri": "hf://a/b@c"}}),
    Row("spec.experts[0].name", "general is", expert(name="generals"), expert(name="general")),
    Row("spec.experts[0].data", "an expert needs",
        {"experts": [READY]}, {"experts": [{"name": "a", "tokens": 5}]}),
    Row("spec.experts[0].tokens", "an expert with data",
        expert(tokens="1K"), expert(tokens=0)),
    Row("spec.experts[0].tokens", "an expert with data", expert(tokens="1"), expert(tokens="0B")),
    Row("spec.experts[0].tokens", "a ready expert",
        {"experts": [{**READY, "data": DATA, "tokens": "0K"}]},
        {"experts": [{**READY, "data": DATA, "tokens": 5}]}),
    Row("spec.experts[0].train", "a ready expert",
        {"experts": [READY]}, {"experts": [{**READY, "train": {}}]}),
    Row("spec.experts", "train.batchTokens of an expert",
        expert(train={"sequenceLength": 16}), expert(train={"sequenceLength": 999})),
    Row("spec.experts", "train.batchTokens of an expert",
        expert(train={"batchTokens": "8.192K"}), expert(train={"batchTokens": 0})),
    Row("spec.experts", "train.batchTokens of an expert",
        expert(train={"batchTokens": "4096"}), expert(train={"batchTokens": "4M"})),
    Row("spec.policy.minExperts", "is more than",
        {"policy": {"minExperts": 2}}, {"policy": {"minExperts": 3}}),
    Row("spec.train.batchTokens", "is not a positive multiple",
        {"train": {"batchTokens": 8192}}, {"train": {"batchTokens": 8193}}),
    Row("spec.train.batchTokens", "is not a positive multiple",
        {"train": {"batchTokens": "4.096K"}}, {"train": {"batchTokens": 0}}),
    Row("spec.train.batchTokens", "is not a positive multiple",
        {"train": {"batchTokens": "8K", "sequenceLength": 80}}, {"train": {"batchTokens": "8K"}}),
    Row("spec.finetune.batchTokens", "is not a positive multiple",
        {"finetune": {"batchTokens": 8192}}, {"finetune": {"sequenceLength": 4095}}),
    Row("spec.finetune.routing.k", "1 with TopK", routing(method="Soft", k=1), routing(k=1)),
    Row("spec.finetune.routing.k", "is more than", routing(k=3), routing(k=4)),
    Row("spec.finetune.routing.k", "is more than",
        {**routing(k=2), "mix": {"includeSeed": False}},
        {**routing(k=3), "mix": {"includeSeed": False}}),
    Row("spec.finetune.routing.capacityFactor", "is read by",
        routing(capacityFactor=1.5), routing(capacityFactor=2)),
    Row("spec.finetune.routing.annealRate", "is read by",
        routing(annealRate=1e-4), routing(annealRate=0)),
    Row("spec.finetune.routing.minTemperature", "is read by",
        routing(minTemperature=0.5), routing(minTemperature=1)),
    Row("spec.evaluate.tasks[0].maxNewTokens", "is read by kind ExactMatch only",
        evaluate(tasks=[EXACT]), evaluate(tasks=[{**TASK, "maxNewTokens": 9}])),
    Row("spec.evaluate.tasks", "maxNewTokens leaves no room",
        evaluate(tasks=[EXACT], sequenceLength=10), evaluate(tasks=[EXACT], sequenceLength=9)),
    Row("spec.general", "all weights are 0", {"general": SOME_WEIGHT}, {"general": NO_WEIGHT}),
    Row("spec.experts[0].data", "all weights are 0",
        expert(data=SOME_WEIGHT), expert(data=NO_WEIGHT)),
    Row("spec.evaluate.domains[0].data", "all weights are 0",
        evaluate(domains=[{"name": "law", "data": SOME_WEIGHT}]),
        evaluate(domains=[{"name": "law", "data": NO_WEIGHT}])),
    Row("spec.finetune.data[0].domains", "needs at least one weight",
        finetuned_on(code=0, math=0.1), finetuned_on(code=0, math=0)),
    Row("spec.finetune.data", "domains has a name without data",
        {**finetuned_on(law=1, general=1), **evaluate(domains=[{"name": "law", "data": DATA}])},
        {**finetuned_on(law=1, general=1), **evaluate(domains=[{"name": "code"}])}),
    Row("spec.finetune.data", "domains has a name without data",
        finetuned_on(general=1), {**finetuned_on(general=1), "general": []}),
    Row("spec.finetune.data", "is required where",
        {"experts": [READY]}, {"experts": [READY], "general": []}),
    Row("spec.evaluate.domains", "makes more than 96",
        evaluate(domains=[{"name": f"d-{i}", "data": DATA} for i in range(93)]),
        evaluate(domains=[{"name": f"d-{i}", "data": DATA} for i in range(94)])),
    Row("spec.evaluate.domains", "has neither data",
        evaluate(domains=[{"name": "general"}, {"name": "law", "data": DATA}]),
        evaluate(domains=[{"name": "general"}, {"name": "law"}])),
    Row("spec.evaluate.domains", "data of a domain that has its data elsewhere",
        evaluate(domains=[{"name": "codes", "data": DATA}]),
        evaluate(domains=[{"name": "code", "data": DATA}])),
    Row("spec.evaluate.domains", "data of a domain that has its data elsewhere",
        evaluate(domains=[{"name": "general"}]),
        evaluate(domains=[{"name": "general", "data": DATA}])),
    Row("spec.evaluate.tasks", "name of a task",
        evaluate(tasks=[TASK]), evaluate(tasks=[{**TASK, "name": "code"}])),
    Row("spec.evaluate.tasks", "name of a task",
        evaluate(tasks=[{**TASK, "name": "code"}], domains=[{"name": "math"}]),
        evaluate(tasks=[{**TASK, "name": "math"}], domains=[{"name": "math"}])),
    Row("spec.average", "is not read by method Dense",
        dense(average={"weights": "Uniform"}), dense(average={"weights": "Posterior"})),
    Row("spec.mix", "is not read by method Dense",
        dense(mix={"includeSeed": True, "routerStd": 0.02}), dense(mix={"routerStd": 0.03})),
    Row("spec.experts", "model of an expert is not read by method Dense",
        dense(**expert()), dense(experts=[READY])),
    Row("spec.experts", "train of an expert is not read by method Dense",
        dense(train={"randomSeed": 1}), dense(**expert(train={"randomSeed": 1}))),
    *(
        Row(f"spec.finetune.{field}", "is not read by method Dense",
            dense(finetune={field: default, **finetuned_on(code=1)["finetune"]}),
            dense(finetune={field: other}))
        for field, default, other in (
            ("sequenceLength", 4096, 2048),
            ("batchTokens", "4194.304K", 8192),
            ("precision", "bf16", "fp32"),
            ("randomSeed", 0, 1),
            ("heldOutTokens", 131_072, 1),
            ("optimizer", {"lr": 1e-4, "eps": 1e-8}, {"eps": 1e-9}),
            ("trainable", "All", "Router"),
            ("routing", {"alpha": 0.01}, {"alpha": 0.02}),
        )
    ),
]  # fmt: skip

LONGEST = "e" * 20
NAMES: list[tuple[str, Changes]] = [
    ("n" * 33, {"experts": [{**READY, "data": DATA}], "general": []}),
    ("n" * 31, dense(**expert(), general=[])),
    ("n" * 27, expert()),
    ("n" * 14, expert(name=LONGEST)),
    ("n" * 14, evaluate(domains=[{"name": LONGEST, "data": DATA}])),
]
"""Names as long as they may be; one letter more is refused."""


def largest(sources: int) -> Changes:
    """A spec with as much of everything as a rule can meet, and so many sources per domain."""
    data = [{"uri": f"file://{i}"} for i in range(sources)]
    train = {"batchTokens": "8192", "sequenceLength": 4096}
    experts = [
        {"name": f"expert-with-name-{i:03d}", "tokens": "1K", "data": data, "train": train}
        for i in range(64)
    ]
    domains = [{"name": f"domain-with-name-{i:03d}", "data": data} for i in range(31)]
    known = [item["name"] for item in (*experts, *domains)] + ["general"]
    named = [{"name": name} for name in known if not name.startswith("domain")]
    phase = {"tokens": 1, "domains": dict.fromkeys(known, 1)}
    return {
        "experts": experts, "general": data, "finetune": {"data": [phase] * 16},
        **evaluate(domains=domains + named,
                   tasks=[{**TASK, "name": f"task-{i}"} for i in range(32)]),
    }  # fmt: skip
