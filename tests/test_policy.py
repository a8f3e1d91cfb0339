import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from tiny import pairs
from transformers import AutoModelForCausalLM

from rmnlhf import ROOT, params, policy, report, splits
from rmnlhf.benchmarks import runner


@pytest.fixture(scope="module")
def P():
    return params.load(ROOT / "params.yaml", "smoke", ["policy.rank=2", "policy.alpha=4", "policy.dtype=float32"])


@pytest.fixture(scope="module")
def ids():
    return torch.tensor([[1, 9690, 198, 2683, 359, 253, 4]])


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_packaged_weights_speak(P, ids):
    model, tokenizer = policy.load(P)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=False
    )
    out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    assert "Paris" in tokenizer.decode(out)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token_id != tokenizer.eos_token_id


def test_an_adapter_on_an_adapter_has_the_lower_one_as_reference(P, ids, tmp_path):
    model, _ = policy.load(P, trainable=True)
    base = logits(policy.load(P)[0], ids)
    assert torch.equal(logits(model, ids), base)  # a fresh LoRA changes nothing
    _disturb(model, 0)
    model.save_pretrained(tmp_path / "one")
    one = logits(model, ids)
    assert not torch.allclose(one, base, atol=1e-3)

    upper, _ = policy.load(P, adapter=tmp_path / "one", trainable=True)
    assert torch.allclose(logits(upper, ids), one, atol=1e-3)
    _disturb(upper, 1)
    with upper.disable_adapter():
        assert torch.allclose(logits(upper, ids), one, atol=1e-3)  # the reference is the lower policy, not the base
    upper.save_pretrained(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "one")
    again, _ = policy.load(P, adapter=tmp_path / "two")
    assert torch.allclose(logits(again, ids), logits(upper, ids), atol=1e-3)


def _disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.05


def test_an_export_is_the_same_model_by_itself_and_says_what_it_is(P, ids, tmp_path, monkeypatch):
    """Two adapters, one on the other, exported; then the folders that they came from are gone."""
    monkeypatch.chdir(tmp_path)
    names = [Path("results/runs") / run / "adapter" for run in ("cold_start", "online")]
    for seed, (name, below) in enumerate(zip(names, [None, *names])):
        model, _ = policy.load(P, below, trainable=True)
        _disturb(model, seed)
        model.save_pretrained(name)
    wanted = logits(policy.load(P, names[1])[0], ids)
    splits.save(splits.Splits(pairs(1), [], [], {}, {}, "controlled"), "results/splits")
    Path("results/metrics").mkdir()
    Path("results/metrics/06_grpo_online.json").write_text('{"online": {"core-F1": {"mean": 0.25, "low": 0.2, "high": 0.3, "n": 48}}}')
    sent = []
    hub = type("Hub", (), {"create_repo": lambda self, *a, **k: sent.append(a), "upload_folder": lambda self, **k: sent.append(k)})
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    out = policy.export(P, names[1], "out")
    assert not sent
    shutil.rmtree("results/runs")
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    assert torch.equal(logits(merged, ids), wanted)
    moved = shutil.move(out / "adapter", tmp_path / "elsewhere")
    assert torch.equal(logits(policy.load(P, moved)[0], ids), wanted)
    assert not torch.allclose(logits(policy.load(P, Path(moved) / "base")[0], ids), wanted, atol=1e-2)
    card = (out / "merged" / "README.md").read_text()
    assert card == (Path(moved) / "README.md").read_text() and yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "1. `adapter/base` (was `cold_start/adapter`)\n2. `adapter` (was `online/adapter`)" in card and str(tmp_path) not in card
    assert "`controlled`: Apache-2.0" in card and "| online.core-F1 | 0.250 [0.200, 0.300], n = 48 |" in card

    policy.export(P, moved, "again", push_to="someone/model")  # an exported adapter can be exported
    assert sent[0] == ("someone/model",) and {k["repo_id"] for k in sent[1:]} == {"someone/model"}
    root = next(k["folder_path"] for k in sent[1:] if not k.get("path_in_repo"))
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= {f.name for f in Path(root).iterdir()}


def test_a_small_adapter_is_not_lost_in_the_rounding_of_merged_weights():
    """Every change is a fraction of a bf16 step: rounded to the nearest number, hardly anything would be left of it."""
    model = tiny.model(lora=True).bfloat16()
    adapter = {n: w.data.float() for n, w in model.named_parameters() if "lora_" in n}
    for name, weight in model.named_parameters():
        if name in adapter:
            weight.data = adapter[name] * (0.002 if "lora_B" in name else 1.0)
    before = {n.replace(".base_layer.", "."): w.detach().clone() for n, w in model.get_base_model().named_parameters() if "lora_" not in n}
    exact = dict(policy.merged_weights(model, torch.float32))
    merged = dict(policy.merged_weights(model))
    assert merged.keys() == before.keys() and all(torch.equal(merged[n], w) for n, w in policy.merged_weights(model))  # the same at each call
    change, kept, nearest = (torch.cat([(w[n].float() - before[n].float()).flatten() for n in sorted(before)])
                             for w in (exact, merged, {n: w.bfloat16() for n, w in exact.items()}))  # fmt: skip
    assert change.any() and (nearest @ change) / (change @ change) < 0.5
    assert (kept @ change) / (change @ change) == pytest.approx(1, abs=0.2)
    assert not kept[change == 0].any()
    for name in before:  # one step up or down, no further
        assert (merged[name].float() - exact[name]).abs().max() <= 2**-7 * exact[name].abs().max()
    plain = policy._merge(model)
    assert not any("lora" in n for n, _ in plain.named_parameters())
    assert all(torch.equal(w, merged[n]) for n, w in plain.named_parameters())



def test_a_card_names_no_licence_that_it_does_not_know(P, tmp_path):
    other = P.model_copy(update={"policy": P.policy.model_copy(update={"model": "someone/model"})})
    card = report.model_card(other, "results/runs/online/adapter", tmp_path)
    assert yaml.safe_load(card.split("---")[1])["license"] == "other" and "`someone/model` is not known here" in card


def test_a_judge_from_a_hub_can_be_pinned(P, tmp_path, monkeypatch):
    monkeypatch.setattr(policy, "load", lambda settings, **kwargs: (settings.policy.model, settings.policy.revision))
    folder = tmp_path / "model@home"
    folder.mkdir()
    asked = {"someone/model@0123abc": ("someone/model", "0123abc"), "someone/model": ("someone/model", None), str(folder): (str(folder), None)}
    assert {name: runner.open_judge(name, P) for name in asked} == asked


def test_what_is_missing_is_named(P, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        policy.load(P, adapter=tmp_path)
    with pytest.raises(ValueError, match="smollm2-135m, minilm"):
        policy.prepare("gpt-9")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="policy.backend is unsloth"):
            policy.backend(params.load(ROOT / "params.yaml", overrides=["policy.backend=unsloth"]))


def test_minilm_folder_is_complete():
    assert (Path(policy.prepare("minilm")) / "config_sentence_transformers.json").exists()


def test_every_function_that_mkl_computes_is_called_once_by_one_thread():
    header = Path(torch.__file__).parent / "include" / "ATen" / "cpu" / "vml.h"
    names = re.findall(r"^IMPLEMENT_VML_MKL\((\w+), \w+\)", header.read_text(), re.M)
    assert "cos" in names and set(names) <= set(policy.ELEMENTWISE)
