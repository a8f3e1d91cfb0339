"""`params.yaml` → validated `Params`. One base, four profiles laid over it, overrides last.

    python -m rmnlhf.params --profile smoke -o results/params.yaml     # what the DVC stages read
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Profile = Literal["smoke", "cpu", "long", "gpu"]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and torch take
ARMS = ("outcome", "human", "offline", "online")
PACKAGED = ("smollm2-135m", "minilm")  # policy.PACKAGED, without an import of torch


Source = Literal["controlled", "haluquestqa", "helpsteer3", "helpsteer3_sample", "mr_ben", "tulu3_if", "ukpconvarg"]
Benchmark = Literal[
    "judgebench", "pandalm", "llmbar", "rm_bench", "rewardbench", "rewardbench2", "helpsteer3", "ukpconvarg", "haluquestqa"
]  # fmt: skip


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Data(Section):
    dir: str
    critique_sources: list[Source]  # training pairs with human critiques
    plain_sources: list[Source]  # training pairs without
    evaluation_sources: list[Source]
    own: str | None  # JSONL of PreferencePair rows, added to the training pairs
    own_sha256: str | None = None  # filled in when a run's parameters are written: a changed file reruns its stages
    balance: Literal["natural", "length"]
    max_train: Positive
    max_eval: Positive
    max_chars: Positive  # pairs with a longer response are left out of training


class Grm(Section):
    think: bool
    max_lines: Positive
    max_chars: Positive
    max_repeats: Positive  # of one sentence within a critique


class SimilaritySection(Section):
    backend: Literal["offline", "llm"]
    threshold: Share


class Judge(Section):
    kind: Literal["endpoint", "vllm"]
    model: str
    base_url_env: str
    key_env: str
    cache: str
    timeout: Rate
    retries: Count
    concurrency: Positive
    answer_tokens: Positive
    max_calls: Positive
    max_tokens: Positive
    price: Annotated[list[float], Field(min_length=2, max_length=2)] | None  # input, output: currency per million tokens
    replay_only: bool


class Policy(Section):
    model: str
    revision: str | None
    backend: Literal["transformers", "unsloth"]
    dtype: Literal["float32", "bfloat16"]
    load_in_4bit: bool
    rank: Positive
    alpha: Positive
    targets: Literal["attention", "all"]
    gradient_checkpointing: bool
    max_prompt: Positive
    max_completion: Positive


class ColdStart(Section):
    enabled: bool
    adapter: str | None  # a shipped adapter; None trains one
    steps: Count
    batch_pairs: Positive
    critiques_per_pair: Positive
    lr: Rate
    verdict_weight: Rate
    controlled_share: Share
    mr_ben_share: Share


class Rollout(Section):
    engine: Literal["auto", "transformers", "vllm", "server"]
    temperature: Rate  # at 0 the completions of a group would be one
    top_p: Annotated[float, Field(gt=0, le=1)]
    batch: Positive
    gpu_memory: Annotated[float, Field(gt=0, lt=1)]


class Reward(Section):
    weight: Annotated[float, Field(ge=0)]
    gated: bool
    binary: bool
    bonus: Literal["paper", "rescaled", "binary"]
    max_missing: Share


class MetaRMSection(Section):
    base: str
    tune: Literal["head", "lora", "full"]
    lr: Rate
    epochs: Positive
    batch: Positive
    rollouts_per_pair: Positive
    human_pairs: Count
    pairs: Positive
    max_length: Positive
    target: Literal["composite", "process"]
    ranking: bool
    online_lr: Rate
    online_steps: Positive
    replay: Count
    replay_share: Annotated[float, Field(ge=0, lt=1)]
    drift_every: Positive
    drift_pairs: Positive
    drift_alarm: float


class Grpo(Section):
    steps: Positive
    prompts: Positive  # P, prompts per step
    group: Annotated[int, Field(ge=1)]  # G, rollouts per prompt
    lr: Rate
    epsilon: Rate
    beta: Annotated[float, Field(ge=0)]
    max_grad_norm: Rate
    token_budget: Positive
    shared_prefix: bool
    save_every: Positive
    seeds: Annotated[list[Seed], Field(min_length=1)]


class Evaluation(Section):
    pairs: Positive
    temperature: Annotated[float, Field(ge=0)]
    bootstrap: Annotated[int, Field(ge=100)]


class Benchmarks(Section):
    names: list[Benchmark]
    rows: Positive
    arm_rows: Positive | None  # None: rows
    judges: list[str]
    max_prompt: Positive | None  # None: policy.max_prompt
    votes: Positive
    own: list[str]  # JSONL files of PreferencePair rows, each one more benchmark
    own_sha256: list[str] = []
    judges_sha256: list[str] = []  # of recorded verdicts among the judges


class Downstream(Section):
    candidates: Annotated[int, Field(ge=2)]
    questions: Positive
    steps: Positive
    max_completion: Positive


class Params(Section):
    """Typed, validated parameters of one run. Sections are those of params.yaml, one for each stage of the story."""

    profile: Profile
    seed: Seed
    endpoint: bool = False  # whether a judge's address was known when the file was resolved: 02 asks it where it is
    data: Data
    grm: Grm
    similarity: SimilaritySection
    judge: Judge
    policy: Policy
    cold_start: ColdStart
    rollout: Rollout
    reward: Reward
    metarm: MetaRMSection
    grpo: Grpo
    evaluation: Evaluation
    benchmarks: Benchmarks
    downstream: Downstream

    @model_validator(mode="after")
    def _possible(self):
        if self.grm.think and self.policy.max_completion < 256:
            raise ValueError("grm.think needs policy.max_completion of at least 256: a think block would be cut before the verdict")
        if self.grm.think and (self.grm.max_lines < 4 or self.grm.max_chars < 1500):
            raise ValueError("grm.max_lines below 4 or grm.max_chars below 1500: with grm.think the prompt (grm.THINK) allows that much")
        if self.policy.load_in_4bit and self.profile != "gpu":
            raise ValueError("policy.load_in_4bit needs a GPU: use profile gpu")
        if self.policy.load_in_4bit and self.rollout.engine in ("vllm", "server"):
            raise ValueError(f"rollout.engine {self.rollout.engine} serves no 4-bit weights: set it to auto or transformers, or policy.load_in_4bit=false")
        if self.policy.load_in_4bit and self.cold_start.enabled:
            raise ValueError("policy.load_in_4bit rounds away most of a cold start that is merged into it: set cold_start.enabled=false")
        if self.policy.backend == "unsloth" and (self.metarm.tune != "head" or self.metarm.base in ("policy", self.policy.model)):
            raise ValueError(
                "policy.backend unsloth replaces the attention of its model's whole class, and patches what trains: beside it MetaRM is a head "
                "on a frozen encoder. Set metarm.base=minilm and metarm.tune=head, or policy.backend=transformers"
            )
        if self.policy.backend == "unsloth" and (self.policy.load_in_4bit or self.rollout.engine == "transformers"):
            raise ValueError(
                "policy.backend unsloth needs vLLM for its rollouts, which serves no 4-bit weights: set policy.load_in_4bit=false and "
                "rollout.engine=auto, or policy.backend=transformers"
            )
        if self.policy.revision is None and self.policy.model not in PACKAGED and not Path(self.policy.model).is_dir():
            raise ValueError(
                f"policy.revision: policy.model {self.policy.model!r} is neither packaged ({PACKAGED[0]}) nor a folder, so it comes "
                "from a hub, where it can change: give the commit"
            )
        base = self.metarm.base
        if base != "policy" and base not in PACKAGED and not Path(base).is_dir() and not all(base.partition("@")):
            raise ValueError(
                f"metarm.base: {base!r} is neither packaged ({', '.join(PACKAGED)}), 'policy' nor a folder, so it comes from a hub, "
                "where it can change: give name@commit"
            )
        d = self.data
        if len(set(self.grpo.seeds)) < len(self.grpo.seeds):
            raise ValueError("grpo.seeds: a seed is named twice")
        for key, names in (("critique_sources", d.critique_sources), ("plain_sources", d.plain_sources), ("evaluation_sources", d.evaluation_sources)):
            if len(set(names)) < len(names):
                raise ValueError(f"data.{key}: a source is named twice")
        if both := set(d.plain_sources) & {*d.critique_sources, *d.evaluation_sources}:
            raise ValueError(
                f"data.plain_sources: {min(both)} is also in data.critique_sources or data.evaluation_sources: all of its pairs would be trained on, "
                "without their critiques"
            )
        if self.metarm.tune == "head" and base == "policy" and self.policy.model not in PACKAGED:
            raise ValueError("metarm.tune head reads a frozen encoder on the CPU: set metarm.base=minilm, or metarm.tune=lora for the policy's base")
        if self.cold_start.controlled_share + self.cold_start.mr_ben_share > 1:
            raise ValueError("cold_start.controlled_share + cold_start.mr_ben_share is over 1")
        return self


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, as DVC reads the same file: 5e-4 is one, not a text."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class ParamsError(ValueError):
    """Parameters that cannot be used; the message names each key's path and what is allowed."""


def run_name(arm: str, seed: int, params) -> str:
    """The name of a run's folder under results/runs."""
    return arm if seed == params.grpo.seeds[0] else f"{arm}-{seed}"


def runs(params) -> dict[str, list[str]]:
    """{arm, the cold start among them: the names of its runs, one for each seed}. Other folders are of other parameters."""
    return {"cold_start": ["cold_start"]} | {arm: [run_name(arm, s, params) for s in params.grpo.seeds] for arm in ARMS}


def _overlay(base: dict, top: dict, path: str = "") -> dict:
    out = dict(base)
    for key, value in top.items():
        here = f"{path}{key}"
        if key not in base:
            raise ParamsError(f"{here}: unknown key; allowed: {', '.join(sorted(base))}")
        if isinstance(base[key], dict):
            if not isinstance(value, dict):
                raise ParamsError(f"{here}: expected a section with keys {', '.join(sorted(base[key]))}, found {value!r}")
            out[key] = _overlay(base[key], value, here + ".")
        else:
            out[key] = value
    return out


def _override(text: str) -> dict:
    key, eq, value = text.partition("=")
    if not eq or not key.strip():
        raise ParamsError(f"override {text!r}: write it as section.key=value")
    try:
        out = yaml.load(value, _Loader)
    except yaml.YAMLError as e:
        raise ParamsError(f"override {text!r}: the value is not YAML: {e}") from e
    for part in reversed(key.strip().split(".")):
        out = {part: out}
    return out


def load(path: str | Path = "params.yaml", profile: str | None = None, overrides=()) -> Params:
    """Read `path`, lay `profile` (default: the file's own) and `overrides` ("grpo.steps=5") over its base.

    Raises FileNotFoundError, or ParamsError naming each wrong key's path and what is allowed."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run from the repository root or name the file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ParamsError(f"{path}: not readable as YAML: {e}") from e
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: expected sections, found {type(raw).__name__}")
    profiles = raw.pop("profiles", None) or {}
    top = [_override(o) for o in overrides]
    for o in top:  # the profile itself may come as an override
        profile = o.pop("profile", profile)
    profile = profile or raw.get("profile")
    allowed = list(Profile.__args__)
    if profile not in allowed:
        raise ParamsError(f"profile: {profile!r}; allowed: {', '.join(allowed)}")
    if unknown := set(profiles) - set(allowed):
        raise ParamsError(f"profiles.{sorted(unknown)[0]}: unknown profile; allowed: {', '.join(allowed)}")
    raw["profile"] = profile
    for layer, name in [(profiles.get(profile) or {}, f"profiles.{profile}.")] + [(o, "") for o in top]:
        raw = _overlay(raw, layer, name)
    try:
        return Params.model_validate(raw)
    except ValidationError as e:
        lines = []
        for err in e.errors():
            key = ".".join(map(str, err["loc"]))
            known = Params.model_fields.get(err["loc"][0]) if err["loc"] else None
            if err["type"] == "extra_forbidden":
                fields = known.annotation.model_fields if known and len(err["loc"]) > 1 else Params.model_fields
                lines.append(f"{key}: unknown key; allowed: {', '.join(sorted(fields))}")
            elif err["type"] == "missing":
                lines.append(f"{key}: missing")
            else:
                lines.append(f"{key or 'params'}: {err['msg'].removeprefix('Value error, ')}" + (f" (found {err['input']!r})" if key else ""))
        raise ParamsError(f"{path}: " + "; ".join(lines)) from None


def _installed(params: Params):
    """A package that a run would look for hours after its start is looked for at once."""
    unsloth, engine = params.policy.backend == "unsloth", params.rollout.engine
    needs = {
        "policy.backend: unsloth": ("unsloth",) * unsloth + ("vllm",) * (unsloth and engine != "server"),
        f"rollout.engine: {engine}": ("vllm",) * (engine in ("vllm", "server")),  # trl's client of a server imports it too
        "judge.kind: vllm": ("vllm",) * (params.similarity.backend == "llm" and params.judge.kind == "vllm" and not params.judge.replay_only),
    }
    for key, names in needs.items():
        if lacking := [name for name in names if importlib.util.find_spec(name) is None]:
            raise ParamsError(
                f"{key} needs {' and '.join(lacking)}, which this environment lacks: run `make setup` anew where nvidia-smi finds the GPU, or "
                "set another one"
            )


def _sha256(key: str, file: str) -> str:
    if not Path(file).is_file():
        raise ParamsError(f"{key}: {file}: no such file; a path is read from the repository root")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def main():
    ap = argparse.ArgumentParser(description="Validate params.yaml and write the parameters of one profile.")
    ap.add_argument("--profile", default=os.environ.get("RMNLHF_PROFILE") or None)
    ap.add_argument("-o", "--out", default="results/params.yaml")
    args = ap.parse_args()
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    found = load(profile=args.profile, overrides=os.environ.get("RMNLHF_SET", "").split())  # key=value …: `make gpu-rehearsal`
    _installed(found)
    found.data.own_sha256 = _sha256("data.own", found.data.own) if found.data.own else None
    found.endpoint = bool(os.environ.get(found.judge.base_url_env))
    found.benchmarks.judges_sha256 = [_sha256("benchmarks.judges", name) for name in found.benchmarks.judges if name.endswith(".jsonl")]
    found.benchmarks.own_sha256 = [_sha256("benchmarks.own", file) for file in found.benchmarks.own]
    part.write_text(yaml.safe_dump(found.model_dump(), sort_keys=False), encoding="utf-8")
    os.replace(part, out)


if __name__ == "__main__":
    main()
