//! One LoRA file: its keys read by the dialects, its matrices paired and checked.
//!
//! Opening reads the header and the few scalars that are alphas; the matrices are looked at once,
//! for NaN, when the adapter is loaded beside a model.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use mmgp_io::{Checkpoint, Dtype, TensorView};
use rayon::prelude::*;

use crate::{
    Error, Result,
    dialects::{DIALECTS, Leaf, peft},
    metadata::Scaling,
};

/// The key of a header's metadata that holds PEFT's configuration.
const METADATA: &str = "lora_adapter_metadata";
/// Bytes looked through at once.
const PIECE: usize = 1 << 20;

/// A LoRA file whose pairs are whole and whose shapes agree with each other.
#[derive(Clone, Debug)]
pub struct Adapter {
    file: PathBuf,
    modules: Vec<Module>,
    keys: usize,
    /// Keys that no dialect knows, or that belong to no pair.
    pub(crate) strays: Vec<String>,
    /// Keys of kinds that are not read.
    pub(crate) unsupported: Vec<(String, &'static str)>,
}

/// What an adapter adds to one module: `scale · B A`.
#[derive(Clone, Debug)]
pub struct Module {
    /// The model that the file names, such as `transformer`; `None` if it names none.
    pub component: Option<String>,
    /// The module, as the model's own file names it.
    pub name: String,
    /// `A`, `[rank, inputs]`.
    pub down: TensorView,
    /// `B`, `[outputs, rank]`.
    pub up: TensorView,
    /// alpha / rank.
    pub scale: f32,
    /// How many of the file's tensors it takes.
    pub(crate) keys: usize,
}

impl Module {
    /// The rank of its matrices.
    pub fn rank(&self) -> usize {
        self.down.shape()[0]
    }
}

/// The tensors of a module, before they are known to be all there.
#[derive(Default)]
struct Found<'a> {
    down: Option<&'a TensorView>,
    up: Option<&'a TensorView>,
    alpha: Option<&'a TensorView>,
    unsupported: Vec<(String, &'static str)>,
}

impl Adapter {
    /// Opens a LoRA file and checks what can be known from its header. Which of its modules a model
    /// has shows when it is loaded into an [`AdapterSet`](crate::AdapterSet).
    ///
    /// # Errors
    /// A file that cannot be read or trusted, is empty or no adapter; pairs that are not whole or do
    /// not fit each other; rank 0; alphas that are no numbers; a configuration that is none.
    pub fn open(file: impl AsRef<Path>) -> Result<Self> {
        let file = file.as_ref();
        let checkpoint = Checkpoint::open(file)?;
        let Some(first) = checkpoint.iter().next() else {
            return Err(Error::Empty { file: file.into() });
        };

        let mut found: BTreeMap<(Option<&str>, &str), Found<'_>> = BTreeMap::new();
        let (mut strays, mut alone) = (Vec::new(), false);
        for view in checkpoint.iter() {
            let Some(key) = DIALECTS.iter().find_map(|dialect| (dialect.key)(view.name())) else {
                strays.push(view.name().to_string());
                continue;
            };
            alone |= view.name().starts_with(peft::BASE);
            let module = found.entry((key.component, key.module)).or_default();
            let place = match key.leaf {
                Leaf::Down => &mut module.down,
                Leaf::Up => &mut module.up,
                Leaf::Alpha => &mut module.alpha,
                Leaf::Unsupported(kind) => {
                    module.unsupported.push((view.name().into(), kind));
                    continue;
                }
            };
            if let Some(first) = place.replace(view) {
                let (first, second) = (first.name().into(), view.name().into());
                return Err(Error::Duplicate { file: file.into(), first, second });
            }
        }
        if strays.len() == checkpoint.len() {
            let dialects: Vec<&str> = DIALECTS.iter().map(|dialect| dialect.name).collect();
            return Err(Error::NotAnAdapter {
                file: file.into(),
                count: checkpoint.len(),
                first: first.name().into(),
                dialects: dialects.join(", "),
            });
        }

        let mut scaling = Scaling::in_header(file, checkpoint.metadata().get(METADATA))?;
        if alone && !checkpoint.metadata().contains_key(METADATA) {
            scaling = Scaling::beside(file)?;
        }
        let mut adapter = Self {
            file: file.into(),
            modules: Vec::with_capacity(found.len()),
            keys: checkpoint.len(),
            strays,
            unsupported: Vec::new(),
        };
        for ((component, name), found) in found {
            adapter.add(component, name, found, &scaling)?;
        }
        Ok(adapter)
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The modules that it changes.
    pub fn modules(&self) -> &[Module] {
        &self.modules
    }

    /// The number of tensors in the file.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// Looks at every value of every matrix.
    ///
    /// # Errors
    /// The first NaN or infinity of a module; a file that cannot be read.
    pub fn check_values(&self) -> Result<()> {
        self.modules.par_iter().try_for_each(|module| {
            check_finite(&module.down)?;
            check_finite(&module.up)
        })
    }

    fn add(
        &mut self,
        component: Option<&str>,
        name: &str,
        found: Found<'_>,
        scaling: &Scaling,
    ) -> Result<()> {
        let file = || self.file.clone();
        if !found.unsupported.is_empty() {
            // Half of such a module would be another picture than the one it was trained for.
            self.unsupported.extend(found.unsupported);
            return Ok(());
        }
        let (down, up) = match (found.down, found.up) {
            (Some(down), Some(up)) => (down, up),
            (None, None) => {
                self.strays.extend(found.alpha.map(|view| view.name().to_string()));
                return Ok(());
            }
            (Some(one), None) | (None, Some(one)) => {
                let missing = if found.up.is_none() { "lora_B" } else { "lora_A" };
                return Err(Error::Half { file: file(), found: one.name().into(), missing });
            }
        };
        let shape = |view: &TensorView, expected: String| Error::Shape {
            file: file(),
            tensor: view.name().into(),
            expected,
            found: view.shape().to_vec(),
        };
        for view in [down, up] {
            if !matches!(view.dtype(), Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
                let (tensor, found) = (view.name().into(), view.dtype());
                return Err(Error::Dtype { file: file(), tensor, found });
            }
        }
        let &[rank, _] = down.shape() else {
            return Err(shape(down, "[rank, inputs] of a linear layer".into()));
        };
        if rank == 0 {
            return Err(shape(down, "[rank, inputs] with a rank of at least 1".into()));
        }
        match up.shape() {
            &[_, columns] if columns == rank => {}
            _ => return Err(shape(up, format!("[outputs, {rank}], the rank of its lora_A"))),
        }
        let scale = match found.alpha {
            Some(view) if view.elements() == 1 => {
                check_finite(view)?;
                floats(view.dtype(), &read(view, 0, view.len() as usize)?)[0] / rank as f32
            }
            Some(view) => return Err(shape(view, "one number".into())),
            None => scaling.scale(&self.file, component, name, rank)?,
        };
        self.modules.push(Module {
            component: component.map(String::from),
            name: name.into(),
            down: down.clone(),
            up: up.clone(),
            scale,
            keys: 2 + usize::from(found.alpha.is_some()),
        });
        Ok(())
    }
}

/// Whether all values are numbers that f32 holds.
fn check_finite(view: &TensorView) -> Result<()> {
    let file = || view.file().path().to_path_buf();
    if !matches!(view.dtype(), Dtype::BF16 | Dtype::F16 | Dtype::F32 | Dtype::F64) {
        let (tensor, found) = (view.name().into(), view.dtype());
        return Err(Error::Dtype { file: file(), tensor, found });
    }
    let width = view.dtype().bits() / 8;
    for from in (0..view.len()).step_by(PIECE) {
        let piece = read(view, from, PIECE.min((view.len() - from) as usize))?;
        let values = floats(view.dtype(), &piece);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite {
                file: file(),
                tensor: view.name().into(),
                offset: view.range().start + from + at as u64 * width,
                found: values[at],
            });
        }
    }
    Ok(())
}

fn read(view: &TensorView, from: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    view.read_into(from, &mut bytes)?;
    Ok(bytes)
}

/// Little-endian floats of the dtypes that adapters come in.
fn floats(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    fn each<T: bytemuck::AnyBitPattern>(bytes: &[u8], widen: impl Fn(T) -> f32) -> Vec<f32> {
        let values = bytes.chunks_exact(size_of::<T>());
        values.map(|value| widen(bytemuck::pod_read_unaligned(value))).collect()
    }
    match dtype {
        Dtype::BF16 => each(bytes, bf16::to_f32),
        Dtype::F16 => each(bytes, f16::to_f32),
        Dtype::F64 => each(bytes, |value: f64| value as f32),
        _ => each(bytes, |value: f32| value),
    }
}
