"""Draw docs/rooms.svg: which packages of `winnow` import which, lowest at the bottom right.

python docs/draw_rooms.py
"""

import tomllib
from collections import Counter
from pathlib import Path

import grimp
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """One row and one column per package, in the order of the contract in pyproject.toml; a square has the number of imports."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    rooms = [layer.removeprefix("winnow.") for layer in contract["layers"]]
    graph = grimp.build_graph("winnow", exclude_type_checking_imports=True, cache_dir=None)
    counts: Counter[tuple[int, int]] = Counter()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            pair = [name.split(".")[1] if "." in name else "" for name in (module, other)]
            if pair[0] != pair[1] and all(name in rooms for name in pair):
                counts[rooms.index(pair[0]), rooms.index(pair[1])] += 1
    plt.rcParams.update({"svg.hashsalt": "winnow", "font.size": 9, "svg.fonttype": "none"})
    figure, axis = plt.subplots(figsize=(9, 7.5))
    axis.set_xlim(-0.5, len(rooms) - 0.5)
    axis.set_ylim(len(rooms) - 0.5, -0.5)
    for place in range(len(rooms)):
        axis.axhline(place, color="#eeeeee", zorder=0)
        axis.axvline(place, color="#eeeeee", zorder=0)
        axis.add_patch(plt.Rectangle((place - 0.5, place - 0.5), 1, 1, color="#dddddd"))
    for (row, column), count in counts.items():
        colour = "#2b6cb0" if column > row else "#c53030"
        axis.add_patch(plt.Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, color=colour, alpha=min(1.0, 0.25 + count / 20)))
        axis.text(column, row, str(count), ha="center", va="center", color="white" if count > 6 else "black", fontsize=7)
    axis.set_xticks(range(len(rooms)), rooms, rotation=60, ha="left")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rooms)), rooms)
    axis.set_ylabel("imports ...")
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "rooms.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
