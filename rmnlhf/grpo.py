"""GRPO on trl's `GRPOTrainer`: the paper's settings, the arms, the shared-prefix update, resume.

Advantage (R - group mean)/(group std + 1e-6), clip 0.2, token mean, KL 0.001 (k3) in the loss, one update for each batch (strictly
on-policy: the old log-probabilities are the current ones, detached). trl's `loss_type="dapo"` is the token mean: the sum over
tokens divided by the tokens of the whole batch, whatever the micro-batches. The reference of the KL term is the policy with its
adapter switched off, that is the cold-start policy.

Arms: what pays beside format and verdict.
  outcome   nothing
  human     the process reward, from human critiques on all training pairs (the hidden ones too): the upper bound
  offline   the process reward where critiques are seen, a frozen MetaRM where they are hidden
  online    the same, MetaRM being updated at each step
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import shlex
import shutil
import subprocess
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from . import grm, judge, policy, rewards, rollout, shared_prefix
from .live import Live
from .pairs import PreferencePair, append_rows, code, fingerprint, read_rows, write_jsonl
from .params import ARMS, run_name

log = logging.getLogger(__name__)
EPSILON = 1e-6  # beside the group's standard deviation (paper; trl has 1e-4)
KEPT = 2  # checkpoints
PATIENCE = {  # what decides over memory, time and cost: a run goes on when it changes
    "grpo": {"seeds", "save_every", "token_budget"}, "rollout": {"batch", "gpu_memory"}, "policy": {"gradient_checkpointing"},
    "judge": {"cache", "timeout", "retries", "concurrency", "max_calls", "max_tokens", "price", "replay_only"},
}  # fmt: skip


def advantages(rewards_P_G: torch.Tensor) -> torch.Tensor:
    """(R - mean)/(std + 1e-6) in each row (group), std with N - 1 as in the paper's trainer; same shape.

    Zero, and so no gradient, where a reward is missing (NaN), where all rewards of the group are equal, and where fewer than
    two are known."""
    known = rewards_P_G.isfinite()
    r = rewards_P_G.double().where(known, 0.0)
    n = known.sum(-1, keepdim=True)
    mean = r.sum(-1, keepdim=True) / n.clamp(min=1)
    off = (r - mean).where(known, 0.0)
    std = (off.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return (off / (std + EPSILON)).where((n > 1) & (std > 1e-9), 0.0).to(rewards_P_G.dtype)


class RewardFunction:
    """Completions and their pairs → rewards, in the paper's order; the one reward function that trl calls.

    1 parse, 2 outcome and process reward where the pair has human critiques, 3 (online) MetaRM is updated on these rows, format
    errors left out and wrong verdicts kept, 4 MetaRM scores the rows without human critiques, 5 final rewards. Whether a row has
    a human critique is decided by the critique, never by a tag. A missing process reward gives None: the completion is masked.

    `rows` then holds one dict for each completion (the line of rollouts.jsonl), `figures` the step's means."""

    __name__ = "reward"

    def __init__(self, arm: str, params, pairs: list[PreferencePair], metarm=None, judge=None):
        if arm not in ARMS:
            raise ValueError(f"arm {arm!r}: allowed are {', '.join(ARMS)}")
        if arm in ("offline", "online") and metarm is None:
            raise ValueError(f"arm {arm!r} needs a MetaRM")
        self.arm, self.params, self.metarm, self.judge = arm, params, metarm, judge
        self.pairs = {p.id: p for p in pairs}
        self.shown = {p.id: (p, p.swapped()) for p in pairs}
        self.due = self.missing = 0  # process rewards so far
        self.rows: list[dict] = []
        self.figures: dict[str, float] = {}
        self.seconds: dict[str, float] = {}  # of the step, both within the trainer's "reward"

    def __call__(self, prompts, completions, pair_id, swap, completion_ids=None, trainer_state=None, **columns) -> list[float | None]:
        p = self.params
        step = trainer_state.global_step + 1 if trainer_state else 0
        shown = [self.shown[i][s] for i, s in zip(pair_id, swap, strict=True)]
        said = [grm.parse_judgement(c, p.grm.max_lines, p.grm.max_chars, p.grm.max_repeats) for c in completions]
        start = time.perf_counter()
        found = self._process(said, shown)
        self.seconds["process"] = time.perf_counter() - start
        process = [None if s is None else s.f1 for s in found]
        options = (p.reward.weight, p.reward.gated, p.reward.binary, p.similarity.threshold)
        base = [rewards.composite(j, x.label, f, *options) for j, x, f in zip(said, shown, process)]
        start = time.perf_counter()
        scores, loss = self._metarm(said, shown, pair_id, swap, process)
        self.seconds["metarm"] = time.perf_counter() - start
        options = (p.reward.weight, p.reward.bonus, p.reward.gated, p.metarm.target)
        final = [b if m is None else rewards.from_metarm(j, x.label, m, *options) for b, m, j, x in zip(base, scores, said, shown)]
        self.rows = [
            {
                "step": step, "pair_id": i, "source": x.source, "swap": bool(w), "text": c, "critique": j.critique, "verdict": j.verdict,
                "error": j.error, "label": x.label, "outcome": rewards.outcome(j, x.label), "process": _number(f),
                "metarm": _number(m), "reward": _number(r), "arguments": [_argument(a) for a in (s.generated if s else ())],
                "matches": [list(t) for t in (s.matches if s else ())],
                "reference": [_argument(a, True) for a in (s.reference if s else ())],
            }
            for i, w, c, j, x, s, f, m, r in zip(pair_id, swap, completions, said, shown, found, process, scores, final)
        ]  # fmt: skip
        self.rows = gather_object(self.rows)
        self._figures(loss)
        self._check()
        return [_number(r) for r in final]

    def _process(self, said, shown):
        """Similarity with the human critiques: None without one (or where the arm does not look); a format error has none either."""
        if self.arm == "outcome":
            return [None] * len(said)
        references = [x.agreeing if j.error is None else [] for j, x in zip(said, shown)]
        backend = self.params.similarity.backend
        return rewards.process_rewards([j.critique for j in said], references, backend=backend, judge=self.judge or judge.of(self.params))

    def _metarm(self, said, shown, pair_id, swap, process):
        scores, loss = [None] * len(said), None
        if self.metarm is None or self.arm not in ("offline", "online"):
            return scores, loss
        from . import metarm

        if self.arm == "online":
            targets = [metarm.target(j, x.label, f, self.params) for j, x, f in zip(said, shown, process)]
            known = [i for i, t in enumerate(targets) if t is not None]
            rows = [metarm.row(self.pairs[pair_id[i]], bool(swap[i]), said[i].critique, targets[i]) for i in known]
            loss = self.metarm.update(gather_object(rows))  # each process makes the same update: its MetaRM stays the others' twin
        ask = [i for i, (j, x) in enumerate(zip(said, shown)) if j.error is None and not x.agreeing]
        found = self.metarm.score([metarm.row(self.pairs[pair_id[i]], bool(swap[i]), said[i].critique) for i in ask])
        for i, m in zip(ask, found):
            scores[i] = float(m)
        return scores, loss

    def _figures(self, loss):
        def mean(values):
            values = [v for v in values if v is not None]
            return float(np.mean(values)) if values else None

        rows = self.rows
        due = [r for r in rows if self.arm != "outcome" and self.pairs[r["pair_id"]].agreeing and not r["error"]]
        missing = sum(r["process"] is None for r in due)
        self.due, self.missing = self.due + len(due), self.missing + missing
        self.figures = {
            "outcome": mean([r["outcome"] for r in rows]), "process": mean([r["process"] for r in rows]),
            "metarm": mean([r["metarm"] for r in rows]), "reward": mean([r["reward"] for r in rows]),
            "correct": mean([float(r["verdict"] == r["label"]) for r in rows]),
            "format_errors": mean([float(r["error"] is not None) for r in rows]),
            "right_process": mean(
                [float(r["process"] >= self.params.similarity.threshold) for r in rows if r["process"] is not None]
            ),
            "missing": missing, "masked": sum(r["reward"] is None for r in rows), "metarm_loss": _number(loss),
        }  # fmt: skip

    def _check(self):
        """Stop where more than reward.max_missing of the process rewards of the run so far are missing."""
        if self.due >= 16 and self.missing > self.params.reward.max_missing * self.due:
            seen = [math.nan] * self.missing + [0.0] * (self.due - self.missing)
            rewards.check_process_rows(list(self.pairs.values()), seen, self.params.reward.max_missing)

    def state_dict(self) -> dict:
        state = {"due": self.due, "missing": self.missing}
        return state | ({"metarm": self.metarm.state_dict()} if self.metarm is not None else {})

    def load_state_dict(self, state: dict):
        self.due, self.missing = state["due"], state["missing"]
        if self.metarm is not None:
            self.metarm.load_state_dict(state["metarm"])


def trimmed(part: dict) -> dict:
    """A part of a batch without the columns that are padding in all of its rows: prompts are padded on the left, completions on the right."""
    p, c = (max(1, int(part[k].sum(1).max())) for k in ("prompt_mask", "completion_mask"))
    width = part["completion_ids"].shape[1]
    cut = {k: v[:, -p:] for k, v in part.items() if k in ("prompt_ids", "prompt_mask")}
    return part | cut | {k: v[:, :c] for k, v in part.items() if k not in cut and torch.is_tensor(v) and v.ndim == 2 and v.shape[1] == width}


def _number(x) -> float | None:
    return None if x is None or not math.isfinite(x) else float(x)


def _argument(a, core: bool = False) -> dict:
    row = asdict(a)
    return {k: row[k] for k in ("text", "side", "polarity", *(["core"] if core else []))}


class Trainer(GRPOTrainer):
    """trl's trainer with our rollouts, the paper's advantage and the shared-prefix update.

    encoded: the prompt column's value → token ids. trl's own loss, clipping and metrics are used as they are: what differs is how
    per-token log-probabilities are computed and that a batch goes through in packs of at most `token_budget` tokens (a longer row is a pack of its own)."""

    record = None  # told of each step's figures

    def __init__(self, *args, encoded: dict[str, list[int]], engine, run: Path, params, beta: float, seed: int, cut=frozenset(), **kwargs):
        super().__init__(*args, **kwargs)
        self.cut = cut
        self.encoded, self.engine, self.run, self.params, self.run_seed = encoded, engine, Path(run), params, seed
        for weight in self.model.parameters():
            if weight.requires_grad and hasattr(self.model, "peft_config"):  # trl makes them bf16 beside 4-bit weights, where a small step rounds to none
                weight.data = weight.data.float()
        self.kl = beta  # the reference is the adapter switched off: trl, told of beta, would keep a second adapter for it
        self.packed = params.grpo.shared_prefix and shared_prefix.prepare(self.model)
        self.reward = self.reward_funcs[0]
        self.seconds: dict[str, float] = {}

    # --- rollouts and rewards
    def _tokenize_prompts(self, prompts):
        self._metrics["train"]["prompts_cut"].append(sum(p in self.cut for p in prompts) / len(prompts))
        return [self.encoded[p] for p in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        start = time.perf_counter()
        g, r = num_generations, self.params.rollout
        first = prompt_ids[::g]
        if any(prompt_ids[i] != first[i // g] for i in range(len(prompt_ids))):
            raise RuntimeError("completions of one prompt do not stand side by side: trl's sampler has changed")
        self.engine.sync(self.accelerator.unwrap_model(self.model))
        self.accelerator.wait_for_everyone()  # a server has the new weights before anyone asks it
        seed = fingerprint(self.run_seed, self.state.global_step) >> 2  # random numbers belong to a prompt: each process draws others
        done = self.engine.generate(first, g, self.max_completion_length, self.temperature, r.top_p, seed, r.batch)
        flat = [c for group in done for c in group]
        self.seconds["rollout"] = time.perf_counter() - start
        nan = torch.nan  # an empty completion; a server's log-probability that was not finite
        self.engine_logps = [torch.tensor([nan if x is None else x for x in c.logprobs] or [nan]) for c in flat]
        end = self._tokenizer.eos_token_id
        # an empty completion becomes its end token: something must carry its reward
        return [c.ids or [end] for c in flat], [c.logprobs or [0.0] for c in flat]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        start = time.perf_counter()
        self.rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.seconds["reward"] = time.perf_counter() - start
        return self.rewards_per_func

    def _generate_and_score_completions(self, inputs):
        out = super()._generate_and_score_completions(inputs)
        rewards_P_G = self.rewards_per_func[:, 0].view(-1, self.num_generations)
        advantages_P_G = advantages(rewards_P_G)
        mine = slice(self.accelerator.process_index * len(inputs), (self.accelerator.process_index + 1) * len(inputs))
        out["advantages"] = advantages_P_G.flatten()[mine]
        engine = torch.nn.utils.rnn.pad_sequence(self.engine_logps, batch_first=True, padding_value=torch.nan)
        out["engine_logps"] = engine.to(out["completion_mask"].device)
        out["order"] = torch.arange(len(inputs), device=out["completion_mask"].device)
        out["completion_mask"] = out["completion_mask"] * rewards_P_G.isfinite().flatten()[mine, None]  # no reward: no gradient
        degenerate = (advantages_P_G == 0).all(-1)
        self._metrics["train"]["degenerate_groups"].append(degenerate.float().mean().item())
        for row, a in zip(self.reward.rows, advantages_P_G.flatten().tolist(), strict=True):
            row["advantage"] = a
        return out

    def _prepare_inputs(self, generation_batch):
        """trl's, in the order in which the rows were generated: trl shuffles them, which would tear the groups apart."""
        inputs = super()._prepare_inputs(generation_batch)
        back = inputs["order"].argsort()
        return {k: v[back] if torch.is_tensor(v) and v.ndim and len(v) == len(back) else v for k, v in inputs.items() if k != "order"}

    # --- update
    def training_step(self, model, inputs, num_items_in_batch=None):
        """One batch: rollouts, rewards, then a backward pass for each pack. Groups without a signal are left out, so that they
        give no gradient (of the KL term neither) and cost nothing; the token mean still counts their tokens.

        Processes have different numbers of packs: each accumulates by itself, and the gradients are exchanged once, at the end."""
        model = self.accelerator.unwrap_model(model)
        model.train()
        inputs = self._prepare_inputs(inputs)
        start, total = time.perf_counter(), torch.zeros((), device=self.accelerator.device)
        self.engine_gap = []
        p, packs = self.params, self.packs(inputs)
        with policy.memory(
            f"in the GRPO update: lower grpo.token_budget (now {p.grpo.token_budget}), then policy.max_prompt ({p.policy.max_prompt}) or "
            f"policy.max_completion ({p.policy.max_completion}); policy.gradient_checkpointing trades a third more time for most of the memory"
        ):
            for rows in packs:
                part = {k: v[rows] if torch.is_tensor(v) and v.ndim and len(v) == len(inputs["advantages"]) else v for k, v in inputs.items()}
                loss = self.pack_loss(model, part if self.packed else trimmed(part))
                self.accelerator.backward(loss)
                total += loss.detach()
        if self.engine_gap:
            self._metrics["train"]["engine_gap"].append(torch.cat(self.engine_gap).mean().item())
        sizes = [int(inputs["completion_mask"][rows].sum()) for rows in packs]
        for name in ("kl", "entropy", "clip_ratio/region_mean"):  # trl takes the mean of packs, whatever they hold: here it is of tokens
            if sum(sizes) and (found := self._metrics["train"].get(name)):
                found[-len(sizes) :] = [float(np.average(found[-len(sizes) :], weights=sizes))]
        self._exchange(model)
        self.seconds["update"] = time.perf_counter() - start
        self._step += 1
        return total

    def _exchange(self, model):
        """Mean of the adapter's gradients over the processes: trl's token mean is scaled for that."""
        if self.accelerator.num_processes == 1:
            return
        weights = [w for w in model.parameters() if w.requires_grad]
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])
        for w, g in zip(weights, self.accelerator.reduce(flat, "mean").split([w.numel() for w in weights])):
            w.grad = g.view_as(w)

    def packs(self, inputs) -> list[torch.Tensor]:
        """Rows of each micro-batch, in order, up to grpo.token_budget: a group that is cut has its prompt in both; only rows with a gradient."""
        lengths = inputs["completion_mask"].sum(1).tolist()
        prompt = inputs["prompt_mask"].sum(1).tolist()
        of = torch.arange(len(lengths), device=inputs["advantages"].device) // self.num_generations
        live = torch.bincount(of, weights=(inputs["advantages"] != 0).double()) > 0
        kept = live[of] & (inputs["completion_mask"].sum(1) > 0)  # a reward at its group's mean still has a KL term
        packs, room, group = [], 0, None
        for i in kept.nonzero()[:, 0].tolist():
            if not self.packed:  # padded: each row is as wide as the longest completion beside it. One prompt: no padding on the left, which
                # Unsloth's kernels would attend to while they train
                rows = [*(packs[-1] if packs else ()), i]
                wide = (max(prompt[r] for r in rows) + max(lengths[r] for r in rows)) * len(rows)
                if not packs or wide > self.params.grpo.token_budget or i // self.num_generations != packs[-1][-1] // self.num_generations:
                    packs.append([])
                packs[-1].append(i)
                continue
            g = i // self.num_generations
            cost = lengths[i] + (prompt[i] if g != group else 0)
            if cost > room:
                packs.append([])
                room, cost = self.params.grpo.token_budget, lengths[i] + prompt[i]
            packs[-1].append(i)
            room, group = room - cost, g
        return [torch.tensor(rows, device=kept.device) for rows in packs]

    def pack_loss(self, model, part):
        """trl's loss of these rows, the reference's log-probabilities computed for them first."""
        self.beta = self.kl
        # trl exchanges the figures of each pack (KL, clip share): not every process has as many packs, so they stay this process's own
        self.accelerator.gather = self.accelerator.reduce = lambda found, *a, **k: found
        try:
            if self.kl:
                ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
                mask = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
                base = self.accelerator.unwrap_model(model)
                with torch.no_grad(), base.disable_adapter() if hasattr(base, "disable_adapter") else nullcontext():
                    part["ref_per_token_logps"] = self._get_per_token_logps_and_entropies(model, ids, mask, part["completion_ids"].shape[1])[0]
            loss = self._compute_loss(model, part)
            if "engine_logps" in part:  # the forward of the loss was the last one
                off = (self.logps - part["engine_logps"]).abs()[part["completion_mask"].bool()]
                self.engine_gap.append(off[off.isfinite()])
            return loss
        finally:
            self.beta = 0.0
            del self.accelerator.gather, self.accelerator.reduce

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """(B, T) log-probabilities and entropies, as trl's; rows that follow each other with one prompt share its encoding."""
        if not self.packed:
            with policy.mixed_precision(self.accelerator.unwrap_model(model)):
                found = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
            self.logps = found[0].detach()
            return found
        width = input_ids.shape[1] - logits_to_keep
        mask, prompts, members = attention_mask.bool(), [], []
        for ids, seen in zip(input_ids, mask):
            prompt, completion = ids[:width][seen[:width]].tolist(), ids[width:][seen[width:]].tolist()
            if not prompts or prompt != prompts[-1]:
                prompts.append(prompt)
                members.append([])
            members[-1].append(completion)
        p = shared_prefix.pack(prompts, members, input_ids.device)
        if not len(p.labels):
            self.logps = zero = input_ids.new_zeros(len(input_ids), logits_to_keep, dtype=torch.float32)
            return zero, zero, None
        found, entropy = shared_prefix.logps(model, p, self.temperature)
        table = found.new_zeros(len(input_ids), logits_to_keep)
        place = (p.row, p.column)  # completions are padded on the right
        logps = table.index_put(place, found)
        self.logps = logps.detach()
        return logps, table.index_put(place, entropy.to(table.dtype)), None

    # --- records and checkpoints
    def log(self, logs, start_time=None):
        super().log(logs, start_time)
        if "loss" not in logs:  # the summary at the end
            return
        if not self.accelerator.is_main_process:
            return
        step = self.state.global_step
        names = {
            "loss": "loss", "grad_norm": "grad_norm", "kl": "kl", "entropy": "entropy", "degenerate_groups": "degenerate_groups",
            "clip_ratio/region_mean": "clip_share", "completions/mean_length": "tokens", "completions/clipped_ratio": "cut_share",
            "prompts_cut": "prompts_cut",  # share of rollouts whose pair was over policy.max_prompt and lost its middle
            "engine_gap": "engine_gap",  # mean |log-probability at rollout - in the update|, nats
        }  # fmt: skip
        row = {"step": step} | {name: _number(logs.get(key)) for key, name in names.items()} | self.reward.figures
        append_rows(self.run / "metrics.jsonl", [row])
        append_rows(self.run / "rollouts.jsonl", [r | {"step": step} for r in self.reward.rows])
        append_rows(self.run / "timings.jsonl", [{"step": step} | {k: round(v, 3) for k, v in (self.seconds | self.reward.seconds).items()}])
        if self.record is not None:
            self.record.show(row)

    def _save_checkpoint(self, model, trial):
        """Written beside its place and renamed into it: a checkpoint that is there is whole."""
        name = f"checkpoint-{self.state.global_step}"
        folder, part = self.run / "checkpoints", self.run / "checkpoints" / f"{name}.part"
        if self.accelerator.is_main_process:
            shutil.rmtree(part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._get_output_dir = lambda trial: str(part)
        try:
            super(GRPOTrainer, self)._save_checkpoint(model, trial)
        finally:
            del self._get_output_dir
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            torch.save(self.reward.state_dict(), part / name / "reward.pt")
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(part / name, folder / name)
            shutil.rmtree(part)
            for old in checkpoints(self.run)[:-KEPT]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()


def checkpoints(run: str | Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    found = [p for p in (Path(run) / "checkpoints").glob("checkpoint-*") if p.suffix != ".part"]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


class _Record(TrainerCallback):
    """Progress bar, TensorBoard and DVCLive for each step; MetaRM's drift when it is due."""

    def __init__(self, run: Path, title: str, steps: int, drift=None):
        self.drift, self.trainer = drift, None
        self.bar = tqdm(total=steps, desc=title)
        self.live = Live(run, resume=False)
        for row in read_rows(run / "metrics.jsonl"):
            self.show(row)

    def show(self, row: dict):
        """The line of metrics.jsonl that was just written."""
        self.live.log(row["step"], {k: v for k, v in row.items() if k != "step"})
        self.bar.update(row["step"] - self.bar.n)
        self.bar.set_postfix({k: f"{row[k]:.3f}" for k in ("reward", "correct", "process") if row.get(k) is not None})

    def on_step_end(self, args, state, control, model=None, processing_class=None, **kwargs):
        if self.drift is not None and self.drift.due(state.global_step):
            self.drift.measure(state.global_step, model, processing_class, self.trainer.reward.metarm, self.trainer.engine)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.live.close()


def prompts(arm: str, params, splits, seed: int) -> tuple[list[PreferencePair], list[dict]]:
    """(pairs, rows): what an arm sees of the training pairs, and the steps · P prompts in their order, the same for every arm.

    Hidden pairs carry their critiques in arm `human` alone. The order comes from a hash; the right response is A in one row of
    every two (which, from a hash), so that a small step does not pay for a letter. Pairs repeat, in the other order, when all
    have been used."""
    hidden = splits.hidden
    if arm == "human":
        hidden = [replace(p, critiques=splits.hidden_truth.get(p.id, p.critiques)) for p in hidden]
    pairs = sorted([*splits.train, *hidden], key=lambda p: fingerprint(seed, "order", p.id))
    if not pairs:
        raise ValueError("the splits hold no training pair: run 00_data, or check data.critique_sources and data.max_chars")
    if arm != "outcome":
        rewards.check_process_rows(pairs)  # of all: a short run may draw none with a critique
    n = params.grpo.steps * params.grpo.prompts
    rows = []
    for i in range(n):
        turn, place = divmod(i, len(pairs))
        right = "AB"[(fingerprint(seed, "right", str(place // 2)) + place + turn) % 2]
        rows.append({"pair_id": pairs[place].id, "swap": int(pairs[place].label != right)})
    used = {r["pair_id"] for r in rows}
    drawn = [p for p in pairs if p.id in used]
    if arm != "outcome" and not any(p.agreeing for p in drawn):
        log.warning("arm %s: none of the %d pairs that this run draws has a human critique; grpo.steps × grpo.prompts is small", arm, len(drawn))
    return drawn, rows


def arguments(params, run: Path, seed: int) -> GRPOConfig:
    """trl's settings, each of the paper's set explicitly."""
    g, p = params.grpo, params.policy
    cuda = torch.cuda.is_available()
    world = PartialState(cpu=not cuda).num_processes
    if g.prompts % world:
        raise ValueError(f"grpo.prompts ({g.prompts}) must be a multiple of the number of processes ({world}): a group stays on one of them")
    config = GRPOConfig(
        output_dir=str(run), seed=seed, data_seed=seed, use_cpu=not cuda, bf16=False, report_to=[], logging_steps=1, log_level="warning",
        disable_tqdm=True, save_strategy="steps", save_steps=g.save_every, max_steps=g.steps,
        per_device_train_batch_size=g.prompts * max(g.group, 2) // world, gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
        num_generations=max(g.group, 2), max_completion_length=p.max_completion, temperature=params.rollout.temperature,
        top_p=params.rollout.top_p, shuffle_dataset=False, remove_unused_columns=False, dataloader_pin_memory=cuda,
        learning_rate=g.lr, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, optim="adamw_torch", max_grad_norm=g.max_grad_norm,
        loss_type="dapo", epsilon=g.epsilon, beta=0.0, scale_rewards="group", importance_sampling_level="token",
        mask_truncated_completions=False, gradient_checkpointing=False,
    )  # fmt: skip
    # trl refuses groups of one; here they are degenerate groups like others. Gradient checkpointing is switched on by `policy`
    config.num_generations = g.group
    config.per_device_train_batch_size, config.generation_batch_size = g.prompts * g.group // world, g.prompts * g.group
    config._n_gpu = min(config.n_gpu, 1)  # else one process takes every card that it sees, each with as many prompts
    return config


def train(arm: str, params, seed: int | None = None, splits=None, metarm=None, model=None, run: str | Path | None = None, judge=None) -> Path:
    """Train one arm; returns its run folder, results/runs/<arm> (or <arm>-<seed> for a seed other than the first).

    The folder holds adapter/, metrics.jsonl, rollouts.jsonl, timings.jsonl, config.yaml, checkpoints/ and, for arm `online`,
    metarm/ and drift.jsonl. A finished run with the same settings is returned as it is; an interrupted one goes on from its last
    checkpoint to the same losses, rewards and weights; one with other settings is put aside.

    splits: results/splits by default. metarm: an object with update, score and state; by default the cold-start MetaRM of
    results/runs/metarm. model: (model, tokenizer) instead of the cold-start policy."""
    from datasets import Dataset

    from . import splits as splits_
    from .benchmarks import runner

    state = PartialState(cpu=not torch.cuda.is_available())  # first: it gives this process its device
    seed = params.grpo.seeds[0] if seed is None else seed
    run = Path(run or Path("results/runs") / run_name(arm, seed, params))
    if os.environ.get("RMNLHF_LAUNCH") and state.num_processes == 1 and model is None and metarm is None:
        return _launch(arm, params, seed, run)
    splits = splits or splits_.load()
    pairs, rows = prompts(arm, params, splits, seed)
    frozen = weights = None
    if arm in ("offline", "online") and metarm is None:
        from .metarm import MetaRM

        weights = hashlib.sha256(Path("results/runs/metarm/state.pt").read_bytes()).hexdigest()[:16]
        metarm = MetaRM.load("results/runs/metarm", params.metarm)
        frozen = MetaRM.load("results/runs/metarm", params.metarm) if arm == "online" else None
    reward = RewardFunction(arm, params, pairs, metarm, judge)
    if model is None:
        policy_, tokenizer = policy.load(params, policy.start(params), trainable=True)
    else:
        policy_, tokenizer = model
    encoded, cut = {}, set()
    for row in tqdm(rows, "prompts", disable=len(rows) < 5000, leave=False):
        row["prompt"] = f"{row['pair_id']}\t{row['swap']}"
        if row["prompt"] not in encoded:
            pair = reward.pairs[row["pair_id"]]
            encoded[row["prompt"]] = grm.encode_prompt(pair, tokenizer, params.policy.max_prompt, bool(row["swap"]), params.grm.think)
            said = [*(t["content"] for t in pair.context), pair.response_a, pair.response_b]
            if grm.CUT.strip() in tokenizer.decode(encoded[row["prompt"]]) and not any(grm.CUT.strip() in text for text in said):
                cut.add(row["prompt"])
    used = ["policy", "grm", "similarity", "rollout", "reward", "grpo"]
    used += ["judge"] * (params.similarity.backend == "llm") + ["metarm"] * (arm in ("offline", "online"))
    said = [(p.label, *((c.annotator, c.label, c.text) for c in p.critiques)) for p in pairs]
    config = {
        "arm": arm, "seed": seed, "prompts": f"{fingerprint(*map(str, encoded.values())):016x}", "policy_weights": runner.fingerprint(policy_),
        "labels_and_critiques": f"{fingerprint(*map(str, said)):016x}", "metarm_weights": weights,
        **{k: v for k, v in params.model_dump(exclude=PATIENCE).items() if k in used},
    }  # fmt: skip
    with state.main_process_first():  # the others find what the first has made
        finished = _continue(run, config)
    if state.is_main_process and _note_code(run):
        log.warning("%s: trained, at least in part, by other code than today's; remove the folder to train it anew", run)
    if finished:
        return run
    drift = None
    if frozen is not None and arm == "online":
        from .metarm import Drift

        drift = Drift(params, splits.unseen, frozen, run, judge)
    last = checkpoints(run)
    with state.main_process_first():
        step = _rewind(run, last[-1] if last else None)
    record = _Record(run, f"{arm} {seed}", params.grpo.steps, drift) if state.is_main_process else None
    trainer = Trainer(
        policy_, reward, arguments(params, run, seed), Dataset.from_list(rows), processing_class=tokenizer, callbacks=[record] if record else [],
        encoded=encoded, engine=rollout.engine(policy_, tokenizer, params), run=run, params=params, beta=params.grpo.beta, seed=seed, cut=cut,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if record:
        record.trainer, trainer.record = trainer, record
    if last:
        reward.load_state_dict(torch.load(last[-1] / "reward.pt", map_location="cpu", weights_only=True))
        log.warning("%s goes on from step %d", run, step)
    trainer.train(resume_from_checkpoint=str(last[-1]) if last else None)
    if state.is_main_process:
        _finish(run, trainer, metarm if arm == "online" else None)
        record.trainer = None  # the circle that would keep models and optimizers alive
    state.wait_for_everyone()
    return run


def _continue(run: Path, config: dict) -> bool:
    """Whether the run is finished with these settings. One with other settings is put aside in `.former`, and comes back with them."""
    text, file = yaml.safe_dump(config, sort_keys=False), run / "config.yaml"
    aside = lambda said: run.parent / ".former" / f"{run.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}"  # noqa: E731
    if file.exists() and (old := file.read_text(encoding="utf-8")) != text:
        log.warning("%s was made with other settings: it is kept in %s", run, aside(old))
        aside(old).parent.mkdir(exist_ok=True)
        shutil.rmtree(aside(old), ignore_errors=True)
        os.replace(run, aside(old))
    if not file.exists() and aside(text).exists():
        shutil.rmtree(run, ignore_errors=True)
        os.replace(aside(text), run)
    if file.exists():
        return (run / "adapter" / "adapter_config.json").exists()
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True)
    (run / "config.part").write_text(text, encoding="utf-8")
    os.replace(run / "config.part", file)
    return False


def _note_code(run: Path) -> bool:
    """Note the code that trains this run in code.txt, one hash for each version (comments do not count); returns whether another than
    today's is among them."""
    now = code("arguments", "grm", "grpo", "metarm", "policy", "rewards", "rollout", "shared_prefix", "similarity")
    seen = (run / "code.txt").read_text().split() if (run / "code.txt").exists() else []
    if not seen or seen[-1] != now and not (run / "adapter").exists():
        (run / "code.txt").write_text("\n".join([*seen, now]) + "\n")
    return set(seen) > {now} or bool(seen) and now not in seen


def _rewind(run: Path, checkpoint: Path | None) -> int:
    """Drop what was recorded after the checkpoint; returns its step."""
    step = int(checkpoint.name.split("-")[1]) if checkpoint else 0
    for name in ("metrics.jsonl", "rollouts.jsonl", "timings.jsonl", "drift.jsonl"):
        if (run / name).exists():
            write_jsonl(run / name, (r for r in read_rows(run / name) if r["step"] <= step))
    for part in (run / "checkpoints").glob("*.part"):
        shutil.rmtree(part)
    return step


def _finish(run: Path, trainer: Trainer, metarm):
    if metarm is not None and hasattr(metarm, "save"):
        metarm.save(run / "metarm")
    part = run / "adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    trainer.model.save_pretrained(part)
    os.replace(part, run / "adapter")


def _launch(arm: str, params, seed: int, run: Path) -> Path:
    """Train in the processes that $RMNLHF_LAUNCH starts, such as "accelerate launch --num_processes 4"; on results/splits."""
    policy.free()  # what this process has used and no longer needs: one of the others trains on the same card
    file = run.parent / f"{run.name}.params.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(params.model_dump(), sort_keys=False), encoding="utf-8")
    # --folder and not --run, which torchrun takes for its own --run-path
    command = [*shlex.split(os.environ["RMNLHF_LAUNCH"]), "-m", "rmnlhf.grpo", arm, "--seed", str(seed), "--params", str(file), "--folder", str(run)]
    if (code := subprocess.run(command).returncode):
        raise RuntimeError(f"{shlex.join(command)} ended with status {code}: its messages are above; the run goes on from its last checkpoint")
    file.unlink()
    return run


def main():
    ap = argparse.ArgumentParser(description="Train one arm: what the notebooks call, for a launcher of several processes.")
    ap.add_argument("arm", choices=ARMS)
    ap.add_argument("--seed", type=int)
    ap.add_argument("--params", default="results/params.yaml")
    ap.add_argument("--folder", type=Path, help="the run folder")
    args = ap.parse_args()
    from .params import load

    os.environ.pop("RMNLHF_LAUNCH", None)
    try:
        train(args.arm, load(args.params), args.seed, run=args.folder)
    finally:  # what each process has asked, beside the notebook's own file; a finished run asks nothing, and keeps what it wrote
        if any(usage.asked for _, usage in judge._USED):
            print(judge.record(f"{args.folder.name if args.folder else args.arm}_{PartialState().process_index}"))


if __name__ == "__main__":
    main()
