//! What the text encoder reads: the prompt inside a fixed conversation, of whose beginning no state is
//! used.
//!
//! The words are the model's: it was trained with them, so they are those of diffusers'
//! `HunyuanVideoPipeline`.

use candle_core::Tensor;

use crate::{Error, Result, nn::contiguous};

/// Tokens of what stands before the prompt, the start token included: their states are dropped.
pub const CROP: usize = 95;

/// The most tokens that are kept behind them.
pub const MAX_TOKENS: usize = 256;

/// Which hidden state of the encoder is used, counted from the last: two blocks follow it.
pub const HIDDEN_STATE: usize = 3;

const BEFORE: &str = "<|start_header_id|>system<|end_header_id|>\n\n\
    Describe the video by detailing the following aspects: \
    1. The main content and theme of the video.\
    2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects.\
    3. Actions, events, behaviors temporal relationships, physical movement changes of the objects.\
    4. background environment, light, style and atmosphere.\
    5. camera angles, movements, and transitions used in the video:<|eot_id|>\
    <|start_header_id|>user<|end_header_id|>\n\n";
const BEHIND: &str = "<|eot_id|>";

/// The text to encode for `prompt`, to [`CROP`] + [`MAX_TOKENS`] tokens.
pub fn wrap(prompt: &str) -> String {
    format!("{BEFORE}{prompt}{BEHIND}")
}

/// What of a wrapped text's cut end belongs to the prompt, if anything.
pub fn cut(end: &str) -> Option<&str> {
    Some(end.strip_suffix(BEHIND).unwrap_or(end).trim_end()).filter(|text| !text.is_empty())
}

/// The states of the prompt among those of a wrapped text, `[batch, tokens, width]` to
/// `[batch, tokens − CROP, width]`, and how many of each are no padding; `mask` has a row of 1 (token)
/// and 0 (padding) for each text.
///
/// # Errors
/// Those of [`lengths`]; a text that is not longer than what stands before a prompt.
pub fn crop(states: &Tensor, mask: &[Vec<u32>]) -> Result<(Tensor, Vec<usize>)> {
    let tokens = states.dim(1)?;
    let lengths = lengths(mask)?.into_iter().map(|n| n.checked_sub(CROP).filter(|&n| n > 0));
    match (lengths.collect::<Option<Vec<_>>>(), tokens.checked_sub(CROP)) {
        (Some(lengths), Some(kept)) if lengths.iter().all(|&n| n <= kept) => {
            Ok((contiguous(&states.narrow(1, CROP, kept)?)?, lengths))
        }
        _ => Err(Error::Input(format!(
            "hunyuanvideo: a prompt stands behind {CROP} tokens, this text has states of {tokens} and \
             tokens {:?}; is this the tokenizer of the model?",
            self::lengths(mask)?
        ))),
    }
}

/// How many tokens each text has before its padding.
///
/// # Errors
/// Padding before a token: the model takes only such that is behind.
pub fn lengths(mask: &[Vec<u32>]) -> Result<Vec<usize>> {
    let length = |row: &Vec<u32>| {
        let length = row.iter().take_while(|&&kept| kept != 0).count();
        match row[length..].iter().all(|&kept| kept == 0) {
            true => Ok(length),
            false => Err(Error::Input(format!(
                "hunyuanvideo: padding belongs behind a text, this mask has it before: {row:?}"
            ))),
        }
    };
    mask.iter().map(length).collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_prompt_stands_in_the_conversation() {
        let text = wrap("a cat, {braces} and all");
        assert!(
            text.starts_with("<|start_header_id|>system<|end_header_id|>\n\nDescribe the video by")
        );
        assert!(text.contains("aspects: 1. The main content and theme of the video.2. The color,"));
        assert!(text.ends_with("user<|end_header_id|>\n\na cat, {braces} and all<|eot_id|>"));
        assert_eq!(text.matches("<|eot_id|>").count(), 2);
    }

    #[test]
    fn a_cut_end_is_told_without_what_stands_behind() {
        assert_eq!(cut("at night<|eot_id|>"), Some("at night"));
        assert_eq!(cut("<|eot_id|>"), None);
    }

    #[test]
    fn states_before_the_prompt_are_dropped() -> Result<()> {
        let states = Tensor::arange(0f32, 200., &Device::Cpu)?.reshape((2, 100, 1))?;
        let mask = |n: usize| (0..100).map(|i| u32::from(i < n)).collect::<Vec<_>>();
        let (kept, lengths) = crop(&states, &[mask(100), mask(97)])?;
        assert_eq!((kept.dims(), lengths), (&[2, 5, 1][..], vec![5, 2]));
        assert_eq!(kept.get(1)?.flatten_all()?.to_vec1::<f32>()?, [195., 196., 197., 198., 199.]);
        for wrong in [mask(95), vec![0; 100], vec![1; 101]] {
            let error = crop(&states, &[mask(100), wrong]).unwrap_err().to_string();
            assert!(error.contains("behind 95 tokens"), "{error}");
        }
        let error = crop(&states, &[mask(100), vec![0, 1]]).unwrap_err().to_string();
        assert!(error.contains("padding belongs behind"), "{error}");
        assert!(crop(&states.narrow(1, 0, 90)?, &[mask(100), mask(99)]).is_err());
        Ok(())
    }
}
