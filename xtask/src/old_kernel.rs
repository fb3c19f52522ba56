//! A Linux kernel older than that of the machine, for the test that runs the demonstration on it in an
//! emulator: Debian's, unpacked, not installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    artifacts,
    run::{output, run, timed},
};

/// Debian's package that names the current kernel: the small one for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Where it is unpacked.
pub fn folder() -> Result<PathBuf> {
    Ok(artifacts::target_dir()?.join("old-kernel"))
}

/// Fetches it, unless it is there already, or cannot be had: on another distribution, on another
/// processor, or without a network. What is missing then is one test, which says so.
pub fn ensure() -> Result<()> {
    let folder = folder()?;
    if folder.join("boot").is_dir() || !cfg!(target_arch = "x86_64") {
        return Ok(());
    }
    let Some(package) = output(Command::new("apt-cache").args(["depends", NEWEST]))
        .as_deref()
        .and_then(kernel_in)
        .map(str::to_owned)
    else {
        return Ok(());
    };
    let fetched = timed(&format!("fetching {package}, for a test only"), || {
        unpack(&package, &folder)
    });
    if let Err(error) = fetched {
        eprintln!("setup: {error:#}; the test on an older kernel is left out");
    }
    Ok(())
}

/// The package that `apt-cache depends` says the newest kernel is in.
fn kernel_in(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
}

fn unpack(package: &str, folder: &Path) -> Result<()> {
    let download = folder.with_extension("deb");
    let _ = fs::remove_dir_all(&download);
    fs::create_dir_all(&download).with_context(|| download.display().to_string())?;
    let mut fetch = Command::new("apt-get");
    run(fetch
        .args(["-q", "-q", "download", package])
        .current_dir(&download))?;
    let archive = fs::read_dir(&download)?
        .next()
        .context("apt-get has downloaded nothing")??
        .path();
    // Beside its place first: one that is half unpacked is none.
    let half = download.join("unpacked");
    run(Command::new("dpkg-deb").arg("-x").args([&archive, &half]))?;
    fs::rename(&half, folder).with_context(|| folder.display().to_string())?;
    fs::remove_dir_all(&download).with_context(|| download.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_package_is_found() {
        let depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(kernel_in(depends), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(kernel_in("N: Unable to locate package\n"), None);
    }
}
