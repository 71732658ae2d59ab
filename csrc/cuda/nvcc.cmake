# Where nvcc is: what CMAKE_CUDA_COMPILER or CUDACXX name, else that of the PATH or of the toolkit's
# usual places, else that of the packages on PyPI (dependency group `cuda`).

# `out`: a path, or empty. `out_flags`: what this nvcc needs to find its own libraries.
function(fusedstep_find_nvcc out out_flags)
  set(${out_flags} "" PARENT_SCOPE)
  set(named "$CACHE{CMAKE_CUDA_COMPILER}" "$ENV{CUDACXX}")
  list(REMOVE_ITEM named "")
  if(named)
    list(GET named 0 named)
    find_program(nvcc ${named} NO_CACHE)
  else()
    find_program(nvcc nvcc
      HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  endif()
  if(NOT nvcc AND NOT named)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
        "import importlib.util as u; s = u.find_spec('nvidia'); s and print(*s.submodule_search_locations, sep=';', end='')"
      OUTPUT_VARIABLE folders COMMAND_ERROR_IS_FATAL ANY)
    list(TRANSFORM folders APPEND /cu13/bin)
    find_program(nvcc nvcc PATHS ${folders} NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(NOT nvcc)
    set(nvcc "")
  endif()
  # The packages have lib where the toolkit has lib64, and their nvcc 13.0 looks for the latter.
  if(nvcc MATCHES "(.*/nvidia/cu13)/bin/nvcc$")
    set(${out_flags} "-L${CMAKE_MATCH_1}/lib" PARENT_SCOPE)
  endif()
  set(${out} "${nvcc}" PARENT_SCOPE)
endfunction()

# `out`: empty if this nvcc makes a library with a kernel, else what it says. CMake would end at a
# compiler that does not work, and with it a build that can do without.
function(fusedstep_try_nvcc nvcc flags out)
  set(folder ${CMAKE_CURRENT_BINARY_DIR}/try)
  set(asked "${nvcc} ${flags} ${CMAKE_CUDA_HOST_COMPILER}")
  if(asked STREQUAL "$CACHE{FUSEDSTEP_CUDA_TRIED}")
    set(${out} "" PARENT_SCOPE)
    return()
  endif()
  file(WRITE ${folder}/try.cu
    "#include <cuda_runtime.h>\n__global__ void kernel(int* x) { *x = 1; }\n"
    "void launch(int* x) { kernel<<<1, 1>>>(x); }\n")
  execute_process(
    COMMAND ${nvcc} -std=c++17 -ccbin ${CMAKE_CUDA_HOST_COMPILER} ${flags}
      -shared -Xcompiler -fPIC -o try.so try.cu
    WORKING_DIRECTORY ${folder} RESULT_VARIABLE failed OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(failed)
    set(${out} "${text}${failed}" PARENT_SCOPE)
    return()
  endif()
  set(FUSEDSTEP_CUDA_TRIED "${asked}" CACHE INTERNAL "")
  set(${out} "" PARENT_SCOPE)
endfunction()
