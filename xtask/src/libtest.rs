//! Reads what Rust's test harness prints.

/// What one or many test programs reported.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u64,
    /// What failed: tests by name, and whatever else went wrong.
    pub failures: Vec<String>,
    /// Whether a result line was seen: a program that dies has none.
    pub finished: bool,
}

impl Tally {
    /// Takes in one line; `program` names the failures.
    pub fn line(&mut self, program: &str, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count(counts, "passed").unwrap_or(0);
            self.finished = true;
        } else if let Some(name) = failed(line) {
            self.failures.push(format!("{program}: {name}"));
        }
    }

    /// Adds what another program reported.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failures.extend(other.failures);
    }

    /// The line at the end of everything.
    pub fn summary(&self) -> String {
        format!("{} passed, {} failed", self.passed, self.failures.len())
    }
}

/// The number before a word in `ok. 5 passed; 0 failed; 0 ignored; …`.
fn count(counts: &str, word: &str) -> Option<u64> {
    let part = counts
        .split([';', '.'])
        .find_map(|part| part.trim().strip_suffix(word));
    part?.trim().parse().ok()
}

/// The name in `test NAME ... FAILED`, also where a test's own output came between.
fn failed(line: &str) -> Option<&str> {
    let (name, _) = line.strip_prefix("test ")?.split_once(" ... ")?;
    line.ends_with("FAILED")
        .then(|| name.trim_end_matches(" - should panic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_many_programs_add_up() {
        let mut all = Tally::default();
        for text in [
            "running 3 tests\ntest a ... ok\ntest b::c ... FAILED\ntest d ... ok\n\
             test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
            "test result: ok. 40 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 12.34s",
        ] {
            let mut one = Tally::default();
            text.lines().for_each(|line| one.line("program", line));
            assert!(one.finished);
            all.add(one);
        }
        assert_eq!(all.failures, ["program: b::c"]);
        assert_eq!(all.summary(), "42 passed, 1 failed");
    }

    #[test]
    fn a_program_that_died_did_not_finish() {
        let mut tally = Tally::default();
        tally.line("program", "test a ... ok");
        assert!(!tally.finished);
    }

    #[test]
    fn failures_are_named_whatever_stands_around_them() {
        assert_eq!(
            failed("test e2e::nat - should panic ... FAILED"),
            Some("e2e::nat")
        );
        assert_eq!(
            failed("test src/lib.rs - f (line 3) ... FAILED"),
            Some("src/lib.rs - f (line 3)")
        );
        assert_eq!(failed("test x ... some output FAILED"), Some("x"));
        assert_eq!(failed("test x ... ok"), None);
        assert_eq!(failed("FAILED"), None);
    }
}
