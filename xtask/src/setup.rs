//! `cargo xtask setup`: installs what is missing, after saying what and why.
//!
//! Every need is checked by itself and quickly; where all is there nothing is run and nothing is said.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{
    bpf, lint, old_kernel,
    run::{as_root, as_root_with, find, output, run, shown, step, succeeds, timed},
};

/// The release of bpf-linker that is installed.
const LINKER_VERSION: &str = "0.13.0";

/// Where ready ones are, for machines that cannot build it.
const LINKER_RELEASES: &str = "https://github.com/aya-rs/bpf-linker/releases";

/// The LLVM versions that this release links against.
const LINKER_LLVM: std::ops::RangeInclusive<u32> = 21..=23;

/// Where BPF objects are pinned.
const BPFFS: &str = "/sys/fs/bpf";

/// What a task needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// To build.
    Build,
    /// To run the balancer here.
    Run,
    /// To check format and run clippy.
    Lint,
    /// What the tests use as peers and tools.
    Tests,
    /// What the balancer is compared with, and the tools for that.
    Bench,
}

/// A program or file that comes from the distribution.
struct Need {
    groups: &'static [Group],
    why: &'static str,
    is_there: fn() -> bool,
    /// The package names, parted by blanks, on Debian and Ubuntu, on Fedora, and on Arch.
    debian: &'static str,
    fedora: &'static str,
    arch: &'static str,
}

const NEEDS: &[Need] = &[
    Need {
        groups: &[Group::Build],
        why: "the linker that rustc calls",
        is_there: || find("cc").is_some(),
        debian: "gcc libc6-dev",
        fedora: "gcc",
        arch: "gcc",
    },
    Need {
        groups: &[Group::Run],
        why: "ip: network namespaces and links",
        is_there: || find("ip").is_some(),
        debian: "iproute2",
        fedora: "iproute",
        arch: "iproute2",
    },
    Need {
        groups: &[Group::Tests, Group::Bench],
        why: "nginx: a backend, and a TCP proxy to compare with",
        is_there: || find("nginx").is_some() && nginx_streams(),
        debian: "nginx-light libnginx-mod-stream",
        fedora: "nginx nginx-mod-stream",
        arch: "nginx",
    },
    Need {
        groups: &[Group::Tests, Group::Bench],
        why: "curl: an HTTP client",
        is_there: || find("curl").is_some(),
        debian: "curl",
        fedora: "curl",
        arch: "curl",
    },
    Need {
        groups: &[Group::Tests],
        why: "openssl: certificates",
        is_there: || find("openssl").is_some(),
        debian: "openssl",
        fedora: "openssl",
        arch: "openssl",
    },
    Need {
        groups: &[Group::Tests, Group::Bench],
        why: "wrk: many HTTP connections at once",
        is_there: || find("wrk").is_some(),
        debian: "wrk",
        fedora: "wrk",
        arch: "wrk",
    },
    Need {
        groups: &[Group::Tests],
        why: "iperf3: TCP and UDP streams",
        is_there: || find("iperf3").is_some(),
        debian: "iperf3",
        fedora: "iperf3",
        arch: "iperf3",
    },
    Need {
        groups: &[Group::Tests],
        why: "tcpdump: what went over the wire",
        is_there: || find("tcpdump").is_some(),
        debian: "tcpdump",
        fedora: "tcpdump",
        arch: "tcpdump",
    },
    Need {
        groups: &[Group::Tests],
        why: "bpftool: reads the pinned maps through their BTF",
        is_there: || find("bpftool").is_some(),
        debian: "bpftool",
        fedora: "bpftool",
        arch: "bpf",
    },
    Need {
        groups: &[Group::Tests],
        why: "ethtool: senders with and without checksum offload",
        is_there: || find("ethtool").is_some(),
        debian: "ethtool",
        fedora: "ethtool",
        arch: "ethtool",
    },
    Need {
        groups: &[Group::Tests, Group::Bench],
        why: "nft: paths that fail on purpose, and a balancer to compare with",
        is_there: || find("nft").is_some(),
        debian: "nftables",
        fedora: "nftables",
        arch: "nftables",
    },
    Need {
        groups: &[Group::Bench],
        why: "HAProxy: a TCP proxy to compare with",
        is_there: || find("haproxy").is_some(),
        debian: "haproxy",
        fedora: "haproxy",
        arch: "haproxy",
    },
    Need {
        groups: &[Group::Tests],
        why: "MariaDB: the database of the example with two applications",
        is_there: || find("mariadbd").is_some(),
        debian: "mariadb-server",
        fedora: "mariadb-server",
        arch: "mariadb",
    },
    Need {
        groups: &[Group::Tests],
        why: "Node.js and npm: those applications",
        is_there: || find("node").is_some() && find("npm").is_some(),
        debian: "nodejs npm",
        fedora: "nodejs npm",
        arch: "nodejs npm",
    },
    Need {
        groups: &[Group::Tests, Group::Bench],
        why: "ps, pgrep and sysctl",
        is_there: || find("pgrep").is_some() && find("sysctl").is_some(),
        debian: "procps",
        fedora: "procps-ng",
        arch: "procps-ng",
    },
    Need {
        groups: &[Group::Tests],
        why: "what a machine in an emulator is made with, for the test on an older kernel",
        is_there: || {
            let all = ["busybox", "cpio", "ldd"];
            all.iter().all(|program| find(program).is_some())
        },
        debian: "busybox-static cpio libc-bin",
        fedora: "busybox cpio glibc-common",
        arch: "busybox cpio glibc",
    },
];

fn nginx_streams() -> bool {
    // As a module in either place, or compiled in (Arch).
    ["/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"]
        .iter()
        .any(|folder| Path::new(folder).join("ngx_stream_module.so").is_file())
        || output(Command::new("sh").args(["-c", "nginx -V 2>&1"]))
            .is_some_and(|text| text.split(' ').any(|word| word == "--with-stream"))
}

/// `cargo xtask setup`.
pub fn command(tests: bool, bench: bool, lint: bool) -> Result<()> {
    let mut groups = vec![Group::Build, Group::Run];
    if tests {
        groups.push(Group::Tests);
    }
    if bench {
        groups.push(Group::Bench);
    }
    if lint {
        groups.push(Group::Lint);
    }
    ensure(&groups)?;
    let toolchain = bpf::find().map_err(|message| anyhow!(message))?;
    println!("All that is needed is there. BPF toolchain: {toolchain}");
    Ok(())
}

/// Installs what these groups lack.
pub fn ensure(groups: &[Group]) -> Result<()> {
    let has = |group| groups.contains(&group);
    let lacking: Vec<&Need> = NEEDS
        .iter()
        .filter(|need| need.groups.iter().any(|group| has(*group)) && !(need.is_there)())
        .collect();
    let toolchain = has(Group::Build) && bpf::find().is_err();
    if !lacking.is_empty() || toolchain {
        let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
        match Family::of(&release) {
            Family::Debian => install_on_debian(&lacking, toolchain)?,
            family => bail!("{}", by_hand(family, &lacking, toolchain)),
        }
        if let Some(need) = lacking.iter().find(|need| !(need.is_there)()) {
            bail!(
                "{} installed, yet it is not there: {}",
                need.debian,
                need.why
            );
        }
    }
    if has(Group::Lint) {
        ensure_lint()?;
    }
    if has(Group::Tests) {
        old_kernel::ensure()?;
    }
    if has(Group::Run) {
        ensure_bpffs()?;
    }
    Ok(())
}

/// Distributions with the same package names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    Debian,
    Fedora,
    Arch,
    Other,
}

impl Family {
    /// From the text of `/etc/os-release`.
    fn of(release: &str) -> Self {
        let names = release
            .lines()
            .filter_map(|line| line.split_once('='))
            .filter(|(key, _)| matches!(*key, "ID" | "ID_LIKE"))
            .flat_map(|(_, value)| value.trim_matches(['"', '\'']).split(' '));
        for name in names {
            match name {
                "debian" | "ubuntu" => return Self::Debian,
                "fedora" | "rhel" | "centos" => return Self::Fedora,
                "arch" => return Self::Arch,
                _ => {}
            }
        }
        Self::Other
    }
}

/// What to type where setup cannot install by itself.
fn by_hand(family: Family, lacking: &[&Need], toolchain: bool) -> String {
    let packages = |name: fn(&Need) -> &'static str| {
        lacking
            .iter()
            .map(|need| name(need))
            .collect::<Vec<_>>()
            .join(" ")
    };
    let mut lines = vec![
        "setup installs on Debian and Ubuntu only; here, do this and run it again:".to_owned(),
    ];
    if !lacking.is_empty() {
        lines.push(match family {
            Family::Fedora => format!("sudo dnf install {}", packages(|need| need.fedora)),
            Family::Arch => format!("sudo pacman -S --needed {}", packages(|need| need.arch)),
            Family::Debian => format!("sudo apt-get install {}", packages(|need| need.debian)),
            Family::Other => format!(
                "install (by Debian's names) {}",
                packages(|need| need.debian)
            ),
        });
    }
    if toolchain && bpf::find_compiler().is_none() {
        lines.push(
            "rustup toolchain install nightly --profile minimal --component rust-src,clippy"
                .to_owned(),
        );
    }
    if toolchain && bpf::find_linker().is_none() {
        lines.push(format!(
            "put bpf-linker {LINKER_VERSION} or later, from {LINKER_RELEASES}, into ~/.cargo/bin"
        ));
    }
    lines.join("\n  ")
}

fn install_on_debian(lacking: &[&Need], toolchain: bool) -> Result<()> {
    let compiler = toolchain && bpf::find_compiler().is_none();
    let linker = toolchain && bpf::find_linker().is_none();

    eprintln!("setup: to be installed:");
    for need in lacking {
        eprintln!("    {:42} {}", need.debian, need.why);
    }
    if compiler {
        eprintln!(
            "    {:42} a Rust compiler that has the BPF target's core",
            COMPILER_PACKAGES.join(" ")
        );
    }
    if linker {
        eprintln!(
            "    {:42} links the kernel side into one object",
            format!("bpf-linker {LINKER_VERSION} (cargo install)")
        );
        eprintln!(
            "    {:42} what bpf-linker is built on",
            "g++, LLVM of the compiler's version"
        );
    }

    let mut packages: Vec<&str> = lacking
        .iter()
        .flat_map(|need| need.debian.split(' '))
        .collect();
    if compiler {
        packages.extend(COMPILER_PACKAGES);
    }
    if !packages.is_empty() || linker {
        step("apt-get update");
        let mut update = apt_get()?;
        if let Err(error) = run(update.args(["-q", "update"])) {
            eprintln!("setup: {error:#}; going on with the package lists as they are");
        }
    }
    let others: Vec<&str> = packages
        .iter()
        .filter(|package| !COMPILER_PACKAGES.contains(package))
        .copied()
        .collect();
    install(&others)?;
    quiet_services(lacking);
    if compiler {
        install_compiler()?;
    }
    if linker {
        install_linker()?;
    }
    Ok(())
}

/// Debian's packages of a current Rust compiler, and of `core` for BPF.
const COMPILER_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// apt-get, which asks nothing.
pub fn apt_get() -> Result<Command> {
    as_root_with(
        "apt-get",
        &[
            ("DEBIAN_FRONTEND", "noninteractive".as_ref()),
            ("LC_ALL", "C.UTF-8".as_ref()),
        ],
    )
}

/// Installs packages; never removes one for it.
fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    timed(&format!("apt-get install {}", packages.join(" ")), || {
        let mut command = apt_get()?;
        command
            .args(["-q", "-y", "--no-install-recommends", "--no-remove"])
            .arg("install")
            .args(packages);
        run_apt(&mut command)
    })
}

/// Runs apt-get: its thousand lines become one now and then; all that it said comes out where it fails.
pub fn run_apt(command: &mut Command) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", shown(command)))?;
    let stdout = child.stdout.take().context("a pipe was asked for")?;
    let mut said = Vec::new();
    let (mut unpacked, mut ready) = (0, 0);
    let mut last = Instant::now();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        unpacked += u32::from(line.starts_with("Unpacking "));
        ready += u32::from(line.starts_with("Setting up "));
        said.push(line);
        if last.elapsed() > Duration::from_secs(5) {
            last = Instant::now();
            eprintln!("    {unpacked} packages unpacked, {ready} of them set up");
        }
    }
    let status = child.wait()?;
    if !status.success() {
        said.iter().for_each(|line| eprintln!("    {line}"));
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

/// Where systemd runs, a package that brings a server starts it: the tests start their own, in namespaces.
fn quiet_services(installed: &[&Need]) {
    if !Path::new("/run/systemd/system").is_dir() {
        return;
    }
    for (package, unit) in [
        ("nginx-light", "nginx"),
        ("mariadb-server", "mariadb"),
        ("haproxy", "haproxy"),
    ] {
        if installed.iter().any(|need| need.debian.contains(package)) {
            step(&format!(
                "systemctl disable --now {unit}: just installed for the tests only"
            ));
            let outcome = as_root("systemctl")
                .and_then(|mut command| run(command.args(["-q", "disable", "--now", unit])));
            if let Err(error) = outcome {
                eprintln!("setup: {error:#}; {unit} is left running");
            }
        }
    }
}

/// Debian's compiler; where it cannot be had, rustup's nightly.
fn install_compiler() -> Result<()> {
    let debian = install(&COMPILER_PACKAGES);
    if bpf::find_compiler().is_some() {
        return Ok(());
    }
    if let Err(error) = debian {
        eprintln!("setup: {error:#}");
    }
    if find("rustup").is_none() {
        bail!(
            "no Rust compiler for BPF: {} {} is not to be had here; install rustup from https://rustup.rs and run this again",
            COMPILER_PACKAGES.join(" and "),
            "in version 1.95 or later"
        );
    }
    step("rustup's nightly with rust-src instead");
    run(Command::new("rustup")
        .args(["toolchain", "install", "nightly", "--profile", "minimal"])
        .args(["--component", "rust-src,clippy"]))?;
    bpf::find_compiler()
        .map(drop)
        .context("rustup installed nightly, yet it has no rust-src")
}

fn install_linker() -> Result<()> {
    let compiler = bpf::find_compiler().context("no Rust compiler for BPF")?;
    let rustc = match &compiler {
        bpf::Compiler::Prebuilt { rustc, .. } => rustc.clone(),
        bpf::Compiler::Nightly { .. } => {
            output(Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]))
                .map(PathBuf::from)
                .context("`rustup which --toolchain nightly rustc` failed")?
        }
    };
    let about = output(Command::new(&rustc).arg("-vV")).context("`rustc -vV` failed")?;
    let llvm = llvm_version(&about)
        .with_context(|| format!("{} names no LLVM version", rustc.display()))?;
    if !LINKER_LLVM.contains(&llvm) {
        bail!(
            "bpf-linker {LINKER_VERSION} works with LLVM {} to {}, and {compiler} has LLVM {llvm}; \
             put a bpf-linker for it from {LINKER_RELEASES} into ~/.cargo/bin",
            LINKER_LLVM.start(),
            LINKER_LLVM.end()
        );
    }
    let packages = [
        &format!("llvm-{llvm}-dev"),
        &format!("libpolly-{llvm}-dev"),
        "zlib1g-dev",
        "libzstd-dev",
        "libxml2-dev",
        "g++",
    ];
    install(&packages).with_context(|| {
        format!("no LLVM {llvm} to build bpf-linker on; add https://apt.llvm.org, or put a bpf-linker from {LINKER_RELEASES} into ~/.cargo/bin")
    })?;
    step("cargo install bpf-linker (a minute or so)");
    let mut command = Command::new("cargo");
    // Without LLVM_PREFIX its build finds the headers and not the library.
    run(command
        .env("LLVM_PREFIX", format!("/usr/lib/llvm-{llvm}"))
        .args([
            "install",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--locked",
        ])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{llvm}"),
        ]))?;
    bpf::find_linker()
        .map(drop)
        .context("cargo installed bpf-linker, yet it is neither in PATH nor in ~/.cargo/bin")
}

/// The major version of LLVM in the output of `rustc -vV`.
fn llvm_version(about: &str) -> Option<u32> {
    let version = about
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    version.split('.').next()?.trim().parse().ok()
}

fn ensure_lint() -> Result<()> {
    let missing: Vec<&str> = [("rustfmt", "fmt"), ("clippy", "clippy")]
        .into_iter()
        .filter(|(_, verb)| !succeeds(crate::run::cargo().args([verb, "--version"])))
        .map(|(component, _)| component)
        .collect();
    if !missing.is_empty() {
        let mut command = Command::new("rustup");
        command.args(["component", "add"]).args(&missing);
        step(&format!(
            "{}: checks format and finds mistakes",
            shown(&command)
        ));
        run(&mut command).with_context(|| {
            format!("install {} for this Rust toolchain", missing.join(" and "))
        })?;
    }

    let compiler =
        bpf::find_compiler().context("no Rust compiler for BPF; run `cargo xtask setup`")?;
    match (&compiler, lint::clippy_driver(&compiler)) {
        (_, Some(driver)) if driver.is_file() => Ok(()),
        (bpf::Compiler::Prebuilt { rustc, .. }, Some(_))
            if rustc.starts_with("/usr/bin") && find("apt-get").is_some() =>
        {
            step("clippy for the kernel side's compiler: rust-web-clippy");
            install(&["rust-web-clippy"])
        }
        (_, Some(driver)) => bail!(
            "{}: not there; install the clippy that belongs to {compiler}",
            driver.display()
        ),
        (_, None) => {
            let cargo = ["run", "nightly", "cargo", "clippy", "--version"];
            if succeeds(Command::new("rustup").args(cargo)) {
                return Ok(());
            }
            step("rustup component add clippy --toolchain nightly: for the kernel side");
            run(Command::new("rustup").args([
                "component",
                "add",
                "clippy",
                "--toolchain",
                "nightly",
            ]))
        }
    }
}

/// Pins need the BPF file system; systemd mounts it, a container may not have it.
fn ensure_bpffs() -> Result<()> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    if is_mounted(&mounts, BPFFS, "bpf") {
        return Ok(());
    }
    step(&format!(
        "mounting the BPF file system at {BPFFS}: maps and programs are pinned there"
    ));
    run(as_root("mount")?.args(["-t", "bpf", "bpf", BPFFS]))
}

fn is_mounted(mounts: &str, place: &str, kind: &str) -> bool {
    mounts.lines().any(|line| {
        let mut words = line.split(' ').skip(1);
        words.next() == Some(place) && words.next() == Some(kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_follow_from_id_and_id_like() {
        let family = Family::of;
        assert_eq!(family("PRETTY_NAME=\"x\"\nID=debian\n"), Family::Debian);
        assert_eq!(
            family("ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n"),
            Family::Debian
        );
        assert_eq!(family("ID=fedora\nVERSION_ID=44"), Family::Fedora);
        assert_eq!(
            family("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\""),
            Family::Fedora
        );
        assert_eq!(family("ID=endeavouros\nID_LIKE=arch"), Family::Arch);
        assert_eq!(family("ID=alpine"), Family::Other);
        assert_eq!(family(""), Family::Other);
    }

    #[test]
    fn other_distributions_get_their_own_names() {
        let needs: Vec<&Need> = NEEDS.iter().collect();
        let fedora = by_hand(Family::Fedora, &needs, false);
        assert!(
            fedora.contains("sudo dnf install gcc iproute nginx nginx-mod-stream curl"),
            "{fedora}"
        );
        let arch = by_hand(Family::Arch, &needs, false);
        assert!(
            arch.contains("sudo pacman -S --needed gcc iproute2 nginx curl"),
            "{arch}"
        );
        assert_eq!(by_hand(Family::Arch, &[], false).lines().count(), 1);
    }

    #[test]
    fn the_llvm_version_is_read_from_rustc() {
        assert_eq!(
            llvm_version("rustc 1.96.0\nhost: x\nLLVM version: 22.1.8"),
            Some(22)
        );
        assert_eq!(llvm_version("rustc 1.96.0"), None);
    }

    #[test]
    fn a_mount_is_place_and_kind() {
        let mounts = "sysfs /sys sysfs rw 0 0\nbpf /sys/fs/bpf bpf rw,mode=700 0 0\n";
        assert!(is_mounted(mounts, "/sys/fs/bpf", "bpf"));
        assert!(!is_mounted(mounts, "/sys", "bpf"));
        assert!(!is_mounted(
            "none /sys/fs/bpf tmpfs rw 0 0",
            "/sys/fs/bpf",
            "bpf"
        ));
    }
}
