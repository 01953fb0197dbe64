//! A row with nothing beside it: one model in a process, timed as `benches/peers/flux.py` times other
//! systems.
//!
//! A step begins and ends with a wait for the device. The card's memory is watched over all steps but those
//! that are timed, and told as the driver tells it to other programs.

use std::{
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::Instant,
};

use anyhow::{Context as _, Result};
use mmgp_models::flux::FluxConfig;
use mmgp_residency::process_peak;
use serde::Serialize;

use crate::{
    card::{Card, used_as_told},
    files::{Files, MODEL},
    measure::{Inputs, bits, model},
    row::median,
    rows::{Form, Request, Way},
};

/// Steps that are timed, after those of the request's warm-up.
const STEPS: usize = 6;

/// What is measured; bytes and seconds of one step unless said.
#[derive(Debug, Serialize)]
pub(crate) struct Single {
    form: Form,
    /// What the weights on the device may take; none for a run with all of them.
    budget_bytes: Option<u64>,
    /// The most weights that were on the device at once.
    held_bytes: u64,
    /// Of the blocks that stream, with nothing beside the copies; none if nothing streams.
    link_gb_s: Option<f64>,
    /// Opening the model and planning.
    load_s: f64,
    /// In which weights are read and page-locked.
    first_step_s: f64,
    /// Median of `step_times`.
    step_s: f64,
    step_times: Vec<f64>,
    streamed_bytes: u64,
    /// Over what was in use before the process opened the device.
    peak_vram_bytes: Option<u64>,
    /// Mapped files included.
    peak_rss_bytes: Option<u64>,
    locked_bytes: u64,
    /// Whether every value of the output is a number.
    finite: bool,
    /// A digest of the output.
    output: String,
}

/// Measures a row.
///
/// # Errors
/// Files or a device that are not to be had, a budget that is too small.
pub(crate) fn measure(
    files: &Files,
    config: &FluxConfig,
    ordinal: Option<usize>,
    request: &Request,
    text: usize,
) -> Result<Single> {
    let checkpoint = files.open(request.form)?;
    // Making the files is no part of the row; where the system does not allow it, its peak is.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let idle = used_as_told();
    let locked = (request.way == Way::Ring).then_some(mmgp_residency::Bytes(0));
    let card = Card::open(ordinal, locked)?;
    card.limit_link(request.link)?;

    let begun = Instant::now();
    let transformer = model(card.pager(), config, &checkpoint, request.form)?;
    let pager = transformer.pager();
    let _adapters = request.loras.map(|loras| loras.attach(files, &transformer)).transpose()?;
    let plan = pager.plan(request.budget)?;
    card.synchronize()?;
    let load_s = begun.elapsed().as_secs_f64();

    let inputs = Inputs::new(config, request.image, text, card.device())?;
    let inputs = inputs.borrowed();
    let step = || {
        card.synchronize()?;
        let begun = Instant::now();
        let output = transformer.forward(&inputs)?;
        card.synchronize()?;
        anyhow::Ok((begun.elapsed().as_secs_f64(), output))
    };
    let watch = card.watch();
    let (first_step_s, _) = step()?;
    for _ in 0..request.steps.warm_up {
        step()?;
    }
    let before = watch.peak();
    let streamed = pager.report().streamed.0;
    let step_times: Vec<f64> = (0..STEPS).map(|_| Ok(step()?.0)).collect::<Result<_>>()?;
    let streamed_bytes = (pager.report().streamed.0 - streamed) / STEPS as u64;
    let watch = card.watch();
    let (_, output) = step()?;
    let peak = before.max(watch.peak());
    let peak_vram_bytes = peak.map(|peak| as_told(peak, card.used(), idle));

    let output = bits(&output)?;
    let mut digest = DefaultHasher::new();
    output.hash(&mut digest);
    let report = pager.report();
    let streams = pager
        .plan_in_force()
        .is_some_and(|plan| plan.models.first().is_some_and(|plan| plan.streaming_slots() > 0));
    let link = streams.then(|| pager.measure_link(MODEL)).transpose().context("copies alone")?;
    Ok(Single {
        form: request.form,
        budget_bytes: Some(plan.budget.0).filter(|&budget| budget != u64::MAX),
        held_bytes: report.peak.0,
        link_gb_s: link.map(|link| link / 1e9),
        load_s,
        first_step_s,
        step_s: median(step_times.clone()),
        step_times,
        streamed_bytes,
        peak_vram_bytes,
        peak_rss_bytes: process_peak().map(|peak| peak.0),
        locked_bytes: report.locked.0,
        finite: output.iter().all(|&bits| f32::from_bits(bits).is_finite()),
        output: format!("{:016x}", digest.finish()),
    })
}

/// A peak that this process saw, as the driver's tool would tell it: what the two say of the same moment
/// differs by what the driver keeps for itself.
fn as_told(peak: u64, now: Option<u64>, idle: Option<u64>) -> u64 {
    match (now, used_as_told(), idle) {
        (Some(now), Some(told), Some(idle)) => (peak + told).saturating_sub(now + idle),
        _ => peak,
    }
}

#[cfg(test)]
mod tests {
    use mmgp_residency::Budget;

    use super::*;
    use crate::rows::combined;

    #[test]
    fn a_row_alone_has_the_same_output_under_every_budget() {
        let mut config = FluxConfig::default();
        (config.num_layers, config.num_single_layers) = (2, 2);
        (config.num_attention_heads, config.guidance_embeds) = (1, true);
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(Some(dir.path()), &config).unwrap();
        let budgets = [Budget::Unlimited, Budget::Min];
        let rows: Vec<Single> = combined(&[Form::Bf16], &[Way::Pinned], &budgets, &[16], &[None])
            .iter()
            .map(|request| measure(&files, &config, None, request, 8).unwrap())
            .collect();
        assert!(rows.iter().all(|row| row.finite && row.step_times.len() == STEPS));
        assert_eq!(rows[0].output, rows[1].output);
        assert_eq!(
            (rows[0].budget_bytes, rows[0].link_gb_s, rows[0].streamed_bytes),
            (None, None, 0)
        );
        assert!(rows[1].streamed_bytes > 0 && rows[1].held_bytes < rows[0].held_bytes);
    }
}
