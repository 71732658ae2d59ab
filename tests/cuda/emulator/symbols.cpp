// The names of kernels. dladdr() knows exported functions only, and kernels are not exported: the
// full table of symbols is read from the file.
#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>

#include "machine.hpp"

namespace emulator {
namespace {

using Names = std::map<ElfW(Addr), std::string>;

/// The functions of an ELF file by their addresses in it.
Names functions_of(const char* path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  Names names;
  ElfW(Ehdr) header;
  if (bytes.size() < sizeof header) return names;
  std::memcpy(&header, bytes.data(), sizeof header);
  const auto section = [&](std::size_t i) {
    ElfW(Shdr) found;
    std::memcpy(&found, bytes.data() + header.e_shoff + i * sizeof found, sizeof found);
    return found;
  };
  for (std::size_t i = 0; i < header.e_shnum; ++i) {
    const ElfW(Shdr) table = section(i);
    if (table.sh_type != SHT_SYMTAB) continue;
    const char* texts = bytes.data() + section(table.sh_link).sh_offset;
    for (std::size_t at = 0; at < table.sh_size; at += sizeof(ElfW(Sym))) {
      ElfW(Sym) symbol;
      std::memcpy(&symbol, bytes.data() + table.sh_offset + at, sizeof symbol);
      if ((symbol.st_info & 0xf) == STT_FUNC)
        names.emplace(symbol.st_value, texts + symbol.st_name);
    }
  }
  return names;
}

std::string demangled(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string out = status == 0 ? text : name;
  std::free(text);
  return out;
}

}  // namespace

std::string name_of_function(const void* function) {
  static std::map<const void*, std::string> known;
  static std::map<const void*, Names> modules;
  std::string& name = known[function];
  if (!name.empty()) return name;
  Dl_info info;
  link_map* map = nullptr;
  if (!dladdr1(function, &info, reinterpret_cast<void**>(&map), RTLD_DL_LINKMAP)) return "?";
  auto found = modules.find(info.dli_fbase);
  if (found == modules.end())
    found = modules.emplace(info.dli_fbase, functions_of(info.dli_fname)).first;
  const auto symbol = found->second.find(reinterpret_cast<ElfW(Addr)>(function) - map->l_addr);
  name = symbol == found->second.end() ? "?" : demangled(symbol->second);
  return name;
}

}  // namespace emulator
