"""The shared-prefix forward: a group's prompt is encoded once, its N completions follow in the same row.

    [prompt 1 | c1 | … | cN | prompt 2 | c1 | …]     positions restart after each prompt

A completion sees its own prompt and itself. Padded, a group costs N(P + C) tokens; packed, P + N·C. On CUDA a block mask goes
to flex attention. Elsewhere attention alone is unpacked: prompts attend causally, completions to their prompt and themselves,
so that its cost, too, is that of what is seen and not of a dense mask.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl.trainer.utils import selective_log_softmax_and_entropy

from . import policy

log = logging.getLogger(__name__)
ATTENTION = "rmnlhf_packed"
BY_CHUNKS = "rmnlhf_head_by_chunks"  # set on a model whose head is a plain product
ELEMENTS = (2**22, 2**26)  # of the head's logits in one chunk: what a CPU's cache holds; what fills a GPU


@dataclass(frozen=True)
class Packed:
    """Several groups in one row of S tokens, and the M completion tokens whose log-probability is wanted."""

    ids: torch.Tensor  # (1, S)
    positions: torch.Tensor  # (1, S)
    group: torch.Tensor  # (S,) which prompt
    branch: torch.Tensor  # (S,) 0 the prompt, k its k-th completion
    at: torch.Tensor  # (M,) the place whose output predicts the token
    labels: torch.Tensor  # (M,)
    row: torch.Tensor  # (M,) which completion, counted over all groups
    column: torch.Tensor  # (M,) which token of it


def pack(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Sequence[int]]], device="cpu") -> Packed:
    """P prompts and, for each, its completions (any number, any length, empty ones too).

    A completion's last token predicts nothing and is seen by nobody: it is a label only."""
    ids, positions, group, branch, at, labels, rows, columns = ([] for _ in range(8))
    row = 0
    for g, (prompt, members) in enumerate(zip(prompts, completions, strict=True)):
        if not len(prompt):
            raise ValueError(f"prompt {g} is empty")
        last = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        group += [g] * len(prompt)
        branch += [0] * len(prompt)
        for k, tokens in enumerate(members, 1):
            start = len(ids)
            ids += tokens[:-1]
            n = len(ids) - start
            positions += range(len(prompt), len(prompt) + n)
            group += [g] * n
            branch += [k] * n
            at += [last, *range(start, start + n)][: len(tokens)]
            labels += tokens
            rows += [row] * len(tokens)
            columns += range(len(tokens))
            row += 1
    t = [torch.tensor(x, dtype=torch.long, device=device) for x in (ids, positions, group, branch, at, labels, rows, columns)]
    return Packed(t[0][None], t[1][None], *t[2:])


def visible(p: Packed) -> torch.Tensor:
    """(S, S), True where a token (row) sees another (column): what both attentions below compute."""
    order = torch.arange(len(p.group), device=p.group.device)
    return (order[:, None] >= order) & (p.group[:, None] == p.group) & ((p.branch == 0) | (p.branch[:, None] == p.branch))


@dataclass(frozen=True)
class Branches:
    """Where the tokens of a pack with G prompts (up to P tokens) and R completions (up to C) stand once they are unpacked."""

    prompt: torch.Tensor  # (G, P) places in the pack; padding repeats a place
    completion: torch.Tensor  # (R, C)
    of: torch.Tensor  # (R,) each completion's prompt
    mask: torch.Tensor  # (R, 1, C, P + C), True where a completion's token sees its prompt's, then its own
    back: torch.Tensor  # (S,) each token's place among the G·P + R·C


def branches(p: Packed) -> Branches:
    _, run, length = torch.unique_consecutive(torch.stack([p.group, p.branch]), dim=1, return_inverse=True, return_counts=True)
    first = length.cumsum(0) - length  # of each run: a prompt or a completion
    is_prompt = p.branch[first] == 0
    order = torch.arange(len(run), device=run.device)
    back, rows, offset = torch.empty_like(run), [], 0
    for kind in (is_prompt, ~is_prompt):
        start, n = first[kind, None], length[kind, None]
        steps = torch.arange(int(n.max()) if len(n) else 0, device=run.device)
        rows.append((start + steps).minimum(start + n - 1))
        row = (kind.cumsum(0) - 1)[run]  # of each token, among its kind
        mine = kind[run]
        back[mine] = (offset + row * len(steps) + order - first[run])[mine]
        offset = rows[0].numel()
    prompt, completion = rows
    of = p.group[first[~is_prompt]]
    own = torch.ones(completion.shape[1], completion.shape[1], dtype=torch.bool, device=run.device).tril()
    seen = torch.arange(prompt.shape[1], device=run.device) < length[is_prompt][of, None]
    mask = torch.cat([seen[:, None].expand(-1, len(own), -1), own.expand(len(of), -1, -1)], 2)[:, None]
    return Branches(prompt, completion, of, mask, back)


def _branch_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, rmnlhf_branches=None, **kwargs):
    """Attention of one packed row: query (1, heads, S, D), key and value (1, kv heads, S, D) → (1, S, heads, D)."""
    t = rmnlhf_branches
    if t is None:  # a forward that is not packed
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, D)
    grouped = q.shape[1] != k.shape[1]

    def at(x, places):  # (S, heads, D) → (rows, heads, length, D)
        return x.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)

    kp, vp = at(k, t.prompt), at(v, t.prompt)
    parts = [scaled_dot_product_attention(at(q, t.prompt), kp, vp, is_causal=True, scale=scaling, enable_gqa=grouped)]
    if len(t.of):
        kc, vc = (torch.cat([x.index_select(0, t.of), at(own, t.completion)], 2) for x, own in ((kp, k), (vp, v)))
        parts.append(scaled_dot_product_attention(at(q, t.completion), kc, vc, attn_mask=t.mask, scale=scaling, enable_gqa=grouped))
    out = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in parts])
    return out.index_select(0, t.back)[None], None


AttentionInterface.register(ATTENTION, _branch_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def block_mask(p: Packed):
    """The same for flex attention, which skips blocks of tokens that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    group, branch = p.group, p.branch  # not p itself: what is compiled for one pack then serves the next

    def seen(batch, head, q, k):
        return (q >= k) & (group[q] == group[k]) & ((branch[k] == 0) | (branch[q] == branch[k]))

    n = len(p.group)
    return create_block_mask(seen, None, None, n, n, device=p.group.device)


def whole_blocks(p: Packed, size: int = 128) -> Packed:
    """Tokens of no group at the end, up to a whole number of flex attention's blocks. For less than one block torch takes another
    kernel, which in bf16 does not compile (seen with torch 2.11 on an H200)."""
    n = -len(p.group) % size
    return replace(p, ids=pad(p.ids, (0, n)), positions=pad(p.positions, (0, n)), group=pad(p.group, (0, n), value=-1), branch=pad(p.branch, (0, n)))


def attention(kind: str, p: Packed) -> dict:
    """What a forward of the packed row needs for attention `kind`: tokens, positions and who sees whom."""
    flex = kind == "flex_attention"
    p = whole_blocks(p) if flex else p
    row = {"input_ids": p.ids, "position_ids": p.positions, "use_cache": False}
    if flex:
        return row | {"attention_mask": block_mask(p)}
    if kind == ATTENTION:  # 4D: passed on as it is, and not read
        return row | {"attention_mask": p.ids.new_empty(1, 1, 1, 1, dtype=torch.bool), "rmnlhf_branches": branches(p)}
    if int(p.branch.max()) < 2 and not int(p.group.max()):
        return row | {"attention_mask": None}  # one prompt, one completion: a plain sequence, for any attention
    return row | {"attention_mask": visible(p)[None, None]}


def logps(model, p: Packed, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of the M tokens under softmax(logits / temperature), and the entropy there (no gradient).

    The head runs at the M places alone: a prompt has no logits. Where `prepare` found it plain and it is frozen, it runs by
    chunks and its (M, vocabulary) logits are never held: see `_Head`."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs, head = attention(model.config._attn_implementation, p), base.get_output_embeddings()
    if getattr(base, BY_CHUNKS, False) and type(head) is torch.nn.Linear and not head.weight.requires_grad:
        with policy.mixed_precision(model):
            hidden = getattr(base, base.base_model_prefix)(**inputs).last_hidden_state[0, p.at]
        return _Head.apply(hidden.to(head.weight.dtype), head.weight, p.labels, temperature)
    with policy.mixed_precision(model):
        logits = model(**inputs, logits_to_keep=p.at).logits
    if logits.shape[1] != len(p.at):
        logits = logits[:, p.at]  # this model knows no list of places and gives all
    found, entropy = selective_log_softmax_and_entropy(
        logits, p.labels[None], entropy_requires_grad=False, temperature=temperature
    )
    return found[0], entropy[0]


class _Head(torch.autograd.Function):
    """Hidden states (M, D), frozen head (V, D), labels (M,) → log-probabilities and entropies (M,) in float32.

    A token's log-probability has the gradient (W_y - Σ_v p_v W_v)/T with respect to its hidden state, whatever the loss makes of
    it: it is formed in the forward, chunk by chunk, and (M, D) is all that waits for the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature):
        wanted, m, new = ctx.needs_input_grad[0], len(labels), hidden.new_empty
        logps, entropy = new(m, dtype=torch.float32), new(m, dtype=torch.float32)
        slope = torch.empty_like(hidden) if wanted else None
        size = min(max(m, 1), max(16, ELEMENTS[hidden.device.type == "cuda"] // len(weight)))
        shape = (size, len(weight))  # of what all chunks are written into: new pages for each would cost more than the arithmetic
        logits, lp, probs = new(shape, dtype=weight.dtype), new(shape, dtype=torch.float32), new(shape, dtype=torch.float32)
        for part in (slice(i, min(i + size, m)) for i in range(0, m, size)):
            n, y = part.stop - part.start, labels[part, None]
            z, f, q = logits[:n], lp[:n], probs[:n]
            torch.mm(hidden[part], weight.t(), out=z)
            torch.log_softmax(q.copy_(z).div_(temperature), -1, out=f)
            logps[part] = f.gather(-1, y)[:, 0]
            torch.exp(f, out=q)
            entropy[part] = -torch.linalg.vecdot(q, f)
            if wanted:
                q.scatter_add_(-1, y, q.new_full((), -1.0).expand(y.shape))  # in float32: a sure token's 1 - p is small
                torch.mm(z.copy_(q), weight, out=slope[part])
        if wanted:
            slope.div_(-temperature)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx, grad, _):
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(slope.dtype), None, None, None


def scores(model, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Output (R,) of a decoder for sequence classification at the last token of each of R texts; what texts have in common at their
    beginning is encoded once (MetaRM's conversation and responses, before each critique of a group)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    order, prompts, members = sorted(range(len(rows)), key=rows.__getitem__), [], []
    for i in order:
        common = len(os.path.commonprefix([members[-1][0], rows[i]])) if members else 0
        if 2 * common >= len(rows[i]) and members:  # most of it
            members[-1].append(rows[i])
            prompts[-1] = min(prompts[-1], common, len(rows[i]) - 1)
        else:
            members.append([rows[i]])
            prompts.append(len(rows[i]) - 1)
    # a completion's last token is a label only: each gets one more, so that its own last token is read
    p = pack([m[0][:n] for m, n in zip(members, prompts)], [[[*x[n:], 0] for x in m] for m, n in zip(members, prompts)], model.device)
    with policy.mixed_precision(model):
        hidden = getattr(base, base.base_model_prefix)(**attention(base.config._attn_implementation, p)).last_hidden_state[0]
    ends = p.at[torch.cat([p.row[1:] != p.row[:-1], p.row.new_ones(1, dtype=torch.bool)])]
    found = score(base, hidden[ends])
    return torch.empty_like(found).index_put((torch.tensor(order, device=found.device),), found)


def score(base, hidden: torch.Tensor) -> torch.Tensor:
    """A sequence classifier's output (R,) from (R, hidden) states, in the precision of its head: two critiques of a group may differ by
    less than a step of bf16."""
    return base.score(hidden.to(base.score.weight.dtype))[:, 0].float()


def unpacked(model, prompts, completions) -> torch.Tensor:
    """What `logps` gives for `pack(prompts, completions)`, each completion in a forward of its own: for models that `prepare` refuses."""
    return torch.cat([logps(model, pack([p], [[c]], model.device))[0] for p, members in zip(prompts, completions, strict=True) for c in members])


@torch.no_grad()
def _try_by_chunks(model, base, p: Packed, plain: torch.Tensor):
    """Set BY_CHUNKS where the head by chunks gives the log-probabilities of the model's own forward (no cap, no scale, no adapter on it)."""
    head = base.get_output_embeddings()
    if model.device.type == "cpu" and base.dtype == torch.float32:
        return  # as exact against float64, but its sums' order is not trl's: the gradients' distance would double
    if type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad:
        setattr(base, BY_CHUNKS, True)
        try:
            off = (logps(model, p)[0].float() - plain.float()).abs().max().item()
        except (AttributeError, TypeError, ValueError, RuntimeError) as e:
            off, _ = float("inf"), log.info("head by chunks not used for %s: %s", type(base).__name__, e)
        setattr(base, BY_CHUNKS, off < 0.2)


def prepare(model) -> bool:
    """Choose the attention for this device and try it: whether packed and padded log-probabilities (of a sequence classifier:
    outputs) agree on a few tokens. The head by chunks is tried too, and left out without a word where it is no plain product.

    Models whose attention cannot take the mask (sliding windows, linear attention, own kernels) return False, with a message;
    they are trained padded, as trl does it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, training = base.config._attn_implementation, model.training
    vocabulary = base.get_input_embeddings().num_embeddings
    prompt, members = [t % vocabulary for t in (11, 12, 13, 14)], [[t % vocabulary for t in c] for c in ((21, 22, 23), (31, 32))]
    reason = compiled = None
    model.eval()
    setattr(base, BY_CHUNKS, False)
    if model.device.type == "cuda":  # after too many recompilations torch would run flex attention without its kernel, which holds all scores
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    try:
        if getattr(base.config, "sliding_window", None) or "sliding_attention" in (getattr(base.config, "layer_types", None) or ()):
            raise NotImplementedError("its attention has a sliding window")
        classifier, alone = hasattr(base, "score"), []
        if not classifier and base.get_output_embeddings() is None:
            raise NotImplementedError("it is no decoder: what follows the prompt changes how the prompt is read")
        base.set_attn_implementation("flex_attention" if model.device.type == "cuda" else ATTENTION)
        with torch.no_grad():
            packed = scores(model, [prompt + c for c in members]) if classifier else logps(model, pack([prompt], [members], model.device))[0]
            for c in members:
                with policy.mixed_precision(model):
                    out = model(input_ids=torch.tensor([prompt + c], device=model.device), use_cache=False).logits[0]
                after = out[len(prompt) - 1 : -1].float().log_softmax(-1) if not classifier else None
                alone.append(out if classifier else after.gather(-1, torch.tensor(c, device=model.device)[:, None])[:, 0])
        off = (packed.float() - torch.cat(alone)).abs()
        if not classifier:
            _try_by_chunks(model, base, pack([prompt], [members], model.device), packed)
        exact = base.dtype == torch.float32  # in bf16 one token of two right forwards may differ by 0.6: there the mean counts
        off = (off.max() if exact else off.mean()).item()
        if not off < (1e-3 if exact else 0.3):
            reason = f"its outputs differ by {off:.2g} from those of the padded forward"
    except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError, ImportError) as e:
        reason, compiled = f"{type(e).__name__}: {e}", isinstance(e, RuntimeError) and not isinstance(e, NotImplementedError)
    finally:
        model.train(training)
    if reason:
        base.set_attn_implementation(before)
        if compiled and model.device.type == "cuda" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
            raise RuntimeError(f"flex attention is compiled at first use, and no C compiler is found (apt-get install gcc python3-dev): {reason}")
        log.warning("shared-prefix forward not used for %s (%s): padded instead", type(base).__name__, reason)
    return reason is None
