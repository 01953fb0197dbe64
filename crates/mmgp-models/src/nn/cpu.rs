//! Reaching f32 data on the CPU from safe code, and the exponential that all kernels share.

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Shape, Storage, Tensor};
use rayon::prelude::*;

/// Elements below which a task is not worth a thread.
const GRAIN: usize = 1 << 14;

/// Runs `f` on the values of a contiguous f32 tensor on the CPU.
///
/// # Errors
/// A tensor that is on another device, of another dtype, strided, or not leased.
pub(crate) fn read<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<R>) -> Result<R> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("a CPU kernel was given a tensor of another device");
    };
    let all = storage.as_slice::<f32>()?;
    let values = layout.contiguous_offsets().and_then(|(from, to)| all.get(from..to));
    match values {
        Some(values) => f(values),
        None => candle_core::bail!("a CPU kernel was given a strided or unbound tensor"),
    }
}

/// Runs `f` on the values of a contiguous f32 tensor on the CPU, in place. The tensor must be an
/// intermediate of the caller's own: whoever shares its storage sees the change.
pub(crate) fn update(t: &Tensor, f: impl Fn(&mut [f32]) + Send + Sync) -> Result<()> {
    struct Update<F>(F);
    impl<F: Fn(&mut [f32]) + Send + Sync> InplaceOp1 for Update<F> {
        fn name(&self) -> &'static str {
            "update"
        }
        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let range = layout.contiguous_offsets();
            match (storage, range) {
                (CpuStorage::F32(all), Some((from, to))) if to <= all.len() => {
                    (self.0)(&mut all[from..to]);
                    Ok(())
                }
                _ => candle_core::bail!("a CPU kernel was given a strided or foreign tensor"),
            }
        }
    }
    t.inplace_op1(&Update(f))
}

/// A tensor over values that were just computed; no copy.
pub(crate) fn tensor(values: Vec<f32>, shape: impl Into<Shape>) -> Result<Tensor> {
    Tensor::from_vec(values, shape.into(), &Device::Cpu)
}

/// Calls `f(index, row)` for all rows of `width` values, in parallel; what a row holds before is
/// what `out` holds.
pub(crate) fn rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Send + Sync) {
    if width == 0 {
        return;
    }
    let grain = (GRAIN / width).max(1);
    out.par_chunks_exact_mut(width).with_min_len(grain).enumerate().for_each(|(i, row)| f(i, row));
}

/// e^x to about one unit in the last place, written without branches so that loops over it become
/// vector code. Cephes' reduction: e^x = 2^n · e^r with |r| ≤ ln 2 / 2, and its polynomial of e^r.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.; // 1.5 · 2^23: adding it rounds to an integer
    let x = x.clamp(-87.3, 88.7);
    let n = (x * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    let r = (x - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let mut p = 1.987_569_2e-4f32;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = (p * r * r + r) + 1.;
    // 2^n in two halves, so that n = 128 does not overflow on the way.
    let n = n as i32;
    let half = n >> 1;
    e * f32::from_bits(((half + 127) << 23) as u32)
        * f32::from_bits(((n - half + 127) << 23) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 2.4e-7 * want, "exp({x}) = {got}, not {want}");
        }
        assert!(exp(f32::NEG_INFINITY) < 1.3e-38);
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn strided_and_foreign_tensors_are_refused() -> Result<()> {
        let t = Tensor::zeros((2, 3), candle_core::DType::F32, &Device::Cpu)?;
        assert!(read(&t.t()?, |_| Ok(())).is_err());
        assert!(update(&t.t()?, |_| ()).is_err());
        assert!(read(&t.to_dtype(candle_core::DType::BF16)?, |_| Ok(())).is_err());
        assert_eq!(read(&t.narrow(0, 1, 1)?, |v| Ok(v.len()))?, 3);
        Ok(())
    }
}
