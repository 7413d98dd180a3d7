#!/usr/bin/env bash
# Builds pycnf without a network, runs the tests that need a GPU and the benchmarks on one, in less
# than nine minutes; see bench/README.md.
#
#   bench/gpu.sh OUT
#
# PYTHON: the interpreter, one whose torch sees the GPU; otherwise python3 or python. COMMIT: what
# this checkout is, where it has no .git. TORCH_CUDA_ARCH_LIST: targets; otherwise this GPU alone.
set -euo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bench/gpu.sh OUT" >&2
  exit 2
fi

# The part that is cut off gets ten more seconds to say what it had, and the report a few.
readonly deadline=$((SECONDS + 500))
# Seconds that are left for each part even if all before it take all they may.
readonly tests=100 forward=35 training=95 cuda=60 memcheck=45  # and the build's: 165

sees_gpu() {
  timeout 60 "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); else candidates=(python3 python); fi
python=""
for candidate in "${candidates[@]}"; do
  if sees_gpu "$candidate"; then
    python=$(command -v "$candidate")
    [[ $python == /* ]] || python=$PWD/$python
    break
  fi
done
if [ -z "$python" ]; then
  echo "gpu.sh: no GPU that the torch of ${candidates[*]} sees; PYTHON chooses another." >&2
  exit 2
fi

mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rm -f "$out"/{build,tests,cuda_forward,cuda_training,cuda,memcheck}.log \
  "$out"/{cuda_forward,cuda_training,cuda,gpu}.json "$out/gpu.md" "$out/parts.tsv"

if ! "$python" -m bench.gpu_needs; then
  echo "gpu.sh: the above is missing; Python packages may also come by PYTHONPATH." >&2
  exit 2
fi

# In place and not by pip: nothing of the machine's Python is touched, and no wheel is needed.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYCNF_CUDA=1
if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c '
import torch
print(".".join(map(str, torch.cuda.get_device_capability())))')
  export TORCH_CUDA_ARCH_LIST
fi

failed=0

# part NAME LATER COMMAND...: runs it with a limit, logs to OUT/NAME.log, notes how it went. It may
# take what is left but for LATER seconds, those of the parts behind it; LIMIT in the command
# becomes ten seconds less, for what ends by itself.
part() {
  local name=$1 limit=$((deadline - SECONDS - $2)) begin=$SECONDS status=0 state
  shift 2
  set -- "${@/#LIMIT/$((limit - 10))}"
  if ((limit < 1)); then
    status=1 state="not begun"
  else
    # An interrupt first: pytest then still sums up what it has (with workers it would not).
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    case $status in
      0) state="done" ;;
      124 | 137) state="cut off" ;;
      *) state="failed ($status)" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$state" $((SECONDS - begin)) >>"$out/parts.tsv"
  echo "$name: $state, $((SECONDS - begin)) s"
  if ((status != 0)); then
    failed=1
    return 1
  fi
}

if ! part build $((tests + forward + training + cuda + memcheck)) \
  "$python" setup.py build_ext --inplace; then
  tail -n 30 "$out/build.log" >&2
  exit 1
fi

pytest=("$python" -m pytest -q -m cuda -p no:cacheprovider)
part tests $((forward + training + cuda + memcheck)) "${pytest[@]}" \
  tests/test_cuda.py tests/test_cuda_capture.py || tail -n 30 "$out/tests.log" >&2

# A process each: an error of a kernel spoils its process.
part cuda_forward $((training + cuda + memcheck)) \
  "$python" -m bench cuda_forward --out "$out" ||
  tail -n 30 "$out/cuda_forward.log" >&2
part cuda_training $((cuda + memcheck)) \
  "$python" -m bench cuda_training --seconds LIMIT --out "$out" ||
  tail -n 30 "$out/cuda_training.log" >&2
part cuda $memcheck "$python" -m bench cuda --rounds 5 --out "$out" ||
  tail -n 30 "$out/cuda.log" >&2

# Some tests of every kernel: groups cut off at the end, views without alignment, tables of pieces.
# Without torch's cache every tensor is an allocation of its own, beyond whose end nothing is valid.
selection="((test_stage or test_finish or test_interpolate or test_initial_norms) and 1025 and f32)
  or (test_finish_segments and many and f64) or opcheck or strided or stores_what
  or (test_rademacher and 129) or test_keys or test_time_tensors or as_written
  or (TestFused and (test_batches or test_regularizers or test_probes or (test_layers and concat)
    or (test_steps_per_sample_of and fourier)))
  or (test_field_by_layer and concatsquash)"
if command -v compute-sanitizer >/dev/null; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 0 \
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
    "${pytest[@]}" tests/test_cuda.py -k "${selection//$'\n'/ }" ||
    tail -n 30 "$out/memcheck.log" >&2
else
  printf 'memcheck\tno compute-sanitizer\t0\n' >>"$out/parts.tsv"
  echo "memcheck: no compute-sanitizer"
fi

timeout 20 "$python" -m bench.gpu_report "$out"
exit $failed
