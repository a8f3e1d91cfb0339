import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rmnlhf import ROOT, cold_start, grm, params, policy
from rmnlhf.pairs import HumanCritique, PreferencePair, fingerprint


def pair(i, label="A", critiques=2):
    good, bad = f"Water boils at {i + 90} degrees because the pressure is low.", "No idea, ask somebody else."
    a, b = (good, bad) if label == "A" else (bad, good)
    said = [HumanCritique(f"w{k}", label, f"Response {label} explains the cause, reason {k}.") for k in range(critiques)]
    return PreferencePair(f"p{i}", "own", f"g{i}", [{"role": "user", "content": f"When does water boil at {i} km?"}], a, b, label, said)


@pytest.fixture(scope="module")
def P():
    return params.load(ROOT / "params.yaml", "smoke", ["cold_start.adapter=null", "cold_start.critiques_per_pair=2", "cold_start.batch_pairs=2", "policy.rank=2"])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(policy.prepare("smollm2-135m"))


@pytest.fixture(scope="module")
def tiny(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


def test_a_target_says_what_the_parser_reads_and_weighs_the_verdict(P, tokenizer):
    for swap, side in ((False, "A"), (True, "B")):
        e = cold_start.example(pair(1), swap, tokenizer, P)
        assert len(e.completions) == 2
        for ids, weights in e.completions:
            assert ids[-1] == tokenizer.eos_token_id
            judgement = grm.parse_judgement(tokenizer.decode(ids[:-1]))
            assert judgement.verdict == side and f"Response {side} explains" in judgement.critique
            heavy = [tokenizer.decode([t]) for t, w in zip(ids, weights) if w == P.cold_start.verdict_weight]
            assert heavy == [f" {side}"]


def test_without_critiques_only_the_verdict_is_learnt(P, tokenizer):
    ((ids, weights),) = cold_start.example(pair(1, critiques=0), False, tokenizer, P).completions
    assert tokenizer.decode(ids) == "<critics>Response A" and weights[-1] == P.cold_start.verdict_weight


def test_the_packed_loss_is_that_of_separate_rows(P, tokenizer, tiny):
    examples = [cold_start.example(pair(i, "AB"[i % 2]), False, tokenizer, P) for i in range(3)]
    total = weight = 0
    for e in examples:
        for ids, weights in e.completions:
            logits = tiny(torch.tensor([e.prompt + ids])).logits[0, len(e.prompt) - 1 : -1]
            nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="none")
            total += (nll * torch.tensor(weights)).sum() / len(e.completions)
            weight += sum(weights) / len(e.completions)
    for packs in (True, False):  # False: a model whose attention cannot take a pack
        assert torch.isclose(cold_start.loss(tiny, examples, packs), total / weight, rtol=1e-5)


def test_a_sliding_window_is_trained_and_measured_as_it_is(P, tokenizer):
    """Such a model is refused by `prepare`; each of its completions then goes through in a plain forward of its own."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), initializer_range=0.5, sliding_window=8, **size)).eval()
    pairs = [pair(i) for i in range(2)]
    found = cold_start.margins(model, tokenizer, pairs, P)
    a, b = (tokenizer.encode(f" {s}", add_special_tokens=False)[0] for s in "AB")
    for i, p in enumerate(pairs):
        ids = grm.encode_prompt(p, tokenizer, P.policy.max_prompt) + tokenizer.encode("<critics>Response", add_special_tokens=False)
        at = model(torch.tensor([ids])).logits[0, -1]
        assert np.isclose(found[i, 0], (at[a] - at[b]).item(), atol=1e-4)


def test_margins_are_those_of_the_plain_model(P, tokenizer, tiny):
    pairs = [pair(i) for i in range(3)]
    found = cold_start.margins(tiny, tokenizer, pairs, P)
    a, b = (tokenizer.encode(f" {s}", add_special_tokens=False)[0] for s in "AB")
    for i, p in enumerate(pairs):
        for swap in (False, True):
            ids = grm.encode_prompt(p, tokenizer, P.policy.max_prompt, swap) + tokenizer.encode("<critics>Response", add_special_tokens=False)
            at = tiny(torch.tensor([ids])).logits[0, -1]
            assert np.isclose(found[i, int(swap)], (at[a] - at[b]).item(), atol=1e-4)


def test_order_holds_every_pair_in_both_orders_once(P):
    pairs = [pair(i) for i in range(37)]
    rows = cold_start.order(pairs, 4, seed=1)
    assert sorted((p.id, s) for p, s in rows) == sorted((p.id, s) for p in pairs for s in (False, True))
    assert rows == cold_start.order(pairs[::-1], 4, seed=1)


def test_shares_of_other_sources(P):
    from rmnlhf.splits import Splits

    s = Splits([pair(i) for i in range(30)], [], [], {}, {}, "own")
    extra = {"controlled": [pair(100 + i) for i in range(40)], "mr_ben": []}
    P2 = params.load(ROOT / "params.yaml", "smoke", ["cold_start.controlled_share=0.25"])
    assert len(cold_start.training_pairs(s, P2, extra)) == 40
    assert cold_start.training_pairs(s, P, extra) == s.train


def test_a_changed_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="cold_start.adapter"):
        cold_start.verify(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "SHA256SUMS").write_text(hashlib.sha256(b"{}").hexdigest() + "  adapter_config.json\n")
    assert cold_start.verify(tmp_path) == tmp_path
    (tmp_path / "adapter_config.json").write_text('{"r": 9}')
    with pytest.raises(ValueError, match="sha256 differs"):
        cold_start.verify(tmp_path)


def test_an_adapter_is_not_used_where_its_training_groups_are_held_out(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "groups.txt").write_text(f"{fingerprint('group', pair(1).group):016x}\n")
    assert cold_start.verify(tmp_path, [pair(2)]) == tmp_path
    with pytest.raises(ValueError, match="trained on 1 of the groups that this run holds out.*cold_start.steps: 400"):
        cold_start.verify(tmp_path, [pair(1), pair(2)])
    assert len((ROOT / "adapters" / "ukpconvarg" / "groups.txt").read_text().split()) == 12


def test_the_held_out_loss_is_the_loss_of_all_its_targets_in_whatever_batches(P, tokenizer, tiny):
    pairs = [pair(i, "AB"[i % 2], critiques=i % 3) for i in range(7)]
    examples = [cold_start.example(p, bool(fingerprint("held out", p.id) % 2), tokenizer, P) for p in pairs]
    tiny.train()
    found = cold_start.held_out_loss(tiny, tokenizer, pairs, P)
    assert tiny.training and np.isclose(found, cold_start.loss(tiny.eval(), examples).item(), rtol=1e-5)


def test_training_lowers_the_loss_resumes_and_is_done_once(P, tmp_path, monkeypatch, tokenizer, tiny):
    """On a tiny model: trained in one go, and in two halves with a held-out loss on the way, the adapter is the same."""
    from peft import LoraConfig, get_peft_model

    def load(*args, **kwargs):
        torch.manual_seed(3)
        model = LlamaForCausalLM(tiny.config)
        model.load_state_dict(tiny.state_dict())
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")), tokenizer

    monkeypatch.setattr(policy, "load", load)
    P = params.load(ROOT / "params.yaml", "smoke", ["cold_start.adapter=null", "cold_start.steps=30", "cold_start.batch_pairs=2", "cold_start.lr=0.01"])
    pairs = [pair(i, "AB"[i % 2]) for i in range(12)]
    whole = cold_start.train(P, pairs, tmp_path / "whole")
    curve = [json.loads(line)["loss"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert curve[-1] < curve[0]

    real, calls = cold_start.loss, []

    def dies(model, examples, packs):
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) == 28:
            raise KeyboardInterrupt
        return real(model, examples, packs)

    monkeypatch.setattr(cold_start, "loss", dies)
    monkeypatch.setattr(cold_start, "EVERY", 10)
    held_out = [pair(100 + i, "AB"[i % 2]) for i in range(5)]
    with pytest.raises(KeyboardInterrupt):
        cold_start.train(P, pairs, tmp_path / "halves", held_out)
    for name, state in (("checkpoint-26", None), ("checkpoint-27", '{"epoch": 0.')):  # killed while it was saved
        shutil.copytree(tmp_path / "halves/checkpoints/checkpoint-25", tmp_path / "halves/checkpoints" / name)
        (tmp_path / "halves/checkpoints" / name / "trainer_state.json").unlink()
        if state:
            (tmp_path / "halves/checkpoints" / name / "trainer_state.json").write_text(state)
    cold_start.train(P, pairs, tmp_path / "halves", held_out)
    assert 28 < len(calls) < 40  # continued from step 25, not from the start
    assert {p.name for p in (tmp_path / "halves/checkpoints").glob("checkpoint-*")} == {"checkpoint-25", "checkpoint-30"}
    rows = [json.loads(line) for line in (tmp_path / "halves/metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows if "loss" in r] == curve
    measured = {r["step"]: r["held_out_loss"] for r in rows if "held_out_loss" in r}
    assert list(measured) == [0, 10, 20, 30] and measured[30] < measured[0] and {r.get("held_out_pairs", 5) for r in rows} == {5}
    board = EventAccumulator(str(tmp_path / "halves/tensorboard")).Reload()
    assert {e.step: e.value for e in board.Scalars("held_out_loss")} == pytest.approx(measured)
    assert [e.step for e in EventAccumulator(str(whole / "tensorboard")).Reload().Scalars("loss")] == [5, 10, 15, 20, 25, 30]
    names = ["whole", "halves"]
    one, two = ((tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in names)
    assert one == two
    before = len(calls)
    cold_start.train(P, pairs, tmp_path / "halves")
    assert len(calls) == before  # done: not trained again


def test_a_given_adapter_is_taken_as_it_is_now(tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    settings = params.load(ROOT / "params.yaml", "smoke", [f"cold_start.adapter={given}", "cold_start.steps=0"])
    for rank in (1, 2):
        (given / "adapter_config.json").write_text(json.dumps({"r": rank}))
        run = cold_start.train(settings, [pair(1)], tmp_path / "run")
        assert json.loads((run / "adapter/adapter_config.json").read_text()) == {"r": rank}
    with pytest.raises(ValueError, match="neither an adapter nor steps"):
        cold_start.train(params.load(ROOT / "params.yaml", "smoke", ["cold_start.adapter=null", "cold_start.steps=0"]), [pair(1)], tmp_path / "none")
