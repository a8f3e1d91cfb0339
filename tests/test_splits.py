"""Roles by group, seeded; what is cut is counted; training pairs that stand in an evaluation set are found."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from rmnlhf import ROOT, params, sources, splits
from rmnlhf.pairs import PreferencePair, fingerprint, write_jsonl


def load(data_dir, *overrides):
    return params.load(ROOT / "params.yaml", profile="cpu", overrides=[f"data.dir={data_dir}", "seed=7", *overrides])


@pytest.fixture(scope="module")
def ukp(data_dir):
    return load(data_dir, "data.evaluation_sources=[haluquestqa, helpsteer3_sample]", "data.max_train=600", "data.max_eval=150")


@pytest.fixture(scope="module")
def made(ukp):
    return splits.make(ukp)


def test_debates_play_one_role_each(made):
    groups = {role: {p.group for p in getattr(made, role)} for role in splits.SHARES}
    assert {role: len(g) for role, g in groups.items()} == {"train": 6, "hidden": 6, "unseen": 4}
    assert len(set.union(*groups.values())) == 16
    whole = Counter(p.group for p in sources.load("ukpconvarg", ROOT / "data"))
    assert Counter(p.group for p in made.unseen) == {g: whole[g] for g in groups["unseen"]}


def test_hidden_critiques_are_gone_from_the_pairs_and_kept_aside(made):
    assert made.source == "ukpconvarg"
    assert all(p.agreeing for p in made.train) and not any(p.critiques for p in made.hidden)
    assert set(made.hidden_truth) == {p.id for p in made.hidden} and all(made.hidden_truth.values())
    whole = {p.id: p for p in sources.load("ukpconvarg", ROOT / "data")}
    assert all(made.hidden_truth[p.id] == whole[p.id].critiques and p == replace(whole[p.id], critiques=[]) for p in made.hidden)


def test_counts_reconcile(made, ukp):
    found = len(sources.load("ukpconvarg", ROOT / "data"))
    left_out = made.report["left out of training"]
    assert len(made.train) + len(made.hidden) + len(made.unseen) + sum(left_out.values()) == found
    assert 598 <= len(made.train) + len(made.hidden) <= 600  # in proportion, rounded down
    assert made.report["ukpconvarg"] == {"read": 16_927, "refused": {"tie": 3_289, "no gold label": 846}}
    assert all(max(len(p.response_a), len(p.response_b)) <= ukp.data.max_chars for p in made.train + made.hidden)
    assert {n: len(m) for n, m in made.evaluation.items()} == {"ukpconvarg": 150, "haluquestqa": 150, "helpsteer3_sample": 100}


def test_same_parameters_same_splits_other_seed_other_roles(made, ukp, data_dir):
    again = splits.make(ukp)
    assert (again.train, again.hidden, again.unseen, again.evaluation) == (made.train, made.hidden, made.unseen, made.evaluation)
    other = splits.assign(sources.load("ukpconvarg", data_dir), seed=8)
    assert {p.group for p in other["unseen"]} != {p.group for p in made.unseen}


def test_cut_is_by_hash_so_a_smaller_set_is_part_of_a_larger_one(made, data_dir):
    small = splits.make(load(data_dir, "data.evaluation_sources=[]", "data.max_train=200", "data.max_eval=50"))
    assert [p.id for p in small.train] == [p.id for p in made.train][: len(small.train)]
    assert [p.id for p in small.evaluation["ukpconvarg"]] == [p.id for p in made.evaluation["ukpconvarg"]][:50]


def longer_wins(members):
    return sum(0.5 if p.longer is None else p.longer == p.label for p in members) / len(members)


def test_length_balance(data_dir):
    whole = splits.balanced(sources.load("ukpconvarg", data_dir), seed=7)
    assert longer_wins(whole) == pytest.approx(0.5, abs=0.01) and len(whole) > 5_000
    natural, even = (
        splits.make(load(data_dir, f"data.balance={b}", "data.evaluation_sources=[]", "data.max_train=3000")) for b in ("natural", "length")
    )
    assert 0.70 < longer_wins(natural.train + natural.hidden) < 0.80
    assert [longer_wins(m) for m in (even.train, even.hidden)] == [pytest.approx(0.5, abs=0.01)] * 2
    assert natural.evaluation == even.evaluation  # the same questions for both


def test_length_balance_of_groups_of_one():
    members = [PreferencePair(f"{i}", "s", f"g{i}", [{"role": "user", "content": f"q{i}"}], "long answer" if i % 3 else "short", "a word", "A") for i in range(30)]
    even = splits.balanced(members, 7)
    assert len(even) == 20 and longer_wins(even) == 0.5


def test_a_training_source_is_evaluated_on_its_unseen_groups_alone(data_dir):
    found = splits.make(load(data_dir, "data.evaluation_sources=[ukpconvarg]"))
    assert {p.group for p in found.evaluation["ukpconvarg"]} == {p.group for p in found.unseen}
    assert not {p.group for p in found.evaluation["ukpconvarg"]} & {p.group for p in found.train + found.hidden}


def test_any_part_of_an_evaluation_set_holds_both_slices(made):
    for n in (10, 50, 150):
        right = Counter(p.longer in (p.label, None) for p in made.evaluation["ukpconvarg"][:n])
        assert right[True] == right[False] == n // 2
    assert len(splits.alternate(made.unseen, 7)) == len(made.unseen)


def test_no_data_falls_back_to_controlled_and_says_so(tmp_path, caplog):
    made = splits.make(load(tmp_path, "data.evaluation_sources=[haluquestqa]"))
    assert made.source == "controlled" and {p.source for p in made.train} == {"controlled"}
    assert "NO DATA for ukpconvarg" in caplog.text and list(made.evaluation) == ["controlled"]
    groups = [{p.group for p in getattr(made, role)} for role in splits.SHARES]
    assert sum(map(len, groups)) == len(set.union(*groups)) and min(map(len, groups)) > 100


def test_plain_sources_are_the_hidden_part(monkeypatch, data_dir):
    made = splits.make(load(data_dir, "data.critique_sources=[controlled]", "data.plain_sources=[haluquestqa]", "data.evaluation_sources=[]",
                            "data.max_chars=100000"))  # fmt: skip
    assert {p.source for p in made.hidden} == {"haluquestqa"} and {p.source for p in made.train} == {"controlled"}
    assert made.source == "controlled+haluquestqa" and made.hidden_truth == {}


def test_a_source_that_marks_its_own_split_keeps_it():
    def pair(i, split):
        return PreferencePair(f"{i}", "s", f"g{i}", [{"role": "user", "content": "q"}], "a", "b", "A", [], {"split": split})

    members = [pair(i, "validation" if i % 10 == 0 else "train") for i in range(100)]
    roles = splits.assign(members, seed=7)
    assert {p.id for p in roles["unseen"]} == {p.id for p in members if p.meta["split"] == "validation"}
    assert len(roles["train"]) == len(roles["hidden"]) == 45


def test_own_pairs_join_training_unless_they_stand_in_an_evaluation_set(tmp_path, data_dir):
    fixed = ["data.critique_sources=[controlled]", "data.evaluation_sources=[]"]
    taken = splits.make(load(data_dir, *fixed)).evaluation["controlled"][0]
    own = [
        replace(taken, id="own-stolen", source="own", response_a=taken.response_a.upper() + " !", group="own"),
        PreferencePair("own-1", "own", "x", [{"role": "user", "content": "q"}], "yes", "no", "A", taken.critiques[:1], {}),
        PreferencePair("own-2", "own", "y", [{"role": "user", "content": "q2"}], "yes", "no", "B", [], {}),
        PreferencePair("own-3", "own", "x", [{"role": "user", "content": "q3"}], "yes", "no", "B", [], {}),  # beside own-1
        PreferencePair("own-4", "own", taken.group, [{"role": "user", "content": "q4"}], "yes", "no", "B", [], {}),
    ]
    own[1] = replace(own[1], label=taken.critiques[0].label)
    file = write_jsonl(tmp_path / "own.jsonl", own)
    with file.open("a") as f:
        f.write('{"id": "broken", "label": "tie"}\n{"id": "half')
    made = splits.make(load(data_dir, *fixed, f"data.own={file}"))
    assert {"own-1", "own-3"} <= {p.id for p in made.train} and "own-2" in {p.id for p in made.hidden}
    groups = [{p.group for p in role} for role in (made.train, made.hidden, made.unseen)]
    assert not any(a & b for i, a in enumerate(groups) for b in groups[i + 1 :])
    assert "own-stolen" not in {p.id for p in made.train + made.hidden}
    assert made.report["left out of training"]["train: the same pair stands in an evaluation set"] == 1
    about = made.report[str(file)]
    assert about["read"] == 7
    assert about["refused"] == {"missing field": 1, "half-written last line": 1, "its group is held out for evaluation": 1}
    assert about["used"] == {"train": 2, "hidden": 1} and about["critiques_hidden"] == 0
    with pytest.raises(ValueError, match="no pair with a human critique is left .*over 1 characters.*data.max_chars"):
        splits.make(load(data_dir, *fixed, "data.max_chars=1"))


def test_save_and_load(made, tmp_path):
    assert splits.load(splits.save(made, tmp_path / "s")) == made
    with pytest.raises(FileNotFoundError, match="00_data"):
        splits.load(tmp_path / "none")


# --- leakage -------------------------------------------------------------------------------------------------------------
def edited(text, rng):
    """A light edit: one word dropped, doubled, moved, misspelt, or written in capitals, and another full stop."""
    words = text.split()
    at = rng.randrange(len(words))
    kind = rng.choice(["drop", "double", "move", "misspell", "capitals"])
    if kind == "drop" and len(words) > 1:
        del words[at]
    elif kind == "move":
        words.append(words.pop(at))
    else:
        words[at] = {"double": f"{words[at]} {words[at]}", "misspell": words[at][:1] + words[at][2:]}.get(kind, words[at].upper())
    return " ".join(words) + "."


@pytest.mark.parametrize("name", ["ukpconvarg", "controlled", "mr_ben", "helpsteer3_sample"])
def test_planted_duplicates_are_found(name, data_dir):
    members = sorted(sources.load(name, data_dir), key=lambda p: fingerprint(p.id))[:100]
    exact = [replace(p.swapped(), id=f"copy {p.id}", response_a=p.swapped().response_a.upper() + "\n") for p in members]
    found = splits.leakage(exact, members)
    assert {(t, e) for t, e, _ in found["exact"]} == {(f"copy {p.id}", p.id) for p in members} and not found["near"]
    rng = Random(7)
    light = [replace(p, id=f"edit {p.id}", response_a=edited(p.response_a, rng), response_b=edited(p.response_b, rng)) for p in members]
    found = splits.leakage(light, members)
    right = [t for t, e, _ in found["exact"] + found["near"] if t == f"edit {e}"]
    assert len(right) >= 0.95 * len(members)


def test_what_is_no_duplicate_is_not_found(made):
    found = splits.leakage(made.train[:200], made.evaluation["haluquestqa"])
    assert found == {"exact": [], "near": []}


def test_units_and_scores():
    def pair(i, q, a, b):
        return PreferencePair(i, "s", i, [{"role": "user", "content": q}], a, b, "A", [], {})

    known = pair("e", "How do tides come about on the coast?", "By the moon's pull on the sea, mostly.", "Nobody knows for sure at all.")
    same_prompt = pair("t", "how do tides come about on the coast", "Entirely other words stand here today.", "And here some more of them too.")
    same_answer = pair("u", "Why does water rise?", "By the moon's pull on the sea, mostly!", "Ships push it up, one after another.")
    hits = {unit: splits.leakage([same_prompt, same_answer], [known], unit)["exact"] for unit in ("pair", "prompt", "response")}
    assert hits == {"pair": [], "prompt": [("t", "e", 1.0)], "response": [("u", "e", 1.0)]}
    (near,) = splits.leakage([pair("n", known.context[0]["content"], known.response_a + " Truly.", known.response_b)], [known])["near"]
    assert near[:2] == ("n", "e") and 0.6 <= near[2] < 1
    assert splits.leakage([], [known]) == splits.leakage([known], []) == {"exact": [], "near": []}


def test_shortcuts():
    def pair(i, longer_right):
        a, b = ("long " * 5, "short") if longer_right else ("short", "long " * 5)
        return PreferencePair(str(i), "s", str(i), [{"role": "user", "content": "q"}], a, b, "A", [], {})

    found = splits.shortcuts([pair(i, i % 4 != 0) for i in range(200)])
    assert found["longer wins"].mean() == 0.75 and found["first wins"].mean() == 1.0
    assert 0.7 < found["bag of words"].mean() < 0.8
