"""Data sets by name: downloaded by huggingface_hub from a hub on this machine, cached, read, drawn from; and what is said when they cannot be had."""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from plumbing import prompts

ROOT = Path(__file__).parent.parent
TOY = str(ROOT / "toy/cme/generator")
COMMIT = "0123456789abcdef" * 2 + "01234567"
LONG = "Sum up this report. " + "Sales rose and rose again. " * 60              # more than 512 of the toy's tokens, and more than its context

ALPACA = [{"instruction": f"Name {n} rivers.\nOne a line: “größer” \U0001f30a", "output": f"{n} rivers", "generator": "text_davinci_003", "dataset": "koala"}
          for n in (5, 3, 4)]
MATH = [{"problem": rf"Convert the point $(0,{n})$ to polar coordinates $(r,\theta).$", "solution": rf"We have $r = {n}.$ \boxed{{{a}}}", "answer": a,
         "subject": "Precalculus", "level": n, "unique_id": f"test/precalculus/{n}.json"}
        for n, a in enumerate([r"\left( 3, \frac{\pi}{2} \right)", "p - q", r"\frac{14}{3}", "42"], 1)]
HEALTH = [{"example_tags": ["theme:hedging"], "ideal_completions_data": None if n else {"ideal_completion": "Rest.", "ideal_completions_group": "Group 1"},
           "prompt": [{"role": role, "content": f"My knee hurts, {role}."} for role in (["user", "assistant", "user"] if n else ["user"])],
           "prompt_id": f"a-{n}", "rubrics": [{"criterion": "Advises rest", "points": 7, "tags": ["level:example"]},
                                             {"criterion": f"Names a drug {n}", "points": -8, "tags": []}], "canary": "healthbench:0000"} for n in range(20)]
ULTRA = {f"{source}.jsonl": [{"source": source, "instruction": f"{source}, question {n}\u2028?", "models": ["llama-2-7b-chat"], "completions": [
    {"model": "llama-2-7b-chat", "response": "Yes.\nNo.", "annotations": {"honesty": {"Rating": "5"}}}], "correct_answers": ["None"], "incorrect_answers": []}
    for n in range(4)] for source in ("evol_instruct", "false_qa", "flan", "sharegpt", "truthful_qa", "ultrachat")}
ULTRA["flan.jsonl"][1]["instruction"] = LONG
SETS = {"alpaca_eval": ("tatsu-lab/alpaca_eval", {"alpaca_eval.json": ALPACA}), "math500": ("HuggingFaceH4/MATH-500", {"test.jsonl": MATH}),
        "healthbench": ("openai/healthbench", {"2025-05-07-06-14-12_oss_eval.jsonl": HEALTH}), "ultrafeedback": ("openbmb/UltraFeedback", ULTRA)}
BOX = "\n\nPut your final answer in \\boxed{}."
HEALTH_HELD_OUT = [12, 13]                                                      # of twenty, by the fixed seed
SETS["healthbench-held-out"] = SETS["healthbench"]
FILES = {file: (repository, json.dumps(rows, indent=4) if file.endswith(".json") else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
         for repository, files in SETS.values() for file, rows in files.items()}
TROUBLES = {"missing": (404, "EntryNotFound", "Entry not found"), "failing": (503, "", "Come back later"), "forbidden": (403, "", "Not for you"),
            "gated": (401, "GatedRepo", "Access to this dataset is restricted. You must be authenticated."), "private": (401, "RepoNotFound", "Who are you?")}


class Handler(BaseHTTPRequestHandler):
    """What the hub says to HEAD and GET: first a redirect, of a .json to another of its own pages, of a .jsonl to another host; then the file."""

    def do_GET(self):
        file, hub = self.path.rpartition("/")[2], self.server
        repository, text = FILES.get(file, ("nothing", ""))
        if not self.path.startswith((f"/datasets/{repository}/resolve/main/", f"/cdn/{repository}/", f"/api/datasets/{repository}/{COMMIT}/")):
            return self.send_error(404)                                        # such as huggingface_hub's own matters
        hub.asked.append((self.command, file))
        trouble, status, body = hub.troubles.get(file), 200, text.encode()
        tag, size = f'"{hashlib.sha256(body).hexdigest()}"', len(body)
        headers = {"X-Repo-Commit": COMMIT, "ETag": tag, "X-HF-Warning": "login; You are sending unauthenticated requests", "X-Request-Id": "Root=1"}
        if trouble in TROUBLES:
            body, (status, headers["X-Error-Code"], headers["X-Error-Message"]) = b"", TROUBLES[trouble]
        elif trouble == "no hub":                                              # the page of a hotel's network
            body, headers = b"<html>Welcome</html>", {"Content-Type": "text/html"}
        elif "/resolve/main/" in self.path and file.endswith("l"):
            headers |= {"X-Linked-Size": size, "X-Linked-ETag": tag, "ETag": '"-"', "Location": f"http://localhost:{hub.server_port}/cdn/{repository}/{file}"}
            status, body = 302, b""
        elif "/resolve/main/" in self.path:
            status, body, headers["Location"] = 307, b"", f"/api/datasets/{repository}/{COMMIT}/{file}"
        self.send_response(status)
        for name, value in (headers | {"Content-Length": len(body)}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:len(body) // 2] if trouble == "cut" else body)

    do_HEAD, log_message = do_GET, lambda *_: None


class Hub(ThreadingHTTPServer):
    """A hub with FILES. `troubles`: by a file's name, what is wrong with it; `asked`: (method, file) of each request."""

    def __init__(self, port):
        super().__init__(("127.0.0.1", port), Handler)
        self.asked, self.troubles = [], {}
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


STARTER = """import json, os, runpy, sys, time, torch, traceback
import evaluate, huggingface_hub.file_download, train, transformers.hf_argparser, transformers.models.qwen2.modeling_qwen2
from plumbing import prompts
torch.set_num_threads(1)
for line in sys.stdin:
    if not os.fork():
        sys.argv, status = json.loads(line), 0
        for number in (1, 2):
            os.dup2(os.open(sys.argv.pop(0), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        time.sleep = lambda seconds: None                                      # huggingface_hub's pauses between attempts
        try:
            runpy.run_path(sys.argv[0], run_name="__main__") if sys.argv[0] else print(json.dumps(eval(sys.argv[1])))
        except BaseException as e:
            status = (e.code or 0) if isinstance(e, SystemExit) else traceback.print_exc() or 70
        sys.stdout.flush(), sys.stderr.flush(), os._exit(status)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """command(program, its arguments ...) or command("", an expression) -> (exit status, stdout, stderr). They are forked off one process that has
    imported everything, with the address of a hub, command.port, and the cache's folder, command.home, in its environment."""
    folder = tmp_path_factory.mktemp("commands")
    out, err, home = folder / "out", folder / "err", folder / "home"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as free:
        port = free.server_port
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost",
                    "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}

    def run(*arguments):
        process.stdin.write(json.dumps([str(a) for a in (out, err, *arguments)]) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline()), out.read_text(), err.read_text()
    run.port, run.home = port, home
    with subprocess.Popen([sys.executable, "-c", STARTER], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield run
        process.kill()


@pytest.fixture
def hub(command):
    """A running hub, of which nothing is cached."""
    shutil.rmtree(command.home, ignore_errors=True)
    server = Hub(command.port)
    yield server
    server.close()


def respond(name, folder, *more):
    return [*f"evaluate.py respond --models base={TOY} --max_new_tokens 8 --prompts".split(), name, "--output_dir", folder, *more]


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_read_and_then_cached(hub, command, name):
    """All its rows in order; again without a second download; again without the hub."""
    files = SETS[name][1]
    expected = [(row["problem"] + BOX if "problem" in row else row.get("instruction") or row["prompt"], row.get("answer"), row.get("rubrics", []), [], None)
                for rows in files.values() for row in rows]
    if name.startswith("healthbench"):
        expected = [row for i, row in enumerate(expected) if (i in HEALTH_HELD_OUT) == (name != "healthbench")]
    for downloaded, up in ((list(files), True), ([], True), ([], False)):
        hub.asked = [] if up else hub.close() or []
        status, out, err = command("", f"prompts.read_prompts({name!r})")
        assert status == 0 and [file for method, file in hub.asked if method == "GET"] == downloaded and bool(hub.asked) == up, err
        rows = json.loads(out)
        assert [tuple(row[k] for k in ("prompt", "answer", "rubrics", "facts", "pattern")) for row in rows] == expected
    assert rows[1]["where"].endswith("alpaca_eval.json: item 2" if name == "alpaca_eval" else f"{list(files)[0]}:{14 if 'held' in name else 2}")


def test_health_benchs_split(tmp_path, monkeypatch):
    """4,500 conversations to train on and 500 others, from everywhere in the file, in its order; the same ones each time."""
    path = tmp_path / "health.jsonl"
    path.write_text("".join(json.dumps(HEALTH[1] | {"prompt": f"{i}"}) + "\n" for i in range(5000)))
    monkeypatch.setattr(prompts, "hf_hub_download", lambda *_, **__: str(path))
    train, held_out = ([int(row["prompt"]) for row in prompts.read_prompts(name)] for name in ("healthbench", "healthbench-held-out"))
    assert (len(train), len(held_out)) == (4500, 500) and sorted(train + held_out) == list(range(5000))
    assert train == sorted(train) and held_out == sorted(held_out) and held_out[:5] == [0, 1, 9, 12, 19]
    assert all(20 < sum(a <= i < a + 500 for i in held_out) < 80 for a in range(0, 5000, 500))


@pytest.mark.parametrize("trouble, name, file, said", [
    ("missing", "ultrafeedback", "truthful_qa.jsonl", "404 Client Error. (Request ID: Root=1) Entry Not Found"),
    ("gated", "healthbench", "2025-05-07-06-14-12_oss_eval.jsonl", "gated"), ("private", "alpaca_eval", "alpaca_eval.json", "make sure you are authenticated"),
    ("forbidden", "math500", "test.jsonl", "403"), ("failing", "math500", "test.jsonl", "503"), ("no hub", "math500", "test.jsonl", "X-Repo-Commit"),
    ("cut", "ultrafeedback", "truthful_qa.jsonl", "closed connection"), ("gone", "math500", "test.jsonl", "refused")])
def test_a_data_set_that_cannot_be_had(hub, command, tmp_path, trouble, name, file, said):
    """One line names data set, repository and reason; nothing is left, and the same command goes through once the hub is well."""
    hub.troubles[file], folder = trouble, tmp_path / "new"
    hub.close() if trouble == "gone" else None
    for program, *arguments in (["train.py", "--prompts", name, "--output_dir", folder], respond(name, folder)):
        status, out, err = command(program, *arguments)
        assert status == 2 and len(err.splitlines()) == 1, err
        assert err.startswith(f"{program}: {name}: {SETS[name][0]} cannot be downloaded: ") and said in err and len(err) < 600
        assert not folder.exists()
    assert not list(command.home.rglob("*.incomplete")) and not list(command.home.rglob(f"snapshots/*/{file}"))
    hub.troubles.clear()
    well = Hub(command.port) if trouble == "gone" else hub
    status, out, err = command(*respond(name, folder))
    well.close()
    assert status == 0 and lines(folder / "models/base/responses.jsonl"), err


def slow_draw(texts, tokenizer, n, most_tokens):
    """The obvious way: all are shuffled and measured, the first n that fit -> the numbers of the drawn prompts."""
    order = random.Random(0).sample(range(len(texts)), len(texts))
    return [i for i in order if len(tokenizer(texts[i], add_special_tokens=False).input_ids) <= most_tokens][:n]


@pytest.mark.parametrize("n, most_tokens", [(5, 512), (5, 9), (1, 6), (1000, 9), (1000, 512), (4, 0)])
def test_draw(n, most_tokens):
    """Against the obvious way, and for what can be said of any draw: none twice, only what fits, as many as asked or all."""
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    texts = ["Tell me about " + "Ada " * (i % 7 + 1) + str(i) for i in range(40)]                          # of 6 to 13 tokens
    rows = [{"prompt": text if i % 2 else [{"role": "user", "content": text}]} for i, text in enumerate(texts)]
    got = [rows.index(row) for row in prompts.draw_prompts(rows, tokenizer, n, most_tokens)]
    fitting = {i for i, text in enumerate(texts) if len(tokenizer.tokenize(text)) <= most_tokens}
    assert got == slow_draw(texts, tokenizer, n, most_tokens) and set(got) <= fitting and len(set(got)) == len(got) == min(n, len(fitting))


def test_draw_is_fixed_and_fair(command):
    """Another process draws the same, from everywhere in the file; CME's number."""
    class Words:
        tokenize = staticmethod(str.split)
    rows = [{"prompt": str(i)} for i in range(6000)]
    got = [int(row["prompt"]) for row in prompts.draw_prompts(rows, Words)]
    assert len(set(got)) == len(got) == 5000 and all(380 < sum(a <= i < a + 500 for i in got) < 450 for a in range(0, 6000, 500))
    expression = f"[row['prompt'] for row in prompts.draw_prompts([{{'prompt': str(i)}} for i in range(6000)], __import__('transformers').AutoTokenizer.from_pretrained({TOY!r}))]"
    assert list(map(int, json.loads(command("", expression)[1]))) == got


def test_an_evaluation_by_name(hub, command, tmp_path):
    """Respond and report; the folder keeps its own prompts, so that it goes on when neither hub nor cache has them."""
    status, out, err = command(*respond("math500", tmp_path))
    assert status == 0, err
    assert [(prompts.question_text(row["prompt"]), row["answer"]) for row in lines(tmp_path / "prompts.jsonl")] == [
        (row["problem"] + BOX, row["answer"]) for row in MATH]
    hub.asked = hub.close() or shutil.rmtree(command.home) or []
    responses = tmp_path / "models/base/responses.jsonl"
    before = responses.read_text()
    responses.write_text(before[:before.index("\n") + 9])                      # killed within the second line
    status, out, err = command(*respond("math500", tmp_path))
    assert status == 0 and not hub.asked and responses.read_text() == before, err
    status, out, err = command("evaluate.py", "report", "--output_dir", tmp_path)
    assert status == 0 and "accuracy" in [row["measure"] for row in json.loads((tmp_path / "report.json").read_text())["means"]] and "accuracy" in out, err


def test_ultrafeedback_is_drawn(hub, command, tmp_path):
    """For training and for evaluations: only what has at most 512 of the model's tokens; the long prompt would not even fit the toy's context."""
    texts, tokenizer = [row["instruction"] for rows in ULTRA.values() for row in rows], AutoTokenizer.from_pretrained(TOY)
    assert len(tokenizer.tokenize(LONG)) > 512
    status, out, err = command(*"train.py --prompts ultrafeedback --steps 1 --prompts_per_step 2 --micro_batch 8 --max_new_tokens 8 --eval_every 0".split(),
                               "--output_dir", tmp_path / "run")
    assert status == 0 and len(lines(tmp_path / "run/metrics.jsonl")) == 2, err
    assert {row["prompt"] for row in lines(tmp_path / "run/samples.jsonl")} <= set(texts) - {LONG}
