"""The CRD on a real API server: what it accepts, refuses, fills in, keeps and prints."""

import json
import re
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from btx_api import names, schema
from btx_api.methods import graph
from btx_api.rules import rules
from btx_api.spec import BTXRunSpec
from btx_api.status import PREFLIGHT, Status
from btx_operator.errors import ManifestError
from btx_operator.manifest import parse
from builders import a_spec, resolved_for, spec_of
from cluster.control_plane import Cluster
from cluster.rule_rows import DATA, NAMES, ROWS, TASK, Changes, Row, expert, largest
from cluster.runs import Runs, a_run, established, kubectl, refusal
from full_status import full_status
from fuzzed_specs import Draw, a_document
from kubernetes import client
from pydantic import ValidationError

ROOT = Path(__file__).parents[2]
FILE = ROOT / "crds" / f"{names.PLURAL}.{names.GROUP}.yaml"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
IMMUTABLE = {
    "method": {"method": "Dense"},
    "seed.uri": {"seed": {"uri": "file://other"}},
    "storage.uri": {"storage": {"uri": "file://other"}},
}


@pytest.fixture(scope="module")
def crd(cluster: Cluster, api: client.ApiClient) -> None:
    """Applied as a user does it, and established."""
    kubectl(cluster, "apply", "--server-side", "-f", str(FILE))
    established(cluster, api, FILE.stem)


@pytest.fixture
def runs(crd: None, api: client.ApiClient, namespace: str) -> Runs:
    """Of a new namespace."""
    return Runs(api, namespace)


@pytest.fixture(scope="module")
def tries(crd: None, api: client.ApiClient) -> Runs:
    """For what is not stored."""
    return Runs(api, "default")


def said(row: Row, causes: list[tuple[str, str]]) -> bool:
    """Whether a row's field is named with its message."""
    return any(field == row.field and f": {row.message}" in f": {text}" for field, text in causes)


ids = [f"{row.field}-{row.message[:20]}-{i}" for i, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_a_rule_accepts_and_refuses(tries: Runs, row: Row) -> None:
    """As the models do; the refusal names the field and nothing else."""
    BTXRunSpec.parse(a_spec(**row.accepted))
    with pytest.raises(ValidationError):
        BTXRunSpec.parse(a_spec(**row.refused))

    tries.tried(a_run(**row.accepted))
    causes = refusal(tries.tried, a_run(**row.refused))

    assert said(row, causes), causes
    both = row.field == "spec.average"  # its other value is not served either
    assert len(causes) == 1 + both, causes


def test_every_rule_has_a_row() -> None:
    """And every row a rule."""
    elsewhere = {"metadata.name", *(f"spec.{path}" for path in IMMUTABLE)}
    table = [rule for rule in rules() if rule.at or rule.field not in elsewhere]

    assert {rule.field for rule in rules()} >= elsewhere
    assert [rule for rule in table if not any(row.is_of(rule) for row in ROWS)] == []
    assert [row for row in ROWS if sum(row.is_of(rule) for rule in table) != 1] == []


def test_the_rules_on_the_server_are_these(crd: None, api: client.ApiClient) -> None:
    """Each rule of rules.py arrived at its place."""
    found = client.CustomObjectsApi(api).get_cluster_custom_object(
        "apiextensions.k8s.io", "v1", "customresourcedefinitions", FILE.stem
    )
    root = found["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

    for rule in rules():
        assert rule.plain() in schema.node(root, rule.at)["x-kubernetes-validations"]


@pytest.mark.parametrize(("name", "changes"), NAMES, ids=[f"{len(n)}" for n, _ in NAMES])
def test_a_name_leaves_room_for_every_child(
    tries: Runs, api: client.ApiClient, name: str, changes: Changes
) -> None:
    """The longest that is accepted: a Job and a Service of its longest stage can be made."""
    spec = spec_of(**changes)
    stages = [*graph(spec, resolved_for(spec)), PREFLIGHT]
    longest = names.job_name(name, max(stages, key=len), "0" * 8)
    container = {"name": "trainer", "image": "trainer"}
    pod = {"restartPolicy": "Never", "containers": [container]}
    job = {"metadata": {"name": longest}, "spec": {"template": {"spec": pod}}}
    service = {"metadata": {"name": longest}, "spec": {"clusterIP": "None"}}

    tries.tried(a_run(name, **changes))
    client.BatchV1Api(api).create_namespaced_job("default", job, dry_run="All")
    client.CoreV1Api(api).create_namespaced_service("default", service, dry_run="All")
    assert len(longest) == names.JOB_NAME_LENGTH
    assert parse(json.dumps(a_run(name, **changes))).name == name

    assert "metadata.name" in dict(refusal(tries.tried, a_run(name + "n", **changes)))
    with pytest.raises(ManifestError, match=r"^metadata\.name: "):
        parse(json.dumps(a_run(name + "n", **changes)))


@pytest.mark.parametrize("name", ["1a", "a.b"])
def test_a_name_that_no_service_can_have_is_refused(tries: Runs, name: str) -> None:
    """By both readers."""
    assert "metadata.name" in dict(refusal(tries.tried, a_run(name)))
    with pytest.raises(ManifestError, match=r"^metadata\.name: "):
        parse(json.dumps(a_run(name)))


@pytest.mark.parametrize("path", IMMUTABLE)
def test_what_was_accepted_is_immutable(runs: Runs, path: str) -> None:
    """Before the first acceptance it can be mended; other fields change at any time."""
    runs.create(a_run())
    runs.write_status({"observedGeneration": 1})
    runs.edit(IMMUTABLE[path])
    runs.write_status({"generation": 2})
    changes = a_run()["spec"] | {"method": "BTX"}
    back = {key: changes[key] for key in IMMUTABLE[path]}

    [(field, message)] = refusal(runs.edit, back)
    assert field == f"spec.{path}"
    assert message.endswith("immutable once accepted; revert, or make a new run")
    runs.edit({"seed": {"tokenSecretRef": {"name": "hub"}}, "suspend": True})


def test_no_spec_is_too_large_for_the_rules(runs: Runs) -> None:
    """Their cost is limited while they run, too: at every limit at once, new and edited."""
    runs.tried(a_run(**largest(256)))
    runs.create(a_run(**largest(50)))
    runs.write_status(full_status().plain())

    assert runs.edit({"suspend": True})["metadata"]["generation"] == 2


STRUCTURE: list[tuple[Changes, str]] = [
    ({"experts": []}, "spec.experts"),
    ({"experts": expert()["experts"] * 2}, "spec.experts[1]"),
    (expert(name="A"), "spec.experts[0].name"),
    (expert(name="n" * 21), "spec.experts[0].name"),
    (expert(tokens=-1), "spec.experts[0].tokens"),
    (expert(tokens="1.5"), "spec.experts[0].tokens"),
    (expert(tokens="1.2345K"), "spec.experts[0].tokens"),
    (expert(tokens=10**18 + 2000), "spec.experts[0].tokens"),
    ({"evaluate": {"domains": [{"name": "code"}, {"name": "code"}]}}, "spec.evaluate.domains[1]"),
    ({"evaluate": {"tasks": [TASK, TASK]}}, "spec.evaluate.tasks[1]"),
    ({"general": DATA * 257}, "spec.general"),
    ({"train": {"randomSeed": -1}}, "spec.train.randomSeed"),
    ({"train": {"optimizer": {"lr": "1e-3"}}}, "spec.train.optimizer.lr"),
    ({"policy": {"noProgressSeconds": 9}}, "spec.policy.noProgressSeconds"),
    ({"seed": {}}, "spec.seed.uri"),
    ({"storage": {"uri": "/tmp"}}, "spec.storage.uri"),
]


@pytest.mark.parametrize(("changes", "path"), STRUCTURE, ids=[str(row)[:50] for row in STRUCTURE])
def test_types_bounds_and_names_are_refused_by_field(
    tries: Runs, changes: Changes, path: str
) -> None:
    """Without a rule, by the schema; by the models too."""
    with pytest.raises(ValidationError):
        BTXRunSpec.parse(a_spec(**changes))

    assert path in [field for field, _ in refusal(tries.tried, a_run(**changes))]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("apply", "--server-side"), ".spec.train.batch_tokens: field not declared in schema"),
        (("apply",), 'unknown field "spec.train.batch_tokens"'),
        (("create",), 'unknown field "spec.train.batch_tokens"'),
    ],
)
def test_an_unknown_field_is_reported(
    cluster: Cluster, crd: None, tmp_path: Path, words: tuple[str, ...], line: str
) -> None:
    """However it is sent; nothing is stored."""
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(a_run(train={"batch_tokens": 8})))

    assert line in kubectl(cluster, *words, "-f", str(path), code=1)
    assert "No resources found" in kubectl(cluster, "get", "btx", "-n", "default")


EVERY_BLOCK: Changes = {
    "experts": [
        {"name": "code", "tokens": "4K", "data": DATA, "train": {"optimizer": {"lr": 0.1}},
         "execution": {"gpus": 1}},
        {"name": "ready", "model": "file://m"},
    ],
    "finetune": {"data": [{"tokens": 5, "domains": {"code": 1}}]},
    "evaluate": {"domains": [{"name": "law", "data": DATA}, {"name": "code"}], "tasks": [TASK]},
    "execution": {"train": {"gpus": 2}, "mix": {}},
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, EVERY_BLOCK], ids=["least", "every block"])
def test_the_server_fills_in_what_the_models_would(tries: Runs, changes: Changes) -> None:
    """Nothing more; in an expert's overlay, and of `execution` where no block is, nothing at all."""
    stored = tries.tried(a_run(**changes))["spec"]
    model = BTXRunSpec.parse(a_spec(**changes)).plain()
    for block in set(model["execution"]) - set(changes.get("execution", ())):
        del model["execution"][block]
    assert BTXRunSpec.parse(stored) == BTXRunSpec.parse(a_spec(**changes))
    if changes:
        # The server keeps a count as it was written.
        assert stored["experts"][0].pop("tokens") == "4K"
        assert model["experts"][0].pop("tokens") == 4000

    assert stored == model


def test_objects_of_kubernetes_are_kept_as_they_are(tries: Runs) -> None:
    """Whatever they hold."""
    block = {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "2Gi"}, "claims": [{"name": "c"}]},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {"x": [{"weight": 1, "preference": {"deep": [{}]}}]}},
        "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
        "volumes": [{"name": "v", "emptyDir": {}, "mountPath": "/v"}],
        "nodeSelector": {"zone": "a"}, "labels": {"team": "x"}, "annotations": {"a": "b"},
    }  # fmt: skip

    stored = tries.tried(a_run(execution={"train": block}))["spec"]["execution"]["train"]

    assert {key: stored[key] for key in block} == block


NUMBERS = json.loads((ROOT / "tests/contract/number_table.json").read_text())
NUMBERS += [{"yaml": text} for text in (".inf", "-.INF", ".nan", "1e30", "-5", "1.5")]
PLACES = {
    "a count": "  evaluate: {tokens: VALUE}\n",
    "an integer": "  train: {randomSeed: VALUE}\n",
    "a number": "  mix: {routerStd: VALUE}\n",
    "a flag": "  suspend: VALUE\n",
    "a text": "  evaluate: {tasks: [{name: q, uri: 'file://q', kind: VALUE}]}\n",
    "free text": "  seed: {uri: 'file://seed', tokenSecretRef: {name: VALUE}}\n",
}


@pytest.mark.parametrize("row", NUMBERS, ids=[repr(row["yaml"]) for row in NUMBERS])
def test_both_readers_agree_about_numbers(
    tries: Runs, api: client.ApiClient, row: dict[str, Any]
) -> None:
    """Same verdict, same spec; where Kubernetes' YAML differs, never two different specs."""
    for place, line in PLACES.items():
        spec = {key: value for key, value in a_spec().items() if f"  {key}:" not in line}
        body = json.dumps(a_run() | {"spec": "SPEC"}).replace(
            '"SPEC"', json.dumps(spec)[:-1] + "," + line.strip().replace("VALUE", row["yaml"]) + "}"
        )
        theirs, ours = from_server(api, body), from_file(body)
        if "kubernetes" not in row:
            assert (theirs is None) == (ours is None), place
        if theirs is not None and ours is not None:
            assert theirs == ours, place


def from_server(api: client.ApiClient, text: str) -> BTXRunSpec | None:
    """What the API server reads, which takes YAML as kubectl does; None: refused."""
    path = f"/apis/{names.API_VERSION}/namespaces/default/{names.PLURAL}"
    answer = api.rest_client.pool_manager.request(
        "POST", f"{api.configuration.host}{path}?dryRun=All&fieldValidation=Strict",
        body=text, headers={"Content-Type": "application/yaml", "Accept": "application/json"},
    )  # fmt: skip
    if answer.status in (400, 422):
        return None
    assert answer.status == 201, answer.data
    return BTXRunSpec.parse(json.loads(answer.data)["spec"])


def from_file(text: str) -> BTXRunSpec | None:
    """What `btx run` reads; None: refused."""
    try:
        return parse(text).spec
    except ManifestError:
        return None


def test_what_the_models_accept_the_server_accepts(tries: Runs) -> None:
    """Hundreds of drawn specs; what only the server accepts is what CEL cannot say."""
    accepted, lenient = 0, 0
    for number in range(1500):
        document = a_document(Draw(number))
        try:
            plain = json.loads(json.dumps(document, allow_nan=False))
            json.dumps(plain, ensure_ascii=False).encode()
        except ValueError:
            continue  # YAML has it, JSON has not: it never reaches an API server
        run = a_run() | {"spec": plain}
        try:
            model = BTXRunSpec.parse(plain)
        except ValidationError:
            model = None
        try:
            stored = tries.tried(run)
        except client.ApiException as error:
            assert error.status in (400, 422), (number, error.body)
            assert model is None, (number, error.body)
            continue
        accepted += model is not None
        lenient += model is None
        if model is not None:
            assert BTXRunSpec.parse(stored["spec"]) == model, number

    print(f"{accepted} accepted by both, {lenient} by the server only")
    assert accepted >= 300
    assert lenient <= 15


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.name for path in EXAMPLES])
def test_examples_can_be_applied(cluster: Cluster, crd: None, namespace: str, path: Path) -> None:
    """Server-side, and again without a change."""
    words = ("apply", "--server-side", "-n", namespace, "-f", str(path))
    assert "serverside-applied" in kubectl(cluster, *words)
    run = parse(path.read_text())
    output = kubectl(cluster, "get", "btxrun", run.name, "-n", namespace, "-o", "json")
    stored = json.loads(output)

    assert BTXRunSpec.parse(stored["spec"]) == run.spec
    kubectl(cluster, *words)
    again = json.loads(kubectl(cluster, "get", "btxrun", run.name, "-n", namespace, "-o", "json"))
    assert again["metadata"]["generation"] == stored["metadata"]["generation"] == 1


def test_experts_keep_the_order_that_is_applied(
    cluster: Cluster, crd: None, namespace: str, runs: Runs, tmp_path: Path
) -> None:
    """It is the experts' index; an expert that is left out goes."""
    path = tmp_path / "run.yaml"
    for order in (["a", "b", "c"], ["c", "a", "b"], ["b", "d", "a"]):
        experts = [{"name": name, "tokens": 5, "data": DATA} for name in order]
        path.write_text(json.dumps(a_run(experts=experts)))
        kubectl(cluster, "apply", "--server-side", "-n", namespace, "-f", str(path))
        assert [e["name"] for e in runs.read()["spec"]["experts"]] == order


def test_the_table_says_how_a_run_is(cluster: Cluster, runs: Runs, namespace: str) -> None:
    """`kubectl get btx`, before and after the first status."""
    runs.create(a_run())
    before = kubectl(cluster, "get", "btx", "-n", namespace).splitlines()
    status = Status(
        state="Running", stage="train x3", experts="1/4", progress="42%", eta="1h10m"
    ).plain()
    runs.write_status(status)
    after = kubectl(cluster, "get", "btx", "-n", namespace).splitlines()

    print("\n".join(after))
    head = ["NAME", "STATE", "STAGE", "EXPERTS", "PROGRESS", "ETA", "AGE"]
    assert before[0].split() == after[0].split() == head
    assert before[1].split()[0] == "x"
    columns = [*(found.start() for found in re.finditer(r"\S+", after[0])), None]
    cells = [after[1][a:b].strip() for a, b in pairwise(columns)]
    assert cells[:-1] == ["x", "Running", "train x3", "1/4", "42%", "1h10m"]
    assert cells[-1].endswith("s")


def test_a_status_survives_the_server(runs: Runs) -> None:
    """Whatever it may hold: nothing is refused, nothing pruned, nothing filled in."""
    runs.create(a_run())
    status = full_status()
    plain = json.loads(status.line())

    assert runs.write_status(plain)["status"] == plain
    assert runs.read()["status"] == plain
    assert Status.parse(runs.read()["status"]) == status


@pytest.fixture
def aged(cluster: Cluster, crd: None, api: client.ApiClient) -> Iterator[dict[str, Any]]:
    """A CRD of another group, without rules, as of an earlier release."""
    body = deepcopy(schema.crd())
    group = f"aged.{names.GROUP}"
    body["metadata"]["name"] = f"{names.PLURAL}.{group}"
    body["spec"] |= {"group": group, "names": {**body["spec"]["names"], "shortNames": []}}
    root = body["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for rule in rules():
        schema.node(root, rule.at).pop("x-kubernetes-validations", None)
    definitions = client.ApiextensionsV1Api(api)
    definitions.create_custom_resource_definition(body)
    established(cluster, api, body["metadata"]["name"])
    yield body
    definitions.delete_custom_resource_definition(body["metadata"]["name"])


def test_a_new_rule_does_not_shut_the_engine_out(
    cluster: Cluster, api: client.ApiClient, namespace: str, aged: dict[str, Any]
) -> None:
    """The status of a run that a later rule would refuse can still be written."""
    group = aged["spec"]["group"]
    old = Runs(api, namespace, group)
    wrong = a_run("n" * 33, policy={"minExperts": 9}) | {"apiVersion": f"{group}/{names.VERSION}"}
    old.create(wrong)
    whole = schema.crd()["spec"]["versions"]
    change = {"spec": {"versions": whole}}
    client.ApiextensionsV1Api(api).patch_custom_resource_definition(
        aged["metadata"]["name"], change
    )

    def refused() -> bool:
        try:
            old.tried({**wrong, "metadata": {"name": "m" * 33}})
        except client.ApiException as error:
            return bool(error.status == 422)
        return False

    cluster.wait_for("the new rules", refused)
    written = old.write_status({"state": "Running"}, "n" * 33)
    assert written["status"] == {"state": "Running"}
