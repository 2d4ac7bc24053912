"""The build: decisions as plain functions, then small real builds in a temporary folder."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "setup.py").is_file():
    pytest.skip("not run from the sources", allow_module_level=True)

spec = importlib.util.spec_from_file_location("otdd_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
sys.modules["otdd_setup"] = build
spec.loader.exec_module(build)


def run(*command, env=None, **options):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OTDD_", "CXX", "LDFLAGS"))}
    environment = kept | (env or {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.fixture
def toolkit(tmp_path):
    home = tmp_path / "toolkit with a space"
    for name in ("include/cuda_runtime.h", "include/cuda.h", "bin/nvcc"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "include/cuda.h").write_text("#define CUDA_VERSION 12080\n")
    return home


def test_native_wanted():
    assert build.native_wanted({})
    assert build.native_wanted({"OTDD_NATIVE": "1"})
    assert not build.native_wanted({"OTDD_NATIVE": "0"})
    with pytest.raises(build.BuildError, match="OTDD_NATIVE must be 1 or 0, not 'yes'"):
        build.native_wanted({"OTDD_NATIVE": "yes"})


def test_instruction_sets():
    assert build.cpu_isas("x86_64") == build.cpu_isas("AMD64") == ["baseline", "avx2", "avx512"]
    assert build.cpu_isas("aarch64") == ["baseline"]


def test_gencode_flags():
    assert build.gencode_flags("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    assert build.gencode_flags("9.0a, 12.0") == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
    ]
    for wrong in ("", "sm_80", "80", "8.0;", "native"):
        with pytest.raises(build.BuildError, match="OTDD_CUDA_ARCHS must look like"):
            build.gencode_flags(wrong)


def test_toolkit_is_found_by_its_headers(toolkit, tmp_path):
    (tmp_path / "wrapper/bin").mkdir(parents=True)
    (tmp_path / "wrapper/bin/nvcc").touch()
    homes = [tmp_path / "wrapper", toolkit]
    for wanted in ({}, {"OTDD_CUDA": "auto"}, {"OTDD_CUDA": "1"}, {"OTDD_CUDA": ""}):
        cuda = build.find_cuda(wanted, homes)
        assert (cuda.home, cuda.version, cuda.archs) == (toolkit, "12.8", "8.0;9.0+PTX")
    assert build.find_cuda({"OTDD_CUDA_ARCHS": "9.0"}, homes).archs == "9.0"
    assert build.find_cuda({"OTDD_CUDA": "0"}, homes) == build.Cuda(reason="OTDD_CUDA=0")


def test_without_toolkit_auto_tells_why_and_1_is_an_error(tmp_path):
    cuda = build.find_cuda({}, [tmp_path])
    assert cuda.home is None
    assert str(tmp_path) in cuda.reason
    with pytest.raises(build.BuildError, match="OTDD_CUDA=1, but no CUDA toolkit"):
        build.find_cuda({"OTDD_CUDA": "1"}, [tmp_path])


def test_wrong_cuda_settings_are_errors(toolkit):
    with pytest.raises(build.BuildError, match="OTDD_CUDA must be auto, 1 or 0, not 'yes'"):
        build.find_cuda({"OTDD_CUDA": "yes"}, [toolkit])
    with pytest.raises(build.BuildError, match="OTDD_CUDA_ARCHS"):
        build.find_cuda({"OTDD_CUDA_ARCHS": "hopper"}, [toolkit])


def test_toolkit_places_and_their_order(tmp_path):
    (tmp_path / "real/bin").mkdir(parents=True)
    (tmp_path / "link/bin").mkdir(parents=True)
    (tmp_path / "real/bin/nvcc").touch()
    (tmp_path / "link/bin/nvcc").symlink_to(tmp_path / "real/bin/nvcc")
    env = {"CUDA_HOME": "/a", "CUDA_PATH": "/b"}
    assert build.cuda_homes(env, lambda name: str(tmp_path / "link/bin/nvcc")) == [
        Path("/a"),
        Path("/b"),
        tmp_path / "real",
        tmp_path / "link",
        Path("/usr/local/cuda"),
    ]
    assert build.cuda_homes({}, lambda name: None) == [Path("/usr/local/cuda")]


def test_compiler_choice():
    assert build.find_compiler({"CXX": "ccache g++"}, lambda name: None) == ["ccache", "g++"]
    assert build.find_compiler({}, lambda name: name if name == "clang++" else None) == ["clang++"]
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
        build.find_compiler({}, lambda name: None)


def plan(**changes):
    settings = {"compiler": ["c++"], "openmp": True, "isas": ["baseline"], "cuda": build.Cuda()}
    return build.Plan(**(settings | changes))


def test_summary_says_what_is_built_and_why(toolkit):
    cuda = build.find_cuda({}, [toolkit])
    text = plan(isas=["baseline", "avx2"], cuda=cuda).summary()
    assert text == (
        f"native module: CPU baseline+avx2, OpenMP; CUDA 12.8 for 8.0;9.0+PTX from {toolkit}"
    )
    text = plan(openmp=False, cuda=build.Cuda(reason="OTDD_CUDA=0")).summary()
    assert "no OpenMP" in text
    assert "no CUDA (OTDD_CUDA=0)" in text


def test_ninja_file_links_baseline_first_and_cuda_statically(tmp_path, toolkit):
    root = sources(tmp_path / "a b")
    (root / "csrc/cuda").mkdir()
    (root / "csrc/cuda/sinkhorn.cu").touch()
    cuda = build.find_cuda({}, [toolkit])
    text = build.ninja_file(plan(isas=list(build.ISA_FLAGS), cuda=cuda), root, [], "m.so")
    link = next(line for line in text.splitlines() if line.startswith("build m.so"))
    kernels = [name for name in link.split() if name.startswith("cpu_kernels_")]
    assert kernels == [f"cpu_kernels_{isa}.o" for isa in ("baseline", "avx2", "avx512")]
    assert "-lcudart_static" in text
    assert "-lcudart " not in text
    assert "build cuda_sinkhorn.o: nvcc ../../csrc/cuda/sinkhorn.cu" in text
    assert str(root) not in text


def test_build_header_quotes_its_strings():
    text = build.build_header(plan(cuda=build.Cuda(reason='say "no"')), "1.0", "g++ 12")
    assert '#define OTDD_BUILD_CUDA_REASON "say \\"no\\""\n' in text


# Small real builds.

BINDINGS = """
#include <Python.h>
#include "value.h"
#include "otdd_build.h"
int value_baseline();
static PyObject* value(PyObject*, PyObject*) { return PyLong_FromLong(VALUE + value_baseline()); }
static PyMethodDef methods[] = {{"value", value, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", "", -1, methods};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&module); }
"""
KERNELS = """
#define NAME2(isa) value_##isa
#define NAME1(isa) NAME2(isa)
int NAME1(OTDD_ISA)() { return 1; }
"""


def sources(root):
    """A source tree with otdd's setup.py and a native module that compiles at once."""
    (root / "csrc/cpu").mkdir(parents=True)
    (root / "otdd").mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "otdd/__init__.py", "otdd/backends.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "README.md").touch()
    (root / "csrc/bindings.cpp").write_text(BINDINGS)
    (root / "csrc/value.h").write_text("#define VALUE 10\n")
    (root / "csrc/cpu/kernels.cpp").write_text(KERNELS)
    return root


def build_in_place(root, **env):
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    return run(*command, cwd=root, env={"OTDD_CUDA": "0"} | env)


def test_build_is_incremental_and_follows_headers(tmp_path):
    root = sources(tmp_path / "tree")
    code = "import sys; sys.path.insert(0, '.'); from otdd._native import value; print(value())"
    result = build_in_place(root)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "otdd: native module: CPU baseline" in result.stdout
    assert run(sys.executable, "-c", code, cwd=root).stdout == "11\n"
    kernels = next(root.glob("build/native-*/cpu_kernels_baseline.o"))
    compiled = kernels.stat().st_mtime_ns
    assert "no work to do" in build_in_place(root).stdout
    (root / "csrc/value.h").write_text("#define VALUE 20\n")
    assert build_in_place(root).returncode == 0
    assert run(sys.executable, "-c", code, cwd=root).stdout == "21\n"
    assert kernels.stat().st_mtime_ns == compiled


def test_objects_of_a_tree_serve_its_copy(tmp_path):
    root, copy = sources(tmp_path / "tree"), tmp_path / "a copy"
    assert build_in_place(root).returncode == 0
    shutil.copytree(root, copy)
    shutil.rmtree(root)
    assert "no work to do" in build_in_place(copy).stdout
    (copy / "csrc/value.h").unlink()
    result = build_in_place(copy)
    assert result.returncode != 0
    assert "value.h" in result.stdout + result.stderr


def test_source_that_does_not_compile_fails_with_the_compiler_output(tmp_path):
    root = sources(tmp_path / "tree")
    (root / "csrc/cpu/kernels.cpp").write_text("#error a deliberate mistake\n")
    result = build_in_place(root)
    assert result.returncode != 0
    assert "a deliberate mistake" in result.stdout + result.stderr
    assert "OTDD_NATIVE=0" in result.stderr
    assert not list(root.glob("otdd/_native*"))


def test_broken_or_missing_compiler_fails(tmp_path):
    root = sources(tmp_path / "tree")
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho compiler is out of order >&2\nexit 1\n")
    broken.chmod(0o755)
    result = build_in_place(root, CXX=str(broken))
    assert result.returncode != 0
    assert "compiler is out of order" in result.stdout + result.stderr
    result = build_in_place(root, CXX=str(tmp_path / "nowhere"))
    assert result.returncode != 0
    assert "cannot run the C++ compiler" in result.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTDD_NATIVE", "maybe"), ("OTDD_CUDA", "yes"), ("OTDD_CUDA_ARCHS", "hopper")],
)
def test_wrong_setting_fails_the_build(tmp_path, name, value):
    result = build_in_place(sources(tmp_path / "tree"), **{name: value})
    assert result.returncode != 0
    assert f"otdd: {name} must" in result.stderr
    assert "Traceback" not in result.stderr


def test_pure_python_install_says_why_cpu_is_missing(tmp_path):
    root = sources(tmp_path / "tree")
    options = (
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
    )
    command = (sys.executable, "-m", "pip", "install", *options, str(root))
    result = run(*command, env={"OTDD_NATIVE": "0", "CXX": "/nowhere"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list(tmp_path.glob("site/otdd/_native*"))
    # The finder of an editable install in this environment would lend its native module.
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path"
        " if not getattr(f, '__module__', '').startswith('__editable__')];"
        "from otdd import backends; print(backends.__file__, backends.available()['cpu'])"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site")}
    result = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert result.stdout.startswith(str(tmp_path / "site")), result.stderr
    assert "OTDD_NATIVE=0" in result.stdout


def test_kernels_of_two_instruction_sets_share_no_code():
    # The linker keeps one copy of a shared function: an AVX-512 one would end older processors.
    objects = sorted(ROOT.glob("build/native-*/cpu_kernels*.o"))
    if not objects or shutil.which("nm") is None:
        pytest.skip("needs the objects of a build in this tree, and nm")
    defined = {}
    for path in objects:
        lines = run("nm", "--defined-only", "--extern-only", "--demangle", str(path)).stdout
        symbols = {line.split(None, 2)[2] for line in lines.splitlines()}
        symbols = {name for name in symbols if not name.startswith("DW.ref.")}
        for other, theirs in defined.items():
            if other.parent == path.parent:
                assert not symbols & theirs, f"in {other.name} and {path.name}"
        defined[path] = symbols


# The installed package.


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (["-c", "import otdd; otdd.__version__"], {"torch", "numpy", "diffusers", "timm"}),
        (["-c", "import otdd; otdd.ops; otdd.losses"], {"diffusers", "timm", "triton", "sklearn"}),
        (["-m", "otdd", "--help"], {"torch", "numpy", "diffusers", "timm", "yaml"}),
    ],
)
def test_imports_are_lazy(arguments, absent):
    result = run(sys.executable, "-X", "importtime", *arguments)
    assert result.returncode == 0, result.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "otdd" in imported
    assert not imported & absent


def test_otdd_has_its_parts_and_no_others():
    import otdd

    assert {"ops", "losses", "distill", "load", "__version__"} <= set(dir(otdd))
    assert otdd.load.__module__ == "otdd.distill.artefact"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        otdd.nothing  # noqa: B018


def requirements(extra):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.match(r"[\w-]+", line).group().lower() for line in listed}


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints/tested.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = set().union(*map(requirements, ("", "distill", "hub", "test", "docs", "bench")))
    assert wanted <= {name.lower() for name in pins}
    assert pins["torch"] == "2.13.0"  # without a local version such as +cpu
    assert pins["torchvision"] == "0.28.0"


def test_readme_has_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    constraints = "pip install -c constraints/tested.txt"
    assert f'{constraints} ".[distill]" && otdd run --data digits --ipc 1' in readme
    assert f'{constraints} -e ".[distill,test]" && pytest' in readme
