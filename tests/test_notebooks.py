"""Cells of the notebooks, run alone on rows whose answer is known: a difference read the wrong way round would be a claim of its own."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny

from rmnlhf import ROOT, params, report, stats


def run(name, cell, space):
    """The cell's names after it ran among those of `space`."""
    cells = {c["id"]: "".join(c["source"]) for c in json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))["cells"]}
    exec(cells[cell], space)  # noqa: S102
    return space


@pytest.mark.parametrize("order, word", [(1, "reproduced"), (-1, "not reproduced")])
def test_05_and_06_compare_as_the_claims_read_it(order, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results/tables").mkdir(parents=True)
    rng, arms = np.random.default_rng(0), ["cold_start", "outcome", "stock_reason", "offline", "online", "human"]
    level = dict(zip(arms, (0.2, 0.3, 0.35, 0.4, 0.5, 0.7)[::order]))
    judged = pd.DataFrame([
        {"id": f"p{i}", "group": f"g{i % 4}", "order": o, "arm": a, "seed": 7, "f1": f + 0.02 * rng.normal(), "correct": float(i % 3 > 0), "inconsistent": float(i % 2)}
        for a, f in level.items() for i in range(40) for o in ("ab", "ba")
    ])  # fmt: skip
    judged["f1_right"] = judged.f1.where(judged.correct == 1)
    columns = {"core-F1": "f1", "core-F1 of right verdicts": "f1_right", "verdict accuracy": "correct", "inconsistency": "inconsistent"}
    P = params.load(ROOT / "params.yaml", "smoke")
    for name in ("05_grpo_offline", "06_grpo_online"):
        space = run(name, "cell-17", {"judged": judged, "columns": columns, "metrics": {}, "P": P, "np": np, "pd": pd, "stats": stats})
        stats.save(name, space["metrics"])
    found = {c["id"]: c for c in report.claims(report.collect("results"))}
    assert {found[i]["word"] for i in ("process-reward", "online-outcome", "online-offline")} == {word}
    if order > 0:
        assert found["process-reward"]["value"]["mean"] == pytest.approx(0.4, abs=0.02)
        assert space["metrics"]["online_share_of_gap"]["mean"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("biased", [False, True])
def test_03_reads_margins_in_both_orders(biased):
    def margins(model, tokenizer, pairs, P):
        return [(1, 1) if biased else (1, -1) if p.label == "A" else (-1, 1) for p in pairs]

    space = {"P": params.load(ROOT / "params.yaml", "smoke"), "held_out": tiny.pairs(6), "arms": {"cold_start": 0}, "tokenizer": None, "pd": pd}
    found = run("03_cold_start", "cell-09", space | {"cold_start": SimpleNamespace(margins=margins)})["verdicts"]
    single, both = found[found.order != "both"].correct.mean(), found[found.order == "both"].correct.mean()
    assert (single, both) == ((0.5, 0.0) if biased else (1.0, 1.0))


def test_notebooks_use_no_undefined_name():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F821,F823", "notebooks"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
