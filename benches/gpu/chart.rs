//! The picture of a run: seconds per step against the budget, one curve for each form, with the bound and the
//! schedule drawn in.
//!
//! Rows of the shortest sequence are drawn, where the link binds and nothing hides a slow schedule. What
//! has no budget stands at the right edge.

use std::fmt::Write as _;

use crate::{row::Row, rows::Form};

/// What rows without a ring and without a limit on the link are called.
pub(crate) const PLAIN: &str = "mmgp";

pub(crate) const BF16: &str = "#0b62a4";
pub(crate) const INT8: &str = "#c2571a";

pub(crate) const WIDTH: f64 = 860.;
const HEIGHT: f64 = 500.;
const LEFT: f64 = 70.;
pub(crate) const RIGHT: f64 = 190.;
pub(crate) const TOP: f64 = 50.;
const BOTTOM: f64 = 60.;

/// Where figures are on the picture.
pub(crate) struct Axes {
    gb: f64,
    seconds: f64,
    /// The part of the width that bytes have; what is resident stands at the right edge.
    part: f64,
}

impl Axes {
    /// Axes that hold so much, and more than nothing.
    pub(crate) fn new(gb: f64, seconds: f64, part: f64) -> Self {
        let some = |value: f64| if value > 0. { value } else { 1. };
        Self { gb: some(gb * 1.03), seconds: some(seconds * 1.08), part }
    }

    pub(crate) fn x(&self, bytes: Option<u64>) -> f64 {
        let width = WIDTH - LEFT - RIGHT;
        match bytes {
            Some(bytes) => LEFT + bytes as f64 / 1e9 / self.gb * width * self.part,
            None => LEFT + width,
        }
    }

    pub(crate) fn y(&self, seconds: f64) -> f64 {
        HEIGHT - BOTTOM - seconds / self.seconds * (HEIGHT - TOP - BOTTOM)
    }
}

/// The beginning of a picture, and its title.
pub(crate) fn head(title: &str) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13" fill="#222">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT}" y="28" font-size="16">{title}</text>
"##
    )
}

/// The picture; without rows to draw it shows empty axes.
pub(crate) fn svg(rows: &[Row]) -> String {
    let plain: Vec<&Row> = rows.iter().filter(|row| row.system == PLAIN).collect();
    let tokens = plain.iter().map(|row| row.tokens).min().unwrap_or(0);
    let mut drawn: Vec<&Row> = plain.into_iter().filter(|row| row.tokens == tokens).collect();
    drawn.sort_by_key(|row| row.budget_bytes.unwrap_or(u64::MAX));

    let largest = |values: Vec<f64>| values.into_iter().fold(0., f64::max);
    let gb = largest(drawn.iter().filter_map(|r| r.budget_bytes).map(|b| b as f64 / 1e9).collect());
    let seconds = largest(
        drawn.iter().flat_map(|r| [r.step_s, r.bound_s, r.schedule_s.unwrap_or(0.)]).collect(),
    );
    // The last eighth is for what is resident.
    let axes = Axes::new(gb, seconds, 7. / 8.);

    let title = format!("Seconds per step against the budget for weights, {tokens} tokens");
    let mut out = head(&title);
    grid(&mut out, &axes, "budget, GB");
    let _ = writeln!(
        out,
        r#"<text x="{:.1}" y="{}" text-anchor="middle">resident</text>"#,
        axes.x(None),
        HEIGHT - BOTTOM + 20.
    );
    for (form, colour) in [(Form::Bf16, BF16), (Form::Int8, INT8)] {
        let rows: Vec<&Row> = drawn.iter().copied().filter(|row| row.form == form).collect();
        for (style, value) in [
            (
                "stroke-dasharray=\"7 4\"",
                &(|r: &Row| Some(r.bound_s)) as &dyn Fn(&Row) -> Option<f64>,
            ),
            ("stroke-dasharray=\"2 3\"", &|r: &Row| r.schedule_s),
            ("stroke-width=\"2\"", &|r: &Row| Some(r.step_s)),
        ] {
            line(&mut out, &axes, &rows, colour, style, value);
        }
        for row in &rows {
            let (x, y) = (axes.x(row.budget_bytes), axes.y(row.step_s));
            let _ = writeln!(out, r#"<circle cx="{x:.1}" cy="{y:.1}" r="3.5" fill="{colour}"/>"#);
        }
    }
    legend(&mut out);
    out.push_str("</svg>\n");
    out
}

fn line(
    out: &mut String,
    axes: &Axes,
    rows: &[&Row],
    colour: &str,
    style: &str,
    value: impl Fn(&Row) -> Option<f64>,
) {
    let point = |row: &&Row| {
        value(row).map(|value| format!("{:.1},{:.1}", axes.x(row.budget_bytes), axes.y(value)))
    };
    let points: Vec<String> = rows.iter().filter_map(point).collect();
    if points.len() > 1 {
        let points = points.join(" ");
        let _ =
            writeln!(out, r#"<polyline points="{points}" fill="none" stroke="{colour}" {style}/>"#);
    }
}

/// Axes with round figures; what is shown to the right is said below.
pub(crate) fn grid(out: &mut String, axes: &Axes, below: &str) {
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for at in ticks(axes.seconds) {
        let y = axes.y(at);
        let _ = writeln!(
            out,
            r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{at}</text>"##,
            LEFT - 8.,
            y + 4.
        );
    }
    for at in ticks(axes.gb) {
        let x = axes.x(Some((at * 1e9) as u64));
        let _ = writeln!(
            out,
            r##"<path d="M{x:.1} {TOP}V{bottom}" stroke="#eee"/><text x="{x:.1}" y="{}" text-anchor="middle">{at}</text>"##,
            bottom + 20.
        );
    }
    let _ = writeln!(
        out,
        r##"<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#222"/>
<text x="{:.1}" y="{}" text-anchor="middle">{below}</text>
<text x="18" y="{:.1}" transform="rotate(-90 18 {:.1})" text-anchor="middle">s</text>"##,
        (LEFT + right) / 2.,
        bottom + 44.,
        (TOP + bottom) / 2.,
        (TOP + bottom) / 2.
    );
}

fn legend(out: &mut String) {
    let left = WIDTH - RIGHT + 20.;
    let mut entry = |at: usize, colour: &str, style: &str, text: &str| {
        let y = TOP + 10. + 22. * at as f64;
        let _ = writeln!(
            out,
            r#"<path d="M{left} {y}h34" stroke="{colour}" {style}/><text x="{}" y="{}">{text}</text>"#,
            left + 42.,
            y + 4.
        );
    };
    entry(0, BF16, "stroke-width=\"2\"", "bf16, step");
    entry(1, INT8, "stroke-width=\"2\"", "int8, step");
    entry(2, "#222", "stroke-dasharray=\"2 3\"", "schedule");
    entry(3, "#222", "stroke-dasharray=\"7 4\"", "bound");
}

/// Round figures from 0 up to `most`, about six of them.
fn ticks(most: f64) -> Vec<f64> {
    let rough = most / 6.;
    let magnitude = 10f64.powf(rough.log10().floor());
    let step = [1., 2., 5., 10.].map(|m| m * magnitude).into_iter().find(|&s| s >= rough);
    let step = step.unwrap_or(10. * magnitude);
    // Rounded, so that a tick is printed as it is meant.
    (0..).map(|i| (f64::from(i) * step * 1e9).round() / 1e9).take_while(|&at| at <= most).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::row::tests::row;

    /// Checks that tags open and close in order and attributes are quoted; counts elements by name.
    pub(crate) fn elements(svg: &str) -> std::collections::BTreeMap<String, usize> {
        let mut open = Vec::new();
        let mut found = std::collections::BTreeMap::new();
        for tag in svg.split('<').skip(1) {
            let (tag, text) = tag.split_once('>').expect("a tag that ends");
            assert!(!text.contains('>') && !text.contains('&'), "{text}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name.to_string()));
                continue;
            }
            let inner = tag.strip_suffix('/').unwrap_or(tag);
            let name = inner.split_whitespace().next().unwrap().to_string();
            let quoted: Vec<&str> = inner.split('"').collect();
            assert!(quoted.len() % 2 == 1, "{tag}");
            for names in quoted.iter().step_by(2).take(quoted.len() / 2) {
                assert!(names.ends_with('='), "{tag}");
            }
            *found.entry(name.clone()).or_insert(0) += 1;
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert_eq!(open, Vec::<String>::new());
        found
    }

    #[test]
    fn every_row_of_the_shortest_sequence_is_a_point() {
        let mut rows: Vec<Row> =
            [Some(4.), Some(1.5), None].iter().map(|&gb| row(gb, 0.41)).collect();
        let int8 = Row { form: Form::Int8, schedule_s: None, ..row(Some(1.2), 0.3) };
        rows.push(int8.clone());
        rows.push(Row { budget_bytes: Some(4_000_000_000), ..int8 });
        rows.push(Row { tokens: 4608, ..row(Some(4.), 1.) });
        rows.push(Row { system: "mmgp, ring".into(), ..row(Some(4.), 1.) });
        let svg = svg(&rows);
        let found = elements(&svg);
        assert_eq!(found["circle"], 5);
        // Three curves of bf16, two of int8, which has no schedule here.
        assert_eq!(found["polyline"], 5);
        assert!(svg.contains("1536 tokens"));
        for text in svg.split(['"', ' ', ',']) {
            assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
        }
        // Budgets stand in order.
        let points = svg.lines().find(|l| l.contains("polyline")).unwrap();
        let points = points.split('"').nth(1).unwrap();
        let x: Vec<f64> = points
            .split(' ')
            .map(|point| point.split_once(',').unwrap().0.parse().unwrap())
            .collect();
        assert!(x.len() == 3 && x.is_sorted());
    }

    #[test]
    fn a_run_without_rows_has_a_picture_too() {
        let found = elements(&svg(&[]));
        assert_eq!((found.get("circle"), found.get("polyline")), (None, None));
        // A single row without a time still gives axes.
        elements(&svg(&[row(None, 0.)]));
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(ticks(0.5), [0., 0.1, 0.2, 0.3, 0.4, 0.5]);
        assert_eq!(ticks(16.5), [0., 5., 10., 15.]);
        assert_eq!(ticks(1.), [0., 0.2, 0.4, 0.6, 0.8, 1.]);
    }
}
