"""MR-Ben: a correct against an incorrect solution of one exam question, with two annotators' reasons for the error.

Every correct solution of a question is paired with every incorrect one; questions with solutions of one kind give no pair.
The reasons speak of the incorrect solution without naming it; they are led by its name. Coding solutions have one annotator.
meta: subject, first_error_step, error_reasons (as written), models [correct, incorrect].
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rmnlhf import sources
from rmnlhf.pairs import HumanCritique, PreferencePair, settle


def _solution(row: dict) -> str:
    steps = row["Model_Solution_Steps"]
    return (steps if isinstance(steps, str) else "\n".join(steps)).strip()


def read(data_dir: Path, name: str = "mr_ben"):
    """(pairs, correct x incorrect candidates, Counter of those refused)."""
    pairs, candidates, refused = [], 0, Counter()
    for _, solutions in sources.rows("mr_ben", data_dir):
        right, wrong = ([s for s in solutions if s["Model_Solution_Correctness"] == c] for c in ("correct", "incorrect"))
        for i, good in enumerate(right):
            for j, bad in enumerate(wrong):
                candidates += 1
                reasons = bad["Model_Solution_Error_Reason"]
                reasons = [r.strip() for r in ([reasons] if isinstance(reasons, str) else reasons) if r and r.strip()]
                question = "\n".join(filter(None, [good["Question"].strip(), (good.get("Options") or "").strip()]))
                meta = {
                    "subject": good["Subject"], "first_error_step": bad["Model_Solution_First_Error_Step"],
                    "error_reasons": reasons, "models": [good["Sampled_Model"], bad["Sampled_Model"]],
                }  # fmt: skip
                try:
                    pair = PreferencePair(
                        f"mr_ben-{good['Question_UUID']}-{i}{j}", "mr_ben", good["Question_UUID"],
                        [{"role": "user", "content": question}], _solution(good), _solution(bad), "A",
                        [HumanCritique(str(k), "A", f"Response B is wrong: {r}") for k, r in enumerate(reasons)], meta,
                    )  # fmt: skip
                except ValueError as e:
                    refused[str(e).split(": ", 1)[1]] += 1
                else:
                    pairs.append(settle(pair))
    return pairs, candidates, refused
