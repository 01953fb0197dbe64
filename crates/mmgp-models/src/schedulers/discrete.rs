//! What the samplers over discrete training timesteps share: the config, the noise of every
//! timestep, and which timesteps a run visits.
//!
//! Everything is computed in f64, as diffusers does for `scaled_linear`, and only what multiplies
//! tensors is rounded.

use std::{
    f64::consts::FRAC_PI_2,
    path::{Path, PathBuf},
};

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::{Error, Result, config::Check, nn::add_scaled, schedulers::flow_match_euler::linspace};

/// How β grows from `beta_start` to `beta_end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly.
    Linear,
    /// Evenly in √β ([latent diffusion](https://arxiv.org/abs/2112.10752)).
    ScaledLinear,
    /// ᾱ falls along a squared cosine, whatever the ends
    /// ([Improved DDPM](https://arxiv.org/abs/2102.09672), equation 17).
    #[serde(rename = "squaredcos_cap_v2")]
    SquaredCosine,
}

/// What the model predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PredictionType {
    /// The noise.
    Epsilon,
    /// The clean sample.
    Sample,
    /// √ᾱ · noise − √(1 − ᾱ) · clean sample
    /// ([Progressive Distillation](https://arxiv.org/abs/2202.00512), appendix D).
    VPrediction,
}

/// Which timesteps a run visits ([Common Diffusion Noise Schedules](https://arxiv.org/abs/2305.08891),
/// table 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimestepSpacing {
    /// Both the first and the last.
    Linspace,
    /// Multiples of a whole number, from `steps_offset` on.
    Leading,
    /// From the last on, downwards.
    Trailing,
}

/// `CogVideoXDDIMScheduler` and `CogVideoXDPMScheduler`, whose keys and defaults are the same; a key
/// that is missing takes the classes' default.
///
/// The keys `clip_sample`, `clip_sample_range` and `sample_max_value` change nothing there, nor here.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct DiscreteConfig {
    /// The number of timesteps.
    pub num_train_timesteps: usize,
    /// β of timestep 0.
    pub beta_start: f64,
    /// β of the last timestep.
    pub beta_end: f64,
    /// What lies between them.
    pub beta_schedule: BetaSchedule,
    /// A list of β; not built yet: refused.
    pub trained_betas: Option<Vec<f64>>,
    /// Whether a run ends at ᾱ = 1, not at that of timestep 0.
    pub set_alpha_to_one: bool,
    /// What is added to the timesteps of [`TimestepSpacing::Leading`].
    pub steps_offset: usize,
    /// What the model predicts.
    pub prediction_type: PredictionType,
    /// Which timesteps a run visits.
    pub timestep_spacing: TimestepSpacing,
    /// Whether the last timestep is pure noise.
    pub rescale_betas_zero_snr: bool,
    /// What the signal-to-noise ratio of every timestep is divided by.
    pub snr_shift_scale: f64,
    #[serde(skip)]
    pub(super) file: PathBuf,
}

impl Default for DiscreteConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            beta_start: 0.00085,
            beta_end: 0.012,
            beta_schedule: BetaSchedule::ScaledLinear,
            trained_betas: None,
            set_alpha_to_one: true,
            steps_offset: 0,
            prediction_type: PredictionType::Epsilon,
            timestep_spacing: TimestepSpacing::Leading,
            rescale_betas_zero_snr: false,
            snr_shift_scale: 3.,
            file: PathBuf::from("scheduler_config"),
        }
    }
}

impl DiscreteConfig {
    /// Reads and checks a `scheduler_config.json`.
    ///
    /// # Errors
    /// A file that is no such config; values that no such scheduler can have, or that are not built.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let file = path.as_ref().to_path_buf();
        let config = Self { file, ..mmgp_io::read_json(path)? };
        config.validate()?;
        Ok(config)
    }

    /// Checks the values.
    ///
    /// # Errors
    /// The first value that will not do, with file, key, expected and found.
    pub fn validate(&self) -> Result<()> {
        let check = Check::new(&self.file);
        check.range("num_train_timesteps", self.num_train_timesteps, 2..=(1 << 20))?;
        for (key, beta) in [("beta_start", self.beta_start), ("beta_end", self.beta_end)] {
            check.that(beta > 0. && beta < 1., key, "a number between 0 and 1", beta)?;
        }
        let betas = self.trained_betas.as_ref().map(Vec::len);
        check.that(betas.is_none(), "trained_betas", "null (not built yet)", betas)?;
        check.range("steps_offset", self.steps_offset, 0..=self.num_train_timesteps - 1)?;
        check.positive("snr_shift_scale", self.snr_shift_scale)?;
        // Of pure noise, the noise says nothing about the sample.
        let noise = self.prediction_type == PredictionType::Epsilon;
        check.that(
            !(noise && self.rescale_betas_zero_snr),
            "prediction_type",
            "sample or v_prediction beside rescale_betas_zero_snr",
            self.prediction_type,
        )
    }

    /// ᾱ of every timestep: how much of the sample's variance is signal.
    ///
    /// The product of 1 − β up to it; then ᾱ / (s + (1 − s) ᾱ), which divides the signal-to-noise
    /// ratio ᾱ / (1 − ᾱ) by s = `snr_shift_scale`
    /// ([simple diffusion](https://arxiv.org/abs/2301.11093), section 3.1); then, for a last timestep
    /// of pure noise, √ᾱ moved and stretched so that it ends at 0 and begins where it did
    /// ([Common Diffusion Noise Schedules](https://arxiv.org/abs/2305.08891), algorithm 1).
    pub fn signal_levels(&self) -> Vec<f64> {
        let count = self.num_train_timesteps;
        let (start, end) = (self.beta_start, self.beta_end);
        let betas: Vec<f64> = match self.beta_schedule {
            BetaSchedule::Linear => linspace(start, end, count),
            BetaSchedule::ScaledLinear => {
                linspace(start.sqrt(), end.sqrt(), count).iter().map(|root| root * root).collect()
            }
            BetaSchedule::SquaredCosine => {
                let level = |i: usize| {
                    let t = i as f64 / count as f64;
                    ((t + 0.008) / 1.008 * FRAC_PI_2).cos().powi(2)
                };
                (0..count).map(|i| (1. - level(i + 1) / level(i)).min(0.999)).collect()
            }
        };
        let shift = self.snr_shift_scale;
        let mut product = 1.;
        let mut levels: Vec<f64> = betas
            .iter()
            .map(|beta| {
                product *= 1. - beta;
                product / (shift + (1. - shift) * product)
            })
            .collect();
        if self.rescale_betas_zero_snr {
            let (first, last) = (levels[0].sqrt(), levels[count - 1].sqrt());
            let stretch = first / (first - last);
            levels.iter_mut().for_each(|l| *l = ((l.sqrt() - last) * stretch).powi(2));
        }
        levels
    }

    /// The timesteps of a run of `steps`, first to last.
    ///
    /// Where steps do not divide evenly numpy makes one timestep more of [`TimestepSpacing::Trailing`]
    /// for some numbers of steps (61 of 1000 is one); here there are always as many as steps.
    ///
    /// # Errors
    /// No steps, or more than there are timesteps.
    pub fn timesteps(&self, steps: usize) -> Result<Vec<usize>> {
        let count = self.num_train_timesteps;
        if !(1..=count).contains(&steps) {
            return Err(Error::Input(format!("{steps} steps: expected 1 to {count}")));
        }
        let timesteps: Vec<usize> = match self.timestep_spacing {
            TimestepSpacing::Linspace => {
                let even = linspace(0., (count - 1) as f64, steps);
                even.iter().rev().map(|t| t.round_ties_even() as usize).collect()
            }
            TimestepSpacing::Leading => {
                let ratio = count / steps;
                (0..steps).rev().map(|i| i * ratio + self.steps_offset).collect()
            }
            TimestepSpacing::Trailing => {
                // The step as numpy's `arange` has it, rounded where it was added to the start:
                // some timesteps lie half between two numbers.
                let start = count as f64;
                let step = (start - start / steps as f64) - start;
                let at = |i: usize| (start + i as f64 * step).round_ties_even() as usize;
                (0..steps).map(|i| at(i).saturating_sub(1)).collect()
            }
        };
        match timesteps.iter().find(|t| **t >= count) {
            Some(t) => Err(Error::Input(format!(
                "{steps} steps with the offset {} begin at timestep {t} of {count}; use fewer steps",
                self.steps_offset
            ))),
            None => Ok(timesteps),
        }
    }
}

/// One step of a run, as its sampler sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Step {
    /// ᾱ at the step.
    pub(super) level: f64,
    /// ᾱ after it.
    pub(super) next: f64,
    /// Whether nothing follows: the step leads below timestep 0.
    pub(super) last: bool,
}

/// The timesteps of a run and the noise at them.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    pub(super) timesteps: Vec<usize>,
    steps: Vec<Step>,
    prediction: PredictionType,
}

impl Run {
    /// A step leads `num_train_timesteps / steps` timesteps (rounded down) back, which is not always
    /// where the next one begins; that is how diffusers does it.
    pub(super) fn new(config: &DiscreteConfig, steps: usize) -> Result<Self> {
        let timesteps = config.timesteps(steps)?;
        let levels = config.signal_levels();
        let stride = config.num_train_timesteps / steps;
        let end = if config.set_alpha_to_one { 1. } else { levels[0] };
        let step = |&t: &usize| {
            let next = t.checked_sub(stride);
            Step { level: levels[t], next: next.map_or(end, |t| levels[t]), last: next.is_none() }
        };
        let steps = timesteps.iter().map(step).collect();
        Ok(Self { timesteps, steps, prediction: config.prediction_type })
    }

    pub(super) fn step(&self, at: usize) -> Result<Step> {
        let step = self.steps.get(at).copied();
        step.ok_or_else(|| Error::Input(format!("step {at} of {}", self.steps.len())))
    }

    /// The clean sample that `output` predicts at `level`, f32.
    pub(super) fn original(&self, level: f64, output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let (signal, noise) = (level.sqrt(), (1. - level).sqrt());
        let (output, sample) = (output.to_dtype(DType::F32)?, sample.to_dtype(DType::F32)?);
        Ok(match self.prediction {
            PredictionType::Epsilon => (add_scaled(&sample, &output, -noise)? / signal)?,
            PredictionType::Sample => output,
            PredictionType::VPrediction => add_scaled(&(sample * signal)?, &output, -noise)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<DiscreteConfig> {
        let dir = tempfile::tempdir().map_err(candle_core::Error::wrap)?;
        let path = dir.path().join("scheduler_config.json");
        std::fs::write(&path, json).map_err(candle_core::Error::wrap)?;
        DiscreteConfig::from_file(&path)
    }

    fn spaced(timestep_spacing: TimestepSpacing) -> DiscreteConfig {
        DiscreteConfig { timestep_spacing, ..DiscreteConfig::default() }
    }

    #[test]
    fn timesteps_are_spaced_as_the_config_says() -> Result<()> {
        let leading = DiscreteConfig { steps_offset: 1, ..spaced(TimestepSpacing::Leading) };
        assert_eq!(leading.timesteps(4)?, [751, 501, 251, 1]);
        assert_eq!(spaced(TimestepSpacing::Linspace).timesteps(4)?, [999, 666, 333, 0]);
        let trailing = spaced(TimestepSpacing::Trailing);
        assert_eq!(trailing.timesteps(4)?, [999, 749, 499, 249]);
        assert_eq!(trailing.timesteps(1)?, [999]);
        // Halves go to the even number: 937.5 and 812.5, less one.
        assert_eq!(trailing.timesteps(16)?[..4], [999, 937, 874, 811]);
        for steps in [61, 103, 999, 1000] {
            let all = trailing.timesteps(steps)?;
            assert_eq!(all.len(), steps);
            assert!(all.windows(2).all(|pair| pair[0] > pair[1]), "{all:?}");
        }
        for steps in [0, 1001, usize::MAX] {
            assert!(trailing.timesteps(steps).is_err());
        }
        assert!(leading.timesteps(1000).is_err()); // would begin at 1000
        Ok(())
    }

    #[test]
    fn levels_fall_from_signal_to_noise() {
        let plain = DiscreteConfig { snr_shift_scale: 1., ..DiscreteConfig::default() };
        let levels = plain.signal_levels();
        assert!((levels[0] - (1. - 0.00085)).abs() < 1e-15);
        assert!(levels.windows(2).all(|pair| pair[0] > pair[1]));
        // Stable Diffusion's, as its papers give them: √ᾱ ends at 0.0683.
        assert!((levels[999].sqrt() - 0.068265).abs() < 1e-6, "{}", levels[999].sqrt());

        let snr = |l: f64| l / (1. - l);
        let shifted = DiscreteConfig::default().signal_levels();
        for (a, b) in levels.iter().zip(&shifted) {
            assert!((snr(*a) / snr(*b) - 3.).abs() < 1e-9);
        }
        let zero = DiscreteConfig {
            rescale_betas_zero_snr: true,
            prediction_type: PredictionType::VPrediction,
            ..DiscreteConfig::default()
        };
        let rescaled = zero.signal_levels();
        assert_eq!(rescaled[999], 0.);
        assert!((rescaled[0] - shifted[0]).abs() < 1e-12);

        let cosine = DiscreteConfig { beta_schedule: BetaSchedule::SquaredCosine, ..plain.clone() };
        let want = (0.508f64 / 1.008 * FRAC_PI_2).cos().powi(2)
            / (0.008f64 / 1.008 * FRAC_PI_2).cos().powi(2);
        assert!((cosine.signal_levels()[499] - want).abs() < 1e-12);
        let linear = DiscreteConfig { beta_schedule: BetaSchedule::Linear, ..plain };
        let betas = linear.signal_levels();
        assert!((1. - betas[999] / betas[998] - 0.012).abs() < 1e-12);
        assert!((1. - betas[500] / betas[499] - (0.00085 + 0.01115 * 500. / 999.)).abs() < 1e-12);
    }

    #[test]
    fn every_prediction_leads_to_the_clean_sample() -> Result<()> {
        let dev = candle_core::Device::Cpu;
        let (clean, noise, level) = (3f64, -2f64, 0.36f64);
        let (a, b) = (level.sqrt(), (1. - level).sqrt());
        let sample = Tensor::new(&[(a * clean + b * noise) as f32], &dev)?;
        for (prediction, output) in [
            (PredictionType::Epsilon, noise),
            (PredictionType::Sample, clean),
            (PredictionType::VPrediction, a * noise - b * clean),
        ] {
            let run = Run { timesteps: vec![], steps: vec![], prediction };
            let got = run.original(level, &Tensor::new(&[output as f32], &dev)?, &sample)?;
            let got = got.to_vec1::<f32>()?;
            assert!((f64::from(got[0]) - clean).abs() < 1e-6, "{prediction:?} {got:?}");
        }
        Ok(())
    }

    #[test]
    fn a_run_ends_at_one_or_at_the_first_level() -> Result<()> {
        let config = spaced(TimestepSpacing::Trailing);
        let run = Run::new(&config, 4)?;
        let levels = config.signal_levels();
        assert_eq!(run.step(2)?, Step { level: levels[499], next: levels[249], last: false });
        assert_eq!(run.step(3)?, Step { level: levels[249], next: 1., last: true });
        assert!(run.step(4).is_err());
        let run = Run::new(&DiscreteConfig { set_alpha_to_one: false, ..config }, 4)?;
        assert_eq!(run.step(3)?.next, levels[0]);
        Ok(())
    }

    #[test]
    fn missing_keys_take_the_class_defaults() -> Result<()> {
        let config = read(r#"{"_class_name": "CogVideoXDDIMScheduler", "clip_sample": false}"#)?;
        let defaults = DiscreteConfig::default();
        assert_eq!(DiscreteConfig { file: defaults.file.clone(), ..config }, defaults);
        let config =
            read(r#"{"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}"#)?;
        assert_eq!(config.beta_schedule, BetaSchedule::SquaredCosine);
        assert_eq!(config.prediction_type, PredictionType::Sample);
        Ok(())
    }

    #[test]
    fn impossible_values_are_named() {
        for (json, key) in [
            (
                r#""num_train_timesteps": 1"#,
                "`num_train_timesteps`: expected 2 to 1048576, found 1",
            ),
            (r#""beta_start": 0"#, "`beta_start`: expected a number between 0 and 1"),
            (r#""beta_end": 1"#, "`beta_end`"),
            (r#""trained_betas": [0.1, 0.2]"#, "`trained_betas`: expected null (not built yet)"),
            (r#""steps_offset": 1000"#, "`steps_offset`: expected 0 to 999, found 1000"),
            (r#""snr_shift_scale": 0"#, "`snr_shift_scale`: expected a number above 0"),
            (
                r#""rescale_betas_zero_snr": true"#,
                "`prediction_type`: expected sample or v_prediction beside rescale_betas_zero_snr",
            ),
            (r#""timestep_spacing": "even""#, "scheduler_config.json:1:"),
            (r#""beta_schedule": "sigmoid""#, "scheduler_config.json:1:"),
        ] {
            let error = read(&format!("{{{json}}}")).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("scheduler_config.json"), "{error}");
        }
    }
}
