//! Block images: where a block's bytes come from, and where each lies in a slot.
//!
//! An image is a list of tensors, each a list of segments (a stored tensor and the offset at which
//! its bytes start inside the slot's tensor). Nothing is read to make one.

use std::{
    any::Any,
    fmt,
    sync::{Arc, atomic::AtomicBool},
};

use candle_core::DType;
use mmgp_io::TensorView;
use mmgp_quant::Codes;

use crate::sync::Mutex;

/// Every tensor in a slot starts at a multiple of this.
pub const ALIGN: u64 = 256;

/// Tensors of fewer bytes are gathered where a device copies: a copy of its own would cost them more than
/// they take.
pub(crate) const LARGE: u64 = 256 << 10;

/// One stored tensor and where its elements go.
#[derive(Clone, Debug)]
pub struct Segment {
    /// What is read.
    pub source: TensorView,
    /// The first element of the slot's tensor that it fills.
    pub element: usize,
    /// How many elements of the slot's tensor lie from one row of the source to the next; `None`
    /// where rows stand one behind another. Lets matrices stand side by side, as the `B` of several
    /// adapters do.
    pub stride: Option<usize>,
}

impl Segment {
    /// The element behind the last that it fills; `None` if there is no such place, as when a row of
    /// the source is longer than the stride.
    pub fn end(&self) -> Option<usize> {
        let (elements, shape) = (self.source.elements() as usize, self.source.shape());
        match (self.stride, shape) {
            (None, _) => self.element.checked_add(elements),
            (Some(_), [_, _]) if elements == 0 => Some(self.element),
            (Some(stride), &[rows, columns]) if columns <= stride => (rows - 1)
                .checked_mul(stride)
                .and_then(|last| last.checked_add(self.element)?.checked_add(columns)),
            _ => None,
        }
    }
}

/// How a tensor of a slot is made of what its segments hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Making {
    /// The values, converted where the dtypes differ.
    #[default]
    Values,
    /// The codes of a dense weight. The next tensor of the image holds their scales.
    Codes(Codes),
    /// The scales of the codes before it, made with them: nothing is read for it alone.
    Scales,
}

/// One tensor of a block as it lies in a slot.
#[derive(Clone, Debug)]
pub struct ImageTensor {
    /// The (first) stored name.
    pub name: String,
    /// The dtype in the slot.
    pub dtype: DType,
    /// The shape in the slot.
    pub shape: Vec<usize>,
    /// Bytes from the start of the slot, a multiple of [`ALIGN`].
    pub offset: u64,
    /// Read in this order; together they fill the tensor.
    pub segments: Vec<Segment>,
    /// What becomes of them.
    pub making: Making,
}

impl ImageTensor {
    /// The number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its bytes in the slot.
    pub fn bytes(&self) -> u64 {
        (self.elements() * self.dtype.size_in_bytes()) as u64
    }
}

/// The digest of a block's bytes in a slot, in slot order.
pub type Digest = [u8; 32];

/// The digest that the first tensors of an image must have.
#[derive(Clone, Debug)]
pub struct Expected {
    /// How many tensors it covers; what is attached comes behind them.
    pub tensors: usize,
    /// BLAKE3 of their bytes.
    pub digest: Digest,
    /// Whether it was looked at in this process: once is enough.
    pub checked: Arc<AtomicBool>,
}

/// Where a block's bytes come from.
#[derive(Clone, Debug)]
pub struct BlockImage {
    /// The block's name, such as `transformer_blocks.3`.
    pub name: String,
    /// In slot order.
    pub tensors: Vec<ImageTensor>,
    /// Its size in a slot.
    pub bytes: u64,
    /// What is read from files to fill it.
    pub stored: u64,
    /// What a slot must hold once it was filled, if that is known.
    pub expected: Option<Expected>,
    /// What the device keeps of it on the host between fills.
    pub(crate) kept: Kept,
}

/// A place for whatever a device keeps; a clone of the image begins with nothing in it.
#[derive(Default)]
pub(crate) struct Kept(Mutex<Option<Arc<dyn Any + Send + Sync>>>);

impl Kept {
    /// What is kept, if it is a `T`.
    #[cfg(feature = "cuda")]
    pub(crate) fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        self.0.lock().clone()?.downcast().ok()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn set<T: Send + Sync + 'static>(&self, kept: Arc<T>) {
        *self.0.lock() = Some(kept);
    }

    pub(crate) fn is_some(&self) -> bool {
        self.0.lock().is_some()
    }

    /// Gives it back; whatever still reads it keeps it alive.
    pub(crate) fn clear(&self) {
        let kept = self.0.lock().take();
        drop(kept);
    }
}

impl Clone for Kept {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept({})", if self.is_some() { "something" } else { "nothing" })
    }
}

impl BlockImage {
    /// Lays `tensors` out one behind another, in the order in which the module asked for them.
    pub fn new(name: String, mut tensors: Vec<ImageTensor>) -> Self {
        let mut bytes = 0;
        for tensor in &mut tensors {
            tensor.offset = bytes;
            bytes += tensor.bytes().next_multiple_of(ALIGN);
        }
        let read = tensors.iter().filter(|t| t.making != Making::Scales);
        let stored = read.flat_map(|t| &t.segments).map(|s| s.source.len()).sum();
        Self { name, tensors, bytes, stored, expected: None, kept: Kept::default() }
    }
}
