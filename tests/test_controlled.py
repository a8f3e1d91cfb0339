"""The generated pairs: seeded, varied, their truth consistent, and no shortcut to the label."""

import re
from collections import Counter

import numpy as np
import pytest

from rmnlhf import sources, splits
from rmnlhf.pairs import PreferencePair, settle
from rmnlhf.sources import controlled


@pytest.fixture(scope="module")
def rows():
    return sources.load("controlled")


def test_same_seed_same_pairs_other_seed_others(rows):
    again = [settle(PreferencePair(source="controlled", **f)) for f in controlled.fields(n=60)]
    assert again == rows[:60]
    other = [f["response_a"] for f in controlled.fields(n=60, seed=8)]
    assert sum(a == b.response_a for a, b in zip(other, rows)) < 10


def test_ten_families_equally_many_unique_ids(rows):
    counts = Counter(p.meta["family"] for p in rows)
    assert len(counts) >= 10 and len(set(counts.values())) == 1
    assert len({p.id for p in rows}) == len(rows) == controlled.PAIRS
    texts = {(p.context[0]["content"], *sorted([p.response_a, p.response_b])) for p in rows}
    assert len(texts) == len(rows)
    assert {p.meta["severity"] for p in rows} == {"minor", "major", "fatal"}


def test_truth_is_consistent(rows):
    for p in rows:
        assert [(c["side"] == p.label) == (c["polarity"] > 0) for c in p.meta["core"]] == [True, True]
        assert all(f"Response {c['side']}" in c["text"] for c in p.meta["core"] + p.meta["nitpicks"])
        assert "{" not in " ".join(c.text for c in p.critiques)


def test_checkable_families_have_the_right_label(rows):
    """The label is checked against the task itself, not against the generator."""
    checked = Counter()
    for p in rows:
        good, bad = (p.response_a, p.response_b) if p.label == "A" else (p.response_b, p.response_a)
        question = p.context[0]["content"]
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        if p.meta["family"] == "arithmetic":
            if "packs" in question:
                a, b, c = numbers
                right = a * b - c
            else:
                right = numbers[0] * numbers[1] + numbers[2]
            assert str(right) in re.findall(r"\d+", good) and str(right) not in re.findall(r"\d+", bad)
        elif "capital letters" in question:
            line = max(good.split("\n"), key=lambda s: s.count(","))
            assert line.upper() == line
        elif m := re.search(r"exactly (\d) ", question):
            counts = [max(t.split("\n"), key=lambda s: s.count(",")).count(",") + 1 for t in (good, bad)]
            assert counts[0] == int(m[1]) != counts[1]
        elif p.meta["family"] == "code":
            results = []
            for text in (good, bad):
                source = "\n".join(x for x in text.split("\n") if x.startswith(("def", "solve", " ")))
                scope = {}
                exec(source, scope)  # our own generated code
                results.append([scope["solve"](v) for v in ([3, -2, 8, 5, -7], [2, 4, 6, 9], [1, 3, -5, 4])])
            assert results[0] != results[1]
            if "largest" in question:
                assert results[0] == [8, 9, 4]
            if "even numbers" in question:
                assert results[0] == [6, 12, 4]
        else:
            continue
        checked[p.meta["family"]] += 1
    assert checked["arithmetic"] == 120 and checked["code"] == 120 and checked["instructions"] > 30


def test_annotators(rows):
    hasty = []
    for p in rows:
        careful, brief, third = p.critiques
        assert (careful.annotator, brief.annotator, third.annotator) == ("careful", "brief", "hasty")
        assert careful.label == brief.label == p.label
        hasty.append(third.label == p.label)
        sentences = [s for c in p.critiques for s in re.split(r"(?<=[.!?]) ", c.text) if not re.match(r"(My|I) ", s)]
        points = [s for s in sentences if not re.fullmatch(r"Response [AB] (is better|wins for me)\.", s)]
        assert len(points) == len(set(points)), p.critiques  # no two annotators share a sentence
    assert 0.70 < np.mean(hasty) < 0.80


def test_who_errs_writes_what_fits_the_error(rows):
    """The text speaks for the label given: it names the point with right and wrong the other way round."""
    for p in rows:
        third = p.critiques[2]
        if p.meta["family"] == "safety" and third.label != p.label:
            assert not re.search(rf"Response {third.label} (chooses|should have)", third.text)
        if p.meta["family"] == "arithmetic" and third.label != p.label:
            assert f"Response {p.label} calculates correctly" not in third.text


def test_no_shortcut_gives_the_label(rows):
    for name, right in splits.shortcuts(rows).items():
        assert 0.45 <= right.mean() <= 0.55, (name, right.mean())


def test_no_single_word_gives_the_label(rows):
    seen = {}
    for p in rows:
        a, b = (set(t.lower().split()) for t in (p.response_a, p.response_b))
        for word in a ^ b:
            seen.setdefault(word, []).append((word in a) == (p.label == "A"))
    often = {w: np.mean(v) for w, v in seen.items() if len(v) >= 200}
    assert len(often) >= 5 and all(0.4 <= v <= 0.6 for v in often.values()), often
