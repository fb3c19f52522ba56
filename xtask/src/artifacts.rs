//! Builds with cargo, and reads from its messages what was built.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{cargo, output, shown, timed};

/// An executable that cargo built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executable {
    /// The package it belongs to.
    pub package: String,
    /// The folder of the package.
    pub folder: PathBuf,
    /// The target: a library's or binary's name, or that of a file under `tests/`.
    pub target: String,
    /// `lib`, `bin`, `test` and so on.
    pub kind: String,
    /// Whether it runs tests.
    pub is_test: bool,
    /// The file.
    pub path: PathBuf,
}

/// Builds the binary `sluice`, the kernel side inside, and returns its path.
pub fn build(release: bool) -> Result<PathBuf> {
    let mut command = cargo();
    command.args([
        "build",
        "--locked",
        "--package",
        "lb-userspace",
        "--bin",
        "sluice",
    ]);
    if release {
        command.arg("--release");
    }
    let text = if release {
        "building sluice, optimised"
    } else {
        "building sluice"
    };
    let sluice = timed(text, || {
        let built = compile(&mut command)?;
        binary(&built).context("cargo built no binary `sluice`")
    })?;
    eprintln!("    {}", sluice.display());
    Ok(sluice)
}

/// The binary `sluice` among what was built.
pub fn binary(built: &[Executable]) -> Option<PathBuf> {
    built
        .iter()
        .find(|one| one.package == "lb-userspace" && one.kind == "bin" && !one.is_test)
        .map(|one| one.path.clone())
}

/// Runs a cargo command that builds, and returns the executables.
pub fn compile(command: &mut Command) -> Result<Vec<Executable>> {
    let line = shown(command);
    let output = command
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        bail!("`{line}` failed ({})", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(executable)
        .collect())
}

/// One message of cargo's, if it tells of an executable.
fn executable(line: &str) -> Option<Executable> {
    let message: Value = serde_json::from_str(line).ok()?;
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let manifest = PathBuf::from(message["manifest_path"].as_str()?);
    let folder = manifest.parent()?.to_owned();
    Some(Executable {
        package: package_name(message["package_id"].as_str()?)?.to_owned(),
        folder,
        target: text(&message["target"]["name"])?,
        kind: text(&message["target"]["kind"][0])?,
        is_test: message["profile"]["test"].as_bool()?,
        path: message["executable"].as_str()?.into(),
    })
}

/// The name in a package id: `path+file:///src/xtask#0.1.0` leaves it out where it is the folder's, and
/// `path+file:///src/tests#sluice-tests@0.1.0` names it.
fn package_name(id: &str) -> Option<&str> {
    let (place, fragment) = id.rsplit_once('#')?;
    match fragment.split_once('@') {
        Some((name, _)) => Some(name),
        None => place.rsplit('/').next(),
    }
}

/// The workspace's target directory.
pub fn target_dir() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["metadata", "--locked", "--no-deps", "--format-version", "1"]);
    let text =
        output(&mut command).context("`cargo metadata` failed; is Cargo.lock up to date?")?;
    let metadata: Value = serde_json::from_str(&text).context("`cargo metadata`")?;
    metadata["target_directory"]
        .as_str()
        .map(PathBuf::from)
        .context("`cargo metadata` names no target directory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_with_and_without_a_folder_of_their_name() {
        assert_eq!(package_name("path+file:///a/xtask#0.1.0"), Some("xtask"));
        assert_eq!(
            package_name("path+file:///a/tests#sluice-tests@0.1.0"),
            Some("sluice-tests")
        );
        assert_eq!(
            package_name("registry+https://example.org/index#libc@0.2.1"),
            Some("libc")
        );
        assert_eq!(package_name("nonsense"), None);
    }

    #[test]
    fn messages_about_libraries_and_text_are_no_executables() {
        assert_eq!(executable("   Compiling libc"), None);
        let library = r#"{"reason":"compiler-artifact","package_id":"path+file:///a/lb-common#0.1.0",
            "manifest_path":"/a/lb-common/Cargo.toml","target":{"kind":["lib"],"name":"lb_common"},
            "profile":{"test":false},"executable":null}"#;
        assert_eq!(executable(library), None);
    }

    #[test]
    fn the_binary_is_told_from_its_tests() {
        let message = |test: bool| {
            format!(
                r#"{{"reason":"compiler-artifact","package_id":"path+file:///a/lb-userspace#0.1.0",
                "manifest_path":"/a/lb-userspace/Cargo.toml","target":{{"kind":["bin"],"name":"sluice"}},
                "profile":{{"test":{test}}},"executable":"/a/target/{test}"}}"#
            )
        };
        let built: Vec<_> = [message(true), message(false)]
            .iter()
            .filter_map(|line| executable(line))
            .collect();
        assert_eq!(built.len(), 2);
        assert_eq!(built[0].folder, PathBuf::from("/a/lb-userspace"));
        assert_eq!(binary(&built), Some("/a/target/false".into()));
    }
}
