//! `sluice demo` as a user runs it: it works, and leaves nothing behind however it ends.

use sluice_tests::topology::{PATIENCE, sluice_bin, wait_until};
use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Instant,
};

/// Marks the processes of one demonstration: children inherit it.
const MARK: &str = "SLUICE_DEMO_TEST";

#[test]
fn shows_the_main_job_in_seconds() {
    let started = Instant::now();
    let mut demo = Demo::start("whole", &[]);
    let text = demo.rest();
    let status = demo.child.wait().expect("it can be waited for");
    assert!(status.success(), "{status}\n{text}\n{}", demo.complaints());
    assert!(started.elapsed() < PATIENCE, "took {:?}", started.elapsed());

    // Round robin over three backends, twice, and over two when one is drained.
    for (name, times) in [
        ("app1", [100, 100, 150]),
        ("app2", [100, 100, 150]),
        ("app3", [100, 100, 0]),
    ] {
        let counts: Vec<u32> = text
            .lines()
            .filter_map(|line| {
                line.trim()
                    .strip_prefix(name)?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        assert_eq!(counts, times, "{name} in:\n{text}");
    }
    assert!(text.contains("marked down after"), "{text}");
    assert!(text.contains("in use again"), "{text}");
    for span in [
        "since it was marked down:",
        "with no daemon:",
        "meanwhile and after:",
    ] {
        let line = text.lines().find(|line| line.contains(span));
        assert!(
            line.is_some_and(|line| line.ends_with(" 0 failed")),
            "{span} in:\n{text}"
        );
    }
    assert!(
        text.contains("took over the program and its maps"),
        "{text}"
    );
    assert!(text.contains("is still answered by it"), "{text}");
    assert!(
        !text.contains('\x1b'),
        "colours, though it is no terminal: {text}"
    );
    demo.left_nothing();
}

#[test]
fn leaves_nothing_behind_when_interrupted() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut demo = Demo::start(&format!("signal{signal}"), &[]);
        demo.wait_for("The live table");
        demo.signal(signal);
        let text = demo.rest();
        let status = demo.child.wait().expect("it can be waited for");
        assert_eq!(status.code(), Some(1), "{text}");
        let complaint = demo.complaints();
        assert_eq!(complaint.lines().count(), 1, "{complaint}");
        demo.left_nothing();
    }
}

#[test]
fn stays_up_with_keep_until_interrupted() {
    let mut demo = Demo::start("keep", &["--keep"]);
    demo.wait_for("Try:");
    let command = demo.wait_for("curl -s http://");
    let request: Vec<_> = command.split_whitespace().skip(1).collect();
    let answer = Command::new(request[0])
        .args(&request[1..])
        .output()
        .expect("nsenter is there");
    let answer = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert!(answer.starts_with("app"), "{command}: {answer}");
    demo.wait_for("Ctrl-C ends it");
    demo.signal(libc::SIGINT);
    let text = demo.rest();
    let status = demo.child.wait().expect("it can be waited for");
    assert!(status.success(), "{status}\n{text}");
    demo.left_nothing();
}

#[test]
fn its_processes_die_with_it() {
    let mut demo = Demo::start("killed", &[]);
    demo.wait_for("The live table");
    demo.signal(libc::SIGKILL);
    demo.child.wait().expect("it can be waited for");
    demo.processes_end();
    let directory = demo.directory();
    // Nobody could remove its directory; the next one does.
    let mut next = Demo::start("next", &[]);
    next.wait_for("The live table");
    assert!(
        !directory.exists(),
        "{} is still there",
        directory.display()
    );
    next.signal(libc::SIGTERM);
    next.child.wait().expect("it can be waited for");
    next.left_nothing();
}

struct Demo {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    mark: String,
}

impl Demo {
    fn start(name: &str, arguments: &[&str]) -> Self {
        let mark = format!("{}-{name}", std::process::id());
        let mut child = Command::new(sluice_bin())
            .arg("demo")
            .args(arguments)
            .env(MARK, &mark)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let output = BufReader::new(child.stdout.take().expect("it is a pipe"));
        Self {
            child,
            output,
            mark,
        }
    }

    /// Reads until a line contains `text`, and returns that line.
    fn wait_for(&mut self, text: &str) -> String {
        let mut all = String::new();
        loop {
            let mut line = String::new();
            let length = self.output.read_line(&mut line).expect("text");
            if length == 0 {
                panic!("no {text:?} in:\n{all}\n{}", self.complaints());
            }
            if line.contains(text) {
                return line;
            }
            all.push_str(&line);
        }
    }

    fn rest(&mut self) -> String {
        let mut text = String::new();
        self.output.read_to_string(&mut text).expect("text");
        text
    }

    /// What it wrote to standard error; once.
    fn complaints(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut text).expect("text");
        }
        text
    }

    fn signal(&self, signal: i32) {
        // SAFETY: plain system call; the child has not been waited for.
        let result = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(result, 0, "signal {signal}");
    }

    fn directory(&self) -> PathBuf {
        Path::new("/run").join(format!("sluice-demo-{}", self.child.id()))
    }

    /// Waits until no process of this demonstration is left.
    fn processes_end(&self) {
        let wanted = format!("{MARK}={}", self.mark);
        wait_until("its processes to end", || {
            let processes = fs::read_dir("/proc").expect("/proc").flatten();
            !processes
                .filter_map(|process| fs::read(process.path().join("environ")).ok())
                .any(|environment| {
                    environment
                        .split(|byte| *byte == 0)
                        .any(|variable| variable == wanted.as_bytes())
                })
        });
    }

    fn left_nothing(&self) {
        self.processes_end();
        let directory = self.directory();
        assert!(
            !directory.exists(),
            "{} is still there",
            directory.display()
        );
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }
}
