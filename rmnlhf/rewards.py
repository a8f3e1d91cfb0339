"""Format, outcome and process → one reward: the table of the paper's released code, its options beside it.

| case | reward |
|---|---|
| format error | -1 |
| wrong verdict | 0 |
| right verdict, human critique | 1 + weight · process, process = 1[F1 >= threshold] or F1 itself |
| right verdict, no human critique, MetaRM | 1 + bonus(m) |
| right verdict, nothing to compare with | 1 |

A process reward can be absent in two ways, and neither is zero: None = the pair has no human critique (the outcome alone is
paid), NaN = it has one but the judge gave no answer (the reward is unknown: NaN, to be masked out of the group).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .grm import Judgement
from .pairs import PreferencePair
from .similarity import Similarity, similarity_many

FORMAT_ERROR = -1.0


class ProcessRewardError(RuntimeError):
    """The run would train without the process reward that it claims to have."""


def outcome(judgement: Judgement, label: str) -> float:
    """-1 format error, 0 wrong verdict, 1 right verdict. `label`: the better response, as named on the prompt shown."""
    if label not in ("A", "B"):
        raise ValueError(f"label {label!r}: allowed are 'A' and 'B', as shown on the prompt")
    if judgement.error is not None or judgement.verdict is None:
        return FORMAT_ERROR
    return float(judgement.verdict == label)


def composite(
    judgement: Judgement,
    label: str,
    process: float | None,
    weight: float = 0.5,
    gated: bool = True,
    binary: bool = True,
    threshold: float = 0.5,
) -> float:
    """The reward of one completion whose pair has a human critique (or none: process=None).

    process: core-F1 in [0, 1]; None: no human critique; NaN: missing. gated: only a right verdict earns it (paper,
    "outcome regularisation"); otherwise outcome + weight · process (the form of the paper's summary)."""
    base = outcome(judgement, label)
    if base < 0 or (gated and base == 0) or process is None or weight == 0:
        return base
    if math.isnan(process):
        return math.nan
    if not 0 <= process <= 1 + 1e-9:
        raise ValueError(f"process reward {process}: expected an F1 in [0, 1], None or NaN")
    return base + weight * (float(process >= threshold) if binary else min(process, 1.0))


def from_metarm(
    judgement: Judgement,
    label: str,
    m: float | None,
    weight: float = 0.5,
    bonus: str = "rescaled",
    gated: bool = True,
    target: str = "composite",
) -> float:
    """The reward of one completion whose pair has no human critique; `m`: MetaRM's raw output, on the scale of `composite`.

    bonus "paper": weight · max(0, m - 1), a perfect MetaRM (m = 1.5) adds only 0.25; "rescaled": weight · clip((m - 1)/weight, 0, 1), a
    perfect one pays exactly what the human critique would; "binary": weight where m is nearer to the full reward than to 1.
    gated: only a right verdict earns it, as in `composite`; target: what MetaRM learned (metarm.target).
    m = None: no MetaRM in this arm; NaN: it has no output for this row (reward NaN)."""
    base = outcome(judgement, label)
    if bonus not in ("paper", "rescaled", "binary"):
        raise ValueError(f"bonus {bonus!r}: allowed are 'paper', 'rescaled', 'binary'")
    if base < 0 or (gated and base == 0) or m is None or weight == 0:
        return base
    if math.isnan(m):
        return math.nan
    above = m - (1.0 if target == "process" else base)  # what MetaRM adds to the verdict's own reward
    if bonus == "paper":
        return base + weight * max(0.0, above)
    if bonus == "binary":
        return base + weight * float(above >= weight / 2)
    return base + min(max(above, 0.0), weight)


def process_rewards(
    critiques: Sequence[str | None], references: Sequence[Sequence], kind: str = "core", backend: str = "offline", judge=None
) -> list[Similarity | None]:
    """Similarity of each critique with the human critiques of its pair, one batch; None where the pair has none.

    A critique that could not be parsed (None) is no text "None": it has no argument and scores 0. `.f1` is NaN where the judge failed, and
    where no argument is found in what people wrote."""
    kept = [i for i, r in enumerate(references) if any((getattr(c, "text", c) or "").strip() for c in r)]
    out: list[Similarity | None] = [None] * len(critiques)
    for i, s in zip(kept, similarity_many([critiques[i] for i in kept], [references[i] for i in kept], kind, backend, judge)):
        out[i] = s
    return out


def check_process_rows(pairs: Sequence[PreferencePair], processes: Sequence[float | None] = (), max_missing: float = 0.2) -> dict:
    """Stop a run whose process reward is not there. Returns {"rows", "with_critique", "scored", "missing"}.

    pairs: the training pairs; processes: the process rewards seen so far (None: no critique, NaN: missing). Raises
    ProcessRewardError where no pair has a critique of an annotator who agrees with its label, or more than `max_missing` of the process
    rewards are missing. (The released code looked its critiques up under a tag that no row had: all were 0, silently.)"""
    with_critique = sum(any(c.text.strip() for c in p.agreeing) for p in pairs)
    if not with_critique:
        sources = ", ".join(sorted({p.source for p in pairs})) or "none"
        raise ProcessRewardError(
            f"none of {len(pairs)} training pairs (sources: {sources}) carries a human critique that agrees with its label: there is no process "
            "reward to train on. Set data.critique_sources to a source with critiques, or train the arm 'outcome'."
        )
    due = [p for p in processes if p is not None]
    missing = sum(math.isnan(p) for p in due)
    if due and missing > max_missing * len(due):
        raise ProcessRewardError(
            f"{missing} of {len(due)} process rewards are missing ({missing / len(due):.0%}, reward.max_missing allows {max_missing:.0%}): the judge "
            "fails too often (see its log and cache, judge.timeout, judge.retries), or no argument is found in the human critiques "
            "(similarity.backend=offline reads English only)."
        )
    return {"rows": len(pairs), "with_critique": with_critique, "scored": len(due) - missing, "missing": missing}
