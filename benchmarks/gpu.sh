#!/usr/bin/env bash
# Everything that needs a GPU, into one file: bash benchmarks/gpu.sh [options] [folder]
#
#   folder               where gpu.json and the logs go; default benchmarks/results
#   --part PART          build, test, sanitize, bench or all (default); a part renews its share of gpu.json
#   --wheels DIR         wheels of peers (POT, geomloss, flash-sinkhorn), for this run alone
#   -k EXPRESSION        of pytest, for test and bench; some clouds are measured only if it names their case
#   --dry-run            prints what would run; needs no GPU
#
# Needs an NVIDIA driver, nvcc, a C++ compiler and a Python (PYTHON, default python3) with torch, triton,
# numpy, scipy, pytest, hypothesis, setuptools, pybind11 and ninja; compute-sanitizer for its part. Peers,
# timm and diffusers may be missing: their rows say so. Nothing is fetched, and no setting of the GPU is
# changed. A copy without git history is told its commit by OTDD_COMMIT.
#
# Stopped after 5 minutes: build; 6: test; 2: each of three sanitizers; 8: bench, whose rows done so far are
# kept. Exit code 0 if all passed, 1 if something failed, 2 without a GPU or for a wrong option.
set -uo pipefail

python=$("${PYTHON:-python3}" -c 'import sys; print(sys.executable)') || exit 2
part=all folder="" wheels="" dry="" select=()
fail() {
  echo "gpu.sh: $1" >&2
  exit 2
}
while [ $# -gt 0 ]; do
  case $1 in
    --part | --wheels | -k) [ $# -gt 1 ] || fail "$1 needs a value" ;;
  esac
  case $1 in
    --part) part=$2 && shift ;;
    --wheels) wheels=$(cd "$2" 2> /dev/null && pwd) || fail "--wheels $2: no such folder"; shift ;;
    -k) select=(-k "$2") && shift ;;
    --dry-run) dry=yes ;;
    -*) fail "unknown option $1" ;;
    *) [ -z "$folder" ] || fail "one folder, not $folder and $1"; folder=$1 ;;
  esac
  shift
done
case $part in
  all) parts="build test sanitize bench" ;;
  build | test | sanitize | bench) parts=$part ;;
  *) fail "--part $part: not build, test, sanitize, bench or all" ;;
esac

archs=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | sort -u | paste -sd ';')
if [ -z "$archs" ]; then
  [ -n "$dry" ] || fail "no GPU: nvidia-smi names none (--dry-run prints what would run)"
  archs=9.0
fi
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${folder:-$root/benchmarks/results}
if [ -z "$dry" ]; then
  mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || fail "$folder cannot be made"
fi
result=$folder/gpu.json
cd "$root"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset OTDD_BACKEND OTDD_NATIVE OTDD_CHECKS
failed=0

# Usage: record NAME SECONDS COMMAND... Runs it for so long at most, its output into NAME.log.
record() {
  local name=$1 limit=$2 status start=$SECONDS log
  shift 2
  log=$folder/gpu_$name.log
  echo "== $name, at most $limit s: $*"
  [ -z "$dry" ] || return 0
  timeout -k 10 "$limit" "$@" > "$log" 2>&1
  status=$?
  [ $status -ne 124 ] || echo "gpu.sh: stopped after $limit s" >> "$log"
  tail -n 5 "$log"
  "$python" benchmarks/gpu_report.py part "$result" "$name" $status $((SECONDS - start)) "$log"
  [ $status -eq 0 ] || failed=1
}

if [ -n "$wheels" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$wheels"/*.whl; do
    install=("$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheel")
    echo "== ${install[*]}"
    [ -n "$dry" ] || "${install[@]}" || echo "gpu.sh: $wheel is left out"
  done
  export PYTHONPATH=$PYTHONPATH:$site
fi

for p in $parts; do
  case $p in
    build)
      record build 300 env OTDD_CUDA=1 OTDD_CUDA_ARCHS="$archs" "$python" setup.py build_ext --inplace
      ;;
    test)
      record test 360 "$python" -m pytest -q -m gpu -p no:cacheprovider "${select[@]}" tests
      ;;
    sanitize)
      tool=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2> /dev/null)
      for check in memcheck racecheck synccheck; do
        if [ -z "$tool$dry" ]; then
          record $check 10 sh -c 'echo "gpu.sh: no compute-sanitizer on this machine" && exit 127'
          continue
        fi
        # Without PyTorch's cache each tensor is an allocation of its own, whose ends memcheck sees.
        record $check 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool:-compute-sanitizer}" --tool $check \
          --error-exitcode 3 "$python" benchmarks/gpu_small.py
      done
      ;;
    bench)
      record bench 480 "$python" -m pytest -q -p no:cacheprovider "${select[@]}" benchmarks/test_gpu.py \
        --gpu-results "$result"
      ;;
  esac
done

[ -n "$dry" ] || "$python" benchmarks/gpu_report.py table "$result"
exit $failed
