# Whether the CUDA kernels can be built here. Sets FASTLR_HAS_CUDA and FASTLR_CUDA_STATUS: with which
# toolkit, or why not.

# The oldest whose kernels may take more than 4 KiB of arguments.
set(FASTLR_OLDEST_CUDA 12.1)

set(FASTLR_HAS_CUDA FALSE)
find_program(FASTLR_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(DEFINED CMAKE_CUDA_COMPILER)
  set(fastlr_nvcc "${CMAKE_CUDA_COMPILER}")
elseif(DEFINED ENV{CUDACXX})
  set(fastlr_nvcc "$ENV{CUDACXX}")
elseif(FASTLR_NVCC)
  set(fastlr_nvcc "${FASTLR_NVCC}")
endif()

if(FASTLR_CUDA STREQUAL "OFF")
  set(FASTLR_CUDA_STATUS "it was built with FASTLR_CUDA=OFF")
elseif(WIN32)
  set(FASTLR_CUDA_STATUS "its CUDA kernels have not been built on Windows yet")
elseif(NOT DEFINED fastlr_nvcc)
  set(FASTLR_CUDA_STATUS "no nvcc was found when it was built (on PATH, in CUDA_HOME or as CUDACXX)")
else()
  execute_process(COMMAND "${fastlr_nvcc}" --version OUTPUT_VARIABLE fastlr_output ERROR_VARIABLE fastlr_output
                  RESULT_VARIABLE fastlr_result)
  if(NOT fastlr_result EQUAL 0 OR NOT fastlr_output MATCHES "release ([0-9]+\\.[0-9]+)")
    set(FASTLR_CUDA_STATUS "${fastlr_nvcc} --version did not tell a version when it was built")
  elseif(CMAKE_MATCH_1 VERSION_LESS FASTLR_OLDEST_CUDA)
    set(FASTLR_CUDA_STATUS "nvcc ${CMAKE_MATCH_1} is too old: it needs CUDA ${FASTLR_OLDEST_CUDA} or newer")
  else()
    set(fastlr_cuda_version "${CMAKE_MATCH_1}")
    # A trial, as CMake itself stops where a compiler does not work.
    file(WRITE "${CMAKE_BINARY_DIR}/trial.cu" "#include <vector>\n__global__ void trial() {}\n")
    if(DEFINED CMAKE_CUDA_HOST_COMPILER)
      set(fastlr_host_compiler -ccbin "${CMAKE_CUDA_HOST_COMPILER}")
    elseif(DEFINED ENV{CUDAHOSTCXX})
      set(fastlr_host_compiler -ccbin "$ENV{CUDAHOSTCXX}")
    endif()
    execute_process(COMMAND "${fastlr_nvcc}" ${fastlr_host_compiler} -std=c++17 -shared -Xcompiler -fPIC trial.cu
                            -o trial.so
                    WORKING_DIRECTORY "${CMAKE_BINARY_DIR}" OUTPUT_VARIABLE fastlr_output
                    ERROR_VARIABLE fastlr_output RESULT_VARIABLE fastlr_result)
    if(fastlr_result EQUAL 0)
      set(FASTLR_HAS_CUDA TRUE)
    else()
      string(REGEX MATCH "[^\n]*(error|fatal)[^\n]*" fastlr_error "${fastlr_output}")
      string(REPLACE "\"" "'" fastlr_error "${fastlr_error}")
      set(FASTLR_CUDA_STATUS "nvcc ${fastlr_cuda_version} did not work with its host compiler: ${fastlr_error}")
    endif()
  endif()
endif()

if(NOT FASTLR_HAS_CUDA)
  if(FASTLR_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FASTLR_CUDA=ON, but ${FASTLR_CUDA_STATUS}")
  endif()
  message(STATUS "fastlr without CUDA: ${FASTLR_CUDA_STATUS}")
  return()
endif()

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
  set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 86-real 89-real)
  if(fastlr_cuda_version VERSION_LESS 12.8)
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90)
  else()
    list(APPEND CMAKE_CUDA_ARCHITECTURES 90-real 100-real 120)
  endif()
endif()
set(CMAKE_CUDA_COMPILER "${fastlr_nvcc}")
enable_language(CUDA)
string(REPLACE ";" " " FASTLR_CUDA_STATUS
       "CUDA ${fastlr_cuda_version}, architectures ${CMAKE_CUDA_ARCHITECTURES}")
message(STATUS "fastlr with ${FASTLR_CUDA_STATUS}")
