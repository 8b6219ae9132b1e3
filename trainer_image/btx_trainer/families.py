"""Which dense families can be mixed, into what, and from which sources each target tensor comes.

A family is one entry of `FAMILIES`: data, no code. From a dense `config.json` and the headers of
its weights this module derives the config of the target and a `Plan`, the ordered list of target
tensors; `weights.py` runs the plan. Pure: no torch, no I/O. Called by the preflight errand and by
the stages average and mix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from btx_trainer.errors import ConfigurationError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """The bytes of tensor `name` of model `model`, unchanged."""

    model: int
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """The weighted element-wise mean of tensor `name`; one weight >= 0 per model, any sum."""

    name: str
    weights: tuple[float, ...]


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
    op: Copy | Mean | Normal


Plan = tuple[Planned, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One row of the table: everything the mixer knows of a dense architecture.

    Shapes are strings with one letter per dimension: H hidden, I intermediate, V vocabulary,
    D head, Q all query heads, K all key (or value) heads.
    """

    defaults: Mapping[str, Any]
    """Fields that the target takes under the same name, each with the dense family's default."""
    required: Mapping[str, Any]
    """Fields that the target cannot express, each with the only value that maps; absent is fine."""
    layer: Mapping[str, str]
    """Shapes of a layer's tensors, in order, without the prefix `model.layers.L.`."""
    experts: Mapping[str, str]
    """FFN tensors of a layer, each with its name in the target; `{}` is the expert's index."""
    router: str
    """Name of the router, [experts, H], in a layer of the target."""
    target: Mapping[str, Any]
    """Fields of the target that no dense config has."""


ROPE_THETA = 10_000.0
# Stock transformers computes these from the config alone, alike for dense model and target.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
ROPE_FIELDS = frozenset({
    "rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "short_factor", "long_factor",
})  # fmt: skip

# Fields that describe the file, its history or generation: no logit depends on them.
METADATA = frozenset({
    "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation_autoset",
    "architectures", "model_type", "transformers_version", "transformers.js_config",
    "unsloth_version", "unsloth_fixed", "is_llama_config", "tokenizer_class", "dtype",
    "torch_dtype", "use_cache", "pretraining_tp", "output_attentions", "output_hidden_states",
    "return_dict", "id2label", "label2id", "num_labels", "problem_type", "max_length",
    "max_new_tokens", "min_length", "do_sample", "num_beams", "temperature", "top_k", "top_p",
    "repetition_penalty", "length_penalty",
})  # fmt: skip

# Taken from the seed; an expert may differ in them, they do not change what its weights mean.
FREE = frozenset({
    "initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id",
})  # fmt: skip

_LLAMA_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED_SILU: Mapping[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "attention_bias": False,
    "rope_interleaved": False,
    "is_encoder_decoder": False,
}
_LLAMA_LAYER: Mapping[str, str] = {
    "input_layernorm.weight": "H",
    "self_attn.q_proj.weight": "QH",
    "self_attn.k_proj.weight": "KH",
    "self_attn.v_proj.weight": "KH",
    "self_attn.o_proj.weight": "HQ",
    "post_attention_layernorm.weight": "H",
    "mlp.gate_proj.weight": "IH",
    "mlp.up_proj.weight": "IH",
    "mlp.down_proj.weight": "HI",
}
# The disk names: transformers fuses them on loading, the native class of vLLM knows no others.
_MIXTRAL_EXPERTS: Mapping[str, str] = {
    "mlp.gate_proj.weight": "block_sparse_moe.experts.{}.w1.weight",
    "mlp.down_proj.weight": "block_sparse_moe.experts.{}.w2.weight",
    "mlp.up_proj.weight": "block_sparse_moe.experts.{}.w3.weight",
}
_MIXTRAL: Mapping[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "use_cache": True,
    "output_router_logits": False,
    "router_jitter_noise": 0.0,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        defaults=_LLAMA_DEFAULTS,
        required=_GATED_SILU,
        layer=_LLAMA_LAYER,
        experts=_MIXTRAL_EXPERTS,
        router="block_sparse_moe.gate.weight",
        target={**_MIXTRAL, "sliding_window": None},
    ),
    "mistral": Family(
        defaults={
            **_LLAMA_DEFAULTS,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        required=_GATED_SILU,
        layer=_LLAMA_LAYER,
        experts=_MIXTRAL_EXPERTS,
        router="block_sparse_moe.gate.weight",
        target=_MIXTRAL,
    ),
}

_COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


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

    def shape(self, letters: str) -> tuple[int, ...]:
        """The shape that `letters` (see `Family`) stand for."""
        f = self.fields
        sizes = {
            "H": f["hidden_size"],
            "I": f["intermediate_size"],
            "V": f["vocab_size"],
            "D": f["head_dim"],
            "Q": f["num_attention_heads"] * f["head_dim"],
            "K": f["num_key_value_heads"] * f["head_dim"],
        }
        return tuple(sizes[letter] for letter in letters)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor on disk, in the model's order; a tied head is absent."""
        letters = {"model.embed_tokens.weight": "VH"}
        for index in range(self.layers):
            letters |= {f"model.layers.{index}.{k}": v for k, v in self.family.layer.items()}
        letters["model.norm.weight"] = "H"
        if not self.fields["tie_word_embeddings"]:
            letters["lm_head.weight"] = "VH"
        return {name: self.shape(shape) for name, shape in letters.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameter counts: all of the model, and those that one token uses (embeddings included)."""

    total: int
    active: int


def read_config(config: Mapping[str, Any], where: str) -> Dense:
    """Check a dense `config.json` field by field and fill in the defaults of its family.

    `where` begins every message, for example `seed`. Raises FamilyError for a family that is not
    in the table, an unknown field, a value that the target cannot express, a bad dimension.
    """
    where = f"{where} config.json"
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise FamilyError(
            where,
            "model_type",
            f"model_type {model_type!r} is not supported (supported: {', '.join(FAMILIES)})",
        )
    rope_names = {"rope_parameters", "rope_scaling", "rope_theta"}
    known = {*family.defaults, *family.required, *METADATA, *rope_names}
    for name in config:
        if name not in known:
            raise FamilyError(
                where, name, f"field {name!r} is unknown for model_type {model_type!r}"
            )
    for name, only in family.required.items():
        if config.get(name, only) != only:
            raise FamilyError(
                where, name, f"{name} is {config[name]!r}, only {only!r} can be mixed"
            )
    fields = {name: config.get(name, default) for name, default in family.defaults.items()}
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    _check_counts(fields, where)
    if fields["head_dim"] is None:
        fields["head_dim"] = fields["hidden_size"] // fields["num_attention_heads"]
    fields["rope_parameters"] = _rope(config, fields["max_position_embeddings"], where)
    return Dense(family=family, model_type=str(model_type), fields=fields)


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
            raise FamilyError(
                where,
                name,
                f"{name} is {theirs.get(name)!r}, the seed's is {ours.get(name)!r}",
            )


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
    return tuple(_mean(name, tensors[name], weights) for name in dense.shapes())


def mix_plan(
    dense: Dense, tensors: Mapping[str, TensorSpec], weights: Sequence[float], router: Normal
) -> Plan:
    """Plan of the mixed model (BTX section 3.2; methods.md 1.2).

    Expert i is the FFN of model i, every other tensor the mean over all models, the router fresh.
    `tensors` is the seed's header (dtypes), `weights` one number >= 0 per model; equal weights are
    the paper's. N times the same model is sparse upcycling.
    """
    family, plan = dense.family, []
    for name in dense.shapes():
        prefix, suffix = _split(name)
        if suffix not in family.experts:
            plan.append(_mean(name, tensors[name], weights))
        elif suffix == next(s for s in family.layer if s in family.experts):
            spec = TensorSpec(dtype=tensors[name].dtype, shape=(len(weights), *dense.shape("H")))
            plan.append(Planned(name=prefix + family.router, spec=spec, op=router))
            plan += [
                Planned(
                    name=prefix + target.format(expert),
                    spec=tensors[prefix + source],
                    op=Copy(model=expert, name=prefix + source),
                )
                for expert in range(len(weights))
                for source, target in family.experts.items()
            ]
    return tuple(plan)


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
    return {
        **dense.family.target,
        **dense.fields,
        "rope_parameters": rope,
        # Readers older than `rope_parameters` take the target's own default, 1e6, without this.
        "rope_theta": rope["rope_theta"],
        "dtype": _CONFIG_DTYPES[tensors["model.embed_tokens.weight"].dtype],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": alpha,
    }


def count_parameters(dense: Dense, *, experts: int = 0, top_k: int = 0) -> Parameters:
    """Parameters of the dense model, or of the mixed one with `experts` of which `top_k` run."""
    ffn = other = 0
    for name, shape in dense.shapes().items():
        size = 1
        for length in shape:
            size *= length
        if _split(name)[1] in dense.family.experts:
            ffn += size
        else:
            other += size
    if not experts:
        return Parameters(total=other + ffn, active=other + ffn)
    other += dense.layers * experts * int(dense.fields["hidden_size"])
    return Parameters(total=other + experts * ffn, active=other + top_k * ffn)


def _mean(name: str, spec: TensorSpec, weights: Sequence[float]) -> Planned:
    assert min(weights) >= 0 and sum(weights) > 0, weights
    return Planned(name=name, spec=spec, op=Mean(name=name, weights=tuple(weights)))


def _split(name: str) -> tuple[str, str]:
    """A layer's tensor as (`model.layers.L.`, rest); others as (name, nothing)."""
    parts = name.split(".", 3)
    if parts[:2] != ["model", "layers"]:
        return name, ""
    return ".".join(parts[:3]) + ".", parts[3]


def _check_counts(fields: Mapping[str, Any], where: str) -> None:
    for name in _COUNTS:
        value = fields[name]
        if name == "head_dim" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise FamilyError(where, name, f"{name} is {value!r}, not a positive integer")


def _rope(config: Mapping[str, Any], max_positions: object, where: str) -> dict[str, Any]:
    """The rope parameters in one form, with the precedence of stock transformers 5.23."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise FamilyError(where, key, f"{key} is {given!r}, not an object")
    for name in given:
        if name not in ROPE_FIELDS:
            raise FamilyError(where, f"{key}.{name}", f"field '{key}.{name}' is unknown")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise FamilyError(
            where,
            f"{key}.rope_type",
            f"{key}.rope_type {kind!r} is not supported (supported: {', '.join(ROPE_TYPES)})",
        )
    rope = {name: value for name, value in given.items() if name != "type"} | {"rope_type": kind}
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
