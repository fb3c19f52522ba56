//! Where and on what was measured: part of every result.

use serde_json::{Map, Value, json};
use std::{fs, process::Command};

/// Kernel, processor, commit and date, as members of each result.
pub fn describe() -> Map<String, Value> {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let facts = [
        ("kernel", json!(kernel.trim())),
        ("cpu", json!(processor())),
        ("cores", json!(cores)),
        ("commit", json!(commit())),
        (
            "date",
            json!(said(Command::new("date").args(["-u", "+%FT%TZ"]))),
        ),
    ];
    facts
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// The processor as the kernel names it.
fn processor() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model.unwrap_or_default();
    model.trim_start_matches([' ', '\t', ':']).to_owned()
}

/// The commit that was built, with a `+` where files have been changed since.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let folder = env!("CARGO_MANIFEST_DIR");
        said(Command::new("git").args(["-C", folder]).args(arguments))
    };
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]);
    let mark = if changed.is_empty() { "" } else { "+" };
    format!("{}{mark}", git(&["rev-parse", "--short", "HEAD"]))
}

/// What a command prints; nothing where it cannot be run.
fn said(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout);
    String::from_utf8_lossy(&output.unwrap_or_default())
        .trim()
        .to_owned()
}
