//! The balancer on an older kernel than this machine's, whose verifier knows less: the whole demonstration, in an
//! emulated machine with a kernel of Debian's.

use sluice_tests::topology::sluice_bin;
use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

/// What the machine does when it has started. Its output is the console.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib RUST_BACKTRACE=0
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
for module in llc stp bridge veth; do insmod /modules/$module.ko*; done
ip link set lo up
echo kernel $(uname -r)
sluice demo
echo exit code $?
poweroff -f
";

/// Modules that the demonstration needs, in the order they need each other.
const MODULES: [&str; 4] = ["llc", "stp", "bridge", "veth"];

#[test]
fn the_demonstration_runs_on_an_older_kernel() {
    let kernel = std::env::var_os("SLUICE_OLD_KERNEL").map(PathBuf::from);
    let Some(kernel) = kernel.filter(|kernel| kernel.join("boot").is_dir()) else {
        println!("not run: `cargo xtask setup --tests` could not fetch an older kernel");
        return;
    };
    let Some(mut emulator) = emulator() else {
        println!("not run: `cargo xtask setup --tests` could not fetch an emulator");
        return;
    };
    let folder = std::env::temp_dir().join(format!("slc-{}-old-kernel", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    let root = folder.join("root");
    if let Err(module) = furnish(&root, &kernel) {
        println!(
            "not run: the kernel in {} has no module {module}",
            kernel.display()
        );
        return;
    }
    let archive = folder.join("initrd");
    run(Command::new("sh").arg("-c").current_dir(&root).arg(format!(
        "find . | cpio --create --format newc --quiet > {}",
        archive.display()
    )));
    let image = find(&kernel.join("boot"), "vmlinuz").expect("a kernel");
    // No kernel-based virtualisation: test machines are virtual themselves.
    let console = emulator
        .args(["-accel", "tcg", "-cpu", "max", "-m", "2048", "-smp", "2"])
        .args(["-nographic", "-no-reboot", "-nic", "none"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(&archive)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .output()
        .expect("the emulator starts");
    let _ = fs::remove_dir_all(&folder);
    let text = String::from_utf8_lossy(&console.stdout);
    let complaints = String::from_utf8_lossy(&console.stderr);
    assert!(text.contains("kernel "), "it starts: {text}\n{complaints}");
    assert!(text.contains("exit code 0"), "{text}\n{complaints}");
    // Round robin over three backends, after failover and after a new daemon.
    for expected in [
        "app3      100",
        "app1      150",
        "took over the program",
        "Done in",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    println!(
        "{}",
        text.lines()
            .find(|line| line.contains("kernel "))
            .unwrap_or_default()
    );
}

/// The emulator, ended after some minutes: the machine's own, or the one that was unpacked for this test.
fn emulator() -> Option<Command> {
    const PROGRAM: &str = "qemu-system-x86_64";
    let mut command = Command::new("timeout");
    command.args(["--kill-after", "5", "240"]);
    if Command::new(PROGRAM).arg("--version").output().is_ok() {
        command.arg(PROGRAM);
        return Some(command);
    }
    let folder = std::env::var_os("SLUICE_EMULATOR").map(PathBuf::from)?;
    let program = folder.join("usr/bin").join(PROGRAM);
    let libraries = ["usr/lib", "lib"].map(|at| folder.join(at).join("x86_64-linux-gnu"));
    let mut path = OsString::from("LD_LIBRARY_PATH=");
    path.push(std::env::join_paths(libraries).ok()?);
    // For the emulator alone.
    command.arg("env").arg(path).arg(&program);
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(folder.join(data));
    }
    program.is_file().then_some(command)
}

/// The files of the machine: the binary with its libraries, a shell, and modules of the kernel. The name
/// of a module that is missing is the error.
fn furnish(root: &Path, kernel: &Path) -> Result<(), &'static str> {
    for folder in ["bin", "lib", "modules", "proc", "sys", "dev", "run", "tmp"] {
        fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    symlink("lib", root.join("lib64")).expect("a link");
    fs::write(root.join("init"), INIT).expect("the first program");
    run(Command::new("chmod").arg("755").arg(root.join("init")));
    let copy = |from: &Path, to: PathBuf| {
        fs::copy(from, &to).unwrap_or_else(|e| panic!("{}: {e}", from.display()));
    };
    let busybox = output(Command::new("sh").args(["-c", "command -v busybox"]));
    copy(Path::new(busybox.trim()), root.join("bin/busybox"));
    // The libraries that `ldd` names, the loader among them, which is looked for in /lib64.
    for line in output(Command::new("ldd").arg(sluice_bin())).lines() {
        let mut words = line.split_whitespace().filter(|word| word.starts_with('/'));
        if let Some(library) = words.next().map(Path::new) {
            let name = library.file_name().expect("a file");
            copy(library, root.join("lib").join(name));
        }
    }
    // Without what only a debugger reads: it all has to fit into memory.
    run(Command::new("strip")
        .arg("-o")
        .arg(root.join("bin/sluice"))
        .arg(sluice_bin()));
    for module in MODULES {
        let found = find(kernel, &format!("{module}.ko")).ok_or(module)?;
        let name = found.file_name().expect("a file");
        copy(&found, root.join("modules").join(name));
    }
    Ok(())
}

/// A file whose name begins so, anywhere below a folder.
fn find(folder: &Path, name: &str) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    entries.sort();
    entries.into_iter().find_map(|path| {
        if path.is_dir() {
            return find(&path, name);
        }
        let file = path.file_name().and_then(OsStr::to_str)?;
        file.starts_with(name).then_some(path)
    })
}

fn output(command: &mut Command) -> String {
    let output = command.output().expect("the program starts");
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

fn run(command: &mut Command) {
    output(command);
}
