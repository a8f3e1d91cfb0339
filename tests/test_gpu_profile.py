"""Profile gpu without a GPU: its data are fetched or the run stops, and README's models and figures are those of the code."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from rmnlhf import ROOT, params, sources, splits

sys.path.insert(0, str(ROOT / "bench"))
import gpu_common

FILE = "bench/results/gpu_check.json"
COMMITTED = subprocess.run(["git", "show", f"HEAD:{FILE}"], cwd=ROOT, capture_output=True, text=True, check=False)  # `make gpu-check` writes there
MEASURED = json.loads(COMMITTED.stdout if COMMITTED.returncode == 0 else (ROOT / FILE).read_text(encoding="utf-8"))
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## GPU\n")[1].split("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in SECTION.splitlines() if line.endswith("| computed |")]
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": "1.5b", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "7b", "Qwen/Qwen2.5-7B-Instruct": "7b",
    "Qwen/Qwen3-8B": "8b",
}  # fmt: skip


def fits(card: str, model: str, changed: str):
    """The parameters of a row of README's table; any commit stands for the revision."""
    overrides = [f"policy.model={model}", "policy.revision=COMMIT", *re.findall("`(.+?)`", changed)]
    return params.load(ROOT / "params.yaml", "gpu", overrides)


def test_readme_names_each_policy_of_the_profile():
    assert {row[1].strip("`") for row in ROWS} == set(SHAPES) and {row[0] for row in ROWS} == {"16", "24", "80", "141"}
    P = params.load(ROOT / "params.yaml", "gpu", ["policy.model=Qwen/Qwen3-8B", "policy.revision=COMMIT"])
    assert (P.policy.model, P.policy.revision) == ("Qwen/Qwen3-8B", "COMMIT")
    (said,) = re.findall(r'`make gpu SET="([^"]+)"`', SECTION)
    assert params.load(ROOT / "params.yaml", "gpu", said.split()).policy.model == "Qwen/Qwen3-8B"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    commits = {model: re.findall(rf"{model}\s+(?:revision: )?([0-9a-f]{{40}})\b", text) for model in SHAPES}  # of each policy of the table
    assert all(len(found) == 1 for found in commits.values()) and f"policy.revision={commits['Qwen/Qwen3-8B'][0]}" in said.split()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} {row[1]}")
def test_readme_tells_what_the_formula_gives_and_it_fits(row):
    card, model, changed = row[0], row[1].strip("`"), row[2]
    P = fits(card, model, changed)
    found = gpu_common.memory(SHAPES[model], P, float(card))
    assert row[3:-1] == [f"{x:.1f}" for x in found.values()] and row[-1] == "computed"
    assert found["total"] + 2 < int(card)  # CUDA itself
    assert P.policy.load_in_4bit or found["rollouts"] > found["weights"] + 1  # vLLM's own copy, and some cache


def test_the_measured_row_is_the_file_and_beside_it_stands_the_formula():
    (row,) = [line for line in SECTION.splitlines() if line.endswith("| measured |")]
    assert row.split("|")[-3].strip() == f"{MEASURED['updates']['ours']['peak_gib'] * 2**30 / 1e9:.1f}"
    s = gpu_common.setting(True)
    P = params.load(ROOT / "params.yaml", "gpu", [f"policy.max_prompt={s.P}", f"policy.max_completion={s.C}", f"grpo.token_budget={s.P + s.N * s.C}"])
    found = gpu_common.memory(s.size, P, 141.0)
    assert f"terms come to {found['weights'] + found['adapter'] / 2 + found['activations'] + found['logits']:.1f}" in SECTION  # weights and gradients


def test_memory_counts_what_the_model_has():
    """The weights and the adapter that `build` makes, on shapes that a CPU holds."""
    P = params.load(ROOT / "params.yaml", "gpu", ["policy.rank=4"])
    model = gpu_common.build("tiny", torch.bfloat16, 4, where="cpu")
    lora = sum(w.numel() for n, w in model.named_parameters() if "lora_" in n)
    weights = sum(w.numel() for n, w in model.named_parameters() if "lora_" not in n and not n.endswith(("norm.weight", "bias")))
    found = gpu_common.memory("tiny", P, 80.0)
    assert found["adapter"] * 1e9 == 16 * lora and found["weights"] * 1e9 == pytest.approx(2 * weights)
    longer = params.load(ROOT / "params.yaml", "gpu", ["grpo.token_budget=65536"])
    tokens = 65536 * 8 * 2048 / (4096 + 8 * 2048)
    assert gpu_common.memory("7b", longer, 80.0)["logits"] == pytest.approx((10 * 2**26 + 2 * 3584 * tokens) / 1e9)


def test_make_gpu_fetches_what_the_profile_reads():
    P = params.load(ROOT / "params.yaml", "gpu")
    wanted = {n for n in (*P.data.critique_sources, *P.data.plain_sources, *P.data.evaluation_sources, *P.benchmarks.names) if n in sources.HUB}
    planned = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (fetching,) = [line for line in planned.splitlines() if "rmnlhf.sources " in line]
    assert set(fetching.split("rmnlhf.sources ")[1].split()) == wanted
    assert planned.index(fetching) < planned.index("dvc repro")


def test_a_labelled_pull_request_runs_make_gpu_and_keeps_its_notebooks():
    spec = yaml.safe_load((ROOT / ".github" / "workflows" / "gpu.yml").read_text(encoding="utf-8"))
    job, on = spec["jobs"]["gpu"], spec[True]  # YAML reads the key `on` as true
    assert on["pull_request"] == {"types": ["labeled"]} and "github.event.label.name == 'gpu'" in job["if"]
    (command,) = [s["run"] for s in job["steps"] if "run" in s]
    assert command.startswith("make ${{ inputs.target || 'gpu-rehearsal' }}")
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(on["workflow_dispatch"]["inputs"]["target"]["options"]) <= set(targets)
    upload = job["steps"][-1]
    assert upload["uses"].startswith("actions/upload-artifact") and upload["if"] == "always()"
    assert {"results/notebooks", "bench/results"} <= set(upload["with"]["path"].split())


def test_profile_gpu_does_not_train_on_generated_pairs(tmp_path):
    P = params.load(ROOT / "params.yaml", "gpu", [f"data.dir={tmp_path}", "data.evaluation_sources=[]"])
    with pytest.raises(FileNotFoundError, match="none of .*helpsteer3.*python -m rmnlhf.sources helpsteer3"):
        splits.make(P)


def test_readme_tells_what_was_measured_on_a_card():
    m, free = MEASURED, MEASURED["updates"]["ours_without_checkpointing"]
    assert m["cuda"] and m["card"] in SECTION and f"torch {m['versions']['torch'][:4]}" in SECTION
    wanted = [
        (f"{m['gradients']['relative_difference']:.1e}", "gradients.relative_difference"), (f"{m['updates']['ratio']:.2f}", "updates.ratio"),
        (f"{m['updates']['ours']['seconds'] / free['seconds']:.2f}", None),
        (f"{m['updates']['flop_share']:.2f}; {free['flop_share']:.2f}", "updates.flop_share"),
        (f"{m['updates']['peak_ratio']:.2f}; {m['updates']['peak_ratio_above_weights']:.2f}", "updates.peak_ratio"),
        (f"{m['rollouts']['ratio_together']:.2f}; {m['rollouts']['ratio_one_by_one']:.2f}", "rollouts.ratio_together"),
        (f"{m['rollouts']['ratio_recorded']:.2f}", None), (f"{m['rollouts']['share_of_decode_bound']:.2f}", None),
        ("; ".join(f"{m[p][k]:.3f}" for p, k in (("rollouts", "logprobs_off_after_sync"), ("smollm2", "logprobs_off"), ("four_bits", "logprobs_off"),
                                                  ("unsloth", "logprobs_off"))), "rollouts.logprobs_off_after_sync"),
    ]  # fmt: skip
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in SECTION.split("| | figure | bar |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()]
    assert [r[1] for r in rows] == [figure for figure, _ in wanted]
    for (_, _, bar), (_, name) in zip(rows, wanted):
        assert bar == (m["bars"][name]["bar"].replace("1e-04", "0.0001") if name else "")


def test_the_bars_of_the_file_are_those_of_its_figures():
    import gpu_check

    judged = gpu_check.bars(MEASURED)
    assert judged == MEASURED["bars"]
    assert {n for n, b in judged.items() if b["met"] is False} == {"updates.peak_ratio", "updates.flop_share"}  # README says why
