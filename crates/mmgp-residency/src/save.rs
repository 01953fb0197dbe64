//! Writing a model as one file in streaming order: block by block, so that a block's image is one
//! range of the file, with weights as they travel, dense, int8 or fp8.
//!
//! Within a block stand weights or codes first, those that one product reads side by side, then
//! scales, then the rest. The format allows no gaps, so tensors whose size is no multiple of 256
//! stand in a tail behind all blocks, and every other tensor starts at such a multiple. Names and
//! metadata are quanto's and Python mmgp's.
//!
//! Codes of rotated rows ([`Codes::RotatedInt8`]) mean nothing to those, and must not be taken for codes of the weight as it was.
//! So they have a name of their own, `_hadamard256` in place of `_data`, which is what marks them here; the map calls
//! them `qint8_hadamard256`, and a file that has any is not `quanto` but `hadamard256`.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use crossbeam_channel::Sender;
use half::{bf16, f16};
use mmgp_io::{Dtype, Overwrite, TensorSpec, TensorView, Writer, base64_json};
use mmgp_quant::{Codes, Real};
use serde_json::{Map, Value, json};

use crate::{ALIGN, BlockImage, Bytes, Error, Making, Pager, Result};

/// Where data starts in the file.
const START: usize = 4096;
/// Bytes of a source that are read at once.
const PIECE: usize = 8 << 20;
/// Pieces that may wait for the disk.
const PIECES: usize = 4;
/// What quanto calls the scales behind a weight's name.
const SCALES: &str = "._scale";

/// What a model became in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Saved {
    /// The tensors written.
    pub tensors: usize,
    /// Their bytes.
    pub bytes: Bytes,
    /// Linear layers whose weight is int8 or fp8 in the file.
    pub quantized: usize,
}

/// A tensor of the file and what it is made of.
struct Item {
    spec: TensorSpec,
    from: From,
    /// Its place within the block: weights, scales, the rest.
    class: u8,
}

enum From {
    /// The stored bytes.
    View(TensorView),
    /// The codes of a dense weight; leaves its scales.
    Codes(Codes, TensorView),
    /// The scales of the weight of this name, left by its codes.
    Scales(String),
    /// The number one.
    One(Dtype),
}

impl Pager {
    /// Writes the weights that the model `model` uses, those that its builder quantizes so, to
    /// the file `path`: complete and synced, or not at all. `metadata` goes into the header beside
    /// `format` and, if anything is int8 or fp8 with scales, `quantization_format` and `quantization_map_base64`.
    ///
    /// No more than a few pieces of tensors are in memory. What is attached to the model is not written.
    ///
    /// # Errors
    /// A model that is not there; a file that cannot be read, or written.
    pub fn save(
        &self,
        model: &str,
        path: &Path,
        metadata: &BTreeMap<String, String>,
        overwrite: Overwrite,
    ) -> Result<Saved> {
        let images = self.images(model).ok_or_else(|| Error::NotPageable {
            model: model.into(),
            reason: "there is no such model".into(),
        })?;
        let items = in_order(images.iter().map(items_of).collect());
        let quantized = map_of(&items);
        let mut metadata = metadata.clone();
        metadata.insert("format".into(), "pt".into());
        if !quantized.is_empty() {
            let rotated = items.iter().any(|item| rotated(&item.spec.name).is_some());
            let format = if rotated { "hadamard256" } else { "quanto" };
            metadata.insert("quantization_format".into(), format.into());
            let map = Value::Object(quantized.clone());
            metadata.insert("quantization_map_base64".into(), base64_json(&map));
        }
        let specs: Vec<TensorSpec> = items.iter().map(|item| item.spec.clone()).collect();
        let mut writer = Writer::create_aligned(path, &specs, &metadata, overwrite, START)?;
        // One thread reads and quantizes while this one writes: the slower of the two decides.
        std::thread::scope(|scope| {
            let (pieces, inbox) = crossbeam_channel::bounded(PIECES);
            let items = &items;
            let maker = scope.spawn(move || make(items, &pieces));
            for (item, piece) in inbox {
                let item: &Item = item;
                writer.write(&item.spec.name, &piece)?;
            }
            maker.join().unwrap_or_else(|_| {
                let reason = "the thread that reads it came to an end".into();
                Err(Error::NotPageable { model: model.into(), reason })
            })
        })?;
        writer.finish()?;
        let bytes = specs.iter().filter_map(TensorSpec::bytes).sum();
        Ok(Saved { tensors: specs.len(), bytes: Bytes(bytes), quantized: quantized.len() })
    }
}

/// What a block becomes in the file, in the order in which its module asked.
fn items_of(image: &BlockImage) -> Vec<Item> {
    let mut items = Vec::new();
    let stored = image.tensors.iter().flat_map(|tensor| &tensor.segments);
    let turned: HashSet<&str> = stored.filter_map(|s| rotated(s.source.name())).collect();
    for tensor in image.tensors.iter().filter(|t| t.making != Making::Scales) {
        for view in tensor.segments.iter().map(|segment| &segment.source) {
            let (name, shape) = (view.name(), view.shape());
            let mut push = |name: String, dtype, shape: Vec<usize>, from, class| {
                items.push(Item { spec: TensorSpec::new(name, dtype, shape), from, class });
            };
            let layer = match tensor.making {
                Making::Codes(to) => {
                    let rows = shape.first().copied().unwrap_or(0);
                    let codes = From::Codes(to, view.clone());
                    let dtype = match to {
                        Codes::Int8 | Codes::RotatedInt8 => Dtype::I8,
                        Codes::Fp8 => Dtype::F8E4M3,
                    };
                    push(format!("{name}.{}", to.leaf()), dtype, shape.to_vec(), codes, 0);
                    let scales = From::Scales(name.into());
                    push(format!("{name}{SCALES}"), view.dtype(), vec![rows, 1], scales, 1);
                    let layer = name.strip_suffix(".weight").unwrap_or(name);
                    (to != Codes::RotatedInt8).then_some((layer, view.dtype()))
                }
                _ => {
                    let class = match name {
                        _ if name.ends_with(SCALES) => 1,
                        _ if shape.len() == 2 => 0,
                        _ => 2,
                    };
                    push(
                        name.into(),
                        view.dtype(),
                        shape.to_vec(),
                        From::View(view.clone()),
                        class,
                    );
                    let weight = name.strip_suffix(SCALES).filter(|w| !turned.contains(w));
                    let layer = weight.and_then(|weight| weight.strip_suffix(".weight"));
                    layer.map(|layer| (layer, view.dtype()))
                }
            };
            // Of activations, which are not quantized; quanto wants them there.
            if let Some((layer, dtype)) = layer {
                for name in ["input_scale", "output_scale"] {
                    push(format!("{layer}.{name}"), dtype, Vec::new(), From::One(dtype), 2);
                }
            }
        }
    }
    items
}

/// All blocks' items in file order, each name once.
fn in_order(blocks: Vec<Vec<Item>>) -> Vec<Item> {
    let mut seen = HashSet::new();
    let (mut front, mut tail) = (Vec::new(), Vec::new());
    for mut block in blocks {
        block.sort_by_key(|item| item.class);
        for item in block {
            if !seen.insert(item.spec.name.clone()) {
                continue;
            }
            match item.spec.bytes().is_some_and(|bytes| bytes.is_multiple_of(ALIGN)) {
                true => front.push(item),
                false => tail.push(item),
            }
        }
    }
    front.append(&mut tail);
    front
}

/// The name of the weight whose rotated codes are called `name`.
fn rotated(name: &str) -> Option<&str> {
    name.strip_suffix(Codes::RotatedInt8.leaf())?.strip_suffix('.')
}

/// quanto's quantization map: the layers whose weights are int8 or fp8.
fn map_of(items: &[Item]) -> Map<String, Value> {
    let layer = |item: &Item| {
        let name = &item.spec.name;
        let (weights, weight) = match (item.spec.dtype, rotated(name)) {
            (Dtype::I8, Some(weight)) => ("qint8_hadamard256", weight),
            (Dtype::I8, None) => ("qint8", name.strip_suffix("._data")?),
            (Dtype::F8E4M3, _) => ("qfloat8_e4m3fn", name.strip_suffix("._data")?),
            _ => return None,
        };
        let name = weight.strip_suffix(".weight")?;
        Some((name.to_string(), json!({ "weights": weights, "activations": "none" })))
    };
    items.iter().filter_map(layer).collect()
}

/// A piece of a tensor of the file, on its way to the disk.
type Piece<'a> = (&'a Item, Vec<u8>);

/// Sends the bytes of all items in order, until they are sent or nobody takes them any more.
fn make<'a>(items: &'a [Item], pieces: &Sender<Piece<'a>>) -> Result<()> {
    let mut scales = HashMap::new();
    for item in items {
        // A writer that failed has its own error.
        let mut send = |piece| pieces.send((item, piece)).is_ok();
        let taken = match &item.from {
            From::View(view) => copy(view, &mut send)?,
            From::Codes(to, view) => {
                let (taken, scale) = match view.dtype() {
                    Dtype::BF16 => codes::<bf16>(*to, view, &mut send)?,
                    Dtype::F16 => codes::<f16>(*to, view, &mut send)?,
                    _ => codes::<f32>(*to, view, &mut send)?,
                };
                scales.insert(view.name(), scale);
                taken
            }
            From::Scales(of) => send(scales.remove(of.as_str()).unwrap_or_default()),
            From::One(dtype) => send(one(*dtype).to_vec()),
        };
        if !taken {
            break;
        }
    }
    Ok(())
}

/// The stored bytes, piece by piece; whether all were taken.
fn copy(view: &TensorView, send: &mut impl FnMut(Vec<u8>) -> bool) -> Result<bool> {
    let mut offset = 0;
    while offset < view.len() {
        let mut piece = vec![0; PIECE.min((view.len() - offset) as usize)];
        view.read_into(offset, &mut piece)?;
        offset += piece.len() as u64;
        if !send(piece) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Quantizes rows on all cores and sends their codes; whether all were taken, and the scales' bytes.
fn codes<T: Real + bytemuck::Pod>(
    to: Codes,
    view: &TensorView,
    send: &mut impl FnMut(Vec<u8>) -> bool,
) -> Result<(bool, Vec<u8>)> {
    let &[rows, inputs] = view.shape() else { return Ok((true, Vec::new())) };
    let step = (PIECE / (inputs * size_of::<T>()).max(1)).clamp(1, rows.max(1));
    let (mut weight, mut scales) = (vec![T::zeroed(); step * inputs], vec![T::zeroed(); rows]);
    for first in (0..rows).step_by(step) {
        let count = step.min(rows - first);
        let weight = &mut weight[..count * inputs];
        let offset = (first * inputs * size_of::<T>()) as u64;
        view.read_into(offset, bytemuck::cast_slice_mut(weight))?;
        let (mut codes, scales) = (vec![0; count * inputs], &mut scales[first..first + count]);
        to.quantize(weight, inputs, &mut codes, scales)
            .map_err(|fault| Error::not_finite(view, first + fault.row, fault.column))?;
        if !send(codes) {
            return Ok((false, Vec::new()));
        }
    }
    Ok((true, bytemuck::cast_slice(&scales).to_vec()))
}

fn one(dtype: Dtype) -> &'static [u8] {
    match dtype {
        Dtype::BF16 => &[0x80, 0x3f],
        Dtype::F16 => &[0x00, 0x3c],
        _ => &[0, 0, 0x80, 0x3f],
    }
}
