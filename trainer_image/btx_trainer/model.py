"""Stock transformers models: load, save, freeze; the loss head that never holds all logits.

Attention and MLPs are never redefined here. Called by the stages train, finetune and evaluate,
by the loop, and by the demo's seed helper.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from btx_api.spec import Trainable
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.utils import logging as transformers_logging

from btx_trainer.distributed import whole
from btx_trainer.errors import ConfigurationError

IGNORED = -100
"""Label of a position that has no loss."""

LOGIT_ROWS, GPU_LOGITS = 512, 2**26
"""Of the loss head: so many rows of logits at once, on a GPU more where the vocabulary is small:
2048 of 32,000 make a step of a 1.1 B model 3 % shorter there (docs/gpu.md)."""

ExpertsImplementation = Literal["grouped_mm", "eager"]
"""batched_mm gathers the weights of one expert per token and slot: out of memory, or swapping."""


class _InAutocast:
    """A layer's experts as the grouped kernel reads them: weights in the dtype of autocast."""

    def __init__(self, experts: nn.Module, dtype: torch.dtype) -> None:
        self._experts, self._dtype = experts, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._experts, name)
        return value.to(self._dtype) if isinstance(value, Tensor) else value


def _grouped_experts(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """transformers' grouped_mm, which autocast does not know of (pytorch issue 174763).

    Left alone it follows the weights' dtype, that is fp32, for which a GPU has no such kernel.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        experts = _InAutocast(experts, torch.get_autocast_dtype(device))
    found: Tensor = grouped_mm_experts_forward(experts, hidden, index, weights)
    return found


_GROUPED = "grouped_mm_in_autocast"
ALL_EXPERTS_FUNCTIONS.register(_GROUPED, _grouped_experts)


@contextmanager
def _load_report() -> Iterator[list[str]]:
    # A table for stderr that ours, one line naming the tensors, replaces; but also the only place
    # where transformers names a tensor that it could not put together.
    report: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        report.append(record.getMessage())
        return False

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    transformers_logging.disable_progress_bar()
    try:
        yield report
    finally:
        logger.removeFilter(keep)


def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    experts_implementation: ExpertsImplementation = "grouped_mm",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """A model from a local folder in HF layout, on the CPU, every weight in `dtype`.

    Raises ConfigurationError naming missing, unexpected or misshapen tensors, or the bad file.
    """
    with _load_report() as report:
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are listed below, with the others
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            line = " ".join(str(error).split())
            if unfit := re.findall(r"^(\S+) +\| CONVERSION", "\n".join(report), re.MULTILINE):
                line = f"tensors that do not fit together: {', '.join(unfit)}"
            raise ConfigurationError(str(folder), f"cannot be loaded: {line}") from error
    model: PreTrainedModel = loaded[0]
    info: dict[str, Any] = loaded[1]
    for what in ("missing", "unexpected", "mismatched"):
        if keys := info[f"{what}_keys"]:
            names = sorted(key if isinstance(key, str) else key[0] for key in keys)
            raise ConfigurationError(str(folder), f"{what} tensors: {', '.join(names)}")
    for parameter in model.parameters():
        # Out of the memory-mapped file: its alignment changes the bits that grouped_mm gives.
        parameter.data = parameter.data.clone()
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        grouped = experts_implementation == "grouped_mm"
        model.set_experts_implementation(_GROUPED if grouped else experts_implementation)
    return model


def new_model(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """A model with random fp32 weights, drawn by the architecture's own init from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def save_model(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, *, main: bool = True
) -> list[str]:
    """Writes the model in HF layout, every tensor in `dtype`, routers too; returns the file names.

    Of several ranks all must call it, and the `main` one writes: it gathers tensor by tensor.

    The tensors have the family's names on disk, which for a Mixtral are one w1, w2 and w3 per
    expert. The same weights give the same bytes. The tokenizer is not written.
    """
    # A tied head is stored once: its copy in another dtype would no longer look tied.
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = {}
    for name, tensor in model.state_dict().items():
        all_rows = whole(tensor)
        if main and name not in tied:
            state[name] = all_rows.to("cpu", dtype) if tensor.is_floating_point() else all_rows
    if not main:
        return []
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    # It took the dtype of the master weights, and readers of a config believe it.
    stated = model.config.dtype
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    model.config.dtype = stated
    return sorted(path.name for path in folder.iterdir())


def forward_hidden(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """Final hidden states, after the last norm, [sequences, length, hidden]; no cache, no mask.

    The head's weight times them is the logits: a Granite divides those by `logits_scaling`, so it
    is divided out here.

    Packed documents cannot see each other if the positions of each start again at 0. A cache (on
    by default) or an attention mask would let them, without a warning (trainer.md 1.5).
    """
    output = model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    scaling = getattr(model.config, "logits_scaling", 1.0)
    return hidden if scaling == 1.0 else hidden / scaling


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihood (nats, fp32) and number of labels that count, both [].

    hidden [..., hidden size], weight of the head [vocabulary, hidden size], labels [...], each
    already the token to predict at its place or IGNORED. At most `chunk` rows of logits are alive;
    0: as many as suit the device.
    """
    targets = labels.reshape(-1)
    chunk = chunk or max(LOGIT_ROWS, GPU_LOGITS // len(weight) * weight.is_cuda)
    total: Tensor = _Nats.apply(  # type: ignore[no-untyped-call]  # torch has no type for it
        hidden.reshape(-1, hidden.shape[-1]), weight, targets, chunk, torch.is_grad_enabled()
    )
    return total, (targets != IGNORED).sum()


class _Nats(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk, when the logits are there.

    They are of the sum; the backward pass only scales them. No product is made twice.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them by position
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk: int, graph: bool
    ) -> Tensor:
        """rows [n, hidden size], weight [vocabulary, hidden size], targets [n] -> []."""
        device, want = rows.device.type, [graph and need for need in ctx.needs_input_grad[:2]]
        cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if cast else rows.dtype
        into = (
            torch.empty_like(rows) if want[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if want[1] else None,
        )
        total = rows.new_zeros((), dtype=torch.float32)
        # The casts are explicit: autocast would keep a weight that was cast without a graph.
        with torch.autocast(device, enabled=False):
            head = weight.to(dtype)
            for start in range(0, len(rows), chunk):
                part = slice(start, start + chunk)
                x, target = rows[part].to(dtype), targets[part]
                found = F.log_softmax(F.linear(x, head).float(), -1)
                total += F.nll_loss(found, target, ignore_index=IGNORED, reduction="sum")
                if any(want):
                    by_row = None if into[0] is None else into[0][part]
                    _add_gradients(found, x, head, target, (by_row, into[1]))
        ctx.save_for_backward(*into)
        ctx.dtypes = rows.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients times the slope of the sum."""
        scaled = (
            None if kept is None else (kept * slopes[0]).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None


def _add_gradients(
    log_probabilities: Tensor,
    x: Tensor,
    head: Tensor,
    target: Tensor,
    into: tuple[Tensor | None, Tensor | None],
) -> None:
    """Sets the gradient of a chunk's rows, adds to that of the weight; overwrites the first."""
    counts = (target != IGNORED)[:, None]
    place = target.clamp_min(0)[:, None]
    slope = log_probabilities.exp_()
    slope.scatter_(1, place, slope.gather(1, place) - 1)
    slope = slope.to(x.dtype)
    by_row, by_weight = into
    if by_row is not None:
        by_row.copy_(torch.mm(slope, head) * counts)
    if by_weight is None:
        return
    # A masked x is the cheapest way to leave rows out.
    x = x * counts
    if x.dtype == by_weight.dtype:
        by_weight.addmm_(slope.T, x)
    else:
        by_weight += torch.mm(slope.T, x).to(by_weight.dtype)


def is_expert(parameter: str) -> bool:
    """Whether it is one of the tensors that hold a layer's experts, by name in memory."""
    return ".experts." in parameter


def _trainable(name: str, scope: Trainable) -> bool:
    if scope is Trainable.ROUTER:
        return ".mlp.gate." in name or ".block_sparse_moe.router." in name
    return scope is Trainable.ALL or not is_expert(name)


def freeze(model: nn.Module, scope: Trainable) -> None:
    """Leaves the scope's parameters trainable: all, all but the experts, or the routers alone."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_trainable(name, scope))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters for AdamW: matrices (experts and routers too) decay, norms do not.

    The BTX paper states 0.1 and no exception; vectors are left out as is usual since Llama.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
