#!/usr/bin/env bash
# Transformer Engine for a GPU machine with no network: what it is made of is downloaded elsewhere.
#   bench/te.sh download FOLDER   where PyPI can be reached, no GPU: wheels and the source of the
#                                 PyTorch part into FOLDER (about 330 MB), torch left out
#   bench/te.sh install FOLDER    on the GPU machine: compiles that part against its torch; prints
#                                 the version, or the reason why not
# install needs torch with CUDA, a C++ compiler, and the headers of a CUDA toolkit, cuDNN 9.12
# and NCCL, the last two as wheels (torch brings them) or the system's. After a failure nothing of
# Transformer Engine is left behind: half of it breaks `import peft`.
# Environment: PYTHON (python3), MAX_JOBS; for download TE_VERSION (2.20.2), and of the GPU machine
# TE_CUDA (13, or 12) and TE_PYTHON (this Python's version, such as 3.12).
set -euo pipefail

python=${PYTHON:-python3}
version=${TE_VERSION:-2.20.2}
needs=(einops onnx onnxscript pydantic importlib-metadata pyyaml ninja setuptools wheel)
loose=(nvdlfw-inspect nvidia-cudnn-frontend) # for these pip would fetch torch and cutlass

download() {
  local folder=$1 cuda=${TE_CUDA:-13} target platforms=() glibc
  target=${TE_PYTHON:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
  for glibc in _2_28 _2_27 _2_24 _2_17 2014; do
    platforms+=(--platform "manylinux${glibc}_x86_64")
  done
  "$python" -m pip download -q -d "$folder" --only-binary=:all: --python-version "$target" \
    "${platforms[@]}" "transformer-engine-cu$cuda==$version" "${needs[@]}"
  "$python" -m pip download -q -d "$folder" --only-binary=:all: --python-version "$target" \
    "${platforms[@]}" --no-deps "transformer-engine==$version" "${loose[@]}"

  # pip asks a source for its metadata, which here wants torch and CUDA: these are stand-ins.
  stub=$(mktemp -d)
  trap 'rm -rf "$stub"' EXIT
  mkdir -p "$stub/torch/utils" "$stub/cuda/bin" "$stub/cuda/include"
  printf '__version__ = "0"\nclass version: cuda = "%s.0"\n' "$cuda" >"$stub/torch/__init__.py"
  printf '%s\n' 'from setuptools import Extension as CppExtension' \
    'from setuptools.command.build_ext import build_ext as BuildExtension' \
    >"$stub/torch/utils/cpp_extension.py"
  printf '#!/bin/sh\necho release %s.0\n' "$cuda" >"$stub/cuda/bin/nvcc"
  chmod +x "$stub/cuda/bin/nvcc"
  "$python" -m pip install -q --target "$stub" setuptools wheel packaging
  PYTHONPATH=$stub CUDA_HOME=$stub/cuda "$python" -m pip download -q -d "$folder" --no-deps \
    --no-build-isolation --no-binary transformer-engine-torch "transformer-engine-torch==$version"
  du -ch "$folder"/* | sort -h
}

begun=
fail() {
  printf 'Transformer Engine is not installed: %s\n' "$1" >&2
  [ -z "$begun" ] || "$python" -m pip uninstall -q -y transformer-engine transformer-engine-torch \
    transformer-engine-cu12 transformer-engine-cu13 2>/dev/null || true
  exit 1
}

headers() { # folders of the headers below, from nvidia-* wheels or the system; fails naming one
  "$python" - <<'PY'
import os, site, sys, sysconfig
from pathlib import Path

roots = [Path(p, "nvidia") for p in (sysconfig.get_path("purelib"), *site.getsitepackages())]
system = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "include"), Path("/usr/include")]
system += Path("/usr/include").glob("*-linux-gnu")
folders = {}
for name in ("crt/host_config.h", "cuda_runtime.h", "cublasLt.h", "cudnn.h", "nccl.h"):
    wheels = [folder for root in roots for folder in sorted(root.glob("**/include"))]
    order = wheels + system if name in ("cudnn.h", "nccl.h") else system + wheels
    found = [folder for folder in order if (folder / name).exists()]
    if not found:
        sys.exit(f"no {name} in {', '.join(map(str, order))}")
    folders[str(found[0])] = None
print(":".join(folders))
PY
}

install() {
  local folder=$1 cuda include
  cuda=$("$python" -c 'import torch; print((torch.version.cuda or "").split(".")[0])') ||
    fail "torch does not import"
  [ -n "$cuda" ] || fail "this torch is built without CUDA"
  compgen -G "$folder/transformer_engine_cu$cuda-*.whl" >/dev/null ||
    fail "$folder has no wheel for CUDA $cuda: TE_CUDA=$cuda bench/te.sh download"
  include=$(headers) || fail "a header is missing, see above"

  local pip=("$python" -m pip install -q --no-index --find-links "$folder" --no-build-isolation)
  "${pip[@]}" "${needs[@]}" || fail "what it needs does not install"
  "${pip[@]}" --no-deps "${loose[@]}" || fail "what it needs does not install"
  begun=yes
  trap 'fail "stopped"' TERM INT
  # FORCE_BUILD: or it would ask GitHub first. NCCL_EP, for mixtures of experts, wants a newer NCCL.
  CPATH=$include${CPATH:+:$CPATH} NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 \
    MAX_JOBS=${MAX_JOBS:-$(nproc)} "${pip[@]}" --no-deps transformer-engine \
    "transformer-engine-cu$cuda" transformer-engine-torch ||
    fail "its PyTorch part does not compile or install, see above"
  "$python" -c 'import transformer_engine as t, transformer_engine.pytorch as te
print("Transformer Engine", t.__version__, "FP8:", te.is_fp8_available(return_reason=True))' ||
    fail "it does not import, see above"
}

if [ $# -eq 2 ] && [[ $1 =~ ^(download|install)$ ]]; then
  mkdir -p "$2"
  "$1" "$(cd "$2" && pwd)"
  exit
fi
sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
exit 2
