"""`python -m tests.benchmark.growth`: where the cost of this loop grows, and with what.

Needs the extra `benchmark`, and Linux. Each point is measured in a process of its own, and all
points again in the next repeat. Writes growth.json, a table growth.md and a picture growth.svg to
--output."""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.benchmark.machine import description, in_a_fork
from tests.benchmark.picture import COLUMNS, Curve, Plot, draw_growth, number
from tests.benchmark.points import Result, measure

Found = dict[str, dict[int, list[Result]]]
"""Series -> x -> one for each repeat that did not fail."""
STEPS = {
    "seconds": "seconds a step",
    "above_mb": "peak memory above the prepared run, MB",
    "whole_mb": "in all, MB",
}


@dataclass(frozen=True)
class Part:
    """One question: what grows (`measures`, by their names in a result) with x."""

    title: str
    axis: str
    xs: tuple[int, ...]
    series: tuple[str, ...]
    measures: dict[str, str]


PARTS = {
    "vocabulary": Part(
        "Vocabulary (hidden 256, 2 layers; 32 rows of 64 tokens a step, here in one forward)",
        "tokens in the vocabulary",
        (4096, 16_384, 65_536, 250_880),
        ("fused_loss: true", "fused_loss: false", "Trainer, 4 rows a forward"),
        STEPS,
    ),
    "length": Part(
        "Length of rows, 2,048 tokens a step (hidden 256, 2 layers, vocabulary 16,384)",
        "tokens in a row",
        (32, 64, 128, 256, 512, 1024, 2048),
        ("padding_free: true", "padding_free: false"),
        STEPS,
    ),
    "micro": Part(
        "micro_batch_tokens, 8,192 tokens a step in rows of 2 to 127 (hidden 256, 2 layers,"
        " vocabulary 16,384)",
        "micro_batch_tokens",
        (256, 512, 1024, 2048, 4096, 8192),
        ("padding_free: true", "padding_free: false"),
        STEPS,
    ),
    "rows": Part(
        "Rows of the dataset, of one or two words",
        "rows",
        (10**3, 10**4, 10**5, 10**6, 10**7),
        ("first time", "second time"),
        {
            "seconds": "seconds to prepare the run",
            "step_ms": "a step drawn, cut, collated, ms",
            "above_mb": "peak memory above the start, MB",
            "first_step_ms": "the first step asked for, ms",
            "own_mb": "kept in memory, MB",
        },
    ),
    "rank": Part(
        "lora_r, on all linear modules (hidden 768, 8 layers)",
        "lora_r",
        (1, 4, 16, 64, 256),
        ("a checkpoint",),
        {"seconds": "seconds to write it", "mb": "its size, MB", "trained": "numbers trained"},
    ),
}


def measure_alone(part: str, folder: Path, x: int, series: str, threads: int) -> Result:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    return measure(part, folder, x, series)


def measure_all(names: list[str], folder: Path, options: argparse.Namespace) -> dict[str, Found]:
    """All points, and all of them again, in the other direction every other time; but a second time
    after a first."""
    points = [
        (name, x)
        for name in names
        for x in PARTS[name].xs
        if name != "rows" or x <= 10**options.largest
    ]
    found: dict[str, Found] = {
        name: {series: {} for series in PARTS[name].series} for name in names
    }
    for repeat in range(options.repeats):
        for name, x in points[::-1] if repeat % 2 else points:
            for series in PARTS[name].series:
                result = in_a_fork(measure_alone, name, folder, x, series, options.threads)
                print(f"{name} {x:,} {series}: {result or 'failed'}", file=sys.stderr, flush=True)
                found[name][series].setdefault(x, []).extend([result] if result else [])
    return found


def middle(found: list[Result], measured: str) -> float:
    return statistics.median(one[measured] for one in found)


def table(part: Part, found: Found) -> str:
    """One row an x, one column a measure and a series; medians over the repeats."""
    columns = [(measured, series) for measured in part.measures for series in part.series]
    several = len(part.series) > 1
    names = [
        part.measures[measured] + (f", {series}" if several else "") for measured, series in columns
    ]
    lines = [
        f"**{part.title}**",
        "",
        f"| {part.axis} | {' | '.join(names)} |",
        "|---" * (len(names) + 1) + "|",
    ]
    for x in sorted({x for of_series in found.values() for x in of_series}):
        cells = [found[series].get(x) for _, series in columns]
        values = [
            number(middle(cell, measured)) if cell else ""
            for cell, (measured, _) in zip(cells, columns)
        ]
        lines.append(f"| {x:,} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


def plots(part: Part, found: Found) -> list[Plot]:
    """Its first measures, a plot each; without the series of which no point was measured."""
    shown = [series for series in part.series if any(found[series].values())]
    return [
        Plot(
            part.title,
            title,
            part.axis,
            [curve(series, found[series], measured) for series in shown],
        )
        for measured, title in list(part.measures.items())[:COLUMNS]
    ]


def curve(series: str, found: dict[int, list[Result]], measured: str) -> Curve:
    kept = {
        x: [one[measured] for one in results] for x, results in sorted(found.items()) if results
    }
    middles = [statistics.median(values) for values in kept.values()]
    return Curve(
        series,
        list(kept),
        middles,
        [min(v) for v in kept.values()],
        [max(v) for v in kept.values()],
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.benchmark.growth", description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"(default {','.join(PARTS)})")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--largest", type=int, default=6, help="at most 10 to the power of this many rows"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    return parser.parse_args()


def main() -> None:
    options, started = parse(), time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="growth-") as folder:
        found = measure_all(options.parts.split(","), Path(folder), options)
    heading = (
        f"{time.strftime('%Y-%m-%d')}, {description(options.threads)}; medians of {options.repeats}"
        " repeats"
    )
    whole = f"{heading}; all of it took {(time.monotonic() - started) / 60:.0f} minutes"
    (options.output / "growth.json").write_text(json.dumps({"heading": whole, "found": found}))
    text = "\n".join([whole, "", *(table(PARTS[name], found[name]) for name in found)])
    (options.output / "growth.md").write_text(text)
    drawn = [plot for name in found for plot in plots(PARTS[name], found[name])]
    draw_growth(drawn, heading, options.output / "growth.svg")
    print(text)


if __name__ == "__main__":
    main()
