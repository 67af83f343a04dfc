"""Running a case and comparing what came out: shared by the benchmark and the GPU tests."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.cases.case import Case, Function
from qirl_fast import ops


def tolerance(case: Case, dtype: torch.dtype) -> float:
    """Error allowed against the reference, relative to the largest true value of a result."""
    return case.tolerance or (2e-2 if dtype == torch.bfloat16 else 2e-5)


def forced(backend: str, function: Function) -> Function:
    """`function` with every op on this backend."""

    def call(*inputs: object) -> object:
        with ops.use_backend(backend):
            return function(*inputs)

    return call


def tensors(result: object) -> list[Tensor]:
    """The tensors that an op returned."""
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def with_leaves(case: Case) -> tuple[list[object], list[Tensor]]:
    """The inputs of a case, and those of them that are trained."""
    inputs = list(case.inputs)
    leaves = []
    for i in case.leaves:
        inputs[i] = inputs[i].detach().requires_grad_()  # type: ignore[attr-defined]
        leaves.append(inputs[i])
    return inputs, leaves  # type: ignore[return-value]


def output_gradients(outputs: list[Tensor]) -> list[Tensor]:
    """1 for a loss, as loss.backward() has it, else normal."""
    g = torch.Generator().manual_seed(1)
    return [
        torch.ones_like(t) if t.ndim == 0 else torch.randn(t.shape, generator=g).to(t)
        for t in outputs
    ]


def results(case: Case, function: Function) -> list[Tensor]:
    """Outputs and the gradient to each leaf."""
    inputs, leaves = with_leaves(case)
    outputs = tensors(function(*inputs))
    if not leaves:
        return outputs
    grads = torch.autograd.grad(outputs, leaves, output_gradients(outputs))
    return [t.detach() for t in (*outputs, *grads)]


def fault(got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float) -> str:
    """What is wrong with these results, or ''."""
    for i, (mine, true) in enumerate(zip(got, truth, strict=True)):
        if mine.shape != true.shape or mine.dtype != true.dtype:
            return f"result {i} is {mine.dtype} {tuple(mine.shape)}, not {true.dtype}"
        error = (mine.float() - true.float()).abs().max() / true.float().abs().max().clamp(min=1e-9)
        if not bool(error <= tolerance):  # NaN is wrong too
            return f"result {i} is off by {float(error):.1e} of the largest true value"
    return ""


def right_ones(
    case: Case,
    found: dict[str, Function],
    allowed: float,
    note: Callable[[str, str], None],
) -> dict[str, Function]:
    """The providers that run and, where they do the same job, give the reference's results."""
    truth = results(case, forced("reference", case.ours))
    right = {}
    for provider, function in found.items():
        try:
            got = results(case, function)
        except ImportError as error:
            note(provider, f"not installed ({error})")
            continue
        except ops.BackendError as error:
            note(provider, str(error))
            continue
        except Exception as error:  # a kernel that does not compile loses this provider only
            note(provider, f"WRONG, not timed: {type(error).__name__}: {error}")
            continue
        ours = provider.startswith("ours")
        wrong = ""
        if ours or case.same_job:  # the others round their intermediates to storage
            wrong = fault(got, truth, allowed if ours else 8 * allowed)
        if wrong:
            note(provider, f"WRONG, not timed: {wrong}")
        else:
            right[provider] = function
    return right
