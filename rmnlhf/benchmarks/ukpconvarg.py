"""UKPConvArg (Habernal & Gurevych 2016), debates that no arm was trained on: which of two arguments convinces more.

Rule: accuracy, both orders averaged, fraction of 1, per debate. Rows are PreferencePairs with five workers' reasons each.
`read` gives all debates; notebooks pass the evaluation pairs of the run's own splits instead, which are the unseen ones.
"""

from __future__ import annotations

from rmnlhf import sources

from .own import as_benchmark
from .scoring import Benchmark

BENCHMARK: Benchmark = as_benchmark("ukpconvarg", lambda data_dir: sources.load("ukpconvarg", data_dir), subset="group")
