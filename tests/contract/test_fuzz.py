"""10,000 manifests made from the CRD and broken: refused with a line that names a field, or valid.

Each is drawn from one number, so that a run is the same everywhere and a failure is one number.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from btx_api.methods import graph
from btx_api.spec import BTXRunSpec, explain
from btx_operator.cli import main
from btx_operator.errors import ManifestError
from btx_operator.manifest import parse
from builders import a_spec, resolved_for
from fuzzed_specs import JUNK, SCHEMA, Draw, a_document
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

NUMBERS = st.integers(0, 2**64 - 1)

fuzzed: Callable[[int], Any] = lambda count: settings(  # noqa: E731 - a decorator by its number
    max_examples=count, derandomize=True, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate],
)  # fmt: skip


FIELD = re.compile(r"spec(\.('[^\n]*'|\"[^\n]*\"|[\w/-]+)|\[\d+\])*: \S")
PLACE = re.compile(r"line \d+, column \d+: \S")
OUTSIDE = re.compile(r"(apiVersion|kind|metadata|metadata\.name|[^\n]{1,70}: unknown field)(: |$)")
WHOLE = "the document is not a BTXRun (a mapping with apiVersion and kind)"


def assert_names_a_field(line: str, *, yaml_too: bool = False) -> None:
    """One line, not endless, printable, that begins with the path of a field (or a place)."""
    assert len(line) <= 1500, len(line)
    assert "\n" not in line and line.isprintable(), repr(line)
    outside = yaml_too and (PLACE.match(line) or OUTSIDE.match(line) or line == WHOLE)
    assert FIELD.match(line) or outside, repr(line)


def fits(value: Any, node: dict[str, Any], path: str = "spec") -> list[str]:
    """What an API server would find wrong: types, enums, bounds, patterns, unknown fields."""
    if node.get("x-kubernetes-int-or-string"):
        return [] if isinstance(value, int | str) else [f"{path}: {value!r}"]
    kinds: dict[str, Any] = {
        "object": dict, "array": list, "string": str, "boolean": bool, "integer": int,
        "number": (int, float),
    }  # fmt: skip
    wrong = not isinstance(value, kinds[node["type"]])
    if wrong or (isinstance(value, bool) and node["type"] != "boolean"):
        return [f"{path}: {value!r} is no {node['type']}"]
    found = []
    size = len(value) if isinstance(value, str | list) else value
    lower = node.get("minLength", node.get("minItems", node.get("minimum", -math.inf)))
    upper = node.get("maxLength", node.get("maxItems", node.get("maximum", math.inf)))
    if not isinstance(value, dict | bool) and not lower <= size <= upper:
        found.append(f"{path}: {size} is not within {lower} and {upper}")
    if value not in node.get("enum", [value]):
        found.append(f"{path}: {value!r} is none of {node['enum']}")
    if "pattern" in node and not re.search(node["pattern"], value):
        found.append(f"{path}: {value!r} is not {node['pattern']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += fits(item, node["items"], f"{path}[{i}]")
    if isinstance(value, dict):
        found += [
            f"{path}.{name}: is required" for name in node.get("required", ()) if name not in value
        ]
        known = node.get("properties", {})
        free = node.get("x-kubernetes-preserve-unknown-fields")
        for name, item in value.items():
            child = known.get(name, node.get("additionalProperties"))
            if child is None and not free:
                found.append(f"{path}.{name}: unknown")
            elif child is not None:
                found += fits(item, child, f"{path}.{name}")
    return found


def assert_valid(spec: BTXRunSpec) -> None:
    """It has a graph with stable digests, survives its own JSON, and an API server would take it."""
    plain = json.loads(json.dumps(spec.plain(), allow_nan=False))
    assert BTXRunSpec.parse(plain) == spec
    nodes, resolved = graph(spec, resolved_for(spec)), resolved_for(spec)
    again = graph(BTXRunSpec.parse(plain), resolved)
    assert [n.stage.digest for n in nodes.values()] == [n.stage.digest for n in again.values()]
    assert list(nodes)[-1] == "evaluate"
    assert fits(plain, SCHEMA) == []


def test_specs_are_refused_by_field_or_valid() -> None:
    """7,000 as an API server would hand them over."""
    counts: Counter[str] = Counter()

    @fuzzed(7000)
    @given(NUMBERS)
    def check(number: int) -> None:
        try:
            spec = BTXRunSpec.parse(a_document(Draw(number)))
        except ValidationError as error:
            counts["refused"] += 1
            lines = explain(error)
            assert lines
            for line in lines:
                assert_names_a_field(line)
        else:
            counts["accepted"] += 1
            assert_valid(spec)

    check()
    assert counts.total() == 7000
    assert min(counts["refused"], counts["accepted"]) > 0.05 * 7000, counts


HEADER = {"apiVersion": "btx.dev/v1alpha1", "kind": "BTXRun", "metadata": {"name": "fuzz"}}
BITS = (
    ":", "- ", "&a ", "*a", "<<: ", "!!int ", "!!python/name:os.system ", "? ", "| ", "> ", "{", "}", "[",
    "]", "\"", "'", "#", "%", "---\n", "...\n", "\t", "\n", "  ", "\\x", "\x00", "\u2028", "é", "0o17", "0x1F",
    "1_000", ".nan", "-.inf", "1e999", "9" * 5000, "~", "null", "yes", "2024-01-01", "[" * 3000,
    "a: &a [*a]\n", "a: *b\n", "\ufeff", "@", "`", "name: x\nname: y\n",
)  # fmt: skip


def a_text(draw: Draw) -> str:
    """A manifest as text, broken in a few places; or a document of another kind."""
    document = {**deepcopy(HEADER), "spec": a_document(draw) if draw.random() < 0.5 else a_spec()}
    if draw.random() < 0.2:
        document[draw.choice(("kind", "metadata", "spec", "status", "x\ny"))] = draw.choice(JUNK)
    if draw.random() < 0.2:
        document["metadata"] = {"name": draw.choice(JUNK)}
    text = json.dumps(document)
    if draw.random() < 0.5 and text.isascii() and "\\u" not in text:
        text = yaml.dump(document, Dumper=yaml.CSafeDumper, sort_keys=False)
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        start = draw.randrange(len(text) + 1)
        cut = draw.choice((0, 0, 1, 5, 50))
        text = text[:start] + draw.choice(BITS) * draw.choice((0, 1, 1)) + text[start + cut :]
    return text


def test_texts_are_refused_by_field_or_place_or_valid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """3,000 as a user would type them; one in ten goes through the command as well."""
    counts: Counter[str] = Counter()
    path = tmp_path / "run.yaml"

    @fuzzed(3000)
    @given(NUMBERS)
    def check(number: int) -> None:
        text = a_text(Draw(number))
        try:
            run = parse(text)
        except ManifestError as error:
            counts["refused"] += 1
            assert error.problems
            for line in error.problems:
                assert_names_a_field(line, yaml_too=True)
            if number % 10 == 0:
                path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
                assert main(["plan", str(path)]) == 2
                out, err = capsys.readouterr()
                assert out == "" and err.startswith(f"btx: {path}: ")
                assert "Traceback" not in err
        else:
            counts["accepted"] += 1
            assert_valid(run.spec)

    check()
    assert counts.total() == 3000
    assert min(counts["refused"], counts["accepted"]) > 0.05 * 3000, counts
