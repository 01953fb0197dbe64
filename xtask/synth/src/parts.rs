//! Models that several families have.

use mmgp_models::text::{
    clip::{ClipConfig, ClipText, Projection},
    t5::{T5Config, T5Encoder},
};
use serde_json::json;

use crate::folder::Model;

/// Files of the repository that stand for a family's tokenizers: small, with ids that the models have.
pub(crate) const CLIP_TOKENIZER: &str = "assets/tiny-flux/tokenizer";
pub(crate) const T5_TOKENIZER: &str = "assets/tiny-flux/tokenizer_2";

/// CLIP-L's text encoder under `name`.
pub(crate) fn clip(name: &'static str) -> Model {
    let config = json!({
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "torch_dtype": "bfloat16",
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    });
    Model::new(name, "CLIPTextModel", config, |path, sketch| {
        ClipText::new(&ClipConfig::from_file(path)?, Projection::No, sketch.builder())?;
        Ok(())
    })
}

/// T5-XXL's encoder under `name`, with so many of its 24 blocks.
pub(crate) fn t5(name: &'static str, t5: usize) -> Model {
    let config = json!({
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "torch_dtype": "bfloat16",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": t5,
        "num_decoder_layers": t5,
        "num_heads": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": true,
        "is_encoder_decoder": true,
        "tie_word_embeddings": false,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
    });
    Model::new(name, "T5EncoderModel", config, |path, sketch| {
        T5Encoder::new(&T5Config::from_file(path)?, sketch.builder())?;
        Ok(())
    })
}
