"""Every dense family through the whole graph: bf16 shards and BPE in, a stock MoE out."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import google_crc32c
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from btx_api.spec import Mix, Routing
from btx_trainer.families import Normal, mix_plan, read_config
from btx_trainer.model import forward_hidden, load_model
from btx_trainer.routing import install, rule_for
from btx_trainer.weights import LocalFolder, open_checkpoint, write_plan
from dense import TARGETS, write_dense
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM
from workspace import Workspace

VOCABULARY = 320
THETA = {"rope_theta": 12_345.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, **THETA}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **THETA,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, **THETA,
}  # fmt: skip
ODD: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3, "head_dim": 12, "tie_word_embeddings": True},
    "mistral": {"rope_parameters": YARN, "sliding_window": 48},
    "phi3": {"rope_parameters": {"rope_type": "default", **THETA}, "sliding_window": 48},
    "qwen3": {"rope_parameters": YARN, "attention_bias": True, "tie_word_embeddings": True},
    "qwen2": {"rope_parameters": LINEAR, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "olmo2": {"rope_parameters": LLAMA3, "attention_bias": True, "rms_norm_eps": 3e-5},
    "granite": {"rope_parameters": YARN, "tie_word_embeddings": True},
}
"""Fields that a target must take over, by family: none is its default."""
TRAINING = {
    "sequenceLength": 64, "batchTokens": 512, "precision": "fp32", "heldOutTokens": 512,
    "optimizer": {"lr": 0.001, "warmupSteps": 1},
}  # fmt: skip


def stories(number: int) -> list[str]:
    """Sentences of a small language."""
    draw = random.Random(number)
    who, what = ("the cat", "a dog", "my aunt", "the judge"), ("sees", "follows", "forgets")
    return [
        " ".join(f"{draw.choice(who)} {draw.choice(what)} {draw.choice(who)}." for _ in range(6))
        for _ in range(120)
    ]


def sums(number: int) -> list[str]:
    """Lines of arithmetic."""
    draw = random.Random(number)
    pairs = [[(draw.randrange(99), draw.randrange(99)) for _ in range(8)] for _ in range(120)]
    return ["\n".join(f"{a} + {b} = {a + b}" for a, b in lines) for lines in pairs]


def write_data(folder: Path) -> None:
    """Parquet, JSONL, and gzip of it."""
    folder.mkdir()
    table = pyarrow.table({"id": list(range(120)), "body": stories(1)})
    pyarrow.parquet.write_table(table, folder / "stories.parquet", row_group_size=50)
    lines = [json.dumps({"text": text}) for text in sums(2)]
    (folder / "sums.jsonl").write_text("\n".join(lines))
    mixed = [json.dumps({"text": text}) for pair in zip(stories(3), sums(4), strict=True)
             for text in pair]  # fmt: skip
    (folder / "general.jsonl.gz").write_bytes(gzip.compress("\n".join(mixed).encode(), mtime=0))


def trained_tokenizer() -> Tokenizer:
    """Byte-level BPE, of the test's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*stories(1), *sums(2)], trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def manifest(family: str) -> dict[str, Any]:
    """Two experts, one of them ready made, and the seed; few steps."""
    return {
        "apiVersion": "btx.dev/v1alpha1", "kind": "BTXRun", "metadata": {"name": family},
        "spec": {
            "storage": {"uri": "file://build/demo/storage"},
            "seed": {"uri": f"file://{family}/seed"},
            "general": [{"uri": "file://data/general.jsonl.gz"}],
            "experts": [
                {"name": "stories", "tokens": 2048,
                 "data": [{"uri": "file://data/*.parquet", "field": "body"}]},
                {"name": "sums", "model": f"file://{family}/ready",
                 "data": [{"uri": "file://data/sums.jsonl"}]},
            ],
            "prepare": {"heldOut": 0.1},
            "train": TRAINING,
            "finetune": {
                **TRAINING, "routing": {"k": 2, "init": "DomainMean"},
                "data": [{"tokens": 2048, "domains": {"stories": 1, "sums": 1, "general": 1}}],
            },
            "evaluate": {
                "tokens": 512, "sequenceLength": 64, "precision": "fp32",
                "domains": [{"name": "stories"}, {"name": "sums"}],
            },
            "policy": {"backoffSeconds": 0},
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Data, tokenizer, and one storage for all: each domain is prepared once."""
    folder = tmp_path_factory.mktemp("families") / "w"
    folder.mkdir()
    write_data(folder / "data")
    trained_tokenizer().save(str(folder / "tokenizer.json"))
    return Workspace(folder)


@pytest.fixture(scope="module")
def finished(workspace: Workspace) -> None:
    """A run for each family, all side by side; each has succeeded."""
    text = (workspace.folder / "tokenizer.json").read_text()
    for name, odd in ODD.items():
        for number, model in enumerate(("seed", "ready")):
            folder = write_dense(
                workspace.folder / name / model, name, number=number, dtype=torch.bfloat16,
                shard="25KB", vocab_size=VOCABULARY, **odd,
            )  # fmt: skip
            assert len(list(folder.glob("model-*.safetensors"))) > 1
            (folder / "tokenizer.json").write_text(text)
        (workspace.folder / f"{name}.yaml").write_text(yaml.safe_dump(manifest(name)))
    workspace.btx("run", *(f"{name}.yaml" for name in ODD))
    assert {name: workspace.status(name).state for name in ODD} == dict.fromkeys(ODD, "Succeeded")


@pytest.fixture(scope="module", params=list(ODD))
def family(request: pytest.FixtureRequest, finished: None) -> str:
    """The name of a family, and of its run."""
    return str(request.param)


def stock_model(folder: Path) -> torch.nn.Module:
    """Loaded by stock code, which finds all it looks for and nothing else."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="grouped_mm"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_stock_code_loads_the_final_model_and_agrees_with_ours(
    workspace: Workspace, family: str
) -> None:
    """fp32 logits within 1e-6 x max(5, max |logit|); the counts that preflight gave are true."""
    folder = workspace.artifact("finetune", family)
    stock = stock_model(folder)
    ours = load_model(folder).eval()
    install(ours, rule_for(Routing(k=2), 3, TARGETS[family]))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode("\n".join(stories(5) + sums(6))).ids[:100]])

    with torch.no_grad():
        theirs = stock(input_ids=ids, use_cache=False).logits
        hidden = forward_hidden(ours, ids, torch.arange(100)[None])
        mine = hidden @ ours.get_output_embeddings().weight.T

    assert (mine - theirs).abs().max().item() <= 1e-6 * max(5.0, theirs.abs().max().item())
    resolved = workspace.status(family).resolved
    assert resolved
    counts, sizes = resolved.parameters, {n: p.numel() for n, p in stock.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert counts.total == sum(sizes.values())
    assert counts.active == counts.total - experts // 3
    assert counts.dense == sum(
        tensor.numel() for tensor in read_weights(workspace.folder / family / "seed").values()
    )


def test_what_the_seeds_config_says_is_in_the_final_config(
    workspace: Workspace, family: str
) -> None:
    """Each odd value; and the seed's dtype on disk."""
    folder = workspace.artifact("finetune", family)
    seed = json.loads((workspace.folder / family / "seed/config.json").read_text())
    final = json.loads((folder / "config.json").read_text())

    assert final["model_type"] == TARGETS[family]
    assert {name: final[name] for name in ODD[family]} == ODD[family]
    assert final["head_dim"] == seed.get("head_dim", 32 // 4)
    for name in ("embedding_multiplier", "logits_scaling", "rms_norm_eps", "num_key_value_heads"):
        assert final.get(name) == seed.get(name)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert {opened.get_slice(name).get_dtype() for name in names} == {"BF16"}


def test_finetuning_moves_every_router_and_no_shared_expert(
    workspace: Workspace, family: str
) -> None:
    """What Qwen2-MoE needs beside the experts stays zero."""
    mixed, final = (
        read_weights(workspace.artifact(stage, family)) for stage in ("mix", "finetune")
    )

    assert mixed.keys() == final.keys()
    routers = [n for n in mixed if n.endswith((".gate.weight", ".router.layer.weight"))]
    assert len(routers) == 2
    assert not any(torch.equal(mixed[name], final[name]) for name in routers)
    shared = [name for name in mixed if ".shared_expert" in name]
    assert len(shared) == (8 if family == "qwen2" else 0)
    assert not any(final[name].any() for name in shared)


def test_mixing_again_gives_the_same_bytes(
    workspace: Workspace, family: str, tmp_path: Path
) -> None:
    """In another process, from the same models: file by file the checksums of the manifest."""
    folder = workspace.folder / family
    paths = [workspace.artifact("train-stories", family), folder / "ready", folder / "seed"]
    opened = [open_checkpoint(LocalFolder(path), path.name) for path in paths]
    dense = read_config(opened[-1].config, "seed")
    router = Normal(std=Mix().router_std, seed=Mix().random_seed)
    plan = mix_plan(dense, opened[-1].tensors, [1.0] * 3, router)

    names = write_plan(plan, opened, LocalFolder(tmp_path))

    told = workspace.checksums(family)["mix"]
    for name in names:
        checksum = google_crc32c.Checksum((tmp_path / name).read_bytes()).hexdigest().decode()
        assert told[name] == checksum
