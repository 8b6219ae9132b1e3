"""Which dense families can be mixed, into what, and from which sources each target tensor comes.

The families are data, in family_table.py. From a dense `config.json` and the headers of its weights
this module derives the config of the target and a `Plan`, the ordered list of target tensors;
`weights.py` runs the plan. Pure: no torch, no I/O. Called by the preflight errand and by
the stages average and mix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from btx_trainer.errors import ConfigurationError
from btx_trainer.family_table import (
    FAMILIES,
    FREE,
    METADATA,
    ROPE_FIELDS,
    ROPE_THETA,
    SHARED_WIDTH,
    Family,
)

Model = TypeVar("Model")


class FamilyError(ConfigurationError):
    """A model that cannot be mixed: one line that names the file, the field and its values.

    Attributes:
        field: the config field (dotted) or the tensor at fault.
    """

    def __init__(self, where: str, field: str, message: str) -> None:
        super().__init__(where, message)
        self.field = field


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What a safetensors header says of one tensor: its dtype (`BF16`, `F16`, `F32`) and shape."""

    dtype: str
    shape: tuple[int, ...]


Rows = tuple[int, int]
"""Rows of a tensor along its first dimension: the first, and the one after the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """The bytes of tensor `name` of model `model`, or of some rows of it, unchanged."""

    model: int
    name: str
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The weighted element-wise mean of tensor `name`; one weight >= 0 per model, any sum."""

    name: str
    weights: tuple[float, ...]
    rows: Rows | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """Copies one after the other, each of `shape`."""

    parts: tuple[Copy, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normal:
    """Fresh values: normal with mean 0 and deviation `std` (0 gives zeros), drawn from `seed`."""

    std: float
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """One tensor of the target as it will be named on disk, and how it is made."""

    name: str
    spec: TensorSpec
    op: Copy | Mean | Stack | Normal


Plan = tuple[Planned, ...]


_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_FFN = "mlp.gate_proj.weight"
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Where a matrix or vector of a layer is: a tensor, or some rows of it."""

    name: str
    shape: tuple[int, ...]
    rows: Rows | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """A dense model as its config.json describes it, with every default of its family filled in."""

    family: Family = field(repr=False)
    model_type: str
    fields: Mapping[str, Any]
    """Values under the names of `family.defaults`, and `rope_parameters`."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.fields["num_hidden_layers"])

    def shape(self, text: str) -> tuple[int, ...]:
        """The shape that `text` (see `Family`) stands for."""
        return tuple(sum(sizes) for sizes in self._sizes(text))

    def _sizes(self, text: str) -> list[list[int]]:
        """The terms of every dimension of `text`."""
        f = self.fields
        sizes = {
            "1": 1,
            "S": SHARED_WIDTH,
            "H": f["hidden_size"],
            "I": f["intermediate_size"],
            "V": f["vocab_size"],
            "D": f["head_dim"],
            "Q": f["num_attention_heads"] * f["head_dim"],
            "K": f["num_key_value_heads"] * f["head_dim"],
        }
        return [[int(sizes[term]) for term in word.split("+")] for word in text.split()]

    def _layer(self) -> dict[str, str]:
        """Names and shapes of a layer's tensors."""
        biases = self.family.biases if self.fields.get("attention_bias") else {}
        return {**biases, **self.family.layer}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor on disk, in the model's order; a tied head is absent."""
        texts = {"model.embed_tokens.weight": "V H"}
        for index in range(self.layers):
            texts |= {f"model.layers.{index}.{name}": text for name, text in self._layer().items()}
        texts["model.norm.weight"] = "H"
        if not self.fields["tie_word_embeddings"]:
            texts["lm_head.weight"] = "V H"
        return {name: self.shape(text) for name, text in texts.items()}

    def parts(self) -> dict[str, Part]:
        """A layer's tensors with the fused ones taken apart, under the target's names."""
        found = {}
        for name, text in self._layer().items():
            rows, *rest = self._sizes(text)
            ends = list(accumulate(rows))
            for part, size, end in zip(
                self.family.parts.get(name, (name,)), rows, ends, strict=True
            ):
                found[part] = Part(
                    name=name, shape=(size, *(sum(terms) for terms in rest)),
                    rows=(end - size, end) if len(rows) > 1 else None,
                )  # fmt: skip
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameter counts: all of the model, and those that one token uses (embeddings included)."""

    total: int
    active: int


def read_config(config: Mapping[str, Any], where: str, seed: Dense | None = None) -> Dense:
    """Check a dense `config.json` field by field and fill in the defaults of its family.

    `where` begins every message, for example `seed`; a member's model_type must be its `seed`'s.
    Raises FamilyError for a family that is not in the table, an unknown field, a value that the
    target cannot express, a bad dimension.
    """
    where = f"{where} config.json"
    model_type = config.get("model_type")
    if seed and model_type != seed.model_type:
        raise _differs(where, "model_type", model_type, seed.model_type)
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FamilyError(
            where,
            "model_type",
            f"model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})",
        )
    _check_fields(config, family, where)
    fields = {name: config.get(name, default) for name, default in family.defaults.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    _check_counts(fields, where)
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields["rope_parameters"] = _rope(config, family, fields["max_position_embeddings"], where)
    return Dense(family=family, model_type=str(model_type), fields=fields)


def _check_fields(config: Mapping[str, Any], family: Family, where: str) -> None:
    rope_names = {"rope_parameters", "rope_scaling", "rope_theta"}
    known = {*family.defaults, *family.required, *family.inert, *METADATA, *rope_names}
    for name, value in config.items():
        if name not in known:
            raise FamilyError(
                where,
                name,
                f"field {name!r} is unknown for model_type {config['model_type']!r}"
                f" (it is {_short(value)})",
            )
    for name, only in family.required.items():
        if config.get(name, only) != only:
            raise FamilyError(
                where, name, f"{name} is {config[name]!r}, only {only!r} can be mixed"
            )
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise FamilyError(
                where,
                "layer_types",
                f"layer_types has {kind!r}, only 'full_attention' can be mixed",
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _differs(where: str, name: str, theirs: object, ours: object) -> FamilyError:
    return FamilyError(where, name, f"{name} is {_short(theirs)}, the seed's is {_short(ours)}")


def check_tensors(dense: Dense, tensors: Mapping[str, TensorSpec], where: str) -> None:
    """Compare the header of a model's weights with what its config implies.

    Raises FamilyError naming the first tensor that is missing, unexpected or of another shape.
    """
    expected = dense.shapes()
    for name, shape in expected.items():
        if name not in tensors:
            raise FamilyError(where, name, f"tensor {name} is missing")
        if tensors[name].shape != shape:
            raise FamilyError(
                where,
                name,
                f"tensor {name} has shape {list(tensors[name].shape)},"
                f" config.json implies {list(shape)}",
            )
    for name in tensors:
        if name == "lm_head.weight" and name not in expected:
            raise FamilyError(where, name, f"{name} is stored, but tie_word_embeddings is true")
        # Old files store this buffer; it follows from the config and stock loading ignores it too.
        if name not in expected and not name.endswith("rotary_emb.inv_freq"):
            raise FamilyError(where, name, f"tensor {name} is unknown for {dense.model_type!r}")


def check_member(seed: Dense, member: Dense, where: str) -> None:
    """Compare a member's architecture with the seed's.

    Raises FamilyError naming the first field that differs, and both values.
    """
    where = f"{where} config.json"
    ours, theirs = _flat(seed), _flat(member)
    for name in {**ours, **theirs}:
        if name not in FREE and ours.get(name) != theirs.get(name):
            raise _differs(where, name, theirs.get(name), ours.get(name))


def check_dtypes(
    seed: Mapping[str, TensorSpec], member: Mapping[str, TensorSpec], where: str
) -> None:
    """Compare dtypes of two headers with the same names; FamilyError names the first difference."""
    for name, spec in seed.items():
        if member[name].dtype != spec.dtype:
            raise FamilyError(
                where,
                name,
                f"tensor {name} is {member[name].dtype}, the seed's is {spec.dtype}",
            )


def expert_order(members: Sequence[Model], seed: Model, *, include_seed: bool) -> tuple[Model, ...]:
    """The mixed models in the order of their expert index: members as given, the seed last."""
    return (*members, seed) if include_seed else tuple(members)


def average_plan(dense: Dense, tensors: Mapping[str, TensorSpec], weights: Sequence[float]) -> Plan:
    """Plan of a dense model whose every tensor is the mean over the models.

    `tensors` is the seed's header (dtypes), `weights` one number >= 0 per model.
    """
    return tuple(
        Planned(name=name, spec=tensors[name], op=_mean(name, weights)) for name in dense.shapes()
    )


def mix_plan(
    dense: Dense, tensors: Mapping[str, TensorSpec], weights: Sequence[float], router: Normal
) -> Plan:
    """Plan of the mixed model (BTX section 3.2; methods.md 1.2).

    Expert i is the FFN of model i, every other tensor the mean over all models, the router fresh.
    `tensors` is the seed's header (dtypes), `weights` one number >= 0 per model; equal weights are
    the paper's. N times the same model is sparse upcycling.
    """
    first, *last = (
        planned
        for planned in average_plan(dense, tensors, weights)
        if not planned.name.startswith("model.layers.")
    )
    plan = [first]
    for index in range(dense.layers):
        plan += _mixed_layer(dense, f"model.layers.{index}.", tensors, weights, router)
    return (*plan, *last)


def _mixed_layer(
    dense: Dense,
    prefix: str,
    tensors: Mapping[str, TensorSpec],
    weights: Sequence[float],
    router: Normal,
) -> Iterator[Planned]:
    target, parts = dense.family.target, dense.parts()
    everyone = range(len(weights))
    ffn = {*target.experts.values(), *(name for names in target.fused.values() for name in names)}
    dtypes = {name: tensors[prefix + part.name].dtype for name, part in parts.items()}

    def planned(
        name: str, dtype: str, shape: tuple[int, ...], op: Copy | Mean | Stack | Normal
    ) -> Planned:
        return Planned(name=prefix + name, spec=TensorSpec(dtype=dtype, shape=shape), op=op)

    def copy(model: int, part: Part) -> Copy:
        return Copy(model=model, name=prefix + part.name, rows=part.rows)

    for name, part in parts.items():
        if name not in ffn:
            op = _mean(prefix + part.name, weights, part.rows)
            yield planned(name, dtypes[name], part.shape, op)
    dtype = dtypes[_FFN]
    yield planned(target.router, dtype, (len(weights), *dense.shape("H")), router)
    for expert in everyone:
        for name, source in target.experts.items():
            part = parts[source]
            yield planned(name.format(expert), dtypes[source], part.shape, copy(expert, part))
    for name, sources in target.fused.items():
        shape = parts[sources[0]].shape
        every = tuple(copy(expert, parts[source]) for expert in everyone for source in sources)
        whole = (len(weights), len(sources) * shape[0], *shape[1:])
        yield planned(name, dtypes[sources[0]], whole, Stack(parts=every, shape=shape))
    for name, text in target.zeros.items():
        yield planned(name, dtype, dense.shape(text), Normal(std=0.0, seed=0))


def mixed_config(
    dense: Dense,
    tensors: Mapping[str, TensorSpec],
    *,
    experts: int,
    top_k: int,
    alpha: float = 0.01,
) -> dict[str, Any]:
    """The `config.json` of the mixed model; every field is written, none is left to a default.

    `tensors` is the seed's header (dtype). `alpha` becomes `router_aux_loss_coef`, which inference
    does not read.
    """
    assert 1 <= top_k <= experts, (top_k, experts)
    rope = dict(dense.fields["rope_parameters"])
    target = dense.family.target
    return {
        **target.fields,
        **dense.fields,
        **{name: dense.fields[source] for name, source in target.renamed.items()},
        "rope_parameters": rope,
        # Readers older than `rope_parameters` take the target's own default without this.
        "rope_theta": rope["rope_theta"],
        "dtype": _CONFIG_DTYPES[tensors["model.embed_tokens.weight"].dtype],
        target.count: experts,
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": alpha,
    }


def count_parameters(dense: Dense, *, experts: int = 0, top_k: int = 0) -> Parameters:
    """Parameters of the dense model, or of the mixed one with `experts` of which `top_k` run."""
    shapes = dense.shapes()
    if not experts:
        total = sum(map(math.prod, shapes.values()))
        return Parameters(total=total, active=total)
    header = {name: TensorSpec(dtype="F32", shape=shape) for name, shape in shapes.items()}
    plan = mix_plan(dense, header, [1.0] * experts, Normal(std=0.0, seed=0))
    total = sum(math.prod(tensor.spec.shape) for tensor in plan)
    expert = 3 * dense.layers * math.prod(dense.shape("I H"))
    return Parameters(total=total, active=total - (experts - top_k) * expert)


def _mean(name: str, weights: Sequence[float], rows: Rows | None = None) -> Mean:
    assert min(weights) >= 0 and sum(weights) > 0, weights
    return Mean(name=name, weights=tuple(weights), rows=rows)


def _check_counts(fields: Mapping[str, Any], where: str) -> None:
    for name in _COUNTS:
        value = fields[name]
        if name == "head_dim" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FamilyError(where, name, f"{name} is {value!r}, not a positive integer")


def _rope(
    config: Mapping[str, Any], family: Family, max_positions: object, where: str
) -> dict[str, Any]:
    """The rope parameters in one form, with the precedence of stock transformers 5.23."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise FamilyError(where, key, f"{key} is {given!r}, not an object")
    for name in given:
        if name not in ROPE_FIELDS:
            raise FamilyError(where, f"{key}.{name}", f"field '{key}.{name}' is unknown")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in family.rope_types:
        kinds = ", ".join(family.rope_types)
        raise FamilyError(
            where,
            f"{key}.rope_type",
            f"{key}.rope_type {kind!r} is not supported (supported: {kinds})",
        )
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        name = f"{key}.partial_rotary_factor"
        value = given["partial_rotary_factor"]
        raise FamilyError(where, name, f"{name} is {value!r}, only 1.0 can be mixed")
    said = {"type", "partial_rotary_factor"}
    rope = {name: value for name, value in given.items() if name not in said}
    rope["rope_type"] = kind
    theta = rope.setdefault("rope_theta", config.get("rope_theta", ROPE_THETA))
    if not isinstance(theta, int | float):
        raise FamilyError(where, "rope_theta", f"rope_theta is {theta!r}, not a number")
    if kind in ("llama3", "yarn", "longrope"):
        rope.setdefault("original_max_position_embeddings", max_positions)
    return rope


def _flat(dense: Dense) -> dict[str, Any]:
    rope = dense.fields["rope_parameters"]
    return (
        {"model_type": dense.model_type}
        | {name: value for name, value in dense.fields.items() if name != "rope_parameters"}
        | {f"rope_parameters.{name}": value for name, value in rope.items()}
    )
