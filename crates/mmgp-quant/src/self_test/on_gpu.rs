//! Each kernel, and products, run on a GPU and held to their twins.

use candle_core::{CudaDevice, DType, Device, Tensor};

use super::{
    Activated, Added, activated, biased, codes, compare, compare_near, expanded, multiplied,
    multiplied_in_fp8, multiplied_in_int8, quantized, quantized_to_fp8, turned, values,
};
use crate::{
    CodedRows, Codes, Epilogue, Error, Input, Result,
    decode::decoded,
    kernels::cuda::{self, Int8Kernel},
};

pub(super) fn expand(
    device: &CudaDevice,
    of: Codes,
    shape: (usize, usize),
    skipped: usize,
    scaled: bool,
    to: DType,
) -> Result<()> {
    let kernel = cuda::expand_name(of, to)?;
    let (outputs, inputs) = shape;
    let len = outputs * inputs;
    let all = codes(skipped + len);
    let scales = if scaled { values(outputs, 7, DType::F32) } else { vec![1.; outputs] };
    let run = || {
        let codes = Tensor::new(all.as_slice(), &Device::Cpu)?;
        let codes = codes.to_device(&Device::Cuda(device.clone()))?;
        let codes = codes.narrow(0, skipped, len)?.reshape(shape)?;
        let scales = on(device, &scales, DType::F32)?.reshape((outputs, 1))?;
        back(&decoded(of, &codes, scaled.then_some(&scales), to)?)
    };
    let found = run().map_err(|error| not_run(&kernel, shape, error))?;
    compare(&kernel, shape, &expanded(of, &all[skipped..], inputs, &scales, to), &found)
}

pub(super) fn add_bias(
    device: &CudaDevice,
    shape: (usize, usize),
    skipped: usize,
    dtype: DType,
) -> Result<()> {
    let kernel = cuda::add_bias_name(dtype)?;
    let (rows, outputs) = shape;
    let len = rows * outputs;
    // What lies before and behind must stay as it is.
    let mut all = values(skipped + len + 1, 11, dtype);
    let bias = values(outputs, 13, dtype);
    let run = || {
        let y = on(device, &all, dtype)?;
        let bias = on(device, &bias, dtype)?;
        y.narrow(0, skipped, len)?.reshape(shape)?.inplace_op2(&bias, &cuda::AddBias)?;
        back(&y)
    };
    let found = run().map_err(|error| not_run(&kernel, shape, error))?;
    biased(&mut all[skipped..skipped + len], &bias, dtype);
    compare(&kernel, shape, &all, &found)
}

pub(super) fn product(
    device: &CudaDevice,
    (rows, outputs, inputs): (usize, usize, usize),
    dtype: DType,
) -> Result<()> {
    let x = values(rows * inputs, 17, dtype);
    let w = values(outputs * inputs, 19, dtype);
    let bias = values(outputs, 23, dtype);
    // They begin at a multiple of 16 bytes, or not.
    let place = |values: &[f32], skipped: usize, shape: &[usize]| {
        let all = [&vec![0.; skipped], values].concat();
        on(device, &all, dtype)?.narrow(0, skipped, values.len())?.reshape(shape)
    };
    for biased in [false, true] {
        let kernel = cuda::product_name(dtype, biased, Epilogue::None)?;
        let run = |skipped| {
            let bias = place(&bias, skipped, &[outputs])?;
            let (x, w) =
                (place(&x, skipped, &[rows, inputs])?, place(&w, skipped, &[outputs, inputs])?);
            let y = cuda::product(&x, &w, biased.then_some(&bias))?;
            y.as_ref().map(back).transpose()
        };
        let shape = (rows, outputs);
        let run = |skipped| run(skipped).map_err(|error| not_run(&kernel, shape, error));
        let Some(found) = run(0)? else {
            // Shapes that nothing is offered for go another way; every library has something for these.
            if rows > 1 && outputs % 8 == 0 && inputs % 8 == 0 {
                let error = candle_core::Error::msg("cublasLt offers no algorithm");
                return Err(not_run(&kernel, shape, error));
            }
            continue;
        };
        let expected = multiplied(&x, &w, biased.then_some(&bias), inputs, dtype);
        compare_near(&kernel, shape, &expected, &found)?;
        for skipped in [0, 1] {
            compare(&kernel, shape, &found, &run(skipped)?.unwrap_or_default())?;
        }
    }
    Ok(())
}

pub(super) fn add_product(device: &CudaDevice, added: &Added, dtype: DType) -> Result<()> {
    let &Added { rows, y: (width, column, outputs), t: (ranks, first, inputs) } = added;
    let (t, b) = (values(rows * ranks, 29, dtype), values(outputs * inputs, 31, dtype));
    let before = values(rows * width, 37, dtype);
    let kernel = format!("add_{}", cuda::product_name(dtype, false, Epilogue::None)?);
    let run = || {
        let t = on(device, &t, dtype)?.reshape((rows, ranks))?;
        let b = on(device, &b, dtype)?.reshape((outputs, inputs))?;
        let y = on(device, &before, dtype)?.reshape((rows, width))?;
        let done = cuda::add_product((&t, first), &b, 0.5, (&y, column))?;
        done.then(|| back(&y)).transpose()
    };
    let run = || run().map_err(|error| not_run(&kernel, (rows, width), error));
    let Some(found) = run()? else {
        if outputs % 8 == 0 {
            let error = candle_core::Error::msg("cublasLt offers no algorithm");
            return Err(not_run(&kernel, (rows, width), error));
        }
        return Ok(());
    };
    // Columns that nothing is added to must stay as they are.
    let mut expected: Vec<(f32, f32)> = before.iter().map(|&y| (y, 0.)).collect();
    for (row, t) in t.chunks_exact(ranks).enumerate() {
        let read: Vec<f32> = t[first..first + inputs].iter().map(|t| t * 0.5).collect();
        let from = row * width + column;
        let y = &before[from..from + outputs];
        let sums = multiplied(&read, &b, Some(y), inputs, dtype);
        expected[from..from + outputs].copy_from_slice(&sums);
    }
    compare_near(&kernel, (rows, width), &expected, &found)?;
    compare(&kernel, (rows, width), &found, &run()?.unwrap_or_default())
}

/// Both kernels, and the quantization before them, give the bits of their twin: of rows as they are, or rotated.
pub(super) fn w8a8(
    device: &CudaDevice,
    of: Codes,
    (rows, outputs, inputs): (usize, usize, usize),
    dtype: DType,
) -> Result<()> {
    let product = cuda::w8a8_name(dtype, Epilogue::None)?;
    let kernel = format!("{}_{product}", cuda::quantize_name(of, dtype)?);
    let mut x = values(rows * inputs, 41, dtype);
    if rows > 2 {
        // A row of zeros, and one with no number in it.
        x[..inputs].fill(0.);
        x[2 * inputs - 1] = f32::NAN;
    }
    let codes = codes(outputs * inputs);
    // So small that f16 holds the outputs, and can be.
    let scales: Vec<f32> = values(outputs, 43, DType::F32).iter().map(|s| s / 256.).collect();
    let bias = values(outputs, 47, dtype);
    // They begin at a multiple of 16 bytes, or not.
    let place = |values: &[f32], skipped: usize, shape: &[usize], dtype| {
        let all = [&vec![0.; skipped], values].concat();
        on(device, &all, dtype)?.narrow(0, skipped, values.len())?.reshape(shape)
    };
    let shape = (rows, outputs);
    for biased in [false, true] {
        let bias = biased.then_some(bias.as_slice());
        let run = |skipped, by| {
            let x = place(&x, skipped, &[rows, inputs], dtype)?;
            let bytes = [&vec![0; skipped], codes.as_slice()].concat();
            let codes = Tensor::new(bytes.as_slice(), &Device::Cpu)?;
            let codes = codes.to_device(&Device::Cuda(device.clone()))?;
            let codes = codes.narrow(0, skipped, outputs * inputs)?;
            let codes = codes.reshape((outputs, inputs))?;
            let scales = place(&scales, skipped, &[outputs, 1], DType::F32)?;
            let bias = bias.map(|bias| place(bias, skipped, &[outputs], dtype)).transpose()?;
            let y = cuda::w8a8_of(&x.into(), (of, &codes), &scales, bias.as_ref(), by)?;
            y.as_ref().map(back).transpose()
        };
        let turned = turned(of, &x, inputs);
        let expected = multiplied_in_int8(&turned, &codes, &scales, bias, inputs, dtype);
        // The input as the codes that become of it.
        let (made, of_rows) = quantized(&turned, inputs);
        let made: Vec<u8> = made.iter().map(|&code| code as u8).collect();
        let of_codes = || {
            let read = coded(device, of, (&made, &of_rows), inputs, dtype)?;
            let there = Tensor::new(codes.as_slice(), &Device::Cpu)?;
            let there = there.to_device(&Device::Cuda(device.clone()))?;
            let there = there.reshape((outputs, inputs))?;
            let scales = place(&scales, 0, &[outputs, 1], DType::F32)?;
            let bias = bias.map(|bias| place(bias, 0, &[outputs], dtype)).transpose()?;
            let by = Int8Kernel::Fastest;
            cuda::w8a8_of(&read, (of, &there), &scales, bias.as_ref(), by)?
                .as_ref()
                .map(back)
                .transpose()
        };
        if let Some(found) = of_codes().map_err(|error| not_run(&kernel, shape, error))? {
            compare(&kernel, shape, &expected, &found)?;
        }
        for (skipped, by) in
            [(0, Int8Kernel::Fastest), (1, Int8Kernel::Fastest), (0, Int8Kernel::Mma)]
        {
            let found = run(skipped, by).map_err(|error| not_run(&kernel, shape, error))?;
            match found {
                Some(found) => compare(&kernel, shape, &expected, &found)?,
                None if inputs % 16 != 0 => {}
                None => {
                    let error = candle_core::Error::msg("no kernel takes this shape");
                    return Err(not_run(&kernel, shape, error));
                }
            }
        }
    }
    Ok(())
}

/// Runs a product that goes into columns of an output, which `write` gets, and holds it to what it should be nearly; what lies
/// beside must stay as it is. Returns all of the output, if the product is there.
fn into_columns(
    device: &CudaDevice,
    kernel: &str,
    &Activated { rows, y: (width, column, outputs), .. }: &Activated,
    dtype: DType,
    expected: &[(f32, f32)],
    write: impl Fn(&Tensor) -> candle_core::Result<bool>,
) -> Result<Option<Vec<f32>>> {
    let before = values(rows * width, 37, dtype);
    let run = || {
        let y = on(device, &before, dtype)?.reshape((rows, width))?;
        let done = write(&y.narrow(1, column, outputs)?)?;
        done.then(|| back(&y)).transpose()
    };
    let run = || run().map_err(|error| not_run(kernel, (rows, width), error));
    let Some(found) = run()? else { return Ok(None) };
    let mut all: Vec<(f32, f32)> = before.iter().map(|&y| (y, 0.)).collect();
    for (to, from) in all.chunks_exact_mut(width).zip(expected.chunks_exact(outputs)) {
        to[column..column + outputs].copy_from_slice(from);
    }
    compare_near(kernel, (rows, width), &all, &found)?;
    compare(kernel, (rows, width), &found, &run()?.unwrap_or_default())?;
    Ok(Some(found))
}

/// Operands whose products lie where GELU bends: the input, a bias.
fn bending(of: &Activated, dtype: DType) -> (Vec<f32>, Vec<f32>) {
    let x = values(of.rows * of.inputs, 53, dtype).iter().map(|x| x / 256.).collect();
    (x, values(of.y.2, 59, dtype).iter().map(|b| b / 16.).collect())
}

pub(super) fn activated_product(device: &CudaDevice, of: &Activated, dtype: DType) -> Result<()> {
    let (outputs, inputs) = (of.y.2, of.inputs);
    let (x, bias) = bending(of, dtype);
    let w = values(outputs * inputs, 61, dtype);
    for biased in [false, true] {
        let kernel = cuda::product_name(dtype, biased, Epilogue::GeluTanh)?;
        let mut expected = multiplied(&x, &w, biased.then_some(&bias), inputs, dtype);
        activated(&mut expected, dtype);
        // Where nothing is offered the activation goes its own way.
        into_columns(device, &kernel, of, dtype, &expected, |y| {
            let x = on(device, &x, dtype)?.reshape((of.rows, inputs))?;
            let w = on(device, &w, dtype)?.reshape((outputs, inputs))?;
            let bias = biased.then(|| on(device, &bias, dtype)).transpose()?;
            cuda::product_into(&x, &w, bias.as_ref(), Epilogue::GeluTanh, y)
        })?;
    }
    Ok(())
}

/// Both kernels, which give each other's bits.
pub(super) fn activated_w8a8(device: &CudaDevice, of: &Activated, dtype: DType) -> Result<()> {
    let (outputs, inputs) = (of.y.2, of.inputs);
    let kernel = cuda::w8a8_name(dtype, Epilogue::GeluTanh)?;
    let (x, bias) = bending(of, dtype);
    let codes = codes(outputs * inputs);
    let scales: Vec<f32> = values(outputs, 67, DType::F32).iter().map(|s| s / 64.).collect();
    let sums = multiplied_in_int8(&x, &codes, &scales, Some(&bias), inputs, DType::F32);
    let mut expected: Vec<(f32, f32)> = sums.iter().map(|&v| (v, 1e-6 * v.abs())).collect();
    activated(&mut expected, dtype);
    let mut first: Option<Vec<f32>> = None;
    for by in [Int8Kernel::Fastest, Int8Kernel::Mma] {
        let found = into_columns(device, &kernel, of, dtype, &expected, |y| {
            let x = on(device, &x, dtype)?.reshape((of.rows, inputs))?;
            let codes = Tensor::new(codes.as_slice(), &Device::Cpu)?;
            let codes = codes.to_device(&Device::Cuda(device.clone()))?;
            let codes = codes.reshape((outputs, inputs))?;
            let scales = on(device, &scales, DType::F32)?.reshape((outputs, 1))?;
            let (bias, to) = (on(device, &bias, dtype)?, (Epilogue::GeluTanh, y));
            cuda::w8a8_into(&x.into(), (Codes::Int8, &codes), &scales, Some(&bias), to, by)
        })?;
        let error = || candle_core::Error::msg("no kernel takes this shape");
        let found = found.ok_or_else(|| not_run(&kernel, (of.rows, outputs), error()))?;
        match &first {
            Some(first) => compare(&kernel, (of.rows, of.y.0), first, &found)?,
            None => first = Some(found),
        }
    }
    Ok(())
}

pub(super) fn activated_fp8(device: &CudaDevice, of: &Activated, dtype: DType) -> Result<()> {
    let (outputs, inputs) = (of.y.2, of.inputs);
    let kernel = format!("{}_gelu", cuda::fp8_name(dtype)?);
    let (x, bias) = bending(of, dtype);
    // Codes of numbers.
    let codes: Vec<u8> =
        codes(outputs * inputs).into_iter().map(|c| if c & 0x7f == 0x7f { 0 } else { c }).collect();
    let scales: Vec<f32> = values(outputs, 67, DType::F32).iter().map(|s| s / 64.).collect();
    let weight = expanded(Codes::Fp8, &codes, inputs, &scales, DType::F32);
    let mut expected = multiplied_in_fp8(&x, &weight, Some(&bias), inputs, dtype);
    activated(&mut expected, dtype);
    into_columns(device, &kernel, of, dtype, &expected, |y| {
        let x = on(device, &x, dtype)?.reshape((of.rows, inputs))?;
        let codes = Tensor::new(codes.as_slice(), &Device::Cpu)?;
        let codes = codes.to_device(&Device::Cuda(device.clone()))?;
        let codes = codes.reshape((outputs, inputs))?;
        let scales = on(device, &scales, DType::F32)?.reshape((outputs, 1))?;
        let (bias, to) = (on(device, &bias, dtype)?, (Epilogue::GeluTanh, y));
        cuda::fp8_product_into(&x.into(), &codes, Some(&scales), Some(&bias), to)
    })?;
    Ok(())
}

/// The quantization to e4m3 gives the bits of its twin.
pub(super) fn quantize_fp8(
    device: &CudaDevice,
    (rows, inputs): (usize, usize),
    dtype: DType,
) -> Result<()> {
    let kernel = cuda::quantize_name(Codes::Fp8, dtype)?;
    let x = of_any_size(rows, inputs, dtype);
    let run = || {
        let made = cuda::coded(Codes::Fp8, &on(device, &x, dtype)?.reshape((rows, inputs))?)?;
        let codes = made.codes.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        Ok((codes, back(&made.scales)?))
    };
    let (codes, of_rows): (Vec<u8>, _) = run().map_err(|e| not_run(&kernel, (rows, inputs), e))?;
    let (expected, expected_scales) = quantized_to_fp8(&x, inputs);
    // Bytes as numbers, which a difference shows best.
    let numbers = |codes: &[u8]| codes.iter().map(|&code| f32::from(code)).collect::<Vec<_>>();
    compare(&kernel, (rows, inputs), &numbers(&expected), &numbers(&codes))?;
    compare(&kernel, (rows, 1), &expected_scales, &of_rows)
}

/// Values among which are small ones, a row of zeros and one with no number in it.
fn of_any_size(rows: usize, inputs: usize, dtype: DType) -> Vec<f32> {
    let mut x = values(rows * inputs, 41, dtype);
    for x in x.iter_mut().skip(3).step_by(7) {
        *x /= 1024.; // a power of two: exact in either dtype
    }
    if rows > 2 {
        x[..inputs].fill(0.);
        x[2 * inputs - 1] = f32::NAN;
    }
    x
}

/// The product in fp8 is as near as rounding allows, and has the same bits again and wherever operands lie.
pub(super) fn fp8(
    device: &CudaDevice,
    (rows, outputs, inputs): (usize, usize, usize),
    dtype: DType,
    scaled: bool,
) -> Result<()> {
    let kernel = cuda::fp8_name(dtype)?;
    let x = of_any_size(rows, inputs, dtype);
    // Codes of numbers, so small that f16 holds the outputs, and can be.
    let codes: Vec<u8> =
        codes(outputs * inputs).into_iter().map(|c| if c & 0x7f == 0x7f { 0 } else { c }).collect();
    let small = || values(outputs, 43, DType::F32).iter().map(|s| s / 4096.).collect();
    let (codes, scales): (Vec<u8>, Vec<f32>) = match scaled {
        true => (codes, small()),
        // Without scales codes alone are so small: the exponent's upper bit is cleared.
        false => (codes.into_iter().map(|c| c & 0xbf).collect(), vec![1.; outputs]),
    };
    let bias = values(outputs, 47, dtype);
    let weight = expanded(Codes::Fp8, &codes, inputs, &scales, DType::F32);
    let place = |values: &[f32], skipped: usize, shape: &[usize], dtype| {
        let all = [&vec![0.; skipped], values].concat();
        on(device, &all, dtype)?.narrow(0, skipped, values.len())?.reshape(shape)
    };
    let shape = (rows, outputs);
    for biased in [false, true] {
        let bias = biased.then_some(bias.as_slice());
        let run = |skipped| {
            let x = place(&x, skipped, &[rows, inputs], dtype)?;
            let bytes = [&vec![0; skipped], codes.as_slice()].concat();
            let codes = Tensor::new(bytes.as_slice(), &Device::Cpu)?;
            let codes = codes.to_device(&Device::Cuda(device.clone()))?;
            let codes = codes.narrow(0, skipped, outputs * inputs)?;
            let codes = codes.reshape((outputs, inputs))?;
            let scales = place(&scales, skipped, &[outputs, 1], DType::F32)?;
            let bias = bias.map(|bias| place(bias, skipped, &[outputs], dtype)).transpose()?;
            let y = cuda::fp8_product(&x, &codes, scaled.then_some(&scales), bias.as_ref())?;
            back(&y.ok_or_else(|| candle_core::Error::msg("nothing takes this shape"))?)
        };
        let run = |skipped| run(skipped).map_err(|error| not_run(&kernel, shape, error));
        let found = run(0)?;
        let expected = multiplied_in_fp8(&x, &weight, bias, inputs, dtype);
        compare_near(&kernel, shape, &expected, &found)?;
        // The same of the input as the codes that become of it.
        let (made, of_rows) = quantized_to_fp8(&x, inputs);
        let of_codes = || {
            let read = coded(device, Codes::Fp8, (&made, &of_rows), inputs, dtype)?;
            let there = Tensor::new(codes.as_slice(), &Device::Cpu)?;
            let there = there.to_device(&Device::Cuda(device.clone()))?;
            let there = there.reshape((outputs, inputs))?;
            let scales = place(&scales, 0, &[outputs, 1], DType::F32)?;
            let bias = bias.map(|bias| place(bias, 0, &[outputs], dtype)).transpose()?;
            let scales = scaled.then_some(&scales);
            let y = cuda::fp8_product_of(&read, &there, scales, bias.as_ref())?;
            back(&y.ok_or_else(|| candle_core::Error::msg("nothing takes these codes"))?)
        };
        let again = of_codes().map_err(|error| not_run(&kernel, shape, error))?;
        compare(&kernel, shape, &found, &again)?;
        for skipped in [0, 1] {
            compare(&kernel, shape, &found, &run(skipped)?)?;
        }
    }
    Ok(())
}

/// Rows as codes and scales on the GPU.
fn coded(
    device: &CudaDevice,
    of: Codes,
    (codes, scales): (&[u8], &[f32]),
    inputs: usize,
    dtype: DType,
) -> candle_core::Result<Input> {
    let rows = scales.len();
    let codes = Tensor::new(codes, &Device::Cpu)?.to_device(&Device::Cuda(device.clone()))?;
    let (codes, scales) = (codes.reshape((rows, inputs))?, on(device, scales, DType::F32)?);
    let (scales, dims) = (scales.reshape((rows, 1))?, vec![rows, inputs]);
    Ok(Input::Codes(CodedRows { of, codes, scales, dtype, dims }))
}

/// `values` in `dtype` on the GPU. They are converted on the CPU, so that no kernel but the tested one runs.
fn on(device: &CudaDevice, values: &[f32], dtype: DType) -> candle_core::Result<Tensor> {
    let values = Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?;
    values.to_device(&Device::Cuda(device.clone()))
}

fn back(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    let tensor = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    tensor.flatten_all()?.to_vec1()
}

fn not_run(kernel: &str, shape: (usize, usize), error: candle_core::Error) -> Error {
    error.context(format!("kernel `{kernel}` on {shape:?} does not run")).into()
}
