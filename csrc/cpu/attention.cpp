#include <cmath>

#include "isa.h"
#include "simd.h"

namespace kvtools::KVTOOLS_ISA {

void merge_states(const MergeStates& p, const Pool& pool) {
  const int64_t rows = p.b_size * p.h, share = (rows + pool.threads - 1) / pool.threads;
  with_type(p.out.type, [&](auto* kind) {
    using T = std::remove_pointer_t<decltype(kind)>;
    pool.run(pool.threads, [&](int64_t task) {
      for (int64_t row = task * share; row < std::min(rows, (task + 1) * share); ++row) {
        const int64_t i = row / p.h, h = row % p.h;
        auto at = [&](const auto& x) {
          return reinterpret_cast<T*>(x.data) + i * x.stride[0] + h * x.stride[1];
        };
        auto lse_at = [&](const auto& x) -> float& {
          return reinterpret_cast<float*>(x.data)[i * x.stride[0] + h * x.stride[1]];
        };
        const float a_lse = lse_at(p.a_lse), b_lse = lse_at(p.b_lse), peak = std::max(a_lse, b_lse);
        const float a_mass = a_lse == -kInfinity ? 0 : std::exp(a_lse - peak);
        const float b_mass = b_lse == -kInfinity ? 0 : std::exp(b_lse - peak);
        const float lse = peak == -kInfinity ? peak : peak + std::log(a_mass + b_mass);
        const float a = a_mass ? std::exp(a_lse - lse) : 0, b = b_mass ? std::exp(b_lse - lse) : 0;
        lse_at(p.lse) = lse;
        auto merged = [&](f32 x, f32 y) {
          return (a > 0 ? a * x : f32{}) + (b > 0 ? b * y : f32{});
        };
        const T *x = at(p.a), *y = at(p.b);
        T* out = at(p.out);
        int64_t d = 0;
        for (; d + kLanes <= p.d; d += kLanes) store(out + d, merged(load(x + d), load(y + d)));
        const int left = p.d - d;
        if (left) store_part(out + d, merged(load_part(x + d, left), load_part(y + d, left)), left);
      }
    });
  });
}

}  // namespace kvtools::KVTOOLS_ISA
