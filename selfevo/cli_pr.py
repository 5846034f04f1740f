"""`selfevo pr`: what the agent proposes, and what people do with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from selfevo.campaign import Campaign
    from selfevo.views import CampaignView, PrView

pr_app = typer.Typer(
    name="pr",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Proposals: list, read, answer, edit, merge them. A bare `selfevo pr` lists.",
)

Number = Annotated[int, typer.Argument(help="number of the PR")]
LabArgument = Annotated[Path, typer.Argument(help="lab folder, or folder of one campaign")]
CampaignOption = Annotated[
    str | None, typer.Option("--campaign", "-c", help="name of the campaign (default: the newest)")
]
JsonOption = Annotated[bool, typer.Option("--json", help="machine output on stdout")]
BodyOption = Annotated[str, typer.Option("--body", "-b", help="text, also for the agent")]
BodyFileOption = Annotated[
    Path | None, typer.Option("--body-file", "-F", help="file with that text")
]
HERE = Path()


@pr_app.callback()
def _bare(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_prs()


@pr_app.command("list")
def list_prs(
    lab: LabArgument = HERE, campaign: CampaignOption = None, as_json: JsonOption = False
) -> None:
    """All PRs of a campaign."""
    from selfevo.text import table

    view, _ = _load(lab, campaign)
    if as_json:
        for pr in view.prs.values():
            _out(record(view, pr))
        return
    if not view.prs:
        print("no PR yet")
        return
    rows = [["PR", "round", "state", "difference", "title"]]
    for pr in view.prs.values():
        difference = pr.gate.get("difference") if pr.gate else None
        rows.append(
            [
                str(pr.number),
                str(pr.round),
                pr.state.replace("_", " "),
                "" if difference is None else f"{difference:+.1f}",
                pr.title,
            ]
        )
    print("\n".join(table(rows, right=(0, 1, 3))))


@pr_app.command()
def view(
    number: Number,
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """A PR in full: hypothesis, change, evidence, cost, reviews."""
    from selfevo import proposals

    state, folder = _load(lab, campaign)
    pr = proposals.pr_of(state, number)
    if as_json:
        _out(record(state, pr))
    else:
        print(proposals.body(state, pr, _stat(folder, pr)))


@pr_app.command()
def diff(
    number: Number,
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """The PR's unified diff."""
    from selfevo import proposals
    from selfevo.store import read_blob

    state, folder = _load(lab, campaign)
    pr = proposals.pr_of(state, number)
    text = read_blob(folder, pr.diff).decode("utf-8", "replace")
    if as_json:
        _out({"number": number, "base": pr.base, "commit": pr.commit, "diff": text})
    else:
        print("".join(c for c in text if c.isprintable() or c in "\n\t"), end="")


@pr_app.command()
def review(
    number: Number,
    lab: LabArgument = HERE,
    approve: Annotated[bool, typer.Option("--approve", help="run it")] = False,
    reject: Annotated[bool, typer.Option("--reject", help="end the round; needs -b")] = False,
    request_changes: Annotated[
        bool, typer.Option("--request-changes", help="another commit on this PR; needs -b")
    ] = False,
    body: BodyOption = "",
    body_file: BodyFileOption = None,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer the PR that waits; then `selfevo resume` goes on."""
    from agent_tools.errors import UserError
    from selfevo import proposals

    flags = {"approve": approve, "reject": reject, "request_changes": request_changes}
    chosen = [name for name, given in flags.items() if given]
    if len(chosen) != 1:
        raise UserError("give exactly one of --approve, --reject, --request-changes")
    body = _body(body, body_file)
    root, opened = _open(lab, campaign)
    with opened as c:
        proposals.answer(c, number, chosen[0], body)
        answered = record(c.view, c.view.prs[number])
    if as_json:
        _out(answered)
    else:
        print(
            f"PR {number}: {answered['state'].replace('_', ' ')}; go on with "
            f"`selfevo resume {shlex.quote(str(root))}`"
        )


@pr_app.command()
def checks(
    number: Number,
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Guard, review, gate and confirmation: exit code 0 only when all have passed."""
    from selfevo import pr_acts, proposals
    from selfevo.text import table

    state, _ = _load(lab, campaign)
    pr = proposals.pr_of(state, number)
    rows = pr_acts.checks(state, pr)
    code = pr_acts.exit_code(state, pr, rows)
    if as_json:
        _out({"number": number, "state": pr.state, "passed": code == 0, "checks": rows})
    else:
        print("\n".join(table([[row["state"], row["name"], row["detail"]] for row in rows])))
    raise typer.Exit(code)


@pr_app.command()
def comment(
    number: Number,
    lab: LabArgument = HERE,
    body: BodyOption = "",
    body_file: BodyFileOption = None,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say something about a PR; it decides nothing and reaches the agent's next prompt."""
    from selfevo import pr_acts

    text = _body(body, body_file)
    _act(lab, campaign, number, as_json, lambda c: pr_acts.comment(c, number, text))


@pr_app.command()
def edit(
    number: Number,
    lab: LabArgument = HERE,
    value: Annotated[str | None, typer.Option(help="another value for the PR's key")] = None,
    title: Annotated[str | None, typer.Option(help="another title")] = None,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change the value or title of the PR that waits, inside the search space."""
    from selfevo import pr_acts

    _act(lab, campaign, number, as_json, lambda c: pr_acts.edit(c, number, value, title))


@pr_app.command()
def close(
    number: Number,
    lab: LabArgument = HERE,
    body: BodyOption = "",
    body_file: BodyFileOption = None,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Close a PR that waits, or that the gate left open; needs -b."""
    from selfevo import pr_acts

    text = _body(body, body_file)
    _act(lab, campaign, number, as_json, lambda c: pr_acts.close(c, number, text))


@pr_app.command()
def merge(
    number: Number,
    into: Annotated[str, typer.Option("--into", help="a branch of yours")],
    lab: LabArgument = HERE,
    campaign: CampaignOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge a PR into a branch of yours (the only command that moves one)."""
    from selfevo import proposals

    _, opened = _open(lab, campaign)
    with opened as c:
        commit = proposals.merge_into(c, number, into)
    if as_json:
        _out({"number": number, "into": into, "commit": commit})
    else:
        print(f"PR {number} merged into {into} as {commit[:12]}")


def record(view: CampaignView, pr: PrView) -> dict[str, Any]:
    """A PR for programs."""
    return {
        "number": pr.number,
        "round": pr.round,
        "state": pr.state,
        "title": pr.title,
        "branch": pr.branch,
        "base": pr.base,
        "commit": pr.commit,
        "commits": pr.commits,
        "proposal": {k: v for k, v in pr.proposal.items() if k != "text"},
        "gate": pr.gate,
        "verdict": view.rounds[pr.round].verdict,
        "reviews": [
            {"answer": r["answer"], "body": r["body"], "commit": r["commit"]} for r in pr.said
        ],
        "merge_commit": pr.merge_commit,
        "merged_into": pr.merged_into,
    }


def _out(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _load(lab: Path, campaign: str | None) -> tuple[CampaignView, Path]:
    from selfevo.cli import load

    return load(lab, campaign)


def _stat(folder: Path, pr: PrView) -> str:
    from selfevo.store import read_blob

    text = read_blob(folder, pr.diff).decode("utf-8", "replace")
    lines = [
        line for line in text.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    return "\n".join(f"    {line}" for line in lines[:40])


def _body(text: str, file: Path | None) -> str:
    """The text of -b, or of the file of -F."""
    from agent_tools.errors import UserError

    if file is None:
        return text
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text; check the path") from error


def _act(
    lab: Path, campaign: str | None, number: int, as_json: bool, act: Callable[[Campaign], None]
) -> None:
    """Do a person's act on a PR under the lab's lock, and show the PR as it is then."""
    from selfevo import proposals

    root, opened = _open(lab, campaign)
    with opened as c:
        act(c)
        pr = proposals.pr_of(c.view, number)
        waiting = c.view.pending_review()
        done = record(c.view, pr)
    if as_json:
        _out(done)
        return
    print(f"PR {number}: {pr.title} ({pr.state.replace('_', ' ')})")
    word = shlex.quote(str(root))
    if waiting is not None:
        print(f"it waits: `selfevo pr review {waiting.number} {word}`")
    elif pr.state == "rejected" and pr.round == c.view.round and not c.view.now.ended:
        print(f"go on with `selfevo resume {word}`")


def _open(lab: Path, campaign: str | None) -> tuple[Path, Any]:
    """(lab, context manager of the locked campaign)."""
    from selfevo.lab import find_campaign
    from selfevo.loop import opened

    root, name = find_campaign(lab, campaign)
    return root, opened(root, name)
