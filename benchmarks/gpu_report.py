"""The result file of `gpu.sh`: what its parts said, renewed part by part, and a short table.

python benchmarks/gpu_report.py part FILE NAME STATUS SECONDS LOG  # what a part ended with
python benchmarks/gpu_report.py table FILE                         # the table, printed
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = (
    "torch", "triton", "numpy", "POT", "geomloss", "pykeops", "flash-sinkhorn", "jax", "ott-jax",
    "timm", "diffusers",
)  # fmt: skip
FACTS = (
    "name", "driver_version", "compute_cap", "memory.total", "clocks.sm", "clocks.mem",
    "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
)  # fmt: skip
TELLING = re.compile(
    r"=====* .*(SUMMARY|Error|Race|hazard)|(passed|failed|error|skipped).* in [\d.]+s"
    r"|^(ok|wrong|refused|failed): |^otdd: |^gpu.sh: |No such|not found"
)
KEY = ("case", "dtype", "direction")
NOISE = 1.1  # times that differ by less are alike


def said(command: list) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def machine() -> dict:
    """The GPU as found; nothing of it is changed."""
    query = f"--query-gpu={','.join(FACTS)}"
    line = (said(["nvidia-smi", query, "--format=csv,noheader"]).splitlines() or [""])[0]
    gpu = dict(zip(FACTS, (part.strip() for part in line.split(",")), strict=False))
    return {"gpu": gpu, "processor": platform.machine(), "cores": len(os.sched_getaffinity(0))}


def versions() -> dict:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    toolkit = re.search(r"\bV([\d.]+)", said(["nvcc", "--version"]))
    return found | {"nvcc": toolkit and toolkit.group(1)}


def stamp() -> dict:
    """Commit and time; a copy without its history is told the commit by OTDD_COMMIT."""
    described = said(["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=10"])
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": os.environ.get("OTDD_COMMIT") or described, "date": now}


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"parts": {}, "rows": []}


def write(path: Path, results: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")  # a run may be stopped at any time
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


def put_part(path: Path, name: str, status: int, seconds: int, log: Path) -> None:
    results = read(path)
    results |= {"machine": machine(), "versions": versions()}
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [line for line in lines if status or TELLING.search(line)]
    part = {"status": status, "seconds": seconds, **stamp()}
    part["says"] = [line[:300] for line in told[-40:]]
    results["parts"][name] = part
    write(path, results)


def put_row(path: Path, row: dict) -> None:
    results, key = read(path), [row.get(k) for k in KEY]
    if rates := row.pop("rates", None):
        results["rates"] = rates
    others = [old for old in results["rows"] if [old.get(k) for k in KEY] != key]
    results["rows"] = [*others, row | stamp()]
    write(path, results)


def milliseconds(seen: dict) -> str:
    if "median_ms" not in seen:
        return "-"
    ms = seen["median_ms"]
    return f"{1e3 * ms:.1f} us" if ms < 1 else f"{ms:.2f} ms" if ms < 1e3 else f"{ms / 1e3:.2f} s"


def line_of(row: dict) -> list[str]:
    if "contenders" not in row:
        return [row["case"], milliseconds(row), row.get("what") or row.get("reason") or ""]
    seen, name = row["contenders"], row.get("fastest_peer")
    line = [f"{row['case']} {row['dtype']} {row['direction']}"]
    ours = [seen.get(n, {}) for n in ("otdd", "otdd, graph", "otdd, unrolled")]
    line += [milliseconds(o) for o in ours]
    line.append(f"{100 * ours[1]['of_floor']:.0f} %" if "of_floor" in ours[1] else "-")
    if name is None:
        return [*line, row.get("fatal") or ours[0].get("reason", "no peer")]
    lead = f", {seen[name]['ratio']:.1f}x" if "ratio" in seen[name] else ""
    why = f"; otdd: {ours[0]['reason']}" if "reason" in ours[0] else ""
    return [*line, f"{milliseconds(seen[name])} {name}{lead}{why}"]


CLOUDS = ["clouds", "contender", "time", "ahead", "plan error", "gradient error", "of floor"]


def of_clouds(row: dict) -> bool:
    return any("plan_error" in seen for seen in row.get("contenders", {}).values())


def lines_of_clouds(row: dict) -> list[list[str]]:
    """A line for each contender; ours with their lead over the fastest peer of equal error."""
    lines = []
    for name, seen in row["contenders"].items():
        who = f"{name} ({seen['backend']})" if "backend" in seen else name
        line = [f"{row['case']} {row['direction']}, {row['iterations']} iterations", who]
        if "median_ms" not in seen:
            lines.append([*line, seen.get("reason", "-")])
            continue
        ahead = row.get("lead", {}).get(name)
        line.append(milliseconds(seen))
        line.append(f"{ahead['ratio']:.2f}x of {ahead['peer']}" if ahead else "-")
        errors = (seen.get(of) for of in ("plan_error", "gradient_error"))
        line += ["-" if error is None else f"{error:.1e}" for error in errors]
        lines.append([*line, f"{100 * seen['of_floor']:.0f} % ({seen['binds']})"])
    return lines


CHOICE = ["choice", "taken", "cuda", "triton", "the other over it"]


def line_of_choice(row: dict) -> list[str] | None:
    """What otdd takes of `cuda` and `triton`, beside the other, which is to be the slower one."""
    seen = row.get("contenders", {})
    ours = seen.get("otdd", {})
    taken = ours.get("backend", "cuda")  # rows of given costs tell none
    other = {"cuda": "triton", "triton": "cuda"}.get(taken)
    beside = seen.get(f"otdd, {other}")
    if beside is None:
        return None
    of = {taken: ours, other: beside}
    line = [f"{row['case']} {row['dtype']} {row['direction']}", taken]
    line += [
        milliseconds(s) if "median_ms" in s else s.get("reason", "-")
        for s in (of["cuda"], of["triton"])
    ]
    if not all("median_ms" in s for s in of.values()):
        return [*line, "-"]
    ratio = beside["median_ms"] / ours["median_ms"]
    return [*line, f"{ratio:.2f}x" + (", to be changed" if ratio < 1 / NOISE else "")]


HEAD = ["case", "otdd", "in a graph", "unrolled", "graph of floor", "fastest peer, over otdd"]


def table(results: dict) -> str:
    """Parts with how they ended, then a line for each row; a reason where otdd has no figure.

    At last what settles the choice between `cuda` and `triton`.
    """
    gpu = results.get("machine", {}).get("gpu", {})
    lines = [", ".join(filter(None, (gpu.get("name"), gpu.get("driver_version")))) or "no GPU"]
    for name, part in results["parts"].items():
        ended = "passed" if part["status"] == 0 else f"ended with {part['status']}"
        lines.append(f"{name}: {ended} in {part['seconds']} s, {part['commit']}")
    clouds = [row for row in results["rows"] if of_clouds(row)]
    rows = [
        [row["case"], "-", row["fatal"]] if "fatal" in row and "contenders" not in row
        else line_of(row)
        for row in results["rows"] if row not in clouds
    ]  # fmt: skip
    tables = [HEAD, *rows] if rows else []
    if clouds:
        tables += [CLOUDS, *(line for row in clouds for line in lines_of_clouds(row))]
    choices = list(filter(None, map(line_of_choice, results["rows"])))
    tables += [CHOICE, *choices] if choices else []
    lines += ["| " + " | ".join(row) + " |" for row in tables]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    part = commands.add_parser("part")
    part.add_argument("file", type=Path)
    part.add_argument("name")
    part.add_argument("status", type=int)
    part.add_argument("seconds", type=int)
    part.add_argument("log", type=Path)
    commands.add_parser("table").add_argument("file", type=Path)
    args = parser.parse_args()
    if args.command == "part":
        put_part(args.file, args.name, args.status, args.seconds, args.log)
    else:
        print(table(read(args.file)))


if __name__ == "__main__":
    main()
