"""JudgeBench (Tan et al. 2024): 350 pairs of GPT-4o and 270 of Claude 3.5 responses, one right and one subtly wrong.

Official rule (its `utils/metrics.py`): +1 for each order that is right, -1 for each that is wrong, 0 for a tie or a
failure; right if the sum is positive. Percent of pairs, overall and for four kinds of source; published per response model.
With one order judged: right in that order.
"""

from __future__ import annotations

import json
from pathlib import Path

from rmnlhf import sources

from .scoring import Benchmark, Case, Contest, by, mean, user

FILES = ["response_model-gpt-4o-2024-05-13.jsonl", "response_model-claude-3-5-sonnet-20240620.jsonl"]
KINDS = {"livebench-reasoning": "reasoning", "livebench-math": "mathematics", "livecodebench": "coding"}
RECORDED = "outputs/response_model-gpt-4o-2024-05-13_judge_name-arena_hard_judge_model-o1-mini-2024-09-12.jsonl"


def read(data_dir: Path) -> list[dict]:
    folder = sources.path("judgebench", data_dir)
    return [json.loads(line) for f in FILES for line in (folder / f).read_text(encoding="utf-8").splitlines() if line]


def recorded(data_dir: str | Path = "data") -> tuple[list[dict], list, list]:
    """(rows, verdicts_ab, verdicts_ba) of o1-mini as the authors recorded them; the second order is stored as seen."""
    text = (sources.path("judgebench", data_dir) / RECORDED).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines() if line]
    first, second = ([(r["judgments"][k] or {}).get("decision") for r in rows] for k in (0, 1))
    return rows, first, second


def official(rows: list, cases: list[list[Case]], subset) -> dict:
    def sign(verdict, gold):
        return 0 if verdict not in ("A", "B") else 1 if verdict == gold else -1

    right = [sign(c.ab, c.gold) + sign(c.ba, c.gold) > 0 for cs in cases for c in cs]
    kinds = by((subset(r) for r, cs in zip(rows, cases) for _ in cs), right)
    percent = {k: 100 * mean(v) for k, v in kinds.items()}
    overall = 100 * mean(right)
    return {"accuracy": mean(right), "official": overall, "unit": "percent", "overall": overall, **percent, "subsets": percent}


BENCHMARK = Benchmark(
    "judgebench",
    read,
    row_id=lambda r: f"{r.get('response_model', '')}-{r['pair_id']}",
    contests=lambda r: [Contest(r["response_A"], r["response_B"], {"A>B": "A", "B>A": "B"}.get(r["label"]))],
    context=lambda r: user(r["question"]),
    subset=lambda r: KINDS.get(r["source"], "knowledge"),
    group=lambda r: f"{r['source']}-{r.get('original_id', r['pair_id'])}",  # both response models answer the same question
    official=official,
)
