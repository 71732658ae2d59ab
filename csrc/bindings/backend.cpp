#include "bindings/backend.hpp"

#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "bindings/gil.hpp"

namespace fusedstep::bindings {

namespace {

constexpr std::int64_t arena_block = 1 << 20;

/// What was found in a module, which stays as it is.
struct Loaded {
  PyObject* module = nullptr;
  const DeviceApi* api = nullptr;
  int devices = 0;
};

[[noreturn]] void unusable(const Device& device, const Place& place, const std::string& why) {
  fail(PyExc_RuntimeError, place, " is on " + device.spell() + ", which cannot be used: " + why);
}

std::string text_of(const py::error_already_set& error) {
  return static_cast<std::string>(py::str(error.value()));
}

/// Waking the driver takes its time.
const char* ask_status(const DeviceApi& api, int* devices) {
  const char* why = nullptr;
  without_gil([&] { why = api.status(devices); });
  return why;
}

Loaded load(const Device& device, const Place& place) {
  py::module_ module;
  try {
    module = py::module_::import(DeviceApi::module);
  } catch (py::error_already_set& error) {
    if (error.matches(PyExc_ModuleNotFoundError)) {
      unusable(device, place,
               "this build of fusedstep has no CUDA backend; install one that has, or build it "
               "where nvcc is (FUSEDSTEP_CUDA=ON)");
    }
    if (!error.matches(PyExc_ImportError)) throw;
    unusable(device, place, text_of(error));
  }
  const py::object capsule = py::getattr(module, DeviceApi::attribute, py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), DeviceApi::capsule)) {
    unusable(device, place, "fusedstep._cuda has no function table");
  }
  const auto* api =
      static_cast<const DeviceApi*>(PyCapsule_GetPointer(capsule.ptr(), DeviceApi::capsule));
  if (const char* mismatch = api->mismatch()) {
    unusable(device, place,
             "fusedstep._cuda and fusedstep._core are of different builds (" +
                 std::string(mismatch) + "); install fusedstep anew");
  }
  Loaded loaded{module.ptr(), api, 0};
  if (const char* why = ask_status(*api, &loaded.devices)) unusable(device, place, why);
  module.release();  // its functions are used as long as the process lives
  return loaded;
}

}  // namespace

void Gpu::check(const char* why) const {
  if (why == nullptr) return;
  throw std::runtime_error("cuda:" + std::to_string(id) + ": " + why);
}

bool Gpu::is_capturing(const Stream& stream) const {
  bool capturing = false;
  check(api->is_capturing(id, stream.handle, &capturing));
  return capturing;
}

void Gpu::synchronize() const {
  const char* why = nullptr;
  without_gil([&] { why = api->synchronize(id); });
  check(why);
}

void refuse_capture(const Gpu& gpu, const Stream& stream, const std::string& what) {
  if (gpu.is_capturing(stream)) {
    throw std::runtime_error(what + " while its stream is being captured into a CUDA graph");
  }
}

void Gpu::copy_out(const Stream& stream, const char* what, void* to, const void* from,
                   std::int64_t bytes) const {
  refuse_capture(*this, stream, std::string(what) + " cannot be read");
  const char* why = nullptr;
  without_gil([&] { why = api->copy_out(id, stream.handle, to, from, bytes); });
  check(why);
}

void Gpu::copy_in(const Stream& stream, const char* what, void* to, const void* from,
                  std::int64_t bytes) const {
  refuse_capture(*this, stream, std::string(what) + " cannot be written");
  const char* why = nullptr;
  without_gil([&] { why = api->copy_in(id, stream.handle, to, from, bytes); });
  check(why);
}

Gpu find_gpu(const Device& device, const Place& place) {
  static Loaded known;
  // Looked up anew: the tests put other modules there.
  const py::object name = py::str(DeviceApi::module);
  const py::object module = py::reinterpret_steal<py::object>(PyImport_GetModule(name.ptr()));
  if (!module && PyErr_Occurred() != nullptr) throw py::error_already_set();
  if (known.api == nullptr || module.ptr() != known.module) known = load(device, place);
  const auto exists = [&] { return device.id >= 0 && device.id < known.devices; };
  if (!exists()) {
    int devices = 0;
    const char* const why = ask_status(*known.api, &devices);
    if (why != nullptr) unusable(device, place, why);
    known.devices = devices;
  }
  if (!exists()) {
    unusable(device, place, "CUDA sees " + std::to_string(known.devices) + " of them");
  }
  return {known.api, device.id};
}

// ---- workspaces -------------------------------------------------------------------------------

Workspace::Workspace(const Gpu& gpu) : gpu_(gpu) {
  gpu_.check(gpu_.api->make_workspace(gpu_.id, &handle_));
}

Workspace::~Workspace() {
  if (!kept_) without_gil_if_held([&] { gpu_.api->free_workspace(handle_); });
}

Workspace& Workspace::of_functions(const Gpu& gpu, const Stream& stream) {
  using Key = std::tuple<const DeviceApi*, int, void*>;
  static auto* all = new std::map<Key, std::unique_ptr<Workspace>>();  // the GIL guards it
  auto& found = (*all)[{gpu.api, gpu.id, stream.handle}];
  if (!found) found = std::make_unique<Workspace>(gpu);
  return *found;
}

void* Workspace::step(const DeviceCall& call) {
  const char* why = nullptr;
  void* report = nullptr;
  without_gil([&] {  // a full queue makes it wait
    const std::lock_guard<std::mutex> lock(turn_);
    why = gpu_.api->step(handle_, &call, &report);
  });
  gpu_.check(why);
  return report;
}

DeviceReport Report::read(const Stream& stream, double* tensor_norms) {
  refuse_capture(gpu_, stream, "the result of a step cannot be read");
  DeviceReport out{};
  const char* why = nullptr;
  without_gil([&] {
    const std::lock_guard<std::mutex> lock(turn_);
    why = gpu_.api->read_report(handle_, stream.handle, &out, tensor_norms);
  });
  gpu_.check(why);
  return out;
}

// ---- memory -----------------------------------------------------------------------------------

Arena::~Arena() {
  if (kept_) return;
  without_gil_if_held([&] {
    for (void* block : blocks_) gpu_.api->release(gpu_.id, block);
  });
}

void* Arena::allocate(std::int64_t bytes, std::int64_t align) {
  std::int64_t begin = (used_ + align - 1) / align * align;
  if (blocks_.empty() || begin + bytes > size_) {
    const std::int64_t size = std::max(bytes, arena_block);
    void* block = nullptr;
    const char* why = nullptr;
    without_gil([&] { why = gpu_.api->allocate(gpu_.id, size, &block); });
    gpu_.check(why);
    blocks_.push_back(block);
    size_ = size;
    begin = 0;
  }
  used_ = begin + bytes;
  return static_cast<char*>(blocks_.back()) + begin;
}

}  // namespace fusedstep::bindings
