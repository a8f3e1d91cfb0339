"""bench/gpu_check.py and bench/gpu.py without a GPU: the parts that can run do, on tiny shapes, and meet their bars."""

import json
import os
import subprocess
import sys

import pytest

from rmnlhf import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import gpu_common


def run(script, tmp_path, *options, **environment):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run([sys.executable, str(ROOT / "bench" / script), *options], capture_output=True, text=True, env=env, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())  # nothing is recorded that was not measured on a GPU
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_that_needs_no_gpu_passes(tmp_path):
    found = run("gpu_check.py", tmp_path)
    assert found["cuda"] is False and found["card"] is None
    parts = {k: v for k, v in found.items() if isinstance(v, dict) and "part_seconds" in v}
    assert {k for k, v in parts.items() if "skipped" in v} == {"cpu_equal", "four_bits", "unsloth", "vllm"}
    assert not [k for k, v in parts.items() if "failed" in v or "missing" in v]
    met = {k: b["met"] for k, b in found["bars"].items()}
    without = {"mask.mismatches", "long_pack.logps_off", "gradients.relative_difference", "metarm.saved_off", "resume.weights_apart"}
    assert {k for k, m in met.items() if m} == without
    assert {m for k, m in met.items() if k not in without} == {None}


def test_the_comparison_of_backends_runs_on_tiny_shapes(tmp_path):
    found = run("gpu.py", tmp_path)
    assert found["unsloth"] == found["vllm"] == {"skipped": "no CUDA device"}
    for prompt in (1000, 2500):
        assert found[f"trl_{prompt}"]["rollout_tokens_per_second"] * found[f"trl_{prompt}"]["rollout"]["seconds"] == pytest.approx(4 * 12)  # N · C
        assert found[f"step_trl_over_ours_{prompt}"] > 0 and found[f"fastest_{prompt}"] in ("transformers", "trl")


def test_a_bare_machine_names_what_it_lacks_and_does_the_rest(tmp_path):
    """torch and Transformers alone: no PEFT, trl, accelerate, datasets."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text("import sys\nsys.modules |= dict.fromkeys(['peft', 'trl', 'accelerate', 'datasets'])\n")
    bare = {"PYTHONPATH": str(tmp_path / "bare")}
    found = run("gpu_check.py", tmp_path / "out", "--part", "rollouts", **bare)
    assert found["tokens_per_second"] > 0 and found["logprobs_off"] < 0.06
    assert run("gpu_check.py", tmp_path / "out", "--part", "resume", **bare)["missing"] in ("trl", "accelerate")


def test_a_case_that_hangs_is_recorded(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import sys, time\nprint('at layer 3', file=sys.stderr, flush=True)\ntime.sleep(120)\n")
    assert gpu_common.alone(str(script), seconds=10) == {"failed": "not done after 10 s: at layer 3\n"}


@pytest.mark.parametrize("backend", ["transformers", "unsloth"])
def test_the_parameters_of_each_backend_are_possible(backend, tmp_path):
    assert gpu_common.small_params(str(tmp_path), **{"policy.backend": backend}).policy.backend == backend


def test_the_whole_step_is_held_to_its_bar():
    import gpu_check

    parts = {p.__name__: {} for p in gpu_check.PARTS} | {"step": {"ratio": 2.9}, "vllm": {"logprobs_off": 0.01}}
    judged = gpu_check.bars(parts | {"cuda": True})
    assert judged["step.ratio"] == {"figure": 2.9, "bar": "at least 3", "met": False} and judged["vllm.logprobs_off"]["met"]
    assert gpu_check.bars(parts | {"cuda": False})["step.ratio"]["met"] is None
