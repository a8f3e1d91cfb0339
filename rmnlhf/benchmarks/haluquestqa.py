"""HaluQuestQA preference data (Sachdeva et al. 2024): 698 pairs of a human and a model answer, and which one an expert prefers.

Rule: accuracy, both orders averaged, fraction of 1. Official rows name the preferred response: it is the first one, so order
"ab" shows it first. Rows that `load` gives are PreferencePairs, whose order a hash decided. The published file holds no
justifications, so there are no human critiques to compare with.
"""

from __future__ import annotations

from rmnlhf import sources

from .own import as_benchmark
from .scoring import Benchmark

BENCHMARK: Benchmark = as_benchmark(
    "haluquestqa", lambda data_dir: sources.load("haluquestqa", data_dir), label=lambda row: "A",
    fields=("preferred_response", "rejected_response"), prompt="question_text",
)  # fmt: skip
