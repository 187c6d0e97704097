"""Rotate, quantise and store keys and values."""

import operator
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from ..reference import quant as reference
from . import Impl, Op, check

INTEGERS = (torch.int32, torch.int64)
FORMATS = ("none", "fp8", "int8", "int6", "int4", "int3", "int2")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TENSORS = ("k", "v", "k_scale", "v_scale", "position", "importance", "history")
width = reference.width  # (format, D): the last axis of pages
EMPTY = 2**31 - 1  # position of a slot that holds no token: after every query, so never seen


@dataclass
class KVPages:
    """One layer's pages. Any page can hold any tokens; a flat slot is `page * page_size + offset`.

    Every tensor has the axes page, KV head and slot first, with any strides; only the last axis of
    `k`, `v` and `history` must be contiguous, so that the caches of other servers are views.

    Attributes:
        k, v: [pages, Hkv, page_size, D] in a float dtype or fp8 (float8_e4m3fn); uint8 with a last
            axis of n D / 8 for n bits (int8, int6, int4, int3, int2). K and V may differ. Quantised
            formats are rotated.
        k_scale, v_scale: [pages, Hkv, page_size] fp16, one scale per token and head; None if
            unquantised. Where both lie in one tensor [pages, Hkv, page_size, 2], as those of
            `empty` do, kernels read them together.
        position: [pages, Hkv, page_size] int32, true token position; None means "in order".
        importance: [pages, Hkv, page_size] fp32, attention received so far; None if no policy needs
            it.
        history: [pages, Hkv, page_size, ceil(w / 32)] int32, a ring of w bits: bit `position % w`
            tells whether the query at that position gave the token less than the mean attention.
            None if not needed.
        recent: these are the newest tokens of rows, where pages of another format hold the others:
            see `before_t` of `tree_attention`.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    position: Tensor | None = None
    importance: Tensor | None = None
    history: Tensor | None = None
    recent: bool = False
    # The head size and tensors that were found to fit, and what operators take of one store of
    # several: the first five, empty where absent.
    _checked: tuple[int, tuple, list] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    @classmethod
    def empty(
        cls,
        pages: int,
        heads: int,
        page_size: int,
        d: int,
        *,
        k_format: str = "none",
        v_format: str = "none",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        position: bool = False,
        importance: bool = False,
        window: int = 0,
    ) -> "KVPages":
        """Pages without content. `window` > 0 adds a history of that many steps."""

        def new(dtype: torch.dtype, *last: int) -> Tensor:
            return torch.empty(pages, heads, page_size, *last, dtype=dtype, device=device)

        def codes(format: str) -> Tensor:
            check_format(format, d)
            if format == "none":
                return new(dtype, d)
            kind = torch.float8_e4m3fn if format == "fp8" else torch.uint8
            return new(kind, reference.width(format, d))

        k_scale = v_scale = None
        if "none" not in (k_format, v_format):
            k_scale, v_scale = _paired(new(torch.float16, 2))
        elif k_format != v_format:
            scale = new(torch.float16)
            k_scale, v_scale = (scale, None) if v_format == "none" else (None, scale)
        return cls(
            codes(k_format),
            codes(v_format),
            k_scale,
            v_scale,
            new(torch.int32) if position else None,
            new(torch.float32) if importance else None,
            new(torch.int32, -(-window // 32)) if window else None,
        )

    @property
    def page_size(self) -> int:
        return self.k.shape[2]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of TENSORS."""
        content = self.k, self.v, self.k_scale, self.v_scale
        return *content, self.position, self.importance, self.history

    def grow(self, pages: int) -> None:
        """Enlarge every tensor to `pages` pages, keeping the content; all of them or, where memory
        ends, none."""
        old = {name: x for name in TENSORS if (x := getattr(self, name)) is not None}
        old = {name: x for name, x in old.items() if pages > x.shape[0]}
        grown = {}
        if "k_scale" in old and "v_scale" in old:
            scale = old["k_scale"]
            both = torch.empty(pages, *scale.shape[1:], 2, dtype=scale.dtype, device=scale.device)
            grown["k_scale"], grown["v_scale"] = _paired(both)
        for name, x in old.items():
            if name not in grown:
                grown[name] = torch.empty(pages, *x.shape[1:], dtype=x.dtype, device=x.device)
            grown[name][: x.shape[0]] = x
        vars(self).update(grown, _checked=None)

    def packed(self, prefix: str = "", page: Tensor | None = None) -> dict[str, Tensor]:
        """Copies of the tensors of `page`s, or all, on the CPU, by `prefix` and name."""
        parts = {}
        for name, x in zip(TENSORS, self.tensors(), strict=True):
            if x is not None:
                narrow = x.view(torch.uint8) if x.itemsize == 1 else x  # float8 has no index
                some = narrow.clone() if page is None else narrow[page]
                parts[prefix + name] = some.view(x.dtype).cpu().contiguous()
        return parts

    def unpack(self, parts: dict[str, Tensor], prefix: str = "") -> None:
        """Take the content that others of the same sizes had `packed`.

        Raises:
            KeyError, ValueError: a tensor is not there, or does not fit.
        """
        for name, x in zip(TENSORS, self.tensors(), strict=True):
            if x is not None:
                x.copy_(fitting(parts, prefix + name, x.shape, x.dtype))


def fitting(
    parts: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """One of packed tensors, which must be of this shape and dtype."""
    x = parts[name]
    if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}, not {dtype} {list(shape)}")
    return x


def packed_for(
    parts: dict[str, Tensor], prefix: str, k_format: str, v_format: str
) -> tuple[int, int, torch.dtype]:
    """KV heads, head size and dtype of the model whose packed pages these are."""
    k, v = parts[prefix + "k"], parts[prefix + "v"]
    bits = int(k_format[3:]) if k_format.startswith("int") else 8
    d = k.shape[-1] * 8 // bits
    return k.shape[1], d, (k if k_format == "none" else v).dtype


def _paired(both: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of keys and of values side by side, in one 32-bit word that a kernel reads at once."""
    k_scale, v_scale = both.unbind(-1)
    if both.is_meta:
        return k_scale, v_scale
    # No element is shared, so none of torch's storages need be: torch.compile with dynamic shapes
    # fails at mutated views of one storage where another axis is 2 long, too (torch 2.13).
    return k_scale, torch.from_dlpack(v_scale)


def check_format(format: str, d: int) -> None:
    """Raise ValueError unless `format` exists and can hold heads of size `d`."""
    check(
        format in FORMATS,
        lambda: f"format={format!r} does not exist; expected one of {', '.join(FORMATS)}",
    )
    check(
        format == "none" or d % 8 == 0,
        lambda: (
            f"head size {d} is not supported by format={format!r}: it must be a multiple of 8; "
            "keep it at 16 bits (format='none')"
        ),
    )


def _fake_quantize(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float8_e4m3fn if format == "fp8" else torch.uint8
    codes = x.new_empty(*x.shape[:-1], reference.width(format, x.shape[-1]), dtype=dtype)
    return codes, x.new_empty(x.shape[:-1], dtype=torch.float16)


_quantize_kv = Op(
    "quantize_kv",
    "(Tensor x, str format) -> (Tensor, Tensor)",
    _fake_quantize,
    reference=reference.quantize_kv,
)
_dequantize_kv = Op(
    "dequantize_kv",
    "(Tensor codes, Tensor scale, int d, ScalarType dtype) -> Tensor",
    lambda codes, scale, d, dtype: codes.new_empty(*codes.shape[:-1], d, dtype=dtype),
    reference=reference.dequantize_kv,
)
_append_kv = Op(
    "append_kv",
    "(Tensor k_thd, Tensor v_thd, Tensor slot_th, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, "
    "Tensor(d!)? v_scale, Tensor? position_t, Tensor(e!)? position, Tensor(f!)? importance, "
    "Tensor(g!)? history, Tensor? also_th, Tensor(h!)? also_k, Tensor(i!)? also_v, "
    "Tensor(j!)? also_k_scale, Tensor(k!)? also_v_scale, Tensor? frame, Tensor? frame_t) -> ()",
    lambda *args: None,
    reference=reference.append_kv,
)


def quantize_kv(x: Tensor, format: str, *, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Rotate heads by a randomised Hadamard transform and quantise each with one scale.

    Equivalent to:

        y = x @ rotation;  codes, s = argmin |s level(codes) - y|², over a few ranges for `codes`
        int n bits: level(code) = c (1 + b (c / c_max)²), c = code - c_max, c_max = (2ⁿ - 1) / 2,
            b = 0.5 for 6 and 4 bits, 0.4 for 3, 0 for 8 and 2
        fp8: code = e4m3(y / s), s = max|y| / 448

    Args:
        x: keys or values [..., D]. fp64, fp32, fp16 or bf16; D a multiple of 8.
        format: "fp8", "int8", "int6", "int4", "int3" or "int2".
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Returns:
        codes [..., D · bits / 8]: float8_e4m3fn, or uint8 with one run of bytes per bit plane: of 4
            and 2 bits for int6, 2 and 1 for int3, one plane otherwise, lowest bits first. Byte j of
            a run of w bytes holds elements j, j + w, ..., lowest bits first.
        scale [...]: fp16. Zero vectors get the smallest. A vector that holds NaN or infinity, or
            whose rotation overflows, gets NaN and the codes of zeros: all of it comes back as NaN.

    Numerics: computed in fp32 (fp64 for fp64). A vector's bits do not depend on its batch. Scales
        saturate at 65504: fp8 at 448 times that, integers at their greatest level times that.

    Reference: QuaRot, arXiv:2404.00456 (rotation); TurboQuant, arXiv:2504.19874 (non-uniform levels
        after it); the search of ranges is the usual least-squares clipping.
    """
    check(format != "none", "format='none' is unquantised; name another of FORMATS")
    check(
        x.dim() > 0 and x.shape[-1] > 0, lambda: f"x has shape {tuple(x.shape)}: no head [..., D]"
    )
    check_format(format, x.shape[-1])
    check(
        x.dtype in FLOATS,
        lambda: f"x has dtype {x.dtype}; quantize_kv takes heads in fp64, fp32, fp16 or bf16",
    )
    return _quantize_kv(impl, x, format)


def dequantize_kv(
    codes: Tensor, scale: Tensor, d: int, *, dtype: torch.dtype = torch.float32, impl: Impl = "auto"
) -> Tensor:
    """Undo `quantize_kv`: decode and rotate back.

    Equivalent to:

        x = decode(codes, scale) @ rotation.T

    Args:
        codes: as `quantize_kv` returned them; the format is read off the dtype and the last axis.
        scale: [...] fp16.
        d: head size of the result.
        dtype: of the result.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64.

    Returns:
        x [..., d].

    Numerics: computed in fp32 (fp64 if `dtype` is fp64). A NaN in scale or in a code of fp8 makes
        all of its vector NaN.
    """
    check(
        codes.dtype in (torch.uint8, torch.float8_e4m3fn)
        and codes.dim() > 0
        and d > 0
        and d % 8 == 0
        and codes.shape[-1] in widths(codes, d),
        lambda: (
            f"codes of dtype {codes.dtype} and last axis {codes.shape[-1]} hold no format of head "
            f"size d={d}"
        ),
    )
    check(
        scale.shape == codes.shape[:-1] and scale.dtype == torch.float16,
        lambda: (
            f"scale has shape {tuple(scale.shape)} and dtype {scale.dtype}, expected "
            f"{tuple(codes.shape[:-1])}, torch.float16"
        ),
    )
    check(
        dtype in FLOATS,
        lambda: f"dtype={dtype}: expected torch.float64, float32, float16, bfloat16",
    )
    return _dequantize_kv(impl, codes, scale, d, dtype)


def append_kv(
    k_thd: Tensor,
    v_thd: Tensor,
    slot: Tensor,
    pages: KVPages,
    position_t: Tensor | None = None,
    *,
    also: tuple[Tensor, KVPages] | None = None,
    frame: Tensor | None = None,
    frame_t: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Write new tokens into pages, packed.

    Equivalent to:

        for each token t and head h:
            k[t, h] = (k[t, h] - frame[frame_t[t], 0, h]) * frame[frame_t[t], 1, h]
            pages[slot[t, h]] = quantize_kv(k[t, h]), quantize_kv(v[t, h])

    Args:
        k_thd: keys, after RoPE. fp64, fp32, fp16 or bf16.
        v_thd: values, dtype of `k_thd`.
        slot: flat slots, [t] for all heads alike or [t, h]. int32 or int64; distinct. What has a
            negative slot is skipped. A slot that the pages do not have is an IndexError on a CPU,
            and is skipped where raising would have to wait for the device.
        pages: where to; changed in place. `importance` and `history` of the slots become zero.
        position_t: true positions, int32 or int64; required where `pages.position` exists.
        also: slots as `slot`, and pages of any format, where the tokens are written a second time.
            Of these pages positions, importance and history stay as they are.
        frame: [frames, 2, Hkv, D] centers and gains that keys are stored with; floating point. See
            `tree_attention`, which needs the same.
        frame_t: [t] the frame of each token, int32; required with `frame`. One that does not exist
            is an IndexError on a CPU, and undefined, but within memory, where raising would have to
            wait.
        impl: "auto" takes Triton on a CUDA device, the C++ kernel on a CPU, the reference elsewhere
            and for fp64. "cuda" is CUDA C++; whether and where it beats Triton is not measured yet.

    Numerics: as `quantize_kv`, which says what becomes of NaN and infinity; unquantised pages take
        a cast. Frames are applied in fp32 (fp64 for fp64), and the result is not rounded before it
        is stored.
    """
    # Not `check`: no message is made here unless it is needed. The operator looks at devices.
    if k_thd.dim() != 3 or v_thd.shape != k_thd.shape:
        raise ValueError(
            f"v_thd has shape {tuple(v_thd.shape)}, k_thd {tuple(k_thd.shape)}; expected "
            "[tokens, heads, D]"
        )
    t, h, d = k_thd.shape
    if k_thd.dtype not in FLOATS or k_thd.dtype != v_thd.dtype:
        raise ValueError("k_thd and v_thd must share a floating point dtype")
    slot_th = _slots("slot", slot, pages, t, h, d)
    if pages.position is not None and (
        position_t is None or position_t.shape != (t,) or position_t.dtype not in INTEGERS
    ):
        raise ValueError(
            f"position_t of shape [{t}], int32 or int64, is needed: these pages store positions"
        )
    second = (None,) * 5
    if also is not None:
        slots, copy = also
        second = _slots("also", slots, copy, t, h, d), *copy.tensors()[:4]
    check_frame(frame, frame_t, t, h, d)
    k, v, k_scale, v_scale, position, importance, history = pages.tensors()
    _append_kv(
        impl, k_thd, v_thd, slot_th, k, v, k_scale, v_scale, position_t, position, importance,
        history, *second, frame, frame_t,
    )  # fmt: skip


def _slots(name: str, slot: Tensor, pages: KVPages, t: int, h: int, d: int) -> Tensor:
    check_pages(pages, d)
    if h != pages.k.shape[1]:
        raise ValueError(f"k_thd has {h} heads, the pages have {pages.k.shape[1]}")
    if (slot.shape != (t,) and slot.shape != (t, h)) or slot.dtype not in INTEGERS:
        raise ValueError(
            f"{name} must be int32 or int64 of shape [{t}] or [{t}, {h}], got {slot.dtype} "
            f"{tuple(slot.shape)}"
        )
    return slot[:, None].expand(t, h) if slot.dim() == 1 else slot


def check_frame(frame: Tensor | None, frame_t: Tensor | None, t: int, heads: int, d: int) -> None:
    """Raise ValueError unless both are absent, or fit `t` tokens and heads of size `d`."""
    if (frame is None) != (frame_t is None):
        raise ValueError("frame and frame_t come together: give both or none")
    if frame is None:
        return
    if frame.dtype not in FLOATS or frame.dim() != 4 or frame.shape[1:] != (2, heads, d):
        raise ValueError(
            f"frame is {frame.dtype} {tuple(frame.shape)}, expected floating point "
            f"[frames, 2, {heads}, {d}]"
        )
    if t and not frame.shape[0]:
        raise ValueError("frame holds no frames")
    if frame_t.shape != (t,) or frame_t.dtype != torch.int32:
        raise ValueError(
            f"frame_t has shape {tuple(frame_t.shape)} and dtype {frame_t.dtype}, expected {(t,)}, "
            "int32"
        )


def widths(codes: Tensor, d: int) -> list[int]:
    """Last axes that `codes` of this dtype may have."""
    if codes.dtype != torch.uint8:
        return [d]
    return [reference.width(format, d) for format in reference.PLANES]


def check_pages(pages: KVPages, d: int) -> None:
    """Raise ValueError unless `pages` is consistent and holds heads of size `d`."""
    known, tensors = pages._checked, pages.tensors()
    if known is not None and known[0] == d and all(map(operator.is_, tensors, known[1])):
        return
    shape = pages.k.shape
    if len(shape) != 4 or 0 in shape[1:3] or d == 0:
        raise ValueError(
            f"pages.k has shape {tuple(shape)}, expected [pages, Hkv, page_size, D] with heads, "
            f"slots and elements; heads are of size {d}"
        )
    lead = shape[:3]
    _check_content("k", pages.k, pages.k_scale, lead, d)
    _check_content("v", pages.v, pages.v_scale, lead, d)
    position, importance, history = pages.position, pages.importance, pages.history
    if position is not None and (position.shape != lead or position.dtype != torch.int32):
        _misfit("position", position, lead, torch.int32)
    if importance is not None and (importance.shape != lead or importance.dtype != torch.float32):
        _misfit("importance", importance, lead, torch.float32)
    if history is not None and (
        history.dim() != 4 or history.shape[:3] != lead or history.dtype != torch.int32
        or (history.stride(-1) != 1 and history.shape[-1] != 1)
    ):  # fmt: skip
        _misfit("history", history, (*lead, "words"), torch.int32)
    nothing = pages.k.new_empty(0)
    pages._checked = d, tensors, [nothing if x is None else x for x in tensors[:5]]


def _check_content(name: str, x: Tensor, scale: Tensor | None, lead: torch.Size, d: int) -> None:
    shape, dtype = x.shape, x.dtype
    if len(shape) != 4 or shape[:3] != lead:
        raise ValueError(f"pages.{name} has shape {tuple(shape)}, expected {(*lead, d)}")
    quantised = dtype == torch.uint8 or dtype == torch.float8_e4m3fn
    if not quantised and dtype not in FLOATS:
        raise ValueError(
            f"pages.{name} has dtype {dtype}, expected fp64, fp32, fp16, bf16, float8_e4m3fn or "
            "uint8"
        )
    if x.stride(-1) != 1 and shape[-1] != 1:
        raise ValueError(f"pages.{name} must be contiguous in its last axis")
    if (quantised and d % 8) or shape[-1] not in widths(x, d):
        raise ValueError(
            f"pages.{name} of dtype {dtype} has a last axis of {shape[-1]}; heads of size "
            f"{d} need one of {widths(x, d)}, and a multiple of 8 if quantised"
        )
    if quantised and (scale is None or scale.shape != lead or scale.dtype != torch.float16):
        raise ValueError(
            f"pages.{name}_scale of shape {tuple(lead)} in fp16 is needed: pages.{name} is "
            "quantised"
        )
    if not quantised and scale is not None:
        raise ValueError(f"pages.{name}_scale is given, but pages.{name} is unquantised")


def _misfit(name: str, x: Tensor, shape: tuple, dtype: torch.dtype) -> NoReturn:
    raise ValueError(
        f"pages.{name} is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}, expected "
        f"{dtype} of shape {tuple(shape)}, contiguous in axes behind the third"
    )
