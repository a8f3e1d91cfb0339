"""What all benchmarks share: contests, verdicts in both orders, and the figures that stand in every column.

A row of a benchmark holds one or more contests: a first and a second response, one of them better. Order "ab" shows the
first response first, order "ba" the second. Verdicts arrive as given on the prompt shown.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rmnlhf.pairs import OTHER, PreferencePair

VALID = ("A", "B", "tie")
_SPELLINGS = {"A>B": "A", "A>>B": "A", "B>A": "B", "B>>A": "B", "A=B": "tie", 1: "A", 2: "B", 0: "tie"}


class Contest(NamedTuple):
    """Two responses of a row; `gold`: "A" the first is better, "B" the second, "tie", None = no gold label (not scored)."""

    first: str
    second: str
    gold: str | None


class Case(NamedTuple):
    """A contest's gold label and its verdicts, all naming the first response "A" (the "ba" verdict is turned round)."""

    gold: str
    ab: str | None
    ba: str | None

    @property
    def hits(self) -> tuple[bool, bool]:
        return self.ab == self.gold, self.ba == self.gold

    @property
    def share(self) -> float:
        """Share of the two orders that are right: 0, 0.5 or 1."""
        return sum(self.hits) / 2


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else 0.0


def by(keys: Iterable, values: Iterable) -> dict[str, list]:
    """{key: its values}, keys sorted: the figures do not depend on the rows' order."""
    out = defaultdict(list)
    for k, v in zip(keys, values):
        out[k].append(v)
    return {k: out[k] for k in sorted(out)}


def plain_official(rows: list, cases: list[list[Case]], subset: Callable) -> dict:
    """Accuracy of single verdicts, both orders averaged, fraction of 1."""
    shares = [c.share for cs in cases for c in cs]
    subsets = by((subset(r) for r, cs in zip(rows, cases) for _ in cs), shares)
    return {"accuracy": mean(shares), "official": mean(shares), "unit": "fraction", "subsets": {k: mean(v) for k, v in subsets.items()}}


@dataclass(frozen=True)
class Benchmark:
    """One benchmark; its file says where the rule comes from.

    read(data_dir) -> rows, as upstream has them (what only a file's name tells is added as a column)
    row_id(row), subset(row) -> str; group(row): what a bootstrap draws (default: the row itself)
    context(row) -> list of {role, content}; contests(row) -> list[Contest]
    official(rows, cases, subset) -> {"accuracy": headline as fraction, "official": headline in its own "unit", "subsets": {...}, ...}
    """

    name: str
    read: Callable[[Path], list]
    row_id: Callable[[dict], str]
    contests: Callable[[dict], list[Contest]]
    context: Callable[[dict], list[dict]]
    subset: Callable[[dict], str] = lambda row: "all"
    group: Callable[[dict], str] | None = None
    official: Callable = plain_official
    mean_of_subsets: bool = False  # the headline is a mean over subsets (else over rows)

    def pair_ids(self, row) -> list[str]:
        """One id per contest of a row: the row's, with the contest's number where there are several."""
        if isinstance(row, PreferencePair):
            return [row.id]
        key, k = f"{self.name}-{self.row_id(row)}", len(self.contests(row))
        return [key] if k == 1 else [f"{key}-{i}" for i in range(k)]

    def pairs(self, rows) -> list[PreferencePair]:
        """The contests as pairs, in the rows' order. A `PreferencePair` knows no tie: such a contest is asked too (to call it
        is a mistake that counts), with `meta["gold"] = "tie"` and a label nobody may read as gold. Left out: contests
        without a gold label, with an empty response or with two equal ones (their verdict stays None, so wrong)."""
        out = []
        for row in rows:
            if isinstance(row, PreferencePair):
                out.append(row)
                continue
            meta = {"benchmark": self.name, "subset": self.subset(row)}
            for key, c in zip(self.pair_ids(row), self.contests(row)):
                if c.gold and c.first.strip() and c.second.strip() and c.first.strip() != c.second.strip():
                    label, group = "A" if c.gold == "tie" else c.gold, (self.group or self.row_id)(row)
                    extra = {**meta, "gold": c.gold}
                    out.append(PreferencePair(key, self.name, group, self.context(row), c.first, c.second, label, [], extra))
        return out

    def cases(self, rows, verdicts_ab, verdicts_ba) -> list[list[Case]]:
        """The scored contests of each row. Raises ValueError where verdicts and rows do not match."""
        ab, ba = (_align(self, rows, v, order) for v, order in ((verdicts_ab, "verdicts_ab"), (verdicts_ba, "verdicts_ba")))
        return [
            [Case(c.gold, va, OTHER.get(vb, vb)) for c, va, vb in zip(self.contests(row), row_ab, row_ba) if c.gold]
            for row, row_ab, row_ba in zip(rows, ab, ba)
        ]


def _read(verdict) -> str | None:
    """A verdict as "A", "B", "tie" or None; anything that is none of these is invalid, and so wrong."""
    try:
        verdict = _SPELLINGS.get(verdict, verdict)
    except TypeError:
        return None
    return verdict if verdict in VALID else None


def _align(bench: Benchmark, rows, verdicts, what: str) -> list[list]:
    """One list of verdicts per row, from a flat list or from one already nested by row; None: this order was not judged."""
    counts = [len(bench.contests(r)) for r in rows]
    if verdicts is None:
        return [[None] * k for k in counts]
    verdicts = list(verdicts)
    flat = []
    for v in verdicts:
        flat += _flatten(v) if isinstance(v, (list, tuple, np.ndarray)) else [v]
    if len(flat) != sum(counts):
        raise ValueError(f"{bench.name}: {what} has {len(flat)} verdicts, the {len(rows)} rows hold {sum(counts)} contests")
    flat = iter([_read(v) for v in flat])
    return [list(itertools.islice(flat, k)) for k in counts]


def _flatten(nested) -> list:
    return [x for v in nested for x in (_flatten(v) if isinstance(v, (list, tuple, np.ndarray)) else [v])]


def shared(cases: list[list[Case]], both: bool = True) -> dict:
    """The figures that every benchmark gets, as fractions of 1, over contests.

    accuracy_ab, accuracy_ba: right verdicts in each order; accuracy_mean: their mean
    consistent_accuracy: right in both orders; consistency: the same response preferred (or the same tie) in both
    first_position: share of the A/B verdicts, both orders, that name the response shown first (0 where there is none)
    invalid, ties: share of all verdicts; n: rows; contests: contests, each judged once per order
    Where only one order was judged, what needs the other is None."""
    flat = [c for cs in cases for c in cs]
    asked = [c.ab for c in flat] + ([OTHER.get(c.ba, c.ba) for c in flat] if both else [])  # as shown
    ab, ba = mean(c.hits[0] for c in flat), mean(c.hits[1] for c in flat)
    return {
        "accuracy_ab": ab,
        "accuracy_ba": ba if both else None,
        "accuracy_mean": (ab + ba) / 2 if both else ab,
        "consistent_accuracy": mean(all(c.hits) for c in flat) if both else None,
        "consistency": mean(c.ab is not None and c.ab == c.ba for c in flat) if both else None,
        "first_position": mean(v == "A" for v in asked if v in OTHER),
        "invalid": mean(v is None for v in asked),
        "ties": mean(v == "tie" for v in asked),
        "n": sum(bool(cs) for cs in cases),
        "contests": len(flat),
    }


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]
