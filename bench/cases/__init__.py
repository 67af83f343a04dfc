"""What is benchmarked: one function per op makes its case, CASES names them.

To add an op: write `def <op>(shape, make) -> Case` in rl.py or dit.py and put it in the table.
"""

from bench.cases import dit, rl
from bench.cases.case import Case, Make, Shape

RL_SHAPE: Shape = (4, 4096, 64)
DIT_SHAPE: Shape = (1, 4352, 3072)  # 256 text tokens and a 1024 px image

CASES = {name: (make, RL_SHAPE) for name, make in rl.CASES.items()}
CASES.update({name: (make, rl.UPDATE_SHAPE) for name, make in rl.UPDATE_CASES.items()})
CASES.update({name: (make, DIT_SHAPE) for name, make in dit.CASES.items()})

__all__ = ["CASES", "Case", "Make", "Shape"]
