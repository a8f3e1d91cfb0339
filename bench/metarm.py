"""What the online MetaRM costs a GRPO step. Needs the runs of 03_cold_start and 04_metarm.

    python bench/metarm.py [--profile cpu] [--steps 4] [--out bench/results/metarm.json]

One JSON line: seconds of a step with the frozen and with the online MetaRM (same prompts, first step left out) and their ratio."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from rmnlhf import grpo, params
from rmnlhf.pairs import read_rows


def steps(P, n):
    """Mean seconds of one step in arms offline and online, drift measures left out."""
    P = P.model_copy(update={
        "grpo": P.grpo.model_copy(update={"steps": n, "save_every": n}),
        "metarm": P.metarm.model_copy(update={"drift_every": n + 1}),
    })  # fmt: skip
    out = {}
    for arm in ("offline", "online"):
        with tempfile.TemporaryDirectory() as folder:
            run = grpo.train(arm, P, run=Path(folder) / arm)
            rows = list(read_rows(run / "timings.jsonl"))[1:]
            out[arm] = {k: float(np.mean([r[k] for r in rows])) for k in ("rollout", "reward", "update")}
    return out


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--profile", default="cpu")
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--out", type=Path, default=Path("bench/results/metarm.json"))
    args = ap.parse_args()
    P = params.load(profile=args.profile)
    seconds = steps(P, args.steps)
    total = {arm: sum(parts.values()) for arm, parts in seconds.items()}
    result = json.dumps({
        "bench": "metarm", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads(),
        "base": P.metarm.base, "tune": P.metarm.tune, "rows_a_step": P.grpo.prompts * P.grpo.group, "seconds": seconds,
        "online_over_offline": total["online"] / total["offline"],
    })  # fmt: skip
    args.out.write_text(result + "\n")
    print(result)
