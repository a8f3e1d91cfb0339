"""The DVC graph itself: the real dvc.yaml, with commands that only write the stages' outputs in place of the notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rmnlhf import ROOT, params, policy

STAGES = {n: s for n, s in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items() if n != "params"}


def paths(entries):
    return [next(iter(e)) if isinstance(e, dict) else e for e in entries]


def test_one_stage_for_each_notebook():
    assert sorted(STAGES) == sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb"))
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m rmnlhf.notebook {name}"
        for dep in stage["deps"]:
            assert dep == "data" or dep.startswith("results/") or (ROOT / dep).exists(), f"{name}: {dep}"


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_names_the_sections_that_its_notebook_reads(name):
    """A section that is read and not named would leave stale results; `P.x` in a cell is what reads."""
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())["cells"]
    code = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    named = set(STAGES[name]["params"][0]["results/params.yaml"])
    read = {m for m in re.findall(r"\bP\.(\w+)", code) if m in params.Params.model_fields}
    assert read <= named, read - named
    written = set(re.findall(r"results/metrics/(\w+)\.json\"?, \"w", code))
    assert not written or written == {name}


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    """A git repository with the real dvc.yaml and params, whose stages write a line each instead of running notebooks."""
    top = tmp_path_factory.mktemp("repo")
    spec = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    for name, stage in spec["stages"].items():
        if name == "params":
            continue
        outs = paths(stage.get("outs", [])) + paths(stage.get("metrics", []))
        stage["cmd"] = f"{sys.executable} fake.py {name} {' '.join(outs)}"
        for dep in stage["deps"]:
            if not dep.startswith("results/"):
                target = top / dep
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.exists():
                    (target.mkdir(), (target / "x").write_text("x")) if not Path(dep).suffix else target.write_text(dep)
    spec["stages"]["params"]["cmd"] = f"{sys.executable} -m rmnlhf.params -o results/params.yaml"
    shutil.copy(ROOT / "params.yaml", top)
    shutil.copy(ROOT / "rmnlhf" / "params.py", top / "rmnlhf" / "params.py")
    (top / "dvc.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    (top / ".gitignore").write_text("results/\nran.txt\n")
    (top / "fake.py").write_text(
        "import pathlib, sys\n"
        "open('ran.txt', 'a').write(sys.argv[1] + '\\n')\n"
        "text = sys.argv[1] + pathlib.Path('results/params.yaml').read_text()\n"
        "for out in map(pathlib.Path, sys.argv[2:]):\n"
        "    out.parent.mkdir(parents=True, exist_ok=True)\n"
        "    if out.suffix: out.write_text('{\"x\": %d}' % len(text) if out.suffix == '.json' else text)\n"
        "    else: out.mkdir(exist_ok=True); (out / 'f').write_text(text)\n"
    )
    run(top, "git", "init", "-q")
    run(top, "dvc", "init", "-q")
    run(top, "dvc", "config", "core.analytics", "false")
    (top / "rmnlhf" / "__init__.py").unlink(missing_ok=True)
    run(top, "dvc", "repro")
    return top


def run(top, *command, env=()):
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)} | dict(env)
    done = subprocess.run(command, cwd=top, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reran(top, *command, env=()):
    (top / "ran.txt").write_text("")
    run(top, *command, env=env)
    return set((top / "ran.txt").read_text().split())


def test_nothing_to_do_is_quick_and_does_nothing(repo):
    start = time.time()
    assert reran(repo, "dvc", "repro") == set()
    assert time.time() - start < 5


def test_a_section_reruns_what_uses_it_and_what_stands_on_that(repo):
    change = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(change.replace("candidates: 5", "candidates: 6"))
    again = reran(repo, "dvc", "repro")  # the report follows where the stage's figures change
    assert "08_downstream" in again and again <= {"08_downstream", "09_report"}
    (repo / "params.yaml").write_text(change)
    run(repo, "dvc", "repro")


def test_a_profile_from_the_environment_reruns_everything(repo):
    # stages whose outputs persist (training resumes in them) run again; the others come from DVC's cache on the way back
    assert reran(repo, "dvc", "repro", env={"RMNLHF_PROFILE": "smoke"}) == set(STAGES)
    assert params.load(repo / "results/params.yaml").profile == "smoke"


def test_a_new_arm_is_one_changed_line(repo):
    run(repo, "dvc", "repro")
    run(repo, "git", "add", "-A")
    run(repo, "git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "start")
    again = reran(repo, "dvc", "exp", "run", "-q", "-n", "wider", "-S", "downstream.candidates=7")
    assert "08_downstream" in again and again <= {"08_downstream", "09_report"}
    assert params.load(repo / "results/params.yaml").downstream.candidates == 7
    assert "wider" in run(repo, "dvc", "exp", "show", "--csv")
    run(repo, "git", "checkout", "-q", "params.yaml")
    run(repo, "dvc", "repro")


def test_a_failing_cell_is_named_a_former_runs_figures_go_and_progress_is_lines(tmp_path):
    """A notebook of its own, in a folder of its own: papermill is real."""
    import nbformat

    (tmp_path / "notebooks").mkdir()
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    nb.cells = [
        nbformat.v4.new_code_cell("params_file = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("import rmnlhf\nfrom tqdm.auto import tqdm\nfor _ in tqdm(range(3), 'steps'): pass\nimport sys; print('a warning stays', file=sys.stderr)"),
        nbformat.v4.new_code_cell("1 / 0"),
    ]
    nbformat.write(nb, tmp_path / "notebooks" / "04_made.ipynb")
    for name in ("figures/04_old.png", "figures/05_other.png", "tables/04_old.csv", "judgements/04/human.jsonl"):
        (tmp_path / "results" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "results" / name).write_text("x")
    code = f"import sys, pathlib, rmnlhf.notebook as n; n.ROOT = pathlib.Path({str(tmp_path)!r}); sys.argv = ['n', '04_made']; n.main()"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "04_made: cell 3 failed with ZeroDivisionError" in done.stderr
    assert "steps: 100%" in done.stdout + done.stderr
    assert sorted(p.name for p in (tmp_path / "results").rglob("*old*")) == [] and (tmp_path / "results/figures/05_other.png").exists()
    assert not (tmp_path / "results/judgements/04").exists()
    page = (tmp_path / "results/notebooks/04_made.html").read_text()
    assert "ZeroDivisionError" in page and "a warning stays" in page and "100%|" not in page  # progress is the log's


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_names_the_modules_that_it_imports(name):
    cells = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    if name == "09_report":  # report computes rewards and texts with what it imports
        code += (ROOT / "rmnlhf/report.py").read_text(encoding="utf-8").replace("from . import ROOT, ", "from rmnlhf import ").replace("from .", "from rmnlhf.")
    used = set(re.findall(r"^from rmnlhf\.(\w+)", code, re.MULTILINE))
    used |= {m for line in re.findall(r"^from rmnlhf import (.+)", code, re.MULTILINE) for m in re.split(r",\s*", line.strip())}
    deps = {Path(d).parts[1].removesuffix(".py") for d in paths(STAGES[name]["deps"]) if d.startswith("rmnlhf/")}
    assert used > {"params"} and not (lost := used - deps - {"params"}), lost


def linked(one, other):
    try:
        os.link(one, other)
    except OSError:  # another file system
        shutil.copy2(one, other)


@pytest.mark.timeout(1800)
def test_the_notebooks_run_to_the_report(tmp_path, data_dir):
    """Profile smoke, all stages, in a copy of the tracked files: what `make smoke` does once the data are there."""
    tracked = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "data", tmp_path / "data", copy_function=linked)
    (tmp_path / "models").symlink_to(policy.prepare("smollm2-135m").parent)
    path = {"PYTHONPATH": str(tmp_path), "RMNLHF_PROFILE": "smoke", "RMNLHF_SET": "", "RMNLHF_LAUNCH": "", "RMNLHF_JUDGE_URL": ""}
    run(tmp_path, "git", "init", "-q")
    run(tmp_path, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "DVCLive wants one")
    run(tmp_path, "dvc", "repro", "--no-run-cache", env=path)
    metrics = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "results" / "metrics").glob("*.json")}
    assert set(metrics) == set(STAGES) and metrics["06_grpo_online"]["online"]["core-F1"]["n"] > 0
    page = (tmp_path / "results" / "report.html").read_text(encoding="utf-8")
    assert "A step with the online MetaRM" in page and (tmp_path / "results" / "runs" / "online" / "adapter").is_dir()
    assert {p.stem for p in (tmp_path / "results" / "notebooks").glob("*.html")} == set(STAGES)
