# What the CPU code is compiled with. Sets fastlr_flags, and fastlr_hidden for objects that pybind11 does not hide.
#
# GCC 12 and newer on x86-64 compile the loops for four SIMD levels; Clang (also Apple's) for one, which on Arm has
# what it takes. On Windows it is Clang too, as clang-cl: Microsoft's own compiler knows neither the built-in
# functions that the arithmetic is written with nor a way to turn an fma into an instruction without AVX2.

if(CMAKE_CXX_COMPILER_ID STREQUAL "MSVC")
  message(FATAL_ERROR "fastlr cannot be built by cl.exe; take Clang, which Visual Studio installs too: set "
          "CMAKE_GENERATOR_TOOLSET=ClangCL in the environment")
endif()

# No contraction: every fma is written out. No traps: lets loops with uniform options vectorise.
set(fastlr_flags -ffp-contract=off -fno-trapping-math -fno-math-errno)
if(CMAKE_CXX_COMPILER_FRONTEND_VARIANT STREQUAL "MSVC")
  list(TRANSFORM fastlr_flags PREPEND "/clang:")
  list(APPEND fastlr_flags /clang:-O3 /W4 -Wno-unknown-pragmas)
  set(fastlr_hidden "")
else()
  list(PREPEND fastlr_flags -O3)
  list(APPEND fastlr_flags -Wall -Wextra)
  if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
    list(APPEND fastlr_flags -Wno-unknown-pragmas)  # GCC's ivdep
  endif()
  set(fastlr_hidden -fvisibility=hidden)
endif()
