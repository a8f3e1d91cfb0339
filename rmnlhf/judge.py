"""LLM calls that answer with JSON: an OpenAI-compatible endpoint or a local vLLM model, behind one disk cache.

A call that fails, or whose answer cannot be read, is *missing*: None, counted with its reason, never a score of 0, as
in the paper's released code. Every answer is kept as soon as it arrives, so a killed run asks only the rest.
"""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import importlib.util
import json
import os
import random
import re
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit

import diskcache
from tenacity import AsyncRetrying, retry_if_exception_type
from tqdm.auto import tqdm

from .params import Judge as JudgeParams

SAMPLING = {"temperature": 0.0, "seed": 0}
GIVE_UP = 20  # calls failed in a row, retries included, after which the endpoint counts as gone
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever Retry-After asks for
VLLM_MEMORY = 0.4  # share of the GPU for a local judge: the policy needs the rest
VLLM_BATCH = 256  # answers between two writes to the cache
_VERSION = re.compile(r"[-@:]v?\d[\w.\-]*")  # what a provider adds to the name asked for: "-2024-08-06", ":0905"


@lru_cache(maxsize=1)
def _shared(section: str):
    return Judge(JudgeParams.model_validate_json(section))


def of(params) -> Judge | None:
    """The judge that reads critiques where `similarity.backend` is "llm", else None: one for each process."""
    return _shared(params.judge.model_dump_json()) if params.similarity.backend == "llm" else None


def reachable(params) -> Judge | None:
    """This process's judge, whatever the backend, where answers can come: replayed, from an endpoint with an address, from vLLM; else None."""
    p = params.judge
    there = os.environ.get(p.base_url_env) if p.kind == "endpoint" else importlib.util.find_spec("vllm")
    return _shared(p.model_dump_json()) if p.replay_only or there else None


def record(stage: str, folder: str | Path = "results/timings") -> str:
    """Write what all judges of this process did to <folder>/<stage>_judge.json, and say it: one line for each model.

    Where none was asked there is no such file: one that an earlier run left is removed. Of several ranks each has a stage of its own."""
    used: dict[str, tuple] = {}
    for params, usage in _USED:
        if usage.asked:
            total = used.setdefault(params.model, (params, Usage()))[1]
            for name, value in vars(usage).items():
                setattr(total, name, getattr(total, name) + value)
    path = Path(folder) / f"{stage}_judge.json"
    if not used:
        path.unlink(missing_ok=True)
        return "no judge was asked"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = {m: vars(u) | {"missing": u.missing.total(), "cost": u.cost(p.price)} for m, (p, u) in used.items()}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return "\n".join(f"judge {model}: {u.line(p.price)}" for model, (p, u) in used.items())


class JudgeError(RuntimeError):
    """The judge cannot go on; all answers received so far are in the cache."""


class BudgetError(JudgeError):
    """judge.max_calls or judge.max_tokens is spent."""


class Missing(Exception):
    """This call has no answer; the text is the reason that is counted."""


class _Again(Missing):
    """Worth another attempt, not before `after` seconds."""

    def __init__(self, reason: str, after: float = 0.0):
        super().__init__(reason)
        self.after = after


class Unreadable(_Again):
    """An answer came but holds not exactly one JSON object of the schema. At temperature 0 one more attempt is enough."""


@dataclass
class Usage:
    """What one `Judge` did. asked = cached + answered + sum(missing.values()); calls and tokens count retries too."""

    asked: int = 0
    cached: int = 0
    answered: int = 0
    missing: Counter = field(default_factory=Counter)
    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    def cost(self, price) -> float | None:
        return round((self.input_tokens * price[0] + self.output_tokens * price[1]) / 1e6, 4) if price else None

    def line(self, price) -> str:
        missing, cost = self.missing.total(), self.cost(price)
        why = f" ({', '.join(f'{k}: {n}' for k, n in self.missing.most_common())})" if missing else ""
        return (f"{self.asked} asked, {self.cached} from the cache, {self.answered} answered, {missing} missing{why}; {self.calls} calls, "
                f"{self.input_tokens} + {self.output_tokens} tokens" + ("" if cost is None else f", cost {cost:.4f}"))  # fmt: skip


_USED: list[tuple[JudgeParams, Usage]] = []  # of every `Judge` of this process


class Judge:
    """Asks one model for JSON answers. `params`: section `judge` of params.yaml.

    One group of rollouts must see one judge. So the model that answers first under the name asked for is pinned (in the cache
    folder, thus for later runs too); an answer of any other model is refused and counted as missing. Cache key: kind, model,
    messages, schema, sampling. The endpoint's address is not part of it, so that a cache replays anywhere; two endpoints that
    serve different weights under one name need two `judge.cache` folders.

    `judge.max_calls` and `judge.max_tokens` are the budget of one run, and a run is all that one model is ever asked through one
    cache folder: stages, restarts, processes and judges share it. A higher limit or another folder gives more."""

    def __init__(self, params: JudgeParams):
        self.params = params
        self.usage = Usage()
        _USED.append((params, self.usage))
        self.cache = diskcache.Cache(params.cache, eviction_policy="none", cull_limit=0)  # by default it forgets after 1 GB
        self._request = {**SAMPLING, "max_tokens": params.answer_tokens}
        self._structured = True  # response_format; like any other field left out once an endpoint refuses it
        self._failures = 0  # in a row
        self._stop: JudgeError | None = None
        self._engine = None

    def ask(self, messages_list: list[list[dict[str, str]]], schema: dict) -> list[dict | None]:
        """One answer that fits `schema` per conversation, in their order; None = missing (see `usage.missing`).

        Equal conversations are asked once. Raises JudgeError where going on is pointless (no address, wrong key, unknown
        model, endpoint gone) and BudgetError; either way what was answered is kept, and the same call later asks only the rest.
        """
        _validator(schema)
        keys = [self.key(messages, schema) for messages in messages_list]
        found, reasons, todo = {}, {}, {}
        for key, messages in zip(keys, messages_list):
            if key in found or key in todo:
                continue
            hit = self.cache.get(key)
            if hit is not None:
                found[key] = hit
            else:
                todo[key] = messages
        cached = set(found)
        self._stop, self._failures = None, 0
        if self.params.replay_only:
            reasons = dict.fromkeys(todo, "not in the cache (replay)")
        elif todo:
            run = self._ask_vllm if self.params.kind == "vllm" else self._ask_endpoint
            run(todo, schema, found, reasons)
        self.usage.asked += len(keys)
        self.usage.cached += sum(k in cached for k in keys)
        self.usage.answered += sum(k in found and k not in cached for k in keys)
        self.usage.missing.update(reasons.get(k, "not asked") for k in keys if k not in found)
        if self._stop:
            done = sum(k in found for k in todo)
            text = f"{self._stop} {done} of the {len(todo)} new answers are kept in {self.params.cache}; {self.summary()}"
            raise type(self._stop)(text) from self._stop
        return [json.loads(found[k])["answer"] if k in found else None for k in keys]

    def key(self, messages: list[dict[str, str]], schema: dict) -> str:
        """Cache key of one call: a hash of everything that decides the answer."""
        what = {"form": 1, "kind": self.params.kind, "model": self.params.model, "messages": messages, "schema": schema,
                "max_tokens": self.params.answer_tokens, **SAMPLING}  # fmt: skip
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def summary(self) -> str:
        """One line: what was asked, what is missing and why, what it cost."""
        p, (calls, tokens) = self.params, self._spent()
        return (f"judge {p.model}: {self.usage.line(p.price)}; budget of {p.cache}: {calls} of {p.max_calls} calls, "
                f"{tokens} of {p.max_tokens} tokens")  # fmt: skip

    def _spent(self) -> tuple[int, int]:
        """Calls and tokens of this model through this cache folder, those set aside for calls under way included."""
        return self.cache.get(f"spent {self.params.model}", (0, 0))

    # ---- an OpenAI-compatible endpoint

    def _ask_endpoint(self, todo, schema, found, reasons):
        url = os.environ.get(self.params.base_url_env)
        if not url:
            self._stop = JudgeError(
                f"The judge has no address: set {self.params.base_url_env} (for instance http://localhost:8000/v1) and, where it "
                f"needs one, {self.params.key_env}; or judge.replay_only=true; or similarity.backend=offline."
            )
            return
        with ThreadPoolExecutor(1) as pool:  # its own thread: a notebook's event loop already runs in this one
            future = pool.submit(asyncio.run, self._batch(url, todo, schema, found, reasons))
            try:
                future.result()
            except KeyboardInterrupt:  # calls under way are paid for: let them arrive, start no other
                self._stop = JudgeError("Interrupted.")
                raise

    async def _batch(self, url, todo, schema, found, reasons):
        from openai import AsyncOpenAI

        queue, validator, host = iter(todo.items()), _validator(schema), urlsplit(url).netloc.rpartition("@")[2]
        bar = tqdm(total=len(todo), desc="judge", disable=len(todo) < 32)
        key = os.environ.get(self.params.key_env) or "none"
        async with AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=self.params.timeout) as client:

            async def work():
                for key, messages in queue:  # shared by all workers
                    if self._stop:
                        return
                    try:
                        answer, model = await self._call(client, messages, schema, validator)
                        found[key] = json.dumps({"answer": answer, "model": model, "host": host})
                        self.cache.set(key, found[key])
                        self._failures = 0
                    except Missing as e:
                        reasons[key] = str(e)
                        self._failures += not isinstance(e, Unreadable)
                        if self._failures >= GIVE_UP and not self._stop:
                            self._stop = JudgeError(f"{self._failures} calls in a row failed, the last one with: {e}.")
                    except JudgeError as e:
                        self._stop = self._stop or e
                    bar.update()
                    bar.set_postfix(calls=self.usage.calls, tokens=self.usage.tokens, missing=len(reasons), refresh=False)

            await asyncio.gather(*(work() for _ in range(min(self.params.concurrency, len(todo)))))
        bar.close()

    async def _call(self, client, messages, schema, validator):
        def enough(state):
            unreadable = isinstance(state.outcome.exception(), Unreadable)
            return self._stop or state.attempt_number > (min(1, self.params.retries) if unreadable else self.params.retries)

        def wait(state):  # 0.5, 1, 2 … seconds with jitter, so that workers do not come back together
            back_off = 2 ** (state.attempt_number - 2) * random.uniform(1, 1.5)
            return min(LONGEST_WAIT, max(back_off, state.outcome.exception().after))

        async for attempt in AsyncRetrying(retry=retry_if_exception_type(_Again), stop=enough, wait=wait, reraise=True):
            with attempt:
                return await self._attempt(client, messages, schema, validator)

    async def _attempt(self, client, messages, schema, validator):
        """(answer, model) of one HTTP call, or Missing, or JudgeError."""
        import openai

        if self._stop:
            raise Missing("not asked")
        text_tokens = sum(len(m["content"]) for m in messages) // 3 + 16  # estimate, until the endpoint says how many
        self._spend(text_tokens + self.params.answer_tokens)
        spent = (0, 0)
        try:
            async with asyncio.timeout(self.params.timeout):  # the client's own timeout starts anew with every drop of a slow drip
                reply = await self._create(client, messages, schema)
            usage = getattr(reply, "usage", None)
            spent = (getattr(usage, "prompt_tokens", None) or text_tokens, getattr(usage, "completion_tokens", None) or 0)
        except (TimeoutError, openai.APITimeoutError):
            spent = (text_tokens, 0)  # the endpoint has probably worked
            raise _Again("timeout") from None
        except openai.APIConnectionError:
            raise _Again("no connection") from None
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as e:
            raise JudgeError(
                f"The endpoint refuses the judge (HTTP {e.status_code}): check {self.params.key_env}, {self.params.base_url_env} "
                f"and judge.model ({self.params.model})."
            ) from None
        except openai.APIStatusError as e:
            if e.code == "insufficient_quota":
                raise JudgeError("The endpoint says that the account's quota is spent (HTTP 429).") from None
            if e.status_code >= 500 or e.status_code in (408, 409, 425, 429):
                raise _Again(f"HTTP {e.status_code}", _retry_after(e.response.headers)) from None
            raise Missing(f"HTTP {e.status_code}") from None
        except ValueError:  # a body that is no JSON
            raise _Again("no chat completion") from None
        finally:
            self._paid(text_tokens + self.params.answer_tokens, *spent)
        try:
            choice, model = reply.choices[0], reply.model
            text, cut = choice.message.content, choice.finish_reason == "length"
        except (AttributeError, IndexError, TypeError):
            raise _Again("no choices") from None
        self._pin(model)
        return read_answer(text, validator, cut), model

    def _spend(self, tokens: int):
        """Count one call and set `tokens` aside for it, or say that the budget does not hold them."""
        p = self.params
        with self.cache.transact(retry=True):
            calls, spent = self._spent()
            what = "calls" if calls + 1 > p.max_calls else "tokens" if spent + tokens > p.max_tokens else None
            if what is None:
                self.cache.set(f"spent {p.model}", (calls + 1, spent + tokens))
        if what:
            raise BudgetError(
                f"Budget spent: judge.max_{what} is {getattr(p, f'max_{what}')}, {calls} calls and {spent} tokens are spent or under way"
                + (f", the next call may need {tokens}." if what == "tokens" else ".") + f" Raise it, or give another judge.cache than {p.cache}."
            )  # fmt: skip
        self.usage.calls += 1

    def _paid(self, reserved: int, given: int, taken: int):
        """A call that took `reserved` tokens from the budget cost `given` + `taken`. (Of a killed process the estimate stays.)"""
        with self.cache.transact(retry=True):
            calls, spent = self._spent()
            self.cache.set(f"spent {self.params.model}", (calls, spent - reserved + given + taken))
        self.usage.input_tokens += given
        self.usage.output_tokens += taken

    async def _create(self, client, messages, schema):
        """The call itself; an optional field that the endpoint refuses is left out (or renamed) from then on."""
        import openai

        while True:
            request, shown = dict(self._request), messages
            if structured := self._structured:
                request["response_format"] = {
                    "type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema},
                }  # fmt: skip
            else:
                form = f"Answer with one JSON object that fits this JSON schema, and nothing else: {json.dumps(schema)}"
                shown = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}\n\n{form}"}]
            try:
                return await client.chat.completions.create(model=self.params.model, messages=shown, **request)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as e:
                said = str(e)
                if structured and re.search("json_schema|response_format|grammar|guided", said):
                    self._structured = False
                elif "max_completion_tokens" in said and "max_tokens" in request:  # OpenAI's newer models
                    self._request["max_completion_tokens"] = self._request.pop("max_tokens", self.params.answer_tokens)
                elif refused := next((name for name in SAMPLING if name in request and name in said), None):
                    self._request.pop(refused, None)
                else:
                    raise

    def _pin(self, model: str | None):
        """Refuse an answer of another model than the one that answered first; an endpoint that names none is trusted."""
        if not model:
            return
        asked = self.params.model.rstrip("/").split("/")[-1].lower().removesuffix("-latest")
        name = model.rstrip("/").split("/")[-1].lower()
        if not name.startswith(asked) or (name != asked and not _VERSION.fullmatch(name[len(asked) :])):
            raise Missing(f"answered by another model: {model}")
        self.cache.add(f"pinned {self.params.model}", model)
        if (pinned := self.cache[f"pinned {self.params.model}"]) != model:
            raise Missing(f"answered by {model}, this cache holds answers of {pinned}")

    # ---- a local model

    def _ask_vllm(self, todo, schema, found, reasons):
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        if self._engine is None:
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise JudgeError("judge.kind vllm would start a model in each of several processes, all on the first card: serve it, and set judge.kind: endpoint (README, GPU)")
            name, _, commit = self.params.model.partition("@")
            self._engine = LLM(model=name, revision=commit or None, seed=0, gpu_memory_utilization=VLLM_MEMORY)
        tok, longest = self._engine.get_tokenizer(), self._engine.llm_engine.model_config.max_model_len
        sampling = SamplingParams(
            temperature=0.0, max_tokens=self.params.answer_tokens, structured_outputs=StructuredOutputsParams(json=schema)
        )
        validator, items = _validator(schema), list(todo.items())
        for start in tqdm(range(0, len(items), VLLM_BATCH), desc="judge", disable=len(items) <= VLLM_BATCH):
            batch = []
            for key, messages in items[start : start + VLLM_BATCH]:
                text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                need = len(tok(text, add_special_tokens=False)["input_ids"]) + self.params.answer_tokens
                if need > longest:
                    reasons[key] = "longer than the model's context"
                    continue
                try:
                    self._spend(need)
                except BudgetError as e:  # what is in the batch is still asked
                    self._stop = e
                    break
                batch.append((key, messages, need))
            for (key, _, need), out in zip(batch, self._engine.chat([m for _, m, _ in batch], sampling, use_tqdm=False) if batch else []):
                self._paid(need, len(out.prompt_token_ids), len(out.outputs[0].token_ids))
                try:
                    answer = read_answer(out.outputs[0].text, validator, out.outputs[0].finish_reason == "length")
                    found[key] = json.dumps({"answer": answer, "model": self.params.model, "host": "vllm"})
                    self.cache.set(key, found[key])
                except Unreadable as e:
                    reasons[key] = str(e)
            if self._stop:
                return


def main():
    """Ask the judge of $RMNLHF_PROFILE one question: a wrong address, key or model is told now, not after hours."""
    from .params import load

    params = load(profile=os.environ.get("RMNLHF_PROFILE") or None, overrides=os.environ.get("RMNLHF_SET", "").split())
    judge = of(params)
    if judge is None or params.judge.kind != "endpoint" or params.judge.replay_only:
        return
    schema = {"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"], "additionalProperties": False}
    try:
        (said,) = judge.ask([[{"role": "user", "content": f"Answer with yes: true. ({time.time()})"}]], schema)
    except JudgeError as e:
        sys.exit(f"judge: {e}")
    if said is None:
        sys.exit(f"judge {params.judge.model}: no readable answer to a plain question ({', '.join(judge.usage.missing)}): see section judge of params.yaml")
    print(f"judge {params.judge.model}: it answers")


def _validator(schema: dict):
    from jsonschema import Draft202012Validator  # here: it takes longer to import than the rest of this module

    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def read_answer(text: str | None, validator, cut: bool = False) -> dict:
    """The one JSON object in `text` that fits the validator's schema, else Unreadable.

    Read past: a think block, code fences, prose around the object. Two different objects that fit are no answer, since one of
    them may be quoted from the critique under judgement; neither is a piece of an answer that was cut at its length limit."""
    if not text or not text.strip():
        raise Unreadable("empty answer")
    if len(text) > 200_000:
        raise Unreadable("answer over 200,000 characters")
    text = text.rpartition("</think>")[2].strip()
    decoder, fits, at, tries = json.JSONDecoder(parse_constant=_no_constant), [], 0, 0
    while (at := text.find("{", at)) >= 0 and tries < 50:
        tries += 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        whole = at == 0 and end == len(text)
        if validator.is_valid(value) and value not in fits and (whole or not cut):
            fits.append(value)
        at = end
    if len(fits) != 1:
        raise Unreadable("answer cut at its length limit" if cut else "no answer in the schema" if not fits else "two answers")
    return fits[0]


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def _retry_after(headers) -> float:
    """Seconds that the endpoint asks to wait: a number, or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


if __name__ == "__main__":
    main()
