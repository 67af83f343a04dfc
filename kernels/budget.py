"""What a compiled Triton kernel may use: BUDGET of each kernels file is a list of these.

tests/budget compiles every case ahead of time, without a GPU, and reads registers, spills and the
width of global accesses from the machine code.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One instance of a kernel, as it is launched in practice.

    signature: type of every argument that is no constexpr, e.g. "*bf16", "i64", "fp32".
    registers: most a thread may use on any target. Spills and local memory are never allowed.
    width: bits of each global load and store of a tensor; those of single values do not count.
    divisible: arguments (pointers and sizes) that are multiples of 16.
    targets: compute capabilities; fp8 types do not compile for 80.
    narrow: accesses of tensors that may be narrower than `width`, e.g. of one value a row.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    registers: int
    width: int = 128
    divisible: tuple[str, ...] = ()
    targets: tuple[int, ...] = (80, 90, 100)
    narrow: int = 0

    @property
    def name(self) -> str:
        """The kernel and what distinguishes this instance."""
        types = [t for t in self.signature.values() if t.startswith("*")]
        flags = [f"{k}={v}" for k, v in self.constexprs.items()]
        return f"{self.kernel.__name__}[{','.join(types + flags)}]"
