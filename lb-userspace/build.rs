//! Builds the kernel side and puts its object where the library embeds it from: `$OUT_DIR/sluice.bpf.o`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[path = "../xtask/src/bpf.rs"]
mod bpf;

/// What the object is made of, from the workspace's folder.
const SOURCES: [&str; 6] = [
    "lb-ebpf/src",
    "lb-ebpf/Cargo.toml",
    "lb-common/src",
    "lb-common/Cargo.toml",
    "Cargo.toml",
    "Cargo.lock",
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            // A build script's panic would bury the one line that matters.
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let out_dir =
        PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set; run by cargo only")?);
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .ok_or("the package is not in a workspace")?;

    for name in ["SLUICE_BPF_OBJECT", "SLUICE_BPF_RUSTC"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for source in SOURCES {
        println!(
            "cargo::rerun-if-changed={}",
            workspace.join(source).display()
        );
    }

    let object = match env::var_os("SLUICE_BPF_OBJECT").filter(|file| !file.is_empty()) {
        Some(file) => {
            println!("cargo::rerun-if-changed={}", file.display());
            PathBuf::from(file)
        }
        None => {
            let toolchain = bpf::find()?;
            println!("BPF toolchain: {toolchain}");
            let target_dir = bpf::target_dir(&out_dir).join("bpf");
            bpf::build(&toolchain, workspace, &target_dir, "sluice")?
        }
    };
    fs::copy(&object, out_dir.join("sluice.bpf.o"))
        .map(drop)
        .map_err(|error| format!("{}: {error}", object.display()))
}
