"""`python -m tests.benchmark`: the same work through every peer, interleaved, each in a process of its own.

Needs the extra `benchmark`. Prints a table in Markdown, and writes it with every single measurement to --output."""

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

from tests.benchmark.peers import PEERS
from tests.benchmark.work import PROXIES, minimal_flops, write_model

Result = dict[str, Any]
MATRIX = """
import time, torch
a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
a @ b
start = time.perf_counter()
for _ in range(8):
    a @ b
print(8 * 2 * 2048**3 / (time.perf_counter() - start))
"""
"""Floating-point operations a second of a large product in float32: what this machine can do at its best."""


def measure(peer: str, proxy: str, folder: Path, steps: int, micro: int, threads: int) -> Result | None:
    """One process; None where it failed, with the last line of what it said."""
    words = [sys.executable, "-m", "tests.benchmark.peers", peer, proxy, str(folder), str(steps), str(micro)]
    places = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(words, capture_output=True, text=True, env=places)
    if done.returncode:
        print(f"{proxy} {peer} {micro}: failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
        return None
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found


def speed(found: Result) -> float:
    """Real target tokens a second, the first step left out."""
    return float(sum(found["targets"][1:]) / (found["ends"][-1] - found["ends"][0]))


def matrix_rate(threads: int) -> float:
    words = [sys.executable, "-c", MATRIX]
    places = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return float(subprocess.run(words, capture_output=True, text=True, check=True, env=places).stdout)


def best_size(peer: str, proxy: str, folder: Path, threads: int) -> int:
    """The micro-batch size at which a peer is fastest, from one short run of each."""
    tried = {micro: measure(peer, proxy, folder, 2, micro, threads) for micro in PEERS[peer].micro}
    speeds = {micro: speed(found) for micro, found in tried.items() if found is not None}
    return max(speeds, key=lambda micro: speeds[micro]) if speeds else 0


def table(proxy: str, sizes: dict[str, int], results: dict[str, list[Result]], rate: float) -> str:
    """One row a peer: medians over the repeats; speed and memory also as ratios to the Trainer as it comes."""
    medians = {peer: _medians(proxy, found, rate) for peer, found in results.items() if found}
    reference = medians["trainer"]
    lines = [
        f"**{proxy}**: {PROXIES[proxy].about}",
        "",
        "| | micro-batch | target tokens/s | x Trainer | peak memory | x Trainer | first step | padding | of rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for peer, m in medians.items():
        about = PEERS[peer].about + (f" ({PEERS[peer].other_update})" if PEERS[peer].other_update else "")
        unit = "tokens" if peer == "this loop" else "rows"
        ratios = (m["speed"] / reference["speed"], m["memory"] / reference["memory"])
        lines.append(
            f"| {about} | {sizes[peer]:,} {unit} | {m['speed']:,.0f} | {ratios[0]:.2f} | {m['memory'] / 1e9:.2f} GB | "
            f"{ratios[1]:.2f} | {m['first']:.1f} s | {m['padding']:.0%} | {m['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _medians(proxy: str, found: list[Result], rate: float) -> dict[str, float]:
    speeds = [speed(one) for one in found]
    return {
        "speed": statistics.median(speeds),
        "memory": statistics.median(one["peak_memory_bytes"] for one in found),
        "first": statistics.median(one["ends"][0] for one in found),
        "padding": statistics.median(1 - sum(one["tokens"]) / sum(one["padded"]) for one in found),
        "share": minimal_flops(proxy, 1) * statistics.median(speeds) / rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.benchmark", description=__doc__)
    parser.add_argument("--proxies", default="A,R,L", help="(default A,R,L)")
    parser.add_argument(
        "--peers", default=",".join(name.replace(", ", ":") for name in PEERS), help="as trainer:grouped"
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a measurement; the first is left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    peers = [name.replace(":", ", ") for name in options.peers.split(",")]
    proxies = options.proxies.split(",")
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folders = {proxy: Path(name) / proxy for proxy in proxies}
        for proxy, folder in folders.items():
            write_model(proxy, folder)
        sizes = {
            proxy: {peer: best_size(peer, proxy, folders[proxy], options.threads) for peer in peers}
            for proxy in proxies
        }
        results: dict[str, dict[str, list[Result]]] = {proxy: {peer: [] for peer in peers} for proxy in proxies}
        rates = []
        for _ in range(options.repeats):
            rates.append(matrix_rate(options.threads))
            for proxy in proxies:
                for peer in [peer for peer in peers if sizes[proxy][peer]]:
                    size = sizes[proxy][peer]
                    found = measure(peer, proxy, folders[proxy], options.steps, size, options.threads)
                    results[proxy][peer] += [found] if found else []
                    if found:
                        print(
                            f"{proxy} {peer} {size}: {speed(found):,.1f} target tokens/s", file=sys.stderr, flush=True
                        )
    rate = statistics.median(rates)
    heading = (
        f"{time.strftime('%Y-%m-%d')}, {options.threads} threads, medians of {options.repeats} interleaved runs of "
    )
    heading += f"{options.steps} steps; product of two 2,048 x 2,048 float32 matrices: {rate / 1e9:.0f} GFLOP/s"
    text = "\n".join([heading, "", *(table(proxy, sizes[proxy], results[proxy], rate) for proxy in proxies)])
    (options.output / "table.md").write_text(text)
    (options.output / "results.json").write_text(json.dumps({"sizes": sizes, "results": results, "rates": rates}))
    print(text)


if __name__ == "__main__":
    main()
