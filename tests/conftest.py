"""Fixtures that several test files need. What a test needs and cannot find fails it, with two exceptions, both told at the end: GPU
tests, and tests on real data where no mirror is there and no upstream has answered, so that `make data` could fetch nothing."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # the servers that tests start

import pytest
from hypothesis import settings

from rmnlhf import ROOT
from rmnlhf.sources import fetch

NOT_RUN = pytest.StashKey[int]()
settings.register_profile("rmnlhf", derandomize=True, deadline=None, database=None)  # the same draws wherever the tests run
settings.load_profile("rmnlhf")


@pytest.fixture(scope="session")
def data_dir():
    """The folder that `make data` fills."""
    folder = ROOT / "data"
    if not (folder / "ukpconvarg1").exists():
        pytest.fail(f"{folder} has no data sets: run `make data` (mirror or network), then the tests", pytrace=False)
    return folder


def pytest_collection_modifyitems(config, items):
    if fetch.mirror() or any(f.is_file() for f in (ROOT / "data").rglob("*")):  # some data: what lacks is an error
        return
    without = [i for i in items if "data_dir" in i.fixturenames]
    items[:] = [i for i in items if i not in without]
    config.hook.pytest_deselected(items=without)
    config.stash[NOT_RUN] = len(without)


def pytest_terminal_summary(terminalreporter, config):
    if n := config.stash.get(NOT_RUN, 0):
        terminalreporter.write_line(
            f"{n} tests on real data NOT RUN: no mirror, and no upstream answered (set RMNLHF_MIRROR, or `make data` again)"
        )
