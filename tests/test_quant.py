"""Row `quant`: rotate, quantise, append."""

from dataclasses import replace

import pytest
import torch

import kvtools
from kvtools import KVPages
from kvtools.ops.quant import FORMATS
from kvtools.reference import quant as reference
from kvtools.testing import assert_within_budget

SHAPES = [(1, 1, 8), (3, 2, 24), (5, 4, 128), (0, 2, 64), (7, 3, 80)]  # T, H, D
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QUANTISED = FORMATS[1:]
FEWER = {"triton": 32}  # how much smaller large inputs are: the interpreter is slow
# Mean squared error of unit normals at head size 64, at most.
ERROR = {"fp8": 1.2e-3, "int8": 6e-5, "int6": 5e-4, "int4": 7.2e-3, "int3": 3e-2, "int2": 0.116}


@pytest.mark.parametrize("d", [8, 24, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_spreads(d):
    r = reference.rotation(d, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(r @ r.T, torch.eye(d, dtype=torch.float64))
    assert r[0].count_nonzero() == d & -d
    assert 0 < (r[:, 0] < 0).sum() < d


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", QUANTISED)
@pytest.mark.parametrize("T,H,D", SHAPES)
def test_quantize_kv(T, H, D, format, dtype, device, impl):
    x = torch.randn(T, H, D, device=device, generator=torch.Generator(device).manual_seed(0))
    x = x.to(dtype)
    codes, scale = kvtools.quantize_kv(x, format, impl=impl)
    bits = 8 if format == "fp8" else int(format[3:])
    assert codes.shape == (T, H, D * bits // 8) and scale.shape == (T, H)
    assert codes.element_size() == 1 and scale.dtype == torch.float16
    back = reference.dequantize_kv(codes, scale, D, torch.float64)
    exact = reference.dequantize_kv(*reference.quantize_kv(x.double(), format), D, torch.float64)
    # The same codes but for values that fp32 rounds across a border: compare what they stand for.
    error, best = ((y - x.double()).square().mean() for y in (back, exact))
    if T:
        assert error <= 1.01 * best + 1e-7
        assert best < ERROR[format] * 2


@pytest.mark.parametrize("format", QUANTISED)
def test_error_of_normals(format, impl):
    rows = 4096 // FEWER.get(impl, 1)
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1))
    back = kvtools.dequantize_kv(*kvtools.quantize_kv(x, format, impl=impl), 64, impl=impl)
    assert (back - x).square().mean() < ERROR[format]


@pytest.mark.parametrize("format", list(reference.PLANES))
def test_trying_more_ranges_never_loses(format, monkeypatch):
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(2))

    def errors():
        codes = kvtools.quantize_kv(x, format, impl="reference")
        return (kvtools.dequantize_kv(*codes, 64) - x).square().sum(-1)

    best, tried = errors(), reference.RANGES[format]
    for reach in tried:
        monkeypatch.setitem(reference.RANGES, format, [reach])
        assert (best <= errors() * 1.0001).all()


@pytest.mark.parametrize("format", list(reference.PLANES))
def test_levels(format):
    n = int(format[3:])
    level = reference.level(torch.arange(2**n, dtype=torch.float64), format)
    assert (level.diff() > 0).all() and torch.equal(level, -level.flip(0))
    widths = level.diff()[2 ** (n - 1) - 1 :]  # from the middle outwards
    assert (widths.diff() >= 0).all() and (format in ("int8", "int2")) == (widths.diff() == 0).all()


@pytest.mark.parametrize("format", list(reference.PLANES))
def test_constants_of_the_kernels(format):
    pytest.importorskip("triton")
    from kvtools.kernels.format import FORMATS, bend, planes
    from kvtools.kernels.quant import tries

    bits = FORMATS[format]
    assert tuple(filter(None, planes(bits))) == reference.PLANES[format]
    assert bend(bits) == reference.BEND[format]
    assert [(17 - i) / 16 for i in range(*tries(bits))] == reference.RANGES[format]


@pytest.mark.parametrize("d", [8, 24, 40, 64, 256])
@pytest.mark.parametrize("format", QUANTISED)
def test_quantize_kv_gives_the_codes_of_the_reference(format, d, device, impl):
    rows = 500 // FEWER.get(impl, 1)
    x = torch.randn(rows, d, device=device, generator=torch.Generator(device).manual_seed(3))
    codes, scale = kvtools.quantize_kv(x, format, impl=impl)
    expected, expected_scale = reference.quantize_kv(x, format)
    same = (codes.view(torch.uint8) == expected.view(torch.uint8)).all(-1) & (
        scale == expected_scale
    )
    # Rounding of the rotation moves a few values across a border, and a few scales.
    assert same.float().mean() > 0.98
    # Of two small integers the rotation at head size 64 is exact, and then every code agrees.
    x = torch.zeros(d, 64, device=device)
    x[:, 3], x[:, 40] = torch.arange(1, d + 1), 2
    for actual, exact in zip(
        kvtools.quantize_kv(x, format, impl=impl), reference.quantize_kv(x, format), strict=True
    ):
        assert torch.equal(actual.view(torch.uint8), exact.view(torch.uint8))


def test_fp8_rounds_to_nearest_even(device, impl):
    """Between any two neighbours: halfway, a little below and a little above."""
    value = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (value[1:] + value[:-1]) / 2
    y = torch.cat([middle - 2**-14, middle, middle + 2**-14]).to(device)
    x = torch.zeros(len(y), 16, device=device)
    x[:, 0], x[:, 1] = 2 * (448 + y), 2 * (448 - y)  # rotated: ±448 and ±y
    codes, scale = kvtools.quantize_kv(x, "fp8", impl=impl)
    expected, one = reference.quantize_kv(x, "fp8")
    assert (one == 1).all() and torch.equal(scale, one)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [24, 64])
@pytest.mark.parametrize("format", QUANTISED)
def test_dequantize_kv_within_budget(format, d, dtype, device, impl):
    codes, scale = kvtools.quantize_kv(torch.randn(9, d, device=device), format)
    exact = reference.dequantize_kv(codes, scale, d, torch.float64)
    eager = reference.dequantize_kv(codes, scale, d, dtype)
    actual = kvtools.dequantize_kv(codes, scale, d, dtype=dtype, impl=impl)
    assert_within_budget("x", actual, exact, eager)


def test_dequantize_kv_of_every_code(device, impl):
    """All bytes of fp8, NaN among them, and of the packed formats."""
    every = torch.arange(256, dtype=torch.uint8, device=device)
    scale = torch.tensor(0.5, dtype=torch.float16, device=device)
    for codes in (every.view(torch.float8_e4m3fn)[:127], every.view(torch.float8_e4m3fn)[128:255]):
        codes = codes[:120]
        exact = reference.dequantize_kv(codes, scale, 120, torch.float64)
        eager = reference.dequantize_kv(codes, scale, 120, torch.float32)
        assert_within_budget("x", kvtools.dequantize_kv(codes, scale, 120, impl=impl), exact, eager)
    nan = torch.full((8,), 0x7F, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    assert kvtools.dequantize_kv(nan, scale, 8, impl=impl).isnan().all()
    for format, planes in reference.PLANES.items():
        d = 256 * 8 // sum(planes) if len(planes) == 1 else 8
        codes = every if len(planes) == 1 else every[: sum(planes)]
        exact = reference.dequantize_kv(codes, scale, d, torch.float64)
        eager = reference.dequantize_kv(codes, scale, d, torch.float32)
        assert_within_budget(
            format, kvtools.dequantize_kv(codes, scale, d, impl=impl), exact, eager
        )


@pytest.mark.parametrize("format", QUANTISED)
def test_extremes(format, impl):
    x = torch.zeros(4, 16)
    x[1] = 1e-30
    x[2] = 6e4
    x[3, 3] = -1.0
    back = kvtools.dequantize_kv(*kvtools.quantize_kv(x, format, impl=impl), 16, impl=impl)
    assert torch.isfinite(back).all()
    assert back[:2].abs().max() < 1e-5
    assert (back[2] - x[2]).abs().max() < {"int2": 2e5, "int3": 4e4, "int4": 4e4}.get(format, 6e3)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("format", QUANTISED)
def test_nan_and_infinity_stay(format, value, impl):
    """Such a head comes back as NaN, and no other does; so does one whose rotation overflows."""
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    codes, scale = kvtools.quantize_kv(x, format, impl=impl)
    x[1, 7], x[4] = value, value
    again, bad = kvtools.quantize_kv(x, format, impl=impl)
    zero, _ = kvtools.quantize_kv(torch.zeros(1, 24), format, impl=impl)
    hit = torch.tensor([False, value != 3e38, False, False, True])
    assert torch.equal(bad.isnan(), hit)
    good = torch.tensor([True, False, True, True, False])
    assert torch.equal(again.view(torch.uint8)[good], codes.view(torch.uint8)[good])
    assert torch.equal(bad[good], scale[good])
    sign = 0x7F if format == "fp8" else 0xFF  # zeros have one there
    assert ((again.view(torch.uint8)[hit] ^ zero.view(torch.uint8)) & sign == 0).all()
    assert torch.equal(kvtools.dequantize_kv(again, bad, 24, impl=impl).isnan().all(-1), hit)


@pytest.mark.parametrize("format", list(reference.PLANES))
def test_packing_is_by_planes(format):
    planes, d = reference.PLANES[format], 16
    codes = torch.randint(2 ** sum(planes), (5, d)).to(torch.uint8)
    packed = reference.pack(codes, planes)
    assert packed.shape == (5, d * sum(planes) // 8)
    torch.testing.assert_close(reference.unpack(packed, planes), codes)
    start = low = 0
    for bits in planes:  # literally: element i of a run of w bytes is in byte i % w, at i // w
        w = d * bits // 8
        for i in range(d):
            part = packed[:, start + i % w] >> (bits * (i // w)) & (2**bits - 1)
            assert torch.equal(part, codes[:, i] >> low & (2**bits - 1))
        start, low = start + w, low + bits


def make_pages(H, D, k_format, v_format, device, dtype=torch.float32, **options):
    return KVPages.empty(
        4, H, 3, D, k_format=k_format, v_format=v_format, dtype=dtype, device=device, **options
    )


def bytes_of(x):
    """Of a tensor with any strides, in a last axis of their own."""
    return x[..., None].view(torch.uint8)


@pytest.mark.parametrize("k_format,v_format", [(f, f) for f in FORMATS] + [("none", "int4")])
@pytest.mark.parametrize("per_head", [False, True])
def test_append_kv(k_format, v_format, per_head, device, impl):
    T, H, D = 5, 2, 16
    pages = make_pages(H, D, k_format, v_format, device, position=True, importance=True, window=40)
    before = [x.clone() for x in pages.tensors() if x is not None]
    k, v = torch.randn(2, T, H, D, device=device)
    slot = torch.tensor([[7, 1], [0, 2], [-1, -1], [11, 11], [4, 3]], device=device)
    if not per_head:
        slot = slot[:, 0]
    position = torch.arange(20, 20 + T, dtype=torch.int32, device=device)
    kvtools.append_kv(k, v, slot, pages, position, impl=impl)
    slots = slot if per_head else slot[:, None].expand(T, H)
    written = torch.zeros(4, H, 3, dtype=torch.bool, device=device)
    for t in range(T):
        for h in range(H):
            s = int(slots[t, h])
            if s < 0:
                continue
            at = (s // 3, h, s % 3)
            written[at] = True
            for x, content, scale, format in (
                (k, pages.k, pages.k_scale, k_format),
                (v, pages.v, pages.v_scale, v_format),
            ):
                if format == "none":
                    assert torch.equal(content[at], x[t, h])
                else:
                    codes, s16 = kvtools.quantize_kv(x[t, h], format, impl=impl)
                    assert torch.equal(content[at].view(torch.uint8), codes.view(torch.uint8))
                    assert scale[at] == s16
            assert pages.position[at] == position[t]
            assert pages.importance[at] == 0 and (pages.history[at] == 0).all()
    for old, new in zip(before, [x for x in pages.tensors() if x is not None], strict=True):
        keep = ~written
        old, new = (
            x[keep].view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x[keep]
            for x in (old, new)
        )
        torch.testing.assert_close(new, old, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_append_kv_in_threads_and_from_views(format, dtype, device, impl):
    """Bitwise the same, whatever the threads and strides; int32 slots."""
    T, H, D = 320 // FEWER.get(impl, 1), 3, 24
    k, v = torch.randn(2, T, H, D, device=device).to(dtype)
    slot = torch.randperm(T, device=device).int()
    position = torch.arange(T, dtype=torch.int32, device=device)

    def append(k, v):
        pages = KVPages.empty(-(-T // 4), H, 4, D, k_format=format, v_format="int4", dtype=dtype,
                              device=device, position=True)  # fmt: skip
        kvtools.append_kv(k, v, slot, pages, position, impl=impl)
        return pages.tensors()

    one = append(k, v)
    views = append(k.mT.contiguous().mT, v.transpose(0, 1).contiguous().transpose(0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    two = append(k, v)
    torch.set_num_threads(before)
    for x, y, z in zip(one, two, views, strict=True):
        if x is not None:
            x, y, z = (a.contiguous().view(torch.uint8) for a in (x, y, z))
            # The reference rotates by a matrix product, which may round otherwise.
            assert impl == "reference" or (torch.equal(x, y) and torch.equal(x, z))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_kv_casts_to_the_pages_dtype(dtype, device, impl):
    k, v = torch.randn(2, 4, 2, 20, device=device) * 1e3
    k[0, 0, :4] = torch.tensor([1e-7, -1e-40, 1e6, -0.0])
    pages = make_pages(2, 20, "none", "none", device, dtype)
    kvtools.append_kv(k, v, torch.arange(4, device=device), pages, impl=impl)
    assert torch.equal(pages.k[0].transpose(0, 1), k[:3].to(dtype))
    assert torch.equal(pages.v[1, :, 0], v[3].to(dtype))


def test_append_kv_into_foreign_layouts(device, impl):
    """vLLM's [blocks, Hkv, block, 2 D] and SGLang's [slots, Hkv, D] are views."""
    k, v = torch.randn(2, 4, 2, 8, device=device)
    slot = torch.tensor([5, 0, 9, 2], device=device)
    vllm = torch.zeros(5, 2, 2, 16, device=device)
    kvtools.append_kv(k, v, slot, KVPages(vllm[..., :8], vllm[..., 8:]), impl=impl)
    sglang = torch.zeros(2, 10, 2, 8, device=device)
    view = sglang.view(2, 10, 1, 2, 8).transpose(2, 3)
    kvtools.append_kv(k, v, slot, KVPages(view[0], view[1]), impl=impl)
    for t, s in enumerate(slot.tolist()):
        assert torch.equal(vllm[s // 2, :, s % 2], torch.cat([k[t], v[t]], -1))
        assert torch.equal(sglang[:, s], torch.stack([k[t], v[t]]))


PLACES = [  # formats of K and V in two places, dtypes of tokens, of the places, and of frames
    (("int4", "int8"), ("int8", "none"), torch.bfloat16, torch.float16, torch.float32),
    (("none", "fp8"), ("int3", "int3"), torch.float32, torch.bfloat16, torch.bfloat16),
    (("none", "none"), ("none", "none"), torch.float16, torch.float32, torch.float16),
    (("int2", "none"), ("int2", "int6"), torch.float16, torch.float16, torch.float32),
]


@pytest.mark.parametrize("D", [24, 20])
@pytest.mark.parametrize("framed", [False, True])
@pytest.mark.parametrize("first,second,dtype,paged,frames", PLACES)
def test_append_kv_to_two_places(first, second, dtype, paged, frames, framed, D, device, impl):
    """As two calls would, and keys as if framed before in fp32; what is skipped in one place is
    written to the other all the same."""
    T, H = 6, 2
    if D % 8:  # only unquantised
        first = second = ("none", "none")
    k, v = torch.randn(2, T, H, D, device=device).to(dtype)
    slot = torch.tensor([7, -1, 0, -1, 11, 3], device=device)
    also = torch.tensor([[5, 1], [2, -4], [0, 3], [-1, -1], [9, 9], [-2, 6]], device=device)
    position = torch.arange(20, 20 + T, dtype=torch.int32, device=device)
    frame_t = torch.tensor([2, 0, 1, 2, 1, 0], dtype=torch.int32, device=device)
    frame = torch.randn(3, 2, H, D, device=device).to(frames)
    gain = 1.5 + frame[:, 1].tanh()
    frame[:, 1] = gain

    def places():
        one = make_pages(H, D, *first, device, paged, position=True, importance=True, window=3)
        two = KVPages.empty(
            2, H, 5, D, k_format=second[0], v_format=second[1], dtype=paged, device=device,
            position=True, importance=True, window=3,
        )  # fmt: skip
        for x in (*one.tensors(), *two.tensors()):
            if x is not None:
                bytes_of(x).fill_(0x55)
        return one, two

    actual, expected = places(), places()
    how = dict(frame=frame, frame_t=frame_t) if framed else {}
    kvtools.append_kv(k, v, slot, actual[0], position, also=(also, actual[1]), impl=impl, **how)
    if framed:
        center, gain = frame[frame_t.long()].float().unbind(1)
        k, v = (k.float() - center) * gain, v.float()
    kvtools.append_kv(k, v, slot, expected[0], position, impl=impl)
    content = KVPages(*expected[1].tensors()[:4])
    kvtools.append_kv(k, v, also, content, impl=impl)
    for got, wanted in zip(actual, expected, strict=True):
        for x, y in zip(got.tensors(), wanted.tensors(), strict=True):
            assert x is None or torch.equal(bytes_of(x), bytes_of(y))


@pytest.mark.parametrize("format", ["none", "fp8", "int4"])
def test_append_kv_of_skipped_tokens_alone(format, device, impl):
    """As a server's warm-up has them; some, and as many as a kernel takes at once and more."""
    for T in (1, 40):
        pages = make_pages(2, 24, format, format, device)
        before = [bytes_of(x).clone() for x in pages.tensors() if x is not None]
        k, v = torch.randn(2, T, 2, 24, device=device)
        kvtools.append_kv(k, v, torch.full((T,), -1, device=device), pages, impl=impl)
        after = [bytes_of(x) for x in pages.tensors() if x is not None]
        assert all(map(torch.equal, after, before))


@pytest.mark.only(when=lambda impl: impl in ("reference", "cpu"))
def test_append_kv_names_ids_out_of_range(impl):
    k = torch.randn(2, 1, 8)
    one, two = (KVPages.empty(pages, 1, 3, 8) for pages in (4, 2))
    for x in (*one.tensors()[:2], *two.tensors()[:2]):
        x.zero_()
    slot, frame = torch.arange(2), torch.ones(3, 2, 1, 8)
    bad = {
        "also holds slot 6": dict(also=(slot + 5, two)),
        "frame_t holds": dict(frame=frame, frame_t=torch.tensor([0, 3], dtype=torch.int32)),
        "frame_t holds .*3 frames": dict(
            frame=frame, frame_t=torch.tensor([-1, 2], dtype=torch.int32)
        ),
    }
    for message, how in bad.items():
        with pytest.raises((RuntimeError, IndexError), match=message):
            kvtools.append_kv(k, k, slot, one, impl=impl, **how)
    assert not one.k.any() and not two.k.any()  # nothing is written in part


@pytest.mark.only(when=lambda impl: impl == "cuda")
def test_append_kv_stays_in_memory_where_frames_do_not_exist(device, impl):
    k = torch.randn(4, 1, 8, device=device)
    slot, frame = torch.arange(4, device=device), torch.rand(3, 2, 1, 8, device=device)
    for ids in ([3, -1, 1, 2], [2**31 - 1, -(2**31), 0, 4]):
        frame_t = torch.tensor(ids, dtype=torch.int32, device=device)
        one, two = (make_pages(1, 8, "none", "none", device) for _ in range(2))
        kvtools.append_kv(k, k, slot, one, frame=frame, frame_t=frame_t, impl=impl)
        kvtools.append_kv(k, k, slot, two, frame=frame, frame_t=frame_t.clamp(0, 2), impl=impl)
        torch.testing.assert_close(one.k, two.k, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("format", ["none", "fp8", "int6"])
def test_append_kv_into_spread_out_pages(format, device, impl):
    """Any strides of page, head and slot, in all seven tensors."""
    k, v = torch.randn(2, 12, 2, 24, device=device)
    slot = torch.randperm(12, device=device)
    position = torch.arange(12, dtype=torch.int32, device=device)
    plain = make_pages(2, 24, format, format, device, position=True, importance=True, window=40)
    kvtools.append_kv(k, v, slot, plain, position, impl=impl)
    wholes, views = [], []
    for x in plain.tensors():
        if x is not None:
            p, h, s, *last = x.shape
            whole = torch.zeros(s, p, 2 * h, *(n + 3 for n in last), device=device).to(x.dtype)
            wholes.append(whole)
            view = whole[:, :, ::2].movedim(0, 2)
            x = view[..., : last[0]] if last else view
        views.append(x)
    kvtools.append_kv(k, v, slot, KVPages(*views), position, impl=impl)
    views = [x for x in views if x is not None]
    for x, view, whole in zip(filter(torch.is_tensor, plain.tensors()), views, wholes, strict=True):
        x, y = (a.contiguous().view(torch.uint8) for a in (x, view))
        assert torch.equal(x, y)
        view.zero_()
        assert not whole.view(torch.uint8).any()


@pytest.mark.parametrize("formats", [("int4", "fp8"), ("int8", "none"), ("none", "int2")])
def test_scales_of_a_slot_are_one_word(formats, device):
    """Where keys and values have some, also of pages that have grown."""
    pages = make_pages(2, 24, *formats, device)
    content = [None if x is None else x.zero_() for x in (pages.k_scale, pages.v_scale)]
    for x in filter(torch.is_tensor, content):
        x += torch.arange(x.numel(), device=device).view(x.shape)
    before = [None if x is None else x.clone() for x in content]
    for _ in range(2):
        k, v = pages.k_scale, pages.v_scale
        if k is not None and v is not None:
            assert v.data_ptr() == k.data_ptr() + 2 and k.data_ptr() % 4 == 0
            assert k.stride() == v.stride() and k.stride(2) == 2
        for x, y in zip((k, v), before, strict=True):
            assert x is y is None or torch.equal(x[: len(y)], y)
        pages.grow(pages.k.shape[0] + 3)


def test_large_heads(device, impl):
    x = torch.randn(3, 2, 264, device=device)
    pages = make_pages(2, 264, "int4", "int8", device)
    if impl == "cuda":
        with pytest.raises(RuntimeError, match="takes up to 256"):
            kvtools.quantize_kv(x, "int4", impl=impl)
        with pytest.raises(RuntimeError, match="takes up to 256"):
            kvtools.append_kv(x, x, torch.arange(3, device=device), pages, impl=impl)
    else:
        kvtools.append_kv(x, x, torch.arange(3, device=device), pages, impl=impl)
        codes, scale = kvtools.quantize_kv(x, "int4", impl=impl)
        assert torch.equal(pages.k[0].transpose(0, 1), codes)
        assert torch.equal(pages.k_scale[0].T, scale)


def test_pages_grow_and_keep(device):
    pages = make_pages(2, 8, "int4", "none", device, position=True)
    k, v = torch.randn(2, 12, 2, 8, device=device)
    positions = torch.arange(12, dtype=torch.int32, device=device)
    kvtools.append_kv(k, v, torch.arange(12, device=device), pages, positions)
    before = [x if x is None else x.clone() for x in pages.tensors()]
    pages.grow(9)
    for old, new in zip(before, pages.tensors(), strict=True):
        assert (old is None) == (new is None)
        if old is not None:
            assert new.shape[0] == 9 and torch.equal(new[:4], old)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: kvtools.quantize_kv(x, "int5"), "format='int5' does not exist"),
        (lambda x: kvtools.quantize_kv(x, "none"), "unquantised"),
        (lambda x: kvtools.quantize_kv(x[..., :7], "int4"), "head size 7 is not supported"),
        (lambda x: kvtools.quantize_kv(x.int(), "int4"), "x has dtype torch.int32"),
        (lambda x: kvtools.quantize_kv(x.to(torch.float8_e4m3fn), "int4"), "x has dtype torch.fl"),
        (lambda x: kvtools.quantize_kv(x[..., :0], "int4"), "x has shape"),
        (lambda x: kvtools.quantize_kv(x[0, 0, 0], "int4"), "x has shape"),
        (lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0], 8), "scale .* torch.float32"),
        (lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0].half(), 0), "d=0"),
        (lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0].half(), -8), "d=-8"),
        (lambda x: kvtools.dequantize_kv(x.byte()[..., :6], x[..., 0].half(), 12), "d=12"),
        (
            lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0].half(), 8, dtype=torch.int32),
            "dtype=torch.int32",
        ),
        (
            lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0].half().to("meta"), 8),
            "scale on meta",
        ),
        (lambda x: kvtools.dequantize_kv(x, x[..., 0], 8), "hold no format"),
        (
            lambda x: kvtools.dequantize_kv(x.to(torch.uint8), x[0, :, 0], 8),
            r"scale has shape \(2,\)",
        ),
        (lambda x: kvtools.quantize_kv(x, "int4", impl="fast"), "impl='fast': expected one of"),
        (
            lambda x: kvtools.dequantize_kv(x.byte(), x[..., 0].half(), 8, impl="cuda"),
            "impl='cuda' does not exist for",
        ),
        (lambda x: kvtools.quantize_kv(x.requires_grad_(), "int4"), "inference only"),
    ],
)
def test_quantize_kv_raises(call, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        call(torch.randn(3, 2, 8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("k_format", ["none", "int3", "fp8"])
def test_append_kv_writes_nothing_outside(k_format, dtype, device, impl):
    """Negative slots are skipped, head by head; one beyond the pages is an error on a CPU, and
    skipped where kernels run on a GPU."""
    around = KVPages.empty(6, 2, 3, 8, k_format=k_format, v_format="none", device=device,
                           position=True, importance=True, window=9)  # fmt: skip
    for x in around.tensors():
        if x is not None:
            bytes_of(x).fill_(0x55)
    before = [None if x is None else bytes_of(x).clone() for x in around.tensors()]
    pages = KVPages(*(None if x is None else x[1:5] for x in around.tensors()))
    k = torch.randn(4, 2, 8, device=device)
    position = torch.arange(4, device=device)

    def append(slot):
        slot = torch.tensor(slot, dtype=dtype, device=device)
        kvtools.append_kv(k, k, slot, pages, position, impl=impl)

    append([[0, -1], [-1, 4], [-7, -(2**31)], [11, 11]])
    written = torch.zeros(6, 2, 3, dtype=torch.bool, device=device)
    written[1, 0, 0] = written[2, 1, 1] = written[4, :, 2] = True
    for x, old in zip(around.tensors(), before, strict=True):
        if x is not None:
            same = (bytes_of(x) == old).reshape(6, 2, 3, -1).all(-1)
            assert torch.equal(same, ~written)
    beyond = [[12, 1], [2, 13], [3, 2**31 - 1], [-1, 12]]
    if impl in ("reference", "cpu"):
        with pytest.raises((RuntimeError, IndexError), match="slot holds slot 1"):
            append(beyond[:1] * 4)
        return
    append(beyond)
    written[1, 1, 1] = written[1, 0, 2] = written[2, 0, 0] = True
    for x, old in zip(around.tensors(), before, strict=True):
        if x is not None:
            same = (bytes_of(x) == old).reshape(6, 2, 3, -1).all(-1)
            assert torch.equal(same, ~written)


def test_append_kv_raises():
    pages = KVPages.empty(4, 2, 3, 8, k_format="int4", position=True)
    k = torch.randn(3, 2, 8)
    slot, position = torch.arange(3), torch.arange(3, dtype=torch.int32)
    page = pages.k[..., 0]
    cases = {
        "v_thd has shape": (k, k[:2], slot, pages, position),
        "k_thd .*expected": (k[0], k[0], slot, pages, position),
        "k_thd has 1 heads": (k[:, :1], k[:, :1], slot, pages, position),
        "share a floating point": (k, k.half(), slot, pages, position),
        "slot must be int32": (k, k, slot.float(), pages, position),
        "slot must be .*got torch.int64": (k, k, slot[:2], pages, position),
        "position_t of shape": (k, k, slot, pages),
        "position_t of .*int32 or int64": (k, k, slot, pages, position.float()),
        "heads of size 16 need": (*[torch.randn(3, 2, 16)] * 2, slot, pages, position),
        "heads are of size 0": (k[..., :0], k[..., :0], slot, pages, position),
        "k_scale of shape": (k, k, slot, KVPages(pages.k, pages.v), position),
        "k_scale .*fp16": (k, k, slot, replace(pages, k_scale=pages.k_scale.float()), position),
        "v_scale is given": (k, k, slot, replace(pages, v_scale=pages.k_scale), position),
        "contiguous in its last axis": (
            k, k, slot, KVPages(torch.zeros(4, 2, 8, 3).mT, torch.zeros(4, 2, 3, 8)),
        ),
        "pages.position is": (k, k, slot, replace(pages, position=page[:3].int()), position),
        "pages.importance is": (k, k, slot, replace(pages, importance=page[:3].float()), position),
        "pages.importance is .*uint8": (k, k, slot, replace(pages, importance=page), position),
        "pages.history is": (k, k, slot, replace(pages, history=pages.k[:3].int()), position),
        "pages.k has shape": (k[:, :0], k[:, :0], slot, replace(pages, k=pages.k[:, :0]), position),
        "slot_th on meta": (k, k, slot.to("meta"), pages, position),
        "position_t on meta": (k, k, slot, pages, position.to("meta")),
        "v_thd on meta": (k, k.to("meta"), slot, pages, position),
        "k_scale on meta": (
            k, k, slot, replace(pages, k_scale=pages.k_scale.to("meta")), position,
        ),
    }  # fmt: skip
    kvtools.append_kv(k, k, slot, pages, position)
    for message, args in cases.items():
        with pytest.raises(ValueError, match=message):
            kvtools.append_kv(*args)
    frame, frame_t = torch.ones(2, 2, 2, 8), torch.zeros(3, dtype=torch.int32)
    other = KVPages.empty(2, 1, 3, 8)
    for message, how in {
        "also must be int32": dict(also=(slot.float(), pages)),
        "also must be .*got torch.int64": dict(also=(slot[:2], pages)),
        "k_thd has 2 heads, the pages have 1": dict(also=(slot, other)),
        "k_scale of shape": dict(also=(slot, KVPages(pages.k, pages.v))),
        "also_th on meta": dict(also=(slot.to("meta"), pages)),
        "give both or none": dict(frame=frame),
        "frame and frame_t": dict(frame_t=frame_t),
        "frame is torch.int32": dict(frame=frame.int(), frame_t=frame_t),
        r"expected floating point \[frames, 2, 2, 8\]": dict(frame=frame[:, :1], frame_t=frame_t),
        "frame holds no frames": dict(frame=frame[:0], frame_t=frame_t),
        "frame_t has shape .*int64": dict(frame=frame, frame_t=frame_t.long()),
        "frame_t has shape": dict(frame=frame, frame_t=frame_t[:2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            kvtools.append_kv(k, k, slot, pages, position, **how)


@pytest.mark.long_if(when=lambda again: again)
@pytest.mark.parametrize("format", QUANTISED)
def test_quant_contract(format, device, opcheck):
    x = torch.randn(3, 2, 8, device=device)
    # The schema test compares by arithmetic that float8 does not have.
    every = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    checks = {"test_utils": every[1:] if format == "fp8" else every}
    opcheck("quantize_kv", (x, format), **checks)
    pages = make_pages(2, 8, format, format, device, position=True, importance=True, window=3)
    for tensor in pages.tensors():
        bytes_of(tensor).zero_()
    slot = torch.tensor([[3, 1], [0, 2], [4, 4]], device=device)
    position = torch.arange(3, dtype=torch.int32, device=device)
    k, v, k_scale, v_scale, *rest = pages.tensors()
    args = (x, x, slot, k, v, k_scale, v_scale, position, *rest)
    opcheck("append_kv", (*args, *[None] * 7), **checks)
    copy = [x.clone() for x in (k, v, k_scale, v_scale)]
    frame, frame_t = torch.ones(2, 2, 2, 8, device=device), position % 2
    opcheck("append_kv", (*args, slot, *copy, frame, frame_t), **checks)
    codes, scale = kvtools.quantize_kv(x, format)
    opcheck("dequantize_kv", (codes, scale, 8, torch.float32), **checks)


def test_quant_compiles(device):
    quantize = torch.compile(kvtools.quantize_kv, fullgraph=True, dynamic=True, backend="eager")
    back = torch.compile(kvtools.dequantize_kv, fullgraph=True, dynamic=True, backend="eager")
    append = torch.compile(kvtools.append_kv, fullgraph=True, dynamic=True, backend="eager")
    for T in (3, 5):
        x = torch.randn(T, 2, 8, device=device)
        codes, scale = quantize(x, "int4")
        assert torch.equal(codes, kvtools.quantize_kv(x, "int4")[0])
        torch.testing.assert_close(back(codes, scale, 8), kvtools.dequantize_kv(codes, scale, 8))
        one, two = (KVPages.empty(3, 2, 2, 8, device=device) for _ in range(2))
        append(x, x, torch.arange(T, device=device), one)
        kvtools.append_kv(x, x, torch.arange(T, device=device), two)
        torch.testing.assert_close(one.k, two.k, equal_nan=True)
