// Rotate, quantise and store: a warp per head.
#include "head.h"
#include "kernels.h"

namespace kvtools::cuda {
namespace {

constexpr int kWarps = 4;

struct Shared {
  uint8_t codes[kWarps][kMostD];
};

__device__ float to_scale(float x) {
  return __half2float(__float2half_rn(fminf(fmaxf(x, kLeastScale), 65504.0f)));
}

// The c of the nearest level to v >= 0, a half or more: of two as near, the lower, so that it is
// -1/2 for v = 0. Products are fused with sums: nothing here is held to the last bit.
template <int Bits>
__device__ float nearest(float v) {
  using G = Grid<Bits>;
  constexpr float kRound = 12582912;  // 1.5 * 2^23: to the nearest integer
  constexpr float kScale = G::kTop / G::kGreatest, kSquare = 1 / (G::kGreatest * G::kGreatest);
  v = fminf(v, G::kGreatest);
  // The border below c = r + 1/2 lies at r (1 + 3/4 kCubic + kCubic r²). A polynomial inverts this
  // to less than half a step; then one comparison decides.
  float r, over;
  if (G::kBend > 0) {
    const float square = v * v;
    float slope = fmaf(square, 0.3477f * kScale * kSquare * kSquare, -0.7805f * kScale * kSquare);
    slope = fmaf(square, slope, 1.4393f * kScale);
    r = fmaf(v, slope, kRound) - kRound;
    over = fmaf(fmaf(r * r, G::kCubic, 1 + 0.75f * G::kCubic), r, -v);
  } else {
    r = (v + kRound) - kRound;
    over = r - v;
  }
  // Where v lies above the border `over` is negative, and the half is added.
  return r - __uint_as_float(__float_as_uint(0.5f) | (__float_as_uint(over) & 0x80000000u));
}

// Codes and scale of rotated x: of a few ranges, that with the least error.
template <int Bits, int E>
__device__ float encode(const float (&x)[E], int d, float peak, uint8_t* codes) {
  using G = Grid<Bits>;
  constexpr int kTries = G::kTries;
  constexpr int N = kTries <= 1 ? 1 : kTries <= 4 ? 4 : kTries <= 8 ? 8 : 16;
  const int lane = lane_index();
  const bool real = lane * E < d;  // E divides d
  // Magnitudes will do: levels lie symmetrically. Lane i % N has the range of try i.
  const float reach = Bits == 8 ? 1 : (17 - lane % N) / 16.0f;
  const float range = peak * (reach / G::kGreatest) + kLeastScale, inverse = 1 / range;
  // Of what is left of x in units of the range, and of the levels.
  float rest[N] = {}, both[N] = {}, square[N] = {};
#pragma unroll
  for (int i = 0; i < kTries; ++i) {
    const float here = N == 1 ? inverse : __shfl_sync(kAll, inverse, i);
#pragma unroll
    for (int j = 0; j < E; ++j) {
      const float v = fabsf(x[j]) * here, c = nearest<Bits>(v);
      const float y = G::kBend > 0 ? c * fmaf(c * c, G::kCubic, 1) : c, left = v - y;
      rest[i] = fmaf(left, left, rest[i]), both[i] = fmaf(left, y, both[i]);
      square[i] = fmaf(y, y, square[i]);
    }
    if (!real) rest[i] = both[i] = square[i] = 0;
  }
  // From here on, lane i has what try i % N needs. For these codes, the best scale; as it is
  // stored, `more` of the range is added to it.
  const float together = sums(both), squares = sums(square);
  const float scale = to_scale((1 + together / squares) / inverse);
  const float more = fmaf(scale, inverse, -1);
  const float of_first = range * __shfl_sync(kAll, inverse, 0);  // as its square might overflow
  float least = fmaf(more, fmaf(more, squares, -2 * together), sums(rest)) * (of_first * of_first);
  int best = lane % N;
  if (best >= kTries) least = INFINITY;
#pragma unroll
  for (int distance = 1; distance < N; distance *= 2) {
    const float other = __shfl_xor_sync(kAll, least, distance);
    const int other_best = __shfl_xor_sync(kAll, best, distance);
    if (other < least || (other == least && other_best < best)) least = other, best = other_best;
  }
  const float chosen = __shfl_sync(kAll, inverse, best);
#pragma unroll
  for (int j = 0; j < E; ++j)
    if (real) {
      const float c = nearest<Bits>(fabsf(x[j]) * chosen);
      codes[lane * E + j] = static_cast<uint8_t>(G::kTop + (x[j] < 0 ? -c : c));
    }
  return __shfl_sync(kAll, scale, best);
}

// Of at most 448 in magnitude; half to even.
__device__ uint8_t to_fp8(float x) {
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffff;
  // Normal: rebias, round. Small: adding 2^14 lines the bits up, and rounds.
  const uint32_t normal = (magnitude - (120u << 23) + 0x7ffff + (magnitude >> 20 & 1)) >> 20;
  const uint32_t small = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000;
  return (magnitude < (121u << 23) ? small : normal) | (bits >> 24 & 0x80);
}

// A plane holds `bits` bits of every code, from bit `low` on, in w = d bits / 8 bytes: those of
// elements j, j + w, ... in byte j, lowest bits first.
__device__ void store_plane(const uint8_t* codes, int d, int bits, int low, char* plane) {
  const int w = d * bits / 8;
  for (int j = lane_index(); j < w; j += kWarp) {
    int byte = 0;
    for (int i = 0; i * bits < 8; ++i)
      byte |= (codes[j + i * w] >> low & ((1 << bits) - 1)) << (bits * i);
    plane[j] = static_cast<char>(byte);
  }
}

// Store the head x, whose elements are `stride` apart, in slot s of page p: as keys of `frame`.
template <int E>
__device__ void put(const char* x, Type type, int64_t stride, const Frame& frame, int d, float norm,
                    const Content& to, int64_t p, int64_t h, int64_t s, uint8_t* staged) {
  const int lane = lane_index();
  char* codes = to.codes.at(p, h, s);
  const int64_t step = stride * size_of(type);
  if (to.format == Format::none) {
    for (int i = lane; i < d; i += kWarp)
      put_number(frame.stored(number_at(x + i * step, type), i), codes + i * size_of(to.type),
                 to.type);
    return;
  }
  float y[E];
  load_head(y, x, type, step, d);
#pragma unroll
  for (int j = 0; j < E; ++j)
    if (lane * E + j < d) y[j] = frame.stored(y[j], lane * E + j);
  rotate(y, d, norm);
  // As integers, infinity and NaN are the greatest. Codes cannot hold them, so the scale does.
  unsigned most = 0;
#pragma unroll
  for (int j = 0; j < E; ++j) most = max(most, __float_as_uint(fabsf(y[j])));
  most = reduce(most, [](unsigned a, unsigned b) { return max(a, b); });
  const bool finite = most < 0x7f800000;
  const float peak = finite ? __uint_as_float(most) : 0;
#pragma unroll
  for (int j = 0; j < E; ++j) y[j] = finite ? y[j] : 0;
  float scale;
  if (to.format == Format::fp8) {
    scale = to_scale(peak / 448);
#pragma unroll
    for (int j = 0; j < E; ++j)
      if (lane * E + j < d)
        codes[lane * E + j] =
            static_cast<char>(to_fp8(fmaxf(fminf(y[j] / scale, 448.0f), -448.0f)));
  } else {
    with_bits(to.format, [&](auto bits) {
      using G = Grid<decltype(bits)::value>;
      scale = encode<decltype(bits)::value>(y, d, peak, staged);
      __syncwarp();
      store_plane(staged, d, G::kLow, 0, codes);
      if (G::kHigh) store_plane(staged, d, G::kHigh, G::kLow, codes + d * G::kLow / 8);
    });
  }
  if (lane == 0) put_number(finite ? scale : NAN, to.scale.at(p, h, s), Type::f16);
}

template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    quantize_kv_kernel(__grid_constant__ const QuantizeKv p, float norm) {
  KVTOOLS_SHARED(Shared, shared);
  const int warp = threadIdx.x / kWarp;
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp;
  if (row >= p.rows) return;
  put<E>(p.x.at(row), p.x.type, p.x.stride[1], {}, p.d, norm, p.to, 0, 0, row, shared.codes[warp]);
}

// A head of a token, in the first place or the second: its keys, and what else belongs to the slot,
// or its values.
template <int E>
__global__ void __launch_bounds__(kWarps* kWarp, 2)
    append_kv_kernel(__grid_constant__ const AppendKv p, float norm) {
  KVTOOLS_SHARED(Shared, shared);
  const int warp = threadIdx.x / kWarp, lane = lane_index();
  const int64_t row = int64_t(blockIdx.x) * kWarps + warp, heads = p.pages.heads;
  const int64_t t = row / heads, h = row % heads;
  if (t >= p.t) return;
  const bool values = blockIdx.y & 1, second = blockIdx.y & 2;
  const Pages& pages = second ? p.also : p.pages;
  const int64_t slot = integer_at(second ? p.also_slot : p.slot, t, h);
  if (slot < 0 || slot >= pages.pages * pages.page_size) return;
  const int64_t page = slot / pages.page_size, s = slot % pages.page_size;
  const Strided<3>& x = values ? p.v : p.k;
  put<E>(x.at(t, h), x.type, x.stride[2], values ? Frame() : Frame(p.frames, t, h), pages.d, norm,
         values ? pages.v : pages.k, page, h, s, shared.codes[warp]);
  if (values) return;
  if (lane == 0) {
    if (pages.position.data)
      *reinterpret_cast<int32_t*>(pages.position.at(page, h, s)) =
          static_cast<int32_t>(integer_at(p.position, t));
    if (pages.importance.data) *reinterpret_cast<float*>(pages.importance.at(page, h, s)) = 0;
  }
  if (pages.history.data)
    for (int i = lane; i < pages.words; i += kWarp)
      reinterpret_cast<int32_t*>(pages.history.at(page, h, s))[i] = 0;
}

// Call f with the elements per lane that heads of size d need, as a type.
template <class F>
void with_elements(int64_t d, F f) {
  if (d <= 32)
    f(std::integral_constant<int, 1>{});
  else if (d <= 64)
    f(std::integral_constant<int, 2>{});
  else if (d <= 128)
    f(std::integral_constant<int, 4>{});
  else
    f(std::integral_constant<int, 8>{});
}

}  // namespace

void quantize_kv(const QuantizeKv& p, void* stream) {
  with_elements(p.d, [&](auto e) {
    launch("quantize_kv", quantize_kv_kernel<decltype(e)::value>, blocks_of(p.rows, kWarps),
           kWarps * kWarp, sizeof(Shared), stream, p, norm_of(p.d));
  });
}

void append_kv(const AppendKv& p, void* stream) {
  with_elements(p.pages.d, [&](auto e) {
    launch("append_kv", append_kv_kernel<decltype(e)::value>,
           blocks_of(p.t * p.pages.heads, kWarps, p.also_slot.data ? 4 : 2), kWarps * kWarp,
           sizeof(Shared), stream, p, norm_of(p.pages.d));
  });
}

}  // namespace kvtools::cuda
