//! Scale and shift from a coarser grid, with SiLU behind them.
//!
//! The decoders of some video VAEs scale and shift each pixel by values that the latents give. These
//! stay on the latents' grid: what a pixel needs is looked up where it is used.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use crate::nn::{activation::silu, cpu, norms::is_f32_cpu};

/// `silu(x · scale + shift)` in the memory of `x` `[batch, channels, frames, height, width]`, which
/// must be the caller's own. `scale` and `shift` are `[batch, channels, t, h, w]`; frame `i` of `x`
/// takes their frame `frames[i]`, and within a frame each of their values covers
/// `height / h × width / w` pixels (nearest neighbour).
///
/// # Errors
/// Shapes that do not fit: other channels, a size that is no multiple, a frame that is not there.
pub fn spread_affine_silu(
    x: Tensor,
    scale: &Tensor,
    shift: &Tensor,
    frames: &[usize],
) -> Result<Tensor> {
    let (batch, channels, count, height, width) = x.dims5()?;
    let (of_batch, of_channels, coarse, h, w) = scale.dims5()?;
    let fits = (of_batch, of_channels, count) == (batch, channels, frames.len())
        && shift.dims() == scale.dims()
        && frames.iter().all(|&frame| frame < coarse)
        && [h, w].iter().all(|&n| n > 0)
        && height.is_multiple_of(h)
        && width.is_multiple_of(w);
    if !fits {
        candle_core::bail!("{:?} scaled by {:?}, frames {frames:?}", x.dims(), scale.dims());
    }
    let x = x.contiguous()?;
    if x.elem_count() == 0 {
        return Ok(x);
    }
    if !is_f32_cpu(&x) {
        return composed(x, scale, shift, frames);
    }
    let (tall, wide) = (height / h, width / w);
    let plane = |i: usize, x: &mut [f32], scale: &[f32], shift: &[f32]| {
        let at = (i / count * coarse + frames[i % count]) * h * w;
        for (y, line) in x.chunks_exact_mut(width).enumerate() {
            let at = at + y / tall * w;
            let values = scale[at..at + w].iter().zip(&shift[at..at + w]);
            for (x, (scale, shift)) in line.chunks_exact_mut(wide).zip(values) {
                x.iter_mut().for_each(|v| *v = silu(*v * scale + shift));
            }
        }
    };
    cpu::read(&scale.contiguous()?, |scale| {
        cpu::read(&shift.contiguous()?, |shift| {
            cpu::update(&x, |x| {
                let planes = x.par_chunks_exact_mut(height * width).enumerate();
                planes.for_each(|(i, x)| plane(i, x, scale, shift));
            })
        })
    })?;
    Ok(x)
}

/// The same frame by frame.
fn composed(x: Tensor, scale: &Tensor, shift: &Tensor, frames: &[usize]) -> Result<Tensor> {
    let (_, _, _, height, width) = x.dims5()?;
    let large = |t: &Tensor, frame: usize| {
        t.narrow(2, frame, 1)?.squeeze(2)?.contiguous()?.upsample_nearest2d(height, width)
    };
    for (i, &frame) in frames.iter().enumerate() {
        let y = x.narrow(2, i, 1)?.squeeze(2)?.contiguous()?;
        let y = ((y * large(scale, frame)?)? + large(shift, frame)?)?.silu()?;
        x.slice_set(&y.unsqueeze(2)?.contiguous()?, 2, i)?;
    }
    Ok(x)
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    #[test]
    fn kernel_and_operations_equal_the_definition() -> Result<()> {
        let dev = Device::Cpu;
        let rand = |s: &[usize]| Tensor::randn(0f32, 1., s, &dev);
        let x = rand(&[2, 3, 4, 4, 9])?;
        let (scale, shift) = (rand(&[2, 3, 3, 2, 3])?, rand(&[2, 3, 3, 2, 3])?);
        let frames = [0, 2, 2, 1];
        let at = |t: &Tensor, at: [usize; 5]| -> Result<f32> {
            at.iter().try_fold(t.clone(), |t, &i| t.get(i))?.to_scalar()
        };
        let mut want = Vec::new();
        for i in 0..x.elem_count() {
            let [b, c, t] = [i / (3 * 4 * 36), i / (4 * 36) % 3, i / 36 % 4];
            let (row, column) = (i / 9 % 4, i % 9);
            let coarse = [b, c, frames[t], row / 2, column / 3];
            let v = at(&x, [b, c, t, row, column])?;
            let v = v * at(&scale, coarse)? + at(&shift, coarse)?;
            want.push(v / (1. + (-v).exp()));
        }
        let want = Tensor::from_vec(want, x.dims(), &dev)?;
        for got in [
            spread_affine_silu(x.copy()?, &scale, &shift, &frames)?,
            composed(x.copy()?, &scale, &shift, &frames)?,
        ] {
            let worst = (got - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(worst < 2e-6, "{worst}");
        }
        let half = |t: &Tensor| t.to_dtype(DType::BF16);
        let got = spread_affine_silu(half(&x)?, &half(&scale)?, &half(&shift)?, &frames)?;
        let worst = (got.to_dtype(DType::F32)? - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(worst < 0.1, "{worst}"); // 2⁻⁸ of values up to 8, four times rounded
        for (x, frames) in
            [(&x, &[0, 1, 2, 3][..]), (&x, &[0][..]), (&rand(&[2, 3, 4, 4, 8])?, &frames)]
        {
            assert!(spread_affine_silu(x.copy()?, &scale, &shift, frames).is_err());
        }
        Ok(())
    }
}
