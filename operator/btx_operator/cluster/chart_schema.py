"""Settings -> chart: `python -m btx_operator.cluster.chart_schema CHART CRDS` (`make generate`).

Writes the `settings` part of CHART/values.schema.json and the copy of the CRD that a chart needs,
as Helm reads no file outside of it.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from btx_operator.cluster.settings import Settings

FROM_OTHER_VALUES = frozenset(
    {"namespaces", "trainerImage", "imagePullPolicy", "imagePullSecrets", "serviceAccounts"}
)
"""Settings that the chart makes of values which it needs for more than the operator."""
_KEPT = ("type", "description", "enum", "pattern", "minLength", "maxLength")
# As pydantic writes the bounds of a number that another validator reads first.
_BOUNDS = {"ge": "minimum", "le": "maximum", "minimum": "minimum", "maximum": "maximum"}


def settings_schema() -> dict[str, Any]:
    """JSON schema of values.settings: every setting that is not made of other values."""
    properties = Settings.model_json_schema(by_alias=True)["properties"]
    return {
        "type": "object",
        "description": "Settings of the operator.",
        "additionalProperties": False,
        "properties": {
            name: _field(field)
            for name, field in properties.items()
            if name not in FROM_OTHER_VALUES
        },
    }


def _field(field: dict[str, Any]) -> dict[str, Any]:
    kept = {key: field[key] for key in _KEPT if key in field}
    return kept | {ours: field[key] for key, ours in _BOUNDS.items() if key in field}


def main(chart: str, crds: str) -> None:
    """Writes into the chart's folder; `crds` is the folder of generated CRDs."""
    path = Path(chart) / "values.schema.json"
    schema = json.loads(path.read_text())
    schema["properties"]["settings"] = settings_schema()
    path.write_text(json.dumps(schema, indent=2) + "\n")
    for crd in sorted(Path(crds).glob("*.yaml")):
        shutil.copyfile(crd, Path(chart) / "files" / crd.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
