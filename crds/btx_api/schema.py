"""Models -> CRD: `python -m btx_api.schema FOLDER` writes btxruns.btx.dev.yaml.

pydantic's JSON schema is not structural: references are inlined, `anyOf` with null collapses, and
what the API server refuses (title, additionalProperties: false, const, exclusive bounds) goes.
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic.json_schema import JsonSchemaMode

from btx_api import names, rules
from btx_api.spec import COUNT_LENGTH, COUNT_PATTERN, NAME_PATTERN, BTXRunSpec, Expert, Model
from btx_api.status import PREFLIGHT, Status

Schema = dict[str, Any]
_KEPT = (
    "type", "description", "default", "enum", "format", "pattern", "minimum", "maximum",
    "minLength", "maxLength", "minItems", "maxItems", "maxProperties", "required",
)  # fmt: skip
_BOUNDS = {"ge": "minimum", "le": "maximum"}
"""pydantic's own words, where a validator runs before a bound."""
_SEEN = {
    "$defs", "$ref", "anyOf", "const", "count", "title", "properties", "items",
    "additionalProperties", "propertyNames",
}  # fmt: skip
"""Handled here, or left out on purpose."""
COLUMNS = {
    "State": ".status.state", "Stage": ".status.stage", "Experts": ".status.experts",
    "Progress": ".status.progress", "ETA": ".status.eta",
}  # fmt: skip
"""Of `kubectl get btx`, before the age."""
_OVERLAYS = {
    name: field for name, field in Expert.model_fields.items() if name in ("train", "execution")
}
_KEYS = {
    "Expert": "name",
    "EvaluationDomain": "name",
    "EvaluationTask": "name",
    "Condition": "type",
}


def structural(model: type[Model], *, written: bool = False) -> Schema:
    """OpenAPI v3 structural schema of a model: what is read from it, defaults filled in; or, if
    `written`, what is written from it, as it is."""
    mode: JsonSchemaMode = "serialization" if written else "validation"
    whole = model.model_json_schema(by_alias=True, mode=mode)
    return _convert(whole, whole.get("$defs", {}), not written)


def _convert(node: Schema, defs: Schema, defaults: bool) -> Schema:
    if "$ref" in node:
        target = defs[node["$ref"].rsplit("/", 1)[1]]
        # A field's own words and default win over those of its type.
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    if "anyOf" in node:
        some = [option for option in node["anyOf"] if option.get("type") != "null"]
        assert len(some) == 1, f"only optional values may be unions: {node}"
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "default")}
        return _convert({**some[0], **rest}, defs, defaults)
    node = {_BOUNDS.get(key, key): value for key, value in node.items()}
    assert not (lost := set(node) - {*_KEPT, *_SEEN}), f"would be lost: {lost}"
    if node.get("count"):
        return _count(node, defaults)
    out = {key: node[key] for key in _KEPT if key in node and (defaults or key != "default")}
    if "const" in node:
        out["enum"] = [node["const"]]
    if out.get("default") is None:
        out.pop("default", None)
    else:
        out["default"] = _without_nulls(out["default"])
    if "properties" in node:
        out["properties"] = {
            name: _convert(child, defs, defaults and name not in _overlays_of(node))
            for name, child in node["properties"].items()
        }
    elif node.get("type") == "object":
        values = node.get("additionalProperties")
        if isinstance(values, dict) and values:
            out["additionalProperties"] = _convert(values, defs, defaults)
        else:
            out["x-kubernetes-preserve-unknown-fields"] = True
    if node.get("type") == "array":
        # A fixed-length tuple has no structural form; our bounds say the rest.
        out["items"] = _convert(node["items"], defs, defaults)
        # An optional field is left out; an item cannot be.
        if {"type": "null"} in node["items"].get("anyOf", ()):
            out["items"]["nullable"] = True
        out |= _list_type(node["items"])
    return out


def _list_type(items: Schema) -> Schema:
    # A list of named things: two of one name are refused, and appliers merge by name.
    key = _KEYS.get(items.get("$ref", "").rsplit("/", 1)[-1])
    if key is None:
        return {"x-kubernetes-list-type": "atomic"}
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def _without_nulls(value: Any) -> Any:
    # A field that is not nullable must not default to null, however deep: it would be refused.
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _overlays_of(node: Schema) -> set[str]:
    return set(_OVERLAYS) if node.get("title") == Expert.__name__ else set()


def _count(node: Schema, defaults: bool) -> Schema:
    kept = ("description", "minimum", "maximum", *(["default"] if defaults else []))
    return {
        "x-kubernetes-int-or-string": True,
        "pattern": COUNT_PATTERN,
        "maxLength": COUNT_LENGTH,
        **{key: node[key] for key in kept if node.get(key) is not None},
    }


def node(root: Schema, path: str) -> Schema:
    """The schema at a path such as `spec.experts[].data`; KeyError if there is none."""
    for name in path.replace("[]", ".[]").split(".") if path else ():
        root = root["items"] if name == "[]" else root["properties"][name]
    return root


def _whole_object() -> Schema:
    name = {
        # Of a Service too, which wants a letter first.
        "type": "string", "pattern": NAME_PATTERN, "maxLength": names.run_name_length(PREFLIGHT),
    }  # fmt: skip
    root: Schema = {
        "type": "object",
        "description": (BTXRunSpec.__doc__ or "").strip(),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object", "properties": {"name": name}},
            "spec": structural(BTXRunSpec),
            "status": structural(Status, written=True),
        },
    }
    # Blocks that nobody wrote were a fifth of what is stored, and so of each status write's work
    # (docs/decisions/0025). Within one that the user wrote every default is filled in.
    execution = node(root, "spec.execution")
    execution["default"] = {}
    for block in execution["properties"].values():
        block.pop("default", None)
    for rule in rules.rules():
        node(root, rule.at).setdefault("x-kubernetes-validations", []).append(rule.plain())
    return root


def crd() -> Schema:
    """The CustomResourceDefinition of BTXRun."""
    version = {
        "name": names.VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            *({"name": name, "type": "string", "jsonPath": path} for name, path in COLUMNS.items()),
            {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
        ],
        "schema": {"openAPIV3Schema": _whole_object()},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{names.PLURAL}.{names.GROUP}"},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": names.KIND,
                "plural": names.PLURAL,
                "singular": names.KIND.lower(),
                "shortNames": ["btx"],
                "categories": ["btx"],
            },
            "versions": [version],
        },
    }


def main(folder: str) -> None:
    """Writes the CRD into a folder."""
    text = yaml.safe_dump(crd(), sort_keys=False, width=100, allow_unicode=True)
    path = Path(folder) / f"{names.PLURAL}.{names.GROUP}.yaml"
    path.write_text("# Generated from btx_api by `make generate`; never edit.\n" + text)


if __name__ == "__main__":
    main(sys.argv[1])
