"""Any PreferencePair rows as a benchmark: accuracy, both orders averaged, fraction of 1, per `meta["subset"]` where given.

Name a JSONL file in `benchmarks.own` of params.yaml. Lines that are no pair are left out, with a warning that counts them by reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from rmnlhf.pairs import PreferencePair, read_jsonl

from .scoring import Benchmark, Contest, user

log = logging.getLogger(__name__)


def as_benchmark(
    name: str, read: Callable, label: Callable | None = None, fields=("response_a", "response_b"), prompt="prompt", subset="subset"
) -> Benchmark:
    """A benchmark of PreferencePairs (objects or their dicts) or, with `label` and `fields`, of official rows too."""

    def get(row, field, default=None):
        return getattr(row, field, default) if isinstance(row, PreferencePair) else row.get(field, default)

    def contests(row):
        if label and not isinstance(row, PreferencePair) and fields[0] in row:
            return [Contest(row[fields[0]] or "", row[fields[1]] or "", label(row))]
        gold = get(row, "label")
        return [Contest(get(row, "response_a"), get(row, "response_b"), gold if gold in ("A", "B") else None)]

    def row_id(row):
        return str(get(row, "id") or f"{contests(row)[0].first}\n{contests(row)[0].second}")

    def part(row):
        meta = get(row, "meta") or {}
        return str(get(row, subset) or meta.get(subset) or "all")

    return Benchmark(
        name, read, row_id, contests, context=lambda r: get(r, "context") or user(get(r, prompt, "")), subset=part,
        group=lambda r: str(get(r, "group") or row_id(r)),
    )  # fmt: skip


def open_file(path: str | Path) -> Benchmark:
    def read(data_dir):
        found = read_jsonl(path)
        for reason, n in found.refused.items():
            log.warning("%s: %d of %d rows left out: %s (%s)", path, n, found.lines, reason, found.examples[reason])
        return found.pairs

    return as_benchmark(str(path), read)
