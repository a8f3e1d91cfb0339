"""MetaRM: what it reads, what it never reads, how it learns and forgets, and that a resumed one is the same one."""

import copy
import shutil
import types

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rmnlhf import grm, metarm, params, rewards
from rmnlhf.grm import Judgement
from rmnlhf.judge import JudgeError
from rmnlhf.pairs import OTHER, HumanCritique, PreferencePair, read_rows, swap_sides
from rmnlhf.policy import prepare
from rmnlhf.rollout import Completion

TOPICS = ["school uniforms", "plastic bottles", "spanking", "nuclear power", "books", "tram lines", "home work", "zoos", "cash", "football"]
PRAISE = ["Response {} gives more facts and examples.", "Response {} is detailed and well explained.", "Response {} cites a study, the other one only has an opinion."]
GOOD = "Studies of {} in four countries found lower costs, and the figures of 2014 show the same for families."
BAD = "{} are just stupid lol."


@pytest.fixture(scope="module")
def P():
    return params.load(profile="smoke", overrides=["reward.binary=true", "metarm.epochs=12", "metarm.batch=16", "metarm.lr=0.001"])


def make(i: int, source: str = "made", topic: str | None = None) -> PreferencePair:
    """A pair whose detailed response is better."""
    topic = topic or TOPICS[i % len(TOPICS)]
    good, bad = GOOD.format(topic), BAD.format(topic) + " Really." * (i // len(TOPICS))
    a, b = (good, bad) if i % 2 else (bad, good)
    label = "A" if i % 2 else "B"
    other = "B" if label == "A" else "A"
    said = [HumanCritique(str(k), label, PRAISE[k].format(label)) for k in range(3)] + [HumanCritique("3", other, f"Response {other} is funny.")]
    return PreferencePair(f"p{i}", source, topic, [{"role": "user", "content": f"What of {topic}?"}], a, b, label, said)


def judged(pairs, seed=0):
    """One right and one wrong critique of each pair, in either order: a policy's rows. Half of the right ones score 1.5."""
    rng, rows = np.random.default_rng(seed), []
    for pair in pairs:
        for verdict in "AB":
            text = PRAISE[rng.integers(3)].format(verdict)
            swap = bool(rng.integers(2))
            right = verdict == pair.label
            rows.append(metarm.row(pair, swap, swap_sides(text) if swap else text, rng.choice([1.0, 1.5]) if right else 0.0))
    return rows


@pytest.fixture(scope="module")
def fitted(P):
    out = metarm.MetaRM(P.metarm, 3)
    history = out.fit(judged([make(i) for i in range(40)]), held_out=judged([make(i) for i in range(40, 50)]))
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and "held_out" in history[-1]
    return out


def test_learns_and_beats_the_simple_predictors(P, fitted):
    rows = judged([make(i, topic=f"new topic {i}") for i in range(60, 80)], seed=1)
    targets = [r["target"] for r in rows]
    got = metarm.agreement(targets, fitted.score(rows))
    train = judged([make(i) for i in range(40)])
    best = min(metarm.agreement(targets, p)["mae"] for p in metarm.simple_predictors(train, rows).values())
    assert got["rho"] > 0.6 and got["mae"] < 0.85 * best


def test_shown_order_does_not_matter_but_stance_does(fitted):
    pair = make(1)
    text = "Response A gives more facts and examples."
    here = fitted.score([metarm.row(pair, False, text)])[0]
    assert fitted.score([metarm.row(pair, True, swap_sides(text))])[0] == pytest.approx(here, abs=1e-5)
    assert fitted.score([metarm.row(pair.swapped(), False, swap_sides(text))])[0] == pytest.approx(here, abs=1e-5)
    assert here - fitted.score([metarm.row(pair, True, text)])[0] > 0.3  # the same words about the other response


@pytest.mark.parametrize("bad", [None, "", "  \n"])
def test_a_judgement_that_failed_to_parse_never_reaches_it(fitted, bad):
    rows = judged([make(1)]) + [metarm.row(make(7), False, bad, 0.0)]
    for call in (fitted.score, fitted.update, fitted.fit):
        with pytest.raises(ValueError, match="row 2 .*p7.*critique"):
            call(rows)


def test_missing_targets_are_refused(fitted):
    for missing in (None, float("nan")):
        with pytest.raises(ValueError, match="target"):
            fitted.update([metarm.row(make(1), False, "Response A is better.", missing)])
    with pytest.raises(ValueError, match="no row with a target"):
        fitted.fit([])


def test_long_input_keeps_the_critique(P, fitted):
    pair = make(1)
    long = " ".join(f"word{i}" for i in range(4 * P.metarm.max_length))
    far = PreferencePair("long", "made", "g", [{"role": "user", "content": long}], long + " one", long + " two", "A")
    base = " ".join(["It says much of the topic."] * 45)  # 45 × 7 tokens: over max_length by itself
    texts = ["Response A gives facts.", "Response B gives facts.", base + " Response A is weak.", base + " Response B is great."]
    scores = fitted.score([metarm.row(far, False, t) for t in texts])
    assert len(set(np.round(scores, 6))) == 4
    windows = fitted.score([metarm.row(pair, False, "! " * 1400 + t) for t in texts[:2]])  # over the encoder's 512 positions
    assert windows[0] != windows[1] and np.isfinite(windows).all()


def test_label_and_critiques_of_the_pair_are_not_read(fitted):
    pair = make(1)
    blind = PreferencePair(pair.id, "elsewhere", "x", pair.context, pair.response_a, pair.response_b, "B", [], {"label": "B"})
    rows = judged([pair])
    assert np.array_equal(fitted.score(rows), fitted.score([r | {"pair": blind, "target": None} for r in rows]))


def test_perfect_metarm_pays_the_human_path():
    for binary in (True, False):
        for process in (0.0, 0.2, 0.5, 0.7, 1.0):
            for verdict in "AB":
                judgement = Judgement("Response A is better.", verdict, None)
                human = rewards.composite(judgement, "A", process, binary=binary)
                assert rewards.from_metarm(judgement, "A", human, bonus="rescaled") == pytest.approx(human, abs=1e-6)


def test_targets(P):
    right, wrong, broken = Judgement("c", "A", None), Judgement("c", "B", None), Judgement(None, None, "no critique block")
    assert [metarm.target(right, "A", f, P) for f in (0.6, 0.4)] == [1.5, 1.0]
    assert metarm.target(wrong, "A", 0.9, P) == 0.0
    assert metarm.target(broken, "A", 0.9, P) is None and metarm.target(right, "A", float("nan"), P) is None
    alone = params.load(profile="smoke", overrides=["reward.binary=true", "metarm.target=process"])
    assert metarm.target(wrong, "A", 0.9, alone) == 1.5 and metarm.target(wrong, "A", 0.1, alone) == 1.0


def _completion(text):
    return Completion([1], [0.0], text, True)


def test_what_decides_is_the_critique_not_the_source_tag(P):
    texts = ["<critics>Response B gives more facts and examples.</critics>\n<choice>[[B]]</choice>", "nonsense", "<critics>x"]
    pairs = [make(2, source="a tag that no code knows"), make(4, source="DataWithHumanCritique")]
    rows = metarm.from_rollouts(pairs, [[_completion(t) for t in texts]] * 2, [False, False], P)
    assert [r["target"] for r in rows] == [1.5, 1.5]  # format errors are left out
    shown = metarm.from_rollouts(pairs[:1], [[_completion(texts[0])]], [True], P)  # the same words, shown the other way round
    assert [r["target"] for r in shown] == [0.0] and shown[0]["swap"]
    mirrored = "<critics>Response A gives more facts and examples.</critics>\n<choice>[[A]]</choice>"
    turned = metarm.from_rollouts(pairs[:1], [[_completion(mirrored)]], [True], P)
    assert [(r["target"], r["swap"]) for r in turned] == [(1.5, True)] and turned[0]["pair"] is pairs[0]
    bare = [PreferencePair(p.id, p.source, p.group, p.context, p.response_a, p.response_b, p.label) for p in pairs]
    with pytest.raises(ValueError, match="human critique"):
        metarm.from_rollouts(bare, [[_completion(texts[0])]] * 2, [False] * 2, P)


def test_rows_from_human_critiques(P):
    pairs = [make(i) for i in range(6)]
    rows = metarm.from_humans(pairs, P)
    assert {r["target"] for r in rows} == {0.0, 1.0, 1.5} and {r["group"] for r in rows} == {p.id for p in pairs}
    own = [r for r in rows if r["group"] == "p0" and "funny" in r["critique"]]
    assert {("Response A is funny" in r["critique"], r["target"] > 0) for r in own} >= {(True, False)}  # the dissenter was wrong
    kept, held = metarm.hold_out(rows, 0.05, 7)
    assert held and not {r["group"] for r in kept} & {r["group"] for r in held} and len(kept) + len(held) == len(rows)


def test_planted_drift_with_and_without_replay(P, fitted):
    """A policy whose style shifts: it begins to concede, praising the response that it does not choose before it chooses."""
    old = judged([make(i) for i in range(40, 60)], seed=5)

    def shifted(numbers, seed):
        rows = judged([make(i, topic=f"later {i % 7}") for i in numbers], seed)
        return [r | {"critique": swap_sides(r["critique"]) + " That is granted, yet: " + r["critique"][:10] + " wins."} for r in rows]

    before = metarm.agreement([r["target"] for r in old], fitted.score(old))["mae"]
    fresh = shifted(range(200, 230), 9)
    for replay in (P.metarm.replay, 0):
        online = metarm.MetaRM(P.metarm.model_copy(update={"replay": replay}), 3)
        online.load_state_dict(fitted.state_dict())
        for step in range(16):
            assert online.update(shifted(range(100 + 8 * step, 108 + 8 * step), step)) is not None
        found = metarm.drift(fitted, online, fresh)
        assert found["online_mae"] < 0.9 * found["frozen_mae"], found
        after = metarm.agreement([r["target"] for r in old], online.score(old))["mae"]
        assert not replay or after <= 1.1 * before, (before, after)
    assert online.update([]) is None


def test_ranking_keeps_groups_and_orders_them(P):
    settings = P.metarm.model_copy(update={"ranking": True, "batch": 7})
    rows = judged([make(i) for i in range(20)])
    ranked = metarm.MetaRM(settings, 3)
    ranked.fit(rows)
    scores = ranked.score(rows).reshape(-1, 2)
    targets = np.array([r["target"] for r in rows]).reshape(-1, 2)
    assert ((scores[:, 0] > scores[:, 1]) == (targets[:, 0] > targets[:, 1])).mean() > 0.9
    output = torch.tensor([0.0, 1.0, 5.0])
    loss = metarm._ranking(output, torch.tensor([1.0, 0.0, 9.0]), ["a", "a", None])
    assert loss.item() == pytest.approx(np.log1p(np.exp(1.0)))


def test_resumed_is_bitwise_the_same(P, fitted, tmp_path):
    steps = [judged([make(100 + 4 * s + k) for k in range(4)], s) for s in range(6)]
    whole = metarm.MetaRM.load(fitted.save(tmp_path / "cold"))
    half = metarm.MetaRM.load(tmp_path / "cold")
    for rows in steps[:3]:
        assert whole.update(rows) == half.update(rows)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = metarm.MetaRM.load(tmp_path / "cold")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for rows in steps[3:]:
        assert whole.update(rows) == resumed.update(rows)
        assert np.array_equal(whole.score(rows), resumed.score(rows))
    one, two = whole.state_dict(), resumed.state_dict()
    assert torch.equal(one["buffer"], two["buffer"]) and torch.equal(one["generator"], two["generator"])
    forgot = metarm.MetaRM.load(tmp_path / "cold")  # what a checkpoint without MetaRM's state would do
    assert not np.array_equal(forgot.score(steps[0]), whole.score(steps[0]))
    with pytest.raises(ValueError, match="train it anew"):
        metarm.MetaRM.load(tmp_path / "cold", P.metarm.model_copy(update={"base": "policy"}))
    with pytest.raises(FileNotFoundError, match="04_metarm"):
        metarm.MetaRM.load(tmp_path / "nowhere")


def test_replay_is_a_fair_sample(P):
    small = metarm.MetaRM(P.metarm.model_copy(update={"replay": 50}), 1)
    for k in range(20):
        small._remember(torch.full((25, 3), float(k)), torch.full((25,), float(k)))
    assert len(small.buffer_targets) == 50 and small.seen == 500
    assert 6 < small.buffer_targets.mean() < 13 and torch.equal(small.buffer[:, 0], small.buffer_targets)
    none = metarm.MetaRM(P.metarm.model_copy(update={"replay": 0}), 1)
    none._remember(torch.zeros(4, 3), torch.zeros(4))
    assert len(none.buffer_targets) == 0


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory):
    """A random two-layer Llama with a byte-level tokenizer: the policy-base path without its weight."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=1024, pad_token_id=256, eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_each_epoch_of_a_fit_can_be_watched(P, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = judged([make(i) for i in range(12)])
    for _ in range(2):  # the second begins its logs anew
        history = metarm.MetaRM(P.metarm.model_copy(update={"epochs": 2}), 3).fit(rows, held_out=rows[:4], run=tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "held_out"):
        lines = (tmp_path / f"dvclive/plots/metrics/{name}.tsv").read_text().splitlines()[1:]
        for logged in ([e.value for e in board.Scalars(name)], [float(line.split("\t")[1]) for line in lines]):
            assert logged == pytest.approx([h[name] for h in history], rel=1e-6)


@pytest.mark.parametrize("base", ["minilm", "policy"])
def test_a_killed_fit_goes_on_to_the_same_weights(P, tiny_decoder, base, tmp_path, monkeypatch, caplog):
    policy = P.policy.model_copy(update={"model": str(tiny_decoder), "rank": 4, "dtype": "float32"})
    settings = P.metarm.model_copy(update={"base": base, "tune": "head" if base == "minilm" else "lora", "epochs": 2, "batch": 6})
    monkeypatch.setattr(metarm, "SAVE_EVERY", 2)
    rows, file = judged([make(i) for i in range(10)]), tmp_path / "fit.pt"
    whole = metarm.MetaRM(settings, 3, policy)
    history = whole.fit(rows, held_out=rows[:4])
    step, left = metarm.MetaRM._step, []

    def killed(self, *args):
        if len(left) == stop:
            raise KeyboardInterrupt
        left.append(1)
        return step(self, *args)

    batches = -(-len(rows) // 6)
    for stop in (3, batches + 3):  # in the middle of the first epoch, and of the second
        left.clear()
        monkeypatch.setattr(metarm.MetaRM, "_step", killed)
        with pytest.raises(KeyboardInterrupt):
            metarm.MetaRM(settings, 3, policy).fit(rows, held_out=rows[:4], checkpoint=file)
        monkeypatch.setattr(metarm.MetaRM, "_step", step)
        other = metarm.MetaRM(settings, 3, policy)
        if stop == 3:  # a fit of other rows begins anew and leaves its own file
            fresh = metarm.MetaRM(settings, 3, policy)
            shutil.copy(file, tmp_path / "copy.pt")
            assert fresh.fit(rows[1:], checkpoint=tmp_path / "copy.pt") == metarm.MetaRM(settings, 3, policy).fit(rows[1:])
            assert "goes on from" not in caplog.text
        assert other.fit(rows, held_out=rows[:4], checkpoint=file, run=tmp_path / "live") == history
        assert "goes on from epoch" in caplog.text
        assert np.array_equal(other.score(rows), whole.score(rows)) and torch.equal(other.generator.get_state(), whole.generator.get_state())
        assert len((tmp_path / "live/dvclive/plots/metrics/loss.tsv").read_text().splitlines()) == 3
        caplog.clear()
        monkeypatch.setattr(metarm.MetaRM, "_step", None)  # a finished fit of these rows is taken as it is
        again = metarm.MetaRM(settings, 3, policy)
        assert again.fit(rows, held_out=rows[:4], checkpoint=file) == history and "taken as it is" in caplog.text
        assert np.array_equal(again.score(rows), whole.score(rows)) and torch.equal(again.generator.get_state(), whole.generator.get_state())
        monkeypatch.setattr(metarm, "code", lambda *names: "other code")
        with pytest.raises(TypeError):  # a fit by other code is no such fit: it trains, and cannot
            metarm.MetaRM(settings, 3, policy).fit(rows, held_out=rows[:4], checkpoint=file)
        monkeypatch.undo()
        monkeypatch.setattr(metarm, "SAVE_EVERY", 2)
        file.unlink()
        caplog.clear()


def test_checkpointed_layers_give_the_same_gradients_and_the_head_trains_in_float32(P, tiny_decoder):
    rows, found = judged([make(i) for i in range(4)]), []
    for checkpointing in (False, True):
        policy = P.policy.model_copy(update={"model": str(tiny_decoder), "rank": 4, "dtype": "float32", "gradient_checkpointing": checkpointing})
        one = metarm.MetaRM(P.metarm.model_copy(update={"base": "policy", "tune": "lora", "max_length": 300}), 3, policy)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = one.model(one.model.encode(rows)).square().sum()
        loss.backward()
        found.append((torch.cat([w.grad.flatten() for w in one._trainable()]), sum(kept)))
    (plain, much), (again, little) = found
    assert torch.equal(plain, again) and plain.norm() > 0 and little < much / 2
    half = metarm.MetaRM(P.metarm.model_copy(update={"base": "policy", "tune": "lora"}), 3, policy.model_copy(update={"dtype": "bfloat16"}))
    assert {w.dtype for w in half._trainable()} == {torch.float32} and any("score" in n for n, w in half.model.named_parameters() if w.requires_grad)
    scores = []
    for half.model.packed in (True, False):
        scores.append(half.score(rows))
    assert np.allclose(*scores, atol=0.05) and half.update(rows) is not None


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_decoder_base(P, tiny_decoder, tune, tmp_path, monkeypatch):
    policy = P.policy.model_copy(update={"model": str(tiny_decoder), "rank": 4, "dtype": "float32"})
    settings = P.metarm.model_copy(update={"base": "policy", "tune": tune, "lr": 0.01, "max_length": 300, "epochs": 2, "batch": 8})
    rows = judged([make(i) for i in range(8)])
    one = metarm.MetaRM(settings, 3, policy)
    history = one.fit(rows)
    assert history[-1]["loss"] < history[0]["loss"]
    group = [r | {"critique": f"{r['critique']} {k} " * k} for r in rows[:3] for k in (1, 2, 3)] + rows[:1] * 2  # unequal, and twice the same
    features = one.model.encode(group)
    assert one.model.packed
    packed, gradients = one.model(features), []
    one.model.packed = False
    torch.testing.assert_close(packed, one.model(features), atol=2e-5, rtol=1e-4)
    for one.model.packed in (True, False):
        one.model.zero_grad()
        one.model(features).square().sum().backward()
        gradients.append(torch.cat([w.grad.flatten() for w in one.model.parameters() if w.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm() > 0
    one.model.packed = True
    one.model.zero_grad()
    whole = one.score(group)
    monkeypatch.setattr(metarm, "TOKENS", 2 * max(map(len, features)))
    parts = one.model.chunks(features)
    assert sorted(i for part in parts for i in part) == list(range(len(group))) and 2 < len(parts) < len(group) / 2  # what is shared counts once
    assert np.allclose(one.score(group), whole, atol=2e-5)
    one.params = settings.model_copy(update={"ranking": True})  # over all of a group, whatever the parts
    targets, names, grads = torch.arange(len(group)) / 5.0, [r["group"] for r in group], lambda: torch.cat([w.grad.flatten() for w in one._trainable()])
    loss = one._step(torch.optim.SGD(one._trainable(), lr=0.0), features, targets, names)
    by_parts = grads()
    one.model.zero_grad()
    output = one.model(features) + one.offset
    at_once = (output - targets).square().mean() + metarm._ranking(output, targets, names)
    at_once.backward()
    torch.nn.utils.clip_grad_norm_(one._trainable(), 1.0)
    assert loss == pytest.approx(at_once.item(), rel=1e-4) and (by_parts - grads()).norm() <= 1e-4 * by_parts.norm() > 0
    one.params = settings
    one.model.zero_grad()
    monkeypatch.undo()
    assert one.update(rows[:4]) is not None and isinstance(one.buffer, list)
    two = metarm.MetaRM.load(one.save(tmp_path / tune))
    assert np.array_equal(one.score(rows), two.score(rows))
    assert one.update(rows[4:8]) == two.update(rows[4:8])
    far = copy.deepcopy(rows[0]) | {"pair": PreferencePair("long", "made", "g", [{"role": "user", "content": "a" * 1200}], "b" * 1200, "c" * 1200, "A")}
    scores = one.score([far | {"critique": t} for t in ("Response A is right.", "Response B is wrong.")])
    assert scores[0] != scores[1]
    assert len(one.model.encode([far])[0]) <= settings.max_length
    with pytest.raises(ValueError, match="never cut"):
        one.score([far | {"critique": "x" * 1100}])
    with pytest.raises(ValueError, match="policy=params.policy"):
        metarm.MetaRM(settings, 3)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_encoder_base(P, tune, tmp_path):
    """An encoder sees both ways, so that nothing can be shared before the critique: each text is read whole."""
    settings = P.metarm.model_copy(update={"base": str(prepare("minilm")), "tune": tune, "lr": 2e-4 if tune == "full" else 1e-3, "max_length": 200, "epochs": 2, "batch": 8})
    rows = judged([make(i) for i in range(8)])
    one = metarm.MetaRM(settings, 3)
    history = one.fit(rows)
    assert not one.model.packed and history[-1]["loss"] < history[0]["loss"]
    scores = one.score([rows[0] | {"critique": t} for t in ("Response A is right.", "Response B is wrong.")])
    assert scores[0] != scores[1]
    two = metarm.MetaRM.load(one.save(tmp_path / tune))
    assert np.array_equal(one.score(rows), two.score(rows)) and one.update(rows[:4]) == two.update(rows[:4])


def test_rank_interval_and_agreement():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    groups = np.repeat(np.arange(40), 5)
    mean, low, high = metarm.rank_interval(x, x + 0.5 * rng.normal(size=200), groups, n=200)
    assert 0.7 < low < mean < high < 0.97
    assert np.isnan(metarm.agreement([0, 1, 1.5], [1, 1, 1])["rho"])
    assert metarm.agreement([0.0, 1.0], [0.5, 1.5]) == pytest.approx({"mae": 0.5, "rho": np.nan, "bias": 0.5}, nan_ok=True)


@pytest.mark.parametrize("tune", ["head", "lora"])
def test_a_hub_base_is_read_at_its_commit(P, tune, monkeypatch):
    def asked(name, revision=None, **kwargs):
        raise LookupError(f"{name} at {revision}")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", asked)
    with pytest.raises(LookupError, match="^someone/encoder at 0123abc$"):
        metarm.MetaRM(P.metarm.model_copy(update={"base": "someone/encoder@0123abc", "tune": tune}))


def test_drift_is_measured_on_fresh_rollouts_in_the_order_shown(tmp_path, monkeypatch, caplog):
    S = params.load(profile="smoke", overrides=["reward.binary=true", "metarm.drift_every=2", "metarm.drift_pairs=6", "grpo.steps=5"])
    monkeypatch.setattr(grm, "encode_prompt", lambda pair, tok, longest, swap=False, think=False: (pair, swap))
    synced, swaps = [], set()

    class Engine:
        def sync(self, model):
            synced.append(model)

        def generate(self, prompts, n, *settings):
            swaps.update(s for _, s in prompts)
            right = [(p.swapped() if s else p).label for p, s in prompts]
            return [[_completion(f"<critics>{PRAISE[0].format(v)}</critics>\n<choice>[[{v}]]</choice>") for v in (r, OTHER[r]) * 2] for r in right]

    class Knows:
        def __init__(self, sign):
            self.sign = sign

        def score(self, rows):
            return self.sign * 1.5 * np.array([r["critique"][9] == (r["pair"].swapped() if r["swap"] else r["pair"]).label for r in rows], float)

    drift = metarm.Drift(S, [make(i) for i in range(8)], Knows(-1), tmp_path)
    assert len(drift.pairs) == 6 and [s for s in range(1, 6) if drift.due(s)] == [2, 4, 5]
    line = drift.measure(4, "policy", None, Knows(1), Engine())
    assert synced == ["policy"] and swaps == {False, True} and line["n"] == 24 and not line["alarm"]
    assert line["online_mae"] == 0 and line["online_rho"] == pytest.approx(1) and line["frozen_rho"] == pytest.approx(-1)
    assert drift.measure(5, "policy", None, Knows(-1), Engine())["alarm"] and "below metarm.drift_alarm" in caplog.text
    drift.measure(4, "policy", None, Knows(1), Engine())
    assert [x["step"] for x in read_rows(drift.path)] == [4]


@pytest.mark.parametrize("fails", ["some", "all", "broken"])
def test_a_judge_that_fails_costs_a_drift_measure_and_not_the_run(fails, tmp_path, monkeypatch, caplog):
    S = params.load(profile="smoke", overrides=["reward.binary=true", "metarm.drift_pairs=6"])
    monkeypatch.setattr(grm, "encode_prompt", lambda pair, tok, longest, swap=False, think=False: pair.swapped().label if swap else pair.label)

    def similar(critiques, *args):
        if fails == "broken":
            raise JudgeError("no connection")
        return [1.0 if fails == "some" and i % 2 else float("nan") for i in range(len(critiques))]

    monkeypatch.setattr(metarm, "_process", similar)
    engine = types.SimpleNamespace(
        sync=lambda model: None,
        generate=lambda prompts, n, *settings: [[_completion(f"<critics>{PRAISE[0].format(v)}</critics>\n<choice>[[{v}]]</choice>")] * n for v in prompts],
    )  # fmt: skip
    zero = types.SimpleNamespace(score=lambda rows: np.zeros(len(rows)))
    line = metarm.Drift(S, [make(i) for i in range(8)], zero, tmp_path).measure(2, "policy", None, zero, engine)
    assert line["n"] == (12 if fails == "some" else 0) and read_rows(tmp_path / "drift.jsonl")
    assert ("drift is not measured: no connection" in caplog.text) == (fails == "broken")


def test_extra_rows_are_learnt_but_not_replayed_and_set_no_level(P):
    settings = P.metarm.model_copy(update={"epochs": 1})
    rows = judged([make(i) for i in range(10)])
    extra = [r | {"target": r["target"] + 3} for r in judged([make(i) for i in range(10, 30)], seed=2)]
    one, alone = metarm.MetaRM(settings, 3), metarm.MetaRM(settings, 3)
    one.fit(rows, extra=extra), alone.fit(rows)
    assert one.buffer_targets.tolist() == [r["target"] for r in rows] and one.seen == len(rows)
    assert one.score(rows).mean() == pytest.approx(np.mean([r["target"] for r in rows]), abs=1e-4)
    assert not np.allclose(one.score(rows), alone.score(rows), atol=1e-4)


def test_out_of_memory_says_what_to_lower(fitted, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(metarm.Head, "forward", full)
    for call, what in ((fitted.score, "while MetaRM scores"), (fitted.update, "in MetaRM's update")):
        with pytest.raises(RuntimeError, match=f"out of memory {what}: set policy.gradient_checkpointing, .*metarm.base: minilm"):
            call(judged([make(1)]))
