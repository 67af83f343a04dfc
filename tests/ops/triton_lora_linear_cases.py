"""kernels/lora_linear.py in Triton's interpreter, on CPU tensors, float32 against float64.

Not collected by name: test_triton.py runs this file in a process of its own, because
TRITON_INTERPRET has to be set before triton is imported. Its tl.dot is wrong in bfloat16.
"""

from __future__ import annotations

import pytest
import torch

from qirl_fast.kernels import lora_linear as kernels
from qirl_fast.ops.lora_linear import lora_linear_backward_reference, lora_linear_reference

# Ranks below and above a block (64), widths and tokens off the blocks, more than a chunk of tokens.
CASES = [((3, 23), 35, 21, (5, 1)), ((70,), 33, 65, (70,)), ((2, 530), 16, 8, (4,))]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    real = torch.Tensor.new_empty
    nan = float("nan")
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: real(t, *a, **k).fill_(nan))


def double(tensors):
    return [t.double() for t in tensors]


@pytest.mark.parametrize(("lead", "width", "out", "ranks"), CASES)
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_gradients(lead, width, out, ranks, strided):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(*lead, width), torch.randn(out, width), torch.randn(out)
    dy = torch.randn(*lead, out)
    a, b = [torch.randn(r, width) for r in ranks], [torch.randn(out, r) for r in ranks]
    if strided:
        x, dy = (torch.cat((t, t), dim=-1)[..., : t.shape[-1]] for t in (x, dy))
        a, b = ([t.T.contiguous().T for t in list_] for list_ in (a, b))
    scale = [0.5 + i for i in range(len(ranks))]
    y, t = kernels.lora_linear(x, weight, bias, a, b, scale)
    wide = x.double(), weight.double(), bias.double(), double(a), double(b), scale
    want_y, want_t = lora_linear_reference(*wide)
    want = [True] * (3 + 2 * len(ranks))
    grads = kernels.lora_linear_backward(dy, x, weight, a, b, t, scale, want)
    exact = lora_linear_backward_reference(
        dy.double(), wide[0], wide[1], wide[3], wide[4], want_t, scale, want
    )
    for got, truth in zip([y, *t, *grads], [want_y, *want_t, *exact], strict=True):
        assert got.shape == truth.shape
        size = float(truth.abs().max())  # sums of up to 1060 products in float32
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-6 * size)


def test_unwanted_gradients_are_left_out():
    x, weight, a, b = torch.ones(3, 4), torch.ones(5, 4), torch.ones(2, 4), torch.ones(5, 2)
    dy = torch.ones(3, 5)
    only = [False, False, False, True, False]
    grads = kernels.lora_linear_backward(dy, x, weight, [a], [b], [], [1.0], only)
    assert [g.numel() for g in grads] == [0, 0, 0, 8, 0]
    only = [True, False, False, False, False]
    grads = kernels.lora_linear_backward(dy, None, weight, [a], [b], [], [1.0], only)
    assert [g.numel() for g in grads] == [12, 0, 0, 0, 0]


def test_a_block_alone_has_the_same_bits():
    """The kernels' rows do not depend on the batch (the base GEMM, a library's, is not in play).

    At the same places of a block: the interpreter's dot is NumPy's, whose BLAS may round the rows
    of one product differently by their place.
    """
    first = kernels.TOKENS
    x, a = torch.randn(2 * first + 22, 40), torch.randn(6, 40)
    assert torch.equal(kernels._down(x, a)[first : first + 5], kernels._down(x[first:][:5], a))
