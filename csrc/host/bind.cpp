// The Python module kvtools._host; its contract is in kvtools/_host.pyi.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>

#include "forest.h"

namespace py = pybind11;

namespace kvtools {
namespace {

using Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

// Integers of any width whose values fit int32; with `garbage` (a block table beyond its rows'
// lengths) those that do not become -1.
Array to_int32(const py::object& values, const char* name, int ndim, bool garbage = false) {
  const py::array array = py::array::ensure(values);
  const char kind = array ? array.dtype().kind() : 'O';
  if (!array || (kind != 'i' && kind != 'u' && array.size() > 0)) {
    throw py::type_error(text(name, " must be an array of integers"));
  }
  if (array.ndim() != ndim) {
    throw Invalid(text(name, " must have ", ndim, " dimension(s), it has ", array.ndim()));
  }
  if (array.itemsize() < 4 || array.dtype().equal(py::dtype::of<int32_t>())) return Array(array);
  const py::array_t<int64_t, py::array::c_style | py::array::forcecast> wide(array);
  Array narrow(std::vector<py::ssize_t>(wide.shape(), wide.shape() + ndim));
  for (py::ssize_t i = 0; i < wide.size(); ++i) {
    const int64_t x = wide.data()[i];
    const bool fits = x == static_cast<int32_t>(x);
    if (!fits && !garbage) throw Invalid(text(name, " holds ", x, ", which is not an int32"));
    narrow.mutable_data()[i] = fits ? static_cast<int32_t>(x) : -1;
  }
  return narrow;
}

View view(const Array& array) { return {array.data(), array.size()}; }

py::array_t<int32_t> to_numpy(const Ints& values) {
  return py::array_t<int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<int64_t> plan_pages(const py::dict& plan, const Ints& page_sizes) {
  std::vector<Array> held;  // what the views borrow
  const auto get = [&](const char* name, int ndim = 1) {
    if (!plan.contains(name)) throw Invalid(text("a plan needs ", name));
    held.push_back(to_int32(plan[name], name, ndim));
    return View{held.back().data(), held.back().size()};
  };
  PlanView view{get("page_indptr"), get("page"),    get("first"),       get("length"),
                get("base"),        get("own"),     get("store"),       get("token_indptr"),
                get("token"),       get("item", 2), get("part_indptr"), get("part"),
                get("leaf")};
  if (held[9].shape(1) != 6)
    throw Invalid(text("item must be [items, 6], it has ", held[9].shape(1), " columns"));
  return check_plan(view, page_sizes);
}

py::dict to_dict(const Plan& plan, int32_t page_size) {
  py::dict out;
  out["page_indptr"] = to_numpy(plan.page_indptr);
  out["page"] = to_numpy(plan.page);
  out["first"] = to_numpy(plan.first);
  out["length"] = to_numpy(plan.length);
  out["base"] = to_numpy(plan.base);
  out["own"] = to_numpy(plan.own);
  out["store"] = to_numpy(Ints(plan.own.size()));
  out["token_indptr"] = to_numpy(plan.token_indptr);
  out["token"] = to_numpy(plan.token);
  out["item"] = to_numpy(plan.item).reshape({-1, 6});
  out["part_indptr"] = to_numpy(plan.part_indptr);
  out["part"] = to_numpy(plan.part);
  out["leaf"] = to_numpy(plan.leaf);
  out["page_size"] = page_size;
  return out;
}

py::dict block_table_plan(const py::object& block_table, const py::object& seq_lens,
                          int32_t page_size, const py::object& counts, int32_t tile, int32_t chunk,
                          int32_t items, bool share, const py::object& rows) {
  const Array table = to_int32(block_table, "block_table", 2, /*garbage=*/true);
  const Array lens = to_int32(seq_lens, "seq_lens", 1);
  Ints every(rows.is_none() ? table.shape(0) : 0);
  std::iota(every.begin(), every.end(), 0);
  const Array index = rows.is_none() ? Array(to_numpy(every)) : to_int32(rows, "rows", 1);
  for (py::ssize_t row = 0; row < index.size(); ++row)
    if (index.data()[row] < 0 || index.data()[row] >= table.shape(0))
      throw std::out_of_range(
          text("rows holds ", index.data()[row], "; block_table has ", table.shape(0), " rows"));
  require_per_row(view(lens), index.size(), "seq_lens");
  const Ints ones(lens.size(), 1);
  const Array given = counts.is_none() ? Array(to_numpy(ones)) : to_int32(counts, "counts", 1);
  return to_dict(plan_from_block_table(table.data(), table.shape(1), view(index), view(lens),
                                       page_size, view(given), {tile, chunk, items}, share),
                 page_size);
}

PYBIND11_MODULE(_host, m) {
  static const py::handle pool_exhausted =
      py::exception<PoolExhausted>(m, "PoolExhausted", PyExc_RuntimeError).release();
  pool_exhausted.attr("__doc__") = "A page pool has too few free pages; nothing has changed.";
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const PoolExhausted& error) {
      py::object instance = pool_exhausted(error.what());
      instance.attr("needed") = error.needed;
      instance.attr("free") = error.free;
      PyErr_SetObject(pool_exhausted.ptr(), instance.ptr());
    }
  });

  py::class_<Forest>(m, "Forest")
      .def(py::init<int64_t, int32_t>(), py::arg("num_pages"), py::arg("page_size"))
      .def_property_readonly("page_size", &Forest::page_size)
      .def_property_readonly("num_pages", &Forest::num_pages)
      .def_property_readonly("free_pages", &Forest::free_pages)
      .def_property_readonly("num_rows", &Forest::num_rows)
      .def_property_readonly("num_nodes", &Forest::num_nodes)
      .def_property_readonly("version", &Forest::version)
      .def("copy", [](const Forest& forest) { return Forest(forest); })
      .def("table",
           [](const Forest& forest) {
             const Table table = forest.table();
             return py::make_tuple(to_numpy(table.node), to_numpy(table.page), to_numpy(table.row));
           })
      .def_static(
          "of",
          [](int64_t num_pages, int32_t page_size, const py::object& node, const py::object& page,
             const py::object& row) {
            const Array nodes = to_int32(node, "node", 1), pages = to_int32(page, "page", 1),
                        rows = to_int32(row, "row", 1);
            return Forest(num_pages, page_size, view(nodes), view(pages), view(rows));
          },
          py::arg("num_pages"), py::arg("page_size"), py::arg("node"), py::arg("page"),
          py::arg("row"))
      .def("grow", &Forest::grow, py::arg("num_pages"))
      .def(
          "insert",
          [](Forest& forest, int32_t length, int32_t base, int32_t copies) {
            return to_numpy(forest.insert(length, base, copies));
          },
          py::arg("length"), py::arg("base") = 0, py::arg("copies") = 1)
      .def(
          "append",
          [](Forest& forest, const py::object& counts, bool seal) {
            return to_numpy(forest.append(view(to_int32(counts, "counts", 1)), seal));
          },
          py::arg("counts"), py::arg("seal") = false)
      .def(
          "pages_needed",
          [](const Forest& forest, const py::object& counts, bool seal) {
            return forest.pages_needed(view(to_int32(counts, "counts", 1)), seal);
          },
          py::arg("counts"), py::arg("seal") = false)
      .def(
          "gather",
          [](Forest& forest, const py::object& index, bool copy) {
            const auto [src, dst] = forest.gather(view(to_int32(index, "index", 1)), copy);
            return py::make_tuple(to_numpy(src), to_numpy(dst));
          },
          py::arg("index"), py::arg("copy") = false)
      .def(
          "gather_pages_needed",
          [](const Forest& forest, const py::object& index) {
            return forest.gather_pages_needed(view(to_int32(index, "index", 1)));
          },
          py::arg("index"))
      .def(
          "crop",
          [](Forest& forest, const py::object& lengths) {
            forest.crop(view(to_int32(lengths, "lengths", 1)));
          },
          py::arg("lengths"))
      .def("lengths", [](const Forest& forest) { return to_numpy(forest.lengths()); })
      .def("own_lengths", [](const Forest& forest) { return to_numpy(forest.own_lengths()); })
      .def(
          "row_slots",
          [](const Forest& forest, int64_t row) { return to_numpy(forest.row_slots(row)); },
          py::arg("row"))
      .def("root_of", &Forest::root_of, py::arg("row"))
      .def("prefix_pages", &Forest::prefix_pages)
      .def(
          "plan",
          [](const Forest& forest, const py::object& counts, int32_t tile, int32_t chunk,
             int32_t items) {
            return to_dict(forest.plan(view(to_int32(counts, "counts", 1)), {tile, chunk, items}),
                           forest.page_size());
          },
          py::arg("counts"), py::arg("tile") = 0, py::arg("chunk") = 0, py::arg("items") = 0)
      .def("check", &Forest::check);

  m.def("plan_from_block_table", &block_table_plan, py::arg("block_table"), py::arg("seq_lens"),
        py::arg("page_size"), py::arg("counts") = py::none(), py::arg("tile") = 0,
        py::arg("chunk") = 0, py::arg("items") = 0, py::arg("share") = true,
        py::arg("rows") = py::none());
  m.def("plan_pages", &plan_pages, py::arg("plan"), py::arg("page_sizes"));
}

}  // namespace
}  // namespace kvtools
