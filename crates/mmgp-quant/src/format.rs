//! What a number format must provide, and the list of those there are.
//!
//! A new format is one new file under `formats/` and one line in [`formats`].

use candle_core::Tensor;

use crate::{
    Part, Result, Weights,
    formats::{dense::Dense, fp8::Fp8, int8::Int8},
};

/// A number format that linear weights are stored in.
///
/// [`formats`] are asked in order; the first that recognises a layer opens it.
pub trait Format: Send + Sync {
    /// The name that recipes and reports use, such as `dense`.
    fn name(&self) -> &'static str;

    /// Whether the layer whose weights would be called `parts` (full names ending in `.weight`) is
    /// stored in this format. Must be decided from names, dtypes and shapes alone.
    fn recognises(&self, weights: &Weights, parts: &[Part]) -> bool;

    /// Asks `weights` for the tensors of the layer and wraps them. `parts` have shape
    /// `[outputs_i, inputs]`.
    ///
    /// # Errors
    /// A tensor of the format that is missing or has another shape or dtype.
    fn open(&self, weights: &Weights, parts: &[Part]) -> Result<Box<dyn QuantTensor>>;
}

/// The weight of a linear layer, `[outputs, inputs]`, in some number format.
///
/// Its tensors may be bound to other memory between calls (never during one), so an implementation
/// keeps no copy, pointer or value derived from them.
pub trait QuantTensor: Send + Sync {
    /// The format's name.
    fn format(&self) -> &'static str;

    /// `x · Wᵀ (+ bias)`: `x` is contiguous `[rows, inputs]` in the compute dtype, `bias`
    /// `[outputs]`, the result `[rows, outputs]`.
    ///
    /// The bits of the result depend on the values of `x`, the weight and the bias and on the number
    /// of rows, never on where anything lies or on the number of threads.
    ///
    /// # Errors
    /// Whatever the tensor library refuses; weights that are not leased.
    fn product(&self, x: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor>;

    /// The weight that this stands for, dense `[outputs, inputs]`, in the dtype that the format
    /// decodes to. Takes the memory of the whole weight.
    ///
    /// # Errors
    /// Weights that are not leased; whatever the tensor library refuses.
    fn decode(&self) -> candle_core::Result<Tensor>;
}

/// All formats, in the order in which they are asked.
pub fn formats() -> &'static [&'static dyn Format] {
    &[&Int8, &Fp8, &Dense]
}
