"""The Python API: load an experiment, run it, read the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedmllm.errors import ConfigError, suggest
from fedmllm.kinds import RunKind

if TYPE_CHECKING:
    import pandas

    from fedmllm.config import Experiment, Setting
    from fedmllm.experiment.parts import Parts
    from fedmllm.fleets.base import FleetBackend
    from fedmllm.progress import ProgressCallback
    from fedmllm.runs.trained import Reply
    from fedmllm.storage.run_dir import RunDir

QUICKSTART = "quickstart"
"""The name of the experiment that ships with the package."""
_FLOWER = (
    'fleet.name = "flower" has no clients in this process; start it with `fedmllm server`, or with `flwr run` on the app in '
    "examples/flower, or add --set fleet.name=in-process."
)


@dataclass(frozen=True)
class Result:
    """A finished run: `path` is its directory, `json` the content of its `result.json` (docs/runs.md)."""

    path: Path
    json: Mapping[str, Any]

    @property
    def metrics(self) -> Mapping[str, Mapping[str, Any]]:
        """{pattern: {metric: value}}; metrics are shares of 1, each with its 95 % interval under `…_ci`."""
        metrics: Mapping[str, Mapping[str, Any]] = self.json["metrics"]
        return metrics

    def to_pandas(self, of: Literal["metrics", "rounds"] = "metrics") -> pandas.DataFrame:
        """The run as a tidy data frame, such that those of several runs can be concatenated.

        "metrics": a row per task, pattern and metric, with `value`, the ends `low` and `high` of its 95 % interval (NaN if it
        has none) and the number of samples `n`. "rounds": a row per round, with the figures that trackers are told, such as
        `train/loss` and `eval/both/accuracy`, which is NaN after rounds that were not scored. Raises ConfigError for another
        name or if pandas is not installed, RunError if the records of the rounds are damaged.
        """
        if of not in ("metrics", "rounds"):
            raise ConfigError(f"to_pandas: there is no frame {of!r}; {suggest(of, ('metrics', 'rounds'))}")
        need("pandas", "pandas")
        from fedmllm.runs.frames import metrics_frame, rounds_frame
        from fedmllm.storage.run_dir import RunDir

        return metrics_frame(self.json, self.path.name) if of == "metrics" else rounds_frame(RunDir(self.path))


class Model:
    """The model of a finished run, loaded once, to which any number of questions can be put.

    ```python
    model = fedmllm.Model("runs/quickstart-federated-seed0")
    model.predict(image="photo.png", question="what shape is in the image?", choices=["circle", "square"]).answer
    ```
    """

    def __init__(self, run: Result | str | Path, *, client: int | None = None, trust_config: bool = False) -> None:
        """`client` chooses one of the adapters if every client has its own. Raises RunError if `run` is not the directory of a
        finished run with an adapter, or if its model is a path or brings code and the directory is not trusted."""
        from fedmllm.runs.trained import TrainedModel
        from fedmllm.storage.run_dir import RunDir

        self._trained = TrainedModel(RunDir(run.path if isinstance(run, Result) else Path(run)), client, trusted=trust_config)

    def predict(
        self,
        *,
        image: str | Path | bytes | Sequence[str | Path | bytes] | None = None,
        text: str | None = None,
        question: str | None = None,
        choices: Sequence[str] | None = None,
        untrained: bool = False,
    ) -> Reply:
        """The answer to one question about a picture (a file or its bytes, or a sequence of several), a text, both or neither.

        If the run's task asks the same about every sample, question and choices can be left out. With `untrained`, the
        model answers as it was before training. Raises DataError for a question or picture that cannot be used.
        """
        from fedmllm.data.questions import question as asked

        several = () if image is None else (image,) if isinstance(image, str | Path | bytes) else image
        pictures = tuple(Path(picture) if isinstance(picture, str) else picture for picture in several)
        sample = asked(self._trained.usual, pictures, text, question, choices)
        return self._trained.ask([sample], untrained=untrained)[0]


def experiment_file(file: str | Path) -> Path:
    """The path of an experiment file; "quickstart", unless there is a file of that name, is the one in this package."""
    path = Path(file)
    return Path(__file__).parent / "quickstart.toml" if str(file) == QUICKSTART and not path.exists() else path


def load(file: str | Path = QUICKSTART, **overrides: Any) -> Experiment:
    """Read an experiment file, with all defaults filled in.

    `file` is a path, or "quickstart" for the experiment that ships with the package. Overrides are nested tables or dotted
    keys: `load(file, seed=1, train={"rounds": 5})` and `load(file, **{"train.rounds": 5})` work alike. An option that an
    override made meaningless is dropped, as with `--set`. Raises ConfigError for the first thing that is wrong.
    """
    return read_experiment(file, [(key.split("."), value) for key, value in overrides.items()])[0]


def read_experiment(file: str | Path, settings: Sequence[Setting]) -> tuple[Experiment, list[str]]:
    """(the experiment of a file with these settings and all defaults, a note per dropped option). Raises ConfigError."""
    from fedmllm import config
    from fedmllm.experiment.parts import options_of, with_defaults

    raw, notes = config.apply_settings(config.read(experiment_file(file)), settings, options_of)
    with config.blaming(str(file), settings):
        return with_defaults(config.validate(raw)), notes


def run(
    experiment: Experiment,
    kind: RunKind = "federated",
    out: str | Path | None = None,
    *,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> Result:
    """Run an experiment, or its baseline of the given kind, and return its result.

    `out` is the run's directory, by default a new one in runs/; with `resume`, a run that was interrupted continues and a
    complete one is read. `progress(stage, done, total, note)` is called as the run proceeds. Raises UserError (ConfigError,
    DataError, RunError) for what the caller can mend, TooFewUpdates if a round fails.
    """
    from fedmllm.experiment.parts import build
    from fedmllm.runs.directory import choose_directory

    parts = build(experiment)
    if kind == "federated":
        check_fleet(parts)
    directory = choose_directory(parts.config, kind, Path(out) if out is not None else None, resume)
    result = directory.result() if directory.complete else _execute(parts, kind, directory, progress)
    return Result(directory.path, result)


def _execute(parts: Parts, kind: RunKind, directory: RunDir, progress: ProgressCallback | None) -> dict[str, Any]:
    from fedmllm.fleets.inprocess import IN_PROCESS
    from fedmllm.progress import no_progress
    from fedmllm.runs.kinds import execute
    from fedmllm.runs.session import Session

    progress = progress or no_progress
    progress("preparing data", 0, 0, "")
    dataset = parts.prepare()
    with fleet_backend(parts) if kind == "federated" else nullcontext(IN_PROCESS) as backend:
        return execute(kind, Session(parts, dataset, progress), directory, backend)


def check_fleet(parts: Parts) -> None:
    """Raises ConfigError if this process cannot open the fleet that the experiment names."""
    from fedmllm.fleets.options import FlowerOptions, RayOptions

    if isinstance(parts.fleet, FlowerOptions):
        raise ConfigError(_FLOWER)
    if isinstance(parts.fleet, RayOptions):
        need("ray", "ray")


@contextmanager
def fleet_backend(parts: Parts) -> Iterator[FleetBackend]:
    """Where the experiment's clients train, started and ended with the context. Raises ConfigError."""
    from fedmllm.fleets.inprocess import IN_PROCESS
    from fedmllm.fleets.options import RayOptions

    check_fleet(parts)
    if isinstance(parts.fleet, RayOptions):
        from fedmllm.remote.actors import on_ray

        with on_ray(parts.fleet) as backend:
            yield backend
    else:
        yield IN_PROCESS


def need(module: str, extra: str) -> None:
    """Raises ConfigError if an optional dependency is missing."""
    if find_spec(module) is None:
        raise ConfigError(f'{module} is not installed; run pip install "fedmllm[{extra}]".')
