//! The result of one health check, named as operators know it from HAProxy.

use super::agent::Report;
use std::{fmt, time::Duration};

/// What a health check found: the layer it reached, and how it ended there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The TCP connection was made.
    L4Ok,
    /// The TCP connection was not made in time.
    L4Timeout,
    /// The TCP connection was refused, or there is no way to the backend.
    L4Connection,
    /// The TLS handshake was made.
    L6Ok,
    /// The TLS handshake failed, or did not end in time.
    L6Response,
    /// The application gave an expected answer.
    L7Ok,
    /// The application did not answer in time.
    L7Timeout,
    /// The application's answer was not of the protocol, or it hung up.
    L7Response,
    /// The application answered with a status that is not expected.
    L7Status,
}

impl Code {
    /// Every code.
    pub const ALL: [Self; 9] = [
        Self::L4Ok,
        Self::L4Timeout,
        Self::L4Connection,
        Self::L6Ok,
        Self::L6Response,
        Self::L7Ok,
        Self::L7Timeout,
        Self::L7Response,
        Self::L7Status,
    ];

    /// The name operators know: `L4OK`, `L4TOUT`, `L4CON`, `L6OK`, `L6RSP`, `L7OK`, `L7TOUT`, `L7RSP`,
    /// `L7STS`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::L4Ok => "L4OK",
            Self::L4Timeout => "L4TOUT",
            Self::L4Connection => "L4CON",
            Self::L6Ok => "L6OK",
            Self::L6Response => "L6RSP",
            Self::L7Ok => "L7OK",
            Self::L7Timeout => "L7TOUT",
            Self::L7Response => "L7RSP",
            Self::L7Status => "L7STS",
        }
    }

    /// Whether the check succeeded.
    #[must_use]
    pub const fn is_ok(self) -> bool {
        matches!(self, Self::L4Ok | Self::L6Ok | Self::L7Ok)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The result of one health check of one backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckResult {
    /// What was found.
    pub code: Code,
    /// What more there is to say: a status code, the system's error; may be empty.
    pub text: String,
    /// Time the check took.
    pub duration: Duration,
    /// What the backend's agent said, if that was asked.
    pub report: Option<Report>,
}

impl CheckResult {
    /// A result.
    #[must_use]
    pub fn new(code: Code, text: impl Into<String>, duration: Duration) -> Self {
        Self {
            code,
            text: text.into(),
            duration,
            report: None,
        }
    }

    /// Whether the check succeeded.
    #[must_use]
    pub const fn is_ok(&self) -> bool {
        self.code.is_ok()
    }

    /// Whether the check failed.
    #[must_use]
    pub const fn is_failed(&self) -> bool {
        !self.is_ok()
    }
}

/// `L7STS 503`, `L4CON Connection refused`, `L4OK`.
impl fmt::Display for CheckResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.name())?;
        if !self.text.is_empty() {
            write!(f, " {}", self.text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ok_codes_are_ok() {
        for code in Code::ALL {
            assert_eq!(code.is_ok(), code.name().ends_with("OK"), "{code}");
        }
    }

    #[test]
    fn a_result_reads_as_in_the_listing() {
        let took = Duration::from_millis(3);
        let bare = CheckResult::new(Code::L4Timeout, "", took);
        assert_eq!(bare.to_string(), "L4TOUT");
        assert!(bare.is_failed());
        let status = CheckResult::new(Code::L7Status, "503", took);
        assert_eq!(status.to_string(), "L7STS 503");
    }
}
