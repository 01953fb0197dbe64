//! Tokenizers: CLIP's two old files against its `tokenizer.json`, T5's `spiece.model` against sentencepiece
//! itself, padding, cutting, broken files.

use std::{
    fs,
    path::{Path, PathBuf},
};

use mmgp_models::text::tokenizer::Tokenizer;
use proptest::prelude::*;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn demo(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny-flux").join(name)
}

/// A folder with copies of the named files of the demo's CLIP tokenizer.
fn folder(files: &[&str]) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    for file in files {
        fs::copy(demo("tokenizer").join(file), dir.path().join(file))?;
    }
    Ok(dir)
}

const OLD: [&str; 4] =
    ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"];

#[test]
fn clip_from_its_two_old_files_gives_the_same_ids() -> Result<()> {
    let dir = folder(&OLD)?;
    let (old, new) = (Tokenizer::open_dir(dir.path())?, Tokenizer::open_dir(demo("tokenizer"))?);
    assert_eq!((old.pad(), old.vocab_size()), (new.pad(), new.vocab_size()));
    for text in [
        "",
        " ",
        "red heart",
        "  Red\t\tHEART \n ",
        "a photo of a cat, isn't it? we'll they've I'd can't 're",
        "Ünïcödé É e\u{301} ﬁ ß İstanbul ΣΑΣ",
        "日本語 中文 한국어 العربية हिन्दी",
        "emoji 🎨🚀 ❤️ 👩‍🚀 \u{feff}\u{200b}\u{a0}x",
        "1234 3.14 2nd ½ ²",
        "<|endoftext|> in the <|startoftext|>middle<|endoftext|>",
        "<|EndOfText|> <|endoftext",
        "don''t \"quote\" (((weights:1.2))) [a|b] \\n --v 5 #tag @you",
        "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
        "\u{0}\u{1}\u{7f}",
    ] {
        let text = text.to_string();
        assert_eq!(old.encode(&text, 77)?, new.encode(&text, 77)?, "{text:?}");
    }
    let config = ProptestConfig::with_cases(2000);
    proptest!(config, |(text in "(\\PC|[a-z ]{1,12}|[ '\u{301}A-Z0-9]){0,24}")| {
        let (a, b) = (old.encode(&text, 40), new.encode(&text, 40));
        prop_assert_eq!(a.map_err(|e| e.to_string()), b.map_err(|e| e.to_string()));
    });
    Ok(())
}

#[test]
fn ids_are_padded_and_masked() -> Result<()> {
    let clip = Tokenizer::open_dir(demo("tokenizer"))?.encode("red heart", 77)?;
    assert_eq!((clip.ids.len(), clip.ids[0], clip.ids[76], clip.cut), (77, 1534, 1535, None));
    let t5 = Tokenizer::open_dir(demo("tokenizer_2"))?.encode("red heart", 32)?;
    let tokens = t5.mask.iter().sum::<u32>() as usize;
    assert_eq!((t5.ids.len(), t5.ids[tokens - 1], t5.ids[tokens]), (32, 1, 0));
    Ok(())
}

#[test]
fn a_long_prompt_keeps_its_end_token_and_says_what_was_cut() -> Result<()> {
    let text = "red heart ".repeat(60) + "and a blue rocket";
    for (name, len, end) in [("tokenizer", 77, 1535), ("tokenizer_2", 32, 1)] {
        let tokenizer = Tokenizer::open_dir(demo(name))?;
        let whole = tokenizer.encode(&text, 4000)?;
        assert_eq!(whole.cut, None);
        let tokens = tokenizer.encode(&text, len)?;
        assert_eq!((tokens.ids.len(), tokens.ids[len - 1]), (len, end));
        assert_eq!(tokens.ids[..len - 1], whole.ids[..len - 1]);
        assert!(tokens.mask.iter().all(|&m| m == 1));
        let cut = tokens.cut.ok_or("nothing was cut")?;
        assert!(text.ends_with(&cut) && cut.ends_with("and a blue rocket"), "{cut}");
        assert!(cut.len() < text.len());
        let short = tokenizer.encode("red heart", 2)?;
        assert_eq!((short.ids[1], short.cut.is_some()), (end, true));
        assert!(tokenizer.encode(&text, 1).is_err());
    }
    Ok(())
}

#[test]
fn pad_tokens_are_strings_or_objects() -> Result<()> {
    let dir = folder(&OLD)?;
    let with = |config: &str| -> Result<Tokenizer> {
        fs::write(dir.path().join("tokenizer_config.json"), config)?;
        Ok(Tokenizer::open_dir(dir.path())?)
    };
    assert_eq!(with(r#"{"pad_token": "!"}"#)?.pad(), 0);
    let object = r#"{"pad_token": {"content": "!", "lstrip": false, "__type": "AddedToken"}}"#;
    assert_eq!(with(object)?.pad(), 0);
    assert_eq!(with(r#"{"pad_token": null}"#)?.pad(), 1535); // as special_tokens_map.json says
    let error = with(r#"{"pad_token": "<nowhere>"}"#).err().ok_or("accepted")?.to_string();
    assert!(error.contains("<nowhere>") && error.contains("tokenizer_config.json"), "{error}");
    fs::remove_file(dir.path().join("special_tokens_map.json"))?;
    assert_eq!(with("{}")?.pad(), 1535);
    Ok(())
}

#[test]
fn broken_tokenizers_are_named() -> Result<()> {
    let refused = |dir: &Path| -> Result<String> {
        Ok(Tokenizer::open_dir(dir).err().ok_or("accepted")?.to_string())
    };
    let dir = tempfile::tempdir()?;
    let error = refused(dir.path())?;
    assert!(error.contains("looked for tokenizer.json"), "{error}");
    fs::write(dir.path().join("spiece.model"), "")?;
    assert!(refused(dir.path())?.contains("spiece.model"));
    for (content, says) in [
        ("", "tokenizer.json:1:0: EOF"),
        ("{\"version\": \"1.0\"}", "not a tokenizer"),
        ("[1, 2", "tokenizer.json:1:5"),
        ("{\"model\": {\"type\": \"BPE\", \"vocab\": 3}}", "not a tokenizer"),
        ("\u{0}\u{1}", "tokenizer.json:1:1"),
    ] {
        fs::write(dir.path().join("tokenizer.json"), content)?;
        let error = refused(dir.path())?;
        assert!(error.contains("tokenizer.json") && error.contains(says), "{content:?}: {error}");
    }
    for (file, content, says) in [
        ("vocab.json", "{\"a\": -1}", "vocab.json:1:"),
        ("vocab.json", "{\"a\": 1}", "<|startoftext|>"),
        ("merges.txt", "#version: 0.2\nq q q\n", "line 2: not two tokens"),
        ("merges.txt", "zz zz</w>zz\n", "line 1: "),
        ("tokenizer_config.json", "{\"pad_token\": 3}", "tokenizer_config.json"),
    ] {
        let dir = folder(&OLD)?;
        fs::write(dir.path().join(file), content)?;
        let error = refused(dir.path())?;
        assert!(error.contains(file) && error.contains(says), "{file} {content:?}: {error}");
    }
    Ok(())
}

fn spiece() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/spiece")
}

/// A folder with this as `spiece.model`, and the pad token that T5's folders name.
fn spiece_folder(model: &[u8]) -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("spiece.model"), model)?;
    fs::write(dir.path().join("tokenizer_config.json"), r#"{"pad_token": "<pad>"}"#)?;
    Ok(dir)
}

#[test]
fn a_spiece_model_gives_the_ids_of_sentencepiece() -> Result<()> {
    let dir = spiece_folder(&fs::read(spiece().join("spiece.model"))?)?;
    let tokenizer = Tokenizer::open_dir(dir.path())?;
    let known: serde_json::Value = serde_json::from_slice(&fs::read(spiece().join("cases.json"))?)?;
    // Behind the pieces are those that T5's classes add.
    assert_eq!(tokenizer.vocab_size() as u64, known["vocab_size"].as_u64().unwrap() + 100);
    assert_eq!(tokenizer.pad(), 0);
    for case in known["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let mut ids: Vec<u32> = serde_json::from_value(case["ids"].clone())?;
        ids.push(1);
        let tokens = tokenizer.encode(text, 128)?;
        let count = tokens.mask.iter().sum::<u32>() as usize;
        assert_eq!(tokens.ids[..count], ids, "{text:?}");
        assert!(tokens.ids[count..].iter().all(|&id| id == 0));
    }
    // As T5's classes have them: special tokens in a text, the last of those that are added first.
    let tokens = tokenizer.encode("<extra_id_99></s><extra_id_0>", 8)?;
    assert_eq!(tokens.ids[..4], [600, 1, 699, 1]);
    let cut = tokenizer.encode("red heart and a blue rocket", 4)?;
    assert_eq!((cut.ids[3], cut.cut.as_deref()), (1, Some("and a blue rocket")));
    Ok(())
}

#[test]
fn a_spiece_model_that_lies_is_an_error() -> Result<()> {
    let model = fs::read(spiece().join("spiece.model"))?;
    let open = |model: &[u8]| {
        let dir = spiece_folder(model)?;
        let tokens =
            Tokenizer::open_dir(dir.path())?.encode("red \u{fb01}sh \u{bd} caf\u{e9}", 40)?;
        Ok::<_, Box<dyn std::error::Error>>(tokens)
    };
    let whole = open(&model)?;
    for cut in [0, 1, 7, 100, model.len() / 2, model.len() - 1] {
        let error = open(&model[..cut]).map_err(|e| e.to_string());
        assert!(error.as_ref().is_err_and(|e| e.contains("spiece.model")), "{cut}: {error:?}");
    }
    // Whatever is changed, it is read, or refused with the file's name.
    proptest!(ProptestConfig::with_cases(400), |(at in 0..model.len(), byte: u8)| {
        let mut model = model.clone();
        model[at] = byte;
        match open(&model) {
            Ok(tokens) => prop_assert_eq!(tokens.ids.len(), whole.ids.len()),
            Err(error) => prop_assert!(error.to_string().contains("spiece.model"), "{}", error),
        }
    });
    Ok(())
}
