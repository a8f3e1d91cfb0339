"""Tulu 3 personas, instruction following: a response that meets all constraints against one that misses some; no critiques.

meta: constraints, models [chosen, rejected]."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rmnlhf import sources
from rmnlhf.pairs import PreferencePair, settle


def read(data_dir: Path, name: str = "tulu3_if"):
    """(pairs, rows, Counter of those refused)."""
    pairs, count, refused = [], 0, Counter()
    for _, row in sources.rows("tulu3_if", data_dir):
        count += 1
        chosen, rejected = row["chosen"], row["rejected"]
        try:
            if not chosen or not rejected:
                raise ValueError(f"pair {row['id']!r}: a response is missing")
            pair = PreferencePair(
                f"tulu3_if-{row['id']}", "tulu3_if", row["prompt"], chosen[:-1] or [{"role": "user", "content": row["prompt"]}],
                chosen[-1]["content"], rejected[-1]["content"], "A", [],
                {"constraints": row.get("constraints"), "models": [row.get("chonsen_model"), row.get("rejected_model")]},
            )  # fmt: skip
        except ValueError as e:
            refused[str(e).split(": ", 1)[1]] += 1
        else:
            pairs.append(settle(pair))
    return pairs, count, refused
