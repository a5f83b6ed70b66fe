"""One file a task. A task is registered with `@tasks.register("name")` and takes keyword options."""

from fedmllm.data.samples import Task
from fedmllm.registry import Registry

tasks: Registry[Task] = Registry("task", __name__)
