"""The comparison of recipes: equal time, one table, and a run that continues after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import recipes

ROOT = Path(__file__).resolve().parents[2]
RESULT = {
    "search": {
        recipe: {rate: {"validation_loss": loss, "seconds_per_image": seconds} for rate, loss, seconds in rows}
        for recipe, rows in (
            (recipes.PAPER, (("0.001", 0.2, 0.002), ("0.002", 0.1, 0.002))),
            (recipes.MODERN, (("0.001", 0.3, 0.004), ("0.002", 0.4, 0.004))),
        )
    },
    "runs": {
        f"{recipe}-{seed}": {"images": images, "learning_rate": 0.002, "seconds": 8.0, "fid": fid + seed, "accuracy": 0.5}
        for recipe, images, fid in ((recipes.PAPER, 4096, 20.0), (recipes.MODERN, 2048, 10.0))
        for seed in (0, 1, 2)
    },
    "floor": {"fid": 1.0, "accuracy": 0.9},
}  # fmt: skip


def test_each_recipe_has_its_own_learning_rate_and_equal_time(tmp_path: Path) -> None:
    path = tmp_path / "recipes-digits.json"
    path.write_text(json.dumps(RESULT))
    comparison = recipes.Comparison(None, tmp_path, path, None)
    assert comparison._rate(recipes.PAPER) == 0.002 and comparison._rate(recipes.MODERN) == 0.001
    assert comparison._time_ratio() == pytest.approx(2.0)


def test_table_has_mean_and_deviation_over_the_seeds(tmp_path: Path) -> None:
    (tmp_path / "recipes-digits.json").write_text(json.dumps(RESULT))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- recipes -->\nold\n<!-- end recipes -->\nafter\n")
    recipes.write_table(tmp_path, page)
    text = page.read_text()
    assert "| digits | paper, 3 seeds | 4,096 | 8 ± 0 | 0.002 | 21.0 ± 1.0 | 50.0 ± 0.0 |" in text
    assert "| digits | modern, 3 seeds | 2,048 | 8 ± 0 | 0.002 | 11.0 ± 1.0 | 50.0 ± 0.0 |" in text
    assert "| digits | real held-out images | | | | 1.0 | 90.0 |" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


@pytest.mark.slow
def test_a_quick_comparison_is_finished_and_not_made_again(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "experiments" / "recipes.py"),
        "--quick",
        "--data",
        "digits",
        "--work",
        str(tmp_path),
    ]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "recipes-digits.json").read_text())
    assert len(result["runs"]) == 6 and all(run["fid"] > 0 for run in result["runs"].values())
    assert (tmp_path / "recipes.md").read_text().count("3 seeds") == 2
