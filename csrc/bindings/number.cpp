#include "bindings/number.hpp"

#include <cstring>

#include "bindings/row.hpp"
#include "core/float16.hpp"

namespace fusedstep::bindings {

namespace {

template <class T>
T read(const void* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

double value_of(Scalar scalar, const void* bytes) {
  switch (scalar) {
    case Scalar::float16: return to_float(read<f16>(bytes));
    case Scalar::bfloat16: return to_float(read<bf16>(bytes));
    case Scalar::float32: return static_cast<double>(read<float>(bytes));
    case Scalar::float64: return static_cast<double>(read<double>(bytes));
    case Scalar::longdouble: return static_cast<double>(read<long double>(bytes));
    case Scalar::int8: return static_cast<double>(read<std::int8_t>(bytes));
    case Scalar::int32: return static_cast<double>(read<std::int32_t>(bytes));
    case Scalar::int64: return static_cast<double>(read<std::int64_t>(bytes));
    case Scalar::boolean: return static_cast<double>(read<std::uint8_t>(bytes));
  }
  throw InternalError("an unknown element type");
}

}  // namespace

double read_element(PyObject* object, const Place& place, const Buffer& buffer) {
  if (buffer.device.is_cpu()) return value_of(buffer.scalar, buffer.data);
  alignas(16) char bytes[16];
  bool known = false;
  const Gpu gpu = find_gpu(buffer.device, place);
  const Stream stream = current_stream(object, *buffer.producer, gpu.id, &known);
  gpu.copy_out(stream, place.name, bytes, buffer.data, size_of(buffer.scalar));
  return value_of(buffer.scalar, bytes);
}

Buffer import_one(PyObject* object, const Place& place, bool integers, Owners& owners,
                  StreamChoice* stream) {
  Buffer buffer;
  owners.keep(object);
  import_buffer(object, place, owners, buffer, {nullptr, integers, stream});
  if (buffer.numel != 1) {
    fail(PyExc_ValueError, place,
         ": expected one number, got an array of " + std::to_string(buffer.numel));
  }
  return buffer;
}

DeviceNumber device_number(const Buffer& buffer, const Place& place) {
  using Type = DeviceNumber::Type;
  switch (buffer.scalar) {
    case Scalar::float16: return {buffer.data, Type::float16};
    case Scalar::bfloat16: return {buffer.data, Type::bfloat16};
    case Scalar::float32: return {buffer.data, Type::float32};
    case Scalar::float64: return {buffer.data, Type::float64};
    case Scalar::int32: return {buffer.data, Type::int32};
    case Scalar::int64: return {buffer.data, Type::int64};
    case Scalar::boolean: return {buffer.data, Type::boolean};
    default: break;
  }
  fail(PyExc_TypeError, place,
       std::string(": dtype ") + name_of(buffer.scalar) + " is no number that a device reads");
}

Number parse_number(PyObject* object, const Place& place, bool integers, const Device& device,
                    Owners& owners, StreamChoice* stream) {
  if (PyFloat_CheckExact(object)) return {PyFloat_AS_DOUBLE(object), {}};
  const auto door = producer_of(object).door;
  if (door == Producer::Door::number) {
    const double value = PyFloat_AsDouble(object);
    if (value != -1.0 || PyErr_Occurred() == nullptr) return {value, {}};
    PyErr_Clear();
  }
  if (door == Producer::Door::number || door == Producer::Door::none) {
    fail(PyExc_TypeError, place,
         ": expected a number or an array of one element, got " + brief(object));
  }
  const Buffer buffer = import_one(object, place, integers, owners, stream);
  if (!device.is_cpu() && buffer.device == device) return {0.0, device_number(buffer, place)};
  return {read_element(object, place, buffer), {}};
}

}  // namespace fusedstep::bindings
