"""What bench/gpu.py and bench/gpu_check.py share: random models, one group of rollouts as trl's batch, trainers, timing, the file.

Nothing here needs a hub: weights are random, the tokenizer has one token for each byte."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ALONE = ("unsloth", "vllm", "four_bits")  # Unsloth replaces the attention of a model's class, vLLM keeps its memory: a process of their own
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "unsloth", "bitsandbytes", "vllm", "triton")
SIZES = {
    "7b": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    "8b": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    "1.5b": {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
    "tiny": {"vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "initializer_range": 0.1},
}  # fmt: skip


def setting(cuda: bool):
    """P prompt tokens, N completions of C tokens; rollouts of `tokens`, so that eight of them one by one fit into the ten minutes."""
    if cuda:
        return SimpleNamespace(size="7b", P=2500, C=600, N=8, rank=32, tokens=128, repeats=5, steps=3, budget=32768, matmul=8192)
    return SimpleNamespace(size="tiny", P=48, C=12, N=4, rank=4, tokens=6, repeats=2, steps=1, budget=4096, matmul=256)


def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build(size: str, dtype, rank: int, checkpointing: bool = False, where: str | None = None, seed: int = 0):
    """A random Qwen2 of that size with LoRA on all linear layers, its B matrices not zero, so that every gradient is not either;
    without PEFT the model alone, for what trains nothing."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rmnlhf.policy import ALL

    config = Qwen2Config(**SIZES[size], rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(seed)
    with torch.device(where or device()):
        base = Qwen2ForCausalLM(config).to(dtype) if size == "tiny" else _settled(Qwen2ForCausalLM._from_config(config, dtype=dtype))
        if not importlib.util.find_spec("peft"):
            return base.eval()
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ALL, task_type="CAUSAL_LM"))
        disturb(model, 0.02)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def _settled(model):
    """Random weights of a deep model, scaled as GPT-2's are at their start: else each layer outweighs all before it, which no trained
    model does, and rounding alone turns the output into another one."""
    model.get_input_embeddings().weight.data /= model.config.initializer_range
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data *= (2 * model.config.num_hidden_layers) ** -0.5
    return model


def disturb(model, scale: float):
    """Add noise to the adapter's B matrices: a training step's stand-in."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight) * scale


def tokenizer():
    """One token for each byte: needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {t: i for i, t in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    return out


def batch(s, where: str, equal: bool = True) -> dict:
    """What trl's trainer makes of one group of N rollouts: `equal` lengths C, or falling ones, padded on the right."""
    import torch

    g = torch.Generator().manual_seed(1)
    high = SIZES[s.size]["vocab_size"]
    prompt = torch.randint(3, high, (1, s.P), generator=g).expand(s.N, -1)
    lengths = torch.tensor([s.C if equal else s.C - k * (s.C // (2 * s.N)) for k in range(s.N)])
    mask = (torch.arange(s.C)[None] < lengths[:, None]).long()
    out = {
        "prompt_ids": prompt, "prompt_mask": torch.ones_like(prompt), "completion_mask": mask,
        "completion_ids": torch.randint(3, high, (s.N, s.C), generator=g) * mask,
        "advantages": torch.linspace(-1.5, 1.4, s.N), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return {k: v.to(where) for k, v in out.items()}


def trainer(model, s, packed: bool | None, folder: str):
    """Our trainer (None: padded, as models that `shared_prefix.prepare` refuses are trained), or trl's own as a user would write it
    (False; bf16 weights under autocast, trl's default); both take the batch that they are given in `training_step`."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rmnlhf import grpo

    base = model.get_base_model() if hasattr(model, "peft_config") else model
    args = GRPOConfig(
        output_dir=folder, per_device_train_batch_size=s.N, num_generations=s.N, max_completion_length=s.C, steps_per_generation=1, beta=0.0,
        loss_type="dapo", bf16=packed is False and base.dtype == torch.bfloat16, use_cpu=model.device.type == "cpu", report_to=[],
        gradient_checkpointing=False, temperature=1.0,
    )  # fmt: skip
    data, tok = Dataset.from_list([{"prompt": "x"}] * s.N), tokenizer()
    if packed is not False:
        params = SimpleNamespace(
            grpo=SimpleNamespace(shared_prefix=bool(packed), token_budget=s.budget), policy=SimpleNamespace(max_prompt=s.P, max_completion=s.C)
        )
        out = grpo.Trainer(model, _no_reward, args, data, processing_class=tok, encoded={}, engine=None, run=folder, params=params, beta=0.0, seed=0)
        if packed and not out.packed:
            raise RuntimeError("shared_prefix.prepare refused this model: see the warning above")
    else:
        base.set_attn_implementation("sdpa")
        out = GRPOTrainer(model, _no_reward, args, data, processing_class=tok)
        if args.bf16:  # `train` would wrap the model's forward, for good: ours runs on the same one
            out.compute_loss_context_manager = out.accelerator.autocast
    out._prepare_inputs = lambda inputs: inputs
    out.current_gradient_accumulation_steps = 1
    return out


def _no_reward(completions, **columns):
    return [0.0] * len(completions)


def drawing(engine: str, model, s, params=None):
    """A call that makes N completions of C tokens of one prompt: by our engine "transformers" or "vllm" (which reads `params`), with
    the model's weights handed over first, or by Transformers' own `generate`, as plain trl does."""
    import torch

    from rmnlhf import rollout

    prompt = batch(s, model.device)["prompt_ids"][:1]
    if engine in ("transformers", "vllm"):
        made = rollout.engine(model, tokenizer(), params) if engine == "vllm" else rollout.TransformersEngine(model, tokenizer())

        def draw():
            made.sync(model)
            return made.generate([prompt[0].tolist()], s.N, s.C, 1.0, 1.0, 0, 64)
    else:

        def draw():
            with torch.no_grad():
                model.eval()
                return model.generate(
                    input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=1.0, max_new_tokens=s.C,
                    min_new_tokens=s.C, num_return_sequences=s.N, pad_token_id=0, use_cache=True,
                )  # fmt: skip

    return draw


def gradient(train, inputs) -> dict:
    """{name: gradient} of one training step."""
    train.model.zero_grad(set_to_none=True)
    train.training_step(train.model, dict(inputs), None)
    return {n: w.grad.detach().float().cpu() for n, w in train.model.named_parameters() if w.grad is not None}


def apart(one: dict, other: dict) -> float:
    """|one - other| / |one| over all gradients; the same names on both sides, or an error."""
    if one.keys() != other.keys() or not one:
        raise RuntimeError(f"gradients of different weights: {sorted(one.keys() ^ other.keys())[:3]}")
    return (sum((one[n] - other[n]).square().sum() for n in one).sqrt() / sum(g.square().sum() for g in one.values()).sqrt()).item()


def spread(values) -> dict:
    return {"median": round(median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3), "n": len(values)}


def timed(call, repeats: int) -> dict:
    """Seconds of `call` (median and all), after one call that is not counted, and the peak of device memory in GiB."""
    import torch

    cuda, seconds = torch.cuda.is_available(), []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"seconds": median(seconds[1:]), "all": [round(x, 4) for x in seconds[1:]], "peak_gib": peak}


def update(train, inputs, repeats: int) -> dict:
    def step():
        train.model.zero_grad(set_to_none=True)
        train.training_step(train.model, dict(inputs), None)

    return timed(step, repeats)


def useful_flop(model, s, prompts: int = 1) -> float:
    """4 × parameters × tokens of a LoRA update (forward 2, backward 2; frozen weights need no gradient). A shared prompt counts
    once, the input embedding not at all, the head at the completions alone; recomputation is not useful."""
    base = model.get_base_model()
    head, embedding = base.get_output_embeddings().weight.numel(), base.get_input_embeddings().weight.numel()
    body = sum(w.numel() for n, w in base.named_parameters() if "lora_" not in n) - head - embedding
    return 4.0 * prompts * (body * (s.P + s.N * s.C) + head * s.N * s.C)


def memory(size: str, params, card: float) -> dict:
    """GB (10^9 bytes) on a card of `card` GB, for one process that trains arm `online`: README's formula (section GPU), nothing measured.

    size: a key of SIZES, whose embeddings and head are not tied; LoRA on all linear layers"""
    from rmnlhf.shared_prefix import ELEMENTS

    shape, p, g = SIZES[size], params.policy, params.grpo
    v, h, m, layers = (shape[k] for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"))
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linear = [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]
    body, lora = layers * sum(a * b for a, b in linear), p.rank * layers * sum(a + b for a, b in linear)
    pack = max(g.token_budget, p.max_prompt + p.max_completion)
    said = pack - p.max_prompt * max(1, pack / (p.max_prompt + g.group * p.max_completion))  # completion tokens: all at their longest
    cached = params.rollout.batch * (p.max_prompt / g.group + p.max_completion)
    gb = {
        "weights": (33 / 64 if p.load_in_4bit else 2) * body + 2 * 2 * v * h, "adapter": 16 * lora, "activations": 2 * layers * h * pack,
        "logits": 10 * ELEMENTS[1] + 2 * h * said, "rollouts": 2 * 2 * layers * kv * cached if p.load_in_4bit else params.rollout.gpu_memory * card * 1e9,
        "metarm": 2 * 2 * (body + v * h) + (16 + 4) * lora if params.metarm.base == "policy" else 2 * 4 * 22.7e6,
    }  # fmt: skip
    total = gb["weights"] + gb["adapter"] + gb["metarm"] + max(gb["rollouts"], gb["activations"] + gb["logits"])
    return {k: x / 1e9 for k, x in (gb | {"total": total}).items()}


def machine(s) -> dict:
    """Rates of this machine that shares are of: a bf16 matrix product, a copy (bytes read and written)."""
    import torch

    where, n = device(), s.matmul
    a, b = (torch.randn(n, n, device=where, dtype=torch.bfloat16) for _ in "ab")
    product = timed(lambda: [a @ b for _ in range(10)], s.repeats)["seconds"] / 10
    wide = torch.empty(n * n * 8, device=where, dtype=torch.bfloat16)
    other = torch.empty_like(wide)
    moved = timed(lambda: other.copy_(wide), s.repeats)["seconds"]
    return {"matmul_tflops": 2 * n**3 / product / 1e12, "copy_gbs": 2 * wide.nbytes / moved / 1e9}


def logprob_difference(model, prompt, completions) -> float:
    """Mean absolute difference of an engine's log-probabilities and those of the model's plain forward, at temperature 1."""
    import torch

    off = []
    with torch.no_grad():
        for c in completions:
            ids = torch.tensor([[*prompt, *c.ids]], device=model.device)
            logits = model(ids, use_cache=False, logits_to_keep=len(c.ids) + 1).logits[0, :-1].float()
            off += (logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0].cpu() - torch.tensor(c.logprobs)).abs().tolist()
    return sum(off) / len(off)


def saved(folder: str, dtype=None):
    """The tiny model (no adapter) and its tokenizer as a folder that engines load."""
    import torch

    model = build("tiny", dtype or torch.float32, 4, where="cpu").merge_and_unload()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def small_params(folder: str, **overrides):
    from rmnlhf import params

    base = {
        "policy.model": folder, "policy.revision": "null", "policy.backend": "transformers", "policy.dtype": "float32", "policy.rank": 4, "grm.think": "false",
        "policy.alpha": 8, "policy.max_prompt": 2048, "policy.max_completion": 16, "cold_start.enabled": "false", "metarm.batch": 4, "metarm.replay": 16,
        "similarity.backend": "offline", "metarm.max_length": 512, "grpo.steps": 3, "grpo.prompts": 2, "grpo.group": 4, "grpo.save_every": 1,
        "grpo.token_budget": 8192, "rollout.engine": "transformers", "rollout.temperature": 1.0,
    } | overrides  # fmt: skip
    if base["policy.backend"] == "unsloth":
        base |= {"metarm.base": "minilm", "metarm.tune": "head", "rollout.engine": "auto"}
    return params.load(ROOT / "params.yaml", "gpu", [f"{k}={v}" for k, v in base.items()])


def attempt(part, s) -> dict:
    """The part's figures, or what is missing or failed; its seconds in any case."""
    import torch

    start = time.perf_counter()
    try:
        if part.__name__ in ALONE and device() == "cpu":
            out = {"skipped": "no CUDA device"}
        else:
            out = part(s)
    except ImportError as e:
        out = {"missing": e.name.split(".")[0] if e.name else str(e)}
    except Exception as e:  # noqa: BLE001  # a part that breaks must not take the others with it
        out = {"failed": f"{type(e).__name__}: {str(e)[:400]}"}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return out | {"part_seconds": round(time.perf_counter() - start, 2)}


def header() -> dict:
    import torch

    cuda, versions = torch.cuda.is_available(), {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"cuda": cuda, "card": torch.cuda.get_device_name() if cuda else None, "memory_gib": memory, "versions": versions, "date": today}


def report(name: str, found: dict):
    """One JSON line; on CUDA also a file."""
    if found["cuda"]:
        folder = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.part").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(folder / f"{name}.part", folder / name)
    print(json.dumps(found))


def alone(script: str, *options: str, seconds: float = 540) -> dict:
    """The JSON line of a process of its own, or how it ended; after `seconds` it is stopped."""
    try:
        done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as e:
        return {"failed": f"not done after {seconds} s: {(e.stderr or b'')[-300:].decode(errors='replace')}"}
    lines = [x for x in done.stdout.splitlines() if x.startswith("{")]
    return json.loads(lines[-1]) if lines else {"failed": f"exit {done.returncode}: {done.stderr[-300:]}"}
