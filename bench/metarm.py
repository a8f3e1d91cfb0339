"""What MetaRM costs a GRPO step, and what it does when the policy's style shifts. Needs the runs of 03_cold_start and 04_metarm.

    python bench/metarm.py [--profile cpu] [--steps 4] [--out bench/results/metarm.json]

One JSON line: seconds of a step with the frozen and with the online MetaRM (same prompts, first step left out) and their ratio;
errors before and after a planted shift, with replay and without."""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from rmnlhf import grpo, metarm, params, splits
from rmnlhf.cold_start import lead
from rmnlhf.pairs import fingerprint, swap_sides


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
            rows = grpo.read(run / "timings.jsonl")[1:]
            out[arm] = {k: float(np.mean([r[k] for r in rows])) for k in ("rollout", "reward", "update")}
    return out


def shift(P, pairs):
    """A policy that begins to concede: it first praises the response that it does not choose. Online updates against none.

    Rows are made of human critiques of unseen groups; the last quarter of the pairs measures, the others come in step by step."""
    old = metarm.from_humans(pairs, P)
    new = []
    for row in old:
        text, right = row["critique"], row["target"] > 0
        verdict = row["pair"].label if right else "AB".replace(row["pair"].label, "")
        new.append(row | {"critique": f"{swap_sides(text)} That may be said. {lead(verdict)}"})
    quarter = {p.id for p in pairs if fingerprint("bench", p.id) % 4 == 0}
    test_old, test_new = ([r for r in rows if r["group"] in quarter] for rows in (old, new))
    stream = sorted((r for r in new if r["group"] not in quarter), key=lambda r: fingerprint(r["group"], r["critique"]))
    out, size = {}, max(1, P.grpo.prompts * P.grpo.group // 2)
    for name, replay in (("replay", P.metarm.replay), ("no_replay", 0)):
        frozen, online = (metarm.MetaRM.load("results/runs/metarm", P.metarm.model_copy(update={"replay": replay})) for _ in range(2))
        if not replay:
            online.buffer, online.buffer_targets = None, torch.zeros(0)
        for k in range(0, len(stream), size):
            online.update(stream[k : k + size])
        before, after = metarm.drift(frozen, online, test_old), metarm.drift(frozen, online, test_new)
        out[name] = {
            "updates": -(-len(stream) // size), "old_mae_before": before["frozen_mae"], "old_mae_after": before["online_mae"],
            "shifted_mae_frozen": after["frozen_mae"], "shifted_mae_online": after["online_mae"], "n": after["n"],
        }  # fmt: skip
    return out


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--profile", default="cpu")
    ap.add_argument("--steps", type=int, default=4)
    ap.add_argument("--pairs", type=int, default=160, help="unseen pairs whose critiques the planted shift is made of")
    ap.add_argument("--out", type=Path, default=Path("bench/results/metarm.json"))
    args = ap.parse_args()
    P = params.load(profile=args.profile)
    seconds = steps(P, args.steps) if args.steps else {}
    total = {arm: sum(parts.values()) for arm, parts in seconds.items()}
    shifted = shift(P, [p for p in splits.load().unseen if p.agreeing][: args.pairs])
    result = json.dumps({
        "bench": "metarm", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads(),
        "base": P.metarm.base, "tune": P.metarm.tune, "rows_a_step": P.grpo.prompts * P.grpo.group, "seconds": seconds,
        "online_over_offline": total["online"] / total["offline"] if total else None, "shift": shifted,
    })  # fmt: skip
    args.out.write_text(result + "\n")
    print(result)
