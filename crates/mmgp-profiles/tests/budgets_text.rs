//! The text form of budgets: what is read, what is refused, and that no text ends the program.
#![allow(clippy::unwrap_used)]

use mmgp_profiles::{Amount, Amounts};
use mmgp_residency::Bytes;
use proptest::prelude::*;

#[test]
fn amounts_are_read() {
    let one = |text: &str| text.parse::<Amounts>().unwrap().of("any");
    for (text, bytes) in [
        ("1200", 1200 << 20),
        ("0.5", 1 << 19),
        ("1.2GB", 1_200_000_000),
        (" 900 MiB ", 900 << 20),
        ("7B", 7),
        ("*=3000", 3000 << 20),
        ("0", 0),
        ("unlimited", 0),
    ] {
        assert_eq!(one(text), Some(Amount::Bytes(Bytes(bytes))), "{text}");
    }
    assert_eq!(one("30%"), Some(Amount::Percent(30.)));
    assert_eq!(one("2.5 %"), Some(Amount::Percent(2.5)));
    assert_eq!(one("Min"), Some(Amount::Min));
    assert_eq!(one("none"), None);

    let amounts: Amounts = " transformer = 1200 , *=30%,vae.encoder=min".parse().unwrap();
    assert_eq!(amounts.of("transformer"), Some(Amount::mib(1200)));
    assert_eq!(amounts.of("vae.encoder"), Some(Amount::Min));
    assert_eq!(amounts.of("vae"), Some(Amount::Percent(30.)));
    assert_eq!("a=1".parse::<Amounts>().unwrap().of("b"), None);
}

#[test]
fn what_is_wrong_is_said() {
    for (text, said) in [
        ("", "empty entry"),
        ("a=1,", "empty entry"),
        ("1200,*=3", "`MODEL=1200`"),
        ("=3", "no name before `=`"),
        ("a=1,a=2", "`a` is there twice"),
        ("*=1,*=1", "`*` is there twice"),
        ("a=0%", "0 is no limit"),
        ("a=101%", "at most 100 %"),
        ("0.00000001", "less than a byte"),
        ("auto", "all models together"),
        ("a=", "expected MiB"),
        ("a=b=3", "expected MiB"),
        ("-5", "expected MiB"),
        ("1e3", "expected MiB"),
        ("inf%", "expected MiB"),
        ("1.2.3", "expected MiB"),
        ("5 apples", "expected MiB"),
        ("99999999999999999999", "expected MiB"),
    ] {
        let error = text.parse::<Amounts>().unwrap_err().to_string();
        assert!(error.contains(said) && error.contains(text), "{text}: {error}");
    }
}

fn amount() -> impl Strategy<Value = Amount> {
    prop_oneof![
        (0u64..1 << 50).prop_map(|bytes| Amount::Bytes(Bytes(bytes))),
        (0u32..1 << 20).prop_map(Amount::mib),
        (1u32..=1000).prop_map(|tenths| Amount::Percent(f64::from(tenths) / 10.)),
        Just(Amount::Min),
    ]
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC*") {
        let _ = text.parse::<Amounts>();
    }

    #[test]
    fn near_misses_are_read_or_refused(text in "[a*=,.%0-9 MGiBmn-]{0,24}") {
        if let Ok(amounts) = text.parse::<Amounts>() {
            prop_assert_eq!(amounts.to_string().parse::<Amounts>(), Ok(amounts));
        }
    }

    #[test]
    fn what_is_printed_is_read_back(
        named in prop::collection::vec(("[a-z_.0-9]{1,12}", amount()), 0..4),
        others in prop::option::of(amount()),
    ) {
        let start = others.map_or_else(Amounts::default, Amounts::all);
        let amounts = named.iter().fold(start, |amounts, (name, a)| amounts.with(name, *a));
        prop_assert_eq!(amounts.to_string().parse::<Amounts>(), Ok(amounts.clone()), "{}", amounts);
    }
}
