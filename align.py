"""Move per-token values from one tokenizer's tokens onto another's: CME Eq. 1 and Appendix B (arXiv 2605.29009).

A verifier scores the text of a response in its own tokens v_1..v_N; the policy being trained has other tokens
y_1..y_T.  How far two tokens overlap, in characters of the text, says how much of a score goes where:

    w_jt = |[c_j, d_j) ∩ [a_t, b_t)| / (d_j - c_j),      r_t = Σ_j w_jt · log p_V(v_j | x, v_<j)             (Eq. 1)

so Σ_t r_t = Σ_j log p_V(v_j | x, v_<j): nothing is lost and nothing counted twice, whatever the two tokenizers are.

    text, spans = spans_from_ids(generator, ids)         # the policy's side: the ids that were sampled
    v_ids, v_spans = spans_from_text(verifier, text)     # the verifier's side: the same text, encoded
    reward = align(v_logp, v_spans, spans)               # [N] -> [T]
    mask = visible(text, spans)                          # [T], False = masked: whitespace, special, no width

Try it alone:  python align.py "Some sentence."

Deliberate departures from the paper and its public code:
 1. Spans come from the bytes of the sampled ids.  Encoding the decoded text again gives other tokens whenever the
    sample was not the canonical encoding; the library's offsets give every piece of one emoji the same characters,
    and an overlap sum over those made 10.0 nats out of 4.0.
 2. A token that holds b bytes of a k-byte character covers b/k of it.  The paper does not say what happens there.
 3. A verifier token of width 0 (SentencePiece's dummy prefix) joins the next one, so that the total stays whole.
 4. Verifier tokens are summed by weight, as Eq. 1 says; the public code averages all that overlap.

Letters: T generator (target) tokens, N verifier (source) tokens, L characters.  A span is [start, end) in characters
(Python's code points) of the text, as float64 because of departure 2.
"""

import json
import operator
import re
import weakref

import numpy as np


def align(values, source, target):
    """Eq. 1: the values of source tokens, moved to the target tokens over the same characters.

    Closed form: let C(c) be the sum of `values` up to character c, piecewise linear; then r_t = C(b_t) - C(a_t).
    O(T + N), no loop.

    values [N], any unit (nats for log-probabilities); source [N, 2] and target [T, 2], spans in characters of the
    same text.  Returns float64 [T] in the unit of `values`; Σ result = Σ values within 1e-9 of Σ|values|.

    "unhappiness", verifier `unhappi|ness` with -7 and -2 nats, generator `un|happiness`: 2/7 of the verifier's first
    token lies over `un`; the other 5/7, and all of its second token, over `happiness`:

    >>> align([-7.0, -2.0], [[0, 7], [7, 11]], [[0, 2], [2, 11]])
    array([-2., -7.])

    A source token of width 0 joins the next one that has width, or else the last.  If none has width and no target
    token has either (an empty text), there is nowhere to put values and the result is 0.  Target tokens that meet no
    source token get 0.

    ValueError: wrong shapes; values not finite; spans out of order, overlapping or with end < start; values that have
    nowhere to go because target does not cover the source's characters, or source has none (two different texts).
    """
    values = np.asarray(values, dtype=np.float64)
    source, target = _check_spans("source", source), _check_spans("target", target)
    if values.shape != (len(source),):
        raise ValueError(f"align: values {values.shape} must be [N], one for each of the {len(source)} source spans")
    if not np.isfinite(values).all():
        raise ValueError("align: values must be finite: one -inf or nan would spoil every token after it")
    width = source[:, 1] - source[:, 0]
    wide = np.flatnonzero(width > 0)  # [W] the source tokens that have width
    if len(wide) == 0:
        if np.any(values) and np.any(target[:, 0] < target[:, 1]):
            raise ValueError("align: no source token has any width, but target has: are both spans of one text?")
        return np.zeros(len(target))
    missing = width.sum() - _share_out(width[wide], source[wide], target).sum()
    if missing > 1e-6:
        raise ValueError(f"align: target leaves {missing:.6g} characters of source uncovered: are both of one text?")
    owner = np.searchsorted(wide, np.arange(len(source))).clip(max=len(wide) - 1)  # [N] position in wide
    return _share_out(np.bincount(owner, weights=values), source[wide], target)


def _share_out(mass, source, target):
    """r_t = C(b_t) - C(a_t) for source tokens [W, 2] of positive width that weigh mass [W] -> [T]."""
    after = np.cumsum(mass)  # [W] C at d_j
    before = np.append(0.0, after[:-1])  # [W] C at c_j
    C = np.interp(target, source.ravel(), np.stack([before, after], axis=1).ravel())  # [T, 2]
    return C[:, 1] - C[:, 0]


def _check_spans(name, spans):
    spans = np.asarray(spans, dtype=np.float64)
    spans = spans.reshape(0, 2) if spans.size == 0 else spans
    if spans.ndim != 2 or spans.shape[1] != 2:
        raise ValueError(f"{name} spans must be [tokens, 2], not {list(spans.shape)}")
    edges = spans[spans[:, 0] != spans[:, 1]].ravel()  # c_1, d_1, c_2, d_2, ... of the tokens that have width
    if not (np.isfinite(spans).all() and (np.diff(edges) >= 0).all()):
        raise ValueError(f"{name} spans must be finite, in order, not overlapping, with start <= end")
    return spans


def visible(text, spans):
    """Which tokens show something: False for whitespace-only, special and zero-width ones, which CME masks.

    spans [T, 2] in characters of text -> bool [T].  A token with only some bytes of a character shows that character.
    Whitespace is what `str.isspace` says.  ValueError: spans that leave the text, or that `align` would refuse.

    >>> visible("Hi  you", [[0, 2], [2, 3], [3, 7], [7, 7]])   # `Hi`, ` `, ` you`, a special token
    array([ True, False,  True, False])
    """
    spans = _check_spans("text", spans)
    if spans.size and (spans.min() < 0 or spans.max() > len(text)):
        raise ValueError(f"spans leave the text, which has {len(text)} characters")
    space = np.fromiter(map(str.isspace, text), dtype=bool, count=len(text))
    ink = np.append(0, np.cumsum(~space))  # [L + 1] how many characters before each position are not whitespace
    first, last = np.floor(spans[:, 0] + 1e-6).astype(int), np.ceil(spans[:, 1] - 1e-6).astype(int)
    return (spans[:, 1] > spans[:, 0]) & (ink[last] > ink[np.minimum(first, last)])


def spans_from_ids(tokenizer, ids):
    """Text and spans of sampled ids, from the bytes of the ids themselves (departure 1).

    ids [T] (list, array or tensor, no padding) -> text, spans float64 [T, 2], which tile [0, len(text)].
    The text is the bytes of all tokens, joined and read as UTF-8 with errors="replace", less one SentencePiece dummy
    prefix: `tokenizer.decode(ids, skip_special_tokens=True)` wherever that loses nothing.  Special tokens, and ids
    without a token (padding rows of an embedding), have width 0 at the place where they stand.  A token with b of a
    character's k bytes covers b/k of it; the U+FFFD of a broken character is shared by the bytes that are there.

    GPT-2 samples "a🙂" as `a`, `ðŁĻ` (three bytes of the emoji), `Ĥ` (the fourth), then stops: spans [[0, 1],
    [1, 1.75], [1.75, 2], [2, 2]].  Cut off before `Ĥ`: text "a\\ufffd", spans [[0, 1], [1, 2]].

    ValueError: no fast backend (Python-only tokenizers, MistralCommonBackend); a decoder not known here; an id < 0.
    """
    pieces = _pieces(tokenizer)
    parts = pieces.of(ids)
    return _spans_of_bytes(_without_prefix(parts) if pieces.drops_prefix else parts)


def spans_from_text(tokenizer, text):
    """Ids and spans of a text that is given, for a verifier to score.

    text -> ids, a list of N, and spans float64 [N, 2], which tile [0, len(text)] if there is any token.
    No special token is added, and the spelling of one ("</s>", "<|im_end|>") is ordinary text.  Added tokens that are
    not special (Gemma's newlines, Qwen's "<think>") are vocabulary and stay whole.

    The spans are those of the ids' bytes when these give the text back: "e🙂" in SentencePiece with byte fallback,
    `▁ e F0 9F 99 82`, has [[0, 0], [0, 1], [1, 1.25], [1.25, 1.5], [1.5, 1.75], [1.75, 2]].  They do not when the
    tokenizer changed the text (NFC, NFKC, lower case, unknown characters): then see `_spans_by_offsets`.

    ValueError: as for spans_from_ids; a lone surrogate in the text (UnicodeEncodeError).
    """
    text.encode("utf-8")  # raises on a lone surrogate
    pieces = _pieces(tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True,
                         truncation=False, padding=False, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    parts = pieces.of(ids)
    if not all(parts):  # a special token all the same: an unknown character, or a model that knows "</s>" as a word
        encoding = pieces.plain_backend(special_ids(tokenizer)).encode(text, add_special_tokens=False)
        ids, offsets, parts = encoding.ids, encoding.offsets, pieces.of(encoding.ids)
    spelled = text.replace(pieces.space, " ") if pieces.space else text  # SentencePiece reads a literal ▁ as a space
    for candidate in (parts, _without_prefix(parts)):
        decoded, spans = _spans_of_bytes(candidate)
        if decoded == spelled:
            return ids, spans
    return ids, _spans_by_offsets(text, parts, offsets)


def special_ids(tokenizer):
    """The ids that are not text: added tokens that are flagged special, or named as eos, pad, ... -> set of int."""
    added, named = _pieces(tokenizer).backend.get_added_tokens_decoder(), set(tokenizer.all_special_ids)
    return {i for i, token in added.items() if token.special or i in named}


def _spans_of_bytes(parts):
    """The bytes of tokens [T] -> their text and spans float64 [T, 2]: each byte has an equal share of its character."""
    raw = b"".join(parts)
    leads = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80  # [bytes] True where a character begins
    at, view = 0, memoryview(raw)
    while at < len(raw):  # once for each broken character: Python writes one U+FFFD for error.start:error.end
        try:
            str(view[at:], "utf-8")
            break
        except UnicodeDecodeError as error:
            leads[at + error.start : at + error.end] = False
            leads[at + error.start] = True
            at += error.end
    start = np.flatnonzero(leads)  # [L] first byte of each character
    size = np.diff(np.append(start, len(raw)))  # [L] number of its bytes
    char = np.cumsum(leads) - 1  # [bytes] which character
    position = np.append(char + (np.arange(len(raw)) - start[char]) / size[char], len(start))  # [bytes + 1]
    edge = position[np.cumsum([0] + [len(part) for part in parts])]  # [T + 1]
    return raw.decode("utf-8", errors="replace"), np.stack([edge[:-1], edge[1:]], axis=1)


def _without_prefix(parts):
    """The same bytes less one space at the very beginning."""
    for t, part in enumerate(parts):
        if part:
            return parts[:t] + [part[1:]] + parts[t + 1 :] if part.startswith(b" ") else parts
    return parts


def _spans_by_offsets(text, parts, offsets):
    """Spans in a text that the tokenizer changed: the library's offsets, made to tile the text.

    parts [N] bytes of the tokens, offsets [N, 2] of the library -> float64 [N, 2].  Neighbours whose offsets overlap
    (pieces of one character) are a group and divide its characters in proportion to what they hold of the changed
    text.  Characters between groups go to the next from the first whitespace on, before that to the previous.
    "e", U+0301, " x" under NFC as C3, A9, ` x` with offsets (0, 1), (0, 1), (2, 4): [[0, 1], [1, 2], [2, 4]].
    """
    if not parts:
        return np.zeros((0, 2))
    begin, end = np.asarray(offsets).T
    end = np.maximum.accumulate(end)
    ends_group = np.append(end[:-1] <= np.minimum.accumulate(begin[::-1])[::-1][1:], True)  # [N]
    reach = _spans_of_bytes(parts)[1][:, 1] + np.cumsum([not part for part in parts])  # [N] an unknown token counts 1
    known, place, first = [0.0], [0], 0  # reach, and position in the text, at the ends of the groups so far
    for last in np.flatnonzero(ends_group).tolist():
        stop, upto = begin[last + 1] if last + 1 < len(parts) else len(text), int(end[last])
        while upto < stop and not text[upto].isspace():
            upto += 1
        same = first < last and begin[first] == begin[first + 1]
        if same and parts[first].startswith(b" ") and not text.startswith(" ", place[-1]):
            reach[first:] -= 1  # a dummy prefix: a space that the text does not have
        known.append(reach[last])
        place.append(upto)
        first = last + 1
    place[-1] = len(text)
    edge = np.interp(np.append(0.0, reach), known, place)  # [N + 1]
    return np.stack([edge[:-1], edge[1:]], axis=1)


_TABLES = weakref.WeakKeyDictionary()  # tokenizer -> its _Pieces


def _pieces(tokenizer):
    """The tokenizer's table of id -> bytes, made anew when its decoder or its named special tokens have changed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        lacks = "fast backend (`backend_tokenizer`)" if backend is None else "decoder"
        raise ValueError(f"{type(tokenizer).__name__} has no {lacks}, which says how its tokens become bytes: load it "
                         "from a tokenizer.json (AutoTokenizer, PreTrainedTokenizerFast)")
    state = backend.decoder.__getstate__(), tuple(tokenizer.all_special_ids)  # the first is the decoder's JSON
    if tokenizer not in _TABLES or _TABLES[tokenizer].state != state:
        _TABLES[tokenizer] = _Pieces(type(tokenizer).__name__, backend, state)
    return _TABLES[tokenizer]


class _Pieces(dict):
    """id -> bytes of the token, b"" if it is special or does not exist; filled as ids are met.

    How a token is spelled is read from the backend's own decoder (the "decoder" of tokenizer.json):
    ByteLevel: GPT-2's printable stand-ins for bytes.  Metaspace, or Replace ▁ by a space: SentencePiece, where
    `<0x0A>` is a byte if there is a ByteFallback.  WordPiece: `##ing` joins, other tokens bring a space along.
    """

    def __init__(self, name, backend, state):
        self.backend, self.state, self.plain = backend, state, (None, None)
        self.added = backend.get_added_tokens_decoder()  # id -> AddedToken
        decoder = json.loads(state[0])
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        self.space, self.drops_prefix = None, "WordPiece" in kinds
        for n, (kind, step) in enumerate(zip(kinds, steps)):
            if kind == "Metaspace":
                self.space, self.drops_prefix = step["replacement"], step.get("prepend_scheme", "always") != "never"
            elif kind == "Replace" and step["content"] == " " and len(step["pattern"].get("String", "")) == 1:
                self.space = step["pattern"]["String"]
            elif step == {"type": "Strip", "content": " ", "start": 1, "stop": 0} and "Fuse" in kinds[:n]:
                self.drops_prefix = True
            elif kind not in ("ByteLevel", "WordPiece", "ByteFallback", "Fuse"):
                raise ValueError(f"{name}: decoder step {step} is not known to align.py (see _Pieces)")
        if ("ByteLevel" in kinds) + ("WordPiece" in kinds) + (self.space is not None) != 1:
            raise ValueError(f"{name}: decoder {kinds} is neither byte-level nor SentencePiece nor WordPiece")
        self.word_piece, self.byte_fallback = "WordPiece" in kinds, "ByteFallback" in kinds
        self.byte_of = _byte_alphabet() if "ByteLevel" in kinds else None

    def of(self, ids):
        """ids [T] -> list of T byte strings."""
        return [self[i] for i in map(operator.index, ids.tolist() if hasattr(ids, "tolist") else ids)]

    def __missing__(self, i):
        if i < 0:
            raise ValueError(f"{i} is not a token id: leave padding out")
        token = self.backend.id_to_token(i)
        if token is not None and i not in self.added and self.backend.model.id_to_token(i) is None:
            self.added = self.backend.get_added_tokens_decoder()  # it was added since
        added = self.added.get(i)
        if token is None or (added and (added.special or i in self.state[1])):
            piece = b""
        elif self.word_piece:
            piece = self.backend.decoder.decode(["a", token])[1:].encode()
        elif self.byte_of:
            literal = added or not self.byte_of.keys() >= set(token)  # added tokens are not byte-level encoded
            piece = token.encode() if literal else bytes(map(self.byte_of.get, token))
        elif self.byte_fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            piece = bytes.fromhex(token[3:5])
        else:
            piece = token.replace(self.space, " ").encode()
        self[i] = piece
        return piece

    def plain_backend(self, special):
        """The backend with its special tokens [ids] respelled as no text is, for text that spells one: a Unigram
        model knows "</s>" as a word like any other, whatever split_special_tokens says."""
        added = {i: str(token) for i, token in self.backend.get_added_tokens_decoder().items()}
        if self.plain[0] != (special, added):
            spec, hidden = json.loads(self.backend.to_str()), {added[i]: f"\U0010ffff{i}" for i in special}
            model, respell = spec["model"], lambda token: hidden.get(token, token)
            if model["type"] == "Unigram":
                model["vocab"] = [[respell(token), score] for token, score in model["vocab"]]
            else:
                model["vocab"] = {respell(token): i for token, i in model["vocab"].items()}
                model["unk_token"] = respell(model.get("unk_token"))
            if "merges" in model:
                model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in hidden]
            for token in spec["added_tokens"]:
                token["content"] = respell(token["content"])
            self.plain = (special, added), type(self.backend).from_str(json.dumps(spec))
        return self.plain[1]


def _byte_alphabet():
    """GPT-2's character -> byte: printable Latin-1 stands for itself, the 68 other bytes for U+0100 onwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


if __name__ == "__main__":
    import sys
    from transformers import AutoTokenizer

    generator, verifier = (AutoTokenizer.from_pretrained(f"toy/cme/{role}") for role in ("generator", "verifier"))
    text = " ".join(sys.argv[1:]) or "Mia lives in Paris and keeps a cat."
    v_ids, v_spans = spans_from_text(verifier, text)
    ids, spans = spans_from_text(generator, text)
    reward = align(np.full(len(v_ids), -1.0), v_spans, spans)  # as if every verifier token were worth -1 nat
    for (a, b), r in zip(spans, reward):
        print(f"[{a:6.2f}, {b:6.2f})  {r:7.3f}  {text[int(a):int(np.ceil(b))]!r}")
    print(f"{reward.sum():.6f} nats on {len(ids)} generator tokens, from {len(v_ids)} verifier tokens of -1 nat each")
