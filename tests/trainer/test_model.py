"""Loading, saving, packing, the chunked loss head and freezing, on tiny stock models."""

import json

import pytest
import torch
from btx_api.spec import Routing, Trainable
from btx_trainer import routing
from btx_trainer.errors import ConfigurationError
from btx_trainer.model import (
    IGNORED,
    chunked_cross_entropy,
    forward_hidden,
    freeze,
    is_expert,
    load_model,
    new_model,
    parameter_groups,
    save_model,
)
from dense import LAYERS, OWN, TARGETS, VOCABULARY, dense_config, moe_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

EXPERTS, WINDOW = 4, 6
MOES = sorted(set(TARGETS.values()))
FAMILIES = {
    **{family: dense_config(family) for family in OWN},
    "llama, tied": dense_config("llama", tie_word_embeddings=True),
    "mistral, window": dense_config("mistral", sliding_window=WINDOW),
    "phi3, window": dense_config("phi3", sliding_window=WINDOW),
    **{target: moe_config(target, EXPERTS) for target in MOES},
    "mixtral, window": moe_config("mixtral", EXPERTS, sliding_window=WINDOW),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens(length, seed=0):
    """A random document."""
    return torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def packed_inputs(documents):
    """One sequence of several documents: input ids, and positions that start again at 0."""
    return torch.cat(documents)[None], torch.cat([torch.arange(len(d)) for d in documents])[None]


def tolerance(logits):
    """The largest difference of logits that counts as equal (DESIGN.md section 5)."""
    return 1e-6 * max(5.0, logits.abs().max().item())


@pytest.fixture
def saved(tmp_path):
    """A folder with a small Mixtral in it."""
    save_model(new_model(FAMILIES["mixtral"], 0), tmp_path, torch.float32)
    return tmp_path


def rewrite(folder, change):
    """Applies `change` to the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@every_family
def test_what_was_saved_is_loaded_bit_for_bit(tmp_path, family):
    """Every parameter comes back, in fp32, and so do the logits."""
    model = new_model(FAMILIES[family], 0)
    save_model(model, tmp_path, torch.float32)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    ids, positions = packed_inputs([tokens(20)])
    assert torch.equal(
        forward_hidden(loaded, ids, positions), forward_hidden(model, ids, positions)
    )


def test_loaded_weights_are_aligned_and_their_own(saved):
    """No parameter is a view of the file: each starts at 64 bytes and owns its storage."""
    (saved / "model.safetensors").rename(saved / "whole.safetensors")
    # An odd header length is what moves tensors off alignment.
    save_file(load_file(saved / "whole.safetensors"), saved / "model.safetensors", {"x": "y" * 13})
    (saved / "whole.safetensors").unlink()
    parameters = list(load_model(saved).parameters())
    assert all(p.data_ptr() % 64 == 0 for p in parameters)
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in parameters)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing tensors: model.norm.weight"),
        (lambda t: t.pop("lm_head.weight"), "missing tensors: lm_head.weight"),
        (lambda t: t.update(extra=torch.zeros(2)), "unexpected tensors: extra"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(31)}),
            "mismatched tensors: model.norm.weight",
        ),
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"),
            "model.layers.1.mlp.experts.gate_up_proj",
        ),
        (
            lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"),
            "missing tensors: model.layers.1.mlp.gate.weight",
        ),
    ],
)
def test_wrong_tensors_are_an_error_naming_them(saved, change, words):
    """Missing, unexpected and misshapen tensors, single experts too, are refused in one line."""
    rewrite(saved, change)
    with pytest.raises(ConfigurationError) as error:
        load_model(saved)
    assert words in str(error.value)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["truncated", "gone", "config"])
def test_a_broken_folder_is_an_error_naming_it(saved, damage):
    """A truncated file, no file and a broken config are refused in one line."""
    weights = saved / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "gone":
        weights.unlink()
    else:
        (saved / "config.json").write_text("{")
    with pytest.raises(ConfigurationError) as error:
        load_model(saved)
    assert str(error.value).startswith(f"{saved}: cannot be loaded: ")
    assert "\n" not in str(error.value)


def test_a_mixtral_has_the_names_that_other_tools_read(saved):
    """On disk there is one w1, w2 and w3 per expert and a gate per layer, nothing fused."""
    names = set(load_file(saved / "model.safetensors"))
    moe = {name for name in names if "block_sparse_moe" in name}
    assert moe == {
        f"model.layers.{layer}.block_sparse_moe.{part}.weight"
        for layer in range(LAYERS)
        for part in ["gate", *(f"experts.{e}.w{w}" for e in range(EXPERTS) for w in (1, 2, 3))]
    }
    assert not any(".mlp." in name for name in names)


def test_files_have_the_dtype_asked_for_and_the_same_bytes_every_time(tmp_path):
    """Two saves in bf16 are equal byte for byte, and config and tensors, routers too, say bf16."""
    model = new_model(FAMILIES["mixtral"], 0)
    routing.install(model, routing.TopK(EXPERTS, 2))
    files = save_model(model, tmp_path / "a", torch.bfloat16)
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    assert save_model(model, tmp_path / "b", torch.bfloat16) == files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_tied_head_is_written_once(tmp_path):
    """A model with tied embeddings has no lm_head on disk and is tied when it comes back."""
    save_model(new_model(FAMILIES["llama, tied"], 0), tmp_path, torch.float32)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("method", ["TopK 2", "TopK 3", "Soft"])
@pytest.mark.parametrize("target", MOES)
def test_stock_code_gives_our_logits(tmp_path, target, method, implementation):
    """Exported means that the stock model, loaded by stock code, agrees with our inference."""
    name, _, k = method.partition(" ")
    asked = Routing(method=name, **({"k": int(k)} if k else {}))
    rule = routing.rule_for(asked, EXPERTS, target)
    # As a config that somebody else wrote may have it: the rule's export must say otherwise.
    config = moe_config(target, EXPERTS, num_experts_per_tok=1)
    if hasattr(config, "norm_topk_prob"):
        config.norm_topk_prob = False
    save_model(new_model(config, 0), tmp_path / "mixed", torch.float32)
    ours = load_model(tmp_path / "mixed", experts_implementation=implementation).eval()
    routing.install(ours, rule)
    save_model(ours, tmp_path / "final", torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "final", dtype=torch.float32, experts_implementation=implementation
    )
    ids, positions = packed_inputs([tokens(50)])
    with torch.no_grad():
        expected = stock(ids, use_cache=False).logits
        logits = ours.lm_head(forward_hidden(ours, ids, positions))
    assert (logits - expected).abs().max() <= tolerance(expected)


class Products(TorchDispatchMode):
    """Notes the dtypes of every grouped product's operands."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:
            self.dtypes += [args[0].dtype, args[1].dtype]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("target", MOES)
def test_experts_multiply_in_the_dtype_of_autocast(tmp_path, target):
    """Forward and backward; fp32 would be many times slower on a GPU. Gradients stay fp32."""
    save_model(new_model(FAMILIES[target], 0), tmp_path, torch.float32)
    ids, positions = packed_inputs([tokens(40)])
    hidden = {}
    for implementation in ("grouped_mm", "eager"):
        model = load_model(tmp_path, experts_implementation=implementation)
        with Products() as seen:
            with torch.autocast("cpu", torch.bfloat16):
                hidden[implementation] = forward_hidden(model, ids, positions)
            hidden[implementation].float().square().sum().backward()
        # A layer has two products, and each of them two more on the way back.
        grouped = implementation == "grouped_mm"
        assert seen.dtypes == [torch.bfloat16] * (12 * LAYERS if grouped else 0)
        experts = [(n, p) for n, p in model.named_parameters() if is_expert(n)]
        assert experts
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for _, p in experts)
    torch.testing.assert_close(hidden["grouped_mm"], hidden["eager"], atol=0.05, rtol=0.05)


def test_a_new_model_is_a_function_of_config_and_seed():
    """The seed decides the weights, and the caller's random numbers go on as before."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, same, other = (new_model(FAMILIES["llama"], seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    weight = first.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, same.model.layers[0].mlp.up_proj.weight)
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_cannot_see_each_other(family, attention):
    """Packed equals one by one, past the window too; without fresh positions the check fails."""
    model = new_model(FAMILIES[family], 0)
    model.set_attn_implementation(attention)
    documents = [tokens(length, seed) for seed, length in enumerate([9, 1, 17, 14])]
    with torch.no_grad():
        head = model.get_output_embeddings()
        ids, positions = packed_inputs(documents)
        packed = head(forward_hidden(model, ids, positions))
        apart = [head(forward_hidden(model, *packed_inputs([document]))) for document in documents]
        leaking = head(forward_hidden(model, ids, torch.arange(packed.shape[1])[None]))
    apart = torch.cat(apart, dim=1)
    assert (packed - apart).abs().max() <= 1e-5
    assert (leaking - apart).abs().max() > 0.1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_cross_entropy_is_the_plain_one(tied, chunk):
    """Value, count and gradients equal those of all logits at once, ignored labels left out."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, 32, generator=generator)
    ids = torch.randint(0, VOCABULARY, (2, 16), generator=generator)
    labels = ids.roll(-1, 1)
    labels[:, -1] = IGNORED
    labels[0, 3:6] = IGNORED

    def gradients(loss_of):
        embedding, head = table.clone().requires_grad_(), table.clone().requires_grad_()
        hidden = torch.tanh(embedding[ids])
        hidden.retain_grad()
        loss = loss_of(hidden, embedding if tied else head)
        loss.backward()
        return [loss.detach(), hidden.grad, embedding.grad, *([] if tied else [head.grad])]

    def plain(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()) * 28

    def chunked(hidden, weight):
        total, count = chunked_cross_entropy(hidden, weight, labels, chunk)
        assert count == 32 - 5
        return total

    def mean(hidden, weight):
        return plain(hidden, weight) * 27 / 28

    for ours, theirs in zip(gradients(chunked), gradients(mean), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_frozen_head_costs_no_gradient_and_an_evaluation_no_graph():
    """The rows' gradient is the same with the head frozen, and the loss is without gradients."""
    hidden, weight = torch.randn(9, 32, requires_grad=True), torch.randn(VOCABULARY, 32)
    labels = torch.arange(9)
    total, _ = chunked_cross_entropy(hidden, weight, labels, chunk=4)
    (3 * total).backward()
    plain = 3 * F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain, hidden)[0])
    assert weight.grad is None
    with torch.no_grad():
        assert torch.equal(chunked_cross_entropy(hidden, weight, labels, chunk=4)[0], total)
        assert not chunked_cross_entropy(hidden, weight, labels)[0].requires_grad


def test_no_logits_outlive_their_chunk():
    """Between forward and backward nothing as wide as the vocabulary is kept but the head."""
    hidden = torch.randn(40, 32, requires_grad=True)
    weight = torch.randn(VOCABULARY, 32, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = chunked_cross_entropy(hidden, weight, torch.zeros(40).long(), chunk=8)
        F.cross_entropy(hidden @ weight.T, torch.zeros(40).long())
    plain = [shape for shape in kept if shape == (40, VOCABULARY)]
    assert plain  # the hooks do see the logits of the plain loss
    assert (8, VOCABULARY) not in kept
    total.backward()
    assert hidden.grad.abs().sum() > 0


def test_bf16_logits_are_summed_in_fp32():
    """Under autocast the logits are bf16 products, and their loss is fp32."""
    hidden, weight = torch.randn(40, 32), torch.randn(VOCABULARY, 32)
    labels = torch.zeros(40).long()
    with torch.autocast("cpu", torch.bfloat16):
        total, _ = chunked_cross_entropy(hidden, weight, labels)
    assert total.dtype is torch.float32
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    torch.testing.assert_close(total, F.cross_entropy(logits, labels, reduction="sum"))


@pytest.mark.parametrize("target", MOES)
@pytest.mark.parametrize("scope", Trainable)
def test_frozen_tensors_stay_bit_identical(scope, target):
    """Identity 11: AdamW with weight decay changes what is in the scope and nothing else."""
    model = new_model(FAMILIES[target], 0)
    routing.install(model, routing.TopK(EXPERTS, 2))
    freeze(model, scope)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=0.1)
    ids, positions = packed_inputs([tokens(40)])
    hidden = forward_hidden(model, ids, positions)
    chunked_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])[0].backward()
    optimizer.step()
    changed = {
        name for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    router = "block_sparse_moe.router" if target == "granitemoe" else "mlp.gate"
    routers = {name for name in before if name.endswith(f".{router}.weight")}
    block = router.split(".", maxsplit=1)[0]
    experts = {name for name in before if f".{block}.experts." in name}
    assert len(routers) == LAYERS
    assert len(experts) == 2 * LAYERS
    assert (
        changed
        == {
            Trainable.ALL: set(before),
            Trainable.ALL_BUT_EXPERTS: set(before) - experts,
            Trainable.ROUTER: routers,
        }[scope]
    )


def test_matrices_decay_and_norms_do_not():
    """Each parameter is in one group; only vectors are spared, experts and routers are not."""
    model = new_model(FAMILIES["mixtral"], 0)
    decayed, spared = parameter_groups(model, weight_decay=0.1)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names.pop(id(p)) for p in spared["params"]} == {
        "model.norm.weight",
        *(f"model.layers.{layer}.{norm}.weight" for layer in range(LAYERS)
          for norm in ("input_layernorm", "post_attention_layernorm")),
    }  # fmt: skip
    assert {id(p) for p in decayed["params"]} == set(names)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
