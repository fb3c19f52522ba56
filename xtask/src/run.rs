//! Runs commands, as oneself or as root, and says what is going on.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail};

/// Says what begins now. Goes before anything that may take longer than a second.
pub fn step(text: &str) {
    eprintln!("==> {text}");
}

/// Like [`step`], and says at the end how long it took.
pub fn timed<T>(text: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    step(text);
    let start = Instant::now();
    let value = work()?;
    eprintln!("    done in {:.1} s", start.elapsed().as_secs_f32());
    Ok(value)
}

/// Runs a command to its end; anything but success is an error that names it.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// The output of a command, or nothing where it does not exist or fails.
pub fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether a command exists and succeeds, its output unseen.
pub fn succeeds(command: &mut Command) -> bool {
    output(command).is_some()
}

/// The command as a person would type it, cut where it gets long.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ");
    match line.char_indices().nth(160) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}

/// Whether this process is root's.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing, changes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A command that runs as root: through sudo where this process is not root's.
pub fn as_root(program: impl AsRef<OsStr>) -> Result<Command> {
    as_root_with(program, &[])
}

/// Like [`as_root`], with variables set in its environment; sudo would otherwise clear them.
pub fn as_root_with(program: impl AsRef<OsStr>, variables: &[(&str, &OsStr)]) -> Result<Command> {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(variables.iter().copied());
        return Ok(command);
    }
    if find("sudo").is_none() {
        bail!(
            "{} needs root: run this as root, or install sudo",
            program.as_ref().display()
        );
    }
    let mut command = Command::new("sudo");
    command.args(["--", "env"]);
    for (name, value) in variables {
        let mut assignment = std::ffi::OsString::from(name);
        assignment.push("=");
        assignment.push(value);
        command.arg(assignment);
    }
    command.arg(program);
    Ok(command)
}

/// Where a program is: `PATH`, and the folders of root's programs, which an ordinary user's `PATH` may leave out.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// The folder of the workspace's `Cargo.toml`.
pub fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}

/// A cargo command in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // `cargo run` sets these for the package xtask; a test that reads them should see its own.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_") || name_text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_named() {
        let error = run(Command::new("false").arg("--why"))
            .unwrap_err()
            .to_string();
        assert!(error.starts_with("`false --why` failed"), "{error}");
        let error = run(&mut Command::new("no-such-program-at-all")).unwrap_err();
        assert_eq!(error.to_string(), "cannot start `no-such-program-at-all`");
    }

    #[test]
    fn long_command_lines_are_cut_between_characters() {
        let mut command = Command::new("echo");
        command.args(std::iter::repeat_n("ü", 200));
        let text = shown(&command);
        assert!(
            text.ends_with(" …") && text.chars().count() == 162,
            "{text}"
        );
    }

    #[test]
    fn programs_are_found_in_the_path() {
        assert!(find("sh").is_some());
        assert_eq!(find("no-such-program-at-all"), None);
    }

    #[test]
    fn the_workspace_is_the_folder_of_the_lock_file() {
        assert!(workspace().join("Cargo.lock").is_file());
    }
}
