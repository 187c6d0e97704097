#include <algorithm>
#include <cmath>
#include <vector>

#include "decode.h"
#include "isa.h"
#include "rotate.h"

namespace kvtools::KVTOOLS_ISA {
namespace {

constexpr float kTiny = 0x1p-24f;                                 // the least scale in fp16
constexpr int kMostTries = Levels<2>::kTries, kPaddedTries = 16;  // of whole vectors

// What one thread needs for a head. Its vectors are whole: zero behind d.
struct Scratch {
  explicit Scratch(int64_t d)
      : x(whole_vectors(d)), framed(x.size()), levels(kMostTries * x.size()), codes(x.size()) {}

  std::vector<float> x, framed, levels;  // levels for each range tried
  std::vector<uint8_t> codes;
};

template <class From, class To>
void convert(const From* from, To* to, int64_t d) {
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) store(to + i, load(from + i));
  if (i < d) store_part(to + i, load_part(from + i, d - i), d - i);
}

void convert(const char* from, Type from_type, char* to, Type to_type, int64_t d) {
  with_type(from_type, [&](auto* a) {
    with_type(to_type, [&](auto* b) {
      using From = std::remove_pointer_t<decltype(a)>;
      using To = std::remove_pointer_t<decltype(b)>;
      convert(reinterpret_cast<const From*>(from), reinterpret_cast<To*>(to), d);
    });
  });
}

// Scales as fp16 holds them.
f32 to_scale(f32 x) {
  f16 rounded[kLanes];
  store(rounded, min(max(x, splat(kTiny)), splat(65504)));
  return load(rounded);
}

bool is_finite(const float* x, int64_t d) {
  f32 zero{};
  for (int64_t i = 0; i < d; i += kLanes) zero += load(x + i) - load(x + i);
  return sum_lanes(zero)[0] == 0;
}

// In all lanes.
f32 peak_of(const float* x, int64_t d) {
  f32 peak{};
  for (int64_t i = 0; i < d; i += kLanes) peak = max(peak, abs(load(x + i)));
  return max_lanes(peak);
}

// The nearest level above zero to v >= 0, counted from zero; -1 for v = 0. Of two as near, the
// lower.
template <int Bits>
struct Nearest {
  using G = Grid<Bits>;
  // The border below level r.
  static constexpr float border(float r) { return r * (1 + G::kCubic * (0.75f + r * r)); }

#if defined(__AVX512F__)
  // Between two integers lies one border at most, so that v's integer part decides all but this.
  static constexpr bool kTable = Bits <= 4;
  struct Table {
    alignas(64) float border[kLanes], count[2][kLanes], level[2][kLanes];  // below it, and above
  };
  static constexpr Table table() {
    Table t{};
    for (int i = 0, below = 0; i < kLanes; ++i) {
      const bool here = below < 1 << (Bits - 1) && border(below) < i + 1;
      t.border[i] = here ? border(below) : kInfinity;
      for (int above = 0; above < 2; ++above) {
        const float k = below - 1 + above, c = k + 0.5f;
        t.count[above][i] = k, t.level[above][i] = c * (1 + G::kCubic * (c * c));
      }
      below += here;
    }
    return t;
  }
  static constexpr Table kAll = table();

  static f32 look_up(f32 v, const float (&of)[2][kLanes]) {
    const __m512i cell = _mm512_cvttps_epi32(min(v, splat(G::kGreatest)));
    const f32 border = _mm512_permutexvar_ps(cell, load(kAll.border));
    const __mmask16 above = _mm512_cmp_ps_mask(border, v, _CMP_LT_OQ);
    const __m512i which = _mm512_mask_add_epi32(cell, above, cell, _mm512_set1_epi32(kLanes));
    return _mm512_permutex2var_ps(load(of[0]), which, load(of[1]));
  }
#else
  static constexpr bool kTable = false;
#endif

  static f32 count(f32 v) {
#if defined(__AVX512F__)
    if constexpr (kTable) return look_up(v, kAll.count);
#endif
    v = min(v, splat(G::kGreatest));
    // A polynomial inverts `border` to less than half a step; then one comparison decides.
    f32 guess = v;
    if constexpr (G::kBend > 0) {
      const f32 t = v * (1 / G::kGreatest), t2 = t * t;
      guess = G::kTop * t * (1.4393f + t2 * (-0.7805f + t2 * 0.3477f));
    }
    const f32 shift = splat(0x1.8p23f), r = (guess + shift) - shift;
    const f32 border = G::kBend > 0 ? r * (1 + G::kCubic * (0.75f + r * r)) : r;
    return select(border < v, r, r - 1);
  }

  static f32 level(f32 v) {
#if defined(__AVX512F__)
    if constexpr (kTable) return look_up(v, kAll.level);
#endif
    return G::level(count(v) + 0.5f);
  }
};

// Call f(j, whole) for vectors j, ... of d elements; the last may not be whole.
template <class F>
void each_vector(int64_t d, F f) {
  int64_t j = 0;
  for (; j + kLanes <= d; j += kLanes) f(j, std::true_type{});
  if (j < d) f(j, std::false_type{});
}

// Integer codes and scale of rotated x: of a few ranges, that with the least error.
template <int Bits>
f32 encode(const float* x, int64_t d, Scratch& scratch, uint8_t* packed) {
  using G = Grid<Bits>;
  constexpr int kTries = G::kTries, kAtOnce = kLanes < 16 ? 3 : 7;  // as registers allow
  const f32 peak = peak_of(x, d);
  float inverse[kPaddedTries], scale[kPaddedTries], error[kPaddedTries];
  auto each_try = [](auto f) {  // f(i) for vectors of tries
    for (int i = 0; i < kTries; i += kLanes) f(i);
  };
  each_try([&](int i) {
    const i32 which = bit_cast<i32>(lane_index()) + (Bits == 8 ? 1 : i);
    const f32 reach = (17 - __builtin_convertvector(which, f32)) / 16;
    store(inverse + i, 1 / (peak * (reach / G::kGreatest) + kTiny));
  });
  f32 products[kTries], squares[kTries];
  in_groups<kAtOnce>(kTries, [&](auto count, int first) {
    f32 product[count.value] = {}, square[count.value] = {};
    each_vector(d, [&](int64_t j, auto whole) {
      // Magnitudes will do: levels lie symmetrically.
      const f32 magnitude = abs(load(x + j));
      for (int i = 0; i < count.value; ++i) {
        f32 y = Nearest<Bits>::level(magnitude * inverse[first + i]);
        if (!whole.value) y = select(bit_cast<i32>(lane_index()) < int(d - j), y, f32{});
        product[i] += magnitude * y;
        square[i] += y * y;
        store(scratch.levels.data() + j * kTries + (first + i) * kLanes, y);
      }
    });
    for (int i = 0; i < count.value; ++i)
      products[first + i] = product[i], squares[first + i] = square[i];
  });
  // For these codes, the best scale.
  each_try([&](int i) {
    const f32 product = sum_each(products + i, kTries - i),
              square = sum_each(squares + i, kTries - i);
    store(scale + i, to_scale(product / square));
  });
  if (kTries > 1)
    in_groups<kAtOnce>(kTries, [&](auto count, int first) {
      f32 square[count.value] = {};
      for (int64_t j = 0; j < d; j += kLanes) {
        const f32 magnitude = abs(load(x + j));
        for (int i = 0; i < count.value; ++i) {
          const float* levels = scratch.levels.data() + j * kTries + (first + i) * kLanes;
          const f32 difference = load(levels) * scale[first + i] - magnitude;
          square[i] += difference * difference;
        }
      }
      for (int i = 0; i < count.value; ++i) squares[first + i] = square[i];
    });
  each_try([&](int i) { store(error + i, sum_each(squares + i, kTries - i)); });
  int best = 0;
  float least = error[0];
  for (int i = 1; i < kTries; ++i)
    best = error[i] < least ? i : best, least = std::min(least, error[i]);
  for (int64_t j = 0; j < d; j += kLanes) {
    const f32 y = load(x + j);
    const f32 k = Nearest<Bits>::count(abs(y) * inverse[best]);
    const f32 code = select(y < 0.0f, (G::kTop - 0.5f) - k, (G::kTop + 0.5f) + k);
    store_bytes(&scratch.codes[j], bit_cast<u32>(__builtin_convertvector(code, i32)));
  }
  pack<Bits>(scratch.codes.data(), d, packed);
  return splat(scale[best]);
}

f32 encode_fp8(const float* x, int64_t d, Scratch& scratch, uint8_t* packed) {
  const f32 scale = to_scale(peak_of(x, d) / 448);
  for (int64_t j = 0; j < d; j += kLanes) {
    const f32 y = load(x + j) / scale;
    store_bytes(&scratch.codes[j], to_fp8(max(min(y, splat(448)), splat(-448))));
  }
  std::memcpy(packed, scratch.codes.data(), d);
  return scale;
}

// A head to be stored, in as many places as wanted; it is rotated once, for the first quantised
// one.
class Head {
 public:
  Head(const char* x, Type type, int64_t d, Scratch& scratch)
      : x_(x), type_(type), d_(d), scratch_(scratch) {}

  // x = (x - center) * gain, in fp32; before it is stored.
  void frame(const char* center, const char* gain, Type type) {
    float* y = scratch_.framed.data();
    convert(x_, type_, reinterpret_cast<char*>(y), Type::f32, d_);
    with_type(type, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      const T *c = reinterpret_cast<const T*>(center), *g = reinterpret_cast<const T*>(gain);
      int64_t i = 0;
      for (; i + kLanes <= d_; i += kLanes) store(y + i, (load(y + i) - load(c + i)) * load(g + i));
      const int left = d_ - i;
      if (left)
        store_part(y + i, (load(y + i) - load_part(c + i, left)) * load_part(g + i, left), left);
    });
    x_ = reinterpret_cast<const char*>(y), type_ = Type::f32;
  }

  // Into slot s of page p.
  void put(const Content& to, int64_t p, int64_t h, int64_t s) {
    char* codes = to.codes.at(p, h, s);
    if (to.format == Format::none) return convert(x_, type_, codes, to.type, d_);
    const float* y = rotated();
    auto* packed = reinterpret_cast<uint8_t*>(codes);
    f32 scale;
    if (to.format == Format::fp8)
      scale = encode_fp8(y, d_, scratch_, packed);
    else
      with_bits(to.format,
                [&](auto bits) { scale = encode<decltype(bits)::value>(y, d_, scratch_, packed); });
    store_one(reinterpret_cast<f16*>(to.scale.at(p, h, s)), finite_ ? scale[0] : NAN);
  }

 private:
  const float* rotated() {
    float* y = scratch_.x.data();
    if (is_rotated_) return y;
    convert(x_, type_, reinterpret_cast<char*>(y), Type::f32, d_);
    rotate(y, d_);
    // Codes cannot tell, so the scale does.
    finite_ = is_finite(y, d_);
    if (!finite_) std::fill_n(y, scratch_.x.size(), 0.0f);
    is_rotated_ = true;
    return y;
  }

  const char* x_;
  Type type_;
  const int64_t d_;
  Scratch& scratch_;
  bool is_rotated_ = false, finite_ = true;
};

// Elements that are work enough for a thread, some 10 us.
int64_t share_of(Format format) {
  return format == Format::none ? 65536 : format == Format::fp8 ? 16384 : 2048;
}

// body(begin, end, scratch) over `rows` heads of size d, in threads of at least `share` elements.
template <class F>
void split(int64_t rows, int64_t d, int64_t share, const Pool& pool, F body) {
  pool.split(rows, share / d, [&](int64_t begin, int64_t end) {
    Scratch scratch(d);
    body(begin, end, scratch);
  });
}

}  // namespace

void quantize_kv(const QuantizeKv& p, const Pool& pool) {
  split(p.rows, p.d, share_of(p.to.format), pool,
        [&](int64_t begin, int64_t end, Scratch& scratch) {
          for (int64_t i = begin; i < end; ++i)
            Head(p.x.at(i), p.x.type, p.d, scratch).put(p.to, 0, 0, i);
        });
}

void dequantize_kv(const DequantizeKv& p, const Pool& pool) {
  split(p.rows, p.d, share_of(Format::fp8), pool,
        [&](int64_t begin, int64_t end, Scratch& scratch) {
          for (int64_t i = begin; i < end; ++i) {
            const float scale = number_at(p.from.scale.at(0, 0, i), Type::f16);
            float* x = scratch.x.data();
            with_reader(p.from, p.d, [&](auto read) {
              decode_row(read, p.from.codes.at(0, 0, i), p.d, scale, x);
            });
            rotate_back(x, p.d);
            convert(reinterpret_cast<char*>(x), Type::f32, p.out.at(i), p.out.type, p.d);
          }
        });
}

void append_kv(const AppendKv& p, const Pool& pool) {
  const Pages &to = p.pages, &also = p.also;
  int64_t share = std::min(share_of(to.k.format), share_of(to.v.format));
  if (p.also_slot.data) share = std::min({share, share_of(also.k.format), share_of(also.v.format)});
  split(p.t * to.heads, to.d, share, pool, [&](int64_t begin, int64_t end, Scratch& scratch) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row / to.heads, h = row % to.heads;
      const int64_t slot = integer_at(p.slot, t, h);
      const int64_t second = p.also_slot.data ? integer_at(p.also_slot, t, h) : -1;
      if (slot < 0 && second < 0) continue;
      const int64_t page = slot / to.page_size, s = slot % to.page_size;
      auto put = [&](Head head, Content Pages::* x) {
        if (slot >= 0) head.put(to.*x, page, h, s);
        if (second >= 0) head.put(also.*x, second / also.page_size, h, second % also.page_size);
      };
      Head k(p.k.at(t, h), p.k.type, to.d, scratch);
      if (const Frames& f = p.frames; f.of)
        k.frame(f.x.at(f.of[t], 0, h), f.x.at(f.of[t], 1, h), f.x.type);
      put(k, &Pages::k);
      put(Head(p.v.at(t, h), p.v.type, to.d, scratch), &Pages::v);
      if (slot < 0) continue;
      if (to.position.data) {
        const auto position = static_cast<int32_t>(integer_at(p.position, t));
        std::memcpy(to.position.at(page, h, s), &position, sizeof position);
      }
      if (to.importance.data) std::memset(to.importance.at(page, h, s), 0, sizeof(float));
      if (to.history.data) std::memset(to.history.at(page, h, s), 0, to.words * sizeof(int32_t));
    }
  });
}

}  // namespace kvtools::KVTOOLS_ISA
