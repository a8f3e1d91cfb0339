"""Fixtures that several test files need. What a test needs and cannot find fails it; only GPU tests may be left out."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from rmnlhf import ROOT


@pytest.fixture(scope="session")
def data_dir():
    """The folder that `make data` fills."""
    folder = ROOT / "data"
    if not (folder / "ukpconvarg1").exists():
        pytest.fail(f"{folder} has no data sets: run `make data` (mirror or network), then the tests", pytrace=False)
    return folder
