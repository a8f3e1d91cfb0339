import re
import shutil

import pytest
import yaml

from rmnlhf import ROOT, benchmarks, params, sources

PROFILES = ("smoke", "cpu", "long", "gpu")


@pytest.fixture
def write(tmp_path):
    base = yaml.safe_load((ROOT / "params.yaml").read_text())

    def _write(change=lambda p: None):
        p = yaml.safe_load(yaml.safe_dump(base))
        change(p)
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(p))
        return path

    return _write


def test_every_profile_is_valid_and_named():
    for name in PROFILES:
        assert params.load(ROOT / "params.yaml", name).profile == name
    assert params.load(ROOT / "params.yaml").profile == "cpu"


def test_a_profile_lies_over_the_base_and_overrides_over_both(write):
    path = write(lambda p: p["profiles"].__setitem__("smoke", {"grpo": {"steps": 3}}))
    assert params.load(path, "smoke").grpo.steps == 3
    assert params.load(path, "smoke").grpo.lr == params.load(path).grpo.lr
    assert params.load(path, "smoke", ["grpo.steps=9"]).grpo.steps == 9
    assert params.load(path, None, ["profile=smoke"]).grpo.steps == 3


@pytest.mark.parametrize("text", ["5e-4", "0.0005", "5.0e-4", "+5E-4"])
def test_a_number_is_a_number_however_it_is_written(text, write):
    assert params.load(ROOT / "params.yaml", overrides=[f"grpo.lr={text}"]).grpo.lr == 0.0005
    raw = write(lambda p: None)
    raw.write_text(raw.read_text().replace("lr: 0.0001", f"lr: {text}"))
    assert params.load(raw).grpo.lr == 0.0005


@pytest.mark.parametrize(
    "override, key, hint",
    [
        ("grpo.stepz=3", "grpo.stepz", "steps"),
        ("nope.a=1", "nope", "grpo"),
        ("grpo.steps=many", "grpo.steps", "integer"),
        ("grpo.steps=-1", "grpo.steps", "greater than 0"),
        ("grpo=3", "grpo", "section"),
        ("reward.bonus=double", "reward.bonus", "'paper', 'rescaled' or 'binary'"),
        ("similarity.threshold=1.5", "similarity.threshold", "less than or equal to 1"),
        ("grm.think='yes'", "grm.think", "boolean"),
        ("grpo.seeds=[]", "grpo.seeds", "at least 1"),
        ("grpo.seeds=[7,7]", "grpo.seeds", "named twice"),
        ("grpo.seeds=[-1]", "grpo.seeds.0", "greater than or equal to 0"),
        ("seed=-1", "seed", "greater than or equal to 0"),
        ("rollout.temperature=0.0", "rollout.temperature", "greater than 0"),
        ("data.critique_sources=[mr_ben,mr_ben]", "data.critique_sources", "named twice"),
        ("data.plain_sources=[ukpconvarg]", "data.plain_sources", "also in data.critique_sources"),
        ("data.plain_sources=[haluquestqa]", "data.plain_sources", "data.evaluation_sources"),
        ("profile=tiny", "profile", "smoke, cpu, long, gpu"),
        ("policy.load_in_4bit=true", "load_in_4bit", "GPU"),
        ("policy.model=someone/model", "policy.revision", "give the commit"),
        ("metarm.base=someone/encoder", "metarm.base", "name@commit"),
        ("grpo.steps", "grpo.steps", "section.key=value"),
        ("grpo.seeds=[7", "grpo.seeds=[7", "not YAML"),
    ],
)
def test_wrong_values_are_refused_with_their_path_and_what_is_allowed(override, key, hint):
    with pytest.raises(params.ParamsError) as e:
        params.load(ROOT / "params.yaml", overrides=[override])
    assert key in str(e.value) and hint in str(e.value)


def test_wrong_files_are_refused(tmp_path, write):
    with pytest.raises(FileNotFoundError, match="repository root"):
        params.load(tmp_path / "none.yaml")
    for text in ("a: [", "- 1\n- 2\n", ""):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(params.ParamsError, match="bad.yaml"):
            params.load(tmp_path / "bad.yaml")
    with pytest.raises(params.ParamsError, match="cold_start: missing"):
        params.load(write(lambda p: p.pop("cold_start")))
    with pytest.raises(params.ParamsError, match=r"profiles\.cpu\.grpo\.speed"):
        params.load(write(lambda p: p["profiles"].__setitem__("cpu", {"grpo": {"speed": 1}})))
    with pytest.raises(params.ParamsError, match=r"profiles\.huge"):
        params.load(write(lambda p: p["profiles"].__setitem__("huge", {})))
    with pytest.raises(params.ParamsError, match="grpo.extra: unknown key"):
        params.load(write(lambda p: p["grpo"].__setitem__("extra", 1)))


def test_impossible_combinations_are_refused():
    with pytest.raises(params.ParamsError, match="grm.max_lines below 4.*the prompt"):
        params.load(ROOT / "params.yaml", "gpu", ["grm.max_lines=3"])
    with pytest.raises(params.ParamsError, match="max_completion of at least 256"):
        params.load(ROOT / "params.yaml", overrides=["grm.think=true", "policy.max_completion=80"])
    with pytest.raises(params.ParamsError, match="beside it MetaRM is a head.*metarm.base=minilm"):
        params.load(ROOT / "params.yaml", "gpu", ["policy.backend=unsloth"])
    with pytest.raises(params.ParamsError, match="beside it MetaRM is a head"):
        params.load(ROOT / "params.yaml", "gpu", ["policy.backend=unsloth", "metarm.base=policy", "metarm.tune=head"])
    assert params.load(ROOT / "params.yaml", "gpu", ["policy.backend=unsloth", "metarm.base=minilm", "metarm.tune=head"]).metarm.base == "minilm"
    small = ["policy.backend=unsloth", "metarm.base=minilm", "metarm.tune=head"]
    for key in ("policy.load_in_4bit=true", "rollout.engine=transformers"):
        with pytest.raises(params.ParamsError, match="needs vLLM for its rollouts"):
            params.load(ROOT / "params.yaml", "gpu", [*small, key])
    with pytest.raises(params.ParamsError, match="rounds away most of a cold start"):
        params.load(ROOT / "params.yaml", "gpu", ["policy.load_in_4bit=true", "cold_start.enabled=true"])
    with pytest.raises(params.ParamsError, match="a frozen encoder on the CPU"):
        params.load(ROOT / "params.yaml", "gpu", ["metarm.tune=head"])
    with pytest.raises(params.ParamsError, match="is over 1"):
        params.load(ROOT / "params.yaml", overrides=["cold_start.controlled_share=0.7", "cold_start.mr_ben_share=0.7"])


def test_a_pinned_hub_model_a_folder_and_a_packaged_name_are_accepted(tmp_path):
    from rmnlhf import policy

    assert set(params.PACKAGED) == set(policy.PACKAGED)
    for model, revision in [("someone/model", "0123abc"), (tmp_path, "null"), ("smollm2-135m", "null")]:
        found = params.load(ROOT / "params.yaml", overrides=[f"policy.model={model}", f"policy.revision={revision}"])
        assert found.policy.model == str(model)
    for base in ("someone/encoder@0123abc", tmp_path, "policy"):
        assert params.load(ROOT / "params.yaml", overrides=[f"metarm.base={base}"]).metarm.base == str(base)


def test_the_rehearsal_of_profile_gpu_is_the_profile_in_small(tmp_path, monkeypatch):
    setting = re.search(r"^gpu-rehearsal: SMALL := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr("sys.argv", ["params", "--profile", "gpu", "-o", "small.yaml"])
    monkeypatch.setenv("RMNLHF_SET", setting)
    params.main()
    small, whole = params.load("small.yaml"), params.load("params.yaml", "gpu")
    assert small.policy == whole.policy and small.judge == whole.judge and small.similarity == whole.similarity
    size = [p.grpo.steps * p.grpo.prompts * p.grpo.group for p in (small, whole)]
    assert 100 * size[0] < size[1] and 100 * small.metarm.pairs < whole.metarm.pairs


@pytest.mark.parametrize("setting, lacking", [
    ("policy.backend=unsloth policy.revision=c metarm.base=minilm metarm.tune=head", "policy.backend: unsloth needs unsloth and vllm"),
    ("policy.backend=unsloth policy.revision=c metarm.base=minilm metarm.tune=head rollout.engine=server", "policy.backend: unsloth needs unsloth,"),
    ("rollout.engine=vllm", "rollout.engine: vllm needs vllm"), ("rollout.engine=server", "rollout.engine: server needs vllm"), ("judge.kind=vllm", "judge.kind: vllm needs vllm"), ("", None),
])  # fmt: skip
def test_a_package_that_lacks_is_told_at_the_start(tmp_path, monkeypatch, setting, lacking):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr("sys.argv", ["params", "--profile", "gpu", "-o", "out.yaml"])
    monkeypatch.setenv("RMNLHF_SET", setting)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    if lacking is None:
        return params.main()
    with pytest.raises(params.ParamsError, match=lacking):
        params.main()
    assert not (tmp_path / "out.yaml").exists()


def test_the_resolved_file_loads_as_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    monkeypatch.setattr("sys.argv", ["params", "--profile", "smoke", "-o", "results/params.yaml"])
    params.main()
    assert params.load("results/params.yaml") == params.load("params.yaml", "smoke")


def test_every_parameter_is_read_somewhere():
    """A dial that turns nothing is worse than none."""
    code = "".join(p.read_text() for p in [*ROOT.glob("rmnlhf/**/*.py"), *ROOT.glob("notebooks/*.ipynb")] if p.name != "params.py")
    unused = [
        f"{section}.{key}"
        for section, field in params.Params.model_fields.items()
        if hasattr(field.annotation, "model_fields")
        for key in field.annotation.model_fields
        if not key.endswith("_sha256") and not re.search(rf"\.{key}\b", code)  # a checksum is no dial
    ]
    assert not unused


def test_names_of_sources_and_benchmarks_are_those_that_there_are():
    assert set(params.Source.__args__) == set(sources.names())
    assert set(params.Benchmark.__args__) == set(benchmarks.names())
    with pytest.raises(params.ParamsError, match=r"benchmarks\.names\.0: .*'judgebench'.*found 'judgebnech'"):
        params.load(ROOT / "params.yaml", overrides=["benchmarks.names=[judgebnech]"])


def test_a_changed_own_file_changes_the_runs_parameters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "params.yaml").read_text().replace("own: null", "own: mine.jsonl").replace("own: []", "own: [mine.jsonl]").replace("judges: [arms]", "judges: [arms, mine.jsonl]")
    (tmp_path / "params.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["params", "-o", "out.yaml"])
    with pytest.raises(params.ParamsError, match=r"data\.own: mine\.jsonl: no such file"):
        params.main()
    written = []
    for rows in ("one\n", "two\n"):
        (tmp_path / "mine.jsonl").write_text(rows)
        params.main()
        written.append(params.load("out.yaml"))
    first, second = ((p.data.own_sha256, *p.benchmarks.own_sha256, *p.benchmarks.judges_sha256) for p in written)
    assert len(first) == 3 and len(first[0]) == 64 and len(set(first)) == len(set(second)) == 1 and first != second
