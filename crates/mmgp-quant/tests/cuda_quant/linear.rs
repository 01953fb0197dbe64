//! Linear layers on a CUDA device agree with the CPU: the expansion of int8 weights bit for bit, products
//! within the rounding of the compute dtype, and those in int8 within what rounding the input costs. With
//! `--nocapture` what products take is told too. These tests fail where no CUDA device can be opened.

use std::time::Instant;

use candle_core::{
    CpuStorage, CudaStorage, D, DType, Device, InplaceOp1, Layout, Tensor, backend::BackendDevice,
};
use mmgp_quant::{
    Band, Bias, Codes, Int8Kernel, Linear, MemorySource, Weights, add_low_rank, w8a8, w8a8_by,
};

use crate::{Any, DTYPES, In, bits, gpu, rand};

/// `(rows of the input, outputs, inputs)`: widths that are no multiple of 16, single rows and outputs.
const SHAPES: [(usize, usize, usize); 8] = [
    (1, 1, 1),
    (1, 1, 37),
    (3, 5, 7),
    (2, 24, 16),
    (17, 33, 129),
    (300, 64, 96),
    (64, 257, 1000),
    (299, 40, 515),
];

/// The tolerance that products are held to, relative to the largest sum of magnitudes (what cancels loses
/// digits): half the spacing of the dtype's numbers, with room for the weight being rounded too.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1e-2,
        DType::F16 => 2e-3,
        _ => 1e-4,
    }
}

fn codes(outputs: usize, inputs: usize) -> Tensor {
    let bytes = (0..outputs * inputs).map(|i| ((i as u32).wrapping_mul(2_654_435_761) >> 24) as u8);
    Tensor::from_vec(bytes.collect(), (outputs, inputs), &Device::Cpu).unwrap()
}

/// Positive scales near 1/127.
fn scales(outputs: usize, dtype: DType) -> Tensor {
    let scales = (rand(&[outputs, 1], DType::F32).abs().unwrap() + 0.1).unwrap();
    (scales / 127.).unwrap().to_dtype(dtype).unwrap()
}

fn layer(
    tensors: &[(&str, &Tensor)],
    dims: (usize, usize),
    bias: Bias,
    dtype: DType,
    dev: &Device,
) -> Result<Linear, Any> {
    layer_with(tensors, dims, bias, (dtype, false), dev)
}

/// A layer that computes in a dtype, its input made int8 or not.
fn layer_with(
    tensors: &[(&str, &Tensor)],
    (outputs, inputs): (usize, usize),
    bias: Bias,
    (dtype, activations): (DType, bool),
    dev: &Device,
) -> Result<Linear, Any> {
    let mut source = MemorySource::new(dev);
    for (name, tensor) in tensors {
        source = source.with(*name, tensor.to_device(dev)?);
    }
    Ok(Weights::new(In { source, dtype, activations: activations.then_some(Codes::Int8) })
        .linear(inputs, outputs, bias)?)
}

fn assert_close(got: &Tensor, expected: &Tensor, magnitude: &Tensor, dtype: DType, what: &str) {
    let wide = |t: &Tensor| t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap();
    let (got, expected) = (wide(got), wide(expected));
    assert_eq!(got.dims(), expected.dims(), "{what}");
    let largest = |t: Tensor| t.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap();
    let far = largest((&got - &expected).unwrap()) / largest(wide(magnitude)).max(1e-30);
    assert!(far < tolerance(dtype), "{what}: off by {far:e}");
}

/// `x Wᵀ + b` in f64 of the values as they are given.
fn reference(x: &Tensor, w: &Tensor, bias: &Tensor) -> Tensor {
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    wide(x).matmul(&wide(w).t().unwrap()).unwrap().broadcast_add(&wide(bias)).unwrap()
}

/// The same of all magnitudes.
fn magnitude(x: &Tensor, w: &Tensor, bias: &Tensor) -> Tensor {
    reference(&x.abs().unwrap(), &w.abs().unwrap(), &bias.abs().unwrap())
}

#[test]
fn cuda_expansion_equals_the_cpu_bit_for_bit() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (_, outputs, inputs) in SHAPES {
        for scale_dtype in DTYPES {
            let (codes, scales) = (codes(outputs, inputs), scales(outputs, scale_dtype));
            let tensors = [("weight._data", &codes), ("weight._scale", &scales)];
            let open = |dev| layer(&tensors, (outputs, inputs), Bias::No, DType::F32, dev);
            let (cpu, cuda) = (open(&Device::Cpu)?.decode()?, open(&dev)?.decode()?);
            assert_eq!((cuda.dtype(), cuda.dims()), (scale_dtype, cpu.dims()));
            assert_eq!(bits(&cuda), bits(&cpu), "[{outputs}, {inputs}] {scale_dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn cuda_products_are_close_to_f64() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (rows, outputs, inputs) in SHAPES {
        for dtype in DTYPES {
            // Rounded once, so that the reference sees the values that the layers see.
            let (x, bias) = (rand(&[rows, inputs], dtype), rand(&[outputs], dtype));
            let on_gpu = x.to_device(&dev)?;
            let dims = (outputs, inputs);
            let what = format!("{rows} rows, [{outputs}, {inputs}] {dtype:?}");

            let weight = rand(&[outputs, inputs], dtype);
            let dense = [("weight", &weight), ("bias", &bias)];
            let y = layer(&dense, dims, Bias::Yes, dtype, &dev)?.forward(&on_gpu)?;
            assert_eq!(y.dtype(), dtype);
            let most = magnitude(&x, &weight, &bias);
            let what_dense = format!("dense, {what}");
            assert_close(&y, &reference(&x, &weight, &bias), &most, dtype, &what_dense);

            for scale_dtype in DTYPES {
                let (codes, scales) = (codes(outputs, inputs), scales(outputs, scale_dtype));
                let weight = decoded(&codes, &scales)?;
                let tensors =
                    [("weight._data", &codes), ("weight._scale", &scales), ("bias", &bias)];
                let y = layer(&tensors, dims, Bias::Yes, dtype, &dev)?.forward(&on_gpu)?;
                let what = format!("int8 by {scale_dtype:?}, {what}");
                assert_eq!(y.dtype(), dtype);
                let most = magnitude(&x, &weight, &bias);
                assert_close(&y, &reference(&x, &weight, &bias), &most, dtype, &what);
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_bias_is_added_to_every_row() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (rows, outputs, inputs) in SHAPES.into_iter().chain([(70_000, 8, 3), (70_000, 3, 1)]) {
        for dtype in DTYPES {
            let (x, weight) = (rand(&[rows, inputs], dtype), rand(&[outputs, inputs], dtype));
            // So large that a product without it would be seen.
            let bias = (rand(&[outputs], DType::F32) * 100.)?.to_dtype(dtype)?;
            let tensors = [("weight", &weight), ("bias", &bias)];
            let open = |bias| layer(&tensors, (outputs, inputs), bias, dtype, &dev);
            let on_gpu = x.to_device(&dev)?;
            let with = open(Bias::Yes)?.forward(&on_gpu)?;
            let what = format!("{rows} rows of {outputs}, {dtype:?}");
            if dtype == DType::F32 {
                let without = open(Bias::No)?.forward(&on_gpu)?;
                let expected = without.broadcast_add(&bias.to_device(&dev)?)?;
                assert_eq!(bits(&with), bits(&expected), "{what}");
            }
            let most = magnitude(&x, &weight, &bias);
            assert_close(&with, &reference(&x, &weight, &bias), &most, dtype, &what);
        }
    }
    Ok(())
}

/// `tensor` on the device, `skipped` values behind where an allocation begins.
fn placed(tensor: &Tensor, skipped: usize, dev: &Device) -> Result<Tensor, Any> {
    let before = Tensor::ones(skipped, tensor.dtype(), &Device::Cpu)?;
    let all = Tensor::cat(&[&before, &tensor.flatten_all()?], 0)?.to_device(dev)?;
    Ok(all.narrow(0, skipped, tensor.elem_count())?.reshape(tensor.shape())?)
}

#[test]
fn cuda_products_have_the_same_bits_wherever_operands_lie() -> Result<(), Any> {
    let (dev, _) = gpu();
    let large = [(77, 3072, 768), (512, 64, 3072), (1, 256, 8192), (4, 1000, 4096)];
    for (rows, outputs, inputs) in SHAPES.into_iter().chain(large) {
        for dtype in [DType::BF16, DType::F16] {
            let (x, bias) = (rand(&[rows, inputs], dtype), rand(&[outputs], dtype));
            let weight = rand(&[outputs, inputs], dtype);
            for with in [Bias::Yes, Bias::No] {
                let run = |skipped| -> Result<Vec<u32>, Any> {
                    let (w, b) = (placed(&weight, skipped, &dev)?, placed(&bias, skipped, &dev)?);
                    let tensors = [("weight", &w), ("bias", &b)];
                    let layer = layer(&tensors, (outputs, inputs), with, dtype, &dev)?;
                    Ok(bits(&layer.forward(&placed(&x, skipped, &dev)?)?))
                };
                let first = run(0)?;
                // Again; 256 bytes further, as weights in slots lie; and where no vector begins.
                for skipped in [0, 128, 8, 1] {
                    let what =
                        format!("{rows}, [{outputs}, {inputs}] {dtype:?} {with:?} {skipped}");
                    assert_eq!(run(skipped)?, first, "{what}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_low_rank_takes_adapters_as_they_are_stored() -> Result<(), Any> {
    let (dev, _) = gpu();
    // Scales that differ within a band, and one for each.
    let all = [[0.5f32, 2., -1., 0.25, 1., 3.], [2., 2., -0.5, -0.5, -0.5, -0.5]];
    // The width, and columns that bands begin at: at multiples of 16 bytes or not, with columns that none touches.
    for (width, first, second) in [(21, 3, 8), (40, 8, 16)] {
        for dtype in DTYPES {
            for stored in DTYPES {
                let (x, y) = (rand(&[33, 13], dtype), rand(&[33, width], dtype));
                let (a, b0, b1) =
                    (rand(&[6, 13], stored), rand(&[5, 2], stored), rand(&[6, 4], stored));
                for scales in &all {
                    // The CPU takes f32 input and any form of adapters.
                    let wide = |t: &Tensor| t.to_dtype(DType::F32);
                    let bands = [Band { row: first, b: &b0 }, Band { row: second, b: &b1 }];
                    let before = wide(&y)?.copy()?;
                    let expected = add_low_rank(&wide(&x)?, before, &a, scales, &bands)?;
                    let (b0, b1) = (b0.to_device(&dev)?, b1.to_device(&dev)?);
                    let bands = [Band { row: first, b: &b0 }, Band { row: second, b: &b1 }];
                    let (x, a) = (x.to_device(&dev)?, a.to_device(&dev)?);
                    let run = || add_low_rank(&x, y.to_device(&dev)?, &a, scales, &bands);
                    let got = run()?;
                    assert_eq!(got.dtype(), dtype);
                    let what = format!("{width}, {dtype:?} of {stored:?}");
                    // Here the intermediate product is rounded too.
                    assert_close(&got, &expected, &expected, dtype, &what);
                    assert_eq!(bits(&got), bits(&run()?), "{what}");
                    let left = |t: &Tensor| Ok::<_, Any>(bits(&t.narrow(1, 0, first)?));
                    assert_eq!(left(&got)?, left(&y)?, "{what}: columns that no band touches");
                }
            }
        }
    }
    Ok(())
}

/// `(rows of the input, outputs, inputs)` that products in int8 take: cut tiles, outputs that are no multiple of 8.
const IN_INT8: [(usize, usize, usize); 7] = [
    (1, 64, 96),
    (3, 136, 16),
    (17, 33, 128),
    (77, 264, 336),
    (300, 257, 1008),
    (130, 3072, 768),
    (512, 64, 12288),
];

/// The weight of codes and scales, in f64.
fn decoded(codes: &Tensor, scales: &Tensor) -> Result<Tensor, Any> {
    let codes = codes.to_dtype(DType::F64)?;
    let signed = (&codes - (codes.ge(128.)?.to_dtype(DType::F64)? * 256.)?)?;
    Ok(signed.broadcast_mul(&scales.to_dtype(DType::F64)?)?)
}

#[test]
fn cuda_w8a8_is_as_close_to_f64_as_rounding_the_input_allows() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (rows, outputs, inputs) in IN_INT8 {
        for dtype in [DType::BF16, DType::F16] {
            let (x, bias) = (rand(&[rows, inputs], dtype), rand(&[outputs], dtype));
            let codes = codes(outputs, inputs);
            // So small that f16 holds the outputs.
            let scales = (scales(outputs, DType::F32) / 16.)?;
            let weight = decoded(&codes, &scales)?;
            let expected = reference(&x, &weight, &bias);
            // Half a code of each input, half a step of the output's numbers, and three roundings in f32.
            let wide = x.to_dtype(DType::F64)?.abs()?;
            let half = (wide.max_keepdim(1)? / 254.)?;
            let by_codes = half.matmul(&weight.abs()?.sum_keepdim(1)?.t()?.contiguous()?)?;
            let step = if dtype == DType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
            let by_rounding = (magnitude(&x, &weight, &bias) * 1e-6)?;
            let by_rounding = (by_rounding + ((expected.abs()? + &by_codes)? * (step * 1.01))?)?;
            let allowed = ((by_codes + by_rounding)? + 1e-7)?;

            let (on_x, on_bias) = (x.to_device(&dev)?, bias.to_device(&dev)?);
            let (on_codes, on_scales) = (codes.to_device(&dev)?, scales.to_device(&dev)?);
            let mut seen: Option<Vec<u32>> = None;
            for by in [Int8Kernel::Fastest, Int8Kernel::Mma] {
                let what = format!("{rows}, [{outputs}, {inputs}] {dtype:?}, {by:?}");
                let y =
                    w8a8_by(&on_x, &on_codes, &on_scales, Some(&on_bias), by)?.ok_or("refused")?;
                assert_eq!((y.dtype(), y.dims()), (dtype, &[rows, outputs][..]), "{what}");
                let wide = y.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                let far = ((&wide - &expected)?.abs()? / &allowed)?;
                let far = far.max_all()?.to_scalar::<f64>()?;
                assert!(far <= 1., "{what}: off by {far} times what is allowed");
                // All values together are much nearer than the worst may be.
                let square = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f64>();
                let error = (square(&(&wide - &expected)?)? / square(&expected)?).sqrt();
                assert!(error < 0.02, "{what}: off by {error} in the mean");
                // Both kernels give the same bits, and again.
                let again = w8a8_by(&on_x, &on_codes, &on_scales, Some(&on_bias), by)?;
                assert_eq!(bits(&again.ok_or("refused")?), bits(&y), "{what}: twice");
                let first = seen.get_or_insert_with(|| bits(&y));
                assert!(*first == bits(&y), "{what}: other bits than the other kernel");
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_layers_make_their_input_int8_only_where_that_is_allowed() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (rows, outputs, inputs) in IN_INT8.into_iter().chain(SHAPES) {
        for dtype in DTYPES {
            let (x, bias) = (rand(&[rows, inputs], dtype), rand(&[outputs], dtype));
            let (codes, scales) = (codes(outputs, inputs), scales(outputs, DType::BF16));
            let run = |activations, skipped| -> Result<Vec<u32>, Any> {
                let codes = placed(&codes, skipped, &dev)?;
                let scales = placed(&scales, skipped, &dev)?;
                let bias = placed(&bias, skipped, &dev)?;
                let tensors =
                    [("weight._data", &codes), ("weight._scale", &scales), ("bias", &bias)];
                let with = (dtype, activations);
                let layer = layer_with(&tensors, (outputs, inputs), Bias::Yes, with, &dev)?;
                Ok(bits(&layer.forward(&placed(&x, skipped, &dev)?)?))
            };
            let what = format!("{rows}, [{outputs}, {inputs}] {dtype:?}");
            let (int8, not) = (run(true, 0)?, run(false, 0)?);
            let taken = dtype != DType::F32 && inputs % 16 == 0;
            if taken {
                let scales = scales.to_dtype(DType::F32)?;
                let [x, codes, scales, bias] =
                    [&x, &codes, &scales, &bias].map(|tensor| tensor.to_device(&dev));
                let y = w8a8(&x?, &codes?, &scales?, Some(&bias?))?.ok_or("refused")?;
                assert_eq!(int8, bits(&y), "{what}");
                assert!(rows * outputs < 64 || int8 != not, "{what}: the input was not made int8");
            } else {
                assert_eq!(int8, not, "{what}: other shapes and dtypes are computed as ever");
            }
            // 256 bytes and more further, as weights in slots lie; and where no vector begins.
            for skipped in [256, 16, 1] {
                assert_eq!(run(true, skipped)?, int8, "{what}, {skipped} further");
            }
        }
    }
    Ok(())
}

/// `(inputs, outputs)` of FLUX' layers: joined projections, the feed-forward's both ways, a single block's.
const TIMED: [(usize, usize); 5] =
    [(3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072), (3072, 21504)];

/// Codes and scales of a dense f32 weight, on its device.
fn quantized(weight: &Tensor) -> Result<(Tensor, Tensor), Any> {
    let scales = (weight.abs()?.max_keepdim(1)? / 127.)?;
    let codes = weight.broadcast_div(&scales)?.round()?;
    let codes = (&codes + (codes.lt(0.)?.to_dtype(DType::F32)? * 256.)?)?;
    Ok((codes.to_dtype(DType::U8)?, scales))
}

/// Seconds of one of many runs back to back.
fn seconds(
    dev: &Device,
    run: impl Fn() -> candle_core::Result<Tensor>,
) -> candle_core::Result<f64> {
    const RUNS: u32 = 30;
    for _ in 0..5 {
        run()?;
    }
    dev.synchronize()?;
    let begun = Instant::now();
    for _ in 0..RUNS {
        run()?;
    }
    dev.synchronize()?;
    Ok(begun.elapsed().as_secs_f64() / f64::from(RUNS))
}

#[test]
fn cuda_w8a8_of_normal_values_is_near_bf16() -> Result<(), Any> {
    let (dev, _) = gpu();
    println!(
        "rows inputs outputs |   w8a8 ms TOPS |   mma ms TOPS |   bf16 ms TOPS |  w8a16 ms TOPS | error cosine"
    );
    for rows in [4608, 1536] {
        for (inputs, outputs) in TIMED {
            let weight = Tensor::randn(0f32, 1., (outputs, inputs), &dev)?;
            let (codes, scales) = quantized(&weight)?;
            let weight = weight.to_dtype(DType::BF16)?;
            let x = Tensor::randn(0f32, 1., (rows, inputs), &dev)?.to_dtype(DType::BF16)?;
            let stored = [("weight._data", &codes), ("weight._scale", &scales)];
            let open = |tensors: &[(&str, &Tensor)], activations| {
                let with = (DType::BF16, activations);
                layer_with(tensors, (outputs, inputs), Bias::No, with, &dev)
            };
            let (int8, expanded) = (open(&stored, true)?, open(&stored, false)?);
            let dense = open(&[("weight", &weight)], false)?;
            let mma = || {
                let y = w8a8_by(&x, &codes, &scales, None, Int8Kernel::Mma)?;
                y.ok_or_else(|| candle_core::Error::msg("refused"))
            };
            let took = [
                seconds(&dev, || int8.forward(&x))?,
                seconds(&dev, mma)?,
                seconds(&dev, || dense.forward(&x))?,
                seconds(&dev, || expanded.forward(&x))?,
            ];
            let (y, expected) = (int8.forward(&x)?, dense.forward(&x)?);
            let (y, expected) = (y.to_dtype(DType::F32)?, expected.to_dtype(DType::F32)?);
            let dot = |a: &Tensor, b: &Tensor| -> candle_core::Result<f64> {
                // Row by row first: one sum in f32 of a hundred million squares would lose digits.
                let rows = (a * b)?.sum(1)?.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
                rows.sum_all()?.to_scalar()
            };
            let of = dot(&expected, &expected)?;
            let off = (&y - &expected)?;
            let error = (dot(&off, &off)? / of).sqrt();
            let cosine = dot(&y, &expected)? / (dot(&y, &y)? * of).sqrt();
            let operations = 2e-12 * (rows * inputs * outputs) as f64;
            let columns = took.map(|s| format!("{:9.4} {:5.0}", s * 1e3, operations / s));
            println!(
                "{rows} {inputs:6} {outputs:7} | {} | {error:.4} {cosine:.6}",
                columns.join(" | ")
            );
            assert!(error < 0.02 && cosine > 0.9995, "off by {error}, cosine {cosine}");
        }
    }
    Ok(())
}

/// Leaves what a weight without a lease has: a tiny storage of another dtype.
struct Unbind;

impl InplaceOp1 for Unbind {
    fn name(&self) -> &'static str {
        "unbind"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("only for CUDA")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        *storage = storage.device.zeros_impl(&1.into(), DType::U32)?;
        Ok(())
    }
}

#[test]
fn cuda_weights_without_a_lease_are_errors() -> Result<(), Any> {
    let (dev, _) = gpu();
    let dtype = DType::BF16;
    let on_gpu = |t: Tensor| t.to_device(&dev);
    let x = on_gpu(rand(&[2, 7], dtype))?;
    for unbound in ["weight", "weight._data", "weight._scale", "bias"] {
        let mut tensors = vec![("bias", on_gpu(rand(&[5], dtype))?)];
        if unbound == "weight" {
            tensors.push(("weight", on_gpu(rand(&[5, 7], dtype))?));
        } else {
            tensors.push(("weight._data", on_gpu(codes(5, 7))?));
            tensors.push(("weight._scale", on_gpu(scales(5, DType::F32))?));
        }
        let borrowed: Vec<(&str, &Tensor)> = tensors.iter().map(|(n, t)| (*n, t)).collect();
        // A tensor that is on the device already, in the right dtype, is shared and not copied.
        let layer = layer(&borrowed, (5, 7), Bias::Yes, dtype, &dev)?;
        assert_eq!(layer.forward(&x)?.dim(D::Minus1)?, 5);
        let (_, tensor) = tensors.iter().find(|(name, _)| *name == unbound).ok_or(unbound)?;
        tensor.inplace_op1(&Unbind)?;
        assert!(layer.forward(&x).is_err(), "{unbound}");
    }
    for unbound in ["weight._data", "weight._scale", "bias"] {
        let tensors = [
            ("bias", on_gpu(rand(&[8], dtype))?),
            ("weight._data", on_gpu(codes(8, 16))?),
            ("weight._scale", on_gpu(scales(8, DType::F32))?),
        ];
        let borrowed = tensors.each_ref().map(|(name, tensor)| (*name, tensor));
        let layer = layer_with(&borrowed, (8, 16), Bias::Yes, (dtype, true), &dev)?;
        let x = on_gpu(rand(&[2, 16], dtype))?;
        assert_eq!(layer.forward(&x)?.dim(D::Minus1)?, 8);
        let (_, tensor) = tensors.iter().find(|(name, _)| *name == unbound).ok_or(unbound)?;
        tensor.inplace_op1(&Unbind)?;
        assert!(layer.forward(&x).is_err(), "{unbound}, in int8");
    }
    for stored in [dtype, DType::F32] {
        let (a, b) = (on_gpu(rand(&[2, 7], stored))?, on_gpu(rand(&[5, 2], stored))?);
        a.inplace_op1(&Unbind)?;
        let y = on_gpu(rand(&[2, 5], dtype))?;
        assert!(add_low_rank(&x, y, &a, &[1., 1.], &[Band { row: 0, b: &b }]).is_err());
    }
    // The device still works: nothing was read out of bounds.
    on_gpu(rand(&[2, 7], dtype))?.sum_all()?.to_dtype(DType::F32)?.to_scalar::<f32>()?;
    Ok(())
}
