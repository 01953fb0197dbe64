//! What the user says replaces what the profile says, whole, and nothing that would mislead is kept.
#![allow(clippy::unwrap_used)]

use mmgp_profiles::{
    Amount, Amounts, Effect, Error, Fraction, Hardware, Models, Origin, Profile, QuantizationType,
    Settings, Switch,
};
use mmgp_residency::{Budget, Bytes};

const MODELS: [&str; 3] = ["transformer", "text_encoder", "vae"];

fn caps(settings: &Settings) -> Vec<(String, Budget)> {
    settings.budgets_of(&MODELS, Budget::Unlimited).unwrap().models
}

fn mib(n: u64) -> Bytes {
    Bytes(n << 20)
}

#[test]
fn an_override_replaces_the_value_of_its_key_whole() {
    let mut settings = Profile::LowRamLowVram.settings();
    settings.set("budgets", "vae=500").unwrap();
    assert_eq!(settings.budgets.origin(), Origin::User);
    assert_eq!(caps(&settings), [("vae".into(), Budget::Bytes(mib(500)))]);
    // Other keys are still the profile's.
    assert_eq!(settings.pinned_memory.origin(), Origin::Profile(Profile::LowRamLowVram));

    settings.quantize_transformer.set(Switch::Off);
    settings.extra_models_to_quantize.set(Models::Named(vec!["vae".into()]));
    let models = MODELS.map(|name| (name, "T5EncoderModel"));
    assert_eq!(settings.models_to_quantize(&models).unwrap(), ["vae"]);
}

#[test]
fn caps_of_a_profile_are_raised_and_those_of_a_user_are_not() {
    let mut settings = Profile::VerylowRamLowVram.settings();
    assert_eq!(
        caps(&settings),
        [
            ("transformer".into(), Budget::AtLeastMin(mib(400))),
            ("text_encoder".into(), Budget::AtLeastMin(mib(3000))),
            ("vae".into(), Budget::AtLeastMin(mib(3000))),
        ]
    );
    let same = settings.budgets.get().clone();
    settings.budgets.set(same);
    assert_eq!(caps(&settings)[0].1, Budget::Bytes(mib(400)));
}

#[test]
fn forms_that_upstream_gets_wrong_are_right() {
    let mut settings = Settings::default();
    // One number bounds every model.
    settings.set("budgets", "1000").unwrap();
    assert_eq!(caps(&settings), MODELS.map(|m| (m.into(), Budget::Bytes(mib(1000)))));
    // A share is a share.
    settings.set("budgets", "50%").unwrap();
    assert_eq!(caps(&settings), MODELS.map(|m| (m.into(), Budget::Percent(50.))));
    settings.set("budgets", "*=70%,vae=0").unwrap();
    assert_eq!(
        caps(&settings),
        [
            ("transformer".into(), Budget::Percent(70.)),
            ("text_encoder".into(), Budget::Percent(70.)),
        ]
    );
    // `*` matches.
    settings.set("workingVRAM", "vae=1,*=2").unwrap();
    assert_eq!(settings.working_vram.get().of("transformer"), Some(Amount::mib(2)));
    // 1 is a coefficient.
    settings.set("vram_safety_coefficient", "1").unwrap();
    assert_eq!(settings.vram_safety_coefficient.get().get(), 1.);
}

#[test]
fn models_that_are_not_there_are_named_if_the_user_meant_them() {
    let only = ["vae"];
    let preset = Profile::LowRamLowVram.settings().budgets_of(&only, Budget::Auto).unwrap();
    assert_eq!(preset.models, [("vae".into(), Budget::AtLeastMin(mib(3000)))]);
    assert_eq!(preset.total, Budget::Auto);

    let mut settings = Settings::default();
    settings.set("budgets", "transformr=5").unwrap();
    settings.set("extra-models-to-quantize", "vea").unwrap();
    let error = settings.budgets_of(&MODELS, Budget::Auto).unwrap_err().to_string();
    let known = "has `transformer`, `text_encoder` and `vae`";
    assert!(error.contains("`transformr`") && error.contains(known), "{error}");
    let error = settings.models_to_quantize(&MODELS.map(|m| (m, ""))).unwrap_err().to_string();
    assert!(error.contains("extra_models_to_quantize") && error.contains("`vea`"), "{error}");
}

#[test]
fn text_sets_every_setting_and_an_error_changes_none() {
    let mut settings = Profile::HighRamHighVram.settings();
    for (name, text) in [
        ("Budgets", "transformer=1.2GB, *=3000"),
        ("quantizeTransformer", "False"),
        ("extraModelsToQuantize", "text_encoder , vae"),
        ("quantizationType", "FP8"),
        ("quantize-exclude", "*.norm*,proj_out"),
        ("pinnedMemory", "transformer"),
        ("PINNED_PEFT_LORA", "on"),
        ("partialPinning", "1"),
        ("perc_reserved_mem_max", "0.3"),
        ("asyncTransfers", "off"),
        ("workingVRAM", "25%"),
        ("vram_safety_coefficient", "0.9"),
        ("loras", "transformer"),
    ] {
        settings.set(name, text).unwrap();
    }
    assert!(settings.explained(&Hardware::detect()).iter().all(|s| s.origin == Origin::User));
    assert_eq!(settings.quantization_type.get(), &QuantizationType::Qfloat8);
    assert_eq!(settings.quantize_exclude.get(), &["*.norm*", "proj_out"]);
    assert_eq!(settings.perc_reserved_mem_max.get(), &Fraction::new(0.3));

    let before = settings.clone();
    for (name, text) in [
        ("budgets", "lots"),
        ("quantize_transformer", "maybe"),
        ("extra_models_to_quantize", ""),
        ("quantization_type", "qint4"),
        ("quantize_exclude", "a,,b"),
        ("pinned_memory", "a,"),
        ("perc_reserved_mem_max", "1.1"),
        ("working_vram", "min"),
        ("vram_safety_coefficient", "0"),
        ("vram_safety_coefficient", "nan"),
    ] {
        let error = settings.set(name, text).unwrap_err();
        assert!(error.to_string().contains(text), "{name}: {error}");
    }
    assert_eq!(settings, before);
}

#[test]
fn what_would_mislead_is_refused() {
    let mut settings = Settings::default();
    for name in ["compile", "compile_mode", "convertWeightsFloatTo", "coTenantsMap", "verboseLevel"]
    {
        let error = settings.set(name, "1").unwrap_err();
        assert!(matches!(error, Error::Refused { .. }), "{error}");
    }
    let error = settings.set("budget", "1").unwrap_err().to_string();
    assert!(error.contains("`budget`") && error.contains("`working_vram`"), "{error}");
    assert_eq!(settings, Settings::default());
}

#[test]
fn explain_lists_every_setting_with_value_origin_and_effect() {
    let mut settings = Profile::LowRamLowVram.settings();
    settings.set("vram_safety_coefficient", "0.7").unwrap();
    let hardware = Hardware::detect();
    let rows = settings.explained(&hardware);
    let text = settings.explain(&hardware);
    assert_eq!(text.lines().count(), 1 + rows.len());

    // The names are those of the error for unknown names, which a user sees.
    let error = settings.clone().set("?", "").unwrap_err().to_string();
    assert_eq!(error.matches('`').count(), 2 * (1 + rows.len()));
    for (row, line) in rows.iter().zip(text.lines().skip(1)) {
        assert!(error.contains(&format!("`{}`", row.name)), "{error}");
        let words: Vec<&str> = line.split_whitespace().take(2).collect();
        assert_eq!(words, [row.name, &row.value]);
        assert!(line.contains(&row.origin.to_string()), "{line}");
        // What is printed can be given back.
        let mut again = settings.clone();
        again.set(row.name, &row.value).unwrap();
        let (before, after) = (settings.explained(&hardware), again.explained(&hardware));
        assert!(before.iter().zip(after).all(|(a, b)| a.value == b.value), "{}", row.name);
    }
    let line = |name: &str| text.lines().find(|l| l.trim_start().starts_with(name)).unwrap();
    assert!(line("budgets").contains("transformer=1200,*=3000  profile 4"), "{text}");
    assert!(line("budgets").contains("raised to the least"), "{text}");
    assert!(line("vram_safety").contains("0.7") && line("vram_safety").contains("user"), "{text}");

    let idle = [
        "pinned_memory",
        "pinned_peft_lora",
        "partial_pinning",
        "perc_reserved_mem_max",
        "async_transfers",
        "working_vram",
        "vram_safety_coefficient",
        "loras",
    ];
    for row in &rows {
        let none = matches!(row.effect, Effect::None(_));
        assert_eq!(none, idle.contains(&row.name), "{}", row.name);
        assert_eq!(none, line(row.name).contains("no effect here: "), "{text}");
    }
}

#[test]
fn amounts_for_all_and_for_one() {
    let amounts = Amounts::all(Amount::mib(1)).with("a", Amount::Min).with("a", Amount::mib(2));
    assert_eq!(amounts.of("a"), Some(Amount::mib(2)));
    assert_eq!(amounts.of("b"), Some(Amount::mib(1)));
    assert_eq!(amounts.to_string(), "a=2,*=1");
}
