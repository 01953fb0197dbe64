//! Adapters on the models of other cases: dense and paged, at the weights given and at weight 1.

use std::sync::Arc;

use mmgp_io::Checkpoint;
use mmgp_lora::{Adapter, AdapterSet, StepWeights, Unfit};
use mmgp_residency::{Budget, ModelBuilder};

use crate::{
    Outcome,
    case::{Case, Error, same_bits},
    classes::{Outputs, flux},
};

/// Cases in the dialects that are built.
const BUILT: &[&str] = &["peft", "peft-metadata", "peft-of-kohya"];

pub(crate) fn run(case: &Case) -> Result<Outcome, Error> {
    let name = case.dir.file_name().map(|name| name.to_string_lossy().into_owned());
    if !name.is_some_and(|name| BUILT.contains(&name.as_str())) {
        return Ok(Outcome::Skipped("this dialect is not built yet".into()));
    }
    let base = Case::open(&case.dir.join(case.about.base.as_ref().ok_or("no base")?))?;
    let checkpoint = Arc::new(Checkpoint::open(base.dir.join("model.safetensors"))?);
    let mut first: Option<Vec<Outputs>> = None;
    for budget in [Budget::Unlimited, Budget::Min] {
        let pager = crate::device::pager()?;
        let builder = ModelBuilder::new(&pager, "transformer", checkpoint.clone());
        let forward = flux(&base, builder)?;
        pager.plan(budget)?;
        let mut set = AdapterSet::new(&pager, &["transformer"]);
        let mut adapters = Vec::new();
        for adapter in &case.about.adapters {
            let weight = StepWeights::constant(adapter.weight)?;
            adapters.push((Adapter::open(case.dir.join(&adapter.file))?, weight));
        }
        set.load(&adapters, Unfit::Fail)?;
        let mut outputs = vec![forward()?];
        set.set_weights(&vec![StepWeights::constant(1.)?; adapters.len()])?;
        outputs.push(forward()?);
        match &first {
            Some(first) => {
                for (a, b) in outputs.iter().zip(first) {
                    same_bits("sample", &a["sample"], &b["sample"])?;
                }
            }
            None => first = Some(outputs),
        }
    }
    for (name, outputs) in ["sample", "sample_weight_1"].into_iter().zip(first.iter().flatten()) {
        case.check(name, &outputs["sample"])?;
    }
    case.done()
}
