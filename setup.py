"""Builds `otdd._native` from csrc/ through a ninja file; everything else is in pyproject.toml.

Environment variables:
    OTDD_NATIVE: 0 installs the pure-Python package, without `otdd._native`.
    OTDD_CUDA: auto (default) compiles csrc/cuda when a CUDA toolkit is found, 1 insists on one,
        0 leaves it out.
    OTDD_CUDA_ARCHS: compute capabilities to compile for, default "8.0;9.0+PTX".
    CXX, CXXFLAGS, LDFLAGS: the C++ compiler and flags added to those of otdd.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fno-math-errno -ffp-contract=fast -DNDEBUG"
AVX2 = "-mavx2 -mfma"
AVX512 = f"{AVX2} -mavx512f -mavx512dq -mavx512vl -mavx512bw -mprefer-vector-width=512"
ISA_FLAGS = {"baseline": [], "avx2": AVX2.split(), "avx512": AVX512.split()}
REACHED = "../.."  # ROOT, from the folder of the build: the objects of a tree serve a copy of it
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden"


class BuildError(RuntimeError):
    """A build that cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit to build with, or (`home` is None) the reason there is none."""

    home: Path | None = None
    version: str = ""
    archs: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """All that decides what is compiled, and how."""

    compiler: list[str]
    openmp: bool
    isas: list[str]
    cuda: Cuda
    cxx_flags: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)

    def summary(self) -> str:
        openmp = "OpenMP" if self.openmp else "no OpenMP (the compiler does not take -fopenmp)"
        cuda = f"CUDA {self.cuda.version} for {self.cuda.archs} from {self.cuda.home}"
        cuda = cuda if self.cuda.home else f"no CUDA ({self.cuda.reason})"
        return f"native module: CPU {'+'.join(self.isas)}, {openmp}; {cuda}"


def native_wanted(env: Mapping[str, str]) -> bool:
    value = env.get("OTDD_NATIVE", "1").strip() or "1"
    if value not in ("0", "1"):
        raise BuildError(f"OTDD_NATIVE must be 1 or 0, not {value!r}")
    return value == "1"


def cpu_isas(machine: str) -> list[str]:
    """Instruction sets to compile the CPU kernels for; one is chosen when they run."""
    return list(ISA_FLAGS) if machine.lower() in ("x86_64", "amd64") else ["baseline"]


def gencode_flags(archs: str) -> list[str]:
    """Turn "8.0;9.0+PTX" into nvcc's -gencode flags."""
    flags = []
    for arch in (part.strip() for part in archs.replace(",", ";").split(";")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if not match:
            wanted = f"OTDD_CUDA_ARCHS must look like {DEFAULT_CUDA_ARCHS!r}"
            raise BuildError(f"{wanted}, not {archs!r}")
        number = "".join(match.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match.group(4):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_homes(env: Mapping[str, str], which: Callable[[str], str | None]) -> list[Path]:
    """Places to look for a toolkit, best first; nvcc on the PATH may be a wrapper or a link."""
    homes = [Path(env[name]) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name)]
    if nvcc := which("nvcc"):
        homes += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    return [*homes, Path("/usr/local/cuda")]


def find_cuda(env: Mapping[str, str], homes: Sequence[Path]) -> Cuda:
    """Decide about CUDA by the toolkit alone: the build machine need not have a GPU."""
    wanted = env.get("OTDD_CUDA", "auto").strip().lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        raise BuildError(f"OTDD_CUDA must be auto, 1 or 0, not {wanted!r}")
    archs = env.get("OTDD_CUDA_ARCHS", "").strip() or DEFAULT_CUDA_ARCHS
    gencode_flags(archs)
    if wanted == "0":
        return Cuda(reason="OTDD_CUDA=0")
    for home in homes:
        if (home / "include/cuda_runtime.h").is_file() and (home / "bin/nvcc").is_file():
            header = (home / "include/cuda.h").read_text(errors="replace")
            number = int(re.search(r"define\s+CUDA_VERSION\s+(\d+)", header).group(1))
            return Cuda(home, f"{number // 1000}.{number % 1000 // 10}", archs)
    looked = ", ".join(dict.fromkeys(map(str, homes)))
    reason = f"no CUDA toolkit with bin/nvcc and include/cuda_runtime.h in {looked}"
    if wanted == "1":
        raise BuildError(f"OTDD_CUDA=1, but {reason}; set CUDA_HOME, or OTDD_CUDA=0")
    return Cuda(reason=reason)


def find_compiler(env: Mapping[str, str], which: Callable[[str], str | None]) -> list[str]:
    if env.get("CXX"):
        return shlex.split(env["CXX"])
    if sys.platform == "win32":
        raise BuildError("the native module needs gcc or clang: set CXX, or OTDD_NATIVE=0")
    configured = shlex.split(sysconfig.get_config_var("CXX") or "c++")[0]
    for name in (configured, "c++", "g++", "clang++"):
        if which(name):
            return [name]
    raise BuildError("no C++ compiler found: install g++ or clang++, set CXX, or OTDD_NATIVE=0")


def compiles_openmp(compiler: Sequence[str]) -> bool:
    """Whether a shared library with OpenMP in it compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        command = [*compiler, "-fPIC", "-shared", "-fopenmp", str(source), "-o", f"{source}.so"]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError as error:
            raise BuildError(f"cannot run the C++ compiler {compiler[0]!r}: {error}") from error


def make_plan(env: Mapping[str, str]) -> Plan:
    compiler = find_compiler(env, shutil.which)
    openmp = ["-fopenmp"] if compiles_openmp(compiler) else []
    darwin = sys.platform == "darwin"
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if darwin else ["-shared"]
    return Plan(
        compiler=compiler,
        openmp=bool(openmp),
        isas=cpu_isas(platform.machine()),
        cuda=find_cuda(env, cuda_homes(env, shutil.which)),
        cxx_flags=[*CXX_FLAGS.split(), *openmp, *shlex.split(env.get("CXXFLAGS", ""))],
        link_flags=[*shared, *openmp, *shlex.split(env.get("LDFLAGS", ""))],
    )


def build_header(plan: Plan, version: str, compiler: str) -> str:
    """Text of otdd_build.h: what `otdd._native.build_info()` tells."""
    facts = {
        "VERSION": version,
        "COMPILER": compiler,
        "ISAS": " ".join(plan.isas),
        "OPENMP": "yes" if plan.openmp else "no",
        "CUDA": plan.cuda.version,
        "CUDA_ARCHS": plan.cuda.archs,
        "CUDA_REASON": plan.cuda.reason,
    }
    return "".join(f"#define OTDD_BUILD_{key} {json.dumps(text)}\n" for key, text in facts.items())


def ninja_file(plan: Plan, root: Path, includes: Sequence[str], target: str) -> str:
    """Text of build.ninja. `includes` (Python, pybind11) go to bindings.cpp alone."""
    defines = ["-DOTDD_ISAS_X86=1"] if "avx2" in plan.isas else []
    cuda = ["-DOTDD_CUDA=1"] if plan.cuda.home else []
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {shlex.join(plan.compiler)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {shlex.join(plan.compiler)} $in -o $out $flags",
    ]
    objects: list[str] = []
    libraries = list(plan.link_flags)

    def compile_(rule: str, source: Path, name: str, flags: Sequence[str]) -> None:
        joined = shlex.join(flags).replace("$", "$$")
        path = f"{REACHED}/{source.relative_to(root).as_posix()}"
        lines.extend([f"build {name}: {rule} {path}", f"  flags = {joined}"])
        objects.append(name)

    if plan.cuda.home:  # first, for these take longest
        nvcc = shlex.quote(str(plan.cuda.home / "bin/nvcc"))
        lines += ["rule nvcc", f"  command = {nvcc} $flags -MMD -MF $out.d -c $in -o $out"]
        lines += ["  depfile = $out.d", "  deps = gcc"]
        flags = [*NVCC_FLAGS.split(), f"-I{REACHED}/csrc"]
        for source in sorted((root / "csrc/cuda").glob("*.cu")):
            archs = gencode_flags(plan.cuda.archs)
            compile_("nvcc", source, f"cuda_{source.stem}.o", [*flags, *archs])
        # Static, so that the module loads on a machine without CUDA.
        folders = [plan.cuda.home / name for name in ("lib64", "lib")]
        libraries += [f"-L{folder}" for folder in folders]
        libraries += ["-lcudart_static", "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
    common = [*plan.cxx_flags, *defines, f"-I{REACHED}/csrc"]
    compile_("cxx", root / "csrc/bindings.cpp", "bindings.o", [*common, *cuda, "-I.", *includes])
    cpu = sorted((root / "csrc/cpu").glob("*.cpp"))
    kernels = [source for source in cpu if source.stem.startswith("kernels")]
    for source in (source for source in cpu if source not in kernels):
        compile_("cxx", source, f"cpu_{source.stem}.o", common)
    # Baseline objects are linked first: of an inline function that several of them hold, the linker
    # keeps the first copy, which then runs on every processor.
    for isa in plan.isas:
        for source in kernels:
            flags = [*common, f"-DOTDD_ISA={isa}", *ISA_FLAGS[isa]]
            compile_("cxx", source, f"cpu_{source.stem}_{isa}.o", flags)
    lines += [f"build {target}: link {' '.join(objects)}"]
    lines += [f"  flags = {shlex.join(libraries).replace('$', '$$')}", f"default {target}", ""]
    return "\n".join(lines)


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def ninja_program() -> str:
    import ninja  # its package brings the program along

    return str(Path(ninja.BIN_DIR, "ninja"))


class BuildNative(build_ext):
    """Hands the compilation to ninja, in a folder that outlives this command."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        plan = make_plan(os.environ)
        print(f"otdd: {plan.summary()}", flush=True)
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / f"native-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        includes = {pybind11.get_include(), sysconfig.get_path("include")}
        ask = subprocess.run([*plan.compiler, "--version"], capture_output=True, text=True)
        compiler = (ask.stdout.splitlines() or [shlex.join(plan.compiler)])[0]
        version = self.distribution.get_version()
        write_if_changed(folder / "otdd_build.h", build_header(plan, version, compiler))
        isystem = [f"-isystem{path}" for path in sorted(includes)]
        write_if_changed(folder / "build.ninja", ninja_file(plan, ROOT, isystem, target.name))
        if subprocess.run([ninja_program(), "-C", str(folder)], check=False).returncode:
            raise BuildError(
                "the native module did not compile (the compiler's output is above). OTDD_CUDA=0 "
                "leaves the CUDA part out, OTDD_NATIVE=0 installs without native code."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copy2(folder / target.name, target)


class BuildPurePython(build_py):
    """OTDD_NATIVE=0: an editable install must not keep the module of an earlier one."""

    def run(self) -> None:
        print("otdd: no native module (OTDD_NATIVE=0)", flush=True)
        if self.editable_mode:
            for module in (ROOT / "otdd").glob("_native.*"):
                module.unlink()
        super().run()


def main() -> None:
    if native_wanted(os.environ):
        sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.c*"))]
        extension = Extension("otdd._native", sources=sources)
        setup(ext_modules=[extension], cmdclass={"build_ext": BuildNative})
    else:
        setup(cmdclass={"build_py": BuildPurePython})


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        raise SystemExit(f"otdd: {error}") from None
