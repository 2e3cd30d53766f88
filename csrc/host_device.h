// Markers that let one source be compiled for the CPU (once per SIMD level) and by nvcc.
#pragma once

// NOTE: [internal linkage]
// The CPU kernels are compiled several times, each time for another SIMD level. An `inline`
// function shared by those objects would be merged by the linker, and the copy it keeps might use
// instructions that the machine lacks. Hence every shared function has internal linkage: each
// object has its own.
#if defined(__CUDACC__)
#define FASTLR_HD __host__ __device__ static inline
#define FASTLR_HD_MEMBER __host__ __device__
#define FASTLR_HD_INLINED __host__ __device__ static inline
#define FASTLR_HD_MEMBER_INLINED __host__ __device__ inline
#else
#define FASTLR_HD static inline
#define FASTLR_HD_MEMBER
#define FASTLR_HD_INLINED static inline __attribute__((always_inline))
#define FASTLR_HD_MEMBER_INLINED inline __attribute__((always_inline))
#endif
