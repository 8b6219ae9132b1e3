"""etcd, API server, controller manager and scheduler: the real programs, without root.

All of them listen on loopback (or inside the network namespace they are given), on free ports, and
keep data, certificates, logs and the audit log below one folder.
"""

import contextlib
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from cluster import binaries
from cluster.certificates import Authority, openssl
from cluster.parts import Part
from kubernetes import client, config
from s3_server import free_ports

SERVICES = "10.0.0.0/24"
API_SERVICE = "10.0.0.1"
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "resources": [{"group": "coordination.k8s.io", "resources": ["leases"]}]},
        {"level": "Metadata"},
    ],
}


@dataclass
class Cluster:
    """A control plane that runs; `enter` are the words that put a program into its network."""

    folder: Path
    host: str
    port: int
    enter: tuple[str, ...] = ()
    parts: dict[str, Part] = field(default_factory=dict)
    s3_endpoint: str = ""
    """Of a real server, where chaos keeps what its runs make."""
    _ports: list[int] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The API server's."""
        return f"https://{self.host}:{self.port}"

    @property
    def kubeconfig(self) -> Path:
        """Of the administrator (system:masters)."""
        return self.folder / "certificates/admin.kubeconfig"

    @property
    def audit_log(self) -> Path:
        """One JSON object a line (audit.k8s.io/v1 Event, level Metadata), leases left out."""
        return self.folder / "audit.jsonl"

    @property
    def ledger(self) -> Path:
        """What played trainers committed (played_trainer.py)."""
        return self.folder / "ledger.jsonl"

    @property
    def authority(self) -> Authority:
        """Who signs clients and servers."""
        return Authority(self.folder / "certificates", "ca")

    def client(self) -> client.ApiClient:
        """A client for the administrator."""
        return config.new_client_from_config(str(self.kubeconfig))

    def add(self, name: str, *command: str | Path, **environment: str) -> Part:
        """A part in the cluster's network, started."""
        log = self.folder / "logs" / f"{name}.log"
        self.parts[name] = Part(name, (*self.enter, *command), log, environment)
        self.parts[name].start()
        return self.parts[name]

    def stop(self, name: str, *, kill: bool = True) -> None:
        """Ends one part, by SIGKILL unless told otherwise."""
        self.parts[name].stop(kill=kill)

    def start(self, name: str) -> None:
        """Starts a part again: same port, same data."""
        self.parts[name].start()
        if name in ("etcd", "kube-apiserver"):
            self.wait_ready()

    def wait_ready(self) -> None:
        """Until the API server says that it is ready."""
        folder = self.folder / "certificates"
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "admin.crt", folder / "admin.key")

        def ready() -> bool:
            with contextlib.suppress(OSError, urllib.error.URLError):
                url = f"{self.address}/readyz"
                with urllib.request.urlopen(url, context=context, timeout=5) as answer:
                    return bool(answer.status == 200)
            return False

        self.wait_for("the API server", ready)

    def wait_for(self, what: str, done: Callable[[], bool], seconds: float = 120) -> None:
        """Polls until `done`, as long as all parts live; for things that offer no watch."""
        until = time.monotonic() + seconds
        while not done():
            # Lanes in other threads add parts and take them out.
            for part in list(self.parts.values()):
                if part.process is not None:
                    part.check()
            if time.monotonic() > until:
                raise TimeoutError(f"{what}: not ready after {seconds:.0f} s; {self.folder}/logs")
            time.sleep(0.1)


@contextlib.contextmanager
def control_plane(
    folder: Path, *, host: str = "127.0.0.1", enter: tuple[str, ...] = ()
) -> Iterator[Cluster]:
    """A control plane with its data below `folder` (emptied first); stopped at the end.

    `enter` are words before each command that put it into a network namespace where `host` is.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("certificates", "logs"):
        (folder / name).mkdir(parents=True)
    # Free on the host is free enough: a namespace of its own has nobody else in it.
    port, *others = free_ports(3)
    cluster = Cluster(folder.resolve(), host, port, enter, _ports=others)
    try:
        _issue(cluster)
        _start_etcd(cluster)
        _start_api_server(cluster)
        cluster.wait_ready()
        # Earlier they end at once: what they may do is written by the API server as it starts.
        _start_controllers(cluster)
        core = client.CoreV1Api(cluster.client())
        cluster.wait_for("service account 'default'", lambda: _has_default(core))
        yield cluster
    finally:
        order = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
        extra = [name for name in reversed(cluster.parts) if name not in order]
        for name in (*extra, *order):
            if name in cluster.parts:
                cluster.parts[name].stop()


def ready(core: client.CoreV1Api, name: str) -> bool:
    """Whether pods may be bound to a node."""
    try:
        found = core.read_node(name)
    except client.ApiException as error:
        if error.status != 404:
            raise
        return False
    conditions = {c.type: c.status for c in found.status.conditions or ()}
    return conditions.get("Ready") == "True" and not found.spec.taints


def _has_default(core: client.CoreV1Api) -> bool:
    try:
        core.read_namespaced_service_account("default", "default")
    except client.ApiException as error:
        if error.status != 404:
            raise
        return False
    return True


def _issue(cluster: Cluster) -> None:
    """Every key and certificate of the control plane."""
    ca, folder = cluster.authority, cluster.folder / "certificates"
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc"]
    names += ["kubernetes.default.svc.cluster.local", "localhost"]
    hosts = [*names, "127.0.0.1", API_SERVICE, cluster.host]
    ca.issue("apiserver", user="kube-apiserver", hosts=hosts)
    ca.issue("apiserver-kubelet", user="apiserver-kubelet", group="system:masters")
    Authority(folder, "front-proxy-ca").issue("front-proxy", user="front-proxy-client")
    openssl("genrsa", "-out", folder / "accounts.key", "2048")
    openssl("rsa", "-in", folder / "accounts.key", "-pubout", "-out", folder / "accounts.pub")
    ca.kubeconfig("admin", cluster.address, user="admin", group="system:masters")
    for name in ("kube-controller-manager", "kube-scheduler", "kube-proxy"):
        ca.kubeconfig(name, cluster.address, user=f"system:{name}")


def _start_etcd(cluster: Cluster) -> None:
    """Without fsync: no test survives the machine's power."""
    client_url, peer_url = (f"http://127.0.0.1:{port}" for port in cluster._ports)
    cluster.add(
        "etcd", binaries.etcd(), "--name=one", f"--data-dir={cluster.folder / 'etcd'}",
        "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls={client_url}", f"--advertise-client-urls={client_url}",
        f"--listen-peer-urls={peer_url}", f"--initial-advertise-peer-urls={peer_url}",
        f"--initial-cluster=one={peer_url}",
    )  # fmt: skip


def _start_api_server(cluster: Cluster) -> None:
    """RBAC and Node authorization, the default admission plugins (PodSecurity is one) and an audit log."""
    folder = cluster.folder / "certificates"
    policy = cluster.folder / "audit-policy.yaml"
    policy.write_text(yaml.safe_dump(AUDIT_POLICY))
    issuer = "https://kubernetes.default.svc.cluster.local"
    # The kubernetes Service cannot point to loopback; the reconciler would complain every 10 s.
    loopback = ["--endpoint-reconciler-type=none"] if cluster.host.startswith("127.") else []
    cluster.add(
        "kube-apiserver", binaries.kubernetes() / "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{cluster._ports[0]}",
        f"--bind-address={cluster.host}", f"--advertise-address={cluster.host}",
        f"--secure-port={cluster.port}", *loopback,
        f"--tls-cert-file={folder}/apiserver.crt", f"--tls-private-key-file={folder}/apiserver.key",
        f"--client-ca-file={folder}/ca.crt", "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction,PodSecurity",
        f"--service-account-issuer={issuer}", f"--api-audiences={issuer}",
        f"--service-account-key-file={folder}/accounts.pub",
        f"--service-account-signing-key-file={folder}/accounts.key",
        f"--service-cluster-ip-range={SERVICES}", "--allow-privileged=true",
        f"--kubelet-client-certificate={folder}/apiserver-kubelet.crt",
        f"--kubelet-client-key={folder}/apiserver-kubelet.key",
        f"--kubelet-certificate-authority={folder}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP,Hostname",
        f"--requestheader-client-ca-file={folder}/front-proxy-ca.crt",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={folder}/front-proxy.crt",
        f"--proxy-client-key-file={folder}/front-proxy.key",
        f"--audit-policy-file={policy}", f"--audit-log-path={cluster.audit_log}",
        "--feature-gates=EtcdRangeStream=false", "--profiling=false", "--v=1",
        # Its heap is small here, so that a third of its work would be to collect garbage.
        GOGC="400",
    )  # fmt: skip


def _start_controllers(cluster: Cluster) -> None:
    """Controller manager (a lost node is noticed after 20 s) and scheduler."""
    folder = cluster.folder / "certificates"
    for name in ("kube-controller-manager", "kube-scheduler"):
        own = folder / f"{name}.kubeconfig"
        more: list[str] = []
        if name == "kube-controller-manager":
            more = [
                f"--service-account-private-key-file={folder}/accounts.key",
                f"--root-ca-file={folder}/ca.crt", "--use-service-account-credentials=true",
                "--node-monitor-period=2s", "--node-monitor-grace-period=20s",
                "--kube-api-qps=200", "--kube-api-burst=400",
            ]  # fmt: skip
        else:
            more = ["--kube-api-qps=200", "--kube-api-burst=400"]
        cluster.add(
            name, binaries.kubernetes() / name, f"--kubeconfig={own}",
            f"--authentication-kubeconfig={own}", f"--authorization-kubeconfig={own}",
            "--secure-port=0", "--leader-elect=false", *more,
        )  # fmt: skip
