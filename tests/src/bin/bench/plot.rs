//! Results as pictures: SVG, written by hand.

use std::fmt::Write as _;

/// One value of each series, for one label.
pub struct Group {
    /// What the values are of.
    pub label: String,
    /// By series; NaN where there is none.
    pub values: Vec<f64>,
}

/// Points of one line, with x above zero.
pub struct Line {
    /// What the line is of.
    pub label: String,
    /// In the order of x.
    pub points: Vec<(f64, f64)>,
}

const COLOURS: [&str; 5] = ["#0b6e8f", "#e08e2b", "#8f3a6b", "#4c8c4a", "#666666"];
const WIDTH: f64 = 760.0;
const TOP: f64 = 64.0;

/// Bars that lie, one below the other, with their values.
pub fn bars(title: &str, series: &[&str], groups: &[Group]) -> String {
    const LABELS: f64 = 190.0;
    const VALUES: f64 = 70.0;
    const BAR: f64 = 13.0;
    const GAP: f64 = 10.0;
    let all = groups.iter().flat_map(|group| &group.values);
    let most = all
        .copied()
        .filter(|value| value.is_finite())
        .fold(1e-9, f64::max);
    let group_height = BAR * series.len() as f64 + GAP;
    let height = TOP + group_height * groups.len() as f64 + GAP;
    let mut svg = head(title, series, height);
    for (n, group) in groups.iter().enumerate() {
        let y = TOP + group_height * n as f64;
        let middle = y + (group_height - GAP) / 2.0 + 4.0;
        text(&mut svg, (LABELS - 8.0, middle), "end", &group.label);
        for (i, value) in group
            .values
            .iter()
            .enumerate()
            .filter(|(_, value)| value.is_finite())
        {
            let y = y + BAR * i as f64;
            let length = (WIDTH - LABELS - VALUES) * value / most;
            let _ = writeln!(
                svg,
                r#"<rect x="{LABELS}" y="{y:.1}" width="{length:.1}" height="{:.1}" fill="{}"/>"#,
                BAR - 2.0,
                COLOURS[i % COLOURS.len()]
            );
            text(
                &mut svg,
                (LABELS + length + 5.0, y + BAR - 3.0),
                "start",
                &number(*value),
            );
        }
    }
    svg + "</svg>\n"
}

/// Lines over an axis on which each step doubles.
pub fn lines(title: &str, x_label: &str, lines: &[Line]) -> String {
    const LEFT: f64 = 60.0;
    const RIGHT: f64 = 20.0;
    const PLOT: f64 = 260.0;
    let labels: Vec<&str> = lines.iter().map(|line| line.label.as_str()).collect();
    let points = || lines.iter().flat_map(|line| &line.points);
    let x_most = points().map(|(x, _)| x.log2()).fold(1.0, f64::max);
    let y_most = points().map(|(_, y)| *y).fold(1e-9, f64::max);
    // From zero, so that a line that looks flat is flat.
    let step = step(y_most);
    let y_end = (y_most / step).ceil() * step;
    let place = |x: f64, y: f64| {
        (
            LEFT + (WIDTH - LEFT - RIGHT) * x.log2() / x_most,
            TOP + PLOT * (1.0 - y / y_end),
        )
    };
    let mut svg = head(title, &labels, TOP + PLOT + 50.0);
    let mut y = 0.0;
    while y <= y_end {
        let (_, at) = place(1.0, y);
        let _ = writeln!(
            svg,
            r##"<line x1="{LEFT}" x2="{}" y1="{at:.1}" y2="{at:.1}" stroke="#dddddd"/>"##,
            WIDTH - RIGHT
        );
        text(&mut svg, (LEFT - 8.0, at + 4.0), "end", &number(y));
        y += step;
    }
    let mut marks: Vec<f64> = points().map(|(x, _)| *x).collect();
    marks.sort_by(f64::total_cmp);
    marks.dedup();
    for x in marks {
        let (at, _) = place(x, 0.0);
        text(&mut svg, (at, TOP + PLOT + 18.0), "middle", &number(x));
    }
    text(
        &mut svg,
        (WIDTH / 2.0, TOP + PLOT + 38.0),
        "middle",
        x_label,
    );
    for (line, colour) in lines.iter().zip(COLOURS.iter().cycle()) {
        let path: Vec<String> = line
            .points
            .iter()
            .map(|(x, y)| {
                let (x, y) = place(*x, *y);
                format!("{x:.1},{y:.1}")
            })
            .collect();
        let _ = writeln!(
            svg,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            path.join(" ")
        );
        for point in path {
            let (x, y) = point.split_once(',').unwrap_or_default();
            let _ = writeln!(svg, r#"<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>"#);
        }
    }
    svg + "</svg>\n"
}

/// Background, title and the colours' meaning.
fn head(title: &str, series: &[&str], height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#222222\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
        escaped(title)
    );
    let mut x = 16.0;
    for (label, colour) in series.iter().zip(COLOURS.iter().cycle()) {
        let _ = writeln!(
            svg,
            r#"<rect x="{x}" y="38" width="10" height="10" fill="{colour}"/>"#
        );
        text(&mut svg, (x + 15.0, 47.0), "start", label);
        x += 30.0 + 7.0 * label.chars().count() as f64;
    }
    svg
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, what: &str) {
    let what = escaped(what);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{what}</text>"#
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// Three digits, or all before the point.
fn number(value: f64) -> String {
    if value >= 100.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// A round distance of which about five fit below `most`.
fn step(most: f64) -> f64 {
    let power = 10_f64.powf((most / 5.0).log10().floor());
    let rough = most / 5.0 / power;
    power
        * if rough > 5.0 {
            10.0
        } else if rough > 2.0 {
            5.0
        } else {
            2.0
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_lengths() {
        let group = |label: &str, value| Group {
            label: label.to_owned(),
            values: vec![value, f64::NAN],
        };
        let svg = bars(
            "a < b",
            &["one", "two"],
            &[group("x", 50.0), group("y", 100.0)],
        );
        assert!(svg.contains("a &lt; b"));
        assert!(
            svg.contains(r#"width="250.0""#) && svg.contains(r#"width="500.0""#),
            "{svg}"
        );
    }

    #[test]
    fn lines_begin_at_zero_and_end_at_a_round_number() {
        let line = Line {
            label: "l".to_owned(),
            points: vec![(1.0, 10.0), (4.0, 42.0)],
        };
        let svg = lines("t", "x", &[line]);
        assert!(svg.contains(r#"points="60.0,272.0 740.0,105.6""#), "{svg}");
        assert!(svg.contains(">50<"), "{svg}");
    }

    #[test]
    fn steps_are_round() {
        assert_eq!(
            [step(42.0), step(100.0), step(650.0)].map(|s| s.round()),
            [10.0, 20.0, 200.0]
        );
    }
}
