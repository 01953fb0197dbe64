//! What dense weights are made into while they are read: the choice, and the way to it.

use std::fmt;

use crate::kernels::{
    fp8,
    int8::{self, NotFinite, Real},
    rotated_int8,
    rotation::GROUP,
};

/// Codes of a byte, with a scale per output channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Whole numbers.
    #[default]
    Int8,
    /// Floating-point numbers with 4 bits of exponent and 3 of mantissa (e4m3).
    Fp8,
    /// Whole numbers of rows that were rotated first: each group of 256 values times the Walsh-Hadamard matrix, which
    /// spreads outliers over the group. A weight and its input are rotated both, or neither.
    RotatedInt8,
}

impl Codes {
    /// The name that formats, recipes and reports use.
    pub fn name(self) -> &'static str {
        match self {
            Codes::Int8 => "int8",
            Codes::Fp8 => "fp8",
            Codes::RotatedInt8 => "rotated_int8",
        }
    }

    /// What a tensor of them is called behind the name of its weight. Those of rotated rows have a name of their own, since
    /// whoever does not know of the rotation must not find codes there.
    pub fn leaf(self) -> &'static str {
        match self {
            Codes::Int8 | Codes::Fp8 => "_data",
            Codes::RotatedInt8 => "_hadamard256",
        }
    }

    /// What weights become these codes for, if products may make their input `activations`: int8 with int8 is guarded
    /// against outliers by a rotation.
    #[must_use]
    pub fn with_activations(self, activations: Option<Codes>) -> Self {
        match (self, activations) {
            (Codes::Int8, Some(Codes::Int8)) => Codes::RotatedInt8,
            (of, _) => of,
        }
    }

    /// What weights of so many inputs become in their place: rows that are no whole groups are not rotated.
    #[must_use]
    pub fn with_inputs(self, inputs: usize) -> Self {
        match self {
            Codes::RotatedInt8 if inputs == 0 || !inputs.is_multiple_of(GROUP) => Codes::Int8,
            of => of,
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
            Codes::RotatedInt8 => rotated_int8::quantize(weight, inputs, codes, scales),
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
            Codes::RotatedInt8 => rotated_int8::quantize_rows(weight, inputs, codes, scales),
        }
    }

    /// The weights that codes `[rows, inputs]` with a scale for each row stand for, rounded once to the dtype of
    /// `weight`, on all threads of the current pool.
    pub(crate) fn decode<T: Real>(
        self,
        codes: &[u8],
        inputs: usize,
        scales: &[f32],
        weight: &mut [T],
    ) {
        match self {
            Codes::Int8 => int8::decode(codes, inputs, scales, weight),
            Codes::Fp8 => fp8::decode(codes, inputs, scales, weight),
            Codes::RotatedInt8 => rotated_int8::decode(codes, inputs, scales, weight),
        }
    }
}

impl fmt::Display for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
