"""Per-row losses and the audit that is computed from them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from agent_tools.errors import UserError
from agent_tools.mle_bench import audit, losses, registry, spread
from agent_tools.mle_bench.field_checks import beat_probabilities
from agent_tools.mle_bench.metrics import METRICS, Array


def task(metric: str, rows: int = 700, seed: int = 0) -> tuple[Array, dict[losses.Name, Array]]:
    """Answers, and predictions that get worse from gold to default."""
    rng = np.random.default_rng(seed)
    made: dict[losses.Name, Array] = {}
    order: tuple[losses.Name, ...] = ("strong", "gold", "silver", "bronze", "median", "default")
    if metric in ("rmse", "mae", "rmsle"):
        true = rng.gamma(2, 3, (rows, 1))
        for k, name in enumerate(order):
            made[name] = true * np.exp(rng.normal(0, 0.1 + 0.1 * k, (rows, 1)))
    elif metric in ("accuracy", "exact"):
        true = np.ones((rows, 1))
        for k, name in enumerate(order):
            made[name] = (rng.random((rows, 1)) > 0.1 + 0.1 * k).astype(float)
    else:
        true = (rng.random((rows, 1)) < 0.3).astype(float)
        for k, name in enumerate(order):
            score = 2 * true - 1 + rng.normal(0, 1 + k, (rows, 1))
            made[name] = np.round(1 / (1 + np.exp(-score)), 2)  # rounded: ties
    return true, made


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_losses_give_the_metric_of_each_entry(metric: str, tmp_path: Path) -> None:
    true, predictions = task(metric)
    found = losses.of_predictions(metric, true, predictions)
    losses.write(tmp_path / "losses.npz", found)
    kept = losses.read(tmp_path / "losses.npz")
    for name in losses.NAMES:
        wanted = METRICS[metric](true, predictions[name])
        assert found.score(name) == pytest.approx(wanted, abs=1e-12)
        assert kept.score(name) == pytest.approx(wanted, rel=5e-4)
    assert kept.test_rows == len(true)


def test_losses_of_several_classes_and_of_blocks() -> None:
    rng = np.random.default_rng(0)
    true = np.eye(4)[rng.integers(0, 4, 300)]
    predictions = {name: rng.dirichlet(np.ones(4), 300) for name in losses.NAMES}
    for metric in ("logloss", "accuracy"):
        found = losses.of_predictions(metric, true, predictions)
        assert found.score("gold") == pytest.approx(METRICS[metric](true, predictions["gold"]))
    blocks = losses.of_predictions("rmse", true[:, :1], _columns(predictions), block=10)
    assert blocks.test_rows == 30
    assert blocks.score("median") == pytest.approx(
        METRICS["rmse"](true[:, :1], predictions["median"][:, :1])
    )


def _columns(predictions: dict[losses.Name, Array]) -> dict[losses.Name, Array]:
    return {name: values[:, :1] for name, values in predictions.items()}


def test_placements_average_to_the_auc_with_ties() -> None:
    true, predictions = task("auc")
    positive, negative = losses.placements(true.ravel() > 0.5, predictions["bronze"].ravel())
    auc = roc_auc_score(true.ravel(), predictions["bronze"].ravel())
    assert positive.mean() == pytest.approx(auc, abs=1e-12)
    assert negative.mean() == pytest.approx(auc, abs=1e-12)


@pytest.mark.parametrize("metric", ["auc", "rmse", "accuracy"])
def test_bootstrap_over_losses_agrees_with_that_over_rows(metric: str) -> None:
    true, predictions = task(metric, rows=120, seed=3)
    found = losses.of_predictions(metric, true, predictions)
    pair = [predictions["gold"], predictions["silver"]]
    (wanted,) = beat_probabilities(metric, true, pair)
    assert losses.beat(found, "gold", "silver") == pytest.approx(wanted, abs=0.04)
    assert losses.beat(found, "silver", "gold") == pytest.approx(1 - wanted, abs=0.04)


def test_the_file_holds_shuffled_losses_and_nothing_else(tmp_path: Path) -> None:
    true, predictions = task("logloss")
    found = losses.of_predictions("logloss", true, predictions)
    for name in ("a.npz", "b.npz"):
        losses.write(tmp_path / name, found)
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert set(a.files) == {"metric", "scale", "rows"}
        assert not np.array_equal(a["rows"], b["rows"])
        order = np.lexsort(a["rows"]), np.lexsort(b["rows"])
        assert np.array_equal(a["rows"][:, order[0]], b["rows"][:, order[1]])  # alike for all


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "losses.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"losses\.npz: no per-row losses"):
        losses.read(path)


# ------------------------------------------------------------------ audit

CONFIG = replace(
    registry.load_config("diamonds-price"), id="made-up", metric="rmse", folds=3, dev=False
)


def fitted(folder: Path, *, spoil: dict[str, object] | None = None) -> Path:
    """A folder whose leaderboard and losses belong together; `spoil` breaks one rule."""
    spoil = spoil or {}
    rows = int(spoil.get("rows", 700))  # type: ignore[call-overload]
    true, predictions = task("rmse", rows=rows)
    if "pair" in spoil:
        better, worse = spoil["pair"]  # type: ignore[misc]
        predictions[better] = predictions[worse] * 0.9999
    found = losses.of_predictions("rmse", true, predictions)
    losses.write(folder / "losses.npz", found)
    at = {rank: found.score(name) for name, rank in losses.field_ranks(100).items()}
    ranks = [1, *sorted(at), 100]
    values = [0.5 * at[10], *(at[rank] for rank in sorted(at)), 3 * at[50]]
    scores = np.interp(np.arange(1, 101), ranks, values)
    if "scores" in spoil:
        scores = scores * spoil["scores"]
    tiers = ["strong"] * 15 + ["tuned"] * 35 + ["default"] * 35 + ["trivial"] * 15
    if "leak" in spoil:
        tiers[3] = "trivial"
    with (folder / "leaderboard.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["score", "fold_0", "fold_1", "fold_2", "tier"])
        for score, tier in list(zip(scores, tiers, strict=True))[: int(spoil.get("entries", 100))]:  # type: ignore[call-overload]
            writer.writerow([*[f"{score:.5f}"] * 4, tier])
    return folder


def broken(folder: Path) -> set[str]:
    return {f.rule for f in audit.audit_competition(CONFIG, folder) if not f.passed}


def test_a_fair_field_passes_every_rule(tmp_path: Path) -> None:
    findings = list(audit.audit_competition(CONFIG, fitted(tmp_path)))
    assert all(f.ok for f in findings), findings
    assert len(findings) == 9


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        ({"pair": ("bronze", "gold")}, "p_gold_bronze"),
        ({"pair": ("median", "bronze")}, "p_bronze_median"),
        ({"pair": ("strong", "bronze")}, "headroom_strong"),
        ({"pair": ("default", "gold")}, "headroom_default"),
        ({"leak": True}, "leak"),
        ({"rows": 480}, "rows"),
        ({"scores": 1.01}, "losses"),
    ],
)
def test_each_rule_can_be_broken(tmp_path: Path, spoil: dict[str, object], rule: str) -> None:
    assert rule in broken(fitted(tmp_path, spoil=spoil))


def test_exceptions_name_a_broken_rule_with_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fitted(tmp_path, spoil={"rows": 480})
    monkeypatch.setattr(audit, "load_config", lambda id: CONFIG)
    monkeypatch.setattr(registry.Config, "folder", property(lambda self: folder))
    ref = registry.CompetitionRef("made-up", "val", "table")

    def suite(*exceptions: registry.SuiteException) -> registry.Suite:
        return registry.Suite("s", 1, (ref,), exceptions=exceptions)

    assert not all(f.ok for f in audit.audit(suite()))
    rows = registry.SuiteException("made-up", "rows", 480, "the source has no more")
    assert all(f.ok for f in audit.audit(suite(rows)))
    with pytest.raises(UserError, match="says 300, found 480"):
        audit.audit(suite(replace(rows, value=300)))
    with pytest.raises(UserError, match="rule that holds"):
        audit.audit(suite(rows, replace(rows, rule="leak")))


def test_findings_are_plain_json(tmp_path: Path) -> None:
    findings = [vars(f) for f in audit.audit_competition(CONFIG, fitted(tmp_path))]
    assert json.loads(json.dumps(findings)) == findings


@pytest.mark.real  # for its length
def test_the_committed_suite_passes_its_audit() -> None:
    findings = audit.audit(registry.load_suite("offline-v1"))
    assert [f for f in findings if not f.ok] == []
    assert {f.competition for f in findings} == set(registry.load_suite("offline-v1").ids())
    assert [(f.competition, f.rule) for f in findings if f.excepted] == [
        ("vowel-speaker-full", "rows")
    ]


@pytest.mark.parametrize("name", ["offline-small-v0", "offline-v1"])
def test_the_drawing_shows_every_entry_and_committed_ones_are_current(name: str) -> None:
    from xml.etree import ElementTree

    suite = registry.load_suite(name)
    text = spread.svg(spread.spreads(suite), f"{name}: the entries of each field")
    strokes = sum(e.get("d", "").count("v12") for e in ElementTree.fromstring(text).iter())
    assert strokes == 100 * len(suite.competitions)
    committed = Path(__file__).parents[2] / "docs" / "img" / f"spread-{name[-2:]}.svg"
    assert committed.read_text() == text


def test_the_drawing_needs_fitted_fields(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(registry.Config, "folder", property(lambda self: tmp_path))
    with pytest.raises(UserError, match="no leaderboard"):
        spread.spreads(registry.load_suite("offline-small-v0"))
