"""The committed table of what CUDA kernels need on a chip is that of the sources."""

import json
import os

import pytest
import resources

ARCH = "9.0"  # the script checks all
EXPECTED = "cuda" in os.environ.get("OTDD_EXPECT", "").split(",")

REPORT = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{plan}' for 'sm_90'
ptxas info    : Function properties for {plan}
    8 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 256 bytes smem
ptxas info    : Compiling entry function '{warp}' for 'sm_90'
ptxas info    : Function properties for __internal_function
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for {warp}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 0 barriers
"""
PLAN = "_ZN4otdd4cuda10plan_tilesIfEEvNS0_8PlanArgsIT_EE"
WARP = "_ZN4otdd4cuda13sinkhorn_warpIdLi2ELi4EEEvNS0_12SinkhornArgsIT_EE"


def test_kernels_need_what_the_table_says():
    found = resources.toolkit()
    if found is None:
        assert not EXPECTED, "OTDD_EXPECT=cuda, but there is no nvcc"
        pytest.skip("needs nvcc")
    nvcc, version = found
    table = json.loads(resources.TABLE.read_text())
    if (version, resources.digest()) == (table["nvcc"], table["sources"]):
        return  # of these very sources
    kernels = resources.measure(nvcc, (ARCH,))
    if version == table["nvcc"]:
        changed = resources.differences(table["kernels"], kernels)
        renew = "renew the table: python benchmarks/resources.py --write"
        assert not changed, "\n".join([*changed, renew])
        return
    spills = resources.new_spills(table["kernels"], kernels)
    assert not (spills and EXPECTED), "\n".join(spills)
    told = "; ".join(spills) or "no new spills"
    pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {version}: {told}")


def test_digest_is_of_the_code_alone(tmp_path):
    folder = tmp_path / "csrc/cuda"
    folder.mkdir(parents=True)
    (tmp_path / "csrc/numerics.h").write_text("int a;\n")
    digests = []
    for text in ("int b;\n", "int  b;  // why\n\n", "int c;\n"):
        (folder / "kernels.cu").write_text(text)
        digests.append(resources.digest(tmp_path))
    (folder / "emulator.h").write_text("int d;\n")
    assert digests[0] == digests[1] != digests[2] == resources.digest(tmp_path)


def test_reports_of_ptxas_are_read():
    kernels = resources.parse(REPORT.format(plan=PLAN, warp=WARP))
    assert kernels == {PLAN: [40, 256, 8, 16, 24], WARP: [168, 0, 0, 0, 0]}
    assert list(resources.readable(kernels)) == [
        "plan_tiles<float>",
        "sinkhorn_warp<double, 2, 4>",
    ]


def test_differences_are_readable():
    table = {"8.0": {"a": [1, 0, 0, 0, 0]}, "9.0": {"a": [32, 0, 0, 0, 0], "b": [8, 0, 0, 0, 0]}}
    found = {"9.0": {"a": [40, 0, 0, 4, 4], "c": [8, 0, 0, 0, 0]}}
    assert resources.differences(table, found) == [
        "9.0 a: registers 32 -> 40, spill stores 0 -> 4, spill loads 0 -> 4",
        "9.0 b: is gone",
        "9.0 c: is not in the table",
    ]
    assert resources.new_spills(table, found) == ["9.0 a: spills 4 bytes"]
    assert resources.new_spills(found, found) == []


def test_the_table_is_json_with_a_line_for_each_kernel():
    kernels = {"8.0": {"a<b>": [1, 2, 3, 4, 5]}, "9.0": {"a<b>": [5, 4, 3, 2, 1], "c": [0] * 5}}
    text = resources.text_of("13.0.1", kernels)
    table = json.loads(text)
    assert table["kernels"] == kernels
    assert table["nvcc"] == "13.0.1"
    assert '\n   "a<b>": [1, 2, 3, 4, 5]\n' in text
