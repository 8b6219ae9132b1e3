"""Routing rules, the balancing loss, load statistics and the router's init, on tiny Mixtrals."""

import copy
import json

import pytest
import torch
from btx_api.spec import Routing, RoutingMethod
from btx_trainer import routing
from btx_trainer.errors import ConfigurationError
from btx_trainer.families import Normal, mix_plan, mixed_config, read_config
from btx_trainer.model import chunked_cross_entropy, forward_hidden, load_model, new_model
from btx_trainer.weights import LocalFolder, open_checkpoint, write_plan
from dense import OWN, TARGETS, VOCABULARY, dense_config, moe_config, write_dense
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

EXPERTS, LAYERS, LENGTH = 4, 3, 24
every_target = pytest.mark.parametrize("target", sorted(set(TARGETS.values())))


def moe(k=2, seed=0, experts_implementation="grouped_mm", target="mixtral"):
    """A random MoE in training mode, a Mixtral unless told otherwise."""
    config = moe_config(target, EXPERTS, num_hidden_layers=LAYERS, num_experts_per_tok=k)
    config._experts_implementation = experts_implementation
    return new_model(config, seed).train()


def tokens(sequences=2, seed=1, low=0, high=VOCABULARY):
    """Random input ids and their positions."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (sequences, LENGTH), generator=generator)
    return ids, torch.arange(LENGTH).expand(sequences, -1)


def language_loss(model, ids, positions):
    """Mean loss of predicting the next token."""
    hidden = forward_hidden(model, ids, positions)
    nll, count = chunked_cross_entropy(hidden[:, :-1], model.lm_head.weight, ids[:, 1:])
    return nll / count


def logits_of(model, ids, positions):
    """All logits, by the stock head."""
    return model.lm_head(forward_hidden(model, ids, positions))


def tolerance(logits):
    """The largest difference of logits that counts as equal (DESIGN.md section 5)."""
    return 1e-6 * max(5.0, logits.abs().max().item())


def gate_gradients(model):
    """The gradient of every router's weight."""
    return torch.stack([gate.weight.grad.clone() for gate in routing.routers(model)])


def layer_of(weights, experts, probabilities):
    """One layer's routing from nested lists."""
    return routing.LayerRouting(
        torch.tensor(weights), torch.tensor(experts), torch.tensor(probabilities)
    )


def balanced_layer():
    """Four tokens, two experts each, every expert as often as every other."""
    experts = [[0, 1], [1, 2], [2, 3], [3, 0]]
    return layer_of([[0.5, 0.5]] * 4, experts, [[0.25] * 4] * 4)


def test_topk_is_the_softmax_over_the_kept_logits():
    """TopK's weights are the full softmax renormalised over the k largest, in Mixtral's order."""
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    gates = routing.TopK(6, 3).infer(logits)
    best = logits.softmax(-1).topk(3, -1)
    assert torch.equal(gates.experts, best.indices)
    torch.testing.assert_close(gates.weights, best.values / best.values.sum(-1, keepdim=True))


def test_soft_weighs_every_expert_by_the_full_softmax():
    """Soft's weights, put in the order of the experts, are the softmax itself."""
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    gates = routing.rule_for(Routing(method=RoutingMethod.SOFT), 6, "mixtral").infer(logits)
    weights = torch.zeros(50, 6).scatter(-1, gates.experts, gates.weights)
    torch.testing.assert_close(weights, logits.softmax(-1))


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (1, "finetune.routing.k: 1 with TopK gives the router no gradient; "
            "use method Switch or SampleTop1"),
        (5, "finetune.routing.k: 5 is more than the 4 experts"),
    ],
)  # fmt: skip
def test_a_bad_k_is_refused_naming_the_field(k, message):
    """TopK refuses k = 1 and more than there are experts, in one line."""
    with pytest.raises(ConfigurationError) as error:
        routing.TopK(EXPERTS, k)
    assert str(error.value) == message


def test_a_model_without_routers_is_refused():
    """A rule cannot be installed in a dense model."""
    dense = new_model(dense_config("llama", num_hidden_layers=LAYERS), 0)
    with pytest.raises(ConfigurationError, match=r"llama: .* no router"):
        routing.install(dense, routing.TopK(EXPERTS, 2))


def test_export_gives_stock_fields_or_the_reason():
    """TopK and Soft export as stock top-k, renormalised; another family gets a sentence."""
    assert routing.TopK(EXPERTS, 3).export("mixtral") == {"num_experts_per_tok": 3}
    assert routing.Soft(EXPERTS).export("granitemoe") == {"num_experts_per_tok": EXPERTS}
    for family in ("qwen2_moe", "qwen3_moe", "flex_olmo"):
        fields = routing.Soft(EXPERTS).export(family)
        assert fields == {"num_experts_per_tok": EXPERTS, "norm_topk_prob": True}
    assert "no stock router" in routing.TopK(EXPERTS, 3).export("phimoe")


def test_experts_that_rounding_ties_are_chosen_as_stock_chooses():
    """Granite compares logits, which differ where their probabilities no longer do."""
    logits = torch.tensor([[0.1, 0.1, 0.1, 9.0], [0.1, 0.1, 0.1, 9.0]])
    logits[0, 2] = torch.nextafter(logits[0, 2], torch.tensor(1.0))
    logits[1, 1] = torch.nextafter(logits[1, 1], torch.tensor(1.0))
    config = moe_config("granitemoe", EXPERTS, hidden_size=EXPERTS)
    stock = GraniteMoeTopKRouter(config)
    stock.weight.data = torch.eye(EXPERTS)

    chosen = stock(logits)[2]
    assert chosen.tolist() == [[3, 2], [3, 1]]
    asked = Routing(method=RoutingMethod.TOP_K, k=2)
    by_logits = routing.rule_for(asked, EXPERTS, "granitemoe")
    assert torch.equal(by_logits.infer(logits).experts, chosen)
    by_probability = routing.rule_for(asked, EXPERTS, "mixtral")
    assert not torch.equal(by_probability.infer(logits).experts, chosen)


@every_target
def test_installing_changes_no_parameter_and_removing_gives_stock_back(target):
    """Names, weights and logits survive install and remove, and the config follows the rule."""
    model = moe(k=3, target=target)
    stock = {name: type(module) for name, module in model.named_modules()}
    assert routing.count_experts(model) == EXPERTS
    ids, positions = tokens()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits_of(model, ids, positions)
    model.config.num_experts_per_tok = 2
    routing.install(model, routing.TopK(EXPERTS, 3))
    assert model.config.num_experts_per_tok == 3
    ours = logits_of(model, ids, positions)
    assert len(routing.routers(model)) == LAYERS
    assert routing.count_experts(model) == EXPERTS
    routing.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == stock
    assert torch.equal(logits_of(model, ids, positions), expected)
    assert (ours - expected).abs().max() <= tolerance(expected)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class OneByStep:
    """A rule of its own for each step in training, and expert 0 for inference."""

    num_experts = EXPERTS

    def gate(self, logits, step):
        """Every token to the expert whose number is the step."""
        experts = step.expand(logits.shape[0], 1)
        return routing.Gates(logits.new_ones(experts.shape), experts)

    def infer(self, logits):
        """Every token to expert 0."""
        return self.gate(logits, torch.tensor(0))

    def export(self, family):
        """Nothing that stock could run."""
        return "no stock router knows the step"


def test_training_gates_by_step_and_inference_does_not():
    """In training the rule is told the step; in evaluation its inference form runs."""
    model = moe()
    routing.install(model, OneByStep())
    chosen = []
    for training in (True, False):
        model.train(training)
        with routing.record(model, step=3) as layers:
            forward_hidden(model, *tokens())
        chosen.append({layer.experts.unique().item() for layer in layers})
    assert chosen == [{3}, {0}]
    assert model.config.num_experts_per_tok == 2


def test_the_router_is_fp32_under_autocast():
    """Logits come from fp32 products of what entered, though everything else is bf16."""
    model = moe()
    routing.install(model, routing.TopK(EXPERTS, 2))
    gate = routing.routers(model)[0]
    hidden = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = gate(hidden)
    assert torch.equal(logits, hidden.float() @ gate.weight.T)
    assert weights.dtype is torch.float32


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("method", ["TopK", "Soft"])
@pytest.mark.parametrize("family", OWN)
def test_identical_experts_give_the_seeds_logits(tmp_path, family, method, implementation):
    """Identity 1: N copies of one model route to that model, whatever the router says."""
    seed = write_dense(tmp_path / "seed", family)
    checkpoint = open_checkpoint(LocalFolder(seed), "seed")
    dense = read_config(checkpoint.config, "seed")
    plan = mix_plan(dense, checkpoint.tensors, [1.0] * EXPERTS, Normal(std=1.0, seed=2))
    write_plan(plan, [checkpoint] * EXPERTS, LocalFolder(tmp_path / "mixed"))
    config = mixed_config(dense, checkpoint.tensors, experts=EXPERTS, top_k=2)
    (tmp_path / "mixed/config.json").write_text(json.dumps(config))

    mixed = load_model(tmp_path / "mixed", experts_implementation=implementation).eval()
    rule = routing.rule_for(Routing(method=method), EXPERTS, config["model_type"])
    routing.install(mixed, rule)
    ids, positions = tokens()
    expected = load_model(seed)(ids, use_cache=False).logits
    assert (logits_of(mixed, ids, positions) - expected).abs().max() <= tolerance(expected)


def test_balanced_layers_give_alpha_each_and_hard_counts_would_not():
    """Identity 5: L layers at balance give L alpha; counting slots instead gives k times that."""
    terms = routing.balance_terms([balanced_layer()] * LAYERS)
    assert routing.balancing_loss(terms, 0.01).item() == pytest.approx(LAYERS * 0.01, rel=1e-6)
    counts = routing.slot_counts([balanced_layer()] * LAYERS)[0].float()
    hard = routing.BalanceTerms(sum_u=counts, sum_p=terms.sum_p, count=terms.count)
    assert routing.balancing_loss(hard, 0.01).item() == pytest.approx(2 * LAYERS * 0.01, rel=1e-6)


def test_collapse_of_each_layer_onto_another_expert_is_seen():
    """Ours is N times the balanced value; stock's pooled loss calls the same collapse balanced."""
    router_logits = tuple(
        torch.nn.functional.one_hot(torch.full((16,), layer), EXPERTS) * 30.0
        for layer in range(EXPERTS)
    )
    assert load_balancing_loss_func(router_logits, EXPERTS, 1).item() == pytest.approx(1.0)
    rule = routing.TopK(EXPERTS, 2)
    layers = [routing.LayerRouting(*rule.infer(it), it.softmax(-1)) for it in router_logits]
    loss = routing.balancing_loss(routing.balance_terms(layers), 0.01).item()
    assert loss == pytest.approx(EXPERTS * EXPERTS * 0.01, rel=1e-4)


def test_collapse_under_soft_is_seen_and_has_a_gradient():
    """Every token goes to every expert there: by counts of slots nothing could ever be wrong."""
    logits = torch.zeros(16, EXPERTS)
    logits[:, 0] = 3.0
    logits.requires_grad_()
    layer = routing.LayerRouting(*routing.Soft(EXPERTS).infer(logits), logits.softmax(-1))
    terms = routing.balance_terms([layer])
    share = layer.probabilities[0].square().sum().item()
    loss = routing.balancing_loss(terms, 0.01)
    assert loss.item() == pytest.approx(0.01 * EXPERTS * share, rel=1e-5)
    assert loss.item() > 1.5 * 0.01
    (slope,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert slope[:, 0].min() > 1e-5, "less for the expert that has it all"
    counts = routing.slot_counts([layer])[0].float() / EXPERTS
    hard = routing.balancing_loss(
        routing.BalanceTerms(sum_u=counts, sum_p=terms.sum_p, count=terms.count), 0.01
    )
    assert hard.item() == pytest.approx(0.01, rel=1e-5)
    assert torch.autograd.grad(hard, logits)[0].abs().max() < 1e-9


def test_padding_is_left_out():
    """Terms and counts of a batch with masked tokens are those of the other tokens alone."""
    model = moe()
    routing.install(model, routing.TopK(EXPERTS, 2))
    ids, positions = tokens(sequences=3)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[2] = False
    with routing.record(model) as padded:
        forward_hidden(model, ids, positions)
    with routing.record(model) as bare:
        forward_hidden(model, ids[:2], positions[:2])
    ours, theirs = routing.balance_terms(padded, mask), routing.balance_terms(bare)
    torch.testing.assert_close(ours.sum_u, theirs.sum_u)
    torch.testing.assert_close(ours.sum_p, theirs.sum_p)
    assert ours.count == 2 * LENGTH
    groups = mask.long() - 1
    assert torch.equal(routing.slot_counts(padded, groups), routing.slot_counts(bare))


@pytest.mark.parametrize("freed", ["u and p", "u only"])
def test_accumulated_gradients_equal_the_full_batch(freed):
    """Micro-batches on two ranks, of unequal token counts, sum to the whole batch's gradient.

    The second case drops the part through p and must fail: both factors carry gradient.
    """
    model = moe()
    routing.install(model, routing.TopK(EXPERTS, 2))
    ids, positions = tokens(sequences=6)
    mask = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.8

    def terms(rows):
        with routing.record(model) as layers:
            forward_hidden(model, ids[rows], positions[rows])
        return routing.balance_terms(layers, mask[rows])

    whole = routing.balancing_loss(terms(slice(None)), 0.01)
    whole.backward()
    expected = gate_gradients(model)
    model.zero_grad()

    micro_batches = [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)]
    with torch.no_grad():
        first = terms(micro_batches[0]) + terms(micro_batches[1])
        second = terms(micro_batches[2]) + terms(micro_batches[3])
    other = []
    second.all_reduced(other.append)
    constants = first.all_reduced(lambda flat: flat.add_(other[0]))
    value = 0.0
    for rows in micro_batches:
        part = terms(rows)
        if freed == "u only":
            part = routing.BalanceTerms(
                sum_u=part.sum_u, sum_p=part.sum_p.detach(), count=part.count
            )
        share = routing.balancing_share(part, constants, 0.01)
        share.backward()
        value += share.item()
    assert value == pytest.approx(whole.item(), rel=1e-5)
    difference = (gate_gradients(model) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5 if freed == "u and p" else difference > 1e-2


def test_checkpointing_keeps_the_balancing_gradient_and_no_graph():
    """Recomputed layers give the same gate gradients, and stash nothing while they recompute."""
    gradients = []
    for checkpointed in (False, True):
        model = moe()
        routing.install(model, routing.TopK(EXPERTS, 2))
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ids, positions = tokens()
        with routing.record(model) as layers:
            language = language_loss(model, ids, positions)
        (language * 0 + routing.balancing_loss(routing.balance_terms(layers), 1.0)).backward()
        gradients.append(gate_gradients(model))
        assert [gate.stash for gate in routing.routers(model)] == [None] * LAYERS
    assert gradients[0].abs().amax(dim=(1, 2)).min() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0])


@every_target
def test_both_losses_reach_every_router_with_two_experts_per_token(target):
    """TopK with k = 2 trains its router; stock with k = 1 does not, and balancing is finite."""
    model = moe(k=1, target=target)
    language_loss(model, *tokens()).backward()
    alone = [gate.weight.grad.norm().item() for gate in routing._stock_routers(model)]
    assert len(alone) == LAYERS
    assert max(alone) < 1e-6
    model.zero_grad()

    routing.install(model, routing.TopK(EXPERTS, 2))
    with routing.record(model) as layers:
        language = language_loss(model, *tokens())
    language.backward(retain_graph=True)
    assert gate_gradients(model).norm(dim=(1, 2)).min() > 1e-3
    model.zero_grad()
    balance = routing.balancing_loss(routing.balance_terms(layers), 0.01)
    assert 0.01 * LAYERS < balance.item() < 0.01 * LAYERS * EXPERTS
    balance.backward()
    assert gate_gradients(model).norm(dim=(1, 2)).min() > 1e-5


def test_a_shared_expert_of_zeros_stays_zero():
    """Qwen2-MoE's extra expert computes 0, gets no gradient, and decay leaves 0 as it is."""
    model = moe(target="qwen2_moe")
    shared = {name: p for name, p in model.named_parameters() if ".shared_expert" in name}
    assert len(shared) == 4 * LAYERS
    with torch.no_grad():
        for parameter in shared.values():
            parameter.zero_()
    routing.install(model, routing.TopK(EXPERTS, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(2):
        optimizer.zero_grad()
        language_loss(model, *tokens(seed=seed)).backward()
        optimizer.step()
    assert {name: p.count_nonzero().item() for name, p in shared.items()} == dict.fromkeys(
        shared, 0
    )


def expert_gradients(model):
    """Whether each expert got any gradient, [layers, experts]."""
    return torch.stack([
        layer.mlp.experts.gate_up_proj.grad.abs().amax(dim=(1, 2))
        + layer.mlp.experts.down_proj.grad.abs().amax(dim=(1, 2))
        for layer in model.model.layers
    ])  # fmt: skip


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
def test_soft_feeds_every_expert_and_top2_leaves_a_dead_one_untouched(implementation):
    """Identity 12: under Top-2 a dead expert's and its router row's gradients are exactly zero."""
    model = moe(experts_implementation=implementation)
    ids, positions = tokens(sequences=1)
    ids = ids[:, :1].repeat(1, LENGTH)  # one token over and over: a constant to steer by
    routing.install(model, routing.Soft(EXPERTS))
    language_loss(model, ids, positions).backward()
    assert (expert_gradients(model) > 0).all()

    model.zero_grad()
    routing.install(model, routing.TopK(EXPERTS, 2))
    with routing.record(model) as layers:
        language_loss(model, ids, positions).backward()
    counts = routing.slot_counts(layers)[0]
    dead = counts == 0
    assert dead.any(dim=1).all()
    assert torch.equal(expert_gradients(model) == 0, dead)
    assert torch.equal(gate_gradients(model).abs().amax(-1) == 0, dead)


def test_slots_are_counted_by_group_of_tokens():
    """Each domain's assignments are its own; shares follow."""
    layers = [balanced_layer(), layer_of([[0.9, 0.1]] * 4, [[2, 0]] * 4, [[0.25] * 4] * 4)]
    counts = routing.slot_counts(layers, torch.tensor([0, 1, 1, -1]), 2)
    assert counts.tolist() == [
        [[1, 1, 0, 0], [1, 0, 1, 0]],
        [[0, 1, 2, 1], [2, 0, 2, 0]],
    ]
    load = routing.shares(counts)
    assert load[1, 0].tolist() == [0, 0.25, 0.5, 0.25]
    empty = routing.shares(routing.slot_counts(layers, torch.full((4,), -1)))
    assert empty.sum() == 0


def test_an_expert_dies_after_the_window_and_comes_back_at_once():
    """Only a full window of steps below a tenth of an even load counts; each change tells once."""
    detector = routing.DeadExperts(window=3)
    even, low = [[0.25] * 4] * 2, [[0.25] * 4, [0.024, 0.026, 0.45, 0.5]]
    events = []
    for step, load in enumerate([low, low, even, low, low, low, low, even, even]):
        events += detector.update(step, load)
    assert events == [(5, 1, 0, True), (7, 1, 0, False)]


def test_the_detectors_state_survives_a_checkpoint():
    """A detector restored from JSON goes on as if nothing had happened."""
    low = [[0.0, 0.5, 0.5]]
    first = routing.DeadExperts(window=3)
    assert first.update(0, low) + first.update(1, low) == []
    second = routing.DeadExperts(window=3)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.update(2, low) == [routing.ExpertEvent(2, 0, 0, True)]


def domain_batches(skip=()):
    """Three domains of disjoint vocabularies, the second of one word; two batches each."""
    return [
        (expert, [tokens(seed=10 * expert + i, low=low, high=high) for i in range(2)])
        for expert, (low, high) in enumerate([(0, 40), (40, 41), (41, 60)])
        if expert not in skip
    ]


def domain_router(model, skip=()):
    """The router weights that the init gives, [layers, experts, hidden]."""
    routing.install(model, routing.TopK(EXPERTS, 2))
    routing.init_domain_mean(model, domain_batches(skip))
    return torch.stack([gate.weight.detach().clone() for gate in routing.routers(model)])


@every_target
def test_each_domains_mean_token_gets_its_own_expert(target):
    """After the init the mean router input of a domain has its expert on top in every layer.

    All tokens share a large part here, as hidden states do, and a domain of one word has more
    of it than a varied one: that must not favour an expert.
    """
    model = moe(target=target)
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.randn(
            32, generator=torch.Generator().manual_seed(3)
        )
    weight = domain_router(model).double()
    logits = []
    for expert, batches in domain_batches():
        for gate in routing.routers(model):
            gate.rule = routing._Always(EXPERTS, expert)
        mean, _ = routing._router_inputs(model, batches)
        logits.append(torch.einsum("leh,lh->le", weight, mean))
    assert [it.argmax(-1).tolist() for it in logits] == [[i] * LAYERS for i in range(3)]
    assert weight[:, 3].abs().max() == 0


def test_the_init_is_a_function_of_experts_and_data_alone():
    """It repeats bit for bit, does not depend on the old router, and leaves the rule in place."""
    first, second = moe(), moe()
    with torch.no_grad():
        for layer in second.model.layers:
            layer.mlp.gate.weight.normal_(generator=torch.Generator().manual_seed(9))
    assert torch.equal(domain_router(first), domain_router(second))
    assert {gate.rule for gate in routing.routers(first)} == {routing.TopK(EXPERTS, 2)}


def first_logits(model):
    """What the first layer's router says of random tokens, [tokens, experts]."""
    kept = []
    hook = routing.routers(model)[0].register_forward_hook(lambda *call: kept.append(call[2][0]))
    forward_hidden(model, *tokens(high=60))
    hook.remove()
    return kept[0]


def test_the_inits_logits_are_of_order_one_whatever_the_norms_scale():
    """A norm ten times as large gives the same logits in the layer behind it."""
    spreads = []
    for scale in (1.0, 10.0):
        model = moe()
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight.mul_(scale)
        domain_router(model)
        spreads.append(first_logits(model).std().item())
    assert spreads[1] == pytest.approx(spreads[0], rel=1e-4)
    assert 0.3 < spreads[0] < 3


def test_one_domain_is_not_enough():
    """Without two domains there is nothing to tell apart."""
    model = moe()
    with pytest.raises(ConfigurationError, match=r"finetune.routing.init: .* at least two"):
        domain_router(model, skip=(0, 1))


def test_a_copied_model_keeps_its_rule():
    """Deep copies route alike, so a model can be compared with its own past."""
    model = moe()
    routing.install(model, routing.Soft(EXPERTS))
    ids, positions = tokens()
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin, ids, positions), logits_of(model, ids, positions))
