"""report.md and report.html of a campaign: the reducer's view, rendered from log and blobs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from selfevo import report_svg as svg
from selfevo import summary, text
from selfevo.campaign import read_view
from selfevo.medals import MedalRow, before_after, medal_rows
from selfevo.memory import clean, confirm_line, gate_line, number
from selfevo.report_svg import Series
from selfevo.store import LogError, read_blob
from selfevo.views import CampaignView, JobView, PrView, RoundView

TEMPLATES = Path(__file__).parent / "templates"
FULL_ROUNDS = 50  # newest rounds, and newest kept ones, that a report tells in full
SHORT_HEAD = ("round", "what", "verdict", "difference")
CHARTS: tuple[tuple[str, str, float | None, float | None], ...] = (
    ("reward/mle/mean", "training reward", 0.0, None),
    ("rollout/valid_frac", "share of valid scripts", 0.0, 1.0),
    ("policy/grad_norm", "gradient norm", 0.0, None),
    ("policy/entropy", "entropy, nats a token", 0.0, None),
)
BADGES = {
    "accept": ("kept", "good"),
    "reject": ("rejected", "bad"),
    "indecisive": ("indecisive", "open"),
    "void": ("void", "bad"),
    "no_proposal": ("no proposal", "open"),
    "rejected_by_review": ("rejected by review", "bad"),
    "refused": ("refused by guard", "bad"),
    "reverted": ("kept, then taken back", "bad"),
    "": ("in progress", "open"),
}


def write(folder: Path) -> tuple[Path, Path]:
    """Write both reports into the campaign folder; returns their paths (Markdown, HTML)."""
    view = read_view(folder)
    targets = folder / "report.md", folder / "report.html"
    contents = markdown(view, folder), html(view, folder)
    for target, content in zip(targets, contents, strict=True):
        part = target.with_name(f".{target.name}.{os.getpid()}")
        part.write_text(content, encoding="utf-8")
        part.replace(target)
    return targets


# ------------------------------------------------------------------ markdown


def markdown(view: CampaignView, folder: Path) -> str:
    """The campaign in Markdown."""
    info = view.info
    lines = [
        f"# Campaign {view.name}",
        "",
        headline(view),
        "",
        f"- state: {view.state}" + (f" ({view.stop_reason})" if view.stop_reason else ""),
        f"- agent: {info['agent']}" + (f" ({info['model']})" if info["agent"] == "model" else ""),
        f"- suite: {info['suite']}, val competitions; {info['train_seeds']} train seeds an arm, "
        f"campaign seed {info['seed']}",
        f"- start: commit `{info['commit'][:12]}` of `{info['user_branch']}`; incumbent "
        f"`{view.incumbent_head[:12]}` on `{info['branch']}`",
        f"- human acts: {view.human_acts}",
        "",
    ]
    full, short = told(view)
    if short:
        lines += ["## Rounds in short", ""]
        lines += _markdown_table(SHORT_HEAD, [_short_cells(view, view.rounds[n]) for n in short])
        lines += [""]
    for round_number in full:
        lines += [*_round_markdown(view, view.rounds[round_number], folder), ""]
    lines += [
        "## Offline medals",
        "",
        f"Offline medals of suite {info['suite']} version {info['suite_version']}; they are "
        "not MLE-bench medals.",
        "",
    ]
    lines += _markdown_table(
        ["round", "arm", "percentile", "valid", "gold", "silver", "bronze", "any", "scripts"],
        [_medal_cells(row) for row in medal_rows(view)],
    )
    lines += ["", "## Where the time went", ""]
    total = view.active_seconds or 1.0
    lines += _markdown_table(
        ["what", "time", "share"],
        [[label, text.seconds(v), f"{v / total:.1%}"] for label, v in text.time_rows(view)],
    )
    lines += ["", "## Try next", ""]
    code = 4 if view.pending_review() else 0
    lines += [f"    {command}" for command in summary.next_commands(view, folder, code)]
    return "\n".join(lines) + "\n"


def told(view: CampaignView) -> tuple[list[int], list[int]]:
    """Rounds that are told in full (kept ones, and the newest), and those told in one line."""
    numbers = sorted(n for n in view.rounds if n)
    kept = {n for n in numbers if view.rounds[n].verdict in ("accept", "reverted")}
    full = {*numbers[-FULL_ROUNDS:], *sorted(kept)[-FULL_ROUNDS:]}
    return sorted(full), [n for n in numbers if n not in full]


def _short_cells(view: CampaignView, current: RoundView) -> list[str]:
    pr = _pr(view, current)
    difference = current.gate.get("difference") if current.gate else None
    return [
        str(current.number),
        clean(pr.title if pr else current.note),
        BADGES.get(current.verdict, (current.verdict, ""))[0],
        "" if difference is None else f"{difference:+.1f}",
    ]


def _round_markdown(view: CampaignView, current: RoundView, folder: Path) -> list[str]:
    badge = BADGES.get(current.verdict, (current.verdict, "open"))[0]
    pr = _pr(view, current)
    if pr is None:
        return [f"## Round {current.number}: {badge}", "", clean(current.note) or "–"]
    lines = [
        f"## Round {current.number}: {clean(pr.title)}: {badge}",
        "",
        f"Hypothesis ({pr.proposal['agent']}): {clean(str(pr.proposal['why']))}",
        "",
        "```diff",
        *_diff_text(folder, pr),
        "```",
        "",
    ]
    if current.gate:
        lines += [gate_line(current.gate) + f" ({clean(str(current.gate['reason']))})", ""]
        lines += _markdown_table(
            ["arm", "seed", "percentile", "valid", "medals", "scripts"], _seed_cells(view, pr)
        )
    if current.confirmation:
        lines += ["", _confirm_text(current)]
    return lines


def _confirm_text(current: RoundView) -> str:
    found = current.confirmation
    return f"{confirm_line(found)} ({clean(str(found['reason']))})" if found else ""


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows)]


# ------------------------------------------------------------------ html


def html(view: CampaignView, folder: Path) -> str:
    """One self-contained page: no script, no link to anywhere, everything escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    times = text.time_rows(view)
    total = view.active_seconds or 1.0
    pair = before_after(view)
    full, short = told(view)
    shown = [job for job in view.jobs.values() if not job.round or job.round in full]
    return environment.get_template("report.html.j2").render(
        view=view,
        info=view.info,
        headline=headline(view),
        pair=pair,
        n_rounds=text.count(view.rounds_planned, "round"),
        n_acts=text.count(view.human_acts, "human act"),
        started=datetime.fromtimestamp(view.first_ts).strftime("%Y-%m-%d %H:%M"),
        worked=text.seconds(view.active_seconds),
        tiles=_tiles(view, pair),
        start=_start(view, folder),
        rounds=[_round(view, view.rounds[n], folder) for n in full],
        short_head=SHORT_HEAD,
        short=[_short_cells(view, view.rounds[n]) for n in short],
        medals=[(_medal_cells(row), row) for row in medal_rows(view)],
        time_bar=svg.time_bar(times),
        times=[(label, text.seconds(v), f"{v / total:.1%}") for label, v in times],
        jobs=[_job_row(job) for job in shown],
        n_jobs=len(view.jobs),
        commands=summary.next_commands(view, folder, 4 if view.pending_review() else 0),
    )


def headline(view: CampaignView) -> str:
    """The outcome in one or two sentences."""
    kept = [pr for pr in view.prs.values() if pr.state == "merged"]
    pair = before_after(view)
    if not kept:
        tried = len(view.prs)
        if view.state != "done":
            return "The campaign is under way; nothing has been kept yet."
        return (
            f"Nothing was kept: {text.count(tried, 'proposal')} in "
            f"{text.count(view.round, 'round')}, none of which the gate accepted."
        )
    changes = "; ".join(clean(pr.title) for pr in kept)
    sentence = f"Kept: {changes}."
    if pair is not None and pair[1] is not pair[0]:
        sentence += (
            f" Mean percentile on held-out competitions {pair[0].percentile:.1f} → "
            f"{pair[1].percentile:.1f}."
        )
    return sentence


def _tiles(view: CampaignView, pair: tuple[MedalRow, MedalRow] | None) -> list[dict[str, str]]:
    verdicts = [r.verdict for n, r in sorted(view.rounds.items()) if n and r.verdict]
    tiles = []
    if pair is not None:
        before, after = pair
        tiles += [
            {
                "name": "mean percentile",
                "before": f"{before.percentile:.1f}",
                "after": f"{after.percentile:.1f}",
            },
            {
                "name": "offline medals, any",
                "before": f"{before.share:.0%}",
                "after": f"{after.share:.0%}",
            },
            {
                "name": "valid scripts",
                "before": f"{before.valid_share:.0%}",
                "after": f"{after.valid_share:.0%}",
            },
        ]
    kept = sum(v == "accept" for v in verdicts)
    tiles.append({"name": "rounds kept", "before": "", "after": f"{kept} of {len(verdicts)}"})
    return tiles


def _pr(view: CampaignView, current: RoundView) -> PrView | None:
    return view.prs.get(current.pr) if current.pr is not None else None


def _start(view: CampaignView, folder: Path) -> dict[str, Any]:
    """Round 0: the start's own runs."""
    arm = view.rounds[0].control_arm
    return {
        "charts": _charts(view, folder, [("start", "control", arm)]),
        "scores": [
            [
                str(s.score.seed),
                f"{s.score.score:.1f}",
                f"{s.valid_share:.0%}",
                f"{s.medals['any_medal']} of {s.medals['scripts']}",
            ]
            for s in view.arm_scores(arm)
        ],
    }


def _round(view: CampaignView, current: RoundView, folder: Path) -> dict[str, Any]:
    pr = _pr(view, current)
    badge, tone = BADGES.get(current.verdict, (current.verdict, "open"))
    record: dict[str, Any] = {
        "number": current.number,
        "badge": badge,
        "tone": tone,
        "note": clean(current.note),
        "pr": pr,
        "title": clean(pr.title) if pr else "no proposal",
        "steps": _steps(current, folder),
        "gate": current.gate,
        "integrity": [clean(p) for p in current.integrity],
    }
    if pr is None:
        return record
    gate = current.gate or {}
    record.update(
        who=pr.proposal["agent"]
        + (f" ({clean(str(pr.proposal['model']))})" if pr.proposal["agent"] == "model" else ""),
        why=clean(str(pr.proposal["why"])),
        change=(pr.proposal["key"], number(pr.proposal["before"]), number(pr.proposal["after"])),
        diff=[(_diff_class(line), line) for line in _diff_text(folder, pr)],
        reviews=[(str(r["answer"]).replace("_", " "), clean(str(r["body"]))) for r in pr.said],
        charts=_charts(
            view,
            folder,
            [("control", "control", pr.control_arm), ("candidate", "candidate", pr.arm)],
        ),
        seeds=_seed_cells(view, pr),
        numbers=_numbers(gate),
        gate_line=gate_line(gate) if gate else "",
        confirmation=_confirm_text(current),
        reason=clean(str(gate.get("reason", ""))),
        gate_chart=svg.gate_chart(
            [s.score.score for s in view.arm_scores(pr.control_arm)],
            [s.score.score for s in view.arm_scores(pr.arm)],
            gate.get("smallest_effect"),
        ),
    )
    return record


def _numbers(gate: dict[str, Any]) -> list[tuple[str, str]]:
    """Every number behind a verdict, for the table under it."""
    if gate.get("candidate_mean") is None:
        return []

    def show(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    rows = [
        ("difference", f"{gate['difference']:+.1f} points"),
        ("p, one-sided", show(gate["p_better"], ".2g")),
        ("α a round", f"{gate['alpha_round']:.3g}"),
        ("t, df", f"{show(gate['t'], '.2f')}, {gate['df']}"),
        ("standard error", f"{gate['standard_error']:.2f}"),
        ("sd between seeds", f"{gate['seed_sd']:.2f}"),
        ("sd of sampling", f"{gate['sampling_sd']:.2f}"),
        ("smallest detectable effect", show(gate["smallest_effect"], ".1f")),
        ("allowed budget, ratio", f"{gate['budget_ratio']:.2f}"),
        ("lost to the machine", f"{gate['infra_share']:.0%}"),
    ]
    for arm in ("control", "candidate"):
        spent = gate[f"{arm}_cost"]
        rows.append((f"{arm} cost", f"{spent['seconds']:.0f} s, {spent['tokens']:.0f} tokens"))
    return rows


def _charts(view: CampaignView, folder: Path, groups: Sequence[tuple[str, str, str]]) -> list[Any]:
    """Curve charts over the arms in `groups`: (label, kind, arm)."""
    runs: list[tuple[str, str, dict[str, Any]]] = []
    for label, kind, arm in groups:
        for job in view.arm_jobs(arm):
            if job.curves is not None:
                curves = _blob(folder, job.curves)
                runs.append((f"{label}, seed {job.seed}", kind, json.loads(curves or "{}")))
    charts = []
    for key, title, floor, ceil in CHARTS:
        series = [
            Series(label, kind, [(float(x), float(y)) for x, y in curves[key]])
            for label, kind, curves in runs
            if curves.get(key)
        ]
        if series:
            charts.append(svg.curve_chart(title, series, floor=floor, ceil=ceil))
    return charts


def _steps(current: RoundView, folder: Path) -> list[dict[str, Any]]:
    """What the agent saw and did, for the folded transcript."""
    steps: list[dict[str, Any]] = []
    if not current.all_turns:
        steps += [
            {"head": f"digest of {name}", "body": str(d["text"])}
            for name, d in current.digests.items()
        ]
        if current.decision:
            steps.append({"head": f"decides: {text.call_text(current.decision)}", "body": ""})
        return steps
    first = json.loads(_blob(folder, current.all_turns[0].request) or '{"messages": []}')
    steps += [
        {"head": f"told ({m['role']})", "body": str(m.get("content") or "")}
        for m in first["messages"]
    ]
    for turn in current.all_turns:
        head = f"calls {text.call_text(turn.call)}" if turn.call else "answers without a good call"
        body = "\n".join(str(result["text"]) for result in turn.results)
        steps.append({"head": f"{head} ({text.seconds(turn.seconds)})", "body": body})
    return steps


def _job_row(job: JobView) -> list[str]:
    spent = job.result.get("seconds")
    return [
        job.id,
        job.kind,
        job.arm,
        str(job.seed),
        job.state,
        "" if spent is None else text.seconds(float(spent)),
    ]


def _seed_cells(view: CampaignView, pr: PrView) -> list[list[str]]:
    return [
        [
            name,
            str(s.score.seed),
            "diverged" if s.diverged else f"{s.score.score:.1f}",
            f"{s.valid_share:.0%}",
            str(s.medals["any_medal"]),
            str(s.medals["scripts"]),
        ]
        for name, arm in (("control", pr.control_arm), ("candidate", pr.arm))
        for s in view.arm_scores(arm)
    ]


def _medal_cells(row: MedalRow) -> list[str]:
    name = clean(row.name) + (" (incumbent)" if row.incumbent else "")
    return [
        str(row.round),
        name,
        f"{row.percentile:.1f}",
        f"{row.valid_share:.0%}",
        str(row.gold),
        str(row.silver),
        str(row.bronze),
        f"{row.any_medal} ({row.share:.0%})",
        str(row.scripts),
    ]


def _diff_text(folder: Path, pr: PrView) -> list[str]:
    raw = _blob(folder, pr.diff) or "(the diff's blob is missing)"
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in raw.splitlines()]
    return [line for line in lines if not line.startswith(("diff --git", "index "))]


def _diff_class(line: str) -> str:
    if line.startswith(("+++", "---")):
        return "file"
    return {"+": "add", "-": "del", "@": "hunk"}.get(line[:1], "same")


def _blob(folder: Path, digest: str) -> str | None:
    try:
        return read_blob(folder, digest).decode("utf-8", "replace")
    except LogError:
        return None  # a report of a damaged folder still shows the rest
