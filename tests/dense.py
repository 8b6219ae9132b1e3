"""A small random model of every dense family that can be mixed, and the target it becomes.

For tests: the sizes show what is confused (grouped heads, more FFN than hidden), every parameter
is random, norms and biases too, and the fields that only one family has are odd.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tiny import SMALL
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY, LAYERS = 64, 2
SIZES: dict[str, Any] = SMALL | {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
    "logits_scaling": 0.6,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "phi3": {},
    "qwen3": {"head_dim": 12},
    "qwen2": {},
    "olmo2": {},
    "granite": MULTIPLIERS,
}
"""Each family's own fields."""
TARGETS = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "phi3": "mixtral",
    "qwen3": "qwen3_moe",
    "qwen2": "qwen2_moe",
    "olmo2": "flex_olmo",
    "granite": "granitemoe",
}


def dense_config(family: str, **changes: Any) -> PreTrainedConfig:
    """The stock config of a small model."""
    # Stock fills in the rope's dict where it is.
    return AutoConfig.for_model(family, **deepcopy(SIZES | OWN[family] | changes))


def moe_config(target: str, experts: int, **changes: Any) -> PreTrainedConfig:
    """The stock config of a small Mixture-of-Experts, as the mixer would set it."""
    wide = {"shared_expert_intermediate_size": 64, "moe_intermediate_size": 48}
    own: dict[str, Any] = {
        "mixtral": {},
        "granitemoe": MULTIPLIERS,
        "qwen2_moe": {"norm_topk_prob": True, **wide},
        "qwen3_moe": {"norm_topk_prob": True, "head_dim": 12, "moe_intermediate_size": 48},
        "flex_olmo": {"norm_topk_prob": True},
    }
    count = "num_local_experts" if target in ("mixtral", "granitemoe") else "num_experts"
    sizes = SIZES | {"num_experts_per_tok": 2, count: experts}
    return AutoConfig.for_model(target, **deepcopy(sizes | own[target] | changes))


def write_dense(
    folder: Path,
    family: str = "llama",
    *,
    number: int = 0,
    dtype: torch.dtype = torch.float32,
    shard: str = "1GB",
    **changes: Any,
) -> Path:
    """Model number `number` of a family, saved by stock transformers; returns the folder."""
    model = AutoModelForCausalLM.from_config(dense_config(family, **changes))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(float("norm" in name), 0.1, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder
