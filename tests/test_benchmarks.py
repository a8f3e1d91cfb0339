import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import test_judge

import rmnlhf
from rmnlhf import benchmarks, params, report, rollout, similarity, splits
from rmnlhf.benchmarks import judgebench, pandalm, rewardbench, runner
from rmnlhf.grm import Judgement, format_judgement
from rmnlhf.pairs import HumanCritique, PreferencePair, write_jsonl

FLIP = {"A": "B", "B": "A"}
endpoint = test_judge.endpoint  # fixture: a server on this machine


# ---- published figures, from the authors' own recorded verdicts


def test_recorded_o1_mini_judgements_give_judgebench_its_published_figures(data_dir):
    rows, ab, ba = judgebench.recorded(data_dir)
    assert len(rows) == 350
    figures = benchmarks.score("judgebench", rows, ab, ba)
    published = {"overall": 65.71, "knowledge": 58.44, "reasoning": 62.24, "mathematics": 82.14, "coding": 78.57}
    assert {k: round(figures[k], 2) for k in published} == published
    assert figures["official"] == figures["overall"] == 100 * figures["accuracy"] and figures["unit"] == "percent"


def test_recorded_pandalm_verdicts_give_its_published_figures(data_dir):
    figures = benchmarks.score("pandalm", *pandalm.recorded(data_dir))
    published = {"accuracy": 0.6677, "macro_precision": 0.5738, "macro_recall": 0.5750, "macro_f1": 0.5743}
    assert {k: round(figures[k], 4) for k in published} == published
    assert figures["n"] == 999 and figures["accuracy_ba"] is None and figures["consistent_accuracy"] is None


# ---- rows of this file's own, in the official layouts


def rows_of(name):
    if name == "judgebench":
        sources = ["mmlu-pro-law", "livebench-math", "livecodebench", "livebench-reasoning", "mmlu-pro-math", "livecodebench"]
        return [{"pair_id": f"p{i}", "original_id": i, "source": s, "question": f"Q{i}?", "response_model": "m",
                 "response_A": f"a{i}", "response_B": f"b{i}", "label": "A>B" if i % 3 else "B>A"} for i, s in enumerate(sources)]  # fmt: skip
    if name == "pandalm":
        votes = [(1, 1, 2), (2, 2, 2), (0, 0, 1), (1, 1, 1), (0, 1, 2), (2, 1, 2)]
        return [{"idx": i, "cmp_key": "x_y", "instruction": f"I{i}", "input": "", "response1": f"one {i}", "response2": f"two {i}",
                 "annotator1": a, "annotator2": b, "annotator3": c} for i, (a, b, c) in enumerate(votes)]  # fmt: skip
    if name == "llmbar":
        subsets = ["Natural"] * 3 + ["Neighbor"] + ["Manual"] * 2
        return [{"input": f"Do {i}", "output_1": f"x{i}", "output_2": f"y{i}", "label": 1 + i % 2, "subset": s, "idx": i}
                for i, s in enumerate(subsets)]  # fmt: skip
    if name == "rm_bench":
        subsets = ["alpacaeval", "bigcode/humanevalpack", "xstest-should-respond", "refusals-dangerous", "refusals-offensive"]
        return [{"id": i, "prompt": f"P{i}", "subset": s, "chosen": [f"{i} good {k}" for k in range(3)],
                 "rejected": [f"{i} bad {k}" for k in range(3)]} for i, s in enumerate(subsets)]  # fmt: skip
    if name == "rewardbench":
        subsets = ["alpacaeval-easy", "alpacaeval-easy", "mt-bench-med", "mt-bench-hard", "donotanswer", "hep-go", "math-prm"]
        return [{"id": i, "prompt": f"P{i}", "chosen": f"c{i}", "rejected": f"r{i}", "subset": s} for i, s in enumerate(subsets)]
    if name == "rewardbench2":
        plain = [{"id": str(i), "prompt": f"P{i}", "chosen": [f"c{i}"], "rejected": [f"{i}r{k}" for k in range(3)], "subset": s}
                 for i, s in enumerate(["Factuality", "Focus", "Math", "Precise IF", "Safety", "Safety"])]  # fmt: skip
        ties = [{"id": "ref:0", "prompt": "one", "chosen": ["r"], "rejected": ["w", "v"], "subset": "Ties"},
                {"id": "tied:0", "prompt": "some", "chosen": ["r", "s"], "rejected": ["w", "v"], "subset": "Ties"}]  # fmt: skip
        return plain + ties
    if name == "helpsteer3":
        return [{"domain": "code" if i % 2 else "general", "context": [{"role": "user", "content": f"Q{i}"}], "response1": f"one {i}",
                 "response2": f"two {i}", "overall_preference": p} for i, p in enumerate([-2, 1, 3, -1, 0, 2])]  # fmt: skip
    if name == "haluquestqa":
        return [{"question_text": f"Q{i}", "preferred_response": f"p{i}", "rejected_response": f"r{i}"} for i in range(6)]
    return own_pairs()


def own_pairs(n=6):
    return [
        PreferencePair(f"own-{i}", "own", f"group {i % 3}", [{"role": "user", "content": f"Question {i}?"}],
                       f"First {i}" + " more" * (i % 2), f"Second {i}", "A" if i % 4 < 2 else "B",
                       [HumanCritique("w", "A" if i % 4 < 2 else "B", "Response A gives a reason, Response B does not.")])
        for i in range(n)
    ]  # fmt: skip


def counts(name, rows):
    return [len(benchmarks.get(name).contests(r)) for r in rows]


def perfect(name, rows):
    golds = [c.gold for r in rows for c in benchmarks.get(name).contests(r)]
    return golds, [FLIP.get(g, g) for g in golds]


@pytest.mark.parametrize(("name", "split", "other"), [("rewardbench", "filtered", "raw"), ("rewardbench2", "test", "train")])
def test_hub_files_are_read_as_they_lie_there(tmp_path, name, split, other):
    with pytest.raises(FileNotFoundError, match=f"rmnlhf.sources {name}"):
        benchmarks.load(name, tmp_path)
    rows, folder = rows_of(name), tmp_path / name / "data"
    folder.mkdir(parents=True)
    pd.DataFrame(rows[:3]).to_parquet(folder / f"{split}-00000-of-00002.parquet")
    pd.DataFrame(rows[3:]).to_parquet(folder / f"{split}-00001-of-00002.parquet")
    pd.DataFrame(rows[:1]).to_parquet(folder / f"{other}-00000-of-00001.parquet")
    (tmp_path / name / "FETCHED.json").write_text("{}")
    assert benchmarks.load(name, tmp_path) == rows
    said = perfect(name, rows)
    assert benchmarks.score(name, benchmarks.load(name, tmp_path), *said) == benchmarks.score(name, rows, *said)


@pytest.mark.parametrize("name", benchmarks.names())
def test_always_a_empty_and_perfect_judges(name):
    rows = rows_of(name)
    k = sum(counts(name, rows))
    always = benchmarks.score(name, rows, ["A"] * k, ["A"] * k)
    assert always["consistent_accuracy"] == 0 and always["consistency"] == 0 and always["first_position"] == 1
    for nothing in ([None] * k, [""] * k, ["C"] * k, [float("nan")] * k):
        empty = benchmarks.score(name, rows, nothing, nothing)
        assert empty["invalid"] == 1
        numbers = {key: v for key, v in empty.items() if key not in ("n", "contests", "invalid", "unscored", "partial")}
        assert all(np.all(np.array(v) == 0) for v in numbers.values() if isinstance(v, (int, float, list))), numbers
        assert set(empty["subsets"].values()) == {0}
    best = benchmarks.score(name, rows, *perfect(name, rows))
    assert best["accuracy"] == pytest.approx(1, abs=0.01) and best["consistent_accuracy"] == best["consistency"] == 1
    assert best["official"] == pytest.approx(best["accuracy"] * (100 if best["unit"] == "percent" else 1))


@pytest.mark.parametrize("name", benchmarks.names())
def test_permuting_the_rows_changes_nothing_and_nested_verdicts_are_the_same(name):
    rows, rng = rows_of(name), np.random.default_rng(2)
    said = [[[rng.choice(["A", "B", None]) for _ in range(k)] for k in counts(name, rows)] for _ in "xy"]
    order = rng.permutation(len(rows))
    flat = benchmarks.score(name, rows, *([v for row in s for v in row] for s in said))
    assert benchmarks.score(name, [rows[i] for i in order], *([s[i] for i in order] for s in said)) == flat
    assert benchmarks.score(name, rows, *said) == flat
    value, low, high = benchmarks.interval(name, rows, *said, n=50)
    assert value == flat["official"] and low <= high
    assert benchmarks.interval(name, [rows[i] for i in order], *([s[i] for i in order] for s in said), n=50) == (value, low, high)
    with pytest.raises(ValueError, match="verdicts"):
        benchmarks.score(name, rows, said[0][1:], None)


@pytest.mark.parametrize("name", benchmarks.names())
def test_the_official_figure_is_a_mean_over_rows_unless_its_module_says_otherwise(name):
    bench, rows, rng, same = benchmarks.get(name), rows_of(name), np.random.default_rng(4), []
    for _ in range(5):
        said = [[[rng.choice(["A", "B"]) for _ in range(k)] for k in counts(name, rows)] for _ in "xy"]
        alone = [benchmarks.score(name, [r], [ab], [ba]) for r, ab, ba in zip(rows, *said)]
        mean = np.mean([f["accuracy"] for f in alone if not f["unscored"]])
        same.append(benchmarks.score(name, rows, *said)["accuracy"] == pytest.approx(mean))
    assert all(same) != bench.mean_of_subsets


def rows_in(name, sizes):
    """That many rows of each subset, as `rows_of` lays them out."""
    likes = {r["subset"]: r for r in rows_of(name)}
    like = next(iter(likes.values()))
    return [{**like, "subset": s, **{k: f"{s} {i}" for k in ("id", "idx", "input") if k in like}} for s, n in sizes.items() for i in range(n)]


SETS = {  # rows of each subset, and how many of them the judge gets right
    "llmbar": {"Natural": (20, 0.9), "Neighbor": (10, 0.5), "GPTInst": (10, 0.4), "GPTOut": (10, 0.7), "Manual": (10, 0.6)},
    "rm_bench": {"alpacaeval": (12, 0.8), "math": (12, 0.6), "bigcode/humanevalpack": (10, 0.55), "xstest-should-respond": (10, 0.9),
                 "refusals-dangerous": (10, 0.7)},
    "rewardbench": {"mt-bench-easy": (15, 0.9), "mt-bench-hard": (12, 0.5), "donotanswer": (12, 0.8), "math-prm": (15, 0.6)},
    "rewardbench2": {"Factuality": (12, 0.8), "Focus": (12, 0.85), "Math": (10, 0.7), "Precise IF": (10, 0.6), "Safety": (12, 0.75)},
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_the_official_interval_holds_the_truth_in_93_to_97_of_100(name):
    """Headlines that are means over subsets; those over rows have `stats.interval`, which tests/test_stats.py simulates."""
    rows, rng = rows_in(name, {s: n for s, (n, _) in SETS[name].items()}), np.random.default_rng(5)
    skill = np.repeat([p for _, p in SETS[name].values()], [n for n, _ in SETS[name].values()])
    truths = {s: p for s, (_, p) in SETS[name].items()}
    if name == "rm_bench":  # safety is one domain of two parts
        truths["safety"] = (truths.pop("xstest-should-respond") + truths.pop("refusals-dangerous")) / 2
    truth, hits, k = np.mean(list(truths.values())), 0, counts(name, rows)[0]
    for i in range(1000):
        each = skill if name == "rewardbench2" else rng.beta(2 * skill, 2 * (1 - skill))  # rows differ, the two orders are alike
        right = rng.random((2, len(rows), 1 if name == "rewardbench2" else k)) < each[None, :, None]  # there: all three or none
        ab, ba = ([list(np.where(r, yes, no)) * (k // r.shape[-1]) for r in rs] for rs, yes, no in zip(right, "AB", "BA"))
        value, low, high = benchmarks.interval(name, rows, ab, ba, n=500, seed=i)
        scale = 100 if name == "llmbar" else 1
        assert low <= value <= high
        hits += low <= scale * truth <= high
    assert 930 <= hits <= 970


def test_judgebench_counts_a_sum_over_both_orders():
    row = rows_of("judgebench")[1]  # label A>B
    cases = {("A", "B"): 1, ("A", "tie"): 1, ("A", None): 1, ("tie", "B"): 1, ("A", "A"): 0, ("tie", "tie"): 0, ("B", "B"): 0, (None, "A"): 0}
    for (ab, ba), right in cases.items():
        assert benchmarks.score("judgebench", [row], [ab], [ba])["accuracy"] == right, (ab, ba)


def test_shared_figures_by_hand():
    rows = rows_of("judgebench")[1:3]  # gold A, A
    figures = benchmarks.score("judgebench", rows, ["A", "A"], ["B", None])
    assert figures["accuracy_ab"] == 1 and figures["accuracy_ba"] == 0.5 and figures["accuracy_mean"] == 0.75
    assert figures["consistent_accuracy"] == figures["consistency"] == 0.5
    assert figures["first_position"] == pytest.approx(2 / 3) and figures["invalid"] == 0.25 and figures["n"] == 2


def test_pandalm_three_classes():
    rows = rows_of("pandalm")
    assert [pandalm.gold(r) for r in rows] == ["A", "B", "tie", "A", "tie", "B"]
    figures = benchmarks.score("pandalm", rows, ["A", "B", "tie", "B", "A", "B"])
    assert figures["accuracy"] == pytest.approx(4 / 6) and figures["accuracy_decided"] == 3 / 4
    # classes tie, A, B by hand: precision 1, 1/2, 2/3; recall 1/2, 1/2, 1
    assert figures["macro_precision"] == pytest.approx((1 + 1 / 2 + 2 / 3) / 3)
    assert figures["macro_recall"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    judged = benchmarks.pairs("pandalm", rows)
    assert [p.meta["gold"] for p in judged] == ["A", "B", "tie", "A", "tie", "B"]


def test_llmbar_averages_orders_then_subsets():
    figures = benchmarks.score("llmbar", rows_of("llmbar"), ["A", "A", "A", "B", "A", "A"], ["B", "A", "A", "A", "B", "B"])
    # gold A B A B A B; Natural: 1, .5, .5 → 2/3; Neighbor 1; Manual 1, 0 → .5
    assert figures["subsets"] == pytest.approx({"Natural": 200 / 3, "Neighbor": 100, "Manual": 50})
    assert figures["overall_partial"] == pytest.approx((200 / 3 + 150) / 3) and figures["adversarial"] == 75
    assert figures["partial"] == ["GPTInst", "GPTOut"] and "overall" not in figures
    whole = [{**r, "subset": s} for r, s in zip(rows_of("llmbar"), ["Natural", "Neighbor", "GPTInst", "GPTOut", "Manual", "Manual"])]
    figures = benchmarks.score("llmbar", whole, ["A"] * 6, ["B"] * 6)
    assert figures["partial"] is False and figures["overall"] == figures["official"] and "overall_partial" not in figures


def test_rm_bench_hard_is_where_the_wrong_answer_has_the_fancier_style():
    rows = rows_of("rm_bench")
    fancier = [("B" if j > i else "A") for i, j in itertools.product(range(3), range(3))]  # a judge that buys style, else right
    figures = benchmarks.score("rm_bench", rows, [fancier] * 5, [[FLIP[v] for v in fancier]] * 5)
    assert (figures["hard"], figures["normal"], figures["easy"]) == (0, 1, 1)
    assert figures["partial"] == ["math"] and "overall" not in figures and figures["overall_partial"] == pytest.approx(6 / 9)
    # safety counts once: refuse (two rows, one wrong) and respond average first
    said = [["A"] * 9, ["A"] * 9, ["B"] * 9, ["A"] * 9, ["B"] * 9]
    figures = benchmarks.score("rm_bench", rows, said, [[FLIP[v] for v in s] for s in said])
    assert figures["subsets"] == {"chat": 1, "code": 1, "safety": 0.25} and figures["accuracy"] == 0.75
    whole = rows + [{**rows[0], "id": 9, "domain": "math"}]
    figures = benchmarks.score("rm_bench", whole, [["A"] * 9] * 6, [["B"] * 9] * 6)
    assert figures["partial"] is False and figures["overall"] == 1 and "overall_partial" not in figures


def test_rewardbench_weights_subsets_by_size_and_math_prm_as_upstream():
    rows = rows_of("rewardbench")
    said = ["A", "A", "B", "A", "A", "B", "A"]
    figures = benchmarks.score("rewardbench", rows, said, [FLIP[v] for v in said])
    weight = 984 / 447
    assert figures["sections"] == pytest.approx({"Chat": 2 / 3, "Chat Hard": 1, "Safety": 1, "Reasoning": weight / (1 + weight)})
    assert figures["overall_partial"] == pytest.approx(np.mean(list(figures["sections"].values()))) and "overall" not in figures
    lacks = ["alpacaeval-length", "alpacaeval-hard", "mt-bench-easy"]
    assert benchmarks.score("rewardbench", rows[:3], said[:3], None)["partial"] == [*lacks, "Chat Hard", "Safety", "Reasoning"]
    every = [k for names in rewardbench.SECTIONS.values() for k in names]
    whole = [{**rows[0], "id": k, "subset": k} for k in every]
    assert benchmarks.score("rewardbench", whole, ["A"] * 23, ["B"] * 23)["partial"] is False
    assert benchmarks.score("rewardbench", whole[:-1], ["A"] * 22, ["B"] * 22)["partial"] == [every[-1]]


def test_rewardbench2_must_beat_all_and_ties_have_their_formula():
    rows = rows_of("rewardbench2")
    said = [["A", "A", "A"], ["A", "A", "B"], ["A"] * 3, ["A"] * 3, ["A"] * 3, ["B"] * 3, ["A", "A"], ["A", "A", "A", "B"]]
    figures = benchmarks.score("rewardbench2", rows, said, [[FLIP[v] for v in s] for s in said])
    assert {k: v for k, v in figures["subsets"].items() if k != "Ties"} == {"Factuality": 1, "Focus": 0, "Math": 1, "Precise IF": 1, "Safety": 0.5}
    # tied: right answers won 1 and 1/2 of theirs, wrong ones 0 and 1/2 → margin 0, spread 1/2; ref: margin 1
    assert figures["subsets"]["Ties"] == pytest.approx(0.3 + 0.01 * np.tanh(0 / 0.5 - 1))
    assert figures["partial"] is False


def test_helpsteer3_by_its_sample_is_partial(data_dir):
    rows = benchmarks.load("helpsteer3", data_dir)
    figures = benchmarks.score("helpsteer3", rows, ["A"] * len(rows), ["B"] * len(rows))
    assert {r.source for r in rows} == {"helpsteer3_sample"} and "sample" in figures["partial"][0]
    assert benchmarks.score("helpsteer3", rows_of("helpsteer3"), ["A"] * 6)["partial"] is False


def test_rows_without_a_gold_label_are_not_scored():
    figures = benchmarks.score("helpsteer3", rows_of("helpsteer3"), ["A", "B", "B", "A", "A", "B"], None)
    assert figures["accuracy"] == 1 and figures["n"] == 5 and figures["unscored"] == 1


# ---- files


@pytest.mark.parametrize("name, n, contests", [("judgebench", 620, 620), ("pandalm", 999, 999), ("llmbar", 419, 419), ("rm_bench", 798, 7182)])
def test_official_files(data_dir, name, n, contests):
    rows = benchmarks.load(name, data_dir)
    assert len(rows) == n and sum(counts(name, rows)) == contests
    some = benchmarks.sample(name, rows, 30)
    assert sum(counts(name, some)) >= 30 and benchmarks.sample(name, rows[::-1], 30) == some
    judged = benchmarks.pairs(name, some)
    assert len({p.id for p in judged}) == len(judged) > 0


def test_missing_files_say_what_to_do(tmp_path):
    for name in ("judgebench", "rm_bench", "rewardbench", "ukpconvarg"):
        with pytest.raises(FileNotFoundError, match="run `"):
            benchmarks.load(name, tmp_path)
    with pytest.raises(KeyError, match="known: judgebench"):
        benchmarks.get("nonsense")


def test_any_jsonl_of_pairs_is_a_benchmark(tmp_path):
    path = str(write_jsonl(tmp_path / "mine.jsonl", own_pairs()))
    rows = benchmarks.load(path)
    assert rows == own_pairs() == benchmarks.pairs(path, rows)
    figures = benchmarks.score(path, rows, ["A"] * 6, ["B"] * 6)
    assert figures["accuracy"] == pytest.approx(4 / 6) and set(figures["subsets"]) == {"all"}


def test_lines_that_are_no_pair_are_counted_by_reason(tmp_path, caplog):
    tie, equal = ({**own_pairs(1)[0].to_dict(), "id": k, **change} for k, change in (("t", {"label": "tie"}), ("e", {"response_b": "First 0"})))
    path = str(write_jsonl(tmp_path / "mine.jsonl", [*own_pairs(2), tie, equal, equal]))
    assert len(benchmarks.load(path)) == 2
    assert "1 of 5 rows left out: tie or unknown label" in caplog.text and "2 of 5 rows left out: equal responses" in caplog.text
    assert f"{path}:4" in caplog.text


# ---- runner: `Scripted` stands in for rollout's engine, everything else is the real thing


class Scripted:
    """Engine: answers by the prompt's tokens, counts what it is asked; `die_at`: raises before that prompt."""

    asked = 0
    die_at = None
    drawn = None

    def __init__(self, model, tokenizer, dtype=None):
        pass

    def generate(self, prompts, n, max_new_tokens, temperature, top_p, seed, batch):
        Scripted.drawn, out = (temperature, top_p, seed), []
        for ids in prompts:
            if Scripted.asked == Scripted.die_at:
                raise KeyboardInterrupt
            Scripted.asked += 1
            draw = np.random.default_rng([seed, *ids])
            texts = [format_judgement("Response A gives a reason.", draw.choice(["A", "B"])) if draw.random() < 0.8 else "no" for _ in range(n)]
            out.append([rollout.Completion([1, 2], [0.0, 0.0], t, True) for t in texts])
        return out


class Bytes:
    """Tokenizer: one token a byte."""

    def apply_chat_template(self, messages, **_):
        return list("\n".join(m["content"] for m in messages).encode())

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(ids).decode(errors="ignore")


@pytest.fixture
def model():
    import torch

    torch.manual_seed(0)
    module = torch.nn.Linear(4, 4)
    module.config, module.device = type("Config", (), {"_name_or_path": "x/tiny"}), torch.device("cpu")
    module.generate = None  # what tells a policy from a function
    return module


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(rollout, "TransformersEngine", Scripted)
    monkeypatch.setattr(Scripted, "asked", 0)
    monkeypatch.setattr(Scripted, "die_at", None)


def smoke(**changed):
    return params.load(profile="smoke", overrides=["policy.max_prompt=4000", *(f"{k.replace('__', '.')}={v}" for k, v in changed.items())])


SAID = ["id", "order", "label", "longer", "verdict", "correct", "error", "critique", "f1"]


def test_evaluate_judges_both_orders_as_shown(model, engine, tmp_path):
    pairs = own_pairs()
    frame = runner.evaluate(model, Bytes(), pairs, smoke(), out=tmp_path / "o.jsonl", cache=tmp_path / "c")
    assert len(frame) == 12 and list(frame["order"][:2]) == ["ab", "ba"]
    by = {(r.id, r.order): r for r in frame.itertuples()}
    for p in pairs:
        assert by[p.id, "ab"].label == p.label == FLIP[by[p.id, "ba"].label]
        assert by[p.id, "ab"].longer == p.longer
    assert (frame["correct"] == (frame["verdict"] == frame["label"])).all()
    assert frame[frame["error"].notna()]["verdict"].isna().all() and frame["error"].notna().any()
    # the reference names the responses in the order shown: praise of "Response A" fits only where A is the better one
    expected = similarity.similarity_many(["Response A gives a reason."] * 2,
                                          [[c.text for c in p.agreeing] for p in (pairs[0], pairs[0].swapped())], kind="core")  # fmt: skip
    for order, s in zip(("ab", "ba"), expected):
        if by[pairs[0].id, order].critique:
            assert by[pairs[0].id, order].f1 == s.f1
    assert (frame[frame["critique"].isna()]["f1"] == 0).all()
    right = frame["correct"] == 1
    assert (frame[right]["inconsistent"] == (frame[right]["f1"] < 0.5)).all() and frame[~right]["inconsistent"].isna().all()
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [r["verdict"] for r in rows] == list(frame["verdict"]) and "seconds" not in rows[0]


@pytest.mark.parametrize("votes", [1, 3])
def test_neither_row_order_nor_batch_size_changes_a_figure(model, engine, tmp_path, votes):
    pairs = own_pairs()
    one = runner.evaluate(model, Bytes(), pairs, smoke(), votes=votes, cache=tmp_path / "1")
    two = runner.evaluate(model, Bytes(), pairs[::-1], smoke(rollout__batch=3), votes=votes, cache=tmp_path / "2")
    key = ["id", "order"]
    assert one[SAID].sort_values(key, ignore_index=True).equals(two[SAID].sort_values(key, ignore_index=True))


def test_a_killed_run_resumes_and_the_cache_belongs_to_weights_prompt_engine_and_seed(model, engine, tmp_path, monkeypatch):
    import torch

    pairs, p = own_pairs(), smoke(rollout__batch=2)
    whole = runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "whole")
    Scripted.asked, Scripted.die_at = 0, 7
    with pytest.raises(KeyboardInterrupt):
        runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
    file = next((tmp_path / "c").glob("*.jsonl"))
    assert len(file.read_text().splitlines()) == 6
    file.write_bytes(file.read_bytes()[:-20])  # killed while writing the last line
    Scripted.asked, Scripted.die_at = 0, None
    again = runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
    assert Scripted.asked == 12 - 5 and again[SAID].equals(whole[SAID])
    Scripted.asked = 0
    runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
    assert Scripted.asked == 0
    runner.evaluate(model, Bytes(), pairs, p, votes=2, cache=tmp_path / "c")
    assert Scripted.asked == 12
    runner.evaluate(model, Bytes(), pairs, smoke(seed=8), votes=2, cache=tmp_path / "c")
    assert Scripted.asked == 24
    assert Scripted.drawn == (0.7, 1.0, 8)
    runner.evaluate(model, Bytes(), pairs, smoke(evaluation__temperature=0.6), cache=tmp_path / "t")
    assert Scripted.asked == 36 and Scripted.drawn == (0.6, 1.0, 7)
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
    assert Scripted.asked == 48 and Scripted.drawn == (0.0, 1.0, 0)
    for kind in (("vllm", torch.bfloat16), ("transformers", torch.bfloat16)):  # they round differently
        monkeypatch.setattr(runner, "_engine", lambda model, params, kind=kind: kind)
        monkeypatch.setattr(runner, "_generate", lambda model, tokenizer, params: Scripted(model, tokenizer).generate)
        runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
        runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path / "c")
    assert Scripted.asked == 72


def test_rollouts_are_kept_by_parts_of_one_policy(model, monkeypatch, tmp_path):
    import torch

    prompts, p, asked, made = [[i, i + 1] for i in range(10)], smoke(), [], []

    class Engine:
        die = None

        def __init__(self, *_):
            made.append(self)

        def generate(self, prompts, n, *settings, progress=False):
            if self.die == len(asked):
                raise KeyboardInterrupt
            asked.append(len(prompts))
            return [[rollout.Completion([*ids, k], [-0.5, -1.25, -k], f"{ids} {k}", bool(k)) for k in range(n)] for ids in prompts]

    def drawn(p=p):
        return runner.rollouts(model, Bytes(), prompts, 3, p, tmp_path, part=4)

    monkeypatch.setattr(rollout, "engine", Engine)
    monkeypatch.setattr(Engine, "die", 2)
    with pytest.raises(KeyboardInterrupt):
        drawn()
    monkeypatch.setattr(Engine, "die", None)
    found = drawn()
    assert asked == [4, 4, 2] and [[(c.text, c.finished) for c in mine] for mine in found] == [[(f"{ids} {k}", bool(k)) for k in range(3)] for ids in prompts]
    asked.clear(), made.clear()
    assert drawn() == found and not asked and not made  # an engine that is not asked is not started
    drawn(smoke(rollout__temperature=0.9))
    assert asked == [4, 4, 2]
    with torch.no_grad():
        model.weight[0, 0] += 1e-3
    drawn()
    assert asked == [4, 4, 2] * 2


def test_one_vllm_judges_prompts_of_any_length(model, monkeypatch, tmp_path):
    p, lengths = smoke(), []

    class Vllm(Scripted):
        def generate(self, prompts, *rest):
            lengths.extend(map(len, prompts))
            return super().generate(prompts, *rest)

    monkeypatch.setattr(runner, "_engine", lambda model, params: ("vllm", "bfloat16"))
    monkeypatch.setattr(rollout, "engine", lambda model, tokenizer, params: Vllm(model, tokenizer) if params is p else pytest.fail("another"))
    pairs = [replace(q, response_a="long " * 300) for q in own_pairs(2)]
    for limit in (None, 500):  # a second length is no second engine
        runner.evaluate(model, Bytes(), pairs, p, cache=tmp_path, max_prompt=limit)
    assert len(lengths) == 8 and min(lengths[:4]) > 1500 and max(lengths[4:]) <= 500


def test_vote_says_how_it_went():
    a, b, bad = Judgement("x", "A", None), Judgement("y", "B", None), Judgement(None, None, "no critique block")
    assert runner.vote([bad, b, a, b]) == (1, b, "A:1 B:2 invalid:1")
    assert runner.vote([a, b])[1] == Judgement("x", None, "tied vote")
    assert runner.vote([bad, bad])[1].error == "no critique block"


def test_recorded_verdicts_and_functions_are_judges(tmp_path):
    pairs = own_pairs(3)
    frame = runner.evaluate(lambda shown: "A" if shown.longer == "A" else "B", None, pairs, smoke())
    assert (frame["verdict"] == frame["longer"].where(frame["longer"] == "A", "B")).all()
    rows = [{"id": p.id, "order": o, "verdict": "A"} for p in pairs for o in ("ab", "ba")][:-1]
    frame = runner.evaluate(write_jsonl(tmp_path / "said.jsonl", rows), None, pairs, smoke())
    assert frame["correct"].isna().sum() == 1 and frame["error"].iloc[-1] == "missing"
    assert benchmarks.verdicts("ukpconvarg", pairs, frame) == (["A"] * 3, ["A", "A", None])
    with pytest.raises(FileNotFoundError, match="verdict"):
        runner.evaluate("nowhere.jsonl", None, pairs, smoke())


@pytest.mark.parametrize("change, says", [
    ({"order": "AB"}, "row 2: order is 'AB'; allowed: ab, ba"), ({"verdict": "A>B"}, "row 2: verdict is 'A>B'; allowed: A, B"), ({"verdict": 1}, "verdict is 1"),
    ({"critique": ["x"]}, "critique is a text"), ({"tokens": "n/a"}, "tokens a number"), ({"id": "p0", "order": "ab", "verdict": "B"}, "another verdict above"),
    ({"order": ...}, "row 2 has no order"), ({"verdict": ...}, "row 2 has no verdict"),
])  # fmt: skip
def test_recorded_verdicts_that_cannot_be_read_are_refused_by_row(tmp_path, change, says):
    row = {"id": "p0", "order": "ba", "verdict": "A"} | change
    rows = [{"id": "p0", "order": "ab", "verdict": "A"}, {k: v for k, v in row.items() if v is not ...}]
    with pytest.raises(ValueError, match=re.escape(says)):
        runner.recorded(write_jsonl(tmp_path / "said.jsonl", rows))


def test_verdicts_find_their_way_back_to_rows_with_several_contests():
    rows = rows_of("rm_bench")
    frame = runner.evaluate(lambda shown: "A" if "good" in shown.response_a else "B", None, benchmarks.pairs("rm_bench", rows)[::-1], smoke())
    assert benchmarks.score("rm_bench", rows, *benchmarks.verdicts("rm_bench", rows, frame))["accuracy"] == 1


def test_an_endpoint_is_a_judge_a_failed_call_is_missing_and_an_unreadable_answer_is_wrong(endpoint, tmp_path):
    pairs = own_pairs(2)

    def behave(number, body):
        text = body["messages"][1]["content"]
        if "Question 1" in text:
            return 400, {"error": {"message": "no"}}, {}
        swapped = text.index("Second 0") < text.index("First 0")
        return test_judge.completion("I cannot choose." if swapped else '{"critique": "Response A gives a reason.", "verdict": "A"}')

    server = endpoint(behave)
    settings = smoke(judge__model=test_judge.MODEL, judge__base_url_env="TEST_JUDGE_URL", judge__cache=tmp_path / "cache", judge__retries=1)
    frame = runner.evaluate("endpoint", None, pairs, settings)
    assert list(frame["error"]) == [None, "no answer in the schema", "missing", "missing"]
    assert list(frame["verdict"]) == ["A", None, None, None] and frame["correct"].tolist()[:2] == [1, 0]
    assert frame["correct"].isna().tolist() == [False, False, True, True] and frame["text"][1] == "I cannot choose."
    assert frame["f1"].tolist()[1] == 0 and frame["tokens"].tolist()[:2] == [5, 5] and (frame["seconds"][:2] > 0).all()
    asked = server.seen[0][1]["messages"][1]["content"]
    assert "<critics>" not in asked and "`verdict`" in asked
    calls = len(server.seen)
    again = runner.evaluate("endpoint", None, pairs[:1], settings)
    assert len(server.seen) == calls and again[[*SAID, "tokens", "seconds"]].equals(frame[:2][[*SAID, "tokens", "seconds"]])
    with pytest.raises(ValueError, match="votes is 3.*benchmarks.votes to 1"):
        runner.evaluate("endpoint", None, pairs, settings, votes=3)


def test_a_local_model_as_endpoint_tells_unreadable_from_unasked(monkeypatch, tmp_path):
    from rmnlhf import judge

    def local(self, todo, schema, found, reasons):
        for key, why in zip(todo, ("answer cut at its length limit", "longer than the model's context")):
            reasons[key] = why

    monkeypatch.setattr(judge.Judge, "_ask_vllm", local)
    frame = runner.evaluate("endpoint", None, own_pairs(1), smoke(judge__kind="vllm", judge__cache=tmp_path / "cache"))
    assert list(frame["error"]) == ["answer cut at its length limit", "missing"] and frame["correct"].isna().tolist() == [False, True]


# ---- 07


def test_07_with_recorded_judges(tmp_path, monkeypatch, data_dir, capsys):
    """The notebook's own cells in a folder of their own: two recorded arms, a set in full, one in part, a file with a row refused."""
    root = rmnlhf.ROOT
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rmnlhf, "ROOT", tmp_path)
    shutil.copy(root / "params.yaml", tmp_path)
    splits.save(splits.Splits(own_pairs(), [], [], {}, {}, "own"), tmp_path / "results/splits")
    mine = [replace(p, id=f"mine-{p.id}") for p in own_pairs(8)]
    write_jsonl("mine.jsonl", [*mine, {**mine[0].to_dict(), "label": "tie"}])
    judged = mine + [p for name in ("llmbar", "judgebench") for p in benchmarks.pairs(name, benchmarks.load(name, data_dir))]
    said = {"outcome": lambda p: ("A", "B"), "human": lambda p: (p.label, None), "silent": None}  # verdicts in each order, as shown
    for name, verdicts in said.items():
        write_jsonl(f"{name}.jsonl", [{"id": p.id, "order": o, "verdict": v, "critique": "Response A gives a reason."}
                                      for p in judged if verdicts for o, v in zip(("ab", "ba"), verdicts(p))])  # fmt: skip
    for stale in ("online.jsonl", "06/online.jsonl"):
        write_jsonl(f"results/judgements/{stale}", [{}])
    cells = [c for c in json.loads((root / "notebooks/07_benchmarks.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    titles = []
    space = {"display": lambda shown: titles.extend(shown.columns)}
    for cell in cells:
        exec("".join(cell["source"]), space)  # noqa: S102
        if cell["id"] == "parameters":
            space["overrides"] = ["profile=smoke", f"data.dir={data_dir}", "benchmarks.names=[llmbar, judgebench]", "benchmarks.own=[mine.jsonl]",
                                  "benchmarks.arm_rows=8", "benchmarks.judges=[outcome.jsonl, human.jsonl, silent.jsonl]"]  # fmt: skip
    for judge, name in (("results/outcome.jsonl", "outcome"), ("length.jsonl", "length"), ("longer.jsonl", "longer")):  # an arm, a section, a baseline
        space["B"] = space["B"].model_copy(update={"judges": ["outcome.jsonl", judge]})
        with pytest.raises(ValueError, match=f"shown as '{name}', which is taken"):
            exec("".join(next(c for c in cells if "RESERVED =" in "".join(c["source"]))["source"]), space)  # noqa: S102
    space["B"] = space["B"].model_copy(update={"own": ["mine.jsonl", "again.jsonl"]})
    shutil.copy("mine.jsonl", "again.jsonl")
    with pytest.raises(ValueError, match=r"again.jsonl: id 'mine-.*' is also one of mine.jsonl's"):
        exec("".join(next(c for c in cells if "searchsorted" in "".join(c["source"]))["source"]), space)  # noqa: S102
    metrics = json.loads((tmp_path / "results/metrics/07_benchmarks.json").read_text())
    shares = ["official", "accuracy", "accuracy_ab", "accuracy_ba", "consistent", "consistency", "first_position", "invalid", "critique_chars"]
    table = pd.read_csv("results/tables/07_main.csv").set_index(["judge", "benchmark"])
    assert len(table) == 7 * 3 and {f"{k}{end}" for k in shares for end in ("", "_low", "_high", "_n")} <= set(table.columns)
    for judge, found in (("outcome", [0.5, 0.5, 0.5, 0.5, 1, 0.5, 0]), ("human", [0.5, 1, 0, 0, 0, None, 0.5])):
        mine = metrics[judge]["mine.jsonl"]
        assert all(mine[k]["mean"] == x for k, x in zip(shares[1:], found) if x is not None), (judge, mine)
        assert mine["critique_chars"] == {"mean": 26, "low": 26, "high": 26, "n": 16} and mine["partial"] is False
    silent = metrics["silent"]["llmbar"]
    assert silent["official"] == silent["accuracy"] == {"mean": None, "low": None, "high": None, "n": 0} and silent["missing"] > 0
    # eight contests do not hold llmbar's five subsets: said wherever its figure stands
    assert table.partial["outcome", "llmbar"] and metrics["lacks"]["llmbar"]["models"] and not metrics["lacks"]["judgebench"]["models"]
    assert metrics["paired"]["human"]["all"]["partial"] == "llmbar" and metrics["paired"]["human"]["mine.jsonl"]["partial"] is False
    assert metrics["paired"]["human"]["all"]["n"] == sum(metrics["human"][b]["accuracy"]["n"] for b in ("llmbar", "judgebench", "mine.jsonl"))
    assert "llmbar (partial)" in titles and "judgebench" in titles
    assert "mine.jsonl: 9 rows; left out: 1 (tie or unknown label)" in capsys.readouterr().out
    # what the report reads
    kept = sorted(str(f.relative_to("results/judgements")) for f in Path("results/judgements").rglob("*.jsonl"))
    assert kept == ["06/online.jsonl", "human.jsonl", "outcome.jsonl", "silent.jsonl"]
    run = report.collect("results")
    assert {r["id"] for r in run.judgements["human"]} <= set(run.pairs) and len(run.judgements["human"]) > 40
