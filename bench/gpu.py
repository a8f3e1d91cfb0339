"""One GRPO step of a 7B policy by each backend, in one run: ours on Transformers, Unsloth's own path, plain trl.

    python bench/gpu.py                                   # bench/results/gpu.json, or $OUT/gpu.json
    python bench/gpu.py --backend trl --prompt 1000       # one case, one JSON line

For prompts of 1,000 and 2,500 tokens: seconds of a step (rollouts of one group, then the update), share of the matrix-product
rate that the update makes useful, peak memory, and rollout tokens/s over the decode bound (the time to read the weights once for
each token). Each case is a process of its own. Without CUDA: tiny shapes, nothing is written.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

BACKENDS = ("transformers", "unsloth", "trl")
ASKED = argparse.ArgumentParser(description=__doc__.split("\n")[0])
ASKED.add_argument("--backend", choices=BACKENDS)
ASKED.add_argument("--prompt", type=int, default=0, help="tokens of the prompt; without CUDA a 20th of it")
ASKED.add_argument("--base", help="folder with the weights for Unsloth, which loads no model from memory")

if __name__ == "__main__" and "unsloth" in sys.argv and importlib.util.find_spec("unsloth"):
    import unsloth  # noqa: F401  # before anything imports Transformers

# isort: off
from gpu_common import (
    alone, attempt, batch, build, device, header, machine, report, setting, small_params, timed, tokenizer, trainer, update, useful_flop,
)  # fmt: skip

PROMPTS = (1000, 2500)


def policy(backend: str, s, base: str | None):
    """The random 7B with LoRA and gradient checkpointing, as this backend loads it."""
    import torch

    if backend != "unsloth":
        return build(s.size, torch.bfloat16, s.rank, checkpointing=True)
    import unsloth  # noqa: F401

    from rmnlhf import policy as loader

    params = small_params(base, **{
        "policy.backend": "unsloth", "policy.dtype": "bfloat16", "policy.rank": s.rank, "policy.alpha": 2 * s.rank, "policy.max_prompt": s.P,
        "policy.max_completion": s.C, "policy.gradient_checkpointing": "true",
    })  # fmt: skip
    return loader.load(params, trainable=True)[0]


def rollouts(backend: str, model, s):
    """A call that makes N completions of `tokens` tokens of one prompt, with this backend's engine."""
    import torch

    prompt = batch(s, model.device)["prompt_ids"][:1]
    if backend == "transformers":
        from rmnlhf import rollout

        engine = rollout.TransformersEngine(model, tokenizer())

        def draw():
            engine.sync(model)
            return engine.generate([prompt[0].tolist()], s.N, s.tokens, 1.0, 1.0, 0, 64)
    else:

        def draw():
            with torch.no_grad():
                model.eval()
                return model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, max_new_tokens=s.tokens,
                    min_new_tokens=s.tokens, num_return_sequences=s.N, pad_token_id=0, use_cache=True,
                )  # fmt: skip

    return draw


def case(backend: str, s, base: str | None) -> dict:
    rate, model = machine(s), policy(backend, s, base)
    made = timed(rollouts(backend, model, s), max(1, s.repeats // 2))
    with tempfile.TemporaryDirectory() as folder:
        model.train()
        done = update(trainer(model, s, backend == "transformers", folder), batch(s, model.device), s.repeats)
    flop, tokens = useful_flop(model, s), s.N * s.tokens / made["seconds"]
    read = sum(w.nbytes for n, w in model.named_parameters() if "lora_" not in n)
    return {
        "step_seconds": made["seconds"] + done["seconds"], "rollout": made, "update": done,
        "update_mfu": flop / done["seconds"] / (rate["matmul_tflops"] * 1e12), "rollout_tokens_per_second": tokens,
        "rollout_over_decode_bound": tokens / (rate["copy_gbs"] * 1e9 / read * s.N), "machine": rate,
    }  # fmt: skip


def shape(prompt: int):
    s = setting(device() == "cuda")
    s.P = prompt if device() == "cuda" else max(8, prompt // 20)
    return s


def save_base(folder: str) -> str:
    """The same random 7B on disk, with a tokenizer: what Unsloth loads."""
    import torch

    build(shape(PROMPTS[0]).size, torch.bfloat16, 1).unload().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def main():
    args = ASKED.parse_args()
    if args.backend:
        s = shape(args.prompt or PROMPTS[-1])

        def one(s):
            return case(args.backend, s, args.base)

        print(json.dumps(attempt(one, s)))
        return
    found, script = header(), str(Path(__file__).resolve())
    with tempfile.TemporaryDirectory() as folder:
        for backend in BACKENDS:
            base = []
            if backend == "unsloth":
                if not found["cuda"] or not importlib.util.find_spec("unsloth"):
                    found[backend] = {"missing": "unsloth"} if found["cuda"] else {"skipped": "no CUDA device"}
                    continue
                base = ["--base", save_base(folder)]
            for prompt in PROMPTS:
                name = f"{backend}_{prompt}"
                found[name] = alone(script, "--backend", backend, "--prompt", str(prompt), *base)
                print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    for prompt in PROMPTS:
        times = {b: found[f"{b}_{prompt}"]["step_seconds"] for b in BACKENDS if "step_seconds" in found.get(f"{b}_{prompt}", {})}
        found[f"fastest_{prompt}"] = min(times, key=times.get) if times else None
        if {"trl", "transformers"} <= times.keys():
            found[f"step_trl_over_ours_{prompt}"] = times["trl"] / times["transformers"]
    report("gpu.json", found)
    sys.exit(any("failed" in v for v in found.values() if isinstance(v, dict)))


if __name__ == "__main__":
    main()
