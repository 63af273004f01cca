"""The benchmarks at sizes that take no time: both sides do the same work, and the result can be read."""

import json

import pytest
from typer.testing import CliRunner

from bench.__main__ import app


def result(*arguments: str) -> dict:
    """The last line that a benchmark prints."""
    ended = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert ended.exit_code == 0
    found = json.loads(ended.stdout.splitlines()[-1])
    assert {"bench", "settings", "rows", "machine", "versions"} <= set(found)
    return found


def test_rounds_compares_loops_that_end_in_the_same_weights(tmp_path):
    """Both average the same clients after the same steps; they only add in another order."""
    small = ("--size", 32, "--images", 4, "--batch-size", 4, "--student", "tiny_unet")
    found = result("rounds", *small, "--repeats", 1, "--out", tmp_path / "rounds.json")
    assert found["largest_difference_of_weights"] < 1e-5
    assert found["steps"] == 3 * 5
    for ratio in ("fmfl_over_plain_cpu", "plain_over_bare_cpu", "fmfl_over_plain_wall"):
        assert 0 < found[ratio]["low"] <= found[ratio]["median"] <= found[ratio]["high"]
    assert json.loads((tmp_path / "rounds.json").read_text()) == found


@pytest.mark.slow
def test_teachers_are_measured_each_in_its_own_process():
    found = result("teachers", "--names", "builtin", "--images", 2, "--size", 64, "--repeats", 1)
    (row,) = found["rows"]
    assert row["teacher"] == "builtin" and row["parameters"] == 1_764_032
    assert row["images_per_second"] > 0 and row["peak_mib"] > 0
