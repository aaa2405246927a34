"""Paired statistics against scipy and values by hand; comparison of evaluated folders."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nnunet_diffext.cli.main import main
from nnunet_diffext.evaluation.compare import compare_models, comparison_table, load_models, write_comparison
from nnunet_diffext.evaluation.paired import cohens_dz, holm, paired_statistics, rank_biserial

RNG = np.random.default_rng(0)
FIRST = RNG.normal(0.8, 0.05, 16)
SECOND = FIRST + RNG.normal(0.01, 0.02, 16)


def summary(folder: Path, dice, *, ece=None, volume=None, cases=None, tolerance=2.0, n_ref=100.0) -> Path:
    """A summary_diffext.json with one label."""
    folder.mkdir(parents=True)
    rows = []
    for index, value in enumerate(dice):
        error = 0.1 if volume is None else volume[index]
        metrics = {"Dice": value, "HD95": 10 * (1 - value), "volume_error": error, "n_ref": n_ref}
        row = {"case": cases[index] if cases else f"case_{index:02d}", "metrics": {"1": metrics}}
        if ece is not None:
            row["calibration"] = {"ece_band": ece[index]}
        rows.append(row)
    report = {
        "metric_per_case": rows,
        "labels": {"1": "organ"},
        "implementation": "one",
        "options": {"nsd_tolerance": tolerance},
    }
    (folder / "summary_diffext.json").write_text(json.dumps(report))
    return folder


def row_of(comparison, metric, **names):
    (row,) = (
        r for r in comparison["comparisons"] if r["metric"] == metric and all(r[k] == v for k, v in names.items())
    )
    return row


def test_tests_and_interval_are_those_of_scipy():
    result, d = paired_statistics(FIRST, SECOND, seed=3), SECOND - FIRST
    assert result.n == 16 and result.difference == pytest.approx(d.mean())
    assert result.wilcoxon_p == pytest.approx(stats.wilcoxon(SECOND, FIRST).pvalue)
    assert result.permutation_p == pytest.approx(stats.ttest_rel(SECOND, FIRST).pvalue, abs=0.02)
    interval = stats.bootstrap((d,), np.mean, n_resamples=9999, rng=np.random.default_rng(3)).confidence_interval
    assert (result.ci_low, result.ci_high) == pytest.approx(tuple(interval))
    assert result.ci_low < d.mean() < result.ci_high
    assert result == paired_statistics(FIRST, SECOND, seed=3)


def test_permutation_is_exact_for_few_pairs_by_enumeration():
    d = np.array([0.3, 0.1, -0.05, 0.2, 0.4, 0.15, 0.01])
    signs = 1 - 2 * ((np.arange(2**7)[:, None] >> np.arange(7)) & 1)
    means = (signs * d).mean(1)
    expected = 2 * min(np.mean(means >= d.mean() - 1e-12), np.mean(means <= d.mean() + 1e-12))
    assert paired_statistics(np.zeros(7), d).permutation_p == pytest.approx(expected)


def test_effect_sizes_by_hand():
    # Ranks of |d|: 1, 2, 3, 4; the zero is left out. Positive ranks 2 + 3 + 4, negative 1.
    assert rank_biserial(np.array([-0.1, 0.2, 0.3, 0.4, 0.0])) == pytest.approx((9 - 1) / 10)
    assert rank_biserial(np.array([-1.0, 1.0])) == 0 and rank_biserial(np.zeros(3)) == 0
    assert cohens_dz(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert math.isnan(cohens_dz(np.array([1.0, 1.0])))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    corrected = holm([0.02, math.nan, 0.04])
    assert corrected[::2] == pytest.approx([0.04, 0.04]) and math.isnan(corrected[1])


def test_fewer_than_six_pairs_get_no_test_and_are_told_why():
    result = paired_statistics(FIRST[:5], SECOND[:5])
    assert all(math.isnan(v) for v in (result.wilcoxon_p, result.permutation_p, result.ci_low, result.ci_high))
    assert "5 pair(s)" in result.note and "0.0625" in result.note
    assert result.difference == pytest.approx(np.mean(SECOND[:5] - FIRST[:5])) and not math.isnan(result.rank_biserial)
    assert not math.isnan(paired_statistics(FIRST[:6], SECOND[:6]).wilcoxon_p)


def test_undefined_values_leave_their_pair_out():
    first, second = FIRST.copy(), SECOND.copy()
    first[2], second[5] = math.nan, math.nan
    keep = [i for i in range(16) if i not in (2, 5)]
    assert paired_statistics(first, second) == paired_statistics(FIRST[keep], SECOND[keep])
    assert paired_statistics([math.nan], [1.0]).n == 0
    with pytest.raises(ValueError, match="one value of either model"):
        paired_statistics([1.0], [1.0, 2.0])


def test_equal_and_constant_differences():
    same = paired_statistics(FIRST, FIRST)
    assert (same.wilcoxon_p, same.permutation_p, same.ci_low, same.ci_high) == (1.0, 1.0, 0.0, 0.0)
    shifted = paired_statistics(np.zeros(8), np.ones(8))
    assert (shifted.ci_low, shifted.ci_high, shifted.rank_biserial) == (1.0, 1.0, 1.0)
    assert shifted.permutation_p == pytest.approx(2 / 2**8) and math.isnan(shifted.cohens_dz)
    some = paired_statistics(FIRST, np.r_[FIRST[:4], SECOND[4:]])
    assert "4 pair(s) without a difference" in some.note


def test_better_follows_the_direction_of_the_metric(tmp_path):
    a = summary(tmp_path / "a", FIRST, ece=np.full(16, 0.03) + 0.001 * np.arange(16), volume=np.full(16, -0.5))
    b = summary(tmp_path / "b", FIRST + 0.05, ece=np.full(16, 0.09), volume=np.full(16, 0.2))
    comparison = compare_models(load_models([a, b]))
    metrics = {r["metric"]: (r["label"], r["better"]) for r in comparison["comparisons"]}
    # Dice up, HD95 down, volume error by its size and not its sign: b; calibration error down: a.
    assert metrics == {
        "Dice": ("1", "b"), "HD95": ("1", "b"), "abs_volume_error": ("1", "b"), "ece_band": ("all", "a")
    }  # fmt: skip
    assert row_of(comparison, "Dice")["difference"] == pytest.approx(0.05)
    assert row_of(comparison, "HD95")["difference"] == pytest.approx(-0.5)
    assert compare_models(load_models([a, summary(tmp_path / "c", FIRST)]))["comparisons"][0]["better"] is None


def test_holm_runs_over_all_rows_of_three_models(tmp_path):
    folders = [summary(tmp_path / n, FIRST + shift) for n, shift in (("a", 0.0), ("b", 0.01), ("c", 0.02))]
    comparison = compare_models(load_models(folders), metrics=["Dice", "HD95"])
    rows = comparison["comparisons"]
    assert [(r["first"], r["second"]) for r in rows] == 2 * [("a", "b"), ("a", "c"), ("b", "c")]
    for test in ("wilcoxon_p", "permutation_p"):
        assert [r[test + "_holm"] for r in rows] == pytest.approx(holm([r[test] for r in rows]))
    assert rows[0]["wilcoxon_p_holm"] == pytest.approx(6 * rows[0]["wilcoxon_p"])
    assert "over the 6 rows" in comparison["method"]


def test_different_cases_are_refused_and_listed(tmp_path):
    a = summary(tmp_path / "a", FIRST[:8], cases=[f"x{i}" for i in range(8)])
    b = summary(tmp_path / "b", SECOND[:8], cases=[f"x{i}" for i in range(1, 9)])
    models = load_models([a, b])
    with pytest.raises(ValueError, match=r"a: x0; b: x8.*7 common case\(s\) with --common-cases"):
        compare_models(models)
    comparison = compare_models(models, common_cases=True)
    assert comparison["cases"] == [f"x{i}" for i in range(1, 8)]
    assert comparison["cases_left_out"] == {"a": ["x0"], "b": ["x8"]}
    # Paired by name, not by position.
    assert row_of(comparison, "Dice")["difference"] == pytest.approx(np.mean(SECOND[:7] - FIRST[1:8]))
    assert "cases of a left out: x0" in comparison_table(comparison)


@pytest.mark.parametrize(
    ("change", "message"), [({"tolerance": 1.0}, "differ in their options"), ({"n_ref": 99.0}, "same reference")]
)
def test_models_scored_differently_are_refused(tmp_path, change, message):
    folders = [summary(tmp_path / "a", FIRST), summary(tmp_path / "b", SECOND, **change)]
    with pytest.raises(ValueError, match=message):
        compare_models(load_models(folders))


def test_wrong_files_and_metrics_are_refused(tmp_path):
    a, b = summary(tmp_path / "a", FIRST), summary(tmp_path / "b", SECOND)
    with pytest.raises(ValueError, match="at least two different"):
        load_models([a, a])
    with pytest.raises(FileNotFoundError, match="nnunet_diffext evaluate"):
        load_models([a, tmp_path])
    (tmp_path / "summary.json").write_text(json.dumps({"metric_per_case": [{"metrics": {"1": {"Dice": 1}}}]}))
    with pytest.raises(ValueError, match="is no summary of nnunet_diffext evaluate"):
        load_models([a, tmp_path / "summary.json"])
    with pytest.raises(ValueError, match="unknown metric.*dice.*known: Dice"):
        compare_models(load_models([a, b]), metrics=["dice"])
    with pytest.raises(ValueError, match="calibration needs the probabilities"):
        compare_models(load_models([a, b]), metrics=["Dice", "nll"])


def test_names_are_as_long_as_needed(tmp_path):
    folders = [summary(tmp_path / n / "fold_0", FIRST + i / 100) for i, n in enumerate(("one", "two"))]
    assert [m.name for m in load_models(folders)] == ["one/fold_0", "two/fold_0"]


def test_command_prints_a_table_and_writes_strict_json(tmp_path, capsys):
    dice = [*SECOND[:7], None]
    a, b = summary(tmp_path / "nanny", FIRST[:8]), tmp_path / "b"
    summary(b, [0.5] * 8)
    report = json.loads((b / "summary_diffext.json").read_text())
    for row, value in zip(report["metric_per_case"], dice, strict=True):
        row["metrics"]["1"] |= {"Dice": value, "HD95": None}
    (b / "summary_diffext.json").write_text(json.dumps(report))
    assert main(["evaluate", "--compare", str(a), str(b), "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "nanny" in printed and "organ HD95, nanny and b: not defined and left out: 0 in nanny, 8 in b" in printed
    assert "difference = second - first" in printed
    content = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=pytest.fail)
    row = row_of(content, "Dice")
    assert row["n"] == 7 and row["undefined_second"] == 1
    assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(SECOND[:7] - FIRST[:7]).pvalue)
    assert row_of(content, "HD95")["n"] == 0 and row_of(content, "HD95")["wilcoxon_p"] is None
    assert main(["evaluate", "--compare", str(a), str(b), "-pred", "x"]) == 1


def test_written_file_is_in_the_folder(tmp_path):
    folders = [summary(tmp_path / "a", FIRST), summary(tmp_path / "b", SECOND)]
    comparison = compare_models(load_models(folders), metrics=["Dice"])
    assert write_comparison(comparison, tmp_path / "new") == tmp_path / "new" / "comparison.json"
