"""Tournaments: properties with a perfect judge, a random judge and judges that give no verdict."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rmnlhf.pairs import PreferencePair
from rmnlhf.tournament import (
    agreement,
    distractor_sets,
    double_elimination,
    ranked_sets,
    round_robin,
    single_elimination,
    together,
)  # fmt: skip

SCHEMES = {"double elimination": double_elimination, "single elimination": single_elimination, "round robin": round_robin}
sizes = st.integers(1, 33)
seeds = st.integers(0, 10_000)


def perfect(strength):
    return lambda pairs: ["A" if strength[i] > strength[j] else "B" for i, j in pairs]


def strengths(n, seed):
    values = list(range(n))
    random.Random(seed).shuffle(values)
    return values


@settings(max_examples=300, deadline=None)
@given(sizes, seeds, st.sampled_from(sorted(SCHEMES)))
def test_a_perfect_judge_finds_the_best(n, seed, scheme):
    strength = strengths(n, seed)
    s = SCHEMES[scheme](n, perfect(strength), seed=seed)
    assert strength[s.ranking[0]] == n - 1
    assert sorted(s.ranking) == list(range(n))
    if scheme == "double elimination" and n > 1:  # the second best loses to one candidate only
        assert strength[s.ranking[1]] == n - 2
    if scheme == "round robin":
        assert [strength[c] for c in s.ranking] == list(range(n))[::-1]


@settings(max_examples=300, deadline=None)
@given(sizes, seeds, st.sampled_from(sorted(SCHEMES)), st.sampled_from(["AB", "A", "B", "ABN", "N"]))
def test_score_range_for_any_judge(n, seed, scheme, says):
    rng = random.Random(seed)
    s = SCHEMES[scheme](n, lambda pairs: [{"N": None}.get(v := rng.choice(says), v) for _ in pairs], seed=seed)
    assert len(s.scores) == n and all(0 <= x <= 1 for x in s.scores)
    assert math.isclose(sum(s.scores), n / 2)  # the mean is 1/2, whatever the judge says
    assert s.coins <= s.judgements and (says != "N" or s.coins == s.judgements)
    assert all(s.scores[a] >= s.scores[b] for a, b in zip(s.ranking, s.ranking[1:]))
    if n == 1:
        assert s.scores == [0.5] and s.judgements == 0
    elif scheme != "round robin":
        assert sorted(s.scores) == [i / (n - 1) for i in range(n)]


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 65), seeds)
def test_judgements_spent(n, seed):
    asked = []
    rng = random.Random(seed)

    def judge(pairs):
        assert pairs and all(i != j for i, j in pairs)
        assert len({c for p in pairs for c in p}) == 2 * len(pairs)  # nobody plays twice in one round
        asked.append(len(pairs))
        return [rng.choice("AB") for _ in pairs]

    s = double_elimination(n, judge, seed=seed)
    assert s.judgements == sum(asked) and s.rounds == len(asked)
    assert 2 * n - 2 <= s.judgements <= 2 * n - 1
    assert s.rounds <= 3 * math.ceil(math.log2(n)) + 2
    assert single_elimination(n, lambda pairs: ["A"] * len(pairs)).judgements == n - 1
    assert round_robin(n, lambda pairs: ["A"] * len(pairs)).judgements == n * (n - 1) // 2


def test_double_elimination_needs_two_losses():
    losses = {}
    rng = random.Random(3)

    def judge(pairs):
        verdicts = [rng.choice("AB") for _ in pairs]
        for (i, j), v in zip(pairs, verdicts):
            assert losses.get(i, 0) < 2 and losses.get(j, 0) < 2
            losses[j if v == "A" else i] = losses.get(j if v == "A" else i, 0) + 1
        return verdicts

    for n in range(2, 20):
        losses.clear()
        s = double_elimination(n, judge, seed=n)
        assert losses.get(s.ranking[0], 0) <= 1 and all(losses[c] == 2 for c in s.ranking[1:])


def test_bracket_reset_is_played_in_the_other_order():
    """Three candidates: the one that comes up from the losers' bracket wins the first final, so that a second one is played."""
    seen = []
    s = double_elimination(2, lambda pairs: seen.extend(pairs) or ["A" for _ in pairs])
    assert [set(p) for p in seen] == [{0, 1}] * len(seen) and seen[1] == seen[0][::-1]
    assert (s.judgements, len(seen)) == (3, 3)  # always "A": each wins once where shown first, then the reset decides
    steady = double_elimination(2, perfect([0, 1]))
    assert steady.judgements == 2 and steady.ranking == [1, 0]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 17), seeds, st.sampled_from(sorted(SCHEMES)))
def test_the_order_of_candidates_does_not_matter(n, seed, scheme):
    """A judge that may be inconsistent and has a position bias, but judges texts: the scores belong to the texts."""
    texts = [f"text {i}" for i in range(n)]
    shuffled = list(texts)
    random.Random(seed).shuffle(shuffled)

    def judge(texts):
        return lambda pairs: [random.Random(texts[i] + "|" + texts[j]).choice(["A", "A", "B", None]) for i, j in pairs]

    a = SCHEMES[scheme](n, judge(texts), seed=seed, keys=texts)
    b = SCHEMES[scheme](n, judge(shuffled), seed=seed, keys=shuffled)
    assert dict(zip(texts, a.scores)) == dict(zip(shuffled, b.scores))
    assert (a.judgements, a.coins) == (b.judgements, b.coins)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), seeds, st.sampled_from(sorted(SCHEMES)))
def test_tournaments_in_step_end_as_they_do_alone(ns, seed, scheme):
    """One call of the judge for each round of all of them: as many calls as the longest one has rounds."""
    keys = [[f"{t}/{i}" for i in range(n)] for t, n in enumerate(ns)]
    calls = []

    def verdict(a, b):
        return random.Random(a + "|" + b).choice(["A", "B", "B", None])

    def judge(asked):
        calls.append(len(asked))
        return [verdict(keys[t][i], keys[t][j]) for t, i, j in asked]

    got = together(scheme, keys, judge, seed=seed)
    for mine, names in zip(got, keys):
        assert mine == SCHEMES[scheme](len(names), lambda ps, names=names: [verdict(names[i], names[j]) for i, j in ps], seed=seed, keys=names)
    assert len(calls) == max(s.rounds for s in got) and sum(calls) == sum(s.judgements for s in got)


def test_a_coin_is_seeded_and_fair():
    def silent(pairs):
        return [None] * len(pairs)

    assert double_elimination(8, silent, seed=1) == double_elimination(8, silent, seed=1)
    first = [double_elimination(8, silent, seed=s).ranking[0] for s in range(400)]
    assert all(20 <= first.count(c) <= 85 for c in range(8))  # 50 expected each


def test_the_side_shown_first_is_balanced():
    first = []
    for seed in range(200):
        round_robin(5, lambda pairs: first.extend(i < j for i, j in pairs) or ["A"] * len(pairs), seed=seed)
    assert 0.45 < sum(first) / len(first) < 0.55


def test_bad_judges_are_named():
    with pytest.raises(ValueError, match="asked for 1 verdicts and gave 0"):
        single_elimination(2, lambda pairs: [])
    with pytest.raises(ValueError, match="'tie'"):
        single_elimination(2, lambda pairs: ["tie"])
    with pytest.raises(ValueError, match="no candidate"):
        double_elimination(0, lambda pairs: [])
    with pytest.raises(ValueError, match="1 keys for 2"):
        double_elimination(2, lambda pairs: [], keys=["x"])


def test_agreement():
    assert agreement([1.0, 0.5, 0.0], [2, 1, 0]) == 1
    assert agreement([0.0, 0.5, 1.0], [2, 1, 0]) == 0
    assert agreement([0.5, 0.5], [1, 0]) == 0.5
    assert agreement([0.2, 0.9, 0.1], [1, 1, 0]) == 1  # order within a level is unknown and does not count
    assert math.isnan(agreement([0.1, 0.2], [1, 1]))


def graph_pair(question, better, worse, i):
    a, b, label = (better, worse, "A") if i % 2 else (worse, better, "B")
    context = [{"role": "user", "content": question}]
    return PreferencePair(f"{question}{better}{worse}", "ukpconvarg", question, context, a, b, label)


def test_ranked_sets_are_fully_labelled_and_transitive():
    rng = random.Random(0)
    pairs, strength = [], {}
    for q in ("q1", "q2"):
        args = [f"{q} argument {i}" for i in range(12)]
        strength |= {a: i for i, a in enumerate(args)}
        edges = [(a, b) for a in args for b in args if strength[a] > strength[b] and rng.random() < 0.8]
        pairs += [graph_pair(q, a, b, i) for i, (a, b) in enumerate(edges)]
    sets = ranked_sets(pairs, n=4, sets=4)
    assert len(sets) >= 3 and {s["group"] for s in sets[:2]} == {"q1", "q2"}
    labelled = {(p.response_a, p.response_b) for p in pairs} | {(p.response_b, p.response_a) for p in pairs}
    for s in sets:
        by_level = [c for _, c in sorted(zip(s["levels"], s["candidates"]))]
        assert [strength[c] for c in by_level] == sorted(strength[c] for c in by_level)
        assert all((a, b) in labelled for a in by_level for b in by_level if a != b)
        assert sorted(s["levels"]) == [0, 1, 2, 3]
    assert ranked_sets(pairs[::-1], n=4, sets=4) == sets


def test_ranked_sets_refuse_a_cycle():
    cycle = [("a", "b"), ("b", "c"), ("c", "a")]
    assert ranked_sets([graph_pair("q", x, y, i) for i, (x, y) in enumerate(cycle)], n=3, sets=1) == []


def test_distractor_sets_hold_one_best_response():
    pairs = [graph_pair(f"q{i}", f"good {i}", f"bad {i}", i) for i in range(6)]
    sets = distractor_sets(pairs, n=4, sets=5)
    assert len(sets) == 5 and sets == distractor_sets(pairs[::-1], n=4, sets=5)
    for s in sets:
        q = s["context"][0]["content"][1:]
        assert [c for c, level in zip(s["candidates"], s["levels"]) if level] == [f"good {q}"]
        assert f"bad {q}" in s["candidates"] and len(set(s["candidates"])) == 4
