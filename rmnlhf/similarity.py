"""How well a critique names the reasons that people gave: arguments matched one-to-one on meaning and stance.

Precision, recall and F1 are computed from the matching, never asked of a model (paper: core human-critique similarity).
A match is worth `stance × claim`: the stance (which response, praise or blame) must agree, the claim may not be contradicted
(negation, antonym, other number, other name), and only then counts how close the meanings are. MiniLM's cosine alone cannot
tell a paraphrase from its contradiction: it is a gate here, not the match.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import linear_sum_assignment

from .arguments import Argument, Claim, analyse, ask, extract, extract_many, is_fatal, repetition
from .pairs import HumanCritique

SHARED = 0.5  # two annotators raise the same argument from this match on
REPEATED = 3  # one point made this often, and more often than people did, voids a critique (paper: 0/0/0)
MIN_MATCH = 0.1  # less than this is no match


@dataclass(frozen=True)
class Similarity:
    """`matches`: (index in `generated`, index in `reference`, score); only the arguments that count for the kind are listed."""

    precision: float
    recall: float
    f1: float
    matches: list[tuple[int, int, float]] = field(default_factory=list)
    generated: list[Argument] = field(default_factory=list)
    reference: list[Argument] = field(default_factory=list)


# ---- meaning --------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=1)
def _encoder():
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    from .policy import prepare

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model = SentenceTransformer(str(prepare("minilm")), device="cpu")
    if bar:
        logging.enable_progress_bar()
    return model


_vectors: dict[str, np.ndarray] = {}
_MAX_VECTORS = 200_000


def embed(texts: Sequence[str], batch: int = 64) -> np.ndarray:
    """Unit vectors (len(texts), 384), each text encoded once per process."""
    if len(_vectors) > _MAX_VECTORS:
        _vectors.clear()
    new = sorted({t for t in texts if t not in _vectors})
    if new:
        found = _encoder().encode(new, batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
        _vectors.update(zip(new, found.astype(np.float32)))
    return np.stack([_vectors[t] for t in texts]) if len(texts) else np.zeros((0, 384), np.float32)


@lru_cache(maxsize=200_000)
def plain(text: str) -> str:
    """The clause without its sides: what is said, not of whom."""
    text = re.sub(r"\b(?:than|unlike|like|compared (?:to|with)|versus|vs\.?)\s+(?:in\s+)?SIDE[AB]\b(?:\s+(?:does|is|did|was))?", "", text)
    text = re.sub(r"^\W*(?:also |and |then |thus |so )*(?:SIDE[AB]|BOTHSIDES|it)\b\s*", "It ", text)
    text = re.sub(r"\bSIDE[AB]\b", "the other", text)
    return re.sub(r"\s+", " ", re.sub(r"\bBOTHSIDES\b", "both", text)).strip(" ,.;:")


# ---- stance ---------------------------------------------------------------------------------------------------------
def stance(a: Argument, b: Argument) -> float:
    """How far two arguments take the same stance, in [0, 1], symmetric.

    Praise of A and blame of B both speak for A. Where a comparison is drawn ("A explains more", "B explains less") that is one
    stance; without one, what is missing from B need not be present in A: such a match counts for less."""
    if a.polarity * b.polarity < 0 and a.side == b.side:
        return 0.0
    sides = {a.side, b.side}
    if sides == {"A", "B"}:
        if a.polarity * b.polarity >= 0:
            return 0.0
        return 0.9 if analyse(a.text).comparative or analyse(b.text).comparative else 0.6
    agree = 1.0 if a.polarity == b.polarity else 0.7 if 0 in (a.polarity, b.polarity) else 0.0
    if a.side == b.side:
        return agree
    return agree * (0.5 if None in sides else 0.2)


# ---- claim ----------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=500_000)
def _claim(one: str, other: str) -> tuple[float, float, float]:
    """(contradiction factor, words in common, aspects in common) of two clauses; symmetric."""
    a, b = analyse(one), analyse(other)
    factor = 1.0
    shared = a.concepts.keys() & b.concepts.keys()
    conflicts = sum(a.concepts[c] * b.concepts[c] < 0 for c in shared)
    if conflicts:
        factor *= 0.1
    if a.numbers - b.numbers and b.numbers - a.numbers:
        factor *= 0.1
    if _other_name(a, b):
        factor *= 0.15
    total = len(a.concepts) + len(b.concepts)
    words = 2 * (len(shared) - conflicts) / total if total else 0.0
    mine, theirs = a.aspects - {"overall"}, b.aspects - {"overall"}
    if mine or theirs:
        aspects = len(mine & theirs) / len(mine | theirs)
    else:
        aspects = 1.0 if a.aspects and b.aspects else 0.0
    return factor, words, aspects


def _other_name(a: Claim, b: Claim) -> bool:
    """Each names something that the other does not mention at all."""
    return bool({n for n in a.names if n not in b.words and n not in b.names}) and bool(
        {n for n in b.names if n not in a.words and n not in a.names}
    )


def match(a: Argument, b: Argument, cosine: float) -> float:
    """The worth of matching two arguments, in [0, 1], symmetric; 1 for the same words and stance."""
    agreement = stance(a, b)
    if not agreement:
        return 0.0
    if plain(a.text).lower() == plain(b.text).lower():
        return agreement
    factor, words, aspects = _claim(min(a.text, b.text), max(a.text, b.text))
    meaning = 1 / (1 + math.exp(-(12 * (cosine - 0.55) + 2.0 * (words - 0.3) + 2.5 * (aspects - 0.5))))
    if cosine < 0.15 and not words:
        return 0.0
    return agreement * factor * meaning


def _scores(generated: Sequence[Argument], reference: Sequence[Argument]) -> np.ndarray:
    """Match of every generated with every reference argument; a merged argument is matched by its closest wording."""
    scores = np.zeros((len(generated), len(reference)))
    if not scores.size:
        return scores
    ours = embed([plain(a.text) for a in generated])
    for j, r in enumerate(reference):
        members = r.members or (r.text,)
        cosines = ours @ embed([plain(m) for m in members]).T
        for i, g in enumerate(generated):
            scores[i, j] = max(match(g, r if m == r.text else replace(r, text=m), float(c)) for m, c in zip(members, cosines[i]))
    scores[scores < MIN_MATCH] = 0.0
    return scores


# ---- reference ------------------------------------------------------------------------------------------------------
def reference(critiques: Sequence[str | HumanCritique], backend: str = "offline", judge=None) -> list[Argument]:
    """Several annotators' critiques of one pair → one list of arguments, the shared ones merged, `core` set.

    Core: raised by at least two annotators; a fatal error, where named, is the only core argument. Where nothing is shared
    each annotator's own core counts (with one annotator: what justifies the choice). Order-free: texts are sorted first.
    Give it the critiques of annotators who chose the gold label (`PreferencePair.agreeing`): this function sees no label."""
    texts = sorted({c.text if isinstance(c, HumanCritique) else c for c in critiques})
    return _merge([extract(t, backend, judge) for t in texts])


def _merge(per_annotator: list[list[Argument]]) -> list[Argument]:
    if len(per_annotator) == 1:
        return per_annotator[0]
    everything = [(k, a) for k, found in enumerate(per_annotator) for a in found]
    groups: list[list[tuple[int, Argument]]] = []
    for k, a in everything:  # first group that it matches, and that this annotator is not in yet
        best, worth = None, SHARED
        for group in groups:
            if any(k == other for other, _ in group):
                continue
            s = max(_scores([a], [replace(b, members=())])[0, 0] for _, b in group)
            if s >= worth:
                best, worth = group, s
        if best is None:
            groups.append([(k, a)])
        else:
            best.append((k, a))
    fatal = [any(a.core and is_fatal(a.text) for _, a in g) for g in groups]
    shared = [len(g) >= 2 and any(a.core for _, a in g) for g in groups]
    own = [any(a.core for _, a in g) for g in groups]
    core = fatal if any(fatal) else shared if any(shared) else own
    return [replace(g[0][1], core=c, members=tuple(dict.fromkeys(a.text for _, a in g))) for g, c in zip(groups, core)]


# ---- precision, recall, F1 ------------------------------------------------------------------------------------------
def similarity(generated, references, kind: str = "core", backend: str = "offline", judge=None) -> Similarity:
    """Compare one generated critique with the human critiques of its pair.

    generated: text (None or without an argument: all zero); references: texts or HumanCritiques of ONE pair, those of
    annotators who chose the gold label; kind: "core" (paper) or "all". Raises ValueError where there is no reference."""
    return similarity_many([generated], [references], kind, backend, judge)[0]


def similarity_many(generated, references, kind: str = "core", backend: str = "offline", judge=None) -> list[Similarity]:
    """`similarity` of many critiques, each with its own list of references; every sentence is encoded once, in one batch."""
    if backend not in ("offline", "llm"):
        raise ValueError(f"backend {backend!r}: allowed are 'offline' and 'llm'")
    if kind not in ("core", "all"):
        raise ValueError(f"kind {kind!r}: allowed are 'core' and 'all'")
    if len(generated) != len(references):
        raise ValueError(f"{len(generated)} critiques but {len(references)} lists of references")
    if isinstance(references, str) or any(isinstance(r, str) for r in references):
        raise ValueError("references: give a list of human critiques for each generated critique")
    texts = [tuple(sorted({c.text if isinstance(c, HumanCritique) else c for c in r})) for r in references]
    if empty := [i for i, t in enumerate(texts) if not any(s.strip() for s in t)]:
        raise ValueError(f"references[{empty[0]}] holds no human critique: this pair has no process reward (missing, not zero)")
    critiques = [g or "" for g in generated]
    every = list(dict.fromkeys([*critiques, *(t for r in texts for t in r)]))
    found = dict(zip(every, extract_many(every) if backend == "offline" else ask(every, judge)))  # None: the judge failed
    embed([plain(a.text) for arguments in found.values() for a in arguments or ()])
    merged = {r: None if any(found[t] is None for t in r) else _merge([found[t] for t in r]) for r in dict.fromkeys(texts)}
    return [_one(c, r, found[c], merged[r], kind) for c, r in zip(critiques, texts)]


def _one(critique, references, generated, merged, kind):
    if generated is None or merged is None:  # missing, not zero
        return Similarity(math.nan, math.nan, math.nan)
    if kind == "core":
        generated = [a for a in generated if a.core]
        merged = [a for a in merged if a.core]
    if not generated or not merged:
        return Similarity(0.0, 0.0, 0.0, [], generated, merged)
    repeats = repetition(critique)
    if repeats >= REPEATED and repeats > max(map(repetition, references)):
        return Similarity(0.0, 0.0, 0.0, [], generated, merged)
    scores = _scores(generated, merged)
    rows, columns = linear_sum_assignment(-scores)
    matches = [(int(i), int(j), float(scores[i, j])) for i, j in zip(rows, columns) if scores[i, j] > 0]
    matched = sum(s for _, _, s in matches)
    precision, recall = matched / len(generated), matched / len(merged)
    f1 = 2 * precision * recall / (precision + recall) if matched else 0.0
    return Similarity(precision, recall, f1, matches, generated, merged)


# ---- by LLM: the paper's single call, and the meta-judge --------------------------------------------------------------
_COUNT = {"type": "integer", "minimum": 0, "maximum": 100}
PAPER_SCHEMA = {
    "type": "object",
    "properties": {"repeats": {"type": "boolean"}, "generated": _COUNT, "reference": _COUNT, "matched": _COUNT},
    "required": ["repeats", "generated", "reference", "matched"],
    "additionalProperties": False,
}
META_SCHEMA = {
    "type": "object",
    "properties": {"valid": {"type": "integer", "minimum": 0, "maximum": 10}},
    "required": ["valid"],
    "additionalProperties": False,
}
_PAPER = """Compare a generated critique with a reference critique of the same two responses.
Count only key arguments: reasons strong enough to justify the choice alone. If the reference names a fatal error, only that error counts (reference = 1).
Match one-to-one, on meaning and on stance (which response, praise or blame).
Answer with: repeats (the generated critique repeats one point several times), generated and reference (their numbers of key arguments), matched.

[Generated critique]
{}

[Reference critique]
{}"""
_META = "{}\n\n[Critique]\n{}\n\nIs this critique valid: are its reasons true and do they decide between the responses? Answer with valid, from 0 (no) to 10 (fully)."


def paper_judge(generated: Sequence[str], references: Sequence[Sequence], judge) -> list[Similarity | None]:
    """The paper's judge: one call that sees only the two critiques. Counts are asked, F1 is computed; None = missing."""
    from .grm import neutralise

    asked = []
    for g, r in zip(generated, references, strict=True):
        texts = [neutralise(c.text if isinstance(c, HumanCritique) else c) for c in r]
        asked.append([{"role": "user", "content": _PAPER.format(neutralise(g), "\n".join(texts))}])
    out = []
    for answer in judge.ask(asked, PAPER_SCHEMA):
        if answer is None:
            out.append(None)
            continue
        matched = 0 if answer["repeats"] else min(answer["matched"], answer["generated"], answer["reference"])
        p, r = matched / max(answer["generated"], 1), matched / max(answer["reference"], 1)
        out.append(Similarity(p, r, 2 * p * r / (p + r) if matched else 0.0))
    return out


def meta_judge(pairs: Sequence, critiques: Sequence[str], judge) -> list[float | None]:
    """Ask an LLM whether each critique of its pair is valid, in [0, 1]; None = missing. The proxy that the paper found weakest."""
    from .grm import body, neutralise

    asked = [[{"role": "user", "content": _META.format(body(p), neutralise(c))}] for p, c in zip(pairs, critiques, strict=True)]
    return [None if a is None else a["valid"] / 10 for a in judge.ask(asked, META_SCHEMA)]
