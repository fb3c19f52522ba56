//! `cargo xtask test`: builds everything once, runs every test program, cleans up, and adds up.

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{
    artifacts::{self, Executable},
    leftovers,
    libtest::Tally,
    old_kernel,
    run::{self, cargo, step, timed},
    setup::{self, Group},
};

/// The package whose tests make namespaces and load programs, and so run as root.
const ROOTS_PACKAGE: &str = "sluice-tests";

/// A test program that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(300);

/// How long a program that was asked to end may take.
const GRACE: Duration = Duration::from_secs(10);

/// What to run.
#[derive(clap::Args)]
pub struct Options {
    /// Only tests whose names contain this; the name of a package, or of a file under tests/, chooses that one
    filter: Vec<String>,
}

/// Runs the suite.
pub fn command(options: &Options) -> Result<()> {
    setup::ensure(&[Group::Build, Group::Run, Group::Tests])?;
    let programs = timed("building everything, with tests", build)?;
    let sluice = artifacts::binary(&programs).context("cargo built no binary `sluice`")?;
    let (selected, filter) = select(&programs, &options.filter);

    for leftover in leftovers::clean() {
        eprintln!("    removed what an earlier run left: {leftover}");
    }
    catch_signals();
    let mut all = Tally::default();
    for program in selected {
        let outcome = run_program(program, &sluice, &filter);
        all.add(outcome.unwrap_or_else(|error| broken(&program.target, &format!("{error:#}"))));
        for leak in leftovers::clean() {
            all.failures
                .push(format!("{}: left behind: {leak}", program.target));
        }
        if interrupted() {
            bail!("interrupted; everything is cleaned up");
        }
    }
    if filter.len() == options.filter.len() {
        all.add(run_doc_tests(&filter)?);
        if interrupted() {
            bail!("interrupted");
        }
    }
    conclude(&all)
}

/// Prints what failed and the last line.
fn conclude(all: &Tally) -> Result<()> {
    if !all.failures.is_empty() {
        println!("\nfailed:");
        for failure in &all.failures {
            println!("    {failure}");
        }
    }
    println!("\n{}", all.summary());
    if !all.failures.is_empty() {
        bail!("the test suite failed");
    }
    if all.passed == 0 {
        bail!("no test has such a name");
    }
    Ok(())
}

/// Builds the binary and all test programs, in one profile.
fn build() -> Result<Vec<Executable>> {
    let workspace = ["--locked", "--workspace", "--exclude", "lb-ebpf"];
    let mut built = artifacts::compile(cargo().arg("build").args(workspace))?;
    built.extend(artifacts::compile(
        cargo().args(["test", "--no-run"]).args(workspace),
    )?);
    // The binaries are in both lists.
    let mut programs: Vec<Executable> = Vec::new();
    for program in built {
        if !programs.contains(&program) {
            programs.push(program);
        }
    }
    Ok(programs)
}

/// The test programs to run, those that need no root first, and the words that narrow down their tests.
///
/// Words that name a program or package choose it; without any, all are chosen.
fn select<'a>(programs: &'a [Executable], words: &[String]) -> (Vec<&'a Executable>, Vec<String>) {
    let mut tests: Vec<_> = programs.iter().filter(|program| program.is_test).collect();
    tests.sort_by_key(|program| (needs_root(program), &program.package, &program.target));
    let names =
        |program: &Executable, word: &String| [&program.target, &program.package].contains(&word);
    let (chosen, filter): (Vec<String>, _) = words
        .iter()
        .cloned()
        .partition(|word| tests.iter().any(|program| names(program, word)));
    if !chosen.is_empty() {
        tests.retain(|program| chosen.iter().any(|word| names(program, word)));
    }
    (tests, filter)
}

fn needs_root(program: &Executable) -> bool {
    program.package == ROOTS_PACKAGE && program.kind == "test"
}

fn run_program(program: &Executable, sluice: &Path, filter: &[String]) -> Result<Tally> {
    let run = std::process::id().to_string();
    let (old_kernel, emulator) = (old_kernel::folder()?, old_kernel::emulator_folder()?);
    let variables: [(&str, &OsStr); 5] = [
        (leftovers::MARK, run.as_ref()),
        ("SLUICE_BIN", sluice.as_os_str()),
        ("SLUICE_OLD_KERNEL", old_kernel.as_os_str()),
        ("SLUICE_EMULATOR", emulator.as_os_str()),
        ("RUST_BACKTRACE", "1".as_ref()),
    ];
    let root = needs_root(program);
    let mut command = if root {
        run::as_root_with(&program.path, &variables)?
    } else {
        let mut command = Command::new(&program.path);
        command.envs(variables);
        command
    };
    command.args(filter).current_dir(&program.folder);
    step(&format!(
        "{} {} of {}{}",
        program.kind,
        program.target,
        program.package,
        if root { ", as root" } else { "" }
    ));
    follow(&program.target, &mut command)
}

fn run_doc_tests(filter: &[String]) -> Result<Tally> {
    step("examples in the documentation");
    let mut command = cargo();
    command
        .args(["test", "--quiet", "--locked", "--doc", "--workspace"])
        .args(["--exclude", "lb-ebpf", "--"])
        // Without it, --quiet makes the harness print dots.
        .args(["--format", "pretty"])
        .args(filter);
    follow("documentation", &mut command)
}

/// Runs a test program to its end, passes on what it prints, and counts.
fn follow(name: &str, command: &mut Command) -> Result<Tally> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", run::shown(command)))?;
    let stdout = child.stdout.take().context("a pipe was asked for")?;
    let (sender, lines) = mpsc::channel();
    // Not joined: a process that the test left running may hold the pipe open for ever.
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if sender
                .send(String::from_utf8_lossy(&line).into_owned())
                .is_err()
            {
                break;
            }
        }
    });

    let mut tally = Tally::default();
    let mut last = Instant::now();
    let mut take = |line: String| {
        println!("{line}");
        tally.line(name, &line);
    };
    let status = loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                last = Instant::now();
                take(line);
            }
            Err(RecvTimeoutError::Disconnected) => break child.wait()?,
            Err(RecvTimeoutError::Timeout) => {
                if let Some(status) = child.try_wait()? {
                    lines.try_iter().for_each(&mut take);
                    break status;
                }
                if interrupted() {
                    break end(&mut child)?;
                }
                if last.elapsed() > SILENCE {
                    end(&mut child)?;
                    bail!("hangs: nothing printed for {} s", SILENCE.as_secs());
                }
            }
        }
    };
    if !tally.finished || (!status.success() && tally.failures.is_empty()) {
        tally
            .failures
            .push(format!("{name}: ended before its result ({status})"));
    }
    Ok(tally)
}

/// Asks a program to end, then makes it. Through sudo where it runs as root: sudo passes the signal on.
fn end(child: &mut Child) -> Result<ExitStatus> {
    let signal = |name: &str| -> Result<()> {
        run::run(run::as_root("kill")?.args([name, &child.id().to_string()]))
    };
    signal("-TERM")?;
    let asked = Instant::now();
    while asked.elapsed() < GRACE {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(50));
    }
    run::run(run::as_root("kill")?.args(["-KILL", &child.id().to_string()]))?;
    Ok(child.wait()?)
}

fn broken(program: &str, why: &str) -> Tally {
    Tally {
        failures: vec![format!("{program}: {why}")],
        ..Tally::default()
    }
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// From here on Ctrl-C ends the tests and not this process, which then cleans up.
fn catch_signals() {
    extern "C" fn note(_signal: libc::c_int) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = note;
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler does one store to an atomic, which a signal handler may do, and lives as long as the process.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(package: &str, target: &str, kind: &str) -> Executable {
        Executable {
            package: package.to_owned(),
            folder: "/".into(),
            target: target.to_owned(),
            kind: kind.to_owned(),
            is_test: kind != "example",
            path: format!("/{target}").into(),
        }
    }

    fn programs() -> Vec<Executable> {
        vec![
            program("sluice-tests", "packets", "test"),
            program("sluice-tests", "sluice_tests", "lib"),
            program("lb-userspace", "sluice", "lib"),
            program("lb-userspace", "tool", "example"),
        ]
    }

    fn targets<'a>(selected: &[&'a Executable]) -> Vec<&'a str> {
        selected.iter().map(|program| &*program.target).collect()
    }

    #[test]
    fn what_needs_root_comes_last_and_what_is_no_test_never() {
        let programs = programs();
        let (selected, _) = select(&programs, &[]);
        assert_eq!(targets(&selected), ["sluice", "sluice_tests", "packets"]);
        assert_eq!(
            selected
                .iter()
                .filter(|program| needs_root(program))
                .count(),
            1
        );
    }

    #[test]
    fn a_filter_names_a_program_or_tests() {
        let programs = programs();
        let filter = ["packets".to_owned()];
        let (selected, rest) = select(&programs, &filter);
        assert_eq!((targets(&selected), rest.len()), (vec!["packets"], 0));
        let filter = ["lb-userspace".to_owned(), "maglev".to_owned()];
        let (selected, rest) = select(&programs, &filter);
        assert_eq!(targets(&selected), ["sluice"]);
        assert_eq!(rest, ["maglev"]);
        let filter = ["maglev".to_owned()];
        let (selected, rest) = select(&programs, &filter);
        assert_eq!((selected.len(), rest), (3, filter.to_vec()));
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let tally = follow("x", &mut shell("echo 'test a ... ok'; kill -SEGV $$")).unwrap();
        assert_eq!(tally.failures.len(), 1);
        assert!(
            tally.failures[0].starts_with("x: ended before its result"),
            "{tally:?}"
        );
    }

    #[test]
    fn a_daemon_that_holds_the_pipe_does_not_hold_the_run() {
        let file = std::env::temp_dir().join(format!("slc-{}-daemon", std::process::id()));
        let script = format!(
            "sleep 60 & echo $! > {}; echo 'test result: ok. 3 passed; 0 failed;'",
            file.display()
        );
        let start = Instant::now();
        let tally = follow("x", &mut shell(&script)).unwrap();
        let waited = start.elapsed();

        let daemon = std::fs::read_to_string(&file).unwrap();
        run::run(Command::new("kill").arg(daemon.trim())).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(tally.summary(), "3 passed, 0 failed");
        assert!(waited < Duration::from_secs(30), "{waited:?}");
    }
}
