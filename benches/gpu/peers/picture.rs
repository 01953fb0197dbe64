//! The picture of a comparison: seconds per step against what a system takes of the card, one mark for each.

use std::fmt::Write as _;

use super::Entry;
use crate::{
    chart::{Axes, BF16, INT8, RIGHT, TOP, WIDTH, grid, head},
    rows::Form,
};

/// The mark of a system: what its rows begin and end with, its shape around (0, 0), and what the legend says.
const MARKS: [(&str, &str, &str, &str); 6] = [
    ("ours", "", "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z", "ours"),
    ("mmgp", "repaired", "M0 -6L6 0L0 6L-6 0zM0 -3L-3 0L0 3L3 0z", "mmgp, repaired"),
    ("mmgp", "", "M0 -6L6 0L0 6L-6 0z", "mmgp (Python)"),
    ("diffusers", "", "M0 -6L6 5H-6z", "diffusers"),
    ("pytorch", "compiled", "M-5 -5H5V5H-5zM-2 -2V2H2V-2z", "PyTorch, compiled"),
    ("pytorch", "", "M-5 -5H5V5H-5z", "PyTorch, eager"),
];

/// The picture; without rows to draw it shows empty axes.
pub(super) fn svg(rows: &[Entry], workload: &str) -> String {
    let mut drawn: Vec<(&Entry, u64)> =
        rows.iter().filter_map(|entry| Some((entry, entry.peak_vram_bytes?))).collect();
    drawn.sort_by_key(|(_, bytes)| *bytes);
    let gb = drawn.iter().map(|(_, bytes)| *bytes as f64 / 1e9).fold(0., f64::max);
    let seconds = drawn.iter().map(|(entry, _)| entry.step_s).fold(0., f64::max);
    let axes = Axes::new(gb, seconds, 1.);

    let mut out = head(&format!("Seconds per step against VRAM, {workload}"));
    grid(&mut out, &axes, "VRAM, GB");
    for (form, colour) in [(Form::Bf16, BF16), (Form::Int8, INT8)] {
        let drawn = drawn.iter().filter(|(entry, _)| entry.form == form);
        let place = |(entry, bytes): &(&Entry, u64)| (axes.x(Some(*bytes)), axes.y(entry.step_s));
        let ours = drawn.clone().filter(|(entry, _)| entry.is_ours()).map(place);
        let points: Vec<String> = ours.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        if points.len() > 1 {
            let points = points.join(" ");
            let _ = writeln!(
                out,
                r#"<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>"#
            );
        }
        for row in drawn {
            let (entry, (x, y)) = (row.0, place(row));
            let title = format!("{}, {}", entry.told().replace('*', ""), entry.form.name());
            let _ = writeln!(
                out,
                r#"<path transform="translate({x:.1} {y:.1})" d="{}" fill="{colour}" fill-rule="evenodd"><title>{title}</title></path>"#,
                shape(&entry.row)
            );
        }
    }
    legend(&mut out);
    out.push_str("</svg>\n");
    out
}

fn shape(row: &str) -> &'static str {
    let is = |(begins, ends, ..): &&(&str, &str, &str, &str)| {
        row.starts_with(begins) && row.ends_with(ends)
    };
    MARKS.iter().find(is).map_or(MARKS[0].2, |mark| mark.2)
}

fn legend(out: &mut String) {
    let left = WIDTH - RIGHT + 26.;
    let forms = [("bf16", BF16), ("int8", INT8)].map(|(name, colour)| (MARKS[0].2, colour, name));
    let systems = MARKS.map(|(_, _, shape, name)| (shape, "#222", name));
    for (at, (shape, colour, name)) in forms.into_iter().chain(systems).enumerate() {
        let y = TOP + 10. + 22. * at as f64;
        let _ = writeln!(
            out,
            r#"<path transform="translate({left} {y})" d="{shape}" fill="{colour}" fill-rule="evenodd"/><text x="{}" y="{}">{name}</text>"#,
            left + 14.,
            y + 4.
        );
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::chart::tests::elements;

    fn entry(row: &str, form: Form, gb: f64) -> Entry {
        Entry {
            row: row.into(),
            system: row.into(),
            form,
            budget_bytes: None,
            load_s: None,
            step_s: gb / 10.,
            bound_s: None,
            ratio: None,
            streamed_bytes: None,
            peak_vram_bytes: Some((gb * 1e9) as u64),
            peak_rss_bytes: None,
            locked_bytes: None,
            processes: 1,
            machines: BTreeSet::new(),
        }
    }

    #[test]
    fn every_system_has_a_mark_of_its_own() {
        let names = "ours_bf16 mmgp_int8_1200 mmgp_int8_1200_repaired diffusers_leaf pytorch \
            pytorch_compiled";
        let mut rows: Vec<Entry> =
            names.split_whitespace().map(|row| entry(row, Form::Bf16, 4.)).collect();
        let shapes: BTreeSet<&str> = rows.iter().map(|row| shape(&row.row)).collect();
        assert_eq!(shapes.len(), MARKS.len());
        rows.push(entry("ours_bf16", Form::Bf16, 25.));
        rows.push(Entry { peak_vram_bytes: None, ..entry("ours_int8", Form::Int8, 3.) });
        let svg = svg(&rows, "FLUX.1-dev");
        let found = elements(&svg);
        assert_eq!((found["title"], found["polyline"]), (7, 1));
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn a_comparison_without_rows_has_a_picture_too() {
        assert!(!elements(&svg(&[], "nothing")).contains_key("polyline"));
    }
}
