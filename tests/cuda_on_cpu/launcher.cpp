// The whole launcher and its kernels as one source, so that a fault in them is built anew at once.
#include "cuda/step_cuda.cu"
#include "cuda/step_cuda_large.cu"
