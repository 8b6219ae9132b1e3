"""Keys and certificates of one cluster, by openssl."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml


def openssl(*words: str | Path) -> None:
    """Runs openssl; raises with what it says."""
    done = subprocess.run(["openssl", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Authority:
    """A certificate authority in a folder; `<name>.crt` and `<name>.key` are its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.certificate, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        if not self.certificate.exists():
            self._request(name, f"/CN={name}", "basicConstraints=critical,CA:TRUE", own=True)

    def issue(self, name: str, *, user: str, group: str = "", hosts: Sequence[str] = ()) -> Path:
        """`<name>.crt` with `<name>.key` beside it, for a client and, with hosts, a server."""
        organization = f"/O={group}" if group else ""
        names = [f"{'IP' if host[0].isdigit() else 'DNS'}:{host}" for host in hosts]
        extensions = ["extendedKeyUsage=clientAuth" + (",serverAuth" if hosts else "")]
        if names:
            extensions.append(f"subjectAltName={','.join(names)}")
        self._request(name, f"{organization}/CN={user}", *extensions)
        return self.folder / f"{name}.crt"

    def _request(self, name: str, subject: str, *extensions: str, own: bool = False) -> None:
        signer = [] if own else ["-CA", self.certificate, "-CAkey", self.key]
        added = [word for extension in extensions for word in ("-addext", extension)]
        openssl(
            "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-days", "30", "-subj", subject, *added, *signer,
            "-keyout", self.folder / f"{name}.key", "-out", self.folder / f"{name}.crt",
        )  # fmt: skip

    def kubeconfig(self, name: str, address: str, *, user: str, group: str = "") -> Path:
        """A file by which `user` (of `group`) reaches the API server."""
        certificate = self.issue(name, user=user, group=group)
        path = self.folder / f"{name}.kubeconfig"
        cluster = {"server": address, "certificate-authority": str(self.certificate)}
        keys = {
            "client-certificate": str(certificate),
            "client-key": str(certificate.with_suffix(".key")),
        }
        context = {"cluster": "btx", "user": name}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "btx",
                    "clusters": [{"name": "btx", "cluster": cluster}],
                    "users": [{"name": name, "user": keys}],
                    "contexts": [{"name": "btx", "context": context}],
                }
            )
        )
        path.chmod(0o600)
        return path
