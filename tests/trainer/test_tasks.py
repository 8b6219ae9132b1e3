"""Tasks: records of the user's file, and answers against a plain recomputation by stock code."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from btx_api.methods import graph, task_source
from btx_api.spec import EvaluationTask, Routing, Storage
from btx_api.stage import RECIPES, Kind, Output
from btx_trainer import routing
from btx_trainer.answers import Desk, answer
from btx_trainer.errors import ConfigurationError
from btx_trainer.model import load_model, new_model, save_model
from btx_trainer.storage import open_store
from btx_trainer.tasks import Questions, given, matches, normalised, read, stops
from btx_trainer.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from builders import resolved_for, spec_of
from tiny import SMALL
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

STORAGE = Storage(uri="file://storage")
ROOM = 64
SUMS = [{"question": f"{a} + {b} =", "answer": str(a + b)} for a in range(4) for b in range(3)]
PICKS: list[dict[str, Any]] = [
    {"question": "The sky is", "choices": ["blue", "a long green fence"], "answer": 0},
    {"question": "Two and two are ", "choices": ["five", "four", "six"], "answer": "four"},
    {"question": "Où est le café ?", "choices": ["là", "içi", "nulle part"], "answer": 2},
    {"question": "x", "choices": ["y", "z z z z z z z z"], "answer": 1},
    {"question": "A question that is rather longer than the others", "choices": ["1", "22"],
     "answer": 1, "id": 7},
]  # fmt: skip


def task(folder: Path, records: list[Any], kind: str = "MultipleChoice", **shape: Any) -> Questions:
    """A task read from a file."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    (folder / "q.jsonl").write_text("\n".join(lines) + "\n")
    if kind == "ExactMatch":
        shape.setdefault("max_new_tokens", 5)
    asked = EvaluationTask(name="q", uri=f"file://{folder}/q.jsonl", kind=kind, **shape)
    return read(asked, task_source(asked), STORAGE)


def bpe(folder: Path) -> FileTokenizer:
    """A BPE tokenizer with merges and a `<s>` before every text."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    text = [json.dumps(record) for record in SUMS + PICKS]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return FileTokenizer(folder / "tokenizer.json")


def desk(tokenizer: Tokenizer, room: int = ROOM, batch_tokens: int = 200) -> Desk:
    """On the CPU."""
    return Desk(
        tokenizer=tokenizer, device=torch.device("cpu"), room=room, batch_tokens=batch_tokens,
        done=lambda _: None,
    )  # fmt: skip


def a_model(folder: Path, experts: int = 0, vocab: int = 304, **changes: Any) -> Path:
    """A random model on disk, in stock layout."""
    shape = {**SMALL, "vocab_size": vocab, "num_hidden_layers": 2, **changes}
    moe = {"num_local_experts": experts, "num_experts_per_tok": 2}
    config = MixtralConfig(**shape, **moe) if experts else LlamaConfig(**shape)
    folder.mkdir(exist_ok=True)
    save_model(new_model(config, seed=3), folder, torch.float32)
    return folder


def ours(folder: Path) -> PreTrainedModel:
    """As evaluate loads it: a Mixture-of-Experts with our rule."""
    model = load_model(folder).eval()
    if experts := routing.count_experts(model):
        routing.install(model, routing.rule_for(Routing(), experts, model.config.model_type))
    return model


def stock_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as a document begins."""
    if isinstance(tokenizer, ByteTokenizer):
        return list(text.encode())
    return HubTokenizer.from_str(tokenizer._tokenizer.to_str()).encode(text).ids


@torch.no_grad()
def stock_likelihood(model: Any, tokenizer: Tokenizer, prompt: str, choice: str) -> float:
    """Of " choice" after the prompt, one sequence at a time, by the model's own logits."""
    context, whole = (stock_ids(tokenizer, t) for t in (prompt, f"{prompt} {choice}"))
    logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[i - 1, whole[i]].item() for i in range(len(context), len(whole)))


@pytest.fixture(params=["bytes", "BPE"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """Both kinds."""
    return ByteTokenizer() if request.param == "bytes" else bpe(tmp_path)


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_judged_as_stock_code_would(
    tmp_path: Path, tokenizer: Tokenizer, experts: int, shots: int
) -> None:
    """Sum of the log-likelihoods of a choice's tokens; then divided by its UTF-8 bytes."""
    folder = a_model(tmp_path / "model", experts, max_position_embeddings=256)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    records = PICKS * 3
    questions = task(tmp_path, records, shots=shots)
    with torch.no_grad():
        found, tally = answer(ours(folder), questions, desk(tokenizer, room=250))

    preamble = "".join(
        f"{r['question'].rstrip()} {right(r)}\n\n" for r in records[:shots]
    )  # fmt: skip
    correct = per_byte = 0
    for record in records[shots:]:
        prompt = preamble + record["question"].rstrip()
        values = [stock_likelihood(stock, tokenizer, prompt, c) for c in record["choices"]]
        scaled = [v / len(c.encode()) for v, c in zip(values, record["choices"], strict=True)]
        correct += record["choices"][values.index(max(values))] == right(record)
        per_byte += record["choices"][scaled.index(max(scaled))] == right(record)
    assert (found.asked, found.cut) == (len(records) - shots, 0)
    assert (found.correct, found.correct_normalised) == (correct, per_byte)
    assert 0 < correct < found.asked
    assert (tally.load.ndim == 2) == bool(experts)


def right(record: dict[str, Any]) -> str:
    """Text of the right choice."""
    given = record["answer"]
    return record["choices"][given] if isinstance(given, int) else str(given)


@torch.no_grad()
def stock_answer(model: Any, tokenizer: Tokenizer, prompt: str, limit: int, room: int) -> str:
    """One prompt at a time, the whole text anew for each token."""
    ids = stock_ids(tokenizer, prompt)[-(room - limit) :]
    begin = len(ids)
    while len(ids) - begin < limit and "\n" not in tokenizer.decode(ids[begin:]):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos:
            break
    return tokenizer.decode(ids[begin:]).split("\n")[0]


def learned(
    folder: Path, tokenizer: Tokenizer, records: list[dict[str, Any]], experts: int
) -> Path:
    """A model that was taught to answer these records."""
    model = load_model(a_model(folder, experts, vocab=304, num_hidden_layers=1))
    texts = [f"{r['question'].rstrip()} {right(r)}\n" for r in records]
    rows = [torch.tensor(stock_ids(tokenizer, text)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, folder, torch.float32)
    return folder


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("shots", [0, 2])
def test_answers_are_what_stock_code_writes(
    tmp_path: Path, tokenizer: Tokenizer, experts: int, shots: int
) -> None:
    """Greedy, batched with kept keys and values: the first line, as from one prompt at a time."""
    folder = learned(tmp_path / "model", tokenizer, SUMS[::2], experts)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    records = [*SUMS, {"question": "Is it so or is it otherwise?", "answer": ["3", "Perhaps."]}]
    questions = task(tmp_path, records, "ExactMatch", shots=shots)
    with torch.no_grad():
        found, tally = answer(ours(folder), questions, desk(tokenizer))

    preamble = "".join(f"{r['question']} {r['answer']}\n\n" for r in records[:shots])
    written = [
        stock_answer(stock, tokenizer, preamble + r["question"], 5, ROOM) for r in records[shots:]
    ]
    expected = sum(matches(q, w) for q, w in zip(questions.asked, written, strict=True))
    assert (found.correct, found.asked) == (expected, len(records) - shots)
    assert expected > 0 or shots
    assert (tally.load.ndim == 2) == bool(experts)


def test_the_model_that_was_taught_wins(tmp_path: Path) -> None:
    """It answers its task, chosen or written; its untaught twin does not."""
    tokenizer = ByteTokenizer()
    choices = [{**r, "choices": sorted({r["answer"], "0", "3", "5"})} for r in SUMS]
    taught = learned(tmp_path / "taught", tokenizer, SUMS, 0)
    twin = a_model(tmp_path / "twin", num_hidden_layers=1)
    for kind, records in (("MultipleChoice", choices), ("ExactMatch", SUMS)):
        questions = task(tmp_path, records, kind)
        scores = [answer(ours(f), questions, desk(tokenizer))[0].correct for f in (taught, twin)]
        assert scores[0] >= 10 and scores[1] <= 6, kind


def test_the_routing_of_a_task_is_that_of_its_questions_and_right_answers(tmp_path: Path) -> None:
    """Not of the examples nor of wrong choices; both kinds count the same tokens."""
    folder = a_model(tmp_path / "model", 3)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = ByteTokenizer()
    choices = [{**r, "choices": ["9", r["answer"]]} for r in SUMS]
    for kind, records in (("MultipleChoice", choices), ("ExactMatch", SUMS)):
        questions = task(tmp_path, records, kind, shots=1)
        _, tally = answer(ours(folder), questions, desk(tokenizer))
        expected = torch.zeros(2, 3)
        for record in SUMS[1:]:
            shot = f"{SUMS[0]['question']} {SUMS[0]['answer']}\n\n"
            ids = list(f"{shot}{record['question']} {record['answer']}".encode())
            out = stock(torch.tensor([ids]), output_router_logits=True)
            for layer, logits in enumerate(out.router_logits):
                # What predicts the question's first token is the last of the example.
                chosen = logits.softmax(-1).topk(2).indices[len(shot) - 1 : -1].flatten()
                expected[layer] += torch.bincount(chosen, minlength=3)
        assert tally.load.tolist() == expected.tolist(), kind
        tokens = expected.sum(-1) / 2
        assert (tally.histogram.sum(-1) == tokens[:, None]).all()


def test_what_does_not_fit_loses_its_beginning(tmp_path: Path) -> None:
    """The oldest tokens go, examples first; it is counted; an answer must fit as a whole."""
    folder = a_model(tmp_path / "model")
    questions = task(tmp_path, PICKS, shots=1)
    with torch.no_grad():
        found, _ = answer(ours(folder), questions, desk(ByteTokenizer(), room=30))
        short, _ = answer(ours(folder), task(tmp_path, PICKS), desk(ByteTokenizer(), room=30))

    assert (found.cut, short.cut) == (4, 1)
    with pytest.raises(
        ConfigurationError, match="q: an answer of 19 tokens cannot be scored in 10"
    ):
        answer(ours(folder), task(tmp_path, PICKS), desk(ByteTokenizer(), room=9))


def test_the_batch_size_changes_no_answer(tmp_path: Path) -> None:
    """One prompt a batch, or all of them in one."""
    folder = learned(tmp_path / "model", ByteTokenizer(), SUMS[::2], 3)
    for kind, records in (("MultipleChoice", PICKS * 3), ("ExactMatch", SUMS)):
        questions = task(tmp_path, records, kind)
        one, all_ = (
            answer(ours(folder), questions, desk(ByteTokenizer(), batch_tokens=tokens))[0]
            for tokens in (1, 10**6)
        )
        assert one == all_


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("42", " 42. ", True), ("The Sun", "the  SUN.", True), ("½", "1⁄2", True),
        ("-5", "5", False), ("3.14", "314", False), ("a cat", "cat", False), ("1,000", "1000", False),
    ],
)  # fmt: skip
def test_answers_are_compared_normalised(one: str, other: str, same: bool) -> None:
    """Case, white space, a final full stop and forms of a letter do not count; all else does."""
    assert (normalised(one) == normalised(other)) is same


CHOICE, EXACT = "MultipleChoice", "ExactMatch"
GOOD = {"question": "q", "choices": ["a", "b"], "answer": 0}
BAD = [
    (CHOICE, "{", "q.jsonl: line 2: is no JSON object"),
    (CHOICE, "[1]", "q.jsonl: line 2: is no JSON object"),
    (CHOICE, "[" * 100_000, "q.jsonl: line 2: is no JSON object"),
    (CHOICE, {**GOOD, "question": None}, "q.jsonl: line 2: question: is missing"),
    (CHOICE, {**GOOD, "question": 7}, "q.jsonl: line 2: question: 7 is no text"),
    (CHOICE, {**GOOD, "question": " "}, 'q.jsonl: line 2: question: " " is no text'),
    (CHOICE, '{"question": "\\ud800"}', "q.jsonl: line 2: question: is no valid Unicode"),
    (CHOICE, {**GOOD, "choices": "ab"}, "q.jsonl: line 2: choices: is no list of at least two"),
    (CHOICE, {**GOOD, "choices": ["a"]}, "q.jsonl: line 2: choices: is no list of at least two"),
    (CHOICE, {**GOOD, "choices": ["a", " a"]}, "q.jsonl: line 2: choices: 'a' is there twice"),
    (CHOICE, {**GOOD, "choices": ["a", ""]}, 'q.jsonl: line 2: choices: "" is no text'),
    (CHOICE, {**GOOD, "answer": None}, "q.jsonl: line 2: answer: is missing"),
    (CHOICE, {**GOOD, "answer": 2}, "q.jsonl: line 2: answer: 2 is none of the 2 choices, nor the"),
    (CHOICE, {**GOOD, "answer": -1}, "q.jsonl: line 2: answer: -1 is none of the 2 choices"),
    (CHOICE, {**GOOD, "answer": True}, "q.jsonl: line 2: answer: true is none of the 2 choices"),
    (CHOICE, {**GOOD, "answer": "c"}, 'q.jsonl: line 2: answer: "c" is none of the 2 choices'),
    (EXACT, {"question": "q"}, "q.jsonl: line 2: answer: is missing"),
    (EXACT, {"question": "q", "answer": 4}, "q.jsonl: line 2: answer: 4 is no text"),
    (EXACT, {"question": "q", "answer": []}, "q.jsonl: line 2: answer: [] is no text"),
    (EXACT, {"question": "q", "answer": ["4", 4]}, "q.jsonl: line 2: answer: 4 is no text"),
    (EXACT, {"question": "q", "answer": "a\nb"}, "q.jsonl: line 2: answer: 'a\\nb' can be no line"),
    (EXACT, {"question": "q", "answer": "."}, "q.jsonl: line 2: answer: '.' can be no line"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "line"), BAD, ids=[line for _, _, line in BAD])
def test_a_bad_record_is_named(tmp_path: Path, kind: str, record: Any, line: str) -> None:
    """File, line and field in one line."""
    with pytest.raises(ConfigurationError) as caught:
        task(tmp_path, [GOOD if kind == CHOICE else SUMS[0], record], kind)

    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_shots_must_leave_something_to_score(tmp_path: Path) -> None:
    """Empty lines are no records; a byte order mark is no part of the first one."""
    lines = ["\ufeff" + json.dumps(GOOD), "", "  ", json.dumps(GOOD)]

    assert len(task(tmp_path, lines).asked) == 2
    assert len(task(tmp_path, lines, shots=1).asked) == 1
    with pytest.raises(ConfigurationError, match=r"q.jsonl: has 2 records; 2 shots leave none"):
        task(tmp_path, lines, shots=2)


def test_questions_are_read_wherever_a_source_may_be(storage: Storage) -> None:
    """file:// and s3://, several files in the order of their names."""
    store = open_store(storage)
    for name, text in (("b", "second"), ("a", "first")):
        store.put(f"asked/{name}.jsonl", json.dumps({**GOOD, "question": text}).encode())
    asked = EvaluationTask(name="q", uri=f"{storage.uri}/asked/*.jsonl")

    found = read(asked, task_source(asked), storage)

    assert [question.text for question in found.asked] == ["first", "second"]


def test_chance_is_the_mean_over_the_questions(tmp_path: Path) -> None:
    """Half of two choices, a third of three."""
    questions = task(tmp_path, PICKS)
    expected = (1 / 2 + 1 / 3 + 1 / 3 + 1 / 2 + 1 / 2) / 5

    assert questions.chance is not None and math.isclose(questions.chance, expected)
    assert task(tmp_path, SUMS, "ExactMatch").chance is None


def test_an_end_of_line_ends_an_answer_whatever_its_token(tmp_path: Path) -> None:
    """Every id whose text holds one, and the end of the document."""
    tokenizer = bpe(tmp_path)
    hub = HubTokenizer.from_file(str(tmp_path / "tokenizer.json"))

    assert stops(ByteTokenizer()) == [10, 257]
    assert given(ByteTokenizer(), [*b" 3\nand more", 257]) == " 3"
    assert set(stops(tokenizer)) == {
        i for i in range(hub.get_vocab_size()) if "\n" in hub.decode([i])
    } | {hub.token_to_id("</s>")}


def test_a_task_enters_the_evaluation_by_its_content() -> None:
    """After the models and the domains; its URI is hashed nowhere, its shape is."""
    tasks = [{"name": "q", "uri": "file://here/q.jsonl"}, {"name": "r", "uri": "file://r.jsonl"}]

    def evaluation(**changes: Any) -> Any:
        spec = spec_of(evaluate={"tasks": [{**tasks[0], **changes}, tasks[1]]})
        return graph(spec, resolved_for(spec))["evaluate"]

    node, moved = evaluation(), evaluation(uri="s3://there/x.jsonl")
    recipe: Any = RECIPES[Kind.EVALUATE].parse(node.stage.recipe)
    inputs = [node.stage.inputs[asked.input] for asked in recipe.questions]
    assert [asked.name for asked in recipe.questions] == ["q", "r"]
    assert [found.fingerprint for found in inputs] == [f"{name:q<22}" for name in ("q", "r")]
    assert node.stage.inputs[-3] == Output(digest=node.stage.inputs[-3].digest)
    assert [place.sources[0].uri for place in node.locations[-2:]] == [t["uri"] for t in tasks]
    assert moved.stage == node.stage
    assert evaluation(shots=1).stage.digest != node.stage.digest
    assert "uri" not in json.dumps(node.stage.recipe)
