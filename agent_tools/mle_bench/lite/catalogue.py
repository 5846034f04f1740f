"""What MLE-bench says of its 22 Lite competitions: metric, columns, files, split, size.

Facts of the original at its 2026-02 snapshot. Paths are relative to a competition's ``prepared``
folder (``<data>/<id>/prepared``), raw files to ``<data>/<id>/raw``, the unpacked download.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

from agent_tools.errors import UserError

JIGSAW_LABELS = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
PLANT_LABELS = ("healthy", "multiple_diseases", "rust", "scab")
# The competition has two more labels (CVC - Normal, Swan Ganz Catheter Present), but the original
# neither asks for them nor scores them: a known fault that its first version keeps.
RANZCR_LABELS = (
    "ETT - Abnormal",
    "ETT - Borderline",
    "ETT - Normal",
    "NGT - Abnormal",
    "NGT - Borderline",
    "NGT - Incompletely Imaged",
    "NGT - Normal",
    "CVC - Abnormal",
    "CVC - Borderline",
)
SPOOKY_LABELS = ("EAP", "HPL", "MWS")

_CHECKSUMS = Path(__file__).with_name("checksums.csv")


@dataclass(frozen=True)
class LiteCompetition:
    """One competition of MLE-bench Lite.

    ``targets`` are the columns that are scored, beside ``key``; empty means one column a class,
    those of the answers. ``floor`` is the score of the sample submission. ``raw`` lists the files
    that our preparer reads; it is empty where we have none, and then the competition is prepared
    by the original program. ``public`` lists what an agent gets, folders included, without
    description.md.
    """

    id: str
    title: str
    task: str
    metric: str
    lower_is_better: bool
    key: str
    targets: tuple[str, ...]
    gigabytes: float
    floor: float
    split: str
    public: tuple[str, ...]
    answers: str = "private/test.csv"
    sample: str = "public/sample_submission.csv"
    gold: str | None = None
    test_rows: int | None = None
    raw: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        """The name of its grader and of its preparer."""
        return self.id.replace("-", "_")

    @property
    def grade_fn(self) -> str:
        """Import string of the grader."""
        return f"agent_tools.mle_bench.lite.graders:{self.function}"

    @property
    def preparer(self) -> str | None:
        """Import string of the preparer, or None."""
        if not self.raw:
            return None
        return f"agent_tools.mle_bench.lite.preparers:{self.function}"


def lite_ids() -> tuple[str, ...]:
    """The 22 ids, sorted: the split list ``low`` of the original."""
    return tuple(LITE)


def lite_competition(competition_id: str) -> LiteCompetition:
    """One of the 22; `UserError` for another id."""
    try:
        return LITE[competition_id]
    except KeyError:
        raise UserError(
            f"{competition_id!r} is not in MLE-bench Lite: choose one of {', '.join(LITE)}"
        ) from None


def checksums(competition_id: str) -> dict[str, str]:
    """MD5 of the original's files: ``zip`` is the download, others are paths in ``prepared``.

    Only tables directly in ``public`` and ``private`` have one. `UserError` for another id.
    """
    lite_competition(competition_id)
    with _CHECKSUMS.open(newline="", encoding="utf-8") as file:
        return {
            row["file"]: row["md5"]
            for row in csv.DictReader(file)
            if row["competition"] == competition_id
        }


def differing_files(competition_id: str, prepared: Path) -> list[str]:
    """Prepared files that are missing or differ from the original's, as paths in ``prepared``.

    An empty list means that scores on this folder compare with published ones.
    """
    return [
        name
        for name, md5 in checksums(competition_id).items()
        if name != "zip" and _md5(prepared / name) != md5
    ]


def _md5(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


_COMPETITIONS = (
    LiteCompetition(
        id="aerial-cactus-identification",
        title="Aerial Cactus Identification",
        task="image, binary",
        metric="auc",
        lower_is_better=False,
        key="id",
        targets=("has_cactus",),
        gigabytes=0.025,
        floor=0.5,
        split="19 % of train",
        raw=("train.csv", "train.zip"),
        public=("train.csv", "train.zip", "test.zip", "sample_submission.csv"),
    ),
    LiteCompetition(
        id="aptos2019-blindness-detection",
        title="APTOS 2019 Blindness Detection",
        task="image, ordinal 0 to 4",
        metric="quadratic kappa",
        lower_is_better=False,
        key="id_code",
        targets=("diagnosis",),
        gigabytes=10.22,
        floor=0.0,
        split="10 % of train",
        public=("train.csv", "test.csv", "sample_submission.csv", "train_images", "test_images"),
    ),
    LiteCompetition(
        id="denoising-dirty-documents",
        title="Denoising Dirty Documents",
        task="image to image",
        metric="rmse",
        lower_is_better=True,
        key="id",
        targets=("value",),
        answers="private/answers.csv",
        sample="public/sampleSubmission.csv",
        gigabytes=0.06,
        floor=0.28616,
        split="20 % of the 144 training images",
        raw=("train.zip", "train_cleaned.zip"),
        public=("train", "train_cleaned", "test", "sampleSubmission.csv"),
    ),
    LiteCompetition(
        id="detecting-insults-in-social-commentary",
        title="Detecting Insults in Social Commentary",
        task="text, binary",
        metric="auc",
        lower_is_better=False,
        key="Comment",
        targets=("Insult",),
        sample="public/sample_submission_null.csv",
        gold="private/gold_submission.csv",
        gigabytes=0.002,
        floor=0.5,
        split="the labelled test set that Kaggle ships",
        raw=("train.csv", "test_with_solutions.csv"),
        public=("train.csv", "test.csv", "sample_submission_null.csv"),
    ),
    LiteCompetition(
        id="dog-breed-identification",
        title="Dog Breed Identification",
        task="image, 120 classes",
        metric="log loss",
        lower_is_better=True,
        key="id",
        targets=(),
        gigabytes=0.75,
        floor=4.78749,
        split="10 % of train",
        public=("labels.csv", "sample_submission.csv", "train", "test"),
    ),
    LiteCompetition(
        id="dogs-vs-cats-redux-kernels-edition",
        title="Dogs vs. Cats Redux: Kernels Edition",
        task="image, binary",
        metric="binary log loss",
        lower_is_better=True,
        key="id",
        targets=("label",),
        answers="private/answers.csv",
        gigabytes=0.85,
        floor=0.69315,
        split="10 % of train",
        public=("train.zip", "test.zip", "sample_submission.csv", "train", "test"),
    ),
    LiteCompetition(
        id="histopathologic-cancer-detection",
        title="Histopathologic Cancer Detection",
        task="image, binary",
        metric="auc",
        lower_is_better=False,
        key="id",
        targets=("label",),
        answers="private/answers.csv",
        gigabytes=7.76,
        floor=0.5,
        split="the original share of test images, taken from train",
        public=("train_labels.csv", "sample_submission.csv", "train", "test"),
    ),
    LiteCompetition(
        id="jigsaw-toxic-comment-classification-challenge",
        title="Toxic Comment Classification Challenge",
        task="text, 6 labels",
        metric="mean column auc",
        lower_is_better=False,
        key="id",
        targets=JIGSAW_LABELS,
        gigabytes=0.06,
        floor=0.5,
        split="the labelled test set that Kaggle ships",
        raw=("train.csv.zip", "test.csv.zip", "test_labels.csv.zip", "sample_submission.csv.zip"),
        public=("train.csv", "test.csv", "sample_submission.csv"),
    ),
    LiteCompetition(
        id="leaf-classification",
        title="Leaf Classification",
        task="image and features, 99 classes",
        metric="log loss",
        lower_is_better=True,
        key="id",
        targets=(),
        gigabytes=0.036,
        floor=4.59512,
        split="10 % of train",
        raw=("train.csv.zip", "images.zip"),
        public=("train.csv", "test.csv", "sample_submission.csv", "images"),
    ),
    LiteCompetition(
        id="mlsp-2013-birds",
        title="MLSP 2013 Bird Classification Challenge",
        task="audio, 19 labels",
        metric="auc",
        lower_is_better=False,
        key="Id",
        targets=("Probability",),
        answers="private/answers.csv",
        gigabytes=0.585,
        test_rows=1216,
        floor=0.5,
        split="64 of the training recordings, 19 rows each",
        public=("sample_submission.csv", "essential_data", "supplemental_data"),
    ),
    LiteCompetition(
        id="new-york-city-taxi-fare-prediction",
        title="New York City Taxi Fare Prediction",
        task="tabular regression",
        metric="rmse",
        lower_is_better=True,
        key="key",
        targets=("fare_amount",),
        gigabytes=5.7,
        test_rows=9914,
        floor=10.02927,
        split="9,914 rows of train",
        public=("labels.csv", "test.csv", "sample_submission.csv", "GCP-Coupons-Instructions.rtf"),
    ),
    LiteCompetition(
        id="nomad2018-predict-transparent-conductors",
        title="Nomad2018 Predicting Transparent Conductors",
        task="tabular, 2 targets",
        metric="mean column rmsle",
        lower_is_better=True,
        key="id",
        targets=("formation_energy_ev_natom", "bandgap_energy_ev"),
        gigabytes=0.006,
        floor=0.21174,
        split="10 % of train",
        raw=("train.csv.zip", "train.zip"),
        public=("train.csv", "test.csv", "sample_submission.csv", "train", "test"),
    ),
    LiteCompetition(
        id="plant-pathology-2020-fgvc7",
        title="Plant Pathology 2020 - FGVC7",
        task="image, 4 classes",
        metric="mean column auc",
        lower_is_better=False,
        key="image_id",
        targets=PLANT_LABELS,
        gigabytes=0.8,
        floor=0.5,
        split="10 % of train",
        public=("train.csv", "test.csv", "sample_submission.csv", "images"),
    ),
    LiteCompetition(
        id="random-acts-of-pizza",
        title="Random Acts of Pizza",
        task="text and facts, binary",
        metric="auc",
        lower_is_better=False,
        key="request_id",
        targets=("requester_received_pizza",),
        sample="public/sampleSubmission.csv",
        gigabytes=0.003,
        floor=0.5,
        split="the original share of test requests, taken from train",
        raw=("train.json", "test.json"),
        public=("train.json", "test.json", "train.zip", "test.zip", "sampleSubmission.csv"),
    ),
    LiteCompetition(
        id="ranzcr-clip-catheter-line-classification",
        title="RANZCR CLiP - Catheter and Line Position Challenge",
        task="image, 9 of 11 labels",
        metric="mean column auc",
        lower_is_better=False,
        key="StudyInstanceUID",
        targets=RANZCR_LABELS,
        gigabytes=13.13,
        floor=0.5,
        split="10 % of train",
        public=("train.csv", "train_annotations.csv", "sample_submission.csv", "train", "test"),
    ),
    LiteCompetition(
        id="siim-isic-melanoma-classification",
        title="SIIM-ISIC Melanoma Classification",
        task="image and facts, binary",
        metric="auc",
        lower_is_better=False,
        key="image_name",
        targets=("target",),
        gigabytes=116.16,
        test_rows=4142,
        floor=0.5,
        split="2 of the 16 training TFRecord files",
        public=(
            "train.csv",
            "test.csv",
            "sample_submission.csv",
            "train",
            "test",
            "jpeg",
            "tfrecords",
        ),
    ),
    LiteCompetition(
        id="spooky-author-identification",
        title="Spooky Author Identification",
        task="text, 3 classes",
        metric="log loss",
        lower_is_better=True,
        key="id",
        targets=SPOOKY_LABELS,
        gigabytes=0.002,
        floor=1.08468,
        split="10 % of train",
        raw=("train.zip",),
        public=("train.csv", "test.csv", "sample_submission.csv"),
    ),
    LiteCompetition(
        id="tabular-playground-series-dec-2021",
        title="Tabular Playground Series - Dec 2021",
        task="tabular, 7 classes",
        metric="accuracy",
        lower_is_better=False,
        key="Id",
        targets=("Cover_Type",),
        gigabytes=0.7,
        floor=0.56458,
        split="10 % of train",
        public=("train.csv", "test.csv", "sample_submission.csv"),
    ),
    LiteCompetition(
        id="tabular-playground-series-may-2022",
        title="Tabular Playground Series - May 2022",
        task="tabular, binary",
        metric="auc",
        lower_is_better=False,
        key="id",
        targets=("target",),
        gold="private/gold_submission.csv",
        gigabytes=0.57,
        test_rows=100000,
        floor=0.5,
        split="100,000 rows of train",
        public=("train.csv", "test.csv", "sample_submission.csv"),
    ),
    LiteCompetition(
        id="text-normalization-challenge-english-language",
        title="Text Normalization Challenge - English Language",
        task="text to text",
        metric="equal text",
        lower_is_better=False,
        key="id",
        targets=("after",),
        answers="private/answers.csv",
        sample="private/sample_submission.csv",
        gigabytes=0.01,
        test_rows=993465,
        floor=0.93326,
        split="10 % of the training sentences",
        raw=("en_train.csv.zip",),
        public=("en_train.csv.zip", "en_test_2.csv.zip", "en_sample_submission_2.csv.zip"),
    ),
    LiteCompetition(
        id="text-normalization-challenge-russian-language",
        title="Text Normalization Challenge - Russian Language",
        task="text to text",
        metric="equal text",
        lower_is_better=False,
        key="id",
        targets=("after",),
        answers="private/answers.csv",
        sample="private/sample_submission.csv",
        gigabytes=0.01,
        test_rows=1059191,
        floor=0.87501,
        split="10 % of the training sentences",
        raw=("ru_train.csv.zip",),
        public=("ru_train.csv.zip", "ru_test_2.csv.zip", "ru_sample_submission_2.csv.zip"),
    ),
    LiteCompetition(
        id="the-icml-2013-whale-challenge-right-whale-redux",
        title="The ICML 2013 Whale Challenge - Right Whale Redux",
        task="audio, binary",
        metric="auc",
        lower_is_better=False,
        key="clip",
        targets=("probability",),
        sample="public/sampleSubmission.csv",
        gigabytes=0.293,
        floor=0.5,
        split="the last 2 of 4 days",
        public=("train2.zip", "test2.zip", "sampleSubmission.csv"),
    ),
)
LITE = {competition.id: competition for competition in _COMPETITIONS}
