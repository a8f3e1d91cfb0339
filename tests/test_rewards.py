"""The table of the released code, its options, and the faults of that code which must not come back (PAPER.md)."""

import math
from dataclasses import replace

import pytest
import tiny

from rmnlhf import grpo, rewards
from rmnlhf.grm import Judgement, parse_judgement
from rmnlhf.pairs import HumanCritique, PreferencePair
from rmnlhf.rewards import ProcessRewardError, check_process_rows, composite, from_metarm, process_rewards
from rmnlhf.similarity import Similarity

RIGHT, WRONG, BROKEN = Judgement("c", "A", None), Judgement("c", "B", None), Judgement("c", None, "no choice block")


@pytest.mark.parametrize("judgement, process, expected", [
    (BROKEN, 1.0, -1), (BROKEN, None, -1), (BROKEN, math.nan, -1), (WRONG, 1.0, 0), (WRONG, None, 0), (WRONG, math.nan, 0),
    (RIGHT, 0.5, 1.5), (RIGHT, 1.0, 1.5), (RIGHT, 0.49, 1.0), (RIGHT, 0.0, 1.0), (RIGHT, None, 1.0),
])  # fmt: skip
def test_the_papers_table(judgement, process, expected):
    assert composite(judgement, "A", process) == expected


def test_options():
    assert composite(RIGHT, "A", 0.3, binary=False) == pytest.approx(1.15)
    assert composite(RIGHT, "A", 0.3, threshold=0.3) == 1.5
    assert composite(RIGHT, "A", 1.0, weight=0.2) == 1.2 and composite(RIGHT, "A", 1.0, weight=0) == 1.0
    assert composite(WRONG, "A", 0.8, gated=False, binary=False) == pytest.approx(0.4)
    assert composite(RIGHT, "A", 0.8, gated=False, binary=False) == pytest.approx(1.4)
    assert composite(BROKEN, "A", 0.8, gated=False) == -1
    assert composite(WRONG, "B", 1.0) == 1.5


def test_missing_is_not_zero():
    assert math.isnan(composite(RIGHT, "A", math.nan))
    assert math.isnan(composite(WRONG, "A", math.nan, gated=False))
    assert composite(RIGHT, "A", math.nan, weight=0) == 1.0
    assert math.isnan(from_metarm(RIGHT, "A", math.nan)) and from_metarm(RIGHT, "A", None) == 1.0


@pytest.mark.parametrize("label", [None, "C", "a", 1])
def test_a_label_must_be_one(label):
    with pytest.raises(ValueError, match="label"):
        composite(RIGHT, label, 1.0)


def test_a_process_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="process reward"):
        composite(RIGHT, "A", 1.5)


@pytest.mark.parametrize("bonus, m, expected", [
    ("paper", 1.5, 1.25), ("paper", 0.7, 1.0), ("rescaled", 1.5, 1.5), ("rescaled", 1.25, 1.25), ("rescaled", 9, 1.5), ("rescaled", -3, 1.0),
    ("binary", 1.25, 1.5), ("binary", 1.24, 1.0),
])  # fmt: skip
def test_metarm_bonus(bonus, m, expected):
    assert from_metarm(RIGHT, "A", m, 0.5, bonus) == pytest.approx(expected)
    assert from_metarm(WRONG, "A", m, 0.5, bonus) == 0 and from_metarm(BROKEN, "A", m, 0.5, bonus) == -1


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("judgement", [RIGHT, WRONG, BROKEN])
def test_a_perfect_metarm_pays_what_the_human_critique_pays(judgement, gated, binary, weight):
    for f1 in (0.0, 0.2, 0.5, 0.77, 1.0):
        human = composite(judgement, "A", f1, weight=weight, gated=gated, binary=binary)
        assert abs(from_metarm(judgement, "A", m=human, weight=weight, bonus="rescaled", gated=gated) - human) < 1e-6
        process = 1 + weight * (float(f1 >= 0.5) if binary else f1)  # a MetaRM of the process reward alone
        assert abs(from_metarm(judgement, "A", process, weight, "rescaled", gated, "process") - human) < 1e-6


def test_unknown_bonus():
    with pytest.raises(ValueError, match="bonus"):
        from_metarm(RIGHT, "A", 1.0, bonus="Paper")


def pair(critiques, label="A"):
    return PreferencePair("1", "own", "1", [{"role": "user", "content": "Who?"}], "He.", "She.", label, critiques)


HUMAN = [HumanCritique("w1", "A", "Response A gives more evidence."), HumanCritique("w2", "B", "Response B is shorter.")]


def test_fault_1_a_run_without_human_critiques_stops():
    with pytest.raises(ProcessRewardError, match="none of 2 training pairs .*own.* carries a human critique"):
        check_process_rows([pair([]), pair([replace(HUMAN[1])])])  # the only critique contradicts the label
    with pytest.raises(ProcessRewardError):
        check_process_rows([])
    assert check_process_rows([pair(HUMAN), pair([])], [1.0, None]) == {"rows": 2, "with_critique": 1, "scored": 1, "missing": 0}


def test_fault_2_missing_process_rewards_stop_the_run():
    ok = [0.0] * 8 + [math.nan] * 2 + [None] * 50
    assert check_process_rows([pair(HUMAN)], ok)["missing"] == 2
    with pytest.raises(ProcessRewardError, match="3 of 11 process rewards are missing"):
        check_process_rows([pair(HUMAN)], [*ok, math.nan])


def test_fault_3_no_verdict_from_thought_or_cut_text():
    assert composite(parse_judgement("<think>It says [[A]].</think><critics>bad <choice>[[A]]</choice>"), "A", 1.0) == -1


def test_fault_5_a_critique_that_did_not_parse_is_no_text():
    human = [c.text for c in HUMAN[:1]]
    scores = process_rewards([None, "Response A gives more evidence.", "Response A gives more evidence.", ""], [human, human, [], human])
    assert [s and s.f1 for s in scores] == [0.0, 1.0, None, 0.0]


def test_a_failed_judge_is_missing():
    class Dead:
        def ask(self, messages_list, schema):
            return [None] * len(messages_list)

    (score,) = process_rewards(["Response A is clear."], [HUMAN[:1]], backend="llm", judge=Dead())
    assert math.isnan(score.f1) and math.isnan(composite(RIGHT, "A", score.f1))


@pytest.mark.parametrize("text", ["👍", "n/a", "回答A更好，因为它更准确。"])
def test_a_human_critique_without_an_argument_is_missing_and_not_zero(text):
    (score,) = process_rewards(["Response A gives more evidence."], [[text]])
    assert math.isnan(score.f1)
    (score,) = process_rewards(["Response A gives more evidence."], [[text, "Response A gives more evidence."]])
    assert score.f1 == 1
    with pytest.raises(ProcessRewardError, match="no argument is found in the human critiques"):
        check_process_rows([pair(HUMAN)], [math.nan] * 3)


@pytest.mark.parametrize("swap", [0, 1])
def test_training_compares_a_critique_with_the_references_as_shown(swap):
    p, right, other = pair(HUMAN[:1]), "AB"[swap], "BA"[swap]  # label A as stored
    texts = [f"<critics>Response {s} gives more evidence.</critics>\n<choice>[[{right}]]</choice>" for s in (right, other)]
    reward = grpo.RewardFunction("human", tiny.settings(), [p])
    assert reward(prompts=texts, completions=texts, pair_id=[p.id] * 2, swap=[swap] * 2) == pytest.approx([1.5, 1.0])
    assert [r["label"] for r in reward.rows] == [right] * 2 and [r["process"] for r in reward.rows] == pytest.approx([1, 0])


@pytest.mark.parametrize("changes, right, wrong", [  # F1 0.4 from people, 1.2 from MetaRM
    ({}, (1.0, 1.2), (0, 0)), ({"reward.binary": "false"}, (1.2, 1.2), (0, 0)), ({"similarity.threshold": 0.4}, (1.5, 1.2), (0, 0)),
    ({"reward.binary": "false", "reward.weight": 0.1}, (1.04, 1.1), (0, 0)), ({"reward.bonus": "paper"}, (1.0, 1.1), (0, 0)),
    ({"reward.bonus": "binary"}, (1.0, 1.0), (0, 0)), ({"reward.gated": "false", "reward.binary": "false"}, (1.2, 1.2), (0.2, 0.5)),
    ({"reward.gated": "false", "reward.binary": "false", "metarm.target": "process"}, (1.2, 1.2), (0.2, 0.2)),
])  # fmt: skip
def test_training_pays_by_the_settings(changes, right, wrong, monkeypatch):
    monkeypatch.setattr(rewards, "process_rewards", lambda c, refs, **_: [Similarity(0.4, 0.4, 0.4) if r else None for r in refs])
    frozen = type("Frozen", (), {"score": lambda self, rows: [1.2] * len(rows)})()
    reward = grpo.RewardFunction("offline", tiny.settings(**changes), [pair(HUMAN[:1]), replace(pair([]), id="2")], frozen)
    texts = [f"<critics>x y.</critics>\n<choice>[[{v}]]</choice>" for v in "AABB"]
    assert reward(prompts=texts, completions=texts, pair_id=["1", "2"] * 2, swap=[0] * 4) == pytest.approx([*right, *wrong])
