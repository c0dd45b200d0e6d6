"""What `collect_statistics` and `merge_statistics` write beside the moments: the table of channels, and the manifest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.calibration.few_tokens import few_tokens
from winnow.calibration.statistics import CHANNELS, channel_rows, channel_table
from winnow.io.artifacts import read_tensors, write_manifest, write_parquet
from winnow.models.architectures import moments_file

if TYPE_CHECKING:
    from winnow.io.records import Provenance
    from winnow.models.files import ModelFiles


def write_channels(output: Any, files: ModelFiles, parts: Sequence[dict[str, int]], provenance: Provenance) -> None:
    """Write `output.channels` and the manifest `output.moments` of a finished folder of moments; widths for which there are few
    tokens are logged. `parts`: {"tokens", "windows"} of every part of the windows."""
    folder, channels, seen = Path(output.moments).parent, [], []
    for layer in sorted({m.layer for m in files.matrices}):
        for site in dict.fromkeys(m.site for m in files.matrices if m.layer == layer):
            names = {f"{site}.{key}": key for key in (*CHANNELS, "count")}
            values = {names[name]: v for name, v in read_tensors(folder / moments_file(layer), names=names)[0].items()}
            readers = (files.stored(m) for m in files.matrices if (m.layer, m.site) == (layer, site))
            seen.append((site, len(values["mean"]), int(values["count"])))
            channels.append(channel_rows(layer, site, values, readers))
    write_parquet(output.channels, channel_table(channels), provenance)
    few = few_tokens(seen, sum(part["windows"] for part in parts))
    for line in few:
        logging.warning(line)
    write_manifest(folder, {"tokens": sum(part["tokens"] for part in parts), "few_tokens": few}, provenance)
