"""MetaRM: predicts a judgement's reward from its critique, where no human critique is there to compare with.

Rows are dicts {pair: PreferencePair, swap: bool, critique: str, target: float | None, group: str}; `swap` says that the critique
was written on the pair shown the other way round. A row holds no verdict, no label, no think block: what MetaRM reads is the
conversation, both responses and the critique (paper; `label` of the pair is never looked at).

Two regressors behind one interface, `params.metarm.tune`:
  head         a frozen encoder's middle layer and a small head that multiplies what the critique says for a response with
               what this response looks like; seconds on a CPU
  lora, full   sequence classification with one output over the whole text, on any encoder or decoder base (the paper's form)
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy import stats as scipy_stats
from torch import nn
from tqdm.auto import tqdm

from . import rewards, shared_prefix
from .arguments import mask_sides
from .grm import CUT, Judgement, parse_judgement
from .live import Live
from .pairs import OTHER, PreferencePair, code, fingerprint, read_rows, swap_sides, write_jsonl
from .policy import PACKAGED, free, memory, mixed_precision, prepare

log = logging.getLogger(__name__)
TOKENS = 8192  # of one forward of a sequence regressor; with LoRA 60 bytes × layers × hidden × tokens, with gradient checkpointing 2
SAVE_EVERY, SAVE_SECONDS = 50, 300  # batches, or time, between the checkpoints of a fit


# --- rows ----------------------------------------------------------------------------------------------------------
def row(pair: PreferencePair, swap: bool, critique: str, target: float | None = None) -> dict:
    return {"pair": pair, "swap": swap, "critique": critique, "target": target, "group": pair.id}


def target(judgement: Judgement, label: str, process: float | None, params) -> float | None:
    """What MetaRM learns for one judgement; None where the process reward is missing or the judgement has a format error.

    "composite": the reward of `rewards.composite`, 0 for a wrong verdict (paper). "process": 1 + weight · process whatever the
    verdict: the same scale, so that the bonus forms of `rewards` mean the same. `label`: as shown on the prompt that was judged."""
    r = params.reward
    if judgement.error or process is None:
        return None
    if params.metarm.target == "composite":
        found = rewards.composite(judgement, label, process, r.weight, r.gated, r.binary, params.similarity.threshold)
    else:
        found = process if np.isnan(process) or not r.binary else float(process >= params.similarity.threshold)
        found = 1.0 + r.weight * found
    return None if np.isnan(found) else found


def from_rollouts(pairs: Sequence[PreferencePair], completions, swaps, params, judge=None, max_missing: float | None = None) -> list[dict]:
    """Rows with targets from a policy's completions (P lists of N `Completion`) on pairs with human critiques.

    Format errors are left out, wrong verdicts kept. Raises ValueError where no pair has a critique to compare with, or more than
    `max_missing` (None: reward.max_missing) of the process rewards are missing."""
    if not any(p.agreeing for p in pairs):
        raise ValueError(
            f"none of {len(pairs)} pairs has a human critique that agrees with its label: MetaRM has nothing to learn from; "
            "add a source with critiques to data.critique_sources"
        )
    said = [
        (p.swapped() if swap else p, p, swap, parse_judgement(c.text, params.grm.max_lines, params.grm.max_chars, params.grm.max_repeats))
        for p, found, swap in zip(pairs, completions, swaps) for c in found if p.agreeing
    ]  # fmt: skip
    said = [s for s in said if not s[3].error]
    process = _process([s[3].critique for s in said], [[c.text for c in s[0].agreeing] for s in said], params, judge)
    rewards.check_process_rows(pairs, process, params.reward.max_missing if max_missing is None else max_missing)
    rows = [row(p, swap, j.critique, target(j, shown.label, f1, params)) for (shown, p, swap, j), f1 in zip(said, process)]
    return [r for r in rows if r["target"] is not None]


def from_humans(pairs: Sequence[PreferencePair], params, judge=None) -> list[dict]:
    """Rows with targets from the human critiques themselves, without any policy: about ten for each pair.

    Each critique is a judgement whose verdict is its annotator's choice, compared with the *other* agreeing critiques; with its
    sides exchanged it is a wrong one; and a critique of another pair, with either verdict, is one that names nothing of this
    pair. Half of them open with the sentence that the cold start teaches. Rollouts of as many pairs cost minutes and vary less."""
    from .cold_start import lead

    pairs = [p for p in pairs if p.agreeing]
    said = []  # (pair, critique, verdict, references)
    strangers = sorted(
        ((p.id, c) for p in pairs for c in p.critiques if c.label), key=lambda s: fingerprint(s[0], s[1].annotator, s[1].text)
    )
    for i, p in enumerate(pairs):
        for c in p.critiques:
            others = [o.text for o in p.agreeing if o is not c]
            if c.label and others:
                said.append((p, c.text, c.label, others))
                said.append((p, swap_sides(c.text), OTHER[c.label], others))
        for k in range(2):
            owner, c = strangers[(2 * i + k) % len(strangers)]
            if owner != p.id:
                flip = fingerprint(p.id, k) % 2
                said.append((p, swap_sides(c.text) if flip else c.text, OTHER[c.label] if flip else c.label, [o.text for o in p.agreeing]))
    gated = params.metarm.target == "composite" and params.reward.gated
    said = [(p, lead(v) + t if fingerprint(p.id, v, t) % 2 else t, v, others) for p, t, v, others in said]
    ask = [s for s in said if not gated or s[2] == s[0].label]  # a wrong verdict's process is not needed
    found = iter(_process([s[1] for s in ask], [s[3] for s in ask], params, judge))
    rows = []
    for p, text, verdict, _ in said:
        process = 0.0 if gated and verdict != p.label else next(found)
        rows.append(row(p, False, text, target(Judgement(text, verdict, None), p.label, process, params)))
    return [r for r in rows if r["target"] is not None]


def _process(critiques, references, params, judge):
    from .judge import of
    from .similarity import similarity_many

    found = similarity_many(critiques, references, backend=params.similarity.backend, judge=judge or of(params))
    return [None if s is None else s.f1 for s in found]


def hold_out(rows: Sequence[dict], share: float, seed: int) -> tuple[list[dict], list[dict]]:
    """(kept, held out): whole groups, by hash; at least one group on either side where there are two."""
    groups = sorted({r["group"] for r in rows}, key=lambda g: fingerprint(seed, g))
    n = min(max(1, round(share * len(groups))), len(groups) - 1)
    out = set(groups[:n])
    return [r for r in rows if r["group"] not in out], [r for r in rows if r["group"] in out]


def _checked(rows: Iterable[dict], targets: bool = False) -> list[dict]:
    rows = list(rows)
    for i, r in enumerate(rows):
        if not isinstance(r.get("critique"), str) or not r["critique"].strip():
            raise ValueError(
                f"row {i} (pair {r['pair'].id!r}): critique is {r.get('critique')!r}; a judgement that failed to parse does not go "
                "to MetaRM: leave out rows with a format error"
            )
        if targets and (r["target"] is None or not np.isfinite(r["target"])):
            raise ValueError(f"row {i} (pair {r['pair'].id!r}): target is {r['target']!r}; leave out rows whose process reward is missing")
    return rows


def _shown(r: dict) -> tuple[str, str, str]:
    """Conversation and the two responses, in the order that the critique speaks of."""
    pair = r["pair"]
    a, b = (pair.response_b, pair.response_a) if r["swap"] else (pair.response_a, pair.response_b)
    return "\n\n".join(f"{t['role']}: {t['content']}" for t in pair.context), a, b


# --- the two regressors --------------------------------------------------------------------------------------------
class Head(nn.Module):
    """Frozen encoder, two views of the critique, a small head.

    A sentence vector hardly knows "Response A" from "Response B", so the critique is read twice: once with A called "this
    response" and B "the other one", once the other way round. The difference of the two vectors is the critique's stance; the
    difference of the responses' vectors (same encoder) says which is better. Their product is the verdict's share of the reward;
    the mean of the two views is what the critique says at all. Exchanging the responses and the names in the critique leaves
    the score as it is, by construction."""

    names = ("stance", "responses", "content")

    def __init__(self, base: str | Path, max_length: int, seed: int, revision=None):
        super().__init__()
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        encoder = AutoModel.from_pretrained(base, revision=revision, dtype=torch.float32).eval().requires_grad_(False)
        layers = next((m for m in encoder.modules() if isinstance(m, nn.ModuleList)), None)
        if layers is None:
            raise ValueError(f"{base}: no list of layers in {type(encoder).__name__}; use metarm.tune lora or full for this base")
        del layers[(len(layers) + 1) // 2 :]  # the middle layer knows more of quality and stance than the last, at half the cost
        self._encoder = [encoder, tokenizer]  # a list: no submodule, never in a state_dict
        limit = encoder.config.max_position_embeddings - 2
        self.max_length, self.window = min(max_length, limit), limit
        d = encoder.config.hidden_size
        self.sizes = (d, d + 2, d + 1)
        self.stance = nn.Linear(d, 1, bias=False)
        self.responses = nn.Linear(d + 2, 1, bias=False)
        self.content = nn.Linear(d + 1, 1)
        with torch.no_grad():
            g = torch.Generator().manual_seed(seed)
            for layer in (self.stance, self.responses):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g) * 0.3 / d**0.5)
            self.content.weight.zero_()
            self.content.bias.zero_()
        for name, size in zip(self.names, self.sizes):
            self.register_buffer(f"centre_{name}", torch.zeros(size))
            self.register_buffer(f"scale_{name}", torch.ones(size))

    def encode(self, rows: list[dict], progress: bool = False) -> torch.Tensor:
        """(n, D) features; a function of `rows` alone, so that a resumed run sees the same numbers."""
        parts = []
        for r in rows:
            masked = mask_sides(r["critique"]).replace("BOTHSIDES", "both responses")
            views = [masked.replace(f"SIDE{s}", "this response").replace(f"SIDE{OTHER[s]}", "the other one") for s in "AB"]
            parts.append((*views, *_shown(r)))
        cut = {t: True for p in parts for t in p[2:]} | {t: False for p in parts for t in p[:2]}  # a critique is never cut
        vectors, lengths = self._embed(cut, progress)
        out = []
        for view_a, view_b, talk, a, b in parts:
            u, v, q, ra, rb = (vectors[t] for t in (view_a, view_b, talk, a, b))
            near = nn.functional.cosine_similarity(torch.stack([ra, rb]), q[None])
            longer = torch.log(torch.tensor([lengths[a] / lengths[b]]))
            size = torch.log(torch.tensor([(lengths[view_a] + lengths[view_b]) / 2]))
            out.append(torch.cat([u - v, ra - rb, longer, near[:1] - near[1:], (u + v) / 2, size]))
        return torch.stack(out)

    @torch.no_grad()
    def _embed(self, cut: dict[str, bool], progress: bool):
        encoder, tokenizer = self._encoder
        ids = {t: tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in sorted(cut)}
        lengths = {t: max(1, len(i)) for t, i in ids.items()}
        windows = []  # (text, ids): a critique beyond the encoder's positions is read in several windows
        for t, i in ids.items():
            i = _middle_out(i, self.max_length, tokenizer) if cut[t] else i
            windows += [(t, i[k : k + self.window]) for k in range(0, max(1, len(i)), self.window)]
        windows.sort(key=lambda w: len(w[1]))
        sums: dict[str, torch.Tensor] = {}
        start, end = [tokenizer.cls_token_id or tokenizer.bos_token_id], [tokenizer.sep_token_id or tokenizer.eos_token_id]
        start, end = ([] if x == [None] else x for x in (start, end))
        for k in tqdm(range(0, len(windows), 32), "embeddings", disable=not progress):
            batch = [start + i + end for _, i in windows[k : k + 32]]
            tokens, mask = _padded(batch, tokenizer.pad_token_id or 0, "cpu")
            hidden = encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
            for (t, _), h, m in zip(windows[k : k + 32], hidden, mask):
                sums[t] = sums.get(t, 0) + torch.cat([h[m.bool()].sum(0), m.sum()[None].float()])
        return {t: s[:-1] / s[-1] for t, s in sums.items()}, lengths

    def prepare(self, features: torch.Tensor):
        """Scales of the features, before the first step. Differences are not centred: that would break the symmetry."""
        for name, x in zip(self.names, features.split(self.sizes, 1)):
            centre = x.mean(0) if name == "content" else torch.zeros(x.shape[1])
            getattr(self, f"centre_{name}").copy_(centre)
            getattr(self, f"scale_{name}").copy_((x - centre).pow(2).mean(0).sqrt() + 1e-3)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        x = {
            n: (v - getattr(self, f"centre_{n}")) / getattr(self, f"scale_{n}")
            for n, v in zip(self.names, features.split(self.sizes, 1))
        }
        verdict = torch.tanh(self.stance(x["stance"])) * torch.tanh(self.responses(x["responses"]))
        return self.content(x["content"])[:, 0] + verdict[:, 0]

    def chunks(self, features) -> list[list[int]]:
        return [list(range(len(features)))]

    def take(self, features, index):
        return features[index]

    def join(self, one, other):
        return torch.cat([one, other])


class SequenceRegressor(nn.Module):
    """Sequence classification with one output: `[conversation] [response A] [response B] [critique]` in one text."""

    def __init__(
        self, base: str | Path, max_length: int, seed: int, tune: str, revision=None, dtype="float32", rank=8, alpha=16, checkpointing=False
    ):  # fmt: skip
        super().__init__()
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.modeling_layers import GradientCheckpointingLayer

        state = torch.get_rng_state()
        torch.manual_seed(seed)  # the new head's weights
        self.tokenizer = AutoTokenizer.from_pretrained(base, revision=revision)
        dtype = getattr(torch, dtype) if tune == "lora" else torch.float32  # what trains: in bf16 a small step is none
        model = AutoModelForSequenceClassification.from_pretrained(base, revision=revision, num_labels=1, dtype=dtype)
        pad = self.tokenizer.pad_token_id
        model.config.pad_token_id = pad if pad is not None else self.tokenizer.eos_token_id
        if tune == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(
                model, LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear")
            )
            for w in model.parameters():
                if w.requires_grad:  # PEFT leaves the head in bf16, where a small step is rounded away
                    w.data = w.data.float()
        torch.set_rng_state(state)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # no dropout: a resumed run stays equal
        self.packed = shared_prefix.prepare(self.model)  # texts of one group share the encoding of what stands before the critique
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self.model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.training = True  # it checkpoints in training mode only; what is inside it stays without dropout
        limit = getattr(model.config, "max_position_embeddings", None) or max_length
        self.max_length, self.limit = min(max_length, limit), limit

    def encode(self, rows: list[dict], progress: bool = False) -> list[list[int]]:
        tok = self.tokenizer
        plain = lru_cache(maxsize=64)(lambda text: tok(text, add_special_tokens=False, verbose=False)["input_ids"])  # rows of a pair share its texts
        return [self._ids(r, plain) for r in tqdm(rows, "tokens", disable=not progress)]

    def _ids(self, r: dict, plain) -> list[int]:
        tok = self.tokenizer

        heads = [plain(h) for h in ("[Conversation]\n", "\n\n[Response A]\n", "\n\n[Response B]\n", "\n\n[Critique]\n")]
        critique, texts = plain(r["critique"]), [plain(t) for t in _shown(r)]
        around = sum(map(len, heads)) + 2
        least = around + len(critique) + 3 * (len(plain(CUT)) + 8)
        if least > self.limit:
            raise ValueError(
                f"pair {r['pair'].id!r}: a critique of {len(critique)} tokens does not fit a base of {self.limit} positions and is never "
                "cut; lower grm.max_chars or take a base with a longer context"
            )
        room = max(self.max_length, least) - around - len(critique)
        keep = _shares([len(t) for t in texts], room)
        body = [i for h, t, k in zip(heads, texts, keep) for i in h + _middle_out(t, k, tok)]
        ids = body + heads[-1] + critique
        start = tok.cls_token_id if tok.cls_token_id is not None else tok.bos_token_id
        end = tok.sep_token_id  # a decoder is read at its last token: the critique's
        return ([start] if start is not None else []) + ids + ([end] if end is not None else [])

    def prepare(self, features):
        pass

    def chunks(self, features) -> list[list[int]]:
        """Rows of each forward: texts with a common beginning side by side, at most TOKENS tokens, what they share counted once."""
        out, room = [], 0
        if not self.packed:  # padded: each row costs as much as the longest beside it
            for i in sorted(range(len(features)), key=lambda i: len(features[i])):
                if not out or len(features[i]) * (len(out[-1]) + 1) > TOKENS:
                    out.append([])
                out[-1].append(i)
            return out
        for i in sorted(range(len(features)), key=features.__getitem__):
            ids = features[i]
            shared = len(os.path.commonprefix([features[out[-1][-1]], ids])) if out else 0
            cost = len(ids) - (shared if 2 * shared >= len(ids) else 0)
            if cost > room:
                out.append([])
                room, cost = TOKENS, len(ids)
            out[-1].append(i)
            room -= cost
        return out

    def forward(self, features: list[list[int]]) -> torch.Tensor:
        if self.packed:
            return shared_prefix.scores(self.model, features)
        tokens, mask = _padded(features, self.model.config.pad_token_id, self.model.device)
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        with mixed_precision(self.model):
            if not hasattr(base, "score"):
                return self.model(input_ids=tokens, attention_mask=mask).logits[:, 0].float()
            hidden = getattr(base, base.base_model_prefix)(input_ids=tokens, attention_mask=mask).last_hidden_state
        return shared_prefix.score(base, hidden[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1])

    def take(self, features, index):
        return [features[i] for i in index]

    def join(self, one, other):
        return list(one) + list(other)


def _padded(batch: list[list[int]], pad: int, device):
    width = max(1, max(map(len, batch)))
    tokens = torch.full((len(batch), width), pad, dtype=torch.long)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for i, ids in enumerate(batch):
        tokens[i, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        mask[i, : len(ids)] = 1
    return tokens.to(device), mask.to(device)


def _middle_out(ids: list[int], keep: int, tokenizer) -> list[int]:
    """At most `keep` tokens: the middle goes, a marker takes its place."""
    if len(ids) <= keep:
        return ids
    mark = tokenizer(CUT, add_special_tokens=False)["input_ids"]
    keep = max(2, keep - len(mark))
    return ids[: (keep + 1) // 2] + mark + ids[len(ids) - keep // 2 :]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each text keeps: the longest are cut to one common length."""
    if sum(lengths) <= room:
        return list(lengths)
    out, left = [0] * len(lengths), room
    for k, i in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        out[i] = min(lengths[i], left // (len(lengths) - k))
        left -= out[i]
    return out


# --- MetaRM --------------------------------------------------------------------------------------------------------
class MetaRM:
    """Regressor with its own optimizer and replay buffer.

    params: `Params.metarm`; `policy`: `Params.policy`, needed where metarm.base is "policy"
    fit(rows, extra) once; then update(rows) and score(rows) at every step of the online arm, score(rows) in the offline one"""

    def __init__(self, params, seed: int = 0, policy=None):
        self.params, self.seed, self.policy = params, seed, policy
        self.model = _regressor(params, seed, policy)
        self.optimizer = None  # the online one, made at the first update
        self.generator = torch.Generator().manual_seed(seed)
        self.offset = 0.0  # added to every output: the targets' mean, so that the model itself starts near 0
        self.buffer, self.buffer_targets, self.seen = None, torch.zeros(0), 0

    def fit(
        self, rows: Sequence[dict], extra: Sequence[dict] = (), progress: bool = False, held_out: Sequence[dict] = (),
        run: str | Path | None = None, checkpoint: str | Path | None = None,
    ) -> list[dict]:  # fmt: skip
        """Train from the start: MSE on the raw output, AdamW, cosine schedule (paper). Returns one dict for each epoch: loss,
        and held_out (mean squared error) where rows for it are given. run: a folder for TensorBoard's and DVCLive's logs of them.

        extra: rows that are learnt but do not enter the replay buffer (`from_humans`); both together are one training set.
        checkpoint: a file that holds the state, at the latest every SAVE_EVERY batches or SAVE_SECONDS: a killed fit of the same rows goes on, to
        the same weights, and a finished one is taken as it is."""
        rows, extra, held_out = _checked(rows, True), _checked(extra, True), _checked(held_out, True)
        if not rows and not extra:
            raise ValueError("MetaRM.fit: no row with a target; it learns from pairs with human critiques only")
        p, everything = self.params, rows + extra
        features = self.model.encode(everything, progress)
        held = self.model.encode(held_out) if held_out else None
        targets = torch.tensor([r["target"] for r in everything], dtype=torch.float32)
        self.model.prepare(features)
        self.offset = float(targets.mean())
        optimizer = torch.optim.AdamW(self._trainable(), lr=p.lr, weight_decay=0.1)
        batches = -(-len(everything) // p.batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, p.epochs * batches))
        said = ((r["group"], r["swap"], r["critique"], r["target"], *_shown(r)) for r in (*everything, *held_out))
        of = fingerprint(code("metarm", "shared_prefix", "arguments", "policy"), p, self.seed, self.policy, len(everything), *said)
        at = self._resume(Path(checkpoint), of, optimizer, schedule) if checkpoint else None
        at = at or {"epoch": 0, "batch": 0, "losses": [], "history": [], "generator": self.generator.get_state()}
        saved = time.monotonic()
        history, live = at["history"], Live(run, resume=False) if run else None
        for past in history if live else ():
            live.log(past["epoch"], {k: v for k, v in past.items() if k != "epoch"})
        for epoch in range(at["epoch"], p.epochs):
            losses, done, start = (at["losses"], at["batch"], at["generator"]) if epoch == at["epoch"] else ([], 0, self.generator.get_state())
            self.generator.set_state(start)
            batches = self._batches(everything, p.batch)
            for k, index in enumerate(tqdm(batches, f"MetaRM epoch {epoch + 1}", disable=not progress)):
                if k < done:
                    continue
                loss = self._step(optimizer, self.model.take(features, index), targets[index], [everything[i]["group"] for i in index])
                schedule.step()
                losses += [loss] * len(index)
                if checkpoint and ((k + 1) % SAVE_EVERY == 0 or time.monotonic() - saved > SAVE_SECONDS):
                    saved = time.monotonic()
                    now = {"epoch": epoch, "batch": k + 1, "losses": losses, "history": history, "generator": start}
                    self._checkpoint(Path(checkpoint), of, optimizer, schedule, now)
            history.append({"epoch": epoch + 1, "loss": float(np.mean(losses))})
            if held_out:
                error = self._predict(held) - np.array([r["target"] for r in held_out])
                history[-1]["held_out"] = float((error**2).mean())
            if live:
                live.log(epoch + 1, {k: v for k, v in history[-1].items() if k != "epoch"})
        if live:
            live.close()
        if checkpoint:  # stays: what stands on this fit may be run again, and need not train it again
            done = {"epoch": p.epochs, "batch": 0, "losses": [], "history": history, "generator": self.generator.get_state()}
            self._checkpoint(Path(checkpoint), of, optimizer, schedule, done)
        if rows and extra:  # `extra` has its own share of right verdicts: the level is the rollouts'
            self.offset -= float((self._predict(self.model.take(features, list(range(len(rows))))) - targets[: len(rows)].numpy()).mean())
        if rows:
            self._remember(self.model.take(features, list(range(len(rows)))), targets[: len(rows)])
        return history

    def _checkpoint(self, file: Path, of: int, optimizer, schedule, at: dict):
        file.parent.mkdir(parents=True, exist_ok=True)
        state = {"of": of, "at": at, "metarm": self.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save(state, file.with_name(file.name + ".part"))
        os.replace(file.with_name(file.name + ".part"), file)

    def _resume(self, file: Path, of: int, optimizer, schedule) -> dict | None:
        """Where a fit of these rows stopped, its state loaded; None where there is none."""
        state = torch.load(file, map_location="cpu", weights_only=True) if file.exists() else None
        if state is None or state["of"] != of:
            return None
        self.load_state_dict(state["metarm"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        at = state["at"]
        log.warning(*("MetaRM's fit of these rows is taken as it is",) if at["epoch"] == self.params.epochs else ("MetaRM's fit goes on from epoch %d, batch %d", at["epoch"] + 1, at["batch"]))
        return state["at"]

    def score(self, rows: Sequence[dict]) -> np.ndarray:
        """Raw outputs, shape (len(rows),), on the targets' scale. Raises ValueError naming a row without a critique."""
        rows = _checked(rows)
        return self._predict(self.model.encode(rows)) if rows else np.zeros(0)

    def update(self, rows: Sequence[dict]) -> float | None:
        """One online update on this step's rows with a human critique (wrong verdicts kept), mixed with replay: the mean loss.

        `online_steps` gradient steps, each on all new rows and a fresh draw from the buffer that makes up `replay_share` of the
        batch; then the rows enter the buffer. replay 0 is the paper's form. No rows: no update, None."""
        rows = _checked(rows, True)
        if not rows:
            return None
        p = self.params
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self._trainable(), lr=p.online_lr, weight_decay=0.0)
        features = self.model.encode(rows)
        targets = torch.tensor([r["target"] for r in rows], dtype=torch.float32)
        losses = []
        for _ in range(p.online_steps):
            batch, wanted, groups = features, targets, [r["group"] for r in rows]
            if p.replay and len(self.buffer_targets) and 0 < p.replay_share < 1:
                n = min(round(len(rows) * p.replay_share / (1 - p.replay_share)), len(self.buffer_targets))
                index = torch.randperm(len(self.buffer_targets), generator=self.generator)[:n].tolist()
                batch = self.model.join(batch, self.model.take(self.buffer, index))
                wanted = torch.cat([wanted, self.buffer_targets[index]])
                groups = groups + [None] * n  # ranking is for this step's groups
            losses.append(self._step(self.optimizer, batch, wanted, groups))
        self._remember(features, targets)
        return float(np.mean(losses))

    def _trainable(self):
        return [w for w in self.model.parameters() if w.requires_grad]

    def _step(self, optimizer, features, targets, groups) -> float:
        """One optimizer step; gradients of long texts are accumulated. A ranking needs all outputs of a group at once: it is
        differentiated by the outputs, which are computed once more for that, and its gradient goes back with the parts'."""
        optimizer.zero_grad(set_to_none=True)
        total, pull = 0.0, None
        if self.params.ranking:
            outputs = torch.tensor(self._predict(features), dtype=torch.float32, requires_grad=True)
            ranking = _ranking(outputs, targets, groups)
            (pull,) = torch.autograd.grad(ranking, outputs)
            total = ranking.item()
        with memory(f"in MetaRM's update: {self._lower()}"):
            for index in self.model.chunks(features):
                output = self.model(self.model.take(features, index)) + self.offset
                loss = ((output - targets[index].to(output.device)) ** 2).sum() / len(targets)
                total += loss.item()
                if pull is not None:
                    loss = loss + (output * pull[index].to(output.device)).sum()
                loss.backward()
            nn.utils.clip_grad_norm_(self._trainable(), 1.0)
            optimizer.step()
        return total

    def _batches(self, rows, size) -> list[list[int]]:
        if not self.params.ranking and isinstance(self.model, Head):
            order = torch.randperm(len(rows), generator=self.generator).tolist()
        else:  # a group stays together: it is compared, and a long conversation is encoded once
            groups = sorted({r["group"] for r in rows})
            rank = dict(zip(groups, torch.randperm(len(groups), generator=self.generator).tolist()))
            order = sorted(range(len(rows)), key=lambda i: rank[rows[i]["group"]])
        return [order[k : k + size] for k in range(0, len(order), size)]

    @torch.no_grad()
    def _predict(self, features) -> np.ndarray:
        out = np.zeros(len(features))
        with memory(f"while MetaRM scores: {self._lower()}"):
            for index in self.model.chunks(features):
                out[index] = self.model(self.model.take(features, index)).cpu().double().numpy()
        return out + self.offset

    def _lower(self) -> str:
        p = self.params  # a pack holds TOKENS whatever the length of its texts
        return f"set policy.gradient_checkpointing, or take metarm.base: minilm with metarm.tune: head (now {p.base}, {p.tune})"

    def _remember(self, features, targets):
        """Reservoir sampling: the buffer is a fair sample of all rows ever seen, the cold start's too."""
        capacity = self.params.replay
        for i in range(len(targets) if capacity else 0):
            self.seen += 1
            at = len(self.buffer_targets)
            if at >= capacity:
                at = int(torch.randint(self.seen, (1,), generator=self.generator))
            if at >= capacity:
                continue
            one, wanted = self.model.take(features, [i]), targets[i : i + 1]
            if at == len(self.buffer_targets):
                self.buffer = one if self.buffer is None else self.model.join(self.buffer, one)
                self.buffer_targets = torch.cat([self.buffer_targets, wanted])
            else:
                self.buffer[at], self.buffer_targets[at] = one[0], wanted[0]

    def state_dict(self) -> dict:
        """Everything that the next update depends on: trained weights, optimizer, replay buffer, generator."""
        trained = {n for n, w in self.model.named_parameters() if w.requires_grad} | {n for n, _ in self.model.named_buffers()}
        return {
            "model": {n: w.detach().cpu().clone() for n, w in self.model.state_dict().items() if n in trained},
            "offset": self.offset,
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "buffer": self.buffer if self.buffer is None or isinstance(self.buffer, list) else self.buffer.clone(),
            "buffer_targets": self.buffer_targets.clone(),
            "seen": self.seen,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict):
        unknown = self.model.load_state_dict(state["model"], strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"this state is of another MetaRM (metarm.base, metarm.tune): {unknown[0]} is not in it")
        self.offset, self.optimizer = state["offset"], None
        if state["optimizer"] is not None:
            self.optimizer = torch.optim.AdamW(self._trainable(), lr=self.params.online_lr, weight_decay=0.0)
            self.optimizer.load_state_dict(state["optimizer"])
        buffer = state["buffer"]
        self.buffer = list(buffer) if isinstance(buffer, list) else None if buffer is None else buffer.clone()
        self.buffer_targets, self.seen = state["buffer_targets"].clone(), state["seen"]
        self.generator.set_state(state["generator"])

    def save(self, path: str | Path) -> Path:
        """Write folder `path`: state.pt and config.json, each by rename."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        torch.save(self.state_dict(), path / "state.pt.part")
        os.replace(path / "state.pt.part", path / "state.pt")
        config = {"metarm": self.params.model_dump(), "seed": self.seed, "policy": self.policy and self.policy.model_dump()}
        (path / "config.json.part").write_text(json.dumps(config, indent=1), encoding="utf-8")
        os.replace(path / "config.json.part", path / "config.json")
        return path

    @classmethod
    def load(cls, path: str | Path, params=None) -> MetaRM:
        """What `save` wrote; `params` (Params.metarm) replaces the stored settings; base and tune must be the same."""
        from .params import MetaRMSection, Policy

        path = Path(path)
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path}: no MetaRM here; notebook 04_metarm trains and saves it (dvc repro 04_metarm)")
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        stored = MetaRMSection(**config["metarm"])
        if params is not None:
            if (params.base, params.tune) != (stored.base, stored.tune):
                raise ValueError(
                    f"{path} holds a MetaRM of base {stored.base!r}, tune {stored.tune!r}, but params ask for {params.base!r}, "
                    f"{params.tune!r}: train it anew (04_metarm)"
                )
            stored = params
        out = cls(stored, config["seed"], config["policy"] and Policy(**config["policy"]))
        out.load_state_dict(torch.load(path / "state.pt", map_location="cpu", weights_only=True))
        return out


def _regressor(p, seed, policy):
    free()
    revision, extra = None, {}
    if p.base == "policy":
        if policy is None:
            raise ValueError("metarm.base is 'policy': give MetaRM(params.metarm, seed, policy=params.policy)")
        name, revision = policy.model, policy.revision
        extra = {"dtype": policy.dtype, "rank": policy.rank, "alpha": policy.alpha, "checkpointing": policy.gradient_checkpointing}
    elif p.base in PACKAGED or Path(p.base).is_dir():
        name = p.base
    else:
        name, _, revision = p.base.partition("@")
    base = prepare(name) if name in PACKAGED else name
    if p.tune == "head":
        return Head(base, p.max_length, seed, revision)
    return SequenceRegressor(base, p.max_length, seed, p.tune, revision, **extra)


def _ranking(output, targets, groups):
    """Mean of softplus(−(mᵢ − mⱼ)) over pairs of one group with targetᵢ > targetⱼ (RankNet)."""
    numbers = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    g = torch.tensor([-1 - i if x is None else numbers[x] for i, x in enumerate(groups)], device=output.device)
    better = (g[:, None] == g[None]) & (targets[:, None] > targets[None])
    if not better.any():
        return output.sum() * 0.0
    return nn.functional.softplus(-(output[:, None] - output[None])[better]).mean()


# --- how well it does ----------------------------------------------------------------------------------------------
def agreement(targets, outputs) -> dict[str, float]:
    """MAE, rank correlation (Spearman; NaN where either side is constant) and bias (mean of output − target)."""
    targets, outputs = np.asarray(targets, float), np.asarray(outputs, float)
    varied = len(targets) > 2 and np.ptp(targets) > 0 and np.ptp(outputs) > 0
    rho = scipy_stats.spearmanr(targets, outputs).statistic if varied else np.nan
    return {"mae": float(np.abs(outputs - targets).mean()), "rho": float(rho), "bias": float((outputs - targets).mean())}


def rank_interval(targets, outputs, groups, n: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """(rho, low, high): Spearman's correlation and its bootstrap interval from draws of whole groups."""
    targets, outputs = np.asarray(targets, float), np.asarray(outputs, float)
    if not len(targets):
        return (np.nan,) * 3
    names, where = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(where == g) for g in range(len(names))]
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(n):
        index = np.concatenate([members[g] for g in rng.integers(len(names), size=len(names))])
        drawn.append(agreement(targets[index], outputs[index])["rho"])
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    return agreement(targets, outputs)["rho"], float(low), float(high)


def simple_predictors(train: Sequence[dict], rows: Sequence[dict]) -> dict[str, np.ndarray]:
    """What needs no language model, fitted on `train`: the constant mean and median, lengths (critique, both responses), and a
    bag of the critique's words. MetaRM has to beat the best of them."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LinearRegression, Ridge

    targets = np.array([r["target"] for r in train])

    def lengths(rows):
        sizes = [(len(r["critique"]), *(len(t) for t in _shown(r)[1:])) for r in rows]
        return np.log1p(np.array([(c, a, b, a / b) for c, a, b in sizes]))

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=1, token_pattern=r"\b\w+\b")
    bag = Ridge(alpha=1.0).fit(words.fit_transform([r["critique"] for r in train]), targets)
    return {
        "constant (mean)": np.full(len(rows), targets.mean()),
        "constant (median)": np.full(len(rows), np.median(targets)),
        "length": LinearRegression().fit(lengths(train), targets).predict(lengths(rows)),
        "bag of words": bag.predict(words.transform([r["critique"] for r in rows])),
    }


def drift(frozen: MetaRM, online: MetaRM, rows: Sequence[dict]) -> dict[str, float]:
    """Both MetaRMs against the true targets of fresh rows: {"frozen_mae", "frozen_rho", "frozen_bias", "online_mae", …, "n"}."""
    rows = _checked(rows, True)
    targets = [r["target"] for r in rows]
    out = {"n": len(rows), "target": float(np.mean(targets)) if rows else np.nan}
    for name, metarm in (("frozen", frozen), ("online", online)):
        found = agreement(targets, metarm.score(rows)) if rows else dict.fromkeys(("mae", "rho", "bias"), np.nan)
        out |= {f"{name}_{k}": v for k, v in found.items()}
    return out


class Drift:
    """Measures frozen against online MetaRM on fresh rollouts of unseen pairs with critiques, every `drift_every` steps.

    Writes `<run>/drift.jsonl`, one line for each measure; after a resume the lines of later steps are dropped first."""

    def __init__(self, params, pairs: Sequence[PreferencePair], frozen: MetaRM, run: str | Path, judge=None):
        self.params, self.frozen, self.judge = params, frozen, judge
        self.pairs = [p for p in pairs if p.agreeing][: params.metarm.drift_pairs]
        if not self.pairs:
            raise ValueError(f"none of {len(pairs)} unseen pairs has a human critique: drift cannot be measured")
        self.path = Path(run) / "drift.jsonl"

    def due(self, step: int) -> bool:
        return step % self.params.metarm.drift_every == 0 or step == self.params.grpo.steps

    def measure(self, step: int, model, tokenizer, online: MetaRM, engine) -> dict:
        """One line {step, n, target, frozen_mae, …}; a warning in the log where the online rank correlation is below drift_alarm, or
        cannot be computed (outputs or targets are all equal). engine: the run's own (`rollout.engine`)."""
        from . import grm
        from .judge import JudgeError

        p = self.params
        swaps = [bool(fingerprint(pair.id, "drift") % 2) for pair in self.pairs]
        prompts = [grm.encode_prompt(x, tokenizer, p.policy.max_prompt, s, p.grm.think) for x, s in zip(self.pairs, swaps)]
        engine.sync(model)
        done = engine.generate(
            prompts, 4, p.policy.max_completion, p.rollout.temperature, p.rollout.top_p, p.seed * 1_000_003 + step, p.rollout.batch
        )
        try:  # a judge that fails here costs a measure, not the run
            rows = from_rollouts(self.pairs, done, swaps, p, self.judge, max_missing=1.0)
        except JudgeError as e:
            log.warning("step %d: drift is not measured: %s", step, e)
            rows = []
        line = {"step": step, **drift(self.frozen, online, rows)}
        alarm = not line["online_rho"] >= p.metarm.drift_alarm
        line["alarm"] = bool(alarm)
        if alarm:
            log.warning(
                "step %d: MetaRM's rank correlation with the true reward is %.2f, below metarm.drift_alarm %.2f (%d fresh rollouts)",
                step, line["online_rho"], p.metarm.drift_alarm, line["n"],
            )  # fmt: skip
        self._write(step, line)
        return line

    def _write(self, step, line):
        write_jsonl(self.path, [*(x for x in read_rows(self.path) if x["step"] < step), line])
