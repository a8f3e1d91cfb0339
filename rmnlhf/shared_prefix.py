"""The shared-prefix forward: a group's prompt is encoded once, its N completions follow in the same row.

    [prompt 1 | c1 | … | cN | prompt 2 | c1 | …]     positions restart after each prompt

A completion sees its own prompt and itself. Padded, a group costs N(P + C) tokens; packed, P + N·C. On CUDA the block mask
goes to flex attention, elsewhere a dense mask to scaled-dot-product attention.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from trl.trainer.utils import selective_log_softmax_and_entropy

log = logging.getLogger(__name__)


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


def size(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> int:
    """Tokens that one group takes in a pack."""
    return len(prompt) + sum(max(len(c) - 1, 0) for c in completions)


def dense_mask(p: Packed) -> torch.Tensor:
    """(1, 1, S, S), True where a token (row) sees another (column)."""
    order = torch.arange(len(p.group), device=p.group.device)
    seen = (order[:, None] >= order) & (p.group[:, None] == p.group) & ((p.branch == 0) | (p.branch[:, None] == p.branch))
    return seen[None, None]


def block_mask(p: Packed):
    """The same for flex attention, which skips blocks of tokens that nobody sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch, head, q, k):
        return (q >= k) & (p.group[q] == p.group[k]) & ((p.branch[k] == 0) | (p.branch[q] == p.branch[k]))

    n = len(p.group)
    return create_block_mask(seen, None, None, n, n, device=p.group.device)


def logps(model, p: Packed, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each of the M tokens under softmax(logits / temperature), and the entropy there (no gradient).

    The head runs at the M places alone: a prompt has no logits."""
    mask = block_mask(p) if model.config._attn_implementation == "flex_attention" else dense_mask(p)
    logits = model(input_ids=p.ids, position_ids=p.positions, attention_mask=mask, use_cache=False, logits_to_keep=p.at).logits
    found, entropy = selective_log_softmax_and_entropy(
        logits, p.labels[None], entropy_requires_grad=False, temperature=temperature
    )
    return found[0], entropy[0]


def prepare(model) -> bool:
    """Choose the attention for this device and try it: whether packed and padded log-probabilities agree on a few tokens.

    Models whose attention cannot take the mask (sliding windows, linear attention, own kernels) return False, with a message;
    they are trained padded, as trl does it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before, training = base.config._attn_implementation, model.training
    vocabulary = base.get_input_embeddings().num_embeddings
    prompt, members = [t % vocabulary for t in (11, 12, 13, 14)], [[t % vocabulary for t in c] for c in ((21, 22, 23), (31, 32))]
    reason = None
    model.eval()
    try:
        base.set_attn_implementation("flex_attention" if model.device.type == "cuda" else "sdpa")
        with torch.no_grad():
            packed, _ = logps(model, pack([prompt], [members], model.device))
            alone = []
            for c in members:
                out = model(input_ids=torch.tensor([prompt + c], device=model.device), use_cache=False).logits[0, len(prompt) - 1 : -1]
                alone.append(out.float().log_softmax(-1).gather(-1, torch.tensor(c, device=model.device)[:, None])[:, 0])
        off = (packed.float() - torch.cat(alone)).abs().max().item()
        if not off < (1e-3 if base.dtype == torch.float32 else 0.3):
            reason = f"its log-probabilities differ by {off:.2g} from those of the padded forward"
    except (TypeError, ValueError, RuntimeError, NotImplementedError, ImportError) as e:
        reason = f"{type(e).__name__}: {e}"
    finally:
        model.train(training)
    if reason:
        base.set_attn_implementation(before)
        log.warning("shared-prefix update not used for %s (%s): training padded, as trl does", type(base).__name__, reason)
    return reason is None
