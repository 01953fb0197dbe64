// What stands between the products of a model, on NVIDIA GPUs: norms, heads, gates, activations; and pixels, as
// convolutions want them.
//
// Values are bf16, f16 or f32; each is widened to f32 when it is read and rounded once when it is written. A
// thread takes vectors of 16 bytes. Where a pointer, a stride or a width does not allow that, the same thread
// takes the same values one by one, and no operation is left to be contracted, so that no result depends on
// where a tensor lies. Sums are taken in an order that follows from width and dtype alone: by a thread over its
// vectors, then over the lanes of a row by exchanges, then over warps. No result depends on the grid: blocks
// step over what it leaves.
//
// Arguments come as one struct of 64-bit fields, whose twin is in `shape.rs`; a pointer that is 0 stands for
// something that is left out. What the host promises: rows, tokens, heads and what is normalised are below 2^31,
// `out` overlaps an input only where it is that input, blocks are a whole number of warps, and their x is a
// power of two.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cstdint>
#include <type_traits>

#include "../../../../mmgp-quant/src/kernels/cuda/rotation.cuh"

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

// 16 bytes of a row.
template <typename T> struct __align__(16) Vector {
    static constexpr u32 N = 16 / sizeof(T);
    T v[N];
};

// The cosines or sines of a vector's pairs.
template <typename T> struct __align__(2 * Vector<T>::N) Turns {
    float v[Vector<T>::N / 2];
};

// Whether all of `parts` are multiples of `of`: addresses of 16, strides of a vector's values.
template <typename... Parts> static __device__ __forceinline__ bool multiples(u64 of, Parts... parts) {
    return ((((u64)parts) % of == 0) && ...);
}

// The first `have` values at `from`, zeros behind them; all of a vector that lies aligned if WHOLE.
template <bool WHOLE, typename T>
static __device__ __forceinline__ Vector<T> load(const T *from, u32 have) {
    Vector<T> to;
    if (WHOLE) {
        *reinterpret_cast<uint4 *>(&to) = *reinterpret_cast<const uint4 *>(from);
    } else {
#pragma unroll
        for (u32 i = 0; i < Vector<T>::N; i++) to.v[i] = i < have ? from[i] : rounded<T>(0.f);
    }
    return to;
}

template <bool WHOLE, typename T>
static __device__ __forceinline__ void store(T *to, const Vector<T> &from, u32 have) {
    if (WHOLE) {
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(&from);
    } else {
#pragma unroll
        for (u32 i = 0; i < Vector<T>::N; i++) {
            if (i < have) to[i] = from.v[i];
        }
    }
}

// How many of the values from `vector` on there are in a row of `width`, at most a vector's.
template <typename T> static __device__ __forceinline__ u32 held_by(u64 vector, u64 width) {
    constexpr u32 N = Vector<T>::N;
    const u64 left = width - vector * N;
    return left < N ? (u32)left : N;
}

// The sum of `v` over the threads of one x row of the block, the same bits in each of them. All threads of the
// block must come here. `shared` has a place for each warp of a row.
static __device__ __forceinline__ float over_row(float v, float *shared) {
    const u32 lanes = blockDim.x;
    for (u32 step = (lanes < 32 ? lanes : 32) / 2; step > 0; step /= 2) {
        v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, step));
    }
    if (lanes > 32) { // then the block is one row
        __syncthreads(); // what was there before is read
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
        __syncthreads();
        v = 0.f;
        for (u32 warp = 0; warp < lanes / 32; warp++) v = __fadd_rn(v, shared[warp]);
    }
    return v;
}

// Vectors that a thread keeps of a row that lies aligned. It reads again what is behind them, and all of a row
// that does not.
constexpr u32 HELD = 4;

// A row of `width` values at `x`, of which this thread has vectors `threadIdx.x`, `threadIdx.x + blockDim.x`, …
template <typename T, bool WHOLE> struct Row {
    static constexpr u32 N = Vector<T>::N, KEPT = WHOLE ? HELD : 0;
    const T *x;
    u32 width, vectors;
    Vector<T> held[HELD];

    __device__ __forceinline__ u32 have(u32 vector) const {
        return WHOLE ? N : held_by<T>(vector, width);
    }

    // A row that is not `live` is no row: it has no vectors.
    __device__ __forceinline__ Row(const T *from, u32 columns, bool live)
        : x(from), width(columns), vectors(live ? (columns + N - 1) / N : 0) {
#pragma unroll
        for (u32 j = 0; j < KEPT; j++) {
            const u32 vector = threadIdx.x + j * blockDim.x;
            if (vector < vectors) held[j] = load<WHOLE>(x + (u64)vector * N, have(vector));
        }
    }

    // A row at `from` that this thread writes first: `make(vector, how many values)` is what a vector becomes.
    template <typename F>
    __device__ __forceinline__ Row(T *from, u32 columns, bool live, F make)
        : x(from), width(columns), vectors(live ? (columns + N - 1) / N : 0) {
#pragma unroll
        for (u32 j = 0; j < KEPT; j++) {
            const u32 vector = threadIdx.x + j * blockDim.x;
            if (vector < vectors) {
                held[j] = make(vector, have(vector));
                store<WHOLE>(from + (u64)vector * N, held[j], have(vector));
            }
        }
        for (u32 vector = threadIdx.x + KEPT * blockDim.x; vector < vectors; vector += blockDim.x) {
            store<WHOLE>(from + (u64)vector * N, make(vector, have(vector)), have(vector));
        }
    }

    // `f(vector, its values)` for each vector of this thread, in their order.
    template <typename F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (u32 j = 0; j < KEPT; j++) {
            const u32 vector = threadIdx.x + j * blockDim.x;
            if (vector < vectors) f(vector, held[j]);
        }
        for (u32 vector = threadIdx.x + KEPT * blockDim.x; vector < vectors; vector += blockDim.x) {
            f(vector, load<WHOLE>(x + (u64)vector * N, have(vector)));
        }
    }

    // The sum of the values.
    __device__ __forceinline__ float sum(float *shared) const {
        float total = 0.f;
        each([&](u32, const Vector<T> &of) {
#pragma unroll
            for (u32 i = 0; i < N; i++) total = __fadd_rn(total, wide(of.v[i])); // zeros at the end
        });
        return over_row(total, shared);
    }

    // The sum of the squares of the values less `mean`.
    __device__ __forceinline__ float squares(float mean, float *shared) const {
        float total = 0.f;
        each([&](u32 vector, const Vector<T> &of) {
            const u32 there = have(vector);
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                const float v = __fsub_rn(wide(of.v[i]), mean);
                if (i < there) total = fmaf(v, v, total);
            }
        });
        return over_row(total, shared);
    }
};

// Rows that are normalised, scaled, turned and put somewhere else, each step if it is wanted.
struct Rows {
    const void *x;
    const void *weight; // [width]
    const void *bias;   // [width]
    const void *scale;  // [items, width]: times 1 + scale
    const void *shift;  // [items, width], where scale is
    const float *cos;   // [tokens, width / 2], contiguous; width is even
    const float *sin;   // where cos is
    void *out;
    u64 rows;   // items · tokens · heads
    u64 tokens; // of an item
    u64 heads;  // of a token
    u64 width;  // of a head
    u64 x_item; // strides, in elements
    u64 x_token;
    u64 x_head;
    u64 out_item;
    u64 out_token;
    u64 out_head;
    u64 scale_item;
    u64 shift_item;
    double eps;
};

enum Norm { NONE, RMS, LAYER };

// Row `(item, token, head)` is a y row of a block. The operations of a turn are rounded one by one, as the CPU
// does them: without a norm, the bits are the same.
template <typename T, Norm NORM, bool WHOLE>
static __device__ __forceinline__ void rows(const Rows &p, float *shared) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width;
    const u32 heads = (u32)p.heads, tokens = (u32)p.tokens;
    const T *weight = static_cast<const T *>(p.weight), *bias = static_cast<const T *>(p.bias);
    const u64 step = (u64)gridDim.x * blockDim.y;
    for (u64 base = (u64)blockIdx.x * blockDim.y; base < count; base += step) {
        const bool live = base + threadIdx.y < count;
        const u32 at = live ? (u32)base + threadIdx.y : 0;
        const u32 head = at % heads, token = at / heads % tokens, item = at / heads / tokens;
        const Row<T, WHOLE> row(
            static_cast<const T *>(p.x) + item * p.x_item + token * p.x_token + head * p.x_head,
            width, live
        );
        float mean = 0.f, inverse = 1.f;
        if (NORM == LAYER) mean = row.sum(shared) / (float)width;
        if (NORM != NONE) {
            const float variance = row.squares(mean, shared) / (float)width;
            inverse = 1.f / sqrtf(__fadd_rn(variance, (float)p.eps));
        }
        const T *scale = static_cast<const T *>(p.scale), *shift = static_cast<const T *>(p.shift);
        if (scale) {
            scale += item * p.scale_item;
            shift += item * p.shift_item;
        }
        const float *cos = p.cos, *sin = p.sin;
        if (cos) {
            cos += (u64)token * (width / 2);
            sin += (u64)token * (width / 2);
        }
        T *out = static_cast<T *>(p.out) + item * p.out_item + token * p.out_token + head * p.out_head;
        row.each([&](u32 vector, const Vector<T> &of) {
            const u32 first = vector * N, have = row.have(vector);
            float y[N];
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                y[i] = wide(of.v[i]);
                if (NORM == LAYER) y[i] = __fsub_rn(y[i], mean);
                if (NORM != NONE) y[i] = __fmul_rn(y[i], inverse);
            }
            if (weight) {
                const Vector<T> w = load<WHOLE>(weight + first, have);
#pragma unroll
                for (u32 i = 0; i < N; i++) y[i] = __fmul_rn(y[i], wide(w.v[i]));
            }
            if (bias) {
                const Vector<T> b = load<WHOLE>(bias + first, have);
#pragma unroll
                for (u32 i = 0; i < N; i++) y[i] = __fadd_rn(y[i], wide(b.v[i]));
            }
            if (scale) {
                const Vector<T> s = load<WHOLE>(scale + first, have);
                const Vector<T> t = load<WHOLE>(shift + first, have);
#pragma unroll
                for (u32 i = 0; i < N; i++) {
                    y[i] = fmaf(y[i], __fadd_rn(1.f, wide(s.v[i])), wide(t.v[i]));
                }
            }
            if (cos) {
                Turns<T> c, s;
                if (WHOLE) {
                    c = *reinterpret_cast<const Turns<T> *>(cos + first / 2);
                    s = *reinterpret_cast<const Turns<T> *>(sin + first / 2);
                } else {
#pragma unroll
                    for (u32 i = 0; i < N / 2; i++) {
                        c.v[i] = 2 * i < have ? cos[first / 2 + i] : 1.f;
                        s.v[i] = 2 * i < have ? sin[first / 2 + i] : 0.f;
                    }
                }
#pragma unroll
                for (u32 i = 0; i < N / 2; i++) {
                    const float a = y[2 * i], b = y[2 * i + 1];
                    y[2 * i] = __fsub_rn(__fmul_rn(a, c.v[i]), __fmul_rn(b, s.v[i]));
                    y[2 * i + 1] = __fadd_rn(__fmul_rn(b, c.v[i]), __fmul_rn(a, s.v[i]));
                }
            }
            Vector<T> to;
#pragma unroll
            for (u32 i = 0; i < N; i++) to.v[i] = rounded<T>(y[i]);
            store<WHOLE>(out + first, to, have);
        });
    }
}

template <typename T, Norm NORM> static __device__ __forceinline__ void rows(const Rows &p) {
    __shared__ float shared[32];
    const bool whole =
        multiples(16, p.x, p.weight, p.bias, p.scale, p.shift, p.cos, p.sin, p.out) &&
        multiples(Vector<T>::N, p.width, p.x_item, p.x_token, p.x_head, p.out_item, p.out_token) &&
        multiples(Vector<T>::N, p.out_head, p.scale_item, p.shift_item);
    whole ? rows<T, NORM, true>(p, shared) : rows<T, NORM, false>(p, shared);
}

// Heads of queries and of keys that are normalised and turned where they lie, in the rows of a projection.
struct Turn {
    void *q;              // the first query
    const void *q_weight; // [width]
    const void *k_weight; // [width]
    const float *cos;     // [tokens, width / 2], contiguous
    const float *sin;
    u64 rows;   // items · tokens · heads
    u64 tokens; // of an item
    u64 heads;  // of a token, side by side
    u64 width;  // of a head, whole vectors
    u64 item;   // strides, in elements
    u64 token;
    u64 key;    // from a query to its key
    double eps;
};

// Row `(item, token, head)` is a y row of a block, of at most 32 threads, each of which has one vector of the query and one
// of the key, which lie aligned. What is computed of either, and in which order, is what `rows` does. WHOLE: weights and tables
// lie aligned too.
template <typename T, bool WHOLE> static __device__ __forceinline__ void turn(const Turn &p) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width, heads = (u32)p.heads, tokens = (u32)p.tokens;
    const u32 first = threadIdx.x * N;
    const u64 step = (u64)gridDim.x * blockDim.y;
    for (u64 base = (u64)blockIdx.x * blockDim.y; base < count; base += step) {
        const bool live = base + threadIdx.y < count && first < width;
        const u32 at = live ? (u32)base + threadIdx.y : 0;
        const u32 head = at % heads, token = at / heads % tokens, item = at / heads / tokens;
        T *at_q = static_cast<T *>(p.q) + item * p.item + token * p.token + head * width + first;
        Vector<T> of[2] = {}, weight[2];
        Turns<T> c, s;
        if (live) {
            of[0] = load<true>(at_q, N);
            of[1] = load<true>(at_q + p.key, N);
            weight[0] = load<WHOLE>(static_cast<const T *>(p.q_weight) + first, N);
            weight[1] = load<WHOLE>(static_cast<const T *>(p.k_weight) + first, N);
            const u64 pairs = (u64)token * (width / 2) + first / 2;
            if (WHOLE) {
                c = *reinterpret_cast<const Turns<T> *>(p.cos + pairs);
                s = *reinterpret_cast<const Turns<T> *>(p.sin + pairs);
            } else {
#pragma unroll
                for (u32 i = 0; i < N / 2; i++) {
                    c.v[i] = p.cos[pairs + i];
                    s.v[i] = p.sin[pairs + i];
                }
            }
        }
        float squares[2] = {0.f, 0.f};
#pragma unroll
        for (u32 i = 0; i < N; i++) {
#pragma unroll
            for (u32 j = 0; j < 2; j++) squares[j] = fmaf(wide(of[j].v[i]), wide(of[j].v[i]), squares[j]);
        }
        for (u32 away = blockDim.x / 2; away > 0; away /= 2) {
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
                squares[j] = __fadd_rn(squares[j], __shfl_xor_sync(0xffffffffu, squares[j], away));
            }
        }
        if (!live) continue; // no thread waits for others below
#pragma unroll
        for (u32 j = 0; j < 2; j++) {
            const float inverse = 1.f / sqrtf(__fadd_rn(squares[j] / (float)width, (float)p.eps));
            Vector<T> to;
#pragma unroll
            for (u32 i = 0; i < N / 2; i++) {
                const float a = __fmul_rn(__fmul_rn(wide(of[j].v[2 * i]), inverse), wide(weight[j].v[2 * i]));
                const float b =
                    __fmul_rn(__fmul_rn(wide(of[j].v[2 * i + 1]), inverse), wide(weight[j].v[2 * i + 1]));
                to.v[2 * i] = rounded<T>(__fsub_rn(__fmul_rn(a, c.v[i]), __fmul_rn(b, s.v[i])));
                to.v[2 * i + 1] = rounded<T>(__fadd_rn(__fmul_rn(b, c.v[i]), __fmul_rn(a, s.v[i])));
            }
            store<true>(at_q + j * p.key, to, N);
        }
    }
}

template <typename T> static __device__ __forceinline__ void turn(const Turn &p) {
    multiples(16, p.q_weight, p.k_weight, p.cos, p.sin) ? turn<T, true>(p) : turn<T, false>(p);
}

// `out = x + gate · y`, both operations rounded in f32 as the CPU does them.
struct Gate {
    const void *x;
    const void *y;
    const void *gate; // [items, width]
    void *out;        // contiguous
    u64 rows;         // items · tokens
    u64 tokens;       // of an item
    u64 width;
    u64 x_item; // strides, in elements
    u64 x_token;
    u64 y_item;
    u64 y_token;
    u64 gate_item;
};

// x runs over the vectors of a row, y over rows.
template <typename T, bool WHOLE> static __device__ __forceinline__ void gate(const Gate &p) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width, tokens = (u32)p.tokens;
    const u32 vectors = (width + N - 1) / N;
    for (u64 at = (u64)blockIdx.y * blockDim.y + threadIdx.y; at < count;
         at += (u64)gridDim.y * blockDim.y) {
        const u32 row = (u32)at, item = row / tokens, token = row % tokens;
        const T *x = static_cast<const T *>(p.x) + item * p.x_item + token * p.x_token;
        const T *y = static_cast<const T *>(p.y) + item * p.y_item + token * p.y_token;
        const T *g = static_cast<const T *>(p.gate) + item * p.gate_item;
        T *out = static_cast<T *>(p.out) + at * width;
        for (u32 vector = blockIdx.x * blockDim.x + threadIdx.x; vector < vectors;
             vector += gridDim.x * blockDim.x) {
            const u32 first = vector * N, have = WHOLE ? N : held_by<T>(vector, width);
            const Vector<T> a = load<WHOLE>(x + first, have);
            const Vector<T> b = load<WHOLE>(y + first, have);
            const Vector<T> c = load<WHOLE>(g + first, have);
            Vector<T> to;
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                to.v[i] = rounded<T>(__fadd_rn(wide(a.v[i]), __fmul_rn(wide(c.v[i]), wide(b.v[i]))));
            }
            store<WHOLE>(out + first, to, have);
        }
    }
}

template <typename T> static __device__ __forceinline__ void gate(const Gate &p) {
    const bool whole =
        multiples(16, p.x, p.y, p.gate, p.out) &&
        multiples(Vector<T>::N, p.width, p.x_item, p.x_token, p.y_item, p.y_token, p.gate_item);
    whole ? gate<T, true>(p) : gate<T, false>(p);
}

// The LayerNorm of rows of x, times 1 + scale and plus shift, as `rows` has it; where `y` is given, of `sum = x + gate · y` as
// `gate` has it. As numbers, or as codes of a byte with a scale for each row.
struct GateNorm {
    const void *x;
    const void *y;
    const void *gate;  // [items, width]
    const void *scale; // [items, width]
    const void *shift; // [items, width]
    void *sum;         // contiguous, where y is given
    void *out;         // contiguous
    float *row_scales; // [rows], where codes are written
    u64 rows;          // items · tokens
    u64 tokens;        // of an item
    u64 width;
    u64 x_item; // strides, in elements
    u64 x_token;
    u64 y_item;
    u64 y_token;
    u64 gate_item;
    u64 scale_item;
    u64 shift_item;
    double eps;
};

// The largest of the threads' `v`, as `over_row` has their sum.
static __device__ __forceinline__ float largest_of_row(float v, float *shared) {
    const u32 lanes = blockDim.x;
    for (u32 step = (lanes < 32 ? lanes : 32) / 2; step > 0; step /= 2) {
        v = larger(v, __shfl_xor_sync(0xffffffffu, v, step));
    }
    if (lanes > 32) {
        __syncthreads();
        if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
        __syncthreads();
        for (u32 warp = 0; warp < lanes / 32; warp++) v = larger(v, shared[warp]);
    }
    return v;
}

// What rows are written as: numbers of their own dtype, or codes as `quantize` of w8a8.cu makes them, from two numbers that are at
// most MOST, the first in the lower byte.
struct Numbers {};
struct Int8 {
    static constexpr float MOST = 127.f;
    static __device__ __forceinline__ u32 codes(float low, float high) {
        return (__float2int_rn(low) & 255) | (__float2int_rn(high) & 255) << 8;
    }
};
struct RotatedInt8 : Int8 {}; // of rows of whole groups
struct Fp8 {
    static constexpr float MOST = 448.f;
    static __device__ __forceinline__ u32 codes(float low, float high) {
        return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
    }
};

// A vector as codes are made of it: in f32, and its group rotated, of which a warp then has all vectors.
template <typename To, typename T>
static __device__ __forceinline__ void widened(const Vector<T> &from, float (&to)[Vector<T>::N]) {
#pragma unroll
    for (u32 i = 0; i < Vector<T>::N; i++) to[i] = wide(from.v[i]);
    if constexpr (std::is_same<To, RotatedInt8>::value) rotate(to);
}

// Writes rows that `made(vector, values)` gives vector by vector, each time the same.
template <typename To, typename T, bool WHOLE> struct Sink {
    template <typename Made>
    static __device__ __forceinline__ void
    put(const GateNorm &p, u32 at, bool live, const Row<T, WHOLE> &row, float *shared, Made made) {
        constexpr u32 N = Vector<T>::N;
        // Rows whose largest magnitude is below this count as zeros: its inverse must be finite.
        constexpr float LEAST = 1e-30f;
        float magnitude = 0.f;
        row.each([&](u32 vector, const Vector<T> &of) {
            float y[N];
            widened<To>(made(vector, of), y);
#pragma unroll
            for (u32 i = 0; i < N; i++) magnitude = larger(magnitude, fabsf(y[i]));
        });
        magnitude = largest_of_row(magnitude, shared);
        const bool finite = magnitude < INFINITY; // no NaN either
        const bool some = finite && magnitude >= LEAST;
        const float inverse = __fdiv_rn(To::MOST, magnitude);
        if (live && threadIdx.x == 0) {
            p.row_scales[at] = some ? __fdiv_rn(magnitude, To::MOST) : finite ? 0.f : NAN;
        }
        // The host promises whole vectors, and codes that begin where eight of them may.
        u32 *to = reinterpret_cast<u32 *>(static_cast<uint8_t *>(p.out) + (u64)at * (u32)p.width);
        row.each([&](u32 vector, const Vector<T> &of) {
            float y[N];
            widened<To>(made(vector, of), y);
            u32 words[N / 4] = {};
#pragma unroll
            for (u32 i = 0; i < N / 2; i++) {
                const float low = __fmul_rn(y[2 * i], inverse);
                const float high = __fmul_rn(y[2 * i + 1], inverse);
                if (some) words[i / 2] |= To::codes(low, high) << (i % 2 * 16);
            }
#pragma unroll
            for (u32 i = 0; i < N / 4; i++) to[vector * (N / 4) + i] = words[i];
        });
    }
};

template <typename T, bool WHOLE> struct Sink<Numbers, T, WHOLE> {
    template <typename Made>
    static __device__ __forceinline__ void
    put(const GateNorm &p, u32 at, bool, const Row<T, WHOLE> &row, float *, Made made) {
        T *out = static_cast<T *>(p.out) + (u64)at * (u32)p.width;
        row.each([&](u32 vector, const Vector<T> &of) {
            store<WHOLE>(out + vector * Vector<T>::N, made(vector, of), row.have(vector));
        });
    }
};

template <typename T, typename To, bool WHOLE>
static __device__ __forceinline__ void norm_into(
    const GateNorm &p, u32 at, bool live, const Row<T, WHOLE> &row, float *shared
) {
    constexpr u32 N = Vector<T>::N;
    const u32 width = (u32)p.width, item = at / (u32)p.tokens;
    const T *scale = static_cast<const T *>(p.scale) + item * p.scale_item;
    const T *shift = static_cast<const T *>(p.shift) + item * p.shift_item;
    const float mean = row.sum(shared) / (float)width;
    const float variance = row.squares(mean, shared) / (float)width;
    const float inverse = 1.f / sqrtf(__fadd_rn(variance, (float)p.eps));
    Sink<To, T, WHOLE>::put(p, at, live, row, shared, [&](u32 vector, const Vector<T> &of) {
        const u32 first = vector * N, have = row.have(vector);
        const Vector<T> s = load<WHOLE>(scale + first, have);
        const Vector<T> t = load<WHOLE>(shift + first, have);
        Vector<T> to;
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            const float v = __fmul_rn(__fsub_rn(wide(of.v[i]), mean), inverse);
            to.v[i] = rounded<T>(fmaf(v, __fadd_rn(1.f, wide(s.v[i])), wide(t.v[i])));
        }
        return to;
    });
}

template <typename T, typename To, bool GATED, bool WHOLE>
static __device__ __forceinline__ void gate_norm(const GateNorm &p, float *shared) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width, tokens = (u32)p.tokens;
    const u64 step = (u64)gridDim.x * blockDim.y;
    for (u64 base = (u64)blockIdx.x * blockDim.y; base < count; base += step) {
        const bool live = base + threadIdx.y < count;
        const u32 at = live ? (u32)base + threadIdx.y : 0;
        const u32 item = at / tokens, token = at % tokens;
        const T *x = static_cast<const T *>(p.x) + item * p.x_item + token * p.x_token;
        if (!GATED) {
            norm_into<T, To>(p, at, live, Row<T, WHOLE>(x, width, live), shared);
            continue;
        }
        const T *y = static_cast<const T *>(p.y) + item * p.y_item + token * p.y_token;
        const T *g = static_cast<const T *>(p.gate) + item * p.gate_item;
        const Row<T, WHOLE> row(
            static_cast<T *>(p.sum) + (u64)at * width, width, live,
            [&](u32 vector, u32 have) {
                const u32 first = vector * N;
                const Vector<T> a = load<WHOLE>(x + first, have);
                const Vector<T> b = load<WHOLE>(y + first, have);
                const Vector<T> c = load<WHOLE>(g + first, have);
                Vector<T> to;
#pragma unroll
                for (u32 i = 0; i < N; i++) {
                    to.v[i] =
                        rounded<T>(__fadd_rn(wide(a.v[i]), __fmul_rn(wide(c.v[i]), wide(b.v[i]))));
                }
                return to;
            }
        );
        norm_into<T, To>(p, at, live, row, shared);
    }
}

template <typename T, typename To, bool GATED>
static __device__ __forceinline__ void gate_norm(const GateNorm &p) {
    __shared__ float shared[32];
    const bool whole =
        multiples(16, p.x, p.y, p.gate, p.scale, p.shift, p.sum, p.out) &&
        multiples(Vector<T>::N, p.width, p.x_item, p.x_token, p.y_item, p.y_token, p.gate_item) &&
        multiples(Vector<T>::N, p.scale_item, p.shift_item);
    whole ? gate_norm<T, To, GATED, true>(p, shared) : gate_norm<T, To, GATED, false>(p, shared);
}

// A number for each axis of a tensor, behind ones for those that it does not have.
constexpr u32 AXES = 6;
typedef u64 Axes[AXES];

// Where the value lies that is the `at`th of `dims`.
static __device__ __forceinline__ u64 placed(u64 at, const Axes &dims, const Axes &strides) {
    u64 to = 0;
    for (int axis = AXES - 1; axis >= 0; axis--) {
        to += at % dims[axis] * strides[axis];
        at /= dims[axis];
    }
    return to;
}

// `out = x + factor · y`, both operations rounded in f32; `x` and `out` are contiguous.
struct Add {
    const void *x;
    const void *y;
    void *out;
    u64 len;
    u64 alike;    // whether y is contiguous too; else
    Axes dims;    // of x
    Axes strides; // of y, in elements
    double factor;
};

template <typename T, bool WHOLE> static __device__ __forceinline__ void add(const Add &p) {
    constexpr u32 N = Vector<T>::N;
    const T *x = static_cast<const T *>(p.x), *y = static_cast<const T *>(p.y);
    T *out = static_cast<T *>(p.out);
    const float factor = (float)p.factor;
    const u64 vectors = p.len / N + (p.len % N != 0), step = (u64)gridDim.x * blockDim.x;
    for (u64 vector = (u64)blockIdx.x * blockDim.x + threadIdx.x; vector < vectors; vector += step) {
        const u64 first = vector * N;
        // The last vector of an aligned tensor may be cut.
        const u32 have = held_by<T>(vector, p.len);
        const bool whole = WHOLE && have == N;
        const Vector<T> a = whole ? load<true>(x + first, N) : load<false>(x + first, have);
        Vector<T> b;
        if (p.alike) {
            b = whole ? load<true>(y + first, N) : load<false>(y + first, have);
        } else {
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                b.v[i] = i < have ? y[placed(first + i, p.dims, p.strides)] : rounded<T>(0.f);
            }
        }
        Vector<T> to;
#pragma unroll
        for (u32 i = 0; i < N; i++) {
            to.v[i] = rounded<T>(__fadd_rn(wide(a.v[i]), __fmul_rn(factor, wide(b.v[i]))));
        }
        if (whole) {
            store<true>(out + first, to, N);
        } else {
            store<false>(out + first, to, have);
        }
    }
}

template <typename T> static __device__ __forceinline__ void add(const Add &p) {
    const bool whole = multiples(16, p.x, p.out) && (!p.alike || multiples(16, p.y));
    whole ? add<T, true>(p) : add<T, false>(p);
}

enum Function { COPY, RELU, GELU, GELU_TANH, QUICK_GELU, SILU };

// v · σ(u): a quotient within two units of the last place, and 0 where e^−u is past 2^126.
static __device__ __forceinline__ float gated_by(float v, float u) {
    return __fdividef(v, __fadd_rn(1.f, expf(-u)));
}

template <Function F> static __device__ __forceinline__ float activated(float v) {
    switch (F) {
        case RELU: return fmaxf(v, 0.f);
        // ½ v (1 + erf(v / √2))
        case GELU: return __fmul_rn(__fmul_rn(0.5f, v), __fadd_rn(1.f, erff(__fmul_rn(v, 0.70710678f))));
        // ½ v (1 + tanh u) = v · σ(2u), u = √(2/π) v (1 + 0.044715 v²)
        case GELU_TANH:
            return gated_by(v, __fmul_rn(__fmul_rn(1.5957691f, v), fmaf(__fmul_rn(0.044715f, v), v, 1.f)));
        case QUICK_GELU: return gated_by(v, __fmul_rn(1.702f, v));
        case SILU: return gated_by(v, v);
        default: return v;
    }
}

// Vectors whose loads a thread has under way at a time, where it has one input that lies aligned.
template <bool WHOLE> constexpr u32 AHEAD = WHOLE ? 2 : 1;

// An activation function of each value, times another value where `times` is given.
struct Activate {
    const void *x;
    const void *times;
    void *out;
    u64 rows;
    u64 width;
    u64 x_row; // strides, in elements
    u64 times_row;
    u64 out_row;
};

// x runs over the vectors of a row, y over rows. A contiguous tensor is one row, which may be very long.
template <typename T, Function F, bool WHOLE>
static __device__ __forceinline__ void activate(const Activate &p) {
    constexpr u32 N = Vector<T>::N;
    const u64 vectors = p.width / N + (p.width % N != 0), step = (u64)gridDim.x * blockDim.x;
    for (u64 row = (u64)blockIdx.y * blockDim.y + threadIdx.y; row < p.rows;
         row += (u64)gridDim.y * blockDim.y) {
        const T *x = static_cast<const T *>(p.x) + row * p.x_row;
        const T *times = static_cast<const T *>(p.times) + row * p.times_row;
        T *out = static_cast<T *>(p.out) + row * p.out_row;
        for (u64 base = (u64)blockIdx.x * blockDim.x + threadIdx.x; base < vectors;
             base += AHEAD<WHOLE> * step) {
            Vector<T> a[AHEAD<WHOLE>], b[AHEAD<WHOLE>];
#pragma unroll
            for (u32 j = 0; j < AHEAD<WHOLE>; j++) {
                const u64 vector = base + j * step;
                if (vector < vectors) {
                    const u32 have = WHOLE ? N : held_by<T>(vector, p.width);
                    a[j] = load<WHOLE>(x + vector * N, have);
                    if (p.times) b[j] = load<WHOLE>(times + vector * N, have);
                }
            }
#pragma unroll
            for (u32 j = 0; j < AHEAD<WHOLE>; j++) {
                const u64 vector = base + j * step;
                if (vector < vectors) {
                    Vector<T> to;
#pragma unroll
                    for (u32 i = 0; i < N; i++) {
                        float y = activated<F>(wide(a[j].v[i]));
                        if (p.times) y = __fmul_rn(y, wide(b[j].v[i]));
                        to.v[i] = rounded<T>(y);
                    }
                    store<WHOLE>(out + vector * N, to, WHOLE ? N : held_by<T>(vector, p.width));
                }
            }
        }
    }
}

template <typename T, Function F> static __device__ __forceinline__ void activate(const Activate &p) {
    const bool whole =
        multiples(16, p.x, p.times, p.out) &&
        multiples(Vector<T>::N, p.width, p.x_row, p.times_row, p.out_row);
    whole ? activate<T, F, true>(p) : activate<T, F, false>(p);
}

// GroupNorm in three kernels: mean and squares of each piece of a group, of each group, and what follows from
// them. A piece is what a block of `PIECE` threads holds.
struct Group {
    const void *x;
    const void *weight; // [channels]
    const void *bias;   // [channels]
    void *out;          // may be x
    float *pieces;      // [groups, pieces of a group, 2]: mean, squared distances from it
    float *moments;     // [groups, 2]: mean, 1 / √(variance + ε)
    u64 groups;         // of all items
    u64 pieces_of_group;
    u64 channels; // of an item
    u64 of_group; // channels of a group
    u64 plane;    // values of a channel
    double eps;
};

// Threads of a block of the first two kernels, in one row.
constexpr u32 PIECE = 256;

template <typename T> static __device__ __forceinline__ u64 piece_values() {
    return (u64)HELD * Vector<T>::N * PIECE;
}

// One piece a block.
template <typename T, bool WHOLE>
static __device__ __forceinline__ void group_pieces(const Group &p, float *shared) {
    const u64 span = p.of_group * p.plane, total = p.groups * p.pieces_of_group;
    for (u64 at = blockIdx.x; at < total; at += gridDim.x) {
        const u64 group = at / p.pieces_of_group;
        const u64 first = at % p.pieces_of_group * piece_values<T>(), left = span - first;
        const u32 count = (u32)(left < piece_values<T>() ? left : piece_values<T>());
        const Row<T, WHOLE> row(static_cast<const T *>(p.x) + group * span + first, count, true);
        const float mean = row.sum(shared) / (float)count;
        const float squares = row.squares(mean, shared);
        if (threadIdx.x == 0) {
            p.pieces[2 * at] = mean;
            p.pieces[2 * at + 1] = squares;
        }
    }
}

template <typename T> static __device__ __forceinline__ void group_pieces(const Group &p) {
    __shared__ float shared[32];
    const bool whole = multiples(16, p.x) && multiples(Vector<T>::N, p.of_group * p.plane);
    whole ? group_pieces<T, true>(p, shared) : group_pieces<T, false>(p, shared);
}

// The sum of `v` over a block of `PIECE` threads.
static __device__ __forceinline__ double over_block(double v, double *shared) {
    __syncthreads(); // what was there before is read
    shared[threadIdx.x] = v;
    for (u32 half = PIECE / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            shared[threadIdx.x] = __dadd_rn(shared[threadIdx.x], shared[threadIdx.x + half]);
        }
    }
    __syncthreads();
    return shared[0];
}

// One group a block.
template <typename T> static __device__ __forceinline__ void group_moments(const Group &p) {
    __shared__ double shared[PIECE];
    const u64 span = p.of_group * p.plane, piece = piece_values<T>();
    for (u64 group = blockIdx.x; group < p.groups; group += gridDim.x) {
        const float *pieces = p.pieces + 2 * group * p.pieces_of_group;
        double sum = 0., squares = 0.;
        for (u64 i = threadIdx.x; i < p.pieces_of_group; i += PIECE) {
            const u64 left = span - i * piece;
            sum = fma((double)(left < piece ? left : piece), (double)pieces[2 * i], sum);
        }
        const double mean = over_block(sum, shared) / (double)span;
        for (u64 i = threadIdx.x; i < p.pieces_of_group; i += PIECE) {
            const u64 left = span - i * piece;
            const double distance = __dsub_rn((double)pieces[2 * i], mean);
            const double weighed = __dmul_rn((double)(left < piece ? left : piece), distance);
            squares = __dadd_rn(squares, fma(weighed, distance, (double)pieces[2 * i + 1]));
        }
        const double variance = over_block(squares, shared) / (double)span;
        if (threadIdx.x == 0) {
            p.moments[2 * group] = (float)mean;
            p.moments[2 * group + 1] = (float)(1. / sqrt(__dadd_rn(variance, p.eps)));
        }
    }
}

// softmax(x · scale + biases) along rows, in their place.
struct Softmax {
    void *x;         // [items, heads, queries, width], contiguous
    const void *a;   // biases, of which rows have their values side by side; the second where the first is
    const void *b;
    u64 rows;        // items · heads · queries
    u64 heads;       // of an item
    u64 queries;     // of a head
    u64 width;
    u64 a_item; // strides, in elements: 0 along what a bias does not have
    u64 a_head;
    u64 a_query;
    u64 b_item;
    u64 b_head;
    u64 b_query;
    double scale;
};

// A row is a y row of a block. WHOLE: rows and biases are whole vectors.
template <typename T, bool WHOLE>
static __device__ __forceinline__ void softmax(const Softmax &p, float *shared) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width;
    const u32 heads = (u32)p.heads, queries = (u32)p.queries;
    const float scale = (float)p.scale;
    const u64 step = (u64)gridDim.x * blockDim.y;
    for (u64 base = (u64)blockIdx.x * blockDim.y; base < count; base += step) {
        const bool live = base + threadIdx.y < count;
        const u32 at = live ? (u32)base + threadIdx.y : 0;
        const u32 query = at % queries, head = at / queries % heads, item = at / queries / heads;
        T *x = static_cast<T *>(p.x) + (u64)at * width;
        const T *a = static_cast<const T *>(p.a), *b = static_cast<const T *>(p.b);
        if (a) a += item * p.a_item + head * p.a_head + query * p.a_query;
        if (b) b += item * p.b_item + head * p.b_head + query * p.b_query;
        const Row<T, WHOLE> row(x, width, live);
        // What is exponentiated, each time the same.
        auto score = [&](u32 vector, const Vector<T> &of, float (&y)[N]) {
            const u32 first = vector * N, have = row.have(vector);
#pragma unroll
            for (u32 i = 0; i < N; i++) y[i] = __fmul_rn(wide(of.v[i]), scale);
            if (a) {
                const Vector<T> bias = load<WHOLE>(a + first, have);
#pragma unroll
                for (u32 i = 0; i < N; i++) y[i] = __fadd_rn(y[i], wide(bias.v[i]));
            }
            if (b) {
                const Vector<T> bias = load<WHOLE>(b + first, have);
#pragma unroll
                for (u32 i = 0; i < N; i++) y[i] = __fadd_rn(y[i], wide(bias.v[i]));
            }
        };
        float most = -INFINITY;
        row.each([&](u32 vector, const Vector<T> &of) {
            float y[N];
            score(vector, of, y);
            const u32 have = row.have(vector);
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                if (i < have) most = larger(most, y[i]);
            }
        });
        most = largest_of_row(most, shared);
        float sum = 0.f;
        row.each([&](u32 vector, const Vector<T> &of) {
            float y[N];
            score(vector, of, y);
            const u32 have = row.have(vector);
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                if (i < have) sum = __fadd_rn(sum, expf(__fsub_rn(y[i], most)));
            }
        });
        const float inverse = 1.f / over_row(sum, shared);
        // A row that does not lie aligned is read again, by the thread that writes it.
        row.each([&](u32 vector, const Vector<T> &of) {
            float y[N];
            score(vector, of, y);
            Vector<T> to;
#pragma unroll
            for (u32 i = 0; i < N; i++) {
                to.v[i] = rounded<T>(__fmul_rn(expf(__fsub_rn(y[i], most)), inverse));
            }
            store<WHOLE>(x + vector * N, to, row.have(vector));
        });
    }
}

template <typename T> static __device__ __forceinline__ void softmax(const Softmax &p) {
    __shared__ float shared[32];
    const bool whole = multiples(16, p.x, p.a, p.b) &&
        multiples(Vector<T>::N, p.width, p.a_item, p.a_head, p.a_query, p.b_item, p.b_head, p.b_query);
    whole ? softmax<T, true>(p, shared) : softmax<T, false>(p, shared);
}

// `out[row] = table[ids[row]]`; NaN for an id that the table does not have.
struct Look {
    const void *table; // [lines, width], contiguous
    const u32 *ids;    // [rows], contiguous
    void *out;         // [rows, width], contiguous
    u64 lines;
    u64 rows;
    u64 width;
};

// x runs over the vectors of a row, y over rows.
template <typename T, bool WHOLE> static __device__ __forceinline__ void look(const Look &p) {
    constexpr u32 N = Vector<T>::N;
    const u32 count = (u32)p.rows, width = (u32)p.width, vectors = (width + N - 1) / N;
    for (u64 at = (u64)blockIdx.y * blockDim.y + threadIdx.y; at < count;
         at += (u64)gridDim.y * blockDim.y) {
        const u32 id = p.ids[at];
        const T *from = static_cast<const T *>(p.table) + (u64)id * width;
        T *to = static_cast<T *>(p.out) + at * width;
        for (u32 vector = blockIdx.x * blockDim.x + threadIdx.x; vector < vectors;
             vector += gridDim.x * blockDim.x) {
            const u32 have = WHOLE ? N : held_by<T>(vector, width);
            Vector<T> line;
#pragma unroll
            for (u32 i = 0; i < N; i++) line.v[i] = rounded<T>(NAN);
            if (id < p.lines) line = load<WHOLE>(from + vector * N, have);
            store<WHOLE>(to + vector * N, line, have);
        }
    }
}

template <typename T> static __device__ __forceinline__ void look(const Look &p) {
    const bool whole = multiples(16, p.table, p.out) && multiples(Vector<T>::N, p.width);
    whole ? look<T, true>(p) : look<T, false>(p);
}

// Values that lie apart, side by side.
struct Gather {
    const void *x;
    void *out; // contiguous
    u64 len;
    Axes dims;
    Axes strides; // of x, in elements
};

template <typename T> static __device__ __forceinline__ void gather(const Gather &p) {
    const T *x = static_cast<const T *>(p.x);
    T *out = static_cast<T *>(p.out);
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x; at < p.len; at += step) {
        out[at] = x[placed(at, p.dims, p.strides)];
    }
}

// x runs over the vectors of a channel, y over channels.
template <typename T, Function F, bool WHOLE>
static __device__ __forceinline__ void group_apply(const Group &p) {
    constexpr u32 N = Vector<T>::N;
    const u64 vectors = p.plane / N + (p.plane % N != 0), step = (u64)gridDim.x * blockDim.x;
    const u64 planes = p.groups * p.of_group;
    for (u64 plane = (u64)blockIdx.y * blockDim.y + threadIdx.y; plane < planes;
         plane += (u64)gridDim.y * blockDim.y) {
        const u64 group = plane / p.of_group, channel = plane % p.channels;
        const float mean = p.moments[2 * group], inverse = p.moments[2 * group + 1];
        const float scale = __fmul_rn(inverse, wide(static_cast<const T *>(p.weight)[channel]));
        const float shift = wide(static_cast<const T *>(p.bias)[channel]);
        const T *x = static_cast<const T *>(p.x) + plane * p.plane;
        T *out = static_cast<T *>(p.out) + plane * p.plane;
        for (u64 base = (u64)blockIdx.x * blockDim.x + threadIdx.x; base < vectors;
             base += AHEAD<WHOLE> * step) {
            Vector<T> a[AHEAD<WHOLE>];
#pragma unroll
            for (u32 j = 0; j < AHEAD<WHOLE>; j++) {
                const u64 vector = base + j * step;
                const u32 have = WHOLE ? N : held_by<T>(vector, p.plane);
                if (vector < vectors) a[j] = load<WHOLE>(x + vector * N, have);
            }
#pragma unroll
            for (u32 j = 0; j < AHEAD<WHOLE>; j++) {
                const u64 vector = base + j * step;
                if (vector < vectors) {
                    Vector<T> to;
#pragma unroll
                    for (u32 i = 0; i < N; i++) {
                        const float y = __fsub_rn(wide(a[j].v[i]), mean);
                        to.v[i] = rounded<T>(activated<F>(fmaf(y, scale, shift)));
                    }
                    store<WHOLE>(out + vector * N, to, WHOLE ? N : held_by<T>(vector, p.plane));
                }
            }
        }
    }
}

template <typename T, Function F> static __device__ __forceinline__ void group_apply(const Group &p) {
    const bool whole = multiples(16, p.x, p.out) && multiples(Vector<T>::N, p.plane);
    whole ? group_apply<T, F, true>(p) : group_apply<T, F, false>(p);
}

// Pixels of pictures, whose channels are planes, as rows of channels, and back.
struct Pixels {
    const void *x;
    const void *bias; // [channels]
    void *out;
    u64 items;    // that `out` has, as rows of channels
    u64 given;    // of them, those that `x` has; the others are zeros
    u64 channels; // of a picture
    u64 padded;   // of a row of channels; what is more than `channels` is zeros, or left out
    u64 height;   // of a picture's plane
    u64 width;
    u64 rows;     // as rows of channels
    u64 columns;
    u64 row;      // the first of `rows` in the padded or in the written picture
    u64 before;   // padding above and left of the picture
    u64 repeat;   // how often each pixel comes in both directions
    u64 nearest;  // whether what lies around the picture is its nearest pixel, or else zero
};

constexpr u32 TILE = 32;

// Calls `f` for each tile of 32 columns by 32 channels of each row, with its first ones. A block has 32 by 8 threads.
template <typename F>
static __device__ __forceinline__ void tiles(u64 columns, u64 channels, u64 rows, const F &f) {
    const u64 across = (columns + TILE - 1) / TILE, all = across * ((channels + TILE - 1) / TILE);
    for (u64 tile = blockIdx.x; tile < all; tile += gridDim.x) {
        for (u64 row = blockIdx.y; row < rows; row += gridDim.y) {
            f(row, tile % across * TILE, tile / across * TILE);
        }
    }
}

// `[given, channels, height, width]` to `[items, rows, columns, padded]`.
template <typename T> static __device__ __forceinline__ void channels_last(const Pixels &p) {
    __shared__ T held[TILE][TILE + 4 / sizeof(T)];
    const T *from = static_cast<const T *>(p.x);
    T *to = static_cast<T *>(p.out);
    const long long tall = (long long)(p.height * p.repeat), broad = (long long)(p.width * p.repeat);
    tiles(p.columns, p.padded, p.items * p.rows, [&](u64 at, u64 column, u64 channel) {
        const u64 item = at / p.rows;
        long long y = (long long)(p.row + at % p.rows) - (long long)p.before;
        long long x = (long long)(column + threadIdx.x) - (long long)p.before;
        if (p.nearest) {
            y = min(max(y, 0ll), tall - 1);
            x = min(max(x, 0ll), broad - 1);
        }
        const bool there = item < p.given && y >= 0 && y < tall && x >= 0 && x < broad;
        for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
            T value = rounded<T>(0.f);
            if (there && channel + i < p.channels) {
                const u64 plane = item * p.channels + channel + i;
                value = from[(plane * p.height + (u64)y / p.repeat) * p.width + (u64)x / p.repeat];
            }
            held[i][threadIdx.x] = value;
        }
        __syncthreads();
        for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
            if (column + i < p.columns && channel + threadIdx.x < p.padded) {
                to[(at * p.columns + column + i) * p.padded + channel + threadIdx.x] = held[threadIdx.x][i];
            }
        }
        __syncthreads();
    });
}

// `[rows, columns, padded]` to the rows from `row` on of `[channels, height, width]`, whose width is `columns`, with the
// bias added.
template <typename T> static __device__ __forceinline__ void channels_first(const Pixels &p) {
    __shared__ T held[TILE][TILE + 4 / sizeof(T)];
    const T *from = static_cast<const T *>(p.x), *bias = static_cast<const T *>(p.bias);
    T *to = static_cast<T *>(p.out);
    tiles(p.columns, p.channels, p.rows, [&](u64 row, u64 column, u64 channel) {
        for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
            if (column + i < p.columns && channel + threadIdx.x < p.channels) {
                held[i][threadIdx.x] = from[(row * p.columns + column + i) * p.padded + channel + threadIdx.x];
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.y; i < TILE; i += blockDim.y) {
            if (column + threadIdx.x < p.columns && channel + i < p.channels) {
                const float value = __fadd_rn(wide(held[threadIdx.x][i]), wide(bias[channel + i]));
                to[((channel + i) * p.height + p.row + row) * p.width + column + threadIdx.x] = rounded<T>(value);
            }
        }
        __syncthreads();
    });
}

// A kernel may be brought up before the one before it ends (`Kernel::launch`): waits for that, then lets the next one come up.
static __device__ __forceinline__ void in_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;\n");
#endif
}

// Blocks have 256 threads at most, and at least so many of that size share a multiprocessor.
#define KERNEL(NAME, BLOCKS, P, ...)                                                               \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME(const P p) {          \
        in_turn();                                                                                 \
        __VA_ARGS__(p);                                                                            \
    }
#define KERNELS(T, SUFFIX)                                                                         \
    KERNEL(rows_none_##SUFFIX, 3, Rows, rows<T, NONE>)                                             \
    KERNEL(rows_rms_##SUFFIX, 3, Rows, rows<T, RMS>)                                               \
    KERNEL(rows_layer_##SUFFIX, 3, Rows, rows<T, LAYER>)                                           \
    KERNEL(turn_##SUFFIX, 4, Turn, turn<T>)                                                        \
    KERNEL(gate_##SUFFIX, 4, Gate, gate<T>)                                                        \
    KERNEL(gate_norm_##SUFFIX, 3, GateNorm, gate_norm<T, Numbers, true>)                           \
    KERNEL(add_##SUFFIX, 4, Add, add<T>)                                                           \
    KERNEL(copy_##SUFFIX, 4, Activate, activate<T, COPY>)                                          \
    KERNEL(relu_##SUFFIX, 4, Activate, activate<T, RELU>)                                          \
    KERNEL(gelu_##SUFFIX, 3, Activate, activate<T, GELU>)                                          \
    KERNEL(gelu_tanh_##SUFFIX, 4, Activate, activate<T, GELU_TANH>)                                \
    KERNEL(quick_gelu_##SUFFIX, 4, Activate, activate<T, QUICK_GELU>)                              \
    KERNEL(silu_##SUFFIX, 4, Activate, activate<T, SILU>)                                          \
    KERNEL(group_pieces_##SUFFIX, 4, Group, group_pieces<T>)                                       \
    KERNEL(group_moments_##SUFFIX, 4, Group, group_moments<T>)                                     \
    KERNEL(group_copy_##SUFFIX, 4, Group, group_apply<T, COPY>)                                    \
    KERNEL(group_silu_##SUFFIX, 4, Group, group_apply<T, SILU>)                                    \
    KERNEL(channels_last_##SUFFIX, 4, Pixels, channels_last<T>)                                    \
    KERNEL(channels_first_##SUFFIX, 4, Pixels, channels_first<T>)                                  \
    KERNEL(softmax_##SUFFIX, 3, Softmax, softmax<T>)                                               \
    KERNEL(look_##SUFFIX, 4, Look, look<T>)                                                        \
    KERNEL(gather_##SUFFIX, 4, Gather, gather<T>)

// What quantized products read is of 16 bits.
#define CODED(T, SUFFIX)                                                                           \
    KERNEL(norm_int8_##SUFFIX, 3, GateNorm, gate_norm<T, Int8, false>)                             \
    KERNEL(norm_fp8_##SUFFIX, 3, GateNorm, gate_norm<T, Fp8, false>)                               \
    KERNEL(norm_rotated_int8_##SUFFIX, 3, GateNorm, gate_norm<T, RotatedInt8, false>)              \
    KERNEL(gate_norm_int8_##SUFFIX, 3, GateNorm, gate_norm<T, Int8, true>)                         \
    KERNEL(gate_norm_fp8_##SUFFIX, 3, GateNorm, gate_norm<T, Fp8, true>)                           \
    KERNEL(gate_norm_rotated_int8_##SUFFIX, 3, GateNorm, gate_norm<T, RotatedInt8, true>)

KERNELS(__nv_bfloat16, bf16)
KERNELS(__half, f16)
KERNELS(float, f32)
CODED(__nv_bfloat16, bf16)
CODED(__half, f16)
