#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

/// The CUDA runtime with errors as exceptions, and what has to be put back afterwards.
namespace fusedstep::cuda {

class Error : public std::runtime_error {
 public:
  Error(const char* what, cudaError_t code)
      : std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorName(code) +
                           " (" + cudaGetErrorString(code) + ")") {}
};

/// An error that is reported here must not be found again by the next one who looks.
inline void check(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  throw Error(what, code);
}

/// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) static_cast<void>(cudaSetDevice(before_));
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// While it lives, this thread may allocate, free and copy although some stream is being captured,
/// be it another thread's: else that would fail, and end the capture.
class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() { static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode_)); }
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

/// A stream that waits for no other.
class OwnStream {
 public:
  OwnStream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~OwnStream() { static_cast<void>(cudaStreamDestroy(stream_)); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Device memory.
class Memory {
 public:
  Memory() = default;
  explicit Memory(std::size_t bytes) : size_(bytes) {
    const RelaxedCapture relaxed;
    check(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  ~Memory() {
    if (!data_) return;
    const RelaxedCapture relaxed;
    static_cast<void>(cudaFree(data_));  // fails only when the process ends, or is lost
  }
  Memory(Memory&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  Memory& operator=(Memory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  std::size_t size() const { return size_; }

  /// Gives it to somebody else.
  void* release() {
    size_ = 0;
    return std::exchange(data_, nullptr);
  }

  /// All zero, when it returns.
  void clear() const {
    const RelaxedCapture relaxed;
    const OwnStream stream;
    check(cudaMemsetAsync(data_, 0, size_, stream.get()), "cudaMemsetAsync");
    check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Launches a kernel with its one argument.
template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, unsigned blocks, unsigned size,
            cudaStream_t stream, const char* what) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernel(kernel, dim3(blocks), dim3(size), arguments, 0, stream), what);
}

}  // namespace fusedstep::cuda
