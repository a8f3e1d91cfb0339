"""Which pair plays which role, and whether a training pair leaks into an evaluation set.

Roles of a source with human critiques, by group (debate, question), so that no group stands on two sides:
  train   critiques are seen
  hidden  such pairs with the critiques taken away, for MetaRM to generalise to; `hidden_truth` keeps the critiques
  unseen  evaluation
A source that marks its own split (meta["split"] == "validation") keeps it. Where `data.plain_sources` gives pairs
without critiques, they are the hidden part and all training groups of the critique sources are seen.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH

from rmnlhf import pairs as pairs_
from rmnlhf import sources
from rmnlhf.pairs import HumanCritique, PreferencePair, fingerprint

log = logging.getLogger(__name__)
SHARES = {"train": 6, "hidden": 6, "unseen": 4}  # of the 16 debates of ukpconvarg; in proportion elsewhere


@dataclass
class Splits:
    train: list[PreferencePair]
    hidden: list[PreferencePair]
    unseen: list[PreferencePair]
    evaluation: dict[str, list[PreferencePair]]
    hidden_truth: dict[str, list[HumanCritique]]
    source: str  # the training data really used, "controlled" where nothing else was there
    report: dict = field(default_factory=dict)  # {source: {"read": n, "refused": {...}, role: n, "left out": {...}}}


def make(params) -> Splits:
    """Splits of one run; the same params and files give the same splits, pair by pair.

    Where no critique source is there, the generated pairs `controlled` take its place; FileNotFoundError in profile gpu."""
    d, seed = params.data, params.seed
    with_critiques, missing = _present(d.critique_sources, d.dir)
    if not with_critiques and params.profile == "gpu":
        raise FileNotFoundError(
            f"{d.dir} has none of data.critique_sources ({', '.join(missing)}), and profile gpu does not train on generated pairs: run "
            f"`python -m rmnlhf.sources {' '.join(missing)}` where the hub can be reached, or name sources that are there"
        )
    if not with_critiques:
        log.warning("NO DATA for %s: running on the generated pairs `controlled` instead", ", ".join(missing))
        with_critiques = ["controlled"]
    plain, _ = _present(d.plain_sources, d.dir)
    report, roles = {}, {role: [] for role in SHARES}
    for name in with_critiques:
        found, rows, refused = sources.read(name, d.dir)
        report[name] = {"read": rows, "refused": dict(refused)}
        for role, members in assign(found, seed, hide=not plain).items():
            roles[role] += members
    for name in plain:
        found, rows, refused = sources.read(name, d.dir)
        report[name] = {"read": rows, "refused": dict(refused)}
        roles["hidden"] += found
    if d.own:
        own, mine, taken = pairs_.read_jsonl(d.own), set(), {p.id for members in roles.values() for p in members}
        role_of = {p.group: role for role, members in roles.items() for p in members}  # a group stands in one role
        for pair in sorted(own.pairs, key=lambda p: not p.agreeing):
            if pair.id in taken:
                own.refused["its id is that of another source's pair"] += 1
            elif role_of.setdefault(pair.group, "train" if pair.agreeing else "hidden") == "unseen":
                own.refused["its group is held out for evaluation"] += 1
            else:
                roles[role_of[pair.group]].append(pair)
                mine.add(pair.id)
        report[d.own] = {"read": own.lines, "refused": dict(own.refused), "examples": own.examples}

    evaluation = {}
    for pair in roles["unseen"]:
        evaluation.setdefault(pair.source, []).append(pair)
    for name in _present([n for n in d.evaluation_sources if n not in with_critiques], d.dir)[0]:  # of those only the unseen groups
        found, rows, refused = sources.read(name, d.dir)
        report[name] = {"read": rows, "refused": dict(refused)}
        evaluation[name] = found
    evaluation = {name: alternate(members, seed)[: d.max_eval] for name, members in evaluation.items()}

    left_out = Counter()
    judged = {_key(p) for members in evaluation.values() for p in members}
    for role in ("train", "hidden"):
        clean = [p for p in roles[role] if _key(p) not in judged]
        left_out[f"{role}: the same pair stands in an evaluation set"] = len(roles[role]) - len(clean)
        roles[role] = clean
        fits = [p for p in roles[role] if max(len(p.response_a), len(p.response_b)) <= d.max_chars]
        left_out[f"{role}: a response over {d.max_chars} characters"] = len(roles[role]) - len(fits)
        kept = alternate(balanced(fits, seed), seed) if d.balance == "length" else by_hash(fits, seed)
        left_out[f"{role}: for the length balance"] = len(fits) - len(kept)
        roles[role] = kept
    total = len(roles["train"]) + len(roles["hidden"])
    for role in ("train", "hidden"):  # cut in proportion, in hash order
        keep = len(roles[role]) if total <= d.max_train else d.max_train * len(roles[role]) // total
        left_out[f"{role}: over data.max_train"] = len(roles[role]) - keep
        roles[role] = roles[role][:keep]
    report["left out of training"] = {k: v for k, v in left_out.items() if v}
    if not roles["train"]:
        raise ValueError(
            f"no pair with a human critique is left to train on ({'; '.join(f'{n} {why}' for why, n in left_out.items() if n) or 'the sources have none'}): "
            "raise data.max_chars or data.max_train, or add a source to data.critique_sources"
        )
    if d.own:  # what the cuts left of them
        report[d.own]["used"] = {role: sum(p.id in mine for p in roles[role]) for role in ("train", "hidden")}
        report[d.own]["critiques_hidden"] = sum(p.id in mine and bool(p.agreeing) for p in roles["hidden"])
    return Splits(
        roles["train"],
        [replace(p, critiques=[]) for p in roles["hidden"]],
        alternate(roles["unseen"], seed),
        evaluation,
        {p.id: p.critiques for p in roles["hidden"] if p.critiques},
        "+".join(with_critiques + plain),
        report,
    )


def _present(names, data_dir) -> tuple[list[str], list[str]]:
    there = [n for n in names if sources.available(n, data_dir)]
    missing = [n for n in names if n not in there]
    for name in missing:
        log.warning(
            "source %s is not in %s: left out (`make data`, or python -m rmnlhf.sources %s)", name, data_dir, name
        )
    return there, missing


def assign(found: list[PreferencePair], seed: int, hide: bool = True) -> dict[str, list[PreferencePair]]:
    """{role: pairs}, by group, in the shares of SHARES; `hide` False puts the hidden share to train."""
    out = {role: [p for p in found if role == "unseen" and p.meta.get("split") == "validation"] for role in SHARES}
    rest = [p for p in found if p.meta.get("split") != "validation"]
    groups = sorted({p.group for p in rest}, key=lambda g: fingerprint(seed, "group", g))
    shares = {r: n for r, n in SHARES.items() if not (r == "unseen" and out["unseen"])}
    role_of, start, done = {}, 0, 0
    for role, share in shares.items():
        done += share
        end = round(len(groups) * done / sum(shares.values()))
        role_of |= dict.fromkeys(groups[start:end], role)
        start = end
    for pair in rest:
        role = role_of[pair.group]
        out["train" if role == "hidden" and not hide else role].append(pair)
    return out


def by_hash(members, seed: int) -> list[PreferencePair]:
    return sorted(members, key=lambda p: fingerprint(seed, p.id))


def balanced(members, seed: int) -> list[PreferencePair]:
    """As many pairs where the longer response is right as where it is wrong, within each group, and over all groups that hold one pair;
    in hash order. Equally long responses stay: "longer wins" cannot use them."""
    slices, sizes = defaultdict(lambda: {True: [], False: []}), Counter(p.group for p in members)
    out = []
    for pair in by_hash(members, seed):
        if pair.longer is None:
            out.append(pair)
        else:
            slices[pair.group if sizes[pair.group] > 1 else None][pair.longer == pair.label].append(pair)
    for right_wrong in slices.values():
        n = min(map(len, right_wrong.values()))
        out += right_wrong[True][:n] + right_wrong[False][:n]
    return by_hash(out, seed)


def alternate(members, seed: int) -> list[PreferencePair]:
    """Evaluation order: longer right and longer wrong in turn, each in hash order, as long as both last.

    Any beginning of the list then holds both slices in equal parts; figures are given by slice, or weighted."""
    ordered = by_hash(members, seed)
    right = [p for p in ordered if p.longer in (p.label, None)]
    wrong = [p for p in ordered if p.longer not in (p.label, None)]
    n = min(len(right), len(wrong))
    return [p for two in zip(right, wrong) for p in two] + right[n:] + wrong[n:]


def save(splits: Splits, folder: str | Path = "results/splits") -> Path:
    folder = Path(folder)
    for role in SHARES:
        pairs_.write_jsonl(folder / f"{role}.jsonl", getattr(splits, role))
    for name, members in splits.evaluation.items():
        pairs_.write_jsonl(folder / "evaluation" / f"{name}.jsonl", members)
    truth = [{"id": i, "critiques": [vars(c) for c in cs]} for i, cs in splits.hidden_truth.items()]
    pairs_.write_jsonl(folder / "hidden_truth.jsonl", truth)
    about = {"source": splits.source, "evaluation": list(splits.evaluation), "report": splits.report}
    pairs_.write_jsonl(folder / "splits.json", [about])
    return folder


def load(folder: str | Path = "results/splits") -> Splits:
    """What 00_data saved. Raises FileNotFoundError where it has not run."""
    folder = Path(folder)
    if not (folder / "splits.json").exists():
        raise FileNotFoundError(f"{folder / 'splits.json'}: no splits yet; run notebook 00_data (dvc repro 00_data)")
    about = json.loads((folder / "splits.json").read_text(encoding="utf-8"))

    def rows(file):
        return [
            PreferencePair.from_dict(json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n") if line
        ]

    truth = map(json.loads, filter(None, (folder / "hidden_truth.jsonl").read_text(encoding="utf-8").split("\n")))
    return Splits(
        *(rows(folder / f"{role}.jsonl") for role in SHARES),
        {name: rows(folder / "evaluation" / f"{name}.jsonl") for name in about["evaluation"]},
        {t["id"]: [HumanCritique(**c) for c in t["critiques"]] for t in truth},
        about["source"],
        about["report"],
    )  # fmt: skip


def shortcuts(members: list[PreferencePair], seed: int = 7, most: int = 3000) -> dict[str, np.ndarray]:
    """{shortcut: right_N (1, 0; 0.5 where it cannot say)}: what a judge gets who does not read the question.

    "bag of words": logistic regression on the difference of both responses' word counts, predicted for groups that it
    was not fitted on (five folds); left out where there are too few groups. At most `most` pairs, in hash order."""
    from scipy.sparse import diags
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict

    members = by_hash(members, seed)[:most]
    is_a = np.array([p.label == "A" for p in members])
    groups = [p.group for p in members]
    out = {
        "longer wins": np.array([0.5 if p.longer is None else float(p.longer == p.label) for p in members]),
        "first wins": is_a.astype(float),
    }
    if len(set(groups)) >= 5 and len(members) >= 50:
        counts = CountVectorizer(token_pattern=r"\S+", min_df=2).fit_transform(
            [p.response_a for p in members] + [p.response_b for p in members]
        )
        # either response may come first: both classes are then there, whatever the labels
        turned = np.array([fingerprint("bag of words", p.id) % 2 == 1 for p in members])
        features = diags(np.where(turned, -1.0, 1.0)) @ (counts[: len(members)] - counts[len(members) :])
        model = LogisticRegression(C=0.1, max_iter=1000, fit_intercept=False)
        guess = cross_val_predict(model, features, is_a ^ turned, groups=groups, cv=GroupKFold(5))
        out["bag of words"] = (guess == is_a ^ turned).astype(float)
    return out


# --- leakage ---------------------------------------------------------------------------------------------------------
SHINGLE = 5  # characters


def _units(pair: PreferencePair, unit: str) -> set[str]:
    """The texts compared, without case, punctuation and blanks."""
    prompt, *sides = (
        re.sub(r"\W+", " ", text.casefold()).strip()
        for text in (" ".join(t["content"] for t in pair.context), pair.response_a, pair.response_b)
    )
    return {"pair": {"\n".join([prompt, *sorted(sides)])}, "prompt": {prompt}, "response": set(sides)}[unit]


def _key(pair: PreferencePair) -> str:
    return _units(pair, "pair").pop()


def _shingles(text: str) -> set[int]:
    return {zlib.crc32(text[i : i + SHINGLE].encode()) for i in range(max(1, len(text) - SHINGLE + 1))}


@lru_cache(maxsize=400_000)  # 60,000 pairs as pair, prompt and two responses; some 2 KB each
def _sketch(text: str) -> MinHash:
    sketch = MinHash(num_perm=128, hashfunc=int)
    sketch.update_batch(list(_shingles(text)))
    return sketch


def leakage(train, evaluation, unit: str = "pair", threshold: float = 0.6) -> dict[str, list[tuple[str, str, float]]]:
    """Training pairs that stand, exactly or nearly, in an evaluation set.

    unit: "pair" (prompt and both responses, in either order), "prompt" or "response" (either one)
    returns {"exact" | "near": [(training id, evaluation id, Jaccard similarity)]}: each training pair with its best match

    Exact: equal but for case, punctuation and blanks. Near: Jaccard similarity of 5-character shingles >= `threshold`;
    candidates come from MinHash-LSH (128 permutations, 32 bands of 4), then the similarity is computed in full."""
    index, texts, owner = MinHashLSH(num_perm=128, params=(32, 4)), [], {}
    for pair in evaluation:
        for text in _units(pair, unit) - owner.keys():
            owner[text] = pair.id
            index.insert(len(texts), _sketch(text))
            texts.append(text)

    @cache
    def best(text: str) -> tuple[float, str]:
        if text in owner:
            return 2.0, owner[text]  # more than any similarity
        found = index.query(_sketch(text))
        grams = _shingles(text) if found else set()
        others = [(_shingles(texts[i]), owner[texts[i]]) for i in found]
        return max(((len(grams & other) / len(grams | other), name) for other, name in others), default=(0.0, ""))

    found = {"exact": [], "near": []}
    for pair in train:
        score, match = max(best(text) for text in _units(pair, unit))
        if score >= threshold:
            found["exact" if score == 2 else "near"].append((pair.id, match, min(score, 1.0)))
    return found
