"""The demo: real text in, a Mixture-of-Experts model that stock transformers loads out.

`make demo` runs it. It writes below the working folder inputs under build/demo (text that is on
any machine with CPython, generated arithmetic, a randomly initialised byte-level Llama), trains a
small seed from them, runs quickstart.yaml and quickstart-dense.yaml side by side over one storage,
and says what came out. Everything but the inputs is made by `btx`, as a user would.
"""

import argparse
import importlib
import importlib.metadata
import json
import pydoc_data.topics
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path("build/demo")
EXAMPLES = Path(__file__).parent
SEED_CONFIG = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
ALLOWED = ("--set", "policy.allowRetrain=true")
"""The demo's text comes from this Python; another version of it may train anew without asking."""
GENERAL_PART = 4
"""Every fourth document of each kind goes to the general mixture, which no expert trains on."""


def code() -> list[str]:
    """The standard library's own modules, largest parts cut to 32 kB."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(errors="replace")[:32_768] for path in files]


def topics() -> list[str]:
    """The language reference as pydoc carries it."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def licences() -> list[str]:
    """Licence texts of CPython and of the installed packages, each once."""
    found = {(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(errors="replace")}
    for package in importlib.metadata.distributions():
        for file in package.files or ():
            path = Path(str(file.locate()))
            if "LICEN" in path.name.upper() and path.is_file() and path.stat().st_size < 65_536:
                found.add(path.read_text(errors="replace"))
    return sorted(found)


def arithmetic(count: int) -> list[str]:
    """Additions and expanded products: little text, exact rules."""
    draw = random.Random(1)
    lines = []
    for _ in range(count):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        lines.append(f"({a} + {b}) * {a} = {(a + b) * a}\n")
        lines.append(f"(x + {a})(x - {b}) = x^2 {a - b:+d}x - {a * b}\n")
    return ["".join(lines[i : i + 16]) for i in range(0, len(lines), 16)]


def docstrings() -> list[str]:
    """Those of CPython's built-in modules: prose about code, in none of its Python files."""
    found = set()
    for module in map(importlib.import_module, sorted(sys.builtin_module_names)):
        for thing in vars(module).values():
            inner = vars(thing).values() if isinstance(thing, type) else ()
            found |= {getattr(part, "__doc__", None) for part in (thing, *inner)}
    return sorted(text for text in found if isinstance(text, str) and len(text) > 40)


def questions(count: int) -> Iterator[dict[str, object]]:
    """Products as `arithmetic` writes them, each with four results to choose from."""
    draw = random.Random(3)
    for _ in range(count):
        a, b = draw.randint(2, 99), draw.randint(2, 99)
        right = (a + b) * a
        choices = sorted({right, right + a, right + 10, abs(right - 2 * b) + 1})
        yield {
            "question": f"({a} + {b}) * {a} =",
            "choices": [str(choice) for choice in choices],
            "answer": str(right),
        }


def pieces(documents: list[str], size: int = 2048) -> Iterator[str]:
    """Documents of about equal length, so that the mixture is even."""
    for document in documents:
        for start in range(0, len(document), size):
            yield document[start : start + size]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """(the domain's, the general mixture's) documents: disjoint."""
    general = documents[GENERAL_PART - 1 :: GENERAL_PART]
    return [d for i, d in enumerate(documents) if i % GENERAL_PART != GENERAL_PART - 1], general


def write_data(folder: Path) -> None:
    """The demo's four domains as text files and JSONL, one that nobody trains on, and a task."""
    general: list[str] = []
    prose: list[str] = []
    for name, suffix, documents in (
        ("code", "py", code()), ("topics", "txt", topics()), ("licences", "txt", licences()),
    ):  # fmt: skip
        own, shared = split(documents)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, text in enumerate(own):
            (folder / name / f"{i:04d}.{suffix}").write_text(text)
        (general if name == "code" else prose).extend(pieces(shared))
    own, shared = split(arithmetic(24_000))
    write_jsonl(folder / "arithmetic.jsonl", ({"text": text} for text in own))
    write_jsonl(folder / "docstrings.jsonl", ({"text": text} for text in docstrings()))
    write_jsonl(folder / "products.jsonl", questions(100))
    even = min(sum(map(len, part)) for part in (general, prose, shared))
    mixture = [text for part in (general, prose, shared) for text in take(part, even)]
    random.Random(2).shuffle(mixture)
    write_jsonl(folder / "general.jsonl", ({"text": text} for text in mixture))


def write_jsonl(path: Path, records: Iterable[dict[str, object]]) -> None:
    """One record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def take(documents: list[str], characters: int) -> Iterator[str]:
    """Documents up to so many characters."""
    for document in documents:
        if characters <= 0:
            return
        characters -= len(document)
        yield document


def write_init(folder: Path) -> None:
    """A randomly initialised Llama with the byte tokenizer, in Hugging Face layout."""
    import torch  # noqa: PLC0415  these imports take seconds
    from btx_trainer.model import new_model, save_model  # noqa: PLC0415
    from btx_trainer.tokenizer import byte_tokenizer_files  # noqa: PLC0415
    from transformers import LlamaConfig  # noqa: PLC0415

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_model(new_model(LlamaConfig(**SEED_CONFIG), seed=1), partial, torch.float32)
    for name, text in byte_tokenizer_files().items():
        (partial / name).write_text(text)
    partial.rename(folder)


def btx(*arguments: str) -> None:
    """The command line, as a user types it."""
    print(f"\n$ btx {' '.join(arguments)}", flush=True)
    process = subprocess.Popen([sys.executable, "-m", "btx_operator.cli", *arguments])
    # Ctrl-C reaches btx too, which stops at a checkpoint; it has the time it needs for that.
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    code = process.wait()
    signal.signal(signal.SIGINT, handler)
    if code:
        sys.exit(code)


def main() -> None:
    """Inputs, seed, both runs, report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs-only", action="store_true", help="stop before any training")
    only_inputs = parser.parse_args().inputs_only
    begun = time.monotonic()
    if not (ROOT / "init").exists():
        write_data(ROOT / "data")
        write_init(ROOT / "init")
    if only_inputs:
        return
    if not (ROOT / "seed").exists():
        btx("run", str(EXAMPLES / "quickstart-seed.yaml"), *ALLOWED)
        btx("export", "quickstart-seed", str(ROOT / "seed"))
    btx(
        "run",
        *(str(EXAMPLES / name) for name in ("quickstart.yaml", "quickstart-dense.yaml")),
        *ALLOWED,
    )
    shutil.rmtree(ROOT / "model", ignore_errors=True)
    btx("export", "quickstart", str(ROOT / "model"))
    btx("report", "quickstart", "quickstart-dense", "--out", str(ROOT))
    print(
        f"\nmodel:  {ROOT}/model\nreport: {ROOT}/report.html, {ROOT}/report.json\n"
        f"load it with stock transformers:\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"  model = AutoModelForCausalLM.from_pretrained('{ROOT}/model')\n"
        f"  tokenizer = AutoTokenizer.from_pretrained('{ROOT}/model')\n"
        f"\n{time.monotonic() - begun:.0f} s in all"
    )


if __name__ == "__main__":
    main()
