// What changes the forest: every public operation counts first and commits after, so that a call
// that raises has changed nothing.
#include "forest.h"

#include <algorithm>

namespace kvtools {

PoolExhausted::PoolExhausted(int64_t needed, int64_t free, int64_t total)
    : std::runtime_error(text("the page pool is exhausted: ", needed, " more pages are needed, ",
                              free, " of ", total, " are free")),
      needed(needed),
      free(free) {}

Forest::Forest(int64_t num_pages, int32_t page_size) : page_size_(page_size) {
  if (page_size <= 0) throw Invalid(text("page_size must be positive, not ", page_size));
  grow(num_pages);
}

Forest::Forest(int64_t num_pages, int32_t page_size, View node, View page, View row)
    : Forest(num_pages, page_size) {
  const auto hold = [](bool ok, const char* what, int64_t id) {
    if (!ok) throw Invalid(text("this is no forest: ", what, " ", id));
  };
  hold(node.size % kNodeFields == 0, "numbers of nodes,", node.size);
  const int64_t count = node.size / kNodeFields;
  int64_t taken = 0;
  for (int64_t id = 0; id < count; ++id) {
    const int32_t* field = node.data + id * kNodeFields;
    Node next;
    next.parent = field[0];
    next.first = field[1];
    next.length = field[2];
    next.base = field[3];
    next.sealed = field[4] != 0;
    next.live = true;
    hold(next.parent >= -1 && next.parent < id, "parent of node", id);
    hold(next.first >= 0 && next.first < page_size_, "first slot of node", id);
    if (next.parent >= 0) {
      next.start = nodes_[next.parent].end();
      ++nodes_[next.parent].children;
    }
    const int32_t most = static_cast<int32_t>(kMaxInt32) - std::max(next.start, next.first);
    hold(next.length >= 0 && next.length <= most, "length of node", id);
    hold(next.base >= 0 && next.base <= kMaxInt32 - next.length, "base of node", id);
    const int64_t pages = next.length > 0 ? pages_spanning(int64_t{next.first} + next.length) : 0;
    hold(pages <= page.size - taken, "pages of node", id);
    next.pages.assign(page.data + taken, page.data + taken + pages);
    taken += pages;
    for (int32_t x : next.pages) {
      hold(x >= 0 && x < this->num_pages(), "page of node", id);
      ++refs_[x];
    }
    nodes_.push_back(std::move(next));
  }
  hold(taken == page.size, "pages beyond node", count);
  for (int64_t i = 0; i < row.size; ++i) {
    hold(row[i] >= 0 && row[i] < count, "leaf of row", i);
    ++nodes_[row[i]].rows;
    rows_.push_back(row[i]);
  }
  free_.clear();
  for (int64_t x = this->num_pages(); x-- > 0;) {
    if (refs_[x] == 0) free_.push_back(static_cast<int32_t>(x));
  }
  try {
    check();
  } catch (const std::runtime_error& error) {
    throw Invalid(error.what());
  }
}

void Forest::grow(int64_t num_pages) {
  const int64_t present = this->num_pages();
  if (num_pages < present) {
    throw Invalid(text("num_pages: ", num_pages, " is less than the present ", present));
  }
  if (num_pages > kMaxInt32 / page_size_) {  // flat slot ids are int32
    throw Invalid(text("num_pages: ", num_pages, " pages of ", page_size_,
                       " slots are more than 2**31 - 1 slots"));
  }
  free_.reserve(num_pages);
  refs_.resize(num_pages, 0);
  for (int64_t page = num_pages; page-- > present;) free_.push_back(static_cast<int32_t>(page));
}

Ints Forest::insert(int32_t length, int32_t base, int32_t copies) {
  if (length < 0) throw Invalid(text("length is negative: ", length));
  if (base < 0 || base > kMaxInt32 - length) {
    throw Invalid(text("base: positions ", base, " + ", length, " are not within 0..2**31 - 1"));
  }
  if (copies <= 0) throw Invalid(text("copies must be positive, not ", copies));
  require_pages(pages_spanning(length));
  rows_.reserve(rows_.size() + copies);

  const int32_t id = new_node(-1);
  Node& node = nodes_[id];
  node.base = base;
  node.length = length;
  node.sealed = true;
  node.rows = copies;
  take_pages(node.pages, pages_spanning(length));
  rows_.insert(rows_.end(), copies, id);
  ++version_;
  Ints slots;
  write_slots(node, 0, slots);
  return slots;
}

int64_t Forest::pages_needed(View counts, bool seal) const {
  require_counts(counts);
  int64_t needed = 0;
  for (int64_t row = 0; row < counts.size; ++row) {
    if (counts[row] == 0) continue;
    const Node& leaf = nodes_[rows_[row]];
    if (seal && !leaf.sealed) {
      throw Invalid(text("seal: row ", row, " has grown, and what is sealed comes before that"));
    }
    needed += grows_in_place(rows_[row])
                  ? pages_spanning(int64_t{leaf.first} + leaf.length + counts[row]) -
                        static_cast<int64_t>(leaf.pages.size())
                  : pages_spanning(counts[row]);
  }
  return needed;
}

Ints Forest::append(View counts, bool seal) {
  const int64_t needed = pages_needed(counts, seal);
  require_pages(needed);
  Ints slots;
  for (int64_t row = 0; row < counts.size; ++row) {
    if (counts[row] == 0) continue;
    if (!grows_in_place(rows_[row])) rows_[row] = new_child(rows_[row]);
    Node& leaf = nodes_[rows_[row]];
    const int32_t begin = leaf.length;
    leaf.length += counts[row];
    take_pages(leaf.pages, pages_spanning(int64_t{leaf.first} + leaf.length));
    leaf.sealed = seal;
    write_slots(leaf, begin, slots);
  }
  // Each new node brings a page, so this covers the tree as well as the page lists.
  if (needed > 0) ++version_;
  return slots;
}

std::pair<Ints, Ints> Forest::gather(View index, bool copy) {
  require_index(index);
  const bool scarce = copy && copied_pages(index) > free_pages();
  if (scarce) require_pages(gather_pages_needed(index));

  Ints next(index.size);
  for (int64_t i = 0; i < index.size; ++i) {
    next[i] = rows_[index[i]];
    ++nodes_[next[i]].rows;
  }
  bool changed = next != rows_;
  rows_.swap(next);
  for (int32_t leaf : next) --nodes_[leaf].rows;
  const auto sweep = [&] {
    for (int32_t leaf : next) collect(leaf);
  };
  if (scarce) sweep();

  Ints src, dst;
  if (copy) {
    // Backwards, so that the first of the rows keeps the original.
    for (int64_t row = num_rows(); row-- > 0;) {
      const int32_t leaf = rows_[row];
      if (nodes_[leaf].sealed || nodes_[leaf].rows == 1) continue;
      rows_[row] = duplicate(leaf);
      const Ints &from = nodes_[leaf].pages, &to = nodes_[rows_[row]].pages;
      src.insert(src.end(), from.begin(), from.end());
      dst.insert(dst.end(), to.begin(), to.end());
      changed = true;
    }
  }
  if (!scarce) sweep();
  if (changed) ++version_;
  return {std::move(src), std::move(dst)};
}

int64_t Forest::gather_pages_needed(View index) const {
  require_index(index);
  return std::max<int64_t>(0, copied_pages(index) - freed_pages(index));
}

void Forest::crop(View lengths) {
  require_per_row(lengths, num_rows(), "lengths");
  for (int64_t row = 0; row < lengths.size; ++row) {
    const int32_t present = nodes_[rows_[row]].end();
    if (lengths[row] < 0 || lengths[row] > present) {
      throw Invalid(text("lengths: row ", row, " cannot be cropped to ", lengths[row],
                         " slots, it holds ", present));
    }
  }
  bool changed = false;
  for (int64_t row = 0; row < lengths.size; ++row) {
    const int32_t leaf = rows_[row], length = lengths[row];
    if (length == nodes_[leaf].end()) continue;
    int32_t node = leaf;
    while (nodes_[node].start >= length && nodes_[node].parent >= 0) node = nodes_[node].parent;
    if (node != leaf) {
      rows_[row] = node;
      ++nodes_[node].rows;
      --nodes_[leaf].rows;
      collect(leaf);
    }
    if (length < nodes_[node].end()) split(node, length - nodes_[node].start, row);
    changed = true;
  }
  if (changed) ++version_;
}

void Forest::require_pages(int64_t needed) const {
  if (needed > free_pages()) throw PoolExhausted(needed, free_pages(), num_pages());
}

void Forest::require_counts(View counts) const {
  require_per_row(counts, num_rows(), "counts");
  for (int64_t row = 0; row < counts.size; ++row) {
    if (counts[row] < 0) throw Invalid(text("counts: row ", row, " has ", counts[row]));
    const Node& leaf = nodes_[rows_[row]];
    if (int64_t{leaf.base} + leaf.length + counts[row] > kMaxInt32) {
      throw Invalid(text("counts: row ", row, " would pass position 2**31 - 1"));
    }
  }
}

void Forest::require_index(View index) const {
  for (int64_t i = 0; i < index.size; ++i) require_row(index[i]);
}

void Forest::require_row(int64_t row) const {
  if (row < 0 || row >= num_rows()) {
    throw std::out_of_range(text("row ", row, " is out of range, there are ", num_rows(), " rows"));
  }
}

// Brings `pages` up to `count`.
void Forest::take_pages(Ints& pages, int64_t count) {
  while (static_cast<int64_t>(pages.size()) < count) {
    const int32_t page = free_.back();
    free_.pop_back();
    refs_[page] = 1;
    pages.push_back(page);
  }
}

int32_t Forest::new_node(int32_t parent) {
  if (free_nodes_.empty()) {
    free_nodes_.push_back(static_cast<int32_t>(nodes_.size()));
    nodes_.emplace_back();
  }
  const int32_t id = free_nodes_.back();
  free_nodes_.pop_back();
  Node node;
  node.parent = parent;
  node.live = true;
  if (parent >= 0) {
    ++nodes_[parent].children;
    node.start = nodes_[parent].end();
    node.base = nodes_[parent].base + nodes_[parent].length;
  }
  nodes_[id] = std::move(node);
  return id;
}

// Moves one row of `parent` to a new, empty child.
int32_t Forest::new_child(int32_t parent) {
  const int32_t id = new_node(parent);
  --nodes_[parent].rows;
  nodes_[id].rows = 1;
  return id;
}

// Moves one row of `node` to a copy of it on fresh pages.
int32_t Forest::duplicate(int32_t node) {
  const int32_t id = new_node(nodes_[node].parent);
  Node &from = nodes_[node], &to = nodes_[id];
  to.first = from.first;
  to.length = from.length;
  take_pages(to.pages, static_cast<int64_t>(from.pages.size()));
  --from.rows;
  to.rows = 1;
  return id;
}

// Cuts `node` in two after `length` slots. `row` stays on the upper half; all else that hung on the
// node goes to the lower, which vanishes at once if that is nothing.
void Forest::split(int32_t node, int32_t length, int64_t row) {
  const int32_t id = new_node(node);
  Node &upper = nodes_[node], &lower = nodes_[id];
  const int32_t cut = upper.first + length, page = cut / page_size_;
  lower.first = cut % page_size_;
  lower.length = upper.length - length;
  lower.base = upper.base + length;
  lower.start = upper.start + length;
  lower.sealed = upper.sealed;
  lower.rows = upper.rows - 1;
  lower.children = upper.children - 1;  // new_node counted the lower half itself
  lower.pages.assign(upper.pages.begin() + page, upper.pages.end());
  upper.pages.resize(length > 0 ? pages_spanning(cut) : 0);
  if (length == 0) upper.first = 0;
  upper.length = length;
  if (upper.pages.size() > static_cast<size_t>(page)) ++refs_[lower.pages.front()];
  upper.rows = 1;
  upper.children = 1;

  if (lower.rows > 0) {
    for (int64_t other = 0; other < num_rows(); ++other) {
      if (other != row && rows_[other] == node) rows_[other] = id;
    }
  }
  if (lower.children > 0) {
    for (Node& child : nodes_) {
      if (child.live && child.parent == node && &child != &lower) child.parent = id;
    }
  }
  collect(id);
}

// Frees `node`, and then its ancestors, as far as nothing uses them.
void Forest::collect(int32_t node) {
  while (node >= 0 && nodes_[node].live && nodes_[node].rows == 0 && nodes_[node].children == 0) {
    for (int32_t page : nodes_[node].pages) {
      if (--refs_[page] == 0) free_.push_back(page);
    }
    const int32_t parent = nodes_[node].parent;
    nodes_[node] = Node();
    free_nodes_.push_back(node);
    if (parent >= 0) --nodes_[parent].children;
    node = parent;
  }
}

bool Forest::grows_in_place(int32_t id) const {
  const Node& node = nodes_[id];
  if (node.sealed || node.rows != 1 || node.children > 0) return false;
  return (node.first + node.length) % page_size_ == 0 || refs_[node.pages.back()] == 1;
}

void Forest::write_slots(const Node& node, int32_t begin, Ints& out) const {
  for (int32_t slot = node.first + begin; slot < node.first + node.length; ++slot) {
    out.push_back(node.pages[slot / page_size_] * page_size_ + slot % page_size_);
  }
}

// Pages that gather(index, copy) copies.
int64_t Forest::copied_pages(View index) const {
  Ints uses(nodes_.size());
  int64_t pages = 0;
  for (int64_t i = 0; i < index.size; ++i) {
    const int32_t leaf = rows_[index[i]];
    if (!nodes_[leaf].sealed && uses[leaf]++ > 0) {
      pages += static_cast<int64_t>(nodes_[leaf].pages.size());
    }
  }
  return pages;
}

// Pages that gather(index) returns to the pool.
int64_t Forest::freed_pages(View index) const {
  std::vector<bool> kept(nodes_.size());
  for (int64_t i = 0; i < index.size; ++i) {
    for (int32_t node = rows_[index[i]]; node >= 0 && !kept[node]; node = nodes_[node].parent) {
      kept[node] = true;
    }
  }
  Ints refs = refs_;
  int64_t freed = 0;
  for (size_t id = 0; id < nodes_.size(); ++id) {
    if (kept[id]) continue;
    for (int32_t page : nodes_[id].pages) freed += --refs[page] == 0;
  }
  return freed;
}

}  // namespace kvtools
