import json
import re
from pathlib import Path

import pytest
import torch

from rmnlhf import ROOT, params, policy


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
