"""Rollouts on a CPU: N completions of one prompt against N separate requests. Ends in one JSON line.

    python bench/rollout.py [--prompt 400 --tokens 64 --group 8 --repeats 5 --out bench/results/rollout.json]

Both sides: the same engine, the 135M policy, the same number of tokens (the end token is switched off). A separate request is a
call of its own. `batched`: P = 4 prompts × N, what a GRPO step asks for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from rmnlhf import params, policy, rollout


def spread(values) -> dict:
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--prompt", type=int, default=400)
    ap.add_argument("--tokens", type=int, default=64)
    ap.add_argument("--group", type=int, default=8)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--out", type=Path, default=Path("bench/results/rollout.json"))
    args = ap.parse_args()
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

        shared, separate, batched = [], [], []
        for i in range(args.repeats + 1):  # the first round warms up
            one = seconds(prompts[:1], args.group)
            eight = sum(seconds(prompts[:1], 1) for _ in range(args.group))
            four = seconds(prompts, args.group)
            if i:
                shared.append(one)
                separate.append(eight)
                batched.append(four)
        name = str(dtype).removeprefix("torch.")
        tokens = args.group * args.tokens
        result[name] = {
            "separate_over_shared": spread([a / b for a, b in zip(separate, shared)]),
            "tokens_per_second_shared": spread([tokens / s for s in shared]), "tokens_per_second_separate": spread([tokens / s for s in separate]),
            "tokens_per_second_batched": spread([4 * tokens / s for s in batched]),
        }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
