"""HaluQuestQA preference data (Sachdeva et al. 2024): 698 pairs of a human and a model answer, an expert's choice and justification.

Rule: accuracy, both orders averaged, fraction of 1. Official rows name the preferred response: it is the first one, so order
"ab" shows it first. Rows that `load` gives are PreferencePairs, whose order a hash decided, with the justifications.
"""

from __future__ import annotations

from rmnlhf import sources

from .own import as_benchmark
from .scoring import Benchmark

BENCHMARK: Benchmark = as_benchmark(
    "haluquestqa", lambda data_dir: sources.load("haluquestqa", data_dir), label=lambda row: "A",
    fields=("preferred_response", "rejected_response"), prompt="question_text",
)  # fmt: skip
