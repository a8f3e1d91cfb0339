"""What can be wrong on a GPU alone. `make gpu-check` measures; these tests hold. Not run where there is no CUDA device."""

import copy
import importlib.util
import os
import subprocess
import sys

import pytest
import tiny
import torch

from rmnlhf import grpo, policy, rollout, shared_prefix
from rmnlhf.pairs import read_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPTS = [list(range(100, 250)), [200, 201, 202]]
MEMBERS = [[[5] * 40, [6, 7, 8], []], [[9] * 130]]


@pytest.fixture(autouse=True)
def exact():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on(device):
    model = tiny.model(lora=True, hidden=128).to(device)
    assert shared_prefix.prepare(model)
    return model


def test_flex_attention_gives_the_gradient_of_the_cpu():
    found = []
    for device in ("cpu", "cuda"):
        model = on(device)
        assert (model.get_base_model().config._attn_implementation == "flex_attention") == (device == "cuda")
        logps, _ = shared_prefix.logps(model, shared_prefix.pack(PROMPTS, MEMBERS, device))
        (logps * torch.linspace(-1, 1, len(logps), device=device)).sum().backward()
        found.append((logps.detach().cpu(), torch.cat([w.grad.cpu().flatten() for w in model.parameters() if w.grad is not None])))
    (logps, one), (other_logps, other) = found
    torch.testing.assert_close(logps, other_logps, atol=1e-4, rtol=1e-4)
    assert (one - other).norm() / one.norm() < 1e-4


def test_many_lengths_stay_right():
    """Each pack has its own length: a compiled attention that gives up after some of them must still be right."""
    model = on("cuda")
    with torch.no_grad():
        for n in range(3, 160, 11):
            got, _ = shared_prefix.logps(model, shared_prefix.pack([PROMPTS[0]], [[[5] * n, [6] * 7]], "cuda"))
            ids = torch.tensor([PROMPTS[0] + [5] * n], device="cuda")
            wanted = model(ids, use_cache=False).logits[0, len(PROMPTS[0]) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(PROMPTS[0]) :, None])[:, 0]
            torch.testing.assert_close(got[:n], wanted, atol=1e-3, rtol=1e-3)


def test_rollouts_are_those_of_the_cpu():
    tokenizer, model = tiny.tokenizer(), tiny.model(lora=True, hidden=128).eval()
    twin = copy.deepcopy(model).cuda()
    one, other = (rollout.generate(m, tokenizer, PROMPTS, 3, 12, 0.0, dtype=torch.float32) for m in (model, twin))
    assert [[c.ids for c in g] for g in one] == [[c.ids for c in g] for g in other]


def test_a_recorded_step_draws_what_a_plain_one_does(monkeypatch):
    monkeypatch.setattr(rollout._Shared, "BLOCK", (32, 4))  # recorded anew at every fourth token
    model, made = tiny.model(hidden=128).eval().cuda(), []
    for graphs in (False, True):
        engine = rollout.TransformersEngine(model, tiny.tokenizer())
        engine.graphs = graphs
        made.append([c.ids for g in engine.generate(PROMPTS, 3, 12, 0.9, seed=1) for c in g])
        assert engine.graphs == graphs  # it did not give up
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_the_engine_follows_the_policy(name, tmp_path):
    if name == "vllm":
        pytest.importorskip("vllm")
    tokenizer, base = tiny.tokenizer(), tiny.model(hidden=128)
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = tiny.settings(**{"rollout.engine": name, "policy.model": tmp_path, "policy.backend": "transformers"})
    model, _ = policy.load(settings, trainable=True)
    engine = rollout.engine(model, tokenizer, settings)
    for weight in (w for n, w in model.named_parameters() if "lora_B" in n):
        weight.data = torch.randn_like(weight) * 0.05
    engine.sync(model)
    (done,) = engine.generate([PROMPTS[0]], 8, 8, 1.0)
    assert shared_prefix.prepare(model)
    with torch.no_grad():
        wanted, _ = shared_prefix.logps(model, shared_prefix.pack([PROMPTS[0]], [[c.ids for c in done]], "cuda"))
    got = torch.tensor([x for c in done for x in c.logprobs], device="cuda")
    assert (got - wanted).abs().mean() < 0.06


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed")
def test_an_adapter_of_unsloth_is_loaded_without_it(tmp_path):
    tiny.model(hidden=128).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    settings = tiny.settings(**{"policy.model": tmp_path / "base", "policy.dtype": "float32"})
    # in a process of its own: Unsloth replaces the attention of the whole class, and no plain model of it runs there any more
    code = """if True:
        import sys, torch, tiny
        from rmnlhf import policy, rollout
        base, out = sys.argv[1:]
        model, tokenizer = policy.load(tiny.settings(**{"policy.model": base, "policy.backend": "unsloth", "policy.dtype": "float32", "rollout.engine": "auto"}), trainable=True)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data = torch.randn_like(weight) * 0.05
        model.save_pretrained(out)
        torch.save({n: w.cpu() for n, w in policy.merged_weights(model)}, out + "/merged.pt")
        try:
            rollout.TransformersEngine(policy.load(tiny.settings(**{"policy.model": base}))[0], tokenizer)
        except RuntimeError as e:
            print("refused:", e)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "base"), str(tmp_path / "adapter")], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "refused: what Unsloth has patched" in done.stdout
    loaded, merged = dict(policy.load(settings, adapter=tmp_path / "adapter")[0].named_parameters()), torch.load(tmp_path / "adapter" / "merged.pt")
    plain = tiny.model(hidden=128).state_dict()
    assert any((weight - plain[name]).abs().max() > 0.01 for name, weight in merged.items())  # there is something to load
    for name, weight in loaded.items():
        torch.testing.assert_close(weight.cpu(), merged[name], atol=1e-5, rtol=1e-5)


def test_a_run_trains_on_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo.grm, "parse_judgement", tiny.read_anything)
    monkeypatch.setattr(grpo.rewards, "process_rewards", tiny.compare_anything)
    run = tiny.train(tmp_path / "run", model_=tiny.model(lora=True, hidden=128).cuda())
    rows = list(read_rows(run / "metrics.jsonl"))
    assert [r["step"] for r in rows] == [1, 2, 3] and all(r["loss"] == r["loss"] for r in rows)
    assert grpo.checkpoints(run) and (run / "adapter" / "adapter_model.safetensors").exists()
