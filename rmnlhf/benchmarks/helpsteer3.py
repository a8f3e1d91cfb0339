"""HelpSteer3 preference, validation split (2,017 rows): which of two responses annotators prefer, in four domains.

Rule: sign of `overall_preference` (negative = response 1 better; 0 = no gold, not scored); accuracy, both orders averaged,
fraction of 1, per domain. Where the split has not been fetched, the 100 real rows of helpsteer3_sample stand in, with a
warning, and the figures are `partial`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from rmnlhf import sources

from .own import as_benchmark
from .scoring import Benchmark, Case, plain_official


def read(data_dir: Path) -> list:
    """PreferencePairs with their human critiques."""
    if sources.available("helpsteer3", data_dir):
        pairs = [p for p in sources.load("helpsteer3", data_dir) if p.meta.get("split") == "validation"]
        if pairs:
            return pairs
    logging.getLogger(__name__).warning("helpsteer3: the validation split is not in %s; its 100 sample rows stand in", data_dir)
    return sources.load("helpsteer3_sample", data_dir)


def label(row: dict) -> str | None:
    preference = row.get("overall_preference") or 0
    return None if preference == 0 else "A" if preference < 0 else "B"


def official(rows: list, cases: list[list[Case]], subset) -> dict:
    stand_in = any(getattr(r, "source", "") == "helpsteer3_sample" for r in rows)
    return plain_official(rows, cases, subset) | {"partial": ["validation split; a sample of 100 rows stands in"] if stand_in else False}


BENCHMARK: Benchmark = replace(
    as_benchmark("helpsteer3", read, label=label, fields=("response1", "response2"), subset="domain"), official=official
)
