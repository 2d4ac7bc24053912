"""Registers, shared memory, stack and spills of every CUDA kernel, as ptxas reports them.

    python benchmarks/resources.py --write  # renews results/cuda_resources.json
    python benchmarks/resources.py --check  # exit code 1 and the differences, if there are any

Needs nvcc and c++filt, no GPU; minutes of a core for each architecture. The flags are those of
setup.py. The table has a digest of the sources, so that a test need not compile them again.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks/results/cuda_resources.json"
ARCHS = ("8.0", "9.0", "10.0")
HOST_ONLY = ("bindings.h", "emulator.h", "tensors.h")
COLUMNS = ("registers", "static shared", "stack", "spill stores", "spill loads")

spec = importlib.util.spec_from_file_location("otdd_setup_of_resources", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = build  # its dataclasses look themselves up there
spec.loader.exec_module(build)

Kernels = dict[str, list[int]]  # name -> COLUMNS, bytes but for the first


def toolkit() -> tuple[Path, str] | None:
    """The path of nvcc and its version, or None where there is none."""
    home = build.find_cuda({}, build.cuda_homes(os.environ, shutil.which)).home
    if home is None:
        return None
    nvcc = home / "bin/nvcc"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return nvcc, re.search(r"\bV([\d.]+)", told).group(1)


def digest(root: Path = ROOT) -> str:
    """Of the flags and of all that nvcc reads, but for comments and white space."""
    sources = sorted([*root.glob("csrc/*.h"), *root.glob("csrc/cuda/*")])
    texts = [path.read_text() for path in sources if path.name not in HOST_ONLY]
    code = re.sub(r"//.*|\s+", " ", "\n".join([build.NVCC_FLAGS, *texts]))
    return hashlib.sha256(" ".join(code.split()).encode()).hexdigest()


def report(nvcc: Path, source: Path, arch: str) -> str:
    """What ptxas says of one file for one architecture."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [*build.NVCC_FLAGS.split(), f"-I{ROOT / 'csrc'}", *build.gencode_flags(arch)]
        command = [nvcc, *flags, "-Xptxas=-v", "-cubin", "-o", f"{folder}/out.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{source.name} for {arch} does not compile:\n{done.stderr}")
    return done.stderr


def parse(text: str) -> Kernels:
    """Mangled names of the kernels in a report of ptxas, with their columns."""
    kernels = {}
    for block in text.split("Compiling entry function '")[1:]:
        name = block.split("'", 1)[0]
        own = block.split(f"Function properties for {name}\n", 1)[1]
        stack, stores, loads = (
            int(re.search(rf"(\d+) bytes {what}", own).group(1))
            for what in ("stack frame", "spill stores", "spill loads")
        )
        shared = re.search(r"(\d+) bytes smem", own)
        registers = int(re.search(r"Used (\d+) registers", own).group(1))
        kernels[name] = [registers, int(shared.group(1)) if shared else 0, stack, stores, loads]
    return kernels


def readable(kernels: Kernels) -> Kernels:
    """The same by demangled names, without return type, namespaces and parameters."""
    lines = "\n".join(kernels)
    told = subprocess.run(["c++filt"], input=lines, capture_output=True, text=True, check=True)
    names = [
        re.sub(r"\((?![^<]*>).*|^void |otdd::cuda::", "", line) for line in told.stdout.splitlines()
    ]
    return dict(sorted(zip(names, kernels.values(), strict=True)))


def measure(nvcc: Path, archs: tuple[str, ...] = ARCHS) -> dict[str, Kernels]:
    """The kernels of each architecture; nvcc runs once on each core that this process may use."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    pairs = [(source, arch) for source in sources for arch in archs]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        reports = list(pool.map(lambda pair: report(nvcc, *pair), pairs))
    found: dict[str, Kernels] = {arch: {} for arch in archs}
    for (_, arch), text in zip(pairs, reports, strict=True):
        found[arch] |= readable(parse(text))
    return found


def differences(table: dict[str, Kernels], found: dict[str, Kernels]) -> list[str]:
    """What has changed in the architectures of `found`, one line each."""
    lines = []
    for arch, kernels in found.items():
        before = table.get(arch, {})
        for name in sorted(before.keys() | kernels.keys()):
            old, new = before.get(name), kernels.get(name)
            if old == new:
                continue
            if old is None or new is None:
                changes = ["is not in the table" if old is None else "is gone"]
            else:
                each = zip(COLUMNS, old, new, strict=True)
                changes = [f"{column} {o} -> {n}" for column, o, n in each if o != n]
            lines.append(f"{arch} {name}: {', '.join(changes)}")
    return lines


def new_spills(table: dict[str, Kernels], found: dict[str, Kernels]) -> list[str]:
    """Kernels that spill where those of the table do not: it holds for any version of nvcc."""
    return [
        f"{arch} {name}: spills {stores} bytes"
        for arch, kernels in found.items()
        for name, (*_, stores, loads) in kernels.items()
        if stores + loads and not any(table.get(arch, {}).get(name, [0])[-2:])
    ]


def text_of(version: str, kernels: dict[str, Kernels]) -> str:
    """The table as JSON, with a line for each kernel."""
    lines = ["{", f' "nvcc": "{version}",', f' "sources": "{digest()}",']
    lines += [f' "flags": {json.dumps(build.NVCC_FLAGS)},']
    lines += [f' "columns": {json.dumps(COLUMNS)},', ' "kernels": {']
    archs = []
    for arch, found in kernels.items():
        each = ",\n".join(f"   {json.dumps(name)}: {row}" for name, row in found.items())
        archs.append(f'  "{arch}": {{\n{each}\n  }}')
    return "\n".join([*lines, ",\n".join(archs), " }", "}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="renew the table")
    what.add_argument("--check", action="store_true", help="compare with it")
    parser.add_argument("--table", type=Path, default=TABLE)
    args = parser.parse_args()
    if (found := toolkit()) is None:
        raise SystemExit("no CUDA toolkit found: set CUDA_HOME")
    nvcc, version = found
    kernels = measure(nvcc)
    if args.write:
        args.table.write_text(text_of(version, kernels))
        return
    table = json.loads(args.table.read_text())
    if table["nvcc"] == version:
        lines = differences(table["kernels"], kernels)
    else:
        print(f"the table is of nvcc {table['nvcc']}, this is {version}: only spills are compared")
        lines = new_spills(table["kernels"], kernels)
    print("\n".join(lines) or f"{args.table.name}: as in the table")
    raise SystemExit(1 if lines else 0)


if __name__ == "__main__":
    main()
