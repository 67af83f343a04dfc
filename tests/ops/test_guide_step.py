"""guide_step is guide, the frozen offset and flow_step in turn, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from qirl_fast import _cpu, ops
from qirl_fast.ops.guide_step import guide_step_reference

# A row of one block's part, of whole blocks, of several; tokens that blocks cut and wide ones.
SHAPES = [(1, 1), (3, 17), (2, 5, 64), (2, 37, 64), (1, 3, 1500), (2, 700, 3), (1, 2, 1024)]
DTYPES = [torch.float32, torch.bfloat16]


def inputs(shape, x_dtype=torch.float32, v_dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    x, v_cond, v_uncond = (torch.randn(shape, generator=g) for _ in range(3))
    scale, a, c, s = (torch.rand(shape[0], generator=g) + 0.2 for _ in range(4))
    w, b = 1 / (2 * s * s), torch.log(s)
    seed = torch.randint(-(2**63), 2**63 - 1, (shape[0],), generator=g)
    return [
        x.to(x_dtype),
        v_cond.to(v_dtype),
        v_uncond.to(v_dtype),
        4 * scale,
        a,
        -c,
        s,
        w,
        b,
    ], seed


def in_turn(x, v_cond, v_uncond, scale, a, c, s, w, b, *, seed, offset, rescale, frozen):
    g = ops.guide(v_cond, v_uncond, scale, rescale=rescale)
    if not frozen:
        return *ops.flow_step(x, g, a, c, s, w, b, seed=seed, offset=offset), None
    c_B = c.reshape(-1, *[1] * (x.ndim - 1))
    delta = (c_B * (g.float() - v_cond.float())).to(x.dtype)
    step = ops.flow_step(x, v_cond, a, c, s, w, b, seed=seed, offset=offset, delta=delta)
    return *step, delta


def same(got, wanted) -> bool:
    pairs = list(zip(got, wanted, strict=True))
    return all(a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_has_the_bits_of_the_ops_in_turn(shape, x_dtype, v_dtype, rescale, frozen, isa, poisoned):
    args, seed = inputs(shape, x_dtype, v_dtype)
    options = {"seed": seed, "offset": 2**40 + 5, "rescale": rescale, "frozen": frozen}
    got = ops.guide_step(*args, **options)
    assert _cpu.last_isa() == isa
    assert same(got, in_turn(*args, **options))
    assert (got[2] is None) == (not frozen)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_cuda_has_the_same_bits(emulated_cuda, poisoned, shape, x_dtype, v_dtype, rescale, frozen):
    args, seed = inputs(shape, x_dtype, v_dtype)
    options = {"seed": seed, "offset": 7, "rescale": rescale, "frozen": frozen}
    with ops.use_backend("cuda"):
        got = ops.guide_step(*args, **options)
    assert same(got, ops.guide_step(*args, **options))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_is_near_the_reference_in_float64(rescale, frozen):
    args, seed = inputs((2, 37, 64))
    got = ops.guide_step(*args, seed=seed, offset=1, rescale=rescale, frozen=frozen)
    wide = [t.double() for t in args]
    wanted = guide_step_reference(*wide[:4], rescale, *wide[4:], seed, 1, frozen)
    for a, b in zip(got, wanted if frozen else wanted[:2], strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_replay_scores_the_step_without_the_other_branch(isa):
    """logp of the stored state under v_cond and delta: the same bits, so the ratio is 1."""
    args, seed = inputs((2, 37, 64), torch.bfloat16, torch.bfloat16)
    x_next, logp, delta = ops.guide_step(*args, seed=seed, offset=3, rescale=True, frozen=True)
    x, v_cond, _, _, a, c, _, w, b = args
    assert torch.equal(ops.flow_logp(x, x_next, v_cond, a, c, w, b, delta=delta), logp)


def test_a_row_does_not_depend_on_its_batch_or_the_threads(threads, isa):
    args, seed = inputs((3, 90, 64))
    options = {"offset": 3, "rescale": True, "frozen": True}
    runs = []
    for count in (1, 2, 5):
        with threads(count):
            runs.append(ops.guide_step(*args, seed=seed, **options))
    assert all(same(again, runs[0]) for again in runs[1:])
    alone = ops.guide_step(*(t[1:2] for t in args), seed=seed[1:2], **options)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone, runs[0], strict=True))


def test_strided_velocities_and_a_number_for_scale():
    args, seed = inputs((2, 10, 128))
    x, v_cond, v_uncond, _, *rest = args
    options = {"seed": seed, "offset": 3, "rescale": True, "frozen": True}
    views = [t[..., :64] for t in (x, v_cond, v_uncond)]
    got = ops.guide_step(*views, 2.5, *rest, **options)
    copies = [t.contiguous() for t in views]
    assert same(got, ops.guide_step(*copies, torch.full((2,), 2.5), *rest, **options))


def test_a_vanishing_guided_token_steps_by_zero():
    args, seed = inputs((1, 2, 64))
    args[1][0, 0] = args[2][0, 0] = 0.0
    x_next, _, delta = ops.guide_step(*args, seed=seed, offset=0, rescale=True, frozen=True)
    assert bool(x_next.isfinite().all()) and not delta[0, 0].any()


def test_opcheck():
    args, seed = inputs((2, 5, 64))
    for backend in ("cpu", "reference"):
        for frozen in (False, True):
            sample = (*args[:4], True, *args[4:], seed, 3, frozen, backend)
            torch.library.opcheck(torch.ops.qirl.guide_step.default, sample)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": math.inf}, "guide_step: scale must be finite"),
        ({"scale": True}, "guide_step: scale must be a number or a tensor"),
        ({"offset": -1}, r"guide_step: offset must be in \[0, 2\^63\)"),
        ({"v_uncond": torch.zeros(2, 5, 64, dtype=torch.bfloat16)}, "guide_step: v_uncond"),
        ({"v_cond": torch.zeros(2, 5, 63)}, "guide_step: v_cond"),
        ({"a": torch.tensor([1.0, math.nan])}, "guide_step: a"),
    ],
)
def test_bad_input(change, message):
    args, seed = inputs((2, 5, 64))
    names = ("x", "v_cond", "v_uncond", "scale", "a", "c", "s", "w", "b")
    given = dict(zip(names, args, strict=True)) | {"seed": seed, "offset": 0} | change
    with pytest.raises(ValueError, match=message):
        ops.guide_step(**given)
