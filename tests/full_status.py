"""A status in which every field, however deep, has a value that it does not have by default."""

from btx_api.methods import Members
from btx_api.stage import Corrupt, Kind, Parameters, Resolved
from btx_api.status import (
    Condition,
    ConditionType,
    Invalid,
    Reason,
    Release,
    Row,
    State,
    Status,
)

DIGEST, TIME = "0123456789abcdef" * 2, 1_700_000_000
FINGERPRINT = "abcdefghijklmnopqrstuv"


def full_row(name: str, state: State) -> Row:
    """A row that has been through everything."""
    return Row(
        name=name, digest=DIGEST, state=state, attempt=3, handle="h" * 36, start_time=TIME,
        seconds=86_400, failures=1, preemptions=2, replaced=1, lost=1, exit=1, retry_time=TIME, check=True,
        waits_for="run/train-code", invalid=Invalid(tag="t" * 80, count=2), gain=-0.25,
        token="0123456789abcdef", dead_experts="2: 0.1, 3.2", message="m" * 96,
    )  # fmt: skip


def full_status() -> Status:
    """One row per state, every condition, everything resolved."""
    conditions = tuple(
        Condition(
            type=kind, status="Unknown", reason=Reason.EDIT_PENDING, message="m" * 200,
            last_transition_time=TIME, observed_generation=2,
        )
        for kind in ConditionType
    )  # fmt: skip
    resolved = Resolved(
        seed=FINGERPRINT, tokenizer=FINGERPRINT, domains=(FINGERPRINT,) * 96,
        models=(FINGERPRINT,) * 64, tasks=(FINGERPRINT,) * 32, complete="f" * 64,
        gains=(None, 0.5, *(None,) * 62), token="0123456789abcdef",
        parameters=Parameters(
            dense=10**11, total=10**12, active=10**11, head=1, embedding=2, experts=3, layers=4,
            hidden=5,
        ),
        corrupt=(Corrupt(kind=Kind.TRAIN, digest=DIGEST, tag="t" * 80),), problems=("p" * 100,),
    )  # fmt: skip
    rows = tuple(full_row(f"train-{i}", state) for i, state in enumerate(State))
    return Status(
        observed_generation=3, generation=2, state="Running", stage="prepare, train x3",
        experts="3/4", progress="42%", eta="1h10m", conditions=conditions,
        problems=("p" * 100,) * 8, model="s3://bucket/" + "m" * 1188,
        members=Members(experts=("code", "math"), without=("law",)), stages=rows,
        preflight=full_row("preflight", State.BACK_OFF), resolved=resolved,
        inputs=("0123abcd",) * 164, key=DIGEST,
        release=Release(image="i" * 253, task=1, kinds=dict.fromkeys(Kind, 1)),
        identity=("0123abcd",) * 3, members_key="0123abcd", expert_seconds=5, expert_since=TIME,
        refresh="2023-11-14", retry="2023-11-14",
    )  # fmt: skip
