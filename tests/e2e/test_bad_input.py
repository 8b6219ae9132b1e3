"""Bad input against the real trainer: one line that names the field or object, nothing left behind."""

import json
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from btx_trainer.model import new_model, save_model
from transformers import LlamaConfig
from workspace import Workspace


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The demo's inputs, made once."""
    return Workspace.with_inputs(tmp_path_factory.mktemp("inputs") / "w")


def edit_config(model: Path, **changes: object) -> None:
    """Changes fields of a model's config.json."""
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def ready(workspace: Workspace) -> Path:
    """Makes expert math a ready copy of the seed; returns its folder."""
    folder = workspace.folder / "build/demo/ready"
    shutil.copytree(workspace.folder / "build/demo/init", folder)
    workspace.manifest(
        experts__1={"name": "math", "model": "file://build/demo/ready"},
        finetune__data=[{"tokens": 2048, "domains": {"code": 1}}],
        evaluate__domains=[{"name": "code"}],
    )
    return folder


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.sprung,)


def test_a_planted_pickle_is_never_read(inputs: Workspace, tmp_path: Path) -> None:
    """Beside the weights, the data, the artifacts and the checkpoints: a run passes it by."""
    workspace, sprung = inputs.copy(tmp_path / "w"), tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists(), "the trap works"
    sprung.unlink()
    demo, storage = workspace.folder / "build/demo", workspace.folder / "build/demo/storage"
    manifest = workspace.manifest()
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl", "x.npy"):
        for folder in (demo / "init", demo / "data", storage / "stages", storage / "checkpoints"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(trap)

    workspace.btx("run", manifest)
    workspace.btx("export", "tiny", "model")
    workspace.btx("gc", manifest, "--keep-days", "1")

    assert not sprung.exists()
    assert not list((workspace.folder / "model").glob("*.bin"))


def test_a_model_that_is_only_a_pickle_is_refused(inputs: Workspace, tmp_path: Path) -> None:
    """By the field that names it; it is not opened."""
    workspace, sprung = inputs.copy(tmp_path / "w"), tmp_path / "sprung"
    seed = workspace.folder / "build/demo/init"
    for path in seed.glob("*.safetensors*"):
        path.unlink()
    (seed / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    printed = workspace.btx("run", workspace.manifest(), code=78)

    assert [line for line in printed.splitlines() if "seed" in line and "safetensors" in line]
    assert not sprung.exists()


def no_such_data(w: Workspace) -> None:
    w.manifest(experts__0__data=[{"uri": "file://build/demo/data/none/*.py"}])


def no_such_seed(w: Workspace) -> None:
    w.manifest(seed__uri="file://build/demo/nothing")


def storage_below_a_file(w: Workspace) -> None:
    w.manifest(storage__uri="file://build/demo/data/general.jsonl/storage")


def unsupported_architecture(w: Workspace) -> None:
    w.manifest()
    edit_config(w.folder / "build/demo/init", model_type="gemma2")


def unknown_config_field(w: Workspace) -> None:
    w.manifest()
    edit_config(w.folder / "build/demo/init", novel_scaling=2.0)


def truncated_seed(w: Workspace) -> None:
    w.manifest()
    path = w.folder / "build/demo/init/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def no_tokenizer(w: Workspace) -> None:
    w.manifest(prepare__tokenizer="file://build/demo/nothing")


def ready_of_another_width(w: Workspace) -> None:
    folder = ready(w)
    config = LlamaConfig.from_pretrained(folder)
    config.intermediate_size = 176
    save_model(new_model(config, seed=3), folder, torch.float32)


def ready_of_another_rope(w: Workspace) -> None:
    edit_config(ready(w), rope_parameters={"rope_theta": 5e5, "rope_type": "default"})


def ready_with_another_tokenizer(w: Workspace) -> None:
    path = ready(w) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(tokenizer))


ROWS: list[tuple[Callable[[Workspace], None], tuple[str, ...]]] = [
    (no_such_data, ("experts[0].data[0].uri", "matches no file")),
    (no_such_seed, ("seed.uri", "config.json: no such file")),
    (storage_below_a_file, ("storage.uri", "Not a directory")),
    (unsupported_architecture, ("seed", "model_type", "gemma2")),
    (unknown_config_field, ("seed", "novel_scaling")),
    (truncated_seed, ("seed", "model.safetensors")),
    (no_tokenizer, ("prepare.tokenizer", "No such file")),
    (ready_of_another_width, ("experts[1].model", "intermediate_size", "176", "352")),
    (ready_of_another_rope, ("experts[1].model", "rope", "500000", "10000")),
    (ready_with_another_tokenizer, ("experts[1].model", "tokenizer")),
]


@pytest.mark.parametrize(("spoil", "words"), ROWS, ids=[row[0].__name__ for row in ROWS])
def test_preflight_refuses_it_before_anything_runs(
    inputs: Workspace,
    tmp_path: Path,
    spoil: Callable[[Workspace], None],
    words: tuple[str, ...],
) -> None:
    """Exit 78, the field and what is wrong in one line, no stage started, no traceback."""
    workspace = inputs.copy(tmp_path / "w")
    spoil(workspace)

    printed = workspace.btx("run", "tiny.yaml", code=78)

    lines = [line for line in printed.splitlines() if all(word in line for word in words)]
    assert lines, printed
    assert "Traceback" not in printed
    assert set(workspace.attempts().values()) <= {0}
    stages = workspace.folder / "build/demo/storage/stages"
    assert not list(stages.rglob("manifest.json"))


def test_a_source_without_a_usable_record_fails_its_stage_naming_it(
    inputs: Workspace, tmp_path: Path
) -> None:
    """Configuration: no retry, the source's URI in the message."""
    workspace = inputs.copy(tmp_path / "w")
    (workspace.folder / "empty.jsonl").write_text('{"text": ""}\nnot json\n{"other": "x"}\n')
    manifest = workspace.manifest(experts__1__data=[{"uri": "file://empty.jsonl"}])

    printed = workspace.btx("run", manifest, code=78)

    assert "empty.jsonl" in printed
    assert "Traceback" not in printed
    assert workspace.attempts()["prepare-math"] == 1


def test_a_full_disk_is_one_line_and_leaves_nothing_that_is_accepted(
    inputs: Workspace, tmp_path: Path
) -> None:
    """On a real file system of 1 MiB (mounting needs root): it fails; with room it succeeds."""
    workspace = inputs.copy(tmp_path / "w")
    small = workspace.folder / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    subprocess.run(mount, check=True)
    try:
        manifest = workspace.manifest(storage__uri="file://small", policy__maxRetries=0)
        printed = workspace.btx("run", manifest, code=1)
        manifests = list(small.rglob("manifest.json"))
        # With room in the very same folder it goes on, and nothing half-written was accepted.
        subprocess.run(["mount", "-o", "remount,size=256m", str(small)], check=True)
        workspace.btx("run", manifest, "--verify")
        attempts = workspace.attempts()
        workspace.btx("run", manifest, "--verify")
    finally:
        subprocess.run(["umount", str(small)], check=True)

    assert "No space left" in printed
    assert not any("/mix/" in str(path) for path in manifests), "1 MiB held the whole run"
    assert workspace.attempts() == attempts, "every byte was right the first time"


def test_a_broken_manifest_is_refused_in_one_line_each(inputs: Workspace, tmp_path: Path) -> None:
    """Every problem names its field; exit code 2."""
    workspace = inputs.copy(tmp_path / "w")
    manifest = workspace.manifest(
        trian={"x": 1}, train__optimizer__lr="fast", policy__maxRetries=-1
    )

    printed = workspace.btx("run", manifest, code=2)

    for words in ("spec.trian: unknown field", "spec.train.optimizer.lr", "spec.policy.maxRetries"):
        assert len([line for line in printed.splitlines() if words in line]) == 1, printed
    assert "Traceback" not in printed
