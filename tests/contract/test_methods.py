"""The graph of each method, and what its digests depend on."""

import json
from pathlib import Path
from typing import Any

import pytest
from btx_api.methods import Graph, Members, finetune_phases, graph
from btx_api.spec import BTXRunSpec, Phase
from btx_api.stage import RECIPES, Kind, Output, Stage
from builders import resolved_for, spec_of

GOLDEN = Path(__file__).parent / "digests.json"


def graph_of(**changes: Any) -> Graph:
    """The graph of a changed spec."""
    spec = spec_of(**changes)
    return graph(spec, resolved_for(spec))


def digests(nodes: Graph) -> dict[str, str]:
    """Digest by stage name."""
    return {name: node.stage.digest for name, node in nodes.items()}


def changed(before: Graph, after: Graph) -> set[str]:
    """Names whose digest differs."""
    ours, theirs = digests(before), digests(after)
    return {name for name in ours | theirs if ours.get(name) != theirs.get(name)}


def test_btx_is_prepare_train_average_mix_finetune_evaluate() -> None:
    """One prepare per domain, one train per expert, and who reads what."""
    needs = {name: node.needs for name, node in graph_of().items()}

    assert needs == {
        "prepare-code": (),
        "prepare-math": (),
        "prepare-general": (),
        "train-code": ("prepare-code",),
        "train-math": ("prepare-math",),
        "average": ("train-code", "train-math"),
        "mix": ("train-code", "train-math"),
        "finetune": ("mix", "prepare-code", "prepare-math", "prepare-general"),
        "evaluate": (
            "train-code", "train-math", "average", "mix", "finetune",
            "prepare-code", "prepare-math", "prepare-general",
        ),
    }  # fmt: skip


def test_dense_is_data_matched() -> None:
    """The experts' data in proportion to their tokens, then the finetune data."""
    train = graph_of(method="Dense")["train-dense"].stage

    assert train.recipe["data"] == [
        {"tokens": 500, "domains": {"1": 400, "2": 100}},
        {"tokens": 100, "domains": {"1": 400, "2": 100, "3": 125}},
    ]


def test_every_recipe_parses_back_into_its_class() -> None:
    """What is hashed is all the trainer needs of a block."""
    for method in ("BTX", "Dense"):
        for node in graph_of(method=method).values():
            recipe = RECIPES[node.stage.kind].parse(node.stage.recipe)
            assert Stage.parse(node.stage.plain()).digest == node.stage.digest
            assert type(recipe).__name__.lower().startswith(node.stage.kind)


def test_locations_stand_beside_their_inputs() -> None:
    """Outputs are found by kind, contents by where the user said they are."""
    for node in graph_of().values():
        assert len(node.locations) == len(node.stage.inputs)
        for found, location in zip(node.stage.inputs, node.locations, strict=True):
            assert isinstance(found, Output) == (location.kind is not None)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"execution": {"train": {"threads": 7, "checkpointSeconds": 5}}}, set()),
        ({"execution": {"train": {"processes": 4}, "finetune": {"processes": 2}}}, set()),
        ({"policy": {"maxRetries": 9}}, set()),
        ({"train": {"optimizer": {"lr": 1e-4}}}, set()),
        ({"evaluate": {"tokens": 99}}, {"evaluate"}),
        ({"mix": {"randomSeed": 2}}, {"mix", "finetune", "evaluate"}),
        ({"finetune": {"routing": {"alpha": 0}}}, {"finetune", "evaluate"}),
        ({"train": {"randomSeed": 2}},
         {"train-code", "train-math", "average", "mix", "finetune", "evaluate"}),
    ],
)  # fmt: skip
def test_a_digest_depends_on_what_changes_the_result(
    change: dict[str, Any], names: set[str]
) -> None:
    """Execution and policy are never hashed; a recipe reaches everything behind it."""
    assert changed(graph_of(), graph_of(**change)) == names


def test_a_storage_or_a_path_is_not_part_of_a_digest() -> None:
    """Inputs enter by content: the same bytes elsewhere are the same stage."""
    spec = spec_of()
    moved = spec_of(storage={"uri": "s3://elsewhere/x"}, seed={"uri": "hf://o/r@c"})

    assert digests(graph(spec, resolved_for(spec))) == digests(graph(moved, resolved_for(moved)))


def test_changed_bytes_of_one_domain_reach_its_expert_and_what_it_is_mixed_into() -> None:
    """And nothing else."""
    spec = spec_of()
    before = resolved_for(spec)
    after = before.model_copy(update={"domains": ("x" * 22, *before.domains[1:])})

    assert changed(graph(spec, before), graph(spec, after)) == {
        "prepare-code", "train-code", "average", "mix", "finetune", "evaluate",
    }  # fmt: skip


def test_the_order_of_experts_is_part_of_the_mix() -> None:
    """Order is the expert's index; single experts do not care."""
    spec = spec_of()
    swapped = spec.model_copy(update={"experts": spec.experts[::-1]})

    names = changed(graph(spec, resolved_for(spec)), graph(swapped, resolved_for(swapped)))

    assert {"mix", "average", "finetune", "evaluate"} <= names
    assert not names & {"train-code", "train-math", "prepare-code"}


def test_a_run_of_its_own_shares_nothing() -> None:
    """`reuse: Never` salts every stage with the run's uid."""
    spec = spec_of(policy={"reuse": "Never"})
    one, two = (graph(spec, resolved_for(spec), uid=uid) for uid in ("u1", "u2"))

    assert changed(one, two) == set(one)


def test_members_leave_out_a_late_expert_but_keep_its_data() -> None:
    """A domain is dropped only when its own prepare failed."""
    spec = spec_of()
    kept = graph(spec, resolved_for(spec), Members(experts=("math",)))
    lost = graph(spec, resolved_for(spec), Members(experts=("math",), without=("code",)))

    assert kept["mix"].needs == ("train-math",)
    assert "prepare-code" in kept["finetune"].needs
    assert "prepare-code" not in lost["finetune"].needs + lost["evaluate"].needs


def test_the_default_mixture_weighs_domains_by_tokens_and_general_by_a_fifth() -> None:
    """BTX paper, Table 7."""
    phases = finetune_phases(spec_of())

    assert phases == [Phase(tokens=100, domains={"code": 400, "math": 100, "general": 125})]
    shares = [weight / 625 for weight in phases[0].domains.values()]
    assert shares == [0.64, 0.16, 0.2]


def test_domain_means_name_the_data_of_each_expert_and_of_the_seed() -> None:
    """In expert order, the seed (general) last; 0 where there is none."""
    routing = {"init": "DomainMean"}
    with_general = graph_of(finetune={"routing": routing})["finetune"].stage.recipe
    without = graph_of(finetune={"routing": routing}, general=[])["finetune"].stage.recipe

    assert with_general["experts"] == [1, 2, 3]
    assert without["experts"] == [1, 2, 0]


def test_numbers_hash_by_value() -> None:
    """1 and 1.0 are one number to both readers of a manifest."""
    one = graph_of(train={"optimizer": {"lr": 1}})
    same = graph_of(train={"optimizer": {"lr": 1.0}})

    assert changed(one, same) == set()


def test_a_new_defaulted_field_changes_no_digest() -> None:
    """Fields equal to their default are left out, so the golden file pins every default."""
    stage = graph_of()["train-code"].stage

    class Grown(RECIPES[Kind.TRAIN]):  # type: ignore[misc]  # a class of the contract, grown
        """A later release's recipe."""

        new_field: int = 7

    grown = Grown.parse(stage.recipe)
    from btx_api.stage import recipe_of

    assert recipe_of(grown) == stage.recipe
    assert recipe_of(grown.model_copy(update={"new_field": 8})) != stage.recipe


def test_digests_are_golden() -> None:
    """A changed digest orphans every artifact in the field: raise the kind's version instead."""
    examples = {
        "defaults": spec_of(),
        "dense": spec_of(method="Dense"),
        "explicit": spec_of(**explicit_defaults()),
        "tasks": spec_of(evaluate={"tasks": [
            {"name": "arc", "uri": "file://arc.jsonl"},
            {"name": "gsm", "uri": "file://gsm.jsonl", "kind": "ExactMatch", "shots": 8},
        ]}),
    }  # fmt: skip
    found = {name: digests(graph(s, resolved_for(s))) for name, s in examples.items()}

    assert found["explicit"] == found["defaults"]
    assert found == json.loads(GOLDEN.read_text())


def explicit_defaults() -> dict[str, Any]:
    """Every block with every default written out, as an API server hands it back."""
    plain = spec_of().model_dump(mode="json", by_alias=True)
    blocks = ("prepare", "train", "average", "mix", "finetune", "evaluate", "policy", "execution")
    return {name: _without_none(plain[name]) for name in blocks}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value


def test_every_default_of_a_recipe_is_pinned() -> None:
    """The golden file also holds the defaults themselves, so that none changes unseen."""
    defaults = BTXRunSpec.parse(spec_of().plain())
    blocks = ("prepare", "train", "average", "mix", "finetune", "evaluate")
    found = {name: getattr(defaults, name).model_dump(mode="json") for name in blocks}

    assert found == json.loads((GOLDEN.parent / "defaults.json").read_text())
