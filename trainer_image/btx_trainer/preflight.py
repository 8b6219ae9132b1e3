"""The errand before everything: what do the URIs hold, can it work, what is there already?

Reads headers, never weights, and hashes local files once (fingerprint.py). Called by errands.py.
"""

import errno
import json
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from btx_api.methods import Members, graph, task_source
from btx_api.spec import GENERAL, BTXRunSpec, Method
from btx_api.stage import Corrupt, Parameters, Preflight, Resolved, Stage

from btx_trainer.artifacts import Artifact, find
from btx_trainer.errors import ConfigurationError, CorruptInputError, TrainerError
from btx_trainer.families import (
    Dense,
    TensorSpec,
    check_dtypes,
    check_member,
    check_tensors,
    count_parameters,
    read_config,
)
from btx_trainer.fingerprint import (
    fingerprint_domain,
    fingerprint_model,
    fingerprint_source,
    fingerprint_sources,
    fingerprint_tokenizer,
    tokenizer_key,
)
from btx_trainer.roots import write_record
from btx_trainer.storage import Conflict, Head, Store, open_outside, open_store
from btx_trainer.tasks import read
from btx_trainer.tokenizer import ByteTokenizer
from btx_trainer.weights import open_checkpoint

MAX_FINGERPRINTS = 96
"""Of domains and ready experts together, so that the answer fits a termination message."""
LOOKUPS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class _Model:
    """A checkpoint from outside, headers only."""

    dense: Dense
    tensors: Mapping[str, TensorSpec]
    fingerprint: str
    tokenizer: bytes | None
    """tokenizer.json, if there is one."""


class _Checks:
    """Collects problems, each beginning with a field path."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def at(self, path: str) -> Iterator[None]:
        """What goes wrong inside is a problem of this field."""
        try:
            yield
        except TrainerError as error:
            # `seed.uri config.json` is at home below `seed.uri`; another URI or path is not.
            place, text = error.problem.field, error.problem.message
            text = f"{place.removeprefix(path)}: {text}" if place.startswith(path) else text
        except OSError as error:
            text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            if "://" in str(error.filename):
                # What a server says may be long, and is cut at the end.
                text = f"{error.filename}: {error.strerror}"
        except ValueError as error:
            text = str(error)
        else:
            return
        self.problems.append(f"{path}: {text.lstrip(' :')}")


def preflight(asked: Preflight) -> Resolved:
    """Fingerprints, parameter counts and complete stages; or at most 8 problems."""
    spec, checks = asked.spec, _Checks()
    with checks.at("storage.uri"):
        store = open_store(spec.storage)
        probe(store)
    seed = _model(spec, spec.seed.uri, "seed.uri", checks)
    tokenizer = _tokenizer(spec, seed, checks)
    domains = _domains(spec, checks)
    models = _ready(spec, seed, checks)
    tasks = _tasks(spec, checks)
    if len(domains) + len(models) + len(tasks) > MAX_FINGERPRINTS:
        checks.problems.append(
            f"experts: {len(domains)} domains, {len(models)} ready experts, {len(tasks)} tasks;"
            f" at most {MAX_FINGERPRINTS} together"
        )
    if checks.problems or seed is None:
        return Resolved(problems=tuple(checks.problems[:8]))
    resolved = Resolved(
        seed=seed.fingerprint, tokenizer=tokenizer, domains=tuple(domains), models=tuple(models),
        tasks=tuple(tasks), parameters=_parameters(spec, seed.dense),
    )  # fmt: skip
    return _with_artifacts(asked, resolved, store)


def probe(store: Store) -> Head:
    """Shows that storage can be written to; the head carries the storage's own time.

    OSError if a second writer of the same object wins: no commit would be safe there.
    """
    key = f"runs/.probe-{secrets.token_hex(4)}"
    store.put(key, b"first", if_none_match=True)
    head = store.head(key)
    try:
        store.put(key, b"second", if_none_match=True)
    except Conflict:
        assert head
        return head
    finally:
        store.delete(key)
    message = "a second writer overwrites the first: If-None-Match is ignored"
    raise OSError(errno.ENOTSUP, message, store.uri(key))


# Inputs from outside.


@dataclass(frozen=True, slots=True)
class _Folder:
    """A model's folder in any storage, as weights.py reads it."""

    store: Store
    key: str

    def size(self, name: str) -> int | None:
        """See weights.Reader."""
        head = self.store.head(f"{self.key}/{name}")
        return head.size if head else None

    def readinto(self, name: str, start: int, buffer: memoryview) -> int:
        """See weights.Reader."""
        data = self.store.read(f"{self.key}/{name}", start, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _model(
    spec: BTXRunSpec, uri: str, path: str, checks: _Checks, seed: _Model | None = None
) -> _Model | None:
    with checks.at(path):
        store, key = open_outside(uri, spec.storage)
        checkpoint = open_checkpoint(_Folder(store, key.rstrip("/")), path)
        dense = read_config(checkpoint.config, path, seed.dense if seed else None)
        check_tensors(dense, checkpoint.tensors, path)
        return _Model(
            dense=dense, tensors=checkpoint.tensors, fingerprint=fingerprint_model(store, key),
            tokenizer=_read(store, tokenizer_key(key)),
        )  # fmt: skip
    return None


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.get(key)[0]
    except FileNotFoundError:
        return None


def _ready(spec: BTXRunSpec, seed: _Model | None, checks: _Checks) -> list[str]:
    """Fingerprints of ready experts, each compared with the seed."""
    found = []
    for i, expert in enumerate(spec.experts):
        if expert.model is not None:
            path = f"experts[{i}].model"
            model = _model(spec, expert.model, path, checks, seed)
            if model and seed:
                _compare(seed, model, path, checks)
            found.append(model.fingerprint if model else "")
    return found


def _compare(seed: _Model, model: _Model, path: str, checks: _Checks) -> None:
    with checks.at(path):
        check_member(seed.dense, model.dense, path)
        check_dtypes(seed.tensors, model.tensors, path)
        if seed.tokenizer and model.tokenizer:
            _compare_tokenizers(seed.tokenizer, model.tokenizer)


def _tokenizer(spec: BTXRunSpec, seed: _Model | None, checks: _Checks) -> str:
    """Fingerprint of the tokenizer that prepare uses; its ids must fit the seed's vocabulary."""
    uri, data = spec.prepare.tokenizer, None
    with checks.at("prepare.tokenizer"):
        ids = ByteTokenizer.vocab_size
        if uri == "seed":
            data = seed.tokenizer if seed else None
            if seed and data is None:
                raise ValueError("the seed has no tokenizer.json; give a URI, or 'bytes'")
        elif uri != "bytes":
            store, key = open_outside(uri, spec.storage)
            data = store.get(tokenizer_key(key))[0]
        if data is not None:
            ids = 1 + max(_vocabulary(_parse(data)).values())
        room = seed.dense.fields["vocab_size"] if seed else ids
        if ids > room:
            raise ValueError(f"has {ids} ids, the seed's vocab_size is {room}")
    return fingerprint_tokenizer(data) if data is not None else ""


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
        _vocabulary(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError("tokenizer.json is not a tokenizer") from error
    return dict(value)


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    return {**vocabulary, **added}


def _compare_tokenizers(seed: bytes, member: bytes) -> None:
    """Raises ValueError naming the first difference and both values."""
    ours, theirs = _parse(seed), _parse(member)
    our_ids, their_ids = _vocabulary(ours), _vocabulary(theirs)
    for token in {**our_ids, **their_ids}:
        if our_ids.get(token) != their_ids.get(token):
            raise ValueError(
                f"tokenizer.json: token {token[:12]!r} is {their_ids.get(token)},"
                f" the seed's is {our_ids.get(token)}"
            )
    for name in ("normalizer", "pre_tokenizer", "model"):
        if ours.get(name) != theirs.get(name):
            texts = [json.dumps(side.get(name))[:20] for side in (theirs, ours)]
            raise ValueError(f"tokenizer.json: {name} is {texts[0]}, the seed's is {texts[1]}")


def _domains(spec: BTXRunSpec, checks: _Checks) -> list[str]:
    """Fingerprints in the order of `spec.domains()`."""
    paths = {expert.name: f"experts[{i}].data" for i, expert in enumerate(spec.experts)}
    paths[GENERAL] = "general"
    for i, domain in enumerate(spec.evaluate.domains):
        paths.setdefault(domain.name, f"evaluate.domains[{i}].data")
    found = []
    for name, sources in spec.domains().items():
        parts = []
        for i, source in enumerate(sources):
            with checks.at(f"{paths[name]}[{i}].uri"):
                parts.append(fingerprint_source(source, spec.storage))
        found.append(fingerprint_domain(parts))
    return found


def _tasks(spec: BTXRunSpec, checks: _Checks) -> list[str]:
    """Fingerprints of the tasks' files, each record of which is read: hours later is too late."""
    found = []
    for i, task in enumerate(spec.evaluate.tasks):
        with checks.at(f"evaluate.tasks[{i}]"):
            source = task_source(task)
            try:
                read(task, source, spec.storage)
            except ConfigurationError as error:
                # Which of its files it is about.
                raise ValueError(str(error)) from error
            found.append(fingerprint_sources([source], spec.storage))
    return found


def _parameters(spec: BTXRunSpec, dense: Dense) -> Parameters:
    fields = dense.fields
    alone = count_parameters(dense)
    embedding = fields["vocab_size"] * fields["hidden_size"]
    total = active = experts = 0
    if spec.method is not Method.DENSE:
        count = spec.mixed_experts(len(spec.experts))
        top_k = spec.finetune.routing.top_k(count)
        mixed = count_parameters(dense, experts=count, top_k=top_k)
        one, two = (count_parameters(dense, experts=2, top_k=k).active for k in (1, 2))
        total, active, experts = mixed.total, mixed.active, top_k * (two - one)
    return Parameters(
        dense=alone.total, total=total, active=active, layers=dense.layers,
        head=0 if fields["tie_word_embeddings"] else embedding, embedding=embedding,
        experts=experts,
        hidden=fields["num_attention_heads"] * fields["head_dim"],
    )  # fmt: skip


# Storage.


def _with_artifacts(asked: Preflight, resolved: Resolved, store: Store) -> Resolved:
    """Adds which stages are complete, and writes the run's record: the root that gc keeps."""
    members = None
    if asked.members is not None:
        members = Members(experts=asked.members, without=asked.without)
    nodes = graph(asked.spec, resolved, members, versions=asked.versions, uid=asked.uid)
    if asked.uid and asked.record:
        # First: what is found complete below is not to be collected in between.
        stages = {name: node.stage for name, node in nodes.items()}
        write_record(store, asked.uid, stages, whole=True)
    with ThreadPoolExecutor(LOOKUPS) as pool:
        answers = pool.map(
            lambda node: _look_up(store, node.stage, verify=asked.verify), nodes.values()
        )
        found = dict(zip(nodes, answers, strict=True))
    complete = {name: item for name, item in found.items() if isinstance(item, Artifact)}
    bits = sum(1 << i for i, name in enumerate(nodes) if name in complete)
    final = complete.get("finetune") or complete.get("train-dense")
    return resolved.model_copy(
        update={
            "complete": f"{bits:x}",
            "gains": tuple(_gain(complete.get(f"train-{e.name}")) for e in asked.spec.experts),
            "token": final.token if final else "",
            "corrupt": tuple(item for item in found.values() if isinstance(item, Corrupt))[:4],
        }
    )


def _look_up(store: Store, stage: Stage, *, verify: bool) -> Artifact | Corrupt | None:
    try:
        found = find(store, stage.kind, stage.digest)
    except CorruptInputError:
        # Its own task replaces a manifest that cannot be read, or whose files are cut short.
        return None
    try:
        if found and verify:
            found.verify()
    except CorruptInputError as error:
        return error.corrupt
    return found


def _gain(artifact: Artifact | None) -> float | None:
    gain = artifact.manifest.metrics.get("gain") if artifact else None
    return None if gain is None else round(max(-999.0, min(999.0, gain)), 4)
