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
import test_judge
import yaml

from rmnlhf import ROOT, arguments, grm, params, policy, similarity, sources
from rmnlhf.pairs import fingerprint

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


def project(top):
    """The tracked files in a folder of their own, with the data and the prepared weights: a clean clone in which `make data` has run."""
    tracked = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(tracked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, top / name)
    shutil.copytree(ROOT / "data", top / "data", copy_function=linked)
    (top / "models").symlink_to(policy.prepare("smollm2-135m").parent)
    run(top, "git", "init", "-q")
    run(top, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "--allow-empty", "-m", "DVCLive wants one")


def figures(top):
    """{stage: its metrics} of a run that got to the report, with every notebook's page."""
    metrics = {p.stem: json.loads(p.read_text()) for p in (top / "results" / "metrics").glob("*.json")}
    assert set(metrics) == set(STAGES) and metrics["06_grpo_online"]["online"]["core-F1"]["n"] > 0
    assert {p.stem for p in (top / "results" / "notebooks").glob("*.html")} == set(STAGES)
    page = (top / "results" / "report.html").read_text(encoding="utf-8")
    assert "A step with the online MetaRM" in page and (top / "results" / "runs" / "online" / "adapter").is_dir()
    return metrics


@pytest.mark.timeout(1800)
def test_the_notebooks_run_to_the_report(tmp_path, data_dir):
    """Profile smoke, all stages: what `make smoke` does once the data are there."""
    project(tmp_path)
    path = {"PYTHONPATH": str(tmp_path), "RMNLHF_PROFILE": "smoke", "RMNLHF_SET": "", "RMNLHF_LAUNCH": "", "RMNLHF_JUDGE_URL": ""}
    run(tmp_path, "dvc", "repro", "--no-run-cache", env=path)
    figures(tmp_path)


# What of profile gpu a laptop without a hub cannot have: the weights, the length, the numbers. All else is the profile's: its sources, a
# think block's prompt, binary rewards from an LLM judge, MetaRM as LoRA on the policy's base, checkpointing, sampled verdicts.
ON_A_LAPTOP = (
    "policy.model=smollm2-135m policy.revision=null policy.max_prompt=420 policy.max_completion=256 cold_start.enabled=true "
    "cold_start.adapter=adapters/ukpconvarg data.max_train=60 data.max_eval=12 metarm.pairs=6 metarm.rollouts_per_pair=2 metarm.batch=8 "
    "metarm.max_length=400 metarm.epochs=1 metarm.drift_every=1 metarm.drift_pairs=2 grpo.steps=1 grpo.prompts=2 grpo.group=2 "
    "evaluation.pairs=2 evaluation.bootstrap=200 benchmarks.rows=4 benchmarks.arm_rows=1 benchmarks.judges=[online] downstream.candidates=2 "
    "downstream.questions=1 downstream.steps=1 downstream.max_completion=24"
)


def hub(data, made):
    """The hub's data sets of profile gpu, in the hub's layout, from generated pairs."""
    import gzip

    import pyarrow
    from pyarrow import parquet

    def table(file, rows):
        file.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)

    for name in sources.HUB:
        (data / name).mkdir()
        (data / name / "FETCHED.json").write_text('{"id": "x", "revision": "y"}')
    (data / "helpsteer3" / "preference").mkdir()
    for split, part in (("train", made[:80]), ("validation", made[80:100])):
        with gzip.open(data / "helpsteer3" / "preference" / f"{split}.jsonl.gz", "wt", encoding="utf-8") as f:
            for p in part:
                opinions = [{"score": {"A": -1, "B": 1, None: 0}[c.label], "reasoning": re.sub(r"Response ([AB])", lambda m: f"@Response {'AB'.index(m[1]) + 1}", c.text)}
                            for c in p.critiques]  # fmt: skip
                f.write(json.dumps({"domain": "general", "language": "english", "context": p.context, "response1": p.response_a,
                                    "response2": p.response_b, "overall_preference": -2 if p.label == "A" else 2, "individual_preference": opinions}) + "\n")  # fmt: skip

    def both(p):
        return (p.response_a, p.response_b) if p.label == "A" else (p.response_b, p.response_a)

    asked = [(p.id, p.context[0]["content"], *both(p)) for p in made[100:180]]
    table(data / "tulu3_if" / "data" / "train-00000-of-00001.parquet", [
        {"id": i, "prompt": q, "constraints": ["be right"], "chonsen_model": "m", "rejected_model": "n",
         **{k: [{"role": "user", "content": q}, {"role": "assistant", "content": text}] for k, text in (("chosen", good), ("rejected", bad))}}
        for i, q, good, bad in asked[:60]
    ])  # fmt: skip
    table(data / "rewardbench" / "data" / "filtered-00000-of-00001.parquet", [
        {"id": k, "subset": ["alpacaeval-easy", "hep-python"][k % 2], "prompt": q, "chosen": good, "rejected": bad} for k, (_, q, good, bad) in enumerate(asked[60:])
    ])  # fmt: skip
    table(data / "rewardbench2" / "data" / "test-00000-of-00001.parquet", [
        {"id": str(k), "subset": ["Focus", "Math"][k % 2], "prompt": q, "chosen": [good], "rejected": [bad, bad + " So it is.", "No."]}
        for k, (_, q, good, bad) in enumerate(asked[60:])
    ])  # fmt: skip


def offline_judge(number, body):
    """An endpoint that answers what it is asked as the offline backend would."""
    text, asks = body["messages"][-1]["content"], set(body["response_format"]["json_schema"]["schema"]["properties"])
    if asks == {"arguments"}:
        (critique,) = re.findall(r"<critique>\n(.*)\n</critique>", text, re.DOTALL)
        found = [{"text": a.text, "side": a.side or "both", "polarity": "blame" if a.polarity < 0 else "praise", "core": a.core} for a in arguments.extract(grm.restore(critique))]
        answer = {"arguments": found}
    elif "matched" in asks:
        _, generated, reference = re.split(r"\[(?:Generated|Reference) critique\]\n", text)
        score = similarity.similarity(generated, [reference])
        answer = {"repeats": False, "generated": len(score.generated), "reference": len(score.reference), "matched": len(score.matches)}
    else:
        answer = {"valid": 5} if asks == {"valid"} else {"yes": True}
    return test_judge.completion(json.dumps(answer), model=body["model"])


@pytest.mark.timeout(1800)
def test_profile_gpu_runs_to_the_report_in_small(tmp_path, data_dir):
    """Every stage of profile gpu on a CPU: its hub data sets in their layout, its judge behind an address, small weights."""
    project(tmp_path)
    hub(tmp_path / "data", sorted(sources.load("controlled", data_dir), key=lambda p: fingerprint("small", p.id)))
    endpoint = test_judge.Endpoint(offline_judge)
    path = {"PYTHONPATH": str(tmp_path), "RMNLHF_PROFILE": "gpu", "RMNLHF_SET": ON_A_LAPTOP, "RMNLHF_LAUNCH": "", "RMNLHF_JUDGE_URL": endpoint.url}
    try:
        run(tmp_path, sys.executable, "-m", "rmnlhf.judge", env=path)
        run(tmp_path, "dvc", "repro", "--no-run-cache", env=path)
    finally:
        endpoint.shutdown()
        endpoint.server_close()
    metrics = figures(tmp_path)
    assert metrics["04_metarm"]["base"] == "policy" and metrics["04_metarm"]["rows"]["human"] == 0
