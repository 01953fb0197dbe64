//! The product of a low-rank side path, `y += s · (x Aᵀ) Bᵀ`, added to an output in place.
//!
//! `A` is stacked over all adapters and parts of a layer; `B` comes in bands, one for each range of
//! output columns, so that parts which do not touch each other cost no products with zeros. On the
//! CPU rows go through in pieces of fixed size: beside `y` little memory is taken, and neither
//! pieces nor bits depend on the number of threads.

use std::ops::Range;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::{
    formats::dense::{product_on_device, slice},
    kernels::cpu::{Rows, product_nt},
};

/// Rows of the input that are multiplied at once.
const PIECE: usize = 256;

/// The part of `B` that adds to a range of output columns.
#[derive(Clone, Copy, Debug)]
pub struct Band<'a> {
    /// The first output column that it adds to.
    pub row: usize,
    /// `[columns added to, ranks]`; bands take the ranks of `A` in order.
    pub b: &'a Tensor,
}

/// `y + (s ∘ x Aᵀ) Bᵀ`, in place: the caller shares `y` with nobody. `x` `[rows, inputs]` and `y`
/// `[rows, outputs]` are contiguous in the compute dtype, `a` is `[ranks, inputs]`, `scales` has one
/// factor per rank; `a` and the bands may be f32, bf16 or f16. Bands whose scales are all zero are skipped.
///
/// # Errors
/// Shapes that do not agree; weights that are not leased; whatever the tensor library refuses.
pub fn add_low_rank(
    x: &Tensor,
    y: Tensor,
    a: &Tensor,
    scales: &[f32],
    bands: &[Band<'_>],
) -> candle_core::Result<Tensor> {
    let (m, k) = x.dims2()?;
    let (rows, n) = y.dims2()?;
    let mut ranks = 0;
    let mut columns = Vec::with_capacity(bands.len());
    for band in bands {
        let (outputs, rank) = band.b.dims2()?;
        if outputs == 0 || band.row.checked_add(outputs).is_none_or(|end| end > n) {
            candle_core::bail!("low rank: {outputs} columns from {} of {n} outputs", band.row);
        }
        columns.push(ranks..ranks + rank);
        ranks += rank;
    }
    if rows != m || a.dims() != [ranks, k] || scales.len() != ranks || k == 0 {
        candle_core::bail!(
            "low rank: input {:?}, output {:?}, A {:?}, {} scales, B of {ranks} ranks",
            x.dims(),
            y.dims(),
            a.dims(),
            scales.len()
        );
    }
    let live = |columns: &Range<usize>| scales[columns.clone()].iter().any(|&s| s != 0.);
    let bands: Vec<_> = bands.iter().zip(columns).filter(|(_, columns)| live(columns)).collect();
    if bands.is_empty() || m == 0 {
        return Ok(y);
    }
    if x.device().is_cpu() {
        add_on_cpu(x, &y, a, scales, &bands)?;
        return Ok(y);
    }
    add_by_products(x, y, a, scales, &bands)
}

/// By products of libraries, on any device.
fn add_by_products(
    x: &Tensor,
    y: Tensor,
    a: &Tensor,
    scales: &[f32],
    bands: &[(&Band<'_>, Range<usize>)],
) -> candle_core::Result<Tensor> {
    let mut t = product_on_device(x, &cast(a, x.dtype())?, None)?;
    // Where each band has one scale that goes into its product; only else are scales copied to the device.
    let single = |(_, columns): &(_, Range<usize>)| single(&scales[columns.clone()]);
    let each: Option<Vec<f32>> = bands.iter().map(single).collect();
    if each.is_none() {
        t = t.broadcast_mul(&Tensor::new(scales, x.device())?.to_dtype(x.dtype())?)?;
    }
    for (at, (band, columns)) in bands.iter().enumerate() {
        let scale = each.as_ref().map_or(1., |each| each[at]);
        let b = cast(band.b, x.dtype())?;
        #[cfg(feature = "cuda")]
        if y.device().is_cuda()
            && crate::kernels::cuda::add_product((&t, columns.start), &b, scale, (&y, band.row))?
        {
            continue;
        }
        let t = t.narrow(1, columns.start, columns.len())?.contiguous()?;
        let t = t.affine(f64::from(scale), 0.)?;
        let part = y.narrow(1, band.row, band.b.dim(0)?)?;
        y.slice_set(&(part + t.matmul(&b.t()?)?)?.contiguous()?, 1, band.row)?;
    }
    Ok(y)
}

/// The scale, if it is the same for all ranks.
fn single(scales: &[f32]) -> Option<f32> {
    let first = *scales.first()?;
    scales.iter().all(|&scale| scale == first).then_some(first)
}

/// An adapter's weight, which lies as it was stored, in the dtype that is computed in.
fn cast(weight: &Tensor, dtype: DType) -> candle_core::Result<Tensor> {
    // Converting would read past the end of the empty storage that a weight without a lease has.
    let stored = weight.storage_and_layout().0.dtype();
    if stored != weight.dtype() {
        candle_core::bail!("low rank: an adapter's weight is not leased");
    }
    weight.to_dtype(dtype)?.contiguous()
}

fn add_on_cpu(
    x: &Tensor,
    y: &Tensor,
    a: &Tensor,
    scales: &[f32],
    bands: &[(&Band<'_>, Range<usize>)],
) -> candle_core::Result<()> {
    let (k, ranks) = (x.dim(1)?, scales.len());
    let input = x.storage_and_layout();
    let input = slice::<f32>(cpu(&input.0)?, input.1)?;
    let down = a.storage_and_layout();
    let down = rows(cpu(&down.0)?, down.1)?;
    let mut t = vec![0f32; input.len() / k * ranks];
    t.par_chunks_mut(PIECE * ranks).zip(input.par_chunks(PIECE * k)).for_each(|(t, x)| {
        t.copy_from_slice(&product_nt(x, down, None, x.len() / k, ranks, k));
        for row in t.chunks_exact_mut(ranks) {
            row.iter_mut().zip(scales).for_each(|(t, s)| *t *= s);
        }
    });

    let up: Vec<_> = bands.iter().map(|(band, _)| band.b.storage_and_layout()).collect();
    let mut parts = Vec::with_capacity(bands.len());
    for ((band, columns), up) in bands.iter().zip(&up) {
        let b = rows(cpu(&up.0)?, up.1)?;
        let columns = columns.clone();
        parts.push(Part { to: band.row..band.row + band.b.dim(0)?, columns, b });
    }
    y.inplace_op1(&Add { t: &t, ranks, outputs: y.dim(1)?, parts: &parts })
}

/// The second product, added to the output as a custom operation because only those may write.
struct Add<'a> {
    /// `[rows, ranks]`, scaled.
    t: &'a [f32],
    ranks: usize,
    outputs: usize,
    parts: &'a [Part<'a>],
}

struct Part<'a> {
    to: Range<usize>,
    columns: Range<usize>,
    b: Rows<'a>,
}

impl InplaceOp1 for Add<'_> {
    fn name(&self) -> &'static str {
        "low rank"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let range = layout.contiguous_offsets().map(|(from, to)| from..to);
        let y = match (storage, range) {
            (CpuStorage::F32(y), Some(range)) => &mut y[range],
            _ => candle_core::bail!("low rank: the output is not contiguous f32"),
        };
        for (y, t) in y.chunks_mut(PIECE * self.outputs).zip(self.t.chunks(PIECE * self.ranks)) {
            let rows = t.len() / self.ranks;
            for Part { to, columns, b } in self.parts {
                let t: Vec<f32> = t
                    .chunks_exact(self.ranks)
                    .flat_map(|row| row[columns.clone()].iter().copied())
                    .collect();
                let part = product_nt(&t, *b, None, rows, to.len(), columns.len());
                y.par_chunks_mut(self.outputs).zip(part.par_chunks(to.len())).for_each(
                    |(y, part)| y[to.clone()].iter_mut().zip(part).for_each(|(y, p)| *y += p),
                );
            }
        }
        Ok(())
    }
}

fn cpu(storage: &Storage) -> candle_core::Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("low rank: operands lie on different devices"),
    }
}

fn rows<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<Rows<'a>> {
    Ok(match storage {
        CpuStorage::BF16(_) => Rows::Bf16(slice::<bf16>(storage, layout)?),
        CpuStorage::F16(_) => Rows::F16(slice::<f16>(storage, layout)?),
        CpuStorage::F32(_) => Rows::F32(slice::<f32>(storage, layout)?),
        _ => candle_core::bail!("low rank: an adapter's weight is not leased"),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn rand(rows: usize, columns: usize) -> Tensor {
        Tensor::randn(0f32, 1., (rows, columns), &Device::Cpu).unwrap()
    }

    fn far(a: &Tensor, b: &Tensor) -> f32 {
        (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap()
    }

    #[test]
    fn bands_equal_dense_products_in_any_form() {
        // More rows than a piece, bands that overlap, and columns that none touches.
        let (x, y, a) = (rand(PIECE + 9, 13), rand(PIECE + 9, 21), rand(7, 13));
        let (b0, b1, b2) = (rand(5, 2), rand(6, 4), rand(9, 1));
        let scales = [0.5, 2., -1., 0.25, 1., 3., -0.5];
        let columns = [(3, &b0, 0..2), (8, &b1, 2..6), (6, &b2, 6..7)];
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let cast = |t: &Tensor| t.to_dtype(dtype).unwrap();
            let wide = |t: &Tensor| cast(t).to_dtype(DType::F32).unwrap();
            let mut expected = y.to_vec2::<f32>().unwrap();
            let t = x.matmul(&wide(&a).t().unwrap()).unwrap().to_vec2::<f32>().unwrap();
            for (row, b, ranks) in &columns {
                for (out, b) in wide(b).to_vec2::<f32>().unwrap().iter().enumerate() {
                    for (y, t) in expected.iter_mut().zip(&t) {
                        for (b, rank) in b.iter().zip(ranks.clone()) {
                            y[row + out] += t[rank] * scales[rank] * b;
                        }
                    }
                }
            }
            let expected = Tensor::new(expected, &Device::Cpu).unwrap();
            let forms: Vec<Tensor> = columns.iter().map(|c| cast(c.1)).collect();
            let bands: Vec<Band<'_>> =
                columns.iter().zip(&forms).map(|(c, b)| Band { row: c.0, b }).collect();
            let got = add_low_rank(&x, y.copy().unwrap(), &cast(&a), &scales, &bands).unwrap();
            assert!(far(&got, &expected) < 1e-4);
            if dtype == DType::F32 {
                let columns = [0..2, 2..6, 6..7];
                let parts: Vec<_> = bands.iter().zip(columns).collect();
                let got = add_by_products(&x, y.copy().unwrap(), &a, &scales, &parts).unwrap();
                assert!(far(&got, &expected) < 1e-4);
                // One scale for each band, which goes another way.
                let scales = [0.5, 0.5, -2., -2., -2., -2., 3.];
                let expected = add_low_rank(&x, y.copy().unwrap(), &a, &scales, &bands).unwrap();
                let got = add_by_products(&x, y.copy().unwrap(), &a, &scales, &parts).unwrap();
                assert!(far(&got, &expected) < 1e-4);
            }
        }
    }

    #[test]
    fn zero_scales_leave_every_bit_and_shapes_are_checked() {
        let (x, y, a, b) = (rand(3, 4), rand(3, 6), rand(2, 4), rand(6, 2));
        let band = |row| [Band { row, b: &b }];
        let before = y.to_vec2::<f32>().unwrap();
        let y = add_low_rank(&x, y, &a, &[0., -0.], &band(0)).unwrap();
        assert_eq!(y.to_vec2::<f32>().unwrap(), before);
        assert!(add_low_rank(&x, y.clone(), &a, &[1., 1.], &band(1)).is_err());
        assert!(add_low_rank(&x, y.clone(), &a, &[1.], &band(0)).is_err());
        assert!(add_low_rank(&x, y.clone(), &rand(3, 4), &[1., 1.], &band(0)).is_err());
        assert!(add_low_rank(&rand(2, 4), y, &a, &[1., 1.], &band(0)).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let (x, y, a, b) = (rand(700, 130), rand(700, 200), rand(70, 130), rand(200, 70));
        let runs: Vec<Vec<Vec<f32>>> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let y = y.copy().unwrap();
                let band = [Band { row: 0, b: &b }];
                pool.install(|| add_low_rank(&x, y, &a, &[0.3; 70], &band)).unwrap()
            })
            .map(|y| y.to_vec2().unwrap())
            .collect();
        assert_eq!(runs[0], runs[1]);
        assert_eq!(runs[0], runs[2]);
    }
}
