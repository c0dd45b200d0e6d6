from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.numerics.operations import Operations
from winnow.planning.stages.base import HUGGING_FACE, Stage
from winnow.planning.stages.collect_statistics import COLLECTING, ROW, TABLE, moments_bytes

if TYPE_CHECKING:
    from winnow.io import specs
    from winnow.planning.load import Load, Work


class MergeStatistics(Stage):
    """The statistics of `collect_statistics` from the sums of jobs that each ran a part of the windows."""

    libraries = HUGGING_FACE
    intermediate = True

    def spec(self, w: dict[str, str]) -> specs.CollectStatistics:
        return self.plan.stages["collect_statistics"].spec(w)  # type: ignore[return-value]

    def code(self, w: dict[str, str]) -> list[str]:
        return ["winnow.checkpoint.loading", "winnow.checkpoint.streaming"]  # of the jobs whose sums are gone by then

    def work(self, load: Load) -> list[Work]:
        found, sites = [], load.shape.sites()
        for name, preset in load.calibrations.items():
            if not (parts := len(self.plan.parts(load.label, self.plan.labels["calibrations"][name]))):
                continue
            unit = 8 if preset.precision == "float64" else 4
            numbers = load.gram + load.cross
            largest = max(n * n + (n * load.shape.width if site == "ffn_hidden" else 0) for (_, site), n in sites.items())
            memory = max(24 * largest + load.shape.layer_sums(unit), TABLE + ROW * sum(sites.values()))
            disk, operations = moments_bytes(load, unit), Operations(products=4.0 * parts * numbers)
            found += self.needed(load, 1, memory, disk, operations, COLLECTING, temporary=(parts * disk, 0.0))
        return found
