"""Supervised start of a small policy: human critiques of the training split, in the judgement format (notebook 03).

A target is "Response A is better. <an annotator's reason>" and the choice: the verdict stands at one known token, which
carries more weight than the others, and the reason follows it. Pairs whose critiques are hidden give that token alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from . import grm, policy, shared_prefix
from .live import Live
from .pairs import OTHER, PreferencePair, fingerprint, write_jsonl

log = logging.getLogger(__name__)
WINDOW = 16  # batches that are sorted by length together
EVERY = 50  # steps from one held-out loss to the next


@dataclass(frozen=True)
class Example:
    """A prompt and the completions that share it: [(token ids, weight of each)]."""

    prompt: list[int]
    completions: list[tuple[list[int], list[float]]]


def lead(label: str) -> str:
    """The sentence that every target begins with."""
    return f"Response {label} is better. "


def example(pair: PreferencePair, swap: bool, tokenizer, params) -> Example:
    """Tokens and weights of one pair in one order; without critiques the target ends at the verdict's token."""
    c, shown = params.cold_start, pair.swapped() if swap else pair
    prompt = grm.encode_prompt(pair, tokenizer, params.policy.max_prompt, swap, params.grm.think)
    chosen = sorted(shown.agreeing, key=lambda h: fingerprint(pair.id, swap, h.annotator))[: c.critiques_per_pair]
    completions = []
    for critique in [" ".join(h.text.split()) for h in chosen] or [None]:
        said = (critique or "").removeprefix(lead(shown.label).strip())
        text = grm.format_judgement(lead(shown.label) + said, shown.label)
        enc = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        at = text.index(lead(shown.label).strip()) + len("Response ")
        side = next(i for i, (start, end) in enumerate(enc["offset_mapping"]) if start <= at < end)
        ids = enc["input_ids"] + [tokenizer.eos_token_id]
        if critique is None or len(ids) > params.policy.max_completion:  # a cut target would teach to stop before the choice
            ids = ids[: side + 1]
        weights = [1.0] * len(ids)
        weights[side] = c.verdict_weight
        completions.append((ids, weights))
    return Example(prompt, completions)


def loss(model, examples: list[Example], packs: bool = True) -> torch.Tensor:
    """Weighted mean cross-entropy of the targets; the completions of a pair count as one. packs: what `shared_prefix.prepare` said."""
    logps = _logps(model, [e.prompt for e in examples], [[ids for ids, _ in e.completions] for e in examples], packs)
    weights = torch.tensor([w / len(e.completions) for e in examples for _, ws in e.completions for w in ws], device=model.device)
    return -(logps.float() * weights).sum() / weights.sum()


def _logps(model, prompts, completions, packs: bool) -> torch.Tensor:
    if packs:
        return shared_prefix.logps(model, shared_prefix.pack(prompts, completions, model.device))[0]
    return shared_prefix.unpacked(model, prompts, completions)


@torch.no_grad()
def held_out_loss(model, tokenizer, pairs: list[PreferencePair], params) -> float:
    """`loss` over all targets of these pairs, each in one order (by hash)."""
    size = params.cold_start.batch_pairs
    asked = [example(p, bool(fingerprint("held out", p.id) % 2), tokenizer, params) for p in pairs]
    asked.sort(key=lambda e: len(e.prompt))
    total = weight = 0.0
    with _read_only(model) as packs:
        for part in (asked[i : i + size] for i in range(0, len(asked), size)):
            w = sum(w / len(e.completions) for e in part for _, ws in e.completions for w in ws)
            total, weight = total + loss(model, part, packs).item() * w, weight + w
    return total / weight


@contextmanager
def _read_only(model):
    """Packed forwards in evaluation mode (yields what `shared_prefix.prepare` says); mode and attention as before afterwards."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, training = base.config._attn_implementation, model.training
    try:
        packs = shared_prefix.prepare(model)
        model.eval()
        yield packs
    finally:
        model.train(training)
        base.set_attn_implementation(attention)


def order(pairs: list[PreferencePair], batch: int, seed: int) -> list[tuple[PreferencePair, bool]]:
    """Every pair in both orders, shuffled by hash, then sorted by length within windows of `WINDOW` batches."""
    shuffled = sorted(((p, s) for p in pairs for s in (False, True)), key=lambda x: fingerprint(seed, x[0].id, x[1]))
    out, size = [], batch * WINDOW
    for start in range(0, len(shuffled), size):
        window = sorted(shuffled[start : start + size], key=lambda x: len(x[0].response_a) + len(x[0].response_b))
        batches = [window[i : i + batch] for i in range(0, len(window), batch)]
        batches.sort(key=lambda b: fingerprint(seed, start, b[0][0].id, b[0][1]))
        out += [x for b in batches for x in b]
    return out


def training_pairs(splits, params, extra: dict[str, list[PreferencePair]] | None = None) -> list[PreferencePair]:
    """The pairs to learn from: the training split, hidden pairs for their verdicts, and `extra` sources in their shares.

    extra: {"controlled": pairs, "mr_ben": pairs}, cut to `cold_start.controlled_share` and `.mr_ben_share` of the whole."""
    c = params.cold_start
    pairs = splits.train + splits.hidden
    shares = {"controlled": c.controlled_share, "mr_ben": c.mr_ben_share}
    own = 1 - sum(shares.values())
    for name, share in shares.items():
        if share:
            wanted = int(len(pairs) * share / own) if own else len((extra or {})[name])
            pairs = pairs + sorted((extra or {})[name], key=lambda p: fingerprint(params.seed, p.id))[:wanted]
    return pairs if own else pairs[len(splits.train + splits.hidden) :]


def train(params, pairs: list[PreferencePair], out: str | Path = "results/runs/cold_start", held_out: list[PreferencePair] = ()) -> Path:
    """The run folder with the cold start's `adapter/`: `cold_start.adapter`, trained for `cold_start.steps` more steps.

    trl's SFTTrainer on packed rows; continues from its last whole checkpoint. metrics.jsonl, tensorboard/ and dvclive/ hold the
    training loss and the loss of `held_out`, measured at the start, each `EVERY` steps and at the end. Raises ValueError where no
    pair can be used."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import SFTConfig, SFTTrainer

    c, out = params.cold_start, Path(out)
    given = verify(c.adapter, held_out) if c.adapter else None
    said = [(p.id, p.response_a, p.response_b, p.label, *((c.annotator, c.label, c.text) for c in p.critiques)) for p in pairs]
    recipe = {"params": params.model_dump(include={"policy", "cold_start", "grm", "seed"}), "pairs": fingerprint(*said)}
    recipe["adapter"] = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(given.iterdir()) if f.is_file() and f.suffix != ".md"} if given else None
    done = out / "recipe.json"
    if done.exists() and json.loads(done.read_text()) == json.loads(json.dumps(recipe)):
        log.info("%s holds the cold start of these parameters already", out)
        return out
    _restart_if_changed(out, recipe)
    if not c.steps:
        if given is None:
            raise ValueError("cold_start has neither an adapter nor steps: set one, or cold_start.enabled to false")
        shutil.copytree(given, out / "adapter", dirs_exist_ok=True)
        _write(done, recipe)
        return out
    rows = order(pairs, c.batch_pairs, params.seed)
    if not rows:
        raise ValueError("the cold start has no training pair: see the counts of 00_data, data.max_chars and data.max_train")
    model, tokenizer = policy.load(params, given, trainable=True)
    model.print_trainable_parameters()
    packs = shared_prefix.prepare(model)

    def collate(features):
        return {"examples": [example(*rows[f["row"] % len(rows)], tokenizer, params) for f in features]}

    class PackedSFTTrainer(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss(self.accelerator.unwrap_model(model), inputs["examples"], packs)

        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    args = SFTConfig(
        output_dir=str(out / "checkpoints"), max_steps=c.steps, per_device_train_batch_size=c.batch_pairs, learning_rate=c.lr,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.05}, warmup_steps=min(20, c.steps // 5),
        weight_decay=0.0, max_grad_norm=1.0, bf16=False, use_cpu=not torch.cuda.is_available(), seed=params.seed, logging_steps=min(5, c.steps),
        save_steps=25, save_total_limit=2, report_to="none", remove_unused_columns=False, dataloader_num_workers=0,
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, disable_tqdm=False, gradient_checkpointing=False,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # one process, one card, whatever it sees
    trainer = PackedSFTTrainer(
        model, args, train_dataset=Dataset.from_dict({"row": range(c.steps * c.batch_pairs)}), data_collator=collate,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.add_callback(_record(out, lambda: held_out_loss(model, tokenizer, held_out, params), len(held_out)))
    trainer.train(resume_from_checkpoint=_last_checkpoint(Path(args.output_dir)))
    _write_adapter(model, out / "adapter")
    _write(done, recipe)
    return out


def _record(out: Path, measure, n: int):
    """Callback: the held-out loss of `n` pairs when it is due; metrics.jsonl, TensorBoard and DVCLive at each log.

    The rows are the trainer's history, which its checkpoints keep: a resumed run repeats none."""
    from transformers import TrainerCallback

    live = Live(out)
    names = {"loss": "loss", "learning_rate": "lr", "held_out_loss": "held_out_loss", "held_out_pairs": "held_out_pairs"}

    def row(logs):
        return {name: logs[key] if math.isfinite(logs[key]) else None for key, name in names.items() if key in logs}

    class Record(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                self.on_step_end(args, state, control)

        def on_step_end(self, args, state, control, **kwargs):
            if n and (state.global_step % EVERY == 0 or state.global_step == state.max_steps):
                found = {"held_out_loss": measure(), "held_out_pairs": n}
                state.log_history.append(found | {"step": state.global_step})
                self.on_log(args, state, control, found)

        def on_log(self, args, state, control, logs=None, **kwargs):
            write_jsonl(out / "metrics.jsonl", [{"step": r["step"], **row(r)} for r in state.log_history if row(r)])
            live.log(state.global_step, {k: v for k, v in row(logs).items() if k != "held_out_pairs"})

        def on_train_end(self, args, state, control, **kwargs):
            live.close()

    return Record()


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; what a kill left half-written is removed. transformers writes trainer_state.json last."""
    whole = None
    for path in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])):
        try:
            json.loads((path / "trainer_state.json").read_text())
            whole = str(path)
        except (FileNotFoundError, ValueError):
            log.warning("%s is half-written: removed", path)
            shutil.rmtree(path)
    return whole


def _restart_if_changed(out: Path, recipe: dict):
    """A run folder of other parameters is not continued."""
    started = out / "started.json"
    if started.exists() and json.loads(started.read_text()) != json.loads(json.dumps(recipe)):
        log.warning("%s was made with other parameters: starting anew", out)
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    _write(started, recipe)


def _write(path: Path, content: dict):
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def _write_adapter(model, folder: Path):
    """The adapter in bf16: half the size, and the policy's own precision."""
    state = {n: w for n, w in model.named_parameters() if w.requires_grad}
    for weight in state.values():
        weight.data = weight.data.to(torch.bfloat16)
    model.save_pretrained(folder)


def verify(folder: str | Path, held_out: list[PreferencePair] = ()) -> Path:
    """A shipped adapter's folder, after its files' checksums (SHA256SUMS) were compared, and its training groups (groups.txt: one
    hash a line) with those of `held_out`, which another `seed` draws.

    Raises FileNotFoundError or ValueError naming the file."""
    folder = Path(folder) if Path(folder).is_absolute() else policy.ROOT / folder
    sums = folder / "SHA256SUMS"
    if not (folder / "adapter_config.json").exists():
        raise FileNotFoundError(f"{folder} holds no adapter: correct cold_start.adapter, or set it to null to train one")
    for line in sums.read_text().splitlines() if sums.exists() else []:
        wanted, name = re.split(r"\s+", line.strip(), maxsplit=1)
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != wanted:
            raise ValueError(f"{folder / name}: sha256 differs from SHA256SUMS: fetch it again (git checkout -- {policy._relative(folder)})")
    known = set((folder / "groups.txt").read_text().split()) if (folder / "groups.txt").exists() else set()
    if seen := {p.group for p in held_out if f"{fingerprint('group', p.group):016x}" in known}:
        raise ValueError(
            f"{folder} was trained on {len(seen)} of the groups that this run holds out (such as {min(seen)!r}): every figure on unseen "
            "groups would be wrong. Use the seed that params.yaml came with (grpo.seeds are seeds of the training), or train a cold "
            "start of your own: cold_start.adapter: null, cold_start.steps: 400"
        )
    return folder


@torch.no_grad()
def margins(model, tokenizer, pairs: list[PreferencePair], params) -> np.ndarray:
    """log p("A") − log p("B") at the verdict's token, (pairs, 2): shown as stored, and swapped. No sampling."""
    sides = [tokenizer.encode(f" {side}", add_special_tokens=False) for side in OTHER]
    asked = [example(replace(p, critiques=[]), swap, tokenizer, params) for p in pairs for swap in (False, True)]
    asked = [(e.prompt, [e.completions[0][0][:-1] + side for side in sides]) for e in asked]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i][0]))  # alike lengths together
    out = np.zeros(len(asked))
    with _read_only(model) as packs:
        for start in tqdm(range(0, len(order), 8), desc="verdict margins", disable=len(pairs) < 32):
            part = order[start : start + 8]
            found = _logps(model, [asked[i][0] for i in part], [asked[i][1] for i in part], packs).float()
            last = np.cumsum([len(c) for i in part for c in asked[i][1]]) - 1  # the verdict's token
            a, b = found[last].reshape(-1, 2).T.cpu().numpy()
            out[part] = a - b
    return out.reshape(-1, 2)
