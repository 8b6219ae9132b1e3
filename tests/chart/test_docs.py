"""What docs/install.md, running.md and the runbook tell a person to type is so."""

import json
import re
from pathlib import Path

import pytest
import yaml
from btx_operator import manifest
from btx_operator.cluster import check
from chart.tools import ROOT, VALUES, leaves, one, render, settings, template

INSTALL = (ROOT / "docs/install.md").read_text()
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
RUNNING = (ROOT / "docs/running.md").read_text()
S3_ACTIONS = {
    "list_objects_v2": "s3:ListBucket", "get_object": "s3:GetObject", "head_object": "s3:GetObject",
    "put_object": "s3:PutObject", "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject", "complete_multipart_upload": "s3:PutObject",
    "delete_object": "s3:DeleteObject", "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_parts": "s3:ListMultipartUploadParts",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
}  # fmt: skip
"""By boto3's name of a call: what AWS asks for."""


def blocks(text: str, language: str) -> list[str]:
    """Code of a language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


FRAGMENTS = blocks(RUNNING, "yaml")


@pytest.mark.parametrize("number", range(len(FRAGMENTS)))
def test_every_fragment_of_a_spec_is_accepted(number: int, tmp_path: Path) -> None:
    """Added to the quick start of a cluster, as `btx plan` reads it; and it says something."""
    example = ROOT / "examples/quickstart-cluster.yaml"
    run, fragment = yaml.safe_load(example.read_text()), yaml.safe_load(FRAGMENTS[number])
    run["spec"].pop("storage")
    run["spec"] = {"storage": {"uri": "s3://models/x"}} | run["spec"] | fragment
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run))

    spec = manifest.read(file).spec
    before = manifest.read(example).spec
    assert any(getattr(spec, name) != getattr(before, name) for name in fragment)


def test_there_are_fragments() -> None:
    """The test before would pass without any."""
    assert len(FRAGMENTS) >= 6


def test_the_table_of_rights_is_the_role() -> None:
    """Each resource with exactly its verbs."""
    table = re.findall(
        r"^\| ([a-z/]+)(?: \([a-z.]+\))? \| ([a-z, ]+) \| .+\|$", INSTALL, re.MULTILINE
    )

    assert {name: tuple(verbs.split(", ")) for name, verbs in table if name != "resource"} == {
        name: verbs for (_, name), verbs in check.RIGHTS.items()
    }


def test_every_value_that_is_named_exists() -> None:
    """In `--set`, and in backticks; and the commands' values render."""
    keys = set(leaves(VALUES))
    given = re.findall(r"--set[= ]([\w.]+)=(\S+)", INSTALL)
    named = re.findall(
        r"`((?:crds|rbac|image|trainer|settings|metrics|networkPolicy)\.[\w.]+)", INSTALL + RUNBOOK
    )
    thresholds = re.findall(r"\(`([a-z]\w+Seconds)`\)", RUNBOOK)

    assert {key for key, _ in given} <= keys
    assert {name.rstrip(".") for name in named} <= keys | {key.rpartition(".")[0] for key in keys}
    assert thresholds
    assert {f"metrics.rules.{name}" for name in thresholds} <= keys
    for key, value in given:
        assert template({key: yaml.safe_load(value)}).returncode == 0


def test_the_service_accounts_of_the_example_are_made() -> None:
    """As YAML of values."""
    (example,) = (yaml.safe_load(text) for text in blocks(INSTALL, "yaml") if "trainer:" in text)
    objects = render({"trainer.serviceAccounts": example["trainer"]["serviceAccounts"]})

    assert one(objects, "ServiceAccount", "btx-trainer")["metadata"]["namespace"] == "team-a"
    assert settings(objects)["serviceAccounts"] == ["btx-trainer", "large-models"]


def test_the_s3_policy_allows_what_the_trainer_calls() -> None:
    """Every S3 call of the trainer has its action, and no action is without a call."""
    (policy,) = (json.loads(text) for text in blocks(INSTALL, "json"))
    allowed = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        allowed |= {actions} if isinstance(actions, str) else set(actions)
    sources = sorted((ROOT / "trainer_image/btx_trainer").rglob("*.py"))
    calls = {
        call
        for path in sources
        for call in re.findall(r"\bclient\.([a-z_0-9]+)\b", path.read_text())
        if "s3" in path.name
    }

    assert {S3_ACTIONS[call] for call in calls} == allowed


def test_links_between_the_documents_lead_somewhere() -> None:
    """Files that they name are there."""
    texts = (
        ("docs/install.md", INSTALL), ("docs/runbook.md", RUNBOOK), ("docs/running.md", RUNNING)
    )  # fmt: skip
    for name, text in texts:
        for target in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (ROOT / Path(name).parent / target).exists(), target
