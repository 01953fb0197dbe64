//! From a prompt to token ids of a fixed length.
//!
//! A tokenizer comes as `tokenizer.json`, or, for CLIP, as `vocab.json` and `merges.txt` alone, or, for T5, as
//! `spiece.model` alone; those are built into the tokenizers that a `tokenizer.json` would describe. Files pad
//! in many ways or not at all, so padding and cutting are done here.

use std::{
    collections::BTreeMap,
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Error, Result, text::spiece};

/// A tokenizer and the id that it pads with.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pad: u32,
    file: PathBuf,
}

/// A prompt as token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// The ids, of the length that was asked for.
    pub ids: Vec<u32>,
    /// 1 for a token, 0 for padding.
    pub mask: Vec<u32>,
    /// The end of the prompt that did not fit, if any.
    pub cut: Option<String>,
}

impl Tokenizer {
    /// Opens the tokenizer in a folder of a pipeline.
    ///
    /// # Errors
    /// A folder without a tokenizer that can be read; a file that is broken; a pad token that the
    /// tokenizer does not know. Each names the file.
    pub fn open_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let special = Special::read(dir)?;
        let file = dir.join("tokenizer.json");
        let (vocab, merges) = (dir.join("vocab.json"), dir.join("merges.txt"));
        let spiece = dir.join("spiece.model");
        let (inner, file) = if file.is_file() {
            // Parsed by hand first: the size is bounded, and the error has a line.
            let json: Value = mmgp_io::read_json(&file)?;
            (parse(json, &file)?, file)
        } else if vocab.is_file() && merges.is_file() {
            (clip(&vocab, &merges, &special)?, vocab)
        } else if spiece.is_file() {
            let extra = special.extra.unwrap_or(T5_EXTRA);
            (spiece::open(&spiece, special.eos.as_deref().unwrap_or(T5_END), extra)?, spiece)
        } else {
            return Err(broken(
                dir,
                "no tokenizer found; looked for tokenizer.json, vocab.json with merges.txt, and \
                 spiece.model",
            ));
        };
        let padding = inner.get_padding().map(|p| p.pad_id);
        let pad = match &special.pad {
            Some((token, source)) => inner.token_to_id(token).ok_or_else(|| {
                broken(source, format!("pad_token {token:?} is not in {}", file.display()))
            })?,
            None => padding
                .or_else(|| inner.token_to_id("<pad>"))
                .or_else(|| inner.token_to_id(CLIP_END))
                .ok_or_else(|| broken(&file, "no pad token is known for this tokenizer"))?,
        };
        let mut inner = inner;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| broken(&file, e))?;
        Ok(Self { inner, pad, file })
    }

    /// The ids of `text`, cut to `len` so that an end token stays, padded to `len`.
    ///
    /// # Errors
    /// A length below 2; text that the tokenizer refuses.
    pub fn encode(&self, text: &str, len: usize) -> Result<Tokens> {
        if len < 2 {
            return Err(Error::Input(format!("token length {len}: at least 2 are needed")));
        }
        // Files are hostile: what a library does with tables that lie is its own affair.
        let encode = || self.inner.encode(text, true);
        let encoding = catch_unwind(AssertUnwindSafe(encode))
            .map_err(|_| broken(&self.file, "its tables contradict themselves"))?
            .map_err(|e| broken(&self.file, e))?;
        let mut ids = encoding.get_ids().to_vec();
        let mut cut = None;
        if ids.len() > len {
            let ends = encoding.get_special_tokens_mask().last() == Some(&1);
            let kept = if ends { len - 1 } else { len };
            let from = encoding.get_offsets().get(kept).map_or(0, |o| o.0);
            cut = Some(text.get(from..).unwrap_or(text).trim().to_string());
            let end = ids.last().copied();
            ids.truncate(kept);
            ids.extend(end.filter(|_| ends));
        }
        let mut mask = vec![1; ids.len()];
        mask.resize(len, 0);
        ids.resize(len, self.pad);
        Ok(Tokens { ids, mask, cut })
    }

    /// The id that prompts are padded with.
    pub fn pad(&self) -> u32 {
        self.pad
    }

    /// Token ids there are, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }
}

const CLIP_START: &str = "<|startoftext|>";
const CLIP_END: &str = "<|endoftext|>";
const T5_END: &str = "</s>";
/// `<extra_id_N>` that T5's classes add where no file says how many.
const T5_EXTRA: usize = 100;

fn broken(file: &Path, message: impl ToString) -> Error {
    Error::Tokenizer { file: file.into(), message: message.to_string() }
}

fn parse(json: Value, file: &Path) -> Result<tokenizers::Tokenizer> {
    serde_json::from_value(json)
        .map_err(|e| broken(file, format!("not a tokenizer that can be read: {e}")))
}

/// A special token: a string, or an object with the string in `content`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

impl Token {
    fn content(self) -> String {
        match self {
            Token::Text(content) | Token::Object { content } => content,
        }
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SpecialFile {
    pad_token: Option<Token>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    extra_ids: Option<u16>,
}

/// The special tokens that the small files beside a tokenizer name.
struct Special {
    pad: Option<(String, PathBuf)>,
    bos: Option<String>,
    eos: Option<String>,
    unk: Option<String>,
    extra: Option<usize>,
}

impl Special {
    fn read(dir: &Path) -> Result<Self> {
        let mut special = Self { pad: None, bos: None, eos: None, unk: None, extra: None };
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            let path = dir.join(name);
            if !path.is_file() {
                continue;
            }
            let file: SpecialFile = mmgp_io::read_json(&path)?;
            special.pad = special.pad.or(file.pad_token.map(|t| (t.content(), path)));
            special.bos = special.bos.or(file.bos_token.map(Token::content));
            special.eos = special.eos.or(file.eos_token.map(Token::content));
            special.unk = special.unk.or(file.unk_token.map(Token::content));
            special.extra = special.extra.or(file.extra_ids.map(usize::from));
        }
        Ok(special)
    }
}

/// CLIP's tokenizer from its two files: lower case, white space to single blanks, CLIP's words, byte
/// pairs with `</w>` at the end of a word, between a start and an end token.
fn clip(vocab: &Path, merges: &Path, special: &Special) -> Result<tokenizers::Tokenizer> {
    let ids: BTreeMap<String, u32> = mmgp_io::read_json(vocab)?;
    let id = |token: &str| {
        ids.get(token)
            .copied()
            .ok_or_else(|| broken(vocab, format!("no entry for the special token {token:?}")))
    };
    let or = |token: &Option<String>, default: &str| token.clone().unwrap_or(default.into());
    let (first, last) = (or(&special.bos, CLIP_START), or(&special.eos, CLIP_END));
    let unknown = or(&special.unk, CLIP_END);
    let (bos, eos) = (id(&first)?, id(&last)?);
    id(&unknown)?;
    let text = fs::read_to_string(merges).map_err(|e| broken(merges, e))?;
    let mut pairs = Vec::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() || (at == 0 && line.starts_with("#version")) {
            continue;
        }
        match line.split(' ').collect::<Vec<_>>()[..] {
            [left, right] => {
                for token in [left, right, &format!("{left}{right}")] {
                    if !ids.contains_key(token) {
                        let message = format!("line {}: {token:?} is not in vocab.json", at + 1);
                        return Err(broken(merges, message));
                    }
                }
                pairs.push(json!([left, right]));
            }
            _ => return Err(broken(merges, format!("line {}: not two tokens", at + 1))),
        }
    }
    let mut added: Vec<(&str, u32)> = vec![(&first, bos)];
    if eos != bos {
        added.push((&last, eos));
    }
    added.sort_by_key(|(_, id)| *id);
    let added: Vec<Value> = added
        .iter()
        .map(|(content, id)| {
            json!({ "id": id, "content": content, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": true })
        })
        .collect();
    let words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ]},
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": words }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ]},
        "post_processor": { "type": "RobertaProcessing", "sep": [last, eos],
            "cls": [first, bos], "trim_offsets": false, "add_prefix_space": false },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true },
        "model": { "type": "BPE", "dropout": null, "unk_token": unknown,
            "continuing_subword_prefix": "", "end_of_word_suffix": "</w>", "fuse_unk": false,
            "byte_fallback": false, "vocab": ids, "merges": pairs },
    });
    parse(json, vocab)
}
