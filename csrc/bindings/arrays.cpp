#include "bindings/arrays.hpp"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings/backend.hpp"
#include "bindings/number.hpp"
#include "bindings/tree.hpp"

namespace fusedstep::bindings {

namespace {

/// An array whatever it is, with its memory kept for as long as the caller keeps `owners`.
Buffer import_any(py::handle object, const char* name, Owners& owners,
                  const ImportOptions& options = {}) {
  Buffer buffer;
  owners.keep(object.ptr());
  import_buffer(object.ptr(), {name, nullptr}, owners, buffer, options);
  return buffer;
}

py::tuple describe(py::handle object) {
  Owners owners;
  const Buffer buffer = import_any(object, "array", owners);
  py::tuple shape(buffer.ndim);
  for (int d = 0; d < buffer.ndim; ++d) shape[static_cast<std::size_t>(d)] = buffer.shape[d];
  return py::make_tuple(shape, name_of(buffer.scalar));
}

std::string device(py::handle object, const std::string& name) {
  Owners owners;
  return import_any(object, name.c_str(), owners, {nullptr, true, nullptr}).device.spell();
}

/// Elements as NumPy knows them; bfloat16 as bits.
py::dtype numpy_dtype(Scalar scalar) {
  static const char* const names[] = {"float16", "uint16", "float32", "float64", "longdouble",
                                      "int8",    "int32",  "int64",   "bool"};
  return py::dtype(names[static_cast<int>(scalar)]);
}

py::array view_of(const Buffer& buffer, const void* data, py::handle base) {
  return py::array(numpy_dtype(buffer.scalar),
                   std::vector<py::ssize_t>(buffer.shape, buffer.shape + buffer.ndim),
                   std::vector<py::ssize_t>(buffer.strides, buffer.strides + buffer.ndim), data,
                   base);
}

py::array array_view(py::object object, bool writable) {
  auto owners = std::make_unique<Owners>();
  const Buffer buffer = import_any(object, "array", *owners);
  if (!buffer.device.is_cpu()) {
    throw py::buffer_error("array is on " + buffer.device.spell() + ", not in CPU memory");
  }
  if (writable && buffer.readonly) throw py::buffer_error("array is read-only");
  const py::capsule base(owners.release(), [](void* p) { delete static_cast<Owners*>(p); });
  py::array view = view_of(buffer, buffer.data, base);
  if (!writable) view.attr("flags").attr("writeable") = false;
  return view;
}

/// The bytes of an array, from its first element in memory to the last.
struct Extent {
  std::int64_t before = 0, bytes = 0;  ///< `before`: from there to where `data` points

  explicit Extent(const Buffer& buffer) {
    if (buffer.numel == 0) return;
    bytes = size_of(buffer.scalar);
    for (int d = 0; d < buffer.ndim; ++d) {
      const std::int64_t reach = (buffer.shape[d] - 1) * buffer.strides[d];
      if (reach < 0) before -= reach;
      bytes += reach < 0 ? -reach : reach;
    }
  }
};

/// The array for the host to read: its memory, or a copy of what a device has.
py::array to_host(py::object object) {
  Owners owners;
  StreamChoice choice;
  const Buffer buffer = import_any(object, "array", owners, {nullptr, false, &choice});
  if (buffer.device.is_cpu()) return array_view(std::move(object), false);
  const Gpu gpu = find_gpu(buffer.device, {"array", nullptr});
  const Extent extent(buffer);
  py::array_t<std::uint8_t> copy(static_cast<py::ssize_t>(extent.bytes));
  std::uint8_t* const bytes = copy.mutable_data();
  if (extent.bytes > 0) {
    gpu.copy_out(choice.stream(), "an array", bytes,
                 static_cast<char*>(buffer.data) - extent.before, extent.bytes);
  }
  return view_of(buffer, bytes + extent.before, copy);
}

/// Assigns `values`, as NumPy does, to an array that need not be in CPU memory.
void write(py::object object, py::handle values) {
  Owners owners;
  StreamChoice choice;
  const Buffer buffer = import_any(object, "array", owners, {nullptr, false, &choice});
  if (buffer.device.is_cpu()) {
    array_view(std::move(object), true)[py::ellipsis()] = values;
    return;
  }
  if (buffer.readonly) throw py::buffer_error("array is read-only");
  if (!buffer.is_dense()) throw py::value_error("array is not dense");
  const Gpu gpu = find_gpu(buffer.device, {"array", nullptr});
  const Extent extent(buffer);
  py::array_t<std::uint8_t> copy(static_cast<py::ssize_t>(extent.bytes));
  view_of(buffer, copy.mutable_data(), copy)[py::ellipsis()] = values;
  if (extent.bytes == 0) return;
  gpu.copy_in(choice.stream(), "an array", buffer.data, copy.data(), extent.bytes);
}

double read_scalar(py::handle object, const std::string& name) {
  Owners owners;
  StreamChoice choice;
  const Place place{name.c_str(), nullptr};
  const Buffer buffer = import_one(object.ptr(), place, false, owners, &choice);
  return read_element(object.ptr(), place, buffer);
}

}  // namespace

void bind_arrays(py::module_& module) {
  module.def("set_producer_lookup", &set_producer_lookup);
  module.def("is_array", [](py::handle object) {
    return producer_of(object.ptr()).door != Producer::Door::none;
  });
  module.def("describe", &describe);
  module.def("device", &device, py::arg("buffer"), py::arg("name") = "array");
  module.def("array_view", &array_view, py::arg("buffer"), py::kw_only(),
             py::arg("writable") = false);
  module.def("to_host", &to_host);
  module.def("write", &write, py::arg("buffer"), py::arg("values"));
  module.def("read_scalar", &read_scalar, py::arg("buffer"), py::arg("name") = "array");
  module.def("flatten", &flatten, py::arg("tree"), py::arg("name") = "params");
}

}  // namespace fusedstep::bindings
