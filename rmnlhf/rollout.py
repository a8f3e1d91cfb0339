"""N completions for each prompt, with log-probabilities: Transformers with the prompt encoded once, or vLLM.

Transformers' own `generate` encodes the prompt N times and reads N copies of its keys and values at every token. Here a
prompt is encoded once; its completions are decoded together and read one copy. On a CPU with bf16 instructions the
weights of this engine are a merged bf16 copy, whatever the trainer's dtype, laid out once for the matrix unit. On a GPU a
decoding step is recorded as a CUDA graph: launching its thousand kernels one by one takes longer than running them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import logging
import os
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import AttentionInterface, DynamicCache

from .policy import free, memory, merged_weights

log = logging.getLogger(__name__)
ATTENTION = "rmnlhf_decode"
FUSED = ("cpu",)  # devices where one kernel gives attention and its log-sum-exp
_engines = weakref.WeakKeyDictionary()  # model -> TransformersEngine, synchronised before each use
_vllm: dict = {}  # what vLLM was started for -> its engine: one for each process, as its sleep mode wants


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    ids: token ids, the end token included where `finished`; a completion that reached the limit is not finished
    logprobs: log-probability of each id under softmax(logits / temperature), which is the distribution that trl's ratio
      uses (top-p does not enter); at temperature 0 under softmax(logits)
    text: decoded without special tokens"""

    ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool


def generate(model, tokenizer, prompts, n=1, max_new_tokens=80, temperature=0.7, top_p=1.0, seed=0, batch=64, dtype=None):
    """Complete each of `prompts` (lists of token ids, shared objects allowed) `n` times: list of P lists of N `Completion`.

    `model` may carry an adapter: a merged copy is kept and synchronised at each call. Random numbers belong to a prompt's
    tokens (and to its count, where it is repeated), so neither the order of the prompts nor `batch` (sequences decoded
    together) changes what is drawn; in bf16 the rounding of a batched product depends on its size, so there a near tie may
    fall the other way. Temperature 0 is greedy. Raises ValueError for an empty prompt, or one that leaves no
    room for `max_new_tokens` in the model's context; RuntimeError saying what to lower when memory runs out."""
    engine = _engines.get(model)
    if engine is None or (dtype is not None and engine.dtype != dtype):
        engine = TransformersEngine(model, tokenizer, dtype)  # made with the weights of now
        if engine.copied:  # one that is the model itself would keep it alive
            _engines[model] = engine
    else:
        engine.sync(model)
    return engine.generate(prompts, n, max_new_tokens, temperature, top_p, seed, batch)


def engine(model, tokenizer, params):
    """The engine that `params.rollout.engine` names, with `model`'s weights; "auto" is vLLM where it is installed beside a GPU and
    can serve this model (not in 4 bits, no other base model served by this process), else Transformers. In one of several
    processes it is the server at $RMNLHF_ROLLOUT_URL, or Transformers where none is named.

    vLLM is started once in a process and takes over each model's weights; so what was returned for an earlier model is no longer
    its engine. Raises RuntimeError where vLLM would have to serve a second base model, or run inside one of several processes."""
    name, key = chosen(model, params), _served(model, params)
    if name == "transformers":
        return TransformersEngine(model, tokenizer)
    from accelerate import PartialState

    if name == "server":
        key = ("server",)
    elif (n := PartialState(cpu=not torch.cuda.is_available()).num_processes) > 1:
        raise RuntimeError(
            f"rollout.engine {params.rollout.engine}: vLLM cannot run inside each of {n} processes; start one server for all of them and "
            "set rollout.engine: server (README, GPU), or rollout.engine: transformers"
        )
    if key not in _vllm:
        if _vllm:
            raise RuntimeError(
                f"vLLM of this process was started for {next(iter(_vllm))} (model, revision, tokens), and its sleep mode allows no second "
                f"one for {key}: use a process of its own (restart the notebook's kernel), or rollout.engine: transformers"
            )
        _vllm[key] = (VllmServer if name == "server" else VllmEngine)(model, tokenizer, params)
    _vllm[key].sync(model)
    return _vllm[key]


def _served(model, params) -> tuple:
    """What vLLM is started for."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return getattr(base.config, "_name_or_path", ""), params.policy.revision, _longest(params)


def _longest(params) -> int:
    """Tokens of the longest prompt with its completion; benchmarks may have a limit of their own."""
    return max(params.policy.max_prompt, params.benchmarks.max_prompt or 0) + params.policy.max_completion


def chosen(model, params) -> str:
    """The engine that `rollout.engine` means for this model, in this process: "transformers", "vllm" or "server"."""
    if params.rollout.engine != "auto":
        return params.rollout.engine
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if not torch.cuda.is_available() or not importlib.util.find_spec("vllm") or getattr(base, "is_quantized", False):
        return "transformers"
    from accelerate import PartialState  # here: a bare machine that only decodes has none

    if (n := PartialState(cpu=False).num_processes) > 1:  # vLLM cannot run inside each of them
        if os.environ.get("RMNLHF_ROLLOUT_URL"):
            return "server"
        log.warning("rollouts by Transformers in each of %d processes, much slower than vLLM: start one server and name it in RMNLHF_ROLLOUT_URL", n)
        return "transformers"
    key = _served(model, params)
    if _vllm and key not in _vllm:
        log.warning("vLLM of this process serves %s: rollouts of %s are made by Transformers", next(iter(_vllm))[0], key[0])
        return "transformers"
    return "vllm"


def fast_dtype(model) -> torch.dtype:
    """bf16 on a CPU whose instructions include it (3 times the speed of fp32 there), else the model's own dtype."""
    own = next(model.parameters()).dtype
    if model.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return own


class TransformersEngine:
    """Batched decoding with shared prompt keys and values. `sync` copies the policy's merged weights in."""

    def __init__(self, model, tokenizer, dtype: torch.dtype | None = None):
        if hasattr(model, "_saved_temp_tokenizer") or any(type(m).forward.__module__.startswith("unsloth") for m in model.modules()):
            # its mark on a model that it loaded; a plain model of a class that it has patched in this process
            raise RuntimeError("what Unsloth has patched fills no Transformers cache: set rollout.engine: vllm, or policy.backend: transformers")
        self.tokenizer, self.dtype, self.graphs = tokenizer, dtype or fast_dtype(model), model.device.type == "cuda"
        adapter = hasattr(model, "peft_config")
        base = model.get_base_model() if adapter else model
        self.copied = not getattr(base, "is_quantized", False) and (adapter or base.dtype != self.dtype)
        self.model = model
        if self.copied:
            with torch.no_grad():
                self.model = copy.deepcopy(model)
                self.model = (self.model.unload() if adapter else self.model).eval()  # `sync` brings the merged weights
                for weight in self.model.parameters():  # and not buffers: rotary frequencies in bf16 are wrong by whole turns at token 2,000
                    weight.data = weight.data.to(self.dtype)
            self.model.requires_grad_(False)
            unit = model.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
            self.packed = _pack_linear(self.model) if unit and self.dtype == torch.bfloat16 else {}
            self.sync(model)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        self.ends = torch.tensor(sorted(e for e in ends if e is not None), device=model.device)

    @torch.no_grad()
    def sync(self, model):
        """Take over `model`'s weights, its adapter merged. 0.2 s for 135 M parameters."""
        if self.copied:
            target = dict(self.model.named_parameters())
            for name, weight in merged_weights(model, self.dtype):
                if name in self.packed:
                    self.packed[name].pack(weight)
                if name in target:  # a tied head is listed once
                    target[name].copy_(weight)

    @torch.no_grad()
    def generate(self, prompts, n, max_new_tokens, temperature, top_p=1.0, seed=0, batch=64, progress=False):
        """As `rollout.generate`."""
        limit, window = getattr(self.model.config, "max_position_embeddings", None), _window(self.model.config)
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} is empty")
            if limit and len(ids) + max_new_tokens > limit:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens: with max_new_tokens {max_new_tokens} it is over the model's context of "
                    f"{limit}; lower policy.max_prompt or policy.max_completion"
                )
            if window and len(ids) + max_new_tokens > window:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens: with max_new_tokens {max_new_tokens} it is over the {window} that this model's sliding "
                    "windows see, which Transformers' rollouts here do not know; set rollout.engine: vllm, or lower policy.max_prompt"
                )
        uniform = _uniforms(prompts, n, max_new_tokens, seed)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # alike lengths together: little padding
        out: list = [None] * len(prompts)
        size = max(1, batch // n)
        training = self.model.training
        self.model.eval()
        lower = f"lower rollout.batch ({batch}), policy.max_completion ({max_new_tokens}) or policy.max_prompt"
        try:
            with memory(f"while decoding {size * n} sequences: {lower}"):
                for start in tqdm(range(0, len(order), size), "rollouts", disable=not progress):
                    part = order[start : start + size]
                    with torch.inference_mode() if self.copied else nullcontext():  # else it is the model that trains
                        rows = self._decode([prompts[i] for i in part], [uniform[i] for i in part], n, max_new_tokens, temperature, top_p)
                    for g, i in enumerate(part):
                        out[i] = rows[g * n : (g + 1) * n]
        finally:
            self.model.train(training)
        return out

    def _decode(self, prompts, uniform, n, max_new_tokens, temperature, top_p):
        model, device = self.model, self.model.device
        live = torch.arange(len(prompts) * n, device=device)  # row -> completion; finished rows leave
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        kv, logits, step = _Shared(lengths, n, fixed=self.graphs), [], None
        flex = model.config._attn_implementation == "flex_attention"  # the model that trains, in 4 bits: each length would be compiled
        with _attention(model, "sdpa") if flex else nullcontext():
            for some in _alike(lengths.tolist()):  # padded on the right, where a causal mask hides it
                ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[g], device=device) for g in some], batch_first=True)
                ends, at = torch.unique(lengths[some] - 1, return_inverse=True)  # the head is applied at the prompts' ends alone
                cache = DynamicCache(config=model.config)
                got = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=ends)
                kv.put(some, cache)
                logits.append(got.logits[torch.arange(len(some), device=device), at])
        logits = torch.cat(logits).repeat_interleave(n, 0)
        uniform = torch.stack(uniform).flatten(0, 1).to(device)  # rows × tokens
        ids = torch.zeros(len(live), max_new_tokens, dtype=torch.long, device=device)
        lps = torch.zeros(len(live), max_new_tokens, device=device)
        count = torch.zeros(len(live), dtype=torch.long, device=device)
        finished = torch.zeros(len(live), dtype=torch.bool, device=device)
        done = torch.zeros(len(live), dtype=torch.bool, device=device)  # by row, until rows are removed
        with _attention(model, ATTENTION):
            for t in range(max_new_tokens):
                token, lp = _sample(logits, uniform[live, t], temperature, top_p)
                went_on = live[~done]
                ids[went_on, t], lps[went_on, t] = token[~done], lp[~done]
                count[went_on] = t + 1
                done = done | torch.isin(token, self.ends)
                finished[live[done]] = True
                left = int((~done).sum())
                if left == 0 or t == max_new_tokens - 1:
                    break
                if left <= (0.5 if self.graphs else 0.8) * len(live):  # a graph is of one shape, and recorded anew
                    keep = (~done).nonzero()[:, 0]
                    live, token, done = live[keep], token[keep], done[keep]
                    kv.keep(keep)
                    step = None
                if kv.advance():
                    step = None
                position = (lengths[live // n] + t)[:, None]
                step = step or self._step(kv, token[:, None], position)
                logits = step(token[:, None], position)
        ids, lps, count, finished = ids.tolist(), lps.tolist(), count.tolist(), finished.tolist()
        texts = self.tokenizer.batch_decode([r[:c] for r, c in zip(ids, count)], skip_special_tokens=True)
        return [Completion(r[:c], p[:c], x, f) for r, p, c, x, f in zip(ids, lps, count, texts, finished)]

    def _step(self, kv, token, position):
        """The call that gives the next token's logits for (R, 1) tokens and positions; on a GPU a graph, if the model allows one."""
        mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=token.device)  # 4D: passed on as it is; `_Shared` masks

        def step(token, position):
            out = self.model(token, position_ids=position, past_key_values=kv, use_cache=True, attention_mask=mask, rmnlhf_kv=kv)
            return out.logits[:, -1]

        if self.graphs and token.device.type == "cuda":
            try:
                return _Graph(step, token, position)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as e:
                self.graphs = False  # of later calls: this one's keys and values stay as they are
                log.warning("decoding without a CUDA graph, slower: %s", str(e).split("\n")[0])
        return step


class _Graph:
    """A step recorded once and replayed with new tokens and positions in the same places; its output is overwritten by the next."""

    def __init__(self, step, token, position):
        self.step = step  # what it holds is read by the graph
        self.token, self.position, self.graph = token.clone(), position.clone(), torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(self.token, self.position)  # what a first call allocates or chooses is not to be recorded
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(self.graph):  # back on this stream, also where it fails
            self.logits = step(self.token, self.position)

    def __call__(self, token, position):
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits


class _PackedLinear(torch.nn.Module):
    """A linear layer in bf16 whose weight is kept in the layout of the CPU's matrix unit; torch's own lays it out again at each call,
    which for the few rows of a decoding step costs a third of its time. Same sums."""

    def __init__(self, linear):
        super().__init__()
        self.bias = linear.bias
        self.pack(linear.weight.detach())

    def pack(self, weight):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def _pack_linear(model) -> dict:
    """Put `_PackedLinear` in the place of the model's linear layers; returns {name of the weight: layer}."""
    names = {id(w): n for n, w in model.named_parameters()}  # a tied head goes by the name of the embedding
    linear = {n: m for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    packed = {names[id(m.weight)]: _PackedLinear(m) for m in linear.values()}
    for name, module in linear.items():
        model.set_submodule(name, packed[names[id(module.weight)]])
    return packed


def _window(config) -> int | None:
    """Tokens that the model's sliding windows see; None where it has none."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def _alike(lengths, tokens=4096, ratio=0.75):
    """Groups of prompts (lengths, the longest first) to encode in one pass: at most `tokens` with padding, little of it padding."""
    groups: list = []
    for g, length in enumerate(lengths):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= tokens and length >= ratio * longest:
            groups[-1].append(g)
        else:
            groups.append([g])
    return groups


def _numbers(prompts, seed) -> list[int]:
    """63 random bits for each prompt, by its tokens and how often it came before."""
    seen, out = {}, []
    for ids in prompts:
        key = hashlib.sha256(f"{seed}:{list(ids)}".encode()).digest()
        seen[key] = seen.get(key, -1) + 1
        number = int.from_bytes(hashlib.sha256(key + bytes([seen[key] % 256, seen[key] // 256])).digest()[:8], "little")
        out.append(number >> 1)
    return out


def _uniforms(prompts, n, tokens, seed):
    """One (n, tokens) block of random numbers in [0, 1) for each prompt."""
    return [torch.rand(n, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(x)) for x in _numbers(prompts, seed)]


def _sample(logits, uniform, temperature, top_p):
    """Token and its log-probability for each row, by the inverse of the distribution function."""
    if temperature == 0:
        logits = logits.float()
        token = logits.argmax(-1)
        return token, (logits.gather(-1, token[:, None])[:, 0] - logits.logsumexp(-1))
    probs = (logits.float() / temperature).softmax(-1)
    drawn = probs
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)
        ranked[(ranked.cumsum(-1) - ranked) >= top_p] = 0.0
        drawn = torch.zeros_like(probs).scatter(-1, order, ranked)
    total = drawn.cumsum(-1)
    last = total[:, -1:]
    at = torch.minimum(uniform.to(total.dtype)[:, None] * last, last.nextafter(last.new_zeros(())))  # 1 - 1e-9 is 1 in float32
    token = torch.searchsorted(total, at, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, probs.gather(-1, token[:, None])[:, 0].log()


class _Shared:
    """Keys and values while decoding: one copy for each prompt (G·H, P, D), padded on the right, and the completions' own
    (R·H, T, D), T growing by blocks. It stands in for a Transformers cache: a model calls `update` in each layer.

    All stay dense: a batched product in bf16 copies anything else first. `fixed`: a step reads whole blocks, masked, and which
    token it writes is a number on the device, so that a recorded step serves all tokens of a block."""

    is_compileable = False
    BLOCK = (32, 256)  # `fixed`: 256

    def __init__(self, lengths, n, fixed=False):
        self.lengths, self.fixed = lengths, fixed
        self.at = torch.zeros(1, dtype=torch.long, device=lengths.device)  # the own token that is written
        self.own_bias = None  # (1, 1, 1, T), where `fixed`
        self.rows = torch.arange(len(lengths) * n, device=lengths.device) // n  # row -> prompt
        self.prompt: list = []  # by layer: [keys, values]
        self.own: list = []
        self.tokens = -1  # own tokens before this step
        self._layout()

    def put(self, some: list, cache):
        """Take over the prompts `some` from a Transformers cache that holds them, padded on the right."""
        lengths = self.lengths[some].tolist()
        for i, layer in enumerate(cache.layers):
            _, h, _, d = layer.keys.shape
            if len(self.prompt) <= i:
                new = layer.keys.new_zeros
                self.prompt.append([new(len(self.lengths) * h, self.width, d) for _ in "kv"])
                self.own.append([new(len(self.rows) * h, 0, d) for _ in "kv"])
            for kept, got in zip(self.prompt[i], (layer.keys, layer.values)):
                for g, p, x in zip(some, lengths, got):
                    kept[g * h : (g + 1) * h, :p] = x[:, :p]

    def advance(self) -> bool:
        """Before each step: one token more. True where that took new memory, whose places a recorded step does not know."""
        self.tokens += 1
        new = self.tokens == self.own[0][0].shape[1]
        if new:
            block = self.BLOCK[self.fixed]
            for own in self.own:  # one layer after the other: old and new together are twice the memory
                own[:] = [torch.cat([x, x.new_zeros(x.shape[0], block, x.shape[2])], 1) for x in own]
            if self.fixed:
                unseen = torch.arange(self.tokens + block, device=self.at.device) >= self.tokens
                self.own_bias = torch.zeros(unseen.shape, device=unseen.device).masked_fill(unseen, float("-inf"))[None, None, None]
        if self.fixed:
            self.at.fill_(self.tokens)
            self.own_bias[..., self.tokens] = 0.0
        return new

    def update(self, keys, values, layer_idx, *args, **kwargs):
        for kept, got in zip(self.own[layer_idx], (keys, values)):
            got = got.flatten(0, 2)
            if self.fixed:
                kept.index_copy_(1, self.at, got[:, None])
            else:
                kept[:, self.tokens] = got
        return keys, values

    def keep(self, index):
        """Drop every row that is not in `index`, and prompts without rows."""
        before, self.rows = len(self.rows), self.rows[index]
        for own in self.own:
            own[:] = [x.unflatten(0, (before, -1))[index].flatten(0, 1) for x in own]
        groups, self.rows = torch.unique(self.rows, return_inverse=True)
        before, self.lengths = len(self.lengths), self.lengths[groups]
        if len(groups) < before:
            width = int(self.lengths.max())
            for pair in self.prompt:
                pair[:] = [x.unflatten(0, (before, -1))[groups, :, :width].flatten(0, 1).contiguous() for x in pair]
        self._layout()

    def _layout(self):
        """Rows of a prompt stand side by side in (G, M) slots, so that one product reads the prompt once for all of them."""
        self.width = int(self.lengths.max())
        padding = torch.arange(self.width, device=self.lengths.device)[None] >= self.lengths[:, None]
        bias = torch.zeros(padding.shape, device=padding.device).masked_fill(padding, float("-inf"))[:, None, None]
        self.bias = bias if padding.any() else None
        counts = torch.bincount(self.rows)
        self.slots = int(counts.max())
        first = torch.cumsum(counts, 0) - counts
        slot = self.rows * self.slots + torch.arange(len(self.rows), device=self.rows.device) - first[self.rows]
        self.slot = None if len(slot) == len(counts) * self.slots else slot  # None: no slot is empty

    def get_seq_length(self, *args) -> int:
        return self.tokens

    def _grouped(self, x, h):
        """(R·H, rep, X) by row → (G·H, M·rep, X) by prompt."""
        r, g, (rep, width) = len(self.rows), len(self.lengths), x.shape[1:]
        x = x.reshape(r, h, rep, width)
        if self.slot is not None:
            x = x.new_zeros(g * self.slots, h, rep, width).index_copy_(0, self.slot, x)
        return x.view(g, self.slots, h, rep, width).transpose(1, 2).reshape(g * h, self.slots * rep, width)

    def _by_row(self, x, h):
        """(G, H, M·rep, X) by prompt → (R·H, rep, X) by row."""
        g, width = len(self.lengths), x.shape[-1]
        x = x.view(g, h, self.slots, -1, width).transpose(1, 2).reshape(g * self.slots, h, -1, width)
        return (x if self.slot is None else x[self.slot]).flatten(0, 1)

    def attend(self, query, layer_idx, scaling):
        """query (R, heads, 1, D) → (R, 1, heads, D): over the prompt's keys for all its rows at once, over each row's own, and the two
        joined by their log-sum-exp, which is one softmax over both."""
        r, heads, _, d = query.shape
        (prompt_keys, prompt_values), own = self.prompt[layer_idx], self.own[layer_idx]
        h, g = own[0].shape[0] // r, len(self.lengths)
        q = query.reshape(r * h, heads // h, d)
        keys, values = (x.view(r, h, -1, d)[:, :, : None if self.fixed else self.tokens + 1] for x in own)
        shared, level = _attend(
            self._grouped(q, h).view(g, h, -1, d), prompt_keys.view(g, h, -1, d), prompt_values.view(g, h, -1, d), self.bias, scaling
        )
        shared, level = self._by_row(shared, h), self._by_row(level[..., None], h)
        mine, mine_level = (x.flatten(0, 1) for x in _attend(q.view(r, h, -1, d), keys, values, self.own_bias, scaling))
        mixed = torch.lerp(mine.float(), shared.float(), torch.sigmoid(level - mine_level[..., None]))
        return mixed.to(query.dtype).view(r, 1, heads, d)


def _attend(query, keys, values, bias, scaling):
    """Attention of query (B, H, M, D) over keys and values (B, H, K, D), and the log-sum-exp (B, H, M) of its scores in float32.

    bias: (B, 1, 1, K), added to the scores, or None."""
    if query.device.type in FUSED:
        if bias is not None:
            bias = bias.to(query.dtype).expand(*query.shape[:3], -1)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what scaled_dot_product_attention runs: it alone tells the sums
        return flash(query, keys, values, 0.0, False, attn_mask=bias, scale=scaling)
    scores = (query @ keys.transpose(2, 3)).float() * scaling
    scores = scores if bias is None else scores + bias
    return scores.softmax(-1).to(query.dtype) @ values, scores.logsumexp(-1)


def _decode_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, rmnlhf_kv=None, **kwargs):
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
        raise RuntimeError("Transformers' rollouts here know no capped scores and no attention sinks: set rollout.engine: vllm")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rmnlhf_kv.attend(query, module.layer_idx, scaling), None


AttentionInterface.register(ATTENTION, _decode_attention)


@contextmanager
def _attention(model, name):
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise RuntimeError(f"{type(model).__name__} has an attention of its own, which Transformers' rollouts here do not know: set rollout.engine: vllm")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class VllmEngine:
    """vLLM behind the same calls. One engine for each process; merged weights are reloaded into it by `sync`.

    `reload_weights` is used and not `load_weights`, which fails on a CPU, where layers are repacked after loading."""

    def __init__(self, model, tokenizer, params):
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # weights are handed over inside this process
        from vllm import LLM

        self.tokenizer, self.cpu = tokenizer, not torch.cuda.is_available()
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        name = base.config._name_or_path
        commit = params.policy.revision if name == params.policy.model else getattr(base.config, "_commit_hash", None)
        self.llm = LLM(
            model=name, revision=commit, dtype="bfloat16", enforce_eager=self.cpu, seed=params.seed,
            max_model_len=_longest(params), gpu_memory_utilization=params.rollout.gpu_memory,
            logprobs_mode="processed_logprobs", enable_prefix_caching=True, enable_sleep_mode=not self.cpu,
        )  # fmt: skip
        self.asleep: list[str] = []  # parts of its memory

    def _wake(self, *parts):
        """Weights alone are awake while new ones come, whose merged copies need room; its cache when it generates."""
        if tags := [part for part in self.asleep if part in parts]:
            free()  # vLLM maps its memory beside what torch keeps
            self.llm.wake_up(tags)
            self.asleep = [part for part in self.asleep if part not in tags]

    def sync(self, model):
        """Take over `model`'s weights, its adapter merged."""
        self._wake("weights")
        weights = merged_weights(model, torch.bfloat16)  # one by one: all of them are as large as the model
        self.llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=weights))
        self.llm.reset_prefix_cache()

    def generate(self, prompts, n, max_new_tokens, temperature, top_p=1.0, seed=0, batch=64, progress=False):
        """As `rollout.generate`; on a CPU the engine's own seed counts, since vLLM has no seed by request there."""
        from vllm import SamplingParams

        sampling = [  # a seed for each prompt: requests of one seed draw the same numbers
            SamplingParams(
                n=n, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, logprobs=0, detokenize=False,
                seed=None if self.cpu else number % 2**31,
            )
            for number in _numbers(prompts, seed)
        ]  # fmt: skip
        self._wake("weights", "kv_cache")
        got = self.llm.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=progress)
        if not self.cpu:  # its memory is the update's now
            self.llm.sleep(level=1)
            self.asleep = ["weights", "kv_cache"]
        return [
            [
                Completion(
                    list(o.token_ids), [lp[i].logprob for i, lp in zip(o.token_ids, o.logprobs)],
                    self.tokenizer.decode(o.token_ids, skip_special_tokens=True), o.finish_reason == "stop",
                )
                for o in request.outputs
            ]
            for request in got
        ]  # fmt: skip


class VllmServer:
    """A vLLM server that all processes share, through trl's client; its address is in $RMNLHF_ROLLOUT_URL.

    The first process sends the merged weights; each asks for its own prompts. How to start the server: README, GPU."""

    def __init__(self, model, tokenizer, params):
        from accelerate import PartialState

        if not (url := os.environ.get("RMNLHF_ROLLOUT_URL")):
            raise ValueError("rollout.engine is server: name its address in RMNLHF_ROLLOUT_URL (http://host:port), or set another engine")
        from trl.generation.vllm_client import VLLMClient

        self.state, self.tokenizer = PartialState(), tokenizer
        self.client = VLLMClient(base_url=url, connection_timeout=240.0)
        if self.state.is_main_process:
            self.client.init_communicator(model.device)

    def sync(self, model):
        """Send `model`'s weights, its adapter merged. Processes that ask for completions wait for the first one themselves."""
        if self.state.is_main_process:
            sent = [(k, "bfloat16", list(w.shape)) for k, w in merged_weights(model, torch.bfloat16)]  # merged twice: all at once are a second model
            self.client.update_named_params(sent, merged_weights(model, torch.bfloat16))
            self.client.reset_prefix_cache()

    def generate(self, prompts, n, max_new_tokens, temperature, top_p=1.0, seed=0, batch=64, progress=False):
        """As `rollout.generate`; the server's own seed counts: one sent along would give every prompt the same numbers."""
        got = self.client.generate(
            [list(p) for p in prompts], n=n, max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, logprobs=0
        )
        flat = [
            Completion(ids, [x[0] for x in logprobs], self.tokenizer.decode(ids, skip_special_tokens=True), ids[-1:] == [self.tokenizer.eos_token_id])
            for ids, logprobs in zip(got["completion_ids"], got["logprobs"], strict=True)
        ]
        return [flat[i : i + n] for i in range(0, len(flat), n)]
