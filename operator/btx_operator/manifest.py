"""Reads a BTXRun manifest from disk: YAML 1.2, `--set` overlays, one line per problem.

PyYAML reads YAML 1.1, where `1e-4` is a string, `010` is eight and `on` is true. So scalars are
resolved here, by the core schema of YAML 1.2.2 (section 10.3.2). Kubernetes reads a dialect of its
own: `tests/contract/number_table.json` is fed to both, and what both accept is one value.
Called by cli.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml
from btx_api.names import API_VERSION, KIND, run_name_length
from btx_api.spec import NAME_PATTERN, BTXRunSpec, Method, Scheduling, explain
from btx_api.stage import Kind
from btx_api.status import PREFLIGHT
from pydantic import ValidationError

from btx_operator.errors import ManifestError

RUN_NAME_LENGTH = run_name_length(PREFLIGHT)
"""Of a run whose other stages have names as short as preflight's."""
NODES = 200_000
"""Of a document once its aliases are followed; more is a bomb."""
CLUSTER_FIELDS = tuple(Scheduling.model_fields)[list(Scheduling.model_fields).index("nodes") :]
"""Fields of Scheduling that a local run accepts and does not read ("Cluster only, ...")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunManifest:
    """One validated manifest."""

    name: str
    spec: BTXRunSpec
    unread: tuple[str, ...] = ()
    """Paths of fields that only mean something on a cluster."""


class _Yaml12(yaml.SafeLoader):
    """SafeLoader with the core schema, string keys only, no key twice, no merge keys."""

    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        # The rest (dates, sets, bytes) are not JSON.
        if tag is None or tag.rpartition(":")[2] in ("map", "seq", "str", "null")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise _at(key, f"key {name!r} is not a string; put it in quotes")
            if name in seen:
                raise _at(key, f"key {name!r} appears twice")
            seen.add(name)
        return super().construct_mapping(node, deep=True)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """`!!int` of the core schema: decimal, 0o and 0x; no leading zero, octal to Kubernetes."""
        text = str(self.construct_scalar(node))
        if re.fullmatch("[-+]?0[0-9]+", text):
            raise _at(node, f"{text[:40]!r} is octal to some readers; write it without its zero")
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            return int(text[2:] if base != 10 else text, base)
        except ValueError:
            raise _at(node, f"{text[:40]!r} ({len(text)} characters) is not an integer") from None

    def real(self, node: yaml.ScalarNode) -> float:
        """`!!float` of the core schema; .inf and .nan are for the spec to refuse."""
        text = str(self.construct_scalar(node)).lower()
        try:
            return float(re.sub(r"\.(?=inf|nan)", "", text))
        except ValueError:
            raise _at(node, f"{text[:40]!r} is not a number") from None

    def truth(self, node: yaml.ScalarNode) -> bool:
        """`!!bool` of the core schema: true and false only."""
        return str(self.construct_scalar(node)).lower() == "true"


_CORE = (
    ("null", r"^(null|Null|NULL|~|)$", ["~", "n", "N", ""], None),
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", list("tTfF"), _Yaml12.truth),
    ("int", r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789"), _Yaml12.number),
    (
        "float",
        r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        list("-+.0123456789"),
        _Yaml12.real,
    ),
)
_Yaml12.yaml_implicit_resolvers = {}
for _name, _pattern, _first, _read in _CORE:
    _tag = f"tag:yaml.org,2002:{_name}"
    _Yaml12.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    if _read is not None:
        _Yaml12.add_constructor(_tag, _read)


def _at(node: yaml.Node, what: str) -> ManifestError:
    return ManifestError(f"{_place(node.start_mark)}: {what}")


def _place(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def parse_yaml(text: str) -> Any:
    """One YAML 1.2 document as JSON values; ManifestError with the place of the first problem."""
    try:
        loader = _Yaml12(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{_place(mark)}: " if mark else ""
        raise ManifestError(f"{place}{_plain(error.problem or error.context or '')}") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        what = f"character {chr(error.character)!r} is not allowed"  # of text it is a number
        raise ManifestError(f"line {line}, column {column}: {what}") from None
    except RecursionError:
        raise ManifestError("line 1, column 1: the document is nested too deeply") from None


def _measure(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below one, aliases followed; refuses what contains itself, and what is too large."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise _at(node, "an alias within its own anchor")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value if isinstance(node, yaml.CollectionNode) else ()
    children = (c for part in parts for c in (part if isinstance(part, tuple) else (part,)))
    size = 1 + sum(_measure(child, sizes) for child in children)
    if size > NODES:
        raise _at(node, f"more than {NODES} values")
    sizes[id(node)] = size
    return size


def _plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def read(path: Path, overlays: Sequence[str] = ()) -> RunManifest:
    """Manifest of one file; every problem is prefixed with the file's name."""
    try:
        return parse(path.read_text(encoding="utf-8"), overlays)
    except ManifestError as error:
        raise ManifestError(*(f"{path}: {problem}" for problem in error.problems)) from None
    except OSError as error:
        raise ManifestError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def parse(text: str, overlays: Sequence[str] = ()) -> RunManifest:
    """Manifest of one YAML document; `overlays` are `path=value`, applied before validation."""
    document = parse_yaml(text)
    if not isinstance(document, dict):
        raise ManifestError(f"the document is not a {KIND} (a mapping with apiVersion and kind)")
    problems = list(_header_problems(document))
    if problems:
        raise ManifestError(*problems)
    for item in overlays:
        apply_overlay(document, item)
    problems = _name_problems(document["metadata"])
    try:
        spec = BTXRunSpec.parse(_set(document["spec"]))
    except ValidationError as error:
        raise ManifestError(*problems, *explain(error)) from None
    except RecursionError:
        raise ManifestError("spec: is nested too deeply") from None
    problems = problems or _fit_problems(document["metadata"]["name"], spec)
    if problems:
        raise ManifestError(*problems)
    return RunManifest(
        name=document["metadata"]["name"], spec=spec, unread=tuple(cluster_fields(spec))
    )


def _set(value: Any) -> Any:
    """A value without null fields: as to an API server they are fields that are not set."""
    if isinstance(value, dict):
        return {key: _set(item) for key, item in value.items() if item is not None}
    return [_set(item) for item in value] if isinstance(value, list) else value


def _fit_problems(name: str, spec: BTXRunSpec) -> list[str]:
    """A cluster names a Job after run and stage."""
    stages = [f"{Kind.PREPARE}-{domain}" for domain in spec.domains()]
    stages += ["train-dense"] if spec.method is Method.DENSE else []
    longest = max([*stages, PREFLIGHT], key=len)
    over = len(name) - run_name_length(longest)
    if over <= 0:
        return []
    what = f"{name!r} is {over} characters too long: a Job of its stage {longest!r} is named after"
    return [f"metadata.name: {what} both"]


def _header_problems(document: dict[str, Any]) -> list[str]:
    problems = [
        f"{field}: is {repr(document.get(field))[:60]}, this release reads {wanted!r}"
        for field, wanted in (("apiVersion", API_VERSION), ("kind", KIND))
        if document.get(field) != wanted
    ]
    for field in ("metadata", "spec"):
        if not isinstance(document.get(field), dict):
            problems.append(f"{field}: is required and must be a mapping")
    # `status` is there when the manifest was printed by the API server; it is not ours to read.
    known = ("apiVersion", "kind", "metadata", "spec", "status")
    unknown = [field for field in document if field not in known]
    return problems + [f"{_plain(field)[:60] or repr(field)}: unknown field" for field in unknown]


def _name_problems(metadata: dict[str, Any]) -> list[str]:
    name = metadata.get("name")
    if name is None:
        return ["metadata.name: is required"]
    if isinstance(name, str) and len(name) <= RUN_NAME_LENGTH and re.fullmatch(NAME_PATTERN, name):
        return []
    rule = f"lower-case letters, digits and dashes, a letter first, at most {RUN_NAME_LENGTH}"
    return [f"metadata.name: {repr(name)[:80]} is not a name ({rule})"]


def apply_overlay(document: dict[str, Any], item: str) -> None:
    """Sets `path=value` in a parsed manifest: `experts[0].tokens=10K`, `metadata.name=other`.

    A path begins at the spec unless it begins with `metadata.`; mappings on the way are made,
    list items must exist. The value is YAML. Raises ManifestError.
    """
    path, equals, value = item.partition("=")
    if not equals:
        raise ManifestError(f"--set {item}: is not path=value")
    parts = _split(item, path)
    if parts[0] not in ("spec", "metadata"):
        parts.insert(0, "spec")
    try:
        new = parse_yaml(value)
    except ManifestError as error:
        raise ManifestError(f"--set {item}: {error}") from None
    here: Any = document
    for depth, part in enumerate(parts):
        at = f"--set {item}: {_join(parts[:depth])}"
        if isinstance(part, int):
            if not isinstance(here, list):
                raise ManifestError(f"{at} is not a list")
            if part >= len(here):
                raise ManifestError(f"{at} has {len(here)} items")
        elif not isinstance(here, dict):
            raise ManifestError(f"{at} is not a mapping")
        if depth == len(parts) - 1:
            here[part] = new
        elif isinstance(part, str) and here.get(part) is None:
            here[part] = {}
        here = here[part]


def _split(item: str, path: str) -> list[str | int]:
    step = r"[A-Za-z][\w-]*(\[[0-9]+\])*"
    if not re.fullmatch(rf"{step}(\.{step})*", path):
        raise ManifestError(f"--set {item}: {path!r} is not a path such as experts[0].tokens")
    return [int(number) if number else name for name, number in
            re.findall(r"([A-Za-z][\w-]*)|\[([0-9]+)\]", path)]  # fmt: skip


def _join(parts: Sequence[str | int]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")


def cluster_fields(spec: BTXRunSpec) -> list[str]:
    """Paths that are set to something and that no local run reads."""
    blocks: list[tuple[str, Scheduling]] = [
        (f"execution.{kind}", getattr(spec.execution, kind))
        for kind in type(spec.execution).model_fields
        if kind != "image"
    ]
    blocks += [(f"experts[{i}].execution", e.execution) for i, e in enumerate(spec.experts)
               if e.execution]  # fmt: skip
    found = ["execution.image"] if spec.execution.image else []
    for path, block in blocks:
        plain = block.model_dump(exclude_defaults=True, by_alias=False)
        names = [name for name in CLUSTER_FIELDS if name in plain]
        found += [f"{path}.{Scheduling.model_fields[name].alias}" for name in names]
    return found
