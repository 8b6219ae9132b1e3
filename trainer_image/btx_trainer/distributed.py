"""Where a stage computes and how: device, threads, precision, reproducibility, and its ranks.

Called by the stages that run a model, once, before they load it; by __main__ in a rank. With one
rank nothing here touches the model. With several each holds a part of the rows of every parameter
(FSDP2, block by block), and whoever runs the model does it through `forward`.
"""

import ctypes
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from btx_api.spec import Precision, Scheduling
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from btx_trainer.errors import ConfigurationError
from btx_trainer.ranks import Place, Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")


class Group(Ranks):
    """Several ranks, connected; tensors on the GPU go over NCCL, all else over gloo."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def share(self, make: Callable[[], T]) -> T:
        """See Ranks."""
        box: list[Any] = [None if self.rank else make()]
        dist.broadcast_object_list(box, src=0, group=self._group, device=torch.device("cpu"))
        shared: T = box[0]
        return shared

    def gather(self, value: T) -> list[T]:
        """See Ranks."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """See Ranks."""
        tensor = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tuple(map(bool, tensor.tolist()))

    def add(self, tensor: Tensor) -> None:
        """See Ranks."""
        dist.all_reduce(tensor, group=self._group)

    def another(self) -> "Group":
        """See Ranks."""
        return Group(dist.new_group(backend="gloo"))

    def leave(self) -> None:
        """See Ranks."""
        # Who gets through knows that all have come here. An error says that somebody got through.
        with suppress(RuntimeError):
            self.gather(None)
            dist.destroy_process_group()


def connect(place: Place, seconds: float) -> Ranks:
    """Meets the other ranks; a call in which one of them is missing fails after so many seconds.

    Raises ConfigurationError when a node has fewer GPUs than ranks.
    """
    if place.world == 1:
        return Ranks()
    backend = "gloo"
    if torch.cuda.is_available():
        if place.local >= (gpus := torch.cuda.device_count()):
            raise ConfigurationError("processes", f"there are more than this node's {gpus} GPUs")
        torch.cuda.set_device(place.local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=place.meeting, rank=place.rank, world_size=place.world,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    return Group()


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The device of this process, the dtype of its matrix products, the other ranks."""

    device: torch.device
    precision: Precision
    ranks: Ranks

    def autocast(self) -> AbstractContextManager[Any]:
        """For one forward pass: bf16 products over fp32 weights; nothing with fp32.

        Never for two: weights cast under no_grad would be kept for a pass that needs gradients.
        """
        enabled = self.precision is Precision.BF16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """The array on the device."""
        # A copy, since an array that maps a file cannot be written to.
        return torch.from_numpy(np.array(array)).to(self.device)

    def total(self, *values: float) -> list[float]:
        """Each number, summed over the ranks in fp64."""
        tensor = torch.tensor(values, dtype=torch.float64)
        self.ranks.add(tensor)
        return tensor.tolist()


def set_up(scheduling: Scheduling, precision: Precision) -> Compute:
    """Takes the GPU if there is one; sets threads and reproducibility for the whole process.

    Without `threads` OMP_NUM_THREADS counts, then the number of cores. On the CPU a stage gives
    the same bits each time, for equal threads and ranks; on a GPU only the order of the data is
    promised.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if scheduling.gpus and device.type == "cpu":
        log.warning("gpus: %d asked for, none seen; computing on the CPU", scheduling.gpus)
    if scheduling.threads:
        torch.set_num_threads(scheduling.threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    # Meant for finding reads of fresh memory; it writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module's class
    if device.type == "cpu":
        _keep_memory()
    ranks = Group() if dist.is_initialized() else Ranks()
    return Compute(device=device, precision=precision, ranks=ranks)


def _keep_memory() -> None:
    """Lets the C library keep what is freed: fresh pages for every large tensor cost time."""
    with suppress(AttributeError, OSError):  # another C library than GNU's
        c_library = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):
            c_library.mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def place_model(model: PreTrainedModel, compute: Compute) -> None:
    """Puts a loaded model on the device; of several ranks each keeps its rows and no more.

    Before an optimizer sees its parameters, after `routing.install` and `freeze`.
    """
    if compute.ranks.world == 1:
        model.to(compute.device)
        return
    mesh = init_device_mesh(compute.device.type, (compute.ranks.world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # The embedding and the head too are let go after a forward pass: between two passes there
    # are no parameters but the ranks' own rows.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Our losses are divided by the targets of all ranks: their gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    model.forward_as = MethodType(lambda self, function, *args: function(self, *args), model)
    register_fsdp_forward_method(model, "forward_as")


def forward(model: PreTrainedModel, function: Callable[..., T], *args: Any) -> T:
    """`function(model, *args)` as one forward pass, on all ranks at once."""
    sharded: Any = model
    result: T = (
        sharded.forward_as(function, *args)
        if isinstance(model, FSDPModule)
        else function(model, *args)
    )
    return result


def own(tensor: Tensor) -> Tensor:
    """This rank's rows of a parameter, its gradient or its moments; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(parameter: Tensor, values: Tensor) -> None:
    """Sets a parameter; of several ranks to the values of rank 0."""
    if isinstance(parameter, DTensor):
        values = distribute_tensor(
            values.to(parameter.dtype), parameter.device_mesh, parameter.placements
        )
    parameter.copy_(values)


def whole(tensor: Tensor) -> Tensor:
    """All rows of a parameter, on every rank; all must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
