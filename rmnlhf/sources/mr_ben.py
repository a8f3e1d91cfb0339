"""MR-Ben: a correct against an incorrect solution of one exam question, with two annotators' reasons for the error.

Every correct solution of a question is paired with every incorrect one (a question with solutions of one kind gives no
pair). The reasons speak of the incorrect solution without naming it, so its name is put before them. Coding has one
annotator. meta: subject, first_error_step, error_reasons (as written), models [correct, incorrect].
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from rmnlhf import sources
from rmnlhf.pairs import HumanCritique


def _solution(row: dict) -> str:
    steps = row["Model_Solution_Steps"]
    return (steps if isinstance(steps, str) else "\n".join(steps)).strip()


def fields(data_dir: Path, name: str):
    """The fields of each pair of a correct with an incorrect solution."""
    for _, solutions in sources.rows(name, data_dir):
        right, wrong = (
            [s for s in solutions if s["Model_Solution_Correctness"] == c] for c in ("correct", "incorrect")
        )
        for (i, good), (j, bad) in product(enumerate(right), enumerate(wrong)):
            reasons = bad["Model_Solution_Error_Reason"]
            reasons = [r.strip() for r in ([reasons] if isinstance(reasons, str) else reasons) if r and r.strip()]
            question = "\n".join(filter(None, [good["Question"].strip(), (good.get("Options") or "").strip()]))
            yield {
                "id": f"mr_ben-{good['Question_UUID']}-{i}{j}",
                "group": good["Question_UUID"],
                "context": [{"role": "user", "content": question}],
                "response_a": _solution(good),
                "response_b": _solution(bad),
                "label": "A",
                "critiques": [HumanCritique(str(k), "A", f"Response B is wrong: {r}") for k, r in enumerate(reasons)],
                "meta": {
                    "subject": good["Subject"],
                    "first_error_step": bad["Model_Solution_First_Error_Step"],
                    "error_reasons": reasons,
                    "models": [good["Sampled_Model"], bad["Sampled_Model"]],
                },
            }
