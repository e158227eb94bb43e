"""A run's scalars as TensorBoard's event files, for those who watch runs there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from swalp.durable import naming
from swalp.report.charts import flat, is_number
from swalp.report.progress import Moment
from swalp.training.kept_recipes import file_name

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

# In a record of metrics these say where it stands; all other numbers are scalars.
_PLACE = ("arm", "seed", "epoch", "step")


class Scalars:
    """A context that writes one TensorBoard run for each arm and seed, ``ARM/seed-N``.

    Every number of an epoch's record is a scalar of that name at the record's step; "step/loss" and
    "step/learning_rate" are of each step. What an interrupted run wrote beyond the checkpoint it
    goes on from is marked as void, so that TensorBoard shows each step once.

    Args:
        folder: of this run.
        records: metrics that exist already, of a run that goes on.
        trajectories: arms times seeds.

    Raises:
        ImportError: there is no TensorBoard.
    """

    def __init__(
        self, folder: Path, records: Iterable[Mapping[str, Any]], *, trajectories: int
    ) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._make = SummaryWriter
        self._folder = folder
        self._trajectories = trajectories
        self._place: tuple[str, int] | None = None
        self._writer: SummaryWriter | None = None
        known: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
        for record in records:
            known.setdefault((record["arm"], record["seed"]), []).append(record)
        for place, older in known.items():
            if not self._path(place).exists():
                writer = SummaryWriter(str(self._path(place)))
                for record in older:
                    _add(writer, record)
                writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            with naming(self._folder) if error is None else suppress(OSError):
                self._writer.close()

    def __call__(self, moment: Moment) -> None:
        """Write what a step brought."""
        with naming(self._folder):
            self._write(moment)

    def _write(self, moment: Moment) -> None:
        length = moment.steps // self._trajectories
        step = (moment.step - 1) % length + 1
        place = (moment.arm, moment.seed)
        if place != self._place:
            if self._writer is not None:
                self._writer.close()
            self._place = place
            self._writer = self._make(str(self._path(place)), purge_step=step)
        assert self._writer is not None
        self._writer.add_scalar("step/loss", moment.loss, step)
        self._writer.add_scalar("step/learning_rate", moment.learning_rate, step)
        if moment.record is not None:
            _add(self._writer, moment.record)

    def _path(self, place: tuple[str, int]) -> Path:
        arm, seed = place
        return self._folder / file_name(arm) / f"seed-{seed}"


def _add(writer: SummaryWriter, record: Mapping[str, Any]) -> None:
    for key, value in flat(record).items():
        if key not in _PLACE and is_number(value):
            writer.add_scalar(key.replace(" ", "/"), value, record["step"])
