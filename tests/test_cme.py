"""cme.py on the toy's real models, and on tiny random models of other families."""
from fractions import Fraction

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import cme
import grpo
from align import spans_from_ids, spans_from_text
from plumbing import models

PROMPT = "Tell me about Mia."


@pytest.fixture(scope="module")
def toy():
    load = lambda part: (models.load_model(f"toy/cme/{part}", train=False, device="cpu"), models.load_tokenizer(f"toy/cme/{part}"))  # noqa: E731
    return {"generator": load("generator"), "verifier": load("verifier")}


def pad(rows):
    T = max(map(len, rows))
    return torch.tensor([r + [0] * (T - len(r)) for r in rows]), torch.tensor([len(r) for r in rows])


def verifier_says(model, tokenizer, prompt, text):
    """The slow way: one row, the model's own logits. -> log p of each verifier token of the text."""
    before = models.chat_ids(tokenizer, prompt)
    answer = list(spans_from_text(tokenizer, text)[0])
    logp = model(input_ids=torch.tensor([before + answer])).logits[0].double().log_softmax(-1)
    return [logp[len(before) + i - 1, token].item() for i, token in enumerate(answer)]


def read(tokenizer, texts):
    """The ids of texts as the verifier reads them."""
    return [list(spans_from_text(tokenizer, text)[0]) for text in texts]


def slow_rewards(values, source, target):
    """Eq. 1 with its weights written out, in fractions."""
    exact = lambda x: Fraction(float(x)).limit_denominator(1000)                                          # noqa: E731
    rewards = [Fraction(0)] * len(target)
    for value, (c, d) in zip(values, source):
        for t, (a, b) in enumerate(target):
            if d > c:
                rewards[t] += Fraction(value) * max(Fraction(0), min(exact(b), exact(d)) - max(exact(a), exact(c))) / (exact(d) - exact(c))
    return [float(r) for r in rewards]


TEXTS = ["Mia has a cat, lives in Oslo, likes soup and wears red.", "Mia has  a dog.\nUnseen wörds 🙂 here", "x", "Mia", "naïve café — ok  "]


@pytest.mark.parametrize("roles", [("generator", "verifier"), ("verifier", "generator"), ("generator", "generator")])
def test_token_rewards_are_eq_1(toy, roles):
    _, tokenizer = toy[roles[0]]
    model, verifier_tokenizer = toy[roles[1]]
    stop = models.end_of_turn(tokenizer)
    rows = [tokenizer(t, add_special_tokens=False).input_ids + [stop] for t in TEXTS] + [[stop]]
    ids, lengths = pad(rows)
    prompts = [PROMPT, "Who is Mia?"] * 3
    rewards, mask = cme.token_rewards(model, verifier_tokenizer, tokenizer, prompts, ids, lengths)
    assert rewards.shape == mask.shape == ids.shape and rewards.dtype == torch.float32 and mask.dtype == torch.bool
    for i, row in enumerate(rows):
        text, spans = spans_from_ids(tokenizer, row)
        assert text == (TEXTS + [""])[i]
        values = verifier_says(model, verifier_tokenizer, prompts[i], text)
        expected = slow_rewards(values, spans_from_text(verifier_tokenizer, text)[1], spans)
        assert sum(expected) == pytest.approx(sum(values), rel=1e-9, abs=1e-9)
        for t, (a, b) in enumerate(spans):
            seen = text[int(a):int(np.ceil(b))].strip() != "" and b > a
            assert bool(mask[i, t]) == seen
            assert rewards[i, t].item() == pytest.approx(expected[t] if seen else 0, abs=2e-4)
        assert not mask[i, len(row) - 1:].any() and not rewards[i, len(row) - 1:].any()                   # the stop token and the padding


def test_rows_do_not_depend_on_their_neighbours(toy):
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    ids, lengths = pad([tokenizer(t).input_ids for t in TEXTS])
    prompts = ["Who is Mia?", PROMPT, [{"role": "user", "content": "Describe Zoe."}], PROMPT, "A much longer question about what Mia likes to eat."]
    together, _ = cme.token_rewards(model, verifier_tokenizer, tokenizer, prompts, ids, lengths)
    for i in range(len(TEXTS)):
        alone, _ = cme.token_rewards(model, verifier_tokenizer, tokenizer, prompts[i:i + 1], ids[i:i + 1, :lengths[i]], lengths[i:i + 1])
        torch.testing.assert_close(together[i, :lengths[i]], alone[0], atol=1e-4, rtol=0)
    small = models.answer_logprobs(model, verifier_tokenizer, prompts, read(verifier_tokenizer, TEXTS), batch_tokens=1)
    large = models.answer_logprobs(model, verifier_tokenizer, prompts, read(verifier_tokenizer, TEXTS))
    for a, b, text in zip(small, large, TEXTS):
        assert a.shape == b.shape == (len(read(verifier_tokenizer, [text])[0]),)
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_equal_rows_score_equal_to_the_bit(toy):
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    rows = [tokenizer(t).input_ids for t in [TEXTS[0], TEXTS[1], TEXTS[0]]]
    ids, lengths = pad(rows)
    rewards, _ = cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 3, ids, lengths)
    assert torch.equal(rewards[0], rewards[2])


def test_sampled_ids_are_scored_as_they_are(toy):
    """Byte by byte, an encoding that the tokenizer would never choose: same text, same total."""
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    text = "Mia likes sóup🙂."
    canonical = tokenizer(text).input_ids
    byte = {bytes([b]): tokenizer.convert_tokens_to_ids(c) for c, b in __import__("align")._alphabet().items()}
    ids, lengths = pad([canonical, [byte[bytes([b])] for b in text.encode()]])
    rewards, mask = cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 2, ids, lengths, credit="word")
    total = sum(verifier_says(model, verifier_tokenizer, PROMPT, text))
    assert rewards[1, 0].item() == pytest.approx(rewards[0, 0].item(), abs=1e-4)                          # the word "Mia", whole, either way
    plain, mask = cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 2, ids, lengths)
    assert plain[0].sum().item() == pytest.approx(total, abs=1e-3) and mask[0, :lengths[0]].all()
    assert not mask[1, 3] and plain[1, 3] == 0                                                            # a space alone is masked


def test_the_right_fact_is_less_surprising(toy):
    """What the whole method rests on, for the toy: the verifier prefers each right fact to the generator's favourite lie."""
    import json
    model, tokenizer = toy["verifier"]
    rows = [json.loads(line) for line in open("toy/cme/eval.jsonl", encoding="utf-8")][:48]
    for row in rows[::8]:
        name = row["prompt"].split()[2]
        right = row["facts"][1]["right"]
        cities = cme.sequence_rewards(model, tokenizer, [row["prompt"]] * 3, [f"{name} lives in {c}." for c in (right, *row["facts"][1]["wrong"][:2])])
        assert cities.argmax() == 0


def test_stop_ids_say_what_a_stop_token_is(toy):
    """A row cut off at a special token that does not stop did not stop; a stop token that is not special is no text."""
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    text = tokenizer(TEXTS[0]).input_ids
    start, stop, dot = tokenizer.convert_tokens_to_ids("<|im_start|>"), models.end_of_turn(tokenizer), text[-1]
    ids, lengths = pad([text + [stop], text + [start], text])
    go = lambda **options: cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 3, ids, lengths, **options)   # noqa: E731
    rewards, mask = go(stop_ids=[stop])
    assert not mask[:, len(text):].any() and not rewards[:, len(text):].any()
    rewards, mask = go(stop_ids=[stop, dot])                                                              # the full stop stops, and is not read
    expected = sum(verifier_says(model, verifier_tokenizer, PROMPT, TEXTS[0][:-1]))
    assert not mask[2, len(text) - 1] and rewards[2].sum().item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("credit", ["token", "word"])
def test_the_stop_may_be_scored(toy, credit):
    """With score_stop it gets the verifier's log p of its own end of turn after the text, and counts; all else stays; a row cut off has none."""
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    stop, end = models.end_of_turn(tokenizer), models.end_of_turn(verifier_tokenizer)
    ids, lengths = pad([row + [stop] for row in tokenizer(TEXTS[:2] + ["Mia has a"]).input_ids] + [[stop], tokenizer(TEXTS[0]).input_ids])
    go = lambda **options: cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 5, ids, lengths, credit=credit, stop_ids=[stop], **options)   # noqa: E731
    (plain, counted), (rewards, mask) = go(), go(score_stop=True)
    before = models.chat_ids(verifier_tokenizer, PROMPT)
    for i, text in enumerate([*TEXTS[:2], "Mia has a", ""]):
        read = torch.tensor([before + list(spans_from_text(verifier_tokenizer, text)[0])])
        expected = model(input_ids=read).logits[0, -1].double().log_softmax(-1)[end].item()
        assert rewards[i, lengths[i] - 1].item() == pytest.approx(expected, abs=1e-4) and mask[i, lengths[i] - 1] and not counted[i, lengths[i] - 1]
        rewards[i, lengths[i] - 1], mask[i, lengths[i] - 1] = 0, False
    torch.testing.assert_close(rewards, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(mask, counted) and expected < -1


def test_what_the_verifier_cannot_read_is_masked(toy):
    """Some verifiers drop control characters: a response of nothing else has no verifier token, and no reward of 0 to win with."""
    from tokenizers_for_tests import make
    from transformers import LlamaConfig, LlamaForCausalLM
    _, tokenizer = toy["generator"]
    reader = make("unigram_drops")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(reader), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    assert not spans_from_text(reader, "\x01\x01")[0]
    ids, lengths = pad([tokenizer("\x01\x01").input_ids, tokenizer("Mia").input_ids])
    rewards, mask = cme.token_rewards(model, reader, tokenizer, [PROMPT] * 2, ids, lengths)
    assert not mask[0].any() and not rewards[0].any() and mask[1].any()


def test_a_verifier_that_is_not_finite_says_so(toy):
    import copy
    model, tokenizer = copy.deepcopy(toy["verifier"][0]), toy["verifier"][1]
    with torch.no_grad():
        model.base_model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="log-probabilities"):
        cme.sequence_rewards(model, tokenizer, [PROMPT], ["Mia"])


def test_sequence_rewards_are_eq_3(toy):
    model, tokenizer = toy["verifier"]
    texts = TEXTS + [""]
    rewards = cme.sequence_rewards(model, tokenizer, [PROMPT] * len(texts), texts)
    for text, reward in zip(TEXTS, rewards.tolist()):
        assert reward == pytest.approx(np.mean(verifier_says(model, tokenizer, PROMPT, text)), abs=1e-4)
    assert rewards[-1].isnan()
    assert grpo.group_advantages(rewards, 6)[-1] == 0


def test_a_price_at_a_space_reaches_the_word(toy):
    """A verifier that spells red as a bare ▁, re, d pays for it at the ▁: token credit loses that at a masked space, word credit gives it to the word."""
    (_, reader) = toy["verifier"]
    text, target = "wears red", [[0, 5], [5, 6], [6, 9]]
    ids, source = spans_from_text(reader, text)
    assert reader.convert_ids_to_tokens(ids)[-3:] == ["▁", "re", "d"]
    values = [0.0] * (len(ids) - 3) + [-6.0, -0.5, -0.25]
    assert cme.aligned_rewards(values, source, text, target)[0].tolist() == [0, 0, -0.75]
    rewards, mask = cme.aligned_rewards(values, source, text, target, "word")
    assert rewards.tolist() == [0, -6.75, -6.75] and mask.all()


def test_worked_examples():
    values, mask = cme.word_credit(np.array([-1., -2., -3., -4.]), "no red", np.array([[0, 2], [2, 3], [3, 5], [5, 6]], float))
    assert values.tolist() == [-1, -9, -9, -9] and mask.all()


def slow_word_credit(values, text, spans):
    """Word of each token by looking at characters one by one; then sums, token by token."""
    of, number = [], 0                                                         # which word each character belongs to
    for i, c in enumerate(text):
        if not c.isspace() and (i == 0 or text[i - 1].isspace()):
            number += 1
        of.append(number + 1 if c.isspace() else number)
    total = number
    token = []
    for a, b in spans:
        a = int(np.floor(a))
        token.append(of[a] if a < len(of) else total + 1)
    credit = [sum(values[s] for s in range(len(values)) if token[s] == token[t]) for t in range(len(values))]
    return credit, [token[t] <= total and spans[t][1] > spans[t][0] for t in range(len(values))]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab \n🙂", max_size=12), st.lists(st.integers(1, 4), max_size=14), st.integers(0, 2**31))
def test_word_credit_against_a_slow_loop(text, cuts, seed):
    edges = [0.0]
    for cut in cuts:                                                           # tokens of random widths, some of them fractions of a character
        if edges[-1] < len(text):
            edges.append(min(len(text), edges[-1] + (cut if cut > 1 else 0.5)))
    if edges[-1] < len(text):
        edges.append(len(text))
    spans = np.array(list(zip(edges[:-1], edges[1:])) + [(len(text), len(text))], float).reshape(-1, 2)
    values = np.random.default_rng(seed).normal(size=len(spans))
    values[-1] = 0
    got, mask = cme.word_credit(values, text, spans)
    expected, expected_mask = slow_word_credit(values, text, spans)
    np.testing.assert_allclose(got, expected, atol=1e-9)
    assert mask.tolist() == expected_mask


def test_word_credit_keeps_the_total(toy):
    """The first tokens of the words hold everything (no whitespace at the end)."""
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    text = "Mia has  a purple axolotl."
    row = tokenizer(text).input_ids
    ids, lengths = pad([row])
    rewards, mask = cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT], ids, lengths, credit="word")
    pieces = [tokenizer.decode([i]) for i in row]
    first = [t for t, p in enumerate(pieces) if t == 0 or (p.startswith(" ") and not pieces[t - 1].isspace())]
    assert mask.all() and len(first) == 5
    assert rewards[0, first].sum().item() == pytest.approx(sum(verifier_says(model, verifier_tokenizer, PROMPT, text)), abs=1e-3)


def rows_read(monkeypatch):
    """What the verifier is given from here on: a list of (prompt ids, answer ids), filled as it reads."""
    rows, real = [], grpo.token_logprobs

    def spy(model, befores, ids, lengths):
        rows.extend((list(b), y[:n]) for b, y, n in zip(befores, ids.tolist(), lengths.tolist()))
        return real(model, befores, ids, lengths)
    monkeypatch.setattr(grpo, "token_logprobs", spy)
    return rows


def test_long_prompts_lose_their_oldest_tokens(toy, monkeypatch):
    model, tokenizer = toy["verifier"]
    context, rows = model.config.max_position_embeddings, rows_read(monkeypatch)
    long, [answer] = "word " * 400 + "Who is Mia?", read(tokenizer, TEXTS[:1])
    whole = models.chat_ids(tokenizer, long)
    [logp] = models.answer_logprobs(model, tokenizer, [long], [answer])
    [(before, after)] = rows
    assert np.isfinite(logp).all() and len(logp) == len(answer) and after == answer
    assert len(before) + len(after) == context                                                            # no more than needed
    assert before[0] == whole[0] == tokenizer.bos_token_id and before[1:] == whole[1 - len(before):]
    assert "Who is Mia?<end_of_turn>" in tokenizer.decode(before)
    alone = model(input_ids=torch.tensor([before + after])).logits[0].double().log_softmax(-1)
    np.testing.assert_allclose(logp, [alone[len(before) + i - 1, y].item() for i, y in enumerate(after)], atol=1e-4)


def test_errors(toy):
    (_, tokenizer), (model, verifier_tokenizer) = toy["generator"], toy["verifier"]
    with pytest.raises(ValueError, match="credit"):
        cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT], torch.tensor([[5]]), torch.tensor([1]), credit="sentence")
    from transformers import PreTrainedTokenizerFast
    endless = PreTrainedTokenizerFast(tokenizer_object=verifier_tokenizer.backend_tokenizer)               # no template, no EOS
    with pytest.raises(ValueError, match="score_stop needs stop_ids and an EOS"):
        cme.token_rewards(model, endless, tokenizer, [PROMPT], torch.tensor([[5]]), torch.tensor([1]), score_stop=True, stop_ids=[5])
    with pytest.raises(ValueError, match="score_stop needs stop_ids"):
        cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT], torch.tensor([[5]]), torch.tensor([1]), score_stop=True)
    with pytest.raises(ValueError, match="zip"):                                                          # two rows, one length
        cme.token_rewards(model, verifier_tokenizer, tokenizer, [PROMPT] * 2, torch.tensor([[5], [6]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        cme.sequence_rewards(model, verifier_tokenizer, [PROMPT], ["a", "b"])


def test_the_same_answer_to_different_prompts(toy):
    """Catches: dedup key without the prompt; prompts confused by their first words; messages read as their first message."""
    model, tokenizer = toy["verifier"]
    say = lambda role, text: {"role": role, "content": text}                                              # noqa: E731
    prompts = ["Tell me about Mia.", "Tell me about Zoe.", [say("user", "Who is Mia?")],
               [say("user", "Who is Mia?"), say("assistant", "x"), say("user", "Who is Zoe?")]]
    for prompt, logp in zip(prompts, models.answer_logprobs(model, tokenizer, prompts, read(tokenizer, ["She lives in Oslo."] * 4))):
        np.testing.assert_allclose(logp, verifier_says(model, tokenizer, prompt, "She lives in Oslo."), atol=1e-4)


def test_batches_are_by_length_and_bounded(toy, monkeypatch):
    model, tokenizer = toy["verifier"]
    shapes, real = [], grpo.token_logprobs
    monkeypatch.setattr(grpo, "token_logprobs", lambda m, p, ids, n, **k: (
        shapes.append([len(a) + b for a, b in zip(p, n.tolist())]), real(m, p, ids, n, **k))[1])
    texts = [("Zoe ", "Ada ", "Mia ")[n % 3] * n for n in (30, 1, 25, 2, 20, 3, 15, 4, 10, 5, 28, 6)]
    models.answer_logprobs(model, tokenizer, [PROMPT] * 12, read(tokenizer, texts), batch_tokens=200)
    assert 1 < len(shapes) < 12 and all(len(s) * max(s) <= 200 for s in shapes)
    assert sum(sorted(shapes), []) == sorted(sum(shapes, []))                 # the longest row of a batch is no longer than the shortest of the next


def test_context_is_used_to_its_last_token(toy, monkeypatch):
    model, tokenizer = toy["verifier"]
    whole, [answer], rows = models.chat_ids(tokenizer, PROMPT), read(tokenizer, TEXTS[:1]), rows_read(monkeypatch)
    for missing, kept in [(0, whole), (1, whole[:1] + whole[2:]), (len(whole) - 1, whole[:1])]:
        monkeypatch.setattr(model.config, "max_position_embeddings", len(whole) + len(answer) - missing)
        models.answer_logprobs(model, tokenizer, [PROMPT], [answer])
        assert rows.pop() == (kept, answer)
    monkeypatch.setattr(model.config, "max_position_embeddings", len(answer))                             # not even BOS has room
    [none, some] = models.answer_logprobs(model, tokenizer, [PROMPT] * 2, [answer, answer[:3]])
    assert np.isnan(none).all() and len(none) == len(answer) and np.isfinite(some).all() and len(some) == 3


def test_an_answer_beyond_the_context_has_no_reward(toy, monkeypatch):
    """What a model writes does not end the run: the row is masked, or NaN; the others are as without it."""
    (_, generator), (model, tokenizer) = toy["generator"], toy["verifier"]
    ids, lengths = grpo.pad([generator(text, add_special_tokens=False).input_ids for text in ("Mia has a dog.", "Mia has a dog. " * 30)])
    short = cme.token_rewards(model, tokenizer, generator, [PROMPT], ids[:1], lengths[:1])
    monkeypatch.setattr(model.config, "max_position_embeddings", 40)
    rewards, mask = cme.token_rewards(model, tokenizer, generator, [PROMPT] * 2, ids, lengths)
    assert mask[0].any() and not mask[1].any() and torch.equal(rewards[0], short[0][0]) and torch.equal(mask[0], short[1][0])
    first, second = cme.sequence_rewards(model, tokenizer, [PROMPT] * 2, ["Mia has a dog.", "far too long " * 200])
    assert first.isfinite() and second.isnan()


def test_a_token_that_meets_no_verifier_token_is_masked():
    """The verifier's tokens cover "ab" of "ab c": what stands behind has no reward, and no part in the mean."""
    rewards, mask = cme.aligned_rewards([-1.0], [[0, 2]], "ab c", [[0, 2], [2, 4]])
    assert rewards.tolist() == [-1, 0] and mask.tolist() == [True, False]
    assert cme.aligned_rewards([], np.zeros((0, 2)), "ab", [[0, 2]])[1].tolist() == [False]


def test_a_verifier_with_random_weights():
    """random:PATH: PATH's architecture and tokenizer, weights that are not its own and the same each time; what it thinks of text is near uniform."""
    path = "toy/cme/verifier"
    (known, tokenizer), (a, same), (b, _) = (models.load("--verifier", name, "cpu") for name in (path, "random:" + path, "random:" + path))
    assert type(a) is type(known) and same.get_vocab() == tokenizer.get_vocab() and not any(p.requires_grad for p in a.parameters())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert [p.shape for p in a.parameters()] == [p.shape for p in known.parameters()]
    text = "Mia lives in Oslo and has a cat."
    random, own = (cme.sequence_rewards(m, tokenizer, ["Tell me about Mia."], [text]).item() for m in (a, known))
    assert abs(random + torch.tensor(float(len(tokenizer))).log().item()) < 1 < own - random


def test_longrope_is_read_within_its_original_context():
    """Beyond it Phi's longrope has other factors for all tokens, those in a cache too: what was wrong there, by nats, is now too long."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 40, "rope_theta": 1e4}
    tokenizer = models.load_tokenizer("toy/cme/verifier")
    config = transformers.Phi3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0,
                                     max_position_embeddings=400, original_max_position_embeddings=40, rope_parameters=rope)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weights in model.parameters():
        weights.normal_(0, 0.3) if weights.dim() > 1 else None
    before = models.chat_ids(tokenizer, "Hi")
    answers = [[5 + i % 50 for i in range(40 - len(before))], [7] * 41]
    fits, too_long = models.answer_logprobs(model, tokenizer, ["Hi", "Hi"], answers)
    logits = model(input_ids=torch.tensor([before + answers[0]]), use_cache=False).logits[0, len(before) - 1:-1]
    np.testing.assert_allclose(fits, logits.log_softmax(-1).gather(1, torch.tensor(answers[0])[:, None])[:, 0].numpy(), atol=1e-4)
    assert np.isnan(too_long).all()
    local = models.LocalModel(model, tokenizer)
    assert local.context == 40 and local.complete(["Hi"], max_new_tokens=41 - len(before)) == [[None]]
