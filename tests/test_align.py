"""align.py against slow oracles: exact fractions for Eq. 1, a byte-by-byte reading of UTF-8 for the spans."""

import copy
import doctest
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import align as module
from align import _pieces, align, spans_from_ids, spans_from_text, visible
from tokenizers_for_tests import NAMES, PRODUCTION, make

settings.register_profile("quick", deadline=None, max_examples=40)
settings.load_profile("quick")

ALL = NAMES + PRODUCTION
BYTE_LEVEL = ["gpt2", "qwen", "roberta", "byte_nfkc", "byte_lower", "tekken"]
LOSSLESS = ["gpt2", "llama2", "mistral", "gemma", "tekken", "mistral_v1", "mistral_v3"]  # nothing but ▁ is changed
NO_PREFIX = BYTE_LEVEL + ["gemma", "bpe_never"]
FALLBACK = ["llama2", "llama2_added", "mistral", "gemma", "mistral_v1", "mistral_v3"]
TEXTS = {
    "empty": "", "words": "hello world, unhappiness", "punctuation": "Hello, World. Don't! (no)",
    "emoji": "🙂 a👩‍👩‍👧b 👍🏽!", "combining": "e\u0301a cafe\u0301 q\u0307\u0323 x\u0301\u0302", "cjk": "日本語の文章。中文", "thai": "สวัสดี ไทย",
    "jamo": "\u1112\u1161\u11ab글 \u1112\u1161", "fffd": "\ufffd x\ufffd\ufffd", "specials": "a</s>b<|im_end|> <bos><end_of_turn> [SEP][UNK]<unk><s>",
    "spaces": "  two  spaces   ", "space": " ", "newline": "\n", "tabs": "\ta\n\n\tb\r\n", "control": "a\x00b\x07\x1b c\x7f", "dotted": "İx İstanbul Straße",
    "nfkc": "ﬁx ½ Ａ１ ² \u00a0x\u3000y ¨", "meta": "a▁b ▁ ▁▁", "meta first": "▁x", "added": "x <think>y<tool>z naïve <é> w\n\nv", "zero width": "a\u200bb \ufeffc",
    "literal byte": "<0x41> <0x", "long": "the cat 🙂 " * 30 + "e\u0301",
}
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \t\n▁eéİ\u0301\u0323🙂👩\u200dﬁ½日\u1112\u1161\u11ab<s>/")), max_size=25)


def tokenizer_of(name):
    try:
        return make(name)
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


# ---------------------------------------------------------------------------------------------------------------- align


def oracle_align(values, source, target):
    """Eq. 1 as a double loop over exact fractions."""
    exact = [[(Fraction(float(a)), Fraction(float(b))) for a, b in spans] for spans in (source, target)]
    carried, waiting = [], Fraction(0)
    for value, (c, d) in zip(values, exact[0]):
        waiting += Fraction(float(value))
        if d > c:
            carried.append([waiting, c, d])
            waiting = Fraction(0)
    if carried:
        carried[-1][0] += waiting
    return [sum((v * max(Fraction(0), min(b, d) - max(a, c)) / (d - c) for v, c, d in carried), Fraction(0)) for a, b in exact[1]]


@st.composite
def tilings(draw, length=None, most=12):
    """Spans that tile [0, length): cuts at sixths of a character, some of them twice (zero width)."""
    length = draw(st.integers(1, 10)) if length is None else length
    cuts = sorted(draw(st.lists(st.integers(0, 6 * length), max_size=most)))
    edge = [0.0] + [cut / 6 for cut in cuts] + [float(length)]
    return np.array(list(zip(edge[:-1], edge[1:])))


@st.composite
def problems(draw):
    length = draw(st.integers(1, 10))
    source, target = draw(tilings(length)), draw(tilings(length))
    value = st.floats(-1e6, 1e6, allow_subnormal=False)
    return np.array(draw(st.lists(value, min_size=len(source), max_size=len(source)))), source, target


@pytest.mark.parametrize("values, source, target, expected", [
    ([-7, -2], [[0, 7], [7, 11]], [[0, 2], [2, 11]], [-2, -7]),  # "unhappiness": 2/7 of -7; 5/7 of it and -2
    ([-1, -2, -3], [[0, 2], [2, 5], [5, 6]], [[0, 5], [5, 6]], [-3, -3]),  # generator coarser: the chain rule's sum
    ([-6], [[0, 6]], [[0, 1], [1, 3], [3, 6]], [-1, -2, -3]),  # verifier coarser: fractions
    ([-1, -1, -1, -1], [[0, .25], [.25, .5], [.5, .75], [.75, 1]], [[0, .5], [.5, 1]], [-2, -2]),  # 4 bytes of one emoji
    ([-1, -2, -3], [[0, 0], [0, 2], [2, 4]], [[0, 4]], [-6]),  # dummy prefix joins the next
    ([-1, -2, -3], [[0, 0], [0, 2], [2, 4]], [[0, 2], [2, 4]], [-3, -3]),
    ([-1, -2, -4], [[0, 2], [2, 2], [2, 2]], [[0, 1], [1, 2]], [-3.5, -3.5]),  # nothing follows: joins the last
    ([-1, -5], [[0, 2], [2, 4]], [[0, 2], [2, 2], [2, 4], [4, 4], [4, 7]], [-1, 0, -5, 0, 0]),  # no width, no source
    ([-4], [[2, 6]], [[0, 3], [3, 8]], [-1, -3]),  # the source covers only the middle
    ([-1, -2], [[0, 1], [3, 4]], [[0, 2], [2, 4]], [-1, -2]),  # a gap in the source
])
def test_align_by_hand(values, source, target, expected):
    np.testing.assert_allclose(align(values, source, target), expected, atol=1e-12)


@given(problems())
def test_align_is_eq_1(problem):
    values, source, target = problem
    result, expected = align(*problem), oracle_align(*problem)
    scale = np.abs(values).sum() or 1.0
    assert result.dtype == np.float64 and result.shape == (len(target),)
    np.testing.assert_allclose(result, np.array(expected, dtype=float), rtol=0, atol=1e-9 * scale)
    assert abs(result.sum() - values.sum()) <= 1e-9 * scale


@given(problems(), st.data())
def test_nothing_leaves_its_span(problem, data):
    values, source, target = problem
    j = data.draw(st.integers(0, len(source) - 1))
    wide = [k for k in range(len(source)) if source[k, 1] > source[k, 0]]
    owner = next((k for k in wide if k >= j), wide[-1])
    one = np.zeros(len(source))
    one[j] = 1.0
    overlap = np.minimum(target[:, 1], source[owner, 1]) - np.maximum(target[:, 0], source[owner, 0])
    moved = align(one, source, target)
    assert (np.abs(moved[overlap <= 0]) < 1e-12).all() and moved.sum() == pytest.approx(1)
    assert (moved > -1e-12).all()


@given(tilings(most=30), st.randoms(use_true_random=False))
def test_align_to_itself_is_identity(spans, rng):
    values = np.array([rng.uniform(-50, 50) if b > a else 0.0 for a, b in spans])
    np.testing.assert_allclose(align(values, spans, spans), values, rtol=0, atol=1e-9 * (np.abs(values).sum() or 1))


def test_align_conserves_at_length():
    rng = np.random.default_rng(0)
    cut = lambda n: np.concatenate([[0.0], np.sort(rng.choice(100_000, n - 1, replace=False)) + 1.0, [100_001.0]])
    (a, b), values = (cut(20_000), cut(15_000)), -rng.exponential(5, 20_000)
    result = align(values, np.stack([a[:-1], a[1:]], 1), np.stack([b[:-1], b[1:]], 1))
    assert abs(result.sum() - values.sum()) <= 1e-9 * np.abs(values).sum()


def test_align_of_nothing():
    none = np.zeros((0, 2))
    assert align([], [], []).shape == (0,) and align([], none, [[0, 3]]).tolist() == [0]
    assert align([-3.0], [[0, 0]], [[0, 0], [0, 0]]).tolist() == [0, 0]  # an empty text: nowhere to put it
    assert align([-3.0], [[0, 0]], none).shape == (0,)
    assert align([0.0], [[0, 0]], [[0, 2]]).tolist() == [0]


@pytest.mark.parametrize("values, source, target, message", [
    ([1, 2], [[0, 1]], [[0, 1]], "one for each"), ([[1]], [[0, 1]], [[0, 1]], "one for each"),
    ([1], [0, 1], [[0, 1]], r"\[tokens, 2\]"), ([1], [[0, 1]], [[0, 1, 2]], r"\[tokens, 2\]"),
    ([np.nan], [[0, 1]], [[0, 1]], "finite"), ([-np.inf], [[0, 1]], [[0, 1]], "finite"), ([1], [[0, np.nan]], [[0, 1]], "finite"),
    ([1], [[1, 0]], [[0, 1]], "in order"), ([1, 1], [[0, 2], [1, 3]], [[0, 3]], "overlapping"), ([1], [[0, 3]], [[0, 2], [1, 3]], "overlapping"),
    ([1, 1], [[2, 3], [0, 2]], [[0, 3]], "in order"),
    ([1, 1], [[0, 1], [1, 2]], [[0, 1]], "uncovered"), ([1], [[0, 3]], [[0, 1], [2, 3]], "uncovered"), ([1], [[0, 1]], [], "uncovered"),
    ([0], [[0, 2]], [[0, 0]], "uncovered"),
])
def test_align_refuses(values, source, target, message):
    with pytest.raises(ValueError, match=message):
        align(values, source, target)


# -------------------------------------------------------------------------------------------------------------- visible


def test_visible_by_hand():
    text = "a \t🙂\u3000\x00"
    spans = [[0, 1], [1, 2], [2, 3.25], [3.25, 3.5], [3.5, 4], [4, 4.5], [4.5, 5], [5, 6], [6, 6]]
    assert visible(text, spans).tolist() == [True, False, True, True, True, False, False, True, False]
    assert visible(text, [[0, 1.5], [1.5, 3]]).tolist() == [True, False]
    assert visible("", []).shape == (0,) and visible("", [[0, 0]]).tolist() == [False]
    with pytest.raises(ValueError, match="leave the text"):
        visible("ab", [[0, 3]])


@given(ANY_TEXT, st.data())
def test_visible_is_any_ink(text, data):
    spans = data.draw(tilings(max(len(text), 1))) if text else np.zeros((2, 2))
    expected = [any(not ch.isspace() and min(i + 1, b) - max(i, a) > 1e-9 for i, ch in enumerate(text)) for a, b in spans]
    assert visible(text, spans).tolist() == expected


# ------------------------------------------------------------------------------------------------------- spans from ids


def oracle_bytes(name, tokenizer, ids):
    """Token bytes by the family's definition, one id at a time."""
    unicode_to_byte = {ch: byte for byte, ch in bytes_to_unicode().items()}
    special, parts = _pieces(tokenizer).special, []
    for i in ids:
        token = tokenizer.convert_ids_to_tokens(int(i))
        if token is None or i in special:
            parts.append(b"")
        elif name in BYTE_LEVEL:
            parts.append(token.encode() if i in tokenizer.added_tokens_decoder else bytes(unicode_to_byte[ch] for ch in token))
        elif name in FALLBACK and len(token) == 6 and token.startswith("<0x"):
            parts.append(bytes([int(token[3:5], 16)]))
        else:
            parts.append(token.replace("▁", " ").encode())
    full = [t for t, part in enumerate(parts) if part]
    if full and name not in NO_PREFIX and parts[full[0]][:1] == b" ":
        parts[full[0]] = parts[full[0]][1:]
    return parts


def begins_a_character(raw):
    """Whether well-formed UTF-8 has a character that starts with these bytes: completed with the least or the most."""
    for fill in (b"\x80", b"\xbf"):
        for n in range(4):
            try:
                if len((raw + fill * n).decode()) == 1:
                    return True
            except UnicodeDecodeError:
                pass
    return False


def oracle_spans(parts):
    """A character at a time: as many of the next bytes as can begin one; whole, or else broken and one U+FFFD."""
    raw, text, where, at = b"".join(parts), "", [], 0  # where: (start, end) of each byte
    while at < len(raw):
        size = max([n for n in (1, 2, 3, 4) if at + n <= len(raw) and begins_a_character(raw[at : at + n])], default=1)
        where += [(len(text) + Fraction(i, size), len(text) + Fraction(i + 1, size)) for i in range(size)]
        text += raw[at : at + size].decode("utf-8", "replace")
        at += size
    spans, done = [], 0
    for part in parts:
        here = where[done - 1][1] if done else Fraction(0)
        spans.append((where[done][0], where[done + len(part) - 1][1]) if part else (here, here))
        done += len(part)
    return text, spans


def check_ids(name, tokenizer, ids):
    text, spans = spans_from_ids(tokenizer, ids)
    expected_text, expected = oracle_spans(oracle_bytes(name, tokenizer, ids))
    assert text == expected_text and spans.dtype == np.float64 and spans.shape == (len(ids), 2)
    np.testing.assert_allclose(spans, np.array(expected, dtype=float).reshape(-1, 2), rtol=0, atol=1e-9)
    check_tiles(text, spans)
    return text, spans


def check_tiles(text, spans):
    if len(spans):
        assert spans[0, 0] == 0 and spans[-1, 1] == len(text)
        np.testing.assert_array_equal(spans[1:, 0], spans[:-1, 1])
        assert (spans[:, 1] >= spans[:, 0]).all()


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_random_ids(name, data):
    """Any ids at all: not the canonical encoding, cut inside characters, special tokens in the middle, padding rows."""
    tokenizer = tokenizer_of(name)
    low, size = st.integers(0, min(len(tokenizer), 700) - 1), len(tokenizer)
    ids = data.draw(st.lists(st.one_of(low, st.integers(0, size + 5)), max_size=25))
    text, _ = check_ids(name, tokenizer, ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if name in BYTE_LEVEL and not any(i in tokenizer.added_tokens_decoder for i in ids):
        assert text == decoded  # Rust's lossy decoder and Python's agree on broken characters too
    if name in FALLBACK and "\ufffd" not in text:
        assert text == decoded


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("key", TEXTS)
def test_sampled_text_is_decode(name, key):
    """A canonical encoding: the text is what tokenizer.decode gives (where a decoder of this family loses nothing)."""
    tokenizer, text = tokenizer_of(name), TEXTS[key]
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    got, _ = check_ids(name, tokenizer, ids)
    decoded = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if decoded == text or name in BYTE_LEVEL and "é" not in text:
        assert got == decoded
    if name in ["gpt2", "tekken"] + ["llama2", "mistral_v1", "gemma"] * ("▁" not in text):
        assert got == text == decoded


@pytest.mark.parametrize("name", LOSSLESS)
@given(ANY_TEXT, st.integers(0, 4), st.randoms(use_true_random=False))
def test_byte_by_byte(name, text, cut, rng):
    """The same text in single bytes, cut inside the last character: never the canonical encoding."""
    tokenizer = tokenizer_of(name)
    shown = bytes_to_unicode()
    spell = (lambda b: shown[b]) if name in BYTE_LEVEL else (lambda b: f"<0x{b:02X}>")
    raw = text.encode()[: max(len(text.encode()) - cut, 0)]
    ids = [tokenizer.convert_tokens_to_ids(spell(b)) for b in raw]
    got, spans = check_ids(name, tokenizer, ids)
    expected = raw.decode("utf-8", "replace")
    assert got == (expected.removeprefix(" ") if name not in NO_PREFIX and text[:1] == " " else expected)


def test_spans_by_hand():
    tokenizer, shown = make("gpt2"), bytes_to_unicode()
    ids = tokenizer.convert_tokens_to_ids([shown[b] for b in "a🙂".encode()])
    text, spans = spans_from_ids(tokenizer, ids)
    assert text == "a🙂" and spans.tolist() == [[0, 1], [1, 1.25], [1.25, 1.5], [1.5, 1.75], [1.75, 2]]
    text, spans = spans_from_ids(tokenizer, np.array(ids[:4]))
    assert text == "a\ufffd"
    np.testing.assert_allclose(spans, [[0, 1], [1, 4 / 3], [4 / 3, 5 / 3], [5 / 3, 2]])
    end = tokenizer.eos_token_id  # a special token inside the emoji stands where it stands
    text, spans = spans_from_ids(tokenizer, [end] + ids[:3] + [end] + ids[3:] + [end, 10**6])
    assert text == "a🙂" and spans[[0, 4, -2, -1]].tolist() == [[0, 0], [1.5, 1.5], [2, 2], [2, 2]]
    assert visible(text, spans).tolist() == [False, True, True, True, False, True, True, False, False]
    tokenizer = make("llama2")  # one dummy prefix goes, after special tokens too; the second space is the text's
    tokens = ["</s>", "▁", "▁the", "▁", "<0xF0>", "<0x9F>"]
    text, spans = spans_from_ids(tokenizer, tokenizer.convert_tokens_to_ids(tokens))
    assert text == " the \ufffd" and spans.tolist() == [[0, 0], [0, 0], [0, 4], [4, 5], [5, 5.5], [5.5, 6]]


def test_ten_nats_out_of_four():
    """The trap: four verifier tokens of one emoji, all with the same offset, summed over what they overlap."""
    verifier, generator = make("llama2"), make("gpt2")
    ids, v_spans = spans_from_text(verifier, "👍")
    text, spans = spans_from_ids(generator, generator.encode("👍"))
    assert text == "👍" and len(ids) == 5 and len(spans) >= 2
    assert align([0.0, -1, -1, -1, -1], v_spans, spans).sum() == pytest.approx(-4.0)
    np.testing.assert_allclose(v_spans, [[0, 0], [0, .25], [.25, .5], [.5, .75], [.75, 1]])


@pytest.mark.parametrize("kind", [tuple, np.array, torch.tensor])
def test_kinds_of_ids(kind):
    (text, spans), (expected, expected_spans) = (spans_from_ids(make("gpt2"), ids) for ids in (kind([3, 5, 8]), [3, 5, 8]))
    assert text == expected and (spans == expected_spans).all()


def test_bad_ids():
    with pytest.raises(ValueError, match="-100 is not a token id"):
        spans_from_ids(make("gpt2"), [1, -100])
    with pytest.raises(TypeError):
        spans_from_ids(make("gpt2"), [1.5])


# ------------------------------------------------------------------------------------------------------ spans from text


def check_text(name, tokenizer, text):
    ids, spans = spans_from_text(tokenizer, text)
    assert spans.dtype == np.float64 and spans.shape == (len(ids), 2)
    check_tiles(text, spans)
    if not name.startswith("unigram"):  # to which "</s>" is a word like others
        unknown = {tokenizer.unk_token_id}
        assert not (_pieces(tokenizer).special - unknown) & set(ids), "a special token read from ordinary text"
    return ids, spans


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("key", TEXTS)
def test_spans_from_text_tile(name, key):
    tokenizer, text = tokenizer_of(name), TEXTS[key]
    ids, spans = check_text(name, tokenizer, text)
    if tokenizer.unk_token_id not in ids:
        assert ids == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


@pytest.mark.parametrize("name", ALL)
@given(ANY_TEXT)
@example("e\u0301🙂")
@example("<unk></s>")
def test_spans_from_any_text(name, text):
    tokenizer = tokenizer_of(name)
    ids, spans = check_text(name, tokenizer, text)
    if name in LOSSLESS:  # each token's characters are its own bytes, whatever the library's offsets say
        raw = [part.replace(b" ", b"_") for part in oracle_bytes("gemma" if name in FALLBACK else name, tokenizer, ids)]
        plain = "".join("_" if ch in " ▁" else ch for ch in text) if name in FALLBACK else text.replace(" ", "_")
        if b"".join(raw).decode() != plain:  # a dummy prefix
            assert raw[0][:1] == b"_"
            raw[0] = raw[0][1:]
        expected_text, expected = oracle_spans(raw)
        assert expected_text == plain
        np.testing.assert_allclose(spans, np.array(expected, dtype=float).reshape(-1, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, text, tokens, expected", [
    ("llama2", "e🙂", "▁ e <0xF0> <0x9F> <0x99> <0x82>", [0, 0, 1, 1.25, 1.5, 1.75, 2]),
    ("llama2", "e▁b", "▁ e ▁ b", [0, 0, 1, 2, 3]),
    ("llama2", " the", "▁ ▁the", [0, 0, 4]),
    ("llama2_added", "e<tool>b", "▁ e <tool> ▁ b", [0, 0, 1, 7, 7, 8]),  # its second dummy prefix is no text: both begin with their letter
    ("mistral", " the", "▁the", [0, 4]),
    ("mistral", "🙂", "▁ <0xF0> <0x9F> <0x99> <0x82>", [0, 0, .25, .5, .75, 1]),
    ("gemma", " hello\n\nhe", "▁hello \n\n he", [0, 6, 8, 10]),
    ("qwen", "e\u0301x", "Ã© x", [0, 2, 3]),  # NFC: both characters belong to the token
    ("qwen", "\u1112\u1161\u11abx", "íķ ľ x", [0, 0, 3, 4]),  # three jamo, one syllable: the last piece has it
    ("qwen", "e\u0301<think>🙂x", "Ã© <think> ðŁ Ļ Ĥ x", [0, 2, 9, 9, 9, 10, 11]),
    ("qwen", "<é>x", "<é> x", [0, 3, 4]),  # an added token is literal text
    ("byte_nfkc", "ﬁ½", "f i 1 âģ Ħ 2", [0, 0, 1, 1, 1, 1, 2]),  # "1⁄2", of 5 bytes
    ("byte_lower", "İX", "i Ì ĩ x", [0, 0, 0, 1, 2]),
    ("roberta", "e\u0301 🙂", "ĠÃ© ĠðŁ Ļ Ĥ", [0, 3, 3, 3, 4]),  # RoBERTa says that a token begins after its space
    ("unigram_nfkc", "a ﬁx", "▁ a ▁f i x", [0, 0, 1, 2, 3, 4]),
    ("unigram_nfkc", "x\u00a0y", "▁ x ▁ y", [0, 0, 1, 2, 3]),  # a space that was another one in the text
    ("bpe_never", " the日", "▁the <unk>", [0, 4, 5]),
    ("bpe_unk", "a日本b", "▁a <unk> b", [0, 1, 3, 4]),
])
def test_spans_from_text_by_hand(name, text, tokens, expected):
    tokenizer = make(name)
    ids, spans = spans_from_text(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(ids) == tokens.split(" ")
    np.testing.assert_allclose(spans, np.stack([expected[:-1], expected[1:]], 1), atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_special_strings_stay_text(name):
    tokenizer = tokenizer_of(name)
    for i in _pieces(tokenizer).special:
        text = f"a {tokenizer.convert_ids_to_tokens(i)}b"
        ids, spans = check_text(name, tokenizer, text)
        assert len(ids) > 2 and (i not in ids or i == tokenizer.unk_token_id or name.startswith("unigram"))
        if i > 20:
            break  # Mistral's have a thousand of the same kind
    # an ordinary call afterwards still reads them as special
    assert tokenizer.eos_token_id in tokenizer(f"a{tokenizer.eos_token}")["input_ids"]


@given(ANY_TEXT, st.sampled_from(ALL), st.sampled_from(ALL), st.integers(0, 2**32 - 1))
def test_end_to_end_conserves(text, verifier, generator, seed):
    """Sampled ids -> text -> verifier's tokens -> back onto the sampled ids: the total is the verifier's."""
    ids, _ = spans_from_text(tokenizer_of(generator), text)
    response, spans = spans_from_ids(tokenizer_of(generator), ids[: max(len(ids) - 1, 0)])
    v_ids, v_spans = spans_from_text(tokenizer_of(verifier), response)
    logp = -np.random.default_rng(seed).exponential(3, len(v_ids))
    reward = align(logp, v_spans, spans)
    if len(v_ids) and (spans[:, 1] > spans[:, 0]).any():
        assert reward.sum() == pytest.approx(logp.sum(), rel=1e-9)
    assert (reward[spans[:, 1] == spans[:, 0]] == 0).all()


def test_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        spans_from_text(make("gpt2"), "a\ud800")


# ---------------------------------------------------------------------------------------------- tokenizers, known or not


def test_tokens_added_later():
    tokenizer = copy.deepcopy(make("qwen"))
    last = len(tokenizer)
    assert spans_from_ids(tokenizer, [last - 1])[0] == "<é>"
    tokenizer.add_tokens(["<tool:é>", AddedToken("<end>", special=True)])
    text, spans = spans_from_ids(tokenizer, [last, last + 1])
    assert text == "<tool:é>" and spans.tolist() == [[0, 8], [8, 8]] and last + 1 in _pieces(tokenizer).special
    tokenizer.add_special_tokens({"pad_token": "<think>"})  # an id that was text before
    assert spans_from_ids(tokenizer, [last - 2])[0] == ""
    tokenizer.eos_token = "<tool:é>"  # named, but not flagged
    assert spans_from_ids(tokenizer, [last])[0] == "" and last in _pieces(tokenizer).special
    plain = copy.deepcopy(make("unigram"))
    plain.add_tokens([AddedToken("<later>", special=False)])
    ids, spans = spans_from_text(plain, "x<later>")
    assert ids[-1] == len(plain) - 1 and spans[-1].tolist() == [1, 8]
    plain.add_tokens(["<0x41>"])
    assert spans_from_ids(plain, [len(plain) - 1])[0] == "<0x41>"  # no byte fallback: a token like any other


def test_added_tokens_in_the_alphabet_of_bytes():
    """Falcon 3 adds the stand-ins of newline and tab, Ċ and ĉ, which its vocabulary has: bytes; DeepSeek adds õ, which it has not: text."""
    tokenizer = copy.deepcopy(make("qwen"))
    ids = tokenizer("a\nb\tc", add_special_tokens=False).input_ids
    tokenizer.add_tokens(["Ċ", "ĉ", "Ċõ"])
    assert tokenizer.convert_tokens_to_ids("Ċ") in ids and tokenizer.decode(ids) == "a\nb\tc"
    text, spans = spans_from_ids(tokenizer, [*ids, len(tokenizer) - 1])
    assert text == "a\nb\tcĊõ" and spans[:-1].tolist() == spans_from_ids(make("qwen"), ids)[1].tolist() and spans[-1].tolist() == [5, 7]


def test_special_token_that_merges_can_build():
    """Where the library reads the end of the text all the same, the token covers its spelling."""
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "<", "/", "s", ">", "</", "s>", "a"])}
    backend = Tokenizer(models.BPE(vocab, [("<", "/"), ("s", ">"), ("</", "s>")], unk_token="<unk>"))
    backend.decoder = decoders.Metaspace("▁", "never")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    ids, spans = spans_from_text(tokenizer, "a</s>")
    assert ids == [8, 1] and spans.tolist() == [[0, 1], [1, 5]]


def test_special_ids():
    tokenizer = make("qwen")
    assert _pieces(tokenizer).special == set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    assert 300 < len(_pieces(tokenizer_of("mistral_v3")).special) or _pieces(tokenizer_of("mistral_v3")).special >= {0, 1, 2}


@pytest.mark.parametrize("decoder, message", [
    (None, "no fast backend with a decoder"), (decoders.BPEDecoder(), "BPEDecoder"), (decoders.CTC(), "CTC"), (decoders.WordPiece(), "WordPiece"), (decoders.Fuse(), "neither"),
    (decoders.Strip(" ", 2, 0), "Strip"), (decoders.Replace("_", "-"), "Replace"), (decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]), "neither"),
])
def test_unknown_decoder_is_refused(decoder, message):
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    if decoder is not None:
        backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    for call in (lambda: spans_from_ids(tokenizer, [0]), lambda: spans_from_text(tokenizer, "b"), lambda: _pieces(tokenizer).special):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert type(tokenizer).__name__ in str(error.value)


def test_python_only_tokenizers_are_refused():
    pytest.importorskip("mistral_common")
    from tokenizers_for_tests import _data
    from transformers import MistralCommonBackend

    for tokenizer in (MistralCommonBackend(str(_data("tokenizer.model.v1"))), SimpleNamespace(encode=str)):
        with pytest.raises(ValueError, match="no fast backend"):
            spans_from_ids(tokenizer, [5])
        with pytest.raises(ValueError, match=type(tokenizer).__name__):
            spans_from_text(tokenizer, "x")


def test_docstrings():
    assert doctest.testmod(module).attempted >= 2 and doctest.testmod(module).failed == 0
