"""What the online MetaRM costs a GRPO step. Needs the runs of 03_cold_start and 04_metarm.

    python bench/metarm.py [--profile cpu] [--repeats 5] [--out bench/results/metarm.json]

One JSON line, medians and spread over the steps of one run (the first left out, drift measures too): seconds of a step, what MetaRM's
update and scores are of it, the step over the same step without them, and the process reward's share."""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from gpu_common import spread

from rmnlhf import grpo, params
from rmnlhf.pairs import read_rows


def steps(P, n: int) -> list[dict]:
    """Seconds of n steps of arm online, by part."""
    P = P.model_copy(update={
        "grpo": P.grpo.model_copy(update={"steps": n + 1, "save_every": n + 1}),
        "metarm": P.metarm.model_copy(update={"drift_every": n + 2}),
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        return list(read_rows(grpo.train("online", P, run=Path(folder) / "online") / "timings.jsonl"))[1:]


if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--profile", default="cpu")
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--out", type=Path, default=Path("bench/results/metarm.json"))
    args = ap.parse_args()
    P = params.load(profile=args.profile)
    rows = [r | {"whole": r["rollout"] + r["reward"] + r["update"]} for r in steps(P, args.repeats)]
    result = json.dumps({
        "bench": "metarm", "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "threads": torch.get_num_threads(),
        "base": P.metarm.base, "tune": P.metarm.tune, "rows_a_step": P.grpo.prompts * P.grpo.group,
        "seconds": {k: spread([r[k] for r in rows]) for k in ("whole", "rollout", "process", "metarm", "update")},
        "with_over_without": spread([r["whole"] / (r["whole"] - r["metarm"]) for r in rows]),
        "process_share": spread([r["process"] / r["whole"] for r in rows]),
    })  # fmt: skip
    args.out.write_text(result + "\n")
    print(result)
