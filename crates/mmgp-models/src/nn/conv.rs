//! Two-dimensional convolution with few temporaries.
//!
//! On the CPU a strip of output rows at a time is gathered into columns and multiplied: the weight
//! needs no copy, bias and a nearest-neighbour doubling of the input cost no pass of their own, and
//! what is held beside input and output stays near 16 MiB. On GPUs strips are cuDNN's, where that is installed, else
//! the tensor library's.

use candle_core::{DType, Result, Tensor};
use mmgp_quant::Weights;
use rayon::prelude::*;

use crate::nn::{add, cpu};

/// Gathered values that are held at once: 16 MiB in f32.
const COLUMNS: usize = 4 << 20;

/// Gathered values that are held at once on other devices: 128 MiB in bf16.
const STRIP: usize = 64 << 20;

/// What stands around an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Padding {
    /// Zeros.
    Zeros,
    /// The nearest pixel of the input.
    Nearest,
}

/// How a kernel moves over its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Kernel height and width.
    pub kernel: usize,
    /// Step between outputs, in input rows and columns.
    pub stride: usize,
    /// Rows above and columns left of the input.
    pub before: usize,
    /// Rows below and columns right of the input.
    pub after: usize,
    /// Each input pixel is first repeated so many times in both directions.
    pub repeat: usize,
    /// What those rows and columns hold.
    pub padding: Padding,
}

impl Window {
    /// A 1 × 1 kernel.
    pub const POINT: Self = Self { kernel: 1, before: 0, after: 0, ..Self::SAME };
    /// A 3 × 3 kernel that keeps the size.
    pub const SAME: Self =
        Self { kernel: 3, stride: 1, before: 1, after: 1, repeat: 1, padding: Padding::Zeros };
    /// A 3 × 3 kernel that halves the size, padded below and right only, as in the encoders of
    /// latent diffusion.
    pub const HALVE: Self = Self { stride: 2, before: 0, ..Self::SAME };
    /// Nearest-neighbour doubling, then a 3 × 3 kernel.
    pub const DOUBLE: Self = Self { repeat: 2, ..Self::SAME };

    /// The same with the nearest pixels around the input.
    #[must_use]
    pub const fn nearest(self) -> Self {
        Self { padding: Padding::Nearest, ..self }
    }

    fn output(self, input: usize) -> Option<usize> {
        let padded = input.checked_mul(self.repeat)? + self.before + self.after;
        Some(padded.checked_sub(self.kernel)? / self.stride + 1)
    }
}

/// How many output rows [`Conv2d`] makes at a time on the CPU: as many as keep the gathered columns,
/// `inputs · kernel² · rows · width`, at most 2²², at least one.
pub fn strip_rows(inputs: usize, window: Window, width: usize) -> usize {
    let row = inputs.saturating_mul(window.kernel * window.kernel).saturating_mul(width);
    (COLUMNS / row.max(1)).max(1)
}

/// A convolution with bias.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    window: Window,
}

impl Conv2d {
    /// Asks for `weight` `[outputs, inputs, kernel, kernel]` and `bias` `[outputs]`.
    ///
    /// # Errors
    /// A tensor that is missing or has another shape.
    pub fn new(
        weights: &Weights,
        inputs: usize,
        outputs: usize,
        window: Window,
    ) -> mmgp_quant::Result<Self> {
        let shape = [outputs, inputs, window.kernel, window.kernel];
        let weight = weights.tensor(&shape, "weight")?;
        Ok(Self { weight, bias: weights.tensor(&[outputs], "bias")?, window })
    }

    /// One over tensors that are leased: `weight` `[outputs, inputs, kernel, kernel]` and `bias`
    /// `[outputs]`.
    pub(super) fn over(weight: Tensor, bias: Tensor, window: Window) -> Self {
        Self { weight, bias, window }
    }

    /// `[batch, inputs, height, width]` to `[batch, outputs, …]`.
    ///
    /// # Errors
    /// Another number of channels, an input smaller than the kernel; weights that are not leased.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, inputs, height, width) = x.dims4()?;
        let (outputs, expected, ..) = self.weight.dims4()?;
        let window = self.window;
        let (Some(out_h), Some(out_w)) = (window.output(height), window.output(width)) else {
            candle_core::bail!("conv2d: {window:?} over {:?}", x.dims());
        };
        if inputs != expected || height == 0 || width == 0 {
            candle_core::bail!("conv2d: {:?} given to {:?}", x.dims(), self.weight.dims());
        }
        #[cfg(feature = "cuda")]
        if let Some(y) =
            crate::nn::cuda::convolution(x, [&self.weight, &self.bias], window, (out_h, out_w))?
        {
            return Ok(y);
        }
        if !x.device().is_cpu() || x.dtype() != DType::F32 {
            return self.composed(x, (out_h, out_w), STRIP);
        }
        let x = x.contiguous()?;
        let taps = inputs * window.kernel * window.kernel;
        let weight = self.weight.reshape((outputs, taps))?;
        let mut out = vec![0f32; batch * outputs * out_h * out_w];
        let strip = strip_rows(inputs, window, out_w);
        for item in 0..batch {
            let out = &mut out[item * outputs * out_h * out_w..][..outputs * out_h * out_w];
            for from in (0..out_h).step_by(strip) {
                let rows = strip.min(out_h - from);
                let mut columns = vec![0f32; taps * rows * out_w];
                cpu::read(&x, |x| {
                    let x = &x[item * inputs * height * width..][..inputs * height * width];
                    gather(x, (height, width), window, from, (rows, out_w), &mut columns);
                    Ok(())
                })?;
                let y = weight.matmul(&cpu::tensor(columns, (taps, rows * out_w))?)?;
                cpu::read(&y, |y| {
                    cpu::read(&self.bias, |bias| {
                        let planes = out.par_chunks_exact_mut(out_h * out_w);
                        planes.zip(y.par_chunks_exact(rows * out_w)).zip(bias).for_each(
                            |((out, y), bias)| {
                                let out = &mut out[from * out_w..][..rows * out_w];
                                out.iter_mut().zip(y).for_each(|(o, y)| *o = y + bias);
                            },
                        );
                        Ok(())
                    })
                })?;
            }
        }
        cpu::tensor(out, (batch, outputs, out_h, out_w))
    }

    /// A strip of output rows at a time, of which the gathered columns have at most `limit` values
    /// if a row has not more: strips read the rows that they need, and see padding only where the
    /// picture ends, so that no seam shows.
    fn composed(&self, x: &Tensor, (out_h, out_w): (usize, usize), limit: usize) -> Result<Tensor> {
        let Window { kernel, stride, before, after, repeat, padding } = self.window;
        let (batch, inputs, height, width) = x.dims4()?;
        let outputs = self.weight.dim(0)?;
        let bias = self.bias.reshape((1, (), 1, 1))?;
        let tall = height * repeat;
        let row = batch.saturating_mul(inputs * kernel * kernel).saturating_mul(out_w);
        let strip = (limit / row.max(1)).clamp(1, out_h);
        let out = Tensor::zeros((batch, outputs, out_h, out_w), x.dtype(), x.device())?;
        for from in (0..out_h).step_by(strip) {
            let rows = strip.min(out_h - from);
            // The rows that it sees, counted in the padded input.
            let (first, last) = (from * stride, (from + rows - 1) * stride + kernel);
            let above = before.saturating_sub(first);
            let top = first.saturating_sub(before).min(tall - 1);
            let bottom = last.saturating_sub(before).clamp(top + 1, tall);
            let below = (last - first) - above - (bottom - top);
            let (low, high) = (top / repeat, bottom.div_ceil(repeat));
            let mut x = x.narrow(2, low, high - low)?.contiguous()?;
            if repeat > 1 {
                x = x.upsample_nearest2d((high - low) * repeat, width * repeat)?;
                x = x.narrow(2, top - low * repeat, bottom - top)?;
            }
            let pad = |x: &Tensor, dim: usize, before: usize, after: usize| match padding {
                Padding::Zeros => x.pad_with_zeros(dim, before, after),
                Padding::Nearest => x.pad_with_same(dim, before, after),
            };
            let x = pad(&pad(&x, 2, above, below)?, 3, before, after)?.contiguous()?;
            let y = match (kernel, stride) {
                (1, 1) => self.product(&x)?,
                _ => x.conv2d(&self.weight, 0, stride, 1, 1)?,
            };
            let y = add(&y, &bias)?;
            if rows == out_h {
                return Ok(y);
            }
            out.slice_set(&y.contiguous()?, 2, from)?;
        }
        Ok(out)
    }

    /// A 1 × 1 kernel over `[batch, inputs, rows, width]`, item by item.
    fn product(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, inputs, rows, width) = x.dims4()?;
        let weight = self.weight.reshape(((), inputs))?;
        let item = |i: usize| weight.matmul(&x.get(i)?.reshape((inputs, rows * width))?);
        let items = (0..batch).map(item).collect::<Result<Vec<_>>>()?;
        Tensor::stack(&items, 0)?.reshape((batch, (), rows, width))
    }
}

/// Fills `columns` `[inputs · kernel², rows · out_w]`, zeroed, with what each tap of the kernel sees
/// at output rows `from..from + rows`; `x` is `[inputs, height, width]`.
fn gather(
    x: &[f32],
    (height, width): (usize, usize),
    window: Window,
    from: usize,
    (rows, out_w): (usize, usize),
    columns: &mut [f32],
) {
    let Window { kernel, stride, before, repeat, padding, .. } = window;
    // The first output column whose tap `k` lies inside, and the one behind the last.
    let inside = |k: usize| {
        let first = before.saturating_sub(k).div_ceil(stride);
        let last = (width * repeat + before).saturating_sub(k).div_ceil(stride).min(out_w);
        (first.min(last), last)
    };
    columns.par_chunks_exact_mut(rows * out_w).enumerate().for_each(|(tap, column)| {
        let (channel, ky, kx) = (tap / (kernel * kernel), tap / kernel % kernel, tap % kernel);
        let plane = &x[channel * height * width..][..height * width];
        let (first, last) = inside(kx);
        for (row, line) in column.chunks_exact_mut(out_w).enumerate() {
            let y = ((from + row) * stride + ky).checked_sub(before);
            let y = match (y.filter(|&y| y < height * repeat), padding) {
                (Some(y), _) => y,
                (None, Padding::Nearest) => y.map_or(0, |_| height * repeat - 1),
                (None, Padding::Zeros) => continue,
            };
            let source = &plane[y / repeat * width..][..width];
            if padding == Padding::Nearest {
                line[..first].fill(source[0]);
                line[last..].fill(source[width - 1]);
            }
            if first == last {
                continue;
            }
            let start = first * stride + kx - before;
            let line = &mut line[first..last];
            if stride == 1 && repeat == 1 {
                line.copy_from_slice(&source[start..start + line.len()]);
            } else {
                for (i, v) in line.iter_mut().enumerate() {
                    *v = source[(start + i * stride) / repeat];
                }
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use mmgp_quant::MemorySource;

    use super::*;

    #[test]
    fn strips_equal_the_library_at_batch_two() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let windows = [Window::POINT, Window::SAME, Window::HALVE, Window::DOUBLE];
        for window in windows.into_iter().flat_map(|window| [window, window.nearest()]) {
            for (h, w) in [(7, 5), (1, 9), (6, 4), (2, 1)] {
                let source = MemorySource::new(&dev)
                    .with("weight", rand(&[4, 3, window.kernel, window.kernel])?)
                    .with("bias", rand(&[4])?);
                let conv = Conv2d::new(&Weights::new(source), 3, 4, window)?;
                let x = rand(&[2, 3, w, h])?.transpose(2, 3)?;
                if window.output(h).is_none() || window.output(w).is_none() {
                    assert!(conv.forward(&x).is_err());
                    continue;
                }
                let size = (window.output(h).unwrap_or(0), window.output(w).unwrap_or(0));
                let (got, want) = (conv.forward(&x)?, conv.composed(&x, size, STRIP)?);
                let row = 2 * 3 * window.kernel * window.kernel * size.1;
                for rows in [1, 2, 3] {
                    let strips = conv.composed(&x, size, rows * row)?;
                    let worst = (strips - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    // Sums of 27 products of about 1 in another order; a seam would be about 1.
                    assert!(worst < 1e-5, "{window:?} {h}x{w} in strips of {rows}: {worst}");
                }
                assert_eq!(got.dims(), want.dims(), "{window:?}");
                let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(worst < 1e-5, "{window:?} {h}x{w} {worst}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_nearest_pixels_stand_around() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let source =
            MemorySource::new(&dev).with("weight", rand(&[2, 3, 3, 3])?).with("bias", rand(&[2])?);
        let weights = Weights::new(source);
        let x = rand(&[1, 3, 4, 5])?;
        let spread = |of: usize| {
            let at: Vec<u32> = (0..of as u32 + 2).map(|i| i.clamp(1, of as u32) - 1).collect();
            Tensor::from_vec(at, of + 2, &dev)
        };
        let wide = x.index_select(&spread(4)?, 2)?.index_select(&spread(5)?, 3)?;
        let inside = Window { before: 0, after: 0, ..Window::SAME };
        let want = Conv2d::new(&weights, 3, 2, inside)?.forward(&wide)?;
        let got = Conv2d::new(&weights, 3, 2, Window::SAME.nearest())?.forward(&x)?;
        let worst = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 1e-6, "{worst}");
        Ok(())
    }

    #[test]
    fn several_strips_equal_one() -> mmgp_quant::Result<()> {
        let dev = Device::Cpu;
        let (h, w, c) = (40, 900, 16);
        assert!(strip_rows(c, Window::SAME, w) < h);
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let source =
            MemorySource::new(&dev).with("weight", rand(&[2, c, 3, 3])?).with("bias", rand(&[2])?);
        let conv = Conv2d::new(&Weights::new(source), c, 2, Window::SAME)?;
        let x = rand(&[1, c, h, w])?;
        let worst = (conv.forward(&x)? - conv.composed(&x, (h, w), STRIP)?)?
            .abs()?
            .max_all()?
            .to_scalar::<f32>()?;
        assert!(worst < 1e-4, "{worst}"); // of values up to 50
        Ok(())
    }
}
