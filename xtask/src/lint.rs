//! `cargo xtask lint`: format, and clippy on both sides, warnings denied.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, anyhow};

use crate::{
    artifacts, bpf,
    run::{cargo, run, timed, workspace},
    setup,
};

/// Separates the arguments in `CLIPPY_ARGS`; it is how cargo-clippy hands them to its driver.
const SEPARATOR: &str = "__CLIPPY_HACKERY__";

/// Checks all of it, and stops at the first that fails.
pub fn command() -> Result<()> {
    setup::ensure(&[setup::Group::Build, setup::Group::Lint])?;
    timed("format", || {
        run(cargo().args(["fmt", "--all", "--", "--check"]))
    })?;
    timed("clippy, user side", || {
        run(cargo()
            .args(["clippy", "--locked", "--workspace", "--exclude", "lb-ebpf"])
            .args(["--all-targets", "--", "-Dwarnings"]))
    })?;
    timed("clippy, kernel side", || run(&mut kernel_side()?))
}

/// Clippy on `lb-ebpf`, for the target it is built for.
fn kernel_side() -> Result<Command> {
    let toolchain = bpf::find().map_err(|message| anyhow!(message))?;
    let target_dir = artifacts::target_dir()?.join("bpf");
    let cargo = |verb| bpf::cargo(&toolchain, workspace(), &target_dir, verb);
    Ok(match clippy_driver(&toolchain.compiler) {
        // The distribution's cargo-clippy would call the distribution's cargo: its driver is wanted, with our cargo.
        Some(driver) => {
            let mut command = cargo("check");
            command
                .env("RUSTC_WORKSPACE_WRAPPER", driver)
                .env("CLIPPY_ARGS", format!("-Dwarnings{SEPARATOR}"));
            command
        }
        None => {
            let mut command = cargo("clippy");
            command.args(["--", "-Dwarnings"]);
            command
        }
    })
}

/// The clippy that was built with this compiler: it lies beside it. rustup's nightly finds its own.
pub fn clippy_driver(compiler: &bpf::Compiler) -> Option<PathBuf> {
    match compiler {
        bpf::Compiler::Prebuilt { rustc, .. } => Some(rustc.with_file_name("clippy-driver")),
        bpf::Compiler::Nightly { .. } => None,
    }
}
