"""The matcher: contradictions against paraphrases, what each part of it is worth, speed. Ends in one JSON line.

    python bench/similarity.py [--pairs 400 --out bench/results/similarity.json]

The contradictions are generated from hand-written claims: each shares its words with a claim but not what it says (other side,
opposite polarity, negation, other number, other name); a paraphrase says the same in other words.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from itertools import product
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from sklearn.metrics import roc_auc_score

from rmnlhf import arguments, similarity

# claim | paraphrase | opposite polarity | negation. {S} the side, {n} a number, {x} a name
CLAIMS = """
{S} correctly states that the treaty was signed in {n}. | {S} is right about the signing of the treaty in {n}. | {S} incorrectly states that the treaty was signed in {n}. | {S} does not correctly state that the treaty was signed in {n}.
{S} explains how {x} derived the law. | {S} describes {x}'s derivation of the law. | {S} fails to explain how {x} derived the law. | {S} doesn't explain how {x} derived the law.
{S} lists {n} practical tips with examples. | There are {n} useful tips, with examples, in {S}. | {S} lists {n} useless tips without examples. | {S} does not list {n} practical tips with examples.
{S} is easy to follow and well organised. | {S} has a clear structure and can be followed easily. | {S} is hard to follow and badly organised. | {S} is not easy to follow and not well organised.
{S} makes an error about the capital and names {x}. | {S} gets the capital wrong, naming {x}. | {S} gets the capital right, naming {x}. | {S} does not make an error about the capital.
{S} backs its claim with statistics from {x}. | {S} supports what it claims using statistics by {x}. | {S} leaves its claim unsupported by statistics from {x}. | {S} never backs its claim with statistics from {x}.
{S} ignores the limit of {n} words. | {S} disregards the user's limit of {n} words. | {S} respects the limit of {n} words. | {S} does not ignore the limit of {n} words.
The code in {S} is correct and prints {n}. | {S} has working code that prints {n}. | The code in {S} is broken and never prints {n}. | The code in {S} is not correct and does not print {n}.
{S} is polite and addresses the complaint. | {S} answers the complaint in a courteous manner. | {S} is rude and ignores the complaint. | {S} isn't polite and doesn't address the complaint.
{S} contains several spelling mistakes. | There are many misspelled words in {S}. | {S} has excellent spelling. | {S} contains no spelling mistakes.
{S} is longer and more detailed than the other response. | {S} goes into greater detail and has more length. | {S} is shorter and less detailed than the other response. | {S} is not longer or more detailed than the other response.
{S} hallucinates a quote by {x}. | {S} makes up a false quotation of {x}. | {S} gives an authentic quote by {x}. | {S} does not hallucinate a quote by {x}.
{S} says that it boils at {n} degrees, which is true. | It is true, as {S} says, that the boiling point is {n} degrees. | {S} says that it boils at {n} degrees, which is false. | {S} says that it does not boil at {n} degrees.
{S} recommends {x} and gives good reasons. | {S} has good reasons for recommending {x}. | {S} recommends {x} but gives poor reasons. | {S} does not recommend {x} or give good reasons.
{S} mentions {n} side effects of {x}. | {n} side effects of {x} are mentioned in {S}. | {S} omits {n} side effects of {x}. | {S} doesn't mention {n} side effects of {x}.
{S} finishes the story with a satisfying twist. | The story in {S} ends with a twist that satisfies. | {S} finishes the story with a disappointing twist. | {S} does not finish the story with a satisfying twist.
{S} repeats itself and is verbose. | {S} is repetitive and wordy. | {S} is succinct and never repeats itself. | {S} does not repeat itself and is not verbose.
{S} refuses a harmless request. | {S} declines to help with a harmless request. | {S} fulfils a harmless request. | {S} does not refuse a harmless request.
{S} calculates the interest correctly as {n} dollars. | The interest of {n} dollars is computed correctly by {S}. | {S} calculates the interest wrongly as {n} dollars. | {S} does not calculate the interest correctly as {n} dollars.
{S} provides relevant facts about {x}. | {S} offers pertinent information on {x}. | {S} provides irrelevant facts about {x}. | {S} provides no relevant facts about {x}.
{S} keeps the formal tone that was asked for. | The formal tone requested is kept by {S}. | {S} keeps an informal tone that was not asked for. | {S} does not keep the formal tone that was asked for.
{S} gives strong evidence from {n} studies. | {S} is convincing because it cites {n} studies as evidence. | {S} gives weak evidence from {n} studies. | {S} gives no evidence from {n} studies.
"""
NAMES = ["Newton", "Einstein", "Paris", "Lyon", "UNESCO", "Oxfam", "Python", "Haskell", "Aspirin", "Ibuprofen"]
NUMBERS = ["3", "seven", "12", "40", "150", "1648", "1713"]


def contradictions(n: int = 400, seed: int = 0, claims: str = CLAIMS) -> list[dict]:
    """n rows {claim, text, kind}: kind "paraphrase", or how `text` contradicts `claim`; about one paraphrase to three contradictions."""
    rng, rows = random.Random(seed), []
    lines = [[p.strip() for p in line.split("|")] for line in claims.strip().splitlines()]
    for (claim, paraphrase, opposite, negation), side in product(lines, "AB"):
        (x, y), (a, b) = rng.sample(NAMES, 2), rng.sample(NUMBERS, 2)
        this, other = f"Response {side}", f"Response {'B' if side == 'A' else 'A'}"
        said = {"S": this, "n": a, "x": x}
        forms = {"side": claim.format(**said | {"S": other}), "polarity": opposite.format(**said), "negation": negation.format(**said)}
        if "{n}" in claim:
            forms["number"] = claim.format(**said | {"n": b})
        if "{x}" in claim:
            forms["name"] = claim.format(**said | {"x": y})
        reworded = paraphrase.format(**said)
        rows.append({"claim": claim.format(**said), "text": reworded[0].upper() + reworded[1:], "kind": "paraphrase"})
        rows += [{"claim": claim.format(**said), "text": t, "kind": k} for k, t in forms.items()]
    while len(rows) < n:
        rows += contradictions(0, seed := seed + 1, claims)
    return rows


def discrimination(rows: list[dict]) -> dict:
    """AUC of F1 and of MiniLM's cosine: paraphrases against contradictions, together and by kind."""
    f1 = np.array([s.f1 for s in similarity.similarity_many([r["text"] for r in rows], [[r["claim"]] for r in rows], "all")])
    one, other = (similarity.embed([r[k] for r in rows]) for k in ("text", "claim"))
    cosine, kinds = (one * other).sum(axis=1), np.array([r["kind"] for r in rows])
    same = kinds == "paraphrase"
    out = {"pairs": len(rows), "contradictions": int((~same).sum()), "auc_f1": roc_auc_score(same, f1), "auc_cosine": roc_auc_score(same, cosine)}
    for kind in sorted(set(kinds) - {"paraphrase"}):
        of = same | (kinds == kind)
        out[f"auc_f1_{kind}"], out[f"auc_cosine_{kind}"] = roc_auc_score(same[of], f1[of]), roc_auc_score(same[of], cosine[of])
    return {k: round(float(v), 3) if isinstance(v, float) else v for k, v in out.items()}


def ablation(rows: list[dict]) -> dict:
    """AUC with one weight of the match taken away."""
    out = {}
    for name in [w for w in similarity.WEIGHTS if w != "bias"]:
        kept = similarity.WEIGHTS[name]
        similarity.WEIGHTS[name] = 0.0
        similarity.forget()
        out[f"auc_without_{name}"] = discrimination(rows)["auc_f1"]
        similarity.WEIGHTS[name] = kept
    similarity.forget()
    return out


def _fresh():
    """Forget every cache: what the first call of a process pays, the model's loading aside."""
    similarity.forget(vectors=True)
    arguments.forget()


def speed(rows: list[dict], count: int = 120, repeats: int = 5) -> dict:
    """Seconds of `count` rewards batched and one by one (no cache), and of matching alone (all sentences encoded)."""
    from gpu_common import spread

    generated, references = [r["text"] + " " + r["claim"] for r in rows[:count]], [[r["claim"]] for r in rows[:count]]
    similarity.embed(["warm"])
    seconds = {"one_by_one_s": [], "batched_s": [], "again": []}
    for _ in range(repeats):
        _fresh()
        start = time.perf_counter()
        for g, r in zip(generated, references):
            similarity.similarity(g, r)
        seconds["one_by_one_s"].append(time.perf_counter() - start)
        _fresh()
        for name in ("batched_s", "again"):
            start = time.perf_counter()
            similarity.similarity_many(generated, references)
            seconds[name].append(time.perf_counter() - start)
    ratios = [one / many for one, many in zip(seconds["one_by_one_s"], seconds["batched_s"])]
    return {
        "rewards": len(generated), **{k: spread(seconds[k]) for k in ("one_by_one_s", "batched_s")}, "speedup": spread(ratios),
        "matching_ms_per_pair": spread([1000 * s / len(generated) for s in seconds["again"]]),
    }  # fmt: skip


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--pairs", type=int, default=400)
    ap.add_argument("--out", type=Path, default=Path("bench/results/similarity.json"))
    args = ap.parse_args()
    rows = contradictions(args.pairs)
    held = "\n".join(CLAIMS.strip().splitlines()[1::2])  # the last search did not read these; the one before it, where it began, did
    unseen = {f"held_out_{k}": v for k, v in discrimination(contradictions(args.pairs, claims=held)).items() if "_f1_" not in k and "_cosine_" not in k}
    result = json.dumps({"bench": "similarity", "weights": similarity.WEIGHTS} | discrimination(rows) | unseen | ablation(rows) | speed(rows))
    args.out.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
