"""RewardBench (Lambert et al. 2024): chosen against rejected in 23 subsets and four sections.

Official rule (its `rewardbench/utils.py`): accuracy per subset; section = mean over its subsets weighted by size, where
math-prm counts 984 for its 447 rows (as many as the code subsets together); headline = mean of the sections. Fractions of
1. Both orders averaged; order "ab" shows the chosen response first. An unparsable verdict earns nothing (upstream: 0.5).
Sections without a row, and subsets without one in the other sections, are named in `partial`.
"""

from __future__ import annotations

from pathlib import Path

from rmnlhf import sources

from .scoring import Benchmark, Case, Contest, by, mean, user

SECTIONS = {
    "Chat": ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
    "Chat Hard": ["mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
                  "llmbar-adver-manual"],
    "Safety": ["refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer"],
    "Reasoning": ["math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"],
}  # fmt: skip
ROW_WEIGHT = {"math-prm": 984 / 447}


def read(data_dir: Path, name: str = "rewardbench", split: str = "filtered") -> list[dict]:
    """Rows of the hub's parquet files, of the split that is the benchmark."""
    import pandas as pd

    folder = sources.path(name, data_dir)
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder}: no {split}-*.parquet; run `python -m rmnlhf.sources {name}` (needs the hub)")
    rows = [row for f in files for row in pd.read_parquet(f).to_dict("records")]
    return [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in row.items()} for row in rows]


def official(rows: list, cases: list[list[Case]], subset) -> dict:
    shares = by((subset(r) for r, cs in zip(rows, cases) for _ in cs), (c.share for cs in cases for c in cs))
    weights = {k: len(v) * ROW_WEIGHT.get(k, 1) for k, v in shares.items()}
    subsets = {k: mean(v) for k, v in shares.items()}
    sections = {}
    for section, names in SECTIONS.items():
        if here := [k for k in names if k in subsets]:
            sections[section] = sum(subsets[k] * weights[k] for k in here) / sum(weights[k] for k in here)
    overall = mean(sections.values()) if sections else mean(subsets.values())
    missing = [x for s, names in SECTIONS.items() for x in ([k for k in names if k not in subsets] if s in sections else [s])]
    out = {"accuracy": overall, "official": overall, "unit": "fraction", "sections": sections, "subsets": subsets}
    return out | {"partial": missing or False, "overall_partial" if missing else "overall": overall}


BENCHMARK = Benchmark(
    "rewardbench",
    read,
    row_id=lambda r: f"{r.get('subset', 'all')}-{r['id']}",
    contests=lambda r: [Contest(r["chosen"], r["rejected"], "A")],
    context=lambda r: user(r["prompt"]),
    subset=lambda r: r.get("subset", "all"),
    official=official,
    mean_of_subsets=True,
)
