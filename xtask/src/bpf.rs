//! Finds a toolchain for the BPF target and builds `lb-ebpf` with it.
//!
//! `lb-userspace/build.rs` includes this file as a module, so that a plain `cargo build` embeds the object: nothing but
//! `std` may be used here.

#![allow(dead_code, reason = "xtask and the build script each use their part")]

use std::{
    env,
    ffi::{OsStr, OsString},
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The target triple of the kernel side.
pub const TARGET: &str = "bpfel-unknown-none";

/// Where Debian puts its own compiler; looked at even where rustup's proxies come first in `PATH`.
const DISTRIBUTION_RUSTC: &str = "/usr/bin/rustc";

/// The `rust-version` of the workspace.
const OLDEST: (u32, u32) = (1, 95);

/// What the object is compiled with, beside the linker.
///
/// - `debuginfo=2` and `--btf`: BTF is made from the debug information, and gives maps and programs their named fields.
/// - `target-cpu=v3`: 32-bit arithmetic and atomic fetch-and-add; kernels since 5.12 take it. The default, `generic`, has
///   neither.
/// - `allows-misaligned-mem-access`: header loads are words instead of bytes; every kernel's JIT allows it.
const FLAGS: [&str; 4] = [
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    "-Ctarget-cpu=v3",
    "-Ctarget-feature=+allows-misaligned-mem-access",
];

/// A compiler that can produce BPF code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// A rustc that has `core` for the BPF target ready in its sysroot.
    Prebuilt {
        /// The compiler.
        rustc: PathBuf,
        /// What it says of itself.
        version: String,
    },
    /// rustup's nightly with the component `rust-src`: `core` is built along.
    Nightly {
        /// What it says of itself.
        version: String,
    },
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prebuilt { rustc, version } => {
                write!(f, "{version} at {} with a ready core", rustc.display())
            }
            Self::Nightly { version } => write!(f, "rustup's {version} with rust-src"),
        }
    }
}

/// All that is needed to build the kernel side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    /// The compiler.
    pub compiler: Compiler,
    /// The path of `bpf-linker`.
    pub linker: PathBuf,
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.compiler, self.linker.display())
    }
}

/// Finds compiler and linker, or says in one line what is missing.
pub fn find() -> Result<Toolchain, String> {
    match (find_compiler(), find_linker()) {
        (Some(compiler), Some(linker)) => Ok(Toolchain { compiler, linker }),
        (compiler, linker) => Err(missing(compiler.is_some(), linker.is_some())),
    }
}

fn missing(compiler: bool, linker: bool) -> String {
    let mut parts = Vec::new();
    if !compiler {
        parts.push(format!(
            "a rustc for {TARGET} (Debian's rustc-web with libstd-rust-web-dev-bpf, or rustup's nightly with rust-src)"
        ));
    }
    if !linker {
        parts.push("bpf-linker".to_owned());
    }
    format!(
        "BPF toolchain: missing {}; run `cargo xtask setup`",
        parts.join(" and ")
    )
}

/// Finds a compiler for the BPF target: `SLUICE_BPF_RUSTC`, the distribution's, the one in `PATH`, then rustup's nightly.
pub fn find_compiler() -> Option<Compiler> {
    // What was asked for is taken or refused, never replaced in silence.
    if let Some(rustc) = env::var_os("SLUICE_BPF_RUSTC").filter(|name| !name.is_empty()) {
        return prebuilt(rustc.into());
    }
    prebuilt(DISTRIBUTION_RUSTC.into())
        .or_else(|| prebuilt(in_path("rustc")?))
        .or_else(nightly)
}

fn prebuilt(rustc: PathBuf) -> Option<Compiler> {
    let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"]))?;
    has_core(Path::new(&sysroot)).then_some(())?;
    let version = output(Command::new(&rustc).arg("--version"))?;
    is_recent(&version).then_some(Compiler::Prebuilt { rustc, version })
}

/// Whether `rustc --version` names a version that the workspace's `rust-version` admits.
fn is_recent(version: &str) -> bool {
    let numbers = version.split([' ', '.', '-']).skip(1);
    let numbers: Vec<u32> = numbers.map_while(|number| number.parse().ok()).collect();
    matches!(numbers[..], [major, minor, ..] if (major, minor) >= OLDEST)
}

fn has_core(sysroot: &Path) -> bool {
    let Ok(files) = sysroot
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib")
        .read_dir()
    else {
        return false;
    };
    files
        .flatten()
        .any(|file| is_core(&file.file_name().to_string_lossy()))
}

fn is_core(file: &str) -> bool {
    file.starts_with("libcore-") && (file.ends_with(".rlib") || file.ends_with(".rmeta"))
}

fn nightly() -> Option<Compiler> {
    let rustc = |arguments: &[&str]| {
        // Without `which`, `rustup run` would start a download of a toolchain that is not there.
        let path =
            output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]))?;
        output(Command::new(path).args(arguments))
    };
    let sysroot = rustc(&["--print", "sysroot"])?;
    let sources = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
    sources.is_dir().then_some(())?;
    let version = rustc(&["--version"])?;
    Some(Compiler::Nightly { version })
}

/// Finds `bpf-linker` in `PATH` or where `cargo install` puts it.
pub fn find_linker() -> Option<PathBuf> {
    let installed = || {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")))?;
        Some(home.join("bin/bpf-linker")).filter(|path| path.is_file())
    };
    in_path("bpf-linker").or_else(installed)
}

fn in_path(program: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?)
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// The output of a command that succeeded, without its line end.
fn output(command: &mut Command) -> Option<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output.status.success().then_some(())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A cargo command that works on the kernel side with this toolchain: `build`, `check` and so on.
///
/// `workspace` is the folder of the root `Cargo.toml`, `target_dir` a target directory that no other build uses.
pub fn cargo(toolchain: &Toolchain, workspace: &Path, target_dir: &Path, verb: &str) -> Command {
    let mut command = match &toolchain.compiler {
        Compiler::Prebuilt { rustc, .. } => {
            let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            strip(&mut command);
            command.arg(verb).env("RUSTC", rustc);
            command
        }
        Compiler::Nightly { .. } => {
            let mut command = Command::new("rustup");
            strip(&mut command);
            command.args(["run", "nightly", "cargo", verb, "-Zbuild-std=core"]);
            command
        }
    };
    command
        .current_dir(workspace)
        .args(["--locked", "--release", "--package", "lb-ebpf"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(target_dir)
        // The target is not stable: it needs what rustc otherwise gives to nightly only.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags(&toolchain.linker));
    command
}

/// Builds an object of `lb-ebpf` and returns its path: `sluice` is the balancer, `sluice-bench` prepares packets for measurements.
pub fn build(
    toolchain: &Toolchain,
    workspace: &Path,
    target_dir: &Path,
    object: &str,
) -> Result<PathBuf, String> {
    let mut command = cargo(toolchain, workspace, target_dir, "build");
    let status = command
        .args(["--bin", object])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .map_err(|error| format!("cannot start {}: {error}", command.get_program().display()))?;
    if !status.success() {
        return Err(format!(
            "the kernel side did not build ({status}) with {toolchain}"
        ));
    }
    let object = target_dir.join(TARGET).join("release").join(object);
    if object.is_file() {
        Ok(object)
    } else {
        Err(format!("{}: not there after the build", object.display()))
    }
}

/// The target directory that a build script with this `OUT_DIR` writes to: the one all profiles share, so that the object is compiled once.
///
/// Cargo does not name it; it marks it with `CACHEDIR.TAG`.
pub fn target_dir(out_dir: &Path) -> &Path {
    out_dir
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").is_file())
        .unwrap_or(out_dir)
}

fn rustflags(linker: &Path) -> OsString {
    let mut flags = OsString::from("-Clinker=");
    flags.push(linker);
    for flag in FLAGS {
        flags.push("\u{1f}");
        flags.push(flag);
    }
    flags
}

/// Takes out of the environment what an outer cargo (or clippy) put there for the host's build.
fn strip(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if belongs_to_outer_build(&name) {
            command.env_remove(name);
        }
    }
}

fn belongs_to_outer_build(name: &OsStr) -> bool {
    const KEPT: [&str; 4] = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR"];
    const OTHERS: [&str; 9] = [
        "TARGET",
        "HOST",
        "PROFILE",
        "OPT_LEVEL",
        "DEBUG",
        "NUM_JOBS",
        "OUT_DIR",
        "CLIPPY_ARGS",
        "MAKEFLAGS",
    ];
    let Some(name) = name.to_str() else {
        return false;
    };
    let cargos = name == "CARGO" || name.starts_with("CARGO_") || name.starts_with("DEP_");
    let rustcs = name.starts_with("RUSTC") || name.starts_with("RUSTDOC") || name == "RUSTFLAGS";
    (cargos && !KEPT.iter().any(|kept| name.starts_with(kept))) || rustcs || OTHERS.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_remedy() {
        let both = missing(false, false);
        assert!(both.contains("rustc for bpfel-unknown-none") && both.contains("bpf-linker"));
        assert!(missing(true, false).starts_with("BPF toolchain: missing bpf-linker;"));
        assert!(!missing(false, true).contains("bpf-linker"));
        assert!(both.ends_with("run `cargo xtask setup`") && !both.contains('\n'));
    }

    #[test]
    fn an_outer_build_leaves_no_trace() {
        for name in [
            "CARGO",
            "CARGO_ENCODED_RUSTFLAGS",
            "CARGO_TARGET_DIR",
            "CARGO_BUILD_TARGET",
            "CARGO_PROFILE_RELEASE_DEBUG",
            "RUSTC",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTFLAGS",
            "OUT_DIR",
            "TARGET",
        ] {
            assert!(belongs_to_outer_build(OsStr::new(name)), "{name} stays");
        }
    }

    #[test]
    fn the_way_to_registry_and_tools_is_kept() {
        for name in [
            "CARGO_HOME",
            "CARGO_NET_OFFLINE",
            "CARGO_HTTP_PROXY",
            "CARGO_REGISTRIES_CRATES_IO_PROTOCOL",
            "RUSTUP_HOME",
            "PATH",
            "HOME",
        ] {
            assert!(!belongs_to_outer_build(OsStr::new(name)), "{name} goes");
        }
    }

    #[test]
    fn the_linker_comes_first_in_the_flags() {
        let flags = rustflags(Path::new("/opt/my tools/bpf-linker"));
        let flags: Vec<_> = flags.to_str().unwrap().split('\u{1f}').collect();
        assert_eq!(flags[0], "-Clinker=/opt/my tools/bpf-linker");
        assert_eq!(flags[1..], FLAGS);
    }

    #[test]
    fn compilers_older_than_the_workspace_are_passed_over() {
        assert!(is_recent(
            "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)"
        ));
        assert!(is_recent("rustc 1.99.0-nightly (0123abcd 2026-09-01)"));
        assert!(is_recent("rustc 2.0.0"));
        assert!(!is_recent("rustc 1.85.0 (built from a source tarball)"));
        assert!(!is_recent("rustc"));
    }

    #[test]
    fn a_ready_core_is_told_from_other_files() {
        assert!(is_core("libcore-0123abcd.rlib"));
        assert!(!is_core("libcompiler_builtins-0123.rlib"));
        assert!(!is_core("libcore-0123.so"));
    }
}
