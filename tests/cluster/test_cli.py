"""`btx status`, `plan`, `retry` and `refresh` against a cluster, with the rights of a user."""

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from btx_api.names import GROUP, PLURAL
from cluster.control_plane import Cluster
from cluster.operator_process import Operator
from cluster.space import TOLD, Space, attempt, scripted
from kubernetes import client

USER = "carol"
VERBS = ["get", "list", "patch"]
"""What a user of `btx` needs, see docs/install.md."""


@pytest.fixture(scope="module")
def kubeconfig(cluster: Cluster) -> Path:
    """Of a user who may do nothing yet."""
    return cluster.authority.kubeconfig(USER, cluster.address, user=USER)


@pytest.fixture
def btx(kubeconfig: Path, space: Space, api: client.ApiClient):
    """The command as the user types it, who may read and annotate runs of this namespace."""
    rbac, name = client.RbacAuthorizationV1Api(api), "user"
    rules = [{"apiGroups": [GROUP], "resources": [PLURAL], "verbs": VERBS}]
    rbac.create_namespaced_role(space.name, {"metadata": {"name": name}, "rules": rules})
    binding = {
        "metadata": {"name": name},
        "roleRef": {"kind": "Role", "name": name, "apiGroup": "rbac.authorization.k8s.io"},
        "subjects": [{"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}],
    }
    rbac.create_namespaced_role_binding(space.name, binding)

    def call(*words: str, namespace: str = space.name) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "btx_operator.cli", *words, "-n", namespace],
            env=os.environ | {"KUBECONFIG": str(kubeconfig)}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    # RBAC is read from a cache of the API server.
    space.cluster.wait_for("the user's rights", lambda: call("status")[0] == 0, 30)
    return call


def columns(text: str) -> list[list[str]]:
    """Cells of a table's rows, its head left out."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()[1:]]


def test_status_of_all_runs_and_of_one(engine: Operator, space: Space, btx) -> None:
    """A line for each run; for one run its state, its reasons and a row for every stage."""
    space.run("done")
    space.succeeded("done")
    space.run("held", execution=scripted(train=TOLD), storage={"uri": f"file://{space.name}/2"})
    space.until_row("train-code", "held", state="Running")

    code, out, err = btx("status")
    assert (code, err) == (0, "")
    rows = {row[0]: row[1:] for row in columns(out)}
    assert rows["done"][:2] == ["BTX", "Succeeded"]
    done, total = rows["done"][2].split("/")
    assert done == total == str(len(space.get("done")["status"]["stages"]))
    assert rows["held"][1] == "Running"

    code, out, err = btx("status", "done")
    assert (code, err) == (0, "")
    assert out.startswith("done: Succeeded\n")
    for row in space.get("done")["status"]["stages"]:
        assert re.search(rf"^{row['name']} +Complete ", out, re.MULTILINE), row["name"]
    assert f"model {space.get('done')['status']['model']}" in out
    assert re.search(r"^train-code +Running +1 ", btx("status", "held")[1], re.MULTILINE)


def test_plan_of_an_accepted_run(engine: Operator, space: Space, btx) -> None:
    """What is complete and what is still to do, from the run's own status; no storage is asked."""
    space.run(execution=scripted(train={"stages": {"train-code": TOLD}}))
    space.until_row("train-math", state="Complete")
    code, out, err = btx("plan", "run", "--flops-per-second", "1e12")
    assert (code, err) == (0, "")
    assert out.startswith(f"run: BTX, storage file://{space.name}\n")
    stages = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert "complete" in stages["train-math"].lower()
    assert "complete" not in stages["train-code"].lower()
    space.release("train-code")
    space.succeeded()
    assert "complete" in btx("plan", "run")[1]


def test_plan_of_a_refused_run(engine: Operator, space: Space, btx) -> None:
    """Its reason on standard error, and the exit code of a wrong configuration."""
    said = '{"resolved":{"problems":["spec.seed.uri: no such folder"]}}'
    space.run(execution=scripted(prepare={"stages": {"preflight": {"message": said}}}))
    space.until_condition("Accepted", "False", "ProblemsFound")
    code, out, err = btx("plan", "run")
    assert code == 78
    assert "spec.seed.uri: no such folder" in err
    assert "train-code" not in out


def test_retry_goes_on_with_a_failed_run(engine: Operator, space: Space, btx) -> None:
    """The failures so far are forgiven: another attempt, and the run succeeds."""
    script = {"stages": {"train-code": {"attempts": [{"exit": 1}, {}]}}}
    space.run(policy={"maxRetries": 0}, execution=scripted(train=script))
    space.until_condition("Succeeded", "False", "ExpertFailed")
    code, out, err = btx("retry", "run")
    assert (code, err) == (0, "")
    assert out == "run: its failures are forgiven by the operator\n"
    space.succeeded()
    assert [attempt(job) for job in space.jobs("train-code")][-1] == 2


def test_refresh_looks_at_the_inputs_again(engine: Operator, space: Space, btx) -> None:
    """A second preflight; what is complete stays so."""
    space.run()
    space.succeeded()
    before = len(space.audit(resource="jobs", verb="create"))
    code, out, err = btx("refresh", "run")
    assert (code, err) == (0, "")
    assert out == "run: its inputs will be looked at again by the operator\n"
    space.until_row("preflight", attempt=2, state="Complete")
    space.succeeded()
    assert len(space.audit(resource="jobs", verb="create")) == before + 1


@pytest.mark.parametrize("command", ["status", "plan", "retry", "refresh"])
def test_a_run_that_is_not_there(command: str, engine: Operator, space: Space, btx) -> None:
    """One line that names it, and no traceback."""
    code, out, err = btx(command, "nothing")
    assert (code, out) == (78, "")
    assert err.count("\n") == 1
    assert '"nothing" not found' in err


def test_without_rights(engine: Operator, space: Space, btx) -> None:
    """What the API server says of who may not what, in one line."""
    code, out, err = btx("status", namespace=f"other-{uuid.uuid4().hex[:6]}")
    assert (code, out) == (78, "")
    assert err.count("\n") == 1
    assert f'User "{USER}" cannot list resource "{PLURAL}"' in err


def test_without_a_cluster(tmp_path: Path) -> None:
    """Nobody listens: one line that names the address; a kubeconfig that is not there: so too."""
    nobody = tmp_path / "config"
    nobody.write_text(
        "{apiVersion: v1, kind: Config, current-context: c, "
        "clusters: [{name: c, cluster: {server: 'https://127.0.0.1:1'}}], "
        "contexts: [{name: c, context: {cluster: c, user: u}}], users: [{name: u, user: {}}]}"
    )
    rows = ((nobody, 1, "127.0.0.1:1"), (tmp_path / "none", 78, "kube-config"))
    for path, code, words in rows:
        done = subprocess.run(
            [sys.executable, "-m", "btx_operator.cli", "status", "-n", "x"],
            env=os.environ | {"KUBECONFIG": str(path)}, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert words in done.stderr
