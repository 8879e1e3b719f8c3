"""Faults and bad input: what goes wrong -> what the user sees -> what is kept. Judges and servers that fail: test_judges.py, test_endpoint.py."""
import contextlib
import json
import os
import resource
import shutil
import signal
import sys

import huggingface_hub
import pytest
import torch
from hypothesis import given, strategies as st

import cat
import evaluate
import grpo
import train
from plumbing import files, models
from test_endpoint import bad, serve  # noqa: F401
from test_train import ROOT, TINY, few, fork, rows, weights, whole  # noqa: F401


# ---------------------------------------------------------------- refused at once, in one line: nothing is written
def broken_generator(tmp_path):
    """The toy's generator without any stop token."""
    model, tokenizer = models.load_model("toy/cme/generator", train=False, device="cpu"), models.load_tokenizer("toy/cme/generator")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token, tokenizer.chat_template = None, None
    model.save_pretrained(tmp_path / "endless"), tokenizer.save_pretrained(tmp_path / "endless")
    return tmp_path / "endless"


BAD_FILES = {"broken.jsonl": '{"prompt": "a"}\n{"prompt": \n', "empty.txt": "\n\n", "noprompt.jsonl": '{"prompt": "a"}\n\n{"text": "b"}\n', "numbers.json": "[1]",
             "prompts.csv": "a,b\n", "roles.jsonl": '{"prompt": [{"content": "a"}]}\n', "blank.jsonl": '{"prompt": "  "}\n',
             "alpaca.jsonl": '{"instruction": "Translate.", "input": "", "output": "b"}\n{"instruction": "Translate.", "input": "Hi.", "output": "Salut."}\n',
             "pattern.jsonl": '{"prompt": "a", "pattern": "("}\n', "facts.jsonl": '{"prompt": "a", "facts": [{"right": "x"}]}\n',
             "object.json": '{"prompts": ["a"]}', "surrogate.jsonl": '{"prompt": "\\ud800"}', 
             "long.txt": "short\n" + "long " * 300, "latin.txt": b"caf\xe9", "deep.jsonl": '{"prompt": ' + "[" * 200_000 + "\n",
             "role.jsonl": '{"prompt": [{"role": 5, "content": "a"}]}\n', "nan.jsonl": '{"prompt": "a", "rubrics": [{"criterion": "b", "points": NaN}]}\n',
             "nofact.jsonl": json.dumps({"prompt": "a", "facts": [{"right": "b", "wrong": [""]}]}) + "\n",
             "output.jsonl": json.dumps({"prompt": "a", "output": "word " * 900}) + "\n"}


@pytest.mark.parametrize("arguments, said", [
    (["--nonsense", 1], "nonsense"), (["--step", 3], "--step"), (["--lr", "fast"], "--lr"), (["--group_size", 1], "--group_size"),
    (["--top_p", 0], "--top_p"), (["--micro_batch", 0], "--micro_batch"), (["--steps", -1], "--steps"), (["--top_p", 1.5], "--top_p"), (["--temperature", 0], "--temperature"), (["--temperature", "nan"], "--temperature"), (["--top_k", -1], "--top_k"), (["--beta", "nan"], "--beta nan"), (["--clip_high", -1], "--clip_high -1"), (["--max_grad_norm", "nan"], "--max_grad_norm"),
    (["--max_grad_norm", -1], "--max_grad_norm"), (["--min_std", -0.1], "--min_std"), (["--lr", "inf"], "--lr inf"), (["--seed", 10**20], "--seed"), (["--lora_rank", -1], "--lora_rank"), (["--output_dir", "latin.txt"], "Not a directory"), (["--reward", "accuracy"], "--reward"),
    (["--device", "abacus"], "abacus"), (["--resume", "--output_dir", "TMP/nothing"], "no run to resume"), (["--prompts", "TMP/nothing.jsonl"], "nothing.jsonl"),
    (["--prompts", "TMP"], ".jsonl"), (["--generator", "TMP/nothing"], "--generator"), (["--verifier", "TMP"], "--verifier"),
    (["--generator", "nobody/nothing"], "nobody/nothing"), (["--verifier", "torn"], "torn"),
    (["--output_dir", "TMP/out/run"], "Not a directory"), (["--prompts", "surrogate.jsonl"], "surrogate.jsonl:1"), 
    (["--generator", "endless"], "stop token"), (["--output_dir", "used"], "in use"),
    (["--prompts", "broken.jsonl"], "broken.jsonl:2"), (["--prompts", "empty.txt"], "no prompts"), (["--prompts", "noprompt.jsonl"], "noprompt.jsonl:3"),
    (["--prompts", "numbers.json"], "item 1"), (["--prompts", "prompts.csv"], ".jsonl, .json or .txt"), (["--prompts", "roles.jsonl"], "roles.jsonl:1"),
    (["--prompts", "blank.jsonl"], "empty"), (["--eval_prompts", "pattern.jsonl"], "pattern.jsonl:1"), (["--eval_prompts", "facts.jsonl"], "facts.jsonl:1"), (["--eval_prompts", "nofact.jsonl"], "nofact.jsonl:1"),
    (["--prompts", "object.json"], "item 1"), (["--prompts", "long.txt"], "long.txt:2"), (["--prompts", "latin.txt"], "UTF-8"),
    (["--prompts", "deep.jsonl"], "deep.jsonl:1"), (["--prompts", "role.jsonl"], "role.jsonl:1"), (["--prompts", "alpaca.jsonl"], "alpaca.jsonl:2: `input` is not read"), (["--eval_prompts", "nan.jsonl"], "nan.jsonl:1"),
    (["--reward", "cat-sft", "--prompts", "output.jsonl"], "output.jsonl:1: leave it out")])
def test_bad_input_gets_one_line_and_status_2(tmp_path, arguments, said):
    bad = {name: tmp_path / name for name in BAD_FILES}
    for argument in arguments:
        if argument in bad:
            content = BAD_FILES[argument]
            bad[argument].write_bytes(content if isinstance(content, bytes) else content.encode())
        if argument == "endless":
            bad["endless"] = broken_generator(tmp_path)
        if argument == "torn":
            bad["torn"] = shutil.copytree(ROOT / "toy/cme/verifier", tmp_path / "torn")
            (bad["torn"] / "model.safetensors").write_bytes((bad["torn"] / "model.safetensors").read_bytes()[:1000])
        if argument == "used":
            bad["used"] = tmp_path / "used"
            bad["used"].mkdir()
            (bad["used"] / "thesis.txt").write_text("precious")
    given = [bad.get(a, str(a).replace("TMP", str(tmp_path))) for a in arguments]
    if "--output_dir" not in given:
        given += ["--output_dir", tmp_path / "run"]
    (tmp_path / "out").touch(), (tmp_path / "err").touch()
    before = {p for p in tmp_path.rglob("*")}
    status, out, err = fork([*given], tmp_path, lambda: setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
    assert status == 2, err
    lines = [line for line in err.splitlines() if "is empty: the toy's" not in line]
    if lines[0].startswith("usage: "):                                         # argparse's own words
        lines = lines[-1:]
    assert len(lines) == 1 and lines[0].startswith("train.py: ") and said in lines[0] and len(lines[0]) < 700
    assert {p for p in tmp_path.rglob("*")} == before


def changed(tmp_path, name, change=lambda model, tokenizer: None):
    """A copy of the toy's generator that something is wrong with."""
    model, tokenizer = models.load_model("toy/cme/generator", train=False, device="cpu"), models.load_tokenizer("toy/cme/generator")
    change(model, tokenizer)
    model.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / name


def without_weights(tmp_path):
    path = changed(tmp_path, "empty")
    (path / "model.safetensors").unlink()
    return path


def not_a_number(tmp_path):
    return changed(tmp_path, "nan", lambda model, _: model.model.layers[0].mlp.down_proj.weight.data.fill_(torch.nan))


def more_tokens_than_embeddings(tmp_path):
    return changed(tmp_path, "more", lambda _, tokenizer: tokenizer.add_tokens([" Rosa", " Mia", " Ben", " Ana", "Tell", "Describe"]))


def without_padding(tmp_path):
    def change(model, tokenizer):
        tokenizer.pad_token = model.config.pad_token_id = model.generation_config.pad_token_id = None
    return changed(tmp_path, "nopad", change)


def without_template(tmp_path):
    return changed(tmp_path, "plain", lambda _, tokenizer: setattr(tokenizer, "chat_template", None))


def short_context(tmp_path, tokens=30):
    return changed(tmp_path, "short", lambda model, _: setattr(model.config, "max_position_embeddings", tokens))


def context_for_the_response(tmp_path):
    """The prompt loses its oldest tokens."""
    return short_context(tmp_path, 35)


@pytest.mark.parametrize("option, model, status, said", [
    ("--generator", without_weights, 2, "--generator"), ("--verifier", without_weights, 2, "--verifier"),
    ("--generator", not_a_number, 1, "not finite"), ("--verifier", not_a_number, 1, "not finite"),
    ("--generator", more_tokens_than_embeddings, 2, "tokens"),
    ("--generator", short_context, 2, "prompts.jsonl:1"),
    ("--verifier", context_for_the_response, 0, ""), ("--generator", without_padding, 0, ""), ("--generator", without_template, 0, "")])
def test_models_and_tokenizers(tmp_path, few, option, model, status, said):  # noqa: F811
    """Refused in one line or, where nothing is missing that is needed, used."""
    verifier = ["--verifier", ROOT / "toy/cme/verifier"]
    got, out, err = fork([*TINY, *few, *verifier, "--steps", 1, "--output_dir", tmp_path / "run", option, model(tmp_path)], tmp_path)
    assert got == status and "Traceback" not in err and said in err, err
    assert status == 0 or err.strip().splitlines()[-1].startswith("train.py: ")


MISREAD = {"Lfm2": (dict(layer_types=["conv", "full_attention"]), "batch_select_indices"),       # a cache that rows cannot leave; or can, and its convolutions not
           "FalconH1": (dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16), "Sizes of tensors"),
           "Bart": (dict(d_model=32, encoder_layers=2, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=32), "misread"),      # counts padding as places
           "Gemma3Text": (dict(head_dim=16, use_bidirectional_attention=True), "misread")}                                        # looks ahead


@pytest.mark.parametrize("kind", [*MISREAD, "Llama"])
def test_a_model_that_would_be_misread_is_refused_at_loading(kind, tmp_path):
    """In one line, by scoring a padded row of a batch from which rows leave; a plain one is not refused."""
    import transformers
    special, said = MISREAD.get(kind, ({}, ""))
    config = getattr(transformers, f"{kind}Config")(**dict(vocab_size=688, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                                           num_key_value_heads=1, max_position_embeddings=64) | special)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weights in model.parameters():
            weights.normal_(0, 0.3) if weights.dim() == 2 else None
    model.save_pretrained(tmp_path / "model")
    models.load_tokenizer(f"{ROOT}/toy/cme/generator").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"--generator .*model: no model.*{said}") if said else contextlib.nullcontext():
        models.load("--generator", str(tmp_path / "model"), "cpu")


@pytest.mark.parametrize("text", [
    "\ufeff" + '{"prompt": "Tell me about Mia."}\n', '{"prompt": "Tell me about Mia."}\r\n\r\n{"prompt": "Describe Rosa."}\r\n',
    '\n\n{"prompt": "Tell me about Mia."}\n   \n', '{"prompt": "Tell me about Mia."}'], ids=["BOM", "CRLF", "empty lines", "no newline at the end"])
def test_prompt_files_as_other_programs_write_them(tmp_path, text):
    from plumbing.prompts import read_prompts
    (tmp_path / "p.jsonl").write_bytes(text.encode())
    assert read_prompts(str(tmp_path / "p.jsonl"))[0]["prompt"] == "Tell me about Mia."


def test_a_large_prompt_file(tmp_path):
    """100 MB: read within seconds, and the wrong line is named."""
    from plumbing.prompts import read_prompts
    line = '{"prompt": "' + "word " * 2000 + '"}\n'
    (tmp_path / "large.jsonl").write_text(line * 10_000 + "{}\n")
    with pytest.raises(ValueError, match="large.jsonl:10001: needs a `prompt`"):
        read_prompts(str(tmp_path / "large.jsonl"))


# ---------------------------------------------------------------- the end of a run
def test_a_run_of_a_moment(tmp_path):
    """Its seconds are no divisor; --watch_verifier may come with --resume; a terminal may be ASCII only."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "Describe Zoë — 日本."}\n')
    models_ = ["--generator", f"{ROOT}/toy/cme/generator", "--verifier", f"{ROOT}/toy/cme/verifier", "--prompts", tmp_path / "p.jsonl", "--lr", 1e-3, "--warmup_steps", 0]
    arguments = [*models_, "--steps", 1, "--group_size", 2, "--prompts_per_step", 1, "--max_new_tokens", 2, "--eval_prompts", tmp_path / "p.jsonl"]
    ascii_only = lambda: setattr(sys, "stdout", open(1, "w", closefd=False, encoding="ascii"))                # noqa: E731
    status, out, err = fork([*arguments, "--output_dir", tmp_path / "run0"], tmp_path, ascii_only)
    assert status == 0 and "1 steps in" in out and "Describe Zo?" in out, err
    status, out, err = fork(["--resume", "--steps", 2, "--watch_verifier", f"{ROOT}/toy/cme/verifier", "--output_dir", tmp_path / "run0"], tmp_path)
    assert status == 0 and "2 steps in" in out, err
    mute = changed(tmp_path, "mute", lambda model, _: setattr(model.generation_config, "eos_token_id", [*range(model.config.vocab_size)]))   # every answer is empty
    status, out, err = fork([*arguments, "--reward", "rent", "--generator", mute, "--watch_verifier", f"{ROOT}/toy/cme/verifier", "--output_dir", tmp_path / "mute_run"], tmp_path)
    assert status == 0 and "watch -" in out, err


def test_two_runs_in_one_folder(tmp_path, few):  # noqa: F811
    """The second, which saw the folder empty, does not write into what the first has begun."""
    run, real = tmp_path / "run", train.begin

    def patch():
        def begin(*arguments):
            run.mkdir()
            (run / "metrics.jsonl").write_text('{"step": 0}\n')
            return real(*arguments)
        train.begin = begin
    status, _, err = fork([*TINY, *few, "--output_dir", run], tmp_path, patch)
    assert status == 2 and "taken by another run" in err and [p.name for p in run.iterdir()] == ["metrics.jsonl"]


# ---------------------------------------------------------------- a run that is disturbed: what was done is kept
def full_disk():
    """No file may grow beyond a megabyte, which a checkpoint would."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


def out_of_memory():
    def loss(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB")
    grpo.grpo_loss = loss


def interrupted(times):
    """Ctrl-C, once or twice, in the third update."""
    def patch():
        real, calls = train.update, []

        def update(*args):
            calls.append(0)
            for _ in range(times if len(calls) == 3 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args)
        train.update = update
    return patch


@pytest.mark.parametrize("fault, status, said, kept", [
    (full_disk, 2, "checkpoint-000002.tmp cannot be written: ", []),
    (out_of_memory, 1, "; lower --batch_tokens (or --micro_batch) (", []),
    (interrupted(1), 130, "stopped; ", ["checkpoint-000002", "checkpoint-000003"]),
    (interrupted(2), 130, "stopped; ", ["checkpoint-000002"])],
    ids=["disk full", "out of memory", "Ctrl-C: the step ends in a checkpoint", "Ctrl-C twice: at once"])
def test_a_disturbed_run_goes_on(tmp_path, whole, few, fault, status, said, kept):  # noqa: F811
    """One line, an exit status; then --resume, and to the bit what an undisturbed run is."""
    run = tmp_path / "run"
    got, _, err = fork([*TINY, *few, "--output_dir", run], tmp_path, fault)
    assert got == status and "Traceback" not in err and err.strip().splitlines()[-1].startswith("train.py: ") and said in err, err
    assert [os.path.basename(path) for path in files.checkpoints(str(run))] == kept
    assert ("this step ends in a checkpoint" in err) == (status == 130)
    got, _, err = fork(["--resume", "--output_dir", run], tmp_path)
    assert got == 0, err
    assert weights(run) == weights(whole[0]) and rows(run / "metrics.jsonl") == rows(whole[0] / "metrics.jsonl")


def cut_off(file):
    return lambda checkpoint: (checkpoint / file).write_bytes((checkpoint / file).read_bytes()[:5000])


@pytest.mark.parametrize("damage", [cut_off("model.safetensors"), cut_off("state.pt"), lambda c: (c / "state.pt").write_text("not a checkpoint"),
                                    lambda c: (c / "state.pt").unlink(), lambda c: (c / "config.json").write_text("{")],
                         ids=["weights cut off", "state cut off", "state overwritten", "state gone", "config broken"])
def test_a_broken_checkpoint_and_the_one_before(tmp_path, whole, damage):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    (run / "summary.json").unlink()
    damage(run / "checkpoint-000006")
    status, _, err = fork(["--resume", "--output_dir", run], tmp_path)
    assert status == 0 and "checkpoint-000006 cannot be read: " in err and "trying the one before" in err and "Traceback" not in err, err
    assert weights(run) == weights(whole[0]) and rows(run / "metrics.jsonl") == rows(whole[0] / "metrics.jsonl")
    damage(run / "checkpoint-000006"), damage(run / "checkpoint-000004")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, err = fork(["--resume", "--output_dir", run], tmp_path)
    assert status == 2 and "checkpoint-000004 cannot be read: " in err.strip().splitlines()[-1]
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [lambda p: p.unlink(), lambda p: p.write_text("".join(p.read_text().splitlines(True)[:-1])),
                                    lambda p: p.write_text("".join(p.read_text().splitlines(True)[1:]))], ids=["gone", "cut", "begun later"])
def test_a_log_that_its_user_changed(tmp_path, whole, damage):  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    damage(run / "metrics.jsonl")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    status, _, err = fork(["--resume", "--output_dir", run, "--steps", 8], tmp_path)
    assert status == 2 and "metrics.jsonl lacks steps up to 6: restore it" in err.strip().splitlines()[-1], err
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("where", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_written(tmp_path, few, where):  # noqa: F811
    status, _, err = fork([*TINY, *few, "--output_dir", where], tmp_path)
    assert status == 2 and err.strip().splitlines()[-1].startswith("train.py: ") and where.split("/")[1] in err and "Traceback" not in err


# ---------------------------------------------------------------- what models write
@given(st.text(), st.sampled_from(["yes", "no", '{"verdict": "A", "reason": "x"}', "<think>yes</think>", "```json", "NaN", "[" * 3000]))
def test_verdicts_are_read_or_missing(noise, said):
    """Nothing that a judge may write ends the run, and only what was asked for counts."""
    for text in (noise, said, noise + said, said + noise, noise + said + noise):
        assert cat.read_verdict(text) in (True, False, None)
        found = evaluate.read_preference(text)
        assert found is None or (set(found) == {"verdict", "reason"} and found["verdict"] in ("A", "B", "tie"))
    assert cat.read_verdict("x" + said) is None and evaluate.read_preference("x" + said) is None


def test_weights_are_never_pickles(tmp_path, few):  # noqa: F811
    """A model saved as a pickle by someone else: refused or loaded without running what is in it; a run's state is loaded with weights_only."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run-by-the-pickle"),)
    path = changed(tmp_path, "pickled")
    (path / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Evil()}, path / "pytorch_model.bin")
    status, _, err = fork([*TINY, *few, "--generator", path, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 2 and "--generator" in err and not (tmp_path / "run-by-the-pickle").exists()
    for script in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        text = script.read_text()
        if "tests" not in script.parts:
            assert text.count("torch.load(") == text.count("weights_only=True") and "pickle" not in text, script


def test_a_judge_that_dies_midway(tmp_path, serve, monkeypatch):  # noqa: F811
    """The run ends in one line once 32 questions in a row had no answer, with what was done before; a new judge goes on. The key is in no file."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    server = serve(lambda number, body: ("yes" if number % 3 else "no") if number < 90 else bad(500))
    arguments = ["--reward", "cat", "--steps", 4, "--prompts_per_step", 2, "--group_size", 4, "--max_new_tokens", 40, "--save_every", 1, "--eval_every", 0,
                 "--output_dir", tmp_path / "run", "--judge", f"m@{server.url}"]
    status, _, err = fork(arguments, tmp_path)
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("train.py: no answer ") and " times in a row, m at http" in last and "Traceback" not in err, err
    done = files.checkpoints(str(tmp_path / "run"))
    assert 1 <= len(done) <= 2
    fine = serve(lambda number, body: "yes" if number % 3 else "no")
    status, _, err = fork(["--resume", "--output_dir", tmp_path / "run", "--judge", f"m@{fine.url}"], tmp_path)
    assert status == 0 and files.read_json(f"{tmp_path}/run/summary.json")["steps"] == 4, err
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert b"sk-very-secret" not in path.read_bytes(), path


def test_a_run_without_any_reward_ends_at_once(tmp_path, few):
    """A verifier that has no room for one response: said in the first step, not a run that learns nothing to its end."""
    path = changed(tmp_path, "small", lambda model, _: setattr(model.config, "max_position_embeddings", 12))
    status, out, err = fork([*TINY, *few, "--verifier", path, "--output_dir", tmp_path / "run"], tmp_path)
    assert status == 2 and "no reward in the first step" in err.splitlines()[-1] and "Traceback" not in err, err
    assert "reward nan" in out                                                 # what the model wrote is shown


def test_a_model_and_prompts_of_ones_own_are_not_scored_by_the_toys_verifier(tmp_path):
    own = ["--generator", f"{ROOT}/toy/cme/generator", "--prompts", f"{ROOT}/toy/cme/prompts.jsonl", "--lr", 1e-3, "--steps", 1]
    for reward in ("cme", "cme-sequence", "reverse-kl"):
        status, _, err = fork([*own, "--reward", reward, "--output_dir", tmp_path / "run"], tmp_path)
        assert status == 2 and "--verifier (give one): no model" in err and not (tmp_path / "run").exists(), err
