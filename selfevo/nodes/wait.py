"""wait: until every training job of the round has ended."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from agent_tools.errors import InfraError
from selfevo import jobs
from selfevo.arms import RunRequest
from selfevo.campaign import Campaign
from selfevo.nodes.launch import training


def run(c: Campaign) -> str:
    """Wait and log outcomes. A failed control run stops the loop: nothing could be compared."""
    train(c, training(c))
    return "evaluate"


def train(c: Campaign, requests: Sequence[RunRequest]) -> None:
    """Run training requests to their end; `InfraError` if one of the control's failed."""
    jobs.run_all(c, requests)
    for request in requests:
        job = c.view.job_of(request.run)
        assert job is not None
        if request.role == "control" and job.state == "failed":
            raise InfraError(
                f"the control run {job.id} failed ({job.reason}); see "
                f"{c.run_dir(job.folder) / 'stderr.log'}, then "
                f"`selfevo resume {shlex.quote(str(c.lab))}`"
            )
