//! The names of diffusers and PEFT: `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`.
//!
//! diffusers puts the model's place in the pipeline first, PEFT on its own puts `base_model.model.`
//! and may leave the adapter's name in the key (`lora_A.default.weight`). Old diffusers files say
//! `lora.down` and `lora.up`.

use super::{Dialect, Key, Leaf};

pub(crate) const DIALECT: Dialect = Dialect { name: "diffusers/peft", key };

/// What PEFT puts before every key when it saves a model by itself.
pub(crate) const BASE: &str = "base_model.model.";

const COMPONENTS: [&str; 5] =
    ["transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "unet"];

/// What stands between a module's name and the end of its key; a name may stand between both parts.
const LEAVES: [(&str, &str, Leaf); 10] = [
    (".lora_A", ".weight", Leaf::Down),
    (".lora_B", ".weight", Leaf::Up),
    (".lora.down", ".weight", Leaf::Down),
    (".lora.up", ".weight", Leaf::Up),
    (".lora_B", ".bias", Leaf::Unsupported("a LoRA with biases")),
    (".lora_embedding_A", "", Leaf::Unsupported("a LoRA of an embedding")),
    (".lora_embedding_B", "", Leaf::Unsupported("a LoRA of an embedding")),
    (".lora_magnitude_vector", ".weight", Leaf::Unsupported("DoRA")),
    (".lora_magnitude_vector", "", Leaf::Unsupported("DoRA")),
    (".alpha", "", Leaf::Alpha),
];

fn key(key: &str) -> Option<Key<'_>> {
    let (module, leaf) = LEAVES.iter().find_map(|&(marker, end, leaf)| {
        let rest = key.strip_suffix(end)?;
        let module = rest.strip_suffix(marker).or_else(|| {
            let (rest, adapter) = rest.rsplit_once('.')?;
            let named = !adapter.is_empty() && leaf != Leaf::Alpha;
            named.then(|| rest.strip_suffix(marker)).flatten()
        })?;
        Some((module, leaf))
    })?;
    let module = module.strip_prefix(BASE).unwrap_or(module);
    let split = module.split_once('.').filter(|(first, _)| COMPONENTS.contains(first));
    let (component, module) = match split {
        Some((component, module)) => (Some(component), module),
        None => (None, module),
    };
    (!module.is_empty()).then_some(Key { component, module, leaf })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_diffusers_and_peft() {
        let read = |component, module, leaf| Some(Key { component, module, leaf });
        let (down, up) = (Leaf::Down, Leaf::Up);
        for (text, meaning) in [
            ("transformer.a.0.to_q.lora_A.weight", read(Some("transformer"), "a.0.to_q", down)),
            ("transformer.a.to_q.lora_B.weight", read(Some("transformer"), "a.to_q", up)),
            ("text_encoder.a.b.lora_A.weight", read(Some("text_encoder"), "a.b", down)),
            ("text_encoder_2.a.b.lora_A.weight", read(Some("text_encoder_2"), "a.b", down)),
            ("base_model.model.a.b.lora_A.weight", read(None, "a.b", down)),
            (
                "base_model.model.transformer.a.lora_A.default.weight",
                read(Some("transformer"), "a", down),
            ),
            ("a.b.lora_B.default.weight", read(None, "a.b", up)),
            ("transformer.a.lora.down.weight", read(Some("transformer"), "a", down)),
            ("transformer.a.lora.up.weight", read(Some("transformer"), "a", up)),
            ("transformer_blocks.0.x.lora_A.weight", read(None, "transformer_blocks.0.x", down)),
            ("a.b.alpha", read(None, "a.b", Leaf::Alpha)),
            ("a.b.lora_A.bias", None),
            ("a.b.weight", None),
            ("lora_A.weight", None),
            (".lora_A.weight", None),
            ("transformer..lora_A.weight", None),
            ("", None),
        ] {
            assert_eq!(key(text), meaning, "{text}");
        }
        for text in ["a.lora_magnitude_vector", "a.lora_magnitude_vector.default.weight"] {
            let leaf = key(text).map(|key| (key.module, key.leaf));
            assert_eq!(leaf, Some(("a", Leaf::Unsupported("DoRA"))), "{text}");
        }
        assert!(matches!(key("a.lora_B.x.bias").unwrap().leaf, Leaf::Unsupported(_)));
        assert!(matches!(key("a.lora_embedding_A.x").unwrap().leaf, Leaf::Unsupported(_)));
    }
}
