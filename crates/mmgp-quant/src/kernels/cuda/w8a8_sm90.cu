// Products of int8 activations and int8 weights on Hopper, by CUTLASS: `wgmma` fed by the card's own tile
// copies, the scales and the bias in the epilogue.
//
// Unlike the other kernels this one brings host code, since the descriptors of tile copies are made on the host.
// So it is a static library with plain C entries, on the CUDA runtime, whose context is the one that candle
// has bound to the thread. Tile, schedule and raster are those that were fastest at FLUX shapes.

#include <cstdint>

#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_callbacks_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace {

using namespace cute;
namespace fusion = cutlass::epilogue::fusion;

// GELU by tanh: 1/2 v (1 + tanh u) = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3), by the f32 operations of `w8a8.cu`.
template <typename T> struct GeluTanh;
template <> struct GeluTanh<float> {
    CUTLASS_DEVICE float operator()(float v) const {
        const float u = __fmul_rn(__fmul_rn(1.5957691f, v), fmaf(__fmul_rn(0.044715f, v), v, 1.f));
        return __fdividef(v, __fadd_rn(1.f, expf(-u)));
    }
};
template <int N> struct GeluTanh<cutlass::Array<float, N>> {
    CUTLASS_DEVICE cutlass::Array<float, N> operator()(const cutlass::Array<float, N> &v) const {
        cutlass::Array<float, N> y;
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < N; i++) y[i] = GeluTanh<float>()(v[i]);
        return y;
    }
};

template <typename Out, bool GELU> struct RowsByColumns {
    using Tile = Shape<_128, _128, _128>;
    using Cluster = Shape<_1, _1, _1>;
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor; // a row-major weight, transposed
    static constexpr auto NEAREST = cutlass::FloatRoundStyle::round_to_nearest;

    // row scale * (column scale * sum) + bias, in f32, then GELU if it is wanted, rounded once
    using OfRows = fusion::Sm90ColBroadcast<0, Tile, float, float>;
    using OfColumns = fusion::Sm90RowBroadcast<0, Tile, float, float>;
    using Bias = fusion::Sm90RowBroadcast<0, Tile, Out, float>;
    using Scaled = fusion::Sm90EVT<
        fusion::Sm90Compute<cutlass::multiplies, float, float, NEAREST>,
        OfColumns, fusion::Sm90AccFetch>;
    template <typename To>
    using Biased = fusion::Sm90EVT<
        fusion::Sm90Compute<cutlass::homogeneous_multiply_add, To, float, NEAREST>,
        OfRows, Scaled, Bias>;
    using Activated = fusion::Sm90EVT<
        fusion::Sm90Compute<GeluTanh, Out, float, NEAREST>, Biased<float>>;
    using Result = std::conditional_t<GELU, Activated, Biased<Out>>;

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, int32_t, float,
        void, Row, 8, Out, Row, 8,
        cutlass::epilogue::TmaWarpSpecialized, Result>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp,
        int8_t, Row, 16, int8_t, Column, 16, int32_t, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<
            static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelTmaWarpSpecializedPingpong>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

    static int run(
        const int8_t *x, const float *x_scales, const int8_t *w, const float *w_scales,
        const Out *bias, Out *y, int y_row, int rows, int outputs, int inputs, int processors,
        cudaStream_t stream
    ) {
        typename Gemm::Arguments arguments{
            cutlass::gemm::GemmUniversalMode::kGemm,
            {rows, outputs, inputs, 1},
            {x, typename Kernel::StrideA{inputs, {}, 0}, w, typename Kernel::StrideB{inputs, {}, 0}},
            {{}, nullptr, {}, y, typename Kernel::StrideD{y_row, {}, 0}},
        };
        const typename Biased<std::conditional_t<GELU, float, Out>>::Arguments biased{
            {x_scales},
            {{w_scales}, {}, {}},
            {bias}, // none: zero
            {},
        };
        if constexpr (GELU) {
            arguments.epilogue.thread = {biased, {}};
        } else {
            arguments.epilogue.thread = biased;
        }
        arguments.hw_info.sm_count = processors;
        using Scheduler = std::remove_reference_t<decltype(arguments.scheduler)>;
        using Raster = decltype(Scheduler{}.raster_order);
        arguments.scheduler.max_swizzle_size = 4; // 1 takes up to 1.4 times as long
        arguments.scheduler.raster_order = Raster::AlongN;
        if (Gemm::get_workspace_size(arguments) != 0) return -1; // it would have to be given
        Gemm gemm;
        cutlass::Status status = gemm.can_implement(arguments);
        if (status == cutlass::Status::kSuccess) status = gemm.run(arguments, nullptr, stream);
        return static_cast<int>(status);
    }
};

} // namespace

// Queues `y = x_scales * (w_scales * x wT) + bias` on `stream`, with GELU behind it where `gelu` is not 0: `x` `[rows,
// inputs]`, `w` `[outputs, inputs]`, `y` `rows` of `outputs`, `y_row` values apart, all at multiples of 16 bytes; `inputs` is a
// multiple of 16, `outputs` and `y_row` of 8, and the bias may be null. `y` and the bias are bf16, or f16 where `half` is
// not 0. Returns 0, or CUTLASS's status.
extern "C" int mmgp_w8a8_sm90(
    const void *x, const void *x_scales, const void *w, const void *w_scales, const void *bias, void *y,
    int half, int gelu, int y_row, int rows, int outputs, int inputs, int processors, void *stream
) {
    const auto run = [&](auto out, auto with) {
        using Out = decltype(out);
        return RowsByColumns<Out, decltype(with)::value>::run(
            static_cast<const int8_t *>(x), static_cast<const float *>(x_scales),
            static_cast<const int8_t *>(w), static_cast<const float *>(w_scales),
            static_cast<const Out *>(bias), static_cast<Out *>(y), y_row, rows, outputs, inputs,
            processors, static_cast<cudaStream_t>(stream)
        );
    };
    if (gelu) {
        const std::true_type with;
        return half ? run(cutlass::half_t(), with) : run(cutlass::bfloat16_t(), with);
    }
    const std::false_type without;
    return half ? run(cutlass::half_t(), without) : run(cutlass::bfloat16_t(), without);
}
