//! What a backend's agent says: one line of words, as HAProxy's agent check has them.

use super::Admin;
use std::str::FromStr;

/// Longest comment that is kept, in characters.
const COMMENT: usize = 80;

/// What one line says; what it does not mention stays as it was.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// `75%`: share of the configured weight, 0 to 100.
    pub percent: Option<u32>,
    /// `drain`, `maint`, or `ready`, which ends both.
    pub admin: Option<Admin>,
    /// `up`, which ends all the other words said before, or `down`, `fail`, `stopped`.
    pub up: Option<bool>,
    /// What follows `#`.
    pub comment: String,
}

impl FromStr for Report {
    type Err = String;

    fn from_str(line: &str) -> Result<Self, String> {
        let (words, comment) = line.split_once('#').unwrap_or((line, ""));
        let printable = comment.trim().chars().filter(|c| !c.is_control());
        let mut report = Self {
            comment: printable.take(COMMENT).collect(),
            ..Self::default()
        };
        let words = words.split(|c: char| c.is_whitespace() || c == ',');
        let mut said = false;
        for word in words.filter(|word| !word.is_empty()) {
            said = true;
            match word {
                "ready" => report.admin = Some(Admin::Ready),
                "drain" => report.admin = Some(Admin::Drain),
                "maint" => report.admin = Some(Admin::Maint),
                "up" => {
                    report.up = Some(true);
                    report.admin = report.admin.or(Some(Admin::Ready));
                }
                "down" | "fail" | "failed" | "stopped" => report.up = Some(false),
                _ => {
                    let percent = word.strip_suffix('%').and_then(|text| text.parse().ok());
                    let percent = percent.filter(|percent| *percent <= 100);
                    report.percent = Some(percent.ok_or_else(|| {
                        let word: String = word.chars().filter(|c| !c.is_control()).collect();
                        format!("the agent says {word:?}, which is none of N%, up, down, ready, drain, maint")
                    })?);
                }
            }
        }
        if said {
            Ok(report)
        } else {
            Err("the agent says nothing".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_as_agents_write_them() {
        let parse = |line: &str| {
            let report: Report = line.parse().unwrap();
            (report.percent, report.admin, report.up, report.comment)
        };
        let bare = String::new;
        assert_eq!(parse("75%"), (Some(75), None, None, bare()));
        assert_eq!(
            parse(" drain\r\n"),
            (None, Some(Admin::Drain), None, bare())
        );
        assert_eq!(parse("maint"), (None, Some(Admin::Maint), None, bare()));
        let ready = Some(Admin::Ready);
        assert_eq!(parse("up"), (None, ready, Some(true), bare()));
        assert_eq!(parse("ready,50%"), (Some(50), ready, None, bare()));
        let why = "disk full".to_owned();
        assert_eq!(parse("down # disk full"), (None, None, Some(false), why));
        for bad in ["", "\n", "#", "101%", "x%", "maxconn:3", "up sideways"] {
            assert!(bad.parse::<Report>().is_err(), "{bad}");
        }
    }
}
