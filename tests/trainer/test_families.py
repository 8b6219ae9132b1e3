"""The family table against stock transformers, refusals, the order of a plan, counts."""

import dataclasses
import json
import subprocess
import sys
from copy import deepcopy

import pytest
from btx_trainer.families import (
    Copy,
    FamilyError,
    Mean,
    Normal,
    Stack,
    TensorSpec,
    average_plan,
    check_dtypes,
    check_member,
    check_tensors,
    count_parameters,
    expert_order,
    mix_plan,
    mixed_config,
    read_config,
)
from btx_trainer.family_table import FAMILIES, METADATA
from dense import TARGETS
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def tensors_of(dense, dtype="BF16"):
    return {name: TensorSpec(dtype=dtype, shape=s) for name, s in dense.shapes().items()}


def mixed(config, experts=3):
    dense = read_config(config, "seed")
    return mixed_config(dense, tensors_of(dense), experts=experts, top_k=2)


def own_fields(model_type):
    inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    fields = dataclasses.fields(CONFIG_MAPPING[model_type])
    return {f.name: f.default for f in fields if f.name not in inherited}


def test_table_has_the_families_that_are_served():
    """Seven dense families, and what each becomes."""
    assert {name: row.target.fields["model_type"] for name, row in FAMILIES.items()} == TARGETS


@pytest.mark.parametrize("model_type", FAMILIES)
def test_table_knows_every_field_of_the_stock_class(model_type):
    """Each field of the stock dense config is known, and carried fields have its default."""
    family = FAMILIES[model_type]
    for name, default in own_fields(model_type).items():
        if name in family.defaults:
            assert family.defaults[name] == default, name
        elif name in family.required:
            assert family.required[name] == default, name
        else:
            assert name in {*METADATA, *family.inert, "rope_parameters"}, name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_is_left_to_the_targets_default(model_type):
    """Every field of the stock target config is written out."""
    config = mixed({"model_type": model_type, "rope_theta": 12345.0})

    target = TARGETS[model_type]
    assert own_fields(target).keys() <= config.keys()
    assert config["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target]]
    assert config["model_type"] == target
    assert config["dtype"] == "bfloat16"
    stock = CONFIG_MAPPING[target](**deepcopy(config))
    count = "num_local_experts" if target in ("mixtral", "granitemoe") else "num_experts"
    assert (getattr(stock, count), stock.num_experts_per_tok) == (3, 2)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
    assert config["output_router_logits"] is False
    # Weights of the top k that do not sum to 1 would be another function.
    assert config.get("norm_topk_prob", True) is True
    if "moe_intermediate_size" in config:
        assert config["moe_intermediate_size"] == config["intermediate_size"]
        assert (config["decoder_sparse_step"], config["mlp_only_layers"]) == (1, [])


MULTIPLIERS = {"embedding_multiplier": 12.0, "attention_multiplier": 0.0078125,
               "residual_multiplier": 0.22, "logits_scaling": 16}  # fmt: skip
CONFIGS = [
    *({"model_type": model_type} for model_type in FAMILIES),
    *({**TINY, "model_type": model_type, "tie_word_embeddings": True, "pad_token_id": None,
       "rope_theta": 5e5, "rms_norm_eps": 3e-3, "head_dim": 12} for model_type in FAMILIES),
    *({**TINY, "model_type": model_type, "rope_theta": 5e5,
       "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
      for model_type in FAMILIES if model_type != "phi3"),
    {**TINY, "model_type": "phi3", "rope_scaling": None, "sliding_window": 2047, "resid_pdrop": 0.0,
     "original_max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
    {**TINY, "model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 1,
     "use_sliding_window": False},
    {**TINY, "model_type": "qwen3", "attention_bias": True, "head_dim": 128,
     "layer_types": ["full_attention"] * 2},
    {**TINY, "model_type": "olmo2", "attention_bias": True},
    {**TINY, "model_type": "granite", **MULTIPLIERS},
    {"model_type": "mistral", "sliding_window": None},
    {**TINY, "rope_theta": 12345},
    {**TINY, "num_key_value_heads": None},
    {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}},
    {**TINY, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    {**TINY, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {**TINY, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    {**TINY, "rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3,
                                 "original_max_position_embeddings": 512}},
    {**TINY, "rope_theta": 5e5, "rope_scaling": None},
    {**TINY, "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5e5}},
    {**TINY, "head_dim": 16, "rms_norm_eps": 3e-6, "tie_word_embeddings": True},
    {**TINY, "pad_token_id": 3, "bos_token_id": None, "eos_token_id": [2, 5]},
    {**TINY, "attention_dropout": 0.1, "initializer_range": 0.3, "torch_dtype": "bfloat16"},
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_stock_target_reads_what_the_stock_dense_model_reads(config):
    """Values of the stock dense config, given or defaulted, are those of the stock target."""
    family, target = config["model_type"], TARGETS[config["model_type"]]
    dense = CONFIG_MAPPING[family](**deepcopy(config))  # stock fills the rope dict in place
    for name in ("type", "partial_rotary_factor"):  # the first is an old name, the second is 1
        dense.rope_parameters.pop(name, None)
    stock = CONFIG_MAPPING[target](**mixed(config))

    names = own_fields(target).keys() & own_fields(family)
    names -= FAMILIES[family].inert | {"use_cache"}
    assert len(names) >= 15
    for name in names:
        assert getattr(stock, name) == getattr(dense, name), name
    assert not (getattr(dense, "sliding_window", None) and not stock.sliding_window)
    heads = dense.hidden_size // dense.num_attention_heads
    assert stock.head_dim == (getattr(dense, "head_dim", None) or heads)
    assert not getattr(stock, "use_sliding_window", False)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_saved_again_by_stock_is_no_difference(config):
    """A member trained from the seed has the config that stock wrote: known, and the same."""
    stock = CONFIG_MAPPING[config["model_type"]](**deepcopy(config))
    saved = json.loads(stock.to_json_string())

    check_member(read_config(config, "seed"), read_config(saved, "member"), "member")


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        *(({"model_type": name}, "model_type", f"seed config.json: model_type {name!r} is not"
           " supported (supported: llama, mistral, phi3, qwen3, qwen2, olmo2, granite)")
          for name in ("gemma2", "gemma3_text", "olmo", "olmo3", "smollm3", "arcee", "gpt_neox",
                       "phi", "gpt2", "mixtral", "qwen3_moe", "granitemoe", "cohere2")),
        ({"model_type": None}, "model_type", "model_type None is not supported"),
        ({"query_pre_attn_scalar": 7}, "query_pre_attn_scalar",
         "'query_pre_attn_scalar' is unknown for model_type 'llama' (it is 7)"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "is 0.5, only 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}},
         "rope_parameters.partial_rotary_factor", "is 0.5, only 1.0 can be mixed"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, "partial_rotary_factor", "is 0.75"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
         "rope_scaling.rope_type", "'longrope' is not supported (supported: default)"),
        ({"model_type": "phi3", "resid_pdrop": 0.1}, "resid_pdrop", "is 0.1, only 0.0"),
        ({"model_type": "phi3", "attention_bias": True}, "attention_bias", "is True, only False"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window", "is True, only"),
        ({"model_type": "qwen2", "use_mrope": True}, "use_mrope", "is True, only False"),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
         "layer_types", "layer_types has 'sliding_attention', only 'full_attention' can be mixed"),
        ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv", "unknown for model_type 'olmo2'"),
        ({"model_type": "olmo2", "layer_types": None}, "layer_types", "unknown"),
        ({"model_type": "granite", "mlp_bias": True}, "mlp_bias", "is True, only False"),
        ({"model_type": "granite", "shared_intermediate_size": 8}, "shared_intermediate_size",
         "unknown for model_type 'granite' (it is 8)"),
        ({"quantization_config": {}}, "quantization_config", "unknown"),
        ({"sliding_window": 32}, "sliding_window", "unknown"),
        ({"mlp_bias": True}, "mlp_bias", "mlp_bias is True, only False can be mixed"),
        ({"attention_bias": True}, "attention_bias", "is True, only False"),
        ({"hidden_act": "gelu"}, "hidden_act", "is 'gelu', only 'silu'"),
        ({"hidden_size": "32"}, "hidden_size", "hidden_size is '32', not a positive integer"),
        ({"hidden_size": None}, "hidden_size", "None, not a positive"),
        ({"num_hidden_layers": True}, "num_hidden_layers", "True, not a positive"),
        ({"head_dim": 0}, "head_dim", "0, not a positive"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type", "'mrope' is not sup"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}},
         "rope_parameters.mrope_section", "'rope_parameters.mrope_section' is unknown"),
        ({"rope_theta": None}, "rope_theta", "rope_theta is None, not a number"),
        ({"rope_scaling": 2}, "rope_scaling", "rope_scaling is 2, not an object"),
    ],
    ids=str,
)  # fmt: skip
def test_config_that_does_not_map_is_refused(change, field, words):
    """A config that the target cannot express is refused in one line that names the field."""
    with pytest.raises(FamilyError) as caught:
        read_config({**TINY, **change}, "seed")

    assert caught.value.field == field
    assert words in str(caught.value)
    assert str(caught.value).startswith("seed config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"hidden_size": 64}, "hidden_size", "hidden_size is 64, the seed's is 32"),
        ({"vocab_size": 66}, "vocab_size", "vocab_size is 66, the seed's is 64"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps", "rms_norm_eps is 1e-05, the seed's is 1e-06"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings",
         "tie_word_embeddings is True, the seed's is False"),
        ({"rope_theta": 1e6}, "rope_parameters.rope_theta",
         "rope_parameters.rope_theta is 1000000.0, the seed's is 10000.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, "rope_parameters.rope_type",
         "rope_parameters.rope_type is 'linear', the seed's is 'default'"),
        ({"model_type": "mistral"}, "model_type", "model_type is 'mistral', the seed's is 'llama'"),
        ({"model_type": "gpt2"}, "model_type", "model_type is 'gpt2', the seed's is 'llama'"),
    ],
    ids=str,
)  # fmt: skip
def test_member_with_another_architecture_is_refused(change, field, message):
    """A member that differs from the seed is refused naming the first field and both values."""
    seed = read_config(TINY, "seed")

    with pytest.raises(FamilyError) as caught:
        member = read_config({**TINY, **change}, "experts.code", seed)
        check_member(seed, member, "experts.code")

    assert caught.value.field == field
    assert str(caught.value) == f"experts.code config.json: {message}"


def test_member_may_write_the_same_config_otherwise():
    """Old and new rope fields, explicit defaults and other special tokens are no difference."""
    seed = read_config({**TINY, "rope_theta": 10000}, "seed")
    other = {**TINY, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
             "rms_norm_eps": 1e-6, "head_dim": 8, "eos_token_id": 5,
             "use_cache": False}  # fmt: skip

    check_member(seed, read_config(other, "member"), "member")


def test_header_that_does_not_fit_the_config_is_refused():
    """Missing, unknown, reshaped and retyped tensors are each refused by name."""
    dense = read_config(TINY, "seed")
    good = tensors_of(dense)
    name = "model.layers.1.mlp.up_proj.weight"
    check_tensors(dense, {**good, "model.layers.0.self_attn.rotary_emb.inv_freq": good[name]}, "s")

    def refusal(tensors, check=check_tensors, first=dense):
        with pytest.raises(FamilyError) as caught:
            check(first, tensors, "experts.code")
        return caught.value.field, str(caught.value)

    missing = {key: value for key, value in good.items() if key != name}
    assert refusal(missing) == (name, f"experts.code: tensor {name} is missing")
    wrong = {**good, name: TensorSpec(dtype="BF16", shape=(50, 32))}
    assert refusal(wrong)[1] == (
        f"experts.code: tensor {name} has shape [50, 32], config.json implies [48, 32]"
    )
    assert "tensor score.weight is unknown" in refusal({**good, "score.weight": good[name]})[1]
    retyped = {**good, name: TensorSpec(dtype="F32", shape=(48, 32))}
    assert refusal(retyped, check_dtypes, good) == (
        name, f"experts.code: tensor {name} is F32, the seed's is BF16")  # fmt: skip

    tied = read_config({**TINY, "tie_word_embeddings": True}, "seed")
    with pytest.raises(FamilyError, match=r"lm_head.weight is stored, but tie_word_embeddings"):
        check_tensors(tied, good, "seed")


def test_plan_takes_experts_in_the_given_order_and_the_seed_last():
    """Expert i copies model i's FFN under the disk names, the rest is a mean, the router fresh."""
    dense = read_config(TINY, "seed")
    models = expert_order(["code", "math"], "seed", include_seed=True)
    assert models == ("code", "math", "seed")
    assert expert_order(["code", "math"], "seed", include_seed=False) == ("code", "math")

    router = Normal(std=0.02, seed=1)
    plan = {t.name: t for t in mix_plan(dense, tensors_of(dense), [1.0] * 3, router)}

    prefix = "model.layers.1."
    for name, source in [("w1", "gate"), ("w2", "down"), ("w3", "up")]:
        for expert in range(3):
            op = plan[f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight"].op
            assert op == Copy(model=expert, name=f"{prefix}mlp.{source}_proj.weight")
    gate = plan[f"{prefix}block_sparse_moe.gate.weight"]
    assert (gate.op, gate.spec) == (router, TensorSpec(dtype="BF16", shape=(3, 32)))
    means = {name for name, tensor in plan.items() if isinstance(tensor.op, Mean)}
    assert means == {name for name in dense.shapes() if ".mlp." not in name}
    assert {plan[name].op.weights for name in means} == {(1.0, 1.0, 1.0)}
    assert len(plan) == len(means) + 2 * (1 + 3 * 3)


def test_fused_tensors_are_cut_and_joined_by_rows():
    """Phi-3's fused projections become separate ones; Granite's experts become one tensor."""
    phi = read_config({**TINY, "model_type": "phi3"}, "seed")
    plan = {t.name: t for t in mix_plan(phi, tensors_of(phi), [1.0] * 2, Normal(std=0.0, seed=1))}
    qkv, gate_up = "self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight"
    for name, source, rows in [
        ("self_attn.q_proj.weight", qkv, (0, 32)), ("self_attn.k_proj.weight", qkv, (32, 48)),
        ("self_attn.v_proj.weight", qkv, (48, 64)),
        ("block_sparse_moe.experts.1.w1.weight", gate_up, (0, 48)),
        ("block_sparse_moe.experts.1.w3.weight", gate_up, (48, 96)),
    ]:  # fmt: skip
        planned = plan[f"model.layers.1.{name}"]
        assert (planned.op.name, planned.op.rows) == (f"model.layers.1.{source}", rows)
        assert planned.spec.shape == (rows[1] - rows[0], 32)
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in plan)

    granite = read_config({**TINY, "model_type": "granite"}, "seed")
    router = Normal(std=0.0, seed=1)
    plan = {t.name: t for t in mix_plan(granite, tensors_of(granite), [1.0] * 2, router)}
    both = plan["model.layers.1.block_sparse_moe.input_linear.weight"]
    assert both.spec.shape == (2, 96, 32)
    assert both.op == Stack(
        parts=tuple(Copy(model=expert, name=f"model.layers.1.mlp.{name}_proj.weight")
                    for expert in range(2) for name in ("gate", "up")),
        shape=(48, 32),
    )  # fmt: skip
    assert plan["model.layers.1.block_sparse_moe.output_linear.weight"].spec.shape == (2, 32, 48)
    assert plan["model.layers.1.block_sparse_moe.router.layer.weight"].op == router


@pytest.mark.parametrize("model_type", FAMILIES)
def test_average_is_dense_and_keeps_weights(model_type):
    """An average has the seed's tensors, each a mean with the given weights."""
    dense = read_config({**TINY, "model_type": model_type}, "seed")
    plan = average_plan(dense, tensors_of(dense), [0.5, 0.25, 0.25])

    assert [t.name for t in plan] == list(dense.shapes())
    assert {t.op for t in plan} == {Mean(name=t.name, weights=(0.5, 0.25, 0.25)) for t in plan}


@pytest.mark.parametrize(("top_k", "active"), [(2, 11.067e9), (4, 19.724e9)])
def test_llama_2_7b_four_ways_has_the_papers_counts(top_k, active):
    """Identity 8: Top-2 runs 11.067 B parameters, soft routing 19.724 B (BTX Table 4)."""
    dense = read_config({"model_type": "llama", "rms_norm_eps": 1e-5}, "Llama-2-7b")

    assert count_parameters(dense).total == 6_738_415_616
    counts = count_parameters(dense, experts=4, top_k=top_k)
    assert counts.active == pytest.approx(active, abs=0.001e9)
    assert counts.total == pytest.approx(19.724e9, abs=0.001e9)


def test_mixer_imports_no_torch():
    """Preflight, average and mix start fast: the mixer loads neither torch nor transformers."""
    code = "import sys, btx_trainer.weights; print({'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
