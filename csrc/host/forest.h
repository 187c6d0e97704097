// The forest of nodes behind a paged KV store: who owns which page, and what a step must read.
// The words (page, node, row, slot) and the public contract are in kvtools/_host.pyi.
#pragma once

#include <cstdint>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace kvtools {

using Ints = std::vector<int32_t>;
using Invalid = std::invalid_argument;

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

// A borrowed one-dimensional argument.
struct View {
  const int32_t* data;
  int64_t size;
  int32_t operator[](int64_t i) const { return data[i]; }
};

// The parts in one string, for messages.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

struct PoolExhausted : std::runtime_error {
  PoolExhausted(int64_t needed, int64_t free, int64_t total);
  int64_t needed, free;
};

struct Plan {
  Ints page_indptr, page;         // [M + 1], [.]
  Ints first, length, base, own;  // [M]
  Ints token_indptr, token;       // [M + 1], [.]
  Ints item;                      // [I * 6]
  Ints part_indptr, part;         // [T + 1], [.]
  Ints leaf;                      // [rows]
};

// A plan that may come from anywhere: M nodes, I items, T query tokens.
struct PlanView {
  View page_indptr, page, first, length, base, own, store, token_indptr, token, item, part_indptr,
      part, leaf;
};

// Throws Invalid, or std::out_of_range for an id, unless kernels may follow the plan over stores
// whose pages have so many slots; returns how many pages each must have.
std::vector<int64_t> check_plan(const PlanView& plan, const Ints& page_sizes);

// Most query tokens and most slots of one work item; 0 is no limit. Without a `chunk`, work is cut
// such that the last of it ends soonest where so many `items` run at once, of nodes that tokens
// share and of others each; the longest is first.
struct Limits {
  int32_t tile, chunk, items;
};

// A forest to be stored: of each node, after its parent, kNodeFields numbers; the pages of one node
// after another; the leaf of each row.
struct Table {
  Ints node, page, row;
};
constexpr int64_t kNodeFields = 5;  // parent, first, length, base, sealed

class Forest {
 public:
  Forest(int64_t num_pages, int32_t page_size);
  // Throws Invalid unless the table, which may come from anywhere, is that of a forest.
  Forest(int64_t num_pages, int32_t page_size, View node, View page, View row);
  Table table() const;

  int32_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(refs_.size()); }
  int64_t free_pages() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t num_nodes() const { return static_cast<int64_t>(nodes_.size() - free_nodes_.size()); }
  int64_t version() const { return version_; }

  void grow(int64_t num_pages);
  Ints insert(int32_t length, int32_t base, int32_t copies);
  Ints append(View counts, bool seal);
  int64_t pages_needed(View counts, bool seal) const;
  std::pair<Ints, Ints> gather(View index, bool copy);
  int64_t gather_pages_needed(View index) const;
  void crop(View lengths);

  Ints lengths() const;
  Ints own_lengths() const;
  Ints row_slots(int64_t row) const;
  int32_t root_of(int64_t row) const;
  int64_t prefix_pages() const;
  Plan plan(View counts, Limits limits) const;
  void check() const;

 private:
  struct Node {
    int32_t parent = -1;
    int32_t first = 0;  // slot offset in the first page
    int32_t length = 0;
    int32_t base = 0;   // true position of the first slot
    int32_t start = 0;  // slots on the path above
    int32_t children = 0;
    int32_t rows = 0;  // rows whose leaf this is
    bool sealed = false;
    bool live = false;
    Ints pages;
    int32_t end() const { return start + length; }
  };

  int64_t pages_spanning(int64_t slots) const { return (slots + page_size_ - 1) / page_size_; }
  void require_pages(int64_t needed) const;
  void require_counts(View counts) const;
  void require_index(View index) const;
  void require_row(int64_t row) const;
  void take_pages(Ints& pages, int64_t count);

  int32_t new_node(int32_t parent);
  int32_t new_child(int32_t parent);
  int32_t duplicate(int32_t node);
  void split(int32_t node, int32_t length, int64_t row);
  void collect(int32_t node);
  bool grows_in_place(int32_t node) const;
  void write_slots(const Node& node, int32_t begin, Ints& out) const;
  int64_t copied_pages(View index) const;
  int64_t freed_pages(View index) const;

  int32_t page_size_;
  int64_t version_ = 0;
  Ints refs_;  // nodes that hold each page
  Ints free_;  // a stack
  std::vector<Node> nodes_;
  Ints free_nodes_;  // a stack
  Ints rows_;        // leaf of each row
};

// `table` is [., max_blocks], row-major; of each row `index` says which of it is its own. Unless
// rows `share`, each reads all of its own.
Plan plan_from_block_table(const int32_t* table, int64_t max_blocks, View index, View seq_lens,
                           int32_t page_size, View counts, Limits limits, bool share);

inline void require_per_row(View values, int64_t rows, const char* name) {
  if (values.size == rows) return;
  throw Invalid(
      text(name, " must have one entry per row: ", values.size, " entries, ", rows, " rows"));
}

}  // namespace kvtools
