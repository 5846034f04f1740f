"""A campaign: everything that the graph's nodes act with, and how one is made, opened and locked.

The event log is the truth. A campaign's configuration is frozen in event 1, so nothing that a
person (or a job) does to the lab's files changes a campaign that has started.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_tools.errors import InfraError, UserError
from agent_tools.git_configs import LabRepo
from agent_tools.launcher import Launcher
from selfevo import arms, guard
from selfevo.arms import Commands
from selfevo.config import (
    PROTECTED,
    TRAIN_CONFIG,
    EvalConfig,
    LabConfig,
    SearchSpace,
    dump_yaml,
    flatten,
    load_eval,
    load_lab_config,
)
from selfevo.events import Actor, Event
from selfevo.installed import version_of
from selfevo.lab import campaign_folder, next_name, parse_lab
from selfevo.llm import Endpoint
from selfevo.preflight import check_machine, check_sandbox, suite_version
from selfevo.snapshot import Keeper, fold
from selfevo.store import LOG, Store, sha256
from selfevo.views import CampaignView, apply

Say = Callable[[str], None]
POLL_S = 0.25  # between looks at running jobs


@dataclass(frozen=True)
class RunOptions:
    """Command-line choices of `selfevo run`; None = the lab's own setting."""

    rounds: int | None = None
    seed: int = 0
    agent: str | None = None
    review: str | None = None
    train_seeds: int | None = None


@dataclass
class Campaign:
    """An open campaign. The caller holds the lab's lock while it writes."""

    lab: Path
    folder: Path
    repo: LabRepo
    store: Store
    view: CampaignView
    config: LabConfig
    space: SearchSpace
    evaluation: EvalConfig
    program: str
    commands: Commands
    launcher: Launcher
    say: Say
    endpoint: Endpoint | None = None
    progress: dict[str, str] = field(default_factory=dict)
    _lap: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.view.name

    @property
    def incumbent_branch(self) -> str:
        return f"selfevo/{self.name}/incumbent"

    @property
    def incumbent_tree(self) -> Path:
        return self.folder / "worktrees" / "incumbent"

    def pr_tree(self, branch: str) -> Path:
        """Folder of a PR's worktree."""
        return self.folder / "worktrees" / branch.rsplit("/", 1)[-1]

    @property
    def budget_id(self) -> str:
        return arms.budget_id(self.config.budget)

    @property
    def campaign_seed(self) -> int:
        return int(self.view.info["seed"])

    def emit(
        self,
        kind: str,
        data: Mapping[str, Any] | None = None,
        *,
        actor: Actor = "system",
        cause: int | None = None,
    ) -> Event:
        """Append an event of the present round; the view is up to date when this returns."""
        return self.store.append(kind, data, round_=self.view.round, actor=actor, cause=cause)

    def once(
        self, kind: str, key: str, data: Mapping[str, Any], act: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Do `act` once a key: intent event, act, outcome event with what `act` returned.

        With the outcome in the log nothing is done. `act` may run again after a kill between
        intent and outcome, so it finds out by itself what it did before.
        """
        if key in self.view.outcomes:
            return self.view.outcomes[key]
        if key not in self.view.intents:
            self.emit(f"{kind}.intent", {**data, "key": key})
        outcome = {**data, **act(), "key": key}
        self.emit(kind, outcome)
        return outcome

    def lap(self) -> float:
        """Seconds since the last call, by the clock that nobody can set."""
        before, self._lap = self._lap, time.monotonic()
        return round(self._lap - before, 3)

    def incumbent(self) -> Path:
        """The incumbent's worktree, clean and at the log's head, whatever was done to it in git.

        A branch that was deleted is made again. One that others moved is put back, and their
        commits stay on a branch of their own.
        """
        branch, head = self.incumbent_branch, self.view.incumbent_head
        if not self.repo.branch_exists(branch):
            self.repo.create_branch(branch, head)
        found = self.repo.resolve(f"refs/heads/{branch}")
        tree = self.worktree(self.incumbent_tree, branch)
        if found != head and not self._made_by_us(found):
            kept = f"selfevo/{self.name}/found-{found[:12]}"
            self.repo.create_branch(kept, found)
            self.repo.reset(head, worktree=tree)
            self.emit("branch.restored", {"branch": branch, "found": found, "kept_as": kept})
        elif self.repo.is_dirty(worktree=tree, tracked_only=True):
            self.repo.reset(found, worktree=tree)
        return tree

    def _made_by_us(self, commit: str) -> bool:
        """Whether it is the commit of an act that was killed before its outcome was logged."""
        last = self.repo.log(commit, limit=1)[0]
        return "Selfevo-Round" in last.trailers and self.view.incumbent_head in last.parents[:1]

    def worktree(self, path: Path, branch: str) -> Path:
        """A worktree of a branch; what is left of one that git has forgotten is removed first."""
        if not self.repo.has_worktree(path):
            shutil.rmtree(path, ignore_errors=True)
        return self.repo.worktree_add(path, branch)

    def run_dir(self, folder: str) -> Path:
        return self.folder / folder

    def arm_folder(self, arm: str) -> Path:
        return self.folder / "arms" / arm

    def export_arm(self, commit: str) -> str:
        """Write the arm at `commit` into the campaign folder and return its id."""
        files = arms.arm_files(self.repo, commit)
        arm = arms.arm_id(files)
        arms.write_arm(self.arm_folder(arm), files)
        return arm

    def control_values(self) -> dict[str, Any]:
        """Dotted key → value of the control's configs/train.yaml."""
        return flatten(arms.parsed(self.control_train(), TRAIN_CONFIG))

    def control_train(self) -> str:
        return self.repo.read_file(self.view.control_commit, TRAIN_CONFIG)

    def close(self) -> None:
        self.store.close()


# ------------------------------------------------------------------ make and open


def create(
    lab: Path, repo: LabRepo, options: RunOptions, say: Say, commands: Commands | None = None
) -> Campaign:
    """Start a campaign from the lab's checked-out commit: folder, branch, event 1.

    Every check that can fail comes first, so a refused campaign leaves nothing behind.
    """
    commands = commands or Commands()
    head = repo.require_clean_head()
    assert head.commit is not None
    texts = {path: repo.read_file(head.commit, path) for path in (*PROTECTED, TRAIN_CONFIG)}
    files = parse_lab(*(texts[p] for p in (*PROTECTED, TRAIN_CONFIG)))
    overrides = {
        "rounds": options.rounds,
        "review": options.review,
        "agent.kind": options.agent,
    }
    config = load_lab_config(
        texts["selfevo.yaml"], {k: v for k, v in overrides.items() if v is not None}
    )
    evaluation = load_eval(texts["configs/eval.yaml"], options.train_seeds)
    parent = _parent(files.train)
    name = next_name(lab, repo)
    folder = campaign_folder(lab, name)
    if commands.check_machine:
        check_machine(config.suite, evaluation.suite)
        for missing in check_sandbox(files.train):
            say(f"sandbox: {missing}")
    if config.agent.kind == "model":
        Endpoint(config.agent, folder, commands.serve).check()
    try:
        _dry_run(folder, texts[TRAIN_CONFIG], config, parent, commands)
        (folder / "jobs").mkdir(parents=True)
        store = Store(folder, name)
    except OSError as error:
        raise InfraError(f"cannot write {folder}: {error.strerror}; free some space") from error
    view = CampaignView()
    _listen(store, view, 0)
    branch = f"selfevo/{name}/incumbent"
    arm_files = arms.arm_files(repo, head.commit)
    resolved = {
        "lab": config.model_dump(mode="json"),
        "eval": evaluation.model_dump(mode="json"),
        "search_space": files.space.model_dump(mode="json"),
    }
    resolved_text = dump_yaml(resolved)
    (folder / "config.resolved.yaml").write_text(resolved_text, encoding="utf-8")
    info = {
        "user_branch": head.branch,
        "commit": head.commit,
        "branch": branch,
        "rounds": config.rounds,
        "seed": options.seed,
        "train_seeds": evaluation.train_seeds,
        "agent": config.agent.kind,
        "model": config.agent.model,
        "review": config.review,
        "suite": evaluation.suite or config.suite,
        "suite_version": suite_version(evaluation.suite or config.suite),
        "train_suite": config.suite,
        "parent": parent,
        "arm": arms.arm_id(arm_files),
        "budget": arms.budget_id(config.budget),
        "config": store.json_blob(resolved),
        "config_sha256": sha256(resolved_text),
        "program": store.blob(repo.read_file(head.commit, "program.md")),
        "protected": guard.manifest({path: texts[path].encode() for path in PROTECTED}),
        "versions": _versions(),
    }
    store.append("campaign.start", info)
    run = {
        "campaign": name,
        "created": time.time(),
        "commit": head.commit,
        "options": vars(options),
    }
    (folder / "run.json").write_text(json.dumps(run, indent=1), encoding="utf-8")
    return _assemble(lab, folder, repo, store, view, say, commands)


def open_campaign(lab: Path, name: str, say: Say, commands: Commands | None = None) -> Campaign:
    """Open a campaign for writing: read the log, and take the configuration from event 1."""
    folder = campaign_folder(lab, name)
    log = fold(folder) if (folder / LOG).exists() else None
    if log is None or not log.view.info:
        raise UserError(
            f"{folder}: the campaign ended before it began (no event); delete the folder and "
            f"its branch selfevo/{name}/incumbent, then `selfevo run`"
        )
    store = Store(folder, name, log.extent)
    _listen(store, log.view, log.covered)
    return _assemble(lab, folder, LabRepo(lab), store, log.view, say, commands or Commands())


def read_view(folder: Path) -> CampaignView:
    """The view of a campaign, read only: works while another process writes, and on a copy."""
    return fold(folder).view


def _assemble(
    lab: Path,
    folder: Path,
    repo: LabRepo,
    store: Store,
    view: CampaignView,
    say: Say,
    commands: Commands,
) -> Campaign:
    resolved = json.loads(store.read(view.info["config"]))
    return Campaign(
        lab=lab,
        folder=folder,
        repo=repo,
        store=store,
        view=view,
        config=LabConfig.model_validate(resolved["lab"]),
        space=SearchSpace.model_validate(resolved["search_space"]),
        evaluation=EvalConfig.model_validate(resolved["eval"]),
        program=store.read(view.info["program"]).decode("utf-8"),
        commands=commands,
        launcher=commands.launcher(folder / "jobs"),
        say=say,
    )


def _listen(store: Store, view: CampaignView, covered: int) -> None:
    """Keep the view up to date with what is written, and its snapshot not far behind."""

    def folded(event: Event) -> None:
        apply(view, event)

    store.listeners += [folded, Keeper(store, view, covered)]


def _parent(train: Mapping[str, object]) -> str:
    """The base checkpoint that every arm starts from, as the train config names it."""
    model = train.get("model")
    checkpoint = model.get("checkpoint") if isinstance(model, Mapping) else None
    if not isinstance(checkpoint, str) or not checkpoint:
        raise UserError(f"{TRAIN_CONFIG}: key model.checkpoint is missing; set it to nano")
    return checkpoint


def _dry_run(folder: Path, train: str, config: LabConfig, parent: str, commands: Commands) -> None:
    """Let the trainer itself check the run's configuration before anything is made."""
    check = folder.with_name(f".check-{folder.name}")
    check.mkdir(parents=True, exist_ok=True)
    try:
        fault = trainer_fault(check, train, config, parent, commands)
    finally:
        shutil.rmtree(check, ignore_errors=True)
    if fault:
        raise UserError(f"{TRAIN_CONFIG}: {fault}")


def trainer_fault(
    folder: Path, train: str, config: LabConfig, parent: str, commands: Commands
) -> str | None:
    """What the trainer's dry run says against a train config; None if it takes it."""
    path = folder / "RUN.yaml"
    path.write_text(
        arms.run_config(
            train,
            config.budget,
            suite=config.suite,
            parent=parent,
            seed=0,
            scaffold=None,
            group="check",
            name="check",
        ),
        encoding="utf-8",
    )
    try:
        done = subprocess.run(
            commands.dry_run_argv(path),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise InfraError("the trainer's dry run took over 120 s; see the machine's load") from error
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    message = lines[-1].removeprefix("error: ").replace(f"{path}: ", "").replace(str(path), "")
    if done.returncode == 2:
        return message
    raise InfraError(f"the trainer's dry run ended with exit code {done.returncode}: {message}")


def _versions() -> dict[str, str]:
    names = ("selfevo", "langgraph", "wandb", "openai")
    found = {"python": platform.python_version()}
    for name in names:
        found[name] = version_of(name)
    return found
