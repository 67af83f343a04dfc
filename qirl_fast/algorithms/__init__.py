"""One paper a file, the same functions in each: record, sampling, loss, after_step."""

from types import ModuleType

from qirl_fast.algorithms import grpo

ALGORITHMS: dict[str, ModuleType] = {"grpo": grpo}
