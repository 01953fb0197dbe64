//! Tokenizers that are stored as sentencepiece stores them (`spiece.model`): T5's unigram models.
//!
//! The file is one message of protocol buffers
//! ([encoding](https://protobuf.dev/programming-guides/encoding/)): pieces with their scores, and rules of
//! normalisation. A text is normalised, white space becomes `▁`, and the most likely pieces are taken, as
//! *Subword Regularization* (Kudo, 2018) has it; an end token follows.

use std::{fs, path::Path};

use tokenizers::{
    AddedToken, Tokenizer,
    models::unigram::Unigram,
    normalizers::{
        NormalizerWrapper, Precompiled, Prepend, Replace, Sequence, Strip, replace::ReplacePattern,
    },
    pre_tokenizers::metaspace::{Metaspace, PrependScheme},
    processors::template::TemplateProcessing,
};

use crate::{Error, Result};

/// Larger files are no tokenizers: T5's has 0.8 MB, those of 250,000 pieces have 5.
const MOST: u64 = 64 << 20;
/// What stands for a blank.
const BLANK: char = '▁';
/// `ModelType.UNIGRAM` and, the default of the format, `Type.NORMAL`.
const UNIGRAM: u64 = 1;
const NORMAL: u64 = 1;
/// `Type.UNKNOWN` and `Type.CONTROL`: pieces that no text becomes.
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;

/// Reads a `spiece.model`. `end` is the token that ends a text, and `extra` how many `<extra_id_N>` follow the
/// pieces, the last first, as T5's classes have them.
///
/// # Errors
/// A file that cannot be read or is no unigram model; one without the end token.
pub(super) fn open(file: &Path, end: &str, extra: usize) -> Result<Tokenizer> {
    let broken = |message: String| Error::Tokenizer { file: file.into(), message };
    let size = fs::metadata(file).map_err(|e| broken(e.to_string()))?.len();
    if size > MOST {
        return Err(broken(format!("{size} bytes, expected at most {MOST}")));
    }
    let bytes = fs::read(file).map_err(|e| broken(e.to_string()))?;
    let model = Model::read(&bytes).map_err(broken)?;
    build(model, end, extra).map_err(broken)
}

fn build(model: Model, end: &str, extra: usize) -> std::result::Result<Tokenizer, String> {
    let text = |e: tokenizers::Error| e.to_string();
    if model.kind != UNIGRAM {
        return Err(format!("a model of kind {}, expected 1 (unigram)", model.kind));
    }
    let of = |kind| model.pieces.iter().position(|piece| piece.kind == kind);
    let unknown = of(UNKNOWN).ok_or("no piece stands for what is unknown")?;
    let find = |name: &str| model.pieces.iter().position(|piece| piece.text == name);
    let last = find(end).ok_or_else(|| format!("the end token {end:?} is no piece"))?;
    let special: Vec<AddedToken> = model
        .pieces
        .iter()
        .filter(|piece| piece.kind == UNKNOWN || piece.kind == CONTROL)
        .map(|piece| piece.text.clone())
        .chain((0..extra).rev().map(|i| format!("<extra_id_{i}>")))
        .map(|token| AddedToken::from(token, true))
        .collect();

    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if !model.rules.is_empty() {
        // The map begins with the length of its trie, which is taken at its word.
        let trie = model.rules.first_chunk().map(|&size| u32::from_le_bytes(size) as usize);
        if trie.is_none_or(|trie| trie < 4 || trie > model.rules.len() - 4) {
            return Err("the rules of normalisation are cut off".into());
        }
        let rules = Precompiled::from(&model.rules).map_err(|e| e.to_string())?;
        normalizers.push(rules.into());
    }
    if model.trims {
        normalizers.push(Strip::new(true, true).into());
        let runs = ReplacePattern::Regex(" {2,}".into());
        normalizers.push(Replace::new(runs, " ").map_err(text)?.into());
    }
    if model.prepends {
        // Whatever the text begins with: the blanks' own rule would spare a text that begins with `▁`.
        normalizers.push(Prepend::new(" ".into()).into());
    }
    let ending = TemplateProcessing::builder()
        .try_single(vec!["$A", end])
        .map_err(|e| e.to_string())?
        .special_tokens(vec![(end, last as u32)])
        .build()
        .map_err(|e| e.to_string())?;

    let pieces = model.pieces.into_iter().map(|piece| (piece.text, f64::from(piece.score)));
    let unigram = Unigram::from(pieces.collect(), Some(unknown), false).map_err(text)?;
    let mut tokenizer = Tokenizer::new(unigram);
    tokenizer.with_normalizer(Some(Sequence::new(normalizers))).map_err(text)?;
    tokenizer.with_pre_tokenizer(Some(Metaspace::new(BLANK, PrependScheme::Never, true)));
    tokenizer.with_post_processor(Some(ending));
    tokenizer.add_special_tokens(special).map_err(text)?;
    Ok(tokenizer)
}

/// What is read of the file, by the names of its schema: `ModelProto`.
struct Model {
    pieces: Vec<Piece>,
    /// `trainer_spec.model_type`
    kind: u64,
    /// `normalizer_spec.precompiled_charsmap`
    rules: Vec<u8>,
    /// `normalizer_spec.add_dummy_prefix`
    prepends: bool,
    /// `normalizer_spec.remove_extra_whitespaces`
    trims: bool,
}

/// `SentencePiece`
struct Piece {
    text: String,
    score: f32,
    kind: u64,
}

impl Model {
    fn read(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            kind: UNIGRAM,
            rules: Vec::new(),
            prepends: true,
            trims: true,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(bytes)) => model.pieces.push(Piece::read(bytes)?),
                (2, Value::Bytes(bytes)) => {
                    for field in Fields(bytes) {
                        if let (3, Value::Number(kind)) = field? {
                            model.kind = kind;
                        }
                    }
                }
                (3, Value::Bytes(bytes)) => {
                    for field in Fields(bytes) {
                        match field? {
                            (2, Value::Bytes(rules)) => model.rules = rules.to_vec(),
                            (3, Value::Number(on)) => model.prepends = on != 0,
                            (4, Value::Number(on)) => model.trims = on != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        if model.pieces.is_empty() {
            return Err("no pieces: this is no sentencepiece model".into());
        }
        Ok(model)
    }
}

impl Piece {
    fn read(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0., kind: NORMAL };
        for field in Fields(bytes) {
            match field? {
                (1, Value::Bytes(text)) => {
                    piece.text = String::from_utf8(text.to_vec())
                        .map_err(|_| "a piece is no UTF-8".to_string())?;
                }
                (2, Value::Four(score)) => piece.score = f32::from_le_bytes(score),
                (3, Value::Number(kind)) => piece.kind = kind,
                _ => {}
            }
        }
        if piece.text.is_empty() || !piece.score.is_finite() {
            return Err(format!("a piece {:?} of score {}", piece.text, piece.score));
        }
        Ok(piece)
    }
}

/// The fields of a message, in their order.
struct Fields<'a>(&'a [u8]);

enum Value<'a> {
    Number(u64),
    Four([u8; 4]),
    Eight,
    Bytes(&'a [u8]),
}

impl<'a> Iterator for Fields<'a> {
    type Item = std::result::Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_none() {
            self.0 = &[];
        }
        Some(field.ok_or_else(|| "a field is cut off or of an unknown kind".into()))
    }
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.number()?;
        let value = match tag & 7 {
            0 => Value::Number(self.number()?),
            1 => self.take(8).map(|_| Value::Eight)?,
            2 => {
                let len = usize::try_from(self.number()?).ok()?;
                Value::Bytes(self.take(len)?)
            }
            5 => Value::Four(self.take(4)?.try_into().ok()?),
            _ => return None,
        };
        Some((tag >> 3, value))
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }
}
