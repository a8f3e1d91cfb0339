"""Benchmarks on their official rows, by their official rules, with the same figures beside them for all.

    score("judgebench", rows, verdicts_ab, verdicts_ba) -> {"overall": 65.71, "knowledge": 58.44, ..., "consistent_accuracy": ...}

`names()` lists them; the path of a JSONL file of PreferencePair rows is a name too. `runner` asks a judge.
"""

from __future__ import annotations

import hashlib
from importlib import import_module
from pathlib import Path

import numpy as np

from rmnlhf import sources, stats
from rmnlhf.pairs import PreferencePair

from . import own
from .scoring import Benchmark, shared

NAMES = ["judgebench", "pandalm", "llmbar", "rm_bench", "rewardbench", "rewardbench2", "helpsteer3", "ukpconvarg", "haluquestqa"]


def names() -> list[str]:
    return list(NAMES)


def get(name: str) -> Benchmark:
    """The benchmark of that name, or of that source's pairs, or of the JSONL file of that path. Raises KeyError for anything else."""
    if name in NAMES:
        return import_module(f"rmnlhf.benchmarks.{name}").BENCHMARK
    if str(name).endswith(".jsonl"):
        return own.open_file(name)
    if name in sources.names():
        return own.as_benchmark(name, lambda data_dir: sources.load(name, data_dir))
    raise KeyError(f"unknown benchmark {name!r}; known: {', '.join(NAMES)}, a source of pairs, or the path of a .jsonl file of pairs")


def load(name: str, data_dir: str | Path = "data") -> list:
    """The benchmark's rows as its files have them. Raises FileNotFoundError, saying what to run, where they are missing."""
    try:
        return get(name).read(Path(data_dir))
    except FileNotFoundError as e:
        hint = "" if "run `" in str(e) or str(name).endswith(".jsonl") else "; run `make data`"
        raise FileNotFoundError(f"benchmark {name}: {e}{hint}") from e


def sample(name: str, rows: list, contests: int) -> list:
    """The first rows by a hash of their id that together hold at least `contests` contests (all, where there are fewer)."""
    bench, out, held = get(name), [], 0
    for row in sorted(rows, key=lambda r: hashlib.sha256(bench.row_id(r).encode()).hexdigest()):
        if held >= contests:
            break
        out.append(row)
        held += len(bench.contests(row))
    return out


def pairs(name: str, rows: list) -> list[PreferencePair]:
    """The rows' contests as pairs to be judged; see `Benchmark.pairs`."""
    return get(name).pairs(rows)


def score(name: str, rows: list, verdicts_ab, verdicts_ba=None) -> dict:
    """Figures of one judge on one benchmark.

    rows: the benchmark's own. verdicts_ab, verdicts_ba: one verdict per contest, as given on the prompt shown: "A" = the
    response shown first, "B" = the second, "tie", anything else (None) = invalid. Order "ab" shows the row's first
    response first (response_A, response1, output_1, chosen); "ba" shows it second. A row with several contests takes them
    flat or nested, in the order that its module states (rm_bench: 9 a row, chosen style × rejected style; rewardbench2:
    chosen × rejected). verdicts_ba None: one order was judged.

    Returns, as fractions of 1: `accuracy` (the official headline) and the figures of `scoring.shared`; `official` = the
    headline in the benchmark's own `unit` ("percent" or "fraction"), `subsets` and what else its module states, in that
    unit; `partial`: False, or what these rows lack of the whole set: the headline is then that of the rest. An invalid verdict
    is wrong everywhere; a judge that says nothing scores 0. Figures do not depend on the rows' order.
    Raises KeyError for an unknown name, ValueError where verdicts do not match the rows."""
    bench = get(name)
    rows = list(rows)
    cases = bench.cases(rows, verdicts_ab, verdicts_ba)
    if verdicts_ba is None:  # official rules that average both orders then average one
        cases = [[c._replace(ba=c.ab) for c in cs] for cs in cases]
    scored = [(r, cs) for r, cs in zip(rows, cases) if cs]
    figures = bench.official([r for r, _ in scored], [cs for _, cs in scored], bench.subset)
    return {"benchmark": str(name), "partial": False, **figures, **shared(cases, both=verdicts_ba is not None), "unscored": len(rows) - len(scored)}


def interval(name: str, rows: list, verdicts_ab, verdicts_ba=None, n: int = 2000, level=0.95, seed=0):
    """(official figure, low, high) in the benchmark's unit, its groups drawn (see `Benchmark.group`).

    `stats.interval` of the rows' own figures where the official one is their mean. A mean over subsets gives it jackknife
    pseudo-values instead, C·(figure of all C groups) − (C−1)·(figure without this one): drawing the rows themselves would empty
    small subsets. One group: (figure, nan, nan); none: three NaN."""
    bench, by_group = get(name), {}
    for row, cs in zip(rows, bench.cases(rows, verdicts_ab, verdicts_ba)):
        if cs:
            cs = cs if verdicts_ba is not None else [c._replace(ba=c.ab) for c in cs]
            by_group.setdefault((bench.group or bench.row_id)(row), []).append((bench.row_id(row), row, cs))
    groups = [sorted(by_group[g], key=lambda x: x[0]) for g in sorted(by_group)]

    def figures(parts):
        return bench.official([r for g in parts for _, r, _ in g], [cs for g in parts for *_, cs in g], bench.subset)

    if not groups:
        return np.nan, np.nan, np.nan
    found, c = figures(groups), len(groups)
    if bench.mean_of_subsets and c > 1:
        values = [c * found["accuracy"] - (c - 1) * figures(groups[:i] + groups[i + 1 :])["accuracy"] for i in range(c)]
        middle, low, high = stats.interval(values, n=n, level=level, seed=seed)
    else:
        values = [figures([[member]])["accuracy"] for g in groups for member in g]
        middle, low, high = stats.interval(values, np.repeat(np.arange(c), [len(g) for g in groups]), n=n, level=level, seed=seed)
    scale = 100 if found["unit"] == "percent" else 1
    low, high = (float(scale * np.clip(x + found["accuracy"] - middle, 0, 1)) for x in (low, high))
    return found["official"], low, high


def verdicts(name: str, rows: list, frame) -> tuple[list, list]:
    """(verdicts_ab, verdicts_ba) for `score`, flat, from the DataFrame of `runner.evaluate`; what was not asked is None."""
    said = {(i, o): v if v in ("A", "B", "tie") else None for i, o, v in zip(frame["id"], frame["order"], frame["verdict"])}
    ids = [key for row in rows for key in get(name).pair_ids(row)]
    return [said.get((i, "ab")) for i in ids], [said.get((i, "ba")) for i in ids]
