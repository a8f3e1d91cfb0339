"""HaluQuestQA preferences: a human and a model answer to one question, and which of them an expert prefers.

The published table has no justification text, so the pairs carry no critiques."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

from rmnlhf.pairs import PreferencePair, settle


def read(data_dir: Path, name: str = "haluquestqa"):
    """(pairs, rows of the table, Counter of those refused)."""
    pairs, rows, refused = [], 0, Counter()
    with (data_dir / "haluquestqa" / "preference_data.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            rows += 1
            try:
                pair = PreferencePair(
                    f"haluquestqa-{Path(row['source_file']).stem}", "haluquestqa", row["question_text"],
                    [{"role": "user", "content": row["question_text"]}], row["preferred_response"], row["rejected_response"], "A",
                )  # fmt: skip
            except ValueError as e:
                refused[str(e).split(": ", 1)[1]] += 1
            else:
                pairs.append(settle(pair))
    return pairs, rows, refused
