#include <algorithm>
#include <cmath>
#include <vector>

#include "decode.h"
#include "isa.h"
#include "rotate.h"

namespace kvtools::KVTOOLS_ISA {
namespace {

constexpr float kTiny = 0x1p-24f;  // the least scale in fp16

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

  static f32 look_up(f32 v, bool beyond, const float (&of)[2][kLanes]) {
    const __m512i cell = _mm512_cvttps_epi32(beyond ? min(v, splat(G::kGreatest)) : v);
    const f32 border = _mm512_permutexvar_ps(cell, load(kAll.border));
    const __mmask16 above = _mm512_cmp_ps_mask(border, v, _CMP_LT_OQ);
    const __m512i which = _mm512_mask_add_epi32(cell, above, cell, _mm512_set1_epi32(kLanes));
    return _mm512_permutex2var_ps(load(of[0]), which, load(of[1]));
  }
#else
  static constexpr bool kTable = false;
#endif

  // Where v is peak / reach of the greatest level, it may lie beyond the table.
  static f32 count(f32 v, bool beyond = true) {
#if defined(__AVX512F__)
    if constexpr (kTable) return look_up(v, beyond, kAll.count);
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

  static f32 level(f32 v, bool beyond) {
#if defined(__AVX512F__)
    if constexpr (kTable) return look_up(v, beyond, kAll.level);
#endif
    return G::level(count(v) + 0.5f);
  }
};

// Heads are encoded kLanes at a time, each in a lane of its own, so that nothing is summed across
// lanes: x[e] has element e of all of them. Meanwhile the next ones are fetched, evenly.
struct Ahead {
  const char* head[kLanes];
  int64_t size;  // of an element

  void operator()(int64_t e) const {
    __builtin_prefetch(head[e % kLanes] + e / kLanes * kLanes * size);
  }
};

// Integer codes and scales of rotated x: of a few ranges, that with the least error; `peak` is the
// greatest magnitude.
template <int Bits>
f32 encode(const f32* x, int64_t d, f32 peak, const Ahead& ahead, u32* codes) {
  using G = Grid<Bits>;
  constexpr int kTries = G::kTries, kAtOnce = kLanes < 16 ? 3 : 7;  // as registers allow
  f32 inverse{}, scale{}, least = splat(kInfinity);
  in_groups<kAtOnce>(kTries, [&](auto count, int first) {
    f32 inverses[count.value], scales[count.value], errors[count.value] = {};
    f32 products[count.value] = {}, squares[count.value] = {};
    for (int i = 0; i < count.value; ++i) {
      const float reach = Bits == 8 ? 1 : (17 - (first + i)) / 16.0f;
      inverses[i] = 1 / (peak * (reach / G::kGreatest) + kTiny);
    }
    auto each = [&](auto f) {  // f(i, magnitude, level); magnitudes do, as levels are symmetric
      for (int64_t e = 0; e < d; ++e) {
        const f32 magnitude = abs(x[e]);
        for (int i = 0; i < count.value; ++i) {
          // Of the widest ranges, nothing lies beyond 16.
          const bool beyond = G::kGreatest * 16 >= 16 * (17 - (first + i));
          f(i, magnitude, Nearest<Bits>::level(magnitude * inverses[i], beyond));
        }
      }
    };
    each([&](int i, f32 magnitude, f32 y) {
      products[i] += magnitude * y;
      squares[i] += y * y;
    });
    // For these codes, the best scale.
    for (int i = 0; i < count.value; ++i) scales[i] = to_scale(products[i] / squares[i]);
    if constexpr (Bits == 6)
      each([&](int i, f32 magnitude, f32 y) {
        const f32 rest = y * scales[i] - magnitude;
        errors[i] += rest * rest;
      });
    for (int i = 0; i < count.value; ++i) {
      const f32 s = scales[i];
      // Less that of zeros, in which the error of 6 bits would be lost.
      const f32 error = Bits == 6 ? errors[i] : s * (s * squares[i] - 2 * products[i]);
      const i32 better = first + i == 0 ? ~i32{} : error < least;  // which may overflow
      least = select(better, error, least), scale = select(better, s, scale);
      inverse = select(better, inverses[i], inverse);
    }
  });
  for (int64_t e = 0; e < d; ++e) {
    const f32 k = Nearest<Bits>::count(abs(x[e]) * inverse);
    ahead(e);
    const u32 code = bit_cast<u32>(__builtin_convertvector(k + (G::kTop + 0.5f), i32));
    codes[e] = code ^ (bit_cast<u32>(x[e] < 0.0f) & ((1 << Bits) - 1));
  }
  return scale;
}

f32 encode_fp8(const f32* x, int64_t d, f32 peak, u32* codes) {
  const f32 scale = to_scale(peak / 448);
  for (int64_t e = 0; e < d; ++e)
    codes[e] = to_fp8(max(min(x[e] / scale, splat(448)), splat(-448)));
  return scale;
}

// Where a head goes; nowhere if there is no page.
struct Place {
  int64_t page = -1, head = 0, slot = 0;
};

// Up to kLanes heads to be stored, in as many places as wanted; they are rotated once, for the
// first quantised one.
class Heads {
 public:
  explicit Heads(int64_t d)
      : d_(d), width_(whole_vectors(d)), rows_(kLanes * width_), x_(d), codes_(d), words_(d) {}

  // Of these, each at x(i); soon those at next(i), i < kLanes.
  template <class F, class Next>
  void take(int n, Type type, F x, Next next) {
    n_ = n, type_ = type, is_rotated_ = false, ahead_.size = size_of(type);
    for (int i = 0; i < n; ++i) from_[i] = x(i);
    for (int i = 0; i < kLanes; ++i) ahead_.head[i] = next(i);
  }

  // x = (x - center) * gain, in fp32; the i-th center at frame(i, 0), its gain at frame(i, 1).
  // Before they are stored.
  template <class F>
  void frame(Type type, F frame) {
    with_type(type, [&](auto* kind) {
      using T = std::remove_pointer_t<decltype(kind)>;
      for (int i = 0; i < n_; ++i) {
        auto *c = reinterpret_cast<const T*>(frame(i, 0)),
             *g = reinterpret_cast<const T*>(frame(i, 1));
        float* y = copied(i);
        int64_t e = 0;
        for (; e + kLanes <= d_; e += kLanes)
          store(y + e, (load(y + e) - load(c + e)) * load(g + e));
        const int left = d_ - e;
        if (left)
          store_part(y + e, (load(y + e) - load_part(c + e, left)) * load_part(g + e, left), left);
        from_[i] = reinterpret_cast<const char*>(y);
      }
    });
    type_ = Type::f32;
  }

  void put(const Content& to, const Place* place) {
    auto each = [&](auto f) {
      for (int i = 0; i < n_; ++i)
        if (const Place& p = place[i]; p.page >= 0) f(i, p);
    };
    if (to.format == Format::none)
      return each([&](int i, const Place& p) {
        convert(from_[i], type_, to.codes.at(p.page, p.head, p.slot), to.type, d_);
      });
    rotate();
    auto write = [&](auto bits, auto low, int64_t at) {
      const int64_t bytes = d_ * bits / 8;
      pack_plane<bits, low>(codes_.data(), bytes, words_.data());
      each([&](int i, const Place& p) {
        const char* word = reinterpret_cast<const char*>(words_.data()) + 4 * i;
        char* plane = to.codes.at(p.page, p.head, p.slot) + at;
        int64_t j = 0;
        for (; j + 4 <= bytes; j += 4, word += sizeof(u32)) std::memcpy(plane + j, word, 4);
        if (j < bytes) std::memcpy(plane + j, word, bytes - j);
      });
    };
    f32 scale;
    if (to.format == Format::fp8) {
      scale = encode_fp8(x_.data(), d_, peak_, codes_.data());
      write(Constant<8>{}, Constant<0>{}, 0);
    } else {
      with_bits(to.format, [&](auto bits) {
        constexpr int kLow = Levels<bits>::kLow, kHigh = Levels<bits>::kHigh;
        scale = encode<bits>(x_.data(), d_, peak_, ahead_, codes_.data());
        write(Constant<kLow>{}, Constant<0>{}, 0);
        if constexpr (kHigh > 0) write(Constant<kHigh>{}, Constant<kLow>{}, d_ * kLow / 8);
      });
    }
    f16 scales[kLanes];
    store(scales, select(finite_, scale, splat(NAN)));
    each([&](int i, const Place& p) {
      std::memcpy(to.scale.at(p.page, p.head, p.slot), scales + i, sizeof *scales);
    });
  }

 private:
  template <int I>
  using Constant = std::integral_constant<int, I>;

  float* copied(int i) {
    float* y = rows_.data() + i * width_;
    convert(from_[i], type_, reinterpret_cast<char*>(y), Type::f32, d_);
    return y;
  }

  // Into the lanes, and find their peaks.
  void rotate() {
    if (is_rotated_) return;
    is_rotated_ = true;
    const float* rows[kLanes];  // behind the last, the first again
    for (int i = 0; i < kLanes; ++i)
      if (i >= n_)
        rows[i] = rows[0];
      else if (type_ == Type::f32 && width_ == d_)
        rows[i] = reinterpret_cast<const float*>(from_[i]);
      else
        rows[i] = copied(i);
    rotate_across(rows, x_.data(), d_);
    i32 peak{};  // bits of magnitudes are in order, and those of NaN come last
    for (f32 x : x_) {
      const i32 magnitude = bit_cast<i32>(abs(x));
      peak = magnitude > peak ? magnitude : peak;
    }
    finite_ = peak < 0x7f800000;
    peak_ = select(finite_, bit_cast<f32>(peak), f32{});
    // Codes cannot tell, so the scale does.
    for (int i = 0; i < kLanes; ++i)
      if (!finite_[i]) return zero();
  }

  void zero() {
    for (f32& x : x_) x = select(finite_, x, f32{});
  }

  const int64_t d_, width_;
  int n_ = 0;
  Type type_ = Type::f32;
  const char* from_[kLanes];
  Ahead ahead_;
  bool is_rotated_ = false;
  i32 finite_;
  f32 peak_;
  std::vector<float> rows_;  // [kLanes][width]
  std::vector<f32> x_;
  std::vector<u32> codes_, words_;
};

// Elements that are work enough for a thread, some 10 us.
int64_t share_of(Format format) {
  return format == Format::none ? 65536 : format == Format::fp8 ? 16384 : 3072;
}

}  // namespace

void quantize_kv(const QuantizeKv& p, const Pool& pool) {
  pool.split(p.rows, share_of(p.to.format) / p.d, [&](int64_t begin, int64_t end) {
    Heads heads(p.d);
    Place place[kLanes];
    for (int64_t row = begin; row < end; row += kLanes) {
      const int n = std::min<int64_t>(kLanes, end - row);
      for (int i = 0; i < n; ++i) place[i] = {0, 0, row + i};
      auto x = [&](int64_t i) { return p.x.at(std::min(row + i, end - 1)); };
      heads.take(n, p.x.type, x, [&](int i) { return x(i + kLanes); });
      heads.put(p.to, place);
    }
  });
}

void dequantize_kv(const DequantizeKv& p, const Pool& pool) {
  pool.split(p.rows, share_of(Format::fp8) / p.d, [&](int64_t begin, int64_t end) {
    std::vector<float> x(whole_vectors(p.d));
    for (int64_t i = begin; i < end; ++i) {
      const float scale = number_at(p.from.scale.at(0, 0, i), Type::f16);
      with_reader(p.from, p.d, [&](auto read) {
        decode_row(read, p.from.codes.at(0, 0, i), p.d, scale, x.data());
      });
      rotate_back(x.data(), p.d);
      convert(reinterpret_cast<char*>(x.data()), Type::f32, p.out.at(i), p.out.type, p.d);
    }
  });
}

void append_kv(const AppendKv& p, const Pool& pool) {
  const Pages &to = p.pages, &also = p.also;
  int64_t share = std::min(share_of(to.k.format), share_of(to.v.format));
  if (p.also_slot.data) share = std::min({share, share_of(also.k.format), share_of(also.v.format)});
  pool.split(p.t * to.heads, share / to.d, [&](int64_t begin, int64_t end) {
    Heads heads(to.d);
    int64_t token[kLanes], head[kLanes];
    Place place[kLanes], second[kLanes];
    int64_t t = begin / to.heads, h = begin % to.heads;
    for (int64_t row = begin; row < end;) {
      int n = 0;
      for (; n < kLanes && row < end; ++row, ++h) {
        if (h == to.heads) ++t, h = 0;
        auto find = [&](const Strided<2>& slots, const Pages& pages) -> Place {
          const int64_t slot = slots.data ? integer_at(slots, t, h) : -1;
          if (slot < 0) return {};
          return {slot / pages.page_size, h, slot % pages.page_size};
        };
        const Place first = find(p.slot, to), other = find(p.also_slot, also);
        if (first.page < 0 && other.page < 0) continue;
        token[n] = t, head[n] = h, place[n] = first, second[n++] = other;
        if (first.page < 0) continue;
        auto at = [&](const Paged& x) { return x.at(first.page, h, first.slot); };
        if (to.position.data) {
          const auto position = static_cast<int32_t>(integer_at(p.position, t));
          std::memcpy(at(to.position), &position, sizeof position);
        }
        if (to.importance.data) std::memset(at(to.importance), 0, sizeof(float));
        if (to.history.data) std::memset(at(to.history), 0, to.words * sizeof(int32_t));
      }
      if (n == 0) break;  // all that were left are skipped
      auto put = [&](Content Pages::* content) {
        heads.put(to.*content, place);
        if (p.also_slot.data) heads.put(also.*content, second);
      };
      auto v = [&](int i) { return p.v.at(token[i], head[i]); };
      heads.take(
          n, p.k.type, [&](int i) { return p.k.at(token[i], head[i]); },
          [&](int i) { return v(std::min(i, n - 1)); });
      if (p.frames.of)
        heads.frame(p.frames.x.type, [&](int i, int64_t which) {
          return p.frames.x.at(p.frames.of[token[i]], which, head[i]);
        });
      put(&Pages::k);
      int64_t next_t = t, next_h = h;
      heads.take(n, p.v.type, v, [&](int) {
        if (next_h == to.heads) ++next_t, next_h = 0;
        return p.k.at(std::min(next_t, p.t - 1), next_h++);
      });
      put(&Pages::v);
    }
  });
}

}  // namespace kvtools::KVTOOLS_ISA
