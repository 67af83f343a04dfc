"""Uses an installed qirl_fast as its users do; .ci/wheel runs it in a new environment.

python -I use_wheel.py PREFIX: everything must lie below PREFIX. With PyTorch an op runs on the
compiled kernels and is compared with its reference, without it they are called themselves.
"""

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import qirl_fast
from qirl_fast import _cpu

HERE = Path(sys.argv[1]).resolve()
for file in (qirl_fast.__file__, _cpu.__file__, qirl_fast.configs_dir() / "tiny_grpo.yaml"):
    assert HERE in Path(file).resolve().parents, f"{file} is not below {HERE}"
assert qirl_fast.__version__ == version("qirl-fast")
said = f"qirl_fast {qirl_fast.__version__}, kernels {', '.join(_cpu.available_isas())}"

if find_spec("torch") is None:
    said += "; no PyTorch here, so no op was run"
else:
    import torch

    from qirl_fast import ops

    gate, up = torch.randn(2, 64, 96).unbind()
    with ops.use_backend("cpu"):
        y = ops.swiglu(gate, up)
    with ops.use_backend("reference"):
        torch.testing.assert_close(y, ops.swiglu(gate, up))
    said += "; ops.swiglu is that of its reference"
print(f"== wheel: {said}")
