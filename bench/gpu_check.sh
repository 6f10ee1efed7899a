#!/usr/bin/env bash
# Checks flashode on a GPU machine, offline: build, tests on the device, compute-sanitizer, benchmarks.
#
#   OUT=out PYTHON=python3 DEVICE=cuda LIMIT=530 bash bench/gpu_check.sh
#
# PYTHON already has torch, torchdiffeq, pytest, scikit-build-core, pybind11, cmake and ninja, and for
# compiled fields cuda-core with NVRTC; flashode is installed into it (unless BUILD=0). Every part has
# its own time limit, and runs whether or not the one before it passed. Logs, bench.json,
# ensembles.json and summary.txt go to OUT; the exit status is 0 if all parts passed. DEVICE=cpu is a
# rehearsal: it leaves out the sanitizers. Without a git checkout, FLASHODE_COMMIT names the commit.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

out=${OUT:-out} python=${PYTHON:-python3} device=${DEVICE:-cuda} build=${BUILD:-1}
deadline=$((SECONDS + ${LIMIT:-530}))
failed=0
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd) || exit 2
: >"$out/summary.txt"
export PYTHONUNBUFFERED=1

note() {
  printf '%-10s %-34s %s\n' "$@" | tee -a "$out/summary.txt"
}

# part NAME SECONDS COMMAND...: runs a command within its limit and what is left of the whole.
part() {
  local name=$1 limit=$2 begin=$SECONDS left=$((deadline - SECONDS)) rc verdict last
  shift 2
  if ((left < 10)); then
    note "$name" "FAILED: no time left" "0 s"
    failed=1
    return
  fi
  ((limit > left)) && limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  case $rc in
    0) verdict=passed ;;
    124 | 137) verdict="FAILED: stopped after $limit s" ;;
    *) verdict="FAILED: exit status $rc" ;;
  esac
  ((rc == 0)) || failed=1
  last=$(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c 1-100)
  note "$name" "$verdict" "$((SECONDS - begin)) s  $last"
}

# sanitize NAME SECONDS TOOL: a small selection of tests under one compute-sanitizer tool.
sanitize() {
  local name=$1 limit=$2 tool=$3
  if [[ $device != cuda ]]; then
    note "$name" "left out: needs a GPU" ""
  elif ! command -v compute-sanitizer >/dev/null; then
    note "$name" "FAILED: no compute-sanitizer" ""
    failed=1
  else
    # Torch's own kernels and compiler are not under test; its caching allocator
    # would hide a write past the end of a tensor in its own slack.
    part "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
      --target-processes all --error-exitcode 99 --print-limit 20 \
      "$python" -m pytest tests -q -x -p no:cacheprovider --device "$device" \
      -k "(ops or engines or batched) and not reference and not opcheck and not compiled"
  fi
}

[[ $build == 0 ]] || part build 150 "$python" -m pip install --no-build-isolation --no-deps .
# The installed package, not the source tree, is what all parts below import.
part info 30 "$python" -c "
import flashode, flashode.info, sys
flashode.info.main()
config = flashode.build_config()
usable = any(d.startswith('$device') for d in config['devices'])
sys.exit(not (config['extension'] and usable))"
jobs=()
"$python" -c "import xdist" 2>/dev/null && jobs=(-n 8)
part tests 170 "$python" -m pytest tests -q -p no:cacheprovider --device "$device" "${jobs[@]}"
part bench 140 "$python" bench/run.py --device "$device" --seconds 6 --json "$out/bench.json"
# Whole solves of compiled fields, which need cuda-core; the largest takes no torchdiffeq.
if [[ $device != cuda ]] || "$python" -c "import cuda.core" 2>/dev/null; then
  part ensembles 120 "$python" bench/ensembles.py --device "$device" --seconds 6 --json "$out/ensembles.json"
else
  note ensembles "left out: no cuda-core" ""
fi
sanitize memcheck 110 memcheck
if ((deadline - SECONDS > 60)); then
  sanitize racecheck 110 racecheck
else
  note racecheck "left out: no time left" ""
fi

echo
[[ -s $out/bench.log ]] && cat "$out/bench.log"
[[ -s $out/ensembles.log ]] && cat "$out/ensembles.log"
echo
cat "$out/summary.txt"
exit "$failed"
