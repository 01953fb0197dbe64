//! What can be wrong with a profile or a setting.

/// A result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a profile or a setting was refused.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No such profile.
    #[error("`{found}` is no profile: give one of {known}")]
    Profile {
        /// What was asked for.
        found: String,
        /// Numbers and names of those there are.
        known: String,
    },
    /// No such setting.
    #[error("there is no setting `{name}`: the settings are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// Those there are.
        known: String,
    },
    /// An option of Python mmgp that is not taken, because keeping it would mislead.
    #[error("`{name}` has no place here: {instead}")]
    Refused {
        /// The option.
        name: &'static str,
        /// Why, and what does its work.
        instead: &'static str,
    },
    /// A value that a setting does not take.
    #[error("{name}: `{found}` does not do; expected {expected}")]
    Value {
        /// The setting.
        name: &'static str,
        /// What was given.
        found: String,
        /// What would do.
        expected: String,
    },
    /// Amounts per model that are none.
    #[error("`{found}` in `{whole}`: {problem}")]
    Amounts {
        /// The entry that is wrong.
        found: String,
        /// The text it stands in.
        whole: String,
        /// What is wrong, and what would do.
        problem: String,
    },
    /// A model that the pipeline does not have.
    #[error("{setting} names the model `{model}`; this pipeline has {known}")]
    NoSuchModel {
        /// The setting.
        setting: &'static str,
        /// The model it names.
        model: String,
        /// The models there are.
        known: String,
    },
}

/// `a, b and c`, for messages.
pub(crate) fn list<S: AsRef<str>>(names: impl IntoIterator<Item = S>) -> String {
    let names: Vec<String> = names.into_iter().map(|n| format!("`{}`", n.as_ref())).collect();
    match names.split_last() {
        None => "none".into(),
        Some((only, [])) => only.clone(),
        Some((last, rest)) => format!("{} and {last}", rest.join(", ")),
    }
}
