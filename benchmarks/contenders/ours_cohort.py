"""(e) As (d), with clients that train in one pass over the shared frozen model: `train.cohort` as the command line says."""

from __future__ import annotations

from contenders import ours
from contenders.workload import Outcome, Workload


def run(workload: Workload) -> Outcome:
    return ours.run(workload, workload.size.cohort)
