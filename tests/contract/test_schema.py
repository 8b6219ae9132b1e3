"""The generated CRD: current, structural as far as can be judged without an API server, small."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from annotated_types import Ge, Le, MaxLen
from btx_api import names, schema
from btx_api.methods import graph
from btx_api.rules import equal_to, rules
from btx_api.spec import (
    COUNT_LENGTH,
    COUNT_PATTERN,
    BTXRunSpec,
    Model,
    Optimizer,
    Routing,
    Scheduling,
    Train,
    parse_count,
)
from btx_api.status import PREFLIGHT, State, Status
from btx_operator.errors import ManifestError
from btx_operator.manifest import parse
from builders import a_spec, resolved_for
from full_status import full_status
from fuzzed_specs import Draw, a_document
from pydantic import Field, ValidationError

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


def whole_schema() -> dict[str, Any]:
    """Of a BTXRun, as it is on disk."""
    crd = yaml.safe_load(FILE.read_text())
    found: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return found


def spec_schema() -> dict[str, Any]:
    """Of `.spec`."""
    found: dict[str, Any] = whole_schema()["properties"]["spec"]
    return found


def test_the_generated_file_is_current(tmp_path: Path) -> None:
    """`make generate` would change nothing."""
    schema.main(str(tmp_path))

    assert (tmp_path / FILE.name).read_text() == FILE.read_text()


def test_it_is_structural_and_fits_an_annotation() -> None:
    """One type per node, no references or unions; below 256 KiB."""
    for path, node in nodes(whole_schema()):
        assert not {"$ref", "anyOf", "allOf", "oneOf", "const", "title", "$defs"} & set(node), path
        assert ("type" in node) != ("x-kubernetes-int-or-string" in node), path
        assert "exclusiveMinimum" not in node, path

    assert FILE.stat().st_size < 256 * 1024


def test_defaults_in_crd_and_models_are_equal() -> None:
    """What the API server fills in is what the models would."""
    filled = fill(a_spec(), spec_schema())

    assert BTXRunSpec.parse(filled) == BTXRunSpec.parse(a_spec())


def test_a_run_is_not_filled_with_blocks_of_scheduling() -> None:
    """They would be a fifth of what is stored; one that the user wrote is whole."""
    assert fill(a_spec(), spec_schema())["execution"] == {}
    filled = fill({**a_spec(), "execution": {"train": {"gpus": 8}}}, spec_schema())
    assert set(filled["execution"]) == {"train"}
    whole = Scheduling(gpus=8).model_dump(mode="json", by_alias=True, exclude_none=True)
    assert filled["execution"]["train"] == whole


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


def test_a_bound_of_a_model_is_a_bound_of_the_schema() -> None:
    """Also where a validator runs before it; so is the length of a list."""
    words = {Ge: ("ge", "minimum"), Le: ("le", "maximum"), MaxLen: ("max_length", "maxLength")}
    checked = 0
    for model, node in with_nodes(BTXRunSpec, spec_schema()):
        for name, field in model.model_fields.items():
            child = node["properties"][field.alias or name]
            for bound in field.metadata:
                if type(bound) not in words:
                    continue
                word, key = words[type(bound)]
                key = "maxItems" if "items" in child else key
                key = "maxProperties" if "additionalProperties" in child else key
                assert child[key] == getattr(bound, word), (model, name)
                checked += 1
    assert checked > 100


def with_nodes(model: type[Model], node: dict[str, Any]) -> Iterator[tuple[type[Model], Any]]:
    """Every model below one, with its schema."""
    yield model, node
    for name, field in model.model_fields.items():
        child = node["properties"][field.alias or name]
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Model):
                yield from with_nodes(part, child.get("items", child))


def test_a_word_that_the_converter_does_not_know_is_not_lost() -> None:
    """It stops; so does a union of two types."""

    class Odd(Model):
        """A number that no CRD can say."""

        x: Annotated[float, Field(multiple_of=2)]
        """Even."""

    class Torn(Model):
        """Two types."""

        x: int | str
        """Either."""

    with pytest.raises(AssertionError, match=r"would be lost: .'multipleOf'"):
        schema.structural(Odd)
    with pytest.raises(AssertionError, match="only optional values may be unions"):
        schema.structural(Torn)


def test_lists_say_how_they_are_merged() -> None:
    """By name where two of one name make no sense; whole elsewhere."""
    kinds = {path: node for path, node in nodes(whole_schema()) if "items" in node}
    by_name = {
        path: node["x-kubernetes-list-map-keys"]
        for path, node in kinds.items()
        if node["x-kubernetes-list-type"] == "map"
    }

    assert by_name == {
        ".spec.experts": ["name"], ".spec.evaluate.domains": ["name"],
        ".spec.evaluate.tasks": ["name"], ".status.conditions": ["type"],
    }  # fmt: skip
    others = [node["x-kubernetes-list-type"] for path, node in kinds.items() if path not in by_name]
    assert set(others) == {"atomic"}
    assert kinds[".status.resolved.gains"]["items"] == {"type": "number", "nullable": True}


def test_the_schema_of_status_is_of_what_is_written() -> None:
    """Times are texts, and nothing is filled in."""
    for path, node in nodes(whole_schema()["properties"]["status"]):
        assert "default" not in node, path
        if path.endswith(("Time", "Since")):
            assert node["type"] == "string", path


def test_the_columns_are_fields_of_status() -> None:
    """Short ones."""
    for path in schema.COLUMNS.values():
        field = schema.node(whole_schema(), path.removeprefix("."))
        assert field["type"] == "string"
        assert field["maxLength"] <= 48


def test_every_rule_stands_at_its_place_and_names_a_field() -> None:
    """Nothing but these rules is in the file."""
    root = whole_schema()
    found = [rule for _, node in nodes(root) for rule in node.get("x-kubernetes-validations", ())]

    assert len(found) == len(list(rules())) > 40
    for rule in rules():
        node = schema.node(root, rule.at)
        assert rule.plain() in node["x-kubernetes-validations"]
        schema.node(node, rule.field)


def test_a_block_is_compared_field_by_field() -> None:
    """Each kind of value in CEL's words; a count also as a text."""
    texts = dict(equal_to(Train(optimizer=Optimizer(lr=2)), "self.train"))

    assert texts["sequenceLength"] == "self.train.sequenceLength == 4096"
    assert texts["precision"] == "self.train.precision == 'bf16'"
    assert texts["optimizer"].startswith("self.train.optimizer.lr == 2.0 && self.train.optimizer.")
    assert "[self.train.batchTokens].all(c, " in texts["batchTokens"]
    assert "n == 4194304" in texts["batchTokens"]
    assert dict(equal_to(Routing(), "self"))["annealRate"] == "self.annealRate == 0.0001"


def test_the_pattern_of_counts_is_what_is_read() -> None:
    """No text that one takes and the other does not."""
    draw = Draw(1)
    taken = 0
    for _ in range(20_000):
        text = "".join(draw.choice("0015.KMBT e-") for _ in range(draw.randint(0, 7)))
        matches = re.search(COUNT_PATTERN, text) is not None and len(text) <= COUNT_LENGTH
        try:
            parse_count(text)
        except ValueError:
            assert not matches, text
        else:
            assert matches, text
            taken += 1
    assert taken > 500


def test_a_run_can_be_named_as_long_as_its_jobs_allow() -> None:
    """The longest stage of any spec, and one letter more."""
    checked = 0
    for number in range(300):
        document = a_document(Draw(number))
        try:
            spec = BTXRunSpec.parse(document)
        except ValidationError:
            continue
        stages = [*graph(spec, resolved_for(spec)), PREFLIGHT]
        most = names.run_name_length(max(stages, key=len))
        plain = {"apiVersion": names.API_VERSION, "kind": names.KIND, "spec": spec.plain()}
        parse(yaml.safe_dump(plain | {"metadata": {"name": "n" * most}}))
        with pytest.raises(ManifestError, match=r"^metadata\.name: "):
            parse(yaml.safe_dump(plain | {"metadata": {"name": "n" * (most + 1)}}))
        checked += 1
    assert checked > 50


def test_the_full_status_is_full() -> None:
    """Every field has a value that it does not have by default: none can be forgotten there."""
    assert list(unset(full_status(), "status")) == []
    assert Status.parse(full_status().plain()) == full_status()


def unset(value: Model, path: str) -> Iterator[str]:
    """Fields that are as they are by default."""
    for name, field in type(value).model_fields.items():
        item = getattr(value, name)
        if item is None or (item == field.default and not isinstance(item, State)):
            yield f"{path}.{name}"
        for part in item if isinstance(item, tuple) else (item,):
            if isinstance(part, Model):
                yield from unset(part, f"{path}.{name}")
