"""UKPConvArg: which of two arguments of a debate convinces more, with the reasons of five crowd workers for each pair.

UKPConvArg1 (Habernal & Gurevych, ACL 2016) gives pairs, gold labels and reasons; UKPConvArg2 (EMNLP 2016) gives reason
codes for part of the same pairs, joined here on the pair id. Both arguments of a pair take the same stance.

meta: pair_id (upstream), debate, stance, competence {annotator: MACE estimate, 0..1}, reason_codes (UKPConvArg2 only).
Codes name why the better argument wins (o8, o9: its merits) or the worse one loses (o5, o6, o7: its faults); see CODES.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from rmnlhf.pairs import HumanCritique

# Habernal & Gurevych 2016, figure 1, in the short form of Wachsmuth et al. (ACL 2017), table 2
CODES = {
    "o5_1": "worse one attacks or abuses",
    "o5_2": "worse one has language issues, or jokes",
    "o5_3": "worse one is unclear",
    "o6_1": "worse one has no credible evidence",
    "o6_2": "worse one has insufficient reasoning",
    "o6_3": "worse one uses irrelevant reasons",
    "o7_1": "worse one is only an opinion or a rant",
    "o7_2": "worse one is nonsense or confusing",
    "o7_3": "worse one is off topic",
    "o7_4": "worse one is weak or vague",
    "o8_1": "better one has more details, facts or examples",
    "o8_4": "better one is balanced or objective",
    "o8_5": "better one is more credible or confident",
    "o9_1": "better one is clear and well written",
    "o9_2": "better one keeps to the topic",
    "o9_3": "better one makes you think",
    "o9_4": "better one is well thought through",
}

_SIDE = dict.fromkeys(["1", "!", "one", "a", "first", "1st", "former"], "A")  # "a!": a 1 typed with shift held
_SIDE |= dict.fromkeys(["2", "two", "b", "second", "2nd", "latter"], "B")
_NOUN = (
    r"(?:arg(?:u?e?m[ea]n?t?s?|uements?|ments?|\.)?|response|answer|option|opinion|statement|post|side|number|no\.|"
    r"speaker|person|author|writer|debater)"
)
_VERBS = r"is|was|has|had|makes?|made|gives?|gave|does|did|states?|uses?|shows?|offers?|explains?|provides?|sounds?"
_VERB = rf"(?=\s+(?:{_VERBS})\b)"
# The many ways in which workers name "a1" and "a2": A1, a 1, A#2, arg. one, argument number two, the first one, #1, ...
_NAMES = re.compile(
    rf"""(?<![\w'])(?:the\s+)?(?:
      {_NOUN}\s*[-\#:.]?\s*(?:no\.?\s*|number\s*|\#\s*)?(1|2|one|two|[ab](?=['’]s|\s+(?:{_VERBS})\b))(?!\w)
    | (?:arg\w*\s+)?a\s?[-.\#_]?\s?([12!])(?!\d)
    | (first|second|1st|2nd)\s+(?:{_NOUN}|one|person|author|writer|comment|poster)(?!\w)
    | (first|second|former|latter)(?:\s+{_NOUN}(?!\w)|{_VERB})
    | \#\s?([12])(?!\d)
    )
    | ^\s*([12])(?:{_VERB}|'s)""",
    re.IGNORECASE | re.VERBOSE,
)


def normalise(text: str) -> str:
    """A worker's text with "a1" and "a2", however written, as "Response A" and "Response B"."""
    text = _NAMES.sub(lambda m: "Response " + _SIDE[next(g for g in m.groups() if g).lower()] + " ", text)
    return re.sub(r"\s+(?=[\s.,;:!?'’)])", "", text).strip()


def _codes(folder: Path) -> dict[str, list[str]]:
    out = {}
    for file in sorted(folder.glob("*.csv")):
        for line in file.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                pair_id, codes = line.split("\t")[:2]
                out[pair_id] = codes.split(",")
    return out


def fields(data_dir: Path, name: str):
    """For each annotated pair: its fields, or why it is left out (tie, no gold label)."""
    codes = _codes(data_dir / "ukpconvarg2" / "csv")
    for file in sorted((data_dir / "ukpconvarg1" / "full-xml").glob("*.xml")):
        for node in ET.parse(file).getroot():
            gold = node.findtext("goldLabel")
            yield _fields(node, gold, codes) if gold in ("a1", "a2") else "tie" if gold == "equal" else "no gold label"


def _fields(node, gold: str, codes: dict) -> dict:
    label = {"a1": "A", "a2": "B", "equal": None}
    pair_id, title, stance = node.findtext("id"), node.findtext("debateMetaData/title"), node.findtext("arg1/stance")
    workers = [(w.findtext("turkID"), w) for w in node.iter("mTurkAssignment")]
    meta = {"pair_id": pair_id, "debate": title, "stance": stance}
    meta["competence"] = {who: float(w.findtext("turkCompetence")) for who, w in workers}
    if pair_id in codes:
        meta["reason_codes"] = codes[pair_id]
    critiques = [
        HumanCritique(who, label[w.findtext("value")], text)
        for who, w in workers
        if (text := normalise(w.findtext("reason") or ""))
    ]
    if not any(c.label == label[gold] for c in critiques):
        meta["no_agreeing"] = "no worker chose the gold label with a written reason"
    question = f"Debate: {title}\nStance: {stance}\nWrite an argument for this stance that convinces."
    return {
        "id": f"ukpconvarg-{pair_id}",
        "group": title,  # both stances of a debate
        "context": [{"role": "user", "content": question}],
        "response_a": node.findtext("arg1/text"),
        "response_b": node.findtext("arg2/text"),
        "label": label[gold],
        "critiques": critiques,
        "meta": meta,
    }
