//! A guidance scale that changes over the run.

use std::f64::consts::PI;

/// The guidance scale at `timestep` of a run of `steps` steps towards `scale`:
/// 1 + scale · ½ (1 − cos(π ((steps − timestep) / steps)⁵)), what diffusers' CogVideoX pipelines do
/// where `use_dynamic_cfg` is set.
///
/// `timestep` is the scheduler's (0..1000), as there, not the number of the step: of timesteps far
/// above `steps` the result lies anywhere from 1 to 1 + `scale`, and only over the last `steps` of
/// them does it rise smoothly to 1 + `scale`.
pub fn dynamic_guidance(scale: f64, steps: usize, timestep: usize) -> f64 {
    let steps = steps.max(1) as f64;
    let left = (steps - timestep as f64) / steps;
    1. + scale * (1. - (PI * left.powi(5)).cos()) / 2.
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_rises_along_a_cosine() {
        assert!((dynamic_guidance(6., 50, 0) - 7.).abs() < 1e-12);
        assert!((dynamic_guidance(6., 50, 50) - 1.).abs() < 1e-12);
        // Half of the way to the fifth power: cos(π / 32).
        let half = 1. + 3. * (1. - (PI / 32.).cos());
        assert!((dynamic_guidance(6., 50, 25) - half).abs() < 1e-12);
        // Above `steps` the base is negative, and the cosine even: 2^5 half turns.
        assert!((dynamic_guidance(6., 50, 150) - 1.).abs() < 1e-9);
        assert!((dynamic_guidance(6., 50, 100) - 7.).abs() < 1e-12);
    }
}
