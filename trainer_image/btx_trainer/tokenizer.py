"""Text to token ids: any Hugging Face tokenizer.json, or the built-in byte tokenizer.

Every document ends with the end-of-document token, and begins with whatever the tokenizer itself
puts before a text (Llama's `<s>`: its seeds have seen no document without). Text that spells a
special token is text. Called by encoding.py; `byte_tokenizer_files` by whoever makes a seed.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import tokenizers

from btx_trainer import apart
from btx_trainer.errors import ConfigurationError

Ids = npt.NDArray[np.uint32]
Lengths = npt.NDArray[np.int64]

BOS, EOS, PAD, UNK = 256, 257, 258, 259
BYTE_SPECIALS = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<unk>": UNK}
END_OF_DOCUMENT = (
    "<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|eos|>",
)  # fmt: skip
"""The first of these special tokens that a tokenizer has ends its documents."""


class Tokenizer(ABC):
    """Thread-safe; the same bytes give the same ids."""

    kind: Literal["bytes", "file"]
    vocab_size: int
    """Highest id + 1."""
    eos: int
    specials: tuple[int, ...]
    """Ids that stand for no text and that `encode` puts around a document, eos among them."""

    @abstractmethod
    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        """UTF-8 documents -> (ids [sum of lengths], one after the other; lengths [documents])."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out; U+FFFD where they are no whole character."""


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are bytes, then bos, eos, pad, unk; nothing is put before a document."""

    kind = "bytes"
    vocab_size = 256 + len(BYTE_SPECIALS)
    eos = EOS
    specials = (EOS,)

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        """See Tokenizer."""
        lengths = np.array([len(text) + 1 for text in texts], np.int64)
        # A byte holds the place of each eos.
        joined = b"".join(part for text in texts for part in (text, b"\0"))
        ids = np.frombuffer(joined, np.uint8).astype(np.uint32)
        ids[np.cumsum(lengths) - 1] = EOS
        return ids, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return bytes(i for i in ids if i < BOS).decode(errors="replace")


class FileTokenizer(Tokenizer):
    """A tokenizer.json; ConfigurationError naming it if it cannot be read or has no eos."""

    kind = "file"

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = apart.open_tokenizer(str(path))
        except Exception as error:
            line = (str(error).splitlines() or ["unknown"])[0]
            raise ConfigurationError(str(path), f"is no tokenizer.json: {line}") from error
        special = {
            token.content: id
            for id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        ends = [special[name] for name in END_OF_DOCUMENT if name in special]
        if not ends:
            names = ", ".join(END_OF_DOCUMENT)
            raise ConfigurationError(str(path), f"none of {names} is a special token of it")
        self.eos = ends[0]
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        around = self._tokenizer.encode("").ids
        self.specials = tuple(sorted({self.eos, *around}))

    def encode(self, texts: Sequence[bytes]) -> tuple[Ids, Lengths]:
        """See Tokenizer."""
        lengths, ids = apart.encode(self._tokenizer, self.eos, texts)
        return np.frombuffer(ids, np.uint32), np.frombuffer(lengths, np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode(list(ids))


def load(path: Path | None) -> Tokenizer:
    """The tokenizer of a file; the built-in byte tokenizer without one."""
    return FileTokenizer(path) if path else ByteTokenizer()


def byte_tokenizer_json() -> str:
    """A stock tokenizer.json with the byte tokenizer's ids: its alphabet and no merges."""
    vocab = {_letter(byte): byte for byte in range(256)} | BYTE_SPECIALS
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in BYTE_SPECIALS]
    )
    return tokenizer.to_str(pretty=True)


def byte_tokenizer_files() -> dict[str, str]:
    """File name -> text: what a model folder needs for AutoTokenizer to give the same ids."""
    roles = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    names = {id: name for name, id in BYTE_SPECIALS.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{role: names[id] for role, id in roles.items()},
    }
    return {
        "tokenizer.json": byte_tokenizer_json(),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }


def _letter(byte: int) -> str:
    """GPT-2's printable stand-in for a byte: itself, or the n-th unprintable byte as 256 + n."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
