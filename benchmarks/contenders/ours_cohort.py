"""(e) The same as (d), but several clients train in one pass over the shared frozen model: `--cohort` sets `train.cohort`."""

from __future__ import annotations

from contenders import ours
from contenders.workload import Outcome, Workload


def run(workload: Workload) -> Outcome:
    return ours.run(workload, workload.size.cohort)
