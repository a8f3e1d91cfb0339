"""How well a critique names the reasons that people gave: arguments matched one-to-one on meaning and stance.

Precision, recall and F1 are computed from the matching, never asked of a model (paper: core human-critique similarity).
A match is worth `stance × claim`: the stance (which response, praise or blame) must agree, the claim may not be contradicted
(negation, antonym, other number, other name), and only then counts how close the meanings are. MiniLM's cosine alone cannot
tell a paraphrase from its contradiction: it is a gate here, not the match.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

from .arguments import Argument, Claim, analyse, ask, extract, extract_many, is_fatal, repetition
from .pairs import OTHER, HumanCritique, PreferencePair, fingerprint

SHARED = 0.5  # two annotators raise the same argument from this match on
SAID = 0.95  # one critique makes the same point twice from this match on
REPEATED = 3  # one point made this often, and more often than people did, voids a critique (paper: 0/0/0)
MIN_MATCH = 0.1  # less than this is no match
BAR = 500  # new sentences from which on a bar is shown: some seconds on a CPU


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


_rows: dict[str, int] = {}
_table = np.zeros((1024, 384), np.float32)
_MAX_ROWS = 200_000


def _encode(texts: Sequence[str], batch: int = 64) -> np.ndarray:
    """Rows of `_table` (unit vectors) for the texts; each text is encoded once per process, all new ones in one batch."""
    global _table
    new = sorted({t for t in texts if t not in _rows})
    if new:
        if len(_rows) + len(new) > _MAX_ROWS:
            _rows.clear()
            new = sorted(set(texts))
        found = _encoder().encode(new, batch_size=batch, normalize_embeddings=True, show_progress_bar=len(new) >= BAR)
        start = len(_rows)
        while start + len(new) > len(_table):
            _table = np.concatenate([_table, np.zeros_like(_table)])
        _table[start : start + len(new)] = found
        _rows.update((t, start + k) for k, t in enumerate(new))
    return np.array([_rows[t] for t in texts], dtype=np.int64)


def embed(texts: Sequence[str], batch: int = 64) -> np.ndarray:
    """Unit vectors (len(texts), 384) of MiniLM, cached by text."""
    rows = _encode(texts, batch)  # first: it may replace the table
    return _table[rows]


def forget(vectors: bool = False):
    """Empty the caches of matching, with `vectors` those of sentences too (measurements, changed WEIGHTS)."""
    _claim.cache_clear()
    if vectors:
        plain.cache_clear()
        _rows.clear()


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
# log-odds that two clauses of one stance make the same point: found by random search on training debates, generated pairs (none
# that 02 reads in profiles cpu and long; their wordings are the same) and claims of bench/similarity.py, which takes each away in turn
WEIGHTS = {"bias": -5.0, "cosine": 8.0, "words": 5.6, "aspects": 4.2}


@lru_cache(maxsize=500_000)
def _claim(one: str, other: str) -> tuple[bool, bool, float]:
    """(one negates the other, another number or name, log-odds of one meaning but for the cosine); symmetric."""
    a, b = analyse(one), analyse(other)
    shared = a.concepts.keys() & b.concepts.keys()
    negated = any(a.concepts[c] * b.concepts[c] < 0 for c in shared)
    other_thing = bool(a.numbers - b.numbers and b.numbers - a.numbers) or _other_name(a, b)
    total = sum(a.weights.values()) + sum(b.weights.values())
    words = 2 * sum(a.weights[c] for c in shared) / total if total else 0.0
    logit = WEIGHTS["bias"] + WEIGHTS["words"] * words
    mine, theirs = a.aspects - {"overall"}, b.aspects - {"overall"}
    if mine & theirs or (a.aspects == b.aspects == {"overall"}):
        logit += WEIGHTS["aspects"]
    return negated, other_thing, logit


def _other_name(a: Claim, b: Claim) -> bool:
    """Each names what the other does not mention; in an otherwise equal clause one name put for another word is enough."""
    mine, theirs = ({n for n in x.names if n not in y.words and n not in y.names} for x, y in ((a, b), (b, a)))
    if mine and theirs:
        return True
    only_a, only_b = a.words - b.words, b.words - a.words
    return bool(mine or theirs) and len(only_a) == len(only_b) == 1 and len(a.words & b.words) >= 2


def match(a: Argument, b: Argument, cosine: float) -> float:
    """What a match of two arguments is worth, in [-1, 1], symmetric; 1 for the same words and stance.

    Negative: they contradict each other, in nearly the same words or on the same point."""
    agreement = stance(a, b)
    if a.text.lower() == b.text.lower() and agreement:
        return agreement if a.side != b.side else 1.0
    negated, other_thing, logit = _claim(*sorted((a.text, b.text)))
    blame = a.polarity == b.polarity == -1 and a.side == b.side  # "ignores the limit", "breaks the limit": what is missing may be said either way
    contradicted = other_thing or (negated and not blame)
    meaning = 1 / (1 + math.exp(-(logit + WEIGHTS["cosine"] * cosine)))
    if contradicted or (not agreement and a.side is not None and b.side is not None):
        return -meaning if meaning > 0.5 else 0.0
    worth = agreement * meaning
    return worth if worth >= MIN_MATCH and a.bare == b.bare else 0.0  # a verdict that names no reason shares none


def _distinct(arguments: Sequence[Argument]) -> list[Argument]:
    """One critique's arguments, each point once: of those that say the same in other words one stays, core where any of them is."""
    if len(arguments) < 2:
        return list(arguments)
    alone = [replace(a, members=()) for a in arguments]
    side = np.array([str(a.side) for a in arguments])
    same = (_scores(alone, alone) >= SAID) & (side[:, None] == side)
    _, point = connected_components(same, directed=False)
    first: dict = {}
    for n in sorted(range(len(arguments)), key=lambda n: (not arguments[n].core, arguments[n].text)):  # whatever their order
        first.setdefault(point[n], n)
    return [arguments[n] for n in sorted(first.values())]


def _scores(generated: Sequence[Argument], reference: Sequence[Argument]) -> np.ndarray:
    """Match of every generated with every reference argument; a merged argument is matched by its closest wording."""
    if not len(generated) or not len(reference):
        return np.zeros((len(generated), len(reference)))
    wordings = [(j, replace(r, text=m) if m != r.text else r) for j, r in enumerate(reference) for m in r.members or (r.text,)]
    cosines = embed([plain(a.text) for a in generated]) @ embed([plain(w.text) for _, w in wordings]).T
    scores = np.full((len(generated), len(reference)), -np.inf)
    for i, g in enumerate(generated):
        for (j, w), c in zip(wordings, cosines[i].tolist()):
            scores[i, j] = max(scores[i, j], match(g, w, c))
    return scores


# ---- reference ------------------------------------------------------------------------------------------------------
def reference(critiques: Sequence[str | HumanCritique], backend: str = "offline", judge=None) -> list[Argument]:
    """Several annotators' critiques of one pair → one list of arguments, the shared ones merged, `core` set.

    Core: raised by at least two annotators; a fatal error, where named, is the only core argument. Where nothing is shared
    each annotator's own core counts (with one annotator: what justifies the choice). Order-free: texts are sorted first.
    Give it the critiques of annotators who chose the gold label (`PreferencePair.agreeing`): this function sees no label."""
    texts = sorted(c.text if isinstance(c, HumanCritique) else c for c in critiques)
    return _merge([extract(t, backend, judge) for t in texts])


def _merge(per_annotator: list[list[Argument]]) -> list[Argument]:
    if any(not a.bare for found in per_annotator for a in found):  # a verdict that names no reason is none beside reasons
        per_annotator = [[a for a in found if not a.bare] for found in per_annotator]
    per_annotator = [_distinct(found) for found in per_annotator]
    if len(per_annotator) == 1:
        return per_annotator[0]
    everything = [(k, a) for k, found in enumerate(per_annotator) for a in found]
    alone = [replace(a, members=()) for _, a in everything]
    pairwise = _scores(alone, alone)
    groups: list[list[tuple[int, int, Argument]]] = []
    for n, (k, a) in enumerate(everything):  # first group that it matches, and that this annotator is not in yet
        best, worth = None, SHARED
        for group in groups:
            if any(k == other for _, other, _ in group):
                continue
            s = max(pairwise[n, m] for m, _, _ in group)
            if s >= worth:
                best, worth = group, s
        if best is None:
            groups.append([(n, k, a)])
        else:
            best.append((n, k, a))
    fatal = [any(a.core and is_fatal(a.text) for _, _, a in g) for g in groups]
    shared = [len(g) >= 2 and any(a.core for _, _, a in g) for g in groups]
    own = [any(a.core for _, _, a in g) for g in groups]
    core = fatal if any(fatal) else shared if any(shared) else own
    return [replace(g[0][2], core=c, members=tuple(dict.fromkeys(a.text for _, _, a in g))) for g, c in zip(groups, core)]


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
    texts = [tuple(sorted(c.text if isinstance(c, HumanCritique) else c for c in r)) for r in references]  # one text of two annotators counts twice
    if empty := [i for i, t in enumerate(texts) if not any(s.strip() for s in t)]:
        raise ValueError(f"references[{empty[0]}] holds no human critique: this pair has no process reward (missing, not zero)")
    critiques = [g or "" for g in generated]
    every = list(dict.fromkeys([*critiques, *(t for r in texts for t in r)]))
    found = dict(zip(every, extract_many(every) if backend == "offline" else ask(every, judge)))  # None: the judge failed
    embed([plain(a.text) for arguments in found.values() for a in arguments or ()])
    merged = {r: None if any(found[t] is None for t in r) else _merge([found[t] for t in r]) for r in dict.fromkeys(texts)}
    return [_one(c, r, found[c], merged[r], kind) for c, r in zip(critiques, texts)]


def stock_reason(pairs: Sequence[PreferencePair], candidates: int = 20, sample: int = 100, backend: str = "offline", judge=None) -> str:
    """The sentence that earns most without a look at the pair: of the most frequent human reasons for these pairs, the one with the
    highest mean core-F1 over a sample of them. "{better}" and "{worse}" stand for the letters. Raises ValueError where no pair has a critique.

    What a critique must beat: where people often agree on "more detail", saying so of every better response is paid well."""
    pairs = sorted((p for p in pairs if p.agreeing), key=lambda p: fingerprint("stock", p.id))
    if not pairs:
        raise ValueError("stock_reason: none of these pairs has a human critique that agrees with its label")
    said = Counter(
        c.text.strip().replace("{", "{{").replace("}", "}}")
        .replace(f"Response {p.label}", "Response {better}").replace(f"Response {OTHER[p.label]}", "Response {worse}")
        for p in pairs for c in p.agreeing
    )  # fmt: skip
    said = sorted(said, key=lambda t: (-said[t], t))[:candidates]
    pairs = pairs[:sample]
    asked = [(t.format(better=p.label, worse=OTHER[p.label]), p.agreeing) for t in said for p in pairs]
    found = similarity_many([t for t, _ in asked], [r for _, r in asked], "core", backend, judge)
    f1 = np.reshape([s.f1 for s in found], (len(said), len(pairs)))
    known = np.isfinite(f1)  # a judge's failed call is missing
    earned = np.where(known, f1, 0.0).sum(1) / np.maximum(1, known.sum(1))
    return said[int(np.argmax(earned))]


def _one(critique, references, generated, merged, kind):
    if generated is None or not merged:  # missing, not zero: the judge failed, or no argument was found in what people wrote
        return Similarity(math.nan, math.nan, math.nan)
    generated = _distinct(generated)
    if kind == "core":
        generated = [a for a in generated if a.core]
        merged = [a for a in merged if a.core] or merged  # a judge may call none core
    if not generated or not merged:
        return Similarity(0.0, 0.0, 0.0, [], generated, merged)
    repeats = repetition(critique)
    if repeats >= REPEATED and repeats > max(map(repetition, references)):
        return Similarity(0.0, 0.0, 0.0, [], generated, merged)
    scores = _scores(generated, merged)
    rows, columns = linear_sum_assignment(-np.maximum(scores, 0))
    matches = [(int(i), int(j), float(scores[i, j])) for i, j in zip(rows, columns) if scores[i, j] > 0]
    matched = sum(s for _, _, s in matches)
    free = np.ones(scores.shape, bool)  # a contradiction counts where neither argument has found its match
    for i, j, s in matches:
        if s >= SHARED:
            free[i], free[:, j] = False, False
    against = np.where(free, np.maximum(-scores, 0), 0)
    precision = float(max(0.0, matched - against.max(axis=1).sum()) / len(generated))
    recall = float(max(0.0, matched - against.max(axis=0).sum()) / len(merged))
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
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
