"""pytest plugin of .ci/asan: qirl_fast._cpu is the build in build/asan, not the installed one."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_path = next(Path("build/asan/csrc/cpu").glob("_cpu.*.so"))
_spec = spec_from_file_location("qirl_fast._cpu", _path)
assert _spec is not None and _spec.loader is not None
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["qirl_fast._cpu"] = _module


def pytest_report_header() -> str:
    """Says at the top of the run which kernels it tests."""
    return f"kernels under AddressSanitizer and UBSan: {_path}"
