"""A whole GRPO step on a CPU: plain trl (Transformers generation, padded update) against ours. Ends in one JSON line.

    python bench/grpo_step.py [--prompts 2 --group 8 --tokens 64 --repeats 5 --out bench/results/grpo_step.json]

Both sides: the 135M policy in the cpu profile's dtype with the same LoRA, the same prompts, KL on, the same reward (a hash of the text,
so that every group has a signal). Rollouts end where the policy ends them; tokens are told for each side. Three steps before those
that count: the first ones of a process touch its memory for the first time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from datasets import Dataset
from gpu_common import spread
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from rmnlhf import grm, grpo, params, policy, rollout
from rmnlhf.pairs import PreferencePair, fingerprint

WARM = 3


def pairs(n: int) -> list[PreferencePair]:
    """Pairs as long as a debate's: about 350 tokens a prompt."""
    reasons = [f"Number {i} matters, because the people of town {i % 7} said so in the year {1900 + i}." for i in range(40)]
    out = []
    for i in range(n):
        a, b = " ".join(reasons[i : i + 5]), " ".join(reasons[i + 6 : i + 11])
        out.append(PreferencePair(f"p{i}", "bench", f"g{i}", [{"role": "user", "content": f"Is {i} a good number?"}], a, b, "A"))
    return out


class Hashed(grpo.RewardFunction):
    """Another reward for each text: no group is degenerate."""

    def __call__(self, prompts, completions, pair_id, swap, **columns):
        super().__call__(prompts, completions, pair_id, swap, **columns)
        return [fingerprint(c, i) % 1000 / 1000 for i, c in enumerate(completions)]


def run(kind: str, settings, steps: int):
    """(seconds of each step after the WARM first, tokens generated a step, prompt tokens)."""
    members = pairs(settings.grpo.prompts)
    model, tokenizer = policy.load(settings, trainable=True)
    tokenizer.padding_side = "left"
    ids = {p.id: grm.encode_prompt(p, tokenizer, settings.policy.max_prompt) for p in members}
    rows = [{"prompt": p.id, "pair_id": p.id, "swap": 0} for _ in range(steps) for p in members]
    reward, args, ends = Hashed("outcome", settings, members), grpo.arguments(settings, Path(tempfile.mkdtemp()), 0), []
    args.save_strategy = "no"
    dataset = Dataset.from_list(rows)
    if kind == "trl":
        args.beta = settings.grpo.beta
        args.bf16, args.mixed_precision = True, "bf16"  # trl's default; our own trainer has a narrower context (policy.mixed_precision)

        class Trainer(GRPOTrainer):
            def _tokenize_prompts(self, prompts):
                return [ids[p] for p in prompts], None, {}

        trainer = Trainer(model, reward, args, dataset, processing_class=tokenizer)
    else:
        trainer = grpo.Trainer(
            model, reward, args, dataset, processing_class=tokenizer, encoded=ids, engine=rollout.TransformersEngine(model, tokenizer),
            run=args.output_dir, params=settings, beta=settings.grpo.beta, seed=0,
        )  # fmt: skip
    trainer.remove_callback(PrinterCallback)

    class Clock(TrainerCallback):
        def on_step_end(self, *a, **k):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(ends)][WARM - 1 :]
    generated = trainer.state.num_input_tokens_seen - sum(len(i) for i in ids.values()) * settings.grpo.group * steps
    return seconds, generated / steps, sum(len(i) for i in ids.values())


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--prompts", type=int, default=2)
    ap.add_argument("--group", type=int, default=8)
    ap.add_argument("--tokens", type=int, default=64)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--out", type=Path, default=Path("bench/results/grpo_step.json"))
    a = ap.parse_args()
    overrides = [f"grpo.prompts={a.prompts}", f"grpo.group={a.group}", f"policy.max_completion={a.tokens}", f"grpo.steps={a.repeats + WARM}"]
    settings = params.load(profile="cpu", overrides=overrides)
    ours, our_tokens, prompt = run("ours", settings, a.repeats + WARM)
    theirs, their_tokens, _ = run("trl", settings, a.repeats + WARM)
    result = {
        "bench": "grpo_step", "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": settings.policy.dtype,
        "model": "smollm2-135m", "prompts": a.prompts, "group": a.group, "prompt_tokens": prompt, "max_tokens": a.tokens,
        "tokens_a_step_trl": round(their_tokens), "tokens_a_step_ours": round(our_tokens), "seconds_trl": spread(theirs),
        "seconds_ours": spread(ours), "trl_over_ours": spread([x / y for x, y in zip(theirs, ours)]),
    }  # fmt: skip
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
