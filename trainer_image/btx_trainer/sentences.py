"""Plain words for the numbers of report.json: what won, what did not; no ordering is assumed.

Pure. Losses are rounded to the three decimals that are shown before they are compared, so a
sentence never says more than its table. Called by report.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from btx_api.spec import GENERAL

from btx_trainer.analysis import RoutingTable
from btx_trainer.scores import Report, Row, common_domains, common_tasks

UNIT = "nats per token"


def sentences(report: Report) -> list[str]:
    """One run, from its report alone."""
    return [
        *_result(report),
        *_oracle(report),
        *_by_domain(report),
        *_mixing(report),
        *_experts(report),
        *_retention(report),
        *_untrained(report),
        *_tasks(report),
        *_routing(report),
    ]


def count(value: float) -> str:
    """A large number for people: 720 k, 1.05 M, 11.1 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last


def signed(value: float) -> str:
    """Three decimals with a typographic sign."""
    return f"{value:+.3f}".replace("-", "−")


def percent(share: float) -> str:
    """Per cent with one decimal."""
    return f"{100 * share:.1f}%"


def _round(loss: float) -> float:
    return round(loss, 3)


def _difference(a: float, b: float) -> float:
    return round(_round(a) - _round(b), 3)


def _against(value: float, others: Mapping[str, float]) -> str:
    """`lower than the seed (1.834, by 0.171) and higher than ...`; empty without others."""
    lower: list[str] = []
    level: list[str] = []
    higher: list[str] = []
    for title, other in others.items():
        difference = _difference(value, other)
        if difference == 0:
            level.append(f"{title} ({other:.3f})")
        else:
            side = lower if difference < 0 else higher
            side.append(f"{title} ({other:.3f}, by {abs(difference):.3f})")
    parts = [
        f"{word} {listed(items)}"
        for word, items in (
            ("lower (better) than", lower),
            ("no different from", level),
            ("higher (worse) than", higher),
        )
        if items
    ]
    return "; ".join(parts)


def _subject(row: Row) -> str:
    return f"the {row.title} model" if row.role in ("final", "dense") else f"the {row.title}"


def _best_expert(report: Report) -> Row | None:
    return min(report.experts, key=lambda row: row.mean_loss, default=None)


def _domains(names: Sequence[str]) -> str:
    return f"the {len(names)} domains" if len(names) > 1 else names[0]


def _result(report: Report) -> Iterator[str]:
    result, best = report.result, _best_expert(report)
    where = _domains([domain.name for domain in report.domains])
    others = {"the seed": report.seed.mean_loss}
    if soup := report.of("soup"):
        others["the soup"] = soup.mean_loss
    if best:
        others[f"the best single expert, {best.label}"] = best.mean_loss
    yield (
        f"Mean held-out loss over {where}: {_subject(result)} has {result.mean_loss:.3f} {UNIT}, "
        f"{_against(result.mean_loss, others)}."
    )
    least = min(_round(row.mean_loss) for row in report.models)
    winners = [_subject(row) for row in report.models if _round(row.mean_loss) == least]
    have = "have" if len(winners) > 1 else "has"
    text = f"{listed(winners)} {have} the lowest mean of the {len(report.models)} models: "
    yield f"{text[0].upper()}{text[1:]}{least:.3f}."


def _oracle(report: Report) -> Iterator[str]:
    if not report.oracle:
        return
    names = list(report.oracle)
    oracle = sum(report.oracle.values()) / len(names)
    seed, result = report.seed.mean(names), report.result.mean(names)
    difference = _difference(result, oracle)
    side = f"{abs(difference):.3f} {'lower (better)' if difference < 0 else 'higher (worse)'}"
    text = (
        f"The oracle, each expert on its own domain and so no single model, has a mean of "
        f"{oracle:.3f} over {listed(names)}; {_subject(report.result)}, {result:.3f} there, is "
        f"{side if difference else 'level with it'}"
    )
    gap, closed = _difference(seed, oracle), _difference(seed, result)
    if gap > 0 and closed >= 0:
        text += f", having closed {closed / gap:.0%} of the gap from the seed ({seed:.3f})"
    elif gap > 0:
        text += f", further from it than the seed ({seed:.3f})"
    yield text + "."


def _by_domain(report: Report) -> Iterator[str]:
    result = report.result
    change = {name: _difference(s.loss, report.seed.scores[name].loss)
              for name, s in result.scores.items()}  # fmt: skip
    better = [f"{name} ({signed(d)})" for name, d in change.items() if d < 0]
    worse = [f"{name} ({signed(d)})" for name, d in change.items() if d > 0]
    same = [name for name, d in change.items() if d == 0]
    parts = []
    if better:
        parts.append(f"is better on {listed(better)}")
    if worse:
        parts.append(f"is worse, so has forgotten, on {listed(worse)}")
    else:
        parts.append("has forgotten nothing that was measured")
    if same:
        parts.append(f"is unchanged on {listed(same)}")
    yield f"Against the seed, {_subject(result)} {listed(parts)}."


def _mixing(report: Report) -> Iterator[str]:
    mixed, final = report.of("mixed"), report.of("final")
    if not mixed or not final:
        return
    others = {"the seed": report.seed.mean_loss}
    if soup := report.of("soup"):
        others["the soup"] = soup.mean_loss
    change = _difference(final.mean_loss, mixed.mean_loss)
    if change == 0:
        then = "finetuning did not change the mean"
    else:
        verb = "lowered" if change < 0 else "raised"
        then = f"finetuning {verb} the mean by {abs(change):.3f} to {final.mean_loss:.3f}"
    yield (
        f"Mixed but not yet finetuned, the model has {mixed.mean_loss:.3f}, "
        f"{_against(mixed.mean_loss, others)}; {then}."
    )


def _experts(report: Report) -> Iterator[str]:
    if not report.experts:
        return
    own = [row for row in report.experts if row.label in report.oracle]
    change = {row.label: _versus(row, row.label, report.seed) for row in own}
    if gained := [f"{name} ({signed(d)})" for name, d in change.items() if d < 0]:
        yield f"On its own domain an expert is better than the seed: {listed(gained)}."
    if failed := [f"{name} ({signed(d)})" for name, d in change.items() if d >= 0]:
        yield f"On its own domain an expert is not better than the seed: {listed(failed)}."
    if (best := _specialists(report)) and len(report.experts) > 1:
        yield best
    pairs = [(_versus(row, name, report.seed), row, name)
             for row in report.experts for name in row.scores]  # fmt: skip
    worst, row, name = max(pairs, key=lambda pair: pair[0])
    if worst > 0:
        yield (
            f"The worst forgetting is the {row.label} expert's on {name}: "
            f"{row.scores[name].loss:.3f} against the seed's "
            f"{report.seed.scores[name].loss:.3f} ({signed(worst)})."
        )
    else:
        yield "No expert is worse than the seed on any domain."


def _versus(row: Row, domain: str, seed: Row) -> float:
    return _difference(row.scores[domain].loss, seed.scores[domain].loss)


def _specialists(report: Report) -> str:
    names = list(report.oracle)
    strangers = []
    for name in names:
        best = min(report.experts, key=lambda row: _round(row.scores[name].loss))
        if _round(best.scores[name].loss) < _round(report.oracle[name]):
            strangers.append(f"on {name} it is the {best.label} expert")
    if strangers:
        return f"The best expert is not always the domain's own: {listed(strangers)}."
    return "On every expert's domain no other expert is better than its own." if names else ""


def _retention(report: Report) -> Iterator[str]:
    """What training cost away from home."""
    away = {row.label: round(row.forgetting, 3) for row in report.experts
            if row.forgetting is not None}  # fmt: skip
    for word, wanted in (("lost", 1), ("gained", -1)):
        names = [f"{name} ({signed(v)})" for name, v in away.items() if v * wanted > 0]
        if names:
            yield (
                f"Away from its own domain, in the mean over the others, an expert has {word} "
                f"against the seed: {listed(names)}."
            )
    result = report.result
    if result.retention is None:
        return
    change = _versus(result, GENERAL, report.seed)
    said = "is no different from the seed"
    if change:
        verb = "has lost" if change > 0 else "is better than the seed by"
        said = f"{verb} {abs(change):.3f}" + " against the seed" * (change > 0)
    text = f"On general, the seed's own data, {_subject(result)} {said}"
    if report.experts:
        lost = {row.label: _versus(row, GENERAL, report.seed) for row in report.experts}
        worst = max(lost, key=lost.__getitem__)
        text += f"; of the experts, {worst} retains least ({signed(lost[worst])})"
    yield text + "."


def _untrained(report: Report) -> Iterator[str]:
    result = report.result
    for name in (domain.name for domain in report.domains if domain.untrained):
        others = {"the seed": report.seed.scores[name].loss}
        if soup := report.of("soup"):
            others["the soup"] = soup.scores[name].loss
        if report.experts:
            best = min(report.experts, key=lambda row: row.scores[name].loss)
            others[f"the best expert there, {best.label}"] = best.scores[name].loss
        loss = result.scores[name].loss
        yield (
            f"Nobody trained on {name}: there {_subject(result)} has {loss:.3f}, "
            f"{_against(loss, others)}."
        )


def _tasks(report: Report) -> Iterator[str]:
    for task in report.tasks:
        scores = {_subject(row): round(row.tasks[task.name].accuracy, 3) for row in report.models}
        most = max(scores.values())
        if not most:
            yield f"Of the {task.questions} questions of task {task.name} no model has any right."
            continue
        winners = [title for title, score in scores.items() if score == most]
        have = "have" if len(winners) > 1 else "has"
        shots = f", {task.shots} shots" if task.shots else ""
        text = f"Of the {task.questions} questions of task {task.name}{shots}, {listed(winners)} "
        text += f"{have} the most right, {percent(most)}"
        if task.chance is not None:
            side = "more" if most > round(task.chance, 3) else "no more"
            text += f" ({side} than the {percent(task.chance)} of guessing)"
        seed, result = scores["the seed"], scores[_subject(report.result)]
        side = "more than" if result > seed else "fewer than" if result < seed else "as many as"
        text += f"; {_subject(report.result)}, {percent(result)}, has {side} the seed"
        yield f"{text}, {percent(seed)}."


def _routing(report: Report) -> Iterator[str]:
    table = next((table for table in report.routing if table.role == "final"), None)
    if table is None:
        return
    top = {name: _favourite(table, name) for name in table.domains}
    text = listed(f"{name} to {expert} ({share:.0%})" for name, (expert, share) in top.items())
    own = [top[domain.name][0] == domain.name for domain in report.domains if domain.expert]
    line = f"The final model's routers send the largest share of {table.unit} of {text}"
    line += f", where an even share is {1 / len(table.experts):.0%}"
    if own:
        line += f"; that is the domain's own expert on {sum(own)} of {len(own)} domains with one"
    yield line + "."
    least = min(range(len(table.layers)), key=lambda i: table.layers[i].least)
    most = max(range(len(table.layers)), key=lambda i: table.layers[i].most)
    low, high = table.layers[least], table.layers[most]
    idle, busy = (table.experts[s.index(f(s))] for s, f in ((low.shares, min), (high.shares, max)))
    yield (
        f"Over all domains the least used expert of any layer is {idle} in layer {least} "
        f"({low.least:.1%} of the {table.unit}), the most used {busy} in layer {most} "
        f"({high.most:.1%})."
    )
    yield from _steps(table)


def _steps(table: RoutingTable) -> Iterator[str]:
    """How much the choice changes from layer to layer."""
    layers = range(1, len(table.layers))
    if not layers or not table.distances:
        return
    mean = [sum(column) / len(column) for column in zip(*table.distances.values(), strict=True)]
    most, least = max(layers, key=mean.__getitem__), min(layers, key=mean.__getitem__)
    text = (
        f"The shares change most from layer {most - 1} to {most} (total variation {mean[most]:.2f}"
    )
    text += ", mean over the domains)"
    if mean[most] > mean[least]:
        text += f" and least from layer {least - 1} to {least} ({mean[least]:.2f})"
    yield text + "."


def _favourite(table: RoutingTable, domain: str) -> tuple[str, float]:
    shares = table.over_layers(domain)
    largest = max(shares)
    return table.experts[shares.index(largest)], largest


def compare(reports: Sequence[tuple[str, Report]]) -> list[str]:
    """What several named runs made, side by side; nothing for a single run."""
    if len(reports) == 1:
        return []
    names = common_domains([report for _, report in reports])
    apart = sorted({d.name for _, report in reports for d in report.domains} - set(names))
    found = []
    if names:
        found += [_ranking(reports, names), *_winners(reports, names)]
    found += _task_winners(reports)
    if apart:
        found.append(f"Not measured alike in every run, so not compared: {listed(apart)}.")
    return found + _effort(reports)


def _ranking(reports: Sequence[tuple[str, Report]], names: Sequence[str]) -> str:
    means = {f"{name} ({report.method})": report.result.mean(names) for name, report in reports}
    ranked = sorted(means.items(), key=lambda item: item[1])
    (first, least), rest = ranked[0], ranked[1:]
    level = [title for title, mean in rest if _difference(mean, least) == 0]
    behind = [
        f"{title} has {mean:.3f}, {_difference(mean, least):.3f} higher (worse)"
        for title, mean in rest
        if _difference(mean, least) > 0
    ]
    text = f"Mean held-out loss over {_domains(names)}: {listed([first, *level])} "
    text += f"{'have' if level else 'has'} the lowest, {least:.3f} {UNIT}"
    return "; ".join([text, *behind]) + "."


def _winners(reports: Sequence[tuple[str, Report]], names: Sequence[str]) -> Iterator[str]:
    if len(names) == 1:
        return
    parts = []
    for name in names:
        losses = {title: _round(report.result.scores[name].loss) for title, report in reports}
        least = min(losses.values())
        best = [title for title, loss in losses.items() if loss == least]
        others = [f"{loss:.3f}" for loss in losses.values() if loss != least]
        against = f" against {listed(others)}" if others else ""
        parts.append(f"on {name} {listed(best)} ({least:.3f}{against})")
    yield f"Lowest by domain: {'; '.join(parts)}."


def _task_winners(reports: Sequence[tuple[str, Report]]) -> Iterator[str]:
    parts = []
    for task in common_tasks([report for _, report in reports]):
        scores = {title: round(r.result.tasks[task].accuracy, 3) for title, r in reports}
        most = max(scores.values())
        best = [title for title, score in scores.items() if score == most]
        others = [percent(score) for score in scores.values() if score != most]
        against = f" against {listed(others)}" if others else ""
        parts.append(f"{task} {listed(best)} ({percent(most)}{against})")
    if parts:
        yield f"Most right by task: {'; '.join(parts)}."


def _effort(reports: Sequence[tuple[str, Report]]) -> list[str]:
    found = []
    for name, report in reports:
        row, text = report.result, f"{name}: the result has {count(report.result.parameters)}"
        text += " parameters"
        if row.active_parameters != row.parameters:
            text += f", of which a token uses {count(row.active_parameters)}"
        if report.curves:
            total, chain = training_tokens(report)
            text += f"; it took {count(total)} tokens of training, {count(chain)} of them in the"
            text += " longest chain of trainings that wait for each other"
        found.append(text + ".")
    return found


def training_tokens(report: Report) -> tuple[int, int]:
    """(all tokens trained on, longest chain: experts train side by side, then comes the rest)."""
    experts = [curve.tokens[-1] for curve in report.curves if curve.role == "expert"]
    others = sum(curve.tokens[-1] for curve in report.curves if curve.role != "expert")
    return sum(experts) + others, max(experts, default=0) + others
