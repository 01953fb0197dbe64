//! What a number format must provide, and the list of those there are.
//!
//! A new format is one new file under `formats/` and one line in [`formats`].

use candle_core::Tensor;

use crate::{
    Codes, Input, Part, Result, Weights,
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

/// What a product does with each output, bias included, before it rounds and writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Epilogue {
    /// Nothing.
    #[default]
    None,
    /// GELU, approximated by tanh ([GELU](https://arxiv.org/abs/1606.08415), section 2).
    GeluTanh,
}

/// The weight of a linear layer, `[outputs, inputs]`, in some number format.
///
/// Its tensors may be bound to other memory between calls (never during one), so an implementation
/// keeps no copy, pointer or value derived from them.
pub trait QuantTensor: Send + Sync {
    /// The format's name.
    fn format(&self) -> &'static str;

    /// `x · Wᵀ (+ bias)`: `x` is `[rows, inputs]`, numbers in the compute dtype, contiguous, or codes of them; `bias`
    /// `[outputs]`, the result `[rows, outputs]`. Codes that the weight [reads](Self::reads) give the bits that the numbers give
    /// of which they were made, but where a library has no such product for the shape after all, and what codes stand for is
    /// multiplied.
    ///
    /// The bits of the result depend on the values of `x`, the weight and the bias and on the number
    /// of rows, never on where anything lies or on the number of threads.
    ///
    /// # Errors
    /// Whatever the tensor library refuses; weights that are not leased; on GPUs, codes of another kind than a quantized weight reads.
    fn product(&self, x: &Input, bias: Option<&Tensor>) -> candle_core::Result<Tensor>;

    /// The same with an epilogue, into `y`: `[rows, outputs]` in the compute dtype, the values of a row side by side, which may be
    /// columns of a wider tensor and shares its memory with no operand. `false`, with `y` as it was, where the device does not
    /// do that in one pass: which is decided by shapes, strides and dtypes alone.
    ///
    /// # Errors
    /// Those of [`product`](Self::product); a `y` of another shape.
    fn product_into(
        &self,
        _x: &Input,
        _bias: Option<&Tensor>,
        _epilogue: Epilogue,
        _y: &Tensor,
    ) -> candle_core::Result<bool> {
        Ok(false)
    }

    /// The codes that products make of an input like `x`, `[rows, inputs]`, before they multiply; `None` where they take
    /// numbers, which is decided by shape, dtype and device alone.
    fn reads(&self, _x: &Input) -> Option<Codes> {
        None
    }

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
