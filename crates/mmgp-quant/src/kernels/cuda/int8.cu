// Kernels of the linear layer on NVIDIA GPUs: int8 and fp8 weights expanded, biases added.
//
// Compiled ahead into one fat binary. Offsets are 64 bits wide: a weight may have more than 2^31
// elements. Pointers of whole weights are multiples of 16 bytes, those of views need not be, so each
// kernel takes 16 bytes at a time where all its pointers allow that and one element where not.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
#include <type_traits>

#include "rotation.cuh"

typedef uint32_t u32;
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

// What a byte stands for; both are exact in f32.
struct Int8 {
    static __device__ __forceinline__ float value(uint32_t byte) { return (float)(int8_t)byte; }
};
struct RotatedInt8 : Int8 {};
struct Fp8 {
    static __device__ __forceinline__ float value(uint32_t byte) {
        return __half2float(__half(__nv_cvt_fp8_to_halfraw((__nv_fp8_storage_t)byte, __NV_E4M3)));
    }
};

static __device__ __forceinline__ bool aligned(const void *p) { return ((uintptr_t)p & 15) == 0; }

// What `expand` does, of codes of rotated rows, rotated back before they are rounded: a warp takes a group of 256, which lies in
// one row.
template <typename T>
static __device__ __forceinline__ void expand_rotated(
    const uint8_t *__restrict__ codes, const float *__restrict__ scales, T *__restrict__ out,
    u64 total, u64 inputs
) {
    const bool whole = (uintptr_t)codes % 8 == 0 && aligned(out);
    const u64 groups = total / 256, of_row = inputs / 256;
    const u64 step = (u64)gridDim.x * blockDim.x / 32;
    const u32 lane = threadIdx.x % 32;
    for (u64 group = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32; group < groups; group += step) {
        const u64 first = group * 256 + lane * ROTATED;
        const float scale = scales ? scales[group / of_row] : 1.f;
        __align__(8) uint8_t bytes[ROTATED];
        if (whole) {
            *reinterpret_cast<uint2 *>(bytes) = *reinterpret_cast<const uint2 *>(codes + first);
        } else {
#pragma unroll
            for (int i = 0; i < ROTATED; i++) bytes[i] = codes[first + i];
        }
        float v[ROTATED];
#pragma unroll
        for (int i = 0; i < ROTATED; i++) v[i] = __fmul_rn(Int8::value(bytes[i]), scale);
        rotate(v);
        __align__(16) T values[ROTATED];
#pragma unroll
        for (int i = 0; i < ROTATED; i++) values[i] = rounded<T>(v[i]);
        if (whole) {
            const uint4 *from = reinterpret_cast<const uint4 *>(values);
            uint4 *to = reinterpret_cast<uint4 *>(out + first);
#pragma unroll
            for (int i = 0; i < (int)(ROTATED * sizeof(T) / 16); i++) to[i] = from[i];
        } else {
#pragma unroll
            for (int i = 0; i < ROTATED; i++) out[first + i] = values[i];
        }
    }
}

// `out[i] = codes[i] * scales[i / inputs]` for i < total, the f32 product rounded once; without scales they are 1. A thread takes
// 16 neighbours of the flat array; rows may begin anywhere among them.
template <typename Code, typename T>
static __device__ __forceinline__ void expand(
    const uint8_t *__restrict__ codes, const float *__restrict__ scales, T *__restrict__ out,
    u64 total, u64 inputs
) {
    if constexpr (std::is_same<Code, RotatedInt8>::value) {
        expand_rotated<T>(codes, scales, out, total, inputs);
        return;
    }
    const bool whole = aligned(codes) && aligned(out);
    const u64 stride = (u64)gridDim.x * blockDim.x;
    const u64 groups = total / 16 + (total % 16 != 0);
    for (u64 group = (u64)blockIdx.x * blockDim.x + threadIdx.x; group < groups; group += stride) {
        const u64 first = group * 16;
        u64 row = first / inputs;
        u64 left = inputs - (first - row * inputs); // elements up to the end of the row, at least 1
        float scale = scales ? scales[row] : 1.f;
        if (whole && first + 16 <= total) {
            const uint4 packed = *reinterpret_cast<const uint4 *>(codes + first);
            const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
            __align__(16) T values[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (left == 0) { // i < 16 elements of this group remain, so this row exists
                    left = inputs;
                    row++;
                    scale = scales ? scales[row] : 1.f;
                }
                left--;
                const float code = Code::value(words[i / 4] >> (i % 4 * 8) & 255);
                values[i] = rounded<T>(__fmul_rn(code, scale));
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
                    row++;
                    scale = scales ? scales[row] : 1.f;
                }
                left--;
                out[i] = rounded<T>(__fmul_rn(Code::value(codes[i]), scale));
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

// A kernel may be brought up before the one before it ends (`Kernel::launch`): waits for that, then lets the next one come up.
static __device__ __forceinline__ void in_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

#define EXPAND_CODES(NAME, CODE, T)                                                                \
    extern "C" __global__ void NAME(                                                               \
        const uint8_t *codes, const float *scales, T *out, u64 total, u64 inputs                   \
    ) {                                                                                            \
        in_turn();                                                                                 \
        expand<CODE, T>(codes, scales, out, total, inputs);                                        \
    }
#define EXPAND(NAME, T)                                                                            \
    EXPAND_CODES(expand_##NAME, Int8, T)                                                           \
    EXPAND_CODES(expand_fp8_##NAME, Fp8, T)                                                        \
    EXPAND_CODES(expand_rotated_int8_##NAME, RotatedInt8, T)
#define ADD_BIAS(NAME, T)                                                                          \
    extern "C" __global__ void NAME(T *y, const T *bias, u64 rows, u64 outputs) {                  \
        in_turn();                                                                                 \
        add_bias<T>(y, bias, rows, outputs);                                                       \
    }

EXPAND(bf16, __nv_bfloat16)
EXPAND(f16, __half)
EXPAND(f32, float)
ADD_BIAS(add_bias_bf16, __nv_bfloat16)
ADD_BIAS(add_bias_f16, __half)
ADD_BIAS(add_bias_f32, float)
