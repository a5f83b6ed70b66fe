"""Tasks: the data sets. One file per task, registered with `@tasks.register("name")`; options are keyword arguments."""

from fedmllm.data.samples import Task
from fedmllm.registry import Registry

tasks: Registry[Task] = Registry("task", __name__)


def check_generated(**counts: int) -> None:
    """Raises ValueError for a number of generated samples that would take hours and all memory."""
    for name, count in counts.items():
        if count > _MOST_GENERATED:
            raise ValueError(f"{name} = {count} must be at most {_MOST_GENERATED}, because all samples are kept in memory")


_MOST_GENERATED = 1_000_000


def check_positive(metric: str, positive: str | None) -> None:
    """Raises ValueError if AUC is requested without the positive answer."""
    if metric == "auc" and positive is None:
        raise ValueError('metric = "auc" needs positive = "…", the answer whose probability is the score')
