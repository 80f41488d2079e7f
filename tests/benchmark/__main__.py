"""`python -m tests.benchmark`: the same work through every peer, interleaved, each in a process of
its own.

Needs the extra `benchmark`. Prints a table in Markdown, and writes it to --output, with every
single measurement and a picture of the speeds."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmark.machine import description, matrix_rate
from tests.benchmark.peers import PEERS
from tests.benchmark.picture import Bar, Panel, draw_speed
from tests.benchmark.work import PROXIES, minimal_flops, write_model

Result = dict[str, Any]
Results = dict[str, dict[str, list[Result]]]
"""Proxy -> peer -> one for each repeat that did not fail."""
OURS = "this loop"
CYCLE = 4
"""Steps in which the Trainer grouped by length goes once from the longest rows to the shortest: of
the demo's 563 rows it sorts 563 // (4 x 32) steps' at a time. Fewer would measure it on its longest
rows, or on its shortest."""


def measure(
    peer: str, proxy: str, folder: Path, steps: int, micro: int, threads: int
) -> Result | None:
    """One process; None where it failed, with the last line of what it said."""
    words = [
        sys.executable,
        "-m",
        "tests.benchmark.peers",
        peer,
        proxy,
        str(folder),
        str(steps),
        str(micro),
    ]
    places = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(words, capture_output=True, text=True, env=places)
    what = f"{proxy} {peer} {micro}, {threads} threads"
    if done.returncode:
        print(
            f"{what}: failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr, flush=True
        )
        return None
    found: Result = json.loads(done.stdout.splitlines()[-1])
    print(f"{what}: {speed(found):,.1f} target tokens/s", file=sys.stderr, flush=True)
    return found


def speed(found: Result) -> float:
    """Real target tokens a second, the first step left out."""
    return float(sum(found["targets"][1:]) / (found["ends"][-1] - found["ends"][0]))


def share(proxy: str, found: Result) -> float:
    """Of the rate that a large matrix product had right before the peer's round."""
    return minimal_flops(proxy, 1) * speed(found) / float(found["rate"])


def best_size(peer: str, proxy: str, folder: Path, threads: int) -> int:
    """The micro-batch size at which a peer is fastest, from one short run of each; 0 where all
    failed."""
    if len(PEERS[peer].micro) == 1:
        return PEERS[peer].micro[0]
    tried = {
        micro: measure(peer, proxy, folder, CYCLE + 1, micro, threads)
        for micro in PEERS[peer].micro
    }
    speeds = {micro: speed(found) for micro, found in tried.items() if found is not None}
    return max(speeds, key=lambda micro: speeds[micro]) if speeds else 0


def measure_all(
    peers: list[str],
    folders: dict[str, Path],
    sizes: dict[str, dict[str, int]],
    options: argparse.Namespace,
) -> tuple[Results, dict[str, list[Result]]]:
    """All repeats of everything, and of this loop with one thread.

    Every other repeat goes through the peers backwards, so that over an even number of repeats a
    machine that becomes slower favours none."""
    results: Results = {proxy: {peer: [] for peer in peers} for proxy in folders}
    alone: dict[str, list[Result]] = {proxy: [] for proxy in folders}
    for repeat in range(options.repeats):
        for proxy, folder in folders.items():
            round_of = [
                (peer, options.threads, results[proxy][peer])
                for peer in peers
                if sizes[proxy][peer]
            ]
            round_of = round_of[::-1] if repeat % 2 else round_of
            round_of += [(OURS, 1, alone[proxy])] if sizes[proxy].get(OURS) else []
            rates = {
                threads: matrix_rate(threads)
                for threads in sorted({threads for _, threads, _ in round_of})
            }
            for peer, threads, kept in round_of:
                found = measure(peer, proxy, folder, options.steps, sizes[proxy][peer], threads)
                kept += [{**found, "rate": rates[threads]}] if found else []
    return results, alone


def table(
    proxy: str, sizes: dict[str, int], results: dict[str, list[Result]], alone: list[Result]
) -> str:
    """One row a peer: medians over the repeats; speed and memory also as ratios to the Trainer as
    it comes."""
    medians = {peer: _medians(proxy, found) for peer, found in results.items() if found}
    reference = medians.get("trainer", {"speed": float("nan"), "memory": float("nan")})
    lines = [
        f"**{proxy}**: {PROXIES[proxy].about}",
        "",
        (
            "| | micro-batch | target tokens/s | x Trainer | peak memory | x Trainer | first step |"
            " padding | of rate |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for peer, m in medians.items():
        differs = PEERS[peer].differs(proxy)
        about = PEERS[peer].about + (f" ({differs})" if differs else "")
        ratios = (m["speed"] / reference["speed"], m["memory"] / reference["memory"])
        size = f"{sizes[peer]:,} {PEERS[peer].unit}"
        lines.append(
            f"| {about} | {size} | {m['speed']:,.0f} | {ratios[0]:.2f} | {m['memory'] / 1e9:.2f} GB"
            f" | {ratios[1]:.2f} | {m['first']:.1f} s | {m['padding']:.0%} | {m['share']:.0%} |"
        )
    if alone:
        m = _medians(proxy, alone)
        rate = f"{m['rate'] / 1e9:.0f} GFLOP/s that a matrix product has there"
        lines += [
            "",
            (
                f"{proxy} with one thread: {m['speed']:,.0f} target tokens/s, {m['share']:.0%} of"
                f" the {rate}."
            ),
        ]
    return "\n".join(lines) + "\n"


def _medians(proxy: str, found: list[Result]) -> dict[str, float]:
    values = {
        "speed": [speed(one) for one in found],
        "memory": [one["peak_memory_bytes"] for one in found],
        "first": [one["ends"][0] for one in found],
        "padding": [1 - sum(one["tokens"]) / sum(one["padded"]) for one in found],
        "share": [share(proxy, one) for one in found],
        "rate": [one["rate"] for one in found],
    }
    return {name: float(statistics.median(numbers)) for name, numbers in values.items()}


def panel(proxy: str, results: dict[str, list[Result]]) -> Panel:
    """What the picture shows of a proxy."""
    speeds = {peer: sorted(speed(one) for one in found) for peer, found in results.items() if found}
    reference = statistics.median(speeds["trainer"]) if "trainer" in speeds else None
    bars = []
    for peer, numbers in speeds.items():
        median = statistics.median(numbers)
        ratio = median / reference if reference else None
        low_median_high = [numbers[0], median, numbers[-1]]
        bars.append(
            Bar(PEERS[peer].about, low_median_high, ratio, peer == OURS, PEERS[peer].differs(proxy))
        )
    rate = statistics.median(one["rate"] for found in results.values() for one in found)
    return Panel(f"{proxy}: {PROXIES[proxy].about}", bars, rate / minimal_flops(proxy, 1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.benchmark", description=__doc__)
    parser.add_argument("--proxies", default="A,R,L", help="(default A,R,L)")
    parser.add_argument(
        "--peers",
        default=",".join(name.replace(", ", ":") for name in PEERS),
        help="as trainer:grouped",
    )
    parser.add_argument(
        "--sizes",
        default="",
        help="micro-batch sizes that need no trial, as trainer=1,this loop=1024",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=CYCLE + 1,
        help="optimizer steps a measurement; the first is left out",
    )
    parser.add_argument(
        "--repeats", type=int, default=4, help="an even number; see measure_all (default 4)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    return parser.parse_args()


def main() -> None:
    options, started = parse(), time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    peers = [name.replace(":", ", ") for name in options.peers.split(",")]
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folders = {proxy: Path(name) / proxy for proxy in options.proxies.split(",")}
        for proxy, folder in folders.items():
            write_model(proxy, folder)
        given = dict(
            pair.replace(":", ", ").split("=") for pair in options.sizes.split(",") if pair
        )
        sizes = {
            proxy: {
                peer: int(given.get(peer, 0)) or best_size(peer, proxy, folder, options.threads)
                for peer in peers
            }
            for proxy, folder in folders.items()
        }
        results, alone = measure_all(peers, folders, sizes, options)
    machine, day = description(options.threads), time.strftime("%Y-%m-%d")
    measured = {
        "machine": machine,
        "day": day,
        "sizes": sizes,
        "results": results,
        "one_thread": alone,
    }
    (options.output / "results.json").write_text(json.dumps(measured))
    rates = [
        one["rate"] / 1e9 for found in results.values() for kept in found.values() for one in kept
    ]
    heading = (
        f"{day}, {machine}; medians of {options.repeats} interleaved runs of {options.steps} steps"
    )
    whole = (
        f"{heading}; product of two 2,048 x 2,048 float32 matrices: {min(rates):.0f} to"
        f" {max(rates):.0f} GFLOP/s"
    )
    whole += f"; all of it took {(time.monotonic() - started) / 60:.0f} minutes"
    tables = [table(proxy, sizes[proxy], results[proxy], alone[proxy]) for proxy in folders]
    (options.output / "table.md").write_text("\n".join([whole, "", *tables]))
    draw_speed(
        [panel(proxy, results[proxy]) for proxy in folders], heading, options.output / "speed.svg"
    )
    print("\n".join([whole, "", *tables]))


if __name__ == "__main__":
    main()
