"""values.yaml -> the table of the chart's README: `make generate` runs it."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HEAD = """\
# Chart btx-operator

<!-- Written by charts/write_readme.py from values.yaml; never edit. -->

Installs the BTX operator: the CRD, one operator, its rights, and what Prometheus and Grafana need.

```bash
helm install btx charts/btx-operator --namespace btx-system --create-namespace
helm test btx --namespace btx-system
```

It needs Kubernetes 1.31 and Helm 3.17 or later. [docs/install.md](../../docs/install.md) explains
namespaces, rights, service accounts, upgrades and removal, [docs/runbook.md](../../docs/runbook.md)
every alert. A value that is wrong or unknown is refused by name (values.schema.json).

| value | default | meaning |
|---|---|---|
"""


def comments(text: str) -> dict[str, str]:
    """Comment above each key, by dotted path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        if comment := re.match(r" *# ?(.*)", line):
            above.append(comment[1])
            continue
        if key := re.match(r"( *)([A-Za-z]\w*):", line):
            path = [step for step in path if step[0] < len(key[1])] + [(len(key[1]), key[2])]
            if above:
                found[".".join(name for _, name in path)] = " ".join(above)
        above = []
    return found


def leaves(values: dict[str, Any], words: dict[str, str], path: str = "") -> Iterator[str]:
    """Dotted paths that a user sets: what has no documented key below it."""
    for key, value in values.items():
        below = f"{path}{key}"
        if isinstance(value, dict) and any(other.startswith(f"{below}.") for other in words):
            yield from leaves(value, words, f"{below}.")
        else:
            yield below


def at(values: Any, path: str) -> Any:
    """Value of a dotted path."""
    for key in path.split("."):
        values = values[key]
    return values


def readme(text: str) -> str:
    """The whole README."""
    words, values = comments(text), yaml.safe_load(text)
    rows = []
    for path in leaves(values, words):
        default = json.dumps(at(values, path)).replace("|", r"\|")
        rows.append(f"| `{path}` | `{default}` | {words.get(path, '')} |\n")
    return HEAD + "".join(rows)


def main(chart: str) -> None:
    """Writes README.md into the chart's folder."""
    folder = Path(chart)
    (folder / "README.md").write_text(readme((folder / "values.yaml").read_text()))


if __name__ == "__main__":
    main(sys.argv[1])
