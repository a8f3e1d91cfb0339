"""ProcessBench: 3,400 model solutions of math problems, with the first wrong step as marked by experts; no pairs."""

from __future__ import annotations

from pathlib import Path

from rmnlhf import sources


def rows(data_dir: str | Path = "data") -> list[dict]:
    """[{id, subset (gsm8k | math | olympiadbench | omnimath), generator, problem, steps, final_answer_correct, label}].

    label: index of the first wrong step, -1 where all are right. Raises FileNotFoundError where files are missing."""
    return [{"subset": subset, **row} for subset, row in sources.rows("processbench", data_dir)]
