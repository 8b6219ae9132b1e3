"""The spec: what is accepted, and what is refused with a line that names the field."""

from typing import Any

import pytest
from btx_api.spec import (
    BTXRunSpec,
    Model,
    Optimizer,
    Train,
    explain,
    overlay,
    parse_count,
)
from builders import a_spec
from pydantic import ValidationError


def refusal(**changes: Any) -> str:
    """The first line that a changed spec is refused with."""
    with pytest.raises(ValidationError) as caught:
        BTXRunSpec.parse(a_spec(**changes))
    return explain(caught.value)[0]


DATA = [{"uri": "file://d/*.txt"}]
REJECTED = [
    ({"extra": 1}, "spec.extra: unknown field"),
    ({"train": {"batch_tokens": 8}}, "spec.train.batch_tokens: unknown field"),
    ({"train": {"optimizer": {"lr": "1e-3"}}}, "spec.train.optimizer.lr: input should be a valid"),
    ({"train": {"optimizer": {"lr": True}}}, "spec.train.optimizer.lr: input should be a valid"),
    ({"train": {"optimizer": {"lr": float("nan")}}}, "spec.train.optimizer.lr: input should be"),
    ({"train": {"optimizer": {"lr": -1}}}, "spec.train.optimizer.lr: input should be greater"),
    ({"train": {"randomSeed": 1.5}}, "spec.train.randomSeed: input should be a valid integer"),
    ({"train": {"batchTokens": 100}}, "spec.train.batchTokens: 100 is not a positive multiple of"),
    ({"train": {"batchTokens": 0}}, "spec.train.batchTokens: 0 is not a positive multiple of"),
    ({"train": {"batchTokens": "1e6"}}, "spec.train.batchTokens: a count is an integer or"),
    ({"storage": {"uri": "hf://x"}}, "spec.storage.uri: storage is file:// or s3://"),
    ({"storage": {"uri": "/tmp"}}, "spec.storage.uri: string should match pattern"),
    ({"seed": {}}, "spec.seed.uri: is required"),
    ({"experts": []}, "spec.experts: tuple should have at least 1 item"),
    ({"experts": [{"name": "a", "tokens": 1, "data": DATA}] * 2},
     "spec.experts[1].name: 'a' is used by experts[0] already"),
    ({"experts": [{"name": "A", "tokens": 1, "data": DATA}]}, "spec.experts[0].name: string should"),
    ({"experts": [{"name": "general", "tokens": 1, "data": DATA}]}, "spec.experts[0].name: 'general'"),
    ({"experts": [{"name": "a", "data": DATA}]}, "spec.experts[0].tokens: an expert with data"),
    ({"experts": [{"name": "a", "tokens": 5}]}, "spec.experts[0].data: an expert needs data"),
    ({"experts": [{"name": "a", "tokens": 5, "model": "file://m"}]}, "spec.experts[0].tokens: a ready"),
    ({"experts": [{"name": "a", "tokens": 5, "data": [{"uri": "file://d", "weight": 0}]}]},
     "spec.experts[0].data: all weights are 0"),
    ({"experts": [{"name": "a", "tokens": 5, "data": [{"uri": "file://d", "weight": -1}]}]},
     "spec.experts[0].data[0].weight: input should be greater"),
    ({"experts": [{"name": "a", "tokens": 5, "data": DATA, "train": {"sequenceLength": 999}}]},
     "spec.experts[0].train.batchTokens: "),
    ({"finetune": {"routing": {"k": 1}}}, "spec.finetune.routing.k: 1 with TopK gives the router no"),
    ({"finetune": {"routing": {"k": 4}}}, "spec.finetune.routing.k: 4 is more than the 3 mixed"),
    ({"finetune": {"routing": {"method": "Switch"}}}, "spec.finetune.routing.method: Switch is not"),
    ({"finetune": {"routing": {"capacityFactor": 2}}}, "spec.finetune.routing.capacityFactor: is read"),
    ({"finetune": {"data": [{"tokens": 1, "domains": {"zz": 1}}]}},
     "spec.finetune.data[0].domains.zz: no such domain (known: "),
    ({"finetune": {"data": [{"tokens": 1, "domains": {"code": 0}}]}},
     "spec.finetune.data[0].domains: needs at least one weight above 0"),
    ({"experts": [{"name": "a", "model": "file://m"}], "general": []},
     "spec.finetune.data: is required where neither general nor an expert has data"),
    ({"average": {"weights": "Posterior"}}, "spec.average.weights: Posterior is not served"),
    ({"method": "BTM"}, "spec.method: BTM is not served by this release (served: BTX, Dense)"),
    ({"method": "XYZ"}, "spec.method: input should be"),
    ({"stitch": {}}, "spec.stitch: is read by method BTS only"),
    ({"evaluate": {"tasks": [{"name": "q", "uri": "hf://q"}]}}, "spec.evaluate.tasks[0].uri: string"),
    ({"evaluate": {"tasks": [{"name": "code", "uri": "file://q"}]}},
     "spec.evaluate.tasks[0].name: 'code' is the name of a domain or of another task"),
    ({"evaluate": {"tasks": [{"name": "q", "uri": "file://q"}] * 2}},
     "spec.evaluate.tasks[1].name: 'q' is the name of a domain or of another task"),
    ({"evaluate": {"tasks": [{"name": "q", "uri": "file://q", "maxNewTokens": 9}]}},
     "spec.evaluate.tasks[0].maxNewTokens: is read by kind ExactMatch only"),
    ({"evaluate": {"sequenceLength": 64,
                   "tasks": [{"name": "q", "uri": "file://q", "kind": "ExactMatch"}]}},
     "spec.evaluate.tasks[0].maxNewTokens: 64 leaves no room for a question in evaluate.sequenceL"),
    ({"evaluate": {"domains": [{"name": "law"}]}}, "spec.evaluate.domains[0].name: no such domain"),
    ({"evaluate": {"domains": [{"name": "code", "data": DATA}]}}, "spec.evaluate.domains[0].data: "),
    ({"evaluate": {"domains": [{"name": "code"}, {"name": "code"}]}}, "spec.evaluate.domains[1].name"),
    ({"evaluate": {"domains": [{"name": f"d-{i}", "data": DATA} for i in range(94)]}},
     "spec.evaluate.domains: 97 domains of the run have data, 96 may"),
    ({"policy": {"minExperts": 3}}, "spec.policy.minExperts: 3 of 2 experts"),
    ({"method": "Dense", "mix": {"includeSeed": False}}, "spec.mix: is not read by method Dense"),
    ({"method": "Dense", "finetune": {"sequenceLength": 64}}, "spec.finetune.sequenceLength: is not"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "line"), REJECTED, ids=[line[:60] for _, line in REJECTED])
def test_bad_input_is_refused_naming_the_field(changes: dict[str, Any], line: str) -> None:
    """One line: the field's path, what is wrong."""
    assert refusal(**changes).startswith(line)


ACCEPTED = [
    {"train": {"randomSeed": 2.0}},
    {"train": {"optimizer": {"lr": 1}}},
    {"train": {"batchTokens": "4.096M", "sequenceLength": 1000}},
    {"experts": [{"name": "a", "model": "hf://o/r@main"}]},
    {"experts": [{"name": "a", "tokens": 5, "data": DATA, "train": {"sequenceLength": 16}}]},
    {"evaluate": {"domains": [{"name": "law", "data": DATA}]}},
    {"finetune": {"routing": {"method": "Soft", "k": 1}}},
    {"finetune": {"routing": {"capacityFactor": 1.5}}},
    {"finetune": {"data": [{"tokens": 0, "domains": {"code": 1}}]}},
    {"method": "Dense"},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=[str(row)[:60] for row in ACCEPTED])
def test_good_input_is_accepted_and_survives_a_round_trip(changes: dict[str, Any]) -> None:
    """What a spec dumps, it reads back as itself."""
    spec = BTXRunSpec.parse(a_spec(**changes))

    assert BTXRunSpec.parse(spec.plain()) == spec


def test_counts_are_read_in_powers_of_ten() -> None:
    """K, M, B and T are exact, fractions too."""
    assert [parse_count(x) for x in (7, "7", "1.5K", "210B", "0.25T", "4.194304M", 2.0)] == [
        7, 7, 1500, 210_000_000_000, 250_000_000_000, 4_194_304, 2,
    ]  # fmt: skip
    for wrong in ("1.5", "1.2345K", "-1", "1e6", "K", "", True, 1.5, None, "1 K", "0" * 33):
        with pytest.raises(ValueError, match=r"count|whole"):
            parse_count(wrong)


def test_an_overlay_replaces_only_what_was_set() -> None:
    """Recursively, and judged as a whole afterwards."""
    base = Train(sequence_length=64, batch_tokens=640, optimizer=Optimizer(lr=0.5, eps=0.1))
    over = Train.parse({"optimizer": {"lr": 0.25}, "randomSeed": 3})

    merged = overlay(base, over)

    assert merged == base.model_copy(
        update={"random_seed": 3, "optimizer": Optimizer(lr=0.25, eps=0.1)}
    )


def fields_of(model: type[Model], seen: set[type[Model]]) -> set[tuple[str, str]]:
    """Every (class, field) pair that a user can write."""
    found: set[tuple[str, str]] = set()
    if model in seen:
        return found
    seen.add(model)
    for name, field in model.model_fields.items():
        owner = next(
            c for c in reversed(model.__mro__) if name in getattr(c, "__annotations__", {})
        )
        found.add((owner.__name__, name))
        for part in _models_in(field.annotation):
            found |= fields_of(part, seen)
    return found


def _models_in(annotation: Any) -> list[type[Model]]:
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def test_the_spec_has_few_dials_and_each_is_documented() -> None:
    """At most 130 distinct (class, field) pairs, each with a docstring."""
    pairs = fields_of(BTXRunSpec, set())

    assert len(pairs) <= 130
    silent = [
        f"{cls.__name__}.{name}"
        for cls in _all_models(BTXRunSpec, [])
        for name, field in cls.model_fields.items()
        if not field.description
    ]
    assert silent == []


def _all_models(model: type[Model], seen: list[type[Model]]) -> list[type[Model]]:
    if model not in seen:
        seen.append(model)
        for field in model.model_fields.values():
            for part in _models_in(field.annotation):
                _all_models(part, seen)
    return seen
