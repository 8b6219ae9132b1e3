"""prepare: a domain's sources -> token shards and a held-out split, see shards.py. CPU, no torch.

inputs: (domain, tokenizer unless it is the built-in byte tokenizer). The result is the same for
any number of threads; memory is a few megabytes of text per thread, and
a tokenizer each.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain

from btx_api.spec import Source
from btx_api.stage import PrepareRecipe, Progress

from btx_trainer.artifacts import Outside
from btx_trainer.encoding import Encoder, held_out_limit, in_order
from btx_trainer.errors import ConfigurationError, PreemptedError
from btx_trainer.processes import TokenizerProcesses
from btx_trainer.shards import TOKENIZER, Index, SourceIndex, Writer
from btx_trainer.sources import Chunk, chunks, list_files
from btx_trainer.tokenizer import load
from btx_trainer.work import Made, Work


def run(work: Work) -> Made:
    """ConfigurationError names a source without documents, and one changed since preflight."""
    recipe, domain = work.recipe, work.inputs[0]
    assert isinstance(recipe, PrepareRecipe) and isinstance(domain, Outside)
    domain.check()
    path = work.inputs[1].fetch() / TOKENIZER if recipe.tokenizer == "file" else None
    tokenizer = load(path)
    reader = _Reader(work, recipe, domain.location.sources)
    numbers = range(len(recipe.sources))
    every = chain.from_iterable(reader.chunks(number) for number in numbers)
    limit = held_out_limit(every, recipe.held_out, recipe.max_record_bytes)
    with ExitStack() as stack:
        encode = tokenizer.encode
        if path:
            encode = stack.enter_context(TokenizerProcesses(path, tokenizer.eos)).encode
        encoder = Encoder(encode=encode, limit=limit, max_record_bytes=recipe.max_record_bytes)
        writer = stack.enter_context(Writer(work.out, tokenizer))
        for number in numbers:
            reader.write(number, writer, encoder)
        index = writer.finish()
    if path:
        work.out.add(path, TOKENIZER)
    domain.check()
    return Made(metrics=_metrics(index))


class _Reader:
    """The domain's sources, and how far they are read."""

    def __init__(self, work: Work, recipe: PrepareRecipe, sources: Sequence[Source]) -> None:
        self._work, self._recipe = work, recipe
        self._uris = [source.uri for source in sources]
        # Nothing is drawn from a source of weight 0, so nothing of it is read.
        self._files = [
            list_files(source, work.execution.storage) if shape.weight else []
            for source, shape in zip(sources, recipe.sources, strict=True)
        ]
        self._threads = work.execution.scheduling.threads or len(os.sched_getaffinity(0))
        self._size = sum(head.size for files in self._files for _, _, head in files)
        self._read, self._tokens, self._started = 0, 0, time.monotonic()

    def chunks(self, number: int) -> Iterator[Chunk]:
        """Of one source."""
        shape = self._recipe.sources[number]
        return chunks(self._files[number], shape, self._recipe.max_record_bytes)

    def write(self, number: int, writer: Writer, encoder: Encoder) -> None:
        """Encodes one source."""
        why = ""
        with ExitStack() as stack:
            target = stack.enter_context(writer.source(self._recipe.sources[number].weight))
            made = in_order(encoder, self.chunks(number), self._threads)
            # Its threads end before what they use does.
            stack.callback(made.close)
            for chunk, encoded, example in made:
                if self._work.stopping():
                    raise PreemptedError("", "asked to stop; preparing begins afresh")
                target.write(encoded)
                why = why or example
                self._publish(chunk.stored, len(encoded.tokens))
            if self._files[number] and not target.index.documents:
                raise ConfigurationError(self._uris[number], _nothing_left(target.index, why))

    def _publish(self, stored: int, tokens: int) -> None:
        self._read += stored
        self._tokens += tokens
        seconds = time.monotonic() - self._started
        speed = self._read / seconds
        self._work.publish(
            Progress(
                phase="preparing", step=self._read, steps=self._size, tokens=self._tokens,
                tokens_per_second=self._tokens / seconds,
                eta_seconds=max(self._size - self._read, 0) / speed if speed else None,
            )
        )  # fmt: skip


def _nothing_left(index: SourceIndex, why: str) -> str:
    if index.held_out:
        return f"all {index.held_out} documents are held out; give more or lower prepare.heldOut"
    counts = f"{index.empty} empty, {index.undecodable} undecodable, {index.oversized} oversized"
    return f"no document in {index.records} records: {counts}" + (f" ({why})" if why else "")


def _metrics(index: Index) -> dict[str, float]:
    names = ("tokens", "documents", "records", "empty", "undecodable", "oversized")
    return {
        **{name: sum(getattr(source, name) for source in index.sources) for name in names},
        "held_out_tokens": index.held_out.tokens,
        "held_out_documents": index.held_out.documents,
    }
