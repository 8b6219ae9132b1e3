"""The analysis of routing, of tasks and of what was forgotten: numbers, words, page."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from btx_api.spec import TaskShape
from btx_api.stage import EvaluatedDomain, EvaluatedModel, EvaluatedTask, EvaluateRecipe
from btx_trainer.analysis import BINS, Excerpt, RoutingTable, Slots, routing_table, total_variation
from btx_trainer.page import page
from btx_trainer.report import card, compare, sentences, text_table
from btx_trainer.routing import LayerRouting
from btx_trainer.scores import Answered, Asked, Measured, Report, Sums, tabulate
from btx_trainer.table import task_table
from btx_trainer.tally import EXCERPT, Tally, excerpt

DOMAINS = ("code", "prose", "general", "extra")
LOSSES = {
    "seed": (2.0, 2.1, 1.9, 2.5), "code": (1.7, 2.3, 2.0, 2.4), "prose": (2.2, 1.8, 1.95, 2.6),
    "soup": (2.0, 2.0, 1.9, 2.45), "final": (1.75, 1.85, 1.88, 2.3),
}  # fmt: skip
RIGHT = {"seed": (30, 5), "code": (60, 20), "prose": (40, 0), "soup": (30, 5), "final": (55, 9)}
"""Of 100 questions of `pick` and 20 of `write`."""
EXPERTS = ("code", "prose", "seed")


def counts(*layers: Sequence[float]) -> list[list[float]]:
    """Slots by layer and expert."""
    return [list(layer) for layer in layers]


def slots(layers: Sequence[Sequence[float]] = ((6, 3, 1), (2, 6, 2), (2, 6, 2))) -> Slots:
    """The same in every domain and task; all tokens in the third bin."""
    bins = [[[0] * 2 + [40] + [0] * (BINS - 3)] * 3] * len(layers)
    shown = Excerpt(
        layers=(0, 1, 2), tokens=("<b>", " is\n", "\t&", "\u202ex"),
        experts=((0, 1, 2, 0), (1, 1, 1, 1), (2, 0, 1, 2)),
    )  # fmt: skip
    return Slots(
        k=2, unit="slots", counts={name: counts(*layers) for name in DOMAINS},
        histograms={name: bins for name in DOMAINS}, tasks={"pick": counts(*layers[::-1])},
        excerpts={"code": shown},
    )  # fmt: skip


def report(
    losses: Mapping[str, Sequence[float]] = LOSSES, right: Mapping[str, Sequence[int]] = RIGHT,
    trained: Sequence[int] | None = (5, 6, 7), routed: Slots | None = None,
) -> Report:  # fmt: skip
    """Of two experts, with a domain that nobody trained on and two tasks."""
    recipe = EvaluateRecipe(
        models=tuple(
            EvaluatedModel(label=n, role="expert" if n in ("code", "prose") else n, input=i)
            for i, n in enumerate(losses)
        ),
        columns=tuple(EvaluatedDomain(name=n, input=5 + i) for i, n in enumerate(DOMAINS)),
        questions=(EvaluatedTask(name="pick", input=9), EvaluatedTask(name="write", input=10)),
        routing="TopK",
    )  # fmt: skip
    measured = [
        Measured(
            sums={d: Sums(loss=v * 1000, tokens=1000, bytes=4000.0)
                  for d, v in zip(DOMAINS, losses[name], strict=True)},
            parameters=10, active=8, slots=(routed or slots()) if name == "final" else None,
            tasks={
                "pick": Answered(asked=100, correct=right[name][0], correct_normalised=25),
                "write": Answered(asked=20, correct=right[name][1], cut=3),
            },
        )
        for name in losses
    ]  # fmt: skip
    asked = [
        Asked(
            shape=TaskShape(name="pick", shots=2), questions=100, chance=0.25, origin="content/q"
        ),
        Asked(shape=TaskShape(name="write", kind="ExactMatch"), questions=20, chance=None),
    ]
    return tabulate(recipe, measured, asked=asked, trained=trained)


def swapped(
    table: Mapping[str, Sequence[float]], one: str, other: str
) -> dict[str, Sequence[float]]:
    """Two models' numbers exchanged."""
    return {**table, one: table[other], other: table[one]}


def said(found: Report) -> str:
    """All sentences in one line."""
    return " ".join(sentences(found))


def a_layer(logits: torch.Tensor, k: int = 2) -> LayerRouting:
    """What a router does with these logits."""
    probabilities = logits.softmax(-1)
    kept, experts = logits.topk(k, dim=-1)
    return LayerRouting(kept.softmax(-1), experts, probabilities)


# The counts.


def test_a_tally_counts_slots_and_probabilities_of_the_masked_tokens() -> None:
    """By hand: three tokens, of which one is left out; the bins of their probabilities."""
    logits = torch.log(torch.tensor([[0.62, 0.31, 0.07], [0.1, 0.1, 0.8], [0.26, 0.51, 0.23]]))
    tally = Tally()
    for _ in range(2):
        tally.add([a_layer(logits)], torch.tensor([[True, False, True]]))

    assert tally.load.tolist() == [[4, 4, 0]]
    bins = tally.histogram[0]
    expected = torch.zeros(3, BINS)
    for expert, places in enumerate(((12, 5), (6, 10), (1, 4))):
        for place in places:
            expected[expert, place] += 2
    assert torch.equal(bins.float(), expected)


def test_a_probability_of_one_is_in_the_last_bin() -> None:
    """The bins cover 0 to 1 with both ends."""
    tally = Tally()
    tally.add([a_layer(torch.tensor([[100.0, 0.0, -100.0]]))], torch.tensor([True]))

    assert tally.histogram[0, 0, BINS - 1] == 1
    assert tally.histogram[0, 1:, 0].tolist() == [1, 1]


def test_weights_are_counted_where_every_expert_runs() -> None:
    """Slots would say nothing there."""
    tally = Tally()
    tally.add([a_layer(torch.log(torch.tensor([[0.6, 0.4]])))], torch.tensor([True]))

    assert tally.load.flatten().tolist() == pytest.approx([0.6, 0.4])


def test_an_excerpt_has_the_first_tokens_and_their_first_experts() -> None:
    """First, middle and last layer; bounded; only tokens of the mask."""
    draws = torch.randn(5, 80, 4, generator=torch.Generator().manual_seed(1))
    layers = [a_layer(logits) for logits in draws]
    ids = torch.arange(80).view(2, 40)
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 1] = False

    found = excerpt(layers, ids, mask, lambda one: f"t{one[0]}")

    kept = [0, *range(2, EXCERPT + 1)]
    assert found.layers == (0, 2, 4)
    assert found.tokens == tuple(f"t{i}" for i in kept)
    for layer, experts in zip(found.layers, found.experts, strict=True):
        assert experts == tuple(draws[layer][kept].argmax(-1).tolist())


# The table.


def test_histograms_sum_to_one_and_weigh_each_domain_alike() -> None:
    """A domain with many tokens counts as much as one with few."""
    few, many = ([[[0] * BINS]] for _ in range(2))
    few[0][0], many[0][0] = [1] + [0] * (BINS - 1), [0] * (BINS - 1) + [999]
    found = routing_table(
        "final", "TopK",
        Slots(k=1, unit="slots", counts={"a": [[1]], "b": [[999]]},
              histograms={"a": few, "b": many}),
        ["x"],
    )  # fmt: skip

    assert found.histograms[0][0] == (0.5, *[0] * (BINS - 2), 0.5)
    for layer in report().routing[0].histograms:
        assert all(sum(bins) == pytest.approx(1, abs=1e-4) for bins in layer)


def test_distances_are_total_variation_and_zero_between_equal_layers() -> None:
    """Half the sum of the absolute differences; the first layer has none before it."""
    [table] = report().routing

    assert table.distances == {name: (0.0, 0.4, 0.0) for name in DOMAINS}
    assert total_variation((1, 0), (0, 1)) == 1
    same = slots([(5, 3, 2)] * 3)
    [still] = report(routed=same).routing
    assert set(still.distances["code"]) == {0.0}


def test_tasks_have_shares_too_and_none_in_the_mean() -> None:
    """They are listed after the domains; loads are of the domains."""
    [table] = report().routing

    assert list(table.text) == [*DOMAINS, "pick"]
    assert table.tasks["pick"][2] == (0.6, 0.3, 0.1)
    assert table.over_layers("pick") == pytest.approx([1 / 3, 0.5, 1 / 6])
    assert table.layers[0].shares == (0.6, 0.3, 0.1)


def test_a_report_of_an_earlier_release_is_read() -> None:
    """Fields that it does not have are empty."""
    plain = json.loads(report().json_text())
    for name in ("distances", "histograms", "tasks", "excerpts"):
        del plain["routing"][0][name]
    del plain["tasks"]
    for row in plain["models"]:
        del row["tasks"]
        row.pop("forgetting", None)
    for domain in plain["domains"]:
        del domain["untrained"]

    found = Report.parse(plain)
    assert found.routing[0].histograms == ()
    assert sentences(found)
    assert "<h2>Routing</h2>" in page([("old", found)])


# Forgetting, retention, the gap.


def test_forgetting_retention_and_gap_by_hand() -> None:
    """Means over the other domains; general; all domains with an expert together."""
    found = report()
    code, prose = found.experts

    assert code.forgetting == pytest.approx((0.2 + 0.1 - 0.1) / 3, abs=1e-6)
    assert prose.forgetting == pytest.approx((0.2 + 0.05 + 0.1) / 3, abs=1e-6)
    assert (code.retention, prose.retention) == pytest.approx((0.1, 0.05))
    assert (found.result.forgetting, found.result.retention) == (None, pytest.approx(-0.02))
    # Seed 2.05, oracle 1.75, final 1.8.
    assert found.result.gap_closed == pytest.approx(0.25 / 0.3, abs=1e-6)
    assert found.seed.gap_closed == 0
    text = card(found)
    assert "| code expert | −0.300 | +0.067 | +0.200 | +0.100 | 17% |" in text
    assert "| final | – | – | −0.020 | −0.020 | 83% |" in text


def test_what_was_forgotten_is_said() -> None:
    """With the experts' numbers turned round, what was lost is gained."""
    text = said(report())
    assert "an expert has lost against the seed: code (+0.067) and prose (+0.117)." in text
    assert "data, the final model is better than the seed by 0.020; of the experts, code" in text
    assert "retains least (+0.100)." in text

    kind = {**LOSSES, "code": (1.7, 2.0, 1.8, 2.4), "final": (1.75, 1.85, 1.95, 2.3)}
    text = said(report(kind))
    assert "an expert has lost against the seed: prose (+0.117)." in text
    assert "an expert has gained against the seed: code (−0.100)." in text
    assert "the final model has lost 0.050 against the seed; of the experts, prose" in text
    level = said(report({**LOSSES, "final": LOSSES["seed"]}))
    assert "the final model is no different from the seed; of the experts" in level


# A domain that nobody trained on.


def test_a_domain_that_nobody_trained_on_is_marked_and_told_of() -> None:
    """By lineage; general is the seed's own; with numbers exchanged the sentence turns."""
    found = report()
    assert [d.name for d in found.domains if d.untrained] == ["extra"]
    assert not any(d.untrained for d in report(trained=None).domains)
    lower = (
        "Nobody trained on extra: there the final model has 2.300, lower (better) than the seed "
        "(2.500, by 0.200), the soup (2.450, by 0.150) and the best expert there, code (2.400, by"
    )
    assert lower in said(found)
    opposite = said(report(swapped(LOSSES, "final", "seed")))
    assert "on extra: there the final model has 2.500, higher (worse) than the seed" in opposite
    assert "Nobody trained" not in said(report(trained=(5, 6, 7, 8)))

    table = text_table([("one", found)])
    assert "extra†" in table and "† no model of the run was trained on this domain" in table
    assert "†" not in text_table([("one", report(trained=None))])
    html = page([("one", found)])
    assert '<th scope="col">extra†</th>' in html
    assert re.search(r">extra</th>.*<td>nobody</td>", html)


# Tasks.


def test_who_is_best_on_a_task_is_said() -> None:
    """Winners, guessing, seed and result; exchanged numbers, exchanged words."""
    text = said(report())
    assert (
        "Of the 100 questions of task pick, 2 shots, the code expert has the most right, 60.0% "
        "(more than the 25.0% of guessing); the final model, 55.0%, has more than the seed, 30.0%."
    ) in text
    assert "of task write, the code expert has the most right, 100.0%; the final" in text

    text = said(report(right={k: (v[0], v[1]) for k, v in swapped(RIGHT, "final", "seed").items()}))
    assert "the final model, 30.0%, has fewer than the seed, 55.0%." in text
    level = dict.fromkeys(RIGHT, (25, 0))
    text = said(report(right=level))
    assert "the seed, the code expert, the prose expert, the soup and the final model have" in text
    assert "25.0% (no more than the 25.0% of guessing); the final model, 25.0%, has as many" in text
    assert "Of the 20 questions of task write no model has any right." in text


def test_accuracies_are_shares_with_the_highest_marked() -> None:
    """In the terminal, the card and the page; one mark where one is highest."""
    found = report()
    assert found.models[1].tasks["pick"].accuracy == 0.6
    assert found.models[1].tasks["pick"].accuracy_per_byte == 0.25
    assert found.models[1].tasks["write"].accuracy_per_byte is None
    assert [(t.name, t.cut, t.chance) for t in found.tasks] == [
        ("pick", 0, 0.25),
        ("write", 3, None),
    ]

    table = text_table([("one", found)])
    assert re.search(r"code expert +60.0%\* +100.0%\*\n", table)
    assert re.search(r"final +55.0% +45.0%\n", table)
    assert "| code expert | **60.0%** | **100.0%** |" in card(found)
    assert "| guessing | 25.0% | – |" in card(found)
    html = page([("one", found)])
    assert html.count('<td class="best">60.0%</td>') == 1
    assert '<tr class="oracle"><th scope="row">guessing</th><td>25.0%</td><td>–</td></tr>' in html


def test_runs_are_compared_on_tasks_that_were_asked_alike() -> None:
    """Whoever wins; a task with other shots is no such task."""
    better = report(right={**RIGHT, "final": (80, 9)})
    text = " ".join(compare([("one", report()), ("two", better)]))
    assert "Most right by task: pick two (80.0% against 55.0%); write one and two (45.0%)." in text
    text = " ".join(compare([("one", better), ("two", report())]))
    assert "pick one (80.0% against 55.0%)" in text

    [pick, write] = better.tasks
    other = better.model_copy(update={"tasks": (pick.model_copy(update={"shots": 5}), write)})
    text = " ".join(compare([("one", report()), ("two", other)]))
    assert "Most right by task: write one and two (45.0%)." in text


def test_a_run_without_tasks_takes_none_from_another() -> None:
    """What both share (here: all but the final model) keeps the accuracies of the one that asked."""
    silent = report({**LOSSES, "final": (1.7, 1.8, 1.9, 2.2)})
    silent = silent.model_copy(
        update={
            "tasks": (),
            "models": tuple(row.model_copy(update={"tasks": {}}) for row in silent.models),
        }
    )
    same = {"origin": "content/same"}
    runs = [
        (name, found.model_copy(update={"models": tuple(
            row.model_copy(update=same) for row in found.models
        )}))
        for name, found in (("one", report()), ("two", silent))
    ]  # fmt: skip

    lines = [title for title, _, _ in task_table(runs)]
    assert lines == ["seed", "code expert", "prose expert", "soup", "one: final"]


# Layers.


def test_the_largest_change_between_layers_is_said() -> None:
    """Where it is, and where the least is; equal layers have none to tell apart."""
    assert (
        "The shares change most from layer 0 to 1 (total variation 0.40, mean over the domains) "
        "and least from layer 1 to 2 (0.00)."
    ) in said(report())
    turned = slots([(2, 6, 2), (2, 6, 2), (6, 3, 1)])
    assert "change most from layer 1 to 2 (total variation 0.40" in said(report(routed=turned))
    still = said(report(routed=slots([(5, 3, 2)] * 3)))
    assert "change most from layer 0 to 1 (total variation 0.00, mean over the domains)." in still


# The page.


def test_tokens_are_shown_with_their_experts_and_escaped() -> None:
    """What a line cannot show is a sign; nothing of the text is markup."""
    html = page([("one", report())])

    assert '<span class="e0" title="code">&lt;b&gt;</span>' in html
    assert '<span class="e1" title="prose"> is↵</span>' in html
    assert '<span class="e2" title="seed">⇥&amp;</span>' in html
    assert "\u202e" not in html and "<b>" not in html
    assert html.count("<i>layer ") == 3


def test_a_large_model_makes_no_large_page() -> None:
    """64 experts in 48 layers over 12 domains: below 2 MB, and every layer's shares are kept."""
    names = [*DOMAINS, *(f"domain-{i}" for i in range(8))]
    even = [[1.0 + (e * 7 + layer) % 5 for e in range(64)] for layer in range(48)]
    bins = [[[(e + b) % 7 + 1 for b in range(BINS)] for e in range(64)] for _ in range(48)]
    shown = Excerpt(layers=(0, 24, 47), tokens=("abc",) * EXCERPT, experts=((63,) * EXCERPT,) * 3)
    table = routing_table(
        "final", "TopK",
        Slots(k=2, unit="slots", counts=dict.fromkeys(names, even),
              histograms=dict.fromkeys(names, bins), tasks=dict.fromkeys(names[:3], even),
              excerpts=dict.fromkeys(names, shown)),
        [f"expert-{i}" for i in range(63)],
    )  # fmt: skip
    tables: tuple[RoutingTable, ...] = (table.model_copy(update={"role": "mixed"}), table)
    large = report().model_copy(update={"routing": tables})

    assert len(page([("one", large)]).encode()) < 2 * 2**20
    assert len(table.histograms[0]) == 64
    assert math.isclose(sum(table.histograms[0][0]), 1, abs_tol=1e-3)


def test_the_folder_of_a_report_has_the_new_numbers(tmp_path: Path) -> None:
    """report.json is read back with all of them."""
    found = report()
    (tmp_path / "report.json").write_text(found.json_text())

    again = Report.parse(json.loads((tmp_path / "report.json").read_text()))
    assert again == found
    assert again.routing[0].excerpts["code"].tokens[3] == "\u202ex"
