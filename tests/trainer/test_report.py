"""The report: sentences follow the numbers, whichever way they point; one page without requests."""

import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest
from btx_api.stage import EvaluatedDomain, EvaluatedModel, EvaluateRecipe
from btx_trainer.analysis import BINS, Excerpt, Slots
from btx_trainer.report import card, compare, render, sentences, text_table, title
from btx_trainer.scores import CURVE_POINTS, Measured, Report, Sums, curve, tabulate
from playwright.sync_api import Browser, sync_playwright

NAMES = ("code", "prose", "math")
LOSSES = {
    "seed": (2.042, 2.107, 1.354),
    "code": (1.796, 2.169, 2.551),
    "prose": (2.148, 1.746, 2.458),
    "math": (3.438, 3.378, 1.277),
    "soup": (2.053, 2.090, 1.420),
    "mixed": (2.005, 2.056, 1.345),
    "final": (1.835, 1.859, 1.295),
}
"""Of one small run (nats per byte)."""
SHARES = {
    "code": (0.46, 0.44, 0.06, 0.04),
    "prose": (0.42, 0.48, 0.04, 0.06),
    "math": (0.04, 0.06, 0.49, 0.41),
}
Losses = Mapping[str, Sequence[float]]


def history(start: float, end: float, steps: int) -> str:
    """A noisy, falling loss in the form of history.jsonl."""
    noise = random.Random(steps)
    return "".join(
        json.dumps(
            {"step": i, "tokens": 2048 * i,
             "loss": end + (start - end) * math.exp(-4 * i / steps) + noise.gauss(0, 0.04)}
        ) + "\n"
        for i in range(1, steps + 1)
    )  # fmt: skip


def measured(losses: Sequence[float], shares: Mapping[str, Sequence[float]] | None) -> Measured:
    """A model with these losses and, in every one of four layers, these shares."""
    counts = {name: [[1000 * s for s in row]] * 4 for name, row in (shares or {}).items()}
    bins = [[[i % 5 for i in range(BINS)]] * 4] * 4
    shown = Excerpt(
        layers=(0, 2, 3), tokens=tuple("def f(x):\n  pass"), experts=(tuple([0, 1, 2, 3] * 4),) * 3
    )
    return Measured(
        sums={
            name: Sums(loss=loss * 40_000, tokens=40_000, bytes=39_600)
            for name, loss in zip(NAMES, losses, strict=True)
        },
        parameters=2_400_000 if shares else 770_000,
        active=1_300_000 if shares else 770_000,
        slots=Slots(
            k=2,
            unit="slots",
            counts=counts,
            histograms=dict.fromkeys(counts, bins),
            excerpts=dict.fromkeys(counts, shown),
        )
        if shares
        else None,
    )


def btx(
    losses: Losses = LOSSES, shares: Mapping[str, Sequence[float]] = SHARES,
    deviations: tuple[str, ...] = (),
) -> Report:  # fmt: skip
    """The report of a BTX run with these losses and the final model's routing shares."""
    roles = {name: "expert" if name in NAMES else name for name in losses}
    inputs = list(roles)
    recipe = EvaluateRecipe(
        models=tuple(
            EvaluatedModel(label=name, role=role, input=i)
            for i, (name, role) in enumerate(roles.items())
        ),
        columns=tuple(EvaluatedDomain(name=n, input=7 + i) for i, n in enumerate(NAMES)),
        routing="TopK", precision="fp32", sequence_length=128, tokens=131_072,
    )  # fmt: skip
    routed = {"mixed": {name: (0.25,) * 4 for name in NAMES}, "final": shares}
    return tabulate(
        recipe,
        [measured(losses[name], routed.get(name)) for name in inputs],
        origins=["content/s33d", *(f"stage/{i:032x}" for i in range(1, 10))],
        histories={
            1: history(2.1, 1.8, 200), 2: history(2.1, 1.7, 200), 3: history(1.4, 1.28, 200),
            6: history(1.8, 1.65, 120),
        },
        tokenizer="bytes", deviations=deviations,
    )  # fmt: skip


def dense(final: Sequence[float] = (1.679, 1.680, 1.283)) -> Report:
    """A data-matched Dense run over the same held-out text."""
    recipe = EvaluateRecipe(
        models=(
            EvaluatedModel(label="seed", role="seed", input=0),
            EvaluatedModel(label="final", role="dense", input=1),
        ),
        columns=tuple(EvaluatedDomain(name=n, input=2 + i) for i, n in enumerate(NAMES)),
        precision="fp32", sequence_length=128, tokens=131_072,
    )  # fmt: skip
    return tabulate(
        recipe,
        [measured(LOSSES["seed"], None), measured(final, None)],
        origins=["content/s33d", f"stage/{77:032x}", *(f"stage/{i:032x}" for i in range(7, 10))],
        histories={1: history(2.0, 1.6, 720)},
    )


def swapped(one: str, other: str) -> dict[str, Sequence[float]]:
    """The losses with two models' numbers exchanged."""
    return {**LOSSES, one: LOSSES[other], other: LOSSES[one]}


def said(report: Report) -> str:
    """All sentences in one line."""
    return " ".join(sentences(report))


def test_the_result_is_set_against_seed_soup_and_best_expert() -> None:
    """With the numbers of final model and seed exchanged, better becomes worse."""
    assert (
        "the final model has 1.663 nats per token, lower (better) than the seed (1.834, by 0.171), "
        "the soup (1.854, by 0.191) and the best single expert, prose (2.117, by 0.454)."
    ) in said(btx())
    assert "The final model has the lowest mean of the 7 models: 1.663." in said(btx())

    opposite = said(btx(swapped("final", "seed")))
    assert "higher (worse) than the seed (1.663, by 0.171)" in opposite
    assert "The seed has the lowest mean of the 7 models: 1.663." in opposite


def test_equal_numbers_are_said_to_be_equal() -> None:
    """What cannot be told apart in the table is not ranked."""
    level = {**LOSSES, "final": (2.042, 2.107, 1.3542)}

    assert "no different from the seed (1.834)" in said(btx(level))
    assert "the seed has 1.834" not in said(btx(level))
    both = {**LOSSES, "soup": (1.835, 1.859, 1.295)}
    assert "The soup and the final model have the lowest mean" in said(btx(both))


def test_the_oracle_may_be_beaten_or_missed() -> None:
    """The share of the gap is counted from the seed; a result behind the seed has closed none."""
    assert "is 0.057 higher (worse), having closed 75% of the gap from the seed" in said(btx())
    better = said(btx({**LOSSES, "final": (1.7, 1.7, 1.2)}))
    assert "1.533 there, is 0.073 lower (better), having closed 132% of the gap" in better
    behind = said(btx({**LOSSES, "final": (2.5, 2.5, 1.5)}))
    assert "higher (worse), further from it than the seed (1.834)" in behind


def test_forgetting_of_the_result_is_named_by_domain() -> None:
    """Gains and losses against the seed, domain by domain."""
    assert (
        "better on code (−0.207), prose (−0.248) and math (−0.059) and has forgotten nothing"
    ) in said(btx())
    assert (
        "is better on code (−0.207) and prose (−0.248) and is worse, so has forgotten, "
        "on math (+0.146)"
    ) in said(btx({**LOSSES, "final": (1.835, 1.859, 1.5)}))


def test_finetuning_may_lower_or_raise_the_mean() -> None:
    """The mixed model against the final one, and against seed and soup."""
    assert "has 1.802, lower (better) than the seed (1.834, by 0.032)" in said(btx())
    assert "finetuning lowered the mean by 0.139 to 1.663." in said(btx())
    assert "finetuning raised the mean by 0.139 to 1.802." in said(btx(swapped("mixed", "final")))


def test_experts_own_gain_and_worst_forgetting() -> None:
    """Experts that gained, that did not, the stranger on a domain, and the worst forgetting."""
    text = said(btx())
    assert "an expert is better than the seed: code (−0.246), prose (−0.361) and math" in text
    assert "not better than the seed" not in text
    assert "no other expert is better than its own" in text
    assert "worst forgetting is the math expert's on code: 3.438 against the seed's 2.042" in text

    other = said(btx(swapped("code", "prose")))
    assert "not better than the seed: code (+0.106) and prose (+0.062)." in other
    assert "is not always the domain's own: on code it is the prose expert and on prose" in other
    mild = {**LOSSES, **dict.fromkeys(NAMES, (1.7, 1.7, 1.2))}
    assert "No expert is worse than the seed on any domain." in said(btx(mild))


def test_routing_names_the_largest_share_of_each_domain() -> None:
    """Specialisation is counted, not assumed."""
    assert (
        "the largest share of slots of code to code (46%), prose to prose (48%) and math to math "
        "(49%), where an even share is 25%; that is the domain's own expert on 3 of 3 domains"
    ) in said(btx())
    other = {"code": SHARES["prose"], "prose": SHARES["code"], "math": SHARES["math"]}
    assert (
        "of code to prose (48%), prose to code (46%) and math to math (49%), where an even share "
        "is 25%; that is the domain's own expert on 1 of 3 domains"
    ) in said(btx(shares=other))
    assert "least used expert of any layer is seed in layer 0 (17.0%" in said(btx())


def test_runs_are_compared_whoever_wins() -> None:
    """The lower mean is named first, with its name and method; exchanged numbers, exchanged."""
    runs = [("one", btx()), ("two", dense())]
    text = " ".join(compare(runs))
    assert "two (Dense) has the lowest, 1.547 nats per token; one (BTX) has 1.663, 0.116" in text
    assert "on math two (1.283 against 1.295)" in text

    best = btx({**LOSSES, "final": (1.679, 1.680, 1.283)})
    text = " ".join(compare([("one", best), ("two", dense(LOSSES["final"]))]))
    assert "one (BTX) has the lowest, 1.547 nats per token; two (Dense) has 1.663, 0.116" in text
    assert "on math one (1.283 against 1.295)" in text

    text = " ".join(compare([("one", best), ("two", dense())]))
    assert "one (BTX) and two (Dense) have the lowest, 1.547" in text
    assert compare([("one", btx())]) == []


def test_the_effort_behind_each_result_is_said() -> None:
    """Parameters in all and per token; tokens in all and in the longest chain."""
    text = " ".join(compare([("one", btx()), ("two", dense())]))

    assert "one: the result has 2.4 M parameters, of which a token uses 1.3 M" in text
    assert "it took 1.47 M tokens of training, 655 k of them in the longest chain" in text
    assert "two: the result has 770 k parameters; it took 1.47 M tokens of training, 1.47 M" in text


def test_what_was_measured_on_other_text_is_not_compared() -> None:
    """Equal names of domains are not enough: the held-out text must be the same."""
    other = dense().model_copy(
        update={
            "domains": tuple(
                d.model_copy(update={"origin": "stage/other"}) if d.name == "code" else d
                for d in dense().domains
            )
        }
    )
    runs = [("one", btx()), ("two", other)]
    text = " ".join(compare(runs))

    assert "over the 2 domains: two (Dense) has the lowest, 1.482" in text
    assert "Not measured alike in every run, so not compared: code." in text
    assert "1.679*" not in text_table(runs)
    assert "1.482*" in text_table(runs)


def test_the_table_marks_the_lowest_as_shown() -> None:
    """One mark a column, two where the shown numbers are equal; the oracle takes no part."""
    lines = text_table([("BTX", btx())]).splitlines()

    assert re.split(r"\s{2,}", lines[0].strip()) == ["nats per token", *NAMES, "mean"]
    starred = {line.split("  ")[0]: line.count("*") for line in lines[2:-1]}
    assert starred == {
        "seed": 0, "code expert": 1, "prose expert": 1, "math expert": 1, "soup": 0, "mixed": 0,
        "final": 1, "oracle": 0,
    }  # fmt: skip
    level = text_table([("BTX", btx({**LOSSES, "soup": (1.7961, 2.0, 2.0)}))])
    assert level.count("1.796*") == 2


def test_runs_side_by_side_share_their_seed() -> None:
    """The same artifact with the same numbers has one line; the others carry their run's name."""
    table = text_table([("one", btx()), ("two", dense())])
    heads = [line.split("  ")[0] for line in table.splitlines()[2:-1]]

    assert heads == [
        "seed", "one: code expert", "one: prose expert", "one: math expert", "one: soup",
        "one: mixed", "one: final", "two: dense", "one: oracle",
    ]  # fmt: skip


def test_the_model_card_says_how_to_load_the_model_and_where_it_is_worse() -> None:
    """Front matter, table with the lowest in bold, lineage, limits, three lines of Python."""
    text = card(btx({**LOSSES, "final": (1.835, 1.859, 1.5)}, deviations=("code: went back",)))

    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "| code expert | **1.796** | 2.169 | 2.551 | 2.172 |" in text
    assert "- Worse than the seed on math." in text
    assert "- Deviation: code: went back" in text
    assert f"| final | `stage/{6:032x}` |" in text
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(block.splitlines()) == 3
    compile(block, "card", "exec")
    assert "# A dense model for code, prose and math" in card(dense())
    assert title(dense()) == "Dense on code, prose and math"


def test_report_json_is_read_back_as_written() -> None:
    """camelCase, one line a field, the same bytes again; unknown to no reader of this release."""
    report = btx()
    text = report.json_text()

    assert Report.parse(json.loads(text)) == report
    assert Report.parse(json.loads(text)).json_text() == text
    assert '"meanLoss"' in text and "mean_loss" not in text
    assert len(text.splitlines()) == len(report.plain())


@pytest.mark.parametrize(("lines", "points", "width"), [(1, 1, 1), (400, 400, 1), (1999, 400, 5)])
def test_long_histories_are_averaged(lines: int, points: int, width: int) -> None:
    """Neighbouring steps share a point; the last step is the last point."""
    text = "".join(f'{{"step":{i},"tokens":{i * 8},"loss":{i}}}\n' for i in range(1, lines + 1))

    found = curve("code", "expert", text)

    assert len(found.loss) == points <= CURVE_POINTS
    assert (found.steps[-1], found.tokens[-1]) == (lines, lines * 8)
    assert found.loss[0] == (width + 1) / 2


def test_making_a_report_needs_no_torch() -> None:
    """The CLI's errand must start fast: no torch at all, matplotlib only for a page."""
    code = (
        "import sys; import btx_trainer.report as r; "
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]); "
        "import btx_trainer.page; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """Nothing of the clock or of chance is in the page, its plots or the summary."""
    runs = [("one", btx()), ("two", dense())]
    for name in ("a", "b"):
        render(runs, tmp_path / name)

    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["report.html", "report.json", "summary.txt"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    content = json.loads((tmp_path / "a/report.json").read_text())
    assert Report.parse(content["runs"]["two"]) == dense()
    assert content["sentences"][0] in (tmp_path / "a/summary.txt").read_text().replace("\n  ", " ")


class _Ids(HTMLParser):
    """Collects ids, references to them, and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
            if name in ("href", "xlink:href", "src"):
                to = self.references if (value or "").startswith("#") else self.addresses
                to.append((value or "").removeprefix("#"))


def test_the_page_is_one_document_without_addresses(tmp_path: Path) -> None:
    """Ids are unique over all plots, references resolve, nothing is loaded; names are escaped."""
    render([("<b>one", btx()), ("two", dense())], tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = _Ids()
    page.feed(text)

    assert len(page.ids) == len(set(page.ids)) > 10
    assert set(page.references) <= set(page.ids)
    assert all(address.startswith("data:") for address in page.addresses)
    assert "<b>one" not in text and "&lt;b&gt;one" in text
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", text), "a stand-in colour was left"
    assert "<script" not in text and "@import" not in text and "DejaVu" not in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Headless Chromium; the test fails where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium is not installed: the package `chromium` of the distribution"
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_shows_table_curves_and_heatmaps(
    browser: Browser, scheme: str, tmp_path: Path
) -> None:
    """Visible and of a size; no console error, no request but the file; screenshots are kept."""
    render([("quickstart", btx()), ("quickstart-dense", dense())], tmp_path)
    view = browser.new_page(viewport={"width": 1100, "height": 900}, color_scheme=scheme)
    requests: list[str] = []
    errors: list[str] = []
    view.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.route("**/*", lambda route: (requests.append(route.request.url), route.continue_()))

    view.goto((tmp_path / "report.html").as_uri())
    view.wait_for_load_state("networkidle")

    view.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert errors == []
    assert requests == [(tmp_path / "report.html").as_uri()]
    table = view.locator("table").first
    assert table.locator("tbody tr").count() == 9
    assert table.locator("td.best").all_inner_texts() == ["1.277", "1.679", "1.680", "1.547"]
    for label, number in (
        ("Change of loss against the seed, by model and domain", 1),
        ("Training loss over tokens", 2),
        ("Share of slots by layer and expert, mixed model", 1),
        ("Share of slots by layer and expert, final model", 1),
        ("Load, entropy and distance by layer, final model", 1),
        ("Routing probability by layer and expert, final model", 1),
    ):
        plots = view.get_by_role("img", name=label)
        assert plots.count() == number, label
        for i in range(number):
            box = plots.nth(i).bounding_box()
            assert box and box["width"] > 600 and box["height"] > 100, label
    curves = view.get_by_role("img", name="Training loss over tokens").first
    assert curves.locator("path[style*='series-2']").count() >= 2
    heat = view.get_by_role("img", name="Share of slots by layer and expert, final model")
    assert heat.locator("image").count() == 3
    assert heat.get_by_text("46", exact=True).count() == 4
    tokens = view.locator(".excerpt span[title=code]")
    colours = [found.evaluate("e => getComputedStyle(e).backgroundColor") for found in tokens.all()]
    assert len(colours) > 20 and len(set(colours)) == 1
    assert view.evaluate("document.documentElement.scrollWidth") <= 1100
    target = Path(__file__).parents[2] / "build/test-artifacts"
    target.mkdir(parents=True, exist_ok=True)
    name = "report.png" if scheme == "light" else "report-dark.png"
    view.screenshot(path=str(target / name), full_page=True)
    view.set_viewport_size({"width": 390, "height": 800})
    assert view.evaluate("document.documentElement.scrollWidth") <= 390
    view.screenshot(path=str(target / name.replace("report", "report-narrow")), full_page=True)
    view.close()
