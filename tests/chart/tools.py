"""Helm and promtool as the chart's tests use them."""

import functools
import importlib.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from cluster import binaries

ROOT = Path(__file__).parent.parent.parent
CHART = ROOT / "charts/btx-operator"
_spec = importlib.util.spec_from_file_location("write_readme", ROOT / "charts/write_readme.py")
assert _spec and _spec.loader
write_readme = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_readme)
COMMENTS = write_readme.comments((CHART / "values.yaml").read_text())
"""Of each key of values.yaml, by dotted path."""
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
EVERYTHING = {
    "metrics": {
        name: {"enabled": True} for name in ("serviceMonitor", "podMonitor", "rules", "dashboards")
    },
    "networkPolicy": {"enabled": True},
    "trainer": {
        "serviceAccounts": [
            {
                "name": "trainer", "create": True, "annotations": {"role": "a"},
                "rules": [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}],
            },
            {"name": "default", "create": False},
        ]
    },
}  # fmt: skip
"""Values with which every template renders something."""


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One command, whatever it ends with."""
    return subprocess.run(
        [binaries.helm(), *arguments], check=False, capture_output=True, text=True
    )


def template(values: Mapping[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`helm template`: release `r` in namespace `sys`."""
    # Values as JSON: `--set` would guess at types.
    given = [f"--set-json={key}={json.dumps(value)}" for key, value in values.items()]
    return helm("template", "r", CHART, "--namespace=sys", *given, *arguments)


def render(values: Mapping[str, Any] | None = None, *arguments: str) -> list[dict[str, Any]]:
    """The objects of the release, not to be changed."""
    return _render(json.dumps(values or {}), *arguments)


@functools.cache
def _render(values: str, *arguments: str) -> list[dict[str, Any]]:
    done = template(json.loads(values), *arguments)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.load_all(done.stdout, yaml.CSafeLoader) if item]


def one(objects: Sequence[dict[str, Any]], kind: str, name: str = "") -> dict[str, Any]:
    """The object of a kind, the only one unless its name is given."""
    found = [
        item
        for item in objects
        if item["kind"] == kind and (not name or item["metadata"]["name"] == name)
    ]
    assert len(found) == 1, f"{len(found)} objects {kind} {name}"
    return found[0]


def settings(objects: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the operator is given in BTX_SETTINGS."""
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    (variable,) = pod["containers"][0]["env"]
    assert variable["name"] == "BTX_SETTINGS"
    return dict(json.loads(variable["value"]))


def dashboards() -> dict[str, dict[str, Any]]:
    """By file name, as Grafana reads them."""
    maps = [o for o in render(EVERYTHING) if o["kind"] == "ConfigMap"]
    return {name: json.loads(text) for item in maps for name, text in item["data"].items()}


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Without the rows' titles."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """One command, whatever it ends with."""
    return subprocess.run(
        [binaries.prometheus() / "promtool", *arguments],
        check=False,
        capture_output=True,
        text=True,
    )


def leaves(values: Mapping[str, Any], path: str = "") -> list[str]:
    """Dotted paths that a user sets: what has no documented key below it."""
    return list(write_readme.leaves(dict(values), COMMENTS, path))


def sections(values: Mapping[str, Any]) -> list[str]:
    """Dotted paths of the mappings above the leaves."""
    paths = (
        path.split(".")[:end] for path in leaves(values) for end in range(1, path.count(".") + 1)
    )
    return sorted({".".join(path) for path in paths})


def at_keys(value: Any, path: str) -> Any:
    """What is at a dotted path, numbers being indexes; None if there is nothing."""
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError):
            return None
    return value
