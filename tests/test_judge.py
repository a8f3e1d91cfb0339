"""The judge against a real HTTP server on this machine: honest answers of SmolLM2, and every fault an endpoint can show."""

import json
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from jsonschema import Draft202012Validator, SchemaError

from rmnlhf import ROOT
from rmnlhf import judge as module
from rmnlhf.judge import GIVE_UP, BudgetError, Judge, JudgeError, Unreadable, read_answer
from rmnlhf.params import Judge as JudgeParams

SCHEMA = {
    "type": "object", "properties": {"choice": {"enum": ["A", "B"]}}, "required": ["choice"], "additionalProperties": False,
}  # fmt: skip
MODEL = "acme/test-model"


def completion(text, model=MODEL, finish="stop", **top):
    message = {"role": "assistant", "content": text}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": model,
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}, **top}  # fmt: skip


def good(number=0, body=None):
    return completion('{"choice": "A"}')


class Endpoint(ThreadingHTTPServer):
    """POST /v1/chat/completions → `behave(number of this call, request body)`: a dict (200), (status, body, headers), or raw bytes."""

    daemon_threads = True

    def __init__(self, behave=good):
        self.behave, self.seen, self.now, self.most, self.lock = behave, [], 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.seen.append((time.monotonic(), body, {k.lower(): v for k, v in self.headers.items()}))
            number = len(server.seen)
            server.now += 1
            server.most = max(server.most, server.now)
        try:
            reply = server.behave(number, body)
        finally:
            with server.lock:
                server.now -= 1
        status, headers = 200, {}
        if isinstance(reply, tuple):
            status, reply, headers = reply
        drip = headers.pop("drip", None)
        raw = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", "content-length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in [raw] if drip is None else (raw[i : i + 1] for i in range(len(raw))):
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(drip or 0)
        except OSError:  # the client has hung up
            self.close_connection = True


@pytest.fixture
def endpoint(monkeypatch):
    servers = []

    def start(behave=good):
        servers.append(Endpoint(behave))
        monkeypatch.setenv("TEST_JUDGE_URL", servers[-1].url)
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def judge(tmp_path):
    def make(**changes):
        return Judge(JudgeParams(**{
            "kind": "endpoint", "model": MODEL, "base_url_env": "TEST_JUDGE_URL", "key_env": "TEST_JUDGE_KEY",
            "cache": str(tmp_path / "cache"), "timeout": 5.0, "retries": 1, "concurrency": 4, "answer_tokens": 16,
            "max_calls": 1000, "max_tokens": 1_000_000, "price": None, "replay_only": False, **changes,
        }))  # fmt: skip

    return make


def talks(n, start=0):
    return [[{"role": "user", "content": f"Question {i}: which response is better?"}] for i in range(start, start + n)]


def reconciles(judge):
    u = judge.usage
    return u.asked == u.cached + u.answered + sum(u.missing.values())


def test_answers_cache_replay(endpoint, judge):
    server = endpoint()
    first = judge()
    assert first.ask(talks(5) + talks(2), SCHEMA) == [{"choice": "A"}] * 7
    assert len(server.seen) == 5, "equal conversations are asked once"
    assert (first.usage.calls, first.usage.input_tokens, first.usage.output_tokens) == (5, 55, 25) and reconciles(first)
    assert server.seen[0][1]["response_format"]["json_schema"]["schema"] == SCHEMA
    again = judge(replay_only=True, base_url_env="TEST_NO_SUCH_URL")  # replay needs no endpoint
    assert again.ask(talks(6), SCHEMA) == [{"choice": "A"}] * 5 + [None]
    assert len(server.seen) == 5 and again.usage.calls == 0 and again.usage.cached == 5 and reconciles(again)
    assert again.usage.missing == {"not in the cache (replay)": 1}


@pytest.mark.parametrize("change", [
    lambda m, s: ([{**m[0], "content": m[0]["content"] + " "}], s, {}),
    lambda m, s: ([{"role": "system", "content": "Be brief."}, *m], s, {}),
    lambda m, s: (m, {**s, "properties": {"choice": {"enum": ["A", "B", "C"]}}}, {}),
    lambda m, s: (m, s, {"answer_tokens": 17}),
    lambda m, s: (m, s, {"model": "acme/test-model-2"}),
])  # fmt: skip
def test_cache_key_holds_what_matters(endpoint, judge, change):
    server = endpoint(lambda n, body: completion('{"choice": "A"}', model=body["model"]))
    judge().ask(talks(1), SCHEMA)
    messages, schema, changes = change(talks(1)[0], SCHEMA)
    judge(**changes).ask([messages], schema)
    assert len(server.seen) == 2
    judge(timeout=9.0, retries=2, concurrency=1, **changes).ask([messages], schema)  # these change no answer
    assert len(server.seen) == 2


def test_key_travels_in_the_header_only(endpoint, judge, monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_JUDGE_KEY", "sk-very-secret")
    server = endpoint(lambda n, body: (401, {"error": {"message": "bad key sk-very-secret"}}, {}) if n > 1 else good())
    j = judge()
    j.ask(talks(1), SCHEMA)
    assert server.seen[0][2]["authorization"] == "Bearer sk-very-secret"
    with pytest.raises(JudgeError, match="TEST_JUDGE_KEY") as e:
        j.ask(talks(1, 1), SCHEMA)
    assert "sk-very-secret" not in str(e.value) + j.summary()
    assert not any(b"sk-very-secret" in f.read_bytes() for f in tmp_path.rglob("*") if f.is_file())


FAULTS = {  # name: (first reply, reason counted when it never ends)
    "500": ((500, {"error": {"message": "oops"}}, {}), "HTTP 500"),
    "429": ((429, {"error": {"message": "slow down"}}, {}), "HTTP 429"),
    "empty choices": (completion("", choices=[]), "no choices"),
    "null choices": (completion("", choices=None), "no choices"),
    "empty answer": (completion(""), "empty answer"),
    "null answer": (completion(None), "empty answer"),
    "bad JSON in the answer": (completion('{"choice": "A"'), "no answer in the schema"),
    "JSON outside the schema": (completion('{"choice": "C"}'), "no answer in the schema"),
    "two answers": (completion('{"choice": "A"} or rather {"choice": "B"}'), "two answers"),
    "cut": (completion('{"choice": "A"} {"', finish="length"), "answer cut at its length limit"),
    "body is no JSON": ((200, b"{half", {}), "no chat completion"),
    "a web page": ((200, b"<html>sign in</html>", {"content-type": "text/html"}), "no choices"),
    "JSON of another kind": ((200, b"[]", {}), "no choices"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_once_then_right(endpoint, judge, name):
    server = endpoint(lambda n, body: FAULTS[name][0] if n == 1 else good())
    j = judge()
    assert j.ask(talks(1), SCHEMA) == [{"choice": "A"}]
    assert len(server.seen) == 2 and j.usage.calls == 2 and not j.usage.missing


def test_faults_that_stay_are_missing_and_not_cached(endpoint, judge):
    kinds = dict(enumerate(FAULTS))

    def behave(n, body):
        i = int(body["messages"][0]["content"].split()[1][:-1])
        return FAULTS[kinds[i]][0] if i in kinds else good()

    endpoint(behave)
    j = judge(concurrency=20)
    answers = j.ask(talks(len(FAULTS) + 3), SCHEMA)
    assert answers == [None] * len(FAULTS) + [{"choice": "A"}] * 3, "missing is None, never a value"
    assert sum(j.usage.missing.values()) == len(FAULTS) and set(j.usage.missing) == {r for _, r in FAULTS.values()}
    assert reconciles(j) and "HTTP 500: 1" in j.summary()
    server = endpoint()  # a later run asks only what is missing
    assert judge().ask(talks(len(FAULTS) + 3), SCHEMA) == [{"choice": "A"}] * (len(FAULTS) + 3)
    assert len(server.seen) == len(FAULTS)


@pytest.mark.parametrize("slow", ["silent", "drip"])
def test_timeout_is_total(endpoint, judge, slow):
    def behave(n, body):
        if slow == "silent":
            time.sleep(3)
            return good()
        return 200, good(), {"drip": 0.05}  # 200 bytes: 10 s in all, never 0.1 s without one

    endpoint(behave)
    j = judge(timeout=0.5, retries=0)
    start = time.monotonic()
    assert j.ask(talks(3), SCHEMA) == [None] * 3
    assert time.monotonic() - start < 2 and j.usage.missing == {"timeout": 3}


def test_retry_after_is_kept(endpoint, judge):
    limited = (429, {"error": {"message": "slow down"}}, {"retry-after": "1.5"})
    server = endpoint(lambda n, body: limited if n == 1 else good())
    assert judge().ask(talks(1), SCHEMA) == [{"choice": "A"}]
    assert 1.5 <= server.seen[1][0] - server.seen[0][0] < 4


def test_concurrency_limit(endpoint, judge):
    server = endpoint(lambda n, body: time.sleep(0.05) or good())
    judge(concurrency=3).ask(talks(12), SCHEMA)
    assert server.most == 3


def test_budget_keeps_what_is_done(endpoint, judge):
    server = endpoint()
    j = judge(max_calls=4)
    with pytest.raises(BudgetError, match="max_calls is 4.*4 of the 10 new answers are kept"):
        j.ask(talks(10), SCHEMA)
    assert len(server.seen) == 4 and reconciles(j)
    assert judge().ask(talks(10), SCHEMA) == [{"choice": "A"}] * 10
    assert len(server.seen) == 10, "the second run asks only the rest"
    tokens = judge(max_tokens=150, concurrency=1, cache=j.params.cache + "2")
    with pytest.raises(BudgetError, match="max_tokens is 150"):
        tokens.ask(talks(20), SCHEMA)
    assert 0 < tokens.usage.tokens <= 150
    retried = judge(max_calls=3, cache=j.params.cache + "3")
    endpoint(lambda n, body: FAULTS["500"][0])
    with pytest.raises(BudgetError):
        retried.ask(talks(4), SCHEMA)
    assert retried.usage.calls == 3, "a retry is a call"


def test_one_budget_for_all_judges_of_a_cache_folder(endpoint, judge, tmp_path):
    """Stages are processes, and a stage may make several judges: the limit holds for all of them together."""
    server = endpoint()
    judge(max_calls=5).ask(talks(3), SCHEMA)
    code = f"""
        from rmnlhf.judge import Judge
        from rmnlhf.params import Judge as P
        from tests.test_judge import SCHEMA, talks
        Judge(P(**{judge(max_calls=5).params.model_dump()!r})).ask(talks(1, 3), SCHEMA)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, check=True)
    last = judge(max_calls=5)
    with pytest.raises(BudgetError, match="max_calls is 5, 5 calls and .*Raise it.*1 of the 2 new answers are kept"):
        last.ask(talks(6), SCHEMA)  # four from the cache cost nothing
    assert len(server.seen) == 5 and last.usage.calls == 1 and "5 of 5 calls, 80 of 1000000 tokens" in last.summary()
    judge(max_calls=6).ask(talks(6), SCHEMA)
    assert len(server.seen) == 6, "a higher limit goes on"
    with pytest.raises(BudgetError, match="max_tokens is 100, 6 calls and 96 tokens are spent"):
        judge(max_tokens=100).ask(talks(1, 6), SCHEMA)
    judge(max_calls=1, cache=str(tmp_path / "other")).ask(talks(1), SCHEMA)
    judge(max_calls=1, model="acme/test").ask(talks(1), SCHEMA)  # each model has its own


def test_the_bill_of_a_stage(endpoint, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_USED", [])
    endpoint(lambda n, body: (500, {"error": {"message": "oops"}}, {}) if "Question 9:" in body["messages"][0]["content"] else good())
    file = tmp_path / "timings" / "02_x_judge.json"
    assert module.record("02_x", file.parent) == "no judge was asked" and not file.exists()
    price = [1000.0, 2000.0]
    judge(price=price).ask(talks(3), SCHEMA)
    judge(price=price, retries=0).ask(talks(2) + talks(1, 9), SCHEMA)  # a second judge of the same process, two answers from the cache
    said = module.record("02_x", file.parent)
    found = json.loads(file.read_text())[MODEL]
    assert {k: found[k] for k in ("asked", "cached", "answered", "missing", "calls")} == {
        "asked": 6, "cached": 2, "answered": 3, "missing": 1, "calls": 4,
    }  # fmt: skip
    assert found["output_tokens"] == 15 and found["cost"] == pytest.approx((found["input_tokens"] * 1000 + 15 * 2000) / 1e6)
    assert said.startswith(f"judge {MODEL}: 6 asked, 2 from the cache, 3 answered, 1 missing (HTTP 500: 1); 4 calls") and "cost" in said
    monkeypatch.setattr(module, "_USED", [])
    module.record("02_x", file.parent)
    assert not file.exists(), "a run without a judge keeps no bill of an earlier one"


def test_reachable_by_endpoint_by_vllm_or_by_replay(tmp_path, monkeypatch):
    import importlib.machinery

    import tiny

    def found(**changes):
        module._shared.cache_clear()
        return module.reachable(tiny.settings(**{"judge.cache": str(tmp_path), "judge.base_url_env": "TEST_JUDGE_URL"} | changes))

    monkeypatch.delenv("TEST_JUDGE_URL", raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert found() is None and found(**{"judge.kind": "vllm"}) is None
    assert found(**{"judge.replay_only": True}).params.replay_only
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    assert found() is None and found(**{"judge.kind": "vllm"}).params.kind == "vllm"
    monkeypatch.setenv("TEST_JUDGE_URL", "http://127.0.0.1:9/v1")
    settings = tiny.settings(**{"similarity.backend": "llm", "judge.cache": str(tmp_path), "judge.base_url_env": "TEST_JUDGE_URL"})
    module._shared.cache_clear()
    assert module.reachable(settings) is module.of(settings), "one judge for each process"
    module._shared.cache_clear()


def test_one_judge_for_a_group(endpoint, judge):
    def behave(n, body):
        names = {0: "test-model-2026-01-01", 1: "test-model-2026-02-02", 2: "test-model-mini", 3: "other"}
        return completion('{"choice": "A"}', model=names.get(int(body["messages"][0]["content"].split()[1][:-1]), MODEL))

    endpoint(behave)
    j = judge(concurrency=1)
    assert j.ask(talks(4), SCHEMA) == [{"choice": "A"}, None, None, None], "the first snapshot is pinned"
    assert j.usage.missing == {
        "answered by test-model-2026-02-02, this cache holds answers of test-model-2026-01-01": 1,
        "answered by another model: test-model-mini": 1, "answered by another model: other": 1,
    }  # fmt: skip
    assert judge().ask(talks(2), SCHEMA) == [{"choice": "A"}, None], "for later runs too"


@pytest.mark.parametrize("field, says", [
    ("response_format", "response_format type json_schema is unavailable now"),
    ("temperature", "Unsupported value: 'temperature' does not support 0.0 with this model"),
    ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
])  # fmt: skip
def test_a_refused_field_is_left_out(endpoint, judge, field, says):
    server = endpoint(lambda n, body: (400, {"error": {"message": says}}, {}) if field in body else good())
    assert judge(concurrency=1).ask(talks(3), SCHEMA) == [{"choice": "A"}] * 3
    assert [field in body for _, body, _ in server.seen] == [True, False, False, False], "learnt once"
    if field == "response_format":
        assert '"enum": ["A", "B"]' in server.seen[1][1]["messages"][-1]["content"], "the schema moves into the prompt, once"
        assert server.seen[3][1]["messages"][-1]["content"].count("JSON schema") == 1


def test_gives_up_on_a_dead_endpoint(endpoint, judge, monkeypatch):
    monkeypatch.setenv("TEST_JUDGE_URL", "http://127.0.0.1:9/v1")  # discard: nobody listens
    j = judge(retries=0)
    with pytest.raises(JudgeError, match="in a row failed.*no connection"):
        j.ask(talks(500), SCHEMA)
    assert GIVE_UP <= j.usage.calls < GIVE_UP + 8 and reconciles(j)
    with pytest.raises(JudgeError, match="in a row failed"):  # asked again it counts anew
        j.ask(talks(500), SCHEMA)
    assert j.usage.calls >= 2 * GIVE_UP
    server = endpoint(lambda n, body: (404, {"error": {"message": "no such model"}}, {}))
    with pytest.raises(JudgeError, match="judge.model"):
        judge(concurrency=1).ask(talks(5), SCHEMA)
    assert len(server.seen) == 1
    monkeypatch.delenv("TEST_JUDGE_URL")
    with pytest.raises(JudgeError, match="TEST_JUDGE_URL"):
        judge().ask(talks(1), SCHEMA)
    with pytest.raises(SchemaError):
        judge().ask(talks(1), {"type": "no such type"})


def test_too_long_is_missing_at_once(endpoint, judge):
    server = endpoint(lambda n, body: (400, {"error": {"message": "context length exceeded"}}, {}))
    j = judge()
    assert j.ask(talks(1), SCHEMA) == [None] and j.usage.missing == {"HTTP 400": 1} and len(server.seen) == 1


def test_killed_in_the_middle(endpoint, judge, tmp_path):
    server = endpoint(lambda n, body: time.sleep(0.1) or good())
    code = textwrap.dedent(f"""
        from rmnlhf.judge import Judge
        from rmnlhf.params import Judge as P
        from tests.test_judge import SCHEMA, talks
        Judge(P(kind="endpoint", model={MODEL!r}, base_url_env="TEST_JUDGE_URL", key_env="NO_KEY", cache={str(tmp_path / "cache")!r},
                timeout=5.0, retries=1, concurrency=2, answer_tokens=16, max_calls=1000, max_tokens=1000000, price=None,
                replay_only=False)).ask(talks(40), SCHEMA)
    """)
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(server.seen) < 10 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(0.3)
    before = len(server.seen)
    assert 10 <= before < 40
    assert judge().ask(talks(40), SCHEMA) == [{"choice": "A"}] * 40
    assert 40 - before <= len(server.seen) - before <= 40 - before + 2, "only the rest, and at most the two calls under way twice"


def test_inside_a_running_event_loop(endpoint, judge):
    import asyncio

    endpoint()

    async def cell():
        return judge().ask(talks(2), SCHEMA)

    assert asyncio.run(cell()) == [{"choice": "A"}] * 2


@pytest.mark.parametrize("text", [
    '{"choice": "A"}', '```json\n{"choice": "A"}\n```', 'Well. {"choice": "A"} That is my answer.',
    '<think>{"choice": "B"} perhaps</think>\n{"choice": "A"}', 'The set {x, y} matters: {"choice": "A"}',
    '{"choice": "A"} and again {"choice": "A"}', '{"note": {"choice": "B"}} {"choice": "A"}', '{"score": NaN} {"choice": "A"}',
])  # fmt: skip
def test_read_answer(text):
    assert read_answer(text, Draft202012Validator(SCHEMA)) == {"choice": "A"}


@pytest.mark.parametrize("text", [
    "", " ", None, "A", '"A"', "[]", '{"choice": "a"}', '{"choice": "A", "choice2": 1}', "{" * 100_000, '{"a":' * 30_000,
    "x" * 300_000, '{"choice": "A"} {"choice": "B"}', '<think>{"choice": "A"}</think>', "{'choice': 'A'}",
])  # fmt: skip
def test_read_answer_refuses(text):
    start = time.monotonic()
    with pytest.raises(Unreadable):
        read_answer(text, Draft202012Validator(SCHEMA))
    assert time.monotonic() - start < 1


def test_local_vllm(judge, monkeypatch):
    """The vLLM path with the package replaced by its interface (tried by hand on the CPU build of vllm 0.30.0 with SmolLM2)."""
    import types

    calls, started = [], []

    class LLM:
        def __init__(self, **kw):
            started.append((kw["model"], kw["revision"]))
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=60))

        def get_tokenizer(self):
            class Tok:
                def apply_chat_template(self, m, tokenize, add_generation_prompt):
                    return m[-1]["content"]

                def __call__(self, text, add_special_tokens):
                    return {"input_ids": text.split()}

            return Tok()

        def chat(self, messages, sampling, use_tqdm):
            calls.append((len(messages), sampling))
            out = lambda m: types.SimpleNamespace(text="no idea" if " 3:" in m else '{"choice": "B"}', token_ids=[1], finish_reason="stop")
            return [types.SimpleNamespace(prompt_token_ids=[1, 2], outputs=[out(m[-1]["content"])]) for m in messages]

    vllm = types.ModuleType("vllm")
    vllm.LLM, vllm.SamplingParams = LLM, lambda **kw: kw
    vllm.sampling_params = types.ModuleType("vllm.sampling_params")
    vllm.sampling_params.StructuredOutputsParams = lambda json: {"json": json}
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", vllm.sampling_params)
    j = judge(kind="vllm")
    long = [[{"role": "user", "content": "word " * 100}]]
    assert j.ask(talks(5) + long, SCHEMA) == [{"choice": "B"}] * 3 + [None, {"choice": "B"}, None]
    assert calls[0][0] == 5 and calls[0][1]["structured_outputs"] == {"json": SCHEMA} and reconciles(j)
    assert j.usage.missing == {"no answer in the schema": 1, "longer than the model's context": 1}
    j.ask(talks(5), SCHEMA)
    assert [n for n, _ in calls] == [5, 1], "from the cache; only the unreadable one is asked again"
    with pytest.raises(BudgetError):
        judge(kind="vllm", max_calls=2, cache=j.params.cache + "2").ask(talks(4, 10), SCHEMA)
    assert calls[-1][0] == 2, "what the budget holds is asked and kept"
    judge(kind="vllm", model="org/model@abc", cache=j.params.cache + "3").ask(talks(1), SCHEMA)
    assert started[-1] == ("org/model", "abc") and started[0][1] is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(JudgeError, match="each of several processes.*judge.kind: endpoint"):
        judge(kind="vllm", cache=j.params.cache + "4").ask(talks(1), SCHEMA)
    assert len(started) == 3


@pytest.fixture(scope="module")
def smollm2():
    """A chat server on SmolLM2. With a response_format it picks the likeliest JSON among the schema's values, as constrained
    decoding would; without one the model writes freely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rmnlhf.policy import prepare

    folder = prepare("smollm2-135m")
    tok, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    one_at_a_time = threading.Lock()

    @torch.inference_mode()
    def behave(n, body):
        with one_at_a_time:
            prompt = tok.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
            if "response_format" not in body:
                out = model.generate(torch.tensor([prompt]), max_new_tokens=body["max_tokens"], do_sample=False, pad_token_id=0)
                return completion(tok.decode(out[0, len(prompt) :], skip_special_tokens=True), "SmolLM2-135M", "length")
            texts = [json.dumps({"choice": v}) for v in body["response_format"]["json_schema"]["schema"]["properties"]["choice"]["enum"]]

            def likelihood(text):
                ids = tok(text, add_special_tokens=False)["input_ids"]
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                return logits.gather(1, torch.tensor(ids)[:, None]).sum().item()

            return completion(max(texts, key=likelihood), "SmolLM2-135M")

    return behave


def test_with_a_real_model(endpoint, judge, smollm2):
    server = endpoint(smollm2)
    schema = {**SCHEMA, "properties": {"choice": {"enum": ["blue", "green", "Paris", "Tokyo"]}}}
    asked = [[{"role": "user", "content": f"{q} Answer as JSON with the key choice."}]
             for q in ("What is the capital of France?", "What is the colour of the clear sky?")]  # fmt: skip
    j = judge(model="SmolLM2-135M", timeout=60.0)
    assert j.ask(asked, schema) == [{"choice": "Paris"}, {"choice": "blue"}]
    free = judge(model="SmolLM2-135M", timeout=60.0, answer_tokens=8)
    free._structured = False
    answers = free.ask(asked, schema)  # eight free tokens of a small model: read where they are an answer, else missing
    assert all(a is None or a["choice"] in schema["properties"]["choice"]["enum"] for a in answers)
    assert sum(a is None for a in answers) == sum(free.usage.missing.values()) and reconciles(free)
    before = len(server.seen)
    assert judge(model="SmolLM2-135M", replay_only=True).ask(asked, schema) == [{"choice": "Paris"}, {"choice": "blue"}]
    assert len(server.seen) == before


def test_the_llm_backend_finds_its_judge_wherever_critiques_are_compared(monkeypatch):
    """Profile gpu compares by an LLM: training, MetaRM's rows and the evaluation all ask one judge, made from the parameters."""
    import tiny

    from rmnlhf import grpo, metarm
    from rmnlhf.benchmarks import runner

    asked = []

    class Fake:
        def __init__(self, section):
            self.section = section

        def ask(self, messages, schema):
            asked.append(self)
            return [{"arguments": [{"text": "names a reason", "side": "A", "polarity": "praise", "core": True}]} for _ in messages]

    monkeypatch.setattr(module, "Judge", Fake)
    module._shared.cache_clear()
    settings, pairs = tiny.settings(**{"similarity.backend": "llm"}), tiny.pairs(2)
    text = "<critics>Response A names a reason.</critics>\n<choice>[[A]]</choice>"
    reward = grpo.RewardFunction("human", settings, pairs)
    reward(prompts=["p"], completions=[text], pair_id=[pairs[0].id], swap=[0])
    assert reward.rows[0]["process"] == 1.0
    assert metarm._process(["Response A names a reason."], [["Response A is reasonable."]], settings, None) == [1.0]
    rows = [{"critique": "Response A names a reason.", "correct": 1.0, "error": None}]
    runner._process(pairs[:1], rows, settings)
    assert rows[0]["f1"] == 1.0
    assert len(asked) == 3 and len(set(map(id, asked))) == 1 and asked[0].section == settings.judge
    assert module.of(tiny.settings()) is None
    module._shared.cache_clear()


def test_a_long_run_asks_its_judge_first(tmp_path, monkeypatch, capsys):
    """`make gpu`: a wrong address or key ends it in seconds, in the judge's own words."""
    from rmnlhf import params

    over = ["similarity.backend=llm", f"judge.model={MODEL}", f"judge.cache={tmp_path}", "judge.retries=0", "judge.timeout=5"]
    settings = params.load(ROOT / "params.yaml", "smoke", over)
    monkeypatch.setattr(params, "load", lambda profile=None, overrides=(): settings)
    monkeypatch.setenv(settings.judge.key_env, "k")
    monkeypatch.delenv(settings.judge.base_url_env, raising=False)
    with pytest.raises(SystemExit, match=settings.judge.base_url_env):
        module.main()
    for behave, said in ((lambda n, b: completion("perhaps"), "no readable answer"), (lambda n, b: (401, {"error": "bad key"}, {}), "401|key")):
        endpoint = Endpoint(behave)
        monkeypatch.setenv(settings.judge.base_url_env, endpoint.url)
        module._shared.cache_clear()
        with pytest.raises(SystemExit, match=said):
            module.main()
        endpoint.shutdown()
    endpoint = Endpoint(lambda n, b: completion('{"yes": true}'))
    monkeypatch.setenv(settings.judge.base_url_env, endpoint.url)
    module._shared.cache_clear()
    module.main()
    assert "it answers" in capsys.readouterr().out and len(endpoint.seen) == 1
    endpoint.shutdown()
    module._shared.cache_clear()
