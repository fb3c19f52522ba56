//! `cargo xtask bench`.

use std::{ffi::OsStr, os::unix::process::CommandExt};

use anyhow::{Context, Result};

use crate::{
    artifacts, run,
    setup::{self, Group},
};

/// The part that needs neither the binary `sluice` nor anything to compare with.
const PACKETS: &str = "packets";
/// The other parts.
const OTHERS: [&str; 3] = ["end-to-end", "control-plane", "failover"];

/// Builds the program that measures, optimised, and becomes it, as root.
pub fn command(arguments: &[String]) -> Result<()> {
    let named = |part: &str| arguments.iter().any(|argument| argument == part);
    let only_packets = named(PACKETS) && !OTHERS.into_iter().any(named);
    let groups: &[Group] = if only_packets {
        &[Group::Build, Group::Run]
    } else {
        &[Group::Build, Group::Run, Group::Bench]
    };
    setup::ensure(groups)?;
    let built = run::timed("building what measures, optimised", || {
        let mut command = run::cargo();
        command.args(["build", "--locked", "--release"]);
        command.args(["--package", "sluice-tests", "--bin", "sluice-bench"]);
        if !only_packets {
            command.args(["--package", "lb-userspace", "--bin", "sluice"]);
        }
        artifacts::compile(&mut command)
    })?;
    let bench = built.iter().find(|one| one.target == "sluice-bench");
    let bench = bench.context("cargo built no binary `sluice-bench`")?;
    let sluice = artifacts::binary(&built).unwrap_or_default();
    let out = artifacts::target_dir()?.join("bench");
    let variables: [(&str, &OsStr); 2] = [
        ("SLUICE_BENCH_OUT", out.as_os_str()),
        ("SLUICE_BIN", sluice.as_os_str()),
    ];
    let mut command = run::as_root_with(&bench.path, &variables)?;
    command.args(arguments);
    Err(command.exec()).with_context(|| format!("cannot start `{}`", run::shown(&command)))
}
