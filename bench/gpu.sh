#!/usr/bin/env bash
# Everything a GPU machine should run, in one call of at most nine minutes: builds the package,
# runs the tests marked gpu, benchmarks every op, block and step on the device, and writes
# OUT/gpu.json (and the logs, a table and a plot) whatever failed on the way.
#   bench/gpu.sh [OUT]   default: build/gpu
# Needs nvcc, torch with CUDA, triton, and the build tools (scikit-build-core, pybind11, cmake,
# ninja); for block and step diffusers, transformers and peft too; no network.
# Environment: PYTHON, LIMIT_S (540), QIRL_COMMIT where there is no .git; TE_WHEELS, a folder that
# bench/te.sh filled, to install Transformer Engine from before its tests.
set -uo pipefail
cd "$(dirname "$0")/.."

out=${1:-build/gpu}
python=${PYTHON:-python3}
limit=${LIMIT_S:-540}
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.json "$out"/*.xml "$out"/parts.txt
export PYTHONUNBUFFERED=1

part() { # part NAME SECONDS COMMAND...: one part, stopped after SECONDS or when the whole limit is up
  local name=$1 most=$2 start=$SECONDS status=0
  shift 2
  local left=$((limit - 10 - SECONDS))
  [ "$left" -gt 5 ] || { echo "$name 0 not-started" >>"$out/parts.txt"; return 0; }
  [ "$most" -lt "$left" ] || most=$left
  printf '\n== %s (at most %d s): %s\n' "$name" "$most" "$*"
  timeout --kill-after=5 "$most" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  status=${PIPESTATUS[0]}
  echo "$name $((SECONDS - start)) $status" >>"$out/parts.txt"
  printf '== %s: exit status %d after %d s\n' "$name" "$status" $((SECONDS - start))
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
case $capability in 90) arch=90a-real ;; *) arch=$capability-real ;; esac
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)

# Editable: tests and bench import the package from this tree.
part build 200 "$python" -m pip install --no-build-isolation --no-deps --no-index \
  --config-settings=cmake.define.QIRL_CUDA=ON \
  "--config-settings=cmake.define.QIRL_CUDA_ARCHS=$arch" -e .
# The tests' outer conftest needs the whole trainer; the ops need torch alone.
part tests 150 "$python" -m pytest -q --confcutdir=tests/ops -p no:cacheprovider \
  ${workers[@]+"${workers[@]}"} -m gpu --junitxml="$out/tests.xml" tests/ops/test_gpu.py
part models 60 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/models/test_graphs.py \
  tests/models/test_fp8.py tests/algorithms/test_opd.py
[ -z "${TE_WHEELS:-}" ] ||
  part te-install 300 env PYTHON="$python" bench/te.sh install "$TE_WHEELS"
if timeout 60 "$python" -c 'import transformer_engine.pytorch' 2>/dev/null; then
  part te 60 "$python" -m pytest -q -p no:cacheprovider -rs -m gpu tests/models/test_fp8_te.py
else
  echo "te 0 absent" >>"$out/parts.txt"
fi
part ops 200 "$python" -m bench ops --device cuda --seconds 0.5 --no-compile --out "$out/ops.json"
export QIRL_BACKEND=triton  # the kernels under test: CUDA tensors go to the reference by default
part block 40 "$python" -m bench block --device cuda --out "$out/block.json"
part step 100 "$python" -m bench step --device cuda --scale half --px 512 --out "$out/step.json"
part fp8 90 "$python" -m bench fp8 --device cuda --px 512 --out "$out/fp8.json"
part opd 60 "$python" -m bench opd --device cuda --px 512 --rounds 3 --out "$out/opd.json"
unset QIRL_BACKEND
part compile 200 "$python" -m bench ops --device cuda --seconds 0.5 --dtype bfloat16 --no-sweep \
  --out "$out/compile.json"
"$python" -m bench.collect "$out"
