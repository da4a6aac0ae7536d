"""Answers of a promised form: JSON, a JSON schema, a regular expression, a choice, a grammar.

The server compiles what a request wants (`Grammars.compile`, on a thread of its own) and gives
the `Grammar` to `Engine.add`.  The engine opens a `Matcher` an answer: `mask` says which tokens
may come next, computed beside the forward pass; `accept` takes the one that was sampled; `over`
says that nothing may follow.  llguidance does the parsing, `closing` finds the way out.

A budget closes an answer where a way out is found.  It is looked for when one token could make
it too long (`schema_size`, an estimate from above).  From there on masks are tight: a token stays
when the grammar accepts it followed by a known way to the end that fits; of plain text within a
free string a few tokens stand for all.  A tight mask leaves out tokens that would have fitted,
too: of many, 96 and those of the structure are tried.  The search is bounded, so for some forms
no way is found; then masks are free, and the answer may end with "length".

Time and memory are bounded before the work: by limits on the text (`require_bounded`), and by
llguidance's on lexer, parser and grammar, which end any one of its calls; between calls, by
`seconds_max`.  Time is the processor's, of the thread that works: a busy machine refuses nothing.
The library lets go of the interpreter's lock while it compiles and makes masks, so who streams
meanwhile goes on.  A step waits for the masks of all its rows, so what one answer may take of it
is bounded, too: `ANSWER_S`, and `TOKEN_S` a token, beyond which it ends with an error.

Invariants
    INV-ENG-30  every token that a mask allows is accepted, and an answer that is over parses
    INV-ENG-31  a budget that holds the way out holds the answer: it is complete
    INV-ENG-32  what the grammar library does not support is refused by name, never ignored
    INV-ENG-33  preparing a grammar takes bounded time and memory, whatever its text
    INV-ENG-34  matchers of one grammar know nothing of each other
    INV-ENG-35  the masks of one answer take a bounded time, whatever its grammar
"""

import json
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import llguidance
import llguidance.gbnf_to_lark
import numpy as np
import torch

from tierline.base.errors import RequestError, SpecError
from tierline.base.names import lookup
from tierline.engine.closing import NODES_MAX, Closer, Place, Words, count, has, tokens_in
from tierline.engine.schema_size import (
    REACH_MAX_TOKENS,
    SchemaSize,
    pattern_bytes,
    require_bounded,
    softened,
)
from tierline.engine.tokenizer import Tokenizer

CACHED = 64  # compiled grammars that are kept
BYTES_MAX = 256_000  # of a text; the largest schema of MaskBench's sample has 9,445
RULES_MAX = 500
GBNF_BYTES_MAX = 32_000  # of one that may have to be converted, in Python
WAY_TOKENS_MAX = 1_024  # of the shortest answer, as it is looked for when compiling
TESTED = 96  # tokens that a tight mask looks at one by one
SEARCHED = 2  # of them, that get a search of their own
SEARCH_NODES = 60  # copies that such a search makes
SEARCH_S = 0.1  # of searching for one mask; what was not found by then counts as none
ANSWER_S = 0.5  # of masks that an answer may take at once; half of it for searches
TOKEN_S = 0.01  # of masks that it may take for each token besides
FREE_TOKENS = 8  # to spare, for any text in a string
JSON_REACH_TOKENS = 16
GRAMMAR_REACH_TOKENS = 256  # of a grammar whose text does not tell
_OPTIONS = {
    "whitespace_flexible": True,
    "whitespace_pattern": r" |\r?\n[ \t]{0,40}",  # what pretty-printers write, and no more
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=300_000,
    step_lexer_fuel=200_000,  # some 14 ms
    step_max_items=20_000,
    max_lexer_states=20_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The form of an answer, as a request asks for it.

    `text` is the schema as JSON text, the pattern, the choices or the grammar; `ebnf` is GBNF
    as llama.cpp writes it or Lark, `lark` is Lark with the special tokens that tools need.
    """

    kind: str  # json_object, json_schema, regex, choice, ebnf or lark
    text: str | tuple[str, ...] = ""
    lenient: bool = False  # a schema's keywords that are not supported are left out, not refused

    @property
    def texts(self) -> tuple[str, ...]:
        """All of its texts."""
        return self.text if isinstance(self.text, tuple) else (self.text,)


class Grammars:
    """Compiles grammars for one tokenizer and keeps the last ones. Any thread may call."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocabulary: int,
        seconds_max: float = 2.0,
        now_s: Callable[[], float] = time.thread_time,
    ) -> None:
        """`vocabulary` is the width of the logits; what exceeds the tokenizer is never allowed.

        `now_s` is the processor's time of the calling thread.
        """
        source = _Source(tokenizer, vocabulary)
        self.vocabulary = vocabulary
        library: Any = llguidance.LLTokenizer
        self._library = library(source, eos_token=source.eos_ids)
        self._shared = Shared(source.tokens, source.special_token_ids, source.eos_ids, now_s)
        self._seconds_max, self._now_s = seconds_max, now_s
        self._lock = Lock()
        self._kept: OrderedDict[Wanted, Grammar] = OrderedDict()

    def kept(self, wanted: Wanted) -> "Grammar | None":
        """The grammar of `wanted` if it was compiled not long ago; takes no time."""
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
            return self._kept.get(wanted)

    def compile(self, wanted: Wanted) -> "Grammar":
        """The grammar of `wanted`; raises `RequestError` for what is wrong or not supported."""
        compiled = self.kept(wanted) or self._compiled(wanted)
        with self._lock:
            self._kept[wanted] = compiled
            while len(self._kept) > CACHED:
                self._kept.popitem(last=False)
        return compiled

    def _compiled(self, wanted: Wanted) -> "Grammar":
        due_s = self._now_s() + self._seconds_max

        def late() -> bool:
            return self._now_s() > due_s

        start, matcher = self._started(wanted)
        reach_tokens = _reach_tokens(wanted)
        way = self._shared.closer.way(
            matcher.deep_copy(),
            Place(),
            tokens_max=WAY_TOKENS_MAX,
            late=late,
            nodes_max=2 * NODES_MAX,
        )
        if late():
            raise RequestError(
                f"the {_NAMES[wanted.kind]} takes more than {self._seconds_max:g} s to prepare",
                hint="make it smaller: fewer alternatives, smaller counts of repetition",
            )
        return Grammar(
            start,
            self._shared,
            way=way,
            reach_tokens=reach_tokens,
            patterned=_patterned(wanted),
        )

    def check(self, wanted: Wanted) -> None:
        """Raise `RequestError` for what is wrong or not supported; quicker than `compile`."""
        self._started(wanted)
        _reach_tokens(wanted)

    def _started(self, wanted: Wanted) -> tuple[Callable[[], Any], Any]:
        """What starts a matcher, and one that has proved to work."""
        source = _source(wanted)

        def start() -> Any:
            return llguidance.LLMatcher(self._library, source, log_level=0, limits=_LIMITS)

        matcher = start()
        self._try(wanted.kind, matcher.deep_copy())
        return start, matcher

    def _try(self, kind: str, probe: Any) -> None:
        """Take a step: what is too large shows in the first masks, not before."""
        for _ in range(2):
            if not probe.is_error():
                allowed = tokens_in(self._shared.closer.words_of(probe))
            if probe.is_error():
                raise _explained(kind, probe.get_error())
            if not len(allowed):
                raise _endless(kind)
            if not probe.is_stopped():
                probe.consume_token(int(allowed[0]))


class Grammar:
    """A compiled grammar. Not changed after it was made: any thread may open matchers."""

    def __init__(
        self,
        start: Callable[[], Any],
        shared: "Shared",
        *,
        way: tuple[int, ...] | None,
        reach_tokens: int,
        patterned: bool,
    ) -> None:
        self._make, self._start = start, start()
        self.shared = shared
        self.way = way  # tokens of a short answer; None: none was found
        self.reach_tokens = reach_tokens  # by how much one token lengthens the way out, at most
        self.patterned = patterned  # whether strings follow a pattern

    def matcher(self) -> "Matcher":
        """The start of one answer."""
        return Matcher(self, self._start.deep_copy())

    def renewed(self) -> Any:
        """A start that shares nothing with the copies so far.

        Copies share what they learned of the lexer, and with it the limit on that: when one of
        them reaches it, all fail, and so would those to come.
        """
        self._start = self._make()
        return self._start.deep_copy()


class Matcher:
    """Where one answer is in its grammar. One thread at a time."""

    __slots__ = (
        "_fresh",
        "_grammar",
        "_inner",
        "_left_s",
        "_look_at",
        "_place",
        "_said",
        "_search_due_s",
        "_way",
    )

    def __init__(self, grammar: Grammar, inner: Any) -> None:
        self._grammar, self._inner = grammar, inner
        self._said: list[int] = []
        self._place = Place()
        self._way = grammar.way  # the last one that was found
        self._fresh = True  # whether it leads out from here
        self._look_at = 1 << 62  # how many tokens are left when the way out is looked at next
        self._left_s = ANSWER_S  # of processor time for masks
        self._search_due_s = 0.0  # when the searches for this mask end

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return bool(self._inner.is_stopped() and not self._inner.is_error())

    def accept(self, token: int) -> None:
        """The token that was taken; one that the mask allowed."""
        taken = self._inner.consume_token(token)
        if not taken:
            self._renew()
            taken = self._inner.consume_token(token)
        assert taken, f"token {token} was masked"
        self._said.append(token)
        self._place = self._place.after(self._grammar.shared.closer.pieces[token])
        if self._fresh and self._way and self._way[0] == token:
            self._way = self._way[1:]
        else:
            self._fresh = False

    def mask(self, left_tokens: int) -> torch.Tensor:
        """[vocabulary] of booleans: what may come next, with `left_tokens` to go, it included.

        Raises `RequestError` when the library's limits are exceeded at this place, or when the
        masks of this answer have taken too long.
        """
        closer, now_s = self._grammar.shared.closer, self._grammar.shared.now_s
        start_s = now_s()
        words = closer.words_of(self._inner)
        if self._inner.is_error():
            self._renew()
            words = closer.words_of(self._inner)
        if self._inner.is_error():
            raise _too_complex(_first_line(self._inner.get_error()))
        self._search_due_s = now_s() + min(SEARCH_S, self._left_s - ANSWER_S / 2)
        if 0 < left_tokens <= self._look_at:
            words = self._within(words, left_tokens)
        self._left_s = min(ANSWER_S, self._left_s + TOKEN_S) - (now_s() - start_s)
        if self._left_s < 0:
            raise _too_complex("its masks take too long")
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=len(closer.pieces))
        return torch.from_numpy(bits.view(np.bool_))

    def _late(self) -> bool:
        return self._grammar.shared.now_s() > self._search_due_s

    def _renew(self) -> None:
        """Come here again on a start of its own: what failed may have been another's doing."""
        self._inner = self._grammar.renewed()
        self._inner.consume_tokens(self._said)

    def _within(self, words: Words, left_tokens: int) -> Words:
        """Of a mask, what leaves room for the way out."""
        way = self._way_out(left_tokens)
        if way is None:
            self._look_at = left_tokens // 2  # perhaps from elsewhere
            return words
        reach = self._grammar.reach_tokens
        slack = left_tokens - len(way)
        if slack > reach:
            self._look_at = left_tokens - max(1, (slack - reach) // (reach + 1))
            return words
        self._look_at = left_tokens
        return self._checked(words, way, left_tokens)

    def _way_out(self, left_tokens: int) -> tuple[int, ...] | None:
        """The way that is known, if it still leads out from here, or another."""
        if not self._fresh:
            old = self._way or ()
            ends = (old[at:] for at in reversed(range(min(len(old) + 1, 4))))
            closer = self._grammar.shared.closer
            self._way = next((end for end in ends if self._leads_out(end)), None)
            if self._way is None:
                self._way = closer.way(
                    self._inner.deep_copy(), self._place, tokens_max=left_tokens, late=self._late
                )
            self._fresh = True
        return self._way if self._way is not None and len(self._way) <= left_tokens else None

    def _leads_out(self, tokens: Sequence[int]) -> bool:
        """Whether the grammar accepts these tokens and may end behind them."""
        if not tokens:
            return bool(self._inner.is_accepting())
        whole = [*tokens, self._grammar.shared.eos_ids[0]]
        return bool(self._inner.validate_tokens(whole) == len(whole))

    def _checked(self, words: Words, way: tuple[int, ...], left_tokens: int) -> Words:
        """The tokens behind which a way out is known that fits; most are tried by the old way."""
        shared = self._grammar.shared
        kept = np.zeros_like(words)
        _add(kept, way[:1] or shared.eos_ids)
        if len(way) == left_tokens:
            return kept
        many = count(words) > TESTED
        if many and self._in_free_string(words, way, left_tokens):
            kept |= words & shared.plain
        tested = self._tested(words) if many else tokens_in(words).tolist()
        searches, fitting = 0, []
        for token in tested:
            ends = (way[at:] for at in range(min(len(way) + 1, 4)))
            fits = any(len(end) < left_tokens and self._leads_out((token, *end)) for end in ends)
            if not fits and searches < SEARCHED and token in shared.structural:
                searches += 1
                fits = self._is_closed_behind(token, left_tokens - 1)
            if fits or token in shared.eos_ids:
                fitting.append(token)
        _add(kept, fitting)
        return kept

    def _tested(self, words: Words) -> list[int]:
        """Of many allowed tokens those with a part in the structure, and some of the others."""
        tried = self._grammar.shared.closer.tried
        chosen = [int(t) for t in tried[has(words, tried)]]
        chosen += [t for t in self._grammar.shared.eos_ids if has(words, np.array([t]))[0]]
        others = tokens_in(words)
        sampled = others[:: len(others) // TESTED].tolist()
        return list(dict.fromkeys(chosen + sampled))

    def _is_closed_behind(self, token: int, left_tokens: int) -> bool:
        closer = self._grammar.shared.closer
        matcher = self._inner.deep_copy()
        if not matcher.consume_token(token):
            return False
        place = self._place.after(closer.pieces[token])
        way = closer.way(
            matcher, place, tokens_max=left_tokens, late=self._late, nodes_max=SEARCH_NODES
        )
        return way is not None

    def _in_free_string(self, words: Words, way: tuple[int, ...], left_tokens: int) -> bool:
        """Whether any plain text may come and the way out stays what it is."""
        shared = self._grammar.shared
        if self._grammar.patterned or not self._place.in_string:
            return False
        if len(way) + FREE_TOKENS > left_tokens or shared.closer.pieces[way[0]][:1] != b'"':
            return False
        plain = tokens_in(words & shared.plain)
        return len(plain) > TESTED and all(
            self._leads_out((token, *way)) for token in plain[:: len(plain) // 4].tolist()
        )


class Shared:
    """What all grammars of a tokenizer share."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        special: Sequence[int],
        eos_ids: Sequence[int],
        now_s: Callable[[], float],
    ) -> None:
        self.closer, self.now_s = Closer(pieces), now_s
        self.eos_ids = tuple(eos_ids)
        self.structural = frozenset(int(t) for t in self.closer.tried)
        self.plain = np.zeros(-(-len(pieces) // 32), dtype=np.uint32)  # leave a string a string
        hidden = frozenset(special)
        _add(self.plain, [t for t, p in enumerate(pieces) if t not in hidden and _is_plain(p)])


def _is_plain(piece: bytes) -> bool:
    """Whether a piece is whole characters that JSON strings hold as they are."""
    text = piece.decode(errors="replace")
    return text.isprintable() and bool(text) and not {'"', "\\", "\ufffd"} & set(text)


def _add(words: Words, tokens: Sequence[int]) -> None:
    """Put tokens into a mask."""
    ids = np.asarray(tokens, dtype=np.int64)
    np.bitwise_or.at(words, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))


class _Source:
    """A tokenizer in the form that llguidance reads."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        known = min(vocabulary, tokenizer.vocabulary_size)
        self.tokens = [tokenizer.token_bytes(token) for token in range(known)]
        self.tokens += [b""] * (vocabulary - known)
        self.eos_ids = sorted(token for token in tokenizer.eos_ids if token < vocabulary)
        if not self.eos_ids:
            raise SpecError(
                "the model names no token that ends an answer",
                hint="grammars need eos_token_id in config.json or generation_config.json",
            )
        self.eos_token_id = self.eos_ids[0]
        self.special_token_ids = sorted(
            {token for token in range(known) if tokenizer.is_special(token)} | {*self.eos_ids}
        )
        self._hidden = frozenset(self.special_token_ids)
        self._tokenizer = tokenizer
        self._places = {
            piece: token
            for token, piece in enumerate(self.tokens)
            if piece and token not in self._hidden
        }
        self._longest = max(map(len, self._places))

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that the grammar forces: as the model would write it, if possible."""
        wanted = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(wanted.decode(), special=False)
        joined = b"".join(self.tokens[token] for token in ids)
        if joined == wanted and self._hidden.isdisjoint(ids):
            return ids
        return self._by_longest(wanted)

    def _by_longest(self, text: bytes) -> list[int]:
        """The longest token that fits, again and again."""
        ids: list[int] = []
        at = 0
        while at < len(text):
            lengths = range(min(self._longest, len(text) - at), 0, -1)
            piece = next(text[at : at + n] for n in lengths if text[at : at + n] in self._places)
            ids.append(self._places[piece])
            at += len(piece)
        return ids


# From what a request asks for to what llguidance reads.


def _source(wanted: Wanted) -> str:
    """The grammar in the library's own form."""
    make = lookup("kind of grammar", wanted.kind, _SOURCES, error=RequestError)
    size = sum(len(text.encode(errors="replace")) for text in wanted.texts)
    name, size_max = _NAMES[wanted.kind], GBNF_BYTES_MAX if wanted.kind == "ebnf" else BYTES_MAX
    if size > size_max:
        raise RequestError(
            f"the {name} has {size} bytes", hint=f"at most {size_max} bytes are taken"
        )
    try:
        for text in wanted.texts:
            text.encode()
        return str(make(wanted))
    except UnicodeError:
        raise RequestError(
            f"the {name} is not valid Unicode", hint="remove unpaired surrogates"
        ) from None
    except RecursionError:
        raise RequestError(f"the {name} is nested too deeply", hint="nest less") from None


def _json_object(_: Wanted) -> str:
    return _json_schema(Wanted(kind="json_schema", text='{"type":"object"}'))


def _json_schema(wanted: Wanted) -> str:
    try:
        schema = json.loads(wanted.texts[0])
    except ValueError as error:
        raise RequestError(f"the schema is not JSON: {error}", hint="send it as JSON") from None
    if schema is False:
        raise RequestError("the schema is false: no value matches", hint="use true or an object")
    if not isinstance(schema, dict | bool):
        raise RequestError("the schema is not an object or boolean", hint="send a JSON schema")
    if isinstance(schema, dict) and "x-guidance" in schema:
        raise RequestError("the schema has x-guidance", hint="remove it: options are the server's")
    require_bounded(schema)
    text = "{}" if schema is True else wanted.texts[0]
    options = _OPTIONS
    if wanted.lenient:
        text, options = json.dumps(softened(json.loads(text))), {**_OPTIONS, "lenient": True}
    library: Any = llguidance.LLMatcher
    try:
        return str(library.grammar_from_json_schema(text, overrides=options))
    except ValueError as error:  # what Python reads as JSON and the library does not
        deep = "recursion limit" in str(error)
        raise RequestError(
            "the schema is nested too deeply" if deep else f"the schema is not JSON: {error}",
            hint="nest less" if deep else "send it as JSON",
        ) from None


def _regex(wanted: Wanted) -> str:
    return str(llguidance.LLMatcher.grammar_from_regex(wanted.texts[0]))


def _choice(wanted: Wanted) -> str:
    if not wanted.texts:
        raise RequestError("the choice is empty", hint="name at least one text")
    pattern = "|".join(f"(?:{_quoted(text)})" for text in wanted.texts)
    return str(llguidance.LLMatcher.grammar_from_regex(pattern))


def _quoted(text: str) -> str:
    return re.sub(r"([^\w\s])", lambda found: f"\\x{{{ord(found[1]):x}}}", text)


def _ebnf(wanted: Wanted) -> str:
    text = wanted.texts[0]
    if re.search(r"%json\s*\{", text):
        raise RequestError("the grammar holds %json", hint="ask for a JSON schema as one")
    if llguidance.gbnf_to_lark.is_lark_syntax(text):
        _require_rules(text)
        return _lark(wanted)
    try:
        lark = llguidance.gbnf_to_lark.gbnf_to_lark(text)
        _require_rules(lark)
        return _lark(Wanted(kind="lark", text=lark))
    except (ValueError, LookupError, llguidance.gbnf_to_lark.GbnfToLarkError) as error:
        raise RequestError(
            f"the grammar is not GBNF: {_first_line(str(error))}",
            hint="GBNF starts with `root ::= ...`; Lark starts with `start: ...`",
        ) from None


def _require_rules(lark: str) -> None:
    """Rules are followed by recursion: a chain of 4,000 overflows the library's stack."""
    rules = sum(":" in line for line in lark.splitlines())  # or a few more
    if rules > RULES_MAX:
        raise RequestError(f"the grammar has {rules} rules", hint=f"at most {RULES_MAX} are taken")


def _lark(wanted: Wanted) -> str:
    return str(llguidance.LLMatcher.grammar_from_lark(wanted.texts[0]))


_SOURCES: dict[str, Callable[[Wanted], str]] = {
    "json_object": _json_object,
    "json_schema": _json_schema,
    "regex": _regex,
    "choice": _choice,
    "ebnf": _ebnf,
    "lark": _lark,
}
_NAMES = {
    "json_object": "schema",
    "json_schema": "schema",
    "regex": "regular expression",
    "choice": "choice",
    "ebnf": "grammar",
    "lark": "grammar",
}


def _reach_tokens(wanted: Wanted) -> int:
    """By how much one token lengthens the way out, at most; raises when there is none."""
    if wanted.kind == "json_schema":
        size = SchemaSize(json.loads(wanted.texts[0]))
        if not size.finite:
            raise _endless(wanted.kind)
        return size.reach_tokens()
    if wanted.kind == "choice":
        return max(len(text.encode()) for text in wanted.texts)
    if wanted.kind == "regex":
        return min(pattern_bytes(wanted.texts[0]), REACH_MAX_TOKENS)
    return JSON_REACH_TOKENS if wanted.kind == "json_object" else GRAMMAR_REACH_TOKENS


def _patterned(wanted: Wanted) -> bool:
    """Whether what stands between quotes may have to follow a pattern."""
    if wanted.kind != "json_schema":
        return wanted.kind != "json_object"
    return re.search(r'"(pattern|format|patternProperties)"\s*:', wanted.texts[0]) is not None


# What is said of a grammar that cannot be used.


def _endless(kind: str) -> RequestError:
    return RequestError(
        f"no text of finite length matches the {_NAMES[kind]}",
        hint="recursion needs a way out: make a property optional, or allow null",
    )


def _too_complex(reason: str) -> RequestError:
    return RequestError(
        f"the grammar is too complex to go on: {reason}",
        hint="make it simpler: fewer ambiguous rules, smaller counts of repetition",
    )


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"


def _explained(kind: str, message: str) -> RequestError:
    """The library's message as one sentence and a hint."""
    name = _NAMES[kind]
    if "NoExtension" in message:
        return _endless(kind)
    if found := re.search(r"Unimplemented keys: \[(.*?)\]", message):
        keys = found[1].replace('"', "")
        return RequestError(
            f"the schema uses {keys}, which is not supported",
            hint="remove it from the schema, and check for it when the answer is there",
        )
    if "oneOf constraints are not supported" in message:
        return RequestError(
            "the schema uses oneOf with branches that may overlap, which is not supported",
            hint="use anyOf, or tell the branches apart by a const property",
        )
    if found := re.search(r"^error: (.+)$", message, re.MULTILINE):
        return RequestError(f"a regular expression: {found[1][:200]}", hint=_REGEX_HINT)
    if found := re.search(r"lookarounds not supported yet; (\w+)", message):
        return RequestError(f"a regular expression: {found[1]} is not supported", hint=_REGEX_HINT)
    reason = _first_line(re.sub(r"^at \d+\(\d+\): ", "", message))
    hint = "make it smaller" if re.search("too |limit", reason) else f"change the {name}"
    return RequestError(f"the {name} cannot be used: {reason}", hint=hint)


_REGEX_HINT = "syntax is that of Rust's regex: no look-around, no backreferences, no \\b"
