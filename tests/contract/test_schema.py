"""The generated CRD: current, structural as far as can be judged without an API server, small."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from btx_api import names, schema
from btx_api.spec import BTXRunSpec
from builders import a_spec

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "crds" / f"{names.PLURAL}.{names.GROUP}.yaml"


def nodes(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below one, with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in node:
        yield from nodes(node["items"], f"{path}[]")
    if isinstance(node.get("additionalProperties"), dict):
        yield from nodes(node["additionalProperties"], f"{path}{{}}")


def spec_schema() -> dict[str, Any]:
    """Of `.spec`, as it is on disk."""
    crd = yaml.safe_load(FILE.read_text())
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    found: dict[str, Any] = root["properties"]["spec"]
    return found


def test_the_generated_file_is_current(tmp_path: Path) -> None:
    """`make generate` would change nothing."""
    schema.main(str(tmp_path))

    assert (tmp_path / FILE.name).read_text() == FILE.read_text()


def test_it_is_structural_and_fits_an_annotation() -> None:
    """One type per node, no references or unions; below 256 KiB."""
    crd = yaml.safe_load(FILE.read_text())
    root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for path, node in nodes(root):
        assert not {"$ref", "anyOf", "allOf", "oneOf", "const", "title", "$defs"} & set(node), path
        assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
        assert "exclusiveMinimum" not in node, path

    assert FILE.stat().st_size < 256 * 1024


def test_defaults_in_crd_and_models_are_equal() -> None:
    """What the API server fills in is what the models would."""
    filled = fill(a_spec(), spec_schema())

    assert BTXRunSpec.parse(filled) == BTXRunSpec.parse(a_spec())


def test_an_experts_overlay_has_no_server_side_default() -> None:
    """A default there would override the run's block with what nobody asked for."""
    expert = spec_schema()["properties"]["experts"]["items"]["properties"]
    for block in ("train", "execution"):
        assert [path for path, node in nodes(expert[block]) if "default" in node] == []


def fill(value: Any, node: dict[str, Any]) -> Any:
    """Defaulting as an API server does it: recursively, where a field is absent."""
    if isinstance(value, dict) and "properties" in node:
        out = dict(value)
        for name, child in node["properties"].items():
            if name not in out and "default" in child:
                out[name] = child["default"]
            if name in out:
                out[name] = fill(out[name], child)
        return out
    if isinstance(value, list) and "items" in node:
        return [fill(item, node["items"]) for item in value]
    return value
