"""HelpSteer3 preference: conversations with two responses and up to three annotators' reasoning.

`helpsteer3` is the hub dataset (train and validation), `helpsteer3_sample` 100 of its rows for tests and evaluation.
overall_preference runs from -3 (response 1 much better) to 3 (response 2 much better); 0 is a tie and refused.
meta: domain, language, strength (1..3), split.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from rmnlhf import sources
from rmnlhf.pairs import HumanCritique, fingerprint

_NAME = re.compile(r"@?\bRes?[pon]{2,5}ses?\s*#?\s*([12])(?!\d)", re.IGNORECASE)
_BETTER = re.compile(r"\bResponse (A|B) (?:is|was) (?:\w+ )?better\b")


def normalise(text: str) -> str:
    """ "@Response 1" as "Response A"; texts that already say "Response A" stay."""
    return _NAME.sub(lambda m: "Response " + "AB"[int(m[1]) - 1], text).strip()


def _critique(i: int, opinion: dict, label: str) -> HumanCritique | None:
    text, score = normalise(opinion.get("reasoning") or ""), opinion.get("score")
    if score is not None:
        chosen = None if score == 0 else "A" if score < 0 else "B"
    else:  # the sample gives no scores: the text says who is better, else the overall preference holds
        chosen = m[1] if (m := _BETTER.search(text)) else label
    return HumanCritique(str(i), chosen, text) if text else None


def fields(data_dir: Path, name: str):
    """For each row: the fields of its pair, or "tie" / "no preference"."""
    for number, (split, row) in enumerate(sources.rows(name, data_dir)):
        preference = row["overall_preference"]
        if not preference:
            yield "tie" if preference == 0 else "no preference"
            continue
        label = "A" if preference < 0 else "B"
        critiques = [_critique(i, o, label) for i, o in enumerate(row.get("individual_preference") or [])]
        yield {
            "id": f"{name}-{split}-{number:05d}",
            "group": f"{fingerprint(json.dumps(row['context'])):016x}",  # one conversation
            "context": row["context"],
            "response_a": row["response1"],
            "response_b": row["response2"],
            "label": label,
            "critiques": [c for c in critiques if c],
            "meta": {"domain": row["domain"], "language": row["language"], "strength": abs(preference), "split": split},
        }
