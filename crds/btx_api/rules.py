"""Rules between fields, in CEL: what the API server refuses beyond types and bounds.

Each says, as far as CEL can, what a validator of spec.py says, and never refuses what that accepts.
What CEL cannot say the engine answers with Accepted=False. Used by schema.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic.alias_generators import to_camel

from btx_api.names import JOB_NAME_LENGTH, run_name_length
from btx_api.spec import (
    GENERAL,
    MAX_DOMAINS,
    POWERS,
    SERVED,
    Average,
    AverageWeights,
    Finetune,
    Method,
    Mix,
    Model,
    Routing,
    RoutingMethod,
    TaskShape,
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of x-kubernetes-validations."""

    at: str
    """Path of the node that is `self`; `[]` steps into a list; empty: the whole object."""
    field: str
    """Path below it that a refusal names; it cannot step into a list. Empty: `self`."""
    holds: str
    """CEL; false or an error refuses."""
    message: str
    """What the field is or lacks, after its path."""

    def plain(self) -> dict[str, Any]:
        """As the CRD says it."""
        out: dict[str, Any] = {"rule": self.holds, "message": self.message}
        if self.field:
            out["fieldPath"] = f".{self.field}"
        if "oldSelf.hasValue()" in self.holds:
            out["optionalOldSelf"] = True
        return out


def rules() -> Iterator[Rule]:
    """All of them."""
    yield from _of_the_object()
    yield from _served()
    yield from _of_experts()
    yield from _of_blocks()
    yield from _of_domains()
    yield from _of_dense()


def _count(path: str, holds: str) -> str:
    """CEL: a count at a path, as `n`, is as wanted. Of 1.5K (with a point) the engine judges."""
    zeros = "".join(f".replace('{u}', '{'0' * power}')" for u, power in POWERS.items() if u)
    number = f"type(c) == int ? c : int(c{zeros})"
    # A list of one gives its item a name.
    text = "type(c) == string && c.contains('.')"
    return f"[{path}].all(c, {text} || [{number}].all(n, {holds}))"


_ACCEPTED = "has(oldSelf.status) && has(oldSelf.status.generation) && oldSelf.status.generation > 0"
_WITH_DATA = "filter(d, size(d.data) > 0).map(d, d.name)"
_TRAINED = f"self.experts.{_WITH_DATA} + (size(self.general) > 0 ? ['{GENERAL}'] : [])"
_KNOWN = f"{_TRAINED} + self.evaluate.domains.{_WITH_DATA}"


def _of_the_object() -> Iterator[Rule]:
    """Names leave room for their Jobs; what was accepted stays (before, it can be mended)."""
    size = "size(self.metadata.name)"
    domain = f"size(d.data) == 0 || {size} + size(d.name) <= {run_name_length('prepare-')}"
    clauses = (
        f"self.spec.experts.all(d, {domain})",
        f"self.spec.evaluate.domains.all(d, {domain})",
        f"(size(self.spec.general) == 0 || {size} <= {run_name_length(f'prepare-{GENERAL}')})",
        f"(self.spec.method != 'Dense' || {size} <= {run_name_length('train-dense')})",
    )
    message = (
        f"is too long: <name>-prepare-<domain>-<8 digits> are at most {JOB_NAME_LENGTH} letters"
    )
    # Every write of the object comes by here, the engine's too: an old object must not shut it out.
    # Last, since to compare two specs costs more than all other rules.
    same = "oldSelf.hasValue() && oldSelf.value().spec == self.spec"
    yield Rule("", "metadata.name", f"{' && '.join(clauses)} || {same}", message)
    for field in ("spec.method", "spec.seed.uri", "spec.storage.uri"):
        holds = f"!({_ACCEPTED}) || self.{field} == oldSelf.{field}"
        yield Rule("", field, holds, "immutable once accepted; revert, or make a new run")


def _served() -> Iterator[Rule]:
    places: dict[str, type[StrEnum]] = {
        "spec.method": Method,
        "spec.average.weights": AverageWeights,
        "spec.finetune.routing.method": RoutingMethod,
    }
    for place, kind in places.items():
        served = [value.value for value in SERVED if type(value) is kind]
        message = f"is not served by this release (served: {', '.join(served)})"
        yield Rule(place, "", f"self in {served}", message)
    message = "is read by method BTS only, which this release does not serve"
    yield Rule("spec", "stitch", "!has(self.stitch)", message)
    yield Rule("spec.storage.uri", "", "!self.startsWith('hf://')", "storage is file:// or s3://")


def _of_experts() -> Iterator[Rule]:
    needs, ready = "has(self.model) || ", "!has(self.model) || "
    trained = "a ready expert (model) is not trained"
    experts = (
        ("name", f"self.name != '{GENERAL}'", "general is the seed's own data; see spec.general"),
        ("data", needs + "size(self.data) > 0", "an expert needs data, or model (a ready one)"),
        (
            "tokens",
            needs + _count("self.tokens", "n > 0"),
            "an expert with data needs a number of tokens above 0",
        ),
        ("tokens", ready + _count("self.tokens", "n == 0"), trained),
        ("train", ready + "!has(self.train)", trained),
    )
    for field, holds, message in experts:
        yield Rule("spec.experts[]", field, holds, message)
    own = "(has(e.train.{0}) ? e.train.{0} : self.train.{0})"
    multiple = f"n > 0 && n % {own.format('sequenceLength')} == 0"
    whole = _count(own.format("batchTokens"), multiple)
    message = "train.batchTokens of an expert is not a positive multiple of its sequenceLength"
    yield Rule("spec", "experts", f"self.experts.all(e, !has(e.train) || {whole})", message)
    few = "!has(self.policy.minExperts) || self.policy.minExperts <= size(self.experts)"
    yield Rule("spec", "policy.minExperts", few, "is more than there are experts")


def _of_blocks() -> Iterator[Rule]:
    whole = _count("self.batchTokens", "n > 0 && n % self.sequenceLength == 0")
    for at in ("spec.train", "spec.finetune"):
        yield Rule(at, "batchTokens", whole, "is not a positive multiple of sequenceLength")
    at, plain = "spec.finetune.routing", dict(equal_to(Routing(), "self"))
    message = "1 with TopK gives the router no gradient; use method Switch or SampleTop1"
    yield Rule(at, "k", "self.method != 'TopK' || self.k != 1", message)
    readers = {
        "capacityFactor": "Switch",
        "annealRate": "SampleTop1",
        "minTemperature": "SampleTop1",
    }
    for field, reader in readers.items():
        yield Rule(at, field, plain[field], f"is read by method {reader} only")
    unread = "self.method == 'Dense' || self.finetune.routing.method != 'TopK' || "
    mixed = "self.finetune.routing.k <= size(self.experts) + (self.mix.includeSeed ? 1 : 0)"
    yield Rule("spec", "finetune.routing.k", unread + mixed, "is more than the mixed experts")
    default = TaskShape.model_fields["max_new_tokens"].default
    unread = f"self.kind == 'ExactMatch' || self.maxNewTokens == {default}"
    message = "is read by kind ExactMatch only"
    yield Rule("spec.evaluate.tasks[]", "maxNewTokens", unread, message)
    room = "self.tasks.all(t, t.kind != 'ExactMatch' || t.maxNewTokens < self.sequenceLength)"
    message = "maxNewTokens leaves no room for a question in evaluate.sequenceLength"
    yield Rule("spec.evaluate", "tasks", room, message)


def _of_domains() -> Iterator[Rule]:
    weighed = "size(self) == 0 || self.exists(s, s.weight > 0.0)"
    for at in ("spec.general", "spec.experts[].data", "spec.evaluate.domains[].data"):
        yield Rule(at, "", weighed, "all weights are 0")
    some = "self.exists(d, self[d] > 0.0)"
    yield Rule("spec.finetune.data[].domains", "", some, "needs at least one weight above 0")
    some = "size(self.finetune.data) > 0 || size(self.general) > 0"
    some += " || self.experts.exists(e, size(e.data) > 0)"
    message = "is required where neither general nor an expert has data"
    yield Rule("spec", "finetune.data", some, message)
    message = f"makes more than {MAX_DOMAINS} domains of the run that have data"
    yield Rule("spec", "evaluate.domains", f"size({_KNOWN}) <= {MAX_DOMAINS}", message)
    domains, named = "self.evaluate.domains", "self.evaluate.domains.map(d, d.name)"
    lists = (
        ("finetune.data", _KNOWN, "self.finetune.data.all(p, p.domains.all(d, d in names))",
         "domains has a name without data in the run"),
        ("evaluate.domains", _KNOWN, f"{domains}.all(d, d.name in names)",
         "has neither data nor the name of a domain with data"),
        ("evaluate.domains", f"self.experts.map(e, e.name) + ['{GENERAL}']",
         f"{domains}.all(d, size(d.data) == 0 || !(d.name in names))",
         "data of a domain that has its data elsewhere in the run"),
        ("evaluate.tasks", f"size({domains}) > 0 ? {named} : {_TRAINED}",
         "self.evaluate.tasks.all(t, !(t.name in names))",
         "name of a task is the name of a domain"),
    )  # fmt: skip
    for field, names, holds, message in lists:
        yield Rule("spec", field, f"[{names}].all(names, {holds})", message)


def _of_dense() -> Iterator[Rule]:
    """By value, not by "was it set": the API server sets every default."""
    unread = {
        f"finetune.{name}": same
        for name, same in equal_to(Finetune(), "self.finetune")
        if name != "data"
    }
    for name, block in {"average": Average(), "mix": Mix()}.items():
        unread[name] = " && ".join(same for _, same in equal_to(block, f"self.{name}"))
    for field, same in unread.items():
        holds = f"self.method != 'Dense' || ({same})"
        yield Rule("spec", field, holds, "is not read by method Dense")
    for name in ("model", "train"):
        holds = f"self.method != 'Dense' || self.experts.all(e, !has(e.{name}))"
        yield Rule("spec", "experts", holds, f"{name} of an expert is not read by method Dense")


def equal_to(block: Model, at: str) -> Iterator[tuple[str, str]]:
    """(field, CEL: at this path it has the value that it has in `block`) of every field."""
    for name, info in type(block).model_fields.items():
        value, path = getattr(block, name), f"{at}.{to_camel(name)}"
        match value:
            case Model():
                same = " && ".join(same for _, same in equal_to(value, path))
            case tuple():
                same = f"size({path}) == {len(value)}"
            case bool():
                same = path if value else f"!{path}"
            case str():
                same = f"{path} == '{value}'"
            case _:
                same = f"{path} == {value}"
        is_count = isinstance(info.json_schema_extra, dict) and "count" in info.json_schema_extra
        yield to_camel(name), _count(path, f"n == {value}") if is_count else same
