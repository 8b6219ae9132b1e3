"""A folder in which `btx` runs for real: the demo's inputs, a manifest small enough for a test."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from btx_api.status import Status

REPOSITORY = Path(__file__).parent.parent
MARK = "BTX_TEST_FOLDER"
"""Environment variable that every process of a workspace inherits: how survivors are found."""


class Workspace:
    """One working folder; `btx` runs in it as a user would type it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, MARK: str(folder)}

    @classmethod
    def with_inputs(cls, folder: Path) -> "Workspace":
        """A folder with the demo's data and randomly initialised model."""
        workspace = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(REPOSITORY / "examples/demo.py"), "--inputs-only"]
        subprocess.run(command, cwd=folder, check=True)
        return workspace

    def copy(self, folder: Path) -> "Workspace":
        """The same files in a folder of their own."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace(folder)

    def manifest(
        self, name: str = "tiny", *, method: str = "BTX", tasks: bool = False, **changes: Any
    ) -> str:
        """Writes the quickstart cut down to seconds: two of its experts, and no questions but
        with `tasks`; returns the file's name."""
        source = "quickstart-dense.yaml" if method == "Dense" else "quickstart.yaml"
        run = yaml.safe_load((REPOSITORY / "examples" / source).read_text())
        run["metadata"]["name"] = name
        spec = run["spec"]
        spec["seed"]["uri"] = "file://build/demo/init"
        del spec["experts"][1], spec["evaluate"]["domains"][1]
        del spec["finetune"]["data"][0]["domains"]["prose"]
        for expert in spec["experts"]:
            expert["tokens"] = 8192
        for block in (spec["train"], *([spec["finetune"]] if method == "BTX" else [])):
            block["heldOutTokens"] = 1024
        spec["finetune"]["data"][0]["tokens"] = 8192
        spec["evaluate"]["tokens"] = 512
        if not tasks:
            del spec["evaluate"]["tasks"]
        spec["policy"]["backoffSeconds"] = 0
        for path, value in changes.items():
            _put(spec, path.split("__"), value)
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
        return f"{name}.yaml"

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Starts `btx` with these arguments."""
        return subprocess.Popen(
            [sys.executable, "-m", "btx_operator.cli", *arguments],
            cwd=self.folder, env=self.environment, text=True, preexec_fn=_hear,  # noqa: PLW1509 - before threads matter
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def btx(self, *arguments: str, code: int = 0) -> str:
        """Runs `btx` to its end; returns what it printed; fails on another exit code."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=900)
        assert process.returncode == code, f"{arguments}: {process.returncode}\n{out}\n{err}"
        return out + err

    def status(self, run: str = "tiny") -> Status:
        """The run's status as it is on disk."""
        text = (self.folder / ".btx/runs" / run / "status.json").read_text()
        return Status.parse(json.loads(text))

    def attempts(self, run: str = "tiny") -> dict[str, int]:
        """Number of the latest attempt per stage."""
        return {row.name: row.attempt for row in self.status(run).stages}

    def stage_folder(self, stage: str, run: str = "tiny") -> Path:
        """Where a stage's artifact is in the storage."""
        row = next(row for row in self.status(run).stages if row.name == stage)
        kind = stage.partition("-")[0]
        return self.folder / "build/demo/storage/stages" / kind / row.digest

    def forget(self, *stages: str, run: str = "tiny") -> None:
        """Removes what these stages have left in the storage, and every run's own folder."""
        for stage in stages:
            shutil.rmtree(self.stage_folder(stage, run))
        shutil.rmtree(self.folder / ".btx")

    def artifact(self, stage: str, run: str = "tiny") -> Path:
        """The folder of the files that a stage's manifest names."""
        folder = self.stage_folder(stage, run)
        manifest = json.loads((folder / "manifest.json").read_text())
        return folder / "attempts" / manifest["token"]

    def checksums(self, run: str = "tiny") -> dict[str, dict[str, str]]:
        """crc32c of every file of every stage's artifact."""
        found = {}
        for row in self.status(run).stages:
            text = (self.stage_folder(row.name, run) / "manifest.json").read_text()
            found[row.name] = {f["name"]: f["crc32c"] for f in json.loads(text)["files"]}
        return found

    def survivors(self) -> list[str]:
        """Command lines of processes that this workspace started and that still run."""
        return [*self.processes().values()]

    def processes(self) -> dict[int, str]:
        """The same by process id."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = (process / "environ").read_bytes()
                state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ProcessLookupError):
                continue
            if f"{MARK}={self.folder}\0".encode() in environment and state != "Z":
                found[int(process.name)] = command
        return found


def _hear() -> None:
    # A test that a shell started in the background has SIGINT ignored; a user's terminal does not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _put(target: Any, path: list[str], value: Any) -> None:
    for part in path[:-1]:
        target = target[int(part)] if part.isdigit() else target.setdefault(part, {})
    target[int(path[-1]) if path[-1].isdigit() else path[-1]] = value


def flip(path: Path, offset: int = -7) -> None:
    """Changes one byte of a file, whatever its mode."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    mode = path.stat().st_mode
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(mode)
