//! Networks of namespaces with real hosts, for end-to-end tests.
//!
//! ```text
//!  client ──┐
//!  lb ──────┤ bridge (namespace "fabric")
//!  b1…bn ───┘
//! ```
//!
//! Every host is a namespace with one interface `eth0`. A two-armed balancer has `eth1` too, and
//! the backends behind it on a segment of their own. Names begin with `slc-<pid>-<n>-`, so any
//! number of tests run side by side, and what a killed test left behind is recognised and removed
//! by the next one. Dropping a [`Topology`] ends its processes and removes everything.

use crate::packet::Mac;
use sluice::dataplane::{OwnedLink, attach_stub};
use std::{
    fmt::Write as _,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::{fd::AsRawFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// How long to wait for a condition before the test fails.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// IPv4 VIP of end-to-end tests; no kernel holds it.
pub const VIP4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// IPv6 VIP of end-to-end tests.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x80, 0, 0, 0, 0, 0x80);

/// A network of namespaces.
pub struct Topology {
    prefix: String,
    dir: PathBuf,
    hosts: Vec<String>,
    children: Mutex<Vec<Child>>,
    two_armed: bool,
    _stubs: Vec<OwnedLink>,
}

/// How a [`Topology`] is built.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Number of backends.
    pub backends: u8,
    /// Whether senders leave checksums to the hardware, as a veth does by default.
    pub tx_offload: bool,
    /// Whether the backends are behind a second interface of the balancer.
    pub two_armed: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            backends: 3,
            tx_offload: true,
            two_armed: false,
        }
    }
}

/// What a finished command said.
#[derive(Debug)]
pub struct Ran {
    /// The command line.
    pub command: String,
    /// Exit code; -1 after a signal.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Returns the standard output.
    ///
    /// # Panics
    /// If the exit code is not 0.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{}", self.report());
        self.stdout
    }

    /// Command, code and both outputs.
    #[must_use]
    pub fn report(&self) -> String {
        format!(
            "command: {}\nexit code: {}\nstdout:\n{}\nstderr:\n{}",
            self.command, self.code, self.stdout, self.stderr
        )
    }
}

impl Topology {
    /// Builds a client `client`, a balancer `lb` and backends `b1`, `b2` … on one segment.
    ///
    /// # Panics
    /// If the machine refuses.
    #[must_use]
    pub fn new(options: Options) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static SWEEP: OnceLock<()> = OnceLock::new();
        SWEEP.get_or_init(|| {
            remove_leftovers();
            mount_bpf_fs();
        });
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let prefix = format!("slc-{}-{number}", std::process::id());
        let dir = std::env::temp_dir().join(&prefix);
        fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));

        let fabric = format!("{prefix}-fabric");
        let mut hosts = vec!["client".to_owned(), "lb".to_owned()];
        hosts.extend((1..=options.backends).map(|n| format!("b{n}")));

        ip(&["netns", "add", &fabric]);
        quiet_ipv6(&fabric);
        for bridge in ["br0", "br1"] {
            ip(&[
                "-n",
                &fabric,
                "link",
                "add",
                bridge,
                "type",
                "bridge",
                "forward_delay",
                "0",
            ]);
            ip(&["-n", &fabric, "link", "set", bridge, "up"]);
        }
        let mut ports = vec!["p-lb"];
        for host in &hosts {
            let namespace = format!("{prefix}-{host}");
            ip(&["netns", "add", &namespace]);
            quiet_ipv6(&namespace);
            ip(&["-n", &namespace, "link", "set", "lo", "up"]);
            let behind = options.two_armed && host.starts_with('b');
            add_interface(&prefix, host, "eth0", u8::from(behind), options.tx_offload);
        }
        if options.two_armed {
            add_interface(&prefix, "lb", "eth1", 1, options.tx_offload);
            ports.push("p-lb1");
        }
        let client = format!("{prefix}-client");
        for vips in ["203.0.113.0/24", "2001:db8:80::/64"] {
            ip(&["-n", &client, "route", "add", vips, "dev", "eth0"]);
        }
        // A veth transmits what XDP sends back only if its peer runs a program of its own.
        let stubs = in_namespace(&fabric, || {
            ports
                .iter()
                .map(|port| {
                    attach_stub(port).unwrap_or_else(|e| panic!("stub program on {port}: {e:#}"))
                })
                .collect()
        });
        Self {
            prefix,
            dir,
            hosts,
            children: Mutex::new(Vec::new()),
            two_armed: options.two_armed,
            _stubs: stubs,
        }
    }

    /// A directory of this topology's own, removed with it.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where this topology's daemon keeps its pins.
    #[must_use]
    pub fn pin_path(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.prefix)
    }

    /// Where this topology's daemon listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// The name of a host's namespace.
    #[must_use]
    pub fn namespace(&self, host: &str) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// IPv4 address of a host.
    #[must_use]
    pub fn v4(&self, host: &str) -> Ipv4Addr {
        address4(host, self.segment(host))
    }

    /// IPv6 address of a host.
    #[must_use]
    pub fn v6(&self, host: &str) -> Ipv6Addr {
        address6(host, self.segment(host))
    }

    fn segment(&self, host: &str) -> u8 {
        u8::from(self.two_armed && host.starts_with('b'))
    }

    /// MAC address of a host.
    #[must_use]
    pub fn mac(&self, host: &str) -> Mac {
        mac(host, self.segment(host))
    }

    /// A command that will run on a host.
    #[must_use]
    pub fn command(&self, host: &str, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        enter(&mut command, &self.namespace(host));
        command
    }

    /// Runs a command on a host to its end.
    #[track_caller]
    pub fn run(&self, host: &str, program: impl AsRef<Path>, args: &[&str]) -> Ran {
        let mut command = self.command(host, program);
        command.args(args);
        finish(&mut command)
    }

    /// Runs `curl` on a host.
    #[track_caller]
    pub fn curl(&self, host: &str, args: &[&str]) -> Ran {
        let mut all = vec!["--silent", "--show-error", "--fail", "--max-time", "20"];
        all.extend(args);
        self.run(host, "curl", &all)
    }

    /// Starts a command on a host; it is killed with the topology. Its output goes to
    /// `<dir>/<label>.log`.
    ///
    /// Returns its process number.
    #[track_caller]
    pub fn spawn(&self, label: &str, mut command: Command) -> u32 {
        let path = self.dir.join(format!("{label}.log"));
        let log = fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let log2 = log.try_clone().expect("a second handle of a file");
        command
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log2)
            .process_group(0);
        let child = command
            .spawn()
            .unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let pid = child.id();
        self.children
            .lock()
            .expect("no test panics here")
            .push(child);
        pid
    }

    /// What a spawned command has written.
    #[must_use]
    pub fn log(&self, label: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{label}.log"))).unwrap_or_default()
    }

    /// Sends a signal to a spawned process.
    ///
    /// # Panics
    /// If there is no such process.
    pub fn signal(&self, pid: u32, signal: i32) {
        // SAFETY: plain system call.
        let result = unsafe { libc::kill(pid as i32, signal) };
        assert_eq!(
            result,
            0,
            "signal {signal} to process {pid}: {}",
            io::Error::last_os_error()
        );
    }

    /// Waits for a spawned process to end and returns its exit code, or -1 after a signal.
    ///
    /// # Panics
    /// If it does not end.
    pub fn wait_exit(&self, pid: u32) -> i32 {
        let mut code = None;
        wait_until(&format!("process {pid} to end"), || {
            code = self.exit_code(pid);
            code.is_some()
        });
        code.expect("it was waited for")
    }

    /// The exit code of a spawned process that has ended, or -1 after a signal.
    #[must_use]
    pub fn exit_code(&self, pid: u32) -> Option<i32> {
        let mut children = self.children.lock().expect("no test panics here");
        let child = children
            .iter_mut()
            .find(|c| c.id() == pid)
            .expect("it was spawned here");
        child
            .try_wait()
            .expect("a child can be waited for")
            .map(|status| status.code().unwrap_or(-1))
    }

    /// Kills a spawned process and waits until it is gone.
    pub fn kill(&self, pid: u32) {
        // The process group, so that workers go with their master.
        // SAFETY: plain system call.
        unsafe { libc::kill(-(pid as i32), libc::SIGKILL) };
        self.wait_exit(pid);
    }

    /// Runs `work` in a thread that is in a host's namespace.
    pub fn on<T: Send + 'static>(
        &self,
        host: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        in_namespace(&self.namespace(host), work)
    }

    /// Starts `work` in a thread that is in a host's namespace, and does not wait for it.
    pub fn background<T: Send + 'static>(
        &self,
        host: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> thread::JoinHandle<T> {
        let namespace = self.namespace(host);
        thread::spawn(move || {
            join_namespace(&namespace).unwrap_or_else(|e| panic!("namespace {namespace}: {e}"));
            work()
        })
    }

    /// Starts nginx on a backend. It answers `/` with the host's name, `/client` with the address it
    /// takes for its client's, and serves the files of
    /// [`Topology::www`]; `PUT /upload/<name>` stores a file there. Ports 8080 (HTTP), IPv4 and
    /// IPv6. Returns its process number.
    #[track_caller]
    pub fn nginx(&self, host: &str) -> u32 {
        let www = self.www(host);
        fs::create_dir_all(www.join("upload")).expect("a directory in our own");
        let conf = self.dir.join(format!("{host}.conf"));
        let dir = self.dir.join(format!("{host}-nginx"));
        fs::create_dir_all(&dir).expect("a directory in our own");
        let mut text = String::from("user root;\ndaemon off;\nworker_processes 1;\n");
        let _ = write!(
            text,
            "pid {dir}/pid;\nerror_log {dir}/error.log;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\n access_log off;\n client_max_body_size 64m;\n\
             client_body_temp_path {dir}/body;\n proxy_temp_path {dir}/proxy;\n\
             fastcgi_temp_path {dir}/fastcgi;\n uwsgi_temp_path {dir}/uwsgi;\n\
             scgi_temp_path {dir}/scgi;\n\
             server {{\n listen 0.0.0.0:8080 backlog=8192;\n listen [::]:8080 backlog=8192;\n\
             root {www};\n location = / {{ return 200 \"{host}\\n\"; }}\n\
             location /health {{ return 200 \"ok\\n\"; }}\n\
             location = /client {{ return 200 \"$remote_addr\\n\"; }}\n\
             location /upload/ {{ dav_methods PUT; }}\n }}\n}}\n",
            dir = dir.display(),
            www = www.display(),
        );
        fs::write(&conf, text).expect("a file in our own directory");
        let mut command = self.command(host, "nginx");
        command.arg("-c").arg(&conf);
        let pid = self.spawn(&format!("nginx-{host}"), command);
        wait_until(&format!("nginx on {host} to answer"), || {
            if self.exit_code(pid).is_some() {
                panic!(
                    "nginx on {host} ended:\n{}",
                    self.log(&format!("nginx-{host}"))
                );
            }
            self.curl(host, &["http://127.0.0.1:8080/health"]).code == 0
        });
        pid
    }

    /// The document root of a backend's nginx.
    #[must_use]
    pub fn www(&self, host: &str) -> PathBuf {
        self.dir.join(format!("{host}-www"))
    }

    /// The `[daemon]` section for this topology.
    #[must_use]
    pub fn daemon_section(&self) -> String {
        format!(
            "[daemon]\ninterfaces = [{}]\nmode = \"driver\"\npin_path = \"{}\"\nsocket = \"{}\"\n\
             [limits]\nflows = 65536\nservices = 64\nbackends = 256\nslots = 1048576\n",
            if self.two_armed {
                "\"eth0\", \"eth1\""
            } else {
                "\"eth0\""
            },
            self.pin_path().display(),
            self.socket().display()
        )
    }

    /// Writes a configuration and returns its path.
    pub fn config(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, text).expect("a file in our own directory");
        path
    }

    /// Starts the daemon in `lb` without waiting for anything. Returns its process number; its
    /// output is the log `label`.
    #[track_caller]
    pub fn start_daemon(&self, label: &str, config: &Path) -> u32 {
        let mut command = self.command("lb", sluice_bin());
        command.arg("run").arg("--config").arg(config);
        self.spawn(label, command)
    }

    /// Starts the daemon in `lb` and waits until it answers.
    #[track_caller]
    pub fn daemon(&self, config: &Path) -> u32 {
        let pid = self.start_daemon("sluice", config);
        wait_until("the daemon to answer", || {
            if let Some(code) = self.exit_code(pid) {
                panic!("the daemon ended with {code}:\n{}", self.log("sluice"));
            }
            self.sluice(&["status"]).code == 0
        });
        pid
    }

    /// Runs the command line against this topology's daemon.
    #[track_caller]
    pub fn sluice(&self, args: &[&str]) -> Ran {
        let mut command = self.command("lb", sluice_bin());
        command.env("SLUICE_SOCKET", self.socket()).args(args);
        finish(&mut command)
    }

    /// Runs a command of the command line and parses its JSON.
    ///
    /// # Panics
    /// If it fails or does not write JSON.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let ran = self.sluice(&all);
        assert_eq!(ran.code, 0, "{}", ran.report());
        serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|e| panic!("not JSON: {e}\n{}", ran.report()))
    }

    /// Waits until exactly `count` backends of `service` are up, or of all services together.
    #[track_caller]
    pub fn wait_backends_up(&self, service: Option<&str>, count: usize) {
        let mut last = serde_json::Value::Null;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut args = vec!["backend", "list"];
            args.extend(service);
            let list = self.json(&args);
            let up = list
                .as_array()
                .map_or(0, |l| l.iter().filter(|b| b["state"] == "up").count());
            if up == count {
                return;
            }
            if Instant::now() > deadline {
                panic!(
                    "{count} backends should be up: {list:#}\nbefore: {last:#}\nlog:\n{}",
                    self.log("sluice")
                );
            }
            last = list;
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        if thread::panicking() {
            for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|e| e == "log") {
                    let text = fs::read_to_string(&path).unwrap_or_default();
                    let from = text.len().saturating_sub(4000);
                    let text = text.get(from..).unwrap_or(&text);
                    eprintln!("--- {}\n{text}", path.display());
                }
            }
        }
        let children = match self.children.get_mut() {
            Ok(children) => children,
            Err(poisoned) => poisoned.into_inner(),
        };
        for child in children.iter_mut() {
            if matches!(child.try_wait(), Ok(None)) {
                // SAFETY: plain system call; the child leads its group and has not been reaped.
                unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
                let _ = child.wait();
            }
        }
        remove(&self.prefix, &self.hosts);
    }
}

fn remove(prefix: &str, hosts: &[String]) {
    for host in hosts.iter().map(String::as_str).chain(["fabric"]) {
        let name = format!("{prefix}-{host}");
        if Path::new("/run/netns").join(&name).exists() {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
    let _ = fs::remove_dir_all(Path::new("/sys/fs/bpf").join(prefix));
    let _ = fs::remove_dir_all(std::env::temp_dir().join(prefix));
}

/// Removes what test processes that no longer run have left behind.
fn remove_leftovers() {
    let mut names: Vec<String> = Vec::new();
    for dir in ["/run/netns", "/sys/fs/bpf", "/tmp"] {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            names.extend(entry.file_name().to_str().map(str::to_owned));
        }
    }
    for name in names {
        let mut parts = name.splitn(4, '-');
        let (Some("slc"), Some(pid), Some(number)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        if pid.parse::<u32>().is_err() || Path::new("/proc").join(pid).exists() {
            continue;
        }
        let host: Vec<String> = parts.next().map(str::to_owned).into_iter().collect();
        remove(&format!("slc-{pid}-{number}"), &host);
    }
}

fn mount_bpf_fs() {
    let mounted = fs::read_to_string("/proc/self/mounts")
        .unwrap_or_default()
        .lines()
        .any(|line| line.split(' ').nth(1) == Some("/sys/fs/bpf"));
    if !mounted {
        finish(Command::new("mount").args(["-t", "bpf", "bpf", "/sys/fs/bpf"])).ok();
    }
}

fn host_number(host: &str) -> u8 {
    match host {
        "lb" => 1,
        "client" => 2,
        _ => 10 + host[1..].parse::<u8>().expect("backends are named b<n>"),
    }
}

fn address4(host: &str, segment: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, segment, host_number(host))
}

fn address6(host: &str, segment: u8) -> Ipv6Addr {
    let (segment, host) = (u16::from(segment), u16::from(host_number(host)));
    Ipv6Addr::new(0x2001, 0xdb8, segment, 0, 0, 0, 0, host)
}

fn mac(host: &str, segment: u8) -> Mac {
    [0x02, 0x51, 0x1c, 0xe0, segment, host_number(host)]
}

/// Connects a host to the bridge of a segment.
fn add_interface(prefix: &str, host: &str, name: &str, segment: u8, tx_offload: bool) {
    let (fabric, namespace) = (format!("{prefix}-fabric"), format!("{prefix}-{host}"));
    let port = if name == "eth0" {
        format!("p-{host}")
    } else {
        format!("p-{host}1")
    };
    let mac = mac(host, segment).map(|b| format!("{b:02x}")).join(":");
    ip(&[
        "-n", &fabric, "link", "add", &port, "type", "veth", "peer", "name", name, "address", &mac,
        "netns", &namespace,
    ]);
    let bridge = format!("br{segment}");
    ip(&["-n", &fabric, "link", "set", &port, "master", &bridge, "up"]);
    if !tx_offload {
        in_namespace(&namespace, || {
            finish(Command::new("ethtool").args(["-K", name, "tx", "off"])).ok();
        });
    }
    let with = |args: &[&str]| ip(&[&["-n", &namespace], args].concat());
    with(&["link", "set", name, "up"]);
    let v4 = format!("{}/24", address4(host, segment));
    with(&["addr", "add", &v4, "dev", name]);
    let v6 = format!("{}/64", address6(host, segment));
    with(&["addr", "add", &v6, "dev", name, "nodad"]);
}

/// Duplicate address detection would hold IPv6 back for a second.
fn quiet_ipv6(namespace: &str) {
    in_namespace(namespace, || {
        for which in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{which}/accept_dad");
            fs::write(&path, "0").unwrap_or_else(|e| panic!("{path}: {e}"));
        }
    });
}

/// Runs `ip`.
#[track_caller]
fn ip(args: &[&str]) {
    finish(Command::new("ip").args(args)).ok();
}

/// Runs a command to its end.
#[track_caller]
pub fn finish(command: &mut Command) -> Ran {
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    Ran {
        command: format!("{command:?}"),
        code: status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&stdout).into_owned(),
        stderr: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

/// Lets a command start in a namespace and die with the thread that starts it.
///
/// Unlike `ip netns exec` it leaves the mounts alone: that one hides `/sys/fs/bpf`.
fn enter(command: &mut Command, namespace: &str) {
    let path = Path::new("/run/netns").join(namespace);
    let file = fs::File::open(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // SAFETY: between fork and exec only two system calls are made, nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            if libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) != 0
                || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0
            {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

fn join_namespace(namespace: &str) -> io::Result<()> {
    let file = fs::File::open(Path::new("/run/netns").join(namespace))?;
    // SAFETY: plain system call; it changes this thread only.
    if unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Runs `work` in a thread of its own that is in a namespace.
///
/// # Panics
/// If the namespace cannot be entered, or with the panic of `work`.
pub fn in_namespace<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            join_namespace(namespace).unwrap_or_else(|e| panic!("namespace {namespace}: {e}"));
            work()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within [`PATIENCE`].
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "waited {PATIENCE:?} for {what}, in vain"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

/// The binary under test: `SLUICE_BIN`, or built from this workspace.
///
/// # Panics
/// If it cannot be built.
pub fn sluice_bin() -> PathBuf {
    static BIN: OnceLock<PathBuf> = OnceLock::new();
    BIN.get_or_init(|| {
        if let Some(bin) = std::env::var_os("SLUICE_BIN").filter(|b| !b.is_empty()) {
            return bin.into();
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command
            .args(["build", "-p", "lb-userspace", "--bin", "sluice"])
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        finish(&mut command).ok();
        // A test runs from target/<profile>/deps.
        let exe = std::env::current_exe().expect("a test knows its own file");
        exe.ancestors()
            .nth(3)
            .expect("a test lies in target/<profile>/deps")
            .join("debug/sluice")
    })
    .clone()
}

/// A URL of an address and port.
#[must_use]
pub fn url(ip: impl Into<IpAddr>, port: u16, path: &str) -> String {
    format!(
        "http://{}{path}",
        std::net::SocketAddr::new(ip.into(), port)
    )
}
