//! Three-dimensional convolution that looks back in time only.
//!
//! An output frame sees as many input frames as the kernel has taps in time. Side by side these are
//! the channels of one two-dimensional convolution, whose weight is the stored one read as
//! `[outputs, inputs · taps, kernel, kernel]`. So a frame is one product per strip, no sums over taps
//! are kept, and what is held beside input and output is `taps` input frames and the strip.

use candle_core::{Result, Tensor};
use mmgp_quant::Weights;

use crate::nn::{Conv2d, Window, contiguous};

/// A convolution with bias over frames, of stride 1 in time.
#[derive(Debug)]
pub struct Conv3d {
    weight: Tensor,
    bias: Tensor,
    taps: usize,
    window: Window,
}

impl Conv3d {
    /// Asks for `weight` `[outputs, inputs, taps, kernel, kernel]` and `bias` `[outputs]`; `window`
    /// is what the kernel does within a frame.
    ///
    /// # Errors
    /// No taps; a tensor that is missing or has another shape.
    pub fn new(
        weights: &Weights,
        inputs: usize,
        outputs: usize,
        taps: usize,
        window: Window,
    ) -> mmgp_quant::Result<Self> {
        if taps == 0 {
            let name = weights.prefix();
            return Err(mmgp_quant::Error::Invalid(format!("convolution `{name}`: no taps")));
        }
        let shape = [outputs, inputs, taps, window.kernel, window.kernel];
        let weight = weights.tensor(&shape, "weight")?;
        Ok(Self { weight, bias: weights.tensor(&[outputs], "bias")?, taps, window })
    }

    /// `[batch, inputs, frames, height, width]` to `[batch, outputs, frames, …]`. An output frame
    /// sees its own input frame and the `taps − 1` before it. `past` holds those before the first,
    /// as [`past`](Self::past) gave them for the frames before; without it the first frame stands
    /// for each of them. Frames have the same bits in whichever portions they come.
    ///
    /// # Errors
    /// Another number of channels, no frames, a `past` that does not fit, frames smaller than the
    /// kernel; weights that are not leased.
    pub fn forward(&self, x: &Tensor, past: Option<&Tensor>) -> Result<Tensor> {
        let (batch, inputs, frames, height, width) = x.dims5()?;
        let (outputs, expected, taps, kernel, _) = self.weight.dims5()?;
        if inputs != expected || frames == 0 {
            candle_core::bail!("conv3d: {:?} given to {:?}", x.dims(), self.weight.dims());
        }
        let weight = self.weight.reshape((outputs, inputs * taps, kernel, kernel))?;
        let conv = Conv2d::over(weight, self.bias.clone(), self.window);
        let mut out: Option<Tensor> = None;
        for frame in 0..frames {
            let seen = self.frames(x, past, frame, taps)?;
            let y = conv.forward(&seen.reshape((batch, inputs * taps, height, width))?)?;
            drop(seen);
            let y = contiguous(&y.unsqueeze(2)?)?;
            if frames == 1 {
                return Ok(y);
            }
            let out = match &out {
                Some(out) => out,
                None => {
                    let (.., height, width) = y.dims5()?;
                    let shape = (batch, outputs, frames, height, width);
                    out.insert(Tensor::zeros(shape, y.dtype(), y.device())?)
                }
            };
            out.slice_set(&y, 2, frame)?;
        }
        out.ok_or_else(|| candle_core::Error::Msg("conv3d: no frames".into()))
    }

    /// What [`forward`](Self::forward) needs of `x`, and of `past` before it, for the frames that
    /// follow: `[batch, inputs, taps − 1, height, width]` in memory of its own, `None` of one tap.
    ///
    /// # Errors
    /// Those of `forward`.
    pub fn past(&self, x: &Tensor, past: Option<&Tensor>) -> Result<Option<Tensor>> {
        match self.taps - 1 {
            0 => Ok(None),
            count => self.frames(x, past, x.dim(2)?, count)?.copy().map(Some),
        }
    }

    /// `count` frames from `from` on, counted from the first of `past`.
    fn frames(
        &self,
        x: &Tensor,
        past: Option<&Tensor>,
        from: usize,
        count: usize,
    ) -> Result<Tensor> {
        let before = self.taps - 1;
        if let Some(past) = past {
            let mut dims = x.dims().to_vec();
            dims[2] = before;
            if past.dims() != dims {
                candle_core::bail!("conv3d: {:?} before {:?}", past.dims(), x.dims());
            }
        }
        if from >= before {
            return contiguous(&x.narrow(2, from - before, count)?);
        }
        let old = before.min(from + count) - from;
        let old = match past {
            Some(past) => past.narrow(2, from, old)?,
            None => {
                let (batch, inputs, _, height, width) = x.dims5()?;
                x.narrow(2, 0, 1)?.broadcast_as((batch, inputs, old, height, width))?
            }
        };
        match count - old.dim(2)? {
            0 => contiguous(&old),
            new => {
                let new = contiguous(&x.narrow(2, 0, new)?)?;
                Tensor::cat(&[&contiguous(&old)?, &new], 2)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};
    use mmgp_quant::MemorySource;

    use super::*;

    type Volume = Vec<Vec<Vec<Vec<f32>>>>; // [channels][frames][height][width]

    fn volume(t: &Tensor) -> Result<Volume> {
        (0..t.dim(0)?).map(|c| t.get(c)?.to_vec3()).collect()
    }

    /// The definition, in f64: the first frame stands for those before it, zeros around a frame.
    fn plain(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (batch, inputs, frames, height, width) = x.dims5()?;
        let (outputs, _, taps, kernel, _) = weight.dims5()?;
        let bias = bias.to_vec1::<f32>()?;
        let mut values = Vec::new();
        for item in 0..batch {
            let x = volume(&x.get(item)?)?;
            for (o, bias) in bias.iter().enumerate() {
                let weight = volume(&weight.get(o)?)?;
                for at in 0..frames * height * width {
                    let (t, y, z) = (at / (height * width), at / width % height, at % width);
                    let mut sum = f64::from(*bias);
                    for k in 0..inputs * taps * kernel * kernel {
                        let (c, dt) = (k / (taps * kernel * kernel), k / (kernel * kernel) % taps);
                        let (dy, dz) = (k / kernel % kernel, k % kernel);
                        let t = (t + dt).saturating_sub(taps - 1);
                        let row = (y + dy).checked_sub(kernel / 2).and_then(|y| x[c][t].get(y));
                        let column = (z + dz).checked_sub(kernel / 2);
                        let value = row.zip(column).and_then(|(row, z)| row.get(z));
                        let value = value.copied().unwrap_or(0.);
                        sum += f64::from(value) * f64::from(weight[c][dt][dy][dz]);
                    }
                    values.push(sum as f32);
                }
            }
        }
        Tensor::from_vec(values, (batch, outputs, frames, height, width), &Device::Cpu)
    }

    fn random(inputs: usize, outputs: usize, taps: usize, window: Window) -> Result<Conv3d> {
        let (dev, kernel) = (Device::Cpu, window.kernel);
        let weight = Tensor::randn(0f32, 1., (outputs, inputs, taps, kernel, kernel), &dev)?;
        let source = MemorySource::new(&dev)
            .with("weight", weight)
            .with("bias", Tensor::randn(0f32, 1., outputs, &dev)?);
        Conv3d::new(&Weights::new(source), inputs, outputs, taps, window)
            .map_err(candle_core::Error::wrap)
    }

    #[test]
    fn frames_equal_the_definition_in_any_portions() -> Result<()> {
        let shapes =
            [(1, 3, 4, 5, 4, 6), (2, 2, 3, 1, 3, 2), (1, 4, 1, 7, 1, 5), (2, 1, 2, 2, 5, 1)];
        for (batch, inputs, outputs, frames, height, width) in shapes {
            for (taps, window) in
                [(3, Window::SAME), (1, Window::POINT), (2, Window::SAME), (4, Window::POINT)]
            {
                let conv = random(inputs, outputs, taps, window)?;
                let shape = (batch, inputs, width, height, frames);
                let x = Tensor::randn(0f32, 1., shape, &Device::Cpu)?.transpose(2, 4)?;
                let want = plain(&x, &conv.weight, &conv.bias)?;
                let whole = conv.forward(&x, None)?;
                assert_eq!(whole.dims(), want.dims());
                let worst = (&whole - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(worst < 2e-5, "{:?} {taps} {window:?}: {worst}", x.dims()); // of up to 30
                for portion in 1..frames {
                    let (mut past, mut parts) = (None, Vec::new());
                    for from in (0..frames).step_by(portion) {
                        let x = x.narrow(2, from, portion.min(frames - from))?;
                        parts.push(conv.forward(&x, past.as_ref())?);
                        past = conv.past(&x, past.as_ref())?;
                    }
                    let bits = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
                    assert_eq!(bits(&Tensor::cat(&parts, 2)?)?, bits(&whole)?, "{portion}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let conv = random(2, 3, 3, Window::SAME)?;
        let zeros =
            |c: usize, t: usize, w: usize| Tensor::zeros((1, c, t, 4, w), DType::F32, &Device::Cpu);
        let x = zeros(2, 2, 5)?;
        assert!(conv.forward(&x, Some(&zeros(2, 2, 5)?)).is_ok());
        for past in [zeros(2, 3, 5)?, zeros(2, 2, 4)?, zeros(1, 2, 5)?] {
            assert!(conv.forward(&x, Some(&past)).is_err());
            assert!(conv.past(&x, Some(&past)).is_err());
        }
        assert!(conv.forward(&zeros(3, 2, 5)?, None).is_err());
        Ok(())
    }
}
