#pragma once
#include <cstdlib>
#include <random>
#include <string>

#include "oracle.hpp"

/// The buffers of tensors, with sentinels, random contents and bitwise comparison.
namespace buffers {

using namespace fusedstep;

// NaN equals NaN: payload and sign are not specified.
inline bool same(double a, double b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

inline std::mt19937_64 generator(1);

/// Elements with sentinels on both sides, `offset` elements off a cache line.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, std::int64_t numel, int offset)
      : dtype_(dtype),
        numel_(numel),
        front_(margin + static_cast<std::size_t>(offset) * size_of(dtype)) {
    bytes_.assign(front_ + nbytes() + margin, sentinel);
  }

  void* data() const { return const_cast<unsigned char*>(bytes_.data()) + front_; }
  std::size_t nbytes() const { return static_cast<std::size_t>(numel_) * size_of(dtype_); }
  DType dtype() const { return dtype_; }
  std::int64_t numel() const { return numel_; }

  void fill(double magnitude) {
    std::normal_distribution<double> normal(0.0, magnitude);
    for (std::int64_t i = 0; i < numel_; ++i) {
      if (dtype_ == DType::int8_blocks) {
        oracle::set(data(), i, static_cast<std::int8_t>(static_cast<int>(generator() % 255) - 127));
      } else {
        oracle::put(dtype_, data(), i, normal(generator));
      }
    }
  }

  void make_positive() {
    for (std::int64_t i = 0; i < numel_; ++i) {
      if (dtype_ == DType::int8_blocks) {
        const int code = oracle::at<std::int8_t>(data(), i);
        oracle::set(data(), i, static_cast<std::int8_t>(std::abs(code)));
      } else {
        oracle::put(dtype_, data(), i, std::fabs(oracle::get(dtype_, data(), i)));
      }
    }
  }

  bool guarded() const {
    const auto intact = [](unsigned char byte) { return byte == sentinel; };
    const auto end = bytes_.begin() + static_cast<std::ptrdiff_t>(front_ + nbytes());
    return std::all_of(bytes_.begin(), bytes_.begin() + static_cast<std::ptrdiff_t>(front_),
                       intact) &&
           std::all_of(end, bytes_.end(), intact);
  }

  bool equals(const Buffer& other) const {
    if (std::memcmp(data(), other.data(), nbytes()) == 0) return true;
    if (dtype_ == DType::int8_blocks) return false;
    for (std::int64_t i = 0; i < numel_; ++i)
      if (!same(oracle::get(dtype_, data(), i), oracle::get(dtype_, other.data(), i))) return false;
    return true;
  }

 private:
  static constexpr unsigned char sentinel = 0xa5;
  static constexpr std::size_t margin = 128;
  DType dtype_ = DType::float32;
  std::int64_t numel_ = 0;
  std::size_t front_ = margin;
  std::vector<unsigned char> bytes_{std::vector<unsigned char>(2 * margin, sentinel)};
};

/// The storage of a tensor's buffers. `copy` float32: no copy.
struct Storage {
  DType param, grad, state, copy = DType::float32;
};

constexpr DType f64 = DType::float64, f32 = DType::float32, f16_ = DType::float16,
                bf16_ = DType::bfloat16, int8 = DType::int8_blocks;
const Storage storages[] = {
    {f64, f64, f64},
    {f32, f32, f32},
    {f32, f32, f16_},
    {f32, f32, bf16_},
    {f32, f16_, f32},
    {f32, f16_, f16_},
    {f32, f16_, bf16_},
    {f32, bf16_, f32},
    {f32, bf16_, f16_},
    {f32, bf16_, bf16_},
    {f16_, f16_, f32},
    {f16_, f16_, f16_},
    {f16_, f32, f32},
    {f16_, f32, f16_},
    {bf16_, bf16_, f32},
    {bf16_, bf16_, bf16_},
    {bf16_, f32, f32},
    {bf16_, f32, bf16_},
    {f32, f32, int8},
    {f32, bf16_, int8},
    {f16_, f16_, int8},
    {bf16_, f32, int8},
    {f32, f32, f32, bf16_},
    {f32, f32, f32, f16_},
    {f32, bf16_, bf16_, bf16_},
    {f32, f16_, int8, f16_},
};

inline std::string name(const Storage& s) {
  std::string text = name_of(s.param);
  for (DType dtype : {s.grad, s.state, s.copy}) text += std::string("-") + name_of(dtype);
  return text;
}

struct TensorBuffers {
  Buffer param, grad, copy, state[max_slots], scales[max_slots];

  TensorBuffers(const Storage& s, std::int64_t numel, int num_slots, int offset)
      : param(s.param, numel, offset), grad(s.grad, numel, offset / 3) {
    param.fill(1.0);
    grad.fill(1.0);
    if (s.copy != f32) copy = Buffer(s.copy, numel, offset);
    for (int k = 0; k < num_slots; ++k) {
      state[k] = Buffer(s.state, numel, offset / 2);
      state[k].fill(0.1);
      if (s.state == int8) scales[k] = Buffer(f32, (numel + block_size - 1) / block_size, offset);
      scales[k].fill(0.01);
    }
  }

  Tensor tensor() const {
    Tensor t{};
    t.param = param.data();
    t.grad = grad.data();
    t.copy = copy.numel() ? copy.data() : nullptr;
    for (int k = 0; k < max_slots; ++k)
      t.slots[k] = {state[k].data(), scales[k].numel() ? scales[k].data() : nullptr,
                    state[k].dtype()};
    t.numel = param.numel();
    t.param_dtype = param.dtype();
    t.grad_dtype = grad.dtype();
    t.copy_dtype = copy.dtype();
    return t;
  }

  /// Empty, or which buffer is not as in `other`.
  std::string difference(const TensorBuffers& other) const {
    std::string text;
    const auto compare = [&](const char* what, const Buffer& a, const Buffer& b) {
      if (!a.guarded()) text += std::string(" sentinels of ") + what;
      if (!a.equals(b)) text += std::string(" ") + what;
    };
    compare("param", param, other.param);
    compare("grad", grad, other.grad);
    compare("copy", copy, other.copy);
    for (int k = 0; k < max_slots; ++k) {
      compare("state", state[k], other.state[k]);
      compare("scales", scales[k], other.scales[k]);
    }
    return text;
  }
};

using Buffers = std::vector<TensorBuffers>;

inline Buffers make(const Storage& storage, const std::vector<std::int64_t>& sizes, int num_slots) {
  Buffers all;
  for (std::size_t i = 0; i < sizes.size(); ++i)
    all.emplace_back(storage, sizes[i], num_slots, static_cast<int>(i % 17));
  return all;
}

inline std::vector<Tensor> tensors_of(const Buffers& all) {
  std::vector<Tensor> tensors;
  for (const TensorBuffers& one : all) tensors.push_back(one.tensor());
  return tensors;
}

inline std::string difference(const Buffers& got, const Buffers& expected) {
  for (std::size_t i = 0; i < got.size(); ++i) {
    const std::string text = got[i].difference(expected[i]);
    if (!text.empty()) return " size " + std::to_string(got[i].param.numel()) + ":" + text;
  }
  return "";
}

}  // namespace buffers
