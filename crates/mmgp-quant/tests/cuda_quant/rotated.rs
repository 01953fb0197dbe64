//! Layers of rotated int8 weights on a CUDA device: the weight that they stand for is the CPU's bit for bit, products are those of it,
//! those in int8 keep what outliers would take from plain ones, and codes of the other kind are refused. With
//! `--nocapture` what the rotation takes is told too. These tests fail where no CUDA device can be opened.

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use mmgp_quant::{
    Bias, CodedRows, Codes, Epilogue, Input, Linear, MemorySource, SharedInput, Weights,
};

use crate::{Any, DTYPES, In, bits, gpu, rand};

/// `(rows of the input, outputs, inputs)`: one group, several, and longer rows than a thread keeps.
const SHAPES: [(usize, usize, usize); 5] =
    [(1, 64, 256), (77, 264, 512), (300, 33, 1280), (130, 3072, 768), (3, 16, 33_024)];

/// Codes and scales that `rows` become, scales in `dtype`.
fn quantized(of: Codes, rows: &Tensor, dtype: DType) -> Result<(Tensor, Tensor), Any> {
    let (count, width) = rows.dims2()?;
    let values: Vec<f32> = rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0f32; count]);
    of.quantize(&values, width, &mut codes, &mut scales).map_err(|fault| format!("{fault:?}"))?;
    let codes = Tensor::from_vec(codes, (count, width), &Device::Cpu)?;
    Ok((codes, Tensor::from_vec(scales, (count, 1), &Device::Cpu)?.to_dtype(dtype)?))
}

struct Stands {
    of: Codes,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor,
}

impl Stands {
    fn layer(&self, dtype: DType, activations: bool, dev: &Device) -> Result<Linear, Any> {
        let source = MemorySource::new(dev)
            .with(format!("weight.{}", self.of.leaf()), self.codes.to_device(dev)?)
            .with("weight._scale", self.scales.to_device(dev)?)
            .with("bias", self.bias.to_device(dev)?);
        let (outputs, inputs) = self.codes.dims2()?;
        Ok(Weights::new(In { source, dtype, activations: activations.then_some(Codes::Int8) })
            .linear(inputs, outputs, Bias::Yes)?)
    }
}

fn stands(of: Codes, weight: &Tensor, scale: DType, dtype: DType) -> Result<Stands, Any> {
    let (codes, scales) = quantized(of, weight, scale)?;
    let bias = rand(&[weight.dim(0)?], dtype);
    Ok(Stands { of, codes, scales, bias })
}

fn wide(t: &Tensor) -> Tensor {
    t.to_device(&Device::Cpu).unwrap().to_dtype(DType::F64).unwrap()
}

/// The cosine of two tensors, and the error of the second to the first.
fn near(expected: &Tensor, found: &Tensor) -> Result<(f64, f64), Any> {
    let (expected, found) = (wide(expected), wide(found));
    let dot = |a: &Tensor, b: &Tensor| (a * b)?.sum_all()?.to_scalar::<f64>();
    let of = dot(&expected, &expected)?;
    let off = (&expected - &found)?;
    let cosine = dot(&expected, &found)? / (of * dot(&found, &found)?).sqrt();
    Ok((cosine, (dot(&off, &off)? / of).sqrt()))
}

#[test]
fn cuda_rotated_weights_are_those_of_the_cpu_bit_for_bit() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (_, outputs, inputs) in SHAPES {
        for scale in DTYPES {
            let weight = rand(&[outputs, inputs], DType::F32);
            let stands = stands(Codes::RotatedInt8, &weight, scale, DType::F32)?;
            let open = |dev| stands.layer(DType::F32, false, dev);
            let (cpu, cuda) = (open(&Device::Cpu)?.decode()?, open(&dev)?.decode()?);
            assert_eq!((cuda.dtype(), cuda.dims()), (scale, cpu.dims()));
            assert_eq!(bits(&cuda), bits(&cpu), "[{outputs}, {inputs}] {scale:?}");
            let (cosine, error) = near(&weight, &cuda)?;
            assert!(cosine > 0.999 && error < 0.02, "[{outputs}, {inputs}]: off by {error}");
        }
    }
    Ok(())
}

#[test]
fn cuda_products_of_rotated_weights_are_those_of_what_they_stand_for() -> Result<(), Any> {
    let (dev, _) = gpu();
    for (rows, outputs, inputs) in SHAPES {
        for dtype in DTYPES {
            let weight = rand(&[outputs, inputs], DType::F32);
            let stands = stands(Codes::RotatedInt8, &weight, DType::BF16, dtype)?;
            let x = rand(&[rows, inputs], dtype);
            let decoded = stands.layer(DType::F32, false, &Device::Cpu)?;
            let expected = decoded.forward(&x.to_dtype(DType::F32)?)?;
            let what = format!("{rows}, [{outputs}, {inputs}] {dtype:?}");
            let on_x = x.to_device(&dev)?;
            let plain = stands.layer(dtype, false, &dev)?.forward(&on_x)?;
            let (cosine, error) = near(&expected, &plain)?;
            assert!(cosine > 0.9999 && error < 1e-2, "{what}: off by {error}");
            let layer = stands.layer(dtype, true, &dev)?;
            let y = layer.forward(&on_x)?;
            assert_eq!((y.dtype(), y.dims()), (dtype, &[rows, outputs][..]));
            let (cosine, error) = near(&expected, &y)?;
            assert!(cosine > 0.999 && error < 0.03, "{what}, in int8: off by {error}");
            assert_eq!(bits(&y), bits(&layer.forward(&on_x)?), "{what}: twice");
            let reads = layer.reads(&(&on_x).into());
            if dtype == DType::F32 {
                assert_eq!((bits(&y), reads), (bits(&plain), None), "{what}");
                continue;
            }
            assert_eq!(reads, Some(Codes::RotatedInt8), "{what}");
            assert!(rows * outputs < 64 || bits(&y) != bits(&plain), "{what}: not made int8");
            let into = Tensor::zeros((rows, outputs), dtype, &dev)?;
            if layer.forward_into(&(&on_x).into(), Epilogue::None, &into)? {
                assert_eq!(bits(&into), bits(&y), "{what}: into columns");
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_codes_are_read_by_weights_of_their_kind_alone() -> Result<(), Any> {
    let (dev, _) = gpu();
    let (rows, outputs, inputs) = (77, 264, 512);
    let (weight, x) = (rand(&[outputs, inputs], DType::F32), rand(&[rows, inputs], DType::BF16));
    let kinds = [Codes::Int8, Codes::RotatedInt8, Codes::Fp8];
    for of in [Codes::Int8, Codes::RotatedInt8] {
        let stands = stands(of, &weight, DType::BF16, DType::BF16)?;
        let layer = stands.layer(DType::BF16, true, &dev)?;
        let numbers = layer.forward(&x.to_device(&dev)?)?;
        for given in kinds {
            let (codes, scales) = quantized(given, &x, DType::F32)?;
            let (codes, scales) = (codes.to_device(&dev)?, scales.to_device(&dev)?);
            let dims = vec![rows, inputs];
            let rows = CodedRows { of: given, codes, scales, dtype: DType::BF16, dims };
            let y = layer.forward_input(&Input::Codes(rows));
            if given == of {
                // The CPU divides by the scale where the GPU multiplies by its inverse: few codes differ.
                let (cosine, _) = near(&numbers, &y?)?;
                assert!(cosine > 0.9999, "{of}: {cosine}");
            } else {
                assert!(y.is_err(), "{given} rows for a weight of {of}");
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_an_input_that_layers_share_gives_what_each_makes_of_it() -> Result<(), Any> {
    let (dev, _) = gpu();
    for rows in [1, 3, 77] {
        let x = rand(&[rows, 512], DType::BF16).to_device(&dev)?;
        let shared = SharedInput::new(x.clone());
        // Two of each kind, among which the input's codes go on.
        for of in [Codes::Int8, Codes::RotatedInt8, Codes::Int8, Codes::RotatedInt8] {
            let stands = stands(of, &rand(&[64, 512], DType::F32), DType::BF16, DType::BF16)?;
            for activations in [true, false] {
                let layer = stands.layer(DType::BF16, activations, &dev)?;
                assert_eq!(layer.reads(&(&x).into()), activations.then_some(of));
                let y = shared.through(&layer)?;
                assert_eq!(bits(&y), bits(&layer.forward(&x)?), "{rows}, {of}, {activations}");
            }
        }
    }
    Ok(())
}

#[test]
fn cuda_rows_without_numbers_or_values_are_kept_apart() -> Result<(), Any> {
    let (dev, _) = gpu();
    let weight = rand(&[32, 512], DType::F32);
    let stands = stands(Codes::RotatedInt8, &weight, DType::BF16, DType::BF16)?;
    let mut x: Vec<f32> = rand(&[4, 512], DType::F32).flatten_all()?.to_vec1()?;
    x[..512].fill(0.);
    x[512 + 5] = f32::NAN;
    x[1024 + 511] = f32::INFINITY;
    let x = Tensor::from_vec(x, (4, 512), &Device::Cpu)?.to_dtype(DType::BF16)?.to_device(&dev)?;
    let y = stands.layer(DType::BF16, true, &dev)?.forward(&x)?.to_dtype(DType::F32)?;
    let y: Vec<Vec<f32>> = y.to_vec2()?;
    assert_eq!(y[0], stands.bias.to_dtype(DType::F32)?.to_vec1::<f32>()?);
    assert!(y[1].iter().chain(&y[2]).all(|y| y.is_nan()));
    assert!(y[3].iter().all(|y| y.is_finite()));
    Ok(())
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
fn cuda_rotation_guards_against_outliers() -> Result<(), Any> {
    let (dev, _) = gpu();
    println!("rows inputs outputs |  plain ms | rotated ms | plain: cosine, rotated: cosine");
    for (inputs, outputs) in [(3072, 9216), (12_288, 3072)] {
        // A few channels of the input are a hundred times as large as the rest.
        let spread = |larger: f32| {
            let of = (0..inputs).map(|at| if at % 1111 == 77 { larger } else { 1. });
            Tensor::from_vec(of.collect::<Vec<f32>>(), (1, inputs), &Device::Cpu)
        };
        let weight = rand(&[outputs, inputs], DType::F32);
        for rows in [4608, 1536] {
            let mut x: Vec<f32> = rand(&[rows, inputs], DType::F32).flatten_all()?.to_vec1()?;
            for row in x.chunks_exact_mut(inputs) {
                (77..inputs).step_by(1111).for_each(|at| row[at] = 1. + row[at] / 8.);
            }
            let x = Tensor::from_vec(x, (rows, inputs), &Device::Cpu)?;
            let x = x.broadcast_mul(&spread(100.)?)?.to_dtype(DType::BF16)?.to_device(&dev)?;
            let dense = weight.to_dtype(DType::BF16)?.to_device(&dev)?;
            let mut found = Vec::new();
            for of in [Codes::Int8, Codes::RotatedInt8] {
                let mut stands = stands(of, &weight, DType::BF16, DType::BF16)?;
                stands.bias = stands.bias.zeros_like()?;
                let layer = stands.layer(DType::BF16, true, &dev)?;
                let y = layer.forward(&x)?;
                let expected = x.matmul(&dense.t()?)?;
                let few = 256; // rows, which the host compares in f64
                let (cosine, _) = near(&expected.narrow(0, 0, few)?, &y.narrow(0, 0, few)?)?;
                found.push((seconds(&dev, || layer.forward(&x))?, cosine));
            }
            let [(plain_s, plain), (rotated_s, rotated)] = found[..] else { return Ok(()) };
            let (plain_s, rotated_s) = (plain_s * 1e3, rotated_s * 1e3);
            println!(
                "{rows} {inputs:6} {outputs:7} | {plain_s:9.4} | {rotated_s:10.4} | {plain:.6}, {rotated:.6}"
            );
            assert!(plain < 0.999 && rotated >= 0.999, "plain {plain}, rotated {rotated}");
        }
    }
    Ok(())
}
