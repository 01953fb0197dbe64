//! Stochastic steps of the second order in time
//! ([DPM-Solver++](https://arxiv.org/abs/2211.01095), SDE-DPM-Solver++(2M)), as diffusers'
//! `CogVideoXDPMScheduler` does them.

use candle_core::{DType, Tensor};

use crate::{
    Error, Result,
    nn::add_scaled,
    schedulers::discrete::{DiscreteConfig, Run},
};

/// The scheduler: makes the [`DpmSchedule`] of a run.
#[derive(Clone, Debug)]
pub struct Dpm {
    config: DiscreteConfig,
}

impl Dpm {
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
    pub fn schedule(&self, steps: usize) -> Result<DpmSchedule> {
        Ok(DpmSchedule { run: Run::new(&self.config, steps)? })
    }
}

/// The timesteps of one run.
#[derive(Clone, Debug, PartialEq)]
pub struct DpmSchedule {
    run: Run,
}

/// What a step gives; both f32, of the sample's shape.
#[derive(Clone, Debug)]
pub struct DpmStep {
    /// The sample after the step.
    pub sample: Tensor,
    /// The clean sample that was predicted, which the next step is given.
    pub original: Tensor,
}

impl DpmSchedule {
    /// What the model is told at each step, 0 to below `num_train_timesteps`.
    pub fn timesteps(&self) -> &[usize] {
        &self.run.timesteps
    }

    /// Whether step `at` ends below timestep 0, where nothing follows; it is of the first order then.
    ///
    /// # Errors
    /// A step that there is not.
    pub fn ends(&self, at: usize) -> Result<bool> {
        Ok(self.run.step(at)?.last)
    }

    /// Step `at`: `output` is what the model made of `sample`, `noise` is standard normal, all of one
    /// shape. `previous` is the clean sample of the step before; without it, and where the run ends,
    /// the step is of the first order.
    ///
    /// With λ = ½ ln(ᾱ / (1 − ᾱ)), h = λ' − λ and r = (λ − λ of the step before) / h:
    /// x' = √((1 − ᾱ') / (1 − ᾱ)) e^−h x + √ᾱ' (1 − e^−2h) D + √(1 − ᾱ') √(1 − e^−2h) z, where
    /// D = x₀ + (x₀ − previous x₀) / 2r in the second order and x₀ in the first.
    ///
    /// diffusers draws noise twice in a step of the second order and uses the later draw.
    ///
    /// # Errors
    /// A step that there is not; a `previous` before the first step; shapes that differ; levels
    /// between which no step leads.
    pub fn step(
        &self,
        at: usize,
        output: &Tensor,
        sample: &Tensor,
        noise: &Tensor,
        previous: Option<&Tensor>,
    ) -> Result<DpmStep> {
        let step = self.run.step(at)?;
        let before = match (at.checked_sub(1), previous) {
            (None, Some(_)) => {
                return Err(Error::Input("the first step has no clean sample before it".into()));
            }
            (Some(before), Some(previous)) if !step.last => {
                Some((self.run.step(before)?.level, previous))
            }
            _ => None,
        };
        // Pure noise and pure signal have λ = ∓∞: all that follows has its limit there.
        let lambda = |level: f64| 0.5 * (level / (1. - level)).ln();
        let h = lambda(step.next) - lambda(step.level);
        let kept = ((1. - step.next) / (1. - step.level)).sqrt() * (-h).exp();
        let gone = -(-2. * h).exp_m1();
        let (signal, random) = (step.next.sqrt() * gone, ((1. - step.next) * gone).sqrt());

        let original = self.run.original(step.level, output, sample)?;
        let (denoised, change) = match before {
            Some((level, previous)) => {
                let change = h / (2. * (lambda(step.level) - lambda(level)));
                let previous = previous.to_dtype(DType::F32)?;
                (add_scaled(&(&original * (1. + change))?, &previous, -change)?, change)
            }
            None => (original.clone(), 0.),
        };
        if [kept, signal, random, change].iter().any(|v| !v.is_finite()) {
            return Err(Error::Input(format!(
                "step {at} leads from the level {} to {}, to which there is no step",
                step.level, step.next
            )));
        }
        let sample = (sample.to_dtype(DType::F32)? * kept)?;
        let sample = add_scaled(&sample, &denoised, signal)?;
        let sample = add_scaled(&sample, &noise.to_dtype(DType::F32)?, random)?;
        Ok(DpmStep { sample, original })
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::schedulers::discrete::{PredictionType, TimestepSpacing};

    fn one(v: f64) -> Result<Tensor> {
        Ok(Tensor::new(&[v as f32], &Device::Cpu)?)
    }

    fn config() -> DiscreteConfig {
        DiscreteConfig {
            timestep_spacing: TimestepSpacing::Trailing,
            prediction_type: PredictionType::Sample,
            rescale_betas_zero_snr: true,
            ..DiscreteConfig::default()
        }
    }

    #[test]
    fn a_run_ends_at_the_prediction() -> Result<()> {
        let schedule = Dpm::new(config())?.schedule(3)?;
        assert_eq!(schedule.timesteps(), [999, 666, 332]);
        let (x, z) = (one(0.7)?, one(-1.1)?);
        let step = schedule.step(2, &one(5.)?, &x, &z, Some(&one(9.)?))?;
        assert_eq!(step.sample.to_vec1::<f32>()?, [5.]);
        assert_eq!(step.original.to_vec1::<f32>()?, [5.]);
        Ok(())
    }

    #[test]
    fn a_step_leaves_the_variance_of_its_level() -> Result<()> {
        // Of a sample of signal s and noise of variance 1, and a prediction that is right, the result
        // is the signal's share of the next level and as much noise as belongs there.
        let config = config();
        let levels = config.signal_levels();
        let schedule = Dpm::new(config)?.schedule(4)?;
        let (level, next) = (levels[749], levels[499]);
        let value = |x: f64, z: f64| -> Result<f64> {
            let step = schedule.step(1, &one(3.)?, &one(x)?, &one(z)?, None)?;
            Ok(f64::from(step.sample.to_vec1::<f32>()?[0]))
        };
        let base = value(level.sqrt() * 3., 0.)?;
        assert!((base - next.sqrt() * 3.).abs() < 1e-6, "{base}");
        let old = value(level.sqrt() * 3. + (1. - level).sqrt(), 0.)? - base;
        let new = value(level.sqrt() * 3., 1.)? - base;
        assert!((old * old + new * new - (1. - next)).abs() < 1e-6, "{old} {new} {next}");
        assert!(old > 0. && new > 0.);
        Ok(())
    }

    #[test]
    fn the_second_order_goes_on_as_before() -> Result<()> {
        let config = config();
        let levels = config.signal_levels();
        let schedule = Dpm::new(config)?.schedule(4)?;
        let step = |previous: Option<&Tensor>| -> Result<f64> {
            let step = schedule.step(2, &one(3.)?, &one(1.)?, &one(0.)?, previous)?;
            Ok(f64::from(step.sample.to_vec1::<f32>()?[0]))
        };
        // The same prediction as before changes nothing; one of 1 less goes on by h / 2 h_last.
        let (first, same, risen) = (step(None)?, step(Some(&one(3.)?))?, step(Some(&one(2.)?))?);
        assert!((first - same).abs() < 1e-6);
        let lambda = |t: usize| 0.5 * (levels[t] / (1. - levels[t])).ln();
        let (h, last) = (lambda(249) - lambda(499), lambda(499) - lambda(749));
        let want = levels[249].sqrt() * (1. - (-2. * h).exp()) * h / (2. * last);
        assert!((risen - first - want).abs() < 1e-5, "{risen} {first} {want}");
        // After pure noise the step before is infinitely far away.
        let far = schedule.step(1, &one(3.)?, &one(1.)?, &one(0.)?, Some(&one(-50.)?))?;
        let near = schedule.step(1, &one(3.)?, &one(1.)?, &one(0.)?, None)?;
        assert_eq!(far.sample.to_vec1::<f32>()?, near.sample.to_vec1::<f32>()?);
        Ok(())
    }

    #[test]
    fn what_makes_no_step_is_refused() -> Result<()> {
        let schedule = Dpm::new(config())?.schedule(4)?;
        let x = one(1.)?;
        assert!(schedule.step(4, &x, &x, &x, None).is_err());
        assert!(schedule.step(0, &x, &x, &x, Some(&x)).is_err());
        let wide = Tensor::new(&[1f32, 2.], &Device::Cpu)?;
        assert!(schedule.step(1, &x, &x, &wide, None).is_err());
        assert!(Dpm::new(DiscreteConfig { snr_shift_scale: 0., ..config() }).is_err());
        Ok(())
    }
}
