"""The mixer on real files: exact weights, stock loading, determinism, bounded memory, bad input.

The checker of the mixed weights shares no code with the mixer: it reads with the safetensors
library, knows the names by heart and averages in fp64 with torch; it is itself put to the test.
"""

import hashlib
import json
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from btx_trainer import numerics, weights
from btx_trainer.families import (
    Copy,
    Mean,
    Normal,
    Planned,
    Stack,
    TensorSpec,
    average_plan,
    check_dtypes,
    check_member,
    check_tensors,
    count_parameters,
    mix_plan,
    mixed_config,
    read_config,
)
from btx_trainer.weights import LocalFolder, WeightsError, open_checkpoint, write_plan
from dense import LAYERS, MULTIPLIERS, OWN, SIZES, TARGETS, write_dense
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROUTER = Normal(std=0.02, seed=7)


def make_model(path, family="llama", dtype="fp32", seed=0, **options):
    """A random dense model, norms and biases included, saved by stock transformers."""
    return write_dense(path, family, number=seed, dtype=DTYPES[dtype], **options)


def open_all(paths):
    """The seed's config and all checkpoints (seed last), checked as preflight does."""
    models = [open_checkpoint(LocalFolder(path), path.name) for path in paths]
    seed = models[-1]
    dense = read_config(seed.config, "seed")
    for model in models:
        check_tensors(dense, model.tensors, model.where)
        check_member(dense, read_config(model.config, model.where, dense), model.where)
        check_dtypes(seed.tensors, model.tensors, model.where)
    return dense, models


def write_model(out, plan, models, config, **options):
    names = write_plan(plan, models, LocalFolder(out), **options)
    (out / "config.json").write_text(json.dumps(config))
    return names


def mix(out, paths, *, top_k=2, router=ROUTER, change=lambda plan: plan, **options):
    """Mix the models at `paths`; `change` tampers with the plan."""
    dense, models = open_all(paths)
    tensors = models[-1].tensors
    plan = change(mix_plan(dense, tensors, [1.0] * len(models), router))
    config = mixed_config(dense, tensors, experts=len(models), top_k=top_k)
    write_model(out, plan, models, config, **options)
    return out


def raw(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def load(path):
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def exact_mean(tensors):
    return (sum(t.double() for t in tensors) / len(tensors)).to(tensors[0].dtype)


def unfused(model):
    """A dense model's tensors; Phi-3's fused ones cut into what they are made of, by heart."""
    found = {}
    for name, tensor in model.items():
        if "qkv_proj" in name:
            parts = zip("qkv", tensor.split([32, 16, 16]), strict=True)
            found |= {name.replace("qkv", letter): part for letter, part in parts}
        elif "gate_up_proj" in name:
            parts = zip(("gate", "up"), tensor.split([48, 48]), strict=True)
            found |= {name.replace("gate_up", word): part for word, part in parts}
        else:
            found[name] = tensor
    return found


def pop_experts(left, family, prefix, count):
    """Router, and name and value of every expert's gate, up and down, under their disk names."""
    block = f"{prefix}mlp" if family in ("qwen2", "qwen3", "olmo2") else f"{prefix}block_sparse_moe"
    if family == "granite":
        both, down = f"{block}.input_linear.weight", f"{block}.output_linear.weight"
        parts = zip(left.pop(both), left.pop(down), strict=True)
        router = left.pop(f"{block}.router.layer.weight")
        return router, [((both, gate_up[:48]), (both, gate_up[48:]), (down, last))
                        for gate_up, last in parts]  # fmt: skip
    names = ("gate_proj", "up_proj", "down_proj") if block.endswith("mlp") else ("w1", "w3", "w2")
    full = [[f"{block}.experts.{i}.{name}.weight" for name in names] for i in range(count)]
    experts = [[(name, left.pop(name)) for name in expert] for expert in full]
    return left.pop(f"{block}.gate.weight"), experts


def pop_shared_expert(left, prefix):
    """Qwen2-MoE has one beside the others: 64 wide, all zeros."""
    shared = f"{prefix}mlp.shared_expert"
    for name, shape in [
        (f"{shared}.gate_proj.weight", (64, 32)), (f"{shared}.up_proj.weight", (64, 32)),
        (f"{shared}.down_proj.weight", (32, 64)), (f"{shared}_gate.weight", (1, 32)),
    ]:  # fmt: skip
        tensor = left.pop(name)
        assert (tensor.shape, tensor.count_nonzero()) == (shape, 0), name


def assert_mixed(out, paths):
    """Every weight of the mix at `out` is what BTX makes of exactly the models at `paths`."""
    left, models = load(out), [unfused(load(path)) for path in paths]
    family = json.loads((paths[0] / "config.json").read_text())["model_type"]
    for name in models[0]:
        if ".mlp." not in name:
            assert torch.equal(left.pop(name), exact_mean([m[name] for m in models])), name
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        router, experts = pop_experts(left, family, prefix, len(models))
        assert router.shape == (len(models), SIZES["hidden_size"]), prefix
        for expert, model in zip(experts, models, strict=True):
            for (name, ours), source in zip(expert, ("gate", "up", "down"), strict=True):
                theirs = model[f"{prefix}mlp.{source}_proj.weight"]
                assert ours.dtype == theirs.dtype, name
                assert raw(ours) == raw(theirs), name
        if family == "qwen2":
            pop_shared_expert(left, prefix)
    assert not left, f"unexpected {[*left]}"


def stock(path, **options):
    """Load with stock transformers, refusing any missing, unexpected or reshaped key."""
    model, info = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.no_grad()
def logits(path, length=48, **options):
    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(5))
    return stock(path, **options)(tokens).logits


def assert_same_logits(actual, expected):
    """The tolerance wherever logits are compared (DESIGN.md section 5)."""
    allowed = 1e-6 * max(5.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= allowed


def digests(path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.iterdir()}


KINDS = [("llama", "fp16"), ("llama", "fp32"), *((family, "bf16") for family in OWN)]


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def paths(request, tmp_path_factory):
    """Four different random models of one family and dtype; the last is the seed."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
    return [make_model(folder / name, family, dtype, i)
            for i, name in enumerate(["code", "prose", "math", "seed"])]  # fmt: skip


@pytest.fixture(scope="session")
def three(tmp_path_factory):
    """Three different bf16 Llama models."""
    folder = tmp_path_factory.mktemp("three")
    return [make_model(folder / name, dtype="bf16", seed=i) for i, name in enumerate("abc")]


# What is in the mix.


def test_different_models_mix_exactly(paths, tmp_path):
    """Experts are bit-equal to their sources, all else is the fp64 mean of all models, cast once.

    Stock transformers loads it without a missing or unexpected key.
    """
    mix(tmp_path / "out", paths)

    assert_mixed(tmp_path / "out", paths)
    model = stock(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == TARGETS[paths[0].parent.name.split("-")[0]]
    dense, _ = open_all(paths)
    counts = count_parameters(dense, experts=4, top_k=2)
    assert counts.total == sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert counts.active == counts.total - experts // 2
    assert count_parameters(dense).total == sum(t.numel() for t in load(paths[0]).values())


def test_stock_saves_the_mix_under_the_names_it_has(paths, tmp_path):
    """What stock save_pretrained writes back has our names, our bytes and our config."""
    ours = mix(tmp_path / "ours", paths)
    dtype = load(ours)["model.norm.weight"].dtype
    model = AutoModelForCausalLM.from_pretrained(ours, dtype=dtype)
    model.save_pretrained(tmp_path / "theirs")

    mine, theirs = load(ours), load(tmp_path / "theirs")
    assert mine.keys() == theirs.keys()
    assert all(raw(mine[name]) == raw(theirs[name]) for name in mine)
    written = json.loads((ours / "config.json").read_text())
    again = json.loads((tmp_path / "theirs/config.json").read_text())
    # What stock derives from others, or calls by its other name.
    derived = {"sliding_window", "layer_types"} if "use_sliding_window" in written else set()
    names = (again.keys() & written.keys()) - derived
    assert {name: again[name] for name in names} == {name: written[name] for name in names}
    assert again.keys() - written.keys() <= {"transformers_version", "num_local_experts"}


def change_ops(change):
    """A tampering with a plan, from a function of one op to another."""

    def changed(op):
        if isinstance(op, Stack):
            return replace(op, parts=tuple(map(change, op.parts)))
        return change(op)

    return lambda plan: tuple(replace(tensor, op=changed(tensor.op)) for tensor in plan)


def drop_seed_from_means(op):
    return replace(op, weights=(1.0, 1.0, 1.0, 0.0)) if isinstance(op, Mean) else op


def permute_experts(op):
    return replace(op, model=(op.model + 1) % 4) if isinstance(op, Copy) else op


def swap_gate_and_up(op):
    if not isinstance(op, Copy):
        return op
    if "gate_up_proj" in op.name:
        return replace(op, rows={(0, 48): (48, 96), (48, 96): (0, 48)}[op.rows])
    swapped = op.name.replace("gate_proj", "x").replace("up_proj", "gate_proj")
    return replace(op, name=swapped.replace(".x.", ".up_proj."))


def attention_from_one(op):
    if isinstance(op, Mean) and "self_attn" in op.name:
        return Copy(model=3, name=op.name, rows=op.rows)
    return op


FIRST_EXPERT = r"experts\.0\.(w1|gate_proj)|input_linear"


@pytest.mark.parametrize(
    ("change", "at_fault"),
    [
        (drop_seed_from_means, "embed_tokens"),
        (permute_experts, FIRST_EXPERT),
        (swap_gate_and_up, FIRST_EXPERT),
        (attention_from_one, "self_attn"),
    ],
)
def test_checker_sees_a_wrong_mix(paths, tmp_path, change, at_fault):
    """The checker fails on a mix without the seed's share, with moved experts, or one attention."""
    mix(tmp_path / "out", paths, change=change_ops(change))

    with pytest.raises(AssertionError, match=at_fault):
        assert_mixed(tmp_path / "out", paths)


def test_checker_sees_a_missing_seed_and_a_flipped_byte(paths, tmp_path):
    """The checker fails when the seed is left out of the mix, or one byte of a file differs."""
    mix(tmp_path / "less", paths[:3])
    with pytest.raises(AssertionError):
        assert_mixed(tmp_path / "less", paths)

    file = mix(tmp_path / "out", paths) / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(AssertionError):
        assert_mixed(tmp_path / "out", paths)


@pytest.mark.parametrize("shares", [(1.0, 1.0, 1.0, 1.0), (0.125, 0.5, 0.25, 0.125)])
def test_average_is_the_exact_mean(paths, tmp_path, shares):
    """A uniform or weighted average equals the fp64 mean, cast once, and stock loads it."""
    dense, models = open_all(paths)
    plan = average_plan(dense, models[-1].tensors, shares)
    write_model(tmp_path, plan, models, models[-1].config)

    sources = [load(path) for path in paths]
    for name, tensor in load(tmp_path).items():
        total = sum(s[name].double() * share for s, share in zip(sources, shares, strict=True))
        assert torch.equal(tensor, (total / sum(shares)).to(tensor.dtype)), name
    stock(tmp_path)


def test_random_router_depends_on_seed_and_name_alone(three, tmp_path):
    """The router is normal with the given deviation, other per layer and seed; 0 gives zeros."""
    names = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    first, second = (load(mix(tmp_path / "a", three * 10))[name].float() for name in names)

    assert 0.018 < first.std() < 0.022
    assert abs(first.mean()) < 0.003
    assert not torch.equal(first, second)
    other = load(mix(tmp_path / "b", three * 10, router=Normal(std=0.02, seed=8)))
    assert not torch.equal(first, other[names[0]].float())
    zero = load(mix(tmp_path / "c", three, router=Normal(std=0.0, seed=7)))
    assert not zero[names[0]].any()


# Identities of methods.md section 8.


@torch.no_grad()
def assert_same_function(path, out, length=48):
    """Stock dense against stock target: Top-1, Top-2 and soft, in both implementations."""
    tokens = torch.randint(0, 64, (2, length), generator=torch.Generator().manual_seed(5))
    expected = stock(path)(tokens).logits
    for implementation in ("grouped_mm", "eager"):
        model = stock(out, experts_implementation=implementation)
        routers = [m for m in model.modules() if hasattr(m, "top_k")]
        assert len(routers) >= LAYERS
        for top_k in (1, 2, 3):
            for router in routers:
                router.top_k = top_k
            assert_same_logits(model(tokens).logits, expected)


@pytest.mark.parametrize("family", OWN)
@pytest.mark.parametrize("std", [0.0, 0.02, 1.0])
def test_identical_models_mix_to_the_same_function(tmp_path, family, std):
    """Identity 1: N copies of a model give its logits, with any router, Top-k and soft."""
    path = make_model(tmp_path / "seed", family)
    mix(tmp_path / "out", [path] * 3, router=Normal(std=std, seed=3))

    assert_same_function(path, tmp_path / "out")


def bits(dtype, stored):
    """Every bf16 or fp16 pattern, or many fp32 ones; finite, the sum of three finite too."""
    if stored.itemsize == 2:
        patterns = np.arange(2**16, dtype=np.uint16)
    else:
        patterns = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = torch.from_numpy(patterns).view(DTYPES[dtype]).clone()
    values[~(values.double().abs() < torch.finfo(values.dtype).max / 4)] = -0.0
    return values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", [(1, 1, 1), (0.2, 0.3, 0.5), (1, 0, 2)], ids=str)
def test_identical_tensors_average_bit_exactly(tmp_path, dtype, shares):
    """Identity 6: the mean of N = 3 identical tensors has their bits, fp32 and -0.0 included."""
    tensor = bits(dtype, torch.empty(1, dtype=DTYPES[dtype]))
    save_file({"t": tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    # Three openings: one object thrice would be read once and copied.
    models = [open_checkpoint(LocalFolder(tmp_path), name) for name in "abc"]
    spec = models[0].tensors["t"]
    plan = (Planned(name="t", spec=spec, op=Mean(name="t", weights=shares)),)
    write_plan(plan, models, LocalFolder(tmp_path / "out"))

    assert raw(load(tmp_path / "out")["t"]) == raw(tensor)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_cast_rounds_to_nearest_even(dtype):
    """The one cast agrees with torch's on ties, neighbours of ties, infinities and zeros."""
    size = 2**18
    values = np.random.default_rng(1).normal(size=size).astype(np.float32)
    low = 13 if dtype == "fp16" else 16
    patterns = values.view(np.uint32) & np.uint32(2**32 - 2**low)
    patterns[: size // 2] |= np.uint32(2 ** (low - 1))
    patterns[: size // 4] += np.tile(np.array([1, 2**32 - 1], np.uint32), size // 8)
    values = patterns.view(np.float32)
    values[-3:] = (np.inf, -np.inf, -0.0)

    ours = numerics.narrow(values, {"bf16": "BF16", "fp16": "F16"}[dtype])

    assert ours.tobytes() == raw(torch.from_numpy(values).to(DTYPES[dtype]))


@pytest.mark.parametrize("family", OWN)
def test_tied_embeddings_stay_tied(tmp_path, family):
    """Identity 7: the flag is kept, no lm_head is written, stock ties the two on loading."""
    paths = [make_model(tmp_path / str(i), family, seed=i, tie_word_embeddings=True)
             for i in range(3)]  # fmt: skip
    mix(tmp_path / "out", paths)

    assert_mixed(tmp_path / "out", paths)
    assert not any("lm_head" in name for name in load(tmp_path / "out"))
    model = stock(tmp_path / "out")
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


THETA = {"rope_theta": 5e5}
PLAIN = {"rope_parameters": {"rope_type": "default", **THETA}}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, **THETA}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "factor": 4.0,
            "long_factor": [2.0, 3.0, 5.0, 9.0], "original_max_position_embeddings": 32,
            **THETA}  # fmt: skip
SCALED = [{"rope_type": "linear", "factor": 4.0, **THETA}, LLAMA3, YARN]
ODD = [
    *((f, {"rope_parameters": {"rope_type": "default", "rope_theta": 12345.0}}, PLAIN)
      for f in OWN),
    *((f, {"rope_parameters": rope}, PLAIN) for f in OWN for rope in SCALED if f != "phi3"),
    ("llama", {"rope_parameters": LONGROPE}, PLAIN),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA},
               "max_position_embeddings": 32}, PLAIN),
    *((f, {"head_dim": 16}, {"head_dim": 8}) for f in OWN),
    *((f, {"num_key_value_heads": 1}, {"num_key_value_heads": 2}) for f in OWN),
    *((f, {"rms_norm_eps": 3e-3}, {"rms_norm_eps": 1e-5}) for f in OWN),
    *((f, {"attention_bias": True}, {"attention_bias": False})
      for f in ("qwen3", "olmo2", "granite")),
    ("qwen2", {}, {"qkv_bias": False}),
    *((f, {"sliding_window": 32}, {"sliding_window": None}) for f in ("mistral", "phi3")),
    ("mistral", {"sliding_window": None}, {"sliding_window": 32}),
    *(("granite", {name: 0.37}, {name: 1.0}) for name in MULTIPLIERS),
]  # fmt: skip
"""(family, odd fields, what the target must not have instead)."""


@pytest.mark.parametrize(("family", "odd", "plain"), ODD, ids=str)
def test_odd_config_values_are_carried_and_matter(tmp_path, family, odd, plain):
    """The mix of identical models keeps the logits of an odd config; `plain` would change them."""
    path = make_model(tmp_path / "seed", family, **odd)
    out = mix(tmp_path / "out", [path] * 3, router=Normal(std=1.0, seed=3))

    assert_same_function(path, out, length=64)
    config = json.loads((out / "config.json").read_text()) | plain
    config = {name: value for name, value in config.items() if name != "rope_theta"}
    (out / "config.json").write_text(json.dumps(config))
    # Either the shapes no longer fit, or the logits are others.
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same_function(path, out, length=64)


def test_config_of_old_files_is_read(tmp_path):
    """A config with rope_theta and torch_dtype, as before transformers 5, mixes alike."""
    path = make_model(tmp_path / "seed", rope_parameters=LLAMA3)
    expected = logits(path)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope,
               "torch_dtype": config.pop("dtype")}  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))

    assert_same_logits(logits(mix(tmp_path / "out", [path] * 2)), expected)


# Files: shards, determinism, memory.


def test_same_inputs_give_the_same_bytes(three, tmp_path):
    """Two mixes of the same models have the same sha256, file by file."""
    assert digests(mix(tmp_path / "a", three)) == digests(mix(tmp_path / "b", three))


@pytest.mark.parametrize("shard_bytes", [1, 10_000, 60_000])
def test_shards_do_not_change_tensors(three, tmp_path, shard_bytes):
    """Any shard size gives the same tensors, router included, and an index that stock reads."""
    whole = load(mix(tmp_path / "whole", three))
    out = mix(tmp_path / "out", three, shard_bytes=shard_bytes)

    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 1
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    sharded = load(out)
    assert sharded.keys() == whole.keys()
    assert all(raw(sharded[name]) == raw(whole[name]) for name in whole)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for file in files:
        held = load_file(file)
        assert held.keys() == {n for n, f in index["weight_map"].items() if f == file.name}
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
    stock(out)


def test_sharded_inputs_give_the_same_bytes(three, tmp_path):
    """Sources in several files with an index mix to the same file as sources in one."""
    sharded = [make_model(tmp_path / path.name, dtype="bf16", seed=i, shard="20KB")
               for i, path in enumerate(three)]  # fmt: skip
    assert len([*sharded[0].glob("*.safetensors")]) > 1

    assert digests(mix(tmp_path / "out1", sharded)) == digests(mix(tmp_path / "out2", three))


def test_pieces_do_not_change_bytes(paths, tmp_path, monkeypatch):
    """Tensors cut into many pieces and blocks, with ragged ends, give the same bytes."""
    mix(tmp_path / "a", paths)
    monkeypatch.setattr(weights, "PIECE_BYTES", 1000)
    monkeypatch.setattr(numerics, "BLOCK_BYTES", 128)

    assert digests(mix(tmp_path / "b", paths)) == digests(tmp_path / "a")


def test_mixed_dtypes_stay_aligned_and_exact(tmp_path):
    """A model with fp32 norms keeps each tensor's dtype; wide tensors come first in a file."""
    paths = [make_model(tmp_path / str(i), dtype="bf16", seed=i) for i in range(2)]
    for path in paths:
        tensors = {k: v.float() if "norm" in k else v for k, v in load(path).items()}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    out = mix(tmp_path / "out", paths)

    assert_mixed(out, paths)
    assert load(out)["model.norm.weight"].dtype == torch.float32
    stored = open_checkpoint(LocalFolder(out), "out").stored.values()
    in_file = [tensor.spec.dtype for tensor in sorted(stored, key=lambda tensor: tensor.start)]
    assert in_file == sorted(in_file, key=["F32", "BF16"].index)
    assert all(tensor.start % 4 == 0 for tensor in stored if tensor.spec.dtype == "F32")


def test_memory_is_bounded_by_pieces(tmp_path, monkeypatch):
    """A mean and a copy of a 16 MB tensor need a few pieces of memory, not a tensor."""
    big = torch.arange(4 * 2**20, dtype=torch.float32)
    save_file({"t": big}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    models = [open_checkpoint(LocalFolder(tmp_path), str(i)) for i in range(8)]
    spec = models[0].tensors["t"]
    plan = (
        Planned(name="mean", spec=spec, op=Mean(name="t", weights=(1.0,) * 8)),
        Planned(name="copy", spec=spec, op=Copy(model=2, name="t")),
    )
    monkeypatch.setattr(weights, "PIECE_BYTES", 2**18)
    tracemalloc.start()
    write_plan(plan, models, LocalFolder(tmp_path / "out"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 4 * 2**20
    assert all(torch.equal(t, big) for t in load(tmp_path / "out").values())


# Bad input.


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def safetensors(header, data=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 7, "7 bytes are too few for a safetensors file"),
        (b"\xff" * 16, "header of 18446744073709551615 bytes does not fit a file of 16 bytes"),
        (safetensors(b"{nonsense"), "header: not valid JSON"),
        (safetensors(b"[]"), "header: not a JSON object"),
        (safetensors(b'{"t": 1, "t": 2}'), "a name occurs twice"),
        (safetensors({"t": entry()})[:-1], "88 bytes, but the data ends at 89 with tensor t"),
        (safetensors({"t": entry()}) + b"\0", "90 bytes, but the data ends at 89"),
        (safetensors({"t": entry(offsets=(0, 12))}, b"\0" * 12),
         "tensor t: offsets [0, 12] do not hold F32 [2, 2] (16 bytes)"),
        (safetensors({"t": entry(offsets=(-4, 12))}), "tensor t: offsets [-4, 12] do not hold"),
        (safetensors({"t": entry(), "u": entry(offsets=(8, 24))}, b"\0" * 24),
         "tensor u overlaps t"),
        (safetensors({"t": entry(), "u": entry(offsets=(20, 36))}, b"\0" * 36),
         "tensor u leaves a gap after t"),
        (safetensors({"t": entry(dtype="I64", shape=(2,))}),
         "tensor t: dtype I64 is not supported (supported: BF16, F16, F32)"),
        (safetensors({"t": entry(shape=(-2, -2))}), "tensor t: bad shape [-2, -2]"),
        (safetensors({"t": [1, 2]}), "tensor t: bad header entry [1, 2]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_file_is_refused(tmp_path, content, message):
    """A file that is not sound safetensors is refused in one line naming file and tensor."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(WeightsError) as caught:
        open_checkpoint(LocalFolder(tmp_path), "experts.code")

    assert str(caught.value).startswith("experts.code model.safetensors")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_incomplete_folder_is_refused(three, tmp_path):
    """A missing config, weight file, shard, or tensor of the index is named."""

    def refusal(path):
        with pytest.raises(WeightsError) as caught:
            open_checkpoint(LocalFolder(path), "code")
        return str(caught.value)

    assert refusal(tmp_path) == "code config.json: no such file"
    (tmp_path / "config.json").write_text("{}")
    assert refusal(tmp_path) == (
        "code: neither model.safetensors nor model.safetensors.index.json exists"
    )
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"t": "../escape.safetensors"}}')
    assert "weight_map is not an object of file names" in refusal(tmp_path)
    index.write_text('{"weight_map": {"t": "part.safetensors"}}')
    assert refusal(tmp_path) == "code part.safetensors: no such file"
    save_file({"u": torch.zeros(2)}, tmp_path / "part.safetensors")
    assert refusal(tmp_path).startswith("code part.safetensors: tensor t is missing")


def test_source_unlike_the_plan_is_refused_before_writing(three, tmp_path):
    """A source tensor that is absent, reshaped or retyped stops the mix before any file exists."""
    dense, models = open_all(three)
    plan = mix_plan(dense, models[-1].tensors, [1.0] * 3, ROUTER)
    name = "model.layers.1.mlp.up_proj.weight"
    good = models[1].stored[name]

    def refusal(stored):
        bad = replace(models[1], stored=stored)
        with pytest.raises(WeightsError) as caught:
            write_plan(plan, [models[0], bad, models[2]], LocalFolder(tmp_path / "out"))
        return str(caught.value)

    without = {key: value for key, value in models[1].stored.items() if key != name}
    assert refusal(without) == f"b: tensor {name} is missing"
    for spec, words in [
        (TensorSpec(dtype="BF16", shape=(32, 48)), "BF16 [32, 48]"),
        (TensorSpec(dtype="F16", shape=(48, 32)), "F16 [48, 32]"),
    ]:
        message = refusal({**models[1].stored, name: replace(good, spec=spec)})
        assert message == (
            f"b model.safetensors: tensor {name} is {words}, the plan has BF16 [48, 32]"
        )
    assert not (tmp_path / "out").exists()


def test_file_cut_while_mixing_leaves_nothing_behind(three, tmp_path):
    """A source that shrinks after its header was read is an error; no output file has a name."""
    paths = [shutil.copytree(path, tmp_path / path.name) for path in three]
    dense, models = open_all(paths)
    plan = mix_plan(dense, models[-1].tensors, [1.0] * 3, ROUTER)
    file = paths[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])

    with pytest.raises(WeightsError, match=r"^b model.safetensors: tensor \S+: file is truncated"):
        write_plan(plan, models, LocalFolder(tmp_path / "out"))

    assert not list((tmp_path / "out").iterdir())
