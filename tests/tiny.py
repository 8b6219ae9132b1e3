"""Tiny models on disk and real trainer processes, for tests."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from btx_api.names import TASK_ENV
from btx_api.stage import Exit, Result, Task
from btx_trainer.families import read_config
from safetensors.numpy import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-6,
}
"""Of models that transformers builds in a test: wide initial weights, so that logits differ."""
HEAVY = ("torch", "transformers", "matplotlib")
PROCESS = f"""
import sys
from btx_trainer.__main__ import main
code = main()
print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


def write_llama(folder: Path, number: int = 0, **config: Any) -> Path:
    """A Llama in stock layout whose random weights depend on `number`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {**LLAMA, **config}
    draws = np.random.default_rng(number)
    shapes = read_config(plain, "test").shapes()
    tensors = {name: draws.normal(0, 0.02, shape).astype("f4") for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(plain))
    (folder / "generation_config.json").write_text('{"eos_token_id": 257}')
    return folder


@dataclass(frozen=True)
class Ended:
    """How a trainer process ended."""

    code: int
    result: Result
    imported: list[str]
    """Which of HEAVY were in the process."""
    out: str
    err: str


def start_trainer(task: Task | dict[str, Any] | str, **environment: str) -> "subprocess.Popen[str]":
    """A trainer process with this task in its environment."""
    plain = task.plain() if isinstance(task, Task) else task
    text = plain if isinstance(plain, str) else json.dumps(plain)
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS],
        env={**os.environ, TASK_ENV: text, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process: "subprocess.Popen[str]") -> Ended:
    """Waits for it; the Result is the last line it prints."""
    out, err = process.communicate(timeout=120)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    result = Result.parse(json.loads(lines[-1])) if lines else Result()
    last = (err.strip().splitlines() or [""])[-1]
    imported = last.removeprefix("imported:").split() if last.startswith("imported:") else []
    return Ended(process.returncode, result, imported, out, err)


def run_trainer(task: Task | dict[str, Any] | str, **environment: str) -> Ended:
    """Runs a task to its end."""
    return ended(start_trainer(task, **environment))


def succeed(task: Task) -> Result:
    """Runs a task that must succeed."""
    done = run_trainer(task)
    assert done.code == Exit.OK, done.err
    return done.result
