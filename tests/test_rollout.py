"""Rollouts: what is drawn, its log-probabilities, and that neither batch, order nor early stops change it (fp32)."""

import sys
import types

import pytest
import tiny
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, MptConfig, MptForCausalLM

from rmnlhf import policy, rollout
from rmnlhf.benchmarks import runner


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval()


PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13], list(range(20, 60)), [5, 6, 7, 8, 9]]


def draw(model, tokenizer, prompts=PROMPTS, n=3, tokens=12, **options):
    options = {"temperature": 0.9, "seed": 1, "dtype": torch.float32} | options
    return rollout.generate(model, tokenizer, prompts, n, tokens, **options)


def plain(model, prompt, ids, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def ending():
    """A model whose end token (2) comes often, so that rows finish at different times."""
    model = tiny.model().eval()
    head = torch.nn.Linear(32, 49152)
    head.weight.data = model.lm_head.weight.data.clone()
    head.bias.data.zero_()
    head.bias.data[2] = 8.0
    model.lm_head = head
    return model


@pytest.mark.parametrize("batch", [1, 3, 6, 64])
def test_batch_size_and_early_stops_change_nothing(tokenizer, batch):
    model = ending()
    reference = draw(model, tokenizer, tokens=20, batch=64)
    lengths = {len(c.ids) for g in reference for c in g}
    assert len(lengths) > 3 and {c.finished for g in reference for c in g} == {True, False}
    got = draw(model, tokenizer, tokens=20, batch=batch)
    assert [[c.ids for c in g] for g in got] == [[c.ids for c in g] for g in reference]
    for g, h in zip(got, reference):
        for c, d in zip(g, h):
            torch.testing.assert_close(torch.tensor(c.logprobs), torch.tensor(d.logprobs), atol=1e-4, rtol=1e-4)


def test_whole_blocks_read_under_a_mask_change_nothing(tokenizer, monkeypatch):
    """What a recorded step on a GPU reads; new blocks come at tokens 4, 8, …"""
    monkeypatch.setattr(rollout._Shared, "BLOCK", (32, 4))
    model, made = ending(), []
    for graphs in (False, True):
        engine = rollout.TransformersEngine(model, tokenizer, torch.float32)
        engine.graphs = graphs
        made.append([c for g in engine.generate(PROMPTS, 3, 20, 0.9, seed=1) for c in g])
    assert [c.ids for c in made[0]] == [c.ids for c in made[1]] and max(len(c.ids) for c in made[0]) > 8
    for one, other in zip(*made):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


def test_prompts_encoded_in_one_pass_are_those_encoded_alone(model, tokenizer):
    assert rollout._alike([8, 7, 6]) == [[0, 1, 2]] and rollout._alike([8, 5, 4]) == [[0], [1, 2]]
    assert rollout._alike([8, 8], tokens=15) == [[0], [1]]
    prompts = [list(range(20, 28)), list(range(40, 47)), list(range(60, 66))]  # padded to one length
    for prompt, group in zip(prompts, draw(model, tokenizer, prompts, batch=64)):
        (alone,) = draw(model, tokenizer, [prompt], batch=64)
        assert [c.ids for c in group] == [c.ids for c in alone]
        for c, d in zip(group, alone):
            torch.testing.assert_close(torch.tensor(c.logprobs), torch.tensor(d.logprobs), atol=1e-4, rtol=1e-4)


def test_order_of_prompts_changes_nothing(model, tokenizer):
    one = draw(model, tokenizer, PROMPTS[:3])
    other = draw(model, tokenizer, PROMPTS[:3][::-1])[::-1]
    assert [[c.ids for c in g] for g in one] == [[c.ids for c in g] for g in other]


def test_a_repeated_prompt_draws_anew_and_a_seed_decides(model, tokenizer):
    out = draw(model, tokenizer)
    assert [c.ids for c in out[0]] != [c.ids for c in out[3]]
    assert len({tuple(c.ids) for c in out[0]}) == 3
    assert [c.ids for c in draw(model, tokenizer)[1]] == [c.ids for c in out[1]]
    assert [c.ids for c in draw(model, tokenizer, seed=2)[1]] != [c.ids for c in out[1]]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_logprobs_are_those_of_the_scaled_distribution(tokenizer, temperature):
    model = ending()
    for prompt, group in zip(PROMPTS, draw(model, tokenizer, temperature=temperature)):
        for c in group:
            wanted = plain(model, prompt, c.ids, temperature).float()
            torch.testing.assert_close(torch.tensor(c.logprobs), wanted, atol=1e-4, rtol=1e-4)
            assert c.finished == (c.ids[-1] == 2) and 2 not in c.ids[:-1]


def test_greedy_is_the_argmax_at_each_place(model, tokenizer):
    for prompt, (c,) in zip(PROMPTS, draw(model, tokenizer, n=1, temperature=0.0)):
        with torch.no_grad():
            best = model(torch.tensor([prompt + c.ids])).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert best.tolist() == c.ids
        torch.testing.assert_close(torch.tensor(c.logprobs), plain(model, prompt, c.ids, 1.0).float(), atol=1e-4, rtol=1e-4)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).repeat(20000, 1)
    uniform = torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    token, lp = rollout._sample(logits, uniform, 0.7, 1.0)
    wanted = (logits[0] / 0.7).softmax(-1)
    torch.testing.assert_close(torch.bincount(token, minlength=4) / 20000, wanted, atol=0.01, rtol=0)
    torch.testing.assert_close(lp, wanted.log()[token])
    token, _ = rollout._sample(logits, uniform, 0.7, 0.9)  # the two likeliest hold 0.95: the others are never drawn
    assert set(token.tolist()) == {1, 2}


def test_an_adapter_is_merged_and_followed(tokenizer):
    model = tiny.model(lora=True).eval()
    prompt = PROMPTS[2]
    before = draw(model, tokenizer, [prompt], n=2, temperature=1.0)[0]
    for c in before:
        torch.testing.assert_close(torch.tensor(c.logprobs), plain(model, prompt, c.ids, 1.0).float(), atol=1e-4, rtol=1e-4)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= -4
    after = draw(model, tokenizer, [prompt], n=2, temperature=1.0)[0]
    assert [c.logprobs for c in after] != [c.logprobs for c in before]
    for c in after:
        torch.testing.assert_close(torch.tensor(c.logprobs), plain(model, prompt, c.ids, 1.0).float(), atol=1e-4, rtol=1e-4)
    assert any("lora_" in n for n, _ in model.named_parameters())  # the policy itself stays as it was


def test_half_precision_stays_near_the_trainer(tokenizer):
    model = tiny.model(lora=True).eval()
    off = []
    for prompt, group in zip(PROMPTS, draw(model, tokenizer, n=8, dtype=torch.bfloat16, temperature=1.0)):
        off += [(plain(model, prompt, c.ids, 1.0) - torch.tensor(c.logprobs)).abs() for c in group]
    assert torch.cat(off).mean() < 0.06


def test_half_precision_knows_where_a_token_stands_in_a_long_prompt(tokenizer):
    """Rotary frequencies rounded to bf16 would be off by whole turns there."""
    model = tiny.model(hidden=128).eval()
    for name, weight in model.model.layers.named_parameters():
        if "norm" not in name:  # attention that is sure of a few tokens, on a stream that half precision does not scatter
            weight.data.mul_(0.8 if "q_proj" in name or "k_proj" in name else 0.2)
    prompt = torch.randint(3, 49152, (900,), generator=torch.Generator().manual_seed(0)).tolist()
    (group,) = draw(model, tokenizer, [prompt], n=8, dtype=torch.bfloat16, temperature=1.0)
    off = [(plain(model, prompt, c.ids, 1.0) - torch.tensor(c.logprobs)).abs() for c in group]
    assert torch.cat(off).mean() < 0.05


@pytest.mark.parametrize("fused", [("cpu",), ()])
def test_prompt_and_own_keys_share_one_softmax(monkeypatch, fused):
    monkeypatch.setattr(rollout, "FUSED", fused)
    torch.manual_seed(0)
    lengths, n, h, rep, d, own = [7, 4], 3, 2, 3, 8, 5
    kv = rollout._Shared(torch.tensor(lengths), n)
    kv.keep(torch.tensor([0, 1, 3, 4, 5]))  # one row is done: a slot is empty
    of = [0, 0, 1, 1, 1]
    prompts = [torch.randn(2, h, p, d) for p in lengths]  # keys, values
    mine = torch.randn(len(of), 2, h, own, d)
    kv.prompt = [[torch.zeros(2 * h, 7, d) for _ in "kv"]]
    for g, x in enumerate(prompts):
        for kept, y in zip(kv.prompt[0], x):
            kept[g * h : (g + 1) * h, : lengths[g]] = y
    junk = torch.full((len(of) * h, 3, d), 9.0)  # room for tokens to come
    kv.own, kv.tokens = [[torch.cat([mine[:, i].flatten(0, 1), junk], 1) for i in (0, 1)]], own - 1
    query = torch.randn(len(of), h * rep, 1, d)
    got = kv.attend(query, 0, 0.3)
    for r, g in enumerate(of):
        keys, values = (torch.cat([prompts[g][i], mine[r, i]], 1).repeat_interleave(rep, 0) for i in (0, 1))
        expected = (query[r] @ keys.transpose(1, 2) * 0.3).softmax(-1) @ values
        torch.testing.assert_close(got[r, 0], expected[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 instructions: weights are not laid out for them")
def test_weights_laid_out_for_the_matrix_unit_follow_the_adapter(tokenizer):
    model = tiny.model(lora=True)
    engine = rollout.TransformersEngine(model, tokenizer, torch.bfloat16)
    assert len(engine.packed) == sum(type(m) is torch.nn.Linear for m in tiny.model().modules())
    for scale in (0.0, 0.5):
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * scale
        engine.sync(model)
        for name, weight in policy.merged_weights(model, torch.bfloat16):
            if name in engine.packed:
                x = torch.randn(5, weight.shape[1]).bfloat16()
                torch.testing.assert_close(engine.packed[name](x), torch.nn.functional.linear(x, weight), atol=1e-6, rtol=0.01)


def test_a_draw_at_the_very_end_is_a_possible_token():
    logits = torch.tensor([[2.0, 1.0, -300.0, -300.0]])
    token, logprob = rollout._sample(logits, torch.tensor([1 - 1e-12], dtype=torch.float64), 1.0, 1.0)
    assert token.item() == 1 and logprob.item() == pytest.approx(logits.log_softmax(-1)[0, 1].item(), abs=1e-6)


def test_what_cannot_be_completed_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        draw(model, tokenizer, [[5], []])
    with pytest.raises(ValueError, match="prompt 0 has 1020 tokens.*context of 1024.*policy.max_prompt"):
        draw(model, tokenizer, [[5] * 1020])


def test_an_attention_that_decoding_does_not_know_is_refused(tokenizer):
    small = {"vocab_size": 49152, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    window = MistralForCausalLM(MistralConfig(**small, sliding_window=20)).eval()
    (group,) = draw(window, tokenizer, [[5, 6, 7]])
    assert len(group) == 3
    with pytest.raises(ValueError, match="prompt 1 has 9 tokens.*over the 20 .*rollout.engine: vllm"):
        draw(window, tokenizer, [[5, 6, 7], list(range(3, 12))])
    capped = Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, sliding_window=4096)).eval()
    with pytest.raises(RuntimeError, match="no capped scores.*rollout.engine: vllm"):
        draw(capped, tokenizer, [[5, 6, 7]])
    with pytest.raises(RuntimeError, match="MptForCausalLM has an attention of its own.*rollout.engine: vllm"):
        draw(MptForCausalLM(MptConfig(vocab_size=49152, d_model=32, n_heads=4, n_layers=2)).eval(), tokenizer, [[5, 6, 7]])


def test_out_of_memory_says_what_to_lower(model, tokenizer, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(rollout.TransformersEngine, "_decode", full)
    with pytest.raises(RuntimeError, match="lower rollout.batch .*policy.max_completion"):
        draw(model, tokenizer)


@pytest.fixture
def vllm(monkeypatch):
    """vLLM itself is not here: a stand-in records what it is handed."""
    seen = {"started": 0}

    class LLM:
        def __init__(self, **options):
            seen["options"] = options
            seen["started"] += 1

        def collective_rpc(self, call):
            call(types.SimpleNamespace(reload_weights=lambda weights_iterator: seen.update(weights=dict(weights_iterator))))

        def reset_prefix_cache(self):
            seen["reset"] = True

        def generate(self, prompts, sampling, use_tqdm):
            seen["prompts"], seen["sampling"] = prompts, sampling
            out = types.SimpleNamespace(token_ids=[7, 2], logprobs=[{7: types.SimpleNamespace(logprob=-0.5)}, {2: types.SimpleNamespace(logprob=-1.0)}],
                                        finish_reason="stop")  # fmt: skip
            return [types.SimpleNamespace(outputs=[out] * s["n"]) for _, s in zip(prompts, sampling, strict=True)]

    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **k: k, __spec__=True))
    monkeypatch.setattr(rollout, "_vllm", {})
    return seen


def test_vllm_is_chosen_by_name_and_takes_merged_weights(vllm, tokenizer):
    model = tiny.model(lora=True)
    engine = rollout.engine(model, tokenizer, tiny.settings(**{"rollout.engine": "vllm", "rollout.gpu_memory": 0.6, "benchmarks.max_prompt": 300}))
    merged = tiny.copy_merged(model)
    assert set(vllm["weights"]) == {n for n, _ in merged.named_parameters()} and vllm["reset"]
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(vllm["weights"][name].float(), weight, rtol=2**-7, atol=0)
    (group,) = engine.generate([[1, 2]], 2, 8, 0.7)
    assert [(c.ids, c.logprobs, c.finished) for c in group] == [([7, 2], [-0.5, -1.0], True)] * 2
    assert vllm["sampling"][0]["seed"] is None  # vLLM on a CPU knows none by request
    engine.cpu, engine.llm.sleep = False, lambda level: None
    engine.generate([[1, 2], [3], [1, 2]], 2, 8, 0.7, seed=5)
    seeds = [s["seed"] for s in vllm["sampling"]]
    woken = []
    engine.llm.wake_up = woken.append
    engine.generate([[3], [1, 2], [1, 2]], 2, 8, 0.7, seed=5)
    assert len(set(seeds)) == 3 and [s["seed"] for s in vllm["sampling"]] == [seeds[1], seeds[0], seeds[2]]  # a prompt's numbers are its own
    assert woken == [["weights", "kv_cache"]]
    engine.sync(model)
    assert woken[1:] == [["weights"]]  # merged copies need the room of its cache
    engine.generate([[3]], 2, 8, 0.7)
    assert woken[2:] == [["kv_cache"]]
    assert vllm["options"]["max_model_len"] == 308 and vllm["options"]["gpu_memory_utilization"] == 0.6
    assert rollout._longest(tiny.settings()) == 168  # without benchmarks of longer prompts


def test_one_vllm_serves_the_arms_of_a_process_and_no_second_base(vllm, tokenizer, monkeypatch, caplog):
    settings = tiny.settings(**{"rollout.engine": "vllm"})
    first, second = tiny.model(lora=True), tiny.model(lora=True, seed=1)
    assert rollout.engine(first, tokenizer, settings) is rollout.engine(second, tokenizer, settings) and vllm["started"] == 1
    for name, weight in tiny.copy_merged(second).named_parameters():
        torch.testing.assert_close(vllm["weights"][name].float(), weight, rtol=2**-7, atol=0)
    other = tiny.model()
    other.config._name_or_path = "another/base"
    with pytest.raises(RuntimeError, match="no second one for .'another/base'.*rollout.engine: transformers"):
        rollout.engine(other, tokenizer, settings)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    auto = tiny.settings(**{"rollout.engine": "auto"})
    assert isinstance(rollout.engine(first, tokenizer, auto), rollout.VllmEngine)
    assert isinstance(rollout.engine(other, tokenizer, auto), rollout.TransformersEngine) and "another/base" in caplog.text


def test_auto_in_one_of_several_processes_is_the_server_or_transformers(vllm, model, tokenizer, monkeypatch, caplog):
    """vLLM cannot run inside each of them: `make gpu LAUNCH=...` must not find that out after hours."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda **k: types.SimpleNamespace(num_processes=2))
    monkeypatch.delenv("RMNLHF_ROLLOUT_URL", raising=False)
    auto = tiny.settings(**{"rollout.engine": "auto"})
    assert rollout.chosen(model, auto) == "transformers" and "each of 2 processes" in caplog.text
    monkeypatch.setenv("RMNLHF_ROLLOUT_URL", "http://127.0.0.1:1")
    assert rollout.chosen(model, auto) == "server"
    monkeypatch.setattr(rollout, "engine", lambda *a: types.SimpleNamespace(generate="the server's"))
    assert runner._generate(model, tokenizer, auto) == "the server's", "benchmarks ask it too"


def test_weights_in_four_bits_are_not_given_to_vllm(vllm, model, tokenizer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(model, "is_quantized", True, raising=False)
    assert isinstance(rollout.engine(model, tokenizer, tiny.settings(**{"rollout.engine": "auto"})), rollout.TransformersEngine)
    with pytest.raises(ValueError, match="4 bits.*rollout.engine: transformers"):
        next(policy.merged_weights(model))
    with pytest.raises(ValueError, match="rollout.engine vllm serves no 4-bit weights.*policy.load_in_4bit=false"):
        tiny.settings(**{"profile": "gpu", "policy.max_completion": 256, "policy.load_in_4bit": "true", "rollout.engine": "vllm"})
    assert not vllm["started"]


def test_a_vllm_server_takes_merged_weights_and_gives_groups(monkeypatch, tokenizer):
    """trl's client is real, what it sends is recorded: no server is here."""
    from trl.generation import vllm_client

    seen = {}

    def post(self, url, json):
        seen["asked"] = json
        said = {"tokens": ["token_id:7", "token_id:2"], "token_logprobs": [-0.5, -1.0], "top_logprobs": [{"token_id:7": -0.5}, {"token_id:2": -1.0}]}
        return {"choices": [{"prompt_token_ids": p, "token_ids": [7, 2], "logprobs": said} for p in json["prompt"] for _ in range(json["n"])]}

    def start(self, base_url, connection_timeout):
        self.base_url, self.model = base_url, "policy"

    monkeypatch.setattr(vllm_client.VLLMClient, "__init__", start)
    monkeypatch.setattr(vllm_client.VLLMClient, "_post", post)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: seen.update(device=device))
    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", lambda self, metadata, named_params: seen.update(meta=metadata, weights=dict(named_params)))
    monkeypatch.setattr(vllm_client.VLLMClient, "reset_prefix_cache", lambda self: seen.update(reset=True))
    monkeypatch.setattr(rollout, "_vllm", {})
    model, settings = tiny.model(lora=True), tiny.settings(**{"rollout.engine": "server"})
    with pytest.raises(ValueError, match="RMNLHF_ROLLOUT_URL"):
        rollout.engine(model, tokenizer, settings)
    monkeypatch.setenv("RMNLHF_ROLLOUT_URL", "http://localhost:8000")
    engine = rollout.engine(model, tokenizer, settings)
    merged = tiny.copy_merged(model)
    assert {name for name, _, _ in seen["meta"]} == set(seen["weights"]) == {n for n, _ in merged.named_parameters()} and seen["reset"]
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(seen["weights"][name].float(), weight, rtol=2**-7, atol=0)
    groups = engine.generate([[1, 2], [3]], 2, 8, 0.7, 0.9, seed=5)
    assert [[(c.ids, c.logprobs) for c in g] for g in groups] == [[([7, 2], [-0.5, -1.0])] * 2] * 2
    assert {k: seen["asked"][k] for k in ("n", "max_tokens", "temperature", "top_p")} == {"n": 2, "max_tokens": 8, "temperature": 0.7, "top_p": 0.9}
    assert "seed" not in seen["asked"]  # one seed would give every prompt the same numbers
