//! What the documentation says, as far as a machine can tell: links lead somewhere, the README's
//! configuration is one, tables that repeat the code agree with it.

use lb_common::stats::DropReason;
use sluice::config::Config;
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files `docs/*.md`.
fn topics() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("docs")).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
        .collect()
}

/// Everything outside fenced code.
fn prose(text: &str) -> String {
    text.split("```").step_by(2).collect()
}

/// The anchors of a file's headings, as GitHub makes them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            line.trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
                .map(|c| if c == ' ' { '-' } else { c })
                .collect()
        })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let mut files = topics();
    for other in [
        "README.md",
        "lb-ebpf/README.md",
        "examples/node-mysql/README.md",
    ] {
        files.push(root().join(other));
    }
    let mut broken = Vec::new();
    for file in files {
        let text = read(&file);
        let prose = prose(&text);
        for target in prose.split("](").skip(1) {
            let target = target.split(')').next().unwrap_or_default();
            if target.contains("://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match path {
                "" => file.clone(),
                path => file.parent().unwrap().join(path),
            };
            let found = path.exists()
                && (anchor.is_empty() || anchors(&self::prose(&read(&path))).contains(anchor));
            if !found {
                broken.push(format!("{}: {target}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn the_index_lists_every_topic() {
    let index = read(&root().join("docs/README.md"));
    for path in topics() {
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(
            name == "README.md" || index.contains(&format!("]({name})")),
            "docs/README.md does not list {name}"
        );
    }
}

#[test]
fn the_configurations_shown_are_valid() {
    let readme = read(&root().join("README.md"));
    let shown: Vec<_> = readme
        .split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect();
    assert!(!shown.is_empty(), "the README shows a configuration");
    for text in shown {
        Config::parse(text, Path::new("README.md")).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn every_drop_reason_is_explained_under_its_number() {
    let text = read(&root().join("docs/packet-path.md"));
    for reason in DropReason::ALL {
        let row = format!("| {} | `{}` | ", reason as u8, reason.name());
        assert!(text.contains(&row), "docs/packet-path.md: no row {row:?}");
    }
}
