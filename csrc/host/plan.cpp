// What one attention call reads: nodes, the query tokens of each, and work items.
#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <numeric>
#include <queue>
#include <tuple>

#include "forest.h"

namespace kvtools {

namespace {

// A node as planning sees it. A list of runs has parents before children.
struct Run {
  int32_t parent;
  const int32_t* page;
  int32_t first, length, base;
  int32_t capacity;  // slots that `length` may come to without a new plan
  bool sealed, grows;
};

// Shorter items would cost more in partial results than they spread.
constexpr int64_t kLeastChunk = 128;
// What an item costs besides its slots, in slots: queries, partial results, the merge.
constexpr int64_t kItem = 64;
constexpr size_t kFields = 6;    // of an item
constexpr int64_t kRounds = 16;  // of items: what many rows have anyway needs no finer cut

void require_limits(Limits limits, int32_t page_size) {
  if (limits.items < 0) throw Invalid(text("items is negative: ", limits.items));
  if (limits.tile < 0) throw Invalid(text("tile is negative: ", limits.tile));
  if (limits.chunk < 0 || limits.chunk % page_size != 0) {
    throw Invalid(
        text("chunk must be a multiple of page_size ", page_size, ", not ", limits.chunk));
  }
}

void require_tokens(View counts) {
  int64_t total = 0;
  for (int64_t row = 0; row < counts.size; ++row) {
    if (counts[row] < 0) throw Invalid(text("counts: row ", row, " has ", counts[row]));
    total += counts[row];
  }
  if (total > kMaxInt32) throw Invalid(text("counts: ", total, " tokens are more than 2**31 - 1"));
}

// Chunks outside, tiles inside: neighbouring items read the same slots.
void add_items(Plan& plan, int64_t& parts, int32_t node, const Run& run, int32_t tokens,
               Limits limits) {
  const int32_t base = plan.token_indptr.back();
  const int64_t chunk = limits.chunk > 0 ? limits.chunk : kMaxInt32;
  const int32_t tile = limits.tile > 0 ? limits.tile : tokens;
  for (int32_t slot = 0; slot < run.capacity;) {
    const int64_t border = ((run.first + slot) / chunk + 1) * chunk - run.first;
    const auto slot_end = static_cast<int32_t>(std::min<int64_t>(run.capacity, border));
    for (int32_t token = 0; token < tokens;) {
      const int32_t token_end = tokens - token > tile ? token + tile : tokens;
      const auto part = static_cast<int32_t>(parts);
      plan.item.insert(plan.item.end(),
                       {node, base + token, base + token_end, slot, slot_end, part});
      parts += token_end - token;
      if (parts > kMaxInt32) throw Invalid("chunk: the plan's partial results pass 2**31 - 1");
      token = token_end;
    }
    slot = slot_end;
  }
}

// Longest first, so that no long item is left alone at the end; shared ones before rows' own.
void sort_items(Plan& plan) {
  using Item = std::array<int32_t, kFields>;
  std::vector<Item> items(plan.item.size() / kFields);
  std::copy(plan.item.begin(), plan.item.end(), items.empty() ? nullptr : items[0].data());
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) {
    const int32_t x = a[4] - a[3], y = b[4] - b[3];
    return x != y ? x > y : a[2] - a[1] > b[2] - b[1];
  });
  if (!items.empty()) std::copy_n(items[0].data(), plan.item.size(), plan.item.begin());
}

// Which partial results each token has: a counting sort of the items' tokens.
void add_parts(Plan& plan, int32_t tokens, int64_t parts) {
  const auto each = [&plan](auto f) {
    for (size_t i = 0; i < plan.item.size(); i += kFields) {
      const int32_t* item = plan.item.data() + i;
      for (int32_t c = item[1]; c < item[2]; ++c) f(plan.token[c], item[5] + c - item[1]);
    }
  };
  plan.part_indptr.assign(tokens + 1, 0);
  each([&plan](int32_t token, int32_t) { ++plan.part_indptr[token + 1]; });
  std::partial_sum(plan.part_indptr.begin(), plan.part_indptr.end(), plan.part_indptr.begin());
  Ints cursor(plan.part_indptr);
  plan.part.resize(parts);
  each([&](int32_t token, int32_t part) { plan.part[cursor[token]++] = part; });
}

// So many slots of each item of a run that parts of about `most` are of one size.
int32_t even_chunk(const Run& run, int64_t most, int32_t page_size) {
  const int64_t end = int64_t{run.first} + run.capacity, parts = (end + most - 1) / most;
  const int64_t pages = ((end + parts - 1) / parts + page_size - 1) / page_size;
  return static_cast<int32_t>(std::min<int64_t>(pages, kMaxInt32 / page_size) * page_size);
}

// When the last of items of about `most` slots ends, in slots, if `places` run at once; and how
// many there are.
std::pair<int64_t, int64_t> span(const std::vector<Run>& runs, const std::vector<int64_t>& tokens,
                                 int64_t most, int32_t page_size, Limits limits) {
  std::vector<std::pair<int64_t, int64_t>> alike;  // what an item costs, how many there are
  for (size_t i = 0; i < runs.size(); ++i) {
    if (tokens[i] == 0 || runs[i].length == 0) continue;
    const int64_t tile = limits.tile > 0 ? limits.tile : tokens[i];
    const int64_t tiles = (tokens[i] + tile - 1) / tile;
    const int64_t chunk = even_chunk(runs[i], most, page_size);
    const int64_t end = int64_t{runs[i].first} + runs[i].capacity;
    for (int64_t slot = runs[i].first; slot < end; slot = (slot / chunk + 1) * chunk) {
      const int64_t slots = std::min(end, (slot / chunk + 1) * chunk) - slot;
      alike.emplace_back(kItem + slots, tiles);
    }
  }
  std::sort(alike.begin(), alike.end(), std::greater<>());
  int64_t count = 0;
  for (const auto& [cost, tiles] : alike) count += tiles;
  if (count <= limits.items) return {alike.empty() ? 0 : alike[0].first, count};
  std::priority_queue<int64_t, std::vector<int64_t>, std::greater<>> free;
  for (int32_t i = 0; i < limits.items; ++i) free.push(0);
  int64_t last = 0;
  for (const auto& [cost, tiles] : alike)
    for (int64_t i = 0; i < tiles; ++i) {
      last = std::max(last, free.top() + cost);
      free.push(free.top() + cost);
      free.pop();
    }
  return {last, count};
}

// How long items should be if `limits.items` run at once: the finest cut of which the last ends
// within 2 % of the best one's, since a kernel of which more run at once gains by it.
int64_t choose_chunk(const std::vector<Run>& runs, const std::vector<int64_t>& tokens,
                     int32_t page_size, Limits limits) {
  int64_t work = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t tile = limits.tile > 0 ? limits.tile : std::max<int64_t>(tokens[i], 1);
    work += (tokens[i] + tile - 1) / tile * int64_t{runs[i].capacity};
  }
  std::vector<std::pair<int64_t, int64_t>> cuts;  // chunk, when the last ends
  for (int64_t rounds = 1; rounds <= 6; ++rounds) {
    const int64_t items = limits.items * rounds;
    const int64_t least = std::max(kLeastChunk, (work + items - 1) / items);
    int64_t last, count = items + 1;
    // A few more than there are places take a round more: somewhat longer ones may do.
    for (int64_t chunk = least; count > items && chunk < 5 * least / 4;
         chunk += (chunk + 15) / 16) {
      std::tie(last, count) = span(runs, tokens, chunk, page_size, limits);
      cuts.emplace_back(chunk, last);
      if (count > items + items / 4) break;
    }
    if (least == kLeastChunk || count > kRounds * limits.items) break;
  }
  int64_t best = INT64_MAX, chunk = INT64_MAX;
  for (const auto& cut : cuts) best = std::min(best, cut.second);
  for (const auto& cut : cuts)
    if (cut.second <= best + best / 50) chunk = std::min(chunk, cut.first);
  return chunk;
}

// `leaf` is the last run of each row, -1 for a row that holds nothing.
Plan make_plan(const std::vector<Run>& runs, const Ints& leaf, View counts, int32_t page_size,
               Limits limits) {
  const auto num_rows = static_cast<int64_t>(leaf.size());
  Ints rows(runs.size());
  std::vector<int64_t> tokens(runs.size());
  for (int64_t row = 0; row < num_rows; ++row) {
    if (leaf[row] < 0) continue;
    ++rows[leaf[row]];
    tokens[leaf[row]] += counts[row];
  }
  for (size_t i = runs.size(); i-- > 0;) {
    if (runs[i].parent < 0) continue;
    rows[runs[i].parent] += rows[i];
    tokens[runs[i].parent] += tokens[i];
  }

  const bool cut = limits.items > 0 && limits.chunk == 0;
  int64_t most[2] = {};  // of what a token has alone, of what several share
  if (cut) {
    std::vector<int64_t> alone(tokens), shared(tokens);
    for (size_t i = 0; i < runs.size(); ++i) (tokens[i] > 1 ? alone : shared)[i] = 0;
    most[1] = choose_chunk(runs, shared, page_size, limits);
    // A kernel for a token's rows alone takes fewer registers: half as many again run at once.
    if (shared == std::vector<int64_t>(runs.size()))
      limits.items = std::min(kMaxInt32, int64_t{limits.items} * 3 / 2);
    most[0] = choose_chunk(runs, alone, page_size, limits);
  }
  Plan plan;
  plan.page_indptr = plan.token_indptr = {0};
  Ints number(runs.size(), -1);
  const auto pages_of = [page_size](const Run& run) {
    return (run.first + run.capacity - 1) / page_size + 1;
  };
  plan.page.reserve(std::accumulate(runs.begin(), runs.end(), size_t{0},
                                    [&](size_t n, const Run& run) { return n + pages_of(run); }));
  int64_t attended = 0, parts = 0;
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run& run = runs[i];
    if (tokens[i] == 0 || run.length == 0) continue;
    attended += tokens[i];
    if (attended > kMaxInt32) throw Invalid("counts: the plan's token list passes 2**31 - 1");
    number[i] = static_cast<int32_t>(plan.first.size());
    plan.page.insert(plan.page.end(), run.page, run.page + pages_of(run));
    plan.page_indptr.push_back(static_cast<int32_t>(plan.page.size()));
    plan.first.push_back(run.first);
    plan.length.push_back(run.length);
    plan.base.push_back(run.base);
    plan.own.push_back(rows[i] == 1 && !run.sealed);
    if (cut) limits.chunk = even_chunk(run, most[tokens[i] > 1], page_size);
    add_items(plan, parts, number[i], run, static_cast<int32_t>(tokens[i]), limits);
    plan.token_indptr.push_back(static_cast<int32_t>(attended));
  }

  if (cut) sort_items(plan);
  plan.token.resize(attended);
  Ints cursor(plan.token_indptr);
  int32_t token = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int32_t i = leaf[row]; i >= 0; i = runs[i].parent) {
      if (number[i] < 0) continue;
      int32_t& at = cursor[number[i]];
      std::iota(plan.token.data() + at, plan.token.data() + at + counts[row], token);
      at += counts[row];
    }
    token += counts[row];
    plan.leaf.push_back(leaf[row] >= 0 && runs[leaf[row]].grows ? number[leaf[row]] : -1);
  }
  add_parts(plan, token, parts);
  return plan;
}

bool any_negative(const int32_t* begin, const int32_t* end) {
  return std::accumulate(begin, end, 0, std::bit_or<>()) < 0;  // in whole vectors
}

// Up to where from `begin` on two rows have the same blocks, `end` at most.
int32_t alike(const int32_t* a, const int32_t* b, int32_t begin, int32_t end) {
  constexpr int32_t kStretch = 64;  // by which memcmp is much faster than one by one
  while (end - begin >= kStretch &&
         std::memcmp(a + begin, b + begin, kStretch * sizeof(int32_t)) == 0) {
    begin += kStretch;
  }
  return static_cast<int32_t>(std::mismatch(a + begin, a + end, b + begin).first - a);
}

void require_size(View x, int64_t size, const char* name, const char* what) {
  if (x.size != size)
    throw Invalid(text(name, " has ", x.size, " entries; ", what, " need ", size));
}

void require_id(int64_t id, int64_t end, const char* name, const char* what) {
  if (id >= 0 && id < end) return;
  throw std::out_of_range(text(name, " holds ", id, "; there are ", end, " ", what));
}

// Rising offsets into `size` values.
void require_offsets(View x, int64_t size, const char* name, const char* of) {
  for (int64_t i = 0; i < x.size; ++i)
    if (x[i] < (i ? x[i - 1] : 0) || x[i] > size)
      throw std::out_of_range(text(name, " holds ", x[i], " at ", i,
                                   "; it must rise from 0 to no more than the ", size,
                                   " entries of ", of));
}

}  // namespace

std::vector<int64_t> check_plan(const PlanView& plan, const Ints& page_sizes) {
  for (int32_t size : page_sizes)
    if (size <= 0) throw Invalid(text("page_size must be positive, not ", size));
  if (plan.page_indptr.size < 1) throw Invalid("page_indptr is empty; it begins with a 0");
  if (plan.part_indptr.size < 1) throw Invalid("part_indptr is empty; it begins with a 0");
  const int64_t nodes = plan.page_indptr.size - 1, tokens = plan.part_indptr.size - 1;
  const char* const of_nodes = "the nodes of page_indptr";
  require_size(plan.first, nodes, "first", of_nodes);
  require_size(plan.length, nodes, "length", of_nodes);
  require_size(plan.base, nodes, "base", of_nodes);
  require_size(plan.own, nodes, "own", of_nodes);
  require_size(plan.store, nodes, "store", of_nodes);
  require_size(plan.token_indptr, nodes + 1, "token_indptr", of_nodes);
  require_offsets(plan.page_indptr, plan.page.size, "page_indptr", "page");
  require_offsets(plan.token_indptr, plan.token.size, "token_indptr", "token");
  require_offsets(plan.part_indptr, plan.part.size, "part_indptr", "part");

  const auto stores = static_cast<int64_t>(page_sizes.size());
  std::vector<int64_t> pages(stores);
  if (any_negative(plan.page.data, plan.page.data + plan.page.size)) {
    const int32_t* end = plan.page.data + plan.page.size;
    throw std::out_of_range(text("page holds ", *std::min_element(plan.page.data, end)));
  }
  for (int64_t i = 0; i < nodes; ++i) {
    require_id(plan.store[i], stores, "store", "stores");
    int64_t& most = pages[plan.store[i]];
    int32_t last = -1;
    for (int64_t j = plan.page_indptr[i]; j < plan.page_indptr[i + 1]; ++j)
      last = std::max(last, plan.page[j]);
    most = std::max(most, last + int64_t{1});
  }
  for (int64_t i = 0; i < plan.token.size; ++i)
    require_id(plan.token[i], tokens, "token", "query tokens");
  for (int64_t i = 0; i < plan.leaf.size; ++i)
    if (plan.leaf[i] != -1) require_id(plan.leaf[i], nodes, "leaf", "nodes");
  auto capacity = [&](int64_t node) {
    const int64_t held = plan.page_indptr[node + 1] - plan.page_indptr[node];
    return held ? held * page_sizes[plan.store[node]] - plan.first[node] : 0;
  };
  for (int64_t i = 0; i < nodes; ++i) {
    require_id(plan.first[i], page_sizes[plan.store[i]], "first", "slots in a page");
    if (plan.length[i] < 0) throw Invalid(text("length holds ", plan.length[i]));
    if (plan.base[i] == INT32_MIN)  // to kernels, the last position that is too old
      throw Invalid(text("base holds ", plan.base[i], ", which is no position"));
    if (plan.base[i] > kMaxInt32 - std::max<int64_t>(capacity(i), 0))
      throw Invalid(text("base holds ", plan.base[i], "; positions would pass 2**31 - 1"));
  }

  // Each partial result is written once, by the item that has its token, and read by that token.
  const int64_t parts = plan.part.size;
  Ints owner(parts, -1);
  for (int64_t i = 0; i < plan.item.size; i += 6) {
    const int32_t* item = plan.item.data + i;
    const int64_t node = item[0];
    require_id(node, nodes, "item", "nodes");
    const auto within = [&](int64_t begin, int64_t end, int64_t least, int64_t most,
                            const char* what) {
      if (least <= begin && begin <= end && end <= most) return;
      throw std::out_of_range(text("item ", i / 6, " has ", what, " ", begin, " to ", end,
                                   "; its node has ", least, " to ", most));
    };
    within(item[1], item[2], plan.token_indptr[node], plan.token_indptr[node + 1], "tokens");
    within(item[3], item[4], 0, capacity(node), "slots");
    for (int64_t c = item[1], part = item[5]; c < item[2]; ++c, ++part) {
      require_id(part, parts, "item", "partial results");
      if (owner[part] >= 0) throw Invalid(text("item: two write the partial result ", part));
      owner[part] = plan.token[c];
    }
  }
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t i = plan.part_indptr[token]; i < plan.part_indptr[token + 1]; ++i) {
      require_id(plan.part[i], parts, "part", "partial results");
      if (owner[plan.part[i]] != token)
        throw Invalid(text("part: token ", token, " has the partial result ", plan.part[i],
                           ", which is no item's of that token"));
    }
  return pages;
}

Plan Forest::plan(View counts, Limits limits) const {
  require_per_row(counts, num_rows(), "counts");
  require_tokens(counts);
  require_limits(limits, page_size_);
  std::vector<Run> runs;
  runs.reserve(nodes_.size());
  Ints number(nodes_.size(), -1), leaf, path;
  for (int32_t end : rows_) {
    path.clear();
    for (int32_t id = end; id >= 0 && number[id] < 0; id = nodes_[id].parent) path.push_back(id);
    for (auto id = path.rbegin(); id != path.rend(); ++id) {
      const Node& node = nodes_[*id];
      const bool grows = grows_in_place(*id);
      const auto slots = static_cast<int32_t>(node.pages.size()) * page_size_ - node.first;
      number[*id] = static_cast<int32_t>(runs.size());
      runs.push_back({node.parent < 0 ? -1 : number[node.parent], node.pages.data(), node.first,
                      node.length, node.base, grows ? slots : node.length, node.sealed, grows});
    }
    leaf.push_back(number[end]);
  }
  return make_plan(runs, leaf, counts, page_size_, limits);
}

Plan plan_from_block_table(const int32_t* table, int64_t max_blocks, View index, View seq_lens,
                           int32_t page_size, View counts, Limits limits, bool share) {
  if (page_size <= 0) throw Invalid(text("page_size must be positive, not ", page_size));
  require_per_row(counts, seq_lens.size, "counts");
  require_tokens(counts);
  require_limits(limits, page_size);
  const auto blocks = [&](int32_t row) { return table + index[row] * max_blocks; };
  const auto full = [&](int32_t row) { return seq_lens[row] / page_size; };
  const int64_t most = std::min<int64_t>(max_blocks * page_size, kMaxInt32 - page_size);
  for (int64_t row = 0; row < seq_lens.size; ++row) {
    if (seq_lens[row] < 0 || seq_lens[row] > most) {
      throw Invalid(
          text("seq_lens: row ", row, " has ", seq_lens[row], ", a row of the table holds ", most));
    }
  }

  // Rows of `order` from begin to end share their first `depth` blocks, all of them full.
  struct Group {
    int64_t begin, end;
    int32_t depth, parent;
  };
  Ints order(seq_lens.size), leaf(seq_lens.size, -1);
  std::iota(order.begin(), order.end(), 0);
  std::vector<Run> runs;
  std::vector<Group> groups;
  if (share)
    groups.push_back({0, seq_lens.size, 0, -1});
  else
    for (int64_t row = 0; row < seq_lens.size; ++row) groups.push_back({row, row + 1, 0, -1});
  const auto add_run = [&](int32_t row, int32_t depth, int32_t parent, int32_t length, bool grows) {
    const int32_t capacity = grows ? (length + page_size - 1) / page_size * page_size : length;
    // Here, since what rows share needs to be looked at once.
    const int32_t* page = blocks(row) + depth;
    if (any_negative(page, page + capacity / page_size)) {
      throw Invalid(text("block_table: row ", row,
                         " has a block within its length that is negative or no int32"));
    }
    runs.push_back({parent, page, 0, length, depth * page_size, capacity, false, grows});
    return static_cast<int32_t>(runs.size()) - 1;
  };
  for (size_t i = 0; i < groups.size(); ++i) {
    const Group group = groups[i];
    if (group.begin == group.end) continue;
    const int32_t lead = order[group.begin];
    if (group.end - group.begin == 1) {
      const int32_t rest = seq_lens[lead] - group.depth * page_size;
      leaf[lead] = rest > 0 ? add_run(lead, group.depth, group.parent, rest, true) : group.parent;
      continue;
    }
    int32_t depth = full(lead);
    for (int64_t j = group.begin + 1; j < group.end; ++j) {
      depth = alike(blocks(lead), blocks(order[j]), group.depth, std::min(depth, full(order[j])));
    }
    const int32_t node = depth > group.depth ? add_run(lead, group.depth, group.parent,
                                                       (depth - group.depth) * page_size, false)
                                             : group.parent;

    // Rows whose full blocks end here come first, the others by their next block.
    const auto key = [&](int32_t row) -> int64_t {
      return full(row) == depth ? INT64_MIN : blocks(row)[depth];
    };
    std::stable_sort(order.begin() + group.begin, order.begin() + group.end,
                     [&](int32_t a, int32_t b) { return key(a) < key(b); });
    for (int64_t begin = group.begin, next; begin < group.end; begin = next) {
      next = begin + 1;
      if (full(order[begin]) > depth) {
        while (next < group.end && key(order[next]) == key(order[begin])) ++next;
      }
      groups.push_back({begin, next, depth, node});
    }
  }
  return make_plan(runs, leaf, counts, page_size, limits);
}

}  // namespace kvtools
