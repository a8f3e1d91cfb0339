"""What 01_diagnosis shows, checked against files and closed forms. The notebook's functions are tested as they stand there."""

import json
import re

import nbformat
import numpy as np
import pandas as pd
import pytest

from rmnlhf import ROOT, pairs, params, similarity, sources, stats
from rmnlhf.pairs import HumanCritique, PreferencePair
from rmnlhf.sources import processbench

NOTEBOOK = ROOT / "notebooks/01_diagnosis.ipynb"


@pytest.fixture(scope="module")
def notebook():
    """Names that the cells tagged `tested` define, run with what the notebook imports and with no pairs at hand."""
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if "tested" in c.metadata.get("tags", [])]
    space = {"np": np, "pd": pd, "re": re, "pairs": pairs, "stats": stats, "sources": sources, "similarity": similarity,
             "processbench": processbench, "sets": {}, "P": params.load(ROOT / "params.yaml", profile="cpu")}  # fmt: skip
    for source in cells:
        exec(source, space)  # noqa: S102
    return space


def test_processbench_shares_are_those_of_the_files(data_dir, notebook):
    """The paper's claim, "near zero in mathematics", against people's step labels: 3.5 / 18.8 / 32.2 / 51.8 %."""
    expected = {"gsm8k": 3.5, "math": 18.8, "olympiadbench": 32.2, "omnimath": 51.8}
    table = notebook["wrong_process"](processbench.rows(data_dir)).set_index("set")
    for name, percent in expected.items():
        rows = json.loads((data_dir / "processbench" / f"{name}.json").read_text())  # the file itself, past the loader
        right = [r for r in rows if r["final_answer_correct"]]
        count = sum(r["label"] != -1 for r in right)
        assert table.loc[name, "n"] == len(right) and table.loc[name, "mean"] == pytest.approx(count / len(right), abs=1e-6)
        assert round(100 * count / len(right), 1) == percent
        assert table.loc[name, "low"] < percent / 100 < table.loc[name, "high"]
        binomial = 1.96 * np.sqrt(percent * (100 - percent) / len(right)) / 100
        assert 0.5 * binomial < (table.loc[name, "high"] - table.loc[name, "low"]) / 2 < 2 * binomial
    assert list(table.index) == list(expected)


def test_wrong_process_looks_at_right_answers_only(notebook):
    def row(right, label, i, subset="x"):
        return {"subset": subset, "final_answer_correct": right, "label": label, "problem": str(i)}

    rows = [row(True, -1, 0), row(True, 0, 1), row(True, 3, 2), row(True, -1, 3), row(False, 0, 4), row(False, 2, 5), row(True, -1, 6, "y")]
    table = notebook["wrong_process"](rows).set_index("set")
    assert table.loc["x", "mean"] == 0.5 and table.loc["x", "n"] == 4, "step 0 is a step too"
    assert table.loc["y", "mean"] == 0 and table.loc["y", "n"] == 1


def test_inconsistency_is_a_share_of_right_verdicts(notebook):
    frame = pd.DataFrame({
        "correct": [1.0, 1.0, 1.0, 0.0, 1.0, np.nan, 1.0],  # wrong verdict, missing call and missing critique are out
        "f1": [0.49, 0.5, 0.9, 0.0, np.nan, 0.0, 0.0],
        "group": list("abcdefg"),
    })  # fmt: skip
    found = notebook["inconsistency"](frame, 0.5)
    assert found["mean"] == 0.5 and found["n"] == 4 and found["low"] <= 0.5 <= found["high"]
    none = notebook["inconsistency"](frame.assign(correct=0.0), 0.5)
    assert none == {"mean": None, "low": None, "high": None, "n": 0, "groups": 0}, "no right verdict: no rate, not a rate of 0"
    one_debate = notebook["inconsistency"](frame.assign(group="a"), 0.5)
    assert one_debate["mean"] == 0.5 and one_debate["low"] is None, "one group says nothing about groups"


def test_inconsistency_interval_covers(notebook):
    """Of 150 draws with a known rate of 0.3 over 24 debates of 8 rows, the 95 % interval holds the truth in most."""
    rng, hit = np.random.default_rng(0), 0
    for _ in range(150):
        group = np.repeat(np.arange(24), 8)
        rate = np.clip(0.3 + rng.normal(0, 0.1, 24), 0, 1)[group]
        f1 = np.where(rng.random(len(group)) < rate, 0.2, 0.8)
        found = notebook["figure"](f1 < 0.5, group, n=300)
        hit += found["low"] <= 0.3 <= found["high"]
    assert hit >= 132


@pytest.mark.parametrize("k", [2, 5, 100])
@pytest.mark.parametrize("s", [0.05, 0.387, 0.9])
def test_guessing_closed_form_and_simulation(notebook, k, s):
    n, rng = 200_000, np.random.default_rng(k)
    drawn = notebook["simulate"](k, s, n, rng)
    share = notebook["wrong_share"](k, s)
    assert share == pytest.approx(((1 - s) / k) / (s + (1 - s) / k))
    assert abs(drawn.mean() - share) < 5 * np.sqrt(share * (1 - share) / len(drawn))
    assert abs(len(drawn) / n - (s + (1 - s) / k)) < 0.01, "the accuracy is that of the formula too"
    assert notebook["answers_needed"](share, s) == pytest.approx(k)


def test_guessing_vanishes_with_the_answer_space(notebook):
    shares = [notebook["wrong_share"](k, 0.387) for k in (2, 4, 16, 256, 10**6)]
    assert shares == sorted(shares, reverse=True) and shares[0] == pytest.approx(0.442, abs=1e-3) and shares[-1] < 1e-5
    assert notebook["wrong_share"](2, notebook["s"]) == pytest.approx(0.4424)


@pytest.mark.parametrize("text, answer", [
    (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} no, \boxed{ 2 }", "2"), (r"$\boxed{\left( 3, \frac{\pi}{2} \right)}$", r"(3,\frac{\pi}{2})"),
    (r"\boxed{\dfrac{3}{4}}.", r"\frac{3}{4}"), ("It is 1,234.", "1234"), ("x = -3/4", "-3/4"), ("3.50 dollars", "3.50"),
    (r"\boxed{unfinished", None), ("", None), ("none", None), (r"\boxed{\text{east}}", "east"), (r"\boxed{90^\circ}", r"90^\circ"),
])  # fmt: skip
def test_final_answer(notebook, text, answer):
    assert notebook["final_answer"](text) == answer


def test_final_answer_reads_the_reference_solutions(data_dir, notebook):
    """On MATH-500's own worked solutions the reader finds the stated answer."""
    from rmnlhf.sources import math500

    rows = math500.rows(data_dir)
    right = [notebook["final_answer"](r["solution"]) == notebook["plain"](r["answer"]) for r in rows]
    assert np.mean(right) > 0.97


def test_known_critics(notebook):
    def pair(i, label, annotators):
        said = [HumanCritique(str(a), label if a else None, f"Reason {a} of {i}.") for a in annotators]
        return PreferencePair(f"p{i}", "t", f"g{i}", [{"role": "user", "content": "q"}], "a", "b", label, said)

    members = [pair(0, "A", [1, 2, 3]), pair(1, "A", [1, 2]), pair(2, "B", [1, 2]), pair(3, "B", [1]), pair(4, "A", [0, 0, 1])]
    rows = list(notebook["known_critics"](members))
    assert {p.id for _, p, _, _ in rows} == {"p0", "p1", "p2"}, "two agreeing annotators are needed"
    for critic, p, text, references in rows:
        own = {c.text for c in p.agreeing}
        assert set(references) < own and len(references) == len(own) - 1
        assert text not in references, "nobody is measured against himself"
        if critic == "annotator":
            assert text in own
        elif critic == "stranger":
            assert text not in own and any(text in {c.text for c in o.agreeing} and o.label == p.label for o in members)
        else:
            assert p.label in text
    assert [p.id for c, p, _, _ in rows if c == "stranger"] == ["p0", "p1"], "a lone pair of its verdict has no stranger"
