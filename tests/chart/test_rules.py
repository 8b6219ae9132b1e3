"""Rules and dashboards: names agree with btx_api.metrics, every alert fires and stays silent."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from btx_api import names
from btx_api.metrics import ENGINE, TRAINER, Metric, MetricType, Outcome
from btx_api.status import Reason, State
from btx_operator.cluster.jobs import labels_of
from btx_operator.cluster.run_metrics import STATES
from chart.tools import EVERYTHING, ROOT, dashboards, one, panels, promtool, render

METRICS = {metric.name: metric for metric in (*TRAINER.values(), *ENGINE.values())}
TARGET_LABELS = {"namespace", "run", "stage", "expert", "pod", "instance", "job"}
"""Of every series, by the monitors or by Prometheus itself."""


def groups() -> list[dict[str, Any]]:
    """The groups of the PrometheusRule."""
    return list(one(render(EVERYTHING), "PrometheusRule")["spec"]["groups"])


RULES = [rule for group in groups() for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDS = {rule["record"]: rule["expr"] for rule in RULES if "record" in rule}


def queries() -> Iterator[tuple[str, str]]:
    """Every PromQL of rules and dashboards, and where it is."""
    for rule in RULES:
        yield rule.get("alert") or rule["record"], rule["expr"]
    for name, dashboard in dashboards().items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"][1:]:
            yield f"{name}: ${variable['name']}", variable["query"]["query"]


def used(query: str) -> set[str]:
    """Names of metrics and recorded series in a query."""
    plain = re.sub(r'"[^"]*"', '""', query)
    return set(re.findall(r"\b(?:namespace_\w+:)?btx_[\w:]+", plain))


def family(name: str) -> Metric | None:
    """The metric that a series belongs to; a histogram has three."""
    metric = METRICS.get(re.sub(r"_(bucket|sum|count)$", "", name))
    if metric is not None and metric.type is MetricType.HISTOGRAM:
        return metric if metric.name != name else None
    return METRICS.get(name)


def test_every_name_in_a_query_is_a_metric() -> None:
    """Of btx_api.metrics, or recorded by a rule."""
    unknown = {
        (where, name)
        for where, query in queries()
        for name in used(query)
        if name not in RECORDS and family(name) is None
    }

    assert unknown == set()


def test_every_metric_is_used() -> None:
    """In a rule or on a dashboard: what nobody looks at is not exported."""
    seen = {name for _, query in queries() for name in used(query)}

    assert {metric.name for name in seen if (metric := family(name))} == METRICS.keys()
    shown = {name for where, query in queries() if where not in RECORDS for name in used(query)}
    assert RECORDS.keys() <= shown


def test_every_label_in_a_query_is_one_of_its_metric() -> None:
    """Selectors and `by` name labels that the metric has, or every target has."""
    wrong = []
    for where, query in queries():
        for name, selector in re.findall(r"\b(btx_\w+)\{([^}]*)\}", query):
            metric = family(name)
            assert metric is not None, name
            asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            if not asked <= {*metric.labels, *TARGET_LABELS, "le"}:
                wrong.append((where, name, asked))
        own = {label for name in used(query) if (m := family(name)) for label in m.labels}
        for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
            asked = {label.strip() for label in labels.split(",")}
            if not asked <= own | TARGET_LABELS | {"le"}:
                wrong.append((where, "by", asked))

    assert wrong == []


def test_label_values_are_those_of_the_engine() -> None:
    """A word in a selector is one that the label can have."""
    values = {
        "outcome": set(Outcome), "reason": set(Reason), "phase": {"training"},
        "state": {*STATES, *State},
    }  # fmt: skip
    for where, query in queries():
        for label, words in re.findall(
            r'\b(outcome|reason|phase|state)\s*(?:=~|!~|=)\s*"([^"]*)"', query
        ):
            assert set(words.split("|")) <= values[label], where


def test_the_pods_labels_become_the_trainers() -> None:
    """PodMonitor: run, stage and expert from the labels that the operator sets; one pod of many."""
    spec = one(render(EVERYTHING), "PodMonitor")["spec"]
    (endpoint,) = spec["podMetricsEndpoints"]
    labels = labels_of("r", "uid", "train-code")
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert {names.RUN_LABEL, names.STAGE_LABEL, names.EXPERT_LABEL} <= labels.keys()
    rules = {rule.get("targetLabel", rule.get("action")): rule for rule in endpoint["relabelings"]}
    prefix = "__meta_kubernetes_pod_label_"

    def meta(label: str) -> list[str]:
        return [prefix + re.sub(r"[^a-zA-Z0-9_]", "_", label)]

    assert rules["run"]["sourceLabels"] == meta(names.RUN_LABEL)
    assert rules["stage"]["sourceLabels"] == meta(names.STAGE_LABEL)
    assert rules["expert"]["sourceLabels"] == meta(names.EXPERT_LABEL)
    assert rules["keep"]["sourceLabels"] == meta("batch.kubernetes.io/job-completion-index")
    kept = [index for index in ("", "0", "1", "10") if re.fullmatch(rules["keep"]["regex"], index)]
    assert kept == ["", "0"]
    assert endpoint["metricRelabelings"] == [
        {"regex": "exported_(run|stage)", "action": "labeldrop"}
    ]


# Alerts.

FLAT = "x60"
"""An hour of samples that do not change."""
CLOCK = "0+60x60"
"""The time of each sample, one a minute."""
TRAINER_LABELS = 'namespace="n", run="r", stage="train-code", pod="p", instance="i"'
WHO = {"namespace": "n", "run": "r", "stage": "train-code"}
OPERATOR = 'instance="o", namespace="sys"'


@dataclass(frozen=True, kw_only=True)
class Case:
    """Series with which an alert fires, what to change in them so that it does not, and its words."""

    series: dict[str, str]
    healthy: dict[str, str]
    labels: dict[str, str]
    minute: int
    """When it fires; series have a sample a minute."""
    summary: str
    description: str


CASES: dict[str, Case] = {
    "BTXOperatorDown": Case(
        series={}, healthy={f"btx_operator_queue_depth{{{OPERATOR}}}": f"0{FLAT}"}, labels={},
        minute=6, summary="The BTX operator is not there",
        description="No operator has been scraped for 5 minutes. Attempts that run go on; "
        "nothing new starts.",
    ),
    "BTXOperatorWatchStale": Case(
        series={f'btx_operator_cache_listed_timestamp_seconds{{{OPERATOR}, kind="jobs"}}': f"60{FLAT}"},
        healthy={f'btx_operator_cache_listed_timestamp_seconds{{{OPERATOR}, kind="jobs"}}': CLOCK},
        labels={"instance": "o", "namespace": "sys", "kind": "jobs"}, minute=22,
        summary="The BTX operator has not listed jobs",
        description="Its last full list of jobs is 21m 0s old, so it may act on what is "
        "no longer the case.",
    ),
    "BTXQueueStuck": Case(
        series={f"btx_operator_queue_depth{{{OPERATOR}}}": f"3{FLAT}",
                f'btx_operator_reconciles_total{{{OPERATOR}, result="done"}}': f"7{FLAT}"},
        healthy={f'btx_operator_reconciles_total{{{OPERATOR}, result="done"}}': "7+1x60"},
        labels={"instance": "o", "namespace": "sys"}, minute=10,
        summary="The BTX operator's queue is stuck",
        description="3 runs wait for a worker, and none has been worked on for 300 s.",
    ),
    "BTXPreflightFailed": Case(
        series={'btx_run_refused{namespace="n", run="r", reason="ProblemsFound"}': f"1{FLAT}"},
        healthy={'btx_run_refused{namespace="n", run="r", reason="ProblemsFound"}': "1x3 stale",
                 'btx_run_refused{namespace="n", run="r", reason="WouldRetrain"}': f"1{FLAT}"},
        labels={"namespace": "n", "run": "r", "reason": "ProblemsFound"}, minute=6,
        summary="Run n/r is refused",
        description="ProblemsFound: `kubectl describe btx -n n r` names what to mend.",
    ),
    "BTXNoProgress": Case(
        series={f"btx_trainer_progress_timestamp_seconds{{{TRAINER_LABELS}}}": f"60{FLAT}"},
        healthy={f"btx_trainer_progress_timestamp_seconds{{{TRAINER_LABELS}}}": CLOCK},
        labels=WHO, minute=17, summary="Stage train-code of run n/r stands still",
        description="Its last progress is 16m 0s old.",
    ),
    "BTXCheckpointOld": Case(
        series={f"btx_trainer_checkpoint_timestamp_seconds{{{TRAINER_LABELS}}}": "60x80"},
        healthy={f"btx_trainer_checkpoint_timestamp_seconds{{{TRAINER_LABELS}}}": "0x80"},
        labels=WHO, minute=62, summary="Stage train-code of run n/r stores no checkpoints",
        description="Its last one is 1h 1m 0s old.",
    ),
    "BTXCheckpointMissing": Case(
        series={f"btx_trainer_checkpoint_timestamp_seconds{{{TRAINER_LABELS}}}": "0x80",
                f'btx_trainer_phase{{{TRAINER_LABELS}, kind="train", phase="training"}}': "1x80"},
        healthy={f'btx_trainer_phase{{{TRAINER_LABELS}, kind="train", phase="training"}}': "stale",
                 f'btx_trainer_phase{{{TRAINER_LABELS}, kind="mix", phase="writing"}}': "1x80"},
        labels=WHO, minute=61, summary="Stage train-code of run n/r has no checkpoint",
        description="It has been training for 3600 s without one.",
    ),
    "BTXDeadExpert": Case(
        series={f"btx_trainer_dead_experts{{{TRAINER_LABELS}}}": f"2{FLAT}"},
        healthy={f"btx_trainer_dead_experts{{{TRAINER_LABELS}}}": f"0{FLAT}"},
        labels=WHO, minute=11, summary="Run n/r has dead experts",
        description="In train-code next to no tokens reach 2 experts, counted by layer.",
    ),
    "BTXLossNotFinite": Case(
        series={'btx_attempts_total{kind="train", outcome="Diverged"}': "0x10 1x50"},
        healthy={'btx_attempts_total{kind="train", outcome="Diverged"}': f"0{FLAT}",
                 'btx_attempts_total{kind="train", outcome="Failed"}': "0x10 1x50"},
        labels={"kind": "train"}, minute=15,
        summary="The loss of a train stage became infinite or NaN",
        description="An attempt ended for it within the last hour; the events of the run say at "
        "which step.",
    ),
    "BTXRunFailed": Case(
        series={'btx_runs{state="Failed"}': "1x20 2x40"},
        healthy={'btx_runs{state="Failed"}': f"1{FLAT}"}, labels={}, minute=25,
        summary="A run failed",
        description="2 runs are Failed, more than 15 minutes ago; `kubectl get btx -A` shows them.",
    ),
}  # fmt: skip


def promtool_test(folder: Path, series: dict[str, str], **test: Any) -> None:
    """One unit test of the rules, with a sample of each series a minute."""
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups()}))
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    path = folder / "test.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "rule_files": ["rules.yaml"],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", "input_series": inputs, **test}],
            }
        )
    )
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    """Syntax, names and templates; every query of the dashboards parses too."""
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": groups()}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr

    plain = [
        {"record": f"q:{number}", "expr": query.replace("$__range", "1h")}
        for number, (where, query) in enumerate(queries())
        if not query.startswith("label_values(")
    ]
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": plain}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_and_an_entry_of_the_runbook() -> None:
    """Named in both, with severity, and a link that ends in the entry's anchor."""
    runbook = (ROOT / "docs/runbook.md").read_text()
    entries = re.findall(r"^## (BTX\w+)$", runbook, re.MULTILINE)

    assert CASES.keys() == ALERTS.keys()
    assert entries == list(ALERTS)
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires(alert: str, tmp_path: Path) -> None:
    """With its labels and its words."""
    case = CASES[alert]
    words = {"summary": case.summary, "description": case.description}
    link = {"runbook_url": f"docs/runbook.md#{alert.lower()}"}
    severity = {"severity": ALERTS[alert]["labels"]["severity"]}
    expected = {"exp_labels": case.labels | severity, "exp_annotations": words | link}
    asked = {"eval_time": f"{case.minute}m", "alertname": alert, "exp_alerts": [expected]}

    promtool_test(tmp_path, case.series, alert_rule_test=[asked])


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_is_silent_when_all_is_well(alert: str, tmp_path: Path) -> None:
    """At the minute at which it would fire, and later."""
    case = CASES[alert]
    asked = [
        {"eval_time": f"{minute}m", "alertname": alert, "exp_alerts": []}
        for minute in (case.minute, case.minute + 10)
    ]

    promtool_test(tmp_path, case.series | case.healthy, alert_rule_test=asked)


def test_recorded_series(tmp_path: Path) -> None:
    """Speed by run, MFU, ages and GPU-hours, from two pods of which one is on its way out."""
    other = TRAINER_LABELS.replace("train-code", "train-math")
    older = TRAINER_LABELS.replace('pod="p"', 'pod="old"')
    series = {
        f"btx_trainer_tokens_per_second{{{TRAINER_LABELS}}}": f"3000{FLAT}",
        f"btx_trainer_tokens_per_second{{{other}}}": f"1000{FLAT}",
        'btx_stage_flops_per_token{namespace="n", run="r", stage="train-code"}': f"98900000000{FLAT}",
        'btx_stage_flops_per_token{namespace="n", run="r", stage="train-math"}': f"98900000000{FLAT}",
        'btx_stage_gpus{namespace="n", run="r", stage="train-code"}': f"2{FLAT}",
        'btx_stage_gpus{namespace="n", run="r", stage="train-math"}': f"0{FLAT}",
        f"btx_trainer_progress_timestamp_seconds{{{TRAINER_LABELS}}}": CLOCK,
        f"btx_trainer_progress_timestamp_seconds{{{older}}}": f"0{FLAT}",
        f"btx_trainer_checkpoint_timestamp_seconds{{{TRAINER_LABELS}}}": f"300{FLAT}",
        f"btx_trainer_checkpoint_timestamp_seconds{{{other}}}": f"0{FLAT}",
        'btx_run_gpu_seconds{namespace="n", run="r"}': f"7200{FLAT}",
    }  # fmt: skip
    stage = '{namespace="n", run="r", stage="train-code"}'
    expected = {
        'namespace_run:btx_trainer_tokens_per_second:sum{namespace="n", run="r"}': 4000,
        f"namespace_run_stage:btx_mfu:ratio{stage}": 0.15,
        f"namespace_run_stage:btx_trainer_progress_age:seconds{stage}": 0,
        f"namespace_run_stage:btx_trainer_checkpoint_age:seconds{stage}": 300,
        'namespace_run:btx_run_gpu_hours:sum{namespace="n", run="r"}': 2,
    }
    asked = [
        {
            "expr": name.partition("{")[0],
            "eval_time": "10m",
            "exp_samples": [{"labels": name, "value": value}],
        }
        for name, value in expected.items()
    ]
    assert {name.partition("{")[0] for name in expected} == RECORDS.keys()

    promtool_test(tmp_path, series, promql_expr_test=asked)


# Dashboards.


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_a_dashboard_is_complete(name: str) -> None:
    """Panels do not overlap, each says what it shows, variables are used and exist."""
    dashboard = dashboards()[name]
    ids = [panel["id"] for panel in dashboard["panels"]]
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    text = " ".join(t["expr"] for panel in panels(dashboard) for t in panel["targets"])
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}

    assert len(set(ids)) == len(ids)
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    assert set(re.findall(r"\$(\w+)", text)) - {"__range"} == variables - {"datasource"}
    for panel in panels(dashboard):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            by = re.search(r"by \(([^)]*)\)", target["expr"])
            labels = {label.strip() for label in by[1].split(",")} if by else TARGET_LABELS
            assert shown <= labels, panel["title"]


def test_what_the_dashboards_show() -> None:
    """The numbers that were asked for, each on a panel of its own."""
    titles = {name: {panel["title"] for panel in panels(d)} for name, d in dashboards().items()}

    assert titles["btx-run.json"] >= {
        "Loss by stage", "Tokens per second", "MFU", "Routing load by expert",
        "Age of the last checkpoint", "GPU-hours",
    }  # fmt: skip
    assert titles["btx-fleet.json"] >= {"Runs by state", "GPUs in use", "Queue"}
