//! What dense weights are made into while they are read: the choice, and the way to it.

use std::fmt;

use crate::kernels::{
    fp8,
    int8::{self, NotFinite, Real},
};

/// Codes of a byte, with a scale per output channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Whole numbers.
    #[default]
    Int8,
    /// Floating-point numbers with 4 bits of exponent and 3 of mantissa (e4m3).
    Fp8,
}

impl Codes {
    /// The name that formats, recipes and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Codes::Int8 => "int8",
            Codes::Fp8 => "fp8",
        }
    }

    /// Makes `weight` `[rows, inputs]` codes of the same shape and one of `scales` for each row, on all threads of the
    /// current pool. See [`quantize`](crate::quantize) for what holds of rows.
    ///
    /// # Errors
    /// The first row that holds a NaN or an infinity.
    pub fn quantize<T: Real>(
        self,
        weight: &[T],
        inputs: usize,
        codes: &mut [u8],
        scales: &mut [T],
    ) -> Result<(), NotFinite> {
        match self {
            Codes::Int8 => int8::quantize(weight, inputs, codes, scales),
            Codes::Fp8 => fp8::quantize(weight, inputs, codes, scales),
        }
    }

    /// [`quantize`](Self::quantize) on the calling thread.
    ///
    /// # Errors
    /// The first row that holds a NaN or an infinity.
    pub fn quantize_rows<T: Real>(
        self,
        weight: &[T],
        inputs: usize,
        codes: &mut [u8],
        scales: &mut [T],
    ) -> Result<(), NotFinite> {
        match self {
            Codes::Int8 => int8::quantize_rows(weight, inputs, codes, scales),
            Codes::Fp8 => fp8::quantize_rows(weight, inputs, codes, scales),
        }
    }
}

impl fmt::Display for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
