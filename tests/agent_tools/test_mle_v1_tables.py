"""Eight full-size competitions: their cut from made-up sources, their splits, their scripts."""

from __future__ import annotations

import ast
import io
import json
import tarfile
import zipfile
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from mle_synthetic import facts

from agent_tools.errors import UserError
from agent_tools.mle_bench.facts import TaskFacts, facts_of
from agent_tools.mle_bench.metrics import grade_with
from agent_tools.mle_bench.recipes import SIZES
from agent_tools.mle_bench.registry import COMPETITIONS, load_config
from agent_tools.mle_bench.splits import (
    even_folds,
    numbered,
    split_groups,
    split_off,
    take_turns,
    write_folds,
)
from agent_tools.mle_bench.v1 import RECIPES
from agent_tools.mle_bench.v1.build import Plan, View, recipes_of, script
from agent_tools.sandbox import Limits, ScriptJob, make_pool

TASKS: dict[str, TaskFacts] = {
    "tweet-sentiment-full": facts("regression", "rmse", numeric=0, text=1),
    "diamonds-price-full": facts("regression", "rmsle", numeric=6, categorical=3, levels=8),
    "food-reviews-full": facts("binary", "auc", numeric=0, text=1),
    "spam-mail": facts("binary", "logloss", numeric=0, text=1),
    "storm-status": facts("multiclass", "accuracy", numeric=11, classes=9, missing=0.1),
    "crash-survival": facts("binary", "auc", numeric=4, categorical=6, levels=5),
    "electricity-demand-full": facts("regression", "mae", numeric=6, time=True),
    "nyc-flight-airtime": facts("regression", "rmse", numeric=11, categorical=4, levels=4000),
}


def module_of(competition: str) -> ModuleType:
    return import_module(f"agent_tools.mle_bench.competitions.{competition}.prepare")


class Cut:
    """What a `prepare` made of a made-up source."""

    def __init__(self, competition: str, folder: Path) -> None:
        self.public, self.private = folder / "public", folder / "private"
        self.public.mkdir()
        self.private.mkdir()
        module_of(competition).prepare(folder / "raw", self.public, self.private)
        read = pd.read_csv
        self.train, self.test = read(self.public / "train.csv"), read(self.public / "test.csv")
        self.answers = read(self.private / "test.csv")
        self.folds = read(self.private / "folds.csv")
        assert list(self.train.columns[:-1]) == list(self.test.columns)
        assert list(self.folds["id"]) == list(self.answers["id"]) == list(self.test["id"])
        sizes = self.folds["fold"].value_counts()
        assert set(sizes.index) == {0, 1, 2}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


def pickled(table: pd.DataFrame, path: Path) -> None:
    table.to_pickle(path, compression="xz")


def storms(raw: Path) -> pd.DataFrame:
    """40 storms of 10 records; one lasts over the turn of a year, one name comes back later."""
    rows = []
    for number in range(40):
        start = pd.Timestamp(1990 + number // 4, 8, 1) + pd.Timedelta(days=9 * (number % 4))
        if number == 7:
            start = pd.Timestamp(1991, 12, 30)
        for step in range(10):
            time = start + pd.Timedelta(hours=6 * step)
            wind = 25 + (number * 7 + step * 5) % 80
            rows.append(
                {
                    "name": "Ana" if number in (3, 30) else f"N{number}",
                    **{part: getattr(time, part) for part in ("year", "month", "day", "hour")},
                    "lat": 20.0 + step,
                    "long": -60.0 - number,
                    "status": "hurricane" if wind > 63 else "tropical storm",
                    "category": 1.0,
                    "wind": wind,
                    "pressure": 1010 - wind // 2,
                    "tropicalstorm_force_diameter": 2.0 * wind if number % 2 else np.nan,
                    "hurricane_force_diameter": wind // 9 if number % 2 else np.nan,
                }
            )
    table = pd.DataFrame(rows)
    pickled(table, raw / "storms.pkl.compress")
    return table


def test_storms_stay_whole_even_into_january_and_lose_name_and_category(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("storm-status"), "TEST_ROWS", 100)
    storms(raw)
    cut = Cut("storm-status", raw.parent)
    assert not set(cut.train["storm"]) & set(cut.test["storm"])
    assert cut.train["storm"].nunique() + cut.test["storm"].nunique() == 40
    assert len(cut.test) == 100 and set(cut.test["storm"].value_counts()) == {10}
    assert not {"name", "category"} & set(cut.train.columns)
    assert set(cut.train["target"]) == {"hurricane", "tropical_storm"} == set(cut.answers) - {"id"}
    folds = cut.test.assign(fold=cut.folds["fold"]).groupby("storm")["fold"].nunique()
    assert folds.max() == 1


def test_people_of_one_crash_are_on_one_side_and_no_outcome_is_a_feature(raw: Path) -> None:
    random = np.random.default_rng(0)
    n = 600
    table = pd.DataFrame(
        {
            "dvcat": random.choice(["10-24", "25-39", "55+"], n),
            "weight": random.random(n),
            "dead": random.choice(["alive", "dead"], n),
            "airbag": random.choice(["none", "airbag"], n),
            "seatbelt": random.choice(["none", "belted"], n),
            "frontal": random.integers(0, 2, n),
            "sex": random.choice(["f", "m"], n),
            # every crash has an age of its own, so that the test can tell them apart
            "ageOFocc": np.arange(n) // 3,
            "yearacc": 1997 + np.arange(n) // 3 % 6,
            "yearVeh": 1990.0,
            "abcat": random.choice(["deploy", "unavail"], n),
            "occRole": random.choice(["driver", "pass"], n),
            "deploy": 0,
            "injSeverity": 3.0,
            "caseid": [f"2:{k // 3}:{k % 3}" for k in range(n)],
        }
    )
    pickled(table, raw / "nassCDS.pkl.compress")
    cut = Cut("crash-survival", raw.parent)
    assert not set(cut.train["age"]) & set(cut.test["age"])
    assert not {"weight", "injSeverity", "caseid", "crash"} & set(cut.train.columns)
    assert 180 <= len(cut.test) <= 182
    assert cut.test.assign(fold=cut.folds["fold"]).groupby("age")["fold"].nunique().max() == 1


def test_a_stone_listed_twice_with_sides_exchanged_is_there_once(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("diamonds-price-full"), "TEST_ROWS", 20)
    table = pd.DataFrame(
        {
            "carat": 0.5,
            "cut": "Ideal",
            "color": "E",
            "clarity": "SI1",
            "depth": 61.0,
            "table": 55.0,
            "price": range(500, 560),
            "x": [5.0 + k / 100 for k in range(60)],
            "y": [5.1 + k / 100 for k in range(60)],
            "z": 3.0,
        }
    )
    twin = table.rename(columns={"x": "y", "y": "x"}).assign(cut="Good", depth=60.9, price=900)
    pd.concat([table, twin]).to_csv(raw / "diamonds.csv", index=False)
    cut = Cut("diamonds-price-full", raw.parent)
    assert (len(cut.train), len(cut.test)) == (40, 20)
    assert set(cut.train["target"]) | set(cut.answers["target"]) == set(range(500, 560))


def test_all_of_the_last_eight_weeks_are_tested_and_days_keep_to_a_fold(raw: Path) -> None:
    n = 365 * 48
    source = pd.DataFrame({"Demand": np.arange(n) / n, "WorkDay": 1, "Temperature": 20.0})
    pickled(source, raw / "elecdemand.pkl.compress")
    cut = Cut("electricity-demand-full", raw.parent)
    assert (len(cut.train), len(cut.test)) == (309 * 48, 56 * 48)
    assert cut.train["day_of_year"].max() == 309 and cut.test["day_of_year"].min() == 310
    assert cut.train["target"].max() < cut.answers["target"].min()
    days = cut.test.assign(fold=cut.folds["fold"]).groupby("day_of_year")["fold"]
    assert days.nunique().max() == 1
    assert sorted(cut.folds["fold"].value_counts()) == [864, 912, 912]


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def test_every_18th_day_of_flights_is_tested_without_what_is_known_after_departure(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("nyc-flight-airtime"), "TEST_ROWS", 100)
    times = pd.date_range("2013-01-01", "2013-12-31", freq="2h")
    flights = pd.DataFrame(
        {
            **{part: getattr(times, part) for part in ("year", "month", "day")},
            "dep_time": 517.0,
            "dep_delay": 2.0,
            "arr_time": 830.0,
            "arr_delay": 11.0,
            "sched_dep_time": 515,
            "sched_arr_time": 819,
            "carrier": "UA",
            "tailnum": "N1",
            "flight": range(len(times)),
            "air_time": np.where(np.arange(len(times)) % 10, 100.0, np.nan),
            "origin": "EWR",
            "dest": "IAH",
            "distance": 1400,
            "time_hour": times.strftime("%Y-%m-%dT%H:00:00Z"),
        }
    )
    weather = flights[["origin", "time_hour"]].assign(
        temp=39.0, wind_dir=270.0, wind_speed=9.0, pressure=1012.0, visib=10.0
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        zipped.writestr("flights.csv", flights.to_csv(index=False))
    prepare = module_of("nyc-flight-airtime")
    with tarfile.open(raw / prepare.ARCHIVE, "w:gz") as archive:
        add(archive, f"{prepare.FOLDER}/flights.csv.zip", packed.getvalue())
        add(archive, f"{prepare.FOLDER}/weather.csv", weather.to_csv(index=False).encode())
    cut = Cut("nyc-flight-airtime", raw.parent)
    day = {
        name: pd.to_datetime(table[["month", "day"]].assign(year=2013)).dt.dayofyear
        for name, table in (("train", cut.train), ("test", cut.test))
    }
    assert set(day["test"] % 18) == {9} and 9 not in set(day["train"] % 18)
    assert len(cut.test) == 100 and cut.train["target"].notna().all()
    after = {"dep_time", "dep_delay", "arr_time", "arr_delay", "time_hour", "air_time"}
    assert not after & set(cut.train.columns)
    assert cut.test["temp"].notna().all()
    assert cut.folds.groupby(day["test"])["fold"].nunique().max() == 1


def mail(group: str, text: str) -> dict[str, str]:
    return {"group": group, "text": f"From: someone\nSubject: secret\n\n{text}"}


def test_mails_lose_headers_and_addresses_and_families_are_on_one_side(raw: Path) -> None:
    random = np.random.default_rng(0)
    words = ["".join(random.choice(list("abcdefgh"), 5)) for _ in range(300)]
    mails = []
    for number in range(60):
        text = " ".join(random.choice(words, 60))
        group = "spam-1" if number % 3 == 0 else "easy-ham-1"
        # the same mailing thrice, with other words before it
        for copy in range(3):
            start = " ".join(random.choice(words, 12))
            mails.append(mail(group, f"tag{number} {start} joe{copy}@example.com {text}"))
    mails.append(mail("spam-1", "short"))
    prepare = module_of("spam-mail")
    with tarfile.open(raw / prepare.ARCHIVE, "w:gz") as archive:
        for number, content in enumerate(mails):
            name = f"package/data/{content['group']}/{number:05}.json"
            add(archive, name, json.dumps(content).encode())
        add(archive, "package/data/file_list.json", b"[]")
    cut = Cut("spam-mail", raw.parent)
    both = pd.concat([cut.train["text"], cut.test["text"]])
    assert len(both) == 180
    assert (
        not both.str.contains("secret|joe|example").any() and both.str.contains("user@host").all()
    )
    families = [set(t["text"].str.split().str[0]) for t in (cut.train, cut.test)]
    assert not families[0] & families[1] and len(families[1]) == 18
    tags = cut.test["text"].str.split().str[0]
    assert cut.folds.groupby(tags.to_numpy())["fold"].nunique().max() == 1


def test_encoded_html_and_wrong_character_sets_are_read() -> None:
    body = module_of("spam-mail")._body
    head = "Content-Type: text/html; charset={}\nContent-Transfer-Encoding: base64\n\n{}"
    assert body(head.format("utf-8", "Y2Fmw6k=")) == "café"
    assert body(head.format("no-such-set", "Y2Fm6Q==")) == "café"
    two = (
        "Content-Type: multipart/mixed; boundary=b\n\n--b\n\nplain\n--b\nContent-Type: image/png\n"
    )
    assert body(f"{two}\nPNG\n--b--\n") == "plain"


def test_tweets_that_differ_in_marks_only_are_there_once(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = module_of("tweet-sentiment-full")
    monkeypatch.setattr(prepare, "TEST_ROWS", 30)
    names = ["".join(chr(97 + (k // 26**i) % 26) for i in range(3)) for k in range(100)]
    lines = [f"{k}\t{k / 50 - 1}\tso happy {name}" for k, name in enumerate(names)]
    lines += [f"x\t0.5\tSO happy {name}!!!" for name in names] + ["y\t1\t:)", "z\t-1\t:("]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, prepare.TWEETS, "\n".join(lines).encode())
    with tarfile.open(raw / prepare.ARCHIVE, "w:gz") as archive:
        add(archive, prepare.INNER, inner.getvalue())
    cut = Cut("tweet-sentiment-full", raw.parent)
    assert (len(cut.train), len(cut.test)) == (72, 30)
    assert not pd.concat([cut.train["text"], cut.test["text"]]).str.contains("!").any()


# --- the shared helpers --------------------------------------------------------------------------


def test_a_split_by_groups_depends_on_content_only() -> None:
    table = pd.DataFrame({"g": [k // 4 for k in range(200)], "v": range(200)})
    train, test = split_groups(table, "g", 50, salt="s")
    assert not set(train["g"]) & set(test["g"])
    assert len(test) == 52 and len(train) == 148
    again, _ = split_groups(table.sample(frac=1, random_state=0), "g", 50, salt="s")
    pd.testing.assert_frame_equal(train, again)
    with pytest.raises(ValueError, match="50 groups cannot give 200"):
        split_groups(table, "g", 200, salt="s")
    rest, few = split_off(table, 30, salt="s")
    assert (len(rest), len(few)) == (170, 30) and not set(rest["v"]) & set(few["v"])


def test_folds_are_near_equal_and_names_of_groups_tell_nothing(tmp_path: Path) -> None:
    answers = pd.DataFrame({"id": range(100, 1_100), "target": 0})
    answers.to_csv(tmp_path / "test.csv", index=False)
    write_folds(tmp_path, take_turns(1_000))
    table = pd.read_csv(tmp_path / "folds.csv")
    assert list(table["id"]) == list(range(100, 1_100))
    assert sorted(table["fold"].value_counts()) == [333, 333, 334]
    groups = pd.Series([k % 40 for k in range(1_000)])
    write_folds(tmp_path, even_folds(groups, "s"))
    table = pd.read_csv(tmp_path / "folds.csv")
    assert table.groupby(groups)["fold"].nunique().max() == 1
    assert table["fold"].value_counts().max() - table["fold"].value_counts().min() <= 25
    names = numbered(groups, salt="s")
    assert sorted(names.unique()) == list(range(40)) and names.nunique() == groups.nunique()
    assert not names[:40].is_monotonic_increasing


# --- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("competition", TASKS)
def test_a_field_has_100_distinct_scripts_that_parse_and_use_one_thread(competition: str) -> None:
    recipes = RECIPES[competition](TASKS[competition])
    assert Counter(recipe.tier for recipe in recipes) == SIZES
    assert len({recipe.id for recipe in recipes}) == len({r.script for r in recipes}) == 100
    assert recipes == RECIPES[competition](TASKS[competition])
    for recipe in recipes:
        ast.parse(recipe.script)
        assert "n_jobs" not in recipe.script and "submission.csv" in recipe.script


@pytest.mark.parametrize("competition", TASKS)
def test_metric_and_kind_of_the_configuration_are_those_the_scripts_are_written_for(
    competition: str,
) -> None:
    config = load_config(competition)
    task = TASKS[competition]
    assert (config.kind, config.metric, config.time) == (task.kind, task.metric, task.time)
    assert config.folds == 3 and not config.dev
    folder = COMPETITIONS / competition
    assert (folder / "data_hashes.yaml").is_file() and (folder / "card.md").is_file()


def test_some_storm_scripts_of_each_tier_give_valid_submissions(
    raw: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_of("storm-status"), "TEST_ROWS", 100)
    storms(raw)
    cut = Cut("storm-status", raw.parent)
    task = facts_of(cut.public, "accuracy", "multiclass")
    wanted = ("trivial-prior", "default-ranks-tree", "tuned-physics-hist-40-8", "strong-path-both")
    recipes = [r for r in RECIPES["storm-status"](task) if r.id in wanted]
    assert len(recipes) == len(wanted)
    limits = Limits(cpu_seconds=60.0, wall_seconds=200.0, memory_mb=3_000)
    with make_pool("process", 2) as pool:
        results = pool.run([ScriptJob(r.script, cut.public, limits=limits) for r in recipes])
    scores = {}
    for recipe, result in zip(recipes, results, strict=True):
        assert result.status == "ok", f"{recipe.id}\n{result.stderr[-400:]}"
        submission = pd.read_csv(io.BytesIO(result.files["submission.csv"]))
        scores[recipe.id] = grade_with("accuracy", submission, cut.answers)
    assert scores["strong-path-both"] > scores["trivial-prior"] + 0.1


def test_a_plan_names_only_the_imports_it_needs() -> None:
    view = View("v", "x = both[['a']]", target="np.log1p(y)", back="np.expm1(pred)")
    text = script("regression", Plan("p", view, ("Ridge()", "Lasso()"), weights=(1, 2), rows=50))
    assert "from sklearn.linear_model import Lasso, Ridge\n" in text
    assert "from scipy" not in text and text.startswith("import numpy as np\nimport pandas as pd\n")
    assert "np.average(parts, axis=0, weights=[1, 2])" in text and "[:50]" in text
    with pytest.raises(UserError, match="has no models"):
        script("regression", Plan("p", view, ()))


def test_a_field_of_the_wrong_size_or_with_twins_is_refused() -> None:
    tiers = {tier: [(f"{k}", f"{tier} {k}") for k in range(n)] for tier, n in SIZES.items()}
    assert len(recipes_of(tiers)) == 100
    tiers["strong"][0] = ("0", "tuned 0")
    with pytest.raises(UserError, match="two recipes have one script"):
        recipes_of(tiers)
    tiers["strong"].pop()
    with pytest.raises(UserError, match="14 strong recipes, 15 are needed"):
        recipes_of(tiers)
