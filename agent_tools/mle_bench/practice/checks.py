"""The suite as a whole: its file, and the selection rules over all of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agent_tools.errors import UserError
from agent_tools.mle_bench.practice import rules
from agent_tools.mle_bench.practice.entries import FOLDER, SUITE, Entry, entries, val_ids
from agent_tools.mle_bench.practice.prepare import ARCHIVE, run_worker, source_file
from agent_tools.mle_bench.registry import SUITES, load_competition, load_suite

EXCLUDED = FOLDER / "excluded.yaml"
LICENCES = FOLDER / "licences.yaml"
HEADER = """\
# About a hundred small real tables for training and, the held-out third, for the gate. They give
# percentiles, not medals. Written by `python -m agent_tools.mle_bench.practice suite` from
# practice/catalogue.yaml; changing a table, a split or a field makes a new suite version.
name: practice-v1
version: 1
medals: false
limits: {cpu_seconds: 3.0, memory_mb: 1536}
competitions:
"""


def suite_text(known: Mapping[str, Entry] | None = None) -> str:
    """The suite file that belongs to the catalogue."""
    known = entries() if known is None else known
    held_out = val_ids(known)
    lines = [
        f"  - {{id: {entry.id}, split: {'val' if entry.id in held_out else 'train'}, "
        f"strata: {entry.stratum}}}\n"
        for entry in known.values()
    ]
    return HEADER + "".join(lines)


def write_suite() -> Path:
    """Write the suite file; returns its path."""
    path = SUITES / f"{SUITE}.yaml"
    path.write_text(suite_text(), encoding="utf-8")
    return path


def excluded() -> dict[str, str]:
    """Tables that were looked at and left out: source → reason. Raises `UserError` if broken."""
    data = _read_yaml(EXCLUDED)
    found: dict[str, str] = {}
    for reason, sources in data.items():
        for source in sources:
            if source in found:
                raise UserError(f"{EXCLUDED.name}: {source} is listed twice: keep one reason")
            found[source] = reason
    return found


def licence_of(source: str) -> str:
    """The licence of the package behind a source; `UserError` if ``licences.yaml`` lacks it."""
    area, package, *_ = source.split("/")
    package = Path(ARCHIVE).name if area == "sdist" else package
    try:
        return str(_read_yaml(LICENCES)[area][package])
    except KeyError:
        raise UserError(f"{LICENCES.name} lacks {area}/{package}: add its licence") from None


def check_names() -> list[rules.Finding]:
    """Rules 1 to 4, as far as names tell: nothing in the suite is on the list of exclusions."""
    left_out = excluded()
    return [
        rules.Finding(entry.id, 4, f"{entry.source} is excluded: {left_out[entry.source]}")
        for entry in entries().values()
        if entry.source in left_out
    ]


def check_suite(data_dir: Path | None = None) -> list[rules.Finding]:
    """All rules that prepared data and fitted fields can tell, over all competitions."""
    suite = load_suite(SUITE)
    found = check_names()
    for competition_id in suite.ids():
        found += rules.check(load_competition(competition_id, data_dir, suite=suite))
    return found


def check_sources() -> list[rules.Finding]:
    """Rule 9 over the source tables, and over those of other suites that the exclusions name."""
    used = {entry.id: entry.source for entry in entries().values()}
    others = {source: source for source, why in excluded().items() if why == "other_suite"}
    jobs = [_sketch_job(name, source) for name, source in (used | others).items()]
    sketches: dict[str, Any] = {}
    for answer in run_worker(jobs):
        if "error" in answer:
            raise UserError(f"{answer['id']}: {answer['error']}")
        sketches[answer["id"]] = answer["sketches"]
    return [
        rules.Finding(left, 9, f"shares {share} of three columns with {right}")
        for left, right, share in rules.near_duplicates(sketches)
        if left in used
    ]


def _sketch_job(name: str, source: str) -> dict[str, Any]:
    path = str(source_file(source))
    return {"id": name, "entry": {"source": source}, "source": path, "sha256": "", "sketch": True}


def _read_yaml(path: Path) -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
