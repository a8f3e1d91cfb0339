import numpy as np
import pandas as pd
import pytest

from rmnlhf import stats


def clustered(rng, groups=20, rows=10):
    """(values, groups): a shared part for each group, so that rows of one group are alike."""
    values = rng.normal(size=groups)[:, None] + rng.normal(size=(groups, rows))
    return values.ravel(), np.repeat(np.arange(groups), rows)


def unequal(rng, groups=30):
    """Right or wrong, the chance differs from group to group, groups have 1 to 19 rows."""
    ids = np.repeat(np.arange(groups), rng.integers(1, 20, groups))
    return (rng.random(len(ids)) < rng.beta(6, 4, groups)[ids]).astype(float), ids


@pytest.mark.parametrize(
    "draw, truth",
    [
        (lambda rng: (rng.normal(size=40), None), 0.0),
        (lambda rng: ((rng.random(100) < 0.7).astype(float), None), 0.7),
        (clustered, 0.0),
        (unequal, 0.6),
    ],
    ids=["normal", "right or wrong", "grouped", "unequal groups"],
)
def test_the_95_percent_interval_holds_the_truth_in_93_to_97_of_100(draw, truth):
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(1000):
        mean, low, high = stats.interval(*draw(rng), n=1000, seed=i)
        assert low <= mean <= high
        hits += low <= truth <= high
    assert 930 <= hits <= 970


def test_ignoring_the_groups_would_fail_that_test():
    """The check above can fail: rows taken as independent give intervals far too narrow on grouped data."""
    rng, hits = np.random.default_rng(5), 0
    for i in range(200):
        values, _ = clustered(rng)
        _, low, high = stats.interval(values, n=1000, seed=i)
        hits += low <= 0 <= high
    assert hits < 160


def test_the_sign_flip_test_rejects_true_nulls_in_at_most_one_of_twenty():
    rng, rejected = np.random.default_rng(3), 0
    for i in range(400):
        values, groups = clustered(rng, groups=12, rows=4)
        rejected += stats.paired(values, np.zeros_like(values), groups, n=200, seed=i)[3] < 0.05
    assert rejected <= 32  # 20 expected, +3 standard deviations is 33


def test_row_order_and_group_names_change_nothing():
    rng = np.random.default_rng(0)
    values, groups = unequal(rng)
    values = values + rng.random(len(values)) / 3
    other = rng.random(len(values))
    order = rng.permutation(len(values))
    names = np.array([f"debate {9 - g % 10}-{g}" for g in groups])
    assert stats.interval(values, groups) == stats.interval(values[order], names[order])
    assert stats.interval(values) == stats.interval(values[order])
    assert stats.paired(values, other, groups) == stats.paired(values[order], other[order], names[order])


def test_mean_is_over_rows_and_missing_values_do_not_count():
    values, groups = [1, 1, 1, 0, np.nan, None], ["a", "a", "a", "b", "b", "c"]
    mean, low, high = stats.interval(values, groups)
    assert mean == 0.75 and low < 0.75 < high
    assert np.isnan(stats.interval([])).all() and np.isnan(stats.interval([np.nan])).all()
    mean, low, high = stats.interval([1, 0, 1], ["one", "one", "one"])
    assert mean == pytest.approx(2 / 3) and np.isnan(low) and np.isnan(high)
    with pytest.raises(ValueError, match="3 values but 2 groups"):
        stats.interval([1, 0, 1], ["a", "b"])


def test_all_right_is_no_certainty():
    mean, low, high = stats.interval([1] * 20)
    assert (mean, high) == (1, 1) and low == pytest.approx(0.8316, abs=1e-4)  # Clopper-Pearson, 20 of 20
    assert stats.interval([0] * 20)[1:] == pytest.approx((0, 0.1684), abs=1e-4)
    assert stats.interval([0.3] * 7) == pytest.approx((0.3, 0.3, 0.3))


def test_paired_compares_row_by_row():
    rng = np.random.default_rng(1)
    skill = rng.random(200)  # rows differ far more than arms do
    a, b = skill + 0.05 + 0.02 * rng.normal(size=200), skill
    diff, low, high, p = stats.paired(a, b)
    assert 0.04 < low < diff < high < 0.06 and p < 0.001
    assert stats.paired(b, a)[0] == pytest.approx(-diff)
    assert stats.paired(a, a) == (0, 0, 0, 1)
    assert stats.paired([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0])[3] == pytest.approx(2 / 2**5)  # exact: 5 rows differ
    assert stats.paired([1, np.nan, 0, 1], [0, 1, 0, np.nan])[0] == 0.5
    with pytest.raises(ValueError, match="3 and 2 values"):
        stats.paired([1, 2, 3], [1, 2])


def test_holm():
    # worked by hand: sorted .01 .02 .03 .04 times 4 3 2 1, made monotone
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == pytest.approx([1, 1])
    adjusted = stats.holm([0.01, np.nan, 0.02])
    assert adjusted[[0, 2]] == pytest.approx([0.02, 0.02]) and np.isnan(adjusted[1])
    assert len(stats.holm([])) == 0


def test_a_table_as_the_tree_of_a_metrics_file():
    table = pd.DataFrame({"set": ["x", "x", "y"], "k": [2, 3, 2], "mean": [0.12345678, np.nan, 1.0], "n": [4, 5, 6]})
    assert stats.tree(table, "set", "k") == {"x": {"2": {"mean": 0.123457, "n": 4}, "3": {"mean": None, "n": 5}}, "y": {"2": {"mean": 1.0, "n": 6}}}


def test_over_is_one_arm_less_the_other_pair_by_pair():
    rows = [("p", "x", 1.0), ("p", "x", 0.0), ("p", "x", 1.0), ("p", "x", 1.0), ("p", "y", 0.25), ("q", "x", 0.5), ("q", "y", np.nan),
            ("r", "y", 1.0), ("s", "x", 0.2), ("s", "y", 0.1)]  # fmt: skip
    judged = pd.DataFrame(rows, columns=["id", "arm", "f1"])
    found = stats.over(judged.assign(group="g"), "x", "y", "f1", n=50)
    assert found["n"] == 2 and found["mean"] == pytest.approx(0.3) and (found["of_groups"], found["groups_above"]) == (1, 1)
    found = stats.over(judged.assign(group=judged["id"]), "y", "x", "f1", n=50)  # p and s alone have both
    assert (found["of_groups"], found["groups_above"]) == (2, 0)


def test_habits_are_what_is_said_whatever_is_shown():
    judged = pd.DataFrame({"critique": ["Response A is better.", "Response B is better.", "It names a study.", None], "verdict": ["A", "B", "A", None]})
    assert stats.habits(judged) == {"distinct critiques": 2, "most frequent critique": 0.5, "first response named": pytest.approx(2 / 3)}
    nothing = pd.DataFrame({"critique": [None], "verdict": [None]})
    assert stats.habits(nothing) == {"distinct critiques": 0, "most frequent critique": None, "first response named": None}
