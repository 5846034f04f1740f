"""The replay player: every event of a campaign, from its folder alone; no model, network or git.

The log and its blobs are enough, so a campaign can be replayed when its lab is broken or elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from selfevo import text
from selfevo.agents import tool_calls
from selfevo.events import Event
from selfevo.memory import clean, confirm_line, gate_line
from selfevo.store import LogError, read_blob, read_events
from selfevo.views import CampaignView, apply

PROMPT_CHARS = 600
CURVES = (
    ("reward/mle/mean", "reward"),
    ("rollout/valid_frac", "valid share"),
    ("policy/grad_norm", "gradient norm"),
    ("optim/lr", "learning rate"),
)


def write_json(folder: Path, stream: IO[str], round_: int | None = None) -> None:
    """One event a line, as logged."""
    for event in read_events(folder / "events.jsonl")[0]:
        if round_ is None or event.round == round_:
            stream.write(event.line() + "\n")


def show(
    folder: Path,
    emit: Callable[[str], None],
    *,
    round_: int | None = None,
    full: bool = False,
    pause: Callable[[], Any] | None = None,
) -> None:
    """Tell every event; `pause` is called after each, `full` shows whole prompts."""
    view = CampaignView()
    for event in read_events(folder / "events.jsonl")[0]:
        apply(view, event)
        if round_ is not None and event.round != round_:
            continue
        for line in block(event, view, folder, full):
            emit(line)
        if pause is not None:
            pause()


def block(event: Event, view: CampaignView, folder: Path, full: bool) -> list[str]:
    """The lines of one event."""
    when = datetime.fromtimestamp(event.ts).strftime("%H:%M:%S")
    head = f"[{event.seq:>4}] {when} r{event.round} {event.kind} ({event.actor})"
    return [head, *(f"       {line}" for line in _details(event, view, folder, full))]


def _details(event: Event, view: CampaignView, folder: Path, full: bool) -> list[str]:
    data = event.data
    kind = event.kind
    if kind == "agent.request":
        return _request(_blob_json(folder, data["blob"]), full)
    if kind == "agent.reply":
        return _reply(_blob_json(folder, data["blob"]), float(data["seconds"]))
    if kind == "tool.call":
        mended = " (its form was repaired)" if data["repaired"] else ""
        return [f"calls {text.call_text(data)}{mended}"]
    if kind == "tool.result":
        return [f"result of {data['name']}:", *_lines(str(data["text"]))]
    if kind == "agent.strike":
        return [f"failed call: {clean(data['reason'])}", *_lines(str(data["answer"]))]
    if kind == "digest":
        record = view.rounds[event.round].digests[data["run"]]
        return [
            f"{record['run']} = {record['job']}, read from {record['source']}",
            *_lines(str(record["text"])),
        ]
    if kind == "pr.open":
        return [
            f"PR {data['number']}: {clean(data['title'])} on {data['branch']}",
            *_lines(_blob_text(folder, data["diff"])),
        ]
    if kind == "job.done":
        return [*_trim(text.live(event, view)), *curve_lines(folder, data.get("curves"))]
    if kind == "eval.scores":
        return [
            *_trim(text.live(event, view)),
            *(
                f"{clean(name)}: percentile {row['percentile']:.1f}, valid {row['valid']:.0%}, "
                f"{row['any_medal']:.0f} of {row['scripts']:.0f} with a medal"
                for name, row in data["competitions"].items()
            ),
        ]
    if kind == "gate":
        return [gate_line(dict(data)), f"because: {clean(data['reason'])}"]
    if kind == "confirm":
        return [confirm_line(dict(data)), f"because: {clean(data['reason'])}"]
    if kind == "memory":
        return _lines(_blob_text(folder, data["entry"]))
    if kind == "phase":
        return [f"{data['from']} → {data['to']}"]
    if kind.endswith(".intent"):
        return [f"about to: {clean(data['key'])}"]
    told = _trim(text.live(event, view))
    return told or [clean(json.dumps(dict(data), ensure_ascii=False), 300)]


def _trim(lines: list[str]) -> list[str]:
    return [line.strip() for line in lines]


def _request(request: dict[str, Any], full: bool) -> list[str]:
    lines = [
        f"asks {clean(str(request.get('model')))} with {len(request['messages'])} messages, "
        f"{len(request.get('tools') or [])} tools"
    ]
    messages = request["messages"] if full else request["messages"][-2:]
    for message in messages:
        body = str(message.get("content") or "")
        if not full and len(body) > PROMPT_CHARS:
            body = "… " + body[-PROMPT_CHARS:]
        calls = [
            f"{c['function']['name']} {c['function']['arguments']}"
            for c in message.get("tool_calls") or []
        ]
        lines.append(f"<{message['role']}>")
        lines += [f"  {line}" for line in [*_lines(body), *(clean(call) for call in calls)]]
    return lines


def _reply(response: dict[str, Any], seconds: float) -> list[str]:
    choice = response["choices"][0]
    message = choice["message"]
    lines = [f"answers after {text.seconds(seconds)} ({choice.get('finish_reason')})"]
    reasoning = message.get("reasoning_content")
    if reasoning:
        lines += [f"  thinks: {line}" for line in _lines(str(reasoning))]
    lines += [f"  {line}" for line in _lines(str(message.get("content") or ""))]
    for call in tool_calls(message):
        function = call["function"]
        lines.append("  " + clean(f"{function.get('name')} {function.get('arguments')}"))
    return lines


def curve_lines(folder: Path, digest: str | None) -> list[str]:
    """The curves of a finished run, one a line; `digest` is the blob that holds them."""
    if digest is None:
        return []
    series = _blob_json(folder, digest)
    lines = []
    for key, label in CURVES:
        points = series.get(key)
        if points:
            values = [float(value) for _, value in points]
            lines.append(f"{label:14} {text.sparkline(values)}  {values[0]:.3g} → {values[-1]:.3g}")
    return lines


def _lines(body: str) -> list[str]:
    return [clean_keep(line) for line in body.splitlines()]


def clean_keep(line: str) -> str:
    """One line without control characters, its indentation kept."""
    return "".join(c if c.isprintable() else " " for c in line)


def _blob_text(folder: Path, digest: str) -> str:
    try:
        return read_blob(folder, digest).decode("utf-8", "replace")
    except LogError as error:
        return f"({error})"


def _blob_json(folder: Path, digest: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(read_blob(folder, digest))
    return value
