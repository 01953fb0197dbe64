// Products of int8 activations and int8 weights: rows quantized, and the product by the tensor cores of all cards
// from compute capability 8.0 on. Rows become e4m3 here too; that product is the library's.
//
// Compiled ahead into one fat binary. All pointers are multiples of 16 bytes and rows of `inputs` are too, so
// that everything is read 16 bytes at a time; other widths are refused by the caller.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
#include <type_traits>

#include "rotation.cuh"

typedef unsigned long long u64;

template <typename T> struct Half;
template <> struct Half<__half> {
    typedef __half2 Pair;
    static __device__ __forceinline__ float2 wide(Pair v) { return __half22float2(v); }
    static __device__ __forceinline__ float wide(__half v) { return __half2float(v); }
    static __device__ __forceinline__ __half rounded(float v) { return __float2half_rn(v); }
};
template <> struct Half<__nv_bfloat16> {
    typedef __nv_bfloat162 Pair;
    static __device__ __forceinline__ float2 wide(Pair v) { return __bfloat1622float2(v); }
    static __device__ __forceinline__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
    static __device__ __forceinline__ __nv_bfloat16 rounded(float v) { return __float2bfloat16_rn(v); }
};

// Rows whose largest magnitude is below this count as zeros: its inverse must be finite.
constexpr float LEAST = 1e-30f;
// Vectors of 8 values that a thread keeps between finding the largest and writing the codes.
constexpr int KEPT = 4;

// The larger magnitudes of each half; NaN if there is one.
template <typename T>
static __device__ __forceinline__ typename Half<T>::Pair larger(typename Half<T>::Pair most, uint4 v) {
    typedef typename Half<T>::Pair Pair;
    const Pair *pairs = reinterpret_cast<const Pair *>(&v);
#pragma unroll
    for (int i = 0; i < 4; i++) most = __hmax2_nan(most, __habs2(pairs[i]));
    return most;
}

// Codes of a byte: the largest one as a number, and two numbers of at most that made codes, to nearest, ties to even,
// the first in the lower byte.
struct Int8 {
    static constexpr float MOST = 127.f;
    static __device__ __forceinline__ uint32_t codes(float low, float high) {
        return (__float2int_rn(low) & 255) | (__float2int_rn(high) & 255) << 8;
    }
};
struct RotatedInt8 : Int8 {};
struct Fp8 {
    static constexpr float MOST = 448.f;
    static __device__ __forceinline__ uint32_t codes(float low, float high) {
        return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
    }
};

template <typename Code, typename T>
static __device__ __forceinline__ uint2 coded(uint4 v, float inverse) {
    typedef typename Half<T>::Pair Pair;
    const Pair *pairs = reinterpret_cast<const Pair *>(&v);
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 x = Half<T>::wide(pairs[i]);
        const uint32_t both = Code::codes(__fmul_rn(x.x, inverse), __fmul_rn(x.y, inverse));
        words[i / 2] |= both << (i % 2 * 16);
    }
    return make_uint2(words[0], words[1]);
}

// Eight values in f32, their groups rotated. All lanes of a warp must come here, with neighbouring vectors.
template <typename T> static __device__ __forceinline__ void rotated(uint4 v, float (&to)[ROTATED]) {
    const typename Half<T>::Pair *pairs = reinterpret_cast<const typename Half<T>::Pair *>(&v);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = Half<T>::wide(pairs[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
    rotate(to);
}

static __device__ __forceinline__ uint2 coded(const float (&v)[ROTATED], float inverse) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float low = __fmul_rn(v[2 * i], inverse), high = __fmul_rn(v[2 * i + 1], inverse);
        words[i / 2] |= Int8::codes(low, high) << (i % 2 * 16);
    }
    return make_uint2(words[0], words[1]);
}

// What `quantize` does, of a row whose groups are rotated. Vectors are a multiple of 32, as threads are, so that a warp has one
// group or none; what a thread does not keep is read and rotated twice.
template <typename T>
static __device__ __forceinline__ void quantize_rotated(
    const T *__restrict__ x, uint8_t *__restrict__ codes, float *__restrict__ row_scales, int inputs
) {
    const int vectors = inputs / 8;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (u64)blockIdx.x * inputs);
    uint2 *to = reinterpret_cast<uint2 *>(codes + (u64)blockIdx.x * inputs);
    const int first = threadIdx.x, step = blockDim.x;
    uint4 read[KEPT];
    float kept[KEPT][ROTATED], most = 0.f;
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int at = first + i * step;
        read[i] = at < vectors ? from[at] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        if (first + i * step >= vectors) continue; // a whole warp does
        rotated<T>(read[i], kept[i]);
        most = largest(most, kept[i]);
    }
    for (int at = first + KEPT * step; at < vectors; at += step) {
        float v[ROTATED];
        rotated<T>(from[at], v);
        most = largest(most, v);
    }
#pragma unroll
    for (int away = 16; away > 0; away /= 2) most = larger(most, __shfl_xor_sync(~0u, most, away));
    __shared__ float of_warps[32];
    if (first % 32 == 0) of_warps[first / 32] = most;
    __syncthreads();
    for (int warp = 0; warp < step / 32; warp++) most = larger(most, of_warps[warp]);

    const bool finite = most < INFINITY; // no NaN either
    const bool some = finite && most >= LEAST;
    const float inverse = __fdiv_rn(Int8::MOST, most);
    if (first == 0)
        row_scales[blockIdx.x] = some ? __fdiv_rn(most, Int8::MOST) : finite ? 0.f : NAN;
    const uint2 none = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int at = first + i * step;
        if (at < vectors) to[at] = some ? coded(kept[i], inverse) : none;
    }
    for (int at = first + KEPT * step; at < vectors; at += step) {
        float v[ROTATED];
        rotated<T>(from[at], v);
        to[at] = some ? coded(v, inverse) : none;
    }
}

// `codes[row] = x[row] / row_scales[row]` with the scale that makes the largest magnitude the largest code, a block a row. Rows of
// zeros get codes and scale 0; rows with a NaN or an infinity get codes 0 and the scale NaN, so that all that
// is computed from them is NaN.
template <typename Code, typename T>
static __device__ __forceinline__ void quantize(
    const T *__restrict__ x, uint8_t *__restrict__ codes, float *__restrict__ row_scales, int inputs
) {
    if constexpr (std::is_same<Code, RotatedInt8>::value) {
        quantize_rotated<T>(x, codes, row_scales, inputs);
        return;
    }
    const int vectors = inputs / 8;
    const uint4 *from = reinterpret_cast<const uint4 *>(x + (u64)blockIdx.x * inputs);
    uint2 *to = reinterpret_cast<uint2 *>(codes + (u64)blockIdx.x * inputs);
    const int first = threadIdx.x, step = blockDim.x;
    uint4 kept[KEPT];
    typename Half<T>::Pair most;
    most.x = most.y = Half<T>::rounded(0.f);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int at = first + i * step;
        kept[i] = at < vectors ? from[at] : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < KEPT; i++) most = larger<T>(most, kept[i]);
    for (int at = first + KEPT * step; at < vectors; at += step) most = larger<T>(most, from[at]);

    T largest = __hmax_nan(most.x, most.y);
#pragma unroll
    for (int away = 16; away > 0; away /= 2)
        largest = __hmax_nan(largest, __shfl_xor_sync(~0u, largest, away));
    __shared__ T of_warps[32];
    if (first % 32 == 0) of_warps[first / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < step / 32; warp++) largest = __hmax_nan(largest, of_warps[warp]);

    const float magnitude = Half<T>::wide(largest);
    const bool finite = magnitude < INFINITY; // no NaN either
    const bool some = finite && magnitude >= LEAST;
    const float inverse = __fdiv_rn(Code::MOST, magnitude);
    if (first == 0)
        row_scales[blockIdx.x] = some ? __fdiv_rn(magnitude, Code::MOST) : finite ? 0.f : NAN;
    const uint2 none = make_uint2(0, 0);
#pragma unroll
    for (int i = 0; i < KEPT; i++) {
        const int at = first + i * step;
        if (at < vectors) to[at] = some ? coded<Code, T>(kept[i], inverse) : none;
    }
    for (int at = first + KEPT * step; at < vectors; at += step)
        to[at] = some ? coded<Code, T>(from[at], inverse) : none;
}

// Tiles of the product: a block computes M x N outputs in steps of K inputs, of which STAGES are on their way or
// in use; a warp computes a quarter. What is shared is the 48 KiB that every card gives two blocks without asking.
constexpr int M = 128, N = 128, K = 64, STAGES = 3, THREADS = 128;
constexpr int WARP_M = 64, WARP_N = 64;
// So many tiles of rows take their turn with each tile of columns, so that both are still in the cache.
constexpr int GROUP = 8;

// Where 16 bytes of a tile with rows of K bytes lie: permuted within two rows, so that eight rows below one another
// lie in different banks.
static __device__ __forceinline__ int place(int row, int vector) {
    return row * K + ((vector ^ (row >> 1 & 3)) << 4);
}

static __device__ __forceinline__ void copy_async(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}

static __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
}

static __device__ __forceinline__ void multiply(
    int (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1
) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};\n"
                 : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Starts copying one tile of 128 rows: those behind the last, and inputs behind the last, become zeros.
static __device__ __forceinline__ void fetch(
    uint32_t to, const int8_t *__restrict__ from, int first, int rows, int inputs, int input
) {
#pragma unroll
    for (int i = 0; i < M * K / 16 / THREADS; i++) {
        const int at = i * THREADS + threadIdx.x, row = at / (K / 16), vector = at % (K / 16);
        const int column = input + vector * 16;
        const bool there = first + row < rows && column < inputs;
        const int8_t *source = from + (there ? (u64)(first + row) * inputs + column : 0);
        copy_async(to + place(row, vector), source, there);
    }
}

// What becomes of an output before it is rounded. GELU by tanh is 1/2 v (1 + tanh u) = v sigmoid(2 u),
// u = sqrt(2 / pi) (v + 0.044715 v^3): 0 where e^-2u is past 2^126.
template <bool GELU> static __device__ __forceinline__ float behind(float v) {
    if (!GELU) return v;
    const float u = __fmul_rn(__fmul_rn(1.5957691f, v), fmaf(__fmul_rn(0.044715f, v), v, 1.f));
    return __fdividef(v, __fadd_rn(1.f, expf(-u)));
}

// `y = row scale * (column scale * x wT) + bias`, summed exactly, then in f32, with what comes behind it, rounded once. Rows
// of `y` are `y_row` values apart.
template <typename T, bool GELU>
static __device__ __forceinline__ void product(
    const int8_t *__restrict__ x, const float *__restrict__ x_scales, const int8_t *__restrict__ w,
    const float *__restrict__ w_scales, const T *__restrict__ bias, T *__restrict__ y, int rows,
    int outputs, int inputs, int y_row
) {
    static_assert(M == N, "one way to fetch");
    __shared__ __align__(128) uint8_t shared[STAGES * (M + N) * K];
    const uint32_t base = (uint32_t)__cvta_generic_to_shared(shared);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

    const int down = (rows + M - 1) / M, across = (outputs + N - 1) / N;
    const int group = blockIdx.x / (GROUP * across), within = blockIdx.x % (GROUP * across);
    const int high = min(GROUP, down - group * GROUP);
    const int row0 = (group * GROUP + within % high) * M, column0 = within / high * N;

    const int steps = (inputs + K - 1) / K;
    auto stage = [&](int step) { return base + step % STAGES * (M + N) * K; };
    auto start = [&](int step) {
        if (step < steps) {
            fetch(stage(step), x, row0, rows, inputs, step * K);
            fetch(stage(step) + M * K, w, column0, outputs, inputs, step * K);
        }
        asm volatile("cp.async.commit_group;\n");
    };

    int sums[WARP_M / 16][WARP_N / 8][4] = {};
    const int warp_row = warp / 2 * WARP_M, warp_column = warp % 2 * WARP_N;
    // The row and the half of 32 inputs whose address this lane gives `ldmatrix`.
    const int a_row = warp_row + lane % 16, a_half = lane / 16;
    const int b_row = warp_column + lane % 8 + lane / 16 * 8, b_half = lane / 8 % 2;

#pragma unroll
    for (int step = 0; step < STAGES - 1; step++) start(step);
    for (int step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;\n" ::"n"(STAGES - 2));
        __syncthreads(); // this step is there, and all are done with the one before, whose place is next
        start(step + STAGES - 1);
        const uint32_t tile_a = stage(step), tile_b = tile_a + M * K;
#pragma unroll
        for (int k = 0; k < K / 32; k++) {
            uint32_t a[WARP_M / 16][4], b[WARP_N / 16][4];
#pragma unroll
            for (int i = 0; i < WARP_M / 16; i++)
                load_matrices(a[i], tile_a + place(a_row + i * 16, k * 2 + a_half));
#pragma unroll
            for (int j = 0; j < WARP_N / 16; j++)
                load_matrices(b[j], tile_b + place(b_row + j * 16, k * 2 + b_half));
#pragma unroll
            for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
                for (int j = 0; j < WARP_N / 8; j++)
                    multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    }
    asm volatile("cp.async.wait_group 0;\n");
    __syncthreads();

    // Through shared memory, so that whole lines are written. Rows are a vector apart from a multiple of all banks.
    constexpr int LINE = N + 8;
    static_assert(M * LINE * 2 <= STAGES * (M + N) * K, "outputs fit where tiles were");
    T *out = reinterpret_cast<T *>(shared);
    const int line = warp_row + lane / 4, column = warp_column + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < WARP_N / 8; j++) {
        float scales[2], biases[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            const int at = column0 + column + j * 8 + c;
            scales[c] = at < outputs ? w_scales[at] : 0.f;
            biases[c] = at < outputs && bias ? Half<T>::wide(bias[at]) : 0.f;
        }
#pragma unroll
        for (int i = 0; i < WARP_M / 16; i++)
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int at = line + i * 16 + r * 8;
                const float of_row = row0 + at < rows ? x_scales[row0 + at] : 0.f;
                typename Half<T>::Pair pair;
                const int *sum = sums[i][j] + r * 2;
                pair.x = Half<T>::rounded(behind<GELU>(
                    __fmaf_rn(of_row, __fmul_rn(scales[0], __int2float_rn(sum[0])), biases[0])
                ));
                pair.y = Half<T>::rounded(behind<GELU>(
                    __fmaf_rn(of_row, __fmul_rn(scales[1], __int2float_rn(sum[1])), biases[1])
                ));
                *reinterpret_cast<typename Half<T>::Pair *>(out + at * LINE + column + j * 8) = pair;
            }
    }
    __syncthreads();
    const int wide = min(N, outputs - column0), lines = min(M, rows - row0);
    T *to = y + (u64)row0 * y_row + column0;
    if (outputs % 8 == 0 && y_row % 8 == 0) {
        const int vectors = wide / 8;
        for (int at = threadIdx.x; at < lines * (N / 8); at += THREADS) {
            const int row = at / (N / 8), vector = at % (N / 8);
            if (vector < vectors)
                reinterpret_cast<uint4 *>(to + (u64)row * y_row)[vector] =
                    *reinterpret_cast<const uint4 *>(out + row * LINE + vector * 8);
        }
    } else {
        for (int at = threadIdx.x; at < lines * N; at += THREADS) {
            const int row = at / N, c = at % N;
            if (c < wide) to[(u64)row * y_row + c] = out[row * LINE + c];
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

#define QUANTIZE_TO(NAME, CODE, T)                                                                 \
    extern "C" __global__ void NAME(const T *x, uint8_t *codes, float *row_scales, int inputs) {   \
        in_turn();                                                                                 \
        quantize<CODE, T>(x, codes, row_scales, inputs);                                           \
    }
#define QUANTIZE(NAME, T)                                                                          \
    QUANTIZE_TO(quantize_##NAME, Int8, T)                                                          \
    QUANTIZE_TO(quantize_fp8_##NAME, Fp8, T)                                                       \
    QUANTIZE_TO(quantize_rotated_int8_##NAME, RotatedInt8, T)
#define PRODUCT(NAME, T, GELU)                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME(                                 \
        const int8_t *x, const float *x_scales, const int8_t *w, const float *w_scales,            \
        const T *bias, T *y, int rows, int outputs, int inputs, int y_row                          \
    ) {                                                                                            \
        in_turn();                                                                                 \
        product<T, GELU>(x, x_scales, w, w_scales, bias, y, rows, outputs, inputs, y_row);         \
    }

QUANTIZE(bf16, __nv_bfloat16)
QUANTIZE(f16, __half)
PRODUCT(w8a8_bf16, __nv_bfloat16, false)
PRODUCT(w8a8_f16, __half, false)
PRODUCT(w8a8_gelu_bf16, __nv_bfloat16, true)
PRODUCT(w8a8_gelu_f16, __half, true)
