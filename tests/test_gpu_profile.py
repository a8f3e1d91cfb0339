"""Profile gpu without a GPU: its data are fetched or the run stops, and README's models and figures are those of the code."""

import subprocess

import pytest

from rmnlhf import ROOT, params, sources, splits


def test_make_gpu_fetches_what_the_profile_reads():
    P = params.load(ROOT / "params.yaml", "gpu")
    wanted = {n for n in (*P.data.critique_sources, *P.data.plain_sources, *P.data.evaluation_sources, *P.benchmarks.names) if n in sources.HUB}
    planned = subprocess.run(["make", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (fetching,) = [line for line in planned.splitlines() if "rmnlhf.sources " in line]
    assert set(fetching.split("rmnlhf.sources ")[1].split()) == wanted
    assert planned.index(fetching) < planned.index("dvc repro")


def test_profile_gpu_does_not_train_on_generated_pairs(tmp_path):
    P = params.load(ROOT / "params.yaml", "gpu", [f"data.dir={tmp_path}", "data.evaluation_sources=[]"])
    with pytest.raises(FileNotFoundError, match="none of .*helpsteer3.*python -m rmnlhf.sources helpsteer3"):
        splits.make(P)
