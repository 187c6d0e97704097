// Pieces of 16 slots of a page, of heads and formats that are known at compile time: how a warp
// brings them to shared memory, and how codes become operands of products there.
#pragma once

#include "attention.h"

namespace kvtools::cuda {

constexpr int kPiece = 16;
constexpr unsigned kHalves = 0x10001;
// Weights are relative to a base that follows the greatest score only when that is greater by
// kMargin: nearly all tiles find it where it is, and weights stay far below the greatest fp16.
constexpr float kMargin = 8;  // of the exponent

// Numbers of 16 bits, as they are.
template <class T>
struct Plain {
  using Operand = T;
  static constexpr int kBits = 16, kParts = 1;
  static constexpr float kUnit = 1;
};

// Codes of 8, 4 or 2 bits. `expand` takes two bytes of each half of x to the levels, over kUnit, of
// their codes: y[2 part + byte] has those of both halves.
template <int Bits>
struct Packed {
  using Operand = __half;
  using L = Levels<Bits>;
  static constexpr int kBits = Bits, kParts = 8 / Bits;
  static constexpr float kUnit = L::kBend > 0 ? L::kCubic : 1;

  __device__ static void expand(uint32_t x, uint32_t (&y)[2 * kParts]) {
#pragma unroll
    for (int byte = 0; byte < 2; ++byte) {
      // Codes begin at bit 2: lower, the sum of what is taken off below is no fp16.
      const uint32_t shifted = byte ? x >> 6 : x << 2;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int at = 2 + Bits * part;
        const uint32_t mask = ((1u << Bits) - 1) << at, power = (25 - at) << 10;  // 2^(10 - at)
        __half2 c = __hsub2(halves(masked(shifted, mask * kHalves, power * kHalves)),
                            __float2half2_rn((1 << (10 - at)) + L::kTop));
        if constexpr (L::kBend > 0) c = __hmul2(c, __hfma2(c, c, __float2half2_rn(1 / L::kCubic)));
        y[2 * part + byte] = bits(c);
      }
    }
  }
};

// fp8 (e4m3), likewise.
struct PackedFp8 {
  using Operand = __half;
  static constexpr int kBits = 8, kParts = 1;
  static constexpr float kUnit = 1;

  __device__ static void expand(uint32_t x, uint32_t (&y)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const uint32_t sorted = __byte_perm(x, x, 0x3120);
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low;"
        " cvt.rn.f16x2.e4m3x2 %1, high;}"
        : "=r"(y[0]), "=r"(y[1])
        : "r"(sorted));
#else
    y[0] = Fp8::pair({x, 0}, 0, 0), y[1] = Fp8::pair({x, 0}, 0, 1);
#endif
  }
};

// How a piece lies in shared memory, in bytes. Rows of codes are apart as far as the lanes need
// that read them (few.cu); those of 16 bits are in units of 16 bytes, whose order is another in
// each of eight rows, so that matrices of them are read from all banks.
template <int D, class F>
struct PieceLayout {
  static constexpr bool kCoded = F::kBits < 16;
  static constexpr int kRow = D * F::kBits / 8;
  static constexpr int kKPitch = kCoded && kRow % 128 == 0 ? kRow + 64 : kRow;
  static constexpr int kVPitch = kCoded && kRow > 16 ? kRow + 16 : kRow;
  static constexpr int kVAt = kPiece * kKPitch, kPositionAt = kVAt + kPiece * kVPitch;
  static constexpr int kScaleAt = kPositionAt + 4 * kPiece;
  static constexpr int kBytes = kScaleAt + (kCoded ? 4 * kPiece : 0);
};

// Unit `unit` + `more` of row `row` of a matrix whose rows have D numbers of 16 bits, in bytes;
// `more`, a multiple of two, is known at compile time, `unit` then 0 or 1.
template <int D>
__device__ inline int swizzled(int row, int unit, int more = 0) {
  return row * (2 * D) + ((unit ^ row % 8) << 4 ^ more % 8 << 4) + more / 8 * 128;
}

// The slots [begin, end) of an item, piece by piece: piece 0 has the first of them. A warp takes a
// stretch of pieces.
template <int D, class F>
class Pieces {
  using L = PieceLayout<D, F>;

 public:
  int first;    // slot of piece 0; may be before `begin`
  int stretch;  // the most pieces that a warp has: the `index`th, those from index * stretch on
  int left;     // of them, that have not been started

  __device__ Pieces(const Item& item, int index, int warps) {
    const Attention& o = item.o;
    const int start = o.first[item.node], from = (start + item.begin) / kPiece * kPiece;
    const int all = max(start + item.end - from + kPiece - 1, 0) / kPiece;
    stretch = item.end > item.begin ? (all + warps - 1) / warps : 0;
    first = from - start;
    left = max(min(all - index * stretch, stretch), 0);
    const int place = from + index * stretch * kPiece, size = page_size(o, item.number);
    table_ = o.page_indptr[item.node] + place / size, offset_ = place % size;
    look_up(o);
  }

  static __device__ bool paired(const Pages& x) { return x.k.scale.slot == 4; }

  // Start to bring the next piece, if there is one, to `to`.
  __device__ void copy(const Attention& o, int number, char* to) {
    if (left > 0) {
      const Pages& pages = o.stores[number];
      const int lane = lane_index(), head = blockIdx.y;
      constexpr int kUnits = L::kRow / 16, kRows = kWarp / kUnits;  // that lanes copy at once
      const int row = lane / kUnits, unit = lane % kUnits;
      auto bring = [&](const Paged& x, char* to, int pitch) {
        const char* from =
            x.at(page_, head, offset_) + (row * static_cast<int>(x.slot) + unit * 16);
#pragma unroll
        for (int n = 0; n < (kPiece + kRows - 1) / kRows; ++n) {
          const int at = L::kCoded ? (row + n * kRows) * pitch + unit * 16
                                   : swizzled<D>(row + n * kRows, unit);
          if (kRows <= kPiece || row < kPiece) copy_async<16>(to + at, from, 16);
          from += kRows * x.slot;
        }
      };
      bring(pages.k.codes, to, L::kKPitch);
      bring(pages.v.codes, to + L::kVAt, L::kVPitch);
      if (L::kCoded && lane < 4) {
        // Scales of keys and values alternate, or have a run each.
        const bool values = !paired(pages) && lane >= 2;
        const char* from = (values ? pages.v : pages.k).scale.at(page_, head, offset_);
        copy_async<16>(to + L::kScaleAt + 16 * lane, from + 16 * (values ? lane - 2 : lane), 16);
      }
      if (pages.position.data && lane < 4)
        copy_async<16>(to + L::kPositionAt + 16 * lane,
                       pages.position.at(page_, head, offset_) + 16 * lane, 16);
      --left, offset_ += kPiece;
      if (offset_ == page_size(o, number)) offset_ = 0, ++table_;
      look_up(o);
    }
    commit_copies();
  }

 private:
  __device__ static int page_size(const Attention& o, int number) {
    return static_cast<int>(o.stores[number].page_size);
  }

  __device__ void look_up(const Attention& o) {
    if (left > 0) page_ = o.page[table_];
  }

  int table_;  // where the page of the next piece is looked up; `page_` is what was found
  int offset_, page_ = 0;
};

// Scales of slot i of a piece in shared memory, of keys and of values.
template <class L>
__device__ inline float2 scales(const char* piece, bool paired, int i) {
  const auto* at = reinterpret_cast<const uint16_t*>(piece + L::kScaleAt);
  auto number = [&](int n) { return __half2float(__ushort_as_half(at[n])); };
  return paired ? float2{number(2 * i), number(2 * i + 1)} : float2{number(i), number(kPiece + i)};
}

// The format of a store, as a type.
template <class F>
void with_format(const Pages& x, F f) {
  switch (x.k.format) {
    case Format::none:
      return x.k.type == Type::bf16 ? f(Plain<__nv_bfloat16>{}) : f(Plain<__half>{});
    case Format::fp8:
      return f(PackedFp8{});
    case Format::int8:
      return f(Packed<8>{});
    case Format::int4:
      return f(Packed<4>{});
    default:
      return f(Packed<2>{});
  }
}

// What a query row sees: keys from x up to y, by their positions where a store has these, else by
// their slots.
__device__ inline int2 seen_by(const Item& item, int row) {
  const Attention& o = item.o;
  const int token = item.token(row);
  const Span span(o, item.number, token);
  const int from = span.from(o, o.position[token]);
  if (o.stores[item.number].position.data) return {from, span.last};
  const int64_t base = o.base[item.node];
  return {static_cast<int>(min(max(from - base, int64_t{item.begin}), int64_t{INT_MAX})),
          static_cast<int>(max(min(span.last - base, int64_t{item.end} - 1), int64_t{-1}))};
}

// Slots from `low` up to `high`, all of which all rows see.
struct Window {
  int low, high;

  // `seen` is the intersection for this lane's rows.
  __device__ Window(const Item& item, int2 seen) : low(INT_MAX), high(INT_MIN) {
    if (item.o.stores[item.number].position.data) return;  // slots are in no order
    low = reduce(seen.x, [](int a, int b) { return max(a, b); });
    high = reduce(seen.y, [](int a, int b) { return min(a, b); });
  }

  __device__ bool whole(int slot) const { return slot >= low && slot + (kPiece - 1) <= high; }
};

}  // namespace kvtools::cuda
