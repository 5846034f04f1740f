"""observe: read the incumbent's training logs and make their digests."""

from __future__ import annotations

from selfevo.campaign import Campaign

MAX_RUNS = 4


def run(c: Campaign) -> str:
    """Digest of each of the control's training runs, as `control-s<index>`; then diagnose."""
    from agent_tools.wandb_logs import digest, read_run

    current = c.view.now
    for job in c.view.arm_jobs(c.view.control_arm)[-MAX_RUNS:]:
        name = f"control-s{job.index}"
        if job.state not in ("done", "diverged") or name in current.digests:
            continue
        earlier = c.view.rounds.get(current.number - 1)
        known = earlier.digests.get(name) if earlier is not None else None
        if known is not None and known["job"] == job.id:  # its log has ended
            c.emit("digest", {"run": name, "job": job.id, "as_in_round": current.number - 1})
            continue
        history = read_run(c.run_dir(job.folder))
        found = digest(history)
        c.emit(
            "digest",
            {
                "run": name,
                "job": job.id,
                "text": found.text,
                "source": history.source,
                "warnings": list(history.warnings)[:5],
                "findings": [
                    {
                        "name": f.name,
                        "key": f.key,
                        "severity": f.severity,
                        "step": f.step,
                        "evidence": f.evidence,
                        "config_key": f.suggestion.config_key if f.suggestion else None,
                        "direction": f.suggestion.direction if f.suggestion else None,
                    }
                    for f in found.findings
                ],
            },
        )
    return "diagnose"
