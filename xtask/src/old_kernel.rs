//! A Linux kernel older than that of the machine, and an emulator, for the test that runs the demonstration on it:
//! Debian's, unpacked and not installed. An emulator of another version may exclude tools that are on the machine.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    artifacts,
    run::{as_root, find, output, run, timed},
    setup::{apt_get, run_apt},
};

/// Debian's package that names the current kernel: the small one for virtual machines.
const NEWEST: &str = "linux-image-cloud-amd64";
/// The package of the emulator, and its program.
const EMULATOR: &str = "qemu-system-x86";
const PROGRAM: &str = "qemu-system-x86_64";

/// Where the kernel is unpacked.
pub fn folder() -> Result<PathBuf> {
    Ok(artifacts::target_dir()?.join("old-kernel"))
}

/// Where the emulator is unpacked, if the machine has none of its own.
pub fn emulator_folder() -> Result<PathBuf> {
    Ok(artifacts::target_dir()?.join("emulator"))
}

/// Fetches both, unless they are there already, or cannot be had: on another distribution, on another
/// processor, or without a network. What is missing then is one test, which says so.
pub fn ensure() -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(());
    }
    let folder = folder()?;
    if !folder.join("boot").is_dir() {
        let Some(package) = output(Command::new("apt-cache").args(["depends", NEWEST]))
            .as_deref()
            .and_then(kernel_in)
            .map(str::to_owned)
        else {
            return Ok(());
        };
        fetch(&package, &folder, |to| {
            run(Command::new("apt-get")
                .args(["-q", "-q", "download", &package])
                .current_dir(to))
        });
    }
    let folder = emulator_folder()?;
    if find(PROGRAM).is_none() && !folder.join("usr/bin").join(PROGRAM).is_file() {
        fetch(EMULATOR, &folder, |to| {
            // With every library that the machine lacks. Nothing is installed, so nothing is in the way.
            fs::create_dir_all(to.join("partial"))?;
            let mut command = apt_get()?;
            run_apt(
                command
                    .args(["-q", "-y", "--no-install-recommends", "--download-only"])
                    .arg("-o")
                    .arg(format!("Dir::Cache::archives={}", to.display()))
                    .args(["install", EMULATOR]),
            )
        });
    }
    Ok(())
}

/// Has `download` put packages into a folder, and unpacks all of them in `folder`.
fn fetch(what: &str, folder: &Path, download: impl FnOnce(&Path) -> Result<()>) {
    let fetched = timed(&format!("fetching {what}, for a test only"), || {
        let downloads = folder.with_extension("deb");
        remove(&downloads)?;
        fs::create_dir_all(&downloads).with_context(|| downloads.display().to_string())?;
        download(&downloads)?;
        // Beside its place first: one that is half unpacked is none.
        let half = folder.with_extension("half");
        let _ = fs::remove_dir_all(&half);
        for entry in fs::read_dir(&downloads)? {
            let path = entry?.path();
            if path.extension().is_some_and(|ending| ending == "deb") {
                run(Command::new("dpkg-deb").arg("-x").args([&path, &half]))?;
            }
        }
        let _ = fs::remove_dir_all(folder);
        fs::rename(&half, folder).with_context(|| folder.display().to_string())?;
        remove(&downloads)
    });
    if let Err(error) = fetched {
        eprintln!("setup: {error:#}; the test on an older kernel is left out");
    }
}

/// Removes a folder, in which apt-get may have left what is root's.
fn remove(folder: &Path) -> Result<()> {
    if !folder.exists() || fs::remove_dir_all(folder).is_ok() {
        return Ok(());
    }
    run(as_root("rm")?.arg("-rf").arg(folder))
}

/// The package that `apt-cache depends` says the newest kernel is in.
fn kernel_in(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|package| package.starts_with("linux-image-"))
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
