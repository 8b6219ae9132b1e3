"""The family table against stock transformers, refusals, the order of a plan, counts."""

import dataclasses
import json
import subprocess
import sys
from copy import deepcopy

import pytest
from btx_trainer.families import (
    FAMILIES,
    METADATA,
    Copy,
    FamilyError,
    Mean,
    Normal,
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
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig

STOCK = {"llama": LlamaConfig, "mistral": MistralConfig}
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


def own_fields(cls):
    inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in inherited}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_table_knows_every_field_of_the_stock_class(model_type):
    """Each field of the stock dense config is known, and carried fields have its default."""
    family = FAMILIES[model_type]
    for name, default in own_fields(STOCK[model_type]).items():
        if name in family.defaults:
            assert family.defaults[name] == default, name
        elif name in family.required:
            assert family.required[name] == default, name
        else:
            assert name in METADATA or name == "rope_parameters", name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nothing_is_left_to_the_targets_default(model_type):
    """Every field of the stock target config is written out."""
    config = mixed({"model_type": model_type, "rope_theta": 12345.0})

    assert own_fields(MixtralConfig).keys() <= config.keys()
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["model_type"] == "mixtral"
    assert config["dtype"] == "bfloat16"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
    assert (config["output_router_logits"], config["router_jitter_noise"]) == (False, 0.0)


CONFIGS = [
    {"model_type": "llama"},
    {"model_type": "mistral"},
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
    dense = STOCK[config["model_type"]](**deepcopy(config))  # stock fills the rope dict in place
    dense.rope_parameters.pop("type", None)  # the old name, kept by stock beside the new one
    target = MixtralConfig(**mixed(config))

    shared = (own_fields(MixtralConfig).keys() & own_fields(type(dense))) - {"use_cache"}
    assert len(shared) >= 17
    for name in shared:
        assert getattr(target, name) == getattr(dense, name), name
    assert target.sliding_window == getattr(dense, "sliding_window", None)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_config_saved_again_by_stock_is_no_difference(config):
    """A member trained from the seed has the config that stock wrote: known, and the same."""
    stock = STOCK[config["model_type"]](**deepcopy(config))
    saved = json.loads(stock.to_json_string())

    check_member(read_config(config, "seed"), read_config(saved, "member"), "member")


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"model_type": "gemma2"}, "model_type",
         "seed config.json: model_type 'gemma2' is not supported (supported: llama, mistral)"),
        ({"model_type": None}, "model_type", "model_type None is not supported"),
        ({"query_pre_attn_scalar": 7}, "query_pre_attn_scalar", "'query_pre_attn_scalar' is unkn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "unknown for model_type 'llama'"),
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
    ],
    ids=str,
)  # fmt: skip
def test_member_with_another_architecture_is_refused(change, field, message):
    """A member that differs from the seed is refused naming the first field and both values."""
    seed = read_config(TINY, "seed")
    member = read_config({**TINY, **change}, "experts.code")

    with pytest.raises(FamilyError) as caught:
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


def test_average_is_dense_and_keeps_weights():
    """An average has the seed's tensors, each a mean with the given weights."""
    dense = read_config(TINY, "seed")
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
