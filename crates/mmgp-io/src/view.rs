//! A tensor in a file: what it is and where its bytes lie.
//!
//! A view is made by the validated header alone, so its range always lies inside the file as it was opened and always has the
//! length that shape and dtype ask for. It owns a share of the file, nothing else.

use std::ops::Range;
use std::sync::Arc;

use crate::dtype::Dtype;
use crate::error::{Fault, Result};
use crate::header::Entry;
use crate::mapped::SourceFile;

/// A named, typed, shaped byte range of a mapped file. Cloning it is cheap and copies no bytes.
#[derive(Clone, Debug)]
pub struct TensorView {
    entry: Arc<Entry>,
    file: Arc<SourceFile>,
}

impl TensorView {
    /// `entry` has been validated against `file`.
    pub(crate) fn new(entry: Entry, file: Arc<SourceFile>) -> Self {
        debug_assert!(entry.range.start <= entry.range.end && entry.range.end <= file.len());
        Self { entry: Arc::new(entry), file }
    }

    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.entry.name
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    /// The shape, outermost dimension first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.entry.shape
    }

    /// The number of elements: the product of the shape, 1 for a scalar.
    pub fn elements(&self) -> u64 {
        self.entry.elements
    }

    /// The number of bytes in the file.
    pub fn len(&self) -> u64 {
        self.entry.range.end - self.entry.range.start
    }

    /// Whether it has no bytes (a dimension is zero).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file it lies in.
    pub fn file(&self) -> &Arc<SourceFile> {
        &self.file
    }

    /// Where its bytes lie, counted from the start of the file.
    pub fn range(&self) -> Range<u64> {
        self.entry.range.clone()
    }

    /// Its bytes as mapped memory, without a copy, row-major and little endian. They may start at any address: the format aligns nothing.
    pub fn bytes(&self) -> &[u8] {
        // Offsets fit `usize`: they lie inside a map.
        &self.file.mapped()[self.entry.range.start as usize..self.entry.range.end as usize]
    }

    /// Fills `buf` from byte `offset` of this tensor by a positioned read.
    ///
    /// # Errors
    /// [`Malformed`](crate::Error::Malformed) if `offset + buf.len()` lies beyond the tensor, [`Read`](crate::Error::Read) if the
    /// file cannot be read or has become shorter.
    pub fn read_into(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.len()) {
            return Err(Fault::new(
                self.file.path(),
                format!("a read inside the tensor's {} bytes", self.len()),
                format!("{} bytes from its byte {offset}", buf.len()),
                "this is a bug in the caller",
            )
            .tensor(self.name())
            .into());
        }
        self.file.read_exact_at(buf, self.entry.range.start + offset)
    }

    pub(crate) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.entry.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_cross_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<TensorView>();
        crosses::<crate::Checkpoint>();
    }
}
