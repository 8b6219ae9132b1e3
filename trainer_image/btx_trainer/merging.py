"""From the inputs of average and mix to the files of a model: weights.py applied to a Work.

No torch. Called by stages/average.py and stages/mix.py.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any, Self

from btx_api.stage import Progress

from btx_trainer.errors import PreemptedError
from btx_trainer.families import (
    Dense,
    Plan,
    check_dtypes,
    check_member,
    check_tensors,
    read_config,
)
from btx_trainer.numerics import DTYPES
from btx_trainer.storage import MODEL_FILES, Sink
from btx_trainer.weights import THREADS, Checkpoint, LocalFolder, open_checkpoint, write_plan
from btx_trainer.work import Made, Work

_MADE_HERE = ("config.json", "*.safetensors", "*.safetensors.index.json")


def open_models(work: Work) -> tuple[Dense, list[Checkpoint]]:
    """The seed's architecture; the seed and the members, verified and of that architecture.

    Raises ConfigurationError naming the model and the first field or tensor that differs.
    """
    # Verifying is reading and a checksum, both outside the interpreter's lock.
    with ThreadPoolExecutor(THREADS) as pool:
        folders = list(pool.map(lambda item: item.fetch(), work.inputs))
    models = [
        open_checkpoint(LocalFolder(folder), f"input {i}" if i else "seed")
        for i, folder in enumerate(folders)
    ]
    seed, *members = models
    dense = read_config(seed.config, seed.where)
    check_tensors(dense, seed.tensors, seed.where)
    for member in members:
        read = read_config(member.config, member.where, dense)
        check_member(dense, read, member.where)
        check_tensors(read, member.tensors, member.where)
        check_dtypes(seed.tensors, member.tensors, member.where)
    return dense, models


def write_model(
    work: Work, plan: Plan, models: Sequence[Checkpoint], config: Mapping[str, Any]
) -> Made:
    """Writes weights, config.json, and the seed's tokenizer and generation defaults."""
    write_plan(plan, models, _Out(work, plan))
    work.out.put("config.json", json.dumps(config, indent=2).encode() + b"\n")
    for path in sorted(work.inputs[0].fetch().iterdir()):
        if _matches(path.name, MODEL_FILES) and not _matches(path.name, _MADE_HERE):
            work.out.add(path, path.name)
    parameters = sum(math.prod(tensor.spec.shape) for tensor in plan)
    return Made(metrics={"models": len(models), "parameters": parameters})


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


class _Out:
    """The attempt as weights.py writes to it: tells how far it is, and stops when asked to."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self._work, self._done = work, 0
        self._total = sum(
            math.prod(tensor.spec.shape) * DTYPES[tensor.spec.dtype].stored.itemsize
            for tensor in plan
        )
        self._sink: Sink

    @contextmanager
    def sink(self, name: str) -> Iterator[Self]:
        """See weights.Writer."""
        with self._work.out.sink(name) as self._sink:
            yield self

    def write(self, data: memoryview) -> None:
        """See weights.Sink."""
        if self._work.stopping():
            raise PreemptedError("", "stopped while the model was written; nothing is kept")
        self._sink.write(data)
        self._done += len(data)
        self._work.publish(Progress(phase="writing", step=self._done, steps=self._total))
