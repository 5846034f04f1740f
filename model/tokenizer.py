"""Byte-level BPE that splits at white space only, with MiniMax-M2's special tokens.

Splitting at white space keeps whole Python expressions together: 113 tokens a policy script
instead of 258 when punctuation and digits split too. A piece is one optional leading space or
newline with the non-space run that follows it, or a run of white space. No torch is imported here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from model.errors import ModelError

PAD: Final = "<pad>"
BOS: Final = "]~!b["
EOS: Final = "[e~["
ROLE: Final = "]~b]"
THINK: Final = "<think>"
THINK_END: Final = "</think>"
CALL: Final = "<minimax:tool_call>"
CALL_END: Final = "</minimax:tool_call>"

SPECIAL_TOKENS: Final = (PAD, BOS, EOS, ROLE, THINK, THINK_END, CALL, CALL_END)
"""In id order: `<pad>` is 0, bos 1, eos 2, role 3, think 4 and 5, tool call 6 and 7."""

TOKENIZER_FILE: Final = "tokenizer.json"
_CONFIG_FILE: Final = "tokenizer_config.json"
_PIECE: Final = r"[ \n]?\S+|\s+(?!\S)|\s+"
_MIN_VOCAB: Final = 256 + len(SPECIAL_TOKENS) + 10
# System prompts, tool lists and markup come again and again, so their ids are kept.
KEPT_TEXTS: Final = 1024
LONGEST_KEPT: Final = 8192
_DIGITS: Final = "".join(f" {digit}" for digit in range(10))


class TokenizerError(ModelError):
    """A tokenizer file that is missing, unreadable, or lacks a special token."""


class Tokenizer:
    """Text to ids and back; `decode(encode(x)) == x` for every text.

    Two views of one vocabulary are held: one that reads the literal text of a special token as
    that token, and one that reads it as plain characters, for text that nobody vouches for.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        try:
            self._with_specials = tokenizers.Tokenizer.from_str(tokenizer_json)
            self._plain = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises no narrower class
            raise TokenizerError(f"not a tokenizer.json ({error}); copy it again") from error
        self._plain.encode_special_tokens = True
        needed = [token for token in SPECIAL_TOKENS if token != PAD]  # the released one has no pad
        missing = [t for t in needed if self._with_specials.token_to_id(t) is None]
        if missing:
            raise TokenizerError(f"tokenizer lacks the special token {missing[0]!r}")

    @classmethod
    def load(cls, directory: Path | str) -> Tokenizer:
        """Reads `tokenizer.json` of a checkpoint folder; `TokenizerError` if it is unusable."""
        path = Path(directory) / TOKENIZER_FILE
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise TokenizerError(
                f"{path} does not exist; name a checkpoint folder that holds {TOKENIZER_FILE}"
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read {path}: {error}") from error
        try:
            return cls(text)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from error

    def save(self, directory: Path | str) -> None:
        """Writes `tokenizer.json` and the small config that Hugging Face's loader wants."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._json, encoding="utf-8")
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000_000,
        }
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def encode(self, text: str, *, specials: bool = True) -> list[int]:
        """Ids of `text`; nothing is added. `specials=False` reads special tokens' text as text.

        Raises TokenizerError for half of a surrogate pair, which no UTF-8 text can hold.
        """
        if len(text) > LONGEST_KEPT:
            return self._ids_of(text, specials)
        return list(self._kept(text, specials))

    def _ids_of(self, text: str, specials: bool) -> list[int]:
        view = self._with_specials if specials else self._plain
        try:
            return list(view.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            reason = "the text is not Unicode: it holds half a surrogate pair"
            raise TokenizerError(reason) from error

    @cached_property
    def _kept(self) -> Callable[[str, bool], tuple[int, ...]]:
        return lru_cache(KEPT_TEXTS)(lambda text, specials: tuple(self._ids_of(text, specials)))

    def decode(self, ids: Sequence[int], *, skip_specials: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        return str(self._with_specials.decode(list(ids), skip_special_tokens=skip_specials))

    def token_id(self, token: str) -> int:
        """Id of one token of the vocabulary, e.g. a special token; `TokenizerError` if absent."""
        found = self._with_specials.token_to_id(token)
        if found is None:
            raise TokenizerError(f"no token {token!r} in this vocabulary")
        return int(found)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for: a token may hold a part of a character."""
        if token_id in self._special_ids:
            return self.decode([token_id]).encode()
        token = self._with_specials.id_to_token(token_id)
        return b"" if token is None else bytes(_BYTE_OF_CHAR[char] for char in token)

    def to_str(self) -> str:
        """The text of `tokenizer.json`."""
        return self._json

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self.token_id(token) for token in SPECIAL_TOKENS)

    @cached_property
    def eos_id(self) -> int:
        return self.token_id(EOS)

    @cached_property
    def bos_id(self) -> int:
        return self.token_id(BOS)

    @cached_property
    def pad_id(self) -> int:
        """Of `<pad>`; of the end mark where the vocabulary has none."""
        known = self._with_specials.token_to_id(PAD)
        return self.eos_id if known is None else int(known)

    @cached_property
    def vocab_size(self) -> int:
        return int(self._with_specials.get_vocab_size(with_added_tokens=True))

    @cached_property
    def hash(self) -> str:
        """sha256 of `tokenizer.json`, kept in call records: ids mean nothing without it."""
        return hashlib.sha256(self._json.encode()).hexdigest()


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Learns the merges from `texts`. The special tokens take the first ids.

    The ten " 0" … " 9" are always single tokens, so that a row of digits can be read digit by
    digit. A small corpus may give fewer than `vocab_size` tokens.
    """
    if vocab_size < _MIN_VOCAB:
        raise TokenizerError(f"vocab_size {vocab_size} is below {_MIN_VOCAB}: bytes and specials")
    corpus = list(texts)
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_with_digits(corpus), trainer=trainer)
    return Tokenizer(core.to_str(pretty=False))


def _with_digits(corpus: Sequence[str]) -> Iterator[str]:
    """The corpus and enough of " 0 1 … 9" that these ten merges come early.

    Merge counts never rise and add up to at most the bytes of the corpus, so a fiftieth of the
    words is more than the last merges of a 2,048-token vocabulary can have.
    """
    words = 0
    for text in corpus:
        words += len(re.findall(r"\S+", text))
        yield text
    repeats = max(1000, words // 50)
    for _ in range(0, repeats, 1000):
        yield _DIGITS * 1000


def _byte_of_char() -> dict[str, int]:
    """Inverse of GPT-2's printable stand-ins: bytes without a glyph sit above U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + offset): byte for offset, byte in enumerate(hidden)})
    return table


_BYTE_OF_CHAR: Final = _byte_of_char()
