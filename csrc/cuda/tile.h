// Tiles of keys and values: how they come to shared memory.
#pragma once

#include <climits>

#include "codes.h"
#include "ptx.h"

namespace kvtools::cuda {

constexpr int kWarps = 4, kThreads = kWarps * kWarp;
constexpr int kStep = 16;  // slots that a warp takes at a time, and query rows that it has

// Rows of keys or values in shared memory, in bytes: as they are stored, zero from `bytes` on up to
// `padded`. They are copied in units of `unit`, a row by 2^lanes_log2 lanes.
struct RowLayout {
  int bytes, padded, pitch, unit, lanes_log2;
};

// A stage: keys, values, and a few numbers for each slot.
struct Layout {
  RowLayout k, v;
  int slots, stages;

  KVTOOLS_ANYWHERE int v_at() const { return slots * k.pitch; }
  KVTOOLS_ANYWHERE int numbers_at() const { return v_at() + slots * v.pitch; }
  KVTOOLS_ANYWHERE int stage() const { return numbers_at() + slots * 12; }
};

// See TreeAttention.
struct Attention : TreeAttention {
  Layout layouts[kMostStores];
  // A bit for each store: what meets its keys is not a query as it is given; its values are
  // rotated.
  uint32_t prepared, rotated;
  uint32_t mine;  // likewise: that are the launch's; a block of an item of others returns
  int group, d;
  float factor, cap;  // scores in base 2: of scores, or what they are in units of the cap; cap
  float norm;         // of rotations
  // In scratch memory:
  float *part_out, *part_lse, *mean;
  int32_t *part_seen, *part_store;
  char* queries;  // that meet keys of the first store, if they are prepared
  Type query_type;
};

// One of the stores: its pages, and how its tiles lie.
struct Store {
  const Pages& pages;
  const Layout& layout;

  __device__ Store(const Attention& o, int index)
      : pages(o.stores[index]), layout(o.layouts[index]) {}
};

// Where a slot is.
struct Place {
  int page, offset;
};

__device__ inline Place find(const Attention& o, const Store& store, int node, int slot) {
  const unsigned size = static_cast<unsigned>(store.pages.page_size);
  const unsigned at = o.first[node] + slot;
  return {o.page[o.page_indptr[node] + at / size], static_cast<int>(at % size)};
}

// A tile of slots in shared memory.
struct Stage {
  const char *k, *v;
  const float *factor, *v_scale;  // of scores in units of products; of values
  const int* key;                 // position; behind every query for slots that do not count
};

// The slots [begin, end) of a node and a KV head, tile by tile. Some tiles ahead are on their way;
// each warp brings its share of their slots, of which a lane has what is known about one.
template <int D, bool Exact, bool Values>
class Tiles {
 public:
  __device__ Tiles(const Attention& o, const Store& store, char* shared, int node, int head,
                   int begin, int end)
      : o_(o),
        store_(store),
        shared_(shared),
        node_(node),
        head_(head),
        begin_(begin),
        end_(end),
        share_(store.layout.slots / kWarps) {}

  __device__ int count() const {
    return (end_ - begin_ + store_.layout.slots - 1) / store_.layout.slots;
  }

  __device__ void start() {
    const int ahead = store_.layout.stages - 1;
    for (int i = 0; i < ahead; ++i) {
      look_up(i);
      copy(i);
      note(i);
    }
    look_up(ahead);
  }

  // Tile i, once it is there.
  __device__ Stage wait(int i) {
    if (store_.layout.stages == 3)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    __syncthreads();
    copy(i + store_.layout.stages - 1);
    look_up(i + store_.layout.stages);
    char* stage = stage_of(i);
    const auto* factor = reinterpret_cast<const float*>(stage + store_.layout.numbers_at());
    const float* v_scale = factor + store_.layout.slots;
    return {stage, stage + store_.layout.v_at(), factor, v_scale,
            reinterpret_cast<const int*>(v_scale + store_.layout.slots)};
  }

  // Tile i is done with.
  __device__ void release(int i) { note(i + store_.layout.stages - 1); }

 private:
  __device__ char* stage_of(int i) const {
    return shared_ + i % store_.layout.stages * store_.layout.stage();
  }

  __device__ int slot_of(int i) const {
    return begin_ + i * store_.layout.slots + threadIdx.x / kWarp * share_ + lane_index();
  }

  __device__ void look_up(int i) {
    const int slot = slot_of(i);
    place_.page = -1;
    if (lane_index() < share_ && slot < end_) place_ = find(o_, store_, node_, slot);
  }

  // Start to bring the tile that was looked up.
  __device__ void copy(int i) {
    if (i < count()) {
      const Content &k = store_.pages.k, &v = store_.pages.v;
      char* stage = stage_of(i);
      factor_ = o_.factor, v_scale_ = 0, key_ = INT_MAX;
      float k_scale = 0;
      if (place_.page >= 0) {
        key_ = store_.pages.position.data ? *reinterpret_cast<const int*>(store_.pages.position.at(
                                                place_.page, head_, place_.offset))
                                          : o_.base[node_] + slot_of(i);
        k_scale = scale_of(k);
        if (Values) v_scale_ = scale_of(v);
      }
      if (!Exact) factor_ *= k_scale;
      bring(stage, k, store_.layout.k, k_scale);
      if (Values) bring(stage + store_.layout.v_at(), v, store_.layout.v, v_scale_);
    }
    commit_copies();
  }

  // Write down what is known about the slots of the tile that was started last.
  __device__ void note(int i) {
    if (i >= count() || lane_index() >= share_) return;
    const int slots = store_.layout.slots, at = threadIdx.x / kWarp * share_ + lane_index();
    auto* numbers = reinterpret_cast<float*>(stage_of(i) + store_.layout.numbers_at());
    numbers[at] = factor_, numbers[slots + at] = v_scale_;
    reinterpret_cast<int*>(numbers)[2 * slots + at] = key_;
  }

  __device__ float scale_of(const Content& x) const {
    if (x.format == Format::none) return 1;
    return number_at(x.scale.at(place_.page, head_, place_.offset), Type::f16);
  }

  __device__ void bring(char* stage, const Content& x, const RowLayout& layout, float scale) const {
    const int64_t from =
        place_.page >= 0 ? reinterpret_cast<int64_t>(x.codes.at(place_.page, head_, place_.offset))
                         : 0;
    char* to = stage + threadIdx.x / kWarp * share_ * layout.pitch;
    if constexpr (Exact) {
      for (int s = 0; s < share_; ++s, to += layout.pitch) {
        const auto* row = reinterpret_cast<const char*>(__shfl_sync(kAll, from, s));
        const float unit = __shfl_sync(kAll, scale, s);
        const int d = o_.d;
        for (int e = lane_index(); e < d; e += kWarp)
          reinterpret_cast<float*>(to)[e] = row ? element_at(x, row, e, d) * unit : 0;
      }
    } else {
      const int lanes = 1 << layout.lanes_log2, lane = lane_index() & (lanes - 1);
      for (int first = 0; first < share_; first += kWarp >> layout.lanes_log2) {
        const int s = first + (lane_index() >> layout.lanes_log2);
        const auto* row = reinterpret_cast<const char*>(__shfl_sync(kAll, from, s));
        if (s < share_) copy_row(to + s * layout.pitch, row, layout, lane, lanes);
      }
    }
  }

  __device__ static void copy_row(char* to, const char* from, const RowLayout& layout, int lane,
                                  int lanes) {
    const int bytes = from ? layout.bytes : 0;
    auto in_units = [&](auto unit) {
      constexpr int kUnit = decltype(unit)::value;
      for (int i = lane * kUnit; i < layout.padded; i += lanes * kUnit)
        copy_async<kUnit>(to + i, from ? from + i : nullptr, min(max(bytes - i, 0), kUnit));
    };
    switch (layout.unit) {
      case 16:
        return in_units(std::integral_constant<int, 16>{});
      case 8:
        return in_units(std::integral_constant<int, 8>{});
      case 4:
        return in_units(std::integral_constant<int, 4>{});
      default:
        for (int i = lane; i < layout.padded; i += lanes) to[i] = i < bytes ? from[i] : 0;
    }
  }

  const Attention& o_;
  const Store store_;
  char* const shared_;
  const int node_, head_, begin_, end_, share_;
  // Of this lane's slot: where it is in the tile that was looked up last, a page below 0 if
  // nowhere; and what is known of it in the one before, which was started.
  Place place_;
  float factor_, v_scale_;
  int key_;
};

}  // namespace kvtools::cuda
