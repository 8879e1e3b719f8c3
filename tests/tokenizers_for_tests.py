"""Small tokenizers of every family, trained in about a second, and production ones that mistral-common ships.

`make(name)` builds a tokenizer once per process; NAMES lists the small ones, PRODUCTION the shipped ones.
"""

import base64
import functools
import importlib.util
import json
import struct
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and unhappiness turns into happiness",
    "hello world! hello there; the cat sat on the mat. Mia lives in Paris and keeps a cat",
    "def main():\n    return 0\n\n\n\ttabs and  two spaces   three spaces",
    "café naïve été déjà vu über straße", "日本語の文章 中文 한글 ไทย", "🙂🙂😀👩‍👩‍👧 ½ ﬁ",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
STRIP = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
FALLBACK = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def _wrap(backend, eos="</s>", **special):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, clean_up_tokenization_spaces=False, **special)


def _byte_level(normalizer=None, prefix=False, trim=False, added=()):
    backend = Tokenizer(models.BPE())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False))
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(list(added))
    return _wrap(backend, "<|im_end|>")


def _sentencepiece(decoder, normalizer=None, pre_tokenizer=None, added=(), fallback=True):
    special = ["<unk>", "<bos>", "</s>", "<end_of_turn>"]
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    if normalizer:
        backend.normalizer = normalizer
    if pre_tokenizer:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special + BYTES * fallback, show_progress=False)
    space = "" if normalizer is PREPEND else " "
    words = [space + word for line in CORPUS[:4] for word in line.split()]  # other characters fall back to bytes
    backend.train_from_iterator(words, trainer)
    spec = json.loads(backend.to_str())  # the trainer made the bytes special; in a real tokenizer they are not
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return _wrap(backend, unk_token="<unk>", bos_token="<bos>")


def _unigram(normalizer=None):
    backend = Tokenizer(models.Unigram())
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    backend.decoder = decoders.Metaspace("▁", "always")
    special = ["<unk>", "<bos>", "</s>", "<end_of_turn>"]
    backend.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False))
    return _wrap(backend, unk_token="<unk>", bos_token="<bos>")


def _data(name):
    found = importlib.util.find_spec("mistral_common")
    path = Path(found.submodule_search_locations[0], "data", name) if found else None
    if path is None or not path.exists():
        raise FileNotFoundError(f"mistral-common's data file {name}")
    return path


def _tekken(name, size=30_000):
    """Mistral's byte-level vocabulary (as tiktoken's, ranked bytes), its first `size` entries of 131k."""
    spec = json.loads(_data(name).read_bytes())
    first = spec["config"]["default_num_special_tokens"]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in spec["vocab"][:size]}
    shown = bytes_to_unicode()
    spell = {token: "".join(map(shown.get, token)) for token in ranks}
    special = ["<unk>", "<s>", "</s>"] + [f"<SPECIAL_{i}>" for i in range(3, first)]
    vocab = {token: i for i, token in enumerate(special)} | {spell[t]: rank + first for t, rank in ranks.items()}
    merges = []
    for token in ranks:  # in the order of their rank
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(spell[a], spell[b]) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(spec["config"]["pattern"]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return _wrap(backend, unk_token="<unk>", bos_token="<s>")


def _spm_pieces(data):
    """The (piece, score, type) of a SentencePiece .model: field 1 of its protobuf, read by hand."""
    def varint(at):
        value = shift = 0
        while True:
            value |= (data[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 0x80:
                return value, at

    def fields(at, stop):
        while at < stop:
            key, at = varint(at)
            if key & 7 == 2:
                size, at = varint(at)
                yield key >> 3, (at, at + size)
                at += size
            elif key & 7 == 5:
                yield key >> 3, struct.unpack_from("<f", data, at)[0]
                at += 4
            else:
                value, at = varint(at)
                yield key >> 3, value

    for number, value in fields(0, len(data)):
        if number == 1:
            entry = dict(fields(*value))
            yield data[slice(*entry[1])].decode(), entry.get(2, 0.0), entry.get(3, 1)


def _spm(name, metaspace):
    """Mistral's SentencePiece BPE, converted as transformers does it: Prepend/Replace (legacy) or Metaspace."""
    pieces = list(_spm_pieces(_data(name).read_bytes()))
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    merges = []
    for piece, score, kind in pieces:
        if kind == 1:
            for i in range(1, len(piece)):
                if piece[:i] in vocab and piece[i:] in vocab:
                    merges.append((-score, vocab[piece[:i]], vocab[piece[i:]], piece[:i], piece[i:]))
    backend = Tokenizer(models.BPE(vocab, [m[3:] for m in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = PREPEND
    backend.decoder = STRIP
    special = [AddedToken(piece, normalized=False, special=True) for piece, _, kind in pieces if kind in (2, 3)]
    backend.add_special_tokens(special)
    return _wrap(backend, unk_token="<unk>", bos_token="<s>")


BUILD = {
    "gpt2": lambda: _byte_level(),
    "qwen": lambda: _byte_level(normalizers.NFC(), added=["<think>", "<é>"]),
    "roberta": lambda: _byte_level(normalizers.NFC(), prefix=True, trim=True),
    "byte_nfkc": lambda: _byte_level(normalizers.NFKC()),
    "byte_lower": lambda: _byte_level(normalizers.Lowercase()),
    "llama2": lambda: _sentencepiece(STRIP, PREPEND),
    "llama2_added": lambda: _sentencepiece(STRIP, PREPEND, added=["<tool>"]),
    "mistral": lambda: _sentencepiece(STRIP, None, pre_tokenizers.Metaspace("▁", "first", split=False)),
    "gemma": lambda: _sentencepiece(FALLBACK, normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous"), added=["\n\n", "▁▁"]),
    "bpe_unk": lambda: _sentencepiece(decoders.Metaspace("▁", "always"), None, pre_tokenizers.Metaspace("▁", "always"), fallback=False),
    "bpe_never": lambda: _sentencepiece(decoders.Metaspace("▁", "never"), None, pre_tokenizers.Metaspace("▁", "never"), fallback=False),
    "unigram": lambda: _unigram(),
    "unigram_nfkc": lambda: _unigram(normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])),
    "unigram_drops": lambda: _unigram(normalizers.Replace("\x01", "")),
    "tekken": lambda: _tekken("tekken_240911.json"),
    "mistral_v1": lambda: _spm("tokenizer.model.v1", metaspace=False),
    "mistral_v3": lambda: _spm("mistral_instruct_tokenizer_240323.model.v3", metaspace=True),
}
PRODUCTION = ["tekken", "mistral_v1", "mistral_v3"]
NAMES = [name for name in BUILD if name not in PRODUCTION]


@functools.lru_cache(maxsize=None)
def make(name):
    """A tokenizer by name, built once.  FileNotFoundError if mistral-common is not installed."""
    return BUILD[name]()
