"""bench/gpu_check.py and bench/gpu.py without a GPU: the parts that can run do, on tiny shapes, and meet their bars."""

import json
import os
import subprocess
import sys

from rmnlhf import ROOT


def run(script, tmp_path, *options):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "bench" / script), *options], capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir())  # nothing is recorded that was not measured on a GPU
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_that_needs_no_gpu_passes(tmp_path):
    found = run("gpu_check.py", tmp_path)
    assert found["cuda"] is False and found["card"] is None
    parts = {k: v for k, v in found.items() if isinstance(v, dict) and "part_seconds" in v}
    assert {k for k, v in parts.items() if "skipped" in v} == {"cpu_equal", "unsloth", "vllm"}
    assert not [k for k, v in parts.items() if "failed" in v or "missing" in v]
    met = {k: b["met"] for k, b in found["bars"].items()}
    assert {k for k, m in met.items() if m} == {"mask.mismatches", "gradients.relative_difference", "metarm.saved_off", "resume.weights_apart"}
    assert {m for k, m in met.items() if k not in ("mask.mismatches", "gradients.relative_difference", "metarm.saved_off", "resume.weights_apart")} == {None}


def test_the_comparison_of_backends_runs_on_tiny_shapes(tmp_path):
    found = run("gpu.py", tmp_path)
    assert found["unsloth"] == {"skipped": "no CUDA device"}
    for prompt in (1000, 2500):
        assert found[f"step_trl_over_ours_{prompt}"] > 0 and found[f"fastest_{prompt}"] in ("transformers", "trl")
