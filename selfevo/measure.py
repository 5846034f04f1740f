"""Measurements beside a campaign: its kept policies on any suite, into the ledger only.

A measurement has its own event log, LAB/runs/medals/<id>/events.jsonl, and writes nothing anywhere
else: the campaign's log, memory and arms are only read. The policy of each commit is served and the
competition agent (`python -m agent_tools.mle_agent run`) is run against it, a process for each.
Equal requests have one id, so the same command goes on after a kill, and commits that are in the
log are not measured again.
"""

from __future__ import annotations

import contextlib
import shlex
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from agent_tools.errors import InfraError, UserError
from agent_tools.git_configs import LabRepo
from selfevo import arms
from selfevo.arms import FULL_ISOLATION, Commands
from selfevo.config import TRAIN_CONFIG
from selfevo.events import Event
from selfevo.lab import campaign_folder, find_campaign
from selfevo.ledger import MEDALS_FOLDER, Hours
from selfevo.llm import Served, die_with_parent
from selfevo.medals import parse_scores
from selfevo.memory import clean
from selfevo.store import LOG, Store, canonical, read_events, sha256
from selfevo.views import CampaignView, reduce

Say = Callable[[str], None]
Which = Literal["kept", "last", "start"]
WHICH: tuple[Which, ...] = ("kept", "last", "start")
SEALED: Literal["sealed"] = "sealed"
END_LIMIT_S = 20.0


@dataclass(frozen=True)
class Request:
    """What is measured and how; the same for all commits of a measurement.

    `model` names the model of an endpoint; None: each commit's own policy. `changes` are KEY=VALUE
    settings of the competition agent. `evaluator` is the hash of what grades: another grader makes
    another measurement.
    """

    campaign: str
    suite: str
    suite_version: int
    split: str
    competitions: tuple[str, ...]
    seeds: int
    settings: str
    evaluator: str
    changes: tuple[str, ...] = ()
    model: str | None = None

    @property
    def id(self) -> str:
        """Names the measurement's folder."""
        if self.split == SEALED:  # once a campaign, whatever the rest
            return f"{self.campaign}-{SEALED}"
        return f"{self.campaign}-{self.suite}-{sha256(canonical(asdict(self)))[:8]}"


@dataclass(frozen=True)
class Target:
    """A commit to measure. `checkpoint` is "<job>/<checkpoint>"; `fault` says why it is not there.

    `hours` is where on the campaign's time axis the arm was measured by the campaign itself.
    """

    round: int
    commit: str
    arm: str
    role: str
    title: str
    checkpoint: str
    folder: Path | None
    fault: str
    hours: dict[str, float]

    @property
    def shown(self) -> str:
        return f"round {self.round}, {clean(self.title)} ({self.commit[:12]})"


@dataclass
class Outcome:
    """What a command did: commits measured now, known before, and not there."""

    id: str
    folder: Path
    measured: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A campaign of a lab, read only."""

    lab: Path
    name: str
    folder: Path
    events: list[Event]
    view: CampaignView


def subject(path: Path, campaign: str | None) -> Subject:
    """The campaign to measure; `UserError` where there is none, or none in a lab."""
    lab, name = find_campaign(path, campaign)
    folder = campaign_folder(lab, name)
    if not (lab / "selfevo.yaml").is_file():
        raise UserError(
            f"{folder}: this campaign is in no lab, and its policies and measurements lie in one: "
            "name the lab's folder"
        )
    events = read_events(folder / LOG)[0]
    view = reduce(events)
    if not view.info:
        raise UserError(f"{folder}: nothing has been logged yet; try again in a moment")
    return Subject(lab, name, folder, events, view)


# ------------------------------------------------------------------ what is measured


def targets(of: Subject, which: Which) -> list[Target]:
    """The start and every merged, not reverted PR, in order; or the last, or the first of them."""
    view = of.view
    hours = _hours(of.events)
    none = {"wall_hours": 0.0, "job_hours": 0.0, "gpu_hours": 0.0}
    start = (0, view.info["commit"], view.info["arm"], "start", "start", view.info["parent"])
    kept = [
        (pr.round, pr.commit, pr.arm, "kept", pr.title, pr.replaced[1])
        for _, pr in sorted(view.prs.items())
        if pr.state == "merged"
    ]
    found = []
    for round_, commit, arm, role, title, parent in (start, *kept):
        label, folder, fault = _checkpoint(of, arm, parent)
        spent = hours.get(arm, none)
        found.append(Target(round_, commit, arm, role, title, label, folder, fault, spent))
    return {"kept": found, "last": found[-1:], "start": found[:1]}[which]


def _checkpoint(of: Subject, arm: str, parent: str) -> tuple[str, Path | None, str]:
    """(label, folder, fault) of what the arm's first train seed left."""
    jobs = [
        job
        for job in of.view.jobs_of_arm.get((arm, "train"), ())
        if job.index == 0 and job.parent == arms.parent_id(parent)
    ]
    if not jobs:
        return "", None, "its first train seed has not been trained"
    job = jobs[-1]
    name = job.result.get("checkpoint")
    if not name:
        return "", None, f"job {job.id} ({job.state}) left no checkpoint"
    folder = of.folder / job.folder / str(name)
    label = f"{job.id}/{name}"
    if not folder.is_dir() or not any(folder.iterdir()):
        return label, None, f"{folder} is not there: restore it from a backup"
    return label, folder, ""


def _hours(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """By arm: the campaign's hours when it had measured that arm."""
    hours, found = Hours(), {}
    for event in events:
        hours.add(event)
        if event.kind == "eval.scores":
            found[str(event.data["arm"])] = hours.at(event)
    return found


def make_request(
    of: Subject,
    suite: str,
    *,
    split: str | None = None,
    competitions: Sequence[str] = (),
    seeds: int = 3,
    settings: str | None = None,
    changes: Sequence[str] = (),
    model: str | None = None,
) -> Request:
    """The request with its defaults. Raises `UserError`, also for data that is not prepared.

    Settings are `real` for endpoints and for MLE-bench's data, else `nano`.
    """
    from agent_tools.mle_agent.settings import PRESETS
    from agent_tools.mle_agent.sources import LITE, competition_ids, suite_version
    from agent_tools.mle_bench.registry import load_suite

    version = suite_version(suite)
    if suite == LITE and split not in (None, "all"):
        raise UserError(f"--split {split}: {LITE} has no splits; leave it out")
    if suite != LITE and not load_suite(suite).medals:
        raise UserError(f"--suite {suite}: it gives percentiles only, no medals; choose another")
    settings = settings or ("real" if suite == LITE or model else "nano")
    if settings not in PRESETS:
        raise UserError(f"--settings {settings}: choose one of {', '.join(PRESETS)}")
    if suite == LITE and settings == "nano":
        raise UserError("--settings nano: its prompt knows our own suites only; choose real")
    split = split or ("all" if suite == LITE else "val")
    if split == SEALED:
        ids = load_suite(suite).ids("sealed")
    else:
        ids = competition_ids(suite, split, list(competitions) or None, None)
    graded = _graders(suite, ids)
    return Request(
        of.name, suite, version, split, ids, seeds, settings, graded, tuple(changes), model
    )


def _graders(suite: str, ids: Sequence[str]) -> str:
    """The hash that rows of these competitions will have, or that of all their hashes."""
    from agent_tools.mle_agent.sources import LITE, folder_competition
    from agent_tools.mle_bench import evaluator, reports
    from agent_tools.mle_bench.registry import load_suite

    if suite != LITE:
        return evaluator.evaluator_hash(load_suite(suite))
    found = [folder_competition(name, None) for name in ids]
    return _together(reports.evaluator_hash(one, one.board()) for one in found)


def _together(hashes: Iterable[str]) -> str:
    found = sorted(set(hashes))
    return found[0] if len(found) == 1 else sha256(canonical(found))[:12]


# ------------------------------------------------------------------ measuring


@dataclass
class Measurement:
    """An open measurement: its folder, log and lock. `seen` holds the keys of its scores."""

    request: Request
    folder: Path
    store: Store
    events: list[Event]
    seen: set[str]

    def emit(self, kind: str, data: Mapping[str, Any], **more: Any) -> None:
        """Append an event, and keep it in `events`."""
        self.events.append(self.store.append(kind, data, **more))

    def has(self, target: Target) -> bool:
        """Whether every seed of a commit is in the log."""
        return all(self.key(target, seed) in self.seen for seed in range(self.request.seeds))

    @staticmethod
    def key(target: Target, seed: int) -> str:
        return f"{target.commit}/s{seed}"


def measurement_folder(lab: Path, request: Request) -> Path:
    """LAB/runs/medals/<id>, which may not exist."""
    return lab / "runs" / MEDALS_FOLDER / request.id


@contextlib.contextmanager
def opened(lab: Path, request: Request, base_url: str | None = None) -> Iterator[Measurement]:
    """The measurement of a request, made or taken up; `UserError` while another process has it."""
    folder = measurement_folder(lab, request)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process measures there; wait for it") from None
    except OSError as error:
        raise InfraError(f"cannot write in {folder}: {error.strerror}; free some space") from error
    try:
        log = folder / LOG
        events = read_events(log)[0] if log.is_file() else []
        seen = {str(e.data["key"]) for e in events if e.kind == "measure.scores"}
        store = Store(folder, request.campaign)
        try:
            made = Measurement(request, folder, store, events, seen)
            if not events:
                record = asdict(request) | {"id": request.id, "base_url": _address(base_url)}
                made.emit("measure.start", record, actor="human")
            yield made
        finally:
            store.close()
    finally:
        lock.release()


def _address(base_url: str | None) -> str | None:
    """An endpoint without what may be secret in it."""
    if base_url is None:
        return None
    parts = urlsplit(base_url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def measure(
    made: Measurement,
    lab: Path,
    chosen: Sequence[Target],
    say: Say,
    commands: Commands,
    base_url: str | None = None,
) -> Outcome:
    """Measure the commits that are not in the log yet. Raises `UserError` or `InfraError`.

    A commit whose checkpoint is gone is left out and named, unless nothing else is left.
    """
    outcome = Outcome(made.request.id, made.folder)
    own = made.request.model is None
    for target in chosen:
        if own and target.fault and not made.has(target):
            outcome.missing[target.commit] = target.fault
            say(f"{target.shown}: not measured, {target.fault}")
    there = [target for target in chosen if target.commit not in outcome.missing]
    if not there:
        commit, fault = next(iter(outcome.missing.items()))
        raise UserError(f"{commit[:12]}: no policy to measure, {fault}; or choose other --commits")
    for target in there:
        if made.has(target):
            outcome.known.append(target.commit)
            say(f"{target.shown}: is measured")
            continue
        _measure_one(made, lab, target, say, commands, base_url)
        outcome.measured.append(target.commit)
    commits = [target.commit for target in there]
    last = made.events[-1]
    if last.kind != "measure.end" or last.data["commits"] != commits:
        made.emit("measure.end", {"commits": commits, "missing": outcome.missing})
    return outcome


def _measure_one(
    made: Measurement,
    lab: Path,
    target: Target,
    say: Say,
    commands: Commands,
    base_url: str | None,
) -> None:
    request = made.request
    label = request.model or target.checkpoint
    say(
        f"{target.shown}: {label}, {request.suite}, {len(request.competitions)} competitions × "
        f"{request.seeds} seeds"
    )
    out = made.folder / "groups" / f"r{target.round}-{target.commit[:12]}"
    out.parent.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        if base_url is None:
            assert target.folder is not None
            served = Served(commands.serve, target.folder, made.folder)
            base_url = stack.enter_context(served)
        argv = [*commands.solve, "--out", str(out), *_options(request, label)]
        argv += ["--base-url", base_url, "--model", request.model or "nano"]
        argv += ["--campaign", request.campaign, "--round", str(target.round)]
        argv += _sandbox(lab, target.commit)
        run_child(argv, made.folder, say, out)
    _record(made, target, label, out)
    say(f"{target.shown}: measured")


def _options(request: Request, label: str) -> list[str]:
    options = ["--suite", request.suite, "--seeds", str(request.seeds), "--checkpoint", label]
    options += ["--settings", request.settings, "--json"]
    options += [part for name in request.competitions for part in ("--competition", name)]
    options += [part for change in request.changes for part in ("--set", change)]
    return [*options, *(["--sealed"] if request.split == SEALED else [])]


def _sandbox(lab: Path, commit: str) -> list[str]:
    """The sandbox that the commit's scripts run in anyway."""
    text = LabRepo(lab).read_file(commit, TRAIN_CONFIG)
    found = arms.parsed(text, TRAIN_CONFIG).get("sandbox")
    found = found if isinstance(found, dict) else {}
    options = ["--sandbox", str(found.get("kind", "bubblewrap"))]
    options += ["--workers", str(found.get("workers", 2))]
    return [*options, *(["--require-full-isolation"] if found.get(FULL_ISOLATION) is True else [])]


def _record(made: Measurement, target: Target, label: str, out: Path) -> None:
    """One event a seed, from what the judge wrote."""
    request = made.request
    path = out / "scores.jsonl"
    rows = parse_scores(path.read_text(encoding="utf-8"), str(path))
    for seed in range(request.seeds):
        key = made.key(target, seed)
        if key in made.seen:
            continue
        own = [row for row in rows if row["seed"] == seed]
        whole = [row for row in own if row["fold"] is None]
        if sorted(row["competition"] for row in whole) != sorted(request.competitions):
            raise InfraError(f"{path}: seed {seed} is not whole; delete {out} and try again")
        made.emit(
            "measure.scores",
            {
                "key": key,
                **{name: getattr(target, name) for name in ("round", "commit", "arm", "role")},
                "checkpoint": label,
                "agent": f"selfevo-{request.settings}",
                "suite": request.suite,
                "suite_version": request.suite_version,
                "split": request.split,
                "seed": seed,
                "evaluator": _together(str(row["evaluator_hash"]) for row in own),
                "rows": made.store.blob("".join(canonical(row) + "\n" for row in own)),
                "cost": {
                    name: round(sum(float(row[name]) for row in whole), 3)
                    for name in ("wall_s", "cpu_s", "tokens")
                },
                "hours": target.hours,
            },
            round_=target.round,
        )
        made.seen.add(key)


def run_child(argv: Sequence[str], cwd: Path, say: Say, out: Path | None = None) -> None:
    """Run a command of ours, its stderr told line by line; it ends with this process.

    Raises `UserError` for exit code 2 and `InfraError` for any other, with its last line.
    """
    with subprocess.Popen(
        argv,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
    ) as child:
        assert child.stderr is not None
        last = "no message"
        try:
            for line in child.stderr:
                if line.strip():
                    last = clean(line.strip())
                    say(f"  {last}")
            code = child.wait()
        except BaseException:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(END_LIMIT_S)
            child.kill()
            raise
    if code == 0:
        return
    message = last.removeprefix("error: ")
    if code == UserError.exit_code:
        hint = f" (here: delete {out} to begin this commit anew)" if "--out" in message else ""
        raise UserError(f"{message}{hint}")
    name = shlex.join([Path(argv[0]).name, *argv[1:4]])
    raise InfraError(f"`{name}` ended with exit code {code}: {message}; the same command goes on")
