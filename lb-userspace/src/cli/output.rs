//! Tables, JSON, and numbers as people read them.

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, BufWriter, ErrorKind, StdoutLock},
};

/// How a listing is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// Aligned columns, numbers rounded for people.
    #[default]
    Table,
    /// The same with more columns.
    Wide,
    /// All fields, numbers exact.
    Json,
}

/// The option `-o` of every listing.
#[derive(Clone, Copy, Debug, clap::Args)]
pub(super) struct Output {
    /// How the listing is printed.
    #[arg(
        short = 'o',
        long = "output",
        value_name = "FORMAT",
        value_enum,
        default_value_t
    )]
    pub(super) format: Format,
}

/// `value` as the API says it, for `-o json`.
pub(super) fn json(value: &impl Serialize) -> Result<String> {
    let mut text = serde_json::to_string_pretty(value).context("cannot write JSON")?;
    text.push('\n');
    Ok(text)
}

/// A colour of the eight that every terminal has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colour {
    Red,
    Green,
    Yellow,
}

/// One field of a table.
#[derive(Clone, Debug)]
pub(super) struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    pub(super) fn coloured(text: impl Into<String>, colour: Option<Colour>) -> Self {
        Self {
            text: printable(&text.into()),
            colour,
        }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::coloured(text, None)
    }
}

/// Standard output, buffered. A reader that has seen enough (`sluice conn list | head`) ends the
/// process quietly: whatever writes here has nothing else to do.
pub(super) struct Stdout(BufWriter<StdoutLock<'static>>);

impl Stdout {
    pub(super) fn new() -> Self {
        Self(BufWriter::new(io::stdout().lock()))
    }

    fn judge<T>(result: io::Result<T>) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
            result => result.map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot write to standard output: {error}"),
                )
            }),
        }
    }
}

impl io::Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Self::judge(self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Self::judge(self.0.flush())
    }
}

/// Aligned columns. A title that begins with `>` makes its column align right.
#[derive(Debug)]
pub(super) struct Table<'a> {
    titles: Vec<&'a str>,
    rows: Vec<Vec<Cell>>,
}

impl<'a> Table<'a> {
    pub(super) fn new(titles: impl IntoIterator<Item = &'a str>) -> Self {
        Self {
            titles: titles.into_iter().collect(),
            rows: Vec::new(),
        }
    }

    pub(super) fn row(&mut self, cells: Vec<Cell>) {
        debug_assert_eq!(cells.len(), self.titles.len(), "a cell for each column");
        self.rows.push(cells);
    }

    pub(super) fn render(&self, colour: bool) -> String {
        self.write(&mut Vec::new(), true, colour)
    }

    /// A part of a table that is too long to be held: columns are at least as wide as `widths`,
    /// which are those of the parts before.
    pub(super) fn render_part(&self, widths: &mut Vec<usize>, heading: bool) -> String {
        self.write(widths, heading, false)
    }

    fn write(&self, widths: &mut Vec<usize>, heading: bool, colour: bool) -> String {
        let columns: Vec<(&str, bool)> = self
            .titles
            .iter()
            .map(|title| {
                title
                    .strip_prefix('>')
                    .map_or((*title, false), |title| (title, true))
            })
            .collect();
        widths.resize(columns.len(), 0);
        for (index, (title, _)) in columns.iter().enumerate() {
            let cells = self.rows.iter().map(|row| row[index].text.chars().count());
            let widest = cells.max().unwrap_or(0).max(title.chars().count());
            widths[index] = widths[index].max(widest);
        }
        let titles: Vec<Cell> = columns
            .iter()
            .map(|(title, _)| Cell::from(*title))
            .collect();
        let titles = heading.then_some(&titles);
        let mut text = String::new();
        for row in titles.into_iter().chain(&self.rows) {
            let mut line = String::new();
            for (index, cell) in row.iter().enumerate() {
                let gap = if index == 0 { "" } else { "  " };
                let padding = " ".repeat(widths[index] - cell.text.chars().count());
                let (before, after) = if columns[index].1 {
                    (&*padding, "")
                } else {
                    ("", &*padding)
                };
                let _ = write!(
                    line,
                    "{gap}{before}{}{after}",
                    paint(&cell.text, cell.colour, colour)
                );
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// `text` in `colour`, if there is one and `enabled`.
pub(super) fn paint(text: &str, colour: Option<Colour>, enabled: bool) -> String {
    let code = match colour {
        Some(colour) if enabled => match colour {
            Colour::Red => 31,
            Colour::Green => 32,
            Colour::Yellow => 33,
        },
        _ => return text.to_owned(),
    };
    format!("\x1b[{code}m{text}\x1b[0m")
}

/// `text` without control characters: what a backend answers a health check must not steer the
/// operator's terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| {
            if c.is_control() {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

/// `12345` as `12.3k`; exact below ten thousand.
pub(super) fn count(n: u64) -> String {
    if n < 10_000 {
        return n.to_string();
    }
    scaled(n as f64, 1000.0, &["", "k", "M", "G", "T", "P", "E"])
}

/// `1258291` as `1.2 MiB`; exact below a KiB.
pub(super) fn bytes(n: u64) -> String {
    if n < 1024 {
        return format!("{n} B");
    }
    scaled(
        n as f64,
        1024.0,
        &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"],
    )
}

/// A rate of events; small ones keep one decimal.
pub(super) fn rate(per_second: f64) -> String {
    if per_second > 0.0 && per_second < 9.95 {
        format!("{per_second:.1}")
    } else {
        count(per_second.round() as u64)
    }
}

fn scaled(mut value: f64, base: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // Not `base` itself: one decimal would round 999.95 up to 1000.0.
    while value >= base - 0.05 && unit + 1 < units.len() {
        value /= base;
        unit += 1;
    }
    format!("{value:.1}{}", units[unit])
}

const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];

/// A time in its two largest units: `1m30s`, `2h`, `350ms`.
pub(super) fn span(seconds: f64) -> String {
    if seconds > 0.0 && seconds < 1.0 {
        return format!("{}ms", (seconds * 1000.0).round() as u64);
    }
    let whole = seconds.round() as u64;
    let first = UNITS
        .iter()
        .position(|(unit, _)| whole >= *unit)
        .unwrap_or(UNITS.len() - 1);
    let (unit, name) = UNITS[first];
    let mut text = format!("{}{name}", whole / unit);
    if let Some((smaller, name)) = UNITS.get(first + 1)
        && whole % unit >= *smaller
    {
        let _ = write!(text, "{}{name}", whole % unit / smaller);
    }
    text
}

/// How long ago: `3m ago`.
pub(super) fn ago(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    let (unit, name) = UNITS
        .into_iter()
        .find(|(unit, _)| whole >= *unit)
        .unwrap_or(UNITS[UNITS.len() - 1]);
    format!("{}{name} ago", whole / unit)
}

/// `1 service`, `2 services`.
pub(super) fn plural(n: usize, noun: &str) -> String {
    let ending = if n == 1 { "" } else { "s" };
    format!("{n} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_while_short_and_never_read_as_a_thousand_of_a_unit() {
        let cases = [
            (0, "0"),
            (9_999, "9999"),
            (10_000, "10.0k"),
            (12_345, "12.3k"),
            (999_949, "999.9k"),
            (999_950, "1.0M"),
            (7_800_000_000, "7.8G"),
            (u64::MAX, "18.4E"),
        ];
        for (n, expected) in cases {
            assert_eq!(count(n), expected);
        }
    }

    #[test]
    fn bytes_use_binary_units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_258_291, "1.2 MiB"),
            (1_048_575, "1.0 MiB"),
            (734_003_200, "700.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (n, expected) in cases {
            assert_eq!(bytes(n), expected);
        }
    }

    #[test]
    fn rates_keep_a_decimal_while_small() {
        for (n, expected) in [(0.0, "0"), (0.44, "0.4"), (9.96, "10"), (12_345.6, "12.3k")] {
            assert_eq!(rate(n), expected);
        }
    }

    #[test]
    fn times_read_like_the_configuration() {
        for (seconds, expected) in [
            (0.0, "0s"),
            (0.35, "350ms"),
            (1.0, "1s"),
            (90.0, "1m30s"),
            (900.0, "15m"),
            (3725.0, "1h2m"),
            (7200.0, "2h"),
            (90_000.0, "1d1h"),
        ] {
            assert_eq!(span(seconds), expected);
        }
        for (seconds, expected) in [
            (0.2, "0s ago"),
            (59.9, "59s ago"),
            (185.0, "3m ago"),
            (1e6, "11d ago"),
        ] {
            assert_eq!(ago(seconds), expected);
        }
    }

    #[test]
    fn columns_align_with_and_without_colour() {
        let mut table = Table::new(["Name", ">Weight", "State"]);
        table.row(vec![
            "a".into(),
            "100".into(),
            Cell::coloured("up", Some(Colour::Green)),
        ]);
        table.row(vec![
            "löng-name".into(),
            "1".into(),
            Cell::coloured("down", Some(Colour::Red)),
        ]);
        let plain = "\
Name       Weight  State
a             100  up
löng-name       1  down
";
        assert_eq!(table.render(false), plain);
        let coloured = table.render(true);
        assert_ne!(coloured, plain);
        let stripped = ["\x1b[31m", "\x1b[32m", "\x1b[0m"]
            .iter()
            .fold(coloured, |text, code| text.replace(code, ""));
        let trimmed: Vec<_> = stripped.lines().map(str::trim_end).collect();
        assert_eq!(trimmed, plain.lines().collect::<Vec<_>>());
    }

    #[test]
    fn what_others_say_cannot_steer_the_terminal() {
        let mut table = Table::new(["Reason"]);
        table.row(vec!["L7STS \x1b[2J\r\n500".into()]);
        assert!(!table.render(true).contains(['\x1b', '\r']));
        assert_eq!(table.render(true).lines().count(), 2);
    }

    #[test]
    fn an_empty_listing_is_its_heading() {
        assert_eq!(
            Table::new(["Name", ">Weight"]).render(false),
            "Name  Weight\n"
        );
        assert_eq!(json(&Vec::<u8>::new()).unwrap(), "[]\n");
    }
}
