"""Intervals, paired differences and Holm's correction: what stands beside every figure in a table.

Rows of one group (debate, question) are not independent, so groups are what is drawn, never rows. A NaN is a missing
value: left out. Nothing depends on the order of the rows.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
from scipy import stats


def _clusters(values, groups) -> tuple[np.ndarray, np.ndarray]:
    """(sums_C, counts_C) of the C groups that hold a value, in an order that the rows' order does not change."""
    values = np.asarray(values, dtype=float).ravel()
    groups = np.arange(len(values)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    if len(groups) != len(values):
        raise ValueError(f"{len(values)} values but {len(groups)} groups: give one group per value")
    known = ~np.isnan(values)
    values, groups = values[known], groups[known]
    order = np.lexsort((values, groups))  # a group's values are always added in one order: sums agree to the last bit
    sums = np.bincount(groups[order], weights=values[order])
    counts = np.bincount(groups)
    sums, counts = sums[counts > 0], counts[counts > 0]
    order = np.lexsort((counts, sums))
    return sums[order], counts[order]


def interval(values, groups=None, n: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): the mean over rows and its percentile bootstrap interval from `n` draws of whole groups.

    Percentiles are widened for few groups (Hesterberg 2015, "expanded percentile"): the plain ones are too narrow by
    sqrt((C-1)/C) and take the normal where the t distribution belongs. They are read off the mid-distribution function: the
    bootstrap of a share moves in steps, and a whole step on either side would make its interval too wide. Strongly skewed
    values in few groups stay short of the level (30 exponential draws: about 91 of 100). Where all values are 0 or all are 1
    a bootstrap would claim certainty: the open side is then Clopper-Pearson's, with C groups. No value: (nan, nan, nan); one
    group says nothing about groups: (mean, nan, nan)."""
    sums, counts = _clusters(values, groups)
    mean, low, high = _bootstrap(sums, counts, n, level, seed)
    if low == high and mean in (0, 1):
        exact = ((1 - level) / 2) ** (1 / len(sums))
        low, high = (exact, 1.0) if mean == 1 else (0.0, 1 - exact)
    return mean, low, high


def _bootstrap(sums, counts, n, level, seed):
    if not len(sums):
        return (np.nan,) * 3
    mean, c = float(sums.sum() / counts.sum()), len(sums)
    if c == 1:
        return mean, np.nan, np.nan
    if np.allclose(sums, mean * counts, rtol=1e-12, atol=0):  # nothing varies
        return mean, mean, mean
    wide = 2 * stats.norm.cdf(np.sqrt(c / (c - 1)) * stats.t.ppf((1 + level) / 2, c - 1)) - 1
    drawn = stats.bootstrap(
        (sums, counts), lambda s, k, axis: s.sum(axis) / k.sum(axis), paired=True, vectorized=True, n_resamples=n,
        method="percentile", batch=max(1, 2_000_000 // c), rng=np.random.default_rng(seed),
    )  # fmt: skip
    steps, count = np.unique(drawn.bootstrap_distribution, return_counts=True)
    low, high = np.interp([(1 - wide) / 2, (1 + wide) / 2], (np.cumsum(count) - count / 2) / n, steps)
    return mean, float(low), float(high)


def paired(a, b, groups=None, n: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float, float]:
    """(difference, low, high, p) of mean(a) - mean(b), row i of `a` and of `b` being the same row.

    A row that misses on either side is left out of both. `p` is two-sided, from flipping the sign of whole groups: exact
    where the groups that differ are few, else from 5 x `n` flips (never below 1 / (5n + 1)). NaN where nothing is left."""
    a, b = np.asarray(a, dtype=float).ravel(), np.asarray(b, dtype=float).ravel()
    if len(a) != len(b):
        raise ValueError(f"paired: {len(a)} and {len(b)} values; give both arms on the same rows, in the same order")
    sums, counts = _clusters(a - b, groups)
    diff, low, high = _bootstrap(sums, counts, n, level, seed)
    if not len(sums):
        return (np.nan,) * 4
    sums = sums[sums != 0]
    if len(sums) < 2:
        return diff, low, high, 1.0
    flipped = stats.permutation_test(
        (sums,), lambda s, axis: s.sum(axis), permutation_type="samples", vectorized=True, n_resamples=5 * n,
        batch=max(1, 2_000_000 // len(sums)), rng=np.random.default_rng(seed),
    )  # fmt: skip
    return diff, low, high, float(min(1.0, flipped.pvalue))


def over(judged, arm: str, other: str, column: str, n: int = 2000) -> dict:
    """{mean, low, high, p, n} of `column` in one arm less the other, pair by pair (column id); orders and seeds are averaged within a
    pair. The interval draws pairs; beside it, of how many groups (debates) the pairs are, and in how many the difference lies above 0:
    {of_groups, groups_above}. judged: rows of `runner.evaluate` with a column arm."""
    both = judged.pivot_table(index="id", columns="arm", values=column, aggfunc="mean").reindex(columns=[arm, other]).dropna()
    out = dict(zip(("mean", "low", "high", "p"), paired(both[arm], both[other], both.index, n)), n=len(both))
    by_group = (both[arm] - both[other]).groupby(judged.groupby("id")["group"].first()).mean()
    return out | {"of_groups": len(by_group), "groups_above": int((by_group > 0).sum())}


def habits(judged) -> dict:
    """What a judge says whatever it is shown: {"distinct critiques": how many, sides' names aside; "most frequent critique": its share of all
    judgements; "first response named": share of the readable verdicts}. judged: rows of `runner.evaluate`."""
    said = judged["critique"].dropna().map(lambda text: re.sub(r"\b(Response|Answer) [AB]\b", r"\1 X", text))
    named = judged["verdict"].dropna()
    return {
        "distinct critiques": int(said.nunique()),
        "most frequent critique": float(said.value_counts().iloc[0] / len(judged)) if len(said) else None,
        "first response named": float((named == "A").mean()) if len(named) else None,
    }


def holm(pvalues) -> np.ndarray:
    """Holm's step-down adjusted p-values, in the order given; NaN (not tested) stays NaN and does not count."""
    p = np.asarray(pvalues, dtype=float)
    out = np.full(p.shape, np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return out


def tree(frame, *keys: str) -> dict:
    """{value of the first key: {value of the second: … {column: cell}}} of a table, as a metrics file holds it; NaN as None."""
    out = {}
    for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
        here = out
        for key in keys:
            here = here.setdefault(str(row.pop(key)), {})
        here |= {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    return out


def save(name: str, metrics: dict, folder: str | Path = "results/metrics") -> Path:
    """Write a notebook's figures to <folder>/<name>.json, by rename; returns the path. A figure that is not finite is null."""
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_plain(metrics), ensure_ascii=False, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def _plain(value):
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value
