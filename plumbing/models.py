"""Models: loading, chat templates, stop tokens; *text models*, on this machine or behind a server.

A text model has complete(prompts, *, n, max_new_tokens, temperature, seed) -> P lists of n texts,
None for a text it did not get (last_error: why); a local one has logprob(prompts, texts) -> [B]."""

import math
import re
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import grpo
from plumbing.files import one_line_error, read_json
from plumbing.prompts import messages_of

TEXT_NAMES = {r"^language_model\.lm_head": "lm_head",  # in multimodal checkpoints, old and new
              r"^(?:model\.)?language_model\.(?:model\.)?": "model."}
CONTEXT = "max_position_embeddings", "original_max_position_embeddings"  # the smaller (longrope)
TINY = 2e6  # parameters; a smaller model gets one PyTorch thread: more would wait for each other
Reply = namedtuple("Reply", "response stopped tokens", defaults=[None] * 3)  # None: too long
load_tokenizer = lambda path: AutoTokenizer.from_pretrained(path, mistral_format=False)  # or hub's


def load_model(path: str, *, train: bool, device="", bf16=False):
    """A causal language model from a folder or hub name, in eval mode, no dropout; for Gemma 3,
    3n and 4 the text model; for a LoRA adapter's folder also its base, frozen; for random:PATH with
    random weights.  train: float32, with gradients (in bf16 AdamW at 1e-6 changes nothing); else
    frozen, bf16 on CUDA or if asked.  ValueError: weights are missing; grpo.py would misread it."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    exact = train or (device.type == "cpu" and not bf16)
    dtype, tolerance = (torch.float32, 1e-4) if exact else (torch.bfloat16, 2e-2)
    random, path = path.startswith("random:"), path.removeprefix("random:")
    lora = read_json(f"{path}/adapter_config.json")
    config = AutoConfig.from_pretrained(lora.get("base_model_name_or_path", path)).get_text_config()
    config.update({name: 0.0 for name in vars(config) if "drop" in name})  # in training mode too
    if random:
        torch.manual_seed(0)
        model, found = AutoModelForCausalLM.from_config(config, dtype=dtype), {}
    else:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, key_mapping=TEXT_NAMES, output_loading_info=True)
    if found.get("missing_keys"):
        raise ValueError(f"{type(model).__name__} finds no {min(found['missing_keys'])} in it")
    if model.num_parameters() < TINY:
        torch.set_num_threads(1)
    vars(model).pop("_weight_conversions", None)  # so that it is saved as a text model
    model = model.to(device).eval()
    for name, weights in model.named_parameters():
        weights.requires_grad_(train and (not lora or "lora_" in name))
    ids = torch.arange(8, device=device)[None] % config.vocab_size
    [x], y = ids.tolist(), ids[:, 2:].expand(3, 6)
    with torch.no_grad():
        own = model(input_ids=ids).logits.float()
        ours = grpo.model_logits(model, model.base_model(input_ids=ids).last_hidden_state)
        logp = grpo.token_logprobs(model, [x[:2], x, x], y, ids.new_tensor([6, 6, 6]))[0]  # padded
    near_zero = tolerance * own.abs().nanmedian().nan_to_num().item()  # some may be -inf
    off = exact and (logp - own.log_softmax(-1)[0, range(1, 7), x[2:]]).abs().max() > 0.05  # nats
    if off or not torch.allclose(own, ours, rtol=tolerance, atol=near_zero, equal_nan=True):
        raise ValueError(f"{type(model).__name__}: grpo.model_logits or grpo.read would misread it")
    return model


def load(what: str, path: str, device="", train=False, **settings):
    """A model and its tokenizer; device "": CUDA if there is one.  ValueError: one line."""
    with one_line_error(f"{what} {path}: no model, or not loadable on this --device"):
        tokenizer = load_tokenizer(path.removeprefix("random:"))
        return load_model(path, train=train, device=device, **settings), tokenizer


def two_at_a_time(model, f, parts):
    """Pairs (part, f(part)), in order; for a tiny model on a CPU two threads work up to 4 ahead."""
    gains = model.num_parameters() < TINY and model.device.type == "cpu" and len(parts) > 1
    if not gains or torch.is_autocast_enabled("cpu"):  # new threads start without autocast
        return zip(parts, map(f, parts))
    def begin(grad=torch.is_grad_enabled()):  # set per thread; autocast's cache would be shared
        torch.set_grad_enabled(grad), torch.set_autocast_cache_enabled(False)
    return zip(parts, (found for i in range(0, len(parts), 4) for found in
                       ThreadPoolExecutor(2, "", begin).map(f, parts[i : i + 4])))


def batches(sizes: list, budget: int, longest=float("inf"), n: int = 1) -> list:
    """Indices of the items in each batch: similar sizes together, at most `budget` tokens, padding
    included (but at least one item), n rows per item; items above `longest` are left out.
    sizes (5, 2, 9, 2), budget 6 -> [[1, 3], [0], [2]]."""
    parts = []
    for size, i in sorted((size, i) for i, size in enumerate(sizes) if size <= longest):
        if not parts or (len(parts[-1]) + 1) * n * size > budget:
            parts.append([])
        parts[-1].append(i)
    return parts


def chat_ids(tokenizer, prompt) -> list:
    """Ids of a prompt up to where the assistant's answer starts, by the chat template (in one call:
    rendering, then encoding, would double the BOS), thinking switched off if it can be; without a
    template "User:\\nHi\\n\\nAssistant:\\n".  ValueError: the template refuses the prompt."""
    messages = messages_of(prompt)
    if tokenizer.chat_template:
        settings = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
        with one_line_error(f"{tokenizer.name_or_path}'s chat template refuses the prompt"):
            return list(tokenizer.apply_chat_template(messages, **settings))
    text = "".join(f"{m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + tokenizer(text + "Assistant:\n", add_special_tokens=False).input_ids


def end_of_turn(tokenizer):
    """The id that ends an assistant's turn: the first special token after its content in the chat
    template, else the tokenizer's EOS; None if it has none."""
    tail = []
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "xyzzy"}]
        with one_line_error(f"{tokenizer.name_or_path}'s chat template refuses a turn"):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        _, said, text = text.rpartition("xyzzy")
        tail = tokenizer(text if said else "", add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    return next((i for i in tail if i in special), tokenizer.eos_token_id)


def find_stop_ids(model, tokenizer) -> list:
    """All ids that end a response: generation_config.eos_token_id (one or a list; nothing else is
    ever taken from there), the tokenizer's EOS, the end of the turn."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = eos if isinstance(eos, (list, tuple)) else [eos]
    ids = {*eos, tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None}
    if not ids:
        raise ValueError(f"{tokenizer.name_or_path} names no stop token: set tokenizer.eos_token")
    return sorted(ids)


def without_stop(ids: torch.Tensor, lengths: torch.Tensor, stop_ids):
    """ids [B, T], lengths [B] -> B lists of ids without a final stop token; B bools: had one?"""
    rows = [y[:n] for y, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
    stopped = [bool(y) and y[-1] in stop_ids for y in rows]
    return [y[:-1] if end else y for y, end in zip(rows, stopped)], stopped


def plain_ids(tokenizer, texts: list) -> list:
    """Ids of texts alone: no special token is added; "</s>" is plain text (except to a Unigram)."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    return [tokenizer(text, **plain).input_ids for text in texts]


@torch.no_grad()
def answer_logprobs(model, tokenizer, prompts: list, answers: list, batch_tokens: int = 0):
    """log p(v_j | x, v_<j) of B answers (lists of ids) to B prompts -> B arrays [N], nats.
    Batches of similar length have at most `batch_tokens` (0: 4,096, on CUDA 65,536); equal rows are
    scored once.  A prompt too long loses its oldest tokens (not the first); still too long: NaN."""
    context, rows, last = min(getattr(model.config, x, None) or math.inf for x in CONTEXT), [], None
    for prompt, answer in zip(prompts, answers, strict=True):
        last, before = prompt, before if prompt == last else tuple(chat_ids(tokenizer, prompt))
        over = max(0, len(before) + len(answer) - context)
        rows.append((() if over >= len(before) else before[:1] + before[1 + over :], tuple(answer)))
    scores = {(x, y): np.full(0 if x else len(y), np.nan) for x, y in rows}  # NaN: does not fit
    most = batch_tokens or (65_536 if model.device.type == "cuda" else 4096)
    unique = sorted({row for row in rows if all(row)}, key=lambda row: (len(row[0] + row[1]), row))
    def score(part):
        xs, ys = zip(*(unique[i] for i in part))  # prompts, answers
        return grpo.token_logprobs(model, xs, *grpo.pad(ys, model.device)).double().cpu().numpy()
    for part, logp in two_at_a_time(model, score, batches([len(x + y) for x, y in unique], most)):
        if not np.isfinite(logp).all():
            raise FloatingPointError("log-probabilities are not finite (precision?)")
        scores.update((unique[i], values[: len(unique[i][1])]) for i, values in zip(part, logp))
    return [scores[row] for row in rows]


class LocalModel:
    """A text model from a transformers model and its tokenizer.  A prompt too long has no reply."""
    last_error, verdict_tokens = "", 1  # a yes or no is the first token of a reply
    def __init__(self, model, tokenizer, *, top_k=0, top_p=1.0, batch_tokens: int = 0):
        self.model, self.tokenizer = model, tokenizer
        self.context = min(getattr(model.config, x, None) or math.inf for x in CONTEXT)
        self.batch_tokens = batch_tokens or (131_072 if model.device.type == "cuda" else 16_384)
        self.stop_ids = find_stop_ids(model, tokenizer)
        self.sampling = {"top_k": top_k, "top_p": top_p, "stop_ids": self.stop_ids}

    def texts(self, ids: torch.Tensor, lengths: torch.Tensor):
        """ids [B, T], lengths [B] -> texts without their stop tokens, and whether each had one."""
        rows, stopped = without_stop(ids, lengths, self.stop_ids)
        return [self.tokenizer.decode(y, skip_special_tokens=True) for y in rows], stopped

    def complete(self, prompts: list, **settings) -> list:
        return [[reply.response for reply in group] for group in self.replies(prompts, **settings)]

    def sample(self, prompt_ids: list, n: int, *, max_new_tokens: int, seed=0, **settings):
        """`grpo.sample` in similar-length batches -> ids [P * n, T], lengths; 0: prompt too long"""
        sizes = [len(row) + max_new_tokens for row in prompt_ids]
        ids = torch.zeros(len(sizes), n, max_new_tokens, dtype=int, device=self.model.device)
        lengths, settings = ids.new_zeros(len(sizes), n), self.sampling | settings
        parts = list(enumerate(batches(sizes, self.batch_tokens, self.context, n)))  # batch, rows
        def answer(pair):
            noise = torch.Generator(ids.device).manual_seed((seed * 1_000_003 + pair[0]) % 2**63)
            return grpo.sample(self.model, [prompt_ids[i] for i in pair[1]], n, generator=noise,
                               max_new_tokens=max_new_tokens, **settings)
        for (_, part), (y, ends) in two_at_a_time(self.model, answer, parts):
            ids[part, :, : y.shape[1]], lengths[part] = y.view(len(part), n, -1), ends.view(-1, n)
        return ids.flatten(0, 1), lengths.flatten()

    def replies(self, prompts, *, n=1, **settings) -> list:
        """n answers to each of P prompts -> P lists of n Reply.  settings: those of `sample`."""
        y, ends = self.sample([chat_ids(self.tokenizer, x) for x in prompts], n, **settings)
        found = [Reply(*r) if r[2] else Reply() for r in zip(*self.texts(y, ends), ends.tolist())]
        return [found[i : i + n] for i in range(0, len(found), n)]

    def logprob(self, prompts: list, texts: list) -> torch.Tensor:
        """Mean log-probability of each text's tokens, without a stop token -> [B]; NaN if empty."""
        answers = plain_ids(self.tokenizer, texts)
        found = answer_logprobs(self.model, self.tokenizer, prompts, answers, self.batch_tokens)
        return torch.tensor([v.mean() if len(v) else torch.nan for v in found])


class Endpoint:
    """A text model on an OpenAI-compatible server (`openai` package); one request per answer."""
    def __init__(self, model: str, url: str, *, key=None, concurrency=8, timeout=180.0, retries=4):
        from openai import OpenAI
        self.model, self.name, self.concurrency = model, f"{model} at {url}", concurrency
        self.last_error, self.failures, self.newer = "", 0, False
        self.key = (key or "no-key").strip()  # else openai would send OPENAI_API_KEY to any server
        self.client = OpenAI(base_url=url, api_key=self.key, timeout=timeout, max_retries=retries)

    def complete(self, prompts, *, n=1, max_new_tokens: int, temperature=1.0, seed=0) -> list:
        each, pool = [p for p in prompts for _ in range(n)], ThreadPoolExecutor(self.concurrency)
        texts = [*pool.map(lambda prompt: self.ask(prompt, max_new_tokens, temperature), each)]
        return [texts[i : i + n] for i in range(0, len(texts), n)]

    def ask(self, prompt, max_new_tokens: int, temperature: float) -> str | None:
        """One answer.  ValueError: 401 or 404.  ConnectionError: the 32nd failure in a row."""
        send = {"max_tokens": max_new_tokens, "temperature": temperature}
        send = {"max_completion_tokens": max_new_tokens} if self.newer else send
        chat = {"model": self.model, "messages": messages_of(prompt), **send}
        try:
            said = self.client.chat.completions.create(**chat).choices[0].message.content or ""
            y, self.failures = "".join(x if type(x) is str else x.get("text", "") for x in said), 0
            return y[:1_000_000].encode(errors="replace").decode()
        except Exception as e:  # of the server, the network or a malformed answer
            status, code = getattr(e, "status_code", 0), str(getattr(e, "code", ""))
            error = f"{status or type(e).__name__}, {e.__cause__ or e}".replace(self.key, "***")
        if status in (401, 404):
            raise ValueError(f"{self.name} answers {status}: wrong key, model or URL")
        if "temperature" in send and (code.startswith("unsupported_") or "temperature" in error):
            self.newer = True  # newer OpenAI models, and some servers, accept neither
            return self.ask(prompt, max_new_tokens, temperature)
        self.last_error = f"{self.name}: {' '.join(error.split())[:250]}"
        self.failures = 0 if status in (400, 413, 422) else self.failures + 1  # 0: prompt's fault
        if self.failures >= 32:
            raise ConnectionError(f"no answer {self.failures} times in a row, {self.last_error}")
        return None


def text_model(what: str, name: str, device="", *, key=None, **settings):
    """A text model by its name: a folder, a hub name, or MODEL@URL.  Errors start with `what`."""
    if "@http" in name:
        model, _, url = name.rpartition("@http")
        if re.search(r"[?@]|//[^/\[]*:(?!\d+(/|$))", url):  # its last `:` is a port's
            raise ValueError(f"{what} {model}@...: a key does not go into the URL; a port: digits")
        return Endpoint(model, "http" + url, key=key)
    return LocalModel(*load(what, name, device), **settings)
