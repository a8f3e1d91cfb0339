"""The report: figures and where they come from, the word for each claim, missing stages, and the page in a real browser."""

import base64
import csv
import json
import math
import re
import shutil
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rmnlhf import params, report, splits
from rmnlhf.pairs import HumanCritique, PreferencePair, write_jsonl

ATTACK = '</script><script>window.injected = 1; document.title = "injected"</script><img src="http://x.invalid/a.png" onerror="window.injected=2">'
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
ARMS = ("outcome", "human", "online")


def make_pair(i, source="debates"):
    return PreferencePair(
        f"{source}-{i}", source, f"group {i % 3}", [{"role": "user", "content": f"Question {i}? " + (ATTACK if i == 0 else "")}],
        f"First answer {i} " + (ATTACK if i == 0 else ""), f"Second answer {i}", "A" if i % 2 else "B",
        [HumanCritique("w1", "A" if i % 2 else "B", f"Response A gives a reason in case {i}. Response B insults. " + (ATTACK if i == 0 else "")),
         HumanCritique("w2", "B" if i % 2 else "A", "Response B is shorter.")],
    )  # fmt: skip


def judgement_row(pair, order, arm, verdict, f1):
    """A row as benchmarks.runner.evaluate writes it: sides as shown to the model."""
    label = pair.label if order == "ab" else {"A": "B", "B": "A"}[pair.label]
    correct = verdict == label
    critique = f"Response A gives a reason. Response B is rude, says {arm}. " + (ATTACK if pair.id.endswith("-0") else "")
    return {
        "id": pair.id, "group": pair.group, "source": pair.source, "order": order, "label": label, "longer": "A",
        "verdict": verdict, "correct": correct, "error": None if verdict else "no choice", "critique": critique if verdict else None,
        "text": critique, "tokens": 20, "precision": f1, "recall": f1, "f1": f1, "inconsistent": bool(correct and f1 < 0.5),
        "arguments": [{"text": "SIDEA gives a reason", "side": "A", "polarity": 1, "core": True},
                      {"text": "Response B is rude", "side": "B", "polarity": -1, "core": False}],
        "reference": [{"text": "Response A gives a reason", "side": "A", "polarity": 1, "core": True},
                      {"text": "Response B insults", "side": "B", "polarity": -1, "core": True}],
        "matches": [[0, 0, 0.93]], "outcome": float(correct), "process": f1, "reward": float(correct) + 0.5 * (f1 >= 0.5),
    }  # fmt: skip


def make_results(folder, n_pairs=12, rollouts=40):
    """A results folder with rows of its own, in the layout of a run."""
    p = params.load(profile="smoke", overrides=["reward.binary=true"]).model_dump()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(p))
    pairs = [make_pair(i, ("debates", "answers")[i % 2]) for i in range(n_pairs)]
    splits.save(splits.Splits(pairs[:2], [], [], {"debates": pairs[2:], "answers": []}, {}, "debates"), folder / "splits")
    for sub in ("metrics", "tables", "figures", "timings"):
        (folder / sub).mkdir()
    (folder / "metrics/01_diagnosis.json").write_text(json.dumps({
        "inconsistency": {"cold_start": {"unseen": {"mean": 0.4567, "low": 0.40123, "high": 0.51234, "n": 321}}},
        "processbench": {"gsm8k": 0.0351}, "note": ATTACK}))  # fmt: skip
    (folder / "timings/01_diagnosis.json").write_text(json.dumps({"seconds": 63.0}))
    (folder / "timings/06_step.json").write_text(json.dumps({"with_metarm_over_without": 1.0123, "process_share": 0.0149}))
    with (folder / "tables/07_main.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["arm", "accuracy", "accuracy_low", "accuracy_high", "n"], ["human", 0.61234, 0.55, 0.67, 96]])
    (folder / "figures/01_inconsistency.png").write_bytes(PNG)
    for a, arm in enumerate(ARMS):
        rows = []
        for i, pair in enumerate(pairs):
            for o, order in enumerate(("ab", "ba")):
                verdict = [None, "A", "B"][(i + a + o * i) % 3]
                rows.append(judgement_row(pair, order, arm, verdict, f1=0.2 if i % 2 else 0.8))
        write_jsonl(folder / f"judgements/{arm}.jsonl", rows)
        write_jsonl(folder / f"runs/{arm}/rollouts.jsonl", [
            {**judgement_row(pairs[i % 2], "ba" if i % 4 == 3 else "ab", arm, "AB"[i % 2], 0.8), "pair_id": pairs[i % 2].id,
             "swap": i % 4 == 3, "step": i // 8, "metarm": 1.2, "correct": None} for i in range(rollouts)])  # fmt: skip
    return folder


# ---- figures and claims --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, text", [
    (None, "–"), (math.nan, "–"), (math.inf, "–"), (0, "0"), (1234, "1,234"), (0.12345, "0.123"), (0.00001, "1.0e-05"), (0.0, "0.000"),
    (True, "True"), ("x", "x"),
])  # fmt: skip
def test_number(value, text):
    assert report.number(value) == text


def test_show_gives_interval_and_n():
    assert report.show({"mean": 0.5, "low": 0.4, "high": 0.6, "n": 1200}) == "0.500 [0.400, 0.600], n = 1,200"
    assert report.show({"mean": 0.5, "low": None, "high": None, "n": 3}) == "0.500, n = 3"


def test_tidy_joins_intervals():
    head, body = report.tidy(["arm", "f1", "f1_low", "f1_high", "n"], [["human", "0.51234", "0.4", "0.6", "48"], ["short"]])
    assert head == ["arm", "f1 [95 % interval]", "n"]
    assert body[0] == ["human", "0.512 [0.400, 0.600]", "48"] and body[1][0] == "short"
    assert report.tidy(["figure", "mean", "low", "high"], [["core-F1", "0.5", "0.4", "0.6"], ["F1", "", "", ""], ["n", "2", "", ""]]) == (
        ["figure", "mean [95 % interval]"], [["core-F1", "0.500 [0.400, 0.600]"], ["F1", "–"], ["n", "2"]])  # fmt: skip
    assert report.tidy(["f1.mean", "f1.low", "f1.high", "difference", "low", "high"], [["1", "0.5", "1", "0.1", "0", "0.2"]])[1] == [["1 [0.500, 1]", "0.100 [0, 0.200]"]]
    assert report.tidy(["x", "mean", "low", "high"], [["a", "1.5", "1", "nan"]]) == (["x", "mean [95 % interval]"], [["a", "1.500 [1, –]"]])


def figure(mean, low, high, n=100):
    return {"mean": mean, "low": low, "high": high, "n": n}


CLAIM = {"stage": "05_grpo_offline", "key": "x", "above": 0}


@pytest.mark.parametrize("claim, value, word, why", [
    (CLAIM, figure(0.1, 0.05, 0.2), "reproduced", "above 0"),
    (CLAIM, figure(0.1, -0.05, 0.2), "not decided", "holds 0"),
    (CLAIM, figure(0.1, 0.0, 0.2), "not decided", "holds 0"),  # the bound itself is not cleared
    (CLAIM, figure(-0.1, -0.2, -0.05), "not reproduced", "below 0"),
    (CLAIM, figure(0.0, 0.0, 0.0), "not testable here", "no width"),
    (CLAIM, figure(0.1, 0.05, 0.2, n=29), "not testable here", "n = 29"),
    (CLAIM, figure(0.1, 0.05, 0.2, n=30), "reproduced", "above 0"),
    (CLAIM, figure(0.1, 0.05, 0.2, n=None), "not testable here", "n = None"),
    (CLAIM, figure(0.1, None, None), "not testable here", "no interval"),
    (CLAIM, figure(0.1, math.nan, math.nan), "not testable here", "no interval"),
    (CLAIM, figure(math.nan, math.nan, math.nan), "not testable here", "missing"),
    (CLAIM, 0.3, "not testable here", "no interval"),
    (CLAIM, None, "not testable here", "has no x"),
    ({"stage": "s", "key": "x", "below": 0.05}, figure(0.02, 0.01, 0.04), "reproduced", "below 0.05"),
    ({"stage": "s", "key": "x", "below": 0.05}, figure(0.2, 0.1, 0.3), "not reproduced", "above 0.05"),
    ({"stage": "s", "key": "x", "below": 0.05}, figure(0.05, 0.03, 0.07), "not decided", "holds 0.05"),
    ({"untestable": "no such data"}, None, "not testable here", "no such data"),
])  # fmt: skip
def test_the_word_for_a_claim(claim, value, word, why):
    got = report.judge(claim, value)
    assert got[0] == word and why in got[1]


def test_generated_pairs_do_not_test_a_claim_about_people():
    assert report.judge({**CLAIM, "human": True}, figure(0.1, 0.05, 0.2), generated=True)[0] == "not testable here"
    assert report.judge(CLAIM, figure(0.1, 0.05, 0.2), ran=False) == ("not testable here", "stage 05_grpo_offline did not run")


def test_few_groups_test_nothing():
    assert report.judge(CLAIM, figure(0.1, 0.05, 0.2), groups=9) == ("not testable here", "the rows come from 9 groups, fewer than 10")
    assert report.judge(CLAIM, figure(0.1, 0.05, 0.2), groups=10)[0] == "reproduced"


def test_a_figure_that_means_something_else_tests_nothing(tmp_path):
    (tmp_path / "metrics").mkdir()
    for reference, word in (("outcome", "reproduced"), ("longer", "not testable here")):
        metrics = {"reference": reference, "paired": {"human": {"all": figure(0.05, 0.01, 0.09, 400) | {"p_holm": 0.01}}}}
        (tmp_path / "metrics/07_benchmarks.json").write_text(json.dumps(metrics))
        [claim] = [c for c in report.claims(report.collect(tmp_path)) if c["id"] == "benchmarks"]
        assert claim["word"] == word
    assert claim["why"] == claim["where_text"]


@pytest.mark.parametrize("start", ["cold_start", "zero_shot"])
def test_the_rate_is_of_the_policy_that_training_starts_from(start, tmp_path):
    """Profile gpu has no cold start: there the rate of the untrained policy answers the paper's claim."""
    (tmp_path / "metrics").mkdir()
    rates = {"zero_shot": {"unseen": figure(0.1, 0.05, 0.2) | {"groups": 40}}, start: {"unseen": figure(0.4, 0.3, 0.5) | {"groups": 12}}}
    metrics = {"inconsistency": rates, "measure_separates": {"unseen": True}}
    (tmp_path / "metrics/01_diagnosis.json").write_text(json.dumps(metrics))
    run = report.collect(tmp_path)
    [claim] = [c for c in report.claims(run) if c["id"] == "inconsistency"]
    assert (claim["key"], claim["value"]["mean"], claim["word"]) == (f"inconsistency.{start}.unseen", 0.4, "reproduced")
    metrics["inconsistency"][start]["unseen"]["groups"] = 4
    (tmp_path / "metrics/01_diagnosis.json").write_text(json.dumps(metrics))
    run = report.collect(tmp_path)
    assert any("draw groups, here 4" in line for line in report.limits(run, report.claims(run)))


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 500))
def test_reproduced_means_the_interval_clears_the_bound(mean, below, above, n):
    value = figure(mean, mean - below, mean + above, n)
    assert (report.judge(CLAIM, value)[0] == "reproduced") == (value["low"] > 0 and n >= 30 and value["low"] < value["high"])


def test_every_claim_of_the_file_is_well_formed():
    claims = yaml.safe_load((report.TEMPLATES / "claims.yaml").read_text())
    assert len({c["id"] for c in claims}) == len(claims) >= 8
    for c in claims:
        assert {"id", "claim", "paper", "from"} <= set(c) and ("where" in c) == ("where_text" in c)
        if not c.get("untestable"):
            assert c["stage"] in report.STAGES and c["key"] and len({"above", "below"} & set(c)) == 1


# ---- the page as text ----------------------------------------------------------------------------------------------------


def test_figures_trace_to_file_and_key(tmp_path):
    page = report.build(make_results(tmp_path / "results")).read_text()
    assert "0.457 [0.401, 0.512], n = 321" in page
    assert 'title="metrics/01_diagnosis.json › inconsistency.cold_start.unseen"' in page
    assert "0.612 [0.550, 0.670]" in page and "tables/07_main.csv" in page
    assert page.count("data:image/png;base64,") == 1 and "figures/01_inconsistency.png" in page


def test_a_figure_of_a_table_without_a_metrics_file_is_found(tmp_path):
    for name in ("metrics", "tables", "runs/human"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "metrics/04_metarm.json").write_text('{"a": {"mean": 0.25, "n": 12}, "list": [3.5e-05], "flag": true}')
    (tmp_path / "runs/human/metrics.jsonl").write_text('{"step": 1, "kl": 0.0031}\n{"step": 2, "kl": -0.002}\n')
    (tmp_path / "tables/04_t.csv").write_text("name,mean,n,kl,step\ntext 7,0.2500004,12,-0.002,2\n\"a, b\",,12,3.5e-05,1\n")
    assert report.untraced(tmp_path) == {}
    with (tmp_path / "tables/04_t.csv").open("a") as file:
        file.write("c,0.26,13,,\n")
    assert report.untraced(tmp_path) == {"04_t": ["mean", "n"]}


def test_a_stage_that_did_not_run_is_said_to_be_missing(tmp_path):
    page = report.build(make_results(tmp_path / "results")).read_text()
    for stage in report.STAGES:
        assert (f"Missing: stage {stage} did not run" in page) == (stage not in ("01_diagnosis", "07_benchmarks"))
    assert "metrics/07_benchmarks.json is missing" in page


def test_an_empty_folder_gives_a_page_that_invents_nothing(tmp_path):
    page = report.build(tmp_path).read_text()
    assert page.count("did not run, or left no metrics file") == len(report.STAGES)
    assert "no arm left judgements" in page
    assert "0 are reproduced, 0 are not" in page
    with pytest.raises(FileNotFoundError, match="make repro"):
        report.build(tmp_path / "nowhere")


def test_broken_files_are_named_and_the_rest_is_used(tmp_path):
    folder = make_results(tmp_path / "results")
    (folder / "metrics/02_core_similarity.json").write_text('{"x": ')
    (folder / "metrics/04_metarm.json").write_text("[1]")
    with (folder / "judgements/human.jsonl").open("a") as f:
        f.write('{"id": "half-writ')
    run = report.collect(folder)
    assert set(run.unreadable) == {"metrics/02_core_similarity.json", "metrics/04_metarm.json"}
    assert len(run.judgements["human"]) == 24
    assert "metrics/02_core_similarity.json" in report.build(folder).read_text()


def test_the_same_results_give_the_same_page(tmp_path):
    folder = make_results(tmp_path / "results")
    assert report.build(folder).read_bytes() == report.build(folder, out=tmp_path / "again.html").read_bytes()


def test_flatten_keeps_what_stands_beside_a_mean():
    got = report.flatten({"a": {"b": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9, "valid": 1.0}, "c": [1]}, "d": None})
    assert got == {"a.b": {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}, "a.b.valid": 1.0, "d": None}


def test_missing_numbers_become_null_in_the_island():
    assert json.loads(report.island({"x": [math.nan, 1.5]})) == {"x": [None, 1.5]}


@given(st.text())
def test_no_text_leaves_the_data_island(text):
    got = report.island({"x": [text + ATTACK]})
    assert json.loads(got) == {"x": [text + ATTACK]} and not set("<>&\u2028\u2029") & set(got)


def test_viewer_puts_sides_in_the_pairs_own_order(tmp_path):
    data = report.viewer(report.collect(make_results(tmp_path / "results")))
    entry = next(e for e in data["entries"] if e["set"] == "held-out" and len({j["verdict"] for j in e["shown"]} - {None}) > 1)
    ab, ba = entry["shown"]
    assert (ab["order"], ba["order"]) == ("ab", "ba")
    for j in (ab, ba):  # right exactly where the verdict, in the pair's order, is the gold label
        assert j["correct"] == (j["verdict"] == data["pairs"][entry["pair"]]["label"])
    assert ab["arguments"][0]["side"] == "A" and ba["arguments"][0] == {**ab["arguments"][0], "text": "Response B gives a reason", "side": "B"}
    assert ab["arguments"][0]["text"] == "Response A gives a reason"  # sides by their names, not as the matcher masks them
    rollout = next(e for e in data["entries"] if e["set"] == "training" and e["shown"][0]["order"] == "ba")
    assert rollout["shown"][0]["critique"].startswith("Response B gives a reason")
    assert rollout["shown"][0]["rewards"]["metarm"] == 1.2


def test_judgements_of_several_notebooks_and_benchmark_texts(tmp_path):
    folder = make_results(tmp_path / "results")
    extra = make_pair(50, "bench")
    write_jsonl(folder / "judgements/06/human.jsonl", [judgement_row(extra, o, "human", "A", 0.7) for o in ("ab", "ba")])
    write_jsonl(folder / "pairs/bench.jsonl", [extra])
    data = report.viewer(report.collect(folder))
    [entry] = [e for e in data["entries"] if e["pair"] == extra.id]
    assert entry["arm"] == "human" and len(entry["shown"]) == 2 and data["pairs"][extra.id]["a"] == extra.response_a


def test_viewer_limit_keeps_held_out_rows_first(tmp_path):
    run = report.collect(make_results(tmp_path / "results"))
    data = report.viewer(run, limit=50)
    assert [e["set"] for e in data["entries"]].count("held-out") == 36 and len(data["entries"]) == 50
    assert data["left_out"] == 36 + 120 - 50


def test_the_last_rollouts_of_a_long_run_are_kept_and_the_others_counted(tmp_path, monkeypatch):
    folder = make_results(tmp_path / "results")
    whole = report.collect(folder)
    monkeypatch.setattr(report, "VIEWED", 10)
    run = report.collect(folder)
    assert all(run.rollouts[arm] == rows[-10:] for arm, rows in whole.rollouts.items())
    assert run.former == sum(len(rows) - 10 for rows in whole.rollouts.values()) > 0 and report.viewer(run, limit=50)["left_out"] == 36 + 120 - 50
    (folder / "runs/human/rollouts.jsonl").write_text("not JSON\n")
    assert list(report.collect(folder).unreadable) == ["runs/human/rollouts.jsonl"]


def test_model_card_has_data_licences_and_this_runs_figures(tmp_path):
    folder = make_results(tmp_path / "results")
    p = params.load(profile="smoke")
    (folder / "metrics/05_grpo_offline.json").write_text(json.dumps({"human": {"f1": figure(0.31, 0.25, 0.37, 200)}, "outcome": {"f1": figure(0.2, 0.1, 0.3)}}))
    card = report.model_card(p, folder / "runs/human/adapter", folder)
    assert "| metrics/05_grpo_offline.json | human.f1 | 0.310 [0.250, 0.370], n = 200 |" in card and "outcome.f1" not in card
    assert "`debates`: the owner's" in card and f"base_model: {p.policy.model}" in card
    splits.save(splits.Splits([make_pair(1)], [], [], {}, {}, "controlled"), folder / "splits")
    assert "`controlled`: Apache-2.0" in report.model_card(p, folder / "runs/human/adapter", folder)
    (tmp_path / "empty").mkdir()
    bare = report.model_card(p, "elsewhere/runs/human/adapter", tmp_path / "empty")
    assert "None: no metrics file" in bare and "is unknown" in bare


def test_held_out_rows_show_the_reward_they_would_earn(tmp_path):
    """Rows as benchmarks.runner.evaluate writes them have no rewards: right verdict, wrong verdict, no verdict, no human critique."""
    folder = make_results(tmp_path / "results")
    rows = [judgement_row(make_pair(i), "ab", "human", v, f) for i, v, f in ((1, "A", 0.8), (3, "A", 0.2), (5, "B", 0.9), (7, None, 0.0), (9, "A", math.nan))]
    rows = [{k: v for k, v in r.items() if k not in ("outcome", "process", "reward")} for r in rows]
    write_jsonl(folder / "judgements/human.jsonl", rows)
    run = report.collect(folder)
    got = {e["pair"]: e["shown"][0]["rewards"] for e in report.viewer(run)["entries"] if e["arm"] == "human" and e["set"] == "held-out"}
    assert {k: (v["outcome"], v["reward"]) for k, v in got.items()} == {
        "debates-1": (1.0, 1.5), "debates-3": (1.0, 1.0), "debates-5": (0.0, 0.0), "debates-7": (-1.0, -1.0), "debates-9": (1.0, 1.0),
    }  # fmt: skip
    assert got["debates-9"]["process"] is None


# ---- the page in a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium and driver:
        options.binary_location = chromium
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--window-size=1400,1000", "--force-prefers-reduced-motion",
                 f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:  # without a path Selenium looks for Chrome and its driver, and fetches them where there is none
        driver = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as e:
        pytest.fail(f"the report is tested in a real browser: install it with `apt-get install chromium chromium-driver` or as Chrome ({e.msg})")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return make_results(tmp_path_factory.mktemp("run") / "results")


@pytest.fixture
def page(browser, results):
    browser.get_log("performance")  # what the browser did before this page
    browser.get(report.build(results).as_uri())
    assert browser.execute_script("return document.documentElement.dataset.viewer") == "ready"
    yield browser
    errors = [x for x in browser.get_log("browser") if x["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    sent = [json.loads(x["message"])["message"] for x in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert [u[:40] for u in urls if not u.startswith(("file:", "data:", "chrome:"))] == []  # chrome: = its own new tab
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name).filter(n => !n.startsWith('data:'))") == []


def find(page, css):
    from selenium.webdriver.common.by import By

    return page.find_elements(By.CSS_SELECTOR, css)


def total(page):
    return int((re.search(r"of ([\d,]+)", find(page, "#count")[0].text) or [0, "0"])[1].replace(",", ""))


def pick(page, name, value):
    from selenium.webdriver.support.select import Select

    Select(find(page, "#f-" + name)[0]).select_by_value(value)


def expected(results, **want):
    entries = report.viewer(report.collect(results))["entries"]
    return [e for e in entries if all(test(e) for test in want.values())]


def test_each_filter(page, results):
    everything = total(page)
    assert everything == len(expected(results)) == 36 + 120
    verdict = {
        "right": lambda j: j["verdict"] and j["correct"], "wrong": lambda j: j["verdict"] and not j["correct"], "none": lambda j: not j["verdict"],
    }  # fmt: skip
    cases = [("arm", a, lambda e, a=a: e["arm"] == a) for a in ARMS]
    cases += [("set", s, lambda e, s=s: e["set"] == s) for s in ("held-out", "training")]
    cases += [("source", s, lambda e, s=s: e["pair"].startswith(s)) for s in ("debates", "answers")]
    cases += [("right", v, lambda e, t=t: any(t(j) for j in e["shown"])) for v, t in verdict.items()]
    cases += [("inconsistent", "process", lambda e: any(j["inconsistent"] for j in e["shown"]))]
    cases += [("inconsistent", "order", lambda e: len({j["verdict"] for j in e["shown"]} - {None}) > 1)]
    for name, value, test in cases:
        pick(page, name, value)
        assert total(page) == len(expected(results, t=test)), (name, value)
        assert 0 < total(page) < everything
        pick(page, name, "")
    pick(page, "arm", "human")
    pick(page, "right", "none")
    pick(page, "set", "training")
    assert total(page) == 0 and "No judgement passes" in find(page, "#count")[0].text
    find(page, "#filters button[type=reset]")[0].click()
    page.implicitly_wait(0)
    deadline = time.monotonic() + 5
    while total(page) != everything and time.monotonic() < deadline:
        time.sleep(0.02)
    assert total(page) == everything


def test_injected_markup_is_text(page):
    pick(page, "set", "held-out")
    pick(page, "source", "debates")
    items = find(page, "#list li")
    next(i for i in items if "debates-0" in i.text).click()
    detail = find(page, "#detail")[0]
    assert detail.text.count("<script>window.injected") >= 5  # question, response, human critique, three arms
    assert find(page, "#detail script, #detail img") == []
    assert page.execute_script("return [typeof window.injected, document.title]") == ["undefined", "RM-NLHF: report of a run"]
    assert "</script><script>window.injected" in find(page, "#figures")[0].get_attribute("textContent")  # a metric's text


def test_points_and_arms_side_by_side(page):
    pick(page, "set", "held-out")
    detail = find(page, "#detail")[0]
    assert [c.get_attribute("aria-label") for c in find(page, "#detail .arms > section")] != []
    assert sorted(c.get_attribute("aria-label") for c in find(page, "#detail .arms > section")) == sorted("Arm " + a for a in ARMS)
    for words in ("✓ matched, point 1 (0.93)", "unmatched: no human counterpart", "missed: not in the model’s critique", "A shown first", "B shown first"):
        assert words in detail.text
    assert find(page, "#detail li.k0") and find(page, "#detail mark.k0")
    assert {"outcome reward", "process (core-F1)", "total reward", "precision", "recall"} <= {t.text for t in find(page, "#detail .arms .rewards th")}


def test_keyboard_and_names_for_screen_readers(page):
    from selenium.webdriver.common.keys import Keys

    box = find(page, "#list")[0]
    box.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    at = box.get_attribute("aria-activedescendant")
    assert [i.get_attribute("id") for i in find(page, "#list li[aria-selected=true]")] == [at] != ["e0"]
    assert find(page, "#list li")[2].get_attribute("id") == at
    box.send_keys(Keys.END)
    assert "of 156" in find(page, "#count")[0].text and find(page, "#next")[0].get_attribute("disabled")
    box.send_keys(Keys.HOME)
    assert find(page, "#list li")[0].get_attribute("aria-selected") == "true"
    assert page.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for control in find(page, "select, button, #list, #detail, nav, .scroll"):
        assert not control.is_displayed() or control.accessible_name, control.get_attribute("outerHTML")[:200]
    assert find(page, "img:not([alt]), img[alt='']") == []


def test_narrow_screens_do_not_scroll_sideways(page):
    page.set_window_size(500, 900)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.set_window_size(1400, 1000)


def test_two_thousand_rollouts_without_lag(browser, tmp_path):
    folder = make_results(tmp_path / "results", n_pairs=300, rollouts=400)
    path = report.build(folder)
    browser.get(path.as_uri())
    assert total(browser) == 2000 and len(find(browser, "#list li")) == 50
    slow = browser.execute_script("""
      const t = [], timed = (f) => { const s = performance.now(); f(); document.body.offsetHeight; t.push(performance.now() - s); };
      for (const [id, v] of [["f-arm", "human"], ["f-right", "right"], ["f-arm", ""], ["f-right", ""]])
        timed(() => { const c = document.getElementById(id); c.value = v; c.dispatchEvent(new Event("change")); });
      for (let i = 0; i < 20; i++) timed(() => document.getElementById("next").click());
      return Math.max(...t);""")
    assert slow < 250  # milliseconds, on a busy machine
    assert path.stat().st_size < 8e6


# ---- README --------------------------------------------------------------------------------------------------------------


def test_readme_shows_only_a_whole_run_of_long(tmp_path):
    run = make_results(tmp_path / "results")
    with pytest.raises(ValueError, match="profile smoke"):
        report.keep(run, tmp_path / "kept")
    p = yaml.safe_load((run / "params.yaml").read_text()) | {"profile": "long"}
    (run / "params.yaml").write_text(yaml.safe_dump(p))
    with pytest.raises(ValueError, match="lacks stages .*03_cold_start"):
        report.keep(run, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_readme_figures_are_those_of_the_committed_run():
    readme = (report.ROOT / "README.md").read_text(encoding="utf-8")
    assert report.BLOCK.search(readme)
    assert report.with_excerpt(readme) == readme, "run `make readme`"
    for name in report.SHOWN:
        assert (report.KEPT / "figures" / name).stat().st_size > 10_000


def test_the_limits_say_when_the_human_arm_is_no_upper_bound():
    said = lambda lost: " ".join(report.limits(report.Run(None, metrics={"05_grpo_offline": {"hidden_pairs.all": 9, "hidden_pairs.without_critique": lost}}), []))  # noqa: E731
    assert "critique of 7 of the 9 hidden pairs" in said(7) and "upper bound" not in said(0)


def test_the_limits_say_in_how_many_debates_a_difference_holds(tmp_path):
    row = figure(0.05, 0.01, 0.09)
    assert not any("lies above 0:" in line for line in report.limits(report.collect(tmp_path), []))
    (tmp_path / "metrics").mkdir()
    paired = {"human_minus_outcome": {"f1": row | {"of_groups": 5, "groups_above": 4}}, "human_minus_cold_start": {"f1": row}}
    (tmp_path / "metrics/05_grpo_offline.json").write_text(json.dumps({"paired": paired}))
    (tmp_path / "metrics/06_grpo_online.json").write_text(json.dumps({"online_over_outcome": row | {"of_groups": 5, "groups_above": 2, "verdict accuracy": row}}))
    [line] = [x for x in report.limits(report.collect(tmp_path), []) if "lies above 0:" in x]
    assert line.endswith("above 0: `human` − `outcome` in 4 of 5, `online` − `outcome` in 2 of 5.")


def test_the_limits_say_when_one_sentence_earns_more_than_people(tmp_path):
    folder = make_results(tmp_path / "results")
    paid = {"paid/stock_reason": {"mean": 0.4, "low": 0.37, "high": 0.43, "n": 90}, "paid/annotator_of_the_pair": {"mean": 0.2, "low": 0.1, "high": 0.3, "n": 90}}
    (folder / "metrics/02_core_similarity.json").write_text(json.dumps(paid))
    assert any("core-F1 of 0.400 [0.370, 0.430], n = 90; an annotator's" in line for line in report.limits(report.collect(folder), []))
    paid["paid/annotator_of_the_pair"]["high"] = 0.38  # the intervals touch
    (folder / "metrics/02_core_similarity.json").write_text(json.dumps(paid))
    assert not any("stock" in line for line in report.limits(report.collect(folder), []))


def test_where_a_lead_comes_from_and_what_is_said_of_every_pair(tmp_path):
    (tmp_path / "metrics").mkdir()
    paired = {k: {"f1": dict(zip(("mean", "low", "high"), v), n=90)} for k, v in {
        "human_minus_cold_start": (0.01, -0.02, 0.04), "outcome_minus_cold_start": (-0.07, -0.1, -0.04), "human_minus_outcome": (0.08, 0.05, 0.11),
        "human_minus_stock_reason": (-0.03, -0.06, -0.01), "human_minus_offline": (-0.05, -0.08, -0.02)}.items()}  # fmt: skip
    online = {"human": {"most frequent critique": 0.69, "first response named": 0.33}, "drift_online_better": {"measures": 10, "mae": 2}}

    def said():
        for name, metrics in (("05_grpo_offline", {"paired": paired}), ("06_grpo_online", online), ("07_benchmarks", {"prompts_cut": {"judgebench": 0.5, "own": 0.0}})):
            (tmp_path / f"metrics/{name}.json").write_text(json.dumps(metrics))
        run = report.collect(tmp_path)
        run.params = {"benchmarks": {"max_prompt": 320}}
        return "\n".join(report._arms(run))

    text = said()
    assert "not clearly above the cold start in core-F1 (0.010" in text and "what `outcome` lost against the cold start (-0.070" in text
    assert "is below one constant sentence" in text and "is below `offline` in core-F1 (-0.050" in text and "`human` 69%" in text and "`human` 33%" in text and "lower error at 2 of 10" in text
    assert "320 tokens, from the middle (`benchmarks.max_prompt`): 50% of judgebench." in text
    assert "has learnt one sentence" not in text
    online["online"] = {"most frequent critique": 0.97}
    assert "`online` 97%: `online` has learnt one sentence and says it of nearly every pair" in said()
    paired["human_minus_cold_start"]["f1"]["low"] = paired["human_minus_stock_reason"]["f1"]["low"] = 0.001
    paired["human_minus_offline"]["f1"]["high"] = 0.001
    online["drift_online_better"]["mae"] = 5
    assert "cold start in core-F1" not in (text := said()) and "constant sentence" not in text and "lower error" not in text and "below `offline`" not in text
