"""Manifests from disk: YAML 1.2 scalars, overlays, and a line per problem that names its field."""

import json
from pathlib import Path

import pytest
from btx_operator.errors import ManifestError
from btx_operator.manifest import parse, parse_yaml, read

NUMBERS = json.loads((Path(__file__).parents[1] / "contract" / "number_table.json").read_text())
TINY = """\
apiVersion: btx.dev/v1alpha1
kind: BTXRun
metadata: {name: tiny}
spec:
  storage: {uri: "file://storage"}
  seed: {uri: "file://seed"}
  experts:
  - {name: code, tokens: 2K, data: [{uri: "file://code.txt"}]}
  - {name: prose, tokens: 2K, data: [{uri: "file://prose.txt"}]}
  train: {sequenceLength: 32, batchTokens: 128, optimizer: {lr: 1e-3}}
  finetune: {sequenceLength: 32, batchTokens: 128}
"""


READ = [row for row in NUMBERS if "json" in row]
REFUSED = [row["yaml"] for row in NUMBERS if "json" not in row]


@pytest.mark.parametrize("text", REFUSED)
def test_what_another_reader_takes_for_another_number_is_refused(text):
    """Ten or eight: the reader does not guess."""
    with pytest.raises(ManifestError, match="is octal to some readers"):
        parse_yaml(f"value: {text}")


@pytest.mark.parametrize("row", READ, ids=[repr(row["yaml"]) for row in READ])
def test_scalars_resolve_by_the_core_schema_of_yaml_1_2(row):
    """Every row of the table both readers are fed gives its JSON value, of JSON's own type."""
    found = parse_yaml(f"value: {row['yaml']}")["value"]
    assert found == row["json"]
    number = (int, float)
    if isinstance(row["json"], number) and not isinstance(row["json"], bool):
        assert isinstance(found, number) and not isinstance(found, bool)
    else:
        assert type(found) is type(row["json"])


def test_a_manifest_reads_into_a_spec():
    """Name and spec come out, numbers as numbers, counts as integers, nothing unread."""
    run = parse(TINY)
    assert (run.name, run.unread) == ("tiny", ())
    assert run.spec.train.optimizer.lr == 0.001
    assert [expert.tokens for expert in run.spec.experts] == [2000, 2000]


def test_a_null_field_is_not_set():
    """As on a cluster: a block whose lines are all comments is its defaults."""
    empty = TINY + "  policy:\n  evaluate: {tokens: null}\n"
    assert parse(empty) == parse(TINY)
    overlaid = parse(TINY, ["experts[0].execution={threads: null}", "execution.train.threads=2"])
    assert overlaid.spec.experts[0].execution.model_fields_set == set()


def test_a_manifest_in_json_reads_the_same():
    """JSON is YAML 1.2: the same document in JSON gives an equal spec."""
    assert parse(json.dumps(parse_yaml(TINY))) == parse(TINY)


OVERLAYS = [
    ("policy.allowRetrain=true", lambda s: s.policy.allow_retrain is True),
    ("experts[0].tokens=10K", lambda s: s.experts[0].tokens == 10_000),
    ("spec.train.optimizer.lr=1e-5", lambda s: s.train.optimizer.lr == 1e-5),
    (
        "experts[1].train.optimizer.lr=.5",
        lambda s: s.expert_train(s.experts[1]).optimizer.lr == 0.5,
    ),
    ("experts[1].data[0].uri=file://a=b", lambda s: s.experts[1].data[0].uri == "file://a=b"),
    ("evaluate.domains=[{name: code}]", lambda s: [d.name for d in s.evaluate.domains] == ["code"]),
    ("seed={uri: 'hf://a/b@c'}", lambda s: s.seed.uri == "hf://a/b@c"),
]


@pytest.mark.parametrize(("item", "holds"), OVERLAYS, ids=[item for item, _ in OVERLAYS])
def test_an_overlay_sets_one_path(item, holds):
    """`--set path=value` reaches that field and leaves the other experts and blocks alone."""
    spec = parse(TINY, [item]).spec
    assert holds(spec)
    assert not holds(parse(TINY).spec)
    assert len(spec.experts) == 2


def test_the_later_overlay_wins_and_metadata_can_be_set():
    """Overlays are applied in order; `metadata.name` gives the same manifest another name."""
    run = parse(TINY, ["metadata.name=a", "train.randomSeed=1", "train.randomSeed=2"])
    assert (run.name, run.spec.train.random_seed) == ("a", 2)


BAD = [
    ("kind: BTXRun", "kind: Job", (), "kind: is 'Job', this release reads 'BTXRun'"),
    ("btx.dev/v1alpha1", "v1", (), "apiVersion: is 'v1', this release reads 'btx.dev/v1alpha1'"),
    ("metadata: {name: tiny}", "", (), "metadata: is required and must be a mapping"),
    ("name: tiny", "labels: {}", (), "metadata.name: is required"),
    ("name: tiny", "name: Tiny_1", (), "metadata.name: 'Tiny_1' is not a name"),
    ("name: tiny", "name: 10", (), "metadata.name: 10 is not a name"),
    ("name: tiny", "name: 1a", (), "metadata.name: '1a' is not a name"),
    ("name: tiny", "name: 010", (), "line 3, column 18: '010' is octal to some readers"),
    ("kind: BTXRun", "kind: BTXRun\nspecs: {}", (), "specs: unknown field"),
    ("seed: {uri", "seed: {url", (), "spec.seed.uri: is required"),
    ("lr: 1e-3", "learningRate: 1", (), "spec.train.optimizer.learningRate: unknown field"),
    ("lr: 1e-3", "lr: '1e-3'", (), "spec.train.optimizer.lr: "),
    ("lr: 1e-3", "lr: .nan", (), "spec.train.optimizer.lr: "),
    ("sequenceLength: 32, batch", "sequenceLength: 3_2, batch", (), "spec.train.sequenceLength: "),
    ("tokens: 2K", "tokens: 2Q", (), "spec.experts[0].tokens: "),
    ("name: prose", "name: code", (), "spec.experts[1].name: 'code' is used by experts[0]"),
    ("tokens: 2K", "tokens: 2K, tokens: 3K", (), "line 8, column 30: key 'tokens' appears twice"),
    ("kind: BTXRun", "kind: [", (), "line "),
    ("kind: BTXRun", "---\nkind: BTXRun", (), "line 2, column 1: but found another document"),
    ("kind: BTXRun", "kind: !!python/name:os.system x", (), "line 2, column 7: could not determine"),
    ("", "", ("train.randomSeed",), "--set train.randomSeed: is not path=value"),
    ("", "", ("experts[2].tokens=1",), "--set experts[2].tokens=1: spec.experts has 2 items"),
    ("", "", ("experts.code=1",), "--set experts.code=1: spec.experts is not a mapping"),
    ("", "", ("seed.uri[0]=1",), "--set seed.uri[0]=1: spec.seed.uri is not a list"),
    ("", "", ("seed..uri=1",), "--set seed..uri=1: 'seed..uri' is not a path"),
    ("", "", ("seed.uri=[",), "--set seed.uri=[: line 1, column "),
    ("", "", ("train.lr=1",), "spec.train.lr: unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "overlays", "line"), BAD, ids=[row[-1] for row in BAD])
def test_bad_input_is_one_line_that_names_the_field(old, new, overlays, line):
    """Each kind of bad manifest or overlay is refused with a line naming the field or the line."""
    text = TINY.replace(old, new, 1) if old else TINY
    with pytest.raises(ManifestError) as caught:
        parse(text, overlays)
    assert any(problem.startswith(line) for problem in caught.value.problems)
    assert not any("\n" in problem for problem in caught.value.problems)


def test_all_problems_are_told_at_once():
    """Three wrong fields of the spec and a wrong name are four lines."""
    text = TINY.replace("tiny", "T").replace("2K", "x").replace("lr:", "rl:")
    with pytest.raises(ManifestError) as caught:
        parse(text)
    fields = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert fields == [
        "metadata.name", "spec.experts[0].tokens", "spec.experts[1].tokens",
        "spec.train.optimizer.rl",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "- 1", "hello", "7"])
def test_a_document_that_is_no_mapping_is_refused(text):
    """Nothing, a list and scalars are not runs."""
    with pytest.raises(ManifestError, match="the document is not a BTXRun"):
        parse(text)


def test_fields_for_a_cluster_are_accepted_and_named():
    """A cluster's manifest reads; what no local run reads is listed, defaults are not."""
    run = parse(TINY, [
        "execution.image=btx:1", "execution.train={threads: 1, nodeSelector: {a: b}, nodes: 1}",
        "experts[1].execution={gpus: 8, queueName: q, microBatch: 2}",
    ])  # fmt: skip
    assert run.unread == (
        "execution.image", "execution.train.nodeSelector",
        "experts[1].execution.gpus", "experts[1].execution.queueName",
    )  # fmt: skip


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """A missing file, a folder and bytes that are no UTF-8 are one line with the path."""
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"kind: \xff")
    for path, what in [
        (tmp_path / "none.yaml", "no such file or directory"),
        (tmp_path, "is a directory"),
        (binary, "is not UTF-8 text"),
    ]:
        with pytest.raises(ManifestError) as caught:
            read(path)
        assert caught.value.problems[0].startswith(f"{path}: {what}")


def test_problems_of_a_file_begin_with_its_name(tmp_path):
    """With several files on one command line every problem says which file it is in."""
    path = tmp_path / "run.yaml"
    path.write_text(TINY.replace("BTXRun", "Job"))
    with pytest.raises(ManifestError) as caught:
        read(path)
    assert caught.value.problems == (f"{path}: kind: is 'Job', this release reads 'BTXRun'",)
