"""Specs that a user might have meant, broken in a few places; each is drawn from one number.

Made from the CRD's schema, so that a new field is fuzzed without a word here.
"""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from builders import a_spec

CRD = Path(__file__).parents[1] / "crds" / "btxruns.btx.dev.yaml"
SCHEMA: dict[str, Any] = yaml.load(CRD.read_text(), Loader=yaml.CSafeLoader)["spec"]["versions"][0][
    "schema"
]["openAPIV3Schema"]["properties"]["spec"]
Draw = random.Random


def deep(levels: int) -> Any:
    """Lists in lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


JUNK: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2.0, 0.1, 10**18, 10**19, 2**63, 10**400, -(10**30), 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "null", "1", "1K", "1.5K", "1.5", "1e6", "210B",
    "-5", "5\n", "code", "general", "code\n", "x" * 5000, "é", "名前", "\x00", "\ud800", "a\nb", "file://",
    "file://x", "s3://b/k", "hf://a/b@c", "http://x", "../..", [], {}, [[]], [None], {"a": None},
    {"": 1}, {"x": {"y": []}}, {"\n": "\n"}, {"\ud800": "\udfff"}, {"a": float("nan")}, ["a"] * 70,
    [{"uri": "file://x"}], [{"name": "code"}], deep(40), "TopK", "Dense", "BTX", "bf16",
)  # fmt: skip
STRINGS = {
    "uri": ("file://x", "s3://bucket/a", "hf://a/b@c", "file://d/**/*.jsonl"),
    "name": ("code", "math", "general", "a", "a-1", "z" * 20),
    "tokenizer": ("seed", "bytes", "file://t.json"),
    "endpoint": ("http://localhost:9000", "https://x"),
    "model": ("file://ready",),
}
COUNTS = (0, 1, 8, 128, 4096, "4096", "8K", "1M", "1.5K", "210B")


def valid(node: dict[str, Any], draw: Draw, name: str = "") -> Any:  # noqa: PLR0911 - one per type
    """A value that the schema of a field allows, as far as the schema says it."""
    if node.get("x-kubernetes-int-or-string"):
        return draw.choice(COUNTS)
    if "enum" in node:
        return draw.choice(node["enum"])
    match node["type"]:
        case "boolean":
            return draw.random() < 0.5
        case "integer" | "number":
            least, most = node.get("minimum", 0), node.get("maximum", 10**6)
            choices = [least, most, node.get("default", least), least + 1, (least + most) / 2]
            value = draw.choice([v for v in choices if least <= v <= most])
            return int(value) if node["type"] == "integer" else float(value)
        case "string":
            return draw.choice(STRINGS.get(name, ("x", "text", "code")))
        case "array":
            count = draw.randint(node.get("minItems", 0), min(3, node.get("maxItems", 3)))
            return [valid(node["items"], draw, name) for _ in range(count)]
    if "properties" not in node:
        names = draw.sample(("code", "math", "general"), 2)
        values = node.get("additionalProperties")
        return {n: valid(values, draw) if isinstance(values, dict) else n for n in names}
    wanted = set(node.get("required", ()))
    return {
        key: valid(child, draw, key)
        for key, child in node["properties"].items()
        if key in wanted or draw.random() < 0.15
    }


def places(node: dict[str, Any], value: Any) -> list[tuple[Any, Any, dict[str, Any]]]:
    """(container, key, schema) of every field that a document has or could have."""
    found: list[tuple[Any, Any, dict[str, Any]]] = []
    if isinstance(value, dict):
        for key, child in node.get("properties", {}).items():
            found.append((value, key, child))
            if key in value:
                found += places(child, value[key])
    if isinstance(value, list) and "items" in node:
        for i, item in enumerate(value):
            found += [(value, i, node["items"]), *places(node["items"], item)]
    return found


def mutate(document: Any, draw: Draw) -> None:
    """One change: a value that may stand there, junk, nothing, twice, or an unknown field."""
    container, key, node = draw.choice(places(SCHEMA, document))
    match draw.choice(("valid", "valid", "valid", "valid", "junk", "remove", "repeat", "unknown")):
        case "valid":
            container[key] = valid(node, draw, key if isinstance(key, str) else "")
        case "junk":
            container[key] = deepcopy(draw.choice(JUNK))
        case "remove" if isinstance(container, list) or key in container:
            del container[key]
        case "repeat" if isinstance(container, list):
            container.extend(deepcopy(container[key]) for _ in range(draw.choice((1, 1, 64, 200))))
        case "unknown" if isinstance(container, dict):
            name = draw.choice(
                ("extra", "batch_tokens", "a\nb", "名", "", "x" * 300, "\ud800", "1")
            )
            container[name] = draw.choice((1, {}, []))
        case _:
            container[key] = valid(node, draw, key if isinstance(key, str) else "")


def a_document(draw: Draw) -> Any:
    """A spec that a user might have meant, changed in one to four places."""
    document = deepcopy(a_spec())
    document["train"] = {"sequenceLength": 128, "batchTokens": 4096}
    document["finetune"] = {**document["train"], "data": [{"tokens": 9, "domains": {"code": 1}}]}
    if draw.random() < 0.3:
        document["method"] = "Dense"
        document["finetune"] = {"data": document["finetune"]["data"]}
    for _ in range(draw.choice((1, 1, 2, 4))):
        mutate(document, draw)
    return document
