//! A block in page-locked memory, from which it goes to the device without any work of the host.
//!
//! Large tensors that travel as they are stored are copied from where their file lies in the page cache,
//! registered with the driver: no second copy of them is in memory. Everything else, the small and the
//! converted, is gathered once in locked memory, in slot order, so that it goes in one copy.

use std::{ops::Range, sync::Arc};

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaEvent, CudaStream, result, sys};
use mmgp_io::SourceFile;

use super::{
    failed,
    made::{Checked, Made, read_range},
    pinned::{Locked, PAGE, Pinned},
    registered::{Registered, Registrar},
};
use crate::{
    BlockImage, ImageTensor, Result, Segment,
    device::read::is_as_stored,
    image::{ALIGN, LARGE},
};

/// A tensor with a smaller part is gathered: parts lose less than a page at either end.
const PARTS: u64 = 4 * PAGE as u64;
/// Bytes that are read at once to check a block's digest.
const CHECKED: usize = 32 << 20;

/// What makes blocks ready to be copied.
pub(super) struct Keeper {
    pub(super) context: Arc<CudaContext>,
    pub(super) locked: Arc<Locked>,
    pub(super) registrar: Registrar,
    pub(super) readers: rayon::ThreadPool,
}

/// A block that is ready to be copied.
pub(super) struct Ready {
    pieces: Vec<Piece>,
    /// Whose addresses the pieces have.
    _registered: Vec<Registered>,
    _gathered: Option<Pinned>,
    copied: CudaEvent,
}

/// One copy.
struct Piece {
    from: *const u8,
    /// Bytes from the start of the slot.
    to: u64,
    len: usize,
}

// SAFETY: the addresses are of memory that the same value keeps locked, and that nobody writes to.
unsafe impl Send for Ready {}
// SAFETY: as above.
unsafe impl Sync for Ready {}

/// A tensor's bytes, or a part of them, where they lie in a file.
struct Stored<'a> {
    file: &'a Arc<SourceFile>,
    range: Range<u64>,
    to: u64,
}

impl Keeper {
    /// Locks a block's bytes; `None` where the limit on locked memory does not allow it or the driver
    /// refuses.
    ///
    /// # Errors
    /// A file that cannot be read; a block that is not what it must be.
    pub(super) fn keep(&self, image: &BlockImage) -> Result<Option<Ready>> {
        if self.registrar.works()
            && let Some(ready) = self.in_place(image)?
        {
            return Ok(Some(ready));
        }
        if !self.locked.works() {
            return Ok(None);
        }
        self.ready(image, Vec::new(), Vec::new())
    }

    /// The large tensors where their files lie, if that works for this block.
    fn in_place(&self, image: &BlockImage) -> Result<Option<Ready>> {
        // Each part is larger than the pages it may lose, and a page's end must not cut a value in two.
        let whole = |t: &ImageTensor| {
            let width = t.dtype.size_in_bytes() as u64;
            let fits = |s: &Segment| {
                s.source.len() >= PARTS && s.source.range().start.is_multiple_of(width)
            };
            t.segments.iter().all(fits)
        };
        let direct = |t: &&ImageTensor| t.bytes() >= LARGE && is_as_stored(t) && whole(t);
        let mut stored: Vec<Stored<'_>> = Vec::new();
        for tensor in image.tensors.iter().filter(direct) {
            for segment in &tensor.segments {
                let to = tensor.offset + (segment.element * tensor.dtype.size_in_bytes()) as u64;
                let (file, range) = (segment.source.file(), segment.source.range());
                stored.push(Stored { file, range, to });
            }
        }
        if stored.is_empty() {
            return Ok(None);
        }
        let same = |a: &Stored<'_>, b: &Stored<'_>| Arc::ptr_eq(a.file, b.file);
        stored.sort_by_key(|s| (Arc::as_ptr(s.file) as usize, s.range.start));
        let mut registered = Vec::new();
        let mut pieces: Vec<Piece> = Vec::new();
        // One registration for what has no room for another block's large tensor between it.
        for near in stored.chunk_by(|a, b| same(a, b) && b.range.start < a.range.end + LARGE) {
            let end = near.iter().map(|s| s.range.end).max().unwrap_or(0);
            let Some(held) = self.registrar.register(near[0].file, near[0].range.start..end) else {
                return Ok(None);
            };
            for Stored { file, range, to } in near {
                // The parts of pages at either end are gathered.
                let start = range.start.max(held.pages.start);
                let end = range.end.min(held.pages.end);
                let from = file.mapped()[start as usize..].as_ptr();
                let (to, len) = (to + (start - range.start), (end - start) as usize);
                match pieces.last_mut() {
                    // Neighbours in the file that are neighbours in the slot go together.
                    Some(last)
                        if last.from.wrapping_add(last.len) == from
                            && last.to + last.len as u64 == to =>
                    {
                        last.len += len;
                    }
                    _ => pieces.push(Piece { from, to, len }),
                }
            }
            registered.push(held);
        }
        pieces.sort_by_key(|piece| piece.to);
        self.ready(image, pieces, registered)
    }

    /// Gathers what `pieces` does not cover, and holds the block to its digest.
    fn ready(
        &self,
        image: &BlockImage,
        mut pieces: Vec<Piece>,
        registered: Vec<Registered>,
    ) -> Result<Option<Ready>> {
        let mut rest: Vec<Range<usize>> = Vec::new();
        let mut covered = 0;
        for piece in &pieces {
            if covered < piece.to as usize && holds(image, covered, piece.to as usize) {
                rest.push(covered..piece.to as usize);
            }
            covered = piece.to as usize + piece.len;
        }
        if covered < image.bytes as usize && holds(image, covered, image.bytes as usize) {
            rest.push(covered..image.bytes as usize);
        }
        let (places, len) = places(&rest);
        let made = if len == 0 { Made::nothing(image) } else { Made::of(image)? };
        let mut gathered = None;
        if len > 0 {
            let Some(mut memory) = Pinned::new(&self.context, &self.locked, len)? else {
                return Ok(None);
            };
            for (range, at) in rest.into_iter().zip(places) {
                let bytes = &mut memory.bytes_mut()[at..at + range.len()];
                self.readers.install(|| read_range(image, &made, range.clone(), bytes))?;
                let from = memory.bytes()[at..].as_ptr();
                pieces.push(Piece { from, to: range.start as u64, len: range.len() });
            }
            gathered = Some(memory);
        }
        let mut digest = Checked::new(image);
        if digest.is_wanted() {
            let mut buffer = vec![0; CHECKED.min(image.bytes as usize)];
            for start in (0..image.bytes as usize).step_by(CHECKED) {
                let range = start..(image.bytes as usize).min(start + CHECKED);
                let bytes = &mut buffer[..range.len()];
                self.readers.install(|| read_range(image, &made, range.clone(), bytes))?;
                digest.update(range, bytes);
            }
            digest.finish()?;
        }
        let copied = self.context.new_event(None).map_err(|e| failed("an event", e))?;
        Ok(Some(Ready { pieces, _registered: registered, _gathered: gathered, copied }))
    }
}

/// Where in one piece of memory the ranges of a slot are gathered, and how much that takes. Each lies as its
/// range does between multiples of ALIGN, so that values of any width are aligned as in the slot.
fn places(ranges: &[Range<usize>]) -> (Vec<usize>, usize) {
    let align = ALIGN as usize;
    let mut len = 0;
    let place = |range: &Range<usize>| {
        let at = len + range.start % align;
        len = (at + range.len()).next_multiple_of(align);
        at
    };
    let places = ranges.iter().map(place).collect();
    (places, len)
}

/// Whether any tensor has bytes in the range `from..to` of the slot.
fn holds(image: &BlockImage, from: usize, to: usize) -> bool {
    let (from, to) = (from as u64, to as u64);
    image.tensors.iter().any(|t| t.offset < to && t.offset + t.bytes() > from)
}

impl Ready {
    /// Queues the copies to the slot at `start`.
    pub(super) fn copy_to(&self, copies: &CudaStream, start: sys::CUdeviceptr) -> Result<()> {
        for piece in &self.pieces {
            // SAFETY: the piece lies in memory that this value keeps locked and that is written no
            // more; it is dropped only after `copied` has passed. The slot is as large as the image.
            let queued = unsafe {
                let bytes = std::slice::from_raw_parts(piece.from, piece.len);
                result::memcpy_htod_async(start + piece.to, bytes, copies.cu_stream())
            };
            queued.map_err(|e| failed("copying to the GPU", e))?;
        }
        self.copied.record(copies).map_err(|e| failed("copying to the GPU", e))
    }

    /// How many copies that are.
    pub(super) fn copies(&self) -> u64 {
        self.pieces.len() as u64
    }
}

impl Drop for Ready {
    fn drop(&mut self) {
        if let Err(error) = self.copied.synchronize() {
            tracing::error!("copies from locked memory: {error}");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::DType;
    use mmgp_io::{Checkpoint, Dtype, Overwrite, TensorSpec, Writer};

    use super::*;

    /// Codes at an odd place of the file, and scales behind them in the slot: cut anywhere in the codes, the
    /// rest is gathered at a place where its values are aligned, and has the bytes of the slot.
    #[test]
    fn ranges_that_begin_anywhere_in_codes_are_gathered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let specs = [
            TensorSpec::new("scales", Dtype::BF16, [37]),
            TensorSpec::new("odd", Dtype::U8, [3]),
            TensorSpec::new("codes", Dtype::I8, [700]),
        ];
        let mut writer = Writer::create(&path, &specs, &BTreeMap::new(), Overwrite::No).unwrap();
        for spec in &specs {
            let bytes: Vec<u8> = (0..spec.bytes().unwrap()).map(|i| (i * 7 % 251) as u8).collect();
            writer.write(&spec.name, &bytes).unwrap();
        }
        writer.finish().unwrap();
        let file = Checkpoint::open(&path).unwrap();
        let tensor = |name: &str, dtype, shape: usize| ImageTensor {
            name: name.into(),
            dtype,
            shape: vec![shape],
            offset: 0,
            segments: vec![Segment {
                source: file.tensor(name).unwrap().clone(),
                element: 0,
                stride: None,
            }],
            making: crate::Making::Values,
        };
        let image = BlockImage::new(
            "block".into(),
            vec![tensor("codes", DType::U8, 700), tensor("scales", DType::BF16, 37)],
        );
        let made = Made::of(&image).unwrap();
        let size = image.bytes as usize;
        let mut slot = vec![0u64; size / 8];
        let slot: &mut [u8] = bytemuck::cast_slice_mut(&mut slot);
        read_range(&image, &made, 0..size, slot).unwrap();
        assert!(slot[..700].iter().any(|&byte| byte != 0));
        for first in 0..700 {
            let ranges = [first / 2..first / 2 + 1, first..size];
            let (places, len) = places(&ranges);
            let mut memory = vec![0u64; len / 8];
            let memory: &mut [u8] = bytemuck::cast_slice_mut(&mut memory);
            for (range, at) in ranges.iter().zip(places) {
                let bytes = &mut memory[at..at + range.len()];
                read_range(&image, &made, range.clone(), bytes).unwrap();
                assert_eq!(*bytes, slot[range.clone()], "{range:?}");
            }
        }
    }
}
