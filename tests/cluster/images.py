"""`make images`: both images from the Dockerfile.

With docker if its daemon answers; else with buildah, as root, which tests always use. buildah's
storage and the layout it is exported to (uncompressed: a layer is written once and never again)
are kept outside the clone. Without a registry in reach the base image is made of Debian packages
under the Dockerfile's `ARG BASE`; `$BASE` names another.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from cluster import binaries
from cluster.oci import REFERENCE, Image

ROOT = Path(__file__).parent.parent.parent
TARGETS = ("operator", "trainer")
TOOLS = ("buildah", "skopeo", "mmdebstrap")
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
DAY = 86_400
DEBIAN = (
    "mmdebstrap", "--quiet", "--variant=minbase", 
    "--include=ca-certificates,python3,python3-venv,libmimalloc2.0",
    "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
)  # fmt: skip


def build() -> dict[str, Image]:
    """Both images by target, made or found, with buildah. Raises PermissionError without root."""
    if os.geteuid() != 0:
        raise PermissionError("buildah needs root here: chroot, mounts and the owners of files")
    _install()
    folder = binaries.cache_folder() / "images"
    with binaries.locked(binaries.cache_folder() / "images.lock"):
        base = os.environ.get("BASE") or _base(folder)
        # The first is tagged too, so that the prune leaves it for the next build.
        for target in ("pins", *TARGETS):
            _bud(folder, target, base)
        _buildah(folder, "rmi", "--prune")
        for target in TARGETS:
            storage = f"containers-storage:[overlay@{folder}/storage+{folder}/run]"
            command = ["skopeo", "copy", "--quiet", "--dest-oci-accept-uncompressed-layers"]
            wanted = f"oci:{folder}/layout:{target}"
            _run(*command, f"{storage}localhost/btx-{target}", wanted)
        # buildah leaves its storage mounted over itself.
        _run("umount", folder / "storage/overlay")
        found = {t: Image.read(folder / "layout", t, f"localhost/btx-{t}") for t in TARGETS}
        _drop_others(folder / "layout", found)
    return found


def _install() -> None:
    """The tools, from Debian's packages, if one is missing."""
    if not all(map(shutil.which, TOOLS)):
        _run("apt-get", "update", "-qq")
        _run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *TOOLS)


def _base(folder: Path) -> str:
    """Python on the machine's own Debian release, as an image of buildah's storage."""
    release = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.MULTILINE)
    assert found, "the base image is made from Debian, and this machine's release has no name"
    key = hashlib.sha256(" ".join((*DEBIAN, found[1])).encode()).hexdigest()[:12]
    name = f"localhost/btx-base:{key}"
    if not _buildah(folder, "images", "--quiet", "--filter", f"reference={name}"):
        archive = folder / "base.tar"
        archive.unlink(missing_ok=True)
        _run(*DEBIAN, found[1], archive)
        container = _buildah(folder, "from", "scratch")
        _buildah(folder, "add", "--quiet", container, archive, "/")
        _buildah(folder, "commit", "--quiet", "--rm", container, name)
        archive.unlink()
    return name


def _bud(folder: Path, target: str, base: str) -> None:
    arguments = {"BASE": base}
    more: list[str] = []
    if AUTHORITIES.is_file():
        # A network of its own may have authorities of its own.
        arguments["SSL_CERT_FILE"] = str(AUTHORITIES)
        more = ["--volume", f"{AUTHORITIES.parent}:{AUTHORITIES.parent}:ro"]
    for name, value in arguments.items():
        more += ["--build-arg", f"{name}={value}"]
    _buildah(
        folder, "bud", "--quiet", "--layers", "--isolation=chroot", "--network=host",
        # The defaults are above what a machine may allow.
        "--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000",
        *more, "--target", target, "--tag", f"localhost/btx-{target}", ROOT,
    )  # fmt: skip


def _buildah(folder: Path, command: str, *words: str | Path) -> str:
    place = (f"--root={folder}/storage", f"--runroot={folder}/run", "--storage-driver=overlay")
    return _run("buildah", *place, command, *words)


def _run(*words: str | Path) -> str:
    """Runs a command; its output; raises with the end of what it says."""
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}:\n{done.stdout}{done.stderr[-4000:]}")
    return done.stdout.strip()


def _drop_others(layout: Path, kept: dict[str, Image]) -> None:
    """Removes entries of the layout but `kept`, and old blobs that none of these has."""
    index = json.loads((layout / "index.json").read_text())
    index["manifests"] = [
        entry for entry in index["manifests"] if entry.get("annotations", {}).get(REFERENCE) in kept
    ]
    (layout / "index.json").write_text(json.dumps(index))
    named = {digest for image in kept.values() for digest in image.blobs()}
    for path in (layout / "blobs/sha256").iterdir():
        # A younger one may be of an image that another process is about to hand over.
        if f"sha256:{path.name}" not in named and time.time() - path.stat().st_ctime > DAY:
            path.unlink()


def _docker_answers() -> bool:
    if not shutil.which("docker"):
        return False
    return not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode


def _build_with_docker(version: str) -> None:
    given = [f"--build-arg=BASE={os.environ['BASE']}"] if os.environ.get("BASE") else []
    for target in TARGETS:
        name = f"btx-{target}:{version}"
        command = ["docker", "build", *given, "--target", target, "--tag", name, ROOT]
        subprocess.run(command, check=True)
        print(name)


def main() -> None:
    """Builds and says how to get at the images."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    begun = time.monotonic()
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        given = [f"--build-arg=BASE={os.environ['BASE']}"] if os.environ.get("BASE") else []
        for target in TARGETS:
            name = f"btx-{target}:{version}"
            subprocess.run(
                ["docker", "build", *given, "--target", target, "--tag", name, ROOT], check=True
            )
            print(name)
        return
    try:
        found = build()
    except PermissionError as error:
        sys.exit(f"neither a docker daemon nor root: {error}")
    for target, image in found.items():
        print(f"{image.name}  {sum(image.blobs().values()) / 1e6:,.0f} MB")
        print(f"  skopeo copy oci:{image.layout}:{target} docker://REGISTRY/btx-{target}:{version}")
    print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
