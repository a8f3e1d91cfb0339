"""GRPO: the packed update against trl's padded one, rewards that belong to their completion, bad input, resume."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from rmnlhf import ROOT, grpo, params, policy, rewards, shared_prefix
from rmnlhf.pairs import PreferencePair, fingerprint
from rmnlhf.similarity import Similarity
from rmnlhf.splits import Splits

P1, P2 = list(range(100, 130)), list(range(200, 217))


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(autouse=True)
def readable(monkeypatch):
    """The tiny policy writes noise: parser and similarity answer by the text's hash."""
    monkeypatch.setattr(grpo.grm, "parse_judgement", tiny.read_anything)
    monkeypatch.setattr(rewards, "process_rewards", tiny.compare_anything)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the shared prefix
def batch(groups, advantages=None, pad=2):
    """trl's padded batch from [(prompt, [completions])]; an empty completion is a masked one."""
    rows = [(p, c) for p, members in groups for c in members]
    width, depth = max(len(p) for p, _ in rows), max(max(len(c) for _, c in rows), 1)
    out = {k: torch.full((len(rows), n), pad) for k, n in (("prompt_ids", width), ("completion_ids", depth))}
    out |= {k.replace("ids", "mask"): torch.zeros_like(v) for k, v in out.items()}
    for i, (p, c) in enumerate(rows):
        out["prompt_ids"][i, width - len(p) :], out["prompt_mask"][i, width - len(p) :] = torch.tensor(p), 1
        out["completion_ids"][i, : len(c)], out["completion_mask"][i, : len(c)] = torch.tensor(c, dtype=torch.long), 1
    generator = torch.Generator().manual_seed(3)
    out["advantages"] = torch.randn(len(rows), generator=generator) if advantages is None else torch.tensor(advantages)
    out["num_items_in_batch"] = out["completion_mask"].sum()
    return out


def trainer(tokenizer, tmp_path, packed=True, beta=0.04, **overrides):
    from datasets import Dataset

    settings = tiny.settings(**{"grpo.group": 4, "grpo.shared_prefix": packed} | overrides)
    pairs = tiny.pairs(4)
    reward = grpo.RewardFunction("outcome", settings, pairs)
    rows = [{"prompt": p.id, "pair_id": p.id, "swap": 0} for p in pairs]
    model = tiny.model(lora=True)
    out = grpo.Trainer(
        model, reward, grpo.arguments(settings, tmp_path, 1), Dataset.from_list(rows), processing_class=tokenizer,
        encoded={p.id: [5, 6, 7 + i] for i, p in enumerate(pairs)}, engine=None, run=tmp_path, params=settings, beta=beta, seed=1,
    )  # fmt: skip
    out.current_gradient_accumulation_steps = 1
    return out


def test_adapters_train_in_float32_whatever_they_came_in(tokenizer, tmp_path, monkeypatch):
    """trl makes them bf16 beside 4-bit weights: there a step of 1e-5 rounds to none."""
    plain = tiny.model

    def half(**k):
        model = plain(**k)
        for name, weight in model.named_parameters():
            weight.data = weight.data.bfloat16() if "lora_" in name else weight.data
        return model

    monkeypatch.setattr(tiny, "model", half)
    weights = [w for w in trainer(tokenizer, tmp_path).model.parameters() if w.requires_grad]
    assert weights and all(w.dtype == torch.float32 for w in weights)


def gradient(trainer, inputs, rows=None):
    """(loss, gradient as one vector) of the batch, through trl's loss."""
    trainer.model.train()
    trainer.model.zero_grad()
    parts = trainer.packs(inputs) if rows is None else rows
    total = 0.0
    for index in parts:
        part = {k: v[index] if torch.is_tensor(v) and v.ndim else v for k, v in inputs.items()}
        loss = trainer.pack_loss(trainer.model, part)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([w.grad.flatten() for w in trainer.model.parameters() if w.grad is not None])


LAYOUTS = {
    "groups of unequal lengths": [(P1, [[7, 8, 9, 10], [7], [9, 9], [11] * 9]), (P2, [[3, 4], [5, 6, 7], [8] * 6, [3]])],
    "one group left over": [(P2, [[7, 8, 9, 10], [7, 8], [9], [5] * 7])],
    "masked and empty completions": [(P1, [[7, 8, 9], [], [4, 5], []]), (P2, [[], [3, 4], [5], [6, 7]])],
    "one prompt twice": [(P1, [[7, 8], [9, 10], [3], [4]]), (P1, [[5, 6], [7], [8, 9, 9], [2]])],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradient_equals_that_of_trls_padded_loss(tokenizer, tmp_path, name):
    inputs = batch(LAYOUTS[name])
    ours = trainer(tokenizer, tmp_path)
    assert ours.packed
    whole = [torch.arange(len(inputs["advantages"]))]
    loss, found = gradient(ours, inputs, whole)
    ours.packed = False
    wanted_loss, wanted = gradient(ours, inputs, whole)
    assert wanted.norm() > 1e-4
    assert (found - wanted).norm() / wanted.norm() <= 1e-5
    assert loss == pytest.approx(wanted_loss, abs=1e-6)


def test_a_reward_at_its_groups_mean_keeps_its_kl_term_and_a_flat_group_goes(tokenizer, tmp_path):
    inputs = batch(LAYOUTS["groups of unequal lengths"])
    inputs["advantages"] = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    inputs["completion_mask"][3] = 0  # a completion without a reward
    ours = trainer(tokenizer, tmp_path)
    assert sorted(torch.cat(ours.packs(inputs)).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("budget", [30, 60, 100, 4000])
def test_token_budget_changes_neither_loss_nor_gradient(tokenizer, tmp_path, budget):
    inputs = batch(LAYOUTS["groups of unequal lengths"])
    whole_loss, whole = gradient(trainer(tokenizer, tmp_path, **{"grpo.token_budget": 4000}), inputs)
    ours = trainer(tokenizer, tmp_path, **{"grpo.token_budget": budget})
    packs = ours.packs(inputs)
    assert sorted(torch.cat(packs).tolist()) == list(range(8))
    assert len(packs) == {30: 5, 60: 2, 100: 1, 4000: 1}[budget]
    loss, found = gradient(ours, inputs)
    assert (found - whole).norm() / whole.norm() <= 1e-5 and loss == pytest.approx(whole_loss, abs=1e-6)


def test_token_budget_does_not_change_what_is_logged(tokenizer, tmp_path):
    inputs, seen = batch(LAYOUTS["groups of unequal lengths"]), []
    for budget in (30, 60, 4000):
        ours = trainer(tokenizer, tmp_path, **{"grpo.token_budget": budget})
        ours._prepare_inputs = lambda given: given
        ours.training_step(ours.model, dict(inputs))
        found = {k: v for k, v in ours._metrics["train"].items() if k in ("kl", "entropy")}
        assert set(found) == {"kl", "entropy"} and all(len(v) == 1 for v in found.values())
        seen.append([v[0] for v in found.values()])
    assert seen[0] == pytest.approx(seen[2], rel=1e-4) and seen[1] == pytest.approx(seen[2], rel=1e-4) and min(seen[2]) > 0


@pytest.mark.parametrize("budget", [30, 90, 4000])
def test_padded_packs_keep_the_budget_too_and_the_gradient(tokenizer, tmp_path, budget):
    """Where the shared-prefix forward is refused: what a pack costs is its width with padding, and padding of other packs goes."""
    inputs = batch([(P1, [[7, 8, 9, 10], [7], [9, 9], [11] * 9]), (P2[:5], [[3, 4], [5, 6, 7], [8] * 6, [3]])])
    whole_loss, whole = gradient(trainer(tokenizer, tmp_path, packed=False), inputs, [torch.arange(8)])
    ours = trainer(tokenizer, tmp_path, packed=False, **{"grpo.token_budget": budget})
    assert not ours.packed
    packs, found, total = ours.packs(inputs), 0, 0.0
    assert sorted(torch.cat(packs).tolist()) == list(range(8))
    ours.model.train()
    for index in packs:
        part = grpo.trimmed({k: v[index] if torch.is_tensor(v) and v.ndim else v for k, v in inputs.items()})
        width = part["prompt_ids"].shape[1] + part["completion_ids"].shape[1]
        assert len(index) * width <= budget or len(index) == 1
        assert len({int(i) // 4 for i in index}) == 1, "one prompt, so no padding on its left"
        assert part["prompt_mask"].any(0).all() and part["completion_mask"].any(0).all()
        ours.model.zero_grad()
        loss = ours.pack_loss(ours.model, part)
        loss.backward()
        total += float(loss.detach())
        found = found + torch.cat([w.grad.flatten() for w in ours.model.parameters() if w.grad is not None])
    assert (found - whole).norm() / whole.norm() <= 1e-5 and total == pytest.approx(whole_loss, abs=1e-6)


def test_runs_are_those_of_this_runs_seeds():
    P = tiny.settings(**{"grpo.seeds": "[7, 9]"})
    assert params.runs(P) == {"cold_start": ["cold_start"]} | {arm: [arm, f"{arm}-9"] for arm in grpo.ARMS}


def test_a_pack_is_what_its_parts_are_alone(tokenizer):
    model = tiny.model().eval()
    groups = LAYOUTS["groups of unequal lengths"]
    p = shared_prefix.pack([g[0] for g in groups], [g[1] for g in groups])
    assert p.ids.shape[1] == sum(len(prompt) + sum(max(len(c) - 1, 0) for c in members) for prompt, members in groups)
    with torch.no_grad():
        found, entropy = shared_prefix.logps(model, p, 0.8)
        for row, (prompt, c) in enumerate((a, c) for a, members in groups for c in members):
            logits = model(torch.tensor([prompt + c])).logits[0, len(prompt) - 1 : -1] / 0.8
            logp = logits.log_softmax(-1)
            torch.testing.assert_close(found[p.row == row], logp.gather(-1, torch.tensor(c)[:, None])[:, 0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(entropy[p.row == row], -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=1e-4)
    assert shared_prefix.prepare(model)


@pytest.mark.parametrize("elements", [1, 20 * 49152, 2**26])
def test_the_head_by_chunks_is_the_models_own(monkeypatch, elements):
    monkeypatch.setattr(shared_prefix, "ELEMENTS", (elements, elements))
    model = tiny.model(lora=True).train()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    assert shared_prefix.prepare(model)
    groups = LAYOUTS["groups of unequal lengths"]
    p = shared_prefix.pack([g[0] for g in groups] * 4, [g[1] for g in groups] * 4)
    found = {}
    for chunks in (True, False):
        setattr(model.get_base_model(), shared_prefix.BY_CHUNKS, chunks)
        model.zero_grad()
        logps, entropy = shared_prefix.logps(model, p, 0.7)
        assert not entropy.requires_grad
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        found[chunks] = logps.detach(), entropy.detach(), torch.cat([w.grad.flatten() for w in model.parameters() if w.grad is not None])
    for a, b in zip(found[True], found[False]):
        assert (a - b).norm() <= 1e-5 * b.norm() and b.norm() > 0


def test_a_head_that_is_no_plain_product_stays_the_models_own():
    class Scaled(type(tiny.model())):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 3 * out.logits
            return out

    p = shared_prefix.pack([[5, 6]], [[[7, 8]]])
    for kind, chunks in ((Scaled, False), (type(tiny.model()), True)):
        model = kind(tiny.model().config).bfloat16().requires_grad_(False)
        torch.nn.init.normal_(model.lm_head.weight, std=1.0)
        assert shared_prefix.prepare(model) and getattr(model, shared_prefix.BY_CHUNKS) is chunks
    model.requires_grad_(True)  # every weight trains: the head too
    shared_prefix.logps(model, p)[0].sum().backward()
    assert model.get_output_embeddings().weight.grad is not None
    frozen = model.requires_grad_(False)
    assert len(shared_prefix.logps(frozen, shared_prefix.pack([[5, 6]], [[[]]]))[0]) == 0


def test_attention_that_cannot_take_the_pack_falls_back_with_a_message(caplog):
    from transformers import MistralConfig, MistralForCausalLM

    class Blind(MistralForCausalLM):  # takes no part in how attention is chosen: a kernel of its own
        def forward(self, *args, rmnlhf_branches=None, attention_mask=None, **kwargs):
            return super().forward(*args, **kwargs)

    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    assert not shared_prefix.prepare(Blind(MistralConfig(**size, initializer_range=0.5, sliding_window=None)))
    assert "padded instead" in caplog.text and "Blind" in caplog.text and "differ by" in caplog.text
    assert not shared_prefix.prepare(MistralForCausalLM(MistralConfig(**size, sliding_window=4096)))
    assert "sliding window" in caplog.text
    assert shared_prefix.prepare(MistralForCausalLM(MistralConfig(**size, sliding_window=None)))


def test_branches_see_what_the_mask_shows():
    """Unpacked attention against the whole mask: random packs, empty and single-token completions, a prompt without any."""
    import random

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rng, module = random.Random(0), torch.nn.Identity()
    module.is_causal = True
    for _ in range(20):
        prompts = [[1] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))]
        members = [[[2] * rng.choice([0, 1, 2, 7]) for _ in range(rng.randint(0, 3))] for _ in prompts]
        p = shared_prefix.pack(prompts, members)
        q, k, v = (torch.randn(1, h, p.ids.shape[1], 8) for h in (4, 2, 2))
        module.num_key_value_groups = 2
        found, _ = shared_prefix._branch_attention(module, q, k, v, None, rmnlhf_branches=shared_prefix.branches(p))
        wanted, _ = sdpa_attention_forward(module, q, k, v, shared_prefix.visible(p)[None, None])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_reference_is_the_adapter_switched_off(tokenizer, tmp_path):
    """With k3 and a policy equal to its reference the KL term has no gradient; with an adapter it has."""
    inputs = batch(LAYOUTS["one group left over"], advantages=[1e-30, 1e-30, 1e-30, 1e-30])
    ours = trainer(tokenizer, tmp_path, beta=1.0)
    _, moved = gradient(ours, inputs)
    assert moved.norm() > 1e-4
    for name, weight in ours.model.named_parameters():
        if "lora_B" in name:
            weight.data.zero_()
    _, still = gradient(ours, inputs)
    assert still.norm() < 1e-6


# --- advantage
def test_advantage_of_hand_written_groups():
    r = torch.tensor([[0.0, 1.0, 1.5, -1.0], [1.0, 1.0, 1.0, 1.0], [1.0, math.nan, 0.0, math.nan], [math.nan, 1.0, math.nan, math.nan]])
    a = grpo.advantages(r)
    group = [0.0, 1.0, 1.5, -1.0]
    mean = sum(group) / 4
    std = math.sqrt(sum((x - mean) ** 2 for x in group) / 3)
    assert a[0].tolist() == pytest.approx([(x - mean) / (std + 1e-6) for x in group], abs=1e-6)
    assert a[1].tolist() == [0.0] * 4
    assert a[2].tolist() == pytest.approx([0.5**0.5, 0.0, -(0.5**0.5), 0.0], abs=1e-5)
    assert a[3].tolist() == [0.0] * 4
    assert grpo.advantages(torch.tensor([[0.3]])).tolist() == [[0.0]]  # N = 1
    assert grpo.advantages(torch.full((1, 8), 0.1)).abs().max() == 0  # equal up to rounding


# --- rewards belong to their completions
def test_alignment_under_shuffling_and_repeated_prompts():
    settings, pairs = tiny.settings(), tiny.pairs(40) + tiny.pairs(20, critiques=False, source="plain")
    metarm = tiny.Linear()
    metarm.weights = torch.tensor([0.7, 0.9])
    reward = grpo.RewardFunction("offline", settings, pairs, metarm)
    rng, mismatches, seen = random.Random(0), 0, 0
    by_id = {p.id: p for p in pairs}
    while seen < 10_000:
        rows = [(rng.choice(pairs).id, rng.randrange(2), f"text {rng.randrange(10**6)}") for _ in range(500)]
        rows += rng.sample(rows, 100)
        rng.shuffle(rows)
        ids, swaps, texts = map(list, zip(*rows))
        got = reward(prompts=texts, completions=texts, pair_id=ids, swap=swaps)
        for (i, swap, text), value, line in zip(rows, got, reward.rows):
            pair = by_id[i].swapped() if swap else by_id[i]
            said = tiny.read_anything(text)
            f1 = fingerprint("f1", said.critique) % 101 / 100
            if said.error:
                wanted = -1.0
            elif said.verdict != pair.label:
                wanted = 0.0
            elif pair.critiques:
                wanted = 1.0 + 0.5 * (f1 >= 0.5)
            else:
                m = float(torch.tensor([fingerprint("x", said.critique) % 7 / 7, 1.0]) @ metarm.weights)
                wanted = 1.0 + min(max(m - 1, 0.0), 0.5)
            mismatches += abs(value - wanted) > 1e-6 or (line["pair_id"], line["text"]) != (i, text)
            seen += 1
    assert mismatches == 0


def test_online_updates_on_human_rows_before_it_scores_the_others():
    settings = tiny.settings()
    pairs = tiny.pairs(3, source="a tag nobody knows") + tiny.pairs(3, critiques=False, source="Helpsteer3_A")
    metarm = tiny.Linear()
    reward = grpo.RewardFunction("online", settings, pairs, metarm)
    texts = [f"critique {i}" for i in range(60)]
    ids = [pairs[i % 6].id for i in range(60)]
    swaps = [i // 6 % 2 for i in range(60)]
    reward(prompts=texts, completions=texts, pair_id=ids, swap=swaps)
    (first, updated), (second, scored) = metarm.calls
    assert (first, second) == ("update", "score")
    said = [tiny.read_anything(t) for t in texts]
    human = [t for t, i, j in zip(texts, ids, said) if "nobody" in i and not j.error]
    assert [r["critique"] for r in updated] == human and {0.0, 1.0, 1.5} == {r["target"] for r in updated}  # wrong verdicts kept
    assert [r["critique"] for r in scored] == [t for t, i, j in zip(texts, ids, said) if "Helpsteer3" in i and not j.error]
    assert all(r["metarm"] is None for r in reward.rows if "nobody" in r["pair_id"])
    by_id = {p.id: p for p in pairs}
    asked = {t: (by_id[i], bool(s)) for t, i, s in zip(texts, ids, swaps)}
    assert all((r["pair"], r["swap"]) == asked[r["critique"]] for r in [*updated, *scored])
    for r in updated:
        shown = r["pair"].swapped() if r["swap"] else r["pair"]
        right = tiny.read_anything(r["critique"]).verdict == shown.label
        assert r["target"] == (1 + 0.5 * (fingerprint("f1", r["critique"]) % 101 / 100 >= 0.5) if right else 0)


def test_a_run_without_any_human_critique_stops():
    bare = replace(tiny.splits(3), train=tiny.pairs(3, critiques=False), hidden_truth={})
    for arm in ("human", "online"):
        with pytest.raises(rewards.ProcessRewardError, match="none of 6 training pairs"):
            grpo.prompts(arm, tiny.settings(), bare, 7)
    mixed = replace(bare, train=tiny.pairs(1) + bare.train[1:])  # a short run may draw none of the few with critiques
    for seed in range(20):
        grpo.prompts("online", tiny.settings(**{"grpo.steps": 1, "grpo.prompts": 1}), mixed, seed)
    with pytest.raises(ValueError, match="'both'.*outcome, human, offline, online"):
        grpo.RewardFunction("both", tiny.settings(), tiny.pairs(3))


def test_missing_process_reward_is_masked_counted_and_stops_the_run_when_frequent(monkeypatch):
    share = {"failing": 7}

    def judge(critiques, references, **options):
        return [Similarity(*[math.nan if i % share["failing"] == 0 else 1.0] * 3) if r else None for i, r in enumerate(references)]

    monkeypatch.setattr(rewards, "process_rewards", judge)
    reward, texts = grpo.RewardFunction("human", tiny.settings(), tiny.pairs(2)), [f"t {i}" for i in range(60)]
    ids = [f"any-{i % 2}" for i in range(60)]
    got = reward(prompts=texts, completions=texts, pair_id=ids, swap=[0] * 60)
    assert any(r is None for r in got)
    lost = [r for r in reward.rows if r["reward"] is None]
    assert reward.figures["masked"] == len(lost) == sum(r is None for r in got)
    assert all(r["verdict"] == r["label"] for r in lost)  # a wrong verdict's reward is known without the judge
    assert reward.figures["missing"] >= len(lost)
    share["failing"] = 2
    with pytest.raises(rewards.ProcessRewardError, match="reward.max_missing allows 20%"):
        for _ in range(3):
            reward(prompts=texts, completions=texts, pair_id=ids, swap=[0] * 60)


def test_arms_see_the_same_prompts_and_hidden_critiques_only_in_human():
    settings, splits = tiny.settings(**{"grpo.steps": 9, "grpo.prompts": 3}), tiny.splits()
    shown = {arm: grpo.prompts(arm, settings, splits, 7) for arm in grpo.ARMS}
    rows = shown["human"][1]
    assert all(r == rows for _, r in shown.values()) and len(rows) == 27
    assert {r["swap"] for r in rows} == {0, 1}
    first, again = rows[:12], rows[12:24]  # 12 pairs, then the same ones in the other order
    assert all(a["pair_id"] == b["pair_id"] and a["swap"] != b["swap"] for a, b in zip(first, again))
    labels = {p.id: p.label for p in shown["human"][0]}
    right = ["BA"[(labels[r["pair_id"]] == "A") != r["swap"]] for r in rows[:24]]
    assert all(a != b for a, b in zip(right[::2], right[1::2])) and right[::2] != right[:1] * 12  # neither a letter nor its place in a step pays
    for arm, (pairs, _) in shown.items():
        hidden = [p for p in pairs if p.id.startswith("hidden")]
        assert hidden and all(bool(p.critiques) == (arm == "human") for p in hidden)
    assert grpo.prompts("human", settings, splits, 8)[1] != rows


# --- whole runs
def rows(run, name="metrics.jsonl"):
    return [json.loads(x) for x in (Path(run) / name).read_text().splitlines()]


def weights(run):
    from safetensors.torch import load_file

    return load_file(Path(run) / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run with MetaRM online."""
    folder = tmp_path_factory.mktemp("runs") / "online"
    patch = pytest.MonkeyPatch()
    patch.setattr(grpo.grm, "parse_judgement", tiny.read_anything)
    patch.setattr(rewards, "process_rewards", tiny.compare_anything)
    threads = torch.get_num_threads()
    run = tiny.train(folder)
    torch.set_num_threads(threads)
    patch.undo()
    return run


KILLED = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import tiny
from rmnlhf import grpo
save, count = grpo.Trainer._save_checkpoint, []
def second(self, *args):
    count.append(1)
    if len(count) == {at}:
        {how}
    save(self, *args)
grpo.Trainer._save_checkpoint = second
tiny.train({run!r})
"""


def test_groups_reach_the_update_whole(tmp_path, monkeypatch):
    """trl shuffles the rows between rollouts and update."""
    seen, packs = [], grpo.Trainer.packs

    def spy(self, inputs):
        found = packs(self, inputs)
        seen.append((self, inputs, found))
        return found

    monkeypatch.setattr(grpo.Trainer, "packs", spy)
    monkeypatch.setattr(grpo.grm, "parse_judgement", tiny.read_anything)
    monkeypatch.setattr(rewards, "process_rewards", tiny.compare_anything)
    run = tiny.train(tmp_path / "run", **{"grpo.prompts": 3, "grpo.token_budget": 220})
    assert len(seen) == 3
    for step, (trainer, inputs, found) in enumerate(seen, 1):
        recorded = [r["advantage"] for r in rows(run, "rollouts.jsonl") if r["step"] == step]
        assert inputs["advantages"].tolist() == pytest.approx(recorded)  # in the order of the rollouts
        for prompt in inputs["prompt_ids"].view(3, 4, -1):
            assert (prompt == prompt[0]).all()
        for part in found:
            ids, mask = inputs["prompt_ids"][part], inputs["prompt_mask"][part].bool()
            prompts = {tuple(i[m].tolist()) for i, m in zip(ids, mask)}
            assert sum(map(len, prompts)) + int(inputs["completion_mask"][part].sum()) <= trainer.params.grpo.token_budget or len(part) == 1


def test_a_killed_run_goes_on_to_the_same_losses_rewards_and_weights(finished, tmp_path):
    run = tmp_path / "killed"
    how = "part = self.run / 'checkpoints' / 'checkpoint-2.part' / 'checkpoint-2'; part.mkdir(parents=True); os._exit(9)"
    code = KILLED.format(root=str(ROOT), tests=str(ROOT / "tests"), run=str(run), at=2, how=how)
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 9, done.stderr[-2000:]
    assert len(rows(run)) == 2 and [p.name for p in grpo.checkpoints(run)] == ["checkpoint-1"]  # step 2 was recorded, not saved
    with (run / "rollouts.jsonl").open("a") as f:
        f.write('{"step": 2, "half a li')
    tiny.train(run)
    assert rows(run) == rows(finished)
    # the engine's log-probabilities against the trainer's: the resumed process had to bring the weights to the engine by itself
    assert all(0 <= r["engine_gap"] < 0.06 for r in rows(run))
    assert rows(run, "rollouts.jsonl") == rows(finished, "rollouts.jsonl")
    a, b = weights(run), weights(finished)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    metarm = [torch.load(grpo.checkpoints(r)[-1] / "reward.pt")["metarm"] for r in (run, finished)]
    assert all(torch.equal(metarm[0][k], metarm[1][k]) for k in metarm[0])
    assert not list((run / "checkpoints").glob("*.part"))
    for name in ("reward", "loss"):  # what can be watched is what was recorded, each step once
        watched = [line.split("\t") for line in (run / f"dvclive/plots/metrics/{name}.tsv").read_text().splitlines()[1:]]
        assert [(int(step), float(x)) for step, x in watched] == [(r["step"], pytest.approx(r[name])) for r in rows(run)]


def test_a_killed_run_goes_on_to_the_same_metarm_replay_and_drift(tmp_path, monkeypatch):
    """With the real MetaRM and its frozen twin, as `grpo.train` itself loads them."""
    from rmnlhf import metarm

    monkeypatch.setattr(metarm, "parse_judgement", tiny.read_anything)
    settings, splits = tiny.settings(**{"metarm.drift_every": 1, "metarm.replay": 20}), tiny.splits()
    monkeypatch.chdir(tmp_path)
    rows_ = [metarm.row(p, False, f"Response {v} names reason {i}.", float(v == p.label)) for i, p in enumerate(tiny.pairs(6)) for v in "AB"]
    cold = metarm.MetaRM(settings.metarm, 3)
    cold.fit(rows_)
    cold.save("results/runs/metarm")
    train = lambda run: grpo.train("online", settings, splits=splits, model=(tiny.model(True), tiny.tokenizer()), run=tmp_path / run)  # noqa: E731
    whole = train("whole")
    save = grpo.Trainer._save_checkpoint
    monkeypatch.setattr(grpo.Trainer, "_save_checkpoint", lambda self, *a: save(self, *a) if self.state.global_step < 2 else (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):
        train("killed")
    assert [r["step"] for r in rows(tmp_path / "killed", "drift.jsonl")] == [1, 2]  # the second is of a step that is not saved
    monkeypatch.setattr(grpo.Trainer, "_save_checkpoint", save)
    killed = train("killed")
    drift = rows(killed, "drift.jsonl")
    assert drift == rows(whole, "drift.jsonl") and [r["step"] for r in drift] == [1, 2, 3]
    assert drift[-1]["online_mae"] != drift[-1]["frozen_mae"]
    assert rows(killed) == rows(whole) and rows(killed, "rollouts.jsonl") == rows(whole, "rollouts.jsonl")
    one, other = (metarm.MetaRM.load(run / "metarm") for run in (killed, whole))
    assert one.seen == other.seen > len(rows_) and len(one.buffer_targets) == 20
    assert torch.equal(one.buffer_targets, other.buffer_targets) and torch.equal(one.buffer, other.buffer)
    assert np.array_equal(one.score(rows_), other.score(rows_)) and not np.array_equal(one.score(rows_), cold.score(rows_))
    a, b = weights(killed), weights(whole)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_is_kept_and_one_with_other_settings_put_aside(finished, tmp_path, caplog):
    before = (finished / "metrics.jsonl").stat().st_mtime_ns
    tiny.train(finished)
    assert (finished / "metrics.jsonl").stat().st_mtime_ns == before
    other = tmp_path / "run"
    tiny.train(other, "outcome", **{"grpo.steps": 1})
    tiny.train(other, "outcome", **{"grpo.steps": 2})
    assert [r["step"] for r in rows(other)] == [1, 2]
    (former,) = (tmp_path / ".former").iterdir()
    assert [r["step"] for r in rows(former)] == [1] and (former / "adapter").exists()  # nothing is lost
    made = (other / "metrics.jsonl").stat().st_mtime_ns
    tiny.train(other, "outcome", **{"grpo.steps": 1})  # back with its settings, not trained again
    assert [r["step"] for r in rows(other)] == [1]
    tiny.train(other, "outcome", **{"grpo.steps": 2})
    assert (other / "metrics.jsonl").stat().st_mtime_ns == made
    fields = tiny.settings().model_dump()
    assert all(names <= fields[section].keys() for section, names in grpo.PATIENCE.items())  # what is misspelt would be left in
    before = (other / "metrics.jsonl").stat().st_mtime_ns
    patience = {"grpo.token_budget": 50, "rollout.batch": 3, "metarm.online_lr": 1.0}  # `outcome` has no MetaRM
    tiny.train(other, "outcome", **{"grpo.steps": 2} | patience)
    assert (other / "metrics.jsonl").stat().st_mtime_ns == before and "other code" not in caplog.text
    (other / "code.txt").write_text("0123456789abcdef\n")
    tiny.train(other, "outcome", **{"grpo.steps": 2})
    assert "run: trained, at least in part, by other code than today's; remove the folder" in caplog.text


def test_trl_is_told_the_papers_settings(tmp_path):
    a = grpo.arguments(tiny.settings(**{"grpo.lr": 3e-4, "grpo.epsilon": 0.15, "grpo.max_grad_norm": 0.7, "grpo.steps": 5}), tmp_path, 11)
    assert (a.learning_rate, a.epsilon, a.max_grad_norm, a.max_steps, a.seed) == (3e-4, 0.15, 0.7, 5, 11)
    assert (a.loss_type, a.num_iterations, a.gradient_accumulation_steps, a.steps_per_generation) == ("dapo", 1, 1, 1)
    assert str(getattr(a.lr_scheduler_type, "value", a.lr_scheduler_type)) == "constant" and a.weight_decay == 0
    assert (a.num_generations, a.per_device_train_batch_size) == (4, 8) and not a.mask_truncated_completions


def test_other_critiques_or_other_weights_are_another_run(tmp_path, monkeypatch):
    """What would be trained is enough to know."""
    monkeypatch.setattr(grpo.Trainer, "train", lambda self, **k: (_ for _ in ()).throw(InterruptedError))

    def config(name, data=None, seed=0):
        with pytest.raises(InterruptedError):
            grpo.train("outcome", tiny.settings(), splits=data or tiny.splits(), model=(tiny.model(True, seed=seed), tiny.tokenizer()), run=tmp_path / name)
        return (tmp_path / name / "config.yaml").read_text()

    data, first = tiny.splits(), config("first")
    assert config("again") == first
    edited = [replace(p, critiques=[replace(c, text=c.text + " Truly.") for c in p.critiques]) for p in data.train]
    assert config("critiques", replace(data, train=edited)) != first and config("weights", seed=1) != first
    turned = replace(data, hidden=[replace(p, label="BA"[p.label == "B"]) for p in data.hidden])
    assert config("labels", turned) != first


@pytest.mark.parametrize("tokens", [3, 40, 128, 300])
def test_whole_blocks_are_seen_by_nobody(tokens):
    p = shared_prefix.pack([[5] * tokens, [6]], [[[7, 8], [9] * 4], [[1, 2, 3]]])
    filled, n = shared_prefix.whole_blocks(p), len(p.group)
    assert filled.ids.shape[1] == filled.positions.shape[1] == len(filled.group) == len(filled.branch) == -(-n // 128) * 128
    seen = shared_prefix.visible(filled)
    assert torch.equal(seen[:n, :n], shared_prefix.visible(p)) and not seen[:n, n:].any() and seen.any(1).all()
    assert torch.equal(filled.ids[:, p.at], p.ids[:, p.at])


def test_records_of_a_run(finished):
    metrics, rollouts = rows(finished), rows(finished, "rollouts.jsonl")
    assert [r["step"] for r in metrics] == [1, 2, 3] and len(rollouts) == 3 * 8
    wanted = {"loss", "reward", "outcome", "process", "metarm", "metarm_loss", "kl", "clip_share", "degenerate_groups", "engine_gap", "tokens", "cut_share",
              "format_errors", "masked", "missing"}  # fmt: skip
    assert wanted <= set(metrics[0])
    live = [m for m in metrics if m["degenerate_groups"] < 1]
    assert live and all(m[k] is not None for m in live for k in ("loss", "grad_norm", "kl", "entropy", "tokens", "cut_share", "engine_gap"))
    assert all(m["kl"] > 0 for m in live)  # grpo.beta reaches the loss: tiny's adapter differs from its base
    assert all(m["clip_share"] == 0 for m in metrics)  # strictly on-policy
    for m in metrics:
        mine = [r for r in rollouts if r["step"] == m["step"]]
        assert m["reward"] == pytest.approx(sum(r["reward"] for r in mine) / 8)
        for i in range(0, 8, 4):
            assert len({(r["pair_id"], r["swap"]) for r in mine[i : i + 4]}) == 1
            a = grpo.advantages(torch.tensor([[r["reward"] for r in mine[i : i + 4]]]))
            assert a[0].tolist() == pytest.approx([r["advantage"] for r in mine[i : i + 4]], abs=1e-6)
    spent = rows(finished, "timings.jsonl")
    assert len(spent) == 3 and all(0 <= r["process"] + r["metarm"] <= r["reward"] + 0.002 for r in spent)  # each rounded to milliseconds
    scored = [r for r in rollouts if r["process"] is not None and r["reference"]]
    assert scored and all(isinstance(r["critique"], str) for r in scored)
    for r in scored:  # which of the critique's arguments met which of the reference's
        assert r["arguments"] == [{"text": r["critique"], "side": "A", "polarity": 1}] and r["matches"][0][:2] == [0, 0]
        assert r["reference"] == [{"text": "sun", "side": "A", "polarity": 1, "core": True}]
    assert {"adapter", "config.yaml", "checkpoints", "tensorboard", "dvclive"} <= {p.name for p in finished.iterdir()}


@pytest.mark.parametrize("case", ["equal", "nan", "missing", "one rollout", "empty", "long prompt", "cut"])
def test_bad_input_gives_a_finite_loss(case, tmp_path, monkeypatch):
    overrides = {"grpo.steps": 1}
    call = grpo.RewardFunction.__call__
    if case == "equal":
        monkeypatch.setattr(grpo.RewardFunction, "__call__", lambda *a, **k: [0.5] * len(call(*a, **k)))
    elif case in ("nan", "missing"):
        value = float("nan") if case == "nan" else None
        monkeypatch.setattr(grpo.RewardFunction, "__call__", lambda *a, **k: [value, 1.0, *call(*a, **k)[2:]])
    elif case == "one rollout":
        overrides["grpo.group"] = 1
    elif case == "empty":
        from rmnlhf import rollout

        real = rollout.TransformersEngine.generate
        nothing = rollout.Completion([], [], "", True)
        monkeypatch.setattr(rollout.TransformersEngine, "generate", lambda *a, **k: [[nothing, *g[1:]] for g in real(*a, **k)])
    elif case == "cut":
        overrides["policy.max_completion"] = 2
    else:
        long = [PreferencePair(p.id, p.source, p.group, p.context, p.response_a * 200, p.response_b * 150, p.label, p.critiques)
                for p in (*tiny.splits().train, *tiny.splits().hidden)]  # fmt: skip
        splits = tiny.splits()
        splits.train, splits.hidden = long[:6], long[6:]
        monkeypatch.setattr(tiny, "splits", lambda: splits)
    updates, packs = [], grpo.Trainer.packs
    monkeypatch.setattr(grpo.Trainer, "packs", lambda self, inputs: updates.append((inputs, packs(self, inputs))) or updates[-1][1])
    run = tiny.train(tmp_path / "run", "outcome", **overrides)
    (line,) = rows(run)
    assert math.isfinite(line["loss"])
    ((inputs, parts),) = updates
    trained = [i for part in parts for i in part.tolist()]
    start = tiny.model(True).state_dict()
    moved = max(float((w - start[k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default")]).abs().max()) for k, w in weights(run).items())
    if case in ("equal", "one rollout"):
        assert line["degenerate_groups"] == 1.0 and line["loss"] == 0.0 and moved == 0.0
    else:
        assert moved > 0
    if case in ("nan", "missing"):
        assert rows(run, "rollouts.jsonl")[0]["advantage"] == 0.0
        assert inputs["completion_mask"].sum(1)[0] == 0 < inputs["completion_mask"].sum(1)[1] and 0 not in trained and 1 in trained  # no KL term either
    assert line["prompts_cut"] == float(case == "long prompt")
    if case == "empty":
        assert [not r["text"] and r["reward"] is not None for r in rows(run, "rollouts.jsonl")] == [True, False, False, False] * 2
        assert inputs["completion_mask"].sum(1)[::4].tolist() == [1, 1]  # its end token carries the reward
    if case in ("cut", "empty"):
        assert (line["cut_share"] == 1.0) == (case == "cut")


def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared_prefix, "logps", full)
    monkeypatch.setattr(shared_prefix, "prepare", lambda model: True)
    with pytest.raises(RuntimeError, match="lower grpo.token_budget .*policy.max_prompt.*gradient_checkpointing"):
        tiny.train(tmp_path / "run", "outcome")


def test_a_run_that_draws_no_pair_with_a_critique_says_so(caplog):
    seen = tiny.splits()
    few = Splits(seen.train[:1], seen.hidden, seen.unseen, {}, {}, "any")
    drawn = {}
    for seed in range(20):
        caplog.clear()
        pairs, _ = grpo.prompts("online", tiny.settings(**{"grpo.steps": 1, "grpo.prompts": 1, "grpo.group": 4}), few, seed)
        drawn[any(p.agreeing for p in pairs)] = "none of the 1 pairs that this run draws has a human critique" in caplog.text
    assert drawn == {True: False, False: True}


def test_a_run_without_a_cold_start_says_what_to_run(tmp_path, monkeypatch):
    on, off = tiny.settings(), tiny.settings(**{"cold_start.enabled": "false"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="03_cold_start"):
        policy.start(on)
    assert policy.start(off) is None
