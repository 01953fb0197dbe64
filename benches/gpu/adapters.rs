//! Adapters for the model: random LoRAs of one rank on its attention and feed-forward layers, each made once.

use std::str::FromStr;

use anyhow::Result;
use mmgp_io::{Dtype, TensorSpec};
use mmgp_lora::{Adapter, AdapterSet, StepWeights, Unfit};
use mmgp_models::flux::FluxTransformer;

use crate::files::{Files, MODEL};

/// So small that the model's values stay what they are about.
const WEIGHT: f32 = 0.1;

/// How many there are beside the model, and of which rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loras {
    pub(crate) count: usize,
    pub(crate) rank: usize,
}

impl FromStr for Loras {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('x').map(|(count, rank)| (count.parse(), rank.parse()));
        match parts {
            Some((Ok(count @ 1..), Ok(rank @ 1..))) => Ok(Self { count, rank }),
            _ => Err("expected a number and a rank, such as 8x64".into()),
        }
    }
}

impl Loras {
    /// Puts them beside `model`, for as long as the set lives.
    ///
    /// # Errors
    /// A disk that refuses; a budget that is too small.
    pub(crate) fn attach(self, files: &Files, model: &FluxTransformer) -> Result<AdapterSet> {
        let weights = StepWeights::constant(WEIGHT)?;
        let adapter = |at| Ok((Adapter::open(files.adapter(self.rank, at)?)?, weights.clone()));
        let adapters = (0..self.count).map(adapter).collect::<Result<Vec<_>>>()?;
        let mut set = AdapterSet::new(model.pager(), &[MODEL]);
        set.load(&adapters, Unfit::Fail)?;
        Ok(set)
    }
}

/// The tensors of an adapter for the layers whose weights are `tensors`.
pub(crate) fn tensors(tensors: &[TensorSpec], rank: usize) -> Vec<TensorSpec> {
    let parts = |spec: &TensorSpec| {
        let layer = spec.name.strip_suffix(".weight")?;
        let [outputs, inputs] = *spec.shape.as_slice() else { return None };
        let block = layer.split_once('.').is_some_and(|(list, _)| list.ends_with("blocks"));
        let part = |part: &str, shape: [usize; 2]| {
            TensorSpec::new(format!("{MODEL}.{layer}.lora_{part}.weight"), Dtype::BF16, shape)
        };
        (block && !layer.contains("norm"))
            .then(|| [part("A", [rank, inputs]), part("B", [outputs, rank])])
    };
    tensors.iter().filter_map(parts).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_and_feed_forward_are_adapted() {
        let spec = |name: &str, shape: &[usize]| TensorSpec::new(name, Dtype::BF16, shape);
        let all = [
            spec("x_embedder.weight", &[128, 64]),
            spec("transformer_blocks.1.attn.to_q.weight", &[8, 6]),
            spec("transformer_blocks.1.attn.to_q.bias", &[8]),
            spec("transformer_blocks.1.attn.norm_q.weight", &[4]),
            spec("transformer_blocks.1.norm1.linear.weight", &[48, 8]),
            spec("single_transformer_blocks.0.proj_mlp.weight", &[32, 8]),
        ];
        let names = |specs: Vec<TensorSpec>| {
            specs.into_iter().map(|s| (s.name, s.shape)).collect::<Vec<_>>()
        };
        let expected = [
            ("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", vec![2, 6]),
            ("transformer.transformer_blocks.1.attn.to_q.lora_B.weight", vec![8, 2]),
            ("transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight", vec![2, 8]),
            ("transformer.single_transformer_blocks.0.proj_mlp.lora_B.weight", vec![32, 2]),
        ];
        let expected = expected.map(|(name, shape)| (name.to_string(), shape));
        assert_eq!(names(tensors(&all, 2)), expected);
    }

    #[test]
    fn they_are_a_number_and_a_rank() {
        assert_eq!("8x64".parse(), Ok(Loras { count: 8, rank: 64 }));
        for wrong in ["", "8", "8x", "x4", "0x4", "4x0", "8x-1", "a x b"] {
            assert!(wrong.parse::<Loras>().is_err(), "{wrong}");
        }
    }
}
