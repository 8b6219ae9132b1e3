"""docs/performance.md from build/bench/*.json: the method in words, the figures from the files.

A bench without a file has no table, and the page says so. `make bench` runs it last.
"""

import json

import common

TARGET = common.ROOT / "docs/performance.md"
INTRODUCTION = """# Performance

Written by `make bench` (`benches/write_docs.py`) from `build/bench/*.json`; not edited by hand.
Ours and the peer run in turns in one run on one machine. A figure is the median of the rounds; a
ratio is ours divided by the peer's, both medians, with the smallest and largest ratio of a single
round beside it. Repeat one with `make bench-NAME`. The peers have a virtual environment of their
own, pinned by `benches/peers.txt`.

The figures, but for one table from a GPU, are of two processor cores that share a host with others;
the ratios travel better than the seconds.
"""
TRIALS = common.ROOT / "benches/trials.md"
"""What `TRIALS=all` showed; written by hand."""
SECTIONS = {
    "operator": (
        "operator: beside a bare create loop and the least controller",
        """A real control plane (etcd, API server, controller manager, scheduler) and scripted
pods on the machine of the bench; they take most of its two cores. *Creates*: the train Jobs of
100 runs, all due at the operator's start, beside a loop that creates as many copies of such a
Job, 32 at a time; the operator also writes the runs' statuses in that time and, half a second
later than each, its events. That ratio scatters with what else the machine's host does: over three
days single rounds went from 0.55 to 1.13, and one commit gave 1.13 on one day and 0.73 on the next.
*Hand-off*: from the end of the last stage that a stage waits for to the appearance of its Job,
all stages of runs with two experts, as one watch sees both, beside a controller of forty lines
that plays the same graphs and does nothing but watch, write a status with its version checked and
create what is due. Until 2026-11-26 it played four Jobs in a row with nothing beside them: p99 was
1.9 of that. *Memory* is the resident size of the operator's process; what the earlier rows left is
deleted before. A *reconcile* while idle would be work that no fact asked for.""",
    ),
    "mix": (
        "mix: beside mergekit-moe and `cp`",
        """Four Llama models of 0.49 B parameters in bf16 (hidden 1536, intermediate 4096, 16
layers) become one Mixture of Experts: 3.9 GB in, 2.8 GB out, all of it in the file cache before.
*Ours* is the stage as the engine starts it, in a fresh process: imports, the CRC32C of every
member's bytes, the average of attention, embeddings and norms in fp32, the CRC32C of the output,
fsync, the commit. *mergekit-moe* is version 0.1.5 at the best setting that we know
(`--out-shard-size 500M --async-write --write-threads 2`); it takes attention, embeddings and norms
from one model, averages nothing, and does not fsync. `cp` copies our output's files: with fsync
beside the stage as it is, and without beside the stage with `os.fsync` doing nothing. *Without
process start* leaves out the interpreter and the imports, about half a second, which weighs on
2.8 GB and not on 50. Memory is the largest resident size of the process; the second model has four
times as large tensors and about twice the bytes, and needs no more.""",
    ),
    "prepare": (
        "prepare: beside `encode_batch_fast` and `datasets.map`",
        """24 MB of Python sources as JSONL and a byte-level BPE tokenizer.json of 16,000 entries
trained on a tenth of them. Each contender is bound to one core with the tokenizer library's own
threads off, so that what its helper threads do counts, and is timed from the end of its imports.
The floor, `encode_batch_fast` alone, has the texts in memory and throws the encodings away.
`datasets` loads the JSONL and maps the same call over it, writing Arrow files, with an empty cache.
*Ours* reads and checks the records, splits off held-out documents by hash, encodes, writes token
files with CRC32C and fsync, and commits. Its tokenizer's process runs on mimalloc where that is
installed, as in the trainer's image; the versions below name the malloc of these figures, and with
glibc's own the ratio to the floor is 0.93. Two processes are two stages at once, each with one half
of the documents and one core; two threads are one stage on two cores. Speed is in text, so higher
is better.""",
    ),
    "s3": (
        "S3: upload and download, beside s5cmd",
        """Two files of 256 MiB of random bytes, between a folder in the file cache and a real S3
server (SeaweedFS) on loopback. *Ours* is what every stage does (`Store.sink`, `Store.download`),
with a CRC32C of every byte, stored with the object and checked on the way back; it is timed from
the end of its imports and the making of its client, which a stage does once. s5cmd is a process
from start to end, with the same size and number of parts. The server runs on the same cores and
takes most of them, so wall times say as much of it as of the clients; the CPU seconds are the
client's alone, per GiB.""",
    ),
    "train": (
        "train: beside the Hugging Face Trainer",
        """A Llama of 58 M parameters (hidden 512, 8 layers, vocabulary 32,000, untied) on packed
rows of 512 tokens: Python sources as bytes, documents of 40 to 600 tokens that cannot see each
other. Both start from the same weights and get the same rows, targets, positions, threads, dtype
(bf16 autocast over fp32 weights) and fused AdamW with clipping; each waits in its own process while
the other does its steps. *Ours* is the real loop with history and progress; it keeps freed memory
(`mallopt`), which is part of what is measured. HF Trainer's logging is off, its defaults stand
else. *Text, packed* counts tokens of text of our loop, beside our loop with one document per row.
*A resumed run* is stopped half-way and resumed from its checkpoint, then compared byte by byte with
the uninterrupted one. The memory of the loss head is the growth of a fresh process's peak resident
size during its forward and backward pass in fp32, weight gradient included, beside
`F.cross_entropy` on all logits.""",
    ),
    "train-gpu": (
        "train on a GPU: beside the Hugging Face Trainer",
        """The same as above by `make bench-train DEVICE=cuda`: a Llama of 1.1 B parameters (hidden
2048, 22 layers) and a Mixtral of 1.3 B (8 layers, 4 experts of which 2 are active), packed rows of
4096 tokens, ten steps a round, one contender after the other. MFU is of 989 TFLOPS (dense bf16):
6 FLOPs per active parameter and token, and 12 * layers * width * length for attention. *Longest
step* shows a checkpoint's stall if one was taken. On a GPU a resumed run promises the same order of
the data, not the same bytes. More in [gpu.md](gpu.md).""",
    ),
}


def main() -> None:
    """Writes the page."""
    parts = [INTRODUCTION]
    for name, (title, method) in SECTIONS.items():
        parts += [f"## {title}", *([method] if method else []), section(name)]
    parts.append(TRIALS.read_text())
    TARGET.write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(TARGET.relative_to(common.ROOT))


def section(name: str) -> str:
    """Table, machine and versions of one bench."""
    path = common.RESULTS / f"{name}.json"
    if not path.exists():
        how = name.replace("-gpu", " DEVICE=cuda")
        return f"Not measured yet: there is no `build/bench/{name}.json` (`make bench-{how}`)."
    rows = json.loads(path.read_text())
    head = "| | ours | peer | | unit | ratio | single rounds | wanted | |\n" + "|---" * 9 + "|\n"
    first = rows[0]
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    about = f"Measured {first['date']} on {first['machine']}; {versions}."
    return head + "\n".join(map(line, rows)) + f"\n\n{about}"


def line(row: common.Row) -> str:
    """One row of the table."""
    peer = number(row["peer"]) if row["peer"] is not None else ""
    ratio, spread = "", ""
    if row["ratio"] is not None:
        low, high = row["ratio_range"]
        ratio, spread = f"**{row['ratio']:.2f}**", f"{low:.2f} to {high:.2f} ({row['rounds']})"
    wanted = f"ratio {row['goal']}" if row["goal"] else ""
    wanted = f"{row['limit']} {row['unit']}" if row.get("limit") else wanted
    verdict = {True: "met", False: "**missed**"}.get(row.get("met"), "")
    cells = [row["metric"], number(row["ours"]), peer, row["peer_name"], row["unit"], ratio, spread]
    return "| " + " | ".join([*cells, wanted, verdict]) + " |"


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
