"""Run one contender in this process: `python -m contenders LETTER WORKLOAD OUT`, where the last two are folders."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from contenders import CONTENDERS
from contenders.workload import Workload

if __name__ == "__main__":
    letter, workload, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    import_module(f"contenders.{CONTENDERS[letter].module}").run(Workload.load(workload)).save(out)
