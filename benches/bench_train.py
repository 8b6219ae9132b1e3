"""train beside HF Trainer: tokens per second, exact resume, the memory of the loss head, packing.

Both train one Llama on the same packed rows with the same threads and dtype, each in a process
that waits while the other has its turn; what is timed is whole steps of the real loops. Ours
includes its history and progress; HF Trainer's logging is off. `DEVICE=cuda` (with
`make bench-train DEVICE=cuda`) does it on a GPU with larger models, a Mixture of Experts among
them, each contender alone since two do not fit, with and without torch.compile; it adds MFU (989
TFLOPS, 6 FLOPs per active parameter and token plus 12 * layers * width * length), peak memory and
the stall of a checkpoint.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get("DEVICE", "cpu")
MODEL = {
    "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
LARGE = MODEL | {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
EXPERTS = LARGE | {"num_hidden_layers": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
"""1.3 B parameters, of which 0.8 B are active."""
TINY = MODEL | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1}
SIZES = {4: ">= 1.0", 2: ">= 1.05", 1: ">= 1.05"}
"""Sequences of a batch, and the goal of the ratio."""
PEAK_FLOPS = 989e12
PROCESS = {
    "GOMP_SPINCOUNT": "1000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}  # fmt: skip
"""What our trainer sets for itself on a CPU (`_keep_memory`, ENVIRONMENT), for any process."""
LIKE_OURS = "HF Trainer, our process settings"


class Worker:
    """A process that trains when it is called."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self._process.args} ended with {self._process.wait()}")

    def __call__(self) -> common.Sample:
        """The next steps."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        found = self._answer()
        return common.Sample(wall=found["wall"], cpu=found["cpu"], values=found)

    def end(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


def command(script: str, what: str, folder: Path, options: dict[str, Any]) -> list[str]:
    """Of one side of the bench."""
    python = common.PEERS / "python" if script == "train_peer" else common.OURS
    return [str(python), str(HERE / f"{script}.py"), what, str(folder), json.dumps(options)]


def environment(options: dict[str, Any]) -> dict[str, str]:
    """Equal for both sides."""
    hidden = {} if options["device"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return {"OMP_NUM_THREADS": str(options["threads"]), **hidden}


def speed(
    folder: Path, options: dict[str, Any], count: int, goal: str, *, padded: bool
) -> list[common.Row]:
    """Tokens per second of both, and with `padded` of our loop without packing."""
    commands = {"ours": Call("train_ours", "run", folder, options)}
    gpu = options["device"] == "cuda"
    if common.peer("python"):
        peer = Call("train_peer", "run", folder, options)
        commands["HF Trainer"] = peer
        if not gpu:
            commands[LIKE_OURS] = replace(peer, around=PROCESS)
    # Not the Mixture of Experts: a lent GPU's time is short.
    compiled = gpu and options["batch"] == max(SIZES) and options["model"] is not EXPERTS
    if compiled:
        for name, call in list(commands.items()):
            compile_it = options | {"compile": True}
            # Ours makes its model where it trains; the peer takes the first one's.
            place = folder / "compiled" if call.script == "train_ours" else folder
            commands[f"{name}, compiled"] = replace(call, folder=place, options=compile_it)
    if padded:
        commands["padded"] = Call("train_ours", "padded", folder / "padded", options)
    samples = in_sequence(count, commands) if gpu else in_turns(count, commands)
    tokens = options["batch"] * options["length"] * options["pace"]
    shape = f"{options['batch']} x {options['length']} tokens, {options['precision']}"
    shape += ", GPU" if gpu else f", {options['threads']} threads"
    shape += ", 4 experts" if "num_local_experts" in options["model"] else ""

    def row(  # noqa: PLR0917 - a table
        ours: str, peer: str, what: str, name: str, unit: str, goal: str = ""
    ) -> common.Row:  # fmt: skip
        speeds = ([tokens / getattr(s, what) for s in samples.get(n, [])] for n in (ours, peer))
        text = f"train, {shape}: {name}"
        return common.row(text, *speeds, peer_name=peer, unit=f"tokens/{unit}", goal=goal)

    found = [row("ours", "HF Trainer", "wall", "speed", "s", goal)]
    if compiled:
        found += [row("ours, compiled", "HF Trainer, compiled", "wall", "speed, compiled", "s")]
    if gpu:
        found += on_gpu(options, samples, tokens, shape)
    else:
        found += [row("ours", "HF Trainer", "cpu", "work", "CPU s")]
        found += [row("ours", LIKE_OURS, "wall", "speed", "s")]
        found += [row("ours", LIKE_OURS, "cpu", "work", "CPU s")]
    if padded:
        ours = [tokens / s.wall for s in samples["ours"]]
        texts = [s.values["text"] / s.wall for s in samples["padded"]]
        found.append(
            common.row(
                f"train, {shape}: text, packed", ours, texts, unit="tokens/s",
                peer_name="one document per row",
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Call:
    """How a contender is started."""

    script: str
    what: str
    folder: Path
    options: dict[str, Any]
    around: dict[str, str] = field(default_factory=dict)

    def worker(self) -> Worker:
        """The process, ready for its first step."""
        line = command(self.script, self.what, self.folder, self.options)
        return Worker(line, **environment(self.options), **self.around)


def in_turns(count: int, calls: Mapping[str, Call]) -> dict[str, list[common.Sample]]:
    """All processes at once, each waiting while another has its turn."""
    workers: dict[str, Worker] = {}
    try:
        for name, call in calls.items():
            workers[name] = call.worker()
        return common.rounds(count, workers)
    finally:
        for worker in workers.values():
            worker.end()


def in_sequence(count: int, calls: Mapping[str, Call]) -> dict[str, list[common.Sample]]:
    """One process after the other."""
    samples: dict[str, list[common.Sample]] = {}
    for name, call in calls.items():
        samples |= in_turns(count, {name: call})
    return samples


def on_gpu(
    options: dict[str, Any], samples: dict[str, list[common.Sample]], tokens: int, shape: str
) -> list[common.Row]:
    """MFU, peak memory and the stall of a checkpoint."""
    model = options["model"]
    width, layers, inner = (
        model[n] for n in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    keys = model["num_key_value_heads"] / model["num_attention_heads"]
    active = model.get("num_experts_per_tok", 1)
    layer = width * width * (2 + 2 * keys) + 3 * width * inner * active
    flops = 6 * (layers * layer + model["vocab_size"] * width)
    flops += 12 * layers * width * options["length"]

    def row(name: str, unit: str, value: Any, way: str = "") -> common.Row:
        ours, peers = samples[f"ours{way}"], samples.get(f"HF Trainer{way}", [])
        return common.row(
            f"train, {shape}: {name}{way}", [value(s) for s in ours], [value(s) for s in peers],
            peer_name=f"HF Trainer{way}", unit=unit,
        )  # fmt: skip

    def utilisation(sample: common.Sample) -> float:
        return tokens * flops / sample.wall / PEAK_FLOPS

    stalls = [s.values["longest"] - s.wall / options["pace"] for s in samples["ours"]]
    ways = ("", ", compiled") if "ours, compiled" in samples else ("",)
    return [
        *(row("MFU", "of 989 TFLOPS", utilisation, way) for way in ways),
        row("peak memory", "GB", lambda s: s.values["peak"] / 1e9),
        common.row(f"train, {shape}: longest step beyond the mean", [max(stalls)], unit="s"),
    ]


def exact(folder: Path, options: dict[str, Any]) -> list[common.Row]:
    """Whether each ends in the same bytes when it is stopped half-way and resumed: 1 or 0."""
    options = options | {"model": MODEL} if options["device"] == "cuda" else options
    around = environment(options)
    ours = common.run(command("train_ours", "resume", folder / "resume", options), **around)
    theirs = "left out"
    if common.peer("python"):
        peer = common.run(command("train_peer", "resume", folder, options), **around)
        theirs = "yes" if peer.values["exact"] else "no"
    name = f"train: a resumed run ends in the same bytes (1: yes; HF Trainer: {theirs})"
    return [common.row(name, [float(ours.values["exact"])], unit="", limit=">= 1")]


def loss_head(folder: Path, options: dict[str, Any], count: int) -> list[common.Row]:
    """Growth of the peak memory of a fresh process (or its GPU) during the head's two passes."""
    ways = {"ours": "head", "plain": "plain-head"}
    samples = common.rounds(
        count,
        {
            name: lambda what=what: common.run(
                command("train_ours", what, folder, options), **environment(options)
            )
            for name, what in ways.items()
        },
        warm=False,
    )
    sizes = [[s.values["bytes"] / 1e9 for s in samples[name]] for name in ways]
    rows, width, vocabulary = options["head"]
    return [
        common.row(
            f"loss head, {rows} tokens, width {width}, vocabulary {vocabulary}: memory", *sizes,
            peer_name="F.cross_entropy on all logits", unit="GB", goal="<= 0.5",
        )
    ]  # fmt: skip


def main() -> None:
    """All rows."""
    asked = common.options(__doc__ or "")
    count = asked.rounds or (1 if asked.tiny else 5)
    model = TINY if asked.tiny else LARGE if DEVICE == "cuda" else MODEL
    options: dict[str, Any] = {
        "model": model, "length": 64 if asked.tiny else 512, "batch": 4, "pace": 1,
        "steps": count + 2, "precision": "bf16", "device": DEVICE,
        "threads": int(os.environ.get("THREADS", len(os.sched_getaffinity(0)))),
        "head": [256, 64, 4096] if asked.tiny else [2048, 1024, 128_256],
    }  # fmt: skip
    if DEVICE == "cuda":
        options |= {"pace": 2} if asked.tiny else {"length": 4096, "pace": 10}
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.RESULTS) as scratch:
        folder, rows = Path(scratch), []
        for size, goal in SIZES.items():
            if DEVICE == "cuda" and size == 2:
                continue  # a lent GPU's time is short
            pace = options["pace"] if DEVICE == "cuda" else 4 // size
            some = options | {"batch": size, "pace": pace, "steps": pace * (count + 2)}
            padded = size == 4 and DEVICE != "cuda"
            rows += speed(folder / f"batch-{size}", some, count, goal, padded=padded)
        if DEVICE == "cuda":
            experts = TINY | {"num_local_experts": 4} if asked.tiny else EXPERTS
            moe = options | {"model": experts, "steps": options["pace"] * (count + 2)}
            rows += speed(folder / "experts", moe, count, ">= 1.0", padded=False)
        rows += exact(folder / "batch-1", options | {"batch": 1, "steps": 4})
        rows += loss_head(folder, options, 1)  # the same to a percent each time
    packages = ("torch", "transformers", "accelerate")
    name = "train-gpu" if DEVICE == "cuda" else "train"
    common.finish(name, rows, tiny=asked.tiny, packages=packages)


if __name__ == "__main__":
    main()
