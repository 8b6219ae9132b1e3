"""What is in the images, seen from pods and from the layout."""

import json
from typing import Any

import pytest
from cluster.installation import Installation

TARGETS = ("operator", "trainer")
FORBIDDEN = {
    "operator": ("torch", "transformers", "boto3", "numpy", "btx_trainer"),
    "trainer": ("kopf", "kubernetes", "btx_operator"),
}
WANTED = {"operator": ("kopf", "kubernetes.aio"), "trainer": ("torch", "transformers", "boto3")}
LOOK = """
import ast, importlib.util, json, os, pathlib, shutil, stat, sys
names = json.loads(sys.argv[1])
files = [p for top in ("/usr", "/opt", "/etc", "/bin", "/sbin", "/lib", "/var", "/root")
         for p in pathlib.Path(top).rglob("*") if not p.is_symlink()]
def writable(path):
    try:
        (pathlib.Path(path) / "probe").write_text("x")
    except OSError:
        return False
    return True
def loose(path):
    try:
        return bool(path.stat().st_mode & (stat.S_ISUID | stat.S_ISGID)) and path.is_file()
    except PermissionError:
        return False
def parses(path):
    try:
        return bool(ast.parse(path.read_bytes()))
    except SyntaxError:
        return False  # written for a newer Python
def importable(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
sources = [p for p in files if p.suffix == ".py" and "bin" not in p.parts and p.is_relative_to("/opt/btx")]
print(json.dumps({
    "uid": [os.getuid(), os.getgid()],
    "importable": [name for name in names if importable(name)],
    "setuid": [str(p) for p in files if loose(p)],
    "compilers": [n for n in ("cc", "gcc", "g++", "clang", "ld", "as", "make", "go", "rustc", "pip", "uv") if shutil.which(n)],
    "uncompiled": [str(p) for p in sources
                   if not pathlib.Path(importlib.util.cache_from_source(p)).exists() and parses(p)],
    "sources": len(sources),
    "writable": [p for p in ("/", "/tmp", "/opt/btx", "/scratch", os.environ["HOME"]) if writable(p)],
}))
"""


def pod(image: str, *words: str, volume: str = "/scratch") -> dict[str, Any]:
    """A restricted pod that runs Python with these words; only `volume` can be written to."""
    security = {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    container = {
        "name": "main", "image": image, "imagePullPolicy": "Never", "securityContext": security,
        "command": ["python"], "args": list(words),
        "volumeMounts": [{"name": "scratch", "mountPath": volume}],
    }  # fmt: skip
    spec = {
        "restartPolicy": "Never", "automountServiceAccountToken": False, "containers": [container],
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "look"}, "spec": spec}


def output(installed: Installation, namespace: str, body: dict[str, Any]) -> str:
    """What a pod printed, once it has succeeded."""
    installed.apply(namespace, body)
    here = f"--namespace={namespace}"
    wait = ("--for=jsonpath={.status.phase}=Succeeded", "--timeout=180s")
    try:
        installed.kubectl("wait", "pod/look", *wait, here)
    except AssertionError:
        raise AssertionError(
            installed.kubectl("describe", "pod/look", here)
            + installed.kubectl("logs", "pod/look", here)
        ) from None
    return installed.kubectl("logs", "pod/look", here)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_holds_what_it_needs_and_no_more(
    installed: Installation, team: str, target: str
) -> None:
    """User 65532, no compilers, no setuid files, bytecode of every module, one place to write to."""
    names = json.dumps([*FORBIDDEN[target], *WANTED[target]])
    volume = {"operator": "/tmp", "trainer": "/scratch"}[target]
    body = pod(installed.images[target].name, "-c", LOOK, names, volume=volume)
    found = json.loads(output(installed, team, body))

    print(f"{target}: {sum(installed.images[target].blobs().values()) / 1e6:,.0f} MB")
    assert found.pop("sources") > 100
    assert set(found.pop("writable")) == {volume}
    assert found == {
        "uncompiled": [],
        "uid": [65532, 65532],
        "importable": list(WANTED[target]),
        "setuid": [],
        "compilers": [],
    }


@pytest.mark.parametrize("target", TARGETS)
def test_a_change_of_code_is_a_small_layer(installed: Installation, target: str) -> None:
    """All that follows the dependencies is below 5 MB."""
    image = installed.images[target]
    sizes = [layer["size"] for layer in image.manifest["layers"]]
    config = image.config
    steps = [s["created_by"] for s in config["history"] if not s.get("empty_layer")]
    assert len(steps) == len(sizes)
    last = max(i for i, step in enumerate(steps) if "uv pip install" in step)

    assert sum(sizes[last + 1 :]) < 5e6
    assert config["config"]["User"] == "65532:65532"
