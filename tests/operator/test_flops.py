"""What `btx plan` says a stage costs: counted by hand for a Llama-2 7B and its experts."""

from btx_api.methods import graph
from btx_api.stage import Parameters
from btx_operator.flops import cost, forward_flops
from builders import resolved_for, spec_of

# Llama-2 7B: 32 layers of 4096, SwiGLU 11008, 32,000 words, head not tied to the embedding.
EXPERT = 32 * 3 * 4096 * 11_008
DENSE = 2 * 32_000 * 4096 + 32 * (4 * 4096**2 + 2 * 4096) + 4096 + EXPERT
SEVEN_B = Parameters(
    dense=DENSE, total=DENSE + 3 * EXPERT, active=DENSE + EXPERT, head=32_000 * 4096,
    layers=32, hidden=4096,
)  # fmt: skip


def costs(**changes):
    """Cost per stage of the small spec with a sequence of 4096 and some blocks replaced."""
    spec = spec_of(**changes)
    return {n: cost(node.stage, SEVEN_B) for n, node in graph(spec, resolved_for(spec)).items()}


def test_forward_is_two_per_weight_and_the_full_square_of_attention():
    """A token of the 7B at 4096 costs 2 N + 4 L H T, the input embedding not multiplied."""
    assert DENSE == 6_738_415_616
    multiplied = DENSE - 32_000 * 4096
    assert forward_flops(SEVEN_B, 4096, sparse=False) == 2 * multiplied + 4 * 32 * 4096 * 4096
    more = forward_flops(SEVEN_B, 4096, sparse=True) - forward_flops(SEVEN_B, 4096, sparse=False)
    assert more == 2 * EXPERT


def test_tokens_are_whole_steps():
    """400 tokens in batches of 128 are 4 steps and 512 tokens; stages without a model cost 0."""
    found = costs(train={"sequenceLength": 32, "batchTokens": 128})
    assert (found["train-code"].steps, found["train-code"].tokens) == (4, 512)
    assert found["mix"].flops == found["average"].flops == found["prepare-code"].flops == 0


def test_training_is_three_forwards_and_held_out_losses_one_each():
    """6 N + 12 L H T per trained token, and two measurements of the own domain."""
    block = {"sequenceLength": 4096, "batchTokens": 8192, "heldOutTokens": 1000}
    forward = forward_flops(SEVEN_B, 4096, sparse=False)
    found = costs(train=block)["train-code"]
    assert found.flops == 8192 * 3 * forward + 2 * 1000 * forward


def test_frozen_weights_save_their_gradient():
    """The router alone saves every weight's gradient; freezing two of two experts saves theirs."""
    flops = {
        scope: costs(finetune={"heldOutTokens": 0, "trainable": scope})["finetune"]
        for scope in ("All", "AllButExperts", "Router")
    }
    tokens = flops["All"].tokens
    assert flops["All"].flops - flops["AllButExperts"].flops == tokens * 2 * 2 * EXPERT
    saved = DENSE + EXPERT - SEVEN_B.head
    assert flops["All"].flops - flops["Router"].flops == tokens * 2 * saved


def test_evaluation_runs_every_model_over_every_domain():
    """Four dense models and two sparse ones (mixed, final) over three domains, at most."""
    found = costs(evaluate={"tokens": 1000, "sequenceLength": 128})["evaluate"]
    dense, sparse = (forward_flops(SEVEN_B, 128, sparse=s) for s in (False, True))
    assert found.flops == (4 * dense + 2 * sparse) * 3 * 1000
