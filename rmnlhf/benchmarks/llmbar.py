"""LLMBar (Zeng et al. 2024): 419 pairs, one following the instruction and one only looking better, in five subsets.

Official rule: accuracy per subset, both orders averaged; headline = mean over the subsets (percent); `adversarial` = mean
over the four adversarial ones. A subset is a folder upstream: `read` adds it as column "subset". `partial` names subsets
without a row.
"""

from __future__ import annotations

import json
from pathlib import Path

from rmnlhf import sources

from .scoring import Benchmark, Case, Contest, by, mean, user

FOLDERS = {f"Adversarial/{n}": n for n in ("Neighbor", "GPTInst", "GPTOut", "Manual")} | {"Natural": "Natural"}


def read(data_dir: Path) -> list[dict]:
    folder = sources.path("llmbar", data_dir)
    return [
        {**row, "subset": subset, "idx": i}
        for name, subset in FOLDERS.items()
        for i, row in enumerate(json.loads((folder / name / "dataset.json").read_text(encoding="utf-8")))
    ]


def official(rows: list, cases: list[list[Case]], subset) -> dict:
    shares = by((subset(r) for r, cs in zip(rows, cases) for _ in cs), (c.share for cs in cases for c in cs))
    percent = {k: 100 * mean(v) for k, v in shares.items()}
    adversarial = [v for k, v in percent.items() if k in FOLDERS.values() and k != "Natural"]
    overall = mean(percent.values())
    missing = [s for s in FOLDERS.values() if s not in percent]
    out = {
        "accuracy": overall / 100, "official": overall, "unit": "percent", "subsets": percent, "partial": missing or False,
        "adversarial": mean(adversarial) if adversarial else None,
    }  # fmt: skip
    return out | {"overall_partial" if missing else "overall": overall}


BENCHMARK = Benchmark(
    "llmbar",
    read,
    row_id=lambda r: f"{r.get('subset', 'all')}-{r['idx']}" if "idx" in r else f"{r['input']}\n{r['output_1']}\n{r['output_2']}",
    contests=lambda r: [Contest(r["output_1"], r["output_2"], {1: "A", 2: "B", "1": "A", "2": "B"}.get(r["label"]))],
    context=lambda r: user(r["input"]),
    subset=lambda r: r.get("subset", "all"),
    group=lambda r: r["input"],
    official=official,
    mean_of_subsets=True,
)
