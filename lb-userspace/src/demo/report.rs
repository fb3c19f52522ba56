//! What the demonstration prints.

use std::{
    fmt::Display,
    io::{IsTerminal, stdout},
    time::Duration,
};

use super::client::{Outcome, Span, by_backend, quantile};

/// Widest bar, in characters.
const BAR: usize = 30;

/// Prints to standard output, in colour only on a terminal.
pub struct Report {
    colour: bool,
    step: usize,
}

impl Report {
    /// Looks at standard output and `NO_COLOR` (no-color.org).
    pub fn new() -> Self {
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            colour: stdout().is_terminal() && !unwanted,
            step: 0,
        }
    }

    /// A numbered headline.
    pub fn step(&mut self, headline: &str) {
        self.step += 1;
        println!(
            "\n{} {}",
            self.paint("1;36", self.step),
            self.paint("1", headline)
        );
    }

    /// An indented line.
    pub fn line(&self, text: impl Display) {
        println!("  {text}");
    }

    /// A command to type, and what it printed.
    pub fn command(&self, command: &str, output: &str) {
        self.line(self.paint("2", format_args!("$ {command}")));
        for line in output.lines() {
            self.line(line);
        }
    }

    /// Who answered how often, as a bar chart over `names`, and how long it took.
    pub fn answers(&self, names: &[&str], outcomes: &[Outcome]) {
        let counts = by_backend(outcomes);
        let most = counts.values().copied().max().unwrap_or(0).max(1);
        for name in names {
            let count = counts.get(name).copied().unwrap_or(0);
            let bar = match (count * BAR).div_ceil(most) {
                0 => String::new(),
                length => format!("  {}", self.paint("32", "█".repeat(length))),
            };
            self.line(format_args!("{name:<8}{count:>5}{bar}"));
        }
        let failed = outcomes.iter().filter(|o| o.backend.is_none()).count();
        let failed = self.failed(failed);
        match (quantile(outcomes, 0.5), quantile(outcomes, 0.99)) {
            (Some(median), Some(p99)) => self.line(format_args!(
                "{failed}; half of them took less than {}, 99 in 100 less than {}",
                milliseconds(median),
                milliseconds(p99)
            )),
            _ => self.line(failed),
        }
    }

    /// Requests and failures of one span of time.
    pub fn span(&self, when: &str, span: Span) {
        let failed = self.failed(span.failed);
        self.line(format_args!("{when}: {} requests, {failed}", span.sent));
    }

    fn failed(&self, count: usize) -> String {
        let colour = if count == 0 { "32" } else { "31" };
        self.paint(colour, format_args!("{count} failed"))
    }

    /// `text` between escape sequences, if colours are wanted.
    pub fn paint(&self, code: &str, text: impl Display) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_string()
        }
    }
}

/// `0.42 ms`, `137 ms`.
pub fn milliseconds(time: Duration) -> String {
    let ms = time.as_secs_f64() * 1e3;
    match ms {
        ..10.0 => format!("{ms:.2} ms"),
        ..100.0 => format!("{ms:.1} ms"),
        _ => format!("{ms:.0} ms"),
    }
}
