//! Measuring a row: two copies of one model on one device, one with all of its weights there and one that
//! streams, whose steps alternate. The first serves all rows of a form, the second is opened for each.
//!
//! A step is a forward with inputs that are on the device already. Steps are timed back to back with one
//! wait at either end: a step that is not timed comes first, so that copies are under way alike when the
//! clock starts and when it stops.

use std::{
    collections::BTreeMap,
    fs,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use mmgp_benches::random;
use mmgp_io::Checkpoint;
use mmgp_lora::AdapterSet;
use mmgp_models::flux::{FluxConfig, FluxInputs, FluxTransformer, latents};
use mmgp_quant::Codes;
use mmgp_residency::{Budget, Bytes, ModelBuilder, ModelPlan, Pager, Report, process_peak};

use crate::{
    adapters::Loras,
    card::Card,
    chart::PLAIN,
    files::{Files, MODEL},
    results::Copies,
    row::{Pass, Row, bound, median, most_streamed},
    rows::{Form, Request, Way},
};

/// How much longer a search is whose plan is held against the one in force.
const EFFORT: u32 = 100;
/// Copies alone are the median of so many.
const COPIES: usize = 5;

/// A device, with all weights of a form on it.
pub(crate) struct Session<'a> {
    card: Card,
    files: &'a Files,
    checkpoint: Arc<Checkpoint>,
    config: FluxConfig,
    form: Form,
    way: Way,
    loras: Option<Loras>,
    text: usize,
    resident: FluxTransformer,
    _adapters: Option<AdapterSet>,
    /// By tokens of the picture.
    references: BTreeMap<usize, Reference>,
}

/// Inputs, and the bits of what the resident model makes of them.
struct Reference {
    inputs: Inputs,
    output: Vec<u32>,
}

impl<'a> Session<'a> {
    /// Opens the device and the files for rows of the form, the way and the adapters of `row`; nothing is read.
    ///
    /// # Errors
    /// A device or files that are not to be had.
    pub(crate) fn open(
        files: &'a Files,
        config: &FluxConfig,
        ordinal: Option<usize>,
        row: &Request,
        text: usize,
    ) -> Result<Self> {
        let Request { form, way, loras, .. } = *row;
        let checkpoint = files.open(form)?;
        let locked = match way {
            Way::Pinned => None,
            Way::Ring => Some(Bytes(0)),
        };
        let card = Card::open(ordinal, locked)?;
        let resident = model(card.pager(), config, &checkpoint, form)?;
        let _adapters = loras.map(|loras| loras.attach(files, &resident)).transpose()?;
        resident.pager().plan(Budget::Unlimited)?;
        Ok(Self {
            card,
            files,
            checkpoint,
            config: config.clone(),
            form,
            way,
            loras,
            text,
            resident,
            _adapters,
            references: BTreeMap::new(),
        })
    }

    /// The device's name.
    pub(crate) fn device(&self) -> String {
        self.card.name()
    }

    /// Measures a row once, and copies of what it streams with nothing beside them if that is wanted.
    ///
    /// # Errors
    /// A budget that is too small, memory that is not there.
    pub(crate) fn row(&mut self, request: &Request, alone: Alone) -> Result<(Row, Option<Copies>)> {
        self.card.limit_link(None)?;
        let reference = match self.references.remove(&request.image) {
            Some(reference) => reference,
            None => self.reference(request.image)?,
        };
        self.card.limit_link(request.link)?;
        let measured = self.measure(request, &reference, alone);
        self.references.insert(request.image, reference);
        measured
    }

    fn reference(&self, image: usize) -> Result<Reference> {
        let inputs = Inputs::new(&self.config, image, self.text, self.card.device())?;
        let output = bits(&self.resident.forward(&inputs.borrowed())?)?;
        let again = bits(&self.resident.forward(&inputs.borrowed())?)?;
        ensure!(output == again, "two resident steps of {image} tokens differ");
        let finite = output.iter().all(|&bits| f32::from_bits(bits).is_finite());
        let varied = output.iter().any(|&bits| bits != output[0]);
        ensure!(finite && varied, "the resident step of {image} tokens computes nothing of use");
        Ok(Reference { inputs, output })
    }

    fn measure(
        &self,
        request: &Request,
        reference: &Reference,
        alone: Alone,
    ) -> Result<(Row, Option<Copies>)> {
        let card = &self.card;
        let inputs = reference.inputs.borrowed();
        let resident = || self.resident.forward(&inputs);
        // Where the system does not allow it, the peak is the process's so far.
        let _ = fs::write("/proc/self/clear_refs", "5");

        let watch = card.watch();
        let begun = Instant::now();
        let streaming = model(&card.pager().beside()?, &self.config, &self.checkpoint, self.form)?;
        let _adapters = self.loras.map(|loras| loras.attach(self.files, &streaming)).transpose()?;
        let pager = streaming.pager();
        let stream = || streaming.forward(&inputs);
        let plan = pager.plan(request.budget)?;
        let mut outputs = vec![stream()?];
        card.synchronize()?;
        let load_s = begun.elapsed().as_secs_f64();
        // Each is over before the next begins, so that what it showed can change the plan.
        for _ in 0..request.steps.warm_up {
            outputs.push(stream()?);
            card.synchronize()?;
        }
        let peak = watch.peak();

        let streams = in_force(pager).is_some_and(|plan| plan.streaming_slots() > 0);
        let (mut resident_times, mut links, mut times) = (Vec::new(), Vec::new(), Vec::new());
        let mut beside_times = Vec::new();
        let mut timed = Counted::default();
        // Bytes and copies are counted once they arrived, so from one resident step to the next.
        let mut arrived = Counted::default();
        let mut quiet = None;
        for group in 0..=request.steps.groups {
            card.synchronize()?;
            let begun = Instant::now();
            resident()?;
            card.synchronize()?;
            resident_times.push(begun.elapsed().as_secs_f64());
            let report = pager.report();
            if let Some(before) = quiet.replace(report.clone()) {
                arrived.add(&before, &report, request.steps.each + 1);
            }
            if group == request.steps.groups {
                break;
            }
            if streams && request.link.is_none() {
                let (link, beside) = link_beside(pager, || {
                    resident()?;
                    card.synchronize()
                })?;
                links.push(link);
                beside_times.extend(beside);
            }
            outputs.push(stream()?);
            card.synchronize()?;
            let before = pager.report();
            let begun = Instant::now();
            for _ in 0..request.steps.each {
                outputs.push(stream()?);
            }
            card.synchronize()?;
            times.push(begun.elapsed().as_secs_f64() / request.steps.each as f64);
            timed.add(&before, &pager.report(), request.steps.each);
        }
        let mut same_bytes = true;
        for output in &outputs {
            same_bytes &= bits(output)? == reference.output;
        }

        let link = match request.link {
            Some(limit) => Some(limit.0 as f64),
            None => (!links.is_empty()).then(|| median(links)),
        };
        let (step_s, resident_s) = (median(times.clone()), median(resident_times));
        let streamed = arrived.per_step(arrived.streamed);
        let bound_s = bound(resident_s, streamed, link);
        let forecast = pager.forecast(MODEL, EFFORT);
        let schedule_s = forecast.as_ref().map(|forecast| forecast.schedule);
        let budget_bytes = Some(plan.budget.0).filter(|&budget| budget != u64::MAX);
        let plan = in_force(pager).context("passes follow no plan")?;
        if let Some(forecast) = &forecast {
            let blocks: Vec<u64> = forecast.blocks.iter().map(|block| block.bytes.0).collect();
            let stem = plan.slots[0].capacity.0;
            let most = most_streamed(budget_bytes, stem, &blocks, plan.expansion.0);
            let verdict = if streamed <= most { "within" } else { "MORE THAN" };
            eprintln!(
                "    streams {} ({} by its plan), {verdict} the {} it may; {} new plans meanwhile",
                Bytes(streamed),
                forecast.streamed,
                Bytes(most),
                arrived.replans
            );
        }
        // What else the card holds is the model that this one is compared with.
        let others = self.resident.pager().report().peak.0;
        let row = Row {
            system: system(request),
            workload: workload(&self.config),
            tokens: request.image + self.text,
            form: self.form,
            budget_bytes,
            link_gb_s: link.map(|link| link / 1e9),
            load_s,
            step_s,
            resident_s,
            streamed_bytes: streamed,
            bound_s,
            schedule_s,
            ratio: step_s / bound_s,
            peak_vram_bytes: peak.map(|peak| peak.saturating_sub(others)),
            peak_rss_bytes: process_peak().map(|peak| peak.0),
            locked_bytes: pager.report().locked.0,
            copies: arrived.per_step(arrived.copies),
            stall_s: timed.seconds(timed.stalled),
            same_bytes,
            schedule_ratio: schedule_s.map(|schedule| step_s / schedule),
            schedule_best_s: forecast.as_ref().map(|forecast| forecast.best),
            own_ms: pager.report().models.iter().map(|m| m.own.as_secs_f64()).sum::<f64>() * 1e3,
            host_ms: timed.seconds(timed.host) * 1e3,
            slots: plan.streaming_slots(),
            resident_blocks: plan.residents(),
            resident_beside_s: (!beside_times.is_empty()).then(|| median(beside_times)),
            step_times: times,
            pass: forecast.map(|forecast| Pass::of(told(request, self.text), step_s, &forecast)),
        };
        let copies = match alone {
            Alone::Measure if streams => Some(self.copies_alone(pager, &row, request)?),
            Alone::Measure | Alone::Leave => None,
        };
        Ok((row, copies))
    }

    fn copies_alone(&self, pager: &Pager, row: &Row, request: &Request) -> Result<Copies> {
        let measured = (0..COPIES).map(|_| pager.measure_link(MODEL));
        let measured: Vec<f64> = measured.collect::<Result<_, _>>().context("copies alone")?;
        Ok(Copies {
            system: row.system.clone(),
            way: self.way,
            form: self.form,
            budget_bytes: row.budget_bytes,
            limit_gb_s: request.link.map(|limit| limit.0 as f64 / 1e9),
            gb_s: median(measured) / 1e9,
        })
    }
}

/// Whether copies are measured with nothing beside them too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alone {
    Leave,
    Measure,
}

/// The model of a checkpoint, in a pager.
///
/// # Errors
/// A checkpoint of something else.
pub(crate) fn model(
    pager: &Pager,
    config: &FluxConfig,
    checkpoint: &Arc<Checkpoint>,
    form: Form,
) -> Result<FluxTransformer> {
    let mut builder = ModelBuilder::new(pager, MODEL, checkpoint.clone());
    let activations = match form {
        Form::Bf16 | Form::Int8 => None,
        Form::W8a8 | Form::Rotated => Some(Codes::Int8),
        Form::Fp8 => Some(Codes::Fp8),
    };
    if let Some(codes) = activations {
        ensure!(!pager.device().candle().is_cpu(), "{codes} activations need a GPU");
        builder.quantize_activations(codes);
    }
    Ok(FluxTransformer::new(config, builder)?)
}

/// The rate of copies while `compute` goes on, as often as it takes, and the seconds of each time that ended
/// before the copies did.
fn link_beside(pager: &Pager, compute: impl Fn() -> Result<()>) -> Result<(f64, Vec<f64>)> {
    thread::scope(|scope| {
        let copies = scope.spawn(|| pager.measure_link(MODEL));
        let mut times = Vec::new();
        loop {
            let begun = Instant::now();
            compute()?;
            if copies.is_finished() {
                break;
            }
            times.push(begun.elapsed().as_secs_f64());
        }
        let rate = copies.join().map_err(|_| anyhow!("the thread that copies came to an end"))?;
        Ok((rate?, times))
    })
}

/// The plan that passes of the model follow now.
fn in_force(pager: &Pager) -> Option<ModelPlan> {
    pager.plan_in_force()?.models.first().cloned()
}

/// What a pager counted over some steps.
#[derive(Default)]
struct Counted {
    steps: u64,
    streamed: u64,
    copies: u64,
    stalled: Duration,
    host: Duration,
    replans: u64,
}

impl Counted {
    fn add(&mut self, before: &Report, after: &Report, steps: usize) {
        let stalled = |report: &Report| report.models.iter().map(|m| m.stalled).sum::<Duration>();
        self.steps += steps as u64;
        self.streamed += after.streamed.0 - before.streamed.0;
        self.copies += after.copies - before.copies;
        self.stalled += stalled(after).saturating_sub(stalled(before));
        self.host += after.host.saturating_sub(before.host);
        self.replans += after.replans - before.replans;
    }

    fn per_step(&self, of_all: u64) -> u64 {
        of_all / self.steps.max(1)
    }

    fn seconds(&self, of_all: Duration) -> f64 {
        of_all.as_secs_f64() / self.steps.max(1) as f64
    }
}

/// What one step reads.
pub(crate) struct Inputs {
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    guidance: Option<Tensor>,
    img_ids: Tensor,
    txt_ids: Tensor,
}

impl Inputs {
    /// Random, on the device.
    ///
    /// # Errors
    /// Those of the device.
    pub(crate) fn new(
        config: &FluxConfig,
        image: usize,
        text: usize,
        device: &Device,
    ) -> Result<Self> {
        let noise = |seed: u64, tokens: usize, width: usize| {
            Tensor::from_vec(random(tokens * width, seed), (1, tokens, width), device)
        };
        let (rows, columns) = grid(image);
        let guidance = || Tensor::new(&[3.5f32], device);
        Ok(Self {
            hidden_states: noise(1, image, config.in_channels)?,
            encoder_hidden_states: noise(2, text, config.joint_attention_dim)?,
            pooled_projections: noise(3, 1, config.pooled_projection_dim)?.squeeze(1)?,
            timestep: Tensor::new(&[0.7f32], device)?,
            guidance: config.guidance_embeds.then(guidance).transpose()?,
            // The model reads positions on the host.
            img_ids: latents::image_ids(rows, columns, &Device::Cpu)?,
            txt_ids: latents::text_ids(text, &Device::Cpu)?,
        })
    }

    /// As a model takes them.
    pub(crate) fn borrowed(&self) -> FluxInputs<'_> {
        FluxInputs {
            hidden_states: &self.hidden_states,
            encoder_hidden_states: &self.encoder_hidden_states,
            pooled_projections: &self.pooled_projections,
            timestep: &self.timestep,
            img_ids: &self.img_ids,
            txt_ids: &self.txt_ids,
            guidance: self.guidance.as_ref(),
        }
    }
}

/// `(rows, columns)` of so many tokens, as square as they allow.
fn grid(tokens: usize) -> (usize, usize) {
    let rows = (1..=tokens.isqrt().max(1)).rev().find(|&rows| tokens.is_multiple_of(rows));
    let rows = rows.unwrap_or(1);
    (rows, tokens / rows)
}

/// The bits of a step's output, on the host.
///
/// # Errors
/// Those of the device.
pub(crate) fn bits(output: &Tensor) -> Result<Vec<u32>> {
    let values = output.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

/// What a row's system is called.
pub(crate) fn system(request: &Request) -> String {
    let ring = match request.way {
        Way::Pinned => "",
        Way::Ring => ", ring",
    };
    let link = request
        .link
        .map_or(String::new(), |limit| format!(", link at {} GB/s", limit.0 as f64 / 1e9));
    let loras = request.loras.map_or(String::new(), |Loras { count, rank }| match count {
        1 => format!(", a LoRA of rank {rank}"),
        _ => format!(", {count} LoRAs of rank {rank}"),
    });
    format!("{PLAIN}{ring}{link}{loras}")
}

/// A row's system, form, budget and tokens.
pub(crate) fn told(request: &Request, text: usize) -> String {
    let (form, budget, image) = (request.form.name(), request.budget, request.image);
    format!("{} {form} at {budget}, {image} + {text} tokens", system(request))
}

/// What a row's model is called.
pub(crate) fn workload(config: &FluxConfig) -> String {
    let (double, single) = (config.num_layers, config.num_single_layers);
    match (double, single, config.hidden()) {
        (19, 38, 3072) => "FLUX.1-dev".into(),
        (_, _, width) => format!("FLUX {double}+{single} of width {width}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::Set;

    #[test]
    fn pictures_are_as_square_as_their_tokens_allow() {
        for (tokens, expected) in [(1024, (32, 32)), (12, (3, 4)), (7, (1, 7)), (1, (1, 1))] {
            assert_eq!(grid(tokens), expected);
        }
    }

    #[test]
    fn systems_tell_what_is_not_plain() {
        let mut names: Vec<String> = Set::Table.requests().iter().map(system).collect();
        names.sort();
        names.dedup();
        let expected = [
            "mmgp",
            "mmgp, link at 12 GB/s",
            "mmgp, link at 20 GB/s",
            "mmgp, ring",
            "mmgp, ring, link at 20 GB/s",
        ];
        assert_eq!(names, expected);
        let row = Set::Table.requests()[0];
        let of = |count| system(&Request { loras: Some(Loras { count, rank: 64 }), ..row });
        assert_eq!([of(1), of(8)], ["mmgp, a LoRA of rank 64", "mmgp, 8 LoRAs of rank 64"]);
    }
}
