//! Deterministic steps of [DDIM](https://arxiv.org/abs/2010.02502), as diffusers'
//! `CogVideoXDDIMScheduler` does them.

use candle_core::{DType, Tensor};

use crate::{
    Result,
    nn::add_scaled,
    schedulers::discrete::{DiscreteConfig, Run},
};

/// The scheduler: makes the [`DdimSchedule`] of a run.
#[derive(Clone, Debug)]
pub struct Ddim {
    config: DiscreteConfig,
}

impl Ddim {
    /// Checks the config.
    ///
    /// # Errors
    /// Those of [`DiscreteConfig::validate`].
    pub fn new(config: DiscreteConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The schedule of a run.
    ///
    /// # Errors
    /// Those of [`DiscreteConfig::timesteps`].
    pub fn schedule(&self, steps: usize) -> Result<DdimSchedule> {
        Ok(DdimSchedule { run: Run::new(&self.config, steps)? })
    }
}

/// The timesteps of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct DdimSchedule {
    run: Run,
}

impl DdimSchedule {
    /// What the model is told at each step, 0 to below `num_train_timesteps`.
    pub fn timesteps(&self) -> &[usize] {
        &self.run.timesteps
    }

    /// The sample after step `at`, f32, any shape; `output` is what the model made of `sample`.
    ///
    /// Equation 12 with σ = 0, written with the clean sample x₀ and the sample x instead of the
    /// noise: x' = √ᾱ' x₀ + √((1 − ᾱ') / (1 − ᾱ)) (x − √ᾱ x₀).
    ///
    /// # Errors
    /// A step that there is not; shapes that differ.
    pub fn step(&self, at: usize, output: &Tensor, sample: &Tensor) -> Result<Tensor> {
        let step = self.run.step(at)?;
        let original = self.run.original(step.level, output, sample)?;
        let kept = ((1. - step.next) / (1. - step.level)).sqrt();
        let new = step.next.sqrt() - step.level.sqrt() * kept;
        Ok(add_scaled(&(sample.to_dtype(DType::F32)? * kept)?, &original, new)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::schedulers::discrete::{PredictionType, TimestepSpacing};

    #[test]
    fn a_step_keeps_sample_and_noise_and_changes_their_shares() -> Result<()> {
        let config = DiscreteConfig {
            timestep_spacing: TimestepSpacing::Trailing,
            prediction_type: PredictionType::Sample,
            ..DiscreteConfig::default()
        };
        let levels = config.signal_levels();
        let schedule = Ddim::new(config)?.schedule(4)?;
        let (clean, noise) = (3f64, -2f64);
        let mix = |level: f64| level.sqrt() * clean + (1. - level).sqrt() * noise;
        let one = |v: f64| Tensor::new(&[v as f32], &Device::Cpu);
        for (at, next) in [levels[749], levels[499], levels[249], 1.].into_iter().enumerate() {
            let sample = one(mix(levels[schedule.timesteps()[at]]))?;
            let got = schedule.step(at, &one(clean)?, &sample)?.to_vec1::<f32>()?[0];
            assert!((f64::from(got) - mix(next)).abs() < 1e-6, "{at}: {got} {}", mix(next));
        }
        assert!(schedule.step(4, &one(0.)?, &one(0.)?).is_err());
        assert!(
            Ddim::new(DiscreteConfig { beta_end: f64::NAN, ..DiscreteConfig::default() }).is_err()
        );
        Ok(())
    }
}
