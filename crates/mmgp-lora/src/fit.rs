//! Which rows of which linear layer each module of an adapter changes.
//!
//! A key that fits nothing fails the call; what is most like it is named, since a wrong prefix and a
//! wrong model look alike. Lenient loading skips it and reports it instead.

use std::{collections::HashMap, path::PathBuf};

use mmgp_residency::BlockTarget;

use crate::{Adapter, Error, Module, Result, Unknown, error::Quoted};

/// What becomes of keys that fit no layer, or one of another shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unfit {
    /// They fail the call.
    #[default]
    Fail,
    /// Their modules are skipped and reported.
    Skip,
}

/// A module that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The adapter's file.
    pub file: PathBuf,
    /// The first of the keys that were left out.
    pub tensor: String,
    /// Why.
    pub reason: String,
}

/// A model's linear layers by the names of what they join.
pub(crate) struct Layers {
    pub(crate) model: String,
    pub(crate) targets: Vec<BlockTarget>,
    /// `(target, part)`; a stored layer may be part of several.
    names: HashMap<String, Vec<(usize, usize)>>,
}

/// A module of an adapter and the rows that it changes.
#[derive(Clone, Copy)]
pub(crate) struct Placement<'a> {
    pub(crate) adapter: usize,
    pub(crate) module: &'a Module,
    pub(crate) model: usize,
    pub(crate) target: usize,
    pub(crate) row: usize,
    pub(crate) rows: usize,
}

impl Layers {
    pub(crate) fn new(model: String, targets: Vec<BlockTarget>) -> Self {
        let mut names: HashMap<String, Vec<(usize, usize)>> = HashMap::new();
        for (at, BlockTarget { target, .. }) in targets.iter().enumerate() {
            for (part, stored) in target.parts.iter().enumerate() {
                names.entry(stored.name.clone()).or_default().push((at, part));
            }
        }
        Self { model, targets, names }
    }
}

/// Places the modules of adapter number `adapter`. The first model is meant where a key names none.
pub(crate) fn fit<'a>(
    number: usize,
    adapter: &'a Adapter,
    models: &[Layers],
    unfit: Unfit,
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<Placement<'a>>> {
    let file = || adapter.file().to_path_buf();
    let mut skip = |tensor: &str, reason: String| {
        skipped.push(Skipped { file: file(), tensor: tensor.into(), reason });
    };
    let mut placements = Vec::new();
    let mut unknown: Vec<(&str, &str)> =
        adapter.strays.iter().map(|key| (&**key, &**key)).collect();
    let mut count = unknown.len();
    for module in adapter.modules() {
        let Some((model, places)) = find(module, models) else {
            unknown.push((module.down.name(), &module.name));
            count += module.keys;
            continue;
        };
        for &(target, part) in places {
            let layer = &models[model].targets[target].target;
            let part = &layer.parts[part];
            let (name, inputs, rows) = (&part.name, layer.inputs, part.rows);
            let wrong = match (module.down.shape(), module.up.shape()) {
                (&[_, k], _) if k != inputs => Some((
                    &module.down,
                    format!("[{}, {inputs}], since `{name}` has {inputs} inputs", module.rank()),
                )),
                (_, &[n, _]) if n != rows => Some((
                    &module.up,
                    format!("[{rows}, {}], since `{name}` has {rows} outputs", module.rank()),
                )),
                _ => None,
            };
            match (wrong, unfit) {
                (None, _) => placements.push(Placement {
                    adapter: number,
                    module,
                    model,
                    target,
                    row: part.row,
                    rows,
                }),
                (Some((view, expected)), Unfit::Fail) => {
                    let (tensor, found) = (view.name().into(), view.shape().to_vec());
                    return Err(Error::Shape { file: file(), tensor, expected, found });
                }
                (Some((view, expected)), Unfit::Skip) => {
                    skip(view.name(), format!("shape {:?}, expected {expected}", view.shape()));
                }
            }
        }
    }
    if unfit == Unfit::Skip {
        for (key, _) in &unknown {
            skip(key, "no such layer in this pipeline".into());
        }
        for (key, kind) in &adapter.unsupported {
            skip(key, format!("belongs to {kind}, which is not supported"));
        }
        return Ok(placements);
    }
    if !unknown.is_empty() {
        let named = |&(key, name): &(&str, &str)| {
            (Quoted(key).to_string(), nearest(name, models).map(String::from))
        };
        let first = unknown.iter().take(3).map(named).collect();
        let (file, of) = (file(), adapter.keys());
        return Err(Error::Unknown(Box::new(Unknown { file, count, of, first })));
    }
    if let Some((tensor, kind)) = adapter.unsupported.first() {
        return Err(Error::Unsupported { file: file(), tensor: tensor.clone(), kind });
    }
    Ok(placements)
}

/// The model that a module is for and where in it.
fn find<'a>(module: &Module, models: &'a [Layers]) -> Option<(usize, &'a [(usize, usize)])> {
    if let Some(component) = &module.component {
        let model = models.iter().position(|m| m.model == *component);
        if let Some(model) = model
            && let Some(places) = models[model].names.get(&module.name)
        {
            return Some((model, places));
        }
        // A module of the first model may be called as a component is.
        let name = format!("{component}.{}", module.name);
        return models.first()?.names.get(&name).map(|places| (0, &**places));
    }
    models.first()?.names.get(&module.name).map(|places| (0, &**places))
}

/// The name of a layer that is most like `name`, if one is like it at all.
fn nearest<'a>(name: &str, models: &'a [Layers]) -> Option<&'a str> {
    let names = models.iter().flat_map(|m| &m.targets).flat_map(|t| &t.target.parts);
    let name: Vec<char> = name.chars().take(200).collect();
    names
        .map(|part| (distance(&name, &part.name), &*part.name))
        .min()
        .filter(|(distance, known)| distance * 2 <= name.len().max(known.len()))
        .map(|(_, known)| known)
}

/// How many characters must be changed, added or left out to get from one to the other
/// (Levenshtein 1965).
fn distance(a: &[char], b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn distances() {
        let between = |a: &str, b| distance(&a.chars().collect::<Vec<_>>(), b);
        assert_eq!(between("kitten", "sitting"), 3);
        assert_eq!(between("", "abc"), 3);
        assert_eq!(between("abc", ""), 3);
        assert_eq!(between("to_q", "to_q"), 0);
    }
}
