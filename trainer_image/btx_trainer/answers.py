"""Has a model answer a task: choices by log-likelihood, lines by greedy decoding.

Every model gets the same prompts in the same batches. Called by evaluation.py.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from btx_api.spec import TaskKind
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from btx_trainer import routing
from btx_trainer.model import forward_hidden
from btx_trainer.scores import Answered
from btx_trainer.tally import Tally
from btx_trainer.tasks import Line, Question, Questions, given, lines, matches, stops
from btx_trainer.tokenizer import Tokenizer

LOGIT_ROWS = 1024
"""At most so many rows of logits are alive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Desk:
    """What a task is answered with."""

    tokenizer: Tokenizer
    device: torch.device
    room: int
    """Tokens of context at the most."""
    batch_tokens: int
    """Of a forward pass; a prompt that is longer is a batch of its own."""
    done: Callable[[int], None]
    """Told after each batch how many answers of one token were computed."""


def answer(model: PreTrainedModel, questions: Questions, desk: Desk) -> tuple[Answered, Tally]:
    """The model's score, and where it routes the questions with their right answers."""
    if questions.shape.kind is TaskKind.MULTIPLE_CHOICE:
        return _choose(model, questions, desk)
    found, tally = _write(model, questions, desk), Tally()
    if routing.routers(model):
        answered = lines(questions, desk.tokenizer, desk.room + 1, answered=True)
        for batch in _batches(answered, desk.batch_tokens):
            _score(model, batch, desk, tally, [True] * len(batch))
    return found, tally


def _choose(model: PreTrainedModel, questions: Questions, desk: Desk) -> tuple[Answered, Tally]:
    tally, correct, normalised, cut = Tally(), 0, 0, 0
    rights = (
        choice == question.answers[0] for question in questions.asked for choice in question.choices
    )

    def scores() -> Iterator[tuple[float, bool]]:
        for batch in _batches(lines(questions, desk.tokenizer, desk.room + 1), desk.batch_tokens):
            values = _score(model, batch, desk, tally, [next(rights) for _ in batch])
            desk.done(len(batch))
            yield from zip(values, (line.cut for line in batch), strict=True)

    found = scores()
    for question in questions.asked:
        values, cuts = zip(*(next(found) for _ in question.choices), strict=True)
        sizes = [len(choice.encode()) for choice in question.choices]
        correct += _best(values) == question.right
        normalised += _best([v / n for v, n in zip(values, sizes, strict=True)]) == question.right
        cut += any(cuts)
    return Answered(
        asked=len(questions.asked), correct=correct, correct_normalised=normalised, cut=cut
    ), tally


def _best(values: Iterable[float]) -> int:
    """Index of the largest, the first of equal ones."""
    every = list(values)
    return every.index(max(every))


def _batches(found: Iterable[Line], tokens: int, extra: int = 0) -> Iterator[list[Line]]:
    """Neighbours, as many as fit when all are as long as the longest with `extra` tokens."""
    batch: list[Line] = []
    longest = 0
    for line in found:
        longest = max(longest, len(line.ids) + extra)
        if batch and (len(batch) + 1) * longest > tokens:
            yield batch
            batch, longest = [], len(line.ids) + extra
        batch.append(line)
    if batch:
        yield batch


def _score(
    model: PreTrainedModel, batch: list[Line], desk: Desk, tally: Tally, counted: list[bool]
) -> list[float]:
    """Log-likelihood of each line's answer after what comes before it, nats.

    Of the lines that are counted, the tokens that predict question and answer go to the tally.
    """
    length = max(len(line.ids) for line in batch) - 1
    ids = torch.zeros(len(batch), length + 1, dtype=torch.int64)
    answers, asked = (torch.zeros(len(batch), length, dtype=torch.bool) for _ in range(2))
    for row, (line, counts) in enumerate(zip(batch, counted, strict=True)):
        end = len(line.ids)
        # What follows a line is not seen by it, nor looked at.
        ids[row, :end] = torch.tensor(line.ids)
        answers[row, end - 1 - line.answer : end - 1] = True
        asked[row, max(0, end - 1 - line.asked) : end - 1] = counts
    ids, answers, asked = (tensor.to(desk.device) for tensor in (ids, answers, asked))
    positions = torch.arange(length, device=desk.device).expand(len(batch), -1)
    with routing.record(model) as layers:
        hidden = forward_hidden(model, ids[:, :-1], positions)
    tally.add(layers, asked)
    values = torch.zeros(answers.shape, dtype=torch.float64, device=desk.device)
    values[answers] = _log_likelihoods(model, hidden[answers], ids[:, 1:][answers]).double()
    return [float(value) for value in values.sum(-1).tolist()]


def _log_likelihoods(model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Of each token after its hidden state [tokens, hidden size], nats, fp32."""
    head = model.get_output_embeddings().weight
    parts = zip(torch.split(hidden, LOGIT_ROWS), torch.split(targets, LOGIT_ROWS), strict=True)
    return torch.cat(
        [-F.cross_entropy(F.linear(h, head).float(), t, reduction="none") for h, t in parts]
    )


def _write(model: PreTrainedModel, questions: Questions, desk: Desk) -> Answered:
    """Exact match of the first line that greedy decoding gives."""
    limit = questions.shape.max_new_tokens
    ends = torch.tensor(stops(desk.tokenizer), device=desk.device)
    asked: Iterator[Question] = iter(questions.asked)
    correct = cut = 0
    prompts = lines(questions, desk.tokenizer, desk.room - limit)
    for batch in _batches(prompts, desk.batch_tokens, extra=limit):
        for line, ids in zip(batch, greedy(model, batch, ends, limit), strict=True):
            correct += matches(next(asked), given(desk.tokenizer, ids))
            cut += line.cut
        desk.done(limit * len(batch))
    return Answered(asked=len(questions.asked), correct=correct, cut=cut)


def greedy(model: PreTrainedModel, batch: list[Line], ends: Tensor, limit: int) -> list[list[int]]:
    """The likeliest next token after each prompt, again and again: up to and with the first of
    `ends`, `limit` tokens at the most. Keys and values are kept; experts run as they are set.
    """
    length = max(len(line.ids) for line in batch)
    mask = torch.zeros(len(batch), length, dtype=torch.int64, device=ends.device)
    ids = torch.zeros_like(mask)
    for row, line in enumerate(batch):
        # The ends stand in one column; what fills up the beginnings is masked.
        mask[row, length - len(line.ids) :] = 1
        ids[row, length - len(line.ids) :] = torch.tensor(line.ids, device=ids.device)
    cache = DynamicCache(config=model.config)
    positions, written = (mask.cumsum(-1) - 1).clamp(min=0), ids[:, :0]
    running = torch.ones(len(batch), dtype=torch.bool, device=ids.device)
    for _ in range(limit):
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        ids = logits.argmax(-1, keepdim=True)
        written = torch.cat([written, ids], 1)
        running &= ~torch.isin(ids[:, 0], ends)
        if not running.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
        positions = positions[:, -1:] + 1
    return [_ended(row, set(ends.tolist())) for row in written.tolist()]


def _ended(ids: list[int], ends: set[int]) -> list[int]:
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: last + 1]
