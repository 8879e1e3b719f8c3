"""Tokens -> character spans -> conserving alignment: CME Eq. 1 and Appendix B (arXiv 2605.29009).

A verifier scores a response's text in its own tokens v_1..v_N; the policy being trained has others,
y_1..y_T.  A v_j at characters [c_j, d_j) shares its score among the y_t at [a_t, b_t) by overlap:
    w_jt = |[c_j, d_j) ∩ [a_t, b_t)| / (d_j - c_j),    r_t = Σ_j w_jt · log p_V(v_j | x, v_<j)
so Σ_t r_t = Σ_j log p_V(v_j | x, v_<j): nothing is lost or counted twice, whatever the tokenizers.

    text, spans = spans_from_ids(generator, ids)      # the policy's side: the ids that were sampled
    v_ids, v_spans = spans_from_text(verifier, text)  # the verifier's side: the same text, encoded
    reward = align(v_logp, v_spans, spans)            # [N] -> [T]
    mask = visible(text, spans)                       # [T], False: whitespace, special, width 0

Deliberate departures from the paper, and from its public code (1):
 1. Spans come from the bytes of the sampled ids: re-encoding the decoded text may give other ids,
    and the library's offsets give every piece of an emoji the same characters, so a sum by overlap
    made 10.0 nats out of 4.0.  Scores are summed by weight; the public code averages them.
 2. A token that holds b bytes of a k-byte character covers b/k of it.  The paper leaves this open.
 3. A verifier token of width 0 (SentencePiece's dummy prefix) passes its value to the next one.

Notation: T generator (target) tokens, N verifier (source) tokens, L characters.  A span is
[start, end) in characters (code points) of the text, float64 because of departure 2."""

import functools
import json
import re

import numpy as np


def align(values, source, target):
    """Eq. 1: moves the values of source tokens to the target tokens that cover the same characters.
    Closed form: let C(c) be the sum of `values` up to character c, piecewise linear; then
    r_t = C(b_t) - C(a_t).  values [N], any unit (here nats); source [N, 2] and target [T, 2],
    spans in characters of the same text -> float64 [T] with Σ result = Σ values.
    A source token of width 0 passes its value to the next one with width, else to the last (if none
    has, all is 0); a target token that overlaps none gets 0.  ValueError: wrong shapes; values not
    finite; spans unordered, overlapping or reversed; target does not cover source (two texts).
    "unhappiness", verifier `unhappi|ness` with -7 and -2 nats, generator `un|happiness`: 2/7 of the
    first verifier token lies over `un`; its other 5/7, and all of the second, over `happiness`:
    >>> align([-7.0, -2.0], [[0, 7], [7, 11]], [[0, 2], [2, 11]])
    array([-2., -7.])"""
    values = np.asarray(values, dtype=np.float64)
    source, target = _check_spans("source", source), _check_spans("target", target)
    if values.shape != (len(source),):
        raise ValueError(f"align: values {values.shape} must be [N], one for each source span")
    if not np.isfinite(values).all():
        raise ValueError("align: values must be finite: a NaN would spread to all later tokens")
    width = source[:, 1] - source[:, 0]
    wide = np.flatnonzero(width > 0)  # [W] the source tokens that have width
    if len(wide) == 0:
        return np.zeros(len(target))
    missing = width.sum() - _share_out(width[wide], source[wide], target).sum()
    if missing > 1e-6:
        raise ValueError(f"align: target leaves {missing:.6g} characters uncovered: same text?")
    owner = np.searchsorted(wide, np.arange(len(source))).clip(max=len(wide) - 1)  # [N]
    return _share_out(np.bincount(owner, weights=values), source[wide], target)


def _share_out(mass, source, target):
    """r_t = C(b_t) - C(a_t) for source tokens [W, 2] of width > 0, their values mass [W] -> [T]."""
    after = np.cumsum(mass)  # [W] C at d_j
    before = np.append(0.0, after[:-1])  # [W] C at c_j
    C = np.interp(target, source.ravel(), np.stack([before, after], axis=1).ravel())  # [T, 2]
    return C[:, 1] - C[:, 0]


def _check_spans(name, spans):
    spans = np.asarray(spans, dtype=np.float64)
    spans = spans.reshape(0, 2) if spans.size == 0 else spans
    in_order = np.isfinite(spans).all() and (np.diff(spans.ravel()) >= 0).all()
    if spans.shape[1:] != (2,) or not in_order:
        raise ValueError(f"{name} spans must be [tokens, 2], finite, in order, not overlapping")
    return spans


def visible(text, spans):
    """Which tokens show something: False for whitespace-only, special and zero-width ones (masked).
    spans [T, 2] in characters of text -> bool [T].  Part of a visible character is visible.
    Whitespace is what `str.isspace` says.  ValueError: spans that leave the text, or overlap.
    >>> visible("Hi  you", [[0, 2], [2, 3], [3, 7], [7, 7]])  # `Hi`, ` `, ` you`, a special token
    array([ True, False,  True, False])"""
    spans = _check_spans("text", spans)
    if spans.size and (spans.min() < 0 or spans.max() > len(text)):
        raise ValueError(f"spans leave the text, which has {len(text)} characters")
    ink = np.cumsum([0] + [not c.isspace() for c in text])  # [L + 1] non-whitespace before each
    C = np.interp(spans, np.arange(len(ink)), ink)  # [T, 2], as in `align`
    return C[:, 1] - C[:, 0] > 1e-6


def spans_from_ids(tokenizer, ids):
    """Text and spans of sampled ids, from the bytes of the ids themselves (departure 1).
    ids [T] (list, array or tensor, no padding) -> text, spans float64 [T, 2], which tile the text.
    The text is the tokens' bytes, read as UTF-8 with errors="replace", less one SentencePiece dummy
    prefix; it equals `tokenizer.decode(ids, skip_special_tokens=True)` where that loses nothing.
    Special tokens, and ids without a token (rows that pad the embedding), have width 0.
    GPT-2 samples "a🙂" as `a`, `ðŁĻ` (three bytes of the emoji), `Ĥ` (the fourth), then stops: spans
    [[0, 1], [1, 1.75], [1.75, 2], [2, 2]].  Cut off before `Ĥ`: text "a\\ufffd", [[0, 1], [1, 2]].
    ValueError: a tokenizer without a fast backend; a decoder not known here; an id < 0."""
    pieces, ids = _pieces(tokenizer), (ids.tolist() if hasattr(ids, "tolist") else ids)
    return _spans_of_bytes([pieces[i] for i in ids], pieces.drops_prefix)


def spans_from_text(tokenizer, text):
    """Ids and spans of a given text, for a verifier to score.
    text -> ids, a list of N, and spans float64 [N, 2], which tile [0, len(text)] if N > 0.
    No special token is added; "</s>" in the text is plain text (except to a Unigram).  Spans come
    from the ids' bytes if these spell the text: "e🙂" as `▁ e F0 9F 99 82` has [0, 0] [0, 1]
    [1, 1.25] [1.25, 1.5] [1.5, 1.75] [1.75, 2].  If the tokenizer changed it (NFC, lower case), the
    library's offsets say where tokens begin; each ends where the next begins (if at once, width 0).
    ValueError: as for spans_from_ids; a lone surrogate in the text (UnicodeEncodeError)."""
    text.encode("utf-8")  # raises on a lone surrogate
    pieces = _pieces(tokenizer)
    plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    encoding = tokenizer(text, **plain, return_offsets_mapping=True)
    parts = [pieces[i] for i in encoding.input_ids]
    spelled = text.replace(pieces.space, " ") if pieces.space else text  # a literal ▁ is a space
    for drop_prefix in (False, True):
        decoded, spans = _spans_of_bytes(parts, drop_prefix)
        if decoded == spelled:
            return encoding.input_ids, spans
    begin = [start for start, _ in encoding.offset_mapping]  # NFC may reorder them
    edge = np.maximum.accumulate(begin + [len(text)], dtype=float)  # [N + 1]
    edge[0] = 0  # whatever the library says, spans tile the text
    return encoding.input_ids, np.stack([edge[:-1], edge[1:]], axis=1)


def _spans_of_bytes(parts, drop_prefix=False):
    """Bytes of tokens [T] -> text (less a first space), spans [T, 2]; bytes share a character."""
    raw, upto = b"".join(parts), np.cumsum([0] + [len(part) for part in parts])  # [T + 1] bytes
    if drop_prefix and raw.startswith(b" "):
        raw, upto = raw[1:], np.maximum(upto - 1, 0)
    leads = (np.frombuffer(raw, dtype=np.uint8) & 0xC0) != 0x80  # [bytes] where a character begins
    at, view = 0, memoryview(raw)
    while at < len(raw):  # once for each broken character: one U+FFFD for error.start:error.end
        try:
            str(view[at:], "utf-8")
            break
        except UnicodeDecodeError as error:
            leads[at + error.start : at + error.end] = False
            leads[at + error.start] = True
            at += error.end
    start = np.flatnonzero(np.append(leads, True))  # [L + 1] each character's first byte; the end
    edge = np.interp(upto, start, np.arange(len(start)))  # [T + 1]
    return raw.decode("utf-8", errors="replace"), np.stack([edge[:-1], edge[1:]], axis=1)


def _pieces(tokenizer):
    """The table of id -> bytes, rebuilt if decoder, size or named special tokens change."""
    name, backend = type(tokenizer).__name__, getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        raise ValueError(f"{name} has no fast backend with a decoder")
    decoder, named = backend.decoder.__getstate__(), tuple(tokenizer.all_special_ids)
    return _Pieces(name, backend, decoder, named, backend.get_vocab_size())


@functools.lru_cache(8)  # one for each tokenizer and state: tokens may be added, or made special
class _Pieces(dict):
    """id -> bytes of the token, b"" if it is special or does not exist; filled as ids are met.
    tokenizer.json's decoder says how tokens spell bytes.  ByteLevel: as GPT-2's stand-ins.
    Metaspace, or Replace ▁ by a space: SentencePiece, where `<0x0A>` may be a byte (fallback)."""
    def __init__(self, name, backend, decoder, named, size):
        self.backend, self.space, self.drops_prefix = backend, None, False
        added = backend.get_added_tokens_decoder().items()
        self.special = {*named, *(i for i, t in added if t.special)}
        decoder = json.loads(decoder)
        steps = decoder.get("decoders", [decoder])  # a Sequence's steps, or the only one
        kinds = [step["type"] for step in steps]
        for kind, step in zip(kinds, steps):
            if kind == "Metaspace":
                self.space = step["replacement"]
                self.drops_prefix = step.get("prepend_scheme", "always") != "never"
            elif kind == "Replace" and step["content"] == " ":
                self.space = step["pattern"].get("String")
            elif kind == "Strip" and step["start"] == 1:
                self.drops_prefix = True
            elif kind not in ("ByteLevel", "ByteFallback", "Fuse"):
                raise ValueError(f"{name}: decoder step {step} is not known to align._Pieces")
        if ("ByteLevel" in kinds) == (self.space is not None):  # both, or neither
            raise ValueError(f"{name}: decoder {kinds} is neither byte-level nor SentencePiece")
        self.fallback, self.byte_of = "ByteFallback" in kinds, {} if self.space else _alphabet()

    def __missing__(self, i):
        if i < 0:
            raise ValueError(f"{i} is not a token id: leave padding out")
        token = self.backend.id_to_token(i)
        if token is None or i in self.special:
            piece = b""
        elif set(token) <= self.byte_of.keys() and self.backend.model.id_to_token(i) == token:
            piece = bytes(map(self.byte_of.get, token))
        elif self.fallback and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            piece = bytes.fromhex(token[3:5])
        else:
            piece = token.replace(self.space or " ", " ").encode()
        return self.setdefault(i, piece)


def _alphabet():
    """GPT-2's character -> byte: printable Latin-1 is itself, the 68 others are U+0100 and up."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): b for n, b in enumerate(others)}


if __name__ == "__main__": from examples import shown; shown.show(__file__)  # on one screen
