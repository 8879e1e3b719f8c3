"""Endpoint against a server that fails on purpose, and against a real one."""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import openai._base_client
import pytest

from plumbing.models import Endpoint, text_model


# ---------------------------------------------------------------- a server that fails on purpose

class Server(ThreadingHTTPServer):
    """Does to each request what `script` says: a function of (number of the request, its body), or a list of which the last entry repeats.

    An entry is a text (a proper answer), or a dict: status, headers, body (bytes), delay (seconds before anything), length (a false
    Content-Length), drip (seconds between single bytes).
    """
    daemon_threads = True
    request_queue_size = 100

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = script, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):                                                # clients that went away
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            number, script = len(self.server.requests), self.server.script
            self.server.requests.append((self.path, dict(self.headers.items()), body, time.monotonic()))
        act = script(number, body) if callable(script) else script[min(number, len(script) - 1)]
        act = {"body": answer(act)} if isinstance(act, str) else act
        content = act.get("body", b"")
        time.sleep(act.get("delay", 0))
        self.send_response(act.get("status", 200))
        for name, value in act.get("headers", {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(act.get("length", len(content))))
        self.end_headers()
        for part in [content] if "drip" not in act else [content[i:i + 1] for i in range(len(content))]:
            time.sleep(act.get("drip", 0))
            self.wfile.write(part)
        self.close_connection = True

    do_GET = do_POST

    def log_message(self, *_):
        pass


def answer(text) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}).encode()


@pytest.fixture
def serve(monkeypatch):
    """serve(script) -> a running Server; the openai package hardly pauses between attempts."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def endpoint(server, **settings):
    return Endpoint("org/m", server if isinstance(server, str) else server.url, **{"timeout": 5.0, "retries": 2} | settings)


def one(e):
    """The one answer to one prompt."""
    [[text]] = e.complete(["Hi"], max_new_tokens=5, temperature=0)
    return text


def bad(status, **more):
    return {"status": status, "body": json.dumps({"error": {"message": f"that was {status}"}}).encode()} | more


# ---------------------------------------------------------------- what is sent

def test_request(serve):
    server = serve(["Hello."])
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 你好"}]
    e = endpoint(server, key="sk-secret")
    assert e.complete(["Hi", messages], max_new_tokens=7, temperature=0.5) == [["Hello."], ["Hello."]]
    bodies = sorted((body for _, _, body, _ in server.requests), key=lambda b: len(b["messages"]))
    assert bodies == [{"model": "org/m", "messages": m, "max_tokens": 7, "temperature": 0.5}
                      for m in ([{"role": "user", "content": "Hi"}], messages)]
    path, headers, _, _ = server.requests[0]
    assert path == "/v1/chat/completions" and {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer sk-secret"
    assert e.last_error == ""


def test_temperature_zero_is_sent(serve):
    server = serve(["Hello."])
    assert one(endpoint(server)) == "Hello." and server.requests[0][2]["temperature"] == 0


@pytest.mark.parametrize("key", [None, ""])
@pytest.mark.parametrize("saved", ["environment", "file"])
def test_saved_token_stays_home(serve, monkeypatch, tmp_path, saved, key):
    """Neither the user's Hugging Face token nor a key for OpenAI goes to another server."""
    (tmp_path / "token").write_text("hf_saved")
    monkeypatch.setenv("HF_TOKEN", "hf_saved")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-openai")
    if saved == "file":
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert huggingface_hub.get_token() == "hf_saved"
    server = serve(["Hello."])
    assert one(endpoint(server, key=key)) == "Hello."
    assert "hf_saved" not in str(server.requests) and "sk-openai" not in str(server.requests)


def test_redirect_to_another_host_loses_the_key(serve):
    other = serve(["Hello."])
    server = serve([{"status": 307, "headers": {"location": f"{other.url}/chat/completions"}}])
    assert one(endpoint(server, key="sk-secret")) == "Hello."
    assert "sk-secret" in str(server.requests) and "sk-secret" not in str(other.requests)


def test_order_and_number_under_concurrency(serve):
    """Answers come back in the order of the prompts, whichever is ready first, each from a request of its own, at most 8 at a time."""
    running, most, lock = [0], [0], threading.Lock()

    def script(number, body):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.005 * (number * 7 % 10))
        with lock:
            running[0] -= 1
        return f"{body['messages'][0]['content']}!"

    server = serve(script)
    prompts = [f"prompt {i}" for i in range(12)]
    assert endpoint(server).complete(prompts, n=3, max_new_tokens=5, temperature=1) == [[f"{p}!"] * 3 for p in prompts]
    assert len(server.requests) == 36 and 2 <= most[0] <= 8
    assert endpoint(server).complete([], max_new_tokens=5, temperature=1) == []


# ---------------------------------------------------------------- what goes wrong

NOT_ANSWERS = {
    "429": bad(429), "408": bad(408), "409": bad(409), "500": bad(500), "503": bad(503, body=b"<html>busy</html>"), "502": bad(502, body=b'["a list"]'),
    "APIConnectionError": {"body": answer("Hello, this is")[:40], "length": 400}}


def test_an_answer_in_parts(serve):
    """Mistral's: a thought, then a text."""
    server = serve([{"body": answer([{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Yes"}, {"type": "text", "text": "."}])}])
    assert one(endpoint(server)) == "Yes."


def test_the_reason_of_what_was_lost_is_kept(serve):
    """A prompt that is refused, then one that is answered: why the first has no answer can still be told."""
    e = endpoint(serve([bad(400, body=json.dumps({"error": {"message": "content policy"}}).encode()), "Hello."]), retries=0, concurrency=1)
    assert e.complete(["a", "b"], max_new_tokens=5, temperature=0) == [[None], ["Hello."]] and "content policy" in e.last_error


@pytest.mark.parametrize("reason", NOT_ANSWERS)
def test_tried_again_and_then_none(serve, reason):
    """1 + retries attempts, then None and why; and an answer after two failures is an answer."""
    server = serve([NOT_ANSWERS[reason]])
    e = endpoint(server)
    assert one(e) is None and len(server.requests) == 3
    assert e.last_error.startswith(f"org/m at {server.url}: {reason}, ") and "\n" not in e.last_error
    server = serve([NOT_ANSWERS[reason], NOT_ANSWERS[reason], "At last."])
    e = endpoint(server)
    assert one(e) == "At last." and len(server.requests) == 3 and e.last_error == ""


@pytest.mark.parametrize("body", [
    b"", b"null", b"[]", b"3", b'"text"', b"\xff\xfe", b'{"choices": []}', b'{"choices": null}', b'{"error": "overloaded"}', b'{"choices": [3]}',
    b'{"choices": [{}]}', b'{"choices": [{"message": "text"}]}', b'{"choices": [{"message": []}]}',
    b"[" * 100_000, answer(3), answer([3]), answer([{"type": "text", "text": 3}])])
@pytest.mark.parametrize("kind", ["application/json", "text/html"])
def test_unreadable(serve, body, kind):
    e = endpoint(serve([{"body": body, "headers": {"content-type": kind}}]))
    assert one(e) is None and e.last_error.startswith("org/m at http")


def test_empty_text_is_an_answer(serve):
    assert one(endpoint(serve([""]))) == "" == one(endpoint(serve([{"body": answer(None)}])))  # None: a thought that took all tokens


def test_a_server_that_is_gone_ends_it(serve):
    """After 32 failures in a row; what is one prompt's own does not count."""
    server = serve(lambda n, _: bad(400) if n == 7 else bad(402))
    with pytest.raises(ConnectionError, match="no answer 32 times in a row, org/m at .*402"):
        endpoint(server, concurrency=1).complete(["Hi"] * 200, max_new_tokens=5, temperature=0)
    assert 40 <= len(server.requests) <= 41  # the 8th had its own trouble; one more may have been on its way
    server = serve([bad(400)])
    assert endpoint(server).complete(["Hi"] * 60, max_new_tokens=5, temperature=0) == [[None]] * 60


def test_bounded_and_writable_text(serve):
    assert one(endpoint(serve(["x" * 1_000_009]))) == "x" * 1_000_000
    assert one(endpoint(serve(["half \ud83d"]))) == "half ?"


@pytest.mark.parametrize("status", [400, 402, 403, 413, 422])
def test_refused_at_once(serve, status):
    server = serve([bad(status)])
    e = endpoint(server)
    assert one(e) is None and len(server.requests) == 1
    assert e.last_error.startswith(f"org/m at {server.url}: {status}, ") and f"that was {status}" in e.last_error


@pytest.mark.parametrize("body", [b'{"error": "no"}', b'[{"error": "a list"}]', b"no"])
@pytest.mark.parametrize("status", [401, 404])
def test_users_mistakes(serve, status, body):
    server = serve([bad(status, body=body)])
    e = endpoint(server, key="sk-secret")
    with pytest.raises(ValueError) as error:
        one(e)
    assert str(error.value) == f"org/m at {server.url} answers {status}: wrong key, model or URL" and len(server.requests) == 1


def test_users_mistake_ends_the_other_requests(serve):
    server = serve(lambda _, body: bad(401) if body["messages"][0]["content"] == "first" else {"delay": 5, "body": b""})
    e, start = endpoint(server, concurrency=4), time.monotonic()
    with pytest.raises(ValueError, match="401"):
        e.complete(["first"] + ["Hi"] * 50, max_new_tokens=5, temperature=0)
    assert time.monotonic() - start < 3
    time.sleep(0.2)                                                            # for threads that went on
    assert len(server.requests) <= 6                        # one or two more may have been on their way


def test_retry_after(serve):
    server = serve([bad(429, headers={"retry-after": "0.4"}), "Hello."])
    assert one(endpoint(server)) == "Hello." and 0.4 <= server.requests[1][3] - server.requests[0][3] < 2


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon", "0"])
def test_retry_after_that_says_nothing(serve, value):
    server = serve([bad(429, headers={"retry-after": value}), "Hello."])
    assert one(endpoint(server)) == "Hello." and server.requests[1][3] - server.requests[0][3] < 2


def test_parameters_that_a_model_does_not_take(serve):
    """OpenAI's newer models want max_completion_tokens and their own temperature, and say so by a code: asked again so, once, and from then on."""
    def script(number, body):
        for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
            if name in body:
                return bad(400, body=json.dumps({"error": {"message": f"'{name}' is not supported with this model.", "param": name, "code": code}}).encode())
        return "Hello."

    server = serve(script)
    e = endpoint(server, retries=0, concurrency=1)
    assert e.complete(["Hi", "Hi"], max_new_tokens=7, temperature=0) == [["Hello."]] * 2 and e.last_error == "" and e.newer
    assert len(server.requests) == 3 and server.requests[-1][2]["max_completion_tokens"] == 7 and "temperature" not in server.requests[-1][2]
    e = endpoint(server, retries=0)                                            # eight at a time find out together
    assert e.complete(["Hi"] * 40, max_new_tokens=7, temperature=0) == [["Hello."]] * 40 and e.last_error == ""
    refused = bad(400, body=json.dumps({"error": {"message": "`temperature` is deprecated for this model.", "type": "invalid_request_error"}}).encode())
    assert one(endpoint(serve(lambda number, body: refused if "temperature" in body else "Hello."), retries=0)) == "Hello."   # no code, only words
    server = serve([bad(400, body=json.dumps({"error": {"message": "no", "code": "unsupported_value"}}).encode())])
    assert one(endpoint(server, retries=0)) is None and len(server.requests) == 2
    server = serve([bad(400, body=json.dumps({"error": {"message": "'max_tokens' is too large for this context", "code": "context_length_exceeded"}}).encode())])
    e = endpoint(server, retries=0)                                            # this prompt's trouble, and no other's
    assert one(e) is None and len(server.requests) == 1 and not e.newer


def test_time_out(serve):
    server = serve([{"delay": 5, "body": answer("Too late.")}])
    e, start = endpoint(server, timeout=0.2, retries=1), time.monotonic()
    assert one(e) is None and time.monotonic() - start < 3
    assert len(server.requests) == 2 and ": APITimeoutError, " in e.last_error


def test_nobody_listens(serve):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        e = endpoint(f"http://127.0.0.1:{s.getsockname()[1]}/v1")
        assert one(e) is None and ": APIConnectionError, " in e.last_error and "refused" in e.last_error


def test_every_answer_has_its_place(serve):
    def script(number, body):
        return {"a": "fine", "b": bad(400), "c": bad(500)}[body["messages"][0]["content"]]

    e = endpoint(serve(script), retries=0)
    assert e.complete(["a", "b", "c", "a"], n=10, max_new_tokens=5, temperature=0) == [["fine"] * 10, [None] * 10, [None] * 10, ["fine"] * 10]


def test_key_is_never_shown(serve):
    """Not even if the server repeats it, in a body that fills last_error to its end."""
    for pad in ("", "x" * 245):
        e = endpoint(serve([bad(500, body=f"{pad} Bearer sk-secret is\nover \x1b[31m quota".encode())]), key="sk-secret", retries=0)
        assert one(e) is None and len(e.last_error) <= 300 and "\n" not in e.last_error
        assert "sk-" not in e.last_error + repr(e)
    server = serve(["Hello."])  # a key that was read from a file, with its line break
    assert one(endpoint(server, key="sk-secret\n")) == "Hello." and "Bearer sk-secret'" in str(server.requests)


def test_offline_mode_is_no_matter(serve, monkeypatch):
    """HF_HUB_OFFLINE is about the hub, not about a judge on the next machine."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert one(endpoint(serve(["Hello."]))) == "Hello."


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    """It is asked for where it is needed, and no sooner; without it there is one clear line."""
    with pytest.raises(ImportError, match="openai"):
        endpoint("http://127.0.0.1:1/v1")


def test_interrupt(serve):
    """Ctrl-C ends the process without waiting for requests, pauses or the queue (long ones here, so that a busy machine passes too)."""
    server = serve(lambda number, _: {"delay": 60} if number % 2 else bad(500, headers={"retry-after": "30"}))
    code = f"from {Endpoint.__module__} import Endpoint; Endpoint('m', {server.url!r}, timeout=90).complete(['Hi'] * 20, max_new_tokens=5, temperature=0)"
    code = f"from plumbing import one_clear_line\ndef main():\n {code}\none_clear_line(main, 'x.py')"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))           # a shell's background jobs ignore it
    try:
        for _ in range(600):
            if len(server.requests) >= 8:
                break
            time.sleep(0.05)
        assert len(server.requests) == 8
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert "x.py: stopped; " in process.communicate(timeout=50)[1] and time.monotonic() - start < 20
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("name, expected", [
    ("m@http://127.0.0.1:8000/v1", ("m", "http://127.0.0.1:8000/v1/")),
    ("org/m@v2@https://host.example/v1", ("org/m@v2", "https://host.example/v1/")),
    ("/models/m@http://[::1]:8000/v1", ("/models/m", "http://[::1]:8000/v1/"))])
def test_names(name, expected):
    model = text_model("--judge", name, "cpu")
    assert (model.model, str(model.client.base_url)) == expected


@pytest.mark.parametrize("url", ["http://user:sk-secret@host/v1", "http://host/v1?api-key=sk-secret", "http://host/v1?a=b&Token=sk-secret"])
def test_a_key_in_the_url_is_refused(url):
    with pytest.raises(ValueError, match="--judge m@...: a key does not go into the URL") as error:
        text_model("--judge", f"m@{url}", "cpu")
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize("url", ["http://localhost:80O0/v1", "http://localhost:/v1", "http://localhost:8000v1"])
def test_a_port_is_digits(url):
    with pytest.raises(ValueError, match="a port: digits"):
        text_model("--judge", f"m@{url}", "cpu")


# ---------------------------------------------------------------- a real server

@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(model folder, URL) of `transformers serve` with the toy generator."""
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="needs transformers[serving]")
    import grpo
    folder = tmp_path_factory.mktemp("serve")
    model = str(shutil.copytree(os.path.join(os.path.dirname(grpo.__file__), "toy", "cme", "generator"), folder / "generator"))
    config = json.loads((folder / "generator" / "generation_config.json").read_text())
    # without do_sample in here this server is greedy at any temperature
    (folder / "generator" / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", model,
               "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32", "--log-level", "error"]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            start = time.monotonic()
            while process.poll() is None and time.monotonic() - start < 90:
                try:
                    opener.open(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                log.seek(0)
                pytest.fail(f"transformers serve did not start: {log.read()[-2000:]}")
            print(f"transformers serve was ready after {time.monotonic() - start:.1f} s")
            yield model, f"http://127.0.0.1:{port}/v1"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_real_server(real, serve):
    """Greedy answers are those of our own sampler, cut where they should be; at temperature 1 they differ from each other."""
    from grpo import sample
    from plumbing.models import chat_ids, find_stop_ids, load_model, load_tokenizer
    model, url = real
    prompts = ["Tell me about Mia.", [{"role": "user", "content": "Who is Theo?"}]]
    own, tokenizer = load_model(model, train=False, device="cpu"), load_tokenizer(model)
    e = Endpoint(model, url, timeout=60)
    for length in (24, 5):
        ids, lengths = sample(own, [chat_ids(tokenizer, p) for p in prompts], 1, max_new_tokens=length, temperature=0, stop_ids=find_stop_ids(own, tokenizer))
        texts = [tokenizer.decode(y[:k], skip_special_tokens=True) for y, k in zip(ids.tolist(), lengths.tolist())]
        assert e.complete(prompts, n=2, max_new_tokens=length, temperature=0) == [[text] * 2 for text in texts]
    [sampled] = e.complete(prompts[:1], n=12, max_new_tokens=24, temperature=1)
    assert len(set(sampled)) > 1 and None not in sampled and e.last_error == ""
    assert one(Endpoint("another", url)) is None
