// The rotation of `rotation.rs`, operation for operation, of a group of 256 f32 values that lie in a warp: lane `l` has those
// from `8 l` on. All 32 lanes must come here.

#pragma once

// Values that one lane has of a group.
constexpr int ROTATED = 8;

static __device__ __forceinline__ void rotate(float (&v)[ROTATED]) {
#pragma unroll
    for (int stride = 1; stride < ROTATED; stride *= 2) {
#pragma unroll
        for (int at = 0; at < ROTATED; at++) {
            if (at & stride) continue;
            const float a = v[at], b = v[at + stride];
            v[at] = __fadd_rn(a, b);
            v[at + stride] = __fsub_rn(a, b);
        }
    }
    // Lanes are warps' own: blocks are a whole number of warps along x.
    const unsigned lane = threadIdx.x % 32;
#pragma unroll
    for (unsigned away = 1; away < 32; away *= 2) {
        const bool upper = lane & away;
#pragma unroll
        for (int at = 0; at < ROTATED; at++) {
            const float other = __shfl_xor_sync(0xffffffffu, v[at], away);
            v[at] = __fadd_rn(other, upper ? -v[at] : v[at]);
        }
    }
#pragma unroll
    for (int at = 0; at < ROTATED; at++) v[at] = __fmul_rn(v[at], 0.0625f);
}

// The larger of two numbers; no number if either is none.
static __device__ __forceinline__ float larger(float a, float b) {
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(a), "f"(b));
    return most;
}

// The largest of `most` and the magnitudes.
static __device__ __forceinline__ float largest(float most, const float (&v)[ROTATED]) {
#pragma unroll
    for (int at = 0; at < ROTATED; at++) most = larger(most, fabsf(v[at]));
    return most;
}
