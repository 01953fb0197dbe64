//! How the models of a pipeline are held in memory: five presets, and the settings they are made of.
//!
//! Three nouns carry the crate. A [`Profile`] is one of five presets, with the names, numbers and
//! values of Python mmgp; it yields [`Settings`], each of which keeps where it came from and can be
//! overridden, by value or by text; [`Hardware`] is the machine, which decides what of them acts.
//!
//! ```
//! use mmgp_profiles::{Hardware, Origin, Profile};
//! use mmgp_residency::{Budget, Bytes};
//!
//! # fn main() -> Result<(), mmgp_profiles::Error> {
//! let profile: Profile = "LowRAM_LowVRAM".parse()?; // or "4"
//! let mut settings = profile.settings();
//! settings.set("budgets", "transformer=1200,*=30%")?; // replaces the profile's budgets whole
//! assert_eq!(settings.budgets.origin(), Origin::User);
//!
//! let models = [("transformer", "FluxTransformer2DModel"), ("text_encoder_2", "T5EncoderModel")];
//! assert_eq!(settings.models_to_quantize(&models)?, ["transformer", "text_encoder_2"]);
//!
//! let budgets = settings.budgets_of(&models.map(|(name, _)| name), Budget::Auto)?;
//! assert_eq!(budgets.models[0].1, Budget::Bytes(Bytes(1200 << 20)));
//! assert_eq!(budgets.models[1].1, Budget::Percent(30.)); // of the weights of that model
//!
//! println!("{}", settings.explain(&Hardware::detect()));
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod amounts;
mod error;
mod explain;
mod hardware;
mod profile;
mod settings;
mod values;

pub use amounts::{Amount, Amounts};
pub use error::{Error, Result};
pub use explain::{Effect, Explained};
pub use hardware::Hardware;
pub use profile::Profile;
pub use settings::{Origin, Setting, Settings};
pub use values::{Fraction, Models, QuantizationType, Switch};
