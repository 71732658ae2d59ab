#pragma once
#include <xla/ffi/api/ffi.h>

#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "core/c_api.hpp"

/// What the handlers share: how they reach the core, and how buffers of XLA are read.
namespace fusedstep::xla {

namespace ffi = ::xla::ffi;

/// The function table of `_core`. Set when this module is loaded, before any handler can run.
extern const CApi* core;

/// Runs the body of a handler; what it throws becomes XLA's kind of error.
template <class Body>
ffi::Error guarded(const char* handler, Body body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(std::string(handler) + ": " + error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(std::string(handler) + ": " + error.what());
  }
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

/// One step by the core.
inline void run(const StepCall& call, StepOutcome& outcome) {
  if (const char* error = core->step(&call, &outcome)) throw std::runtime_error(error);
}

/// Operand `i` of those that a handler does not name.
inline ffi::AnyBuffer operand(const ffi::RemainingArgs& args, std::size_t i) {
  const auto found = args.get<ffi::AnyBuffer>(i);
  require(found.has_value(), "an operand is missing, or no buffer");
  return *found;
}

inline ffi::AnyBuffer result(const ffi::RemainingRets& rets, std::size_t i) {
  auto found = rets.get<ffi::AnyBuffer>(i);
  require(found.has_value(), "a result is missing, or no buffer");
  return **found;
}

inline DType dtype_of(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F64: return DType::float64;
    case ffi::F32: return DType::float32;
    case ffi::F16: return DType::float16;
    case ffi::BF16: return DType::bfloat16;
    default: throw std::invalid_argument("a buffer is of no floating-point type that is read here");
  }
}

// --- float64 without XLA's float64 --------------------------------------------------------------
// JAX has no float64 unless a flag allows it, so a double travels as its two uint32 halves.

using Words = ffi::Buffer<ffi::U32>;

template <class Buffer>
double double_at(const Buffer& words, std::size_t i) {
  double x;
  std::memcpy(&x, static_cast<const char*>(words.untyped_data()) + i * sizeof x, sizeof x);
  return x;
}

inline void put_double(const Words& words, std::size_t i, double x) {
  std::memcpy(static_cast<char*>(words.untyped_data()) + i * sizeof x, &x, sizeof x);
}

template <class Buffer>
std::size_t num_doubles(const Buffer& words) {
  return words.element_count() / 2;
}

}  // namespace fusedstep::xla
