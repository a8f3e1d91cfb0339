"""PandaLM test set v1 (Wang et al. 2023): 999 pairs of instruction-tuned models' answers, three annotators each.

Official rule: gold = the annotators' majority among tie, 1, 2 (no majority: tie; it does not occur); one order, response
1 shown first; accuracy and macro precision, recall and F1 over the three classes, fractions of 1. A judge that cannot say
"tie" is wrong on every gold tie; `accuracy_decided` leaves these out.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from sklearn.metrics import precision_recall_fscore_support

from rmnlhf import sources

from .scoring import VALID, Benchmark, Case, Contest, by, mean, user

RECORDED = "outputs/pandalm-7b-testset-v1.json"


def read(data_dir: Path) -> list[dict]:
    return json.loads((sources.path("pandalm", data_dir) / "testset-v1.json").read_text(encoding="utf-8"))


def recorded(data_dir: str | Path = "data") -> tuple[list[dict], list, None]:
    """(rows, verdicts_ab, None) of PandaLM-7B as its authors recorded them: one order."""
    rows = read(Path(data_dir))
    said = json.loads((sources.path("pandalm", data_dir) / RECORDED).read_text(encoding="utf-8"))
    verdict = {r["idx"]: {"0": "tie", "1": "A", "2": "B"}.get(str(r["pandalm_result"])) for r in said}
    return rows, [verdict[r["idx"]] for r in rows], None


def gold(row: dict) -> str:
    (first, votes), *_ = Counter(str(row[f"annotator{i}"]) for i in (1, 2, 3)).most_common()
    return {"1": "A", "2": "B"}.get(first, "tie") if votes > 1 else "tie"


def official(rows: list, cases: list[list[Case]], subset) -> dict:
    flat = [c for cs in cases for c in cs]
    figures = [0.0] * 3
    if flat:
        figures = precision_recall_fscore_support(
            [c.gold for c in flat], [c.ab or "invalid" for c in flat], labels=VALID, average="macro", zero_division=0
        )[:3]
    accuracy = mean(c.hits[0] for c in flat)
    kinds = by((subset(r) for r, cs in zip(rows, cases) for _ in cs), (c.hits[0] for c in flat))
    return {
        "accuracy": accuracy, "official": accuracy, "unit": "fraction",
        **dict(zip(("macro_precision", "macro_recall", "macro_f1"), map(float, figures))),
        "accuracy_decided": mean(c.hits[0] for c in flat if c.gold != "tie"),
        "subsets": {k: mean(v) for k, v in kinds.items()},
    }  # fmt: skip


BENCHMARK = Benchmark(
    "pandalm",
    read,
    row_id=lambda r: str(r["idx"]),
    contests=lambda r: [Contest(str(r["response1"]), str(r["response2"]), gold(r))],  # one text upstream is a bare true
    context=lambda r: user("\n\n".join(t for t in (r["instruction"], r.get("input")) if t)),
    subset=lambda r: r.get("cmp_key") or "all",
    group=lambda r: f"{r['instruction']}\n{r.get('input') or ''}",
    official=official,
)
