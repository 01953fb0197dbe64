//! Where a module's tensors come from: the [`Source`] behind a [`Weights`] path.
//!
//! A model's constructor walks a `Weights` as it would walk candle's `VarBuilder`; the difference
//! is that a linear layer is asked for as a whole, so that the source's number format stays its own
//! affair, and that rows of several stored tensors can be joined into one product.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use mmgp_io::Dtype;

use crate::{Bias, Codes, Error, Linear, Result, Target};

/// What a source knows about a stored tensor without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The dtype in the file.
    pub dtype: Dtype,
    /// The shape in the file.
    pub shape: Vec<usize>,
    /// The file, for messages.
    pub origin: String,
}

/// The form in which a requested tensor is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// In the dtype of the file: what [`Linear`] and embedding tables take.
    AsStored,
    /// Converted to [`Source::compute_dtype`]: what candle's own operations take.
    Compute,
    /// Codes of a byte as they lie in the file, U8: for number formats that candle has no dtype for.
    Bytes,
    /// Converted to f32: scales of codes, as products take them.
    F32,
    /// The codes that a dense weight is quantized to while it is read, U8 of the same shape.
    Codes(Codes),
    /// Their scales, `[outputs, 1]` in f32, rounded to the dtype of the weight that each is of. Asked for right after the codes.
    Scales,
}

/// One stored tensor, or one of several that are joined along their first dimension.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Part {
    /// Full name in the source.
    pub name: String,
    /// The shape that the model expects it to have.
    pub shape: Vec<usize>,
}

/// Hands out tensors by name.
///
/// The caller asks for each tensor once while it builds a module. The implementation checks that
/// every part exists with the shape given, and answers with a tensor of the joined shape that holds
/// (or, for a pager, will hold while leased) the parts' rows one after another. It need not have
/// read anything when it answers.
pub trait Source: Send + Sync {
    /// What is stored under a full name, or `None`.
    fn stored(&self, name: &str) -> Option<Stored>;

    /// The tensor made of `parts` (at least one; all but the first dimension equal).
    ///
    /// # Errors
    /// A part that is missing, has another shape, or a dtype that `form` cannot be made from.
    fn tensor(&self, parts: &[Part], form: Form) -> Result<Tensor>;

    /// What the recipe wants the dense linear weight made of `parts` to become, if anything. A source that says
    /// so hands out [`Form::Codes`] and [`Form::Scales`] for them.
    fn quantizes(&self, _parts: &[Part]) -> Option<Codes> {
        None
    }

    /// Whether products with int8 weights round `code · scale` to the dtype of the stored scales, as quanto does,
    /// instead of using it in f32. Part of the recipe.
    fn rounds_int8(&self) -> bool {
        false
    }

    /// The codes for which products may make the rows of their input what the weight is, with a scale for each,
    /// where the device multiplies such codes. Part of the recipe.
    fn quantizes_activations(&self) -> Option<Codes> {
        None
    }

    /// Where the tensors will live.
    fn device(&self) -> &Device;

    /// The dtype in which activations are computed.
    fn compute_dtype(&self) -> DType;

    /// Names the files, for messages.
    fn origin(&self) -> String;

    /// Hears of each linear layer once it is opened. A source that adapters may change keeps them;
    /// one that stands before another passes them on.
    fn register(&self, _target: Target) {}
}

/// A path into a [`Source`], handed to the constructors of modules.
#[derive(Clone)]
pub struct Weights {
    source: Arc<dyn Source>,
    prefix: String,
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Weights({} in {})", self.prefix, self.source.origin())
    }
}

impl Weights {
    /// The root of a source.
    pub fn new(source: impl Source + 'static) -> Self {
        Self::from_arc(Arc::new(source))
    }

    /// The root of a shared source.
    pub fn from_arc(source: Arc<dyn Source>) -> Self {
        Self { source, prefix: String::new() }
    }

    /// This path with `name` pushed onto it, as in `VarBuilder::pp`.
    #[must_use]
    pub fn pp(&self, name: impl fmt::Display) -> Self {
        Self { source: self.source.clone(), prefix: self.full(name) }
    }

    /// The full name of `name` below this path.
    pub fn full(&self, name: impl fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    /// This path, without a trailing dot.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The source behind the path.
    pub fn source(&self) -> &dyn Source {
        &*self.source
    }

    /// Where the tensors will live.
    pub fn device(&self) -> &Device {
        self.source.device()
    }

    /// The dtype of activations.
    pub fn compute_dtype(&self) -> DType {
        self.source.compute_dtype()
    }

    /// What is stored under `name` below this path.
    pub fn stored(&self, name: impl fmt::Display) -> Option<Stored> {
        self.source.stored(&self.full(name))
    }

    /// Whether a tensor `name` exists below this path.
    pub fn contains(&self, name: impl fmt::Display) -> bool {
        self.stored(name).is_some()
    }

    /// A tensor in the compute dtype (norm weights, biases, convolutions).
    ///
    /// # Errors
    /// See [`Source::tensor`].
    pub fn tensor(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.source.tensor(&[self.part(shape, name)], Form::Compute)
    }

    /// A tensor in the dtype of the file (embedding tables: look rows up, then convert).
    ///
    /// # Errors
    /// See [`Source::tensor`].
    pub fn tensor_as_stored(&self, shape: &[usize], name: &str) -> Result<Tensor> {
        self.source.tensor(&[self.part(shape, name)], Form::AsStored)
    }

    /// The linear layer at this path: `weight` `[outputs, inputs]` in any format, `bias` `[outputs]`.
    ///
    /// # Errors
    /// See [`Linear::open`].
    pub fn linear(&self, inputs: usize, outputs: usize, bias: Bias) -> Result<Linear> {
        Linear::open(self, &[("", outputs)], inputs, bias)
    }

    /// One layer out of several stored ones that read the same input: their rows stand one below
    /// another, `[(name, outputs)]` in order, so that one product computes them all.
    ///
    /// # Errors
    /// See [`Linear::open`].
    pub fn linear_joined(
        &self,
        layers: &[(&str, usize)],
        inputs: usize,
        bias: Bias,
    ) -> Result<Linear> {
        Linear::open(self, layers, inputs, bias)
    }

    fn part(&self, shape: &[usize], name: &str) -> Part {
        Part { name: self.full(name), shape: shape.to_vec() }
    }
}

/// The shape of `parts` joined along the first dimension.
///
/// # Errors
/// No part, a scalar among several parts, trailing dimensions that differ, or a size that overflows.
pub fn join_parts(parts: &[Part]) -> Result<Vec<usize>> {
    let Some(first) = parts.first() else {
        return Err(Error::Invalid("a tensor of no parts was asked for".into()));
    };
    let mut shape = first.shape.clone();
    for part in &parts[1..] {
        let same = !shape.is_empty() && part.shape.get(1..) == shape.get(1..);
        let rows = part.shape.first().filter(|_| same).and_then(|r| r.checked_add(shape[0]));
        shape[0] = rows.ok_or_else(|| {
            Error::Invalid(format!(
                "tensors `{}` {:?} and `{}` {:?} cannot be joined by rows",
                first.name, first.shape, part.name, part.shape
            ))
        })?;
    }
    if shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).is_none_or(|n| n > 1 << 48) {
        return Err(Error::Invalid(format!(
            "tensor `{}` of shape {shape:?} is larger than any memory",
            first.name
        )));
    }
    Ok(shape)
}

/// A source over tensors that are already in memory, for tests and small modules.
#[derive(Debug)]
pub struct MemorySource {
    tensors: HashMap<String, Tensor>,
    fp8: HashSet<String>,
    device: Device,
    compute: DType,
}

impl MemorySource {
    /// An empty source whose tensors live on `device`; activations are f32 on the CPU, else bf16.
    pub fn new(device: &Device) -> Self {
        let compute = if device.is_cpu() { DType::F32 } else { DType::BF16 };
        Self { tensors: HashMap::new(), fp8: HashSet::new(), device: device.clone(), compute }
    }

    /// Has activations in `dtype`.
    #[must_use]
    pub fn computing_in(mut self, dtype: DType) -> Self {
        self.compute = dtype;
        self
    }

    /// Adds a tensor under its full name.
    #[must_use]
    pub fn with(mut self, name: impl Into<String>, tensor: Tensor) -> Self {
        self.tensors.insert(name.into(), tensor);
        self
    }

    /// Adds e4m3 codes, U8, under their full name.
    #[must_use]
    pub fn with_fp8(mut self, name: impl Into<String>, codes: Tensor) -> Self {
        let name = name.into();
        self.fp8.insert(name.clone());
        self.with(name, codes)
    }
}

impl Source for MemorySource {
    fn stored(&self, name: &str) -> Option<Stored> {
        let tensor = self.tensors.get(name)?;
        let dtype = match tensor.dtype() {
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F32 => Dtype::F32,
            DType::F64 => Dtype::F64,
            DType::U8 if self.fp8.contains(name) => Dtype::F8E4M3,
            DType::U8 if matches!(name.rsplit_once('.'), Some((_, "_data" | "_hadamard256"))) => {
                Dtype::I8
            }
            DType::U8 => Dtype::U8,
            DType::U32 => Dtype::U32,
            DType::I64 => Dtype::I64,
            _ => return None,
        };
        Some(Stored { dtype, shape: tensor.dims().to_vec(), origin: self.origin() })
    }

    fn tensor(&self, parts: &[Part], form: Form) -> Result<Tensor> {
        join_parts(parts)?;
        let mut rows = Vec::with_capacity(parts.len());
        for Part { name, shape } in parts {
            let tensor = self.tensors.get(name).ok_or_else(|| Error::Missing {
                origin: self.origin(),
                name: name.clone(),
                hint: String::new(),
            })?;
            if tensor.dims() != shape {
                return Err(Error::Shape {
                    origin: self.origin(),
                    name: name.clone(),
                    expected: shape.clone(),
                    found: tensor.dims().to_vec(),
                });
            }
            rows.push(tensor.clone());
        }
        let joined = if rows.len() == 1 { rows.remove(0) } else { Tensor::cat(&rows, 0)? };
        let joined = joined.contiguous()?;
        Ok(match form {
            Form::AsStored | Form::Bytes => joined,
            Form::Compute => joined.to_dtype(self.compute_dtype())?,
            Form::F32 => joined.to_dtype(DType::F32)?,
            Form::Codes(_) | Form::Scales => {
                return Err(Error::Invalid("memory sources do not quantize".into()));
            }
        })
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn compute_dtype(&self) -> DType {
        self.compute
    }

    fn origin(&self) -> String {
        "memory".into()
    }
}
