//! Convolution by cuDNN, a strip of rows at a time.
//!
//! Engines are fastest on pixels that are rows of channels, and pictures here are planes. So a strip of the input is
//! gathered as rows of channels, with whatever stands around the picture and each pixel as often as it is repeated, and
//! a strip of the output is put into its planes with the bias: beside input and output there are two strips.
//! All strips of a picture have the same height, so that one plan does for them; the last one makes rows again that
//! the one before it made.

use candle_core::{Device, Result, Tensor};

use super::{
    cudnn::Convolution,
    launch::{Element, Fresh, held_to},
    shape::{Grid, Pixels, contiguous, countable},
};
use crate::nn::{Window, conv::Padding};

/// Values of both strips together: 64 MiB in bf16.
pub(super) const STRIP: u64 = 32 << 20;
/// Channels come in so many, zeros behind what there are.
const CHANNELS: u64 = 8;

/// `weight` `[outputs, inputs, kernel, kernel]` over `x` `[batch, inputs, height, width]`, and `bias` `[outputs]`:
/// `[batch, outputs, …]` as `size` says. Strips have `strip` values if a row has not more. `None` for what cuDNN
/// does not compute, and for products over single pixels.
pub(super) fn convolve<T: Element>(
    x: &Tensor,
    [weight, bias]: [&Tensor; 2],
    window: Window,
    size: (usize, usize),
    strip: u64,
) -> Result<Option<Tensor>> {
    let Device::Cuda(device) = x.device() else { return Ok(None) };
    let (batch, inputs, height, width) = x.dims4()?;
    let outputs = weight.dim(0)?;
    let fits = weight.dims() == [outputs, inputs, window.kernel, window.kernel]
        && bias.dims() == [outputs]
        && bias.is_contiguous();
    if !fits || window.kernel == 1 || batch * outputs * size.0 * size.1 == 0 {
        return Ok(None);
    }
    let (x, weight) = (contiguous(x)?, contiguous(weight)?);
    held_to::<T>(&[Some(&x), Some(&weight), Some(bias)])?;
    let [batch, inputs, height, width, outputs, tall, broad, kernel, stride] =
        [batch, inputs, height, width, outputs, size.0, size.1, window.kernel, window.stride]
            .map(|n| n as u64);
    let [taken, made] = [inputs, outputs].map(|n| n.next_multiple_of(CHANNELS));
    let mut how = Convolution {
        dtype: T::DTYPE,
        inputs: taken,
        outputs: made,
        kernel,
        stride,
        rows: 1,
        columns: broad,
    };
    let columns = how.seen(broad);
    countable(how.seen(tall), columns)?;
    let row = stride * columns * taken + broad * made;
    let strips = tall.div_ceil((strip / row).clamp(1, tall));
    how.rows = tall.div_ceil(strips);
    let stream = device.cuda_stream();
    if !how.is_offered(&stream)? {
        return Ok(None);
    }

    // Its taps are the pixels of as many items as there are outputs.
    let mut turned = Fresh::<T>::new(&x, made * kernel * kernel * taken)?;
    let taps = kernel * kernel;
    let pixels = Pixels {
        items: made,
        given: outputs,
        channels: inputs,
        padded: taken,
        height: 1,
        width: taps,
        rows: 1,
        columns: taps,
        repeat: 1,
        ..Pixels::default()
    };
    let grid = Grid::of_tiles(taps, taken, made);
    let name = format!("channels_last_{}", T::SUFFIX);
    // SAFETY: `outputs` items of `inputs` channels are read and `made` of `taken` written: what both have.
    unsafe {
        let argue = |at: &[u64], out: u64| Pixels { x: at[0], out, ..pixels };
        turned.run(&name, grid, &[Some(&weight)], argue)?;
    }
    let turned = turned.tensor((made as usize, taps as usize, taken as usize));

    let mut out = Fresh::<T>::new(&x, batch * outputs * tall * broad)?;
    let plane = tall * broad * outputs * size_of::<T>() as u64;
    let seen = how.seen(how.rows);
    for item in 0..batch {
        let picture = x.narrow(0, item as usize, 1)?;
        for at in 0..strips {
            let from = (at * how.rows).min(tall - how.rows);
            let pixels = Pixels {
                items: 1,
                given: 1,
                channels: inputs,
                padded: taken,
                height,
                width,
                rows: seen,
                columns,
                row: from * stride,
                before: window.before as u64,
                repeat: window.repeat as u64,
                nearest: u64::from(window.padding == Padding::Nearest),
                ..Pixels::default()
            };
            let mut gathered = Fresh::<T>::new(&x, seen * columns * taken)?;
            let grid = Grid::of_tiles(columns, taken, seen);
            // SAFETY: of the picture, pixels within it are read; all of the strip is written, which has room for them.
            unsafe {
                let argue = |at: &[u64], out: u64| Pixels { x: at[0], out, ..pixels };
                gathered.run(&name, grid, &[Some(&picture)], argue)?;
            }
            let gathered = gathered.tensor((seen as usize, columns as usize, taken as usize));
            let mut strip = Fresh::<T>::new(&x, how.rows * broad * made)?;
            let done = strip.queue(&[Some(&gathered), Some(&turned)], |stream, at, out| {
                // SAFETY: strips and weight have what `how` says, at the beginning of memory of their own.
                unsafe { how.run(device, stream, [at[0], at[1], out]) }
            })?;
            if !done {
                return Ok(None);
            }
            let strip = strip.tensor((how.rows as usize, broad as usize, made as usize));
            let pixels = Pixels {
                channels: outputs,
                padded: made,
                height: tall,
                width: broad,
                rows: how.rows,
                columns: broad,
                row: from,
                ..Pixels::default()
            };
            let grid = Grid::of_tiles(broad, outputs, how.rows);
            // SAFETY: the strip's rows are read, and `how.rows` rows of each plane of the item written from `from` on,
            // which are not more than planes have.
            unsafe {
                let name = format!("channels_first_{}", T::SUFFIX);
                let argue = |at: &[u64], out: u64| Pixels {
                    x: at[0],
                    bias: at[1],
                    out: out + item * plane,
                    ..pixels
                };
                out.run(&name, grid, &[Some(&strip), Some(bias)], argue)?;
            }
        }
    }
    Ok(Some(out.tensor((batch as usize, outputs as usize, size.0, size.1))))
}
