//! A block's bytes as they lie in a slot, made on the host: range by range, so that they can pass through
//! buffers of any size, and held to the block's digest while they pass.

use std::{ops::Range, sync::atomic::Ordering};

use candle_core::CpuStorage;

use crate::{
    BlockImage, Error, Making, Result,
    device::read::{Target, no_way, quantize_tensor, read_elements, read_tensor},
    placeholder::empty,
};

/// The tensors of a block that cannot be read range by range: quantized ones, and those whose rows
/// stand apart.
pub(super) struct Made(Vec<Option<CpuStorage>>);

impl Made {
    /// Nothing: for blocks that are read range by range.
    pub(super) fn nothing(image: &BlockImage) -> Self {
        Self(vec![None; image.tensors.len()])
    }

    pub(super) fn of(image: &BlockImage) -> Result<Self> {
        let mut made: Vec<Option<CpuStorage>> = vec![None; image.tensors.len()];
        for (at, tensor) in image.tensors.iter().enumerate() {
            if matches!(tensor.making, Making::Codes(_)) {
                let Some(t) = image.tensors.get(at + 1).filter(|t| t.making == Making::Scales)
                else {
                    return Err(no_way(tensor, "its scales do not follow its codes"));
                };
                let mut codes = empty(tensor.dtype, tensor.elements())?;
                let mut scales = empty(t.dtype, t.elements())?;
                quantize_tensor(tensor, &mut codes, &mut scales)?;
                (made[at], made[at + 1]) = (Some(codes), Some(scales));
            } else if tensor.segments.iter().any(|s| s.stride.is_some()) {
                let mut whole = empty(tensor.dtype, tensor.elements())?;
                read_tensor(tensor, &mut whole)?;
                made[at] = Some(whole);
            }
        }
        Ok(Self(made))
    }
}

/// Fills `out` with the bytes `range` of a block as it lies in a slot.
pub(super) fn read_range(
    image: &BlockImage,
    made: &Made,
    range: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    for (tensor, made) in image.tensors.iter().zip(&made.0) {
        let (start, width) = (tensor.offset as usize, tensor.dtype.size_in_bytes());
        let end = start + tensor.bytes() as usize;
        let (from, to) = (range.start.max(start), range.end.min(end));
        if from >= to {
            continue;
        }
        // No value is cut in two: tensors begin at multiples of ALIGN, ranges at whole values.
        let bytes = &mut out[from - range.start..to - range.start];
        let wrong = || no_way(tensor, "it cannot be staged");
        match made {
            Some(made) => {
                let whole = match made {
                    CpuStorage::U8(v) => v.as_slice(),
                    CpuStorage::F16(v) => bytemuck::cast_slice(v),
                    CpuStorage::BF16(v) => bytemuck::cast_slice(v),
                    CpuStorage::F32(v) => bytemuck::cast_slice(v),
                    _ => return Err(wrong()),
                };
                bytes.copy_from_slice(&whole[from - start..to - start]);
            }
            None => {
                let elements = (from - start) / width..(to - start) / width;
                let target = Target::over(bytes, tensor.dtype).ok_or_else(wrong)?;
                read_elements(tensor, elements, target)?;
            }
        }
    }
    Ok(())
}

/// Holds a block to its digest the first time it passes by.
pub(super) struct Checked<'a> {
    image: &'a BlockImage,
    hasher: Option<blake3::Hasher>,
}

impl<'a> Checked<'a> {
    pub(super) fn new(image: &'a BlockImage) -> Self {
        let wanted = |e: &&crate::Expected| !e.checked.load(Ordering::Relaxed);
        let hasher = image.expected.as_ref().filter(wanted).map(|_| blake3::Hasher::new());
        Self { image, hasher }
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.hasher.is_some()
    }

    /// The next bytes of the block, in order.
    pub(super) fn update(&mut self, range: Range<usize>, bytes: &[u8]) {
        let (Some(hasher), Some(expected)) = (&mut self.hasher, &self.image.expected) else {
            return;
        };
        for tensor in self.image.tensors.iter().take(expected.tensors) {
            let start = tensor.offset as usize;
            let (from, to) =
                (range.start.max(start), range.end.min(start + tensor.bytes() as usize));
            if from < to {
                hasher.update_rayon(&bytes[from - range.start..to - range.start]);
            }
        }
    }

    pub(super) fn finish(self) -> Result<()> {
        if let (Some(hasher), Some(expected)) = (self.hasher, &self.image.expected) {
            if *hasher.finalize().as_bytes() != expected.digest {
                return Err(Error::corrupt(self.image));
            }
            expected.checked.store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}
