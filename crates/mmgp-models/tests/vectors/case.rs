//! One case of the golden vectors: its files, and the comparison with what was computed elsewhere.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
};

use candle_core::{DType, Tensor};
use serde::Deserialize;
use serde_json::Value;

use crate::Outcome;

/// What bf16 may cost at most. What it costs in PyTorch, `benches/peers/bf16.py` tells.
const HALF_TOLERANCE: f64 = 0.06;

pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;

#[derive(Deserialize)]
pub(crate) struct Description {
    pub(crate) class: String,
    pub(crate) kind: String,
    #[serde(default)]
    pub(crate) kwargs: Value,
    tolerance_rel: f64,
    #[serde(default)]
    pub(crate) exact_outputs: Vec<String>,
    pub(crate) base: Option<PathBuf>,
    #[serde(default)]
    pub(crate) adapters: Vec<Adapted>,
}

/// An adapter of a `lora` case.
#[derive(Deserialize)]
pub(crate) struct Adapted {
    pub(crate) file: PathBuf,
    pub(crate) weight: f32,
}

pub(crate) struct Case {
    pub(crate) dir: PathBuf,
    pub(crate) about: Description,
    io: HashMap<String, Tensor>,
    checked: RefCell<BTreeMap<String, f64>>,
}

impl Case {
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let about = mmgp_io::read_json(dir.join("case.json"))?;
        let io =
            candle_core::safetensors::load(dir.join("io.safetensors"), &crate::device::device())?;
        Ok(Self { dir: dir.into(), about, io, checked: RefCell::default() })
    }

    pub(crate) fn input(&self, name: &str) -> Result<&Tensor, Error> {
        self.io.get(&format!("in.{name}")).ok_or_else(|| format!("no input {name}").into())
    }

    pub(crate) fn optional_input(&self, name: &str) -> Option<&Tensor> {
        self.io.get(&format!("in.{name}"))
    }

    pub(crate) fn has_output(&self, name: &str) -> bool {
        self.io.contains_key(&format!("out.{name}"))
    }

    /// The names of all outputs.
    pub(crate) fn outputs(&self) -> Vec<&str> {
        let names = self.io.keys().filter_map(|k| k.strip_prefix("out."));
        names.collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Fails unless `got` is within tolerance of the output `name`; a file's README says what that
    /// means.
    pub(crate) fn check(&self, name: &str, got: &Tensor) -> Result<(), Error> {
        let exact = self.about.exact_outputs.iter().any(|exact| exact == name);
        self.check_within(name, got, if exact { 0. } else { self.about.tolerance_rel })
    }

    /// Whether the case says something about a device that computes in bf16: that of a model does.
    pub(crate) fn is_model(&self) -> bool {
        ["transformer", "text_encoder", "vae_encoder", "vae_decoder"].contains(&&*self.about.kind)
    }

    /// Fails unless `got` is equal to the output `name`.
    pub(crate) fn check_exact(&self, name: &str, got: &Tensor) -> Result<(), Error> {
        self.check_within(name, got, 0.)
    }

    fn check_within(&self, name: &str, got: &Tensor, tolerance: f64) -> Result<(), Error> {
        let want =
            self.io.get(&format!("out.{name}")).ok_or_else(|| format!("no output {name}"))?;
        let tolerance = match crate::device::dtype() {
            DType::F32 => tolerance,
            _ => tolerance.max(HALF_TOLERANCE),
        };
        let error = compare(name, got, want, tolerance)?;
        self.checked.borrow_mut().insert(name.into(), error);
        Ok(())
    }

    /// The outcome once every output was compared.
    pub(crate) fn done(&self) -> Result<Outcome, Error> {
        let outputs: BTreeSet<&str> =
            self.io.keys().filter_map(|k| k.strip_prefix("out.")).collect();
        let checked = self.checked.borrow();
        let missing: Vec<_> = outputs.iter().filter(|name| !checked.contains_key(**name)).collect();
        match missing.is_empty() {
            true => Ok(Outcome::Ran(checked.iter().map(|(k, v)| (k.clone(), *v)).collect())),
            false => Err(format!("outputs that nothing was compared with: {missing:?}").into()),
        }
    }
}

/// The relative error in the 2-norm, if both it and the largest deviation are within tolerance.
pub(crate) fn compare(
    name: &str,
    got: &Tensor,
    want: &Tensor,
    tolerance: f64,
) -> Result<f64, Error> {
    if got.dims() != want.dims() {
        return Err(format!("{name}: shape {:?}, not {:?}", got.dims(), want.dims()).into());
    }
    let values = |t: &Tensor| t.to_dtype(DType::F64)?.flatten_all()?.to_vec1::<f64>();
    let (got, want) = (values(got)?, values(want)?);
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let max = |v: &mut dyn Iterator<Item = f64>| v.fold(0f64, |m, x| m.max(x.abs()));
    let mut difference = got.iter().zip(&want).map(|(a, b)| a - b);
    let (two, most) = (norm(&mut difference.clone()), max(&mut difference));
    let (norm, largest) = (norm(&mut want.iter().copied()), max(&mut want.iter().copied()));
    let within = two <= tolerance * norm && most <= 10. * tolerance * largest;
    if !within || got.iter().any(|v| v.is_nan()) {
        return Err(format!(
            "{name}: off by {:.2e} of the norm and {:.2e} of the maximum, allowed {tolerance:.0e}",
            two / norm,
            most / largest
        )
        .into());
    }
    Ok(if norm > 0. { two / norm } else { 0. })
}

/// Fails unless two tensors are equal to the bit.
pub(crate) fn same_bits(what: &str, a: &Tensor, b: &Tensor) -> Result<(), Error> {
    let bits = |t: &Tensor| -> candle_core::Result<Vec<u32>> {
        Ok(t.flatten_all()?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
    };
    match a.dims() == b.dims() && bits(a)? == bits(b)? {
        true => Ok(()),
        false => Err(format!("{what}: paged and resident differ").into()),
    }
}
