//! What is wrong with a configuration, in one line.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// Why a configuration was refused: one line that names file, line, object and remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    path: PathBuf,
    line: Option<usize>,
    message: String,
}

impl Error {
    /// An error that concerns the whole file.
    pub(super) fn file(path: &Path, message: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line: None,
            message: message.into(),
        }
    }

    /// An error in line `line`, counted from 1.
    pub(super) fn at(path: &Path, line: usize, message: impl Into<String>) -> Self {
        Self {
            path: path.to_owned(),
            line: Some(line),
            message: message.into(),
        }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The line, counted from 1, unless the error concerns the whole file.
    #[must_use]
    pub const fn line(&self) -> Option<usize> {
        self.line
    }

    /// Object and remedy, without file and line; may hold line breaks only as escapes.
    #[must_use]
    pub fn message(&self) -> String {
        one_line(&self.message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&one_line(&self.path.to_string_lossy()))?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}", self.message())
    }
}

impl std::error::Error for Error {}

/// Writes control characters and line separators as escapes, so that whatever the operator wrote
/// stays in one line of a terminal or a log.
fn one_line(text: &str) -> String {
    text.chars().fold(String::new(), |mut line, c| {
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
        line
    })
}
