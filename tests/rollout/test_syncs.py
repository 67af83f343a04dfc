"""Denoising steps and replay never wait for the device: no value of a tensor reaches the host.

Counted as the operations that read a value or whose output's size depends on values; on a GPU each
would stop the host until the queue is empty.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qirl_fast.algorithms import Policy, grpo
from qirl_fast.rollout.guidance import Guidance
from qirl_fast.rollout.sample import Sampling, sample
from qirl_fast.rollout.workers import Workers

READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class HostReads(TorchDispatchMode):
    """Counts the operations that read a value, and all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.calls += 1
        if name in READS:
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))


def test_the_counter_sees_a_read() -> None:
    with HostReads() as counter:
        x = torch.ones(3)
        assert x.sum().item() == 3 and bool((x > 0).all()) and len(x.nonzero()) == 3
    assert sum(counter.reads.values()) == 3


@pytest.mark.parametrize("mode", ["frozen_offset", "conditional", "full"])
def test_a_denoising_step_reads_nothing(make_model, prompts, mode: str) -> None:
    """Twice the steps: twice the work, not one read more. Then replay, loss and gradient."""
    model = make_model()
    trainable = model.trainable("lora", 4, 8, None, 0)
    with torch.no_grad():
        text, null = model.encode(prompts[:2]), model.encode([""])[0]
    found = []
    for steps in (4, 8):
        how = Sampling(64, 64, steps, Guidance(2.0, False, mode), "flow_sde", 0.7)
        with HostReads() as counter:
            (chunk,) = sample(
                model,
                text,
                null,
                how,
                model.pipeline.scheduler.config,
                group_size=2,
                seed=0,
                update=1,
                recorded=(0, 1),
            )
        found.append((counter.reads, counter.calls))
    (few, few_calls), (many, many_calls) = found
    assert many_calls > few_calls + 100 and many == few
    algorithm = grpo.Grpo(grpo.Settings(name="grpo"), Policy(model, trainable, how, Workers(1)))
    (prepared,) = algorithm.prepare([chunk], ["t2i"] * 4)
    with HostReads() as counter:
        losses = [s.loss for s in algorithm.loss(chunk, torch.ones(4), prepared)]
        torch.autograd.grad(torch.stack(losses).sum(), list(trainable.values()))
    assert counter.calls > 100 and not counter.reads
