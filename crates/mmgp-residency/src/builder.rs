//! Building a paged model: a module's constructor asks for tensors and gets placeholders, while the
//! builder notes where the bytes of each will come from.
//!
//! Our own models ask through [`Weights`], the stem and each block through a path of its own.
//! Unmodified candle modules ask through a `VarBuilder` and become all stem.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, atomic::Ordering},
};

use candle_core::{DType, Device as Candle, Shape, Tensor};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use mmgp_io::{Checkpoint, Dtype, TensorView};
use mmgp_quant::{Codes, Form, Part, QuantPolicy, Source, Stored, Target, Weights, join_parts};

use crate::{
    BlockImage, BlockTarget, Digest, Error, Expected, ImageTensor, Making, Paged, Pager, Result,
    Segment,
    image::LARGE,
    pager::NewBlock,
    placeholder::placeholder,
    sync::{AtomicBool, Mutex},
};

/// Collects what a module's constructor asks for, then hands the model to the pager.
pub struct ModelBuilder {
    pager: Pager,
    shared: Arc<Shared>,
    ignored: Vec<String>,
    expected: Vec<Digest>,
}

impl ModelBuilder {
    /// Starts a model called `name` (`transformer`, `text_encoder`, …) over the weights of
    /// `checkpoint`. Nothing is read.
    pub fn new(pager: &Pager, name: &str, checkpoint: Arc<Checkpoint>) -> Self {
        Self::over(pager, name, Origin::Files(checkpoint))
    }

    /// A model of which only the shapes are known: every tensor that its constructor asks for is
    /// taken to be stored as `dtype`. The [`Sketch`] lists them. Such a model can be planned (what
    /// would it need?) but not run.
    pub fn sketch(pager: &Pager, name: &str, dtype: Dtype) -> (Self, Sketch) {
        let builder = Self::over(pager, name, Origin::Shapes(dtype));
        let sketch = Sketch { shared: builder.shared.clone() };
        (builder, sketch)
    }

    fn over(pager: &Pager, name: &str, origin: Origin) -> Self {
        let device = pager.device();
        let shared = Shared {
            model: name.to_string(),
            origin,
            device: device.candle().clone(),
            compute: device.compute_dtype(),
            pager: pager.clone(),
            drafts: Mutex::new(Drafts {
                blocks: vec![Draft::new("stem")],
                known: HashMap::new(),
                asked: HashSet::new(),
                last: None,
                targets: Vec::new(),
            }),
            requested: Mutex::default(),
            policy: Mutex::default(),
            rounds_int8: AtomicBool::default(),
            activations: Mutex::default(),
        };
        Self {
            pager: pager.clone(),
            shared: Arc::new(shared),
            ignored: Vec::new(),
            expected: Vec::new(),
        }
    }

    /// The model's name.
    pub fn name(&self) -> &str {
        &self.shared.model
    }

    /// The root path; tensors asked for through it belong to the stem.
    pub fn stem(&self) -> Weights {
        self.weights(0)
    }

    /// Opens a block called `path`, such as `transformer_blocks.3`; tensors asked for through the
    /// returned path belong to it. Blocks run in the order of these calls.
    pub fn block(&self, path: &str) -> Weights {
        let mut drafts = self.shared.drafts.lock();
        drafts.blocks.push(Draft::new(path));
        let block = drafts.blocks.len() - 1;
        drop(drafts);
        self.weights(block).pp(path)
    }

    /// Makes linear weights int8 or fp8 while they are read, as `policy` says; for modules that are built
    /// from here on. Where products with int8 make int8 of their input too, layers of a multiple of 256 inputs are
    /// rotated ([`Codes::RotatedInt8`]). A checkpoint that holds quantized weights is left as it is.
    pub fn quantize(&mut self, policy: QuantPolicy) {
        if let Origin::Files(checkpoint) = &self.shared.origin
            && checkpoint.iter().any(|view| holds_codes(view.name()))
        {
            tracing::warn!("model `{}` is quantized already and stays as it is", self.name());
            return;
        }
        *self.shared.policy.lock() = Some(policy);
    }

    /// Lets products with int8 weights round the expanded weight to the dtype of its scale, as quanto
    /// does, for modules that are built from here on. By default it stays f32, which is closer to the
    /// original.
    pub fn round_int8(&mut self) {
        self.shared.rounds_int8.store(true, Ordering::Relaxed);
    }

    /// Lets products with weights of these codes make the rows of their input such codes too, on GPUs that multiply
    /// them and for modules that are built from here on: faster, and less exact. It decides what weights become, too
    /// ([`quantize`](Self::quantize)), so it comes before the first module.
    pub fn quantize_activations(&mut self, codes: Codes) {
        *self.shared.activations.lock() = Some(codes);
    }

    /// The digests that the blocks must have when they are first read, the stem's first, as
    /// [`Pager::digests`] gave them. A block that has another fails its lease.
    pub fn expect(&mut self, digests: Vec<Digest>) {
        self.expected = digests;
    }

    /// A `VarBuilder` for an unmodified candle module; what it asks for belongs to the stem and
    /// gets `dtype`, converted while it is read.
    pub fn var_builder(&self, dtype: DType) -> VarBuilder<'static> {
        let backend = BlockSource { shared: self.shared.clone(), block: 0 };
        VarBuilder::from_backend(Box::new(backend), dtype, self.shared.device.clone())
    }

    /// Stored tensors whose names start with `prefix` are known not to be needed: they are not
    /// reported by [`Paged::unused`].
    pub fn ignore(&mut self, prefix: &str) {
        self.ignored.push(prefix.to_string());
    }

    /// Hands the model to the pager: `blocks` holds one module for each call of
    /// [`block`](Self::block), in the same order.
    ///
    /// # Errors
    /// Another number of modules than of opened blocks.
    pub fn finish<S, B>(self, stem: S, blocks: Vec<B>) -> Result<Paged<S, B>> {
        let drafts = std::mem::take(&mut *self.shared.drafts.lock());
        if drafts.blocks.len() != blocks.len() + 1 {
            return Err(Error::NotPageable {
                model: self.shared.model.clone(),
                reason: format!(
                    "{} blocks were opened, {} modules were handed over",
                    drafts.blocks.len() - 1,
                    blocks.len()
                ),
            });
        }
        let files = match &self.shared.origin {
            Origin::Files(checkpoint) => Some(checkpoint),
            Origin::Shapes(_) => None,
        };
        let unused = files
            .iter()
            .flat_map(|checkpoint| checkpoint.iter())
            .map(|view| view.name())
            .filter(|name| !drafts.asked.contains(*name))
            .filter(|name| !self.ignored.iter().any(|prefix| name.starts_with(prefix)))
            .filter(|name| !is_activation_scale(name, &drafts.asked))
            .map(String::from)
            .collect();
        let paged = drafts
            .blocks
            .into_iter()
            .enumerate()
            .map(|(at, mut draft)| {
                draft.large_first();
                let mut image = BlockImage::new(draft.name, draft.tensors);
                image.expected = self.expected.get(at).map(|&digest| Expected {
                    tensors: image.tensors.len(),
                    digest,
                    checked: Arc::default(),
                });
                NewBlock { image: Arc::new(image), tensors: draft.placeholders }
            })
            .collect();
        let disk = files.map_or(0, |checkpoint| checkpoint.bytes());
        let id = self.pager.add(self.shared.model.clone(), disk, paged, drafts.targets);
        Ok(Paged::new(self.pager, id, stem, blocks, unused))
    }

    fn weights(&self, block: usize) -> Weights {
        Weights::new(BlockSource { shared: self.shared.clone(), block })
    }
}

/// Whether a tensor of this name holds a weight's codes.
fn holds_codes(name: &str) -> bool {
    let all = [Codes::Int8, Codes::Fp8, Codes::RotatedInt8];
    name.rsplit_once('.').is_some_and(|(_, leaf)| all.iter().any(|of| of.leaf() == leaf))
}

/// Whether `name` is one of the factors of activations that stand beside a quantized weight. They
/// mean something only where activations are quantized too; the weight's own scale is all there is
/// to it here.
fn is_activation_scale(name: &str, asked: &HashSet<String>) -> bool {
    let layer = name.strip_suffix(".input_scale").or(name.strip_suffix(".output_scale"));
    layer.is_some_and(|layer| asked.contains(&format!("{layer}.weight._data")))
}

/// Whether the module that `build` constructs can be paged: it must not compute on its weights while
/// it is built. On failure the error names the tensor that was asked for last.
///
/// # Errors
/// The constructor's error, with that name.
pub fn check_pageable<M>(
    pager: &Pager,
    name: &str,
    checkpoint: Arc<Checkpoint>,
    dtype: DType,
    build: impl FnOnce(VarBuilder<'_>) -> candle_core::Result<M>,
) -> Result<()> {
    let builder = ModelBuilder::new(pager, name, checkpoint);
    build(builder.var_builder(dtype)).map(drop).map_err(|error| Error::NotPageable {
        model: name.into(),
        reason: match builder.shared.drafts.lock().last.take() {
            Some(tensor) => format!(
                "its constructor failed after it asked for `{tensor}`; a constructor that computes \
                 on weights cannot be paged ({error})"
            ),
            None => error.to_string(),
        },
    })
}

/// What a model that was built from shapes asked for.
pub struct Sketch {
    shared: Arc<Shared>,
}

impl Sketch {
    /// The stored tensors that the model reads, `(name, shape)` in the order of asking.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        self.shared.requested.lock().clone()
    }
}

/// Where a model's tensors are.
enum Origin {
    Files(Arc<Checkpoint>),
    /// Nowhere: any tensor exists in any shape, in this dtype.
    Shapes(Dtype),
}

impl Origin {
    fn view(&self, name: &str) -> Option<&TensorView> {
        match self {
            Origin::Files(checkpoint) => checkpoint.get(name),
            Origin::Shapes(_) => None,
        }
    }

    /// The file that holds `name`, for messages.
    fn file_of(&self, name: &str) -> String {
        match (self, self.view(name)) {
            (_, Some(view)) => view.file().path().display().to_string(),
            (Origin::Files(checkpoint), None) => checkpoint.path().display().to_string(),
            (Origin::Shapes(_), None) => "sketch".into(),
        }
    }
}

struct Shared {
    model: String,
    origin: Origin,
    device: Candle,
    compute: DType,
    pager: Pager,
    drafts: Mutex<Drafts>,
    requested: Mutex<Vec<(String, Vec<usize>)>>,
    policy: Mutex<Option<QuantPolicy>>,
    rounds_int8: AtomicBool,
    activations: Mutex<Option<Codes>>,
}

#[derive(Default)]
struct Drafts {
    blocks: Vec<Draft>,
    /// What was handed out, so that a tensor asked for twice is one tensor.
    known: HashMap<(Vec<String>, DType, Making), (usize, Tensor)>,
    asked: HashSet<String>,
    last: Option<String>,
    targets: Vec<BlockTarget>,
}

struct Draft {
    name: String,
    tensors: Vec<ImageTensor>,
    placeholders: Vec<Tensor>,
}

impl Draft {
    fn new(name: &str) -> Self {
        Self { name: name.into(), tensors: Vec::new(), placeholders: Vec::new() }
    }

    /// Puts the small tensors behind the large ones, each in the order of asking, so that a device can
    /// bring all small ones in one copy. Codes and their scales stay together.
    fn large_first(&mut self) {
        let paired = |making| matches!(making, Making::Codes(_) | Making::Scales);
        let small = |t: &ImageTensor| t.bytes() < LARGE && !paired(t.making);
        let (tensors, placeholders) =
            (std::mem::take(&mut self.tensors), std::mem::take(&mut self.placeholders));
        let (behind, front): (Vec<_>, Vec<_>) =
            tensors.into_iter().zip(placeholders).partition(|(tensor, _)| small(tensor));
        (self.tensors, self.placeholders) = front.into_iter().chain(behind).unzip();
    }
}

/// Whether a number of this dtype takes a byte, which its format reads.
fn is_byte(stored: Dtype) -> bool {
    matches!(stored, Dtype::U8 | Dtype::I8 | Dtype::F8E4M3)
}

/// The source that one block's constructor sees.
struct BlockSource {
    shared: Arc<Shared>,
    block: usize,
}

impl BlockSource {
    /// The dtype that `parts` have in the slot: that of `form`, or else their own if they agree, else the compute dtype.
    fn slot_dtype(&self, parts: &[Part], form: Form) -> mmgp_quant::Result<DType> {
        let mut dtypes = Vec::with_capacity(parts.len());
        for part in parts {
            let stored = self.expect(part)?;
            let travels = self.shared.pager.device().travels_as(stored);
            let dense = matches!(stored, Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64);
            let converts = match form {
                Form::AsStored | Form::Compute => dense || stored == Dtype::F8E4M3,
                Form::Bytes => false,
                Form::F32 | Form::Codes(_) | Form::Scales => dense,
            };
            match (form, travels) {
                (Form::AsStored, Some(dtype)) => dtypes.push(dtype),
                (Form::F32 | Form::Scales, _) if converts => dtypes.push(DType::F32),
                (Form::Bytes, _) if is_byte(stored) => dtypes.push(DType::U8),
                (Form::Codes(_), _) if converts => dtypes.push(DType::U8),
                _ if converts => dtypes.push(self.shared.compute),
                _ => {
                    return Err(mmgp_quant::Error::Format {
                        origin: self.shared.origin.file_of(&part.name),
                        name: part.name.clone(),
                        found: stored,
                        expected: match form {
                            Form::Bytes => "I8, U8 or F8_E4M3",
                            Form::F32 | Form::Codes(_) | Form::Scales => "BF16, F16, F32 or F64",
                            _ => "BF16, F16, F32, F64 or F8_E4M3",
                        },
                    });
                }
            }
        }
        let first = dtypes.first().copied().unwrap_or(self.shared.compute);
        Ok(if dtypes.iter().all(|d| *d == first) { first } else { self.shared.compute })
    }

    /// The stored dtype of a part whose shape is right.
    fn expect(&self, part: &Part) -> mmgp_quant::Result<Dtype> {
        let view = match &self.shared.origin {
            Origin::Shapes(dtype) => return Ok(*dtype),
            Origin::Files(checkpoint) => checkpoint
                .tensor(&part.name)
                .map_err(|error| mmgp_quant::Error::Invalid(error.to_string()))?,
        };
        if view.shape() != part.shape {
            return Err(mmgp_quant::Error::Shape {
                origin: self.shared.origin.file_of(&part.name),
                name: part.name.clone(),
                expected: part.shape.clone(),
                found: view.shape().to_vec(),
            });
        }
        Ok(view.dtype())
    }

    fn request(&self, parts: &[Part], dtype: DType, making: Making) -> mmgp_quant::Result<Tensor> {
        let mut shape = join_parts(parts)?;
        if making == Making::Scales {
            shape.truncate(1);
            shape.push(1);
        }
        let mut drafts = self.shared.drafts.lock();
        let names = parts.iter().map(|p| p.name.clone()).collect::<Vec<_>>();
        let key = (names, dtype, making);
        drafts.last = key.0.last().cloned();
        if let Some((owner, tensor)) = drafts.known.get(&key) {
            // The stem is leased throughout a pass, so blocks may share what belongs to it.
            if (*owner != self.block && *owner != 0) || tensor.dims() != shape {
                return Err(mmgp_quant::Error::Invalid(format!(
                    "model `{}`: tensor `{}` was asked for by two blocks or in two shapes; ask for \
                     shared tensors in the stem first",
                    self.shared.model, key.0[0]
                )));
            }
            return Ok(tensor.clone());
        }
        let mut element = 0;
        let mut segments = Vec::with_capacity(parts.len());
        for part in parts {
            self.expect(part)?;
            if making != Making::Scales {
                self.shared.requested.lock().push((part.name.clone(), part.shape.clone()));
            }
            if let Some(view) = self.shared.origin.view(&part.name) {
                segments.push(Segment { source: view.clone(), element, stride: None });
                element += view.elements() as usize;
            }
        }
        let tensor = placeholder(&shape, dtype, &self.shared.device)?;
        drafts.asked.extend(key.0.iter().cloned());
        let name = key.0[0].clone();
        drafts.known.insert(key, (self.block, tensor.clone()));
        let draft = &mut drafts.blocks[self.block];
        draft.placeholders.push(tensor.clone());
        draft.tensors.push(ImageTensor { name, dtype, shape, offset: 0, segments, making });
        Ok(tensor)
    }
}

impl Source for BlockSource {
    fn stored(&self, name: &str) -> Option<Stored> {
        let (dtype, shape) = match (&self.shared.origin, self.shared.origin.view(name)) {
            (_, Some(view)) => (view.dtype(), view.shape().to_vec()),
            (Origin::Shapes(dtype), None) => (*dtype, Vec::new()),
            (Origin::Files(_), None) => return None,
        };
        Some(Stored { dtype, shape, origin: self.shared.origin.file_of(name) })
    }

    fn tensor(&self, parts: &[Part], form: Form) -> mmgp_quant::Result<Tensor> {
        join_parts(parts)?;
        let dtype = match form {
            Form::Compute => {
                self.slot_dtype(parts, form)?;
                self.shared.compute
            }
            _ => self.slot_dtype(parts, form)?,
        };
        let making = match form {
            Form::AsStored | Form::Bytes | Form::Compute | Form::F32 => Making::Values,
            Form::Codes(codes) => Making::Codes(codes),
            Form::Scales => Making::Scales,
        };
        self.request(parts, dtype, making)
    }

    fn quantizes(&self, parts: &[Part]) -> Option<Codes> {
        let dense = |part: &Part| {
            let stored = self.stored(&part.name).map(|stored| stored.dtype);
            matches!(stored, Some(Dtype::BF16 | Dtype::F16 | Dtype::F32))
        };
        let policy = self.shared.policy.lock();
        let policy = policy.as_ref().filter(|_| self.block != 0)?;
        let wanted = !parts.iter().any(|p| policy.excludes(&p.name)) && parts.iter().all(dense);
        let codes = policy.codes().with_activations(self.quantizes_activations());
        let inputs = parts.first().and_then(|part| part.shape.get(1)).copied();
        wanted.then(|| codes.with_inputs(inputs.unwrap_or(0)))
    }

    fn rounds_int8(&self) -> bool {
        self.shared.rounds_int8.load(Ordering::Relaxed)
    }

    fn quantizes_activations(&self) -> Option<Codes> {
        *self.shared.activations.lock()
    }

    fn device(&self) -> &Candle {
        &self.shared.device
    }

    fn compute_dtype(&self) -> DType {
        self.shared.compute
    }

    fn origin(&self) -> String {
        self.shared.origin.file_of("")
    }

    fn register(&self, target: Target) {
        self.shared.drafts.lock().targets.push(BlockTarget { block: self.block, target });
    }
}

impl SimpleBackend for BlockSource {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        _: &Candle,
    ) -> candle_core::Result<Tensor> {
        let part = Part { name: name.to_string(), shape: shape.dims().to_vec() };
        self.request(&[part], dtype, Making::Values).map_err(candle_core::Error::wrap)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, _: &Candle) -> candle_core::Result<Tensor> {
        let Some(view) = self.shared.origin.view(name) else {
            candle_core::bail!("{}: tensor `{name}` is missing", self.shared.origin.file_of(name));
        };
        let part = Part { name: name.to_string(), shape: view.shape().to_vec() };
        self.request(&[part], dtype, Making::Values).map_err(candle_core::Error::wrap)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.stored(name).is_some()
    }
}
