//! What a linear layer reads: numbers, or the codes that its product would make of them.
//!
//! Products with quantized weights make codes of their input's rows first. Who computes the input may write the codes in
//! place of the numbers, for all layers that [read](crate::Linear::reads) the same.

use candle_core::{DType, Device, Result, Tensor};
#[cfg(feature = "cuda")]
use parking_lot::Mutex;

use crate::{Codes, Linear};

/// Rows as codes of a byte, each with a scale.
#[derive(Clone, Debug)]
pub struct CodedRows {
    /// What the codes are.
    pub of: Codes,
    /// U8 `[rows, inputs]`, contiguous.
    pub codes: Tensor,
    /// What a code of 1 stands for, f32 `[rows, 1]`: 0 for a row of zeros, NaN for one that holds a NaN or an infinity.
    pub scales: Tensor,
    /// The dtype of the numbers that they stand for, which products compute in.
    pub dtype: DType,
    /// The shape of those, `[…, inputs]`.
    pub dims: Vec<usize>,
}

/// A layer's input, `[…, inputs]`.
#[derive(Clone, Debug)]
pub enum Input {
    /// As numbers.
    Numbers(Tensor),
    /// As codes.
    Codes(CodedRows),
}

impl Input {
    /// The shape.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Numbers(x) => x.dims(),
            Self::Codes(rows) => &rows.dims,
        }
    }

    /// The dtype of the numbers.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Numbers(x) => x.dtype(),
            Self::Codes(rows) => rows.dtype,
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        match self {
            Self::Numbers(x) => x.device(),
            Self::Codes(rows) => rows.codes.device(),
        }
    }

    /// The numbers, which codes are expanded to.
    ///
    /// # Errors
    /// Codes on a device that they are not expanded on.
    pub fn numbers(&self) -> Result<Tensor> {
        match self {
            Self::Numbers(x) => Ok(x.clone()),
            Self::Codes(rows) => {
                let CodedRows { of, codes, scales, dtype, dims } = rows;
                crate::decode::decoded(*of, codes, Some(scales), *dtype)?.reshape(dims.as_slice())
            }
        }
    }

    /// The numbers as `[rows, inputs]`.
    pub(crate) fn rows(&self) -> Result<Tensor> {
        match self {
            Self::Numbers(x) if x.rank() == 2 => Ok(x.clone()),
            Self::Numbers(x) => x.flatten(0, x.rank().saturating_sub(2)),
            Self::Codes(rows) => self.numbers()?.reshape(rows.codes.dims()),
        }
    }
}

/// Numbers that many layers read: the codes of a kind are made once for all layers that read those.
#[derive(Debug)]
pub struct SharedInput {
    numbers: Tensor,
    #[cfg(feature = "cuda")]
    coded: Mutex<Vec<CodedRows>>,
}

impl SharedInput {
    /// Of `[…, inputs]` in the compute dtype.
    pub fn new(numbers: Tensor) -> Self {
        Self {
            numbers,
            #[cfg(feature = "cuda")]
            coded: Mutex::default(),
        }
    }

    /// What `layer` makes of it: the bits of [`Linear::forward`].
    ///
    /// # Errors
    /// Those of [`Linear::forward`].
    pub fn through(&self, layer: &Linear) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(of) = layer.reads(&Input::from(&self.numbers)) {
            let mut coded = self.coded.lock();
            let there = coded.iter().find(|rows| rows.of == of).cloned();
            let rows = match there {
                Some(rows) => rows,
                None => {
                    let rows = crate::kernels::cuda::coded(of, &self.numbers)?;
                    coded.push(rows.clone());
                    rows
                }
            };
            drop(coded);
            return layer.forward_input(&Input::Codes(rows));
        }
        layer.forward(&self.numbers)
    }
}

impl From<Tensor> for Input {
    fn from(x: Tensor) -> Self {
        Self::Numbers(x)
    }
}

impl From<&Tensor> for Input {
    fn from(x: &Tensor) -> Self {
        Self::Numbers(x.clone())
    }
}
