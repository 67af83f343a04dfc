"""fp8_quantize in Triton. Math, shapes, dtypes: qirl_fast/ops/fp8_quantize.py.

The conversion works on the bits of float32, as csrc/math/fp8.h does: the same codes on every
architecture (sm_80 has no fp8 instructions) and in the interpreter, whose fp8 casts are wrong.
Loops are `while`: the interpreter cannot count to a run-time bound under NumPy 2.4.
Divisions round correctly: scales and codes have the bits of the other backends.
"""

import torch
import triton
import triton.language as tl

from qirl_fast.kernels.budget import Case

LARGEST = {False: 448.0, True: 57344.0}  # by e5m2
SPAN = 128  # elements of a block
ONE_PASS = 16384  # rows up to this width stay in registers between scale and conversion
SPANS = 16  # blocks a program takes
TILE = 64  # rows and columns of a tile of the transposing kernel


@triton.jit
def _finite_magnitude(x):
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(bits < 0x7F800000, bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _scale(amax, E5M2: tl.constexpr):
    largest: tl.constexpr = 57344.0 if E5M2 else 448.0
    scale = tl.div_rn(amax, largest + amax * 0.0)
    scale = tl.where(scale < 1.17549435e-38, 1.17549435e-38, scale)
    return tl.where(amax > 0.0, scale, 1.0)


@triton.jit
def _inverse(scale):
    return tl.div_rn(scale * 0.0 + 1.0, scale)


@triton.jit
def _codes(x, inverse, E5M2: tl.constexpr):
    """The 8 bits of x inverse, clamped and rounded to nearest even."""
    largest: tl.constexpr = 57344.0 if E5M2 else 448.0
    shift: tl.constexpr = 21 if E5M2 else 20
    bias: tl.constexpr = (112 << 2) if E5M2 else (120 << 3)
    smallest_normal: tl.constexpr = 6.10351562e-5 if E5M2 else 0.015625
    denormal_one: tl.constexpr = 128.0 if E5M2 else 16384.0  # its ulp is the denormals' step
    denormal_bits: tl.constexpr = 0x43000000 if E5M2 else 0x46800000
    infinity: tl.constexpr = 0x7C if E5M2 else 0x7F
    x_bits = x.to(tl.int32, bitcast=True)
    y = tl.abs(x * inverse)
    y = tl.where(y > largest, largest, y)
    bits = y.to(tl.int32, bitcast=True)
    rounded = bits + ((1 << (shift - 1)) - 1) + ((bits >> shift) & 1)
    normal = (rounded >> shift) - bias
    denormal = (y + denormal_one).to(tl.int32, bitcast=True) - denormal_bits
    q = tl.where(y < smallest_normal, denormal, normal)
    magnitude = x_bits & 0x7FFFFFFF
    q = tl.where(magnitude >= 0x7F800000, infinity, q)
    q = tl.where(magnitude > 0x7F800000, 0x7F, q)
    return (q | ((x_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def store_quantized(
    y, q_ptr, scale_ptr, row, first, width, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """For other kernels: the e4m3fn codes and scales of elements `first` on of a row.

    y: [BLOCK] in float32, as rounded to its own dtype. A scale for every UNIT elements: 128, of
    which `first` is a multiple, or BLOCK, which holds the whole row. The codes are stored in two
    dimensions: stored in one, they would hand their own layout to all of the kernel and change the
    order of a norm's sums, and so y.
    """
    k = tl.arange(0, BLOCK // UNIT)
    at = first + k[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    spans = tl.where(at < width, tl.reshape(y, (BLOCK // UNIT, UNIT)), 0.0)
    scale = _scale(tl.max(_finite_magnitude(spans), axis=1), False)
    codes = _codes(spans, _inverse(scale)[:, None], False)
    tl.store((q_ptr + row * width) + at, codes, mask=at < width)
    span, count = first // UNIT + k, (width + UNIT - 1) // UNIT
    tl.store((scale_ptr + row * count) + span, scale, mask=span < count)


@triton.jit
def rows_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    width,
    E5M2: tl.constexpr,
    GIVEN: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row. GIVEN: scale_ptr holds one scale for everything. ONE: the row is one block."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    q_ptr += row * width
    i = tl.arange(0, BLOCK)
    if ONE:
        x = tl.load(x_ptr + i, mask=i < width, other=0.0).to(tl.float32)
        if GIVEN:
            scale = tl.load(scale_ptr)
        else:
            scale = _scale(tl.max(_finite_magnitude(x)), E5M2)
            tl.store(scale_ptr + row, scale)
        tl.store(q_ptr + i, _codes(x, _inverse(scale), E5M2), mask=i < width)
    else:
        if GIVEN:
            scale = tl.load(scale_ptr)
        else:
            most = tl.zeros((BLOCK,), tl.float32)
            start = width * 0
            while start < width:
                at = start + i
                x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
                most = tl.maximum(most, _finite_magnitude(x))
                start += BLOCK
            scale = _scale(tl.max(most), E5M2)
            tl.store(scale_ptr + row, scale)
        inverse = _inverse(scale)
        start = width * 0
        while start < width:
            at = start + i
            x = tl.load(x_ptr + at, mask=at < width, other=0.0).to(tl.float32)
            tl.store(q_ptr + at, _codes(x, inverse, E5M2), mask=at < width)
            start += BLOCK


@triton.jit
def spans_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    width,
    spans,
    chunks,
    E5M2: tl.constexpr,
    SPAN: tl.constexpr,
    COUNT: tl.constexpr,
):
    """COUNT spans of SPAN elements of one row, a scale each."""
    task = tl.program_id(0).to(tl.int64)
    row, first = task // chunks, (task % chunks) * COUNT
    span = first + tl.arange(0, COUNT)
    at = span[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
    scale = _scale(tl.max(_finite_magnitude(x), axis=1), E5M2)
    tl.store(scale_ptr + row * spans + span, scale, mask=span < spans)
    codes = _codes(x, _inverse(scale)[:, None], E5M2)
    tl.store(q_ptr + row * width + at, codes, mask=at < width)


@triton.jit
def amax_kernel(x_ptr, amax_ptr, x_stride, width, BLOCK: tl.constexpr):
    """Largest finite magnitude of one row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    most = tl.zeros((BLOCK,), tl.float32)
    start = width * 0
    while start < width:
        at = start + i
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
        most = tl.maximum(most, _finite_magnitude(x))
        start += BLOCK
    tl.store(amax_ptr + row, tl.max(most))


@triton.jit
def columns_kernel(
    x_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    rows,
    width,
    unit,
    E5M2: tl.constexpr,
    GIVEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """TILE columns over `unit` rows: a scale each, then q transposed."""
    k = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    first = tl.program_id(1).to(tl.int64) * unit
    last = tl.minimum(first + unit, rows)
    if GIVEN:
        scale = tl.zeros((TILE,), tl.float32) + tl.load(scale_ptr)
    else:
        most = tl.zeros((TILE, TILE), tl.float32)
        start = first
        while start < last:
            m = start + tl.arange(0, TILE)
            inside = (m[:, None] < last) & (k[None, :] < width)
            x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
            most = tl.maximum(most, _finite_magnitude(x.to(tl.float32)))
            start += TILE
        scale = _scale(tl.max(most, axis=0), E5M2)
        units = tl.num_programs(1)
        tl.store(scale_ptr + k * units + tl.program_id(1), scale, mask=k < width)
    inverse = _inverse(scale)
    start = first
    while start < last:
        m = start + tl.arange(0, TILE)
        inside = (m[:, None] < last) & (k[None, :] < width)
        x = tl.load(x_ptr + m[:, None] * x_stride + k[None, :], mask=inside, other=0.0)
        codes = tl.trans(_codes(x.to(tl.float32), inverse[None, :], E5M2))
        out = (k[:, None] < width) & (m[None, :] < last)
        tl.store(q_ptr + k[:, None] * rows + m[None, :], codes, mask=out)
        start += TILE


# ---- launchers ----------------------------------------------------------------------------------
def row_config(width):
    """(BLOCK, warps): 16 elements a thread, what a 128-bit store of codes takes."""
    block = min(max(triton.next_power_of_2(width), 512), ONE_PASS)
    return block, max(1, min(block // 512, 16))


def outputs(y, quantize):
    """Empty q and scale for y, as the ops with `quantize` return them."""
    if not quantize:
        return y.new_empty(0, dtype=torch.float8_e4m3fn), y.new_empty(0, dtype=torch.float32)
    units = triton.cdiv(y.shape[-1], SPAN) if quantize == "block" else 1
    q = y.new_empty(y.shape, dtype=torch.float8_e4m3fn)
    return q, y.new_empty((*y.shape[:-1], units), dtype=torch.float32)


def pointers(q, scale, y):
    """q as bytes and scale, as a kernel takes them; y and y stand in for what is not wanted."""
    return (q.view(torch.uint8), scale) if q.numel() else (y, y)


def unit_of(quantize, block):
    """UNIT of store_quantized(); 0: nothing is quantised."""
    return {"": 0, "row": block, "block": SPAN}[quantize]


def pointwise_plan(op, width, quantize, block, warps):
    """(BLOCK, warps) of an op that takes `block` elements a program unless rows share a scale."""
    if quantize != "row":
        return block, warps
    if width > ONE_PASS:
        raise ValueError(
            f"{op}: with quantize='row' the triton backend takes rows of at most {ONE_PASS}; "
            f"got {width}."
        )
    return row_config(width)


def _matrix(x):
    view = x.reshape(-1, x.shape[-1])
    return view if view.stride(1) == 1 or view.shape[1] == 1 else view.contiguous()


def _whole_scale(x, e5m2):
    """[1], on the device: the host waits for nothing."""
    rows, width = x.shape
    block, warps = row_config(width)
    amax = x.new_empty(rows, dtype=torch.float32)
    amax_kernel[(rows,)](x, amax, x.stride(0), width, BLOCK=block, num_warps=warps)
    most = amax.amax(0, keepdim=True)
    scale = (most / LARGEST[e5m2]).clamp(min=2.0**-126)
    return torch.where(most > 0, scale, 1.0)


def fp8_quantize(x, granularity, e5m2, transpose):
    """(q, scale); arguments as the op's, already checked."""
    lead = (x.shape[-1],) if transpose else x.shape[:-1]
    length = x.numel() // x.shape[-1] if transpose else x.shape[-1]
    fp8 = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    q = x.new_empty((*lead, length), dtype=fp8)
    x = _matrix(x)
    rows, width = x.shape
    units = triton.cdiv(length, SPAN) if granularity == "block" else 1
    whole = granularity == "tensor"
    scale = _whole_scale(x, e5m2) if whole else x.new_empty((*lead, units), dtype=torch.float32)
    codes, stride = q.view(torch.uint8), x.stride(0)
    fixed = {"E5M2": e5m2, "enable_fp_fusion": False}
    if transpose:
        unit = SPAN if granularity == "block" else rows
        grid = (triton.cdiv(width, TILE), units)
        given = {"GIVEN": whole, "TILE": TILE, "num_warps": 4}
        columns_kernel[grid](x, codes, scale, stride, rows, width, unit, **given, **fixed)
    elif granularity == "block":
        chunks = triton.cdiv(units, SPANS)
        sizes = {"SPAN": SPAN, "COUNT": SPANS, "num_warps": 4}
        grid = (rows * chunks,)
        spans_kernel[grid](x, codes, scale, stride, width, units, chunks, **sizes, **fixed)
    else:
        block, warps = row_config(width)
        sizes = {"GIVEN": whole, "ONE": width <= block, "BLOCK": block, "num_warps": warps}
        rows_kernel[(rows,)](x, codes, scale, stride, width, **sizes, **fixed)
    return q, scale


# ---- budget -------------------------------------------------------------------------------------
def _case(kernel, dtype, sizes, constexprs, num_warps, **limits):
    pointers = {"x_ptr": f"*{dtype}", "q_ptr": "*u8", "scale_ptr": "*fp32", "amax_ptr": "*fp32"}
    arguments = {n: t for n, t in pointers.items() if n in kernel.arg_names}
    signature = {**arguments, "x_stride": "i64", **dict.fromkeys(sizes, "i32")}
    divisible = (*arguments, "x_stride", *(n for n in sizes if n in ("width", "rows", "unit")))
    return Case(kernel, signature, constexprs, num_warps, divisible=divisible, **limits)


def _cases(dtype, e5m2):
    fp8 = {"E5M2": e5m2}
    block, warps = row_config(3072)
    row = {**fp8, "ONE": True, "BLOCK": block}
    long_row = {**fp8, "ONE": False, "GIVEN": False, "BLOCK": ONE_PASS}
    spans = {**fp8, "SPAN": SPAN, "COUNT": SPANS}
    tile = {**fp8, "TILE": TILE}
    sizes = ("rows", "width", "unit")
    return [
        _case(rows_kernel, dtype, ("width",), {**row, "GIVEN": False}, warps, registers=96),
        _case(rows_kernel, dtype, ("width",), {**row, "GIVEN": True}, warps, registers=96),
        _case(rows_kernel, dtype, ("width",), long_row, 16, registers=128),
        _case(spans_kernel, dtype, ("width", "spans", "chunks"), spans, 4, registers=96, narrow=1),
        _case(amax_kernel, dtype, ("width",), {"BLOCK": block}, warps, registers=96),
        _case(columns_kernel, dtype, sizes, {**tile, "GIVEN": False}, 4, registers=128, narrow=4),
        _case(columns_kernel, dtype, sizes, {**tile, "GIVEN": True}, 4, registers=128, narrow=4),
    ]


BUDGET = [case for dtype in ("bf16", "fp32") for case in _cases(dtype, e5m2=dtype == "fp32")]
