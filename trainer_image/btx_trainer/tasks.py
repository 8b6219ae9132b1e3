"""A task's questions: the user's JSONL, the prompts made of it, and what counts as right; no torch.

The formats follow the usual harnesses: a question, one space, an answer; examples before it are
parted by an empty line. Called by preflight.py (which reads every record before anything is
trained) and answers.py.
"""

import json
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from btx_api.spec import Source, Storage, TaskKind, TaskShape

from btx_trainer.errors import ConfigurationError
from btx_trainer.sources import list_files
from btx_trainer.tokenizer import Tokenizer

MAX_BYTES = 256 * 2**20
"""Of a task's files: they are held in memory."""
BREAK = "\n\n"
"""Between examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One record."""

    text: str
    """Without white space at its end: a token of it would be none of the answer's."""
    answers: tuple[str, ...]
    """All that are right; of a MultipleChoice one, of the choices."""
    choices: tuple[str, ...] = ()
    """Of a MultipleChoice; without white space around them."""

    @property
    def right(self) -> int:
        """Index of the right choice."""
        return self.choices.index(self.answers[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """A task: its shape, what every prompt begins with, and what is scored, in the files' order."""

    shape: TaskShape
    preamble: str
    """The answered examples; empty without shots."""
    asked: tuple[Question, ...]

    @property
    def chance(self) -> float | None:
        """Share that guessing gets right; None of an ExactMatch."""
        if self.shape.kind is not TaskKind.MULTIPLE_CHOICE:
            return None
        return sum(1 / len(question.choices) for question in self.asked) / len(self.asked)

    @property
    def effort(self) -> int:
        """How much there is to compute, in answers of one token; for progress."""
        if self.shape.kind is TaskKind.MULTIPLE_CHOICE:
            return sum(len(question.choices) for question in self.asked)
        return len(self.asked) * self.shape.max_new_tokens


def read(shape: TaskShape, source: Source, storage: Storage) -> Questions:
    """All records of the source's files.

    Raises ConfigurationError naming file, line and field of the first record that is not one, or
    the file without a record to score.
    """
    files = list_files(source, storage)
    if (size := sum(head.size for _, _, head in files)) > MAX_BYTES:
        raise ConfigurationError(source.uri, f"{size} bytes of questions; at most {MAX_BYTES}")
    found: list[Question] = []
    for store, key, _ in files:
        with store.open(key) as file:
            found += _records(file, PurePosixPath(key).name, shape.kind)
    if len(found) <= shape.shots:
        name = PurePosixPath(source.uri).name
        raise ConfigurationError(
            name, f"has {len(found)} records; {shape.shots} shots leave none to score"
        )
    examples = (f"{shot.text} {shot.answers[0]}{BREAK}" for shot in found[: shape.shots])
    return Questions(shape=shape, preamble="".join(examples), asked=tuple(found[shape.shots :]))


def _records(file: Iterable[bytes], name: str, kind: TaskKind) -> Iterator[Question]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            yield _question(line, kind)
        except ValueError as error:
            raise ConfigurationError(name, f"line {number}: {error}") from None


def _question(line: bytes, kind: TaskKind) -> Question:
    """Raises ValueError with the field and what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise ValueError("is no JSON object") from None
    if not isinstance(record, dict):
        raise ValueError("is no JSON object")
    text = _text(record.get("question"), "question").rstrip()
    if kind is TaskKind.MULTIPLE_CHOICE:
        choices = _choices(record.get("choices"))
        return Question(text=text, choices=choices, answers=(_right(record, choices),))
    given = record.get("answer")
    answers = given if isinstance(given, list) and given else [given]
    texts = tuple(_text(answer, "answer").strip() for answer in answers)
    if bad := next((text for text in texts if "\n" in text or not normalised(text)), None):
        raise ValueError(f"answer: {bad[:20]!r} can be no line that a model is to give")
    return Question(text=text, answers=texts)


def _text(value: Any, field: str) -> str:
    if value is None:
        raise ValueError(f"{field}: is missing")
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{field}: {json.dumps(value)[:20]} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{field}: is no valid Unicode") from None
    return value


def _choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("choices: is no list of at least two texts")
    choices = tuple(_text(choice, "choices").strip() for choice in value)
    if twice := next((text for i, text in enumerate(choices) if text in choices[:i]), None):
        raise ValueError(f"choices: {twice[:20]!r} is there twice")
    return choices


def _right(record: dict[str, Any], choices: Sequence[str]) -> str:
    answer = record.get("answer")
    if answer is None:
        raise ValueError("answer: is missing")
    if isinstance(answer, str) and answer.strip() in choices:
        return answer.strip()
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices[answer]
    raise ValueError(
        f"answer: {json.dumps(answer)[:20]} is none of the {len(choices)} choices, nor the index "
        "of one (from 0)"
    )


def normalised(answer: str) -> str:
    """What of an answer is compared: NFKC, case and amount of white space do not count, nor does
    a full stop at the end. Signs, digits and articles do: -5 is not 5."""
    words = unicodedata.normalize("NFKC", answer).casefold().split()
    return " ".join(words).removesuffix(".").rstrip()


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The tokens of a prompt, or of a prompt and an answer."""

    ids: tuple[int, ...]
    answer: int
    """The last so many of them are the answer's."""
    asked: int
    """The last so many are the question's and the answer's: what follows the examples."""
    cut: bool
    """The beginning was left out: it did not fit."""


def lines(
    questions: Questions, tokenizer: Tokenizer, room: int, *, answered: bool = False
) -> Iterator[Line]:
    """Every question with each of its choices (or as it is; `answered`: with its right answer).

    At most `room` tokens each, the oldest left out first. ConfigurationError if an answer alone
    has more.
    """
    shape, preamble = questions.shape, questions.preamble
    [shots] = encode(tokenizer, [preamble]) if preamble else [()]
    for question in questions.asked:
        prompt = preamble + question.text
        ends = question.answers[:1] if answered else question.choices
        texts = [prompt, *(f"{prompt} {end}" for end in ends)]
        context, *wholes = encode(tokenizer, texts)
        for ids in wholes or [context]:
            # A token that stands for the end of the question and the beginning of the answer is
            # the answer's.
            answer = len(ids) - _common(context, ids)
            if answer >= room or (ends and not answer):
                raise ConfigurationError(
                    shape.name, f"an answer of {answer} tokens cannot be scored in {room} tokens"
                )
            yield Line(
                ids=ids[-room:], answer=answer, asked=len(ids) - _common(shots, ids),
                cut=len(ids) > room,
            )  # fmt: skip


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of each text as a document begins, without the end of one."""
    ids, lengths = tokenizer.encode([text.encode() for text in texts])
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    return [tuple(part[:-1].tolist()) for part in parts]


def stops(tokenizer: Tokenizer) -> list[int]:
    """Ids that end an answer: the end of the document, and all with an end of line in them."""
    ends = (i for i in range(tokenizer.vocab_size) if "\n" in tokenizer.decode([i]))
    return sorted({tokenizer.eos, *ends})


def given(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The answer in what was generated: its first line."""
    return tokenizer.decode([i for i in ids if i != tokenizer.eos]).partition("\n")[0]


def matches(question: Question, answer: str) -> bool:
    """Whether a generated answer is one of the right ones."""
    return normalised(answer) in map(normalised, question.answers)
