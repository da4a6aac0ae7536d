"""Text to tokens and back, with the tokenizer that came with the checkpoint.

`engine` encodes prompts, and keeps one `Detokenizer` per stream of output. The work is the
`tokenizers` package's; here is what it needs: the special tokens of `tokenizer_config.json`,
a tokenizer built from a GGUF file's own vocabulary, and streaming.

Streaming: a token is a piece of bytes, and only whole characters are text. `Detokenizer` keeps
the bytes that may still become a character, so a push costs the piece it adds, whatever came
before. (Decoding a growing window again and again holds back for ever on bytes that never
become text, and is quadratic then.)

Invariants
    INV-ENG-60  all pushes of a `Detokenizer` and its flush, joined, are `decode` of all ids
"""

import codecs
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from tierline.base.errors import RequestError, SpecError
from tierline.base.names import lookup
from tierline.engine.checkpoint import Checkpoint, read_object

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_SPACE = "\u2581"  # how SentencePiece writes a space


class Tokenizer:
    """The tokenizer of one checkpoint. Make one with `load_tokenizer`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int],
    ) -> None:
        self.backend = backend
        self.special_tokens = special_tokens  # "bos_token" and so on: what templates may name
        self.bos_id = backend.token_to_id(special_tokens.get("bos_token", ""))
        self.eos_ids = frozenset(eos_ids)  # any of them ends an answer
        self.vocabulary_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        special = {number: token.content for number, token in added.items() if token.special}
        self._skipped = frozenset(special)
        self.special_texts = frozenset(special.values())  # as they are written
        self.byte_runs, self.strips_first, self._bytes_of = _reading(backend.decoder)
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of `text`; `special` puts what the model expects around it (often BOS) in place.

        A special token written out in `text` becomes that token, as everywhere. Text that a
        chat template made holds its special tokens already: pass `special=False`.
        """
        try:
            return self.backend.encode(text, add_special_tokens=special).ids
        except (TypeError, UnicodeError):
            raise RequestError(
                "the text is not valid Unicode", hint="remove unpaired surrogates"
            ) from None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no text become U+FFFD. Unknown ids are left out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, a special one as it is written; unknown: nothing."""
        piece = self._pieces.get(token)
        if piece is None:
            name = self.backend.id_to_token(token)
            piece = self._pieces[token] = b"" if name is None else self._bytes_of(name)
        return piece

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, with U+FFFD for parts of characters."""
        return self.token_bytes(token).decode(errors="replace")

    def is_special(self, token: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token in self._skipped

    def is_byte(self, token: int) -> bool:
        """Whether this token stands for one byte that no other token could express."""
        return self.byte_runs and _byte(self.backend.id_to_token(token)) is not None


class Detokenizer:
    """The text of a growing list of tokens, as early as it cannot change any more."""

    __slots__ = ("_decoder", "_run", "_skip_special", "_started", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # byte tokens in a row, see `_end_run`
        self._started = not tokenizer.strips_first

    def push(self, token: int) -> str:
        """The text that is certain now and was not before; often the token's own, or ''."""
        tokenizer = self._tokenizer
        if self._skip_special and tokenizer.is_special(token):
            return ""
        piece = tokenizer.token_bytes(token)
        if tokenizer.byte_runs and piece:  # a token that is nothing does not end a run
            if tokenizer.is_byte(token):
                self._run += piece
                return ""
            return self._trimmed(self._end_run() + piece.decode())
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The text still held back: no token follows."""
        if self._tokenizer.byte_runs:
            return self._trimmed(self._end_run())
        return self._decoder.decode(b"", final=True)

    def _end_run(self) -> str:
        """Byte tokens in a row are text as a whole, or U+FFFD each: so does `tokenizers`."""
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _trimmed(self, text: str) -> str:
        """Without the space that the encoder put before the first word."""
        if text and not self._started:
            self._started = True
            return text.removeprefix(" ")
        return text


# How a decoder turns the name of a token into bytes.


def _reading(decoder: Any) -> tuple[bool, bool, Callable[[str], bytes]]:
    """Whether byte tokens come in runs, whether a first space goes, and bytes of a name."""
    state: Any = json.loads(decoder.__getstate__()) if decoder else {"type": None}
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    match [part["type"] for part in parts]:
        case ["ByteLevel"]:
            return False, False, _byte_level
        case ["Replace", "ByteFallback", "Fuse"]:
            return True, False, _sentence_piece
        case ["Replace", "ByteFallback", "Fuse", "Strip"] if parts[3]["content"] == " " and (
            parts[3]["start"],
            parts[3]["stop"],
        ) == (1, 0):
            return True, True, _sentence_piece
        case kinds:
            raise SpecError(
                f"a tokenizer with decoder {' + '.join(map(str, kinds))} is not known",
                hint="known: byte-level (GPT-2, Llama 3, Qwen) and SentencePiece BPE with byte "
                "fallback (Llama 2, Mistral, Gemma)",
            )


def _byte_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for 256 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()


def _byte_level(name: str) -> bytes:
    try:
        return bytes(_BYTE_CHARACTERS[c] for c in name)
    except KeyError:  # an added token, written as it is
        return name.encode()


def _byte(name: str | None) -> int | None:
    """The byte that a name such as `<0x0A>` stands for."""
    if name is None or len(name) != 6 or not (name.startswith("<0x") and name.endswith(">")):
        return None
    try:
        return int(name[3:5], 16)
    except ValueError:
        return None


def _sentence_piece(name: str) -> bytes:
    byte = _byte(name)
    return name.replace(_SPACE, " ").encode() if byte is None else bytes([byte])


# Reading the tokenizer of a checkpoint.


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer that lies beside the weights, or inside a GGUF file.

    Raises `SpecError` when there is none, or it is damaged or of a kind that is not known.
    """
    if checkpoint.metadata:
        return _from_gguf(checkpoint.metadata, where=str(checkpoint.path))
    return _from_folder(checkpoint.path, checkpoint.config)


def _from_folder(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise SpecError(
            f"no tokenizer.json in {str(folder)!r}",
            hint="save the model with a fast tokenizer (transformers: save_pretrained)",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise SpecError(f"{str(path)!r} is not a tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = optional_object(folder / "tokenizer_config.json")
    special = {name: text for name in SPECIAL_NAMES if (text := _content(settings.get(name)))}
    ends = _ids(config.get("eos_token_id"))
    ends |= _ids(optional_object(folder / "generation_config.json").get("eos_token_id"))
    end = backend.token_to_id(special.get("eos_token", ""))
    ends |= set() if end is None else {end}
    return Tokenizer(backend, special_tokens=special, eos_ids=ends)


def optional_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty when there is no such file."""
    return read_object(path, what="settings") if path.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(value: Any) -> set[int]:
    """One id, several, or none."""
    return {n for n in (value if isinstance(value, list) else [value]) if type(n) is int}


# From a GGUF file's own vocabulary. `tokenizer.ggml.pre` names how text is split before merging.

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")


def _byte_level_split(*, by_itself: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_itself)


def _split(pattern: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated"), _byte_level_split(by_itself=False)]
    return pre_tokenizers.Sequence(parts)


def _digits_apart() -> Any:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _byte_level_split(by_itself=True)])


_SPLITS: dict[str, Callable[[], Any]] = {
    "default": lambda: _byte_level_split(by_itself=True),
    "gpt-2": lambda: _byte_level_split(by_itself=True),
    "smollm": _digits_apart,
    "llama-bpe": lambda: _split(_LLAMA_3),
    "llama3": lambda: _split(_LLAMA_3),
    "qwen2": lambda: _split(_QWEN_2),
}
_CONTROL, _USER_DEFINED = 3, 4  # `tokenizer.ggml.token_type`


def _from_gguf(metadata: Mapping[str, Any], *, where: str) -> Tokenizer:
    kind = metadata.get("tokenizer.ggml.model", "nothing")
    if kind != "gpt2":
        raise SpecError(
            f"{where}: vocabulary of kind {kind!r}",
            hint="known: gpt2 (byte-level BPE); or use the safetensors checkpoint",
        )
    tokens = _list(metadata, "tokens", str, where=where)
    types = _list(metadata, "token_type", int, where=where)
    if len(types) != len(tokens):
        raise SpecError(f"{where}: {len(tokens)} tokens and {len(types)} token types")
    backend = _byte_level_bpe(metadata, tokens, where=where)
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in defined])
    ids = {
        f"{short}_token": metadata.get(f"tokenizer.ggml.{long}_token_id")
        for short, long in _GGUF_SPECIAL.items()
    }
    names = {n: tokens[i] for n, i in ids.items() if type(i) is int and 0 <= i < len(tokens)}
    if metadata.get("tokenizer.ggml.add_bos_token", False) and "bos_token" in names:
        backend.post_processor = _starting_with(names["bos_token"], ids["bos_token"])
    ends = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return Tokenizer(backend, special_tokens=names, eos_ids={i for i in ends if type(i) is int})


_GGUF_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: list[str], *, where: str
) -> tokenizers.Tokenizer:
    """Byte-level BPE over the file's tokens and merges, split as `tokenizer.ggml.pre` says."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    split = lookup(
        "GGUF pre-tokenizer", str(pre), _SPLITS, error=SpecError, way_out="or use safetensors"
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise SpecError(f"{where}: a token comes twice in the vocabulary")
    merges = []
    for merge in _list(metadata, "merges", str, where=where):
        at = merge.find(" ", 1)
        if at < 0:
            raise SpecError(f"{where}: {merge!r} is not a merge of two tokens")
        merges.append((merge[:at], merge[at + 1 :]))
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split is _SPLITS["llama-bpe"])
        )
    except Exception as error:  # the package raises nothing narrower
        raise SpecError(f"{where}: its vocabulary is damaged: {error}") from None
    backend.pre_tokenizer = split()
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _starting_with(name: str, token: Any) -> Any:
    """Puts BOS before every text."""
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, token)]
    )


def _list(metadata: Mapping[str, Any], key: str, kind: type, *, where: str) -> list[Any]:
    """A list of the GGUF vocabulary."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise SpecError(f"{where}: tokenizer.ggml.{key} is not a list of {kind.__name__}")
    return value
