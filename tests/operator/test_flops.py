"""What `btx plan` says a stage costs: counted by hand for a Llama-2 7B and its experts."""

from types import SimpleNamespace

from btx_api.methods import graph
from btx_api.spec import Scheduling
from btx_api.stage import Kind, Parameters, Resolved
from btx_api.status import Row, State, Status
from btx_operator.flops import cost, forward_flops, longest_chain, measured_rates
from builders import resolved_for, spec_of

# Llama-2 7B: 32 layers of 4096, SwiGLU 11008, 32,000 words, head not tied to the embedding.
EXPERT = 32 * 3 * 4096 * 11_008
DENSE = 2 * 32_000 * 4096 + 32 * (4 * 4096**2 + 2 * 4096) + 4096 + EXPERT
HEAD = 32_000 * 4096
SEVEN_B = Parameters(
    dense=DENSE, total=DENSE + 3 * EXPERT, active=DENSE + EXPERT, head=HEAD, embedding=HEAD,
    experts=2 * EXPERT, layers=32, hidden=4096,
)  # fmt: skip
SHORT = {"sequenceLength": 128, "batchTokens": 1024}


def costs(scheduling=None, **changes):
    """Cost per stage of the small spec with some blocks replaced."""
    spec, how = spec_of(**changes), scheduling or Scheduling()
    nodes = graph(spec, resolved_for(spec))
    return {name: cost(node.stage, SEVEN_B, how) for name, node in nodes.items()}


def test_forward_is_two_per_weight_and_the_full_square_of_attention():
    """A token of the 7B at 4096 costs 2 N + 4 L H T, the input embedding not multiplied."""
    assert DENSE == 6_738_415_616
    multiplied = DENSE - HEAD
    assert forward_flops(SEVEN_B, 4096, sparse=False) == 2 * multiplied + 4 * 32 * 4096 * 4096
    more = forward_flops(SEVEN_B, 4096, sparse=True) - forward_flops(SEVEN_B, 4096, sparse=False)
    assert more == 2 * EXPERT


def test_tokens_are_whole_steps():
    """400 tokens in batches of 128 are 4 steps and 512 tokens; stages without a model cost 0."""
    found = costs(train={"sequenceLength": 32, "batchTokens": 128})
    assert (found["train-code"].steps, found["train-code"].tokens) == (4, 512)
    assert found["mix"].flops == found["average"].flops == found["prepare-code"].flops == 0


def test_training_is_three_forwards_and_the_scores_again():
    """Per token 6 N + 12 L H T, and 2 L H T more; held-out losses."""
    block = {"sequenceLength": 4096, "batchTokens": 8192, "heldOutTokens": 1000}
    forward = forward_flops(SEVEN_B, 4096, sparse=False)
    again = 2 * 32 * 4096 * 4096
    found = costs(train=block)["train-code"]
    assert found.flops == 8192 * (3 * forward + again) + 2 * 1000 * forward


def test_a_batch_in_parts_needs_its_means_first():
    """One forward pass more but for the head; none without balancing loss, or in one part."""
    block = {**SHORT, "heldOutTokens": 0, "data": [{"tokens": 1, "domains": {"code": 1}}]}
    parts = Scheduling(micro_batch=7)
    whole, cut = (costs(how, finetune=block)["finetune"].flops for how in (None, parts))
    body = forward_flops(SEVEN_B, 128, sparse=True) - 2 * HEAD
    assert cut - whole == 1024 * body
    free = costs(parts, finetune={**block, "routing": {"alpha": 0}})["finetune"].flops
    assert free == whole


def test_frozen_weights_save_their_gradient():
    """Two of two experts save theirs; the router alone all, and the first layer's passing on."""
    flops = {
        scope: costs(finetune={**SHORT, "heldOutTokens": 0, "trainable": scope})["finetune"]
        for scope in ("All", "AllButExperts", "Router")
    }
    tokens = flops["All"].tokens
    assert flops["All"].flops - flops["AllButExperts"].flops == tokens * 2 * 2 * EXPERT
    body, attention = 2 * (DENSE + EXPERT - 2 * HEAD), 4 * 32 * 4096 * 128
    saved = 2 * HEAD + body + body / 32 + 2.5 * attention / 32
    assert flops["All"].flops - flops["Router"].flops == tokens * saved


def test_evaluation_runs_every_model_over_every_domain():
    """Four dense models and two sparse ones (mixed, final) over three domains, at most."""
    found = costs(evaluate={"tokens": 1000, "sequenceLength": 128})["evaluate"]
    dense, sparse = (forward_flops(SEVEN_B, 128, sparse=s) for s in (False, True))
    assert found.flops == (4 * dense + 2 * sparse) * 3 * 1000


SPEC = spec_of(train=SHORT, finetune=SHORT)
NODES = graph(SPEC, resolved_for(SPEC))


def past(name, created, seconds, **changes):
    """A run of this machine whose train-code took so long."""
    rows = tuple(
        Row(name=n, digest=node.stage.digest, state=State.COMPLETE, attempt=1,
            seconds=seconds if n == "train-code" else 0)
        for n, node in NODES.items()
    )  # fmt: skip
    resolved = resolved_for(SPEC, parameters=SEVEN_B)
    status = Status(stages=rows, resolved=resolved).model_copy(update=changes)
    return SimpleNamespace(name=name, uid="u", created=created, spec=SPEC, status=status)


def test_a_rate_is_what_the_latest_run_achieved():
    """FLOPs of its longest stage by its seconds; by kind; too short a stage tells nothing."""
    flops = cost(NODES["train-code"].stage, SEVEN_B, Scheduling()).flops
    rates = measured_rates([past("new", 2, 100), past("old", 1, 400), past("short", 3, 9)])
    assert set(rates) == {Kind.TRAIN}
    assert rates[Kind.TRAIN].flops_per_second == flops / 100
    assert rates[Kind.TRAIN].source == "train-code of run 'new' on this machine, 100 s"
    assert rates[Kind.TRAIN].hours(36 * flops) == 1


def test_runs_that_tell_nothing_give_no_rate():
    """Not resolved yet, of another spec than its rows, or reused from another run."""
    other = (Row(name="train-code", digest="x", state=State.COMPLETE, seconds=99),)
    for changes in ({"resolved": None}, {"stages": other}, {"resolved": Resolved()}):
        assert measured_rates([past("a", 1, 100, **changes)]) == {}


def test_the_longest_chain_follows_what_stages_need():
    """The dearer expert, then what both feed."""
    weight = {**dict.fromkeys(NODES, 0.0), "train-math": 2.0, "train-code": 1.0, "finetune": 1.0}
    chain = longest_chain(NODES, weight)
    assert chain == ["prepare-math", "train-math", "mix", "finetune", "evaluate"]
    assert longest_chain({}, {}) == []
