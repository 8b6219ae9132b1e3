"""A tokenizer.json in a process of its own, which does nothing else and never has a second thread.

Half of the time of a BPE tokenizer is malloc and free, and glibc's take a tenth longer in a process
that has ever had two threads, as a stage has [measured]. So this imports next to nothing: numpy
alone starts threads. Run by processes.py; tokenizer.py uses the same functions at home.
"""

import signal
import sys
from array import array
from collections.abc import Sequence
from typing import IO

import tokenizers

ID = "I"
"""Type code of an id: uint32."""
Message = tuple["array[int]", bytes]
"""Lengths of documents (int64, in bytes or in ids), and the documents, one after the other."""


def open_tokenizer(path: str) -> tokenizers.Tokenizer:
    """The file's tokenizer, which cuts and pads nothing, and to which special tokens are text."""
    tokenizer = tokenizers.Tokenizer.from_file(path)
    # Some files are saved as their last user left them.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, eos: int, texts: Sequence[bytes]) -> Message:
    """Ids of UTF-8 documents, each of which ends with eos."""
    ids, lengths = array(ID), array("q")
    for text in texts:
        # One by one: what a document has left behind is used again while it is in the cache.
        found = tokenizer.encode_batch_fast([text.decode()])[0].ids
        if not found or found[-1] != eos:
            found.append(eos)
        ids.fromlist(found)
        lengths.append(len(found))
    return lengths, ids.tobytes()


def send(file: IO[bytes], message: Message) -> None:
    """Writes a message."""
    lengths, data = message
    file.write(len(lengths).to_bytes(8, "little") + lengths.tobytes())
    file.write(data)
    file.flush()


def receive(file: IO[bytes], width: int) -> Message:
    """Reads a message whose lengths count items of `width` bytes. EOFError: there is none."""
    lengths = array("q")
    lengths.frombytes(_read(file, 8 * int.from_bytes(_read(file, 8), "little")))
    return lengths, _read(file, width * sum(lengths))


def _read(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Answers messages on standard input until that ends: `apart PATH EOS`."""
    # Ctrl-C goes to all; the parent decides, and whatever ends it ends our input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer, eos = open_tokenizer(sys.argv[1]), int(sys.argv[2])
    while True:
        try:
            lengths, data = receive(sys.stdin.buffer, 1)
        except EOFError:
            return
        texts, start = [], 0
        for length in lengths:
            texts.append(data[start : start + length])
            start += length
        send(sys.stdout.buffer, encode(tokenizer, eos, texts))


if __name__ == "__main__":
    main()
