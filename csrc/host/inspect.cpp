// What reads the forest without changing it.
#include <algorithm>

#include "forest.h"

namespace kvtools {

Ints Forest::lengths() const {
  Ints lengths;
  for (int32_t leaf : rows_) lengths.push_back(nodes_[leaf].end());
  return lengths;
}

Ints Forest::own_lengths() const {
  Ints lengths;
  for (int32_t leaf : rows_) {
    int32_t node = leaf;
    while (!nodes_[node].sealed) node = nodes_[node].parent;  // a root is always sealed
    lengths.push_back(nodes_[leaf].end() - nodes_[node].end());
  }
  return lengths;
}

Ints Forest::row_slots(int64_t row) const {
  require_row(row);
  Ints path;
  for (int32_t node = rows_[row]; node >= 0; node = nodes_[node].parent) path.push_back(node);
  Ints slots;
  for (auto node = path.rbegin(); node != path.rend(); ++node) {
    write_slots(nodes_[*node], 0, slots);
  }
  return slots;
}

int32_t Forest::root_of(int64_t row) const {
  require_row(row);
  int32_t node = rows_[row];
  while (nodes_[node].parent >= 0) node = nodes_[node].parent;
  return node;
}

int64_t Forest::prefix_pages() const {
  std::vector<bool> sealed(refs_.size());
  for (const Node& node : nodes_) {
    if (!node.live || !node.sealed) continue;
    for (int32_t page : node.pages) sealed[page] = true;
  }
  return std::count(sealed.begin(), sealed.end(), true);
}

Table Forest::table() const {
  Ints depth(nodes_.size()), order, number(nodes_.size());
  for (size_t id = 0; id < nodes_.size(); ++id) {
    for (int32_t up = nodes_[id].parent; up >= 0; up = nodes_[up].parent) ++depth[id];
    if (nodes_[id].live) order.push_back(static_cast<int32_t>(id));
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return depth[a] < depth[b]; });
  Table table;
  for (size_t i = 0; i < order.size(); ++i) {
    const Node& node = nodes_[order[i]];
    number[order[i]] = static_cast<int32_t>(i);
    const int32_t parent = node.parent < 0 ? -1 : number[node.parent];
    for (int32_t x : {parent, node.first, node.length, node.base, int32_t{node.sealed}}) {
      table.node.push_back(x);
    }
    table.page.insert(table.page.end(), node.pages.begin(), node.pages.end());
  }
  for (int32_t leaf : rows_) table.row.push_back(number[leaf]);
  return table;
}

void Forest::check() const {
  const auto hold = [](bool ok, const char* what, int64_t id) {
    if (!ok) throw std::runtime_error(text("broken forest: ", what, " ", id));
  };
  const auto num_ids = static_cast<int64_t>(nodes_.size());
  Ints refs(refs_.size()), rows(nodes_.size()), children(nodes_.size());
  std::vector<bool> held(refs_.size() * page_size_), listed(refs_.size());

  for (int64_t row = 0; row < num_rows(); ++row) {
    hold(rows_[row] >= 0 && rows_[row] < num_ids && nodes_[rows_[row]].live, "leaf of row", row);
    ++rows[rows_[row]];
  }
  int64_t live = 0;
  for (int64_t id = 0; id < num_ids; ++id) {
    const Node& node = nodes_[id];
    if (!node.live) continue;
    ++live;
    hold(node.first >= 0 && node.first < page_size_, "first slot of node", id);
    const int64_t pages = node.length > 0 ? pages_spanning(int64_t{node.first} + node.length) : 0;
    hold(static_cast<int64_t>(node.pages.size()) == pages, "page count of node", id);
    for (int32_t page : node.pages) {
      hold(page >= 0 && page < num_pages(), "page of node", id);
      ++refs[page];
    }
    Ints slots;
    write_slots(node, 0, slots);
    for (int32_t slot : slots) {
      hold(!held[slot], "two nodes hold slot", slot);
      held[slot] = true;
    }
    if (node.parent < 0) {
      hold(node.sealed && node.start == 0, "root", id);
      continue;
    }
    hold(node.parent < num_ids && nodes_[node.parent].live, "parent of node", id);
    const Node& parent = nodes_[node.parent];
    ++children[node.parent];
    hold(parent.sealed || !node.sealed, "sealed node below an open one,", id);
    hold(node.start == parent.end(), "start of node", id);
    hold(node.base == parent.base + parent.length, "base of node", id);
  }
  hold(live == num_nodes(), "count of live nodes,", live);
  for (int64_t id = 0; id < num_ids; ++id) {
    hold(nodes_[id].rows == rows[id], "row count of node", id);
    hold(nodes_[id].children == children[id], "child count of node", id);
    hold(!nodes_[id].live || rows[id] + children[id] > 0, "unreachable node", id);
  }
  for (int32_t page : free_) {
    hold(page >= 0 && page < num_pages() && !listed[page], "free list at page", page);
    listed[page] = true;
  }
  for (int64_t page = 0; page < num_pages(); ++page) {
    hold(refs_[page] == refs[page], "reference count of page", page);
    hold(listed[page] == (refs[page] == 0), "free list at page", page);
  }
}

}  // namespace kvtools
