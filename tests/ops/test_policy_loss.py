"""policy_loss: both backends against float64 formulas and autograd, edge rules, op contract."""

import math

import numpy as np
import pytest
import torch

from qirl_fast import _cpu, ops

BACKENDS = ["reference", "cpu"]
DTYPES = [torch.float32, torch.float64]


def batch(
    rows: int, dtype: torch.dtype = torch.float32, spread: float = 3e-4, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logp, logp_old, advantage) with ratios on both sides of a 1e-4 clip band."""
    g = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, generator=g, dtype=torch.float64)
    move = torch.randn(rows, generator=g, dtype=torch.float64) * spread
    advantage = torch.randn(rows, generator=g, dtype=torch.float64)
    return (old + move).to(dtype), old.to(dtype), advantage.to(dtype)


def call(
    backend: str, *args: torch.Tensor, low: float = 1e-4, high: float = 1e-4
) -> ops.PolicyLoss:
    with ops.use_backend(backend):
        return ops.policy_loss(*args, clip_low=low, clip_high=high)


def plain(
    logp: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """The textbook lines, in the dtype of the inputs."""
    ratio = torch.exp(logp - old)
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    return torch.maximum(-advantage * ratio, -advantage * clipped).mean()


def loss_and_grad(
    run: object, logp: torch.Tensor, *args: object
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logp.clone().requires_grad_()
    loss = run(leaf, *args)  # type: ignore[operator]
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 1152])
@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e-4), (2e-4, 5e-5), (1.0, math.inf)])
def test_float64_against_autograd(backend: str, rows: int, low: float, high: float) -> None:
    logp, old, advantage = batch(rows, torch.float64)
    with ops.use_backend(backend):
        loss, grad = loss_and_grad(
            lambda x: ops.policy_loss(x, old, advantage, clip_low=low, clip_high=high).loss, logp
        )
    wanted_loss, wanted_grad = loss_and_grad(plain, logp, old, advantage, low, high)
    # Float64; exp differs by an ulp between libraries, and sums of 1152 terms by a few more.
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-13, atol=1e-18)


def test_float32_error_against_plain_float32() -> None:
    """At most twice the error of the same lines in float32, for the loss and the gradient."""
    for seed in range(10):
        logp, old, advantage = batch(96, seed=seed)
        exact = loss_and_grad(plain, logp.double(), old.double(), advantage.double(), 1e-4, 1e-4)
        theirs = loss_and_grad(plain, logp, old, advantage, 1e-4, 1e-4)
        ours = loss_and_grad(lambda x, o=old, a=advantage: call("cpu", x, o, a).loss, logp)
        # The double result rounded to float32 is the best there is: allow that half ulp as well.
        assert (ours[0] - exact[0]).abs() <= max(
            2 * float((theirs[0] - exact[0]).abs()), 2**-24 * float(exact[0].abs())
        )
        assert (ours[1] - exact[1]).abs().max() <= 2 * (theirs[1] - exact[1]).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_log_probs_give_ratio_one(backend: str, dtype: torch.dtype) -> None:
    logp = torch.linspace(-50, 50, 101, dtype=dtype)
    advantage = torch.linspace(-3, 5, 101, dtype=dtype)
    out = call(backend, logp, logp.clone(), advantage, low=1e-12, high=1e-12)
    assert torch.equal(out.ratio, torch.ones_like(logp))
    assert float(out.clip_fraction) == 0.0 and float(out.approx_kl) == 0.0
    torch.testing.assert_close(out.loss, -advantage.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_side_of_the_band(backend: str) -> None:
    """Ratio 0.5, 0.95, 1.05, 2 by both signs of A, band [0.9, 1.2], worked by hand."""
    ratio = torch.tensor([0.5, 0.95, 1.05, 2.0] * 2, dtype=torch.float64)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 4, dtype=torch.float64)
    leaf = ratio.log().requires_grad_()
    with ops.use_backend(backend):
        out = ops.policy_loss(leaf, torch.zeros(8).double(), advantage, clip_low=0.1, clip_high=0.2)
    out.loss.backward()
    terms = np.array([-0.5, -0.95, -1.05, -1.2, 0.9, 0.95, 1.05, 2.0])
    slopes = np.array([-0.5, -0.95, -1.05, 0.0, 0.0, 0.95, 1.05, 2.0])
    np.testing.assert_allclose(float(out.loss.detach()), terms.mean(), rtol=1e-14)
    assert leaf.grad is not None
    np.testing.assert_allclose(leaf.grad.numpy(), slopes / 8, rtol=1e-14)
    assert float(out.clip_fraction) == 0.5
    np.testing.assert_allclose(
        float(out.approx_kl), 0.5 * np.mean(np.log(ratio.numpy()) ** 2), rtol=1e-14
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradient_and_the_other_outputs(backend: str) -> None:
    logp, old, advantage = batch(16, torch.float64)
    leaf = logp.clone().requires_grad_()
    with ops.use_backend(backend):
        out = ops.policy_loss(leaf, old, advantage, clip_low=1e-4, clip_high=1e-4)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in (out.ratio, out.clip_fraction, out.approx_kl))
    (scaled,) = torch.autograd.grad(3.0 * out.loss, leaf)
    _, once = loss_and_grad(plain, logp, old, advantage, 1e-4, 1e-4)
    torch.testing.assert_close(scaled, 3.0 * once, rtol=1e-13, atol=1e-18)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_reaches_the_loss(backend: str, where: int, sign: float) -> None:
    """max and clip must not drop it, whatever the sign of the advantage."""
    arguments = list(batch(9))
    arguments[2] = arguments[2].abs() * sign
    arguments[where][4] = math.nan
    arguments[0].requires_grad_()
    out = call(backend, *arguments)
    out.loss.backward()
    assert out.loss.isnan() and arguments[0].grad is not None
    assert arguments[0].grad[4].isnan()
    assert arguments[0].grad[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_overflow_is_infinite_or_clipped(backend: str) -> None:
    far, zero = torch.tensor([800.0]), torch.zeros(1)
    assert float(call(backend, far, zero, torch.tensor([-1.0])).loss) == math.inf
    assert float(call(backend, far, zero, torch.tensor([1.0])).loss) == pytest.approx(-1.0001)
    assert float(call(backend, -far, zero, torch.tensor([-1.0])).loss) == pytest.approx(0.9999)


def test_rows_do_not_depend_on_the_batch() -> None:
    """Ratio and B * gradient of a row alone equal those in a batch; B is a power of two: exact."""
    logp, old, advantage = batch(64)
    leaf = logp.clone().requires_grad_()
    together = call("cpu", leaf, old, advantage)
    together.loss.backward()
    assert leaf.grad is not None
    for row in (0, 31, 63):
        at = slice(row, row + 1)
        alone = logp[at].clone().requires_grad_()
        out = call("cpu", alone, old[at], advantage[at])
        out.loss.backward()
        assert alone.grad is not None
        assert torch.equal(out.ratio, together.ratio[at])
        assert torch.equal(alone.grad, 64 * leaf.grad[at])


def test_strided_inputs_and_repeats() -> None:
    logp, old, advantage = batch(40)
    first = call("cpu", logp, old, advantage)
    wide = torch.stack([logp, old, advantage], 1)
    for _ in range(3):
        again = call("cpu", wide[:, 0], wide[:, 1], wide[:, 2])
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_same_bits_on_every_instruction_set(isa: str) -> None:
    arguments = batch(500)
    ours = call("cpu", *arguments)
    assert _cpu.last_isa() == isa
    _cpu.force_isa("base")
    assert all(torch.equal(a, b) for a, b in zip(ours, call("cpu", *arguments), strict=True))


def test_the_kernel_writes_every_output(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = batch(33)
    expected = call("cpu", *arguments)
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *a, **k: fresh(self, *a, **k).fill_(math.nan)
    )
    again = call("cpu", *arguments)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logp": torch.zeros(0)}, "at least one row"),
        ({"logp": torch.zeros(4, 1)}, r"\[B\]"),
        ({"logp": torch.zeros(())}, r"\[B\]"),
        ({"logp": torch.zeros(4).bfloat16()}, "float32 or float64"),
        ({"logp_old": torch.zeros(3)}, "logp_old must be like logp"),
        ({"logp_old": torch.zeros(4).double()}, "logp_old must be like logp"),
        ({"advantage": torch.zeros(4, 1)}, "advantage must be like logp"),
        ({"advantage": torch.zeros(4).double()}, "advantage must be like logp"),
        ({"logp_old": torch.zeros(4, requires_grad=True)}, "logp_old requires grad"),
        ({"advantage": torch.zeros(4, requires_grad=True)}, "advantage requires grad"),
        ({"clip_low": 0.0}, "clip_low is 0"),
        ({"clip_low": 1.5}, r"clip_low is 1\.5"),
        ({"clip_low": math.nan}, "clip_low is nan"),
        ({"clip_high": 0.0}, "clip_high is 0"),
        ({"clip_high": -1e-4}, "clip_high is -0"),
        ({"clip_high": math.nan}, "clip_high is nan"),
    ],
)
def test_bad_input_is_named(backend: str, change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "logp": torch.zeros(4),
        "logp_old": torch.zeros(4),
        "advantage": torch.zeros(4),
        "clip_low": 1e-4,
        "clip_high": 1e-4,
    }
    with ops.use_backend(backend):
        ops.policy_loss(**arguments)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=words):
            ops.policy_loss(**(arguments | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    logp, old, advantage = batch(12)
    op = torch.ops.qirl.policy_loss.default
    torch.library.opcheck(op, (logp, old, advantage, 1e-4, 2e-4, backend))
    strided = torch.stack([logp, logp], 1)[:, 0]
    torch.library.opcheck(op, (strided, old, advantage, 1e-4, 2e-4, backend))


def test_compiles_without_a_graph_break() -> None:
    logp, old, advantage = batch(12)

    def step(x: torch.Tensor) -> torch.Tensor:
        return ops.policy_loss(x, old, advantage, clip_low=1e-4, clip_high=1e-4).loss

    ours = loss_and_grad(torch.compile(step, fullgraph=True, backend="aot_eager"), logp)
    for a, b in zip(ours, loss_and_grad(step, logp), strict=True):
        assert torch.equal(a, b)
