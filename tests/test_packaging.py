import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from rmnlhf import ROOT

HOSTS = "|".join(a + r"\." + b for a, b in (("pypi", "org"), ("files", "pythonhosted"), ("download", "pytorch"), ("registry", "npmjs")))


def test_environment_yml_pins_nothing_itself():
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in env["dependencies"] if isinstance(d, dict))
    assert pip == ["-c requirements/constraints.txt", "-e .[gpu,dev]"]
    assert [d for d in env["dependencies"] if isinstance(d, str)] == ["python>=3.11,<3.13", "pip", "make"]


def test_the_lock_satisfies_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = (ROOT / "requirements/constraints.txt").read_text()
    pins = {m[1].lower().replace("_", "-"): m[2] for m in re.finditer(r"^([\w.-]+)==([^\s;]+)", lock, re.M)}
    from packaging.requirements import Requirement

    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    for requirement in map(Requirement, wanted):
        version = pins.get(requirement.name.lower().replace("_", "-"))
        assert version, f"{requirement.name} is not in the lock: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement} against {version}: make lock"
    assert "--hash" not in lock


def test_committed_files_name_no_index_and_carry_no_outputs():
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    assert len(files) > 50
    for name in filter(None, files):
        path = ROOT / name
        if not path.is_file() or path.suffix in (".safetensors", ".png"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not re.search(HOSTS, text), name


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_form(path):
    import nbformat

    nb = nbformat.read(path, 4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert sum("parameters" in c.metadata.get("tags", []) for c in code) == 1
    assert max(len(c.source.splitlines()) for c in code) <= 30
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert nb.metadata.kernelspec.name == "python3"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="nothing is done beside a GPU")
def test_freed_memory_is_used_again():
    code = """
import resource, rmnlhf, torch
faults = []
for _ in range(24):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-12])
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.05 * 11 * 2**26 / 4096  # pages of eleven tensors of 64 MB
