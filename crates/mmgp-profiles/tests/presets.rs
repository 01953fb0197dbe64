//! The five profiles have upstream's numbers, names and values.
#![allow(clippy::unwrap_used)]

use mmgp_profiles::{Amount, Amounts, Models, Origin, Profile, Settings, Switch};

#[test]
fn the_table_of_presets() {
    let transformer = || Models::Named(vec!["transformer".into()]);
    let budgets = |mib| Amounts::all(Amount::mib(3000)).with("transformer", Amount::mib(mib));
    let none = Amounts::default;
    let (no, all, encoders) = (Models::None, Models::All, Models::Encoders);
    let table = [
        (1, "HighRAM_HighVRAM", all.clone(), none(), no.clone(), 48, 24),
        (2, "HighRAM_LowVRAM", all, budgets(1200), no.clone(), 48, 12),
        (3, "LowRAM_HighVRAM", transformer(), none(), encoders.clone(), 32, 24),
        (4, "LowRAM_LowVRAM", transformer(), budgets(1200), encoders.clone(), 32, 12),
        (5, "VerylowRAM_LowVRAM", no, budgets(400), encoders, 24, 10),
    ];
    assert_eq!(table.len(), Profile::ALL.len());
    for (profile, row) in Profile::ALL.into_iter().zip(table) {
        let (number, name, pinned, budgets, extra, ram, vram) = row;
        assert_eq!((profile.number(), profile.name()), (number, name));
        assert_eq!(
            (profile.ram().0, profile.vram().0),
            (ram * 1_000_000_000, vram * 1_000_000_000)
        );

        let s = profile.settings();
        assert_eq!(s.pinned_memory.get(), &pinned, "{name}");
        assert_eq!(s.budgets.get(), &budgets, "{name}");
        assert_eq!(s.extra_models_to_quantize.get(), &extra, "{name}");
        assert_eq!(s.quantize_transformer.get(), &Switch::On, "{name}");
        assert_eq!(s.async_transfers.get(), &Switch::On, "{name}");
        for origin in [
            s.pinned_memory.origin(),
            s.budgets.origin(),
            s.extra_models_to_quantize.origin(),
            s.quantize_transformer.origin(),
            s.async_transfers.origin(),
        ] {
            assert_eq!(origin, Origin::Profile(profile));
        }

        // The rest is as without a profile.
        let d = Settings::default();
        let rest = Settings {
            pinned_memory: d.pinned_memory,
            budgets: d.budgets,
            extra_models_to_quantize: d.extra_models_to_quantize,
            quantize_transformer: d.quantize_transformer,
            async_transfers: d.async_transfers,
            ..s
        };
        assert_eq!(rest, Settings::default(), "{name}");
    }
}

#[test]
fn profiles_are_named_by_number_or_name() {
    for profile in Profile::ALL {
        let name = profile.to_string();
        for text in [
            name.clone(),
            name.to_lowercase(),
            name.to_uppercase().replace('_', "-"),
            name.replace('_', ""),
            profile.number().to_string(),
            format!(" {} ", profile.number()),
        ] {
            assert_eq!(text.parse(), Ok(profile), "{text}");
        }
    }
    for text in ["", "0", "6", "-4", "3.5", "04", "HighRAM", "HighRAM_LowVRAM_Fast"] {
        let error = text.parse::<Profile>().unwrap_err().to_string();
        assert!(error.contains("4 (LowRAM_LowVRAM)") && error.contains(text), "{error}");
    }
}

#[test]
fn large_text_encoders_are_told_by_their_class() {
    let flux = [
        ("transformer", "FluxTransformer2DModel"),
        ("text_encoder", "CLIPTextModel"),
        ("text_encoder_2", "T5EncoderModel"),
        ("vae", "AutoencoderKL"),
    ];
    let quantized = |profile: Profile| profile.settings().models_to_quantize(&flux).unwrap();
    assert_eq!(quantized(Profile::HighRamLowVram), ["transformer"]);
    assert_eq!(quantized(Profile::LowRamLowVram), ["transformer", "text_encoder_2"]);
    let none: [&str; 0] = [];
    assert_eq!(Settings::default().models_to_quantize(&flux).unwrap(), none);

    let other = [("text_encoder", "LlamaModel"), ("text_encoder_3", "T5EncoderModel")];
    let settings = Profile::VerylowRamLowVram.settings();
    assert_eq!(settings.models_to_quantize(&other).unwrap(), ["text_encoder"]);
}
