// Kernels of the linear layer on NVIDIA GPUs: int8 weights expanded, biases added.
//
// Compiled ahead into one fat binary. Offsets are 64 bits wide: a weight may have more than 2^31
// elements. Pointers of whole weights are multiples of 16 bytes, those of views need not be, so each
// kernel takes 16 bytes at a time where all its pointers allow that and one element where not.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

typedef unsigned long long u64;

static __device__ __forceinline__ float wide(float v) { return v; }
static __device__ __forceinline__ float wide(__half v) { return __half2float(v); }
static __device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> static __device__ __forceinline__ T rounded(float v);
template <> __device__ __forceinline__ float rounded<float>(float v) { return v; }
template <> __device__ __forceinline__ __half rounded<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float v) {
    return __float2bfloat16_rn(v);
}

static __device__ __forceinline__ bool aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

// `out[i] = codes[i] * scales[i / inputs]` for i < total, the f32 product rounded once. A thread takes
// 16 neighbours of the flat array; rows may begin anywhere among them.
template <typename S, typename T>
static __device__ __forceinline__ void expand(
    const uint8_t *__restrict__ codes, const S *__restrict__ scales, T *__restrict__ out,
    u64 total, u64 inputs
) {
    const bool whole = aligned(codes) && aligned(out);
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 groups = total / 16 + (total % 16 != 0);
    for (u64 group = (u64)blockIdx.x * blockDim.x + threadIdx.x; group < groups; group += stride) {
        const u64 first = group * 16;
        u64 row = first / inputs;
        u64 left = inputs - (first - row * inputs); // elements up to the end of the row, at least 1
        float scale = wide(scales[row]);
        if (whole && first + 16 <= total) {
            const uint4 packed = *reinterpret_cast<const uint4 *>(codes + first);
            const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
            __align__(16) T values[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (left == 0) { // i < 16 elements of this group remain, so this row exists
                    left = inputs;
                    scale = wide(scales[++row]);
                }
                left--;
                const int8_t code = (int8_t)(words[i / 4] >> (i % 4 * 8));
                values[i] = rounded<T>(__fmul_rn((float)code, scale));
            }
            const uint4 *from = reinterpret_cast<const uint4 *>(values);
            uint4 *to = reinterpret_cast<uint4 *>(out + first);
#pragma unroll
            for (int i = 0; i < (int)sizeof(T); i++) to[i] = from[i];
        } else {
            const u64 end = first + 16 < total ? first + 16 : total;
            for (u64 i = first; i < end; i++) {
                if (left == 0) {
                    left = inputs;
                    scale = wide(scales[++row]);
                }
                left--;
                out[i] = rounded<T>(__fmul_rn((float)(int8_t)codes[i], scale));
            }
        }
    }
}

// `y[row, c] += bias[c]`, the f32 sum rounded once. The grid's x runs over columns, its y over rows.
template <typename T>
static __device__ __forceinline__ void add_bias(
    T *__restrict__ y, const T *__restrict__ bias, u64 rows, u64 outputs
) {
    constexpr int N = 16 / sizeof(T);
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    const u64 stride = (u64)gridDim.x * blockDim.x;
    if (aligned(y) && aligned(bias) && outputs % N == 0) {
        for (u64 group = at; group < outputs / N; group += stride) {
            __align__(16) T b[N];
            *reinterpret_cast<uint4 *>(b) = reinterpret_cast<const uint4 *>(bias)[group];
            for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
                uint4 *place = reinterpret_cast<uint4 *>(y + row * outputs) + group;
                __align__(16) T v[N];
                *reinterpret_cast<uint4 *>(v) = *place;
#pragma unroll
                for (int i = 0; i < N; i++) v[i] = rounded<T>(__fadd_rn(wide(v[i]), wide(b[i])));
                *place = *reinterpret_cast<const uint4 *>(v);
            }
        }
    } else {
        for (u64 c = at; c < outputs; c += stride) {
            const float b = wide(bias[c]);
            for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
                T *place = y + row * outputs + c;
                *place = rounded<T>(__fadd_rn(wide(*place), b));
            }
        }
    }
}

#define EXPAND(NAME, S, T)                                                                         \
    extern "C" __global__ void NAME(                                                               \
        const uint8_t *codes, const S *scales, T *out, u64 total, u64 inputs                       \
    ) {                                                                                            \
        expand<S, T>(codes, scales, out, total, inputs);                                           \
    }
#define ADD_BIAS(NAME, T)                                                                          \
    extern "C" __global__ void NAME(T *y, const T *bias, u64 rows, u64 outputs) {                  \
        add_bias<T>(y, bias, rows, outputs);                                                       \
    }

EXPAND(expand_bf16_bf16, __nv_bfloat16, __nv_bfloat16)
EXPAND(expand_bf16_f16, __nv_bfloat16, __half)
EXPAND(expand_bf16_f32, __nv_bfloat16, float)
EXPAND(expand_f16_bf16, __half, __nv_bfloat16)
EXPAND(expand_f16_f16, __half, __half)
EXPAND(expand_f16_f32, __half, float)
EXPAND(expand_f32_bf16, float, __nv_bfloat16)
EXPAND(expand_f32_f16, float, __half)
EXPAND(expand_f32_f32, float, float)
ADD_BIAS(add_bias_bf16, __nv_bfloat16)
ADD_BIAS(add_bias_f16, __half)
ADD_BIAS(add_bias_f32, float)
