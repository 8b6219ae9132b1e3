"""A real node: containerd, runc, CNI, kubelet, kube-proxy and DNS in a network namespace of its own.

Needs root. One at a time on a machine: its pods' cgroups are /kubepods. The kubelet wants an address
that is not loopback, so the control plane runs in the same namespace; the host reaches all of it,
and pods reach the host at `Network.gateway`.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cluster import binaries, oci
from cluster.control_plane import Cluster, control_plane, ready
from kubernetes import client

PAUSE, PROBE = "localhost/pause:1", "localhost/probe:1"
KEPT = 3
"""Images of one repository that containerd keeps from run to run."""


@dataclass(frozen=True)
class Network:
    """A network namespace, joined to the host by a pair of interfaces."""

    name: str
    number: int

    @property
    def address(self) -> str:
        """The node's, and the API server's."""
        return f"10.255.{self.number}.1"

    @property
    def gateway(self) -> str:
        """The host's, seen from the pods."""
        return f"10.255.{self.number}.254"

    @property
    def pods(self) -> str:
        """Addresses of the pods; the host has a route to them."""
        return f"10.254.{self.number}.0/24"

    @property
    def enter(self) -> tuple[str, ...]:
        """`ip netns exec` would mount a fresh /sys, which hides the cgroups."""
        return ("nsenter", f"--net=/run/netns/{self.name}")


def sh(*words: str | Path, check: bool = True) -> str:
    """Runs a command; its output; raises with what it says."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """A namespace with a free subnet; gone with its interfaces and routes at the end."""
    if os.geteuid() != 0:
        raise PermissionError("the node needs root: network namespaces, mounts, cgroups")
    taken = set(re.findall(r"10\.25[45]\.(\d+)\.", sh("ip", "-o", "address") + sh("ip", "route")))
    number = next(n for n in range(77, 255) if str(n) not in taken)
    net = Network(f"btx-{os.getpid()}", number)
    outside, inside = f"btx{number}h", f"btx{number}n"
    sh("ip", "netns", "add", net.name)
    try:
        sh("ip", "link", "add", outside, "type", "veth", "peer", "name", inside, "netns", net.name)
        sh("ip", "address", "add", f"{net.gateway}/24", "dev", outside)
        sh("ip", "link", "set", outside, "up")
        sh("ip", "route", "add", net.pods, "via", net.address)
        ip = (*net.enter, "ip")
        sh(*ip, "link", "set", "lo", "up")
        sh(*ip, "address", "add", f"{net.address}/24", "dev", inside)
        sh(*ip, "link", "set", inside, "up")
        sh(*ip, "route", "add", "default", "via", net.gateway)
        yield net
    finally:
        sh("ip", "link", "delete", outside, check=False)
        sh("ip", "netns", "delete", net.name)


class Node:
    """The node's programs, in the cluster's list of parts."""

    def __init__(self, cluster: Cluster, net: Network, name: str) -> None:
        self.cluster, self.net, self.name = cluster, net, name
        self.folder = cluster.folder / "node"
        self.root = binaries.packages()
        # Images outlive the cluster: one of gigabytes is unpacked once.
        self.store = binaries.cache_folder() / f"containerd-{self.root.name.partition('-')[2]}"
        self.socket = self.folder / "containerd.sock"
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        self.environment = {
            "PATH": f"{self.root}/usr/bin:{self.root}/bin:{self.root}/usr/sbin:{os.environ['PATH']}",
            "LD_LIBRARY_PATH": str(libraries),
            "XTABLES_LIBDIR": str(libraries / "xtables"),
        }

    def ctr(self, *words: str | Path, check: bool = True) -> str:
        """containerd's own client, in the kubelet's namespace."""
        program = self.root / "usr/bin/ctr"
        return sh(program, "-a", self.socket, "-n", "k8s.io", *words, check=check)

    def load(self, image: Path) -> None:
        """An OCI archive; pods that use it say `imagePullPolicy: Never`."""
        self.ctr("images", "import", "--local", image)

    def hand_over(self, image: oci.Image) -> int:
        """An image of a layout, without the layers that are there; how many bytes were sent."""
        if image.name in self.ctr("images", "list", "-q").split():
            return 0
        known = frozenset(self.ctr("content", "list", "-q").split())
        command = [
            self.root / "usr/bin/ctr", "-a", self.socket, "-n", "k8s.io",
            "images", "import", "--local", "-",
        ]  # fmt: skip
        log = self.folder / "import.log"
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out)
            assert process.stdin
            with process.stdin as pipe:
                sent = image.write(pipe, known)
        if process.wait():
            raise RuntimeError(f"import of {image.name}: {log.read_text()[-2000:]}")
        self._share(image)
        self._drop_old(image)
        return sent

    def _share(self, image: oci.Image) -> None:
        """One copy on the disk of what containerd and the layout both hold."""
        for digest in image.blobs():
            here = image.blob(digest)
            there = self.store / "io.containerd.content.v1.content/blobs" / digest.replace(":", "/")
            if here.stat().st_dev == there.stat().st_dev and not here.samefile(there):
                spare = here.with_name(f"{here.name}.link")
                spare.unlink(missing_ok=True)
                spare.hardlink_to(there)
                spare.replace(here)

    def _drop_old(self, image: oci.Image) -> None:
        """Removes all but the latest images of a repository."""
        record = self.store / "handed-over"
        lines = record.read_text().split() if record.exists() else []
        lines = [*(line for line in lines if line != image.name), image.name]
        ours = [line for line in lines if line.startswith(f"{image.repository}:")]
        there = self.ctr("images", "list", "-q").split()
        for name in ours[:-KEPT]:
            # The kubelet's side keeps a name by id beside ours.
            ids = [n for n in there if n.startswith(f"sha256:{name.rpartition(':')[2]}")]
            self.ctr("images", "remove", name, *ids, check=False)
        record.write_text("\n".join(line for line in lines if line not in ours[:-KEPT]))

    def start_containerd(self) -> None:
        """With the images of the sandbox and of the tests."""
        cni = self.folder / "cni"
        cni.mkdir()
        (cni / "10-btx.conflist").write_text(json.dumps(self._cni()))
        path = self._write("containerd.toml", self._containerd(cni))
        # What pods of a killed run left; images are elsewhere.
        shutil.rmtree(self.store / "io.containerd.grpc.v1.cri", ignore_errors=True)
        program = self.root / "usr/bin/containerd"
        self.cluster.add("containerd", program, "--config", path, **self.environment)
        self._wait_for_containerd()
        if self.ctr("containers", "list", "-q"):
            self._clear_containerd()
            self.cluster.parts["containerd"].stop()
            self.cluster.start("containerd")
            self._wait_for_containerd()
        image = self.folder / "probe.tar"
        oci.archive(binaries.go_build("probe", ["."], ()) / "probe", image, PAUSE, PROBE)
        self.load(image)

    def _wait_for_containerd(self) -> None:
        self.cluster.wait_for(
            "containerd",
            lambda: self.socket.exists() and "Server:" in self.ctr("version", check=False),
        )

    def _cni(self) -> dict[str, Any]:
        ipam = {"type": "host-local", "subnet": self.net.pods, "dataDir": str(self.folder / "ipam")}
        ipam |= {"routes": [{"dst": "0.0.0.0/0"}]}
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipMasq": False}
        plugins = [bridge | {"hairpinMode": True, "ipam": ipam}, {"type": "loopback"}]
        return {"cniVersion": "1.0.0", "name": self.net.name, "plugins": plugins}

    def _containerd(self, cni: Path) -> str:
        # Without CAP_SYS_RESOURCE nothing may lower its oom_score_adj, as sandboxes ask for.
        return f"""
version = 3
root = "{self.store}"
state = "{self.folder}/containerd-state"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  stream_server_address = "127.0.0.1"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dirs = ["{self.root}/usr/lib/cni"]
  conf_dir = "{cni}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
    BinaryName = "{self.root}/usr/sbin/runc"
    SystemdCgroup = false
"""

    def start_kubelet(self) -> None:
        """Registers the node; Ready when containerd and the network are."""
        ca, certificates = self.cluster.authority, self.cluster.folder / "certificates"
        user = {"user": f"system:node:{self.name}", "group": "system:nodes"}
        kubeconfig = ca.kubeconfig("kubelet", self.cluster.address, **user)
        ca.issue("kubelet-server", user=self.name, hosts=[self.name, self.net.address])
        nothing = {f"{name}.available": "0%" for name in ("nodefs", "imagefs")}
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": self.net.address, "port": 10250, "readOnlyPort": 0,
            "healthzBindAddress": "127.0.0.1",
            "authentication": {
                "anonymous": {"enabled": False}, "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(ca.certificate)},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": f"{certificates}/kubelet-server.crt",
            "tlsPrivateKeyFile": f"{certificates}/kubelet-server.key",
            "cgroupDriver": "cgroupfs", "failCgroupV1": False, "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{self.socket}",
            "oomScoreAdj": 0, "maxOpenFiles": 20000, "maxPods": 100,
            "enforceNodeAllocatable": ["pods"], "makeIPTablesUtilChains": False,
            "resolvConf": "", "clusterDNS": [self.net.address], "clusterDomain": "cluster.local",
            "imageGCHighThresholdPercent": 100, "evictionHard": {**nothing, "memory.available": "100Mi"},
            "volumePluginDir": f"{self.folder}/plugins",
        }  # fmt: skip
        path = self._write("kubelet.yaml", yaml.safe_dump(settings))
        self.cluster.add(
            "kubelet", binaries.kubernetes() / "kubelet", f"--config={path}",
            f"--kubeconfig={kubeconfig}", f"--hostname-override={self.name}",
            f"--node-ip={self.net.address}", f"--root-dir={self.folder}/kubelet",
            f"--cert-dir={self.folder}/kubelet/pki", **self.environment,
        )  # fmt: skip
        core = client.CoreV1Api(self.cluster.client())
        self.cluster.wait_for(f"node {self.name}", lambda: ready(core, self.name))

    def start_proxy(self) -> None:
        """Services, by iptables."""
        folder = self.cluster.folder / "certificates"
        settings = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": f"{folder}/kube-proxy.kubeconfig"},
            "mode": "iptables", "iptables": {"masqueradeAll": True}, "clusterCIDR": self.net.pods,
            "conntrack": {"maxPerCore": 0, "min": 0}, "hostnameOverride": self.name,
            "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
        }  # fmt: skip
        path = self._write("kube-proxy.yaml", yaml.safe_dump(settings))
        program = binaries.kubernetes() / "kube-proxy"
        self.cluster.add("kube-proxy", program, f"--config={path}", **self.environment)

    def start_dns(self) -> None:
        """CoreDNS at the node's address, port 53, for cluster.local only."""
        user = "system:coredns"
        kubeconfig = self.cluster.authority.kubeconfig("coredns", self.cluster.address, user=user)
        may = {"verbs": ["list", "watch"]}
        rules = [
            {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], **may},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], **may},
        ]
        rbac = client.RbacAuthorizationV1Api(self.cluster.client())
        rbac.create_cluster_role({"metadata": {"name": user}, "rules": rules})
        subject = {"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"}
        role = {"kind": "ClusterRole", "name": user, "apiGroup": "rbac.authorization.k8s.io"}
        rbac.create_cluster_role_binding(
            {"metadata": {"name": user}, "roleRef": role, "subjects": [subject]}
        )
        path = self._write(
            "Corefile",
            ".:53 {\n errors\n ready\n cache 1\n"
            f" kubernetes cluster.local {{\n  kubeconfig {kubeconfig}\n }}\n}}\n",
        )
        self.cluster.add("coredns", binaries.coredns(), "-conf", path)

    def _write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def stop(self) -> None:
        """Pods first, by the kubelet; then whatever it left: tasks, namespaces, mounts, cgroups."""
        with contextlib.suppress(Exception):
            self._delete_pods()
        for name in ("coredns", "kube-proxy", "kubelet"):
            if name in self.cluster.parts:
                self.cluster.parts[name].stop()
        if "containerd" in self.cluster.parts:
            self._clear_containerd()
            self.cluster.parts["containerd"].stop()
        for path in Path("/var/lib/cni/results").glob(f"{self.net.name}-*"):
            path.unlink()
        points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        ours = (f"{self.folder}/", f"{self.store}/")
        for point in reversed([p for p in points if p.startswith(ours)]):
            sh("umount", point, check=False)
        for top in Path("/sys/fs/cgroup").glob("**/kubepods"):
            for folder, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    def _delete_pods(self) -> None:
        core = client.CoreV1Api(self.cluster.client())
        mine = {"field_selector": f"spec.nodeName={self.name}"}
        # Nobody makes new ones meanwhile.
        for name in ("kube-scheduler", "kube-controller-manager"):
            self.cluster.parts[name].stop()
        for pod in core.list_pod_for_all_namespaces(**mine).items:
            patch = {"metadata": {"finalizers": None}}
            core.patch_namespaced_pod(pod.metadata.name, pod.metadata.namespace, patch)
            core.delete_namespaced_pod(
                pod.metadata.name, pod.metadata.namespace, grace_period_seconds=1
            )
        self.cluster.wait_for(
            "the end of the pods",
            lambda: not core.list_pod_for_all_namespaces(**mine).items,
            seconds=30,
        )

    def _clear_containerd(self) -> None:
        namespaces = []
        for name in self.ctr("containers", "list", "-q", check=False).split():
            info = json.loads(self.ctr("containers", "info", name))
            linux = info["Spec"]["linux"]["namespaces"]
            namespaces += [n["path"] for n in linux if n["type"] == "network" and n.get("path")]
            self.ctr("tasks", "delete", "--force", name, check=False)
            self.ctr("containers", "delete", name, check=False)
        for path in namespaces:
            sh("umount", path, check=False)
            if path.startswith(("/run/netns/cni-", "/var/run/netns/cni-")):
                Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def node(cluster: Cluster, net: Network, name: str = "node-1") -> Iterator[Node]:
    """A real node, ready for pods; the control plane must run inside `net`."""
    started = Node(cluster, net, name)
    started.folder.mkdir()
    try:
        started.start_containerd()
        started.start_dns()
        started.start_proxy()
        started.start_kubelet()
        yield started
    finally:
        started.stop()


@contextlib.contextmanager
def real_node(folder: Path) -> Iterator[Node]:
    """A control plane and a real node in a new network namespace, data below `folder`.

    Waits for another one of this user's to end: containerd's images are everybody's.
    """
    with (
        binaries.locked(binaries.cache_folder() / "node.lock"),
        network() as net,
        control_plane(folder, host=net.address, enter=net.enter) as cluster,
        node(cluster, net) as started,
    ):
        yield started


@contextlib.contextmanager
def real_cluster(folder: Path) -> Iterator[Cluster]:
    """The same; its control plane."""
    with real_node(folder) as started:
        yield started.cluster
