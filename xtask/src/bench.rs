//! `cargo xtask bench`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::{artifacts, run, setup};

/// Builds the program that measures, optimised, and becomes it, as root.
pub fn command(arguments: &[String]) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Run])?;
    let bench = run::timed("building what measures, optimised", || {
        let package = ["--package", "sluice-tests", "--bin", "sluice-bench"];
        let mut command = run::cargo();
        command
            .args(["build", "--locked", "--release"])
            .args(package);
        let built = artifacts::compile(&mut command)?;
        let bench = built.into_iter().find(|one| one.target == "sluice-bench");
        bench.context("cargo built no binary `sluice-bench`")
    })?;
    let out = artifacts::target_dir()?.join("bench");
    let variables = [("SLUICE_BENCH_OUT", out.as_os_str())];
    let mut command = run::as_root_with(&bench.path, &variables)?;
    command.args(arguments);
    Err(command.exec()).with_context(|| format!("cannot start `{}`", run::shown(&command)))
}
