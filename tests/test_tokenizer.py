"""Text becomes the tokens that the model was trained on, and tokens become text piece by piece:
whatever is pushed, in whatever order, the pieces joined are the text of the whole."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from demo_model import demo_model
from tierline.base.errors import RequestError, SpecError, TierlineError
from tierline.engine.checkpoint import Checkpoint, open_checkpoint
from tierline.engine.tokenizer import Detokenizer, Tokenizer, load_tokenizer
from tiny_checkpoints import tiny_checkpoint

HARD = [
    "",
    " ",
    "\n\n\t ",
    "naïve café — “quoted” 1,234.56",
    "漢字かな交じり文、全角　空白",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇯🇵 and 👍🏽",
    "ʇxəʇ ‮reversed‬ e\u0301 vs é",
    "def f(x):\n    return x ** 2  # \t tab\r\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "\u0000\ufffd\U0010ffff",
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer(open_checkpoint(demo_model()))


def real_texts(data_dir: Path) -> list[str]:
    """A few hundred questions, programs and instructions."""
    found: list[str] = []
    for name in ("gsm8k/test", "humaneval/HumanEval", "ifeval/input_data", "bfcl/parallel"):
        with gzip.open(data_dir / "evals" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in itertools.islice(file, 60)]
        found += [str(value) for line in lines for value in line.values()]
    return [text[:2000] for text in found if len(text) > 20]


# The demo model's tokens


@pytest.fixture(scope="module")
def reference() -> Any:
    """GPT-2's fast tokenizer over the same vocabulary, with SmolLM's split of digits."""
    metadata = open_checkpoint(demo_model()).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    fast = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    fast.add_special_tokens({"additional_special_tokens": tokens[:17]})
    return fast


def test_tokens_are_those_of_the_reference(demo: Tokenizer, reference: Any, data_dir: Path) -> None:
    texts = HARD + real_texts(data_dir)

    assert len(texts) > 300
    for text in texts:
        assert demo.encode(text, special=True) == reference.encode(text), text
        ids = demo.encode(text, special=False)
        assert demo.decode(ids, skip_special=False) == text


def test_without_the_split_into_words_it_would_be_seen(demo: Tokenizer, data_dir: Path) -> None:
    """Negative control of the test above."""
    plain = tokenizers.Tokenizer.from_str(demo.backend.to_str())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    texts = HARD + real_texts(data_dir)

    assert any(plain.encode(text).ids != demo.encode(text, special=True) for text in texts)


def test_special_tokens_of_the_demo_model(demo: Tokenizer) -> None:
    assert demo.vocabulary_size == 49_152
    assert demo.bos_id == 1
    assert demo.eos_ids == {2}
    assert demo.special_tokens["eos_token"] == "<|im_end|>"
    assert demo.encode("<|im_start|>", special=False) == [1]
    assert demo.decode([1, 2], skip_special=False) == "<|im_start|><|im_end|>"
    assert demo.decode([1, 2]) == ""


# Streaming


def byte_fallback(*, strips: bool) -> tokenizers.Tokenizer:
    """A SentencePiece BPE in small: some pieces, and a token for every byte."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "a", "b", "▁a", "▁ab", "ab", "é", "漢", "▁<x>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * strips)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE in small, with tokens that hold parts of characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("ðŁ", "ĺ"), ("æ", "¼"), ("a", "b"), ("Ġ", "a")]
    pieces = [*alphabet, *(left + right for left, right in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={p: n for n, p in enumerate(pieces)}, merges=merges)
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    backend.add_tokens(["two words", "漢字"])
    return backend


SMALL = {
    "byte level": byte_level(),
    "byte fallback": byte_fallback(strips=False),
    "byte fallback, first space stripped": byte_fallback(strips=True),
}


def small(kind: str) -> Tokenizer:
    return Tokenizer(SMALL[kind], special_tokens={}, eos_ids=())


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return "".join([detokenizer.push(i) for i in ids] + [detokenizer.flush()])


@pytest.mark.parametrize("kind", SMALL)
@given(st.data())
def test_any_tokens_stream_to_their_text(kind: str, data: st.DataObject) -> None:
    tokenizer = small(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size + 3), max_size=24))
    skip = data.draw(st.booleans())

    assert streamed(tokenizer, ids, skip_special=skip) == tokenizer.decode(ids, skip_special=skip)


@pytest.mark.parametrize("kind", SMALL)
@given(st.text(max_size=24))
def test_any_text_streams_back(kind: str, text: str) -> None:
    tokenizer = small(kind)
    ids = tokenizer.encode(text, special=False)

    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_decoding_token_by_token_would_be_seen() -> None:
    """Negative control: without holding back, parts of characters become U+FFFD."""
    tokenizer = small("byte level")
    ids = tokenizer.encode("😀", special=False)

    assert len(ids) > 1
    assert "".join(tokenizer.token_text(i) for i in ids) != "😀"
    assert streamed(tokenizer, ids) == "😀"


def test_real_text_streams_to_itself(demo: Tokenizer, data_dir: Path) -> None:
    for text in HARD + real_texts(data_dir)[:100]:
        ids = demo.encode(text, special=False)
        assert streamed(demo, ids, skip_special=False) == text


@given(ids=st.lists(st.integers(0, 49_151), max_size=40))
def test_any_tokens_of_the_demo_model_stream_to_their_text(demo: Tokenizer, ids: list[int]) -> None:
    assert streamed(demo, ids) == demo.decode(ids)


def test_text_comes_as_soon_as_it_is_certain(demo: Tokenizer) -> None:
    detokenizer = Detokenizer(demo)
    pushed = [detokenizer.push(i) for i in demo.encode("Hello 漢 there", special=False)]

    assert pushed[0] == "Hello"
    assert "".join(pushed) == "Hello 漢 there"  # nothing is left for the flush
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_text_are_not_held_back() -> None:
    """Holding back all until the text looks whole would keep every one, and cost more each time."""
    tokenizer = small("byte level")
    (stray,) = (i for i in range(256) if tokenizer.token_bytes(i) == b"\x80")
    detokenizer = Detokenizer(tokenizer)

    assert all(detokenizer.push(stray) == "\ufffd" for _ in range(5_000))


# Folders


def test_a_folder_brings_its_tokenizer(tmp_path: Path) -> None:
    folder = tiny_checkpoint("llama", tmp_path)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None})
    )
    (folder / "generation_config.json").write_text('{"eos_token_id": [257, 260]}')
    tokenizer = load_tokenizer(open_checkpoint(folder))

    assert tokenizer.bos_id == 256
    assert tokenizer.eos_ids == {257, 260}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.decode(tokenizer.encode("<s>Grüße 😀", special=True)) == "Grüße 😀"


def with_metadata(tmp_path: Path, **changes: Any) -> Checkpoint:
    """A checkpoint whose GGUF metadata holds a tiny byte-level vocabulary."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<s>", "<user>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 257 + [3, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 1,
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return Checkpoint(tmp_path / "x.gguf", config={}, metadata=metadata, files=[], stored={})


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "a2024", ["a", "2024"]),
        ("smollm", "a2024", ["a", "2", "0", "2", "4"]),
        ("llama-bpe", "a2024", ["a", "202", "4"]),
        ("qwen2", "a2024", ["a", "2", "0", "2", "4"]),
        ("llama-bpe", "don'T!!\n\n x", ["don", "'T", "!!ĊĊ", "Ġx"]),
        ("qwen2", "a,b  c", ["a", ",b", "Ġ", "Ġc"]),
    ],
)
def test_text_is_split_as_the_file_says(
    tmp_path: Path, pre: str, text: str, expected: list[str]
) -> None:
    backend = load_tokenizer(with_metadata(tmp_path, pre=pre)).backend

    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == expected


def test_a_beginning_is_added_when_the_file_asks(tmp_path: Path) -> None:
    plain = load_tokenizer(with_metadata(tmp_path))
    asked = load_tokenizer(with_metadata(tmp_path, add_bos_token=True))

    assert asked.encode("ab", special=True) == [257, *plain.encode("ab", special=True)]
    assert asked.encode("ab", special=False) == [256]
    assert asked.eos_ids == {0, 1}
    assert asked.decode([257, 256, 258]) == "ab<user>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "vocabulary of kind 'bert'"),
        ({"pre": "klingon"}, "unknown GGUF pre-tokenizer 'klingon'"),
        ({"tokens": None}, "tokens is not a list of str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "comes twice"),
        ({"token_type": [1]}, "259 tokens and 1 token types"),
        ({"merges": ["ab"]}, "not a merge"),
        ({"merges": ["a zz"]}, "vocabulary is damaged"),
    ],
)
def test_a_damaged_vocabulary_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        load_tokenizer(with_metadata(tmp_path, **changes))


def other_decoder() -> str:
    backend = byte_level()
    backend.decoder = decoders.WordPiece()
    return str(backend.to_str())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no tokenizer.json"),
        ("", "is not a tokenizer"),
        ("{}", "is not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}', "is not a tokenizer"),
        (other_decoder(), "decoder WordPiece is not known"),
    ],
)
def test_a_damaged_tokenizer_file_is_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    checkpoint = Checkpoint(tmp_path, config={}, metadata={}, files=[], stored={})

    with pytest.raises(TierlineError, match=message):
        load_tokenizer(checkpoint)


def test_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        small("byte level").encode("\ud800", special=True)
