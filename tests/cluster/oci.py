"""Container images as OCI layouts and archives, without any registry."""

import hashlib
import io
import json
import tarfile
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
NAME = "io.containerd.image.name"
REFERENCE = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class Image:
    """An image of a layout as it was when it was read; the layout may have a newer one by now."""

    layout: Path
    repository: str
    descriptor: dict[str, Any]
    """Media type, digest and size of its manifest."""
    manifest: dict[str, Any]
    """With config and layers."""

    @classmethod
    def read(cls, layout: Path, reference: str, repository: str) -> "Image":
        """The image that the layout knows by a reference."""
        entries = json.loads((layout / "index.json").read_text())["manifests"]
        [found] = [e for e in entries if e.get("annotations", {}).get(REFERENCE) == reference]
        descriptor = {key: found[key] for key in ("mediaType", "digest", "size")}
        path = layout / "blobs" / descriptor["digest"].replace(":", "/")
        return cls(layout, repository, descriptor, json.loads(path.read_text()))

    @property
    def config(self) -> dict[str, Any]:
        """User, entry point, history."""
        return dict(json.loads(self.blob(self.manifest["config"]["digest"]).read_text()))

    def blob(self, digest: str) -> Path:
        """File of `sha256:...`."""
        return self.layout / "blobs" / digest.replace(":", "/")

    def blobs(self) -> dict[str, int]:
        """Size in bytes by digest: layers, config, manifest."""
        parts = [*self.manifest["layers"], self.manifest["config"], self.descriptor]
        return {part["digest"]: part["size"] for part in parts}

    @property
    def tag(self) -> str:
        """By content: the first 12 digits of the config's digest."""
        return str(self.manifest["config"]["digest"].partition(":")[2][:12])

    @property
    def name(self) -> str:
        """Repository and tag."""
        return f"{self.repository}:{self.tag}"

    def write(self, out: IO[bytes], known: Set[str]) -> int:
        """Writes an archive without the blobs that the reader knows; bytes of the others."""
        entry = {**self.descriptor, "annotations": {NAME: self.name}}
        index = json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()
        sent = {digest: size for digest, size in self.blobs().items() if digest not in known}
        with tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20) as tar:
            for name, data in (("oci-layout", LAYOUT), ("index.json", index)):
                _add(tar, name, data)
            for digest in sent:
                path = self.blob(digest)
                with path.open("rb") as file:
                    entry_of = tar.gettarinfo(path, f"blobs/{digest.replace(':', '/')}", file)
                    entry_of.type = tarfile.REGTYPE  # not a link to another one of the same bytes
                    tar.addfile(entry_of, file)
        return sum(sent.values())


def archive(program: Path, target: Path, *names: str) -> None:
    """Writes `target`: an archive with an image under each name, its entry point /program."""
    layer = _tar({"program": (program.read_bytes(), 0o755)})
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        kind = f"application/vnd.oci.image.{media}"
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    described = add(layer, "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/program"], "User": "65532"},
        "rootfs": {"type": "layers", "diff_ids": [described["digest"]]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": add(json.dumps(config).encode(), "config.v1+json"),
        "layers": [described],
    }
    image = add(json.dumps(manifest).encode(), "manifest.v1+json")
    entries = [{**image, "annotations": {NAME: name}} for name in names]
    index = {"schemaVersion": 2, "manifests": entries}
    files = {"oci-layout": LAYOUT, "index.json": json.dumps(index).encode()}
    target.write_bytes(_tar({name: (data, 0o644) for name, data in (files | blobs).items()}))


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, (data, mode) in files.items():
            _add(tar, name, data, mode)
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), mode
    tar.addfile(entry, io.BytesIO(data))
