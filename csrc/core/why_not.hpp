#pragma once
#include <exception>
#include <new>
#include <string>

/// How functions of the tables (core/c_api.hpp, core/device.hpp) say that something went wrong.
namespace fusedstep {

/// Runs something; null, or why it failed: a text that stays valid until the next call in this
/// thread. No exception may cross from module to module: each has a C++ runtime of its own choice.
template <class Run>
const char* why_not(Run run) noexcept {
  thread_local std::string text;
  try {
    run();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (const std::exception& error) {
    try {
      text = error.what();
    } catch (...) {
      return "out of memory";
    }
    return text.c_str();
  } catch (...) {
    return "an exception of an unknown kind";
  }
}

}  // namespace fusedstep
