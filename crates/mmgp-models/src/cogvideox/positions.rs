//! Where the patches of a video lie: positions for rotary embedding, and sinusoids to add.
//!
//! A position is (frame, row, column), in patches. Models before 1.5 turn by positions that are
//! scaled to the size they were trained at, 1.5 by plain counts.

use candle_core::{Device, Result, Tensor};

use crate::cogvideox::CogVideoXConfig;

/// Positions `[patches, 3]` (f32) of latents of `frames` × `height` × `width` for a model of
/// `config`, as diffusers' pipelines make them: frame by frame, row by row.
///
/// # Errors
/// None of its own.
pub fn rotary(
    config: &CogVideoXConfig,
    [frames, height, width]: [usize; 3],
    device: &Device,
) -> Result<Tensor> {
    let patch = config.patch_size;
    let grid = [height / patch, width / patch];
    match config.patch_size_t {
        Some(joined) => counted([frames.div_ceil(joined), grid[0], grid[1]], device),
        None => {
            let base = [config.sample_height / patch, config.sample_width / patch];
            let [from, to] = fitted(grid, base);
            scaled(frames, grid, from, to, device)
        }
    }
}

/// Frames, rows and columns counted from 0: `[frames · rows · columns, 3]`, f32.
///
/// # Errors
/// None of its own.
pub fn counted([frames, rows, columns]: [usize; 3], device: &Device) -> Result<Tensor> {
    let count = |n: usize| (0..n).map(|i| i as f32).collect::<Vec<_>>();
    grid(&count(frames), &count(rows), &count(columns), device)
}

/// Frames counted from 0, rows and columns (`grid` of them) spread evenly from `from` up to, not
/// including, `to`: `[frames · rows · columns, 3]`, f32.
///
/// # Errors
/// None of its own.
pub fn scaled(
    frames: usize,
    [rows, columns]: [usize; 2],
    from: [f64; 2],
    to: [f64; 2],
    device: &Device,
) -> Result<Tensor> {
    // diffusers spreads from `from` to `to · (n − 1) / n`, both included.
    let axis = |n: usize, from: f64, to: f64| -> Vec<f32> {
        let last = to * n.saturating_sub(1) as f64 / n.max(1) as f64;
        let step = (last - from) / n.saturating_sub(1).max(1) as f64;
        (0..n).map(|i| (from + i as f64 * step) as f32).collect()
    };
    let count: Vec<f32> = (0..frames).map(|i| i as f32).collect();
    grid(&count, &axis(rows, from[0], to[0]), &axis(columns, from[1], to[1]), device)
}

/// The largest rectangle of the shape of `grid` in the middle of `base`, all rows × columns: its
/// first corner and the one behind its last, in whole patches (halves to the even one).
pub fn fitted([rows, columns]: [usize; 2], [base_rows, base_columns]: [usize; 2]) -> [[f64; 2]; 2] {
    let (rows, columns) = (rows.max(1) as f64, columns.max(1) as f64);
    let (base_rows, base_columns) = (base_rows as f64, base_columns as f64);
    let (height, width) = if rows / columns > base_rows / base_columns {
        (base_rows, (base_rows / rows * columns).round_ties_even())
    } else {
        ((base_columns / columns * rows).round_ties_even(), base_columns)
    };
    let top = ((base_rows - height) / 2.).round_ties_even();
    let left = ((base_columns - width) / 2.).round_ties_even();
    [[top, left], [top + height, left + width]]
}

fn grid(frames: &[f32], rows: &[f32], columns: &[f32], device: &Device) -> Result<Tensor> {
    let mut all = Vec::with_capacity(frames.len() * rows.len() * columns.len() * 3);
    for &frame in frames {
        for &row in rows {
            columns.iter().for_each(|&column| all.extend([frame, row, column]));
        }
    }
    Tensor::from_vec(all, (frames.len() * rows.len() * columns.len(), 3), device)
}

/// Sinusoids of frame, column and row that are added to patches
/// ([Attention Is All You Need](https://arxiv.org/abs/1706.03762), section 3.5, for three axes).
///
/// Only a table for each axis is kept: the whole is as large as the patches themselves.
#[derive(Clone, Debug)]
pub(crate) struct Sinusoids {
    frames: Tensor,
    columns: Tensor,
    rows: Tensor,
}

impl Sinusoids {
    /// The tables of a grid of `[frames, rows, columns]` patches for a stream of `width`, a multiple
    /// of 16: a quarter of it is for frames, three eighths for columns, then three eighths for rows.
    /// Within each the sines come first.
    pub(crate) fn new(
        [frames, rows, columns]: [usize; 3],
        width: usize,
        spatial: f64,
        temporal: f64,
        device: &Device,
    ) -> Result<Self> {
        let (time, space) = (width / 4, width / 8 * 3);
        Ok(Self {
            frames: axis(frames, temporal, time, device)?.reshape((frames, 1, 1, time))?,
            columns: axis(columns, spatial, space, device)?.reshape((1, 1, columns, space))?,
            rows: axis(rows, spatial, space, device)?.reshape((1, rows, 1, space))?,
        })
    }

    /// `[1, patches, width]`, f32.
    pub(crate) fn table(&self) -> Result<Tensor> {
        let (frames, rows, columns) =
            (self.frames.dim(0)?, self.rows.dim(1)?, self.columns.dim(2)?);
        let spread = |t: &Tensor| t.broadcast_as((frames, rows, columns, t.dim(3)?))?.contiguous();
        let parts = [spread(&self.frames)?, spread(&self.columns)?, spread(&self.rows)?];
        Tensor::cat(&parts, 3)?.reshape((1, frames * rows * columns, ()))
    }
}

/// Rows of sin, then cos, of (i / `scale`) · 10000^(−j / (width/2)): `[count, width]`.
fn axis(count: usize, scale: f64, width: usize, device: &Device) -> Result<Tensor> {
    let half = width / 2;
    let mut all = Vec::with_capacity(count * width);
    for i in 0..count {
        // Positions are rounded to f32 where diffusers rounds them.
        let at = f64::from(i as f32 / scale as f32);
        let angle = |j: usize| at * 10000f64.powf(-(j as f64 / half as f64));
        all.extend((0..half).map(|j| angle(j).sin() as f32));
        all.extend((0..half).map(|j| angle(j).cos() as f32));
    }
    Tensor::from_vec(all, (count, width), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_go_frame_by_frame_and_row_by_row() -> Result<()> {
        let dev = Device::Cpu;
        let at = scaled(2, [2, 3], [0., 0.], [5., 6.], &dev)?.to_vec2::<f32>()?;
        assert_eq!(at.len(), 12);
        assert_eq!(at[..4], [[0., 0., 0.], [0., 0., 2.], [0., 0., 4.], [0., 2.5, 0.]]);
        assert_eq!(at[11], [1., 2.5, 4.]);
        let at = counted([2, 2, 3], &dev)?.to_vec2::<f32>()?;
        assert_eq!((at[5].as_slice(), at[6].as_slice()), (&[0., 1., 2.][..], &[1., 0., 0.][..]));
        // A crop that does not start at 0: from 1 to 5 · 1/2.
        let at = scaled(1, [2, 1], [1., 3.], [5., 6.], &dev)?.to_vec2::<f32>()?;
        assert_eq!(at, [[0., 1., 3.], [0., 2.5, 3.]]);
        Ok(())
    }

    #[test]
    fn a_grid_is_fitted_into_the_middle() {
        assert_eq!(fitted([30, 45], [30, 45]), [[0., 0.], [30., 45.]]);
        // A square of 30 patches: as high as the base, 7.5 from its sides, to the even 8.
        assert_eq!(fitted([10, 10], [30, 45]), [[0., 8.], [30., 38.]]);
        assert_eq!(fitted([10, 40], [30, 45]), [[10., 0.], [21., 45.]]);
    }

    #[test]
    fn a_model_of_1_5_counts_joined_frames() -> Result<()> {
        let dev = Device::Cpu;
        let mut config =
            CogVideoXConfig { sample_height: 8, sample_width: 8, ..Default::default() };
        let at = rotary(&config, [3, 4, 4], &dev)?.to_vec2::<f32>()?;
        assert_eq!((at.len(), at[11].as_slice()), (12, &[2., 2., 2.][..]));
        config.patch_size_t = Some(2);
        let at = rotary(&config, [3, 4, 4], &dev)?.to_vec2::<f32>()?;
        assert_eq!((at.len(), at[7].as_slice()), (8, &[1., 1., 1.][..]));
        Ok(())
    }

    #[test]
    fn sinusoids_have_frames_then_columns_then_rows() -> Result<()> {
        let (rows, columns) = (2, 3);
        let sinusoids = Sinusoids::new([2, rows, columns], 16, 2., 0.5, &Device::Cpu)?;
        let table = sinusoids.table()?.squeeze(0)?.to_vec2::<f32>()?;
        assert_eq!(table.len(), 12);
        for (i, got) in table.iter().enumerate() {
            let (t, r, c) = (i / (rows * columns), i / columns % rows, i % columns);
            let mut want = Vec::new();
            for (at, width) in [(t as f64 * 2., 4), (c as f64 / 2., 6), (r as f64 / 2., 6)] {
                let half = width / 2;
                let angles = (0..half).map(|j| at / 10000f64.powf(j as f64 / half as f64));
                want.extend(angles.clone().map(f64::sin));
                want.extend(angles.map(f64::cos));
            }
            for (got, want) in got.iter().zip(&want) {
                assert!((f64::from(*got) - want).abs() < 1e-6, "{i}: {got} {want}");
            }
        }
        Ok(())
    }
}
