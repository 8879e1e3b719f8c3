"""What someone copies out works alone: each script with only what stands below it beside it, and only the packages that it names."""
import doctest
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BARE = """
import sys, importlib.abc
class Only(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ImportError(f"{name} is not there")
FORBIDDEN = set(%r)
sys.meta_path.insert(0, Only())
"""
HEAVY = {"numpy", "torch", "transformers", "tokenizers", "huggingface_hub", "tqdm", "jinja2", "safetensors", "plumbing", "align", "grpo", "cme", "cat", "evaluate", "train"}

ALIGN = """
import align
assert align.align([-7.0, -2.0], [[0, 7], [7, 11]], [[0, 2], [2, 11]]).tolist() == [-2, -7]
assert align.visible("a b", [[0, 1], [1, 2], [2, 3]]).tolist() == [True, False, True]
class Backend:                                # of any tokenizer that can say how it spells its tokens
    class decoder:
        def __getstate__(): return b'{"type": "ByteLevel"}'
    def get_vocab_size(): return 2
    def get_added_tokens_decoder(): return {}
    def id_to_token(i): return ["a", "\\u0120b"][i]
Backend.model = Backend                       # no token was added
class tokenizer:
    backend_tokenizer, all_special_ids = Backend, []
text, spans = align.spans_from_ids(tokenizer, [0, 1])
assert text == "a b" and spans.tolist() == [[0, 1], [1, 3]]
class encoding:
    input_ids, offset_mapping = [0, 1], [(0, 1), (1, 3)]
class callable_tokenizer(tokenizer):
    def __new__(cls, text, **_): return encoding
ids, spans = align.spans_from_text(callable_tokenizer, "a b")
assert ids == [0, 1] and spans.tolist() == [[0, 1], [1, 3]]
"""
GRPO = """
from types import SimpleNamespace
import torch, grpo
ids, lengths = grpo.pad([[1, 2], [3]])
assert ids.tolist() == [[1, 2], [3, 0]] and grpo.response_mask(lengths, 2).tolist() == [[True, True], [True, False]]
mask = torch.tensor([[1, 1], [1, 1], [1, 0]]).bool()
A = grpo.position_advantages(torch.tensor([[-1., -2], [-3, -2], [-5, 0]]), mask, 3)
assert A[:, 0].round(decimals=3).tolist() == [1, 0, -1] and A[:, 1].tolist() == [0, 0, 0]
assert grpo.group_advantages(torch.tensor([1., 2, 3, float("nan")]), 4).round(decimals=3).tolist() == [-1, 0, 1, 0]
logp = torch.zeros(2, 2, requires_grad=True)
loss, _ = grpo.grpo_loss(logp, torch.zeros(2, 2), None, torch.tensor([0.5, -0.5]), grpo.response_mask(lengths, 2), beta=0.0)
loss.backward()
assert loss == 0 and logp.grad.tolist() == [[-0.125, -0.125], [0.25, 0]]
assert grpo.draw(torch.tensor([[0., 9, 0]]), temperature=0).tolist() == [1] == grpo.draw(torch.tensor([[0., 99, 0]]), top_k=2, top_p=.9).tolist()

class Tiny(torch.nn.Module):                  # the interface that grpo asks of a model: base_model, output embeddings, config, device
    class config:
        get_text_config, model_type = classmethod(lambda cls: cls), "tiny"
    device = torch.device("cpu")
    dtype = torch.float32
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False)
        self.base_model = Body(self.inner)
    def get_output_embeddings(self): return self.head
class Body(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, input_ids, past_key_values=None, **_):
        cache = past_key_values or Cache()
        cache.n += input_ids.shape[1]
        return SimpleNamespace(last_hidden_state=self.inner(input_ids), past_key_values=cache)
class Cache:                                  # of a model that looks at the last token only
    n, layers = 0, [None]
    def get_seq_length(self): return self.n
    def batch_select_indices(self, of): pass
model = Tiny()
ids, lengths = grpo.sample(model, [[1, 2], [3]], 2, max_new_tokens=5, stop_ids=[0], temperature=0)
logp, entropy = grpo.token_logprobs(model, [[1, 2], [1, 2], [3], [3]], ids, lengths, entropy=True)
table = model.head(model.inner.weight).log_softmax(-1)
before = torch.cat([torch.tensor([[2], [2], [3], [3]]), ids[:, :-1]], 1)
want = torch.where(grpo.response_mask(lengths, ids.shape[1]), table[before, ids], 0)
assert torch.allclose(logp, want, atol=1e-6) and (entropy >= 0).all()
"""
CME = """
import cme                                    # its core needs numpy: values, spans and a text, nothing else
rewards, mask = cme.aligned_rewards([-7.0, -2.0], [[0, 7], [7, 11]], "unhappiness", [[0, 2], [2, 11]])
assert rewards.tolist() == [-2, -7] and mask.all()
import numpy as np
values, mask = cme.word_credit(np.array([-1.0, -2, -3, -4]), "no red", np.array([[0, 2], [2, 3], [3, 5], [5, 6]], float))
assert values.tolist() == [-1, -9, -9, -9] and mask.all()
"""
CAT = """
import cat                                    # a text model is anything with complete(prompts, *, n, max_new_tokens, temperature, seed)
class Parrot:
    last_error = ""
    def complete(self, prompts, *, n=1, max_new_tokens, temperature=1.0, seed=0):
        return [["yes" if "criterion>" in p and "true of the answer" in p else "<rubric><criterion>It is 7.</criterion></rubric>" if "rubric" in p else
                 "\\\\boxed{7}"] * n for p in prompts]
model, rollouts = Parrot(), [["\\\\boxed{7}", "\\\\boxed{8}", "7"]]
references = cat.synthesize(["How many?"], rollouts, model, max_new_tokens=9)
assert cat.answer_rewards(rollouts, references).tolist() == [1, 0, 0] and cat.majority_vote(["How many?"], rollouts) == ["\\\\boxed{7}"]
rubrics = cat.propose_rubrics(["How many?"], references, model, max_new_tokens=9)
assert rubrics == [["It is 7."]] and cat.rubric_rewards(cat.judge_rubrics(rollouts, rubrics, model)).tolist() == [1, 1, 1]
"""


@pytest.mark.parametrize("name, beside, packages, code", [
    ("align", [], {"numpy"}, ALIGN), ("grpo", [], {"torch", "numpy", "tqdm"}, GRPO)])
def test_a_script_alone(tmp_path, name, beside, packages, code):
    """The file by itself in an empty folder; torch may import what it likes (numpy), the script nothing else."""
    for copied in [name, *beside]:
        (tmp_path / f"{copied}.py").write_text((ROOT / f"{copied}.py").read_text())
    alone(tmp_path, HEAVY - packages - {name, *beside}, code)


@pytest.mark.parametrize("name, beside, code", [("cme", ["align"], CME), ("cat", [], CAT)])
def test_the_core_without_models(tmp_path, name, beside, code):
    """cme's and cat's functions of values, spans and text models, with the functions about transformers' models left out of plumbing."""
    for copied in [name, *beside]:
        (tmp_path / f"{copied}.py").write_text((ROOT / f"{copied}.py").read_text())
    (tmp_path / "plumbing").mkdir()
    (tmp_path / "plumbing/models.py").write_text("answer_logprobs = end_of_turn = plain_ids = without_stop = None\n")
    (tmp_path / "plumbing/__init__.py").write_text("def one_line(text): return text\n")
    (tmp_path / "plumbing/prompts.py").write_text("def question_text(prompt): return prompt\n")
    alone(tmp_path, HEAVY - {name, *beside, "plumbing", "numpy", "torch", "tqdm"}, code)


def alone(folder, forbidden, code):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", BARE % sorted(forbidden) + code], cwd=folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]


def test_only_from_the_floors_below():
    """align, grpo < plumbing < cme, cat < evaluate < train; examples are shown when a script is run alone, and never imported."""
    floors = [{"align", "grpo"}, {"plumbing"}, {"cme", "cat"}, {"evaluate"}, {"train"}]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py")]:
        own = "plumbing" if path.parent.name == "plumbing" else path.stem
        below = set().union(*floors[:next(i for i, floor in enumerate(floors) if own in floor)])
        used = set(re.findall(r"(?m)^\s*(?:from|import) (align|grpo|plumbing|cme|cat|evaluate|train|toy|examples|tests)\b", path.read_text().partition("if __name__")[0]))
        assert used - {own if own == "plumbing" else ""} <= below, path


def test_nothing_happens_at_import(tmp_path):
    """No file, no thread count, no random state, no output."""
    code = """
import torch, random, numpy as np
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback  # what these do is theirs
before = torch.get_num_threads(), torch.get_rng_state().sum(), random.getstate()[1][:3], np.random.get_state()[1][:3].tolist()
import align, cat, cme, evaluate, grpo, train
assert before == (torch.get_num_threads(), torch.get_rng_state().sum(), random.getstate()[1][:3], np.random.get_state()[1][:3].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == "" and not list(tmp_path.iterdir()), done.stderr


@pytest.mark.parametrize("name", ["align", "cat", "grpo", "cme", "evaluate", "train", "plumbing.statistics", "plumbing.models", "plumbing.prompts", "plumbing.files", "plumbing.run"])
def test_worked_examples(name):
    """Every >>> in a docstring says what is printed."""
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0 and (found.attempted >= 2 or name not in ("align", "cat"))


def test_the_budget():
    """What is read: at most 2,250 lines, 400 a file, 100 columns, 60 lines a function."""
    import ast
    scripts = [*(ROOT / f"{name}.py" for name in "align grpo cme cat evaluate train".split()), *sorted((ROOT / "plumbing").glob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8").split("\n")[:-1] for path in scripts}
    assert sum(map(len, texts.values())) <= 2250 and max(map(len, texts.values())) <= 400 and max(len(line) for text in texts.values() for line in text) <= 100
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.FunctionDef) or node.end_lineno - node.lineno < 60, node.name
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split("\n")) - 1 <= 200
