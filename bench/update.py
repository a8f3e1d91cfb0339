"""The GRPO update on a CPU: shared-prefix packing against trl's padded forward. Ends in one JSON line.

    python bench/update.py [--prompt 350 --completion 96 --group 8 --repeats 5 --out bench/results/update.json]

One group of random tokens, SmolLM2-135M with LoRA on all linear layers, trl's own loss, forward + backward (the reference left
out on both sides). Each memory figure is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_common import spread

from rmnlhf import grpo, params, policy


def trainer(dtype: str, tmp: str, budget: int):
    """A GRPO trainer on the 135M policy whose adapter is not zero, so that every gradient is."""
    from datasets import Dataset

    settings = params.load(profile="cpu", overrides=[f"policy.dtype={dtype}", "policy.rank=16", "policy.alpha=32", f"grpo.token_budget={budget}"])
    model, tokenizer = policy.load(settings, trainable=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.01 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    reward = grpo.RewardFunction("outcome", settings, [])
    rows = Dataset.from_list([{"prompt": "p", "pair_id": "p", "swap": 0}])
    out = grpo.Trainer(
        model, reward, grpo.arguments(settings, Path(tmp), 0), rows, processing_class=tokenizer, encoded={}, engine=None, run=tmp,
        params=settings, beta=0.0, seed=0,
    )  # fmt: skip
    out.current_gradient_accumulation_steps = 1
    if not out.packed:
        raise SystemExit("the shared-prefix update is not used here: see the message above")
    return out


def batch(p: int, c: int, n: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(10, 49000, (1, p), generator=generator).repeat(n, 1)
    completion = torch.randint(10, 49000, (n, c), generator=generator)
    ones = torch.ones_like
    return {
        "prompt_ids": prompt, "prompt_mask": ones(prompt), "completion_ids": completion, "completion_mask": ones(completion),
        "advantages": torch.randn(n, generator=generator), "num_items_in_batch": torch.tensor(n * c),
    }  # fmt: skip


def update(t, inputs, packed: bool) -> float:
    """Seconds of one forward + backward."""
    t.packed = packed
    t.model.train()
    t.model.zero_grad()
    start = time.perf_counter()
    t.pack_loss(t.model, dict(inputs)).backward()
    return time.perf_counter() - start


def gradient(t) -> torch.Tensor:
    return torch.cat([w.grad.flatten().double() for w in t.model.parameters() if w.grad is not None])


def matmul_rate(dtype, seconds: float = 2.0) -> float:
    """FLOP/s of 2560 × 576 × 1536 products."""
    a, b = torch.randn(2560, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    for _ in range(5):
        a @ b
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        n += 1
    return n * 2 * 2560 * 576 * 1536 / (time.perf_counter() - start)


def useful(t, p: int, c: int, n: int) -> float:
    """4 × parameters × tokens of a LoRA update: layers at P + N(C-1) tokens, head at the N·C that need it."""
    base = t.model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    layers = sum(w.numel() for k, w in base.named_parameters() if "lora_" not in k and "embed" not in k and "lm_head" not in k)
    return 4.0 * (layers * (p + n * (c - 1)) + head * n * c)


def resident(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at its highest."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def peak(args, dtype: str, packed: bool) -> float:
    """MiB above the loaded model, of a fresh process that does one update."""
    command = [sys.executable, __file__, "--peak", "ours" if packed else "trl", "--dtype", dtype]
    command += [f"--{k}={getattr(args, k)}" for k in ("prompt", "completion", "group")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--prompt", type=int, default=350)
    ap.add_argument("--completion", type=int, default=96)
    ap.add_argument("--group", type=int, default=8)
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--out", type=Path, default=Path("bench/results/update.json"))
    ap.add_argument("--peak", choices=("ours", "trl"))
    args = ap.parse_args()
    inputs = batch(args.prompt, args.completion, args.group)
    tmp = tempfile.mkdtemp()
    if args.peak:
        t = trainer(args.dtype, tmp, 10**6)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading the weights, is forgotten
        before = resident("VmRSS")
        update(t, inputs, args.peak == "ours")
        print(resident("VmHWM") - before)
        return
    exact = trainer("float32", tmp, 10**6)
    update(exact, inputs, True)
    ours = gradient(exact)
    update(exact, inputs, False)
    wanted = gradient(exact)
    difference = ((ours - wanted).norm() / wanted.norm()).item()
    flop = useful(exact, args.prompt, args.completion, args.group)
    in_fp32 = [flop / update(exact, inputs, True) / matmul_rate(torch.float32) for _ in range(args.repeats)]  # where no matrix unit sets the rate
    t = trainer(args.dtype, tmp, 10**6)
    times, rates = {True: [], False: []}, []
    for i in range(args.repeats + 1):  # the first round warms up
        for packed in (True, False):
            s = update(t, inputs, packed)
            if i:
                times[packed].append(s)
        rates.append(matmul_rate(t.model.get_base_model().dtype))
    ratios = [a / b for a, b in zip(times[False], times[True])]
    shares = [flop / s / r for s, r in zip(times[True], rates[1:])]
    memory = {packed: [peak(args, args.dtype, packed) for _ in range(args.repeats)] for packed in (True, False)}
    result = {
        "bench": "update", "device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__, "dtype": args.dtype,
        "model": "smollm2-135m", "P": args.prompt, "C": args.completion, "N": args.group, "gradient_relative_difference_fp32": difference,
        "seconds_trl": spread(times[False]), "seconds_ours": spread(times[True]), "trl_over_ours": spread(ratios),
        "useful_flop_share": spread(shares), "useful_flop_share_fp32": spread(in_fp32), "matmul_gflops": spread([r / 1e9 for r in rates[1:]]),
        "peak_mib_trl": spread(memory[False]), "peak_mib_ours": spread(memory[True]),
        "peak_ours_over_trl": round(median(memory[True]) / median(memory[False]), 3),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
