//! What the settings come to on this machine: each value, where it came from, what it does.

use std::fmt::Write as _;

use crate::{Hardware, Models, Origin, Settings};

/// One setting, explained.
#[derive(Clone, Debug, PartialEq)]
pub struct Explained {
    /// Its name, as [`Settings::set`] takes it.
    pub name: &'static str,
    /// Its value, as [`Settings::set`] takes it.
    pub value: String,
    /// Where the value came from.
    pub origin: Origin,
    /// What it does on this machine.
    pub effect: Effect,
}

/// Whether a setting does anything on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// It acts: how.
    Acts(&'static str),
    /// It is kept but does nothing: why.
    None(&'static str),
}

impl Settings {
    /// Every setting with its origin and its effect on `hardware`.
    pub fn explained(&self, hardware: &Hardware) -> Vec<Explained> {
        // A field that is added must be explained.
        let Settings {
            budgets,
            quantize_transformer,
            extra_models_to_quantize,
            quantization_type,
            quantize_exclude,
            pinned_memory,
            pinned_peft_lora,
            partial_pinning,
            perc_reserved_mem_max,
            async_transfers,
            working_vram,
            vram_safety_coefficient,
            loras,
        } = self;
        let on_gpu = |how, why_not| match hardware.vram {
            Some(_) => Effect::Acts(how),
            None => Effect::None(why_not),
        };
        let pins = |how| on_gpu(how, "there is no GPU, nothing is copied from pinned memory");
        let vram = |how| on_gpu(how, "there is no GPU; on the CPU, budgets bound the weights");
        let excluded: String = match quantize_exclude.get().as_slice() {
            [] => "none".into(),
            patterns => patterns.join(","),
        };
        let reserved = perc_reserved_mem_max.get().map_or("auto".into(), |s| format!("{s}"));

        let bounds = match budgets.origin() {
            _ if budgets.get().is_empty() => "no model is bounded on its own",
            Origin::Profile(_) => {
                "weights of each model at once, in MiB, raised to the least it runs in"
            }
            _ => "weights of each model at once, in MiB, refused below the least it runs in",
        };
        let encoders = match extra_models_to_quantize.get() {
            Models::Encoders => "text encoders whose class is a T5, a Llama or an LLM",
            _ => "beside the transformer",
        };
        let fetch = on_gpu("", "there is no GPU; the next block is always read while one computes");
        let adapters = Effect::None("every linear layer takes adapters, none is declared");

        macro_rules! row {
            ($setting:ident, $effect:expr) => {
                row!($setting, $setting.get(), $effect)
            };
            ($setting:ident, $value:expr, $effect:expr) => {
                Explained {
                    name: stringify!($setting),
                    value: $value.to_string(),
                    origin: $setting.origin(),
                    effect: $effect,
                }
            };
        }
        vec![
            row!(budgets, Effect::Acts(bounds)),
            row!(quantize_transformer, Effect::Acts("the model `transformer`")),
            row!(extra_models_to_quantize, Effect::Acts(encoders)),
            row!(quantization_type, Effect::Acts("of what is quantized while loading")),
            row!(quantize_exclude, excluded, Effect::Acts("patterns of what is not quantized")),
            row!(pinned_memory, pins("")),
            row!(pinned_peft_lora, pins("")),
            row!(partial_pinning, pins("")),
            row!(perc_reserved_mem_max, reserved, pins("share of RAM that may be pinned")),
            row!(async_transfers, fetch),
            row!(working_vram, vram("VRAM that each model leaves free")),
            row!(vram_safety_coefficient, vram("share of VRAM that weights may take")),
            row!(loras, adapters),
        ]
    }

    /// What `--verbose 2` prints: a line for each of [`explained`](Self::explained).
    pub fn explain(&self, hardware: &Hardware) -> String {
        let rows = self.explained(hardware);
        let width = |of: fn(&Explained) -> usize| rows.iter().map(of).max().unwrap_or(0);
        let (names, values) = (width(|r| r.name.len()), width(|r| r.value.len()));
        let mut text = format!("settings ({hardware}):");
        for Explained { name, value, origin, effect } in &rows {
            let origin = origin.to_string();
            let line = format!("{name:<names$}  {value:<values$}  {origin:<9}");
            let line = match effect {
                Effect::Acts(how) => format!("{line}  {how}"),
                Effect::None(why) => format!("{line}  no effect here: {why}"),
            };
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  {}", line.trim_end());
        }
        text
    }
}
