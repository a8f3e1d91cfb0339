"""A policy of two random layers with the real tokenizer, and what training on it needs: seconds instead of minutes."""

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rmnlhf import grpo, params, policy, rewards
from rmnlhf.arguments import Argument
from rmnlhf.grm import Judgement
from rmnlhf.pairs import HumanCritique, PreferencePair, fingerprint
from rmnlhf.similarity import Similarity
from rmnlhf.splits import Splits


def tokenizer():
    return AutoTokenizer.from_pretrained(policy.prepare("smollm2-135m"))


def model(lora: bool = False, seed: int = 0, hidden: int = 32):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=hidden, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    out = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        out = get_peft_model(out, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in out.named_parameters():
            if "lora_B" in name:
                weight.data = torch.randn(weight.shape, generator=generator) * 0.05
    return out


def pairs(n: int, critiques: bool = True, source: str = "any") -> list[PreferencePair]:
    return [
        PreferencePair(
            f"{source}-{i}", source, f"g{i}", [{"role": "user", "content": f"Name a reason, number {i}."}], f"Reason {i} is rain.",
            f"Reason {i} is sun and wind.", "AB"[i % 2],
            [HumanCritique(str(k), "AB"[i % 2], f"Response {'AB'[i % 2]} names reason {i}.") for k in range(2)] if critiques else [],
        )
        for i in range(n)
    ]  # fmt: skip


def settings(**overrides):
    small = {
        "policy.max_prompt": 160, "policy.max_completion": 8, "policy.dtype": "float32", "grpo.steps": 3, "grpo.prompts": 2, "grpo.group": 4,
        "grpo.save_every": 1, "grpo.token_budget": 400, "rollout.engine": "transformers", "rollout.temperature": 1.0,
    }  # fmt: skip
    return params.load(profile="smoke", overrides=[f"{k}={v}" for k, v in {"reward.binary": "true", **small, **overrides}.items()])


def splits(n: int = 6) -> Splits:
    seen, hidden = pairs(n), pairs(n, critiques=False, source="hidden")
    truth = {p.id: q.critiques for p, q in zip(hidden, pairs(n, source="hidden"))}
    return Splits(seen, hidden, pairs(2, source="unseen"), {}, truth, "any")


def read_anything(text, *limits) -> Judgement:
    """A verdict for any text, by its hash: a random policy writes no format."""
    if fingerprint("format", text) % 5 == 0:
        return Judgement(None, None, "format")
    return Judgement(text or "-", "AB"[fingerprint(text) % 2], None)


def compare_anything(critiques, references, **options):
    out = []
    for c, r in zip(critiques, references):
        score = fingerprint("f1", c) % 101 / 100
        out.append(Similarity(*[score] * 3, [(0, 0, score)], [Argument(c, "A", 1)], [Argument("sun", "A", 1, True)]) if r else None)
    return out


class Linear:
    """The least MetaRM: one weight, one bias, momentum; what a checkpoint has to hold."""

    def __init__(self):
        self.weights, self.momentum, self.calls = torch.zeros(2), torch.zeros(2), []

    def _x(self, rows):
        return torch.tensor([[fingerprint("x", r["critique"]) % 7 / 7, 1.0] for r in rows])

    def update(self, rows):
        self.calls.append(("update", list(rows)))
        if not rows:
            return None
        x, y = self._x(rows), torch.tensor([r["target"] for r in rows])
        error = x @ self.weights - y
        self.momentum = 0.9 * self.momentum + x.T @ error / len(rows)
        self.weights = self.weights - 0.3 * self.momentum
        return float(error.square().mean())

    def score(self, rows):
        self.calls.append(("score", list(rows)))
        return (self._x(rows) @ self.weights).numpy() if rows else []

    def state_dict(self):
        return {"weights": self.weights, "momentum": self.momentum}

    def load_state_dict(self, state):
        self.weights, self.momentum = state["weights"], state["momentum"]


def train(folder, arm="online", model_=None, monkeypatch=None, **overrides):
    """One run on the tiny policy: parser and similarity replaced by hashes of the text, since it writes noise."""
    torch.set_num_threads(1)
    grpo.grm.parse_judgement, rewards.process_rewards = read_anything, compare_anything
    metarm = Linear() if arm in ("offline", "online") else None
    return grpo.train(arm, settings(**overrides), splits=splits(), metarm=metarm, model=(model_ or model(True), tokenizer()), run=folder)


def copy_merged(model):
    import copy

    return copy.deepcopy(model).merge_and_unload()
