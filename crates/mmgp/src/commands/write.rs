//! Frames on their way to a file: a picture, or a video one frame after another.

use std::path::{Path, PathBuf};

use mmgp::{
    Denoised, Medium, Names, Offload, Overwrite, Picture, Pipeline, Request, Result, Video,
};

use super::progress::Progress;

/// Where the results of a command go.
pub(crate) struct Out {
    names: Names,
}

impl Out {
    pub(crate) fn new(out: Option<&Path>, request: &Request) -> Result<Self> {
        let medium = if request.frames > 1 { Medium::Video } else { Medium::Picture };
        Ok(Self {
            names: match out {
                Some(out) => Names::at(out, &request.prompt, medium)?,
                None => Names::of_prompt(&request.prompt, medium),
            },
        })
    }

    /// Writes latents beside the place of the next result, and returns their path.
    pub(crate) fn keep(&self, denoised: &Denoised) -> Result<PathBuf> {
        for number in 1u64.. {
            let path = self.names.beside(number, ".latents.safetensors");
            match denoised.save(&path, Overwrite::No) {
                Err(mmgp::Error::Io(mmgp_io::Error::Exists { .. })) => {}
                saved => return saved.map(|()| path),
            }
        }
        unreachable!("there are more numbers than files")
    }

    /// Decodes into the next result and returns its path.
    pub(crate) fn decode(
        &mut self,
        offload: &Offload,
        pipeline: &mut dyn Pipeline,
        denoised: &Denoised,
        progress: &mut Progress,
    ) -> Result<PathBuf> {
        let Denoised { about, latents } = denoised;
        let text: Vec<(&str, String)> =
            about.text.iter().map(|(keyword, text)| (keyword.as_str(), text.clone())).collect();
        let mut to = To::Nothing;
        let progress = std::cell::RefCell::new(progress);
        let mut frames = 0;
        let mut each = |frame: Picture| {
            frames += 1;
            progress.borrow_mut().frame(frames);
            if about.request.frames == 1 {
                to = To::Picture(frame);
                return Ok(());
            }
            if let To::Nothing = to {
                let (width, height) = (frame.width, frame.height);
                to = To::Video(self.names.video(width, height, about.fps, &text)?);
            }
            match &mut to {
                To::Video(video) => video.frame(&frame.rgb),
                _ => Ok(()),
            }
        };
        let mut tell = |event| progress.borrow_mut().tell(&event);
        offload.decode(pipeline, &about.request, latents, &mut tell, &mut each)?;
        let path = match to {
            To::Picture(picture) => self.names.write(&picture, &text)?,
            To::Video(video) => video.finish()?,
            To::Nothing => unreachable!("a request has at least one frame"),
        };
        progress.into_inner().decoded(frames);
        Ok(path)
    }
}

enum To {
    Nothing,
    Picture(Picture),
    Video(Video),
}
