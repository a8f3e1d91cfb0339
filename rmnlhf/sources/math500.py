"""MATH-500: 500 problems with worked solution and answer, for the diagnosis on mathematics; no pairs."""

from __future__ import annotations

from pathlib import Path

from rmnlhf import sources


def rows(data_dir: str | Path = "data") -> list[dict]:
    """[{problem, solution, answer, subject, level, unique_id}]. Raises FileNotFoundError where the file is missing."""
    return [row for _, row in sources.rows("math500", data_dir)]
