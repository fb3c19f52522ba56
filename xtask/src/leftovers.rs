//! Finds and removes what test runs left behind that are no more.
//!
//! Whatever a test makes outside its own process is called `slc-<pid>…`, by the process that made it (a demonstration:
//! `sluice-demo-<pid>…`). It belongs to a dead run when that process is gone; what belongs to a live one is never touched.

use std::{
    ffi::OsStr,
    fmt, fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::Result;

use crate::run::{as_root, output, run};

/// How the names of all that tests make begin, and of what a demonstration makes.
const PREFIXES: [&str; 2] = ["slc-", "sluice-demo-"];

/// Something that outlived the run that made it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// A process in a namespace of the run. Goes first: it may hold the others.
    Process {
        /// Its number.
        pid: u32,
        /// What `/proc/<pid>/comm` says.
        name: String,
        /// The namespace it runs in.
        namespace: String,
    },
    /// A folder of pinned BPF objects, or a pin.
    Pin(PathBuf),
    /// A network namespace.
    Namespace(String),
    /// A link in the namespace that the machine started with.
    Link(String),
    /// A file or folder among the temporary ones.
    File(PathBuf),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process {
                pid,
                name,
                namespace,
            } => write!(f, "process {pid} ({name}) in namespace {namespace}"),
            Self::Pin(path) => write!(f, "pin {}", path.display()),
            Self::Namespace(name) => write!(f, "network namespace {name}"),
            Self::Link(name) => write!(f, "link {name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// All that dead runs left, in the order in which it is to be removed.
fn find() -> Vec<Leftover> {
    let mut found = Vec::new();
    for namespace in names("/run/netns") {
        found.extend(processes(&namespace));
        found.push(Leftover::Namespace(namespace));
    }
    // Pins are root's alone; an ordinary user has to ask.
    let pins = output_as_root("ls", &["/sys/fs/bpf"]).unwrap_or_default();
    for pin in pins.lines().filter(|name| is_dead(name)) {
        found.push(Leftover::Pin(Path::new("/sys/fs/bpf").join(pin)));
    }
    found.extend(names("/sys/class/net").into_iter().map(Leftover::Link));
    let temporary = std::env::temp_dir();
    found.extend(
        names(&temporary)
            .into_iter()
            .map(|name| Leftover::File(temporary.join(name))),
    );
    found.sort();
    found
}

/// Removes one, as root.
fn remove(leftover: &Leftover) -> Result<()> {
    let (program, arguments): (_, [&OsStr; 3]) = match leftover {
        Leftover::Process { pid, .. } => {
            return run(as_root("kill")?.args(["-KILL", &pid.to_string()]));
        }
        Leftover::Namespace(name) => ("ip", ["netns".as_ref(), "del".as_ref(), name.as_ref()]),
        Leftover::Link(name) => ("ip", ["link".as_ref(), "del".as_ref(), name.as_ref()]),
        Leftover::Pin(path) | Leftover::File(path) => {
            ("rm", ["-rf".as_ref(), "--".as_ref(), path.as_ref()])
        }
    };
    // Its complaint would mislead where one end of a veth has taken the other with it.
    run(as_root(program)?.args(arguments).stderr(Stdio::null()))
}

/// Removes all that dead runs left, and returns what it was.
pub fn clean() -> Vec<Leftover> {
    let found = find();
    for leftover in &found {
        if let Err(error) = remove(leftover)
            && find().contains(leftover)
        {
            eprintln!("xtask: {leftover} stays: {error:#}");
        }
    }
    found
}

/// The entries of a folder that belong to dead runs.
fn names(folder: impl AsRef<Path>) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_dead(name))
        .collect()
}

fn is_dead(name: &str) -> bool {
    owner(name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// The process that a name belongs to. A name without one is nobody's, and left alone.
fn owner(name: &str) -> Option<u32> {
    let rest = PREFIXES
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix))?;
    let end = rest
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

/// The processes that run in a namespace.
fn processes(namespace: &str) -> Vec<Leftover> {
    let pids = output_as_root("ip", &["netns", "pids", namespace]).unwrap_or_default();
    pids.lines()
        .filter_map(|pid| pid.trim().parse().ok())
        .map(|pid: u32| Leftover::Process {
            pid,
            name: fs::read_to_string(format!("/proc/{pid}/comm"))
                .unwrap_or_default()
                .trim()
                .to_owned(),
            namespace: namespace.to_owned(),
        })
        .collect()
}

fn output_as_root(program: &str, arguments: &[&str]) -> Option<String> {
    output(as_root(program).ok()?.args(arguments))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Above the kernel's limit: no process has this number.
    const NOBODY: u32 = 4_194_305;

    #[test]
    fn a_name_tells_its_owner() {
        assert_eq!(owner("slc-123-client"), Some(123));
        assert_eq!(owner("slc-123"), Some(123));
        assert_eq!(owner("slc-123c0"), Some(123));
        assert_eq!(owner("sluice-demo-123"), Some(123));
        assert_eq!(owner("slc-client"), None);
        assert_eq!(owner("slc-"), None);
        assert_eq!(owner("sluice-123"), None);
    }

    #[test]
    fn what_belongs_to_a_live_process_is_left_alone() {
        assert!(!is_dead(&format!("slc-{}-x", std::process::id())));
        assert!(is_dead(&format!("slc-{NOBODY}-x")));
        assert!(!is_dead("eth0"));
    }

    #[test]
    fn leftovers_among_files_are_found_and_live_ones_not() {
        let folder = std::env::temp_dir().join(format!("slc-{}-leftovers", std::process::id()));
        fs::create_dir_all(folder.join(format!("slc-{NOBODY}-dead"))).unwrap();
        fs::create_dir_all(folder.join(format!("slc-{}-live", std::process::id()))).unwrap();
        let found = names(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found, [format!("slc-{NOBODY}-dead")]);
    }

    #[test]
    fn processes_go_before_the_namespace_that_they_hold() {
        let mut both = [
            Leftover::Namespace("slc-1-a".to_owned()),
            Leftover::Process {
                pid: 2,
                name: "nginx".to_owned(),
                namespace: "slc-1-a".to_owned(),
            },
        ];
        both.sort();
        assert_eq!(
            both[0].to_string(),
            "process 2 (nginx) in namespace slc-1-a"
        );
        assert_eq!(both[1].to_string(), "network namespace slc-1-a");
    }
}
