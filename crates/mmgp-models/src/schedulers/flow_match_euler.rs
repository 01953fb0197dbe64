//! Euler steps along a rectified flow ([Stable Diffusion 3](https://arxiv.org/abs/2403.03206)), as
//! diffusers' `FlowMatchEulerDiscreteScheduler` does them.
//!
//! The noise levels are computed in the order and width in which numpy computes them there: in f32
//! from levels that are given, in f64 from those it makes itself.

use std::path::{Path, PathBuf};

use candle_core::{DType, Tensor};
use serde::Deserialize;

use crate::{Error, Result, config::Check, nn::add_scaled};

/// How the shift of a dynamic schedule bends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeShift {
    /// e^μ / (e^μ + 1/t − 1)
    Exponential,
    /// μ / (μ + 1/t − 1)
    Linear,
}

/// `FlowMatchEulerDiscreteScheduler`; a key that is missing takes that class's default.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct FlowMatchConfig {
    /// The timestep of pure noise.
    pub num_train_timesteps: usize,
    /// The static shift.
    pub shift: f64,
    /// Whether the shift depends on the size of the picture.
    pub use_dynamic_shifting: bool,
    /// μ at `base_image_seq_len` tokens.
    pub base_shift: f64,
    /// μ at `max_image_seq_len` tokens.
    pub max_shift: f64,
    /// See `base_shift`.
    pub base_image_seq_len: usize,
    /// See `max_shift`.
    pub max_image_seq_len: usize,
    /// Whether 0 is noise and 1 clean.
    pub invert_sigmas: bool,
    /// The last level before 0, to which the schedule is stretched.
    pub shift_terminal: Option<f64>,
    /// Levels spaced as [Karras et al.](https://arxiv.org/abs/2206.00364) do.
    pub use_karras_sigmas: bool,
    /// Levels spaced evenly in their logarithm.
    pub use_exponential_sigmas: bool,
    /// Not built yet: refused.
    pub use_beta_sigmas: bool,
    /// How a dynamic shift bends.
    pub time_shift_type: TimeShift,
    /// Not built yet: refused.
    pub stochastic_sampling: bool,
    #[serde(skip)]
    file: PathBuf,
}

impl Default for FlowMatchConfig {
    fn default() -> Self {
        Self {
            num_train_timesteps: 1000,
            shift: 1.,
            use_dynamic_shifting: false,
            base_shift: 0.5,
            max_shift: 1.15,
            base_image_seq_len: 256,
            max_image_seq_len: 4096,
            invert_sigmas: false,
            shift_terminal: None,
            use_karras_sigmas: false,
            use_exponential_sigmas: false,
            use_beta_sigmas: false,
            time_shift_type: TimeShift::Exponential,
            stochastic_sampling: false,
            file: PathBuf::from("scheduler_config"),
        }
    }
}

impl FlowMatchConfig {
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
        check.range("num_train_timesteps", self.num_train_timesteps, 1..=(1 << 20))?;
        check.positive("shift", self.shift)?;
        for (key, shift) in [("base_shift", self.base_shift), ("max_shift", self.max_shift)] {
            check.that(shift.is_finite(), key, "a number", shift)?;
        }
        let (base, max) = (self.base_image_seq_len, self.max_image_seq_len);
        check.that(base < max, "max_image_seq_len", format_args!("more than {base}"), max)?;
        if let Some(terminal) = self.shift_terminal {
            check.that(
                (0. ..1.).contains(&terminal),
                "shift_terminal",
                "0 to below 1",
                terminal,
            )?;
        }
        let not_built = "false (not built yet)";
        check.that(!self.use_beta_sigmas, "use_beta_sigmas", not_built, true)?;
        check.that(!self.stochastic_sampling, "stochastic_sampling", not_built, true)?;
        let both = self.use_karras_sigmas && self.use_exponential_sigmas;
        check.that(!both, "use_exponential_sigmas", "false beside use_karras_sigmas", true)
    }

    /// μ for a picture of `tokens` packed tokens, on the line through the two points of the config.
    pub fn mu(&self, tokens: usize) -> f64 {
        let (base, max) = (self.base_image_seq_len as f64, self.max_image_seq_len as f64);
        calculate_mu(tokens, base, max, self.base_shift, self.max_shift)
    }
}

/// The line through (`base_len`, `base_shift`) and (`max_len`, `max_shift`) at `tokens`.
pub fn calculate_mu(
    tokens: usize,
    base_len: f64,
    max_len: f64,
    base_shift: f64,
    max_shift: f64,
) -> f64 {
    let m = (max_shift - base_shift) / (max_len - base_len);
    let b = base_shift - m * base_len;
    tokens as f64 * m + b
}

/// `count` levels from 1 to 1/`count`: what the FLUX pipeline asks for.
pub fn linspace_sigmas(count: usize) -> Vec<f64> {
    linspace(1., 1. / count.max(1) as f64, count)
}

/// What a run wants of its schedule. At least one of the first three must be given.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// How many steps.
    pub steps: Option<usize>,
    /// The levels before the shift, instead of evenly spaced ones.
    pub sigmas: Option<&'a [f64]>,
    /// The timesteps; without `sigmas` the levels come from them.
    pub timesteps: Option<&'a [f64]>,
    /// The shift of a dynamic schedule.
    pub mu: Option<f64>,
}

/// The scheduler: makes the [`Schedule`] of a run.
#[derive(Clone, Debug)]
pub struct FlowMatchEuler {
    config: FlowMatchConfig,
}

impl FlowMatchEuler {
    /// Checks the config.
    ///
    /// # Errors
    /// Those of [`FlowMatchConfig::validate`].
    pub fn new(config: FlowMatchConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The config.
    pub fn config(&self) -> &FlowMatchConfig {
        &self.config
    }

    /// The levels of a run, shifted, stretched, spaced and inverted as the config says.
    ///
    /// # Errors
    /// No steps, lists of different lengths, values that are no numbers; a dynamic schedule without
    /// μ.
    pub fn schedule(&self, request: &Request<'_>) -> Result<Schedule> {
        let config = &self.config;
        let count = self.count(request)?;
        let train = config.num_train_timesteps as f64;
        let given = request.timesteps.map(|t| round_all(t.to_vec()));

        // Numpy keeps f32 where it was given some, and computes in f64 what it makes itself.
        let (mut sigmas, single) = match (request.sigmas, &given) {
            (Some(sigmas), _) => (round_all(sigmas.to_vec()), true),
            (None, Some(timesteps)) => (timesteps.clone(), true),
            (None, None) => {
                let (max, min) = self.ends();
                (linspace(max * train, min * train, count), false)
            }
        };
        let r = |v: f64| if single { f64::from(v as f32) } else { v };
        if request.sigmas.is_none() {
            sigmas.iter_mut().for_each(|s| *s = r(*s / train));
        }
        if config.use_dynamic_shifting {
            let mu = request.mu.ok_or_else(|| {
                Error::Input("a schedule with dynamic shifting needs mu, the shift".into())
            })?;
            let mu = match config.time_shift_type {
                TimeShift::Exponential => mu.exp(),
                TimeShift::Linear => mu,
            };
            let mu = r(mu);
            sigmas.iter_mut().for_each(|s| *s = r(mu / r(mu + r(r(1. / *s) - 1.))));
        } else {
            let (shift, more) = (r(config.shift), r(config.shift - 1.));
            sigmas.iter_mut().for_each(|s| *s = r(r(shift * *s) / r(1. + r(more * *s))));
        }
        if let Some(terminal) = config.shift_terminal.filter(|t| *t != 0.) {
            let last = sigmas.last().map_or(0., |s| r(1. - s));
            let factor = r(last / r(1. - terminal));
            sigmas.iter_mut().for_each(|s| *s = r(1. - r(r(1. - *s) / factor)));
        }
        let (first, last) = (sigmas[0], sigmas[count - 1]);
        if config.use_karras_sigmas {
            const RHO: f64 = 7.;
            let (high, low) = (first.powf(1. / RHO), last.powf(1. / RHO));
            let ramp = linspace(0., 1., count);
            sigmas = ramp.iter().map(|t| (high + t * (low - high)).powf(RHO)).collect();
        } else if config.use_exponential_sigmas {
            sigmas = linspace(first.ln(), last.ln(), count).iter().map(|s| s.exp()).collect();
        }

        let mut sigmas: Vec<f32> = sigmas.iter().map(|&s| s as f32).collect();
        if sigmas.iter().any(|s| !s.is_finite()) {
            return Err(Error::Input(format!(
                "a schedule of {count} steps came out as {sigmas:?}"
            )));
        }
        if config.invert_sigmas {
            sigmas.iter_mut().for_each(|s| *s = 1. - *s);
        }
        let timesteps = match &given {
            Some(given) if !config.invert_sigmas => given.iter().map(|&t| t as f32).collect(),
            _ => sigmas.iter().map(|&s| s * train as f32).collect(),
        };
        sigmas.push(if config.invert_sigmas { 1. } else { 0. });
        Ok(Schedule { timesteps, sigmas })
    }

    fn count(&self, request: &Request<'_>) -> Result<usize> {
        let lens =
            [request.steps, request.sigmas.map(<[f64]>::len), request.timesteps.map(<[f64]>::len)];
        let mut known = lens.into_iter().flatten();
        let count = known.next().unwrap_or(0);
        if known.any(|n| n != count) || !(1..=100_000).contains(&count) {
            return Err(Error::Input(format!(
                "a schedule needs one number of steps, 1 to 100000: steps {:?}, {:?} sigmas, {:?} \
                 timesteps were given",
                lens[0], lens[1], lens[2]
            )));
        }
        let values = request.sigmas.unwrap_or(&[]).iter().chain(request.timesteps.unwrap_or(&[]));
        match values.copied().find(|v| !v.is_finite()) {
            Some(value) => Err(Error::Input(format!("a schedule was given the level {value}"))),
            None => Ok(count),
        }
    }

    /// The levels of the first and the last training timestep, as diffusers' f32 has them.
    fn ends(&self) -> (f64, f64) {
        let train = self.config.num_train_timesteps as f32;
        let level = |t: f32| {
            let sigma = t / train;
            if self.config.use_dynamic_shifting {
                return f64::from(sigma);
            }
            let (shift, more) = (self.config.shift as f32, (self.config.shift - 1.) as f32);
            f64::from(shift * sigma / (1. + more * sigma))
        };
        (level(train), level(1.))
    }
}

/// The noise levels of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    timesteps: Vec<f32>,
    sigmas: Vec<f32>,
}

impl Schedule {
    /// What the model is told at each step, 0 to `num_train_timesteps`.
    pub fn timesteps(&self) -> &[f32] {
        &self.timesteps
    }

    /// The level at each step, and the final one: one more than there are timesteps.
    pub fn sigmas(&self) -> &[f32] {
        &self.sigmas
    }

    /// The number of steps.
    pub fn len(&self) -> usize {
        self.timesteps.len()
    }

    /// Whether there are no steps; never the case.
    pub fn is_empty(&self) -> bool {
        self.timesteps.is_empty()
    }

    /// The sample after step `at`: `sample + (σ' − σ) · velocity`, f32, any shape.
    ///
    /// # Errors
    /// A step that there is not; shapes that differ.
    pub fn step(&self, at: usize, velocity: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let (Some(sigma), Some(next)) = (self.sigmas.get(at), self.sigmas.get(at + 1)) else {
            return Err(Error::Input(format!("step {at} of {}", self.len())));
        };
        let dt = f64::from(next - sigma);
        Ok(add_scaled(&sample.to_dtype(DType::F32)?, &velocity.to_dtype(DType::F32)?, dt)?)
    }
}

/// numpy's `linspace`: `count` values from `start` to `stop`, both included.
pub(super) fn linspace(start: f64, stop: f64, count: usize) -> Vec<f64> {
    let step = (stop - start) / count.saturating_sub(1).max(1) as f64;
    let mut values: Vec<f64> = (0..count).map(|i| i as f64 * step + start).collect();
    if count > 1 {
        values[count - 1] = stop;
    }
    values
}

fn round_all(mut values: Vec<f64>) -> Vec<f64> {
    values.iter_mut().for_each(|v| *v = f64::from(*v as f32));
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheduler(change: impl FnOnce(&mut FlowMatchConfig)) -> FlowMatchEuler {
        let mut config = FlowMatchConfig::default();
        change(&mut config);
        FlowMatchEuler { config }
    }

    #[test]
    fn four_plain_steps() -> Result<()> {
        let sigmas = linspace_sigmas(4);
        let plain = scheduler(|_| ());
        let schedule = plain.schedule(&Request { sigmas: Some(&sigmas), ..Request::default() })?;
        assert_eq!(schedule.sigmas(), [1., 0.75, 0.5, 0.25, 0.]);
        assert_eq!(schedule.timesteps(), [1000., 750., 500., 250.]);
        let x = Tensor::new(&[2f32, 4.], &candle_core::Device::Cpu)?;
        assert_eq!(schedule.step(3, &x, &x)?.to_vec1::<f32>()?, [1.5, 3.]);
        assert!(schedule.step(4, &x, &x).is_err());
        Ok(())
    }

    #[test]
    fn exponential_levels_are_even_in_their_logarithm() -> Result<()> {
        let s = scheduler(|c| c.use_exponential_sigmas = true);
        let schedule = s.schedule(&Request { steps: Some(3), ..Request::default() })?;
        let sigmas = schedule.sigmas();
        assert!((sigmas[0] - 1.).abs() < 1e-6 && (sigmas[2] - 0.001).abs() < 1e-8);
        assert!((sigmas[1] - 0.001f32.sqrt()).abs() < 1e-6);
        Ok(())
    }

    #[test]
    fn mu_lies_on_its_line() {
        let config = FlowMatchConfig::default();
        assert!((config.mu(256) - 0.5).abs() < 1e-12);
        assert!((config.mu(4096) - 1.15).abs() < 1e-12);
        assert!((config.mu(2520) - 0.8832291666666666).abs() < 1e-12);
    }

    #[test]
    fn what_makes_no_schedule_is_refused() {
        let plain = scheduler(|_| ());
        let none = Request::default();
        let nan = [1., f64::NAN];
        for request in [
            none,
            Request { steps: Some(0), ..none },
            Request { steps: Some(3), sigmas: Some(&[1., 0.5]), ..none },
            Request { sigmas: Some(&nan), ..none },
            Request { sigmas: Some(&[]), ..none },
            Request { steps: Some(usize::MAX), ..none },
        ] {
            assert!(plain.schedule(&request).is_err(), "{request:?}");
        }
        let dynamic = scheduler(|c| c.use_dynamic_shifting = true);
        let error = dynamic.schedule(&Request { steps: Some(2), ..none }).unwrap_err();
        assert!(error.to_string().contains("mu"));
        for change in [
            (|c| c.use_beta_sigmas = true) as fn(&mut FlowMatchConfig),
            |c| c.stochastic_sampling = true,
            |c| c.shift = f64::NAN,
            |c| c.num_train_timesteps = 0,
            |c| c.max_image_seq_len = 256,
            |c| c.shift_terminal = Some(1.),
        ] {
            assert!(FlowMatchEuler::new(scheduler(change).config).is_err());
        }
    }
}
