//! Builds the BPF object that prepares packets for measurements: `$OUT_DIR/sluice-bench.bpf.o`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

#[path = "../xtask/src/bpf.rs"]
mod bpf;

/// What the object is made of, from the workspace's folder.
const SOURCES: [&str; 6] = [
    "lb-ebpf/bench",
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
    println!("cargo::rerun-if-env-changed=SLUICE_BPF_RUSTC");
    for source in SOURCES {
        let source = workspace.join(source);
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let toolchain = bpf::find()?;
    let target_dir = bpf::target_dir(&out_dir).join("bpf");
    let object = bpf::build(&toolchain, workspace, &target_dir, "sluice-bench")?;
    fs::copy(&object, out_dir.join("sluice-bench.bpf.o"))
        .map(drop)
        .map_err(|error| format!("{}: {error}", object.display()))
}
