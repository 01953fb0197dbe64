// softmax(q kT scale) v of bf16 or f16 on NVIDIA GPUs, without scores in memory, by the tensor cores of all cards from
// compute capability 8.0 on.
//
// A block has 128 queries of one head, and steps over the keys a tile at a time (https://arxiv.org/abs/2307.08691): a
// warp has 32 of the queries to itself, the f32 scores of a tile in registers, and the f32 result so far. Keys and
// values of a tile have one place each in shared memory: the next keys are copied while weights are made and multiply
// the values, these while the scores are made. Heads that are narrower than D are filled up with zeros there.
//
// A row's result follows from its query, keys and values alone: not from other rows, nor from where operands lie,
// nor from the grid. It may differ between cards, which have tiles of different sizes.
//
// The argument is a struct of 64-bit fields, whose twin is in `shape.rs`. What the host promises: operands begin at
// multiples of 16 bytes, and strides and heads are multiples of 8 values; queries, keys and strides between tokens are
// below 2^31, a head is at most D values, every item has a key, and the scale is above 0.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

typedef uint32_t u32;
typedef unsigned long long u64;

// Items of a batch that one launch computes at most.
constexpr u32 ITEMS = 16;

struct Lengths {
    u64 of[ITEMS];
};

struct Attention {
    const void *q; // [items, heads, queries, dim]
    const void *k; // [items, groups, keys, dim]
    const void *v; // as k
    void *out;     // [items, queries, heads, dim], side by side
    u64 heads;
    u64 sharing; // heads that share keys and values
    u64 queries;
    u64 dim;
    u64 q_item; // strides, in elements
    u64 q_head;
    u64 q_token;
    u64 k_item;
    u64 k_head;
    u64 k_token;
    u64 v_item;
    u64 v_head;
    u64 v_token;
    double scale; // of scores, as exponents of 2
    Lengths keys; // that each item sees
};

constexpr u32 THREADS = 128;
// Queries of a block and of a warp.
constexpr u32 QUERIES = 128, OWN = 32;
// Weights are made against the largest score that there was when a row's last rescaling took place. Scores may grow by
// so many powers of 2 before the next one: weights stay far below the largest f16.
constexpr float AHEAD = 8.f;

// Keys of a tile. Where a multiprocessor shares out 100 KB only, wide heads have smaller tiles, so that two blocks find
// room: while one makes weights, the other multiplies.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
template <u32 D> constexpr u32 KEYS = D > 64 ? 32 : 64;
#else
template <u32 D> constexpr u32 KEYS = 64;
#endif

static __device__ __forceinline__ u32 packed(__nv_bfloat162 pair) { return *reinterpret_cast<u32 *>(&pair); }
static __device__ __forceinline__ u32 packed(__half2 pair) { return *reinterpret_cast<u32 *>(&pair); }

// Two numbers in a word, the first in its low half.
template <typename T> static __device__ __forceinline__ u32 rounded(float low, float high);
template <> __device__ __forceinline__ u32 rounded<__nv_bfloat16>(float low, float high) {
    return packed(__floats2bfloat162_rn(low, high));
}
template <> __device__ __forceinline__ u32 rounded<__half>(float low, float high) {
    return packed(__floats2half2_rn(low, high));
}

// 2^v to 2 units of the last place.
static __device__ __forceinline__ float power(float v) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(v));
    return y;
}

// Starts copying 16 bytes into shared memory, of which nothing is read and all become zeros unless `there`.
static __device__ __forceinline__ void copy_async(u32 to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}

// Waits for all that threads of this block copy, and for all threads.
static __device__ __forceinline__ void arrived() {
    asm volatile("cp.async.wait_all;\n" ::: "memory");
    __syncthreads();
}

// Four matrices of 8 rows of 16 bytes, `from` being the address of row `lane % 8` of matrix `lane / 8`. A lane gets
// values `lane % 4 * 2` and the next of row `lane / 4` of each.
static __device__ __forceinline__ void load_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// The same of the transposed matrices.
static __device__ __forceinline__ void load_transposed(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from)
                 : "memory");
}

// `sum += a b`: 16 rows of 16 by 16 rows of 8.
template <typename T>
static __device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1);
#define MULTIPLY(T, NAME)                                                                          \
    template <>                                                                                    \
    __device__ __forceinline__ void multiply<T>(float (&sum)[4], const u32 (&a)[4], u32 b0, u32 b1) { \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0, %1, %2, %3}, "       \
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"                                      \
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                               \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                       \
    }
MULTIPLY(__nv_bfloat16, "bf16")
MULTIPLY(__half, "f16")

// Words and vectors of shared memory.
static __device__ __forceinline__ void put(u32 to, u32 word) {
    asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(word) : "memory");
}

static __device__ __forceinline__ uint4 taken(u32 from) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(from)
                 : "memory");
    return v;
}

static __device__ __forceinline__ u32 address_of(void *shared) {
    return (u32)__cvta_generic_to_shared(shared);
}

// Where 16 bytes of a tile with rows of D values lie: permuted within each row, so that eight rows below one another lie
// in different banks. Where bits of `vector` are 0, other vectors of the row are at the exclusive or of its place and
// theirs times 16.
template <u32 D> static __device__ __forceinline__ u32 place(u32 row, u32 vector) {
    return row * (D * 2) + ((vector ^ (row & 7)) << 4);
}

// Starts copying a tile of `ROWS` rows, `step` bytes apart, from row `first` of `rows` on.
template <u32 D, u32 ROWS>
static __device__ __forceinline__ void fetch(
    u32 to, const char *from, u32 step, u32 first, u32 rows, u32 dim
) {
    constexpr u32 VECTORS = D / 8, BESIDE = THREADS / VECTORS;
    const u32 vector = threadIdx.x % VECTORS, line = threadIdx.x / VECTORS;
    // Of vectors that there are not, no row.
    const u32 there = vector * 8 < dim ? rows : 0;
#pragma unroll
    for (u32 i = 0; i < ROWS / BESIDE; i++) {
        const u32 row = first + line + i * BESIDE;
        const char *source = from + (row < there ? (u64)row * step + vector * 16 : 0);
        copy_async(to + place<D>(line + i * BESIDE, vector), source, row < there);
    }
}

// The larger of `v` over the four lanes that have a row.
static __device__ __forceinline__ float over_row_most(float v) {
    v = fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return fmaxf(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

static __device__ __forceinline__ float over_row_sum(float v) {
    v = __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 1));
    return __fadd_rn(v, __shfl_xor_sync(0xffffffffu, v, 2));
}

template <typename T, u32 D, u32 KEYS>
static __device__ __forceinline__ void attend(const Attention &p, u32 queries_at, u32 keys_at, u32 values_at) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 queries = (u32)p.queries, dim = (u32)p.dim, heads = (u32)p.heads;
    const u32 tiles = (queries + QUERIES - 1) / QUERIES, plane = blockIdx.x / tiles;
    const u32 head = plane % heads, item = plane / heads, group = head / (u32)p.sharing;
    const u32 query0 = blockIdx.x % tiles * QUERIES, keys = (u32)p.keys.of[item];
    const char *q = static_cast<const char *>(p.q) + (item * p.q_item + head * p.q_head) * 2;
    const char *k = static_cast<const char *>(p.k) + (item * p.k_item + group * p.k_head) * 2;
    const char *v = static_cast<const char *>(p.v) + (item * p.v_item + group * p.v_head) * 2;
    const u32 k_step = (u32)p.k_token * 2, v_step = (u32)p.v_token * 2;
    const float scale = (float)p.scale;

    fetch<D, QUERIES>(queries_at, q, (u32)p.q_token * 2, query0, queries, dim);
    fetch<D, KEYS>(keys_at, k, k_step, 0, keys, dim);

    // The address that this lane gives for the first matrices of each tile. 16 rows below it is that of the next ones.
    constexpr u32 DOWN = 16 * D * 2;
    u32 own_at = queries_at + place<D>(warp * OWN + lane % 16, lane / 16);
    u32 key_at = keys_at + place<D>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    u32 value_at = values_at + place<D>(lane % 16, lane / 16);

    // Of rows `lane / 4` and `lane / 4 + 8` of both halves: what their scores are held against, the sum of the weights
    // that this lane makes, and of 8 values each the two that it has.
    float against[2][2], sums[2][2], out[2][D / 8][4];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        against[i][0] = against[i][1] = -INFINITY;
        sums[i][0] = sums[i][1] = 0.f;
#pragma unroll
        for (u32 j = 0; j < D / 8; j++) out[i][j][0] = out[i][j][1] = out[i][j][2] = out[i][j][3] = 0.f;
    }

    for (u32 first = 0; first < keys; first += KEYS) {
        // Addresses within tiles are made anew from these: registers are few.
        asm volatile("" : "+r"(own_at), "+r"(key_at), "+r"(value_at));
        arrived(); // the keys, and all threads are done with the values before
        fetch<D, KEYS>(values_at, v, v_step, first, keys, dim);

        float scores[2][KEYS / 8][4] = {};
#pragma unroll
        for (u32 c = 0; c < D / 16; c++) {
            u32 a[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++) load_matrices(a[i], (own_at ^ c << 5) + i * DOWN);
#pragma unroll
            for (u32 j = 0; j < KEYS / 16; j++) {
                u32 b[4];
                load_matrices(b, (key_at ^ c << 5) + j * DOWN);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    multiply<T>(scores[i][2 * j], a[i], b[0], b[1]);
                    multiply<T>(scores[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }

        arrived(); // the values, and all threads are done with the keys
        if (first + KEYS < keys) {
            fetch<D, KEYS>(keys_at, k, k_step, first + KEYS, keys, dim);
        } else {
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (u32 at = 0; at < 4; at++)
                    if (first + j * 8 + lane % 4 * 2 + at % 2 >= keys)
                        scores[0][j][at] = scores[1][j][at] = -INFINITY;
        }

        float factors[2][2];
        bool grown = false;
#pragma unroll
        for (u32 i = 0; i < 2; i++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                float most = -INFINITY;
#pragma unroll
                for (u32 j = 0; j < KEYS / 8; j++)
                    most = fmaxf(most, fmaxf(scores[i][j][2 * r], scores[i][j][2 * r + 1]));
                most = __fmul_rn(over_row_most(most), scale);
                const bool grows = most > against[i][r] + AHEAD;
                factors[i][r] = grows ? power(against[i][r] - most) : 1.f;
                if (grows) against[i][r] = most;
                grown |= grows;
            }
        // Rows that did not grow have a factor of 1, which changes nothing.
        if (__any_sync(0xffffffffu, grown)) {
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    sums[i][r] = __fmul_rn(sums[i][r], factors[i][r]);
#pragma unroll
                    for (u32 j = 0; j < D / 8; j++) {
                        out[i][j][2 * r] = __fmul_rn(out[i][j][2 * r], factors[i][r]);
                        out[i][j][2 * r + 1] = __fmul_rn(out[i][j][2 * r + 1], factors[i][r]);
                    }
                }
        }

#pragma unroll
        for (u32 c = 0; c < KEYS / 16; c++) {
            // The scores of 16 keys lie as their weights are wanted.
            u32 a[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++)
#pragma unroll
                for (u32 at = 0; at < 4; at++) {
                    const u32 r = at % 2;
                    const float *pair = scores[i][2 * c + at / 2] + 2 * r;
                    const float low = power(__fmaf_rn(pair[0], scale, -against[i][r]));
                    const float high = power(__fmaf_rn(pair[1], scale, -against[i][r]));
                    sums[i][r] = __fadd_rn(sums[i][r], __fadd_rn(low, high));
                    a[i][at] = rounded<T>(low, high);
                }
#pragma unroll
            for (u32 j = 0; j < D / 16; j++) {
                u32 b[4];
                load_transposed(b, (value_at ^ j << 5) + c * DOWN);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    multiply<T>(out[i][2 * j], a[i], b[0], b[1]);
                    multiply<T>(out[i][2 * j + 1], a[i], b[2], b[3]);
                }
            }
        }
    }

    // Through the place of the warp's own queries, so that whole vectors are written.
    __syncwarp();
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const float inverse = __fdiv_rn(1.f, over_row_sum(sums[i][r]));
            const u32 row = warp * OWN + i * 16 + r * 8 + lane / 4;
#pragma unroll
            for (u32 j = 0; j < D / 8; j++) {
                const u32 pair = rounded<T>(
                    __fmul_rn(out[i][j][2 * r], inverse), __fmul_rn(out[i][j][2 * r + 1], inverse)
                );
                put(queries_at + place<D>(row, j) + lane % 4 * 4, pair);
            }
        }
    __syncwarp();
    char *to = static_cast<char *>(p.out) + (u64)item * queries * heads * dim * 2;
#pragma unroll 4
    for (u32 at = lane; at < OWN * (D / 8); at += 32) {
        const u32 row = warp * OWN + at / (D / 8), vector = at % (D / 8), query = query0 + row;
        if (query < queries && vector * 8 < dim) {
            const uint4 held = taken(queries_at + place<D>(row, vector));
            *reinterpret_cast<uint4 *>(to + (((u64)query * heads + head) * dim + vector * 8) * 2) = held;
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

// What a block shares: the queries as memory that the launch gives, beside it the tile.
#define ATTENTION(NAME, T, D, BLOCKS)                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ Attention p) { \
        extern __shared__ __align__(256) unsigned char queries[];                                  \
        __shared__ __align__(256) unsigned char tile[2][KEYS<D> * D * 2];                          \
        in_turn();                                                                                 \
        attend<T, D, KEYS<D>>(p, address_of(queries), address_of(tile[0]), address_of(tile[1]));   \
    }

ATTENTION(attention_64_bf16, __nv_bfloat16, 64, 3)
ATTENTION(attention_64_f16, __half, 64, 3)
ATTENTION(attention_128_bf16, __nv_bfloat16, 128, 2)
ATTENTION(attention_128_f16, __half, 128, 2)
