"""Small valid objects for tests: change what a test is about, leave the rest."""

import os
from typing import Any

from btx_api.spec import BTXRunSpec
from btx_api.stage import Resolved


def trials(every: int, few: int = 3) -> int:
    """How often a repeated trial runs: `TRIALS=all`: `every` time, a number: so often, else few."""
    asked = os.environ.get("TRIALS", "")
    return every if asked == "all" else min(every, int(asked)) if asked else few


def a_spec(**changes: Any) -> dict[str, Any]:
    """A BTX spec of two experts as a user writes it, with some top-level fields replaced."""
    return {
        "storage": {"uri": "file://storage"},
        "seed": {"uri": "file://seed"},
        "general": [{"uri": "file://general.jsonl"}],
        "experts": [
            {"name": "code", "tokens": 400, "data": [{"uri": "file://code/*.py"}]},
            {"name": "math", "tokens": 100, "data": [{"uri": "file://math.jsonl"}]},
        ],
        **changes,
    }


def spec_of(**changes: Any) -> BTXRunSpec:
    """The same, parsed."""
    return BTXRunSpec.parse(a_spec(**changes))


def resolved_for(spec: BTXRunSpec, **changes: Any) -> Resolved:
    """A preflight answer in which every input has its own fingerprint."""
    ready = [expert.name for expert in spec.experts if expert.model]
    return Resolved(
        **{
            "seed": "s" * 22,
            "tokenizer": "t" * 22,
            "domains": tuple(f"{name:d<22}"[:22] for name in spec.domains()),
            "models": tuple(f"{name:m<22}"[:22] for name in ready),
            "tasks": tuple(f"{task.name:q<22}"[:22] for task in spec.evaluate.tasks),
            **changes,
        }
    )
