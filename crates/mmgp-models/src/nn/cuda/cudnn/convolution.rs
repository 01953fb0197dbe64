//! [Convolution](https://docs.nvidia.com/deeplearning/cudnn/backend/latest/api/cudnn-graph-library.html) of pixels that
//! are rows of channels, without padding: what an engine reads is all there.

use candle_core::{CudaDevice, DType, Result, cuda_backend::cudarc::driver::CudaStream};

use super::{Answer, Descriptor, Key, Library, Lies, Raw, attribute, kind, of, offers, queue};

/// A kernel of `kernel`² over `rows` times `columns` pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Convolution {
    pub(in super::super) dtype: DType,
    /// Channels of what comes in and out.
    pub(in super::super) inputs: u64,
    pub(in super::super) outputs: u64,
    pub(in super::super) kernel: u64,
    pub(in super::super) stride: u64,
    /// Of what comes out.
    pub(in super::super) rows: u64,
    pub(in super::super) columns: u64,
}

impl Convolution {
    /// So many pixels come in on so many rows.
    pub(in super::super) fn seen(&self, out: u64) -> u64 {
        (out - 1) * self.stride + self.kernel
    }

    /// Whether the library computes it on the stream's GPU.
    pub(in super::super) fn is_offered(self, stream: &CudaStream) -> Result<bool> {
        offers(stream, Key::Convolution(self))
    }

    /// Queues it; `false` where the library does not compute it.
    ///
    /// # Safety
    /// `x` has `seen(rows)` times `seen(columns)` rows of `inputs` values, `weight` `[outputs, kernel, kernel,
    /// inputs]` and `y` room for `rows` times `columns` rows of `outputs`, all contiguous, at multiples of 16
    /// bytes and ordered by `stream`, which is `device`'s.
    pub(in super::super) unsafe fn run(
        self,
        device: &CudaDevice,
        stream: &CudaStream,
        [x, weight, y]: [u64; 3],
    ) -> Result<bool> {
        let operands = [x as Raw, weight as Raw, y as Raw];
        // SAFETY: handed on to the caller.
        unsafe { queue(device, stream, Key::Convolution(self), &operands) }
    }

    pub(super) fn described(
        &self,
        library: &'static Library,
    ) -> Answer<(Descriptor, Vec<Descriptor>)> {
        use attribute as a;
        let &Self { inputs, outputs, kernel, rows, columns, .. } = self;
        // Items, channels, rows, columns, in this order wherever they lie.
        let pixels = |items: u64, channels: u64, rows: u64, columns: u64| {
            let [n, c, h, w] = [items, channels, rows, columns].map(|n| n as i64);
            Lies { dims: [n, c, h, w], strides: [h * w * c, 1, w * c, c] }
        };
        let tensor = |lies: Lies, id| lies.described(library, id, self.dtype);
        let x = tensor(pixels(1, inputs, self.seen(rows), self.seen(columns)), 1)?;
        let w = tensor(pixels(outputs, inputs, kernel, kernel), 2)?;
        let y = tensor(pixels(1, outputs, rows, columns), 3)?;
        let how = Descriptor::new(library, of::CONVOLUTION)?;
        how.set(a::CONVOLUTION_DIMS, kind::INT64, &[2i64])?;
        // Sums are f32; kernels are not turned around.
        how.set(a::CONVOLUTION_DTYPE, kind::DATA_TYPE, &[0i32])?;
        how.set(a::CONVOLUTION_MODE, kind::CONVOLUTION_MODE, &[1i32])?;
        how.set(a::CONVOLUTION_BEFORE, kind::INT64, &[0i64; 2])?;
        how.set(a::CONVOLUTION_BEHIND, kind::INT64, &[0i64; 2])?;
        how.set(a::CONVOLUTION_DILATIONS, kind::INT64, &[1i64; 2])?;
        how.set(a::CONVOLUTION_STRIDES, kind::INT64, &[self.stride as i64; 2])?;
        let how = how.finalized("convolution")?;
        let operation = Descriptor::new(library, of::CONVOLVE)?;
        operation.set(a::CONVOLVE_ALPHA, kind::FLOAT, &[1f32])?;
        operation.set(a::CONVOLVE_BETA, kind::FLOAT, &[0f32])?;
        for (name, part) in
            [(a::CONVOLVE_HOW, &how), (a::CONVOLVE_X, &x), (a::CONVOLVE_W, &w), (a::CONVOLVE_Y, &y)]
        {
            operation.refer(name, &[part])?;
        }
        Ok((operation.finalized("convolution")?, vec![x, w, y, how]))
    }
}
