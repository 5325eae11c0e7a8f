"""Results of a study from run folders written by hand: means, both intervals, the correction, the verdict."""

import json

import numpy as np
import pytest
from scipy import stats

from vitreous.base.metrics import CLASSIFICATION, Metric
from vitreous.train.study import compare_arms

ACCURACY = CLASSIFICATION[0]


def run(folder, right, rate=100.0, patience=None, content="same"):
    """A run folder with one test image per entry of `right`."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": {"patience": patience}}))
    line = {"epoch": 1, "images_per_second": rate, "tests": {"test": {"accuracy": float(np.mean(right))}}}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    rows = [f"test,{i},1,{int(hit)},0.9" for i, hit in enumerate(right)]
    (folder / "predictions.csv").write_text("\n".join(["set,index,label,predicted,probability", *rows]) + "\n")
    (folder / "manifest.csv").write_text(f"set,name,label,content\ntest,{len(right)} images,,{content}\n")
    return folder


@pytest.fixture
def study(tmp_path):
    """Three arms, three seeds, 200 images; the second arm is 10 points better, the third as good."""
    random, arms = np.random.default_rng(0), {}
    for arm, chance, rate in (("plain", 0.6, 100.0), ("b", 0.72, 50.0), ("c", 0.6, 100.0)):
        arms[arm] = [(random.random(200) < chance + 0.01 * seed) for seed in range(3)]
        arms[arm] = [run(tmp_path / f"{arm}-{seed}", right, rate) for seed, right in enumerate(arms[arm])]
    return arms


def answers(folder):
    return np.array([line.split(",")[2] == line.split(",")[3] for line in (folder / "predictions.csv").read_text().split()[1:]])


def test_means_and_intervals_are_scipys(study):
    found = compare_arms.compare(study)
    assert found["level"] == pytest.approx(0.975)  # two comparisons
    scores = {arm: [answers(path).mean() for path in runs] for arm, runs in study.items()}
    for arm, one in found["tests"]["test"]["arms"].items():
        assert one["mean"] == pytest.approx(np.mean(scores[arm]))
        assert one["interval"] == pytest.approx(stats.t.interval(0.95, 2, np.mean(scores[arm]), stats.sem(scores[arm])))
    for arm, one in found["tests"]["test"]["differences"].items():
        each = np.subtract(scores[arm], scores["plain"])
        assert one["by_seed"] == pytest.approx(each.tolist())
        assert one["interval_by_seed"] == pytest.approx(stats.t.interval(0.975, 2, each.mean(), stats.sem(each)))


def test_by_image_is_resampling_of_images_over_their_mean_over_seeds(study):
    one = compare_arms.compare(study)["tests"]["test"]["differences"]["b"]
    ours, theirs = (np.mean([answers(path) for path in study[arm]], axis=0) for arm in ("b", "plain"))
    random, means = np.random.default_rng(5), []
    for _ in range(6000):
        drawn = random.integers(0, 200, 200)
        means.append((ours[drawn] - theirs[drawn]).mean())
    assert one["interval_by_image"] == pytest.approx(np.quantile(means, [0.0125, 0.9875]).tolist(), abs=0.008)


def test_verdicts_and_cost(study):
    found = compare_arms.compare(study)
    text = "\n".join(compare_arms.tables(found))
    assert found["cost"]["b"]["mean"] == pytest.approx(2.0)
    assert found["cost"]["plain"]["by_seed"] == [1.0, 1.0, 1.0]
    for by_seed, by_image, verdict in (
        ([0.01, 0.2], [0.02, 0.1], "better"),
        ([-0.2, -0.01], [-0.1, -0.02], "worse"),
        ([-0.01, 0.2], [0.02, 0.1], "undecided"),
        ([-0.01, 0.005], [0.001, 0.01], "no difference"),
        ([-0.011, 0.005], [0.001, 0.01], "undecided"),
        (None, [0.02, 0.1], "better"),
        (None, None, "undecided"),
    ):
        difference = {"interval_by_seed": by_seed, "interval_by_image": by_image, "by_seed": [0.0] * 3}
        assert compare_arms.verdict(difference, ACCURACY) == verdict
    two_seeds = {"interval_by_seed": [-0.01, 0.005], "interval_by_image": [0.001, 0.01], "by_seed": [0.0] * 2}
    assert compare_arms.verdict(two_seeds, ACCURACY) == "undecided"
    error = Metric("error", "px", "lower", "error")
    one_seed = {"interval_by_seed": None, "interval_by_image": [0.02, 0.1], "by_seed": [0.1]}
    assert compare_arms.verdict(one_seed, error) == "worse"
    assert "all 2 comparisons of a test set hold" in text
    assert "| c |" in text


def test_images_of_made_data_are_other_ones_for_every_seed(tmp_path):
    right = np.arange(40) % 2 == 0
    arms = {
        arm: [run(tmp_path / f"{arm}-{seed}", right if arm == "a" else ~right, content=f"seed {seed}") for seed in (0, 1)]
        for arm in ("a", "b")
    }
    assert not compare_arms.alike(arms["a"])
    apart = compare_arms.compare(arms)["tests"]["test"]["differences"]["b"]["interval_by_image"]
    for run_ in [*arms["a"], *arms["b"]]:
        (run_ / "manifest.csv").write_text("set,name,label,content\ntest,40 images,,same\n")
    together = compare_arms.compare(arms)["tests"]["test"]["differences"]["b"]["interval_by_image"]
    assert apart[1] - apart[0] == pytest.approx((together[1] - together[0]) / 2**0.5, rel=0.15)  # 80 images, not 40


def test_one_seed_has_wilsons_interval_and_no_interval_by_seed(tmp_path):
    right = np.arange(50) < 30
    found = compare_arms.compare({"a": [run(tmp_path / "a", right)], "b": [run(tmp_path / "b", ~right)]})["tests"]["test"]
    expected = stats.binomtest(30, 50).proportion_ci(method="wilson")
    assert found["arms"]["a"]["interval"] == pytest.approx([expected.low, expected.high])
    assert found["differences"]["b"]["interval_by_seed"] is None
