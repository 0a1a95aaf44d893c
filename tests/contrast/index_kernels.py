"Kernels whose index leaves 32 bits, or not: for the test of `index_ranges`."
import triton
import triton.language as tl


@triton.jit
def narrow_kernel(X, N, K): tl.store(X + tl.program_id(0)*K, N)


@triton.jit
def wide_kernel(X, N, K): tl.store(X + tl.program_id(0).to(tl.int64)*K, N)


@triton.jit
def looped_kernel(X, N, K):
    at = tl.program_id(0)
    for _ in range(0, K): at += N
    tl.store(X + at, N)
