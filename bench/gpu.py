"""One GRPO step of a 7B policy by each backend, in one run: ours with Transformers' or vLLM's rollouts, ours on Unsloth's kernels
(prompts padded, vLLM's rollouts where it is installed), plain trl.

    python bench/gpu.py                                   # bench/results/gpu.json, or $OUT/gpu.json
    python bench/gpu.py --backend trl --prompt 1000       # one case, one JSON line

For prompts of 1,000 and 2,500 tokens: seconds of a step (rollouts of one group, 600 tokens each, then their update), share of the matrix-product
rate that the update makes useful, peak memory, and rollout tokens/s over the decode bound (the time to read the weights once for
each token). Each case is a process of its own. Without CUDA: tiny shapes, nothing is written.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

BACKENDS = ("transformers", "vllm", "unsloth", "trl")
LOADED = ("vllm", "unsloth")  # these read a folder, and need CUDA
ASKED = argparse.ArgumentParser(description=__doc__.split("\n")[0])
ASKED.add_argument("--backend", choices=BACKENDS)
ASKED.add_argument("--prompt", type=int, default=0, help="tokens of the prompt; without CUDA a 20th of it")
ASKED.add_argument("--base", help="folder with the weights for vLLM and Unsloth, which load no model from memory")

# isort: off
from gpu_common import (
    alone, attempt, batch, build, device, drawing, header, machine, report, setting, small_params, timed, tokenizer, trainer, update, useful_flop,
)  # fmt: skip

PROMPTS = (1000, 2500)


def policy(backend: str, s, base: str | None):
    """The random 7B with LoRA and gradient checkpointing, as this backend loads it; the parameters of one that is read from a folder."""
    import torch

    if backend not in LOADED:
        return build(s.size, torch.bfloat16, s.rank, checkpointing=True), None
    from rmnlhf import grpo  # noqa: F401  # trl first, as in a notebook: Unsloth then leaves its trainers alone
    from rmnlhf import policy as loader

    params = small_params(base, **{
        "policy.backend": "unsloth" if backend == "unsloth" else "transformers", "policy.dtype": "bfloat16", "policy.rank": s.rank,
        "policy.alpha": 2 * s.rank, "policy.max_prompt": s.P, "policy.max_completion": s.C, "policy.gradient_checkpointing": "true",
        "rollout.engine": "vllm",
    })  # fmt: skip
    return loader.load(params, trainable=True)[0], params


def case(backend: str, s, base: str | None) -> dict:
    rate, (model, params) = machine(s), policy(backend, s, base)
    engine = "vllm" if backend == "unsloth" and importlib.util.find_spec("vllm") else backend  # Unsloth's models fill no cache of ours
    made = timed(drawing(engine, model, s, params), max(1, s.repeats // 2))
    with tempfile.TemporaryDirectory() as folder:
        model.train()
        packed = {"trl": False, "unsloth": None}.get(backend, True)  # Unsloth's forward knows no shared prefix
        done = update(trainer(model, s, packed, folder), batch(s, model.device), s.repeats)
    flop, tokens = useful_flop(model, s), s.N * s.C / made["seconds"]
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
    """The same random 7B on disk, with a tokenizer; this process keeps none of the GPU's memory."""
    import torch

    build(shape(PROMPTS[0]).size, torch.bfloat16, 1).unload().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    gc.collect()
    torch.cuda.empty_cache()
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
            if backend in LOADED:
                if not found["cuda"] or not importlib.util.find_spec(backend):
                    found[backend] = {"missing": backend} if found["cuda"] else {"skipped": "no CUDA device"}
                    continue
                base = ["--base", folder if any(Path(folder).iterdir()) else save_base(folder)]
            for prompt in PROMPTS:
                name = f"{backend}_{prompt}"
                found[name] = alone(script, "--backend", backend, "--prompt", str(prompt), *base)
                print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    for prompt in PROMPTS:
        times = {b: found[f"{b}_{prompt}"]["step_seconds"] for b in BACKENDS if "step_seconds" in found.get(f"{b}_{prompt}", {})}
        found[f"fastest_{prompt}"] = min(times, key=times.get) if times else None
        if {"trl", "transformers"} <= times.keys():
            found[f"step_trl_over_ours_{prompt}"] = times["trl"] / times["transformers"]
        if {"trl", "vllm"} <= times.keys():  # the default where vLLM is installed
            found[f"step_trl_over_ours_with_vllm_{prompt}"] = times["trl"] / times["vllm"]
    report("gpu.json", found)
    sys.exit(any("failed" in v for v in found.values() if isinstance(v, dict)))


if __name__ == "__main__":
    main()
