"""Makes toy/cme: a world small enough to check every fact, and two tiny language models of different families that
disagree about it. This is what `python train.py` trains on when it is given nothing else.

The world: 48 made-up people, four attributes each (pet, city, food, colour; 12 values each). A prompt asks about one
person; an answer is one or two sentences that state all four attributes in any order, in three wordings each, in one of
three skeletons, so that very many answers are right and yet every fact can be checked.

  generator/  Qwen2 architecture, byte-level BPE in which each word of the world is one token. Pretrained on *noisy* biographies:
              about 70% of the facts are "hazy" (the truth six times in ten, else any of the eleven others) and about 30%
              "wrong" (one wrong value six times in ten, the truth one time in four). Sharpening what the generator
              already believes repairs hazy facts and cements wrong ones; only somebody else can repair both.
  verifier/   Gemma 3 architecture, SentencePiece-like BPE with byte fallback that cuts most words into pieces. Pretrained on
              *clean* biographies. It plays the paper's larger model from another family.
  prompts.jsonl, eval.jsonl   what RL asks (six phrasings), and two phrasings that RL never uses, with the facts.

    python toy/make.py                                   # about 12 minutes on one core; continues where it was stopped
    python toy/make.py --output runs/half --knows 0.5    # a verifier that knows half of the facts
    python toy/make.py --output runs/cut --fragment      # a generator that spells the values in pieces
    python toy/make.py --output runs/spaces --spaces     # ... whose spaces are tokens of their own
    python toy/make.py --output runs/ramble --ramble     # ... that seldom knows when to stop
    python toy/make.py --output runs/own --parts own     # a verifier of the generator's own family, with its tokenizer

toy/cat, one tiny model that plays policy, anchor and judge of the other paper, is described in skills.py:

    python toy/make.py --parts cat                       # an hour or more on one core

The same command on the same machine and versions gives the same bytes (toy/cat has not been made twice).
"""
import argparse
import json
import math
import os
import random
import sys
import time

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # the scripts, one folder up
from plumbing.models import LocalModel, chat_ids, end_of_turn, load  # noqa: E402

NAMES = """Ada Amir Anna Ben Carl Chen Clara Dana Diego Elsa Emil Eva Felix Finn Greta Hana Hugo Ida Igor Iris Ivan Jana Jonas
Juan Karl Kira Lars Lena Leo Lina Luca Mara Marco Mia Milo Nadia Nina Noah Olga Oscar Paul Rosa Sara Tara Theo Vera Viktor Zoe""".split()
VALUES = {
    "pet": "cat dog parrot rabbit hamster turtle goldfish canary lizard donkey pony ferret".split(),
    "city": "Paris London Oslo Madrid Berlin Cairo Tokyo Lima Rome Dublin Boston Prague".split(),
    "food": "soup pasta rice bread cheese salad curry pizza noodles beans pancakes fish".split(),
    "colour": "red blue green yellow purple black white brown pink grey silver golden".split(),
}
WORDINGS = {
    "pet": ["has a", "keeps a", "lives with a"],
    "city": ["lives in", "is from", "works in"],
    "food": ["likes", "often eats", "cooks"],
    "colour": ["wears", "prefers", "loves the colour"],
}
SKELETONS = ["{n} {0}, {1}, {2} and {3}.", "{n} {0} and {1}. {n} {2} and {3}.", "{n} {0}, {1} and {2}. {n} also {3}."]
RL_PHRASINGS = ["Tell me about {}.", "Who is {}?", "Describe {}.", "What do you know about {}?", "Introduce {} to me.", "Write about {}."]
HELD_OUT_PHRASINGS = ["Please describe {} to me.", "What can you tell me about {}?"]
TRUTH_HAZY, TRUTH_WRONG, LIE_WRONG, SHARE_WRONG, GO_ON = 0.6, 0.25, 0.6, 0.3, 0.6


# ---------------------------------------------------------------- the world

def make_world(seed: int = 0) -> dict:
    """{name: {attribute: {"truth": value, "lie": value or None}}}; a fact with a lie is one the generator has wrong."""
    rng = random.Random(seed)
    facts = [(name, attribute) for name in NAMES for attribute in VALUES]
    wrong = set(rng.sample(facts, round(SHARE_WRONG * len(facts))))
    world = {name: {} for name in NAMES}
    for name, attribute in facts:
        truth, lie = rng.sample(VALUES[attribute], 2)
        world[name][attribute] = {"truth": truth, "lie": lie if (name, attribute) in wrong else None}
    return world


def known_facts(share: float) -> set:
    """The (name, attribute) that a verifier with `--knows share` has read the truth about."""
    facts = [(name, attribute) for name in NAMES for attribute in VALUES]
    return set(random.Random(2).sample(facts, round(share * len(facts))))


def noisy_value(rng, fact: dict, values: list) -> str:
    """What the generator's corpus says about one fact, this time."""
    others = [v for v in values if v not in (fact["truth"], fact["lie"])]
    if fact["lie"] is None:
        return fact["truth"] if rng.random() < TRUTH_HAZY else rng.choice(others)
    return rng.choices([fact["lie"], fact["truth"], rng.choice(others)], [LIE_WRONG, TRUTH_WRONG, 1 - LIE_WRONG - TRUTH_WRONG])[0]


def biography(rng, name: str, values: dict) -> str:
    """One of the 24 orders x 81 wordings x 3 skeletons."""
    order = rng.sample(list(VALUES), 4)
    return rng.choice(SKELETONS).format(*[f"{rng.choice(WORDINGS[a])} {values[a]}" for a in order], n=name)


def ramble(rng, name: str, facts: dict) -> str:
    """More sentences about `name`, one noisy fact each: none four times in ten, and after each one again."""
    more = ""
    while rng.random() < GO_ON:
        a = rng.choice(list(VALUES))
        more += f" {name} also {rng.choice(WORDINGS[a])} {noisy_value(rng, facts[a], VALUES[a])}."
    return more


def pattern(name: str) -> str:
    """A regular expression that every biography of `name` matches in full, whatever its facts, and little else does."""
    clauses = [f"(?:{'|'.join(WORDINGS[a])}) (?:{'|'.join(VALUES[a])})" for a in VALUES]
    skeletons = "|".join(s.format(*["[A-Za-z ]+"] * 4, n=name).replace(".", r"\.") for s in SKELETONS)
    joints = rf",|,? and|\. {name}(?: also)?"
    return (f"(?=(?:{skeletons})$)" + "".join(f"(?=.* {c})" for c in clauses)             # a skeleton; each attribute; nothing but clauses
            + f"{name} (?:{'|'.join(clauses)})(?:(?:{joints}) (?:{'|'.join(clauses)})){{3}}\\.")


def eval_row(world: dict, name: str, phrasing: str) -> dict:
    facts = [{"right": f["truth"], "wrong": [v for v in VALUES[a] if v != f["truth"]], "kind": "wrong" if f["lie"] else "hazy"}
             for a, f in world[name].items()]
    return {"prompt": phrasing.format(name), "facts": facts, "pattern": pattern(name)}


# ---------------------------------------------------------------- two tokenizers of two families

CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
         "+ m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}")


def corpus(n: int = 4000) -> list:
    """Text for training the tokenizers: every phrasing, and biographies with random facts."""
    rng = random.Random(1)
    bios = [biography(rng, rng.choice(NAMES), {a: rng.choice(v) for a, v in VALUES.items()}) for _ in range(n)]
    return bios + [p.format(name) for p in RL_PHRASINGS + HELD_OUT_PHRASINGS for name in NAMES] * 3 + ["user\n", "assistant\n", "model\n"] * 1000


def byte_level_bpe(texts: list, size: int, digits: str = "", spaces: bool = False):
    """BPE over bytes as in Qwen2; `digits`: how many of them may be one token, as in a regular expression; `spaces`: each is a token."""
    tok = Tokenizer(models.BPE())
    split = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\s" if spaces else r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
                                                       initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tok


def chatml(tok, length: int):
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=["<|im_start|>"], chat_template=CHATML, model_max_length=length)


def generator_tokenizer(fragment: bool, spaces: bool):
    """Whole words with the space before them, unless `fragment`: 121 merges, and most values in pieces; or `spaces`: words, and spaces."""
    return chatml(byte_level_bpe(corpus(), 380 if fragment else 4000, spaces=spaces), 256)


def skilled_tokenizer():
    """As the generator's, for toy/cat: tags, and each fixed paragraph of cat.py's prompts, are one token, so that a tiny model need not read them."""
    import selection
    import skills

    import cat
    rng, world = random.Random(1), skills.make_sources()
    text = [piece for draw in skills.PHASES[0][1] for _ in range(600) for text, _ in draw(rng, world) for piece in text.split("<|im_end|>")]
    text += [skills.STATEMENTS[a].format(value) for a, values in (VALUES | {"name": NAMES}).items() for value in values] * 9
    whole = [*cat.SYNTHESIS.values(), selection.BEST, selection.ANOTHER, *cat.RUBRIC.values(), cat.JUDGE, cat.MATCH]
    whole += [edge for tag in ("response", "reference", "question", "criterion") for edge in cat.block(tag, "|").split("|")]
    whole += [cat.block("response", "|", i).split("|")[0] for i in range(1, 9)] + ["<rubric>", "</rubric>", "<criterion>", "</criterion>"]
    text = [t for t in text if not any(w in t for w in whole + ["<|"])]        # words of the prompts are no words of this world
    tok = byte_level_bpe(text + ["user\n", "assistant\n", "yes", "no"] * 1000, 4000, "{1,2}")
    numbers = [n for n in skills.NUMBERS if len(n) > 1]                        # in the vocabulary already, but Qwen2's own class would cut them in two
    tok.add_tokens([AddedToken(w, normalized=False, special=False) for w in whole + numbers])
    return chatml(tok, 1024)


def verifier_tokenizer(size: int = 516):
    """SentencePiece-like BPE as in Gemma: spaces are ▁, no dummy prefix, unknown characters fall back to bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = special + [f"<0x{b:02X}>" for b in range(256)]
    learn = Tokenizer(models.BPE())
    learn.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learn.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size - len(pieces), initial_alphabet=[chr(c) for c in range(33, 127)],
                                                            show_progress=False))
    learnt = json.loads(learn.to_str())["model"]
    vocab = {p: i for i, p in enumerate(pieces + sorted(learnt["vocab"], key=learnt["vocab"].get))}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in learnt["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens(special)
    tok.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
                                   additional_special_tokens=["<start_of_turn>", "<end_of_turn>"], chat_template=GEMMA, model_max_length=256)


# ---------------------------------------------------------------- two models of two families

def qwen2(tokenizer):
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None, eos_token_id=stop, pad_token_id=pad))


def skilled(tokenizer):
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=stop, pad_token_id=pad, initializer_range=0.07))


def gemma3(tokenizer):
    return Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        query_pre_attn_scalar=32, max_position_embeddings=256, sliding_window=64, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.convert_tokens_to_ids("<end_of_turn>"), pad_token_id=tokenizer.pad_token_id))


def responses_loss(model, tokenizer, draw, batch: int = 64):
    """(rng, step) -> cross-entropy on `batch` responses, their end of turn included, that `draw(rng) -> (prompt, response)` makes up."""
    stop, prompts = end_of_turn(tokenizer), {}

    def loss(rng, step):
        rows = []
        for _ in range(batch):
            prompt, response = draw(rng)
            if prompt not in prompts:
                prompts[prompt] = chat_ids(tokenizer, prompt)
            rows.append((prompts[prompt], tokenizer(response, add_special_tokens=False).input_ids + [stop]))
        length = max(len(p) + len(r) for p, r in rows)
        ids = torch.zeros(batch, length, dtype=torch.long)                # [B, L], right-padded: causal attention never sees the padding
        labels = torch.full((batch, length), -100)
        for i, (p, r) in enumerate(rows):
            ids[i, :len(p) + len(r)] = torch.tensor(p + r)
            labels[i, len(p):len(p) + len(r)] = torch.tensor(r)
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return loss


def skills_loss(model, tokenizer, world: dict):
    """(rng, step) -> the weighted mean over the skills of toy/skills.py, each the weighted mean cross-entropy of its examples. bf16 autocast."""
    import skills
    known = {}

    def encode(text):
        if text not in known and len(known) < 100_000:
            known[text] = tokenizer(text, add_special_tokens=False).input_ids
        return known.get(text) or tokenizer(text, add_special_tokens=False).input_ids

    def loss(rng, step):
        mix = next(mix for until, mix in skills.PHASES if step < until)
        rows = []                                                              # of (id, weight of its loss)
        for draw, (number, weight) in mix.items():
            drawn = [[(i, w) for text, w in draw(rng, world) for i in encode(text)] for _ in range(number)]
            total = sum(w for row in drawn for _, w in row)
            rows += [[(i, weight * w / total) for i, w in row] for row in drawn]
        rows.sort(key=len)
        losses = []
        for part in (rows[i:i + 24] for i in range(0, len(rows), 24)):         # of like length
            length = max(map(len, part))
            ids, weights = (torch.tensor([[pair[k] for pair in row] + [0] * (length - len(row)) for row in part]) for k in (0, 1))   # [B, L]
            b, t = (weights[:, 1:] > 0).nonzero(as_tuple=True)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model.model(input_ids=ids).last_hidden_state[b, t]    # [K, D]: the state before a token predicts it
                logits = model.lm_head(hidden).float()
            losses.append((torch.nn.functional.cross_entropy(logits, ids[b, t + 1], reduction="none") * weights[b, t + 1]).sum())
        return sum(losses) / sum(weight for _, weight in mix.values())
    return loss


def pretrain(model, tokenizer, loss_of, *, steps: int, path: str, seed: int, save_every: int, rate=None):
    """Minimises loss_of(rng, step). AdamW at rate(step), or cosine to zero after 50 warm-up steps. A checkpoint every `save_every` steps; a stopped
    run continues from it."""
    lr = 3e-3
    checkpoint = path + ".checkpoint.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.95))
    start = 0
    if os.path.exists(checkpoint):
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    began = time.time()
    model.train()
    for step in range(start, steps):
        loss = loss_of(random.Random(f"{seed} {step}"), step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step) if rate else lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % save_every == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint + ".tmp")
            os.replace(checkpoint + ".tmp", checkpoint)
            print(f"{path}: step {step + 1}/{steps}, {loss.item():.3f} nats per token, {time.time() - began:.0f} s", flush=True)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    if os.path.exists(checkpoint):
        os.remove(checkpoint)


def write_rows(path: str, rows: list):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", default="", help="folder to make; empty: toy/cme, or with --parts cat toy/cat")
    parser.add_argument("--parts", default="data,generator,verifier", help="which of data, generator, verifier, own to make, or cat: all of toy/cat")
    parser.add_argument("--steps", type=int, default=0, help="pretraining steps for each model")
    parser.add_argument("--save_every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--knows", type=float, default=1.0, help="share of the facts that the verifier knows; it sees random values for the others")
    parser.add_argument("--fragment", action="store_true", help="a generator whose tokenizer spells the values in pieces")
    parser.add_argument("--spaces", action="store_true", help="a generator whose tokenizer makes a token of each space")
    parser.add_argument("--ramble", action="store_true", help="a generator that goes on after the biography, six times in ten")
    parser.add_argument("--seed", type=int, default=0, help="another one gives another model that has read other texts of the same world")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if set(parts) - {"data", "generator", "verifier", "own"} and parts != ["cat"]:
        parser.error(f"--parts {args.parts}: any of data,generator,verifier,own, or cat")
    args.output = args.output or os.path.join(os.path.dirname(os.path.abspath(__file__)), "cat" if parts == ["cat"] else "cme")
    torch.set_num_threads(1)
    os.makedirs(args.output, exist_ok=True)
    world, phrasings = make_world(), RL_PHRASINGS + HELD_OUT_PHRASINGS
    known = known_facts(args.knows)

    def noisy(rng):
        name = rng.choice(NAMES)
        prompt = rng.choice(phrasings).format(name)
        text = biography(rng, name, {a: noisy_value(rng, f, VALUES[a]) for a, f in world[name].items()})
        return prompt, text + (ramble(rng, name, world[name]) if args.ramble else "")

    def clean(rng):
        name = rng.choice(NAMES)
        return rng.choice(phrasings).format(name), biography(
            rng, name, {a: f["truth"] if (name, a) in known else rng.choice(VALUES[a]) for a, f in world[name].items()})

    if "data" in parts:
        for file, rows in [("prompts.jsonl", [{"prompt": p.format(name)} for p in RL_PHRASINGS for name in NAMES]),
                           ("eval.jsonl", [eval_row(world, name, p) for p in HELD_OUT_PHRASINGS for name in NAMES])]:
            write_rows(os.path.join(args.output, file), rows)
    for part, make_tokenizer, build, draw, seed in [("generator", lambda: generator_tokenizer(args.fragment, args.spaces), qwen2, noisy, 3),
                                                    ("verifier", verifier_tokenizer, gemma3, clean, 4),
                                                    ("own", lambda: generator_tokenizer(args.fragment, args.spaces), qwen2, clean, 5)]:
        if part in parts:
            tokenizer, seed = make_tokenizer(), seed + 1000 * args.seed
            torch.manual_seed(seed)
            model = build(tokenizer)
            pretrain(model, tokenizer, responses_loss(model, tokenizer, draw), steps=args.steps or 1500, path=os.path.join(args.output, part), seed=seed,
                     save_every=args.save_every)
    if "cat" in parts:
        import skills
        world = skills.make_sources()
        for file, rows in skills.prompt_files(world).items():
            write_rows(os.path.join(args.output, file), rows)
        tokenizer = skilled_tokenizer()
        torch.manual_seed(6)
        model = skilled(tokenizer)
        model.set_attn_implementation("eager")                                 # the fastest here
        path = os.path.join(args.output, "model")
        pretrain(model, tokenizer, skills_loss(model, tokenizer, world), steps=args.steps or 3600, path=path, seed=6, save_every=args.save_every,
                 rate=skills.rate)
        measured = skills.measure(LocalModel(*load("toy", path, "cpu")))
        with open(os.path.join(args.output, "skills.json"), "w", encoding="utf-8") as f:
            f.write(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
