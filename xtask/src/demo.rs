//! `cargo xtask demo`.

use std::os::unix::process::CommandExt;

use anyhow::{Context, Result};

use crate::{artifacts, run, setup};

/// Builds the optimised binary and becomes `sluice demo`, so that Ctrl-C reaches it and nothing else.
pub fn command(arguments: &[String]) -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Run])?;
    let sluice = artifacts::build(true)?;
    run::step("sluice demo");
    let mut command = run::as_root(&sluice)?;
    command.arg("demo").args(arguments);
    Err(command.exec()).with_context(|| format!("cannot start `{}`", run::shown(&command)))
}
