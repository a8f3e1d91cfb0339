"""HaluQuestQA preferences: a human and a model answer to one question, and which of them an expert prefers.

The published table has no justification text, so the pairs carry no critiques."""

from __future__ import annotations

import csv
from pathlib import Path


def fields(data_dir: Path, name: str):
    """The fields of each row's pair."""
    with (data_dir / "haluquestqa" / "preference_data.csv").open(encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            yield {
                "id": f"haluquestqa-{Path(row['source_file']).stem}",
                "group": row["question_text"],
                "context": [{"role": "user", "content": row["question_text"]}],
                "response_a": row["preferred_response"],
                "response_b": row["rejected_response"],
                "label": "A",
            }
