#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one command, in less than 25 minutes: builds for its architecture,
# runs the GPU tests, runs some of them under compute-sanitizer, checks and times the table of
# bench/gpu.py. A stage that fails does not stop those that follow; the exit status tells of it.
#
#   OUT=DIR          where logs, JSON and PNG go (build/gpu)
#   STAGES="..."     which of: build test sanitize bench
#   GPU_PYTHON=EXE   use this Python with its packages, without network; fusedstep goes into
#                    build/gpu-site. Otherwise make installs everything into .venv
#   WHEELS=DIR       wheels of packages that it lacks; the build needs apache-tvm-ffi
#   BENCH_ARGS="..." for bench/gpu.py
#   FUSEDSTEP_COMMIT=ID  of a copy that has no history
set -uo pipefail
cd "$(dirname "$0")/.."

OUT=$(mkdir -p "${OUT:-build/gpu}" && cd "${OUT:-build/gpu}" && pwd)
SITE=$PWD/build/gpu-site
read -ra stages <<<"${STAGES:-build test sanitize bench}"
read -ra bench_args <<<"${BENCH_ARGS:-}"
if [ -n "${GPU_PYTHON:-}" ]; then
  python=$GPU_PYTHON
  export PYTHONPATH=$SITE${PYTHONPATH:+:$PYTHONPATH}
else
  python=.venv/bin/python
fi
PATH=$PATH:/usr/local/cuda/bin
export PYTHONUNBUFFERED=1

# Runs a command for so many seconds at most.
within() { timeout --kill-after=10 "$@"; }

# 90 for a device of compute capability 9.0.
architecture() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d '. '
}

# --- stages ------------------------------------------------------------------------------------

stage_build() {
  install_all && "$python" -c 'from fusedstep import _cuda; print(_cuda)'
}

install_all() {
  local arch
  arch=$(architecture)
  [ -n "$arch" ] || { echo "nvidia-smi names no GPU"; return 1; }
  if [ -z "${GPU_PYTHON:-}" ]; then
    within 360 make FUSEDSTEP_CUDA=ON FUSEDSTEP_CUDA_ARCHITECTURES="$arch" \
      .venv/fusedstep.stamp .venv/group-test.stamp .venv/group-bench-gpu.stamp
    return
  fi
  local install=("$python" -m pip --disable-pip-version-check install --no-index --no-deps
    --upgrade --target "$SITE")
  if [ -n "${WHEELS:-}" ]; then
    within 60 "${install[@]}" "$WHEELS"/*.whl || return
  fi
  within 300 "${install[@]}" --no-build-isolation \
    --config-settings=cmake.define.FUSEDSTEP_CUDA=ON \
    --config-settings=cmake.define.FUSEDSTEP_CUDA_ARCHITECTURES="$arch" .
}

stage_test() {
  FUSEDSTEP_REQUIRE_GPU=1 within 330 "$python" -m pytest -p no:cacheprovider -q -m gpu \
    --junitxml="$OUT/tests.xml"
}

# Reads of what nobody wrote can only be told by watching every kernel; the others look at ours.
stage_sanitize() {
  local sanitizer tool only failed=0
  sanitizer=$(command -v compute-sanitizer) || { echo "compute-sanitizer is not there"; return 77; }
  for tool in memcheck racecheck initcheck; do
    only=(--kernel-name kns=fusedstep)
    [ "$tool" = initcheck ] && only=()
    echo "# $tool"
    # torch's cache would hide accesses beyond a tensor.
    FUSEDSTEP_REQUIRE_GPU=1 PYTORCH_NO_CUDA_MEMORY_CACHING=1 within 80 \
      "$sanitizer" --tool "$tool" "${only[@]}" --error-exitcode 86 \
      "$python" -m pytest -p no:cacheprovider -q -x -m gpu tests/test_gpu_sanitizer.py || failed=1
  done
  return $failed
}

stage_bench() {
  within 500 "$python" -m bench.gpu --output "$OUT" "${bench_args[@]}"
}

# --- all of them -------------------------------------------------------------------------------

run() {
  local begin=$SECONDS status
  printf '\n### %s\n' "$1"
  "stage_$1" 2>&1 | tee "$OUT/$1.log"
  status=${PIPESTATUS[0]}
  case $status in
    0) status=passed ;;
    77) status="left out" ;;
    124 | 137) status="FAILED: took too long" failed=1 ;;
    *) status="FAILED ($status)" failed=1 ;;
  esac
  summary+="$1: $status, $((SECONDS - begin)) s"$'\n'
}

failed=0
summary=""
{
  nvidia-smi || echo "no nvidia-smi"
  nvcc --version || echo "no nvcc"
  "$python" --version
} >"$OUT/machine.log" 2>&1
for stage in "${stages[@]}"; do
  case $stage in
    build | test | sanitize | bench) run "$stage" ;;
    *) summary+="$stage: no such stage"$'\n' failed=1 ;;
  esac
done
printf '\n%s' "$summary" | tee "$OUT/summary.log"
exit $failed
