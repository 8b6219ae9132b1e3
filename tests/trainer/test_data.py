"""Which tokens a step sees, in which order, with which labels; and the held-out batches."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from btx_api.spec import Phase
from btx_trainer import shards
from btx_trainer.data import IGNORED, Sampler, held_out_batches
from btx_trainer.encoding import hashes
from btx_trainer.shards import Encoded, Writer
from btx_trainer.storage import FileStore
from btx_trainer.tokenizer import EOS, ByteTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

T = 8


def prepared(folder, *sources, held_out=()):
    """An artifact of byte tokens: per source (weight, documents); the first has `held_out` too."""
    tokenizer = ByteTokenizer()
    with Writer(FileStore(folder), tokenizer) as writer:
        for i, (weight, documents) in enumerate(sources):
            texts = [*documents, *(held_out if i == 0 else ())]
            tokens, lengths = tokenizer.encode(texts)
            with writer.source(weight) as target:
                target.write(
                    Encoded(
                        tokens=tokens, lengths=lengths, hashes=hashes(texts), lost=Counter(),
                        sizes=np.array([len(text) for text in texts]),
                        held_out=np.arange(len(texts)) >= len(documents),
                    )
                )  # fmt: skip
        writer.finish()
    return shards.open(folder)


def text(size, seed=0):
    """Some bytes."""
    return np.random.default_rng(seed).integers(32, 127, size).astype(np.uint8).tobytes()


@pytest.fixture(scope="module")
def domains(tmp_path_factory):
    """Two domains; source 1 of the first is so small that it is repeated often."""
    many = [text(5 + i % 40, i) for i in range(600)]
    folder = tmp_path_factory.mktemp("domains")
    return {
        "1": prepared(folder / "1", (9, many[:300]), (1, [text(20), text(30)])),
        "2": prepared(folder / "2", (1, many[300:]), (0, [text(50)]), (2.5, many[:100])),
    }


PHASES = (
    Phase(tokens=4 * T * 75 - 3, domains={"1": 60, "2": 41}),
    Phase(tokens=0, domains={"1": 1}),
    Phase(tokens=4 * T * 50, domains={"2": 0.5, "1": 0.5}),
)


def sampler(domains, phases=PHASES, *, length=T, batch=4, seed=3):
    """A Sampler of small batches."""
    return Sampler(
        phases=phases, domains=domains, sequence_length=length, batch_tokens=batch * length,
        seed=seed,
    )  # fmt: skip


def test_phases_are_rounded_up_to_whole_steps(domains):
    """The steps of the phases add up; a phase of no tokens has none."""
    data = sampler(domains)
    assert (data.steps, data.batch_size) == (125, 4)
    assert [data.phase_of(step) for step in (0, 74, 75, 124)] == [0, 0, 2, 2]
    assert sampler(domains, []).steps == 0


def test_a_sample_depends_on_seed_and_index_alone(domains):
    """Any order of asking, and a fresh sampler, give the same; another seed another order."""
    data = sampler(domains)
    numbers = range(data.steps * data.batch_size)
    forth = [data.sample(i) for i in numbers]
    back = [sampler(domains).sample(i) for i in reversed(numbers)][::-1]
    assert forth == back
    other = [sampler(domains, seed=4).sample(i) for i in numbers]
    assert [s.start for s in other] != [s.start for s in forth]
    # The mapping of a phase has no order of its own.
    turned = [Phase(tokens=p.tokens, domains=dict(reversed(p.domains.items()))) for p in PHASES]
    assert [sampler(domains, turned).sample(i) for i in numbers] == forth


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_order_does_not_depend_on_the_ranks(domains, world):
    """The ranks' rows together are the batch of one rank; rank r has i % world == r."""
    data = sampler(domains, batch=8)
    for step in (0, 1, data.steps - 1):
        whole = data.batch(step)
        mine = [(step * 8 + row) % world for row in range(8)]
        for rank in range(world):
            part = data.batch(step, rank, world)
            rows = [row for row in range(8) if mine[row] == rank]
            for name in ("input_ids", "labels", "position_ids", "domains"):
                assert (getattr(part, name) == getattr(whole, name)[rows]).all(), name


def test_every_rank_sees_every_domain(tmp_path):
    """Two domains in turn and two ranks: neither rank is stuck with one domain."""
    one = prepared(tmp_path, (1, [text(1000)]))
    phase = Phase(tokens=T * 400, domains={"1": 1, "2": 1})
    data = sampler({"1": one, "2": one}, [phase], batch=4)
    mine = Counter(int(d) for step in range(100) for d in data.batch(step, 0, 2).domains)
    assert set(mine) == {1, 2} and min(mine.values()) > 70


def shares(samples):
    """Share of each (domain, source)."""
    counts = Counter((sample.domain, sample.source) for sample in samples)
    return {leaf: count / len(samples) for leaf, count in counts.items()}


def test_shares_follow_the_weights_at_every_tenth(domains):
    """At every 10 % of a phase each source has its share of the tokens within 1 %."""
    phases = [Phase(tokens=1200 * T, domains={"1": 60, "2": 41}), PHASES[0]]
    data = sampler(domains, phases, batch=12)
    expected = {
        (1, 0): 60 / 101 * 0.9, (1, 1): 60 / 101 * 0.1,
        (2, 0): 41 / 101 / 3.5, (2, 2): 41 / 101 * 2.5 / 3.5,
    }  # fmt: skip
    samples = [data.sample(i) for i in range(1200)]
    for part in range(1, 11):
        found = shares(samples[: 120 * part])
        assert found.keys() == expected.keys()
        for leaf, share in expected.items():
            assert abs(found[leaf] - share) < 0.01
    repeated = [s.epoch for s in samples if (s.domain, s.source) == (1, 1)]
    assert repeated[-1] > 3


MATH = {"algebra": 13.57, "web": 54.27, "papers": 27.14, "code": 2.99, "crawl": 5.01}
CODE = {"code": 82.18, "about": 9.90, "prose": 6.93}
"""Weights as the BTX paper prints them (section 4.1): they sum to 102.98 and 99.01."""


def test_the_realised_mixture_is_within_one_percent_at_every_tenth_of_the_run(tmp_path):
    """By the tokens really read: three domains of several sources, two phases, one source repeated.

    Each source has a letter of its own, so that a row of a batch tells where it came from.
    """
    letters = iter("abcdefghijkl")
    letter_of, domains = {}, {}
    for domain, weights in enumerate((MATH, CODE, {"general": 1.0}), 1):
        sources = []
        for name, weight in weights.items():
            letter_of[domain, name] = letter = next(letters)
            size = 400 if name == "crawl" else 40_000
            sources.append((weight, [letter.encode() * 39] * (size // 40)))
        domains[str(domain)] = prepared(tmp_path / str(domain), *sources)
    # Three tenths of one domain alone, then all of them with `general`, as finetune has it.
    shares_of = [{"1": 1.0}, {"1": 60.0, "2": 40.0, "3": 25.0}]
    phases = [
        Phase(tokens=tokens, domains=s)
        for tokens, s in zip((30_720, 71_680), shares_of, strict=True)
    ]
    data = sampler(domains, phases, batch=16, length=16)
    per_step, read, due = 256, Counter(), Counter()
    assert data.steps * per_step == 102_400
    for step in range(data.steps):
        for row in data.batch(step).input_ids:
            read[chr(min(row))] += len(row)
        phase = shares_of[data.phase_of(step)]
        for (domain, name), letter in letter_of.items():
            source = (MATH, CODE, {"general": 1.0})[domain - 1]
            own = source[name] / math.fsum(source.values())
            due[letter] += per_step * own * phase.get(str(domain), 0) / math.fsum(phase.values())
        if (step + 1) % (data.steps // 10) == 0:
            total = (step + 1) * per_step
            assert math.fsum(due.values()) == pytest.approx(total)
            for letter in letter_of.values():
                assert abs(read[letter] / total - due[letter] / total) < 0.01
                # Well below: a source is never more than two sequences from what is due.
                assert abs(read[letter] - due[letter]) < 2 * 16 * len(phases)
    assert read.total() == 102_400
    samples = [data.sample(i) for i in range(data.steps * data.batch_size)]
    last = max(s.epoch for s in samples if (s.domain, s.source) == (1, 4))
    assert last > 3, "the crawl is repeated more than three times"


@settings(max_examples=50)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20), st.integers(1, 3000))
def test_no_source_is_far_from_its_share(tmp_path_factory, weights, count):
    """After any number of steps a source is less than 1.75 samples from its share, for any weights."""
    folder = tmp_path_factory.getbasetemp() / "one"
    one = shards.open(folder) if folder.exists() else prepared(folder, (1, [text(100)]))
    domains = {str(i + 1): one for i in range(len(weights))}
    phase = Phase(
        tokens=count * T, domains={str(i + 1): weight for i, weight in enumerate(weights)}
    )
    data = sampler(domains, [phase], batch=1)
    found = Counter(data.sample(i).domain for i in range(count))
    for i, weight in enumerate(weights):
        assert abs(found[i + 1] - count * weight / math.fsum(weights)) < 1.75


def test_every_epoch_visits_every_sequence_once(tmp_path):
    """Within an epoch no two sequences overlap, nearly all tokens are seen, the order differs."""
    domains = {"1": prepared(tmp_path, (1, [text(1000)]))}
    data = sampler(domains, [Phase(tokens=125 * T * 4, domains={"1": 1})], batch=1)
    total, per_epoch = 1001, 125
    starts = [data.sample(i).start for i in range(500)]
    assert [data.sample(i).epoch for i in range(500)] == [i // per_epoch for i in range(500)]
    orders = []
    for epoch in range(4):
        mine = starts[epoch * per_epoch : (epoch + 1) * per_epoch]
        seen = Counter((start + k) % total for start in mine for k in range(T))
        assert set(seen.values()) == {1}
        assert len(seen) == per_epoch * T
        # Neighbours in the stream are no neighbours in time.
        assert sum(b - a == T for a, b in pairwise(mine)) < 10
        orders.append([(start - mine[0]) % total for start in mine])
    assert len({tuple(order) for order in orders}) == 4


def test_phases_go_on_where_the_source_was(tmp_path):
    """A source's sequences are not repeated before all were seen, across phases too."""
    domains = {
        "1": prepared(tmp_path, (1, [text(1000)])),
        "2": prepared(tmp_path / "2", (1, [b"x"])),
    }
    phases = [Phase(tokens=40 * T, domains={"1": 1, "2": w}) for w in (1, 3, 0)]
    data = sampler(domains, phases)
    mine = [s for s in map(data.sample, range(120)) if s.domain == 1]
    assert len(mine) == len({s.start for s in mine}) == 20 + 10 + 40
    assert {s.epoch for s in mine} == {0}


def test_labels_and_positions_of_packed_documents(tmp_path):
    """A token predicts the next of its own document; the first of a document is nobody's target."""
    domains = {"1": prepared(tmp_path, (1, [b"abc", b"d", b"efghij"]))}
    data = sampler(domains, [Phase(tokens=1000, domains={"1": 1})], length=5, batch=1)
    stream = [*b"abc", EOS, *b"d", EOS, *b"efghij", EOS]
    first = {0, 4, 6}
    for step in range(data.steps):
        batch, start = data.batch(step), data.sample(step).start
        places = [(start + k) % len(stream) for k in range(6)]
        assert batch.input_ids[0].tolist() == [stream[p] for p in places[:-1]]
        assert batch.labels[0].tolist() == [
            IGNORED if p in first else stream[p] for p in places[1:]
        ]
        position = -1
        for k, place in enumerate(places[:-1]):
            position = 0 if place in first or k == 0 else position + 1
            assert batch.position_ids[0, k] == position
        assert batch.targets == (batch.labels != IGNORED).sum()
    assert batch.input_ids.dtype == batch.labels.dtype == batch.position_ids.dtype == np.int64


def test_a_sequence_longer_than_the_stream_wraps_around(tmp_path):
    """A stream shorter than a sequence is read round, its documents apart from each other."""
    domains = {"1": prepared(tmp_path, (1, [b"ab"]))}
    data = sampler(domains, [Phase(tokens=16, domains={"1": 1})], length=8, batch=1)
    start = data.sample(0).start
    batch = data.batch(0)
    stream = [*b"ab", EOS] * 5
    assert batch.input_ids[0].tolist() == stream[start : start + 8]
    follow = [IGNORED if t == ord("a") else t for t in stream[start + 1 : start + 9]]
    assert batch.labels[0].tolist() == follow
    assert data.sample(1).epoch == 1


@pytest.mark.parametrize("weights", [{"1": 0.0, "2": 0.0}, {"1": -1.0, "2": 2.0}, {}])
def test_bad_weights_never_get_here(weights):
    """All-zero and negative weights are refused by the contract."""
    with pytest.raises(ValidationError, match="domains"):
        Phase.parse({"tokens": 10, "domains": weights})


def test_streams_across_files(tmp_path, monkeypatch):
    """Documents and reads span token files."""
    monkeypatch.setattr(shards, "FILE_BYTES", 10)
    documents = [text(3 + i, i) for i in range(6)]
    opened = prepared(tmp_path, (1, documents))
    stream = opened.sources[0]
    expected = [t for d in documents for t in (*d, EOS)]
    assert len(list(tmp_path.glob("source-0-0*.bin"))) == math.ceil(len(expected) / 5)
    assert stream.total == len(expected)
    for start in range(0, stream.total, 3):
        for stop in range(start, stream.total + 1, 4):
            assert stream.tokens(start, stop).tolist() == expected[start:stop]
    assert stream.starts(0, stream.total).tolist() == [0, 4, 9, 15, 22, 30]
    assert stream.starts(4, 15).tolist() == [4, 9]


def pieces_of(batches):
    """The documents (or pieces) of held-out batches as (input bytes, target ids)."""
    found = []
    for batch in batches:
        for ids, labels, positions in zip(
            batch.input_ids, batch.labels, batch.position_ids, strict=True
        ):
            starts = [*np.flatnonzero(positions == 0), len(ids)]
            for a, b in pairwise(starts):
                assert positions[a:b].tolist() == list(range(b - a))
                real = labels[a:b] != IGNORED
                assert real.all() or not real.any()
                if real.all():
                    found.append((bytes(ids[a:b].tolist()), labels[a:b].tolist()))
    return found


HELD = (b"abcdefghij", b"kl", b"mnopqrstuvwxyzABCDEFG", b"HIJKLMN", b"O", b"PQRST")


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_held_out_batches_cover_every_document_once(tmp_path, batch_size):
    """All documents, in pieces of at most T targets from their start, whatever the batch size."""
    opened = prepared(tmp_path, (1, [b"train"]), held_out=HELD)
    batches = list(
        held_out_batches(opened, sequence_length=8, max_tokens=10**6, batch_size=batch_size)
    )
    expected = []
    for document in HELD:
        ids = [*document, EOS]
        expected += [
            (bytes(ids[a : a + 8][: len(ids) - a - 1]), ids[a + 1 : a + 9])
            for a in range(0, len(document), 8)
        ]
    found = pieces_of(batches)
    assert sorted(found) == sorted(expected)
    assert sum(batch.targets for batch in batches) == sum(map(len, HELD))
    # The first byte of a document is never predicted; its eos is, and stands for no byte.
    assert sum(batch.target_bytes for batch in batches) == pytest.approx(
        sum(len(document) - 1 for document in HELD)
    )
    assert all(len(batch.input_ids) <= batch_size for batch in batches)


@pytest.mark.parametrize("limit", [0, 1, 13, 30])
def test_held_out_batches_stop_at_max_tokens(tmp_path, limit):
    """Exactly so many targets, the first in the documents' order, for any batch size."""
    opened = prepared(tmp_path, (1, [b"train"]), held_out=HELD)
    every = []
    for size in (1, 3):
        batches = list(
            held_out_batches(opened, sequence_length=8, max_tokens=limit, batch_size=size)
        )
        assert sum(batch.targets for batch in batches) == limit
        every.append(sorted(pieces_of(batches)))
    assert every[0] == every[1]


def test_held_out_documents_are_drawn_by_weight(tmp_path):
    """Any first part of the held-out split has the sources in the proportion of their weights."""
    tokenizer = ByteTokenizer()
    with Writer(FileStore(tmp_path), tokenizer) as writer:
        for letter, weight, count in (("a", 9, 1000), ("b", 1, 5000)):
            texts = [f"{letter}{i:04d}".encode() for i in range(count)]
            tokens, lengths = tokenizer.encode(texts)
            with writer.source(weight) as target:
                target.write(
                    Encoded(
                        tokens=tokens, lengths=lengths, hashes=hashes(texts), lost=Counter(),
                        sizes=lengths - 1, held_out=np.arange(count) % 2 == 0,
                    )
                )  # fmt: skip
        writer.finish()
    held = shards.open(tmp_path).held_out
    names = [
        bytes(held.tokens(start, start + 5).tolist()).decode() for start, _, _ in held.documents
    ]
    for count in (50, 100, 500):
        assert abs(sum(name[0] == "a" for name in names[:count]) - 0.9 * count) <= 1
    assert len(set(names)) == 3000
    # Within a source they are in the order of their hashes, so a first part is a fair draw.
    mine = [name for name in names if name[0] == "a"]
    assert mine[:20] != sorted(mine[:20])


def test_bytes_are_spread_over_the_tokens_of_a_document(tmp_path):
    """With tokens of several bytes, a piece stands for its share of the document's bytes."""
    with Writer(FileStore(tmp_path), ByteTokenizer()) as writer, writer.source(1) as target:
        target.write(
            Encoded(
                tokens=np.array([7, 7, 7, 7, EOS, 9, 9, 9, 9, 9, EOS]), lengths=np.array([5, 6]),
                sizes=np.array([1, 20]), hashes=np.zeros(2, np.uint64), lost=Counter(),
                held_out=np.array([False, True]),
            )
        )  # fmt: skip
    with pytest.raises(FileNotFoundError):
        (tmp_path / "shards.json").stat()
    writer.finish()
    opened = shards.open(tmp_path)
    batches = held_out_batches(opened, sequence_length=3, max_tokens=100, batch_size=1)
    assert [batch.target_bytes for batch in batches] == [12.0, 4.0]
