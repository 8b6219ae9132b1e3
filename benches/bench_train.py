"""train beside HF Trainer: tokens per second, exact resume, the memory of the loss head, packing.

Both train one Llama on the same packed rows with the same threads and dtype, each in a process
that waits while the other has its turn; what is timed is whole steps of the real loops. Ours
includes its history and progress; HF Trainer's logging is off. `DEVICE=cuda` (with
`make bench-train DEVICE=cuda`) does it on a GPU with a larger model, and adds MFU (989 TFLOPS,
6 FLOPs per parameter and token plus 12 * layers * width * length), peak memory and the stall of a
checkpoint.
"""

import json
import os
import subprocess
import tempfile
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
TINY = MODEL | {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 1}
PEAK_FLOPS = 989e12
PROCESS = {
    "GOMP_SPINCOUNT": "1000", "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}  # fmt: skip
"""What our trainer sets for itself on a CPU (`_keep_memory`, ENVIRONMENT), for any process."""


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
    around = environment(options)
    commands = {"ours": (command("train_ours", "run", folder, options), around)}
    if common.peer("python"):
        peer = command("train_peer", "run", folder, options)
        commands["HF Trainer"] = peer, around
        commands["HF Trainer, our process settings"] = peer, PROCESS | around
    if padded:
        commands["padded"] = command("train_ours", "padded", folder / "padded", options), around
    workers: dict[str, Worker] = {}
    try:
        for name, (line, settings) in commands.items():
            workers[name] = Worker(line, **settings)
        samples = common.rounds(count, workers)
    finally:
        for worker in workers.values():
            worker.end()
    tokens = options["batch"] * options["length"] * options["pace"]
    shape = f"{options['batch']} x {options['length']} tokens, {options['precision']}"
    shape += f", {options['threads']} threads, {options['device']}"
    found = [
        common.row(
            f"train, {shape}: {name}", [tokens / getattr(s, what) for s in samples["ours"]],
            [tokens / getattr(s, what) for s in samples.get(peer_name, [])], peer_name=peer_name,
            unit=f"tokens/{unit}", goal=goal if peer_name + what == "HF Trainerwall" else "",
        )
        for peer_name in ("HF Trainer", "HF Trainer, our process settings")
        for what, name, unit in (("wall", "speed", "s"), ("cpu", "work", "CPU s"))
    ]  # fmt: skip
    if padded:
        texts = [s.values["text"] / s.wall for s in samples["padded"]]
        ours = [tokens / s.wall for s in samples["ours"]]
        found.append(
            common.row(
                f"train, {shape}: text, packed",
                ours,
                texts,
                unit="tokens/s",
                peer_name="one document per row",
            )
        )
    return found + (on_gpu(options, samples, tokens, shape) if DEVICE == "cuda" else [])


def on_gpu(
    options: dict[str, Any], samples: dict[str, list[common.Sample]], tokens: int, shape: str
) -> list[common.Row]:
    """MFU, peak memory and the stall of a checkpoint."""
    model = options["model"]
    width, layers, inner = (
        model[n] for n in ("hidden_size", "num_hidden_layers", "intermediate_size")
    )
    keys = model["num_key_value_heads"] / model["num_attention_heads"]
    layer = width * width * (2 + 2 * keys) + 3 * width * inner
    flops = 6 * (layers * layer + model["vocab_size"] * width)
    flops += 12 * layers * width * options["length"]
    ours, peers = samples["ours"], samples.get("HF Trainer", [])
    stalls = [s.values["longest"] - s.wall / options["pace"] for s in ours]

    def row(name: str, unit: str, value: Any) -> common.Row:
        return common.row(
            f"train, {shape}: {name}", [value(s) for s in ours], [value(s) for s in peers],
            peer_name="HF Trainer", unit=unit,
        )  # fmt: skip

    return [
        row("MFU", "of 989 TFLOPS", lambda s: tokens * flops / s.wall / PEAK_FLOPS),
        row("peak memory", "GB", lambda s: s.values["peak"] / 1e9),
        common.row(f"train, {shape}: longest step beyond the mean", [max(stalls)], unit="s"),
    ]


def exact(folder: Path, options: dict[str, Any]) -> list[common.Row]:
    """Whether each ends in the same bytes when it is stopped half-way and resumed: 1 or 0."""
    around = environment(options)
    ours = common.run(command("train_ours", "resume", folder / "resume", options), **around)
    theirs = "left out"
    if common.peer("python"):
        peer = common.run(command("train_peer", "resume", folder, options), **around)
        theirs = "yes" if peer.values["exact"] else "no"
    name = f"train: a resumed run ends in the same bytes (1: yes; HF Trainer: {theirs})"
    return [common.row(name, [float(ours.values["exact"])], unit="", limit=">= 1")]


def loss_head(folder: Path, options: dict[str, Any], count: int) -> list[common.Row]:
    """Growth of a fresh process's peak resident memory during the head's two passes."""
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
        options |= {"length": 4096, "pace": 10, "steps": 10 * (count + 2)}
    one = options | {"batch": 1, "pace": 4, "steps": 4 * (count + 2)}
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=common.RESULTS) as scratch:
        several, single = Path(scratch) / "several", Path(scratch) / "single"
        rows = speed(several, options, count, ">= 1.0", padded=True)
        rows += speed(single, one, count, ">= 1.05", padded=False)
        rows += exact(single, one | {"steps": 4})
        rows += loss_head(Path(scratch), options, 1)  # the same to a percent each time
    packages = ("torch", "transformers", "accelerate")
    common.finish("train", rows, tiny=asked.tiny, packages=packages)


if __name__ == "__main__":
    main()
