"""Where a stage computes and how: device, threads, precision, reproducibility.

Called by the stages that run a model, once, before they load it. One process per stage today.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from btx_api.spec import Precision, Scheduling
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """The device of this process and the dtype of its matrix products."""

    device: torch.device
    precision: Precision

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


def set_up(scheduling: Scheduling, precision: Precision) -> Compute:
    """Takes the GPU if there is one; sets threads and reproducibility for the whole process.

    Without `threads` OMP_NUM_THREADS counts, then the number of cores. On the CPU a stage gives
    the same bits each time, for equal threads; on a GPU only the order of the data is promised.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if scheduling.threads:
        torch.set_num_threads(scheduling.threads)
    torch.use_deterministic_algorithms(device.type == "cpu")
    # Meant for finding reads of fresh memory; it writes every new tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set on the module's class
    return Compute(device=device, precision=precision)
