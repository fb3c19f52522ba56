//! The real binary: exit codes, one-line errors, and listings from a server on a real socket.

use sluice::{
    api::{ConnectionFilter, Control, Failure, Reply, server::Server, types},
    dataplane::Dataplane,
    model::Admin,
};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
};
use tokio::sync::oneshot;

/// A directory of its own for each test, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("sluice-cli-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn sluice(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice"));
    command
        .args(arguments)
        .env_remove("SLUICE_SOCKET")
        .env_remove("RUST_LOG");
    command
}

/// What a failed check prints: everything there is to know about the command.
fn told(command: &Command, output: &Output) -> String {
    format!(
        "{command:?}: {}\nstdout:\n{}\nstderr:\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs a command that must succeed and returns what it prints.
fn prints(mut command: Command) -> String {
    let output = command.output().unwrap();
    let told = told(&command, &output);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{told}"
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that must fail with one line and returns the line.
fn fails(mut command: Command) -> String {
    let output = command.output().unwrap();
    let told = told(&command, &output);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(output.stdout.is_empty(), "{told}");
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.starts_with("sluice: ") && error.ends_with('\n'),
        "{told}"
    );
    assert_eq!(error.lines().count(), 1, "{told}");
    error.trim_end().to_owned()
}

/// A daemon with one service and `flows` connections.
struct Daemon {
    directory: Directory,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Daemon {
    fn start(flows: usize) -> Self {
        let directory = Directory::new();
        let socket = directory.file("control.sock");
        let (ready, is_ready) = std::sync::mpsc::channel();
        let (end, ended) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let server = Server::bind(&socket, None).await.unwrap();
                ready.send(()).unwrap();
                let ended = async {
                    let _ = ended.await;
                };
                server
                    .serve(Arc::new(Fixed { flows }), ended)
                    .await
                    .unwrap();
            });
        });
        is_ready.recv().unwrap();
        Self {
            directory,
            end: Some(end),
            thread: Some(thread),
        }
    }

    fn sluice(&self, arguments: &[&str]) -> Command {
        let mut command = sluice(arguments);
        command.env("SLUICE_SOCKET", self.directory.file("control.sock"));
        command
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.end.take().map(|end| end.send(()));
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

struct Fixed {
    flows: usize,
}

impl Control for Fixed {
    async fn services(&self) -> Reply<Vec<types::Service>> {
        Ok(vec![types::Service {
            name: "web".into(),
            listen: "198.51.100.10:80".into(),
            protocol: "tcp".into(),
            forward: "nat".into(),
            scheduler: "round-robin".into(),
            backends_up: 0,
            backends_total: 0,
            idle_timeout_seconds: 900.0,
            connect_timeout_seconds: None,
            gateway: None,
            health: "tcp".into(),
            traffic: types::Traffic {
                connections_total: 123_456,
                ..Default::default()
            },
        }])
    }

    async fn backends(&self, _: Option<String>) -> Reply<Vec<types::Backend>> {
        Ok(Vec::new())
    }

    async fn connections(&self, filter: ConnectionFilter) -> Reply<Vec<types::Connection>> {
        let flow = |number: usize| types::Connection {
            protocol: "tcp".into(),
            expires_seconds: 60.0,
            state: "ESTABLISHED".into(),
            source: format!("203.0.113.7:{}", 1024 + number % 60_000),
            virtual_address: "198.51.100.10:80".into(),
            destination: "10.0.0.11:3001".into(),
            nat_source: "10.0.0.1:1024".into(),
            service: "web".into(),
            backend: "app1".into(),
        };
        Ok((0..self.flows.min(filter.limit.unwrap_or(usize::MAX)))
            .map(flow)
            .collect())
    }

    async fn connection_count(&self, _: ConnectionFilter) -> Reply<u64> {
        Ok(self.flows as u64)
    }

    async fn connection_flush(&self, _: ConnectionFilter) -> Reply<u64> {
        Ok(self.flows as u64)
    }

    async fn drops(&self) -> Reply<Vec<types::Drops>> {
        Err(Failure::internal("map drops:\ncannot be read"))
    }

    async fn status(&self) -> Reply<types::Status> {
        Err(Failure::internal("not asked for here"))
    }

    async fn set_admin(&self, _: String, _: String, _: Admin) -> Reply<types::Backend> {
        Err(Failure::refused("not now"))
    }

    async fn open_flows(&self, _: String, _: String) -> Reply<types::OpenFlows> {
        Err(Failure::refused("not now"))
    }

    async fn stop(&self) -> Reply<()> {
        Err(Failure::refused("not now"))
    }

    async fn reload(&self) -> Reply<()> {
        Err(Failure::refused("not now"))
    }
}

#[test]
fn without_a_daemon_every_question_fails_with_the_remedy() {
    let directory = Directory::new();
    let socket = directory.file("control.sock");
    let socket = socket.to_str().unwrap();
    let expected = format!(
        "sluice: no daemon answers on {socket}; start it with: sudo sluice run --config FILE"
    );
    for arguments in [
        &["status"][..],
        &["stop"],
        &["service", "list"],
        &["service", "show", "web"],
        &["backend", "list"],
        &["conn", "list"],
        &["conn", "count"],
        &["stats", "--rate"],
        &["stats", "--drops", "-o", "json"],
    ] {
        assert_eq!(
            fails(sluice(&[&["--socket", socket], arguments].concat())),
            expected
        );
        // Global options may stand behind the command too.
        assert_eq!(
            fails(sluice(&[arguments, &["--socket", socket]].concat())),
            expected
        );
    }
    let mut by_environment = sluice(&["status"]);
    by_environment.env("SLUICE_SOCKET", socket);
    assert_eq!(fails(by_environment), expected);
}

#[test]
fn a_file_that_is_no_socket_is_named() {
    let directory = Directory::new();
    let file = directory.file("notes.txt");
    fs::write(&file, "").unwrap();
    let file = file.to_str().unwrap();
    let error = fails(sluice(&["status", "--socket", file]));
    assert!(error.contains(file), "{error}");
}

#[test]
fn wrong_usage_is_2() {
    for arguments in [
        &[][..],
        &["nonsense"],
        &["service"],
        &["service", "show"],
        &["backend", "list", "-o", "xml"],
        &["stats", "web", "--drops"],
        &["stats", "--rate", "--drops"],
        &["conn", "list", "--limit", "many"],
        &["completions", "tcsh"],
        &["run"],
        &[
            "run",
            "--config",
            "sluice.toml",
            "--socket",
            "/run/other.sock",
        ],
        &[
            "detach",
            "--config",
            "sluice.toml",
            "--pin-path",
            "/sys/fs/bpf/sluice",
        ],
    ] {
        let mut command = sluice(arguments);
        let output = command.output().unwrap();
        let told = told(&command, &output);
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(
            !output.stderr.is_empty() && output.stdout.is_empty(),
            "{told}"
        );
    }
}

#[test]
fn help_and_version_are_no_failures() {
    for arguments in [
        &["--help"][..],
        &["help", "conn", "list"],
        &["service", "show", "--help"],
        &["-V"],
    ] {
        assert!(!prints(sluice(arguments)).is_empty());
    }
    assert!(prints(sluice(&["completions", "bash"])).contains("_sluice"));
    assert!(prints(sluice(&["man"])).contains(".TH"));
}

#[test]
fn manual_pages_are_written_where_asked() {
    let directory = Directory::new();
    let text = prints(sluice(&["man", "--dir", directory.0.to_str().unwrap()]));
    assert!(text.is_empty());
    assert!(directory.file("sluice.1").exists() && directory.file("sluice-conn-list.1").exists());
    let missing = directory.file("missing");
    let error = fails(sluice(&["man", "--dir", missing.to_str().unwrap()]));
    assert!(error.contains("missing"), "{error}");
}

#[test]
fn a_configuration_is_judged_without_a_daemon() {
    let directory = Directory::new();
    let file = directory.file("sluice.toml");
    let shown = file.to_str().unwrap();
    let text = "\
        [daemon]\n\
        interfaces = [\"eth0\"]\n\
        [[service]]\n\
        name = \"web\"\n\
        listen = \"198.51.100.10:80\"\n\
        protocol = \"tcp\"\n\
        [[service.backend]]\n\
        address = \"10.0.0.11:3001\"\n";
    fs::write(&file, text).unwrap();
    let judgement = prints(sluice(&["config", "check", shown]));
    assert_eq!(judgement, format!("{shown}: ok, 1 service, 1 backend\n"));

    fs::write(&file, text.replace("protocol", "protokol")).unwrap();
    let error = fails(sluice(&["config", "check", shown]));
    let place = format!("sluice: {shown}:6: ");
    assert!(
        error.starts_with(&place) && error.contains("protocol"),
        "{error}"
    );

    assert_eq!(
        fails(sluice(&["run", "--config", shown])),
        error,
        "the daemon says the same"
    );

    fs::remove_file(&file).unwrap();
    let error = fails(sluice(&["config", "check", shown]));
    assert!(error.starts_with(&format!("sluice: {shown}: ")), "{error}");
    assert_eq!(fails(sluice(&["run", "--config", shown])), error);
    assert_eq!(fails(sluice(&["detach", "--config", shown])), error);
}

#[test]
fn listings_come_from_the_daemon() {
    let daemon = Daemon::start(2);
    let text = prints(daemon.sluice(&["service", "list"]));
    assert!(
        text.lines()
            .nth(1)
            .unwrap()
            .starts_with("web   198.51.100.10:80  tcp"),
        "{text}"
    );
    assert!(text.contains("123.5k") && !text.contains('\x1b'), "{text}");
    let json = prints(daemon.sluice(&["service", "list", "-o", "json"]));
    let services: Vec<types::Service> = serde_json::from_str(&json).unwrap();
    assert_eq!(services[0].traffic.connections_total, 123_456);
    assert_eq!(prints(daemon.sluice(&["conn", "count"])), "2\n");
    assert_eq!(
        prints(daemon.sluice(&["conn", "list", "--limit", "1"]))
            .lines()
            .count(),
        2
    );
    let rates = prints(daemon.sluice(&["stats", "198.51.100.10:80/tcp", "--rate", "-o", "json"]));
    let rates: serde_json::Value = serde_json::from_str(&rates).unwrap();
    assert_eq!(rates[0]["connections_per_second"], 0.0);
}

#[test]
fn an_empty_listing_is_a_heading_or_empty_brackets() {
    let daemon = Daemon::start(0);
    for arguments in [&["backend", "list"][..], &["conn", "list"]] {
        assert_eq!(prints(daemon.sluice(arguments)).lines().count(), 1);
        assert_eq!(
            prints(daemon.sluice(&[arguments, &["-o", "json"]].concat())),
            "[]\n"
        );
    }
}

#[test]
fn what_the_daemon_refuses_is_one_line() {
    let daemon = Daemon::start(0);
    let error = fails(daemon.sluice(&["service", "show", "mail"]));
    assert_eq!(
        error,
        "sluice: service \"mail\": not configured; known: web"
    );
    assert_eq!(
        fails(daemon.sluice(&["stats", "--drops"])),
        "sluice: map drops: cannot be read"
    );
    assert_eq!(fails(daemon.sluice(&["stop"])), "sluice: not now");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    // More than a pipe holds.
    let daemon = Daemon::start(20_000);
    let mut command = daemon.sluice(&["conn", "list"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::with_capacity(16, child.stdout.take().unwrap())
        .read_line(&mut first)
        .unwrap();
    assert!(first.starts_with("pro"), "{first}");
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        told(&command, &output)
    );
}

#[test]
fn output_that_cannot_be_written_is_a_failure() {
    assert!(Path::new("/dev/full").exists());
    let mut command = sluice(&["completions", "bash"]);
    command.stdout(fs::File::options().write(true).open("/dev/full").unwrap());
    let output = command
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.starts_with("sluice: cannot write to standard output: "),
        "{error}"
    );
}

/// A pin directory that is taken away in the end, whatever is in it.
struct Pins(PathBuf);

impl Drop for Pins {
    fn drop(&mut self) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let _ = fs::remove_file(entry.path());
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn maps_are_read_and_removed_without_a_daemon() {
    // SAFETY: a plain system call.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: only root may load BPF programs");
        return;
    }
    let directory = Directory::new();
    let pins = Pins(format!("/sys/fs/bpf/slc-cli-{}", std::process::id()).into());
    let path = pins.0.to_str().unwrap();
    let config = directory.file("sluice.toml");
    let socket = directory.file("control.sock");
    let text = format!(
        "[daemon]\ninterfaces = [\"eth0\"]\npin_path = \"{path}\"\nsocket = {socket:?}\n\
         [limits]\nflows = 1024\nservices = 16\nbackends = 32\nslots = 65536\n"
    );
    fs::write(&config, text).unwrap();
    let config_path = config.to_str().unwrap();

    let none = fails(sluice(&["map", "list", "--pin-path", path]));
    assert!(none.contains(path) && none.contains("sluice run"), "{none}");

    let parsed = sluice::config::Config::load(&config).unwrap();
    let settings = lb_common::abi::Settings {
        nat_port_seed: 7,
        ..bytemuck::Zeroable::zeroed()
    };
    let dataplane = Dataplane::open(&parsed.daemon, &parsed.limits, settings).unwrap();
    let backend = lb_common::backend::Backend {
        addr: lb_common::addr::from_ip("10.0.0.11".parse().unwrap()),
        port: 3001u16.to_be(),
        family: lb_common::addr::FAMILY_V4,
        ..bytemuck::Zeroable::zeroed()
    };
    dataplane.maps.backends.store(1, backend);
    drop(dataplane);

    let list = prints(sluice(&["map", "list", "--pin-path", path]));
    assert!(
        list.starts_with("Map") && list.lines().any(|l| l.starts_with("backends")),
        "{list}"
    );
    let json = prints(sluice(&["map", "list", "--pin-path", path, "-o", "json"]));
    let maps: Vec<types::MapStatus> = serde_json::from_str(&json).unwrap();
    assert!(
        maps.iter()
            .any(|map| map.name == "backends" && map.max_entries == 33),
        "{json}"
    );

    let dump = prints(sluice(&["map", "dump", "backends", "--pin-path", path]));
    assert_eq!(dump.lines().count(), 2, "{dump}");
    assert!(
        dump.starts_with("backend  ") && dump.contains("10.0.0.11  3001"),
        "{dump}"
    );
    let json = prints(sluice(&[
        "map",
        "dump",
        "backends",
        "--pin-path",
        path,
        "-o",
        "json",
    ]));
    let entries: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&entries[0]["backend"], &entries[0]["port"]),
        (&1.into(), &3001.into())
    );
    let empty = prints(sluice(&[
        "map",
        "dump",
        "flows4",
        "--pin-path",
        path,
        "-o",
        "json",
    ]));
    assert_eq!(empty, "[]\n");
    let unknown = fails(sluice(&["map", "dump", "flow", "--pin-path", path]));
    assert!(
        unknown.contains("\"flow\"") && unknown.contains("flows4"),
        "{unknown}"
    );

    // In a network namespace of its own: the neighbour entries it hands back are not this host's.
    let detach = || {
        let mut command = Command::new("unshare");
        command.args([
            "--net",
            env!("CARGO_BIN_EXE_sluice"),
            "detach",
            "--config",
            config_path,
        ]);
        command.env_remove("SLUICE_SOCKET");
        command
    };
    let removed = prints(detach());
    assert!(removed.contains(&format!("maps from {path}")), "{removed}");
    assert!(!pins.0.exists());
    assert_eq!(prints(detach()), format!("nothing to remove in {path}\n"));
}
