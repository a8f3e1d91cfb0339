"""One runner for every judge and every benchmark: both orders, one verdict or voting@k, cached, resumed.

A judge is a policy (model and tokenizer), "endpoint" (through `rmnlhf.judge`), the path of a JSONL file of recorded verdicts,
or a function of the pair as shown. `open_judge` turns a name into one of these.

Cache: one JSONL file per judge under .cache/judgements, named by a hash of its weights; one line per prompt, keyed by the
prompt's tokens, the engine, its code and its dtype, the decoding and the seed. A killed run goes on where it stopped, and two notebooks
that ask one arm the same thing pay once.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from rmnlhf import grm
from rmnlhf import pairs as pairs_
from rmnlhf.grm import Judgement
from rmnlhf.pairs import PreferencePair

CACHE = Path(".cache/judgements")
ROLLOUTS = Path(".cache/rollouts")
ORDERS = ("ab", "ba")
VLLM = ("vllm", "server")  # engines that schedule by themselves
MISSING = "missing"  # a call that failed: not a wrong answer


def open_judge(name: str, params):
    """(judge, tokenizer) for `evaluate`: "endpoint", "base" (the policy without adapter), a .jsonl file of recorded verdicts,
    a folder with an adapter, or a folder or hub name of a whole model, at a commit where it is "name@commit"."""
    from rmnlhf import policy

    if name == "endpoint" or str(name).endswith(".jsonl"):
        return name, None
    if name == "base":
        return policy.load(params)
    if (Path(name) / "adapter_config.json").exists():
        return policy.load(params, adapter=name)
    model, _, revision = (str(name), "", "") if Path(name).is_dir() else str(name).partition("@")
    return policy.load(params.model_copy(update={"policy": params.policy.model_copy(update={"model": model, "revision": revision or None})}))


def evaluate(
    judge, tokenizer, pairs: list[PreferencePair], params, out: str | Path | None = None, votes: int = 1,
    orders: tuple[str, ...] = ORDERS, cache: str | Path = CACHE, max_prompt: int | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Judge `pairs` in each of `orders`; one row per pair and order, in the order given.

    Columns: id, group, source, order; label, longer, verdict as on the prompt shown ("ba": response_b first, as "Response A");
    correct (an invalid verdict is wrong; NaN where the call is missing), error (why there is no verdict: a parse error, "tied
    vote" or "missing"), critique, text, tokens (completion tokens, all votes; NaN where an endpoint does not tell), seconds (its
    share of the batch, when it was generated; an endpoint's: from question to answer), votes (as "A:3 B:1 invalid:1"). Where the
    pair has critiques of annotators who chose the gold label: precision, recall, f1 of core arguments (0 without a critique),
    inconsistent (a right verdict with f1 below similarity.threshold; None for a wrong one), arguments, reference, matches.

    votes: 1 decodes at evaluation.temperature, 0 being greedy; k samples k completions at rollout.temperature and takes the majority of their valid verdicts; an
    even split is no verdict. An endpoint answers once: votes > 1 is a ValueError. out: the rows also go there as JSONL, without
    seconds. max_prompt: a policy's longest prompt in tokens, where it is not policy.max_prompt."""
    if unknown := set(orders) - set(ORDERS):
        raise ValueError(f"orders: {min(unknown)!r}; allowed: {', '.join(ORDERS)}")
    asked = [(pair, order) for pair in pairs for order in orders]
    if isinstance(judge, (str, Path)) and str(judge).endswith(".jsonl"):
        answers = _recorded(judge, asked)
    elif isinstance(judge, str) and judge == "endpoint":
        from . import endpoint

        if votes > 1:
            raise ValueError(f"judge 'endpoint': votes is {votes}, but its answers are not sampled: set benchmarks.votes to 1, or leave "
                             "endpoint out of benchmarks.judges")  # fmt: skip
        answers = endpoint.answers(asked, params)
    elif callable(judge) and not hasattr(judge, "generate"):
        answers = [_plain(judge(pair.swapped() if order == "ba" else pair)) for pair, order in asked]
    else:
        answers = _policy(judge, tokenizer, asked, params, votes, Path(cache), max_prompt)
    rows = []
    for (pair, order), answer in zip(asked, answers):
        shown = pair.swapped() if order == "ba" else pair
        label = "tie" if pair.meta.get("gold") == "tie" else shown.label
        said: Judgement = answer["judgement"]
        rows.append(
            {
                "id": pair.id, "group": pair.group, "source": pair.source, "order": order, "label": label, "longer": shown.longer,
                "verdict": said.verdict, "correct": None if said.error == MISSING else said.verdict == label, "error": said.error,
                "critique": said.critique, "text": answer["text"], "tokens": answer["tokens"], "seconds": answer["seconds"],
                "votes": answer["votes"],
            }
        )  # fmt: skip
    _process([p.swapped() if o == "ba" else p for p, o in asked], rows, params)
    if out is not None:
        pairs_.write_jsonl(out, [{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    columns = ["id", "group", "source", "order", "label", "longer", "verdict", "correct", "error", "critique", "text", "tokens",
               "seconds", "votes", "precision", "recall", "f1", "inconsistent", "arguments", "reference", "matches"]  # fmt: skip
    frame = pd.DataFrame([dict.fromkeys(columns) | row for row in rows], columns=columns, dtype=object)  # None stays None
    numbers = ("correct", "tokens", "seconds", "precision", "recall", "f1", "inconsistent")
    return frame.astype(dict.fromkeys(numbers, float))


def judge(model, tokenizer, pairs: list[PreferencePair], params, orders=ORDERS, votes: int = 1, cache=CACHE) -> dict[str, list[Judgement]]:
    """{order: one Judgement per pair} of a policy, without the scoring that `evaluate` adds."""
    asked = [(pair, order) for order in orders for pair in pairs]
    said = [a["judgement"] for a in _policy(model, tokenizer, asked, params, votes, Path(cache))]
    return {order: said[i * len(pairs) : (i + 1) * len(pairs)] for i, order in enumerate(orders)}


def _process(shown: list[PreferencePair], rows: list[dict], params):
    """Add the process figures to rows whose pair has human critiques that agree with the label."""
    with_reference = [i for i, p in enumerate(shown) if p.agreeing]
    if not with_reference:
        return
    from rmnlhf import judge, similarity

    scored = [i for i in with_reference if rows[i]["error"] != MISSING]
    found = similarity.similarity_many(  # a judgement without a critique says nothing: 0, where the others of its pair are known
        [rows[i]["critique"] for i in scored], [[c.text for c in shown[i].agreeing] for i in scored], kind="core",
        backend=params.similarity.backend, judge=judge.of(params),
    ) if scored else []  # fmt: skip
    for i, s in zip(scored, found):
        row = rows[i]
        if np.isnan(s.f1):  # a judge call that failed, references without an argument: missing
            continue
        row |= {"precision": s.precision, "recall": s.recall, "f1": s.f1}
        row["inconsistent"] = row["f1"] < params.similarity.threshold if row["correct"] else None
        row |= {"arguments": [vars(a) for a in s.generated], "reference": [vars(a) for a in s.reference],
                "matches": [[int(a), int(b), float(c)] for a, b, c in s.matches]}  # fmt: skip


def vote(said: list[Judgement]) -> tuple[int, Judgement, str]:
    """(index of the completion that stands for all, its judgement, the count) of k judgements: the majority of the valid verdicts.

    The first completion with the winning verdict speaks. An even split: verdict None, error "tied vote"; no valid verdict at
    all: the first one's error."""
    count = Counter(j.verdict for j in said if j.verdict)
    text = " ".join(f"{k}:{n}" for k, n in (("A", count["A"]), ("B", count["B"]), ("invalid", len(said) - count.total())) if n)
    if not count:
        return 0, said[0], text
    if count["A"] == count["B"]:
        return 0, Judgement(said[0].critique, None, "tied vote"), text
    winner = max(count, key=count.get)
    i = next(i for i, j in enumerate(said) if j.verdict == winner)
    return i, said[i], text


# ---- kinds of judge


def _plain(verdict) -> dict:
    verdict = verdict if verdict in ("A", "B", "tie") else None
    return {"judgement": Judgement(None, verdict, None if verdict else "no verdict"), "text": None, "tokens": 0, "seconds": 0.0, "votes": None}


def recorded(path) -> dict[tuple[str, str], dict]:
    """{(pair id, order): row} of a file of recorded verdicts. Raises FileNotFoundError, or ValueError naming the row and what is wrong."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file; expected JSON Lines with id, order (ab, ba) and verdict")
    rows: dict = {}
    for n, row in enumerate(pairs_.read_rows(path), 1):
        where, verdict = f"{path}: row {n}", row.get("verdict")
        if lacking := {"id", "order", "verdict"} - row.keys():
            raise ValueError(f"{where} has no {min(lacking)}: a recorded verdict has id, order (ab or ba, ba showing response_b first) and verdict")
        if row["order"] not in ORDERS:
            raise ValueError(f"{where}: order is {row['order']!r}; allowed: {', '.join(ORDERS)}")
        if verdict not in ("A", "B", "tie", None):
            raise ValueError(f"{where}: verdict is {verdict!r}; allowed: A, B (as shown in this order), tie, null (no readable verdict)")
        if not isinstance(row.get("critique"), (str, type(None))) or not isinstance(row.get("tokens"), (int, float, type(None))):
            raise ValueError(f"{where}: critique is a text and tokens a number, where they are given")
        if rows.setdefault((str(row["id"]), row["order"]), row) != row:
            raise ValueError(f"{where}: id {row['id']!r}, order {row['order']} has another verdict above")
    return rows


def _recorded(path, asked) -> list[dict]:
    """Rows {id, order, verdict[, critique, text, tokens]}, verdict as shown, such as `evaluate` writes; no row: missing."""
    rows = recorded(path)
    out = []
    for pair, order in asked:
        row = rows.get((pair.id, order))
        answer = _plain(row and row.get("verdict"))
        error = MISSING if row is None or row.get("error") == MISSING else answer["judgement"].error and (row.get("error") or "no verdict")
        answer["judgement"] = Judgement(row and row.get("critique"), answer["judgement"].verdict, error)
        out.append(answer | {"text": row and row.get("text"), "tokens": (row or {}).get("tokens") or 0, "votes": (row or {}).get("votes")})
    return out


def _policy(model, tokenizer, asked, params, votes: int, cache: Path, max_prompt: int | None = None) -> list[dict]:
    r, p = params.rollout, params.policy
    temperature = params.evaluation.temperature if votes == 1 else r.temperature
    top_p, seed = (r.top_p, params.seed) if temperature else (1.0, 0)
    longest = max_prompt or p.max_prompt
    prompts = [grm.encode_prompt(pair, tokenizer, longest, swap=order == "ba", think=params.grm.think) for pair, order in asked]
    name, dtype = _engine(model, params)
    what = json.dumps([pairs_.code("rollout", "policy"), name, str(dtype), votes, p.max_completion, temperature, top_p, seed])
    keys = [hashlib.sha256(f"{what}{ids}".encode()).hexdigest() for ids in prompts]
    file = cache / f"{fingerprint(model)}.jsonl"
    known = {r["key"]: r for r in pairs_.read_rows(file)}
    todo = {k: ids for k, ids in zip(keys, prompts) if k not in known}
    queue = sorted(todo, key=lambda k: (-len(todo[k]), k))  # alike lengths together, whatever order they came in
    size = max(1, (1024 if name in VLLM else r.batch) // votes)  # vLLM schedules by itself, and each call wakes it
    generate = _generate(model, tokenizer, params) if queue else None
    with tqdm(total=len(queue), desc="judge", disable=len(queue) < 2, leave=False) as bar:
        for start in range(0, len(queue), size):
            part = queue[start : start + size]
            began = time.perf_counter()
            done = generate([todo[k] for k in part], votes, p.max_completion, temperature, top_p, seed, r.batch)
            seconds = (time.perf_counter() - began) / len(part)
            rows = [
                {"key": k, "texts": [c.text for c in cs], "tokens": sum(len(c.ids) for c in cs), "seconds": round(seconds, 4)}
                for k, cs in zip(part, done)
            ]
            pairs_.append_rows(file, rows)
            known |= {r["key"]: r for r in rows}
            bar.update(len(part))
    out = []
    for key in keys:
        row = known[key]
        i, said, count = vote([grm.parse_judgement(t, params.grm.max_lines, params.grm.max_chars, params.grm.max_repeats) for t in row["texts"]])
        out.append({"judgement": said, "text": row["texts"][i], "tokens": row["tokens"], "seconds": row["seconds"],
                    "votes": count if votes > 1 else None})  # fmt: skip
    return out


def rollouts(model, tokenizer, prompts, n: int, params, cache: str | Path = ROLLOUTS, part: int = 1024) -> list[list]:
    """Completions at the policy's settings by `rollout.engine`, `part` prompts at a time: P lists of N `rollout.Completion`, without ids
    and log-probabilities. Each part is kept under `cache`, in a file named by the weights; a killed run goes on after the last one."""
    from rmnlhf import rollout

    p, r = params.policy, params.rollout
    what = json.dumps([pairs_.code("rollout", "policy"), rollout.chosen(model, params), n, p.max_completion, r.temperature, r.top_p, params.seed])
    file = Path(cache) / f"{fingerprint(model)}.jsonl"
    starts = range(0, len(prompts), part)
    keys = {start: hashlib.sha256(f"{what}{prompts[start : start + part]}".encode()).hexdigest() for start in starts}
    known = {row["key"]: row["drawn"] for row in pairs_.read_rows(file) if row["key"] in set(keys.values())}
    missing = [start for start in starts if keys[start] not in known]
    engine = rollout.engine(model, tokenizer, params) if missing else None  # one that is not asked would keep its memory
    for start in missing:
        done = engine.generate(prompts[start : start + part], n, p.max_completion, r.temperature, r.top_p, params.seed, r.batch, progress=True)
        known[keys[start]] = [[[c.text, c.finished] for c in mine] for mine in done]
        pairs_.append_rows(file, [{"key": keys[start], "drawn": known[keys[start]]}])
    return [[rollout.Completion([], [], *c) for c in mine] for key in keys.values() for mine in known[key]]


def _engine(model, params) -> tuple:
    """(name, dtype) of the engine that rollout.engine means here, and of its arithmetic: two that round differently answer
    differently."""
    import torch

    from rmnlhf import rollout

    if (name := rollout.chosen(model, params)) in VLLM:
        return name, torch.bfloat16
    # bf16 rounds differently in batches of another size: 3 of 24 greedy completions changed with it, none in fp32. So a CPU,
    # where fp32 costs little at this size, judges in fp32
    return "transformers", torch.float32 if model.device.type == "cpu" else rollout.fast_dtype(model)


def _generate(model, tokenizer, params) -> Callable:
    """`rollout.generate`'s call with this model's weights."""
    from rmnlhf import rollout

    name, dtype = _engine(model, params)
    if name in VLLM:
        return rollout.engine(model, tokenizer, params).generate  # the process's one vLLM or server, which training uses too
    return rollout.TransformersEngine(model, tokenizer, dtype).generate


def fingerprint(model) -> str:
    """16 hex digits that name a model by its weights: every byte of an adapter, and of the base a fixed sample of each tensor."""
    digest = hashlib.sha256(str(getattr(model.config, "_name_or_path", "")).rsplit("/", 1)[-1].encode())
    for name, weight in sorted(model.named_parameters(), key=lambda p: p[0]):
        flat = weight.detach().reshape(-1)
        if "lora_" not in name:
            flat = flat[:: max(1, flat.numel() // 512)]
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(flat.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
