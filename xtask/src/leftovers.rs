//! Finds and removes what test runs left behind that are no more.
//!
//! Whatever a test makes outside its own process is called `slc-<pid>…`, by the process that made it (a demonstration:
//! `sluice-demo-<pid>…`). It belongs to a dead run when that process is gone; what belongs to a live one is never touched.
//!
//! Processes are known by the dead run's namespace they run in, or by the variable [`MARK`] that they inherited.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fmt, fs,
    path::{Path, PathBuf},
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

use crate::run::{as_root, output, run};

/// How the names of all that tests make begin, and of what a demonstration makes.
const PREFIXES: [&str; 2] = ["slc-", "sluice-demo-"];

/// Set in the environment of every test program to the number of the xtask that runs it.
pub const MARK: &str = "SLUICE_TEST_RUN";

/// How long a process may take to end that was told to by the end of its run.
const GRACE: Duration = Duration::from_secs(3);

/// Something that outlived the run that made it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leftover {
    /// A process. Goes first: it may hold the others.
    Process {
        /// Its number.
        pid: u32,
        /// What `/proc/<pid>/comm` says.
        name: String,
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
            Self::Process { pid, name } => write!(f, "process {pid} ({name})"),
            Self::Pin(path) => write!(f, "pin {}", path.display()),
            Self::Namespace(name) => write!(f, "network namespace {name}"),
            Self::Link(name) => write!(f, "link {name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// All that dead runs left, in the order in which it is to be removed.
fn find() -> Vec<Leftover> {
    let namespaces = names("/run/netns");
    let mut found = processes(&namespaces);
    found.extend(namespaces.into_iter().map(Leftover::Namespace));
    // Pins are root's alone; an ordinary user has to ask.
    let pins = output_as_root("ls", &["/sys/fs/bpf"]).unwrap_or_default();
    for pin in pins.lines().filter(|name| is_dead(name)) {
        found.push(Leftover::Pin(Path::new("/sys/fs/bpf").join(pin)));
    }
    found.extend(names("/sys/class/net").into_iter().map(Leftover::Link));
    for folder in [std::env::temp_dir(), "/run".into()] {
        let files = names(&folder).into_iter();
        found.extend(files.map(|name| Leftover::File(folder.join(name))));
    }
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

/// Removes all that dead runs left, and returns what it was. What is just about to end gets the time to.
pub fn clean() -> Vec<Leftover> {
    let asked = Instant::now();
    let mut found = find();
    while matches!(found.first(), Some(Leftover::Process { .. })) && asked.elapsed() < GRACE {
        thread::sleep(Duration::from_millis(50));
        found = find();
    }
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
    owner(name).is_some_and(is_gone)
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

/// The processes in these namespaces, and the marked ones of runs that are over.
fn processes(namespaces: &[String]) -> Vec<Leftover> {
    let mut pids: BTreeSet<u32> = BTreeSet::new();
    for namespace in namespaces {
        let inside = output_as_root("ip", &["netns", "pids", namespace]).unwrap_or_default();
        pids.extend(
            inside
                .lines()
                .filter_map(|pid| pid.trim().parse::<u32>().ok()),
        );
    }
    // Only root may read the environment of root's processes.
    let marked = output_as_root("sh", &["-c", &marks("[0-9]*")]).unwrap_or_default();
    pids.extend(marked.lines().filter_map(orphan));
    pids.into_iter()
        .map(|pid| Leftover::Process {
            pid,
            name: fs::read_to_string(format!("/proc/{pid}/comm"))
                .unwrap_or_default()
                .trim()
                .to_owned(),
        })
        .collect()
}

/// A script that prints a line for [`orphan`] for each process that is marked.
fn marks(pid: &str) -> String {
    // The last command's result counts: grep fails where a process has no mark or ends meanwhile.
    format!("grep -aHzosx '{MARK}=[0-9]*' /proc/{pid}/environ | tr '\\0' '\\n'")
}

/// The process in `/proc/<pid>/environ:SLUICE_TEST_RUN=<xtask>`, unless another, live xtask runs it.
fn orphan(line: &str) -> Option<u32> {
    let (path, mark) = line.split_once(':')?;
    let run: u32 = mark.strip_prefix(MARK)?.strip_prefix('=')?.parse().ok()?;
    // Our own test programs have ended when this is asked.
    (run == std::process::id() || is_gone(run)).then_some(())?;
    path.split('/').nth(2)?.parse().ok()
}

fn is_gone(pid: u32) -> bool {
    !Path::new("/proc").join(pid.to_string()).exists()
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
    fn marked_processes_of_live_runs_are_not_orphans() {
        let line = |run: u32| format!("/proc/77/environ:{MARK}={run}");
        assert_eq!(orphan(&line(NOBODY)), Some(77));
        assert_eq!(orphan(&line(std::process::id())), Some(77));
        assert_eq!(orphan(&line(1)), None);
        assert_eq!(orphan("grep: nonsense"), None);
    }

    #[test]
    fn a_marked_process_is_found() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .env(MARK, NOBODY.to_string())
            .spawn()
            .unwrap();
        let script = marks(&child.id().to_string());
        let line = output(std::process::Command::new("sh").args(["-c", &script]));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(orphan(&line.unwrap()), Some(child.id()));
    }

    #[test]
    fn processes_go_before_the_namespace_that_they_hold() {
        let mut both = [
            Leftover::Namespace("slc-1-a".to_owned()),
            Leftover::Process {
                pid: 2,
                name: "nginx".to_owned(),
            },
        ];
        both.sort();
        assert_eq!(both[0].to_string(), "process 2 (nginx)");
        assert_eq!(both[1].to_string(), "network namespace slc-1-a");
    }
}
